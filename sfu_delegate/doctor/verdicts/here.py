"""What was seen on this machine, the configuration and the daemon, and what it means."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from sfu_delegate.config import Problem
from sfu_delegate.doctor.findings import Finding, ok, problem, skipped, warning
from sfu_delegate.doctor.words import counted

_READABLE: Final = "chmod o= "  # begins the remedy of a file of secrets that everybody may read


# ── the configuration ──


def is_of_a_file(risk: Problem) -> bool:
    """Is it about who may read a file? That has a check of its own."""
    return risk.remedy.startswith(_READABLE)


def judge_config(problems: Sequence[Problem], risks: Sequence[Problem]) -> Finding:
    """Can it be used, and is it what is meant?"""
    if problems:
        return problem(_lines(problems), _remedies(problems))
    risks = [risk for risk in risks if not is_of_a_file(risk)]
    if risks:
        return warning(_lines(risks), _remedies(risks))
    return ok("it can be used, and nothing in it is risky")


def _lines(problems: Sequence[Problem]) -> str:
    return "\n".join(f"{one.key or one.value or 'the file'}{f' ({one.where})' if one.where else ''}: {one.problem}" for one in problems)


def _remedies(problems: Sequence[Problem]) -> str:
    if len(problems) == 1:
        return problems[0].remedy
    return "\n".join(f"{one.key or one.value or 'the file'}: {one.remedy}" for one in problems)


@dataclass(frozen=True, slots=True)
class SecretFile:
    """A file that holds secrets, and its mode; None: it cannot be looked at."""

    path: str
    mode: int | None


def judge_files(seen: Sequence[SecretFile]) -> Finding:
    """May anybody read them who should not?"""
    there = [one for one in seen if one.mode is not None]
    if not there:
        if not seen:
            return ok("there are none yet")
        return skipped("none of them can be looked at from here", "run this as root, or as the daemon's user")
    open_to_all = {one.path: _may(one.mode) for one in there if one.mode is not None and _may(one.mode)}
    if not open_to_all:
        return ok(f"nobody but owner and group may read the {counted(len(there), 'file')} with secrets")
    what = "\n".join(f"{path}: every user of this machine may {may} it" for path, may in open_to_all.items())
    return warning(what, f"{_READABLE}{' '.join(open_to_all)}; replace what others may have read")


def _may(mode: int) -> str:
    return " and ".join(word for bit, word in ((0o004, "read"), (0o002, "write")) if mode & bit)


# ── the daemon ──


class Daemon(StrEnum):
    """Is there one with this configuration?"""

    RUNS = "runs"
    HIDDEN = "hidden"  # it seems so, but it cannot be asked
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Seen:
    """What is to be seen of the daemon, and how."""

    daemon: Daemon
    place: str = ""  # of its admin listener
    trouble: str = ""  # why that cannot be asked
    signs: Sequence[str] = ()  # by which it seems to run
    status: int = 0  # of /health/ready
    ready: Mapping[str, Any] = field(default_factory=dict)  # … and what it says


def judge_daemon(seen: Seen) -> Finding:
    """Does it run, and is it well?"""
    if seen.daemon is Daemon.NONE:
        return skipped("no daemon runs with this configuration", "start it when this shows no problems")
    if seen.daemon is Daemon.HIDDEN:
        remedy = "check `admin`; run this on the daemon's machine (in its container), with its configuration, as root or as its user"
        return problem(f"a daemon seems to run ({'; '.join(seen.signs)}), but its admin listener cannot be asked: {seen.trouble}", remedy)
    said = _troubles(seen.ready)
    if seen.status == 200 and not said:
        return ok(f"it answers at {seen.place}, and is ready")
    if seen.status == 200:
        return warning(f"it is ready, and says: {'; '.join(said)}", "see the other checks, and the daemon's log")
    remedy = "see `database` below; without it nothing can be delegated, and no webhook kept"
    return problem(
        f"it is not ready ({seen.status} at {seen.place}/health/ready): {'; '.join(said) or seen.ready.get('phase', 'no reason given')}", remedy
    )


def _troubles(ready: Mapping[str, Any]) -> list[str]:
    said = []
    if (database := ready.get("database", "ok")) != "ok":
        said.append(f"database: {database}")
    for kind, word in (("homeservers", "homeserver"), ("sfus", "SFU"), ("application_services", "application service of")):
        conditions = ready.get(kind)
        if isinstance(conditions, Mapping):
            said += [f"{word} {name}: {condition}" for name, condition in conditions.items() if condition not in ("ok", "not asked yet")]
    return said


class Port(StrEnum):
    """What is at the public listener's address."""

    OURS = "ours"  # a sfu-delegate answers
    FREE = "free"
    TAKEN = "taken"  # somebody listens, and is no sfu-delegate
    FORBIDDEN = "forbidden"  # it cannot be bound, by us at least


@dataclass(frozen=True, slots=True)
class Public:
    """The public listener."""

    place: str
    port: Port
    detail: str = ""


def judge_public(seen: Public, daemon: Daemon) -> Finding:
    """Can clients, LiveKit and homeservers reach it?"""
    match seen.port:
        case Port.OURS if daemon is Daemon.NONE:
            return warning(
                f"a sfu-delegate answers at {seen.place}, though none was found with this configuration's admin listener",
                "stop it before you start another one, or give this one an address of its own (listen.port)",
            )
        case Port.OURS:
            return ok(f"a sfu-delegate answers at {seen.place}")
        case Port.FREE if daemon is Daemon.NONE:
            return ok(f"{seen.place} is free for the daemon")
        case Port.FREE:
            return problem(f"the daemon runs, and nothing listens at {seen.place}", "restart the daemon: it still has another `listen`")
        case Port.TAKEN:
            remedy = "stop that program, or change listen.port, with what leads there: reverse proxy, LiveKit's webhook.urls, proxy_url"
            return problem(f"another program holds {seen.place}{f': {seen.detail}' if seen.detail else ''}", remedy)
        case Port.FORBIDDEN:
            remedy = "check listen.host and listen.port; ports below 1024 need CAP_NET_BIND_SERVICE"
            return problem(f"{seen.place} cannot be listened at: {seen.detail}", remedy)
