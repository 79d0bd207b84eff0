"""The report, for people and for programs."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from sfu_delegate import __version__
from sfu_delegate.doctor.findings import Check, Report, Verdict
from sfu_delegate.doctor.words import counted, listed, spoken
from sfu_delegate.operate.screen import write
from sfu_delegate.operate.shown import plain

_STYLES: Final = {Verdict.OK: "green", Verdict.WARNING: "bold yellow", Verdict.PROBLEM: "bold red", Verdict.SKIPPED: "dim"}


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
    width = max(len(f"{result.id} {result.subject}".rstrip()) for result in report.results)
    for result in report.results:
        finding = result.finding
        first, *more = _plain_lines(finding.evidence) or [""]
        yield f"{finding.verdict:<8} {f'{result.id} {result.subject}'.rstrip():<{width}}  {first}"
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
    """On standard output: a table on a terminal, else lines."""
    if not sys.stdout.isatty():
        write(sys.stdout, "".join(f"{line}\n" for line in lines(report)))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_lines=True)
    table.add_column("Check", overflow="fold")
    table.add_column("Verdict")
    table.add_column("Evidence", overflow="fold", ratio=3)
    table.add_column("Remedy", overflow="fold", ratio=3)
    for result in report.results:
        finding = result.finding
        name = Text(result.id, style="bold")
        if result.subject:
            name.append(f"\n{result.subject}", style="not bold")
        style = _STYLES[finding.verdict]
        # As Text: in what others have said, square brackets are no markup.
        evidence, remedy = ("\n".join(_plain_lines(text)) for text in (finding.evidence, finding.remedy))
        table.add_row(name, Text(finding.verdict.value, style=style), Text(evidence), Text(remedy))
    console = Console(file=sys.stdout)
    with console.capture() as drawn:
        console.print(table)
        console.print(Text(summary(report), style=_STYLES[report.verdict]))
    write(sys.stdout, drawn.get())


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
            titles = [check.title for check in left[:3]] + (["…"] if len(left) > 3 else [])
            status.update(f"looking: {counted(len(left), 'check')} to go: {escape(', '.join(titles))}")

        yield tell
