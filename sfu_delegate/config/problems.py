"""What is wrong, or risky, in a configuration, and at which of its keys. A problem must never hold a secret."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

HIDDEN: Final = "(hidden)"
NOT_SET: Final = "(not set)"

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, or risky, in the configuration. `value` never holds a secret."""

    key: str  # such as homeservers[0].url; "" for the file as a whole
    value: str
    problem: str
    remedy: str
    where: str = ""  # the line of the file, or the environment variable, that it comes from

    def __str__(self) -> str:
        where = f" ({self.where})" if self.where else ""
        if not self.key:
            return f"{self.value or 'the file'}{where}: {self.problem}; {self.remedy}"
        value = f" = {self.value}" if self.value else ""
        return f"{self.key}{where}{value}: {self.problem}; {self.remedy}"


class ConfigInvalid(Exception):
    """The configuration cannot be used; `problems` has everything that is wrong with it, `warnings` what is risky in the rest."""

    def __init__(self, problems: Sequence[Problem], warnings: Sequence[Problem] = ()) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = tuple(problems)
        self.warnings = tuple(warnings)


def unique(problems: Iterable[Problem]) -> list[Problem]:
    """Each problem once, in the order of their first appearance."""
    return list(dict.fromkeys(problems))


def located(problem: Problem, path: KeyPath, where: Mapping[KeyPath, str]) -> Problem:
    """The same problem with the line or variable that its key comes from, unless it names one already."""
    return Problem(problem.key, problem.value, problem.problem, problem.remedy, problem.where or place_of(path, where))


def place_of(path: KeyPath, where: Mapping[KeyPath, str]) -> str:
    """The line or variable that a key comes from, or else the innermost section around it that has one; "" for none."""
    for length in range(len(path), 0, -1):
        if found := where.get(path[:length]):
            return found
    return ""


def related(one: KeyPath, other: KeyPath) -> bool:
    """Are they the same key, or one of them within the other?"""
    shorter = min(len(one), len(other))
    return one[:shorter] == other[:shorter]


def dotted(path: KeyPath) -> str:
    """A key as people write it, such as homeservers[0].url."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def kind_of(value: object) -> str:
    """What sort of value it is, for a problem that must not show the value."""
    match value:
        case None:
            return "(empty)"
        case bool():
            return "(true or false)"
        case str():
            return "(a text)"
        case int() | float():
            return "(a number)"
        case Mapping():
            return "(keys with values)"
        case list() | tuple():
            return "(a list)"
        case _:
            return "(something else)"
