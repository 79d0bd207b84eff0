"""The report, for people and for programs."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from sfu_delegate import __version__
from sfu_delegate.doctor.findings import Check, Report, Result, Verdict
from sfu_delegate.doctor.words import counted, listed, spoken
from sfu_delegate.observe.story import Tone
from sfu_delegate.operate.screen import show_paragraphs, write
from sfu_delegate.operate.shown import Line, Paragraph, plain

_TONES: Final = {Verdict.OK: Tone.GOOD, Verdict.WARNING: Tone.NOTICE, Verdict.PROBLEM: Tone.BAD, Verdict.SKIPPED: Tone.PLAIN}


def as_data(report: Report) -> dict[str, Any]:
    """For programs."""
    return {
        "ok": report.exit_code == 0,
        "verdict": report.verdict.value,
        "version": __version__,
        "config": report.config,
        "seconds": round(report.seconds, 3),
        "counts": {verdict.value: report.count(verdict) for verdict in Verdict},
        "checks": [
            {
                "id": result.id,
                "subject": result.subject,
                "verdict": result.finding.verdict.value,
                "evidence": result.finding.evidence,
                "remedy": result.finding.remedy,
                "seconds": round(result.seconds, 3),
            }
            for result in report.results
        ],
    }


def lines(report: Report) -> Iterator[str]:
    """For pipes and files: a line for each check, and what to do indented below it."""
    width = max(len(_title(result)) for result in report.results)
    for result in report.results:
        finding = result.finding
        first, *more = _plain_lines(finding.evidence) or [""]
        yield f"{finding.verdict:<8} {_title(result):<{width}}  {first}"
        indent = " " * (8 + 1 + width + 2)
        yield from (f"{indent}{line}" for line in more)
        remedy = _plain_lines(finding.remedy)
        yield from (f"{indent}{'→' if number == 0 else ' '} {line}" for number, line in enumerate(remedy))
    yield summary(report)


def _plain_lines(text: str) -> list[str]:
    """What homeservers, SFUs and proxies have answered stands in it, and must not be obeyed by a terminal."""
    return [plain(line) for line in text.splitlines()]


def summary(report: Report) -> str:
    """One line for all."""
    found = {verdict: report.count(verdict) for verdict in (Verdict.PROBLEM, Verdict.WARNING, Verdict.OK, Verdict.SKIPPED)}
    words = {
        Verdict.PROBLEM: ("problem", "problems"),
        Verdict.WARNING: ("warning", "warnings"),
        Verdict.OK: ("ok", "ok"),
        Verdict.SKIPPED: ("skipped",) * 2,
    }
    counts = [counted(count, *words[verdict]) for verdict, count in found.items() if count]
    return f"{report.config}: {listed(counts)}, in {spoken(report.seconds)}"


def show(report: Report) -> None:
    """On standard output: on a terminal what needs somebody first, else a line for each check in its order."""
    if not sys.stdout.isatty():
        write(sys.stdout, "".join(f"{line}\n" for line in lines(report)))
        return
    show_paragraphs(paragraphs(report))


_IN_FULL: Final = (Verdict.PROBLEM, Verdict.WARNING)


def paragraphs(report: Report) -> Iterator[Paragraph]:
    """For people: problems, then warnings, with what to do; of the rest a line each; the verdict last, where it is seen."""
    for verdict in _IN_FULL:
        for result in report.results:
            if result.finding.verdict is verdict:
                evidence, remedy = _told(result)
                what = [Line(f"{verdict}: {_title(result)}", _TONES[verdict], heading=True), Line(evidence)]
                yield Paragraph([*what, Line(f"→ {remedy}"), Line("")] if remedy else [*what, Line("")], hang=2)
    rest = [result for verdict in (Verdict.SKIPPED, Verdict.OK) for result in report.results if result.finding.verdict is verdict]
    width = max((len(_title(result)) for result in rest), default=0)
    for result in rest:
        evidence, remedy = _told(result)
        said = [Line(f"{result.finding.verdict:<8} {_title(result):<{width}}  {evidence}", _TONES[result.finding.verdict])]
        yield Paragraph([*said, Line(f"→ {remedy}")] if remedy else said, hang=9)
    yield Paragraph([Line(summary(report), _TONES[report.verdict], heading=True)])


def _told(result: Result) -> tuple[str, str]:
    """Evidence and remedy; what goes on below its arrow is indented with it."""
    return "\n".join(_plain_lines(result.finding.evidence)), "\n  ".join(_plain_lines(result.finding.remedy))


def _title(result: Result) -> str:
    return f"{result.id} {result.subject}".rstrip()


@contextmanager
def progress() -> Iterator[Callable[[Sequence[Check]], object]]:
    """Shows on a terminal what is still under way."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.markup import escape

    with Console(stderr=True).status("looking …") as status:

        def tell(left: Sequence[Check]) -> None:
            if left:
                titles = [check.title for check in left[:3]] + (["…"] if len(left) > 3 else [])
                status.update(f"looking at {escape(', '.join(titles))} ({counted(len(left), 'check')} to go)")
            else:
                status.update("everything has been looked at")

        yield tell
