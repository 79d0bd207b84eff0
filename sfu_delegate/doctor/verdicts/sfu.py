"""What was seen at an SFU, and what it means."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from sfu_delegate.doctor.findings import Finding, ok, problem, skipped, warning
from sfu_delegate.doctor.words import counted, listed, spoken
from sfu_delegate.livekit.room_service import Trouble
from sfu_delegate.livekit.webhook import Refusal

LATE: Final = 2.0  # seconds: beyond the first repetition
WEBHOOK_PATH: Final = "/webhooks/livekit"
AWAITED: Final = ("room_started", "room_finished")


@dataclass(frozen=True, slots=True)
class KeyTried:
    """One API key. `trouble` is None where it was accepted."""

    key: str
    trouble: Trouble | None = None
    sentence: str = ""


def judge_answers(seen: Sequence[KeyTried], seconds: float) -> Finding:
    """Can the SFU be asked? The first key is the one that the daemon asks with."""
    first, others = seen[0], seen[1:]
    if first.trouble is not None:
        return problem(first.sentence.rstrip("."), _REMEDIES[first.trouble])
    refused = [one.key for one in others if one.trouble is Trouble.REFUSED]
    if refused:
        remedy = "remove it here, or give it its secret as LiveKit's `keys` have it: webhooks and participants' tokens that it signed are refused"
        return warning(f"it answers, and takes key {first.key}, but not {listed(refused)}", remedy)
    keys = "key" if len(seen) == 1 else "keys"
    return ok(f"it answers within {spoken(seconds)}, and takes the {keys} {listed([one.key for one in seen])}")


_URL: Final = "check sfus.*.url, and that this machine reaches it"
_REMEDIES: Final = {
    Trouble.TIMEOUT: _URL,
    Trouble.CONNECTION: _URL,
    Trouble.TLS: "give the SFU's reverse proxy a certificate for this name, from an authority that this machine trusts",
    Trouble.REFUSED: "give sfus.*.keys the key and the secret of LiveKit's `keys`, to the letter; and look at the clocks",
    Trouble.ERROR: "look at LiveKit's log",
    Trouble.ANSWER: "let sfus.*.url lead to LiveKit itself, its path included; a proxy must pass /twirp/ on",
}


@dataclass(frozen=True, slots=True)
class Came:
    """A webhook that has come."""

    after: float  # seconds, since what it tells of was done
    sfu: str  # whose key has signed it


@dataclass(frozen=True, slots=True)
class Heard:
    """What came of a room that was made and deleted."""

    sfu: str
    waited: float  # seconds at the most
    by_daemon: bool  # it was the daemon that listened, and not we
    webhooks: Mapping[str, Came] = field(default_factory=dict)  # by event
    refused: Mapping[str, int] = field(default_factory=dict)  # by the reason: those of this room; by the daemon, all meanwhile
    misdirected: str = ""  # a path to which they came, and where the daemon hears none
    untold: str = ""  # why the daemon could not be asked, or the port not be listened at
    others: int = 0  # further instances of the daemon, which may have heard it


@dataclass(frozen=True, slots=True)
class Wanted:
    """What LiveKit's configuration has to say."""

    key: str
    url: str

    @property
    def remedy(self) -> str:
        """For people, as lines of LiveKit's configuration."""
        return (
            f"livekit.yaml needs, with the public listener as LiveKit's machine reaches it, and a restart of LiveKit:\n"
            f"webhook:\n  api_key: {self.key}\n  urls:\n    - {self.url}"
        )


def judge_webhooks(seen: Heard, wanted: Wanted) -> Finding:
    """Are webhooks configured, and do they come to us?"""
    if seen.untold:
        return skipped(f"whether webhooks come cannot be told: {seen.untold}", wanted.remedy)
    came = [event for event in AWAITED if event in seen.webhooks]
    foreign = {one.sfu for one in seen.webhooks.values()} - {seen.sfu}
    if foreign:
        remedy = f"let webhook.api_key in LiveKit's configuration be a key of sfus.{seen.sfu}: by the key it is told which SFU a webhook comes from"
        return problem(f"they come signed with a key of sfus.{listed(sorted(foreign))}", remedy)
    if not came and seen.misdirected:
        return problem(f"they come to the path {seen.misdirected[:100]!r}, where the daemon hears none", wanted.remedy)
    if not came and seen.refused:
        return _refused(seen, wanted)
    if not came:
        away = f"neither {listed(AWAITED, 'nor')} came within {spoken(seen.waited)} after a room was made and deleted"
        if seen.others:
            remedy = f"fine if LiveKit's url leads to one of the others: run this there. Otherwise {wanted.remedy}"
            return warning(f"{away}; {counted(seen.others, 'other instance')} may have got them", remedy)
        return problem(away, wanted.remedy)
    slowest = max(one.after for one in seen.webhooks.values())
    to = "came to the daemon" if seen.by_daemon else f"came to {wanted.url.partition('://')[2].partition('/')[0]} (where this command listened)"
    if len(came) < len(AWAITED):
        missing = next(event for event in AWAITED if event not in seen.webhooks)
        remedy = "look at LiveKit's log, and at livekit_webhook_dispatch_total: webhooks get lost on their way"
        return warning(f"{came[0]} {to} after {spoken(slowest)}, and {missing} did not within {spoken(seen.waited)}", remedy)
    if slowest > LATE:
        remedy = "look at what is between LiveKit and us, such as a proxy that is not always there: LiveKit repeats what fails after 1, 3, 7 and 15 s"
        return warning(f"both {to}, but late: after {spoken(slowest)}", remedy)
    return ok(f"{listed(AWAITED)} of a room that was made and deleted {to} within {spoken(slowest)}")


def _refused(seen: Heard, wanted: Wanted) -> Finding:
    reasons = set(seen.refused)
    of_whom = "meanwhile the daemon refused" if seen.by_daemon else "they come, and are refused (401):"
    counts = listed([f"{counted(count, 'webhook')} ({reason})" for reason, count in seen.refused.items()])
    evidence = f"{of_whom} {counts}"
    if seen.by_daemon:
        evidence = f"none was accepted; {evidence}"
    if reasons <= {Refusal.EXPIRED, Refusal.NOT_YET_VALID}:
        return problem(f"{evidence}: the clocks differ", "synchronise the clocks of this machine and of the SFU's")
    if Refusal.UNKNOWN_KEY in reasons:
        return problem(f"{evidence}: signed with an API key that is not one of sfus.*.keys", f"use the same key on both sides: {wanted.remedy}")
    if Refusal.BAD_SIGNATURE in reasons:
        remedy = "give sfus.*.keys the secret that LiveKit's `keys` have for this key, to the letter"
        return problem(f"{evidence}: the key is known, and its secret another one", remedy)
    return problem(
        f"{evidence}: not signed as LiveKit does", "let a proxy between LiveKit and us leave the Authorization header and the body as they are"
    )
