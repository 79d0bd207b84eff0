"""What a check is, and what comes of it. Nothing here asks anybody, and a finding must never hold a secret."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """How it is."""

    OK = "ok"
    WARNING = "warning"  # it works, and will not always, or not as well as it could
    PROBLEM = "problem"  # it does not work
    SKIPPED = "skipped"  # not looked at, for the reason that the evidence gives


@dataclass(frozen=True, slots=True)
class Finding:
    """A verdict, what was seen or measured, and what to do: plain sentences for the operator."""

    verdict: Verdict
    evidence: str
    remedy: str = ""


def ok(evidence: str, remedy: str = "") -> Finding:
    """All is well."""
    return Finding(Verdict.OK, evidence, remedy)


def warning(evidence: str, remedy: str) -> Finding:
    """It works, and should be better."""
    return Finding(Verdict.WARNING, evidence, remedy)


def problem(evidence: str, remedy: str) -> Finding:
    """It does not work."""
    return Finding(Verdict.PROBLEM, evidence, remedy)


def skipped(reason: str, remedy: str = "") -> Finding:
    """It was not looked at."""
    return Finding(Verdict.SKIPPED, reason, remedy)


class CannotLook(Exception):
    """What a check needs is not there: it is skipped, for this reason."""

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(reason)
        self.finding = skipped(reason, remedy)


@dataclass(frozen=True, slots=True)
class Check:
    """One question. `id` is stable, `subject` the name of the SFU or the homeserver that it is about, or "".

    `look` does all that has to wait, within `within` seconds, and has pure functions judge what it saw. May raise CannotLook.
    """

    id: str
    subject: str
    within: float
    look: Callable[[], Awaitable[Finding]]

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.id} {self.subject}".rstrip()


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one check."""

    id: str
    subject: str
    finding: Finding
    seconds: float


@dataclass(frozen=True, slots=True)
class Report:
    """What came of all of them, in their order."""

    config: str  # the file
    results: Sequence[Result]
    seconds: float

    def count(self, verdict: Verdict) -> int:
        """How many have this verdict."""
        return sum(result.finding.verdict is verdict for result in self.results)

    @property
    def verdict(self) -> Verdict:
        """The worst one."""
        return next((verdict for verdict in (Verdict.PROBLEM, Verdict.WARNING) if self.count(verdict)), Verdict.OK)

    @property
    def exit_code(self) -> int:
        """1 where something does not work, else 0."""
        return 1 if self.count(Verdict.PROBLEM) else 0
