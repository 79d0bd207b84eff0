"""What was seen of the database, and what it means. It must never hold the URL of a PostgreSQL database, or its password."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Final

from sfu_delegate.doctor.findings import Finding, ok, problem, skipped, warning
from sfu_delegate.doctor.words import counted, in_bytes, spoken

SLOW: Final = 0.02  # seconds for a commit: a webhook waits for one
TOO_SLOW: Final = 0.25
TIGHT: Final = 1e9  # bytes free
FULL: Final = 64e6


@dataclass(frozen=True, slots=True)
class Speed:
    """How long it takes until something is on the disk. Seconds, of `count` tries."""

    median: float
    worst: float
    count: int
    how: str  # what was done each time
    note: str = ""
    trouble: str = ""  # why it could not be done; then the rest is of no account
    remedy: str = ""


def judge_speed(seen: Speed) -> Finding:
    """Writable, and fast enough?"""
    if seen.trouble:
        return problem(seen.trouble, seen.remedy)
    evidence = f"{seen.how} takes {spoken(seen.median)} (median of {seen.count}; worst {spoken(seen.worst)})" + (
        f"; {seen.note}" if seen.note else ""
    )
    remedy = "put the database on a local SSD, and look for what else writes to that disk: every webhook and delegation waits for such a write"
    if seen.median > TOO_SLOW:
        return problem(f"{evidence}: webhooks cannot be answered in time", remedy)
    if seen.median > SLOW:
        return warning(evidence, remedy)
    return ok(evidence)


@dataclass(frozen=True, slots=True)
class Inside:
    """What is in the database. `there` is False where nobody has made it yet."""

    there: bool
    server: str = ""  # of PostgreSQL: its version
    revision: str | None = None  # of the schema
    oldest: str | None = None  # the oldest schema version whose program can work with it, as the database says
    keys: str | None = None  # the fingerprint of the encryption key that was last in use
    tokens: int = 0  # open events with a client's token, which is sealed
    open_events: Mapping[str, int] = field(default_factory=dict)  # by homeserver
    others: int = 0  # instances that are alive, this one included
    size: float = 0.0  # bytes
    connections: int = 0  # to the server, of anybody
    most_connections: int = 0
    written: bool = True  # we may write to its tables


def judge_version(seen: Inside, head: str, known: Collection[str]) -> Finding:
    """Does the schema fit this program?"""
    server = f" (PostgreSQL {seen.server})" if seen.server else ""
    if not seen.there or seen.revision is None:
        return ok(f"there is no schema yet: the daemon makes it at its first start{server}")
    if seen.revision == head:
        return ok(f"schema version {seen.revision}, that of this program{server}")
    if seen.revision in known:
        return ok(f"schema version {seen.revision}; the daemon brings it to {head} when it starts{server}")
    if seen.oldest in known:
        return warning(
            f"schema version {seen.revision}, of a newer program, which says that this one (schema {head}) can work with it{server}",
            "bring this program up to date as well",
        )
    return problem(
        f"schema version {seen.revision}, which this program (schema {head}) does not know: a newer one wrote it{server}",
        "start the newer version again, or restore the backup made before the upgrade",
    )


def judge_space(size: float, free: float | None, total: float, files: str) -> Finding:
    """How much there is, and how much space is left, in bytes; None where that cannot be seen from here."""
    if free is None:
        return ok(f"{in_bytes(size)}; the space on the server's disk cannot be seen from here")
    evidence = f"{files}{in_bytes(size)}; {in_bytes(free)} of {in_bytes(total)} are free on its disk"
    remedy = "free some space: on a full disk nothing can be delegated, and no webhook kept"
    if free < FULL:
        return problem(evidence, remedy)
    if free < TIGHT:
        return warning(evidence, remedy)
    return ok(evidence)


def judge_connections(seen: Inside, needed: int) -> Finding:
    """Are there enough of PostgreSQL's? `needed`: of each instance."""
    evidence = f"{seen.connections} of {seen.most_connections} in use; each instance needs {needed}" + (
        f", and {counted(seen.others, 'is', 'are')} alive" if seen.others else ""
    )
    if not seen.written:
        return problem("the user may not write to the tables", "make it their owner, or grant it all on the tables of the schema public")
    left = seen.most_connections - seen.connections
    if left < needed:
        return problem(evidence, "raise max_connections of the server")
    if left < 3 * needed:
        return warning(evidence, "raise max_connections of the server: an upgrade, or one more instance, may find none left")
    return ok(evidence)


@dataclass(frozen=True, slots=True)
class Keys:
    """The encryption keys. `trouble`: why they cannot be used."""

    place: str  # where they are from
    fingerprints: tuple[str, ...] = ()  # none: there is none yet
    trouble: str = ""
    remedy: str = ""


def judge_keys(seen: Keys, inside: Inside | None) -> Finding:
    """Can what is in the database be opened? `inside` is None where the database cannot be read."""
    if seen.trouble:
        return problem(seen.trouble, seen.remedy)
    last = None if inside is None else inside.keys
    if not seen.fingerprints:
        if last is None:
            return ok(f"there is none yet: the daemon makes one at its first start, in {seen.place}")
        lost = f", and {counted(inside.tokens, 'token')} in it cannot be opened" if inside is not None and inside.tokens else ""
        remedy = "restore the key from your backup; without it the daemon makes a new one, and clients' management tokens are void"
        return problem(f"there is no key in {seen.place}, though the database was written with one{lost}", remedy)
    usable = f"{counted(len(seen.fingerprints), 'usable key')} in {seen.place}"
    if inside is None:
        return ok(f"{usable}; whether the database was written with it was not looked at")
    if last is not None and last not in seen.fingerprints:
        remedy = "give `encryption` the keys that this database was written with; of several instances all need the same"
        return problem(f"{usable}, but the database was last written with another one", remedy)
    return ok(usable + (", with which the database was written" if last is not None else ""))


def cannot_read(why: str) -> Finding:
    """The database is not looked at."""
    return skipped(f"the database cannot be read: {why}")
