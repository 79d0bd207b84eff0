"""What was seen at a homeserver, and what it means."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import ceil
from typing import Final

from sfu_delegate.config import format_duration
from sfu_delegate.doctor.findings import Finding, ok, problem, skipped, warning
from sfu_delegate.doctor.words import counted, listed, spoken
from sfu_delegate.matrix.management import Generation
from sfu_delegate.matrix.service import Findings, Part

CALL: Final = 500  # people who leave at once, for saying what a limit means
BEARABLE: Final = 60.0  # seconds until the last of them is gone
USUAL_DELAY: Final = 3600.0  # seconds: what clients are told to schedule
ACTIONS: Final = ("restart", "send", "cancel")

GENERATIONS: Final = {
    Generation.A: "the original text, with the action in the body, at /_matrix/client/v1",
    Generation.B: "unstable, with the action in the body",
    Generation.C: "unstable, with the action in the path",
    Generation.D: "stable, with the action in the path, at /_matrix/client/v1",
}
_PRIVATE: Final = "must not be reached"
_OWN_NETWORK: Final = "; or, if it is in a network of your own, set homeservers[].allow_private_addresses: true"
_WITHOUT_SERVICE: Final = "register the application service to lift it: `sfu-delegate appservice` writes what is needed; or raise Synapse's"
_WITHOUT_SERVICE_END: Final = "rc_delayed_event_mgmt, which then holds for every client, too"


# ── delayed events ──


class Served(StrEnum):
    """Is an endpoint there? Found out by a method that it does not have."""

    YES = "served"
    NO = "not there"
    ELSE = "answered by something else"  # no Matrix error: a proxy's
    UNKNOWN = "not told"


@dataclass(frozen=True, slots=True)
class Offered:
    """The management API."""

    generations: Sequence[Generation]  # that `/versions` announces, the best first
    endpoints: Mapping[str, Served]  # of the best one, by action


def judge_delayed_events(seen: Offered) -> Finding:
    """Are they on, and can they be managed?"""
    if not seen.generations:
        remedy = "Synapse: set `max_event_delay_duration: 24h` in homeserver.yaml and restart it; other homeservers must have MSC4140"
        return problem("delayed events are off: /_matrix/client/versions does not announce org.matrix.msc4140", remedy)
    best = seen.generations[0]
    announced = f"on; generation {best.name} of the API ({GENERATIONS[best]})"
    wrong = {action: state for action, state in seen.endpoints.items() if state in (Served.NO, Served.ELSE)}
    if not wrong:
        there = [action for action, state in seen.endpoints.items() if state is Served.YES]
        untold = [action for action, state in seen.endpoints.items() if state is Served.UNKNOWN]
        what = f"; {listed(there)} {'is' if len(there) == 1 else 'are'} served" if there else ""
        return ok(announced + what + (f"; whether {listed(untold, 'or')} is served cannot be told without trying" if untold else ""))
    what = "; ".join(f"{action} is {state}" for action, state in wrong.items())
    prefix = "/_matrix/client/v1/delayed_events/" if best in (Generation.A, Generation.D) else "/_matrix/client/unstable/org.matrix.msc4140/"
    remedy = f"let the reverse proxy pass {prefix}… on to the homeserver (send and cancel to Synapse's main process)"
    return problem(f"{announced}, but {what}", remedy)


@dataclass(frozen=True, slots=True)
class Capability:
    """What the homeserver allows each user. Seconds, and delayed events at a time; None: it does not say."""

    longest: float | None
    scheduled: int | None


def judge_largest_delay(seen: Capability, least: float) -> Finding:
    """Is the largest delay enough? `least` is the shortest one, in seconds, that the daemon takes (delegations.min_delay)."""
    if seen.longest is None:
        return skipped("it does not tell that among its capabilities", "let it be an hour or more (Synapse: max_event_delay_duration)")
    at_a_time = f"; a user may have {seen.scheduled} at a time" if seen.scheduled is not None else ""
    evidence = f"{format_duration(seen.longest)} is the longest that it allows{at_a_time}"
    remedy = "raise it (Synapse: `max_event_delay_duration: 24h`, and a restart)"
    if seen.longest <= 0:
        return problem(f"it allows no delay at all{at_a_time}", remedy)
    if seen.longest < least:
        return problem(f"{evidence}, and delegations.min_delay is {format_duration(least)}: nothing can be delegated", remedy)
    if seen.longest < USUAL_DELAY:
        return warning(f"{evidence}: clients that schedule their leave event in an hour, as they should, are refused", remedy)
    return ok(evidence)


# ── the rate limit ──


class Way(StrEnum):
    """How the limit was found out."""

    MEASURED = "measured"
    LEARNED = "as the daemon has learned"
    GIVEN = "as the configuration says"


@dataclass(frozen=True, slots=True)
class Limit:
    """The limit of delayed events' management, as it holds for the daemon."""

    way: Way
    service: bool  # there is an as_token
    limited: bool | None  # None: not known
    rate: float | None = None  # actions a second
    burst: float | None = None  # actions
    tried: int = 0  # requests, where it was measured
    granted: int = 0


@dataclass(frozen=True, slots=True)
class Refused:
    """A refusal. Seconds."""

    wait: float | None  # that it asks to wait
    after: float  # since the first of the requests before it was sent, or since one more was allowed


def measured(granted: int, tried: int, first: Refused | None = None, again: Refused | None = None, *, service: bool) -> Limit:
    """What a few requests, one after the other, have shown: so many were granted, until `first`. `again` came after the one that was granted when the
    time was over that `first` had named.

    The homeserver has a bucket, which leaks. Nobody knows what was in it before; but when that time was over it had room for just one, so that
    another one has to wait from then on until one has leaked away. Without `again`, the bucket is taken for empty at the beginning.
    """
    if first is None:
        return Limit(Way.MEASURED, service, False, tried=tried, granted=granted)
    if first.wait is None:
        return Limit(Way.MEASURED, service, True, tried=tried, granted=granted)
    full = again if again is not None and again.wait is not None else first
    rate = _rounded(1.0 / max((full.wait or 0.0) + full.after, 1e-3))
    burst = float(max(ceil(granted + 0.9 - (first.wait + first.after) * rate), 1)) if granted else None
    return Limit(Way.MEASURED, service, True, rate, burst, tried, granted)


def _rounded(rate: float) -> float:
    """Requests take their time, so it is not exact; and what operators write is a round number."""
    round_one = float(f"{rate:.1g}")
    return round_one if abs(rate / round_one - 1) <= 0.05 else float(f"{rate:.2g}")


def judge_limit(seen: Limit) -> Finding:
    """What the limit means, in numbers."""
    if seen.limited is None:
        if seen.service:
            return ok(f"none, as far as is known: there is an application service, and the daemon has met no limit ({seen.way})")
        remedy = "run this while the daemon is stopped to have it measured; or register the application service: `sfu-delegate appservice`"
        return skipped("the daemon runs and has not met a limit yet; measuring would use up what it may need", remedy)
    if not seen.limited:
        if seen.way is Way.MEASURED:
            asked = "as the application service" if seen.service else "without a token"
            return ok(f"none: {seen.granted} of {seen.tried} requests at once were granted ({seen.way}, {asked})")
        return ok(f"none ({seen.way})")
    remedy = (
        "the application service is limited: set `rate_limited: false` in its registration (`sfu-delegate appservice` does), and restart Synapse"
        if seen.service
        else f"{_WITHOUT_SERVICE} {_WITHOUT_SERVICE_END}"
    )
    if seen.rate is None:
        return warning(f"limited, and the homeserver does not say how long to wait ({seen.way})", remedy)
    burst = seen.burst or 0.0
    seconds = max(0.0, CALL - burst) / seen.rate
    limit = f"{seen.rate:g} action{'' if seen.rate == 1 else 's'} a second" + (f", burst {burst:g}" if burst else "")
    takes = f"takes {spoken(seconds)} to clear" if seconds else "is cleared at once"
    evidence = f"a call of {CALL} that ends at once {takes} ({limit}; {seen.way})"
    return ok(evidence) if seconds <= BEARABLE and not seen.service else warning(evidence, remedy)


# ── the application service ──


@dataclass(frozen=True, slots=True)
class Tried:
    """What was tried of an application service."""

    findings: Findings
    passes_on: bool  # there is an hs_token: it is to forward clients' requests
    daemon: bool  # does a daemon run, to which they could be forwarded?


def judge_service(seen: Tried) -> Finding:
    """Does all of it work?"""
    defects = [defect for defect in seen.findings.defects if seen.daemon or defect.part is not Part.PROXY]
    if defects:
        what = "; ".join(f"{defect.part}: {defect.problem}" for defect in defects)
        return problem(what, "; ".join(dict.fromkeys(defect.remedy for defect in defects)))
    tried = [part.value for part in Part if part in seen.findings.tried and (seen.daemon or part is not Part.PROXY)]
    evidence = f"{listed(tried)} work{'s' if len(tried) == 1 else ''}"
    if not seen.passes_on:
        return ok(f"{evidence}; there is no hs_token, so clients cannot delegate through the homeserver")
    if not seen.daemon:
        return ok(f"{evidence}; the way back to the daemon was not tried, since none runs", "run this again when the daemon runs")
    return ok(evidence)


# ── federation ──


@dataclass(frozen=True, slots=True)
class Asked:
    """What was answered to an OpenID token that nobody has issued. `trouble`: why nothing was, or not the homeserver's word; "" for a refusal."""

    trouble: str = ""
    believed: bool = False  # it vouches for a made-up token


def judge_federation(seen: Asked, *, needed: bool) -> Finding:
    """Can it be asked whose a token is? `needed`: the standalone endpoints are on, which ask that."""
    if seen.believed:
        return problem("it vouches for a token that was made up: whatever answers there is no homeserver", "check homeservers[].federation_url")
    if not seen.trouble:
        return ok("a made-up OpenID token is refused by the homeserver itself, as it should be")
    remedy = "let this machine reach its federation API (port 8448, or as .well-known/matrix/server or SRV records say), or set federation_url"
    remedy += _OWN_NETWORK if _PRIVATE in seen.trouble else ""
    if needed:
        return problem(f"{seen.trouble}: nobody of it gets a token at /get_token and /sfu/get", remedy)
    return warning(seen.trouble, f"{remedy}; only the standalone endpoints need it, and matrixrtc.enabled is false")


# ── what clients find ──


class Answers(StrEnum):
    """What is at a `livekit_service_url`."""

    OURS = "ours"
    ELSE = "else"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Focus:
    """One of the services that the homeserver's `.well-known` names."""

    url: str
    answers: Answers
    detail: str = ""


@dataclass(frozen=True, slots=True)
class WellKnown:
    """`.well-known/matrix/client`. `trouble`: why it cannot be read."""

    trouble: str = ""
    foci: Sequence[Focus] = ()
    cross_origin: bool = True  # pages of other origins may read it


def judge_well_known(seen: WellKnown, *, daemon: bool, standalone: bool) -> Finding:
    """Do clients find the daemon? `standalone`: the endpoints are on that they would look for."""
    if seen.trouble:
        remedy = "clients look there for their call service: see the README, step 5; fine if your homeserver announces it in another way"
        return warning(f"it cannot be read from here: {seen.trouble}", remedy + (_OWN_NETWORK if _PRIVATE in seen.trouble else ""))
    if not seen.foci:
        remedy = 'add "org.matrix.msc4143.rtc_foci": [{"type": "livekit", "livekit_service_url": "https://…"}]: see the README, step 5'
        if not standalone:
            return ok("it names no livekit_service_url; the standalone endpoints are off")
        return warning("it names no livekit_service_url: clients such as Element Call cannot find the daemon", remedy)
    names = listed([focus.url for focus in seen.foci])
    wrong = [focus for focus in seen.foci if focus.answers is not Answers.OURS]
    if wrong and not daemon and all(focus.answers is Answers.NONE for focus in wrong):
        return skipped(f"it names {names}, where nothing answers while the daemon does not run", "run this again when the daemon runs")
    if wrong:
        what = "; ".join(f"{focus.url}: {focus.detail}" for focus in wrong)
        some = "" if len(wrong) == len(seen.foci) else f"; {counted(len(seen.foci) - len(wrong), 'other one is', 'others are')} a sfu-delegate"
        remedy = "let the reverse proxy pass that path on to `listen`, without it (README, step 5): <livekit_service_url>/healthz must answer"
        return warning(f"{what}{some}", remedy)
    if not seen.cross_origin:
        remedy = "send it with the header `Access-Control-Allow-Origin: *`"
        return warning(f"it names {names}, where a sfu-delegate answers; but pages of other origins may not read it", remedy)
    return ok(f"it names {names}, where a sfu-delegate answers")
