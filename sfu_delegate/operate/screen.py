"""Where the commands' lines, tables and JSON go: with colours and wrapped on a terminal, and elsewhere as they are, one line each."""

import io
import json
import re
import sys
import textwrap
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Final, TextIO

from sfu_delegate.observe.story import Tone
from sfu_delegate.operate.shown import Line, Paragraph, Table, as_json, plain

_STYLES: Final = {Tone.PLAIN: "", Tone.GOOD: "green", Tone.NOTICE: "yellow", Tone.BAD: "bold red"}
_COLUMN: Final = re.compile(r"(\s*\S.*?\s{2,})\S")
_WIDEST_HANG: Final = 44


def is_terminal(stream: TextIO) -> bool:
    """Does a person look at it?"""
    return stream.isatty()


def write(stream: TextIO, text: str) -> None:
    """Write it all at once; what the stream's encoding has not is escaped. Raises BrokenPipeError where the reader has gone."""
    if isinstance(stream, io.TextIOWrapper):
        with suppress(io.UnsupportedOperation):
            stream.reconfigure(errors="backslashreplace")
    stream.write(text)
    stream.flush()


def show_lines(lines: Iterable[Line], *, error: bool = False) -> None:
    """Lines, on standard output, or standard error."""
    stream = sys.stderr if error else sys.stdout
    if not is_terminal(stream):
        write(stream, "".join(f"{line.text}\n" for line in lines))
        return
    from rich.console import Console

    console = Console(file=stream, highlight=False, soft_wrap=True)
    console.print(drawn(lines, console.width))


def drawn(lines: Iterable[Line], width: int) -> Any:
    """Lines for a terminal of so many columns: what is too long goes on under its own column."""
    from rich.text import Text

    text = Text(end="")
    for line in lines:
        wrapped = textwrap.wrap(
            line.text, max(width - 1, 20), subsequent_indent=" " * _hang(line.text, width), break_on_hyphens=False, replace_whitespace=False
        )
        style = f"{_STYLES[line.tone]} bold" if line.heading else _STYLES[line.tone]
        text.append("\n".join(wrapped) + "\n", style=style.strip())
    return text


def show_paragraphs(paragraphs: Iterable[Paragraph], *, error: bool = False) -> None:
    """Paragraphs on a terminal. A word that is longer than a line, such as a path, is left to the terminal, which copies it in one piece."""
    from rich.console import Console
    from rich.text import Text

    stream = sys.stderr if error else sys.stdout
    console = Console(file=stream, highlight=False, soft_wrap=True)
    text = Text(end="")
    for paragraph in paragraphs:
        for number, line in enumerate(paragraph.lines):
            indent = " " * (paragraph.hang if number else 0)
            more = f"{indent}  " if number else " " * paragraph.hang
            style = f"{_STYLES[line.tone]} bold" if line.heading else _STYLES[line.tone]
            for row in line.text.split("\n"):
                wrapped = textwrap.wrap(
                    row,
                    max(console.width - 1, 20),
                    initial_indent=indent,
                    subsequent_indent=more,
                    break_on_hyphens=False,
                    break_long_words=False,
                    replace_whitespace=False,
                )
                text.append("\n".join(wrapped) + "\n", style=style.strip())
    with console.capture() as drawn_text:
        console.print(text, end="")
    write(stream, drawn_text.get())


def _hang(text: str, width: int) -> int:
    column = _COLUMN.match(text)
    hang = len(column[1]) if column else len(text) - len(text.lstrip()) + 2
    return min(hang, _WIDEST_HANG, width // 2)


def show_table(table: Table) -> None:
    """A table on a terminal; elsewhere one line each, with tabs between the fields and without headings, for programs like grep, cut and awk."""
    if not is_terminal(sys.stdout):
        write(sys.stdout, "".join("\t".join(fields) + "\n" for fields in table.fields))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    drawing = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in table.headings:
        drawing.add_column(heading, overflow="fold")
    for row, tone in zip(table.rows, table.tones, strict=True):
        # As Text: in names, square brackets are no markup.
        drawing.add_row(*(Text(cell) for cell in row), style=_STYLES[tone] if tone in (Tone.NOTICE, Tone.BAD) else "")
    Console(file=sys.stdout, highlight=False).print(drawing)


def show_json(answer: object) -> None:
    """For programs."""
    write(sys.stdout, as_json(json.dumps(answer, indent=2, ensure_ascii=False)) + "\n")


def tell_problem(sentence: str) -> None:
    """On standard error."""
    show_lines([Line(f"problem: {plain(sentence)}", Tone.BAD)], error=True)
