"""The blocks of code in the documentation, and what is said below them of how they are tested.

A block is either run, or loaded by the program that it is for, or has a note for the reader below it: *(not run by the tests: …)*. Shell and programs
are run where a test asks for them by `given`. Which ones that are is read from the tests' text, so that no list beside them can disagree.
"""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), ROOT / "requirements" / "README.md"])

_NOTE = re.compile(r"\*\(not run by the tests\b[^*]+\)\*")
_PAGE_NOTE = re.compile(r"(?m)^\*\((?:The examples|Nothing) on this page (?:are|is) (?:not )?run by the tests\b[^*]+\)\*$")


class Snippet(NamedTuple):
    """A block of code in a page."""

    page: Path
    line: int
    language: str
    text: str
    note: str  # what is said below it, or at the top of its page, of why it is not run; "": it is

    @property
    def of(self) -> str:
        """The page, as tests name it."""
        return str(self.page.relative_to(ROOT))

    def __str__(self) -> str:
        return f"{self.of}:{self.line}"


def of_page(page: Path) -> Iterator[Snippet]:
    """The blocks of a page, in its order."""
    text = page.read_text()
    lines = text.splitlines()
    for_all = _PAGE_NOTE.search(text)
    language, indent, start, found = None, 0, 0, list[str]()
    for number, line in enumerate(lines, 1):
        fence = re.fullmatch(r"(\s*)```(\w*)\s*", line)
        if fence is None:
            found.append(line[indent:] if not line[:indent].strip() else line)
        elif language is None:
            indent, language, start, found = len(fence[1]), fence[2], number, []
        else:
            below = "\n".join(lines[number : number + 4]).strip().replace("\n", " ")
            note = _NOTE.match(below)
            yield Snippet(page, start, language, "\n".join(found) + "\n", note[0] if note else for_all[0] if for_all else "")
            language, indent = None, 0
    assert language is None, f"{page}: a block of code that begins in line {start} never ends"


SNIPPETS = [snippet for page in PAGES for snippet in of_page(page)]


def snippets(*languages: str) -> list[Snippet]:
    """All blocks in these languages."""
    found = [snippet for snippet in SNIPPETS if snippet.language in languages]
    assert found, f"no snippet in {languages} any more"
    return found


def given(page: str, contains: str) -> str:
    """The text of the one block of this page that has this in it, for a test that runs it."""
    found = [snippet for snippet in SNIPPETS if snippet.of == page and contains in snippet.text]
    assert len(found) == 1, f"{page} has {len(found)} blocks with {contains!r}: {', '.join(map(str, found))}"
    return found[0].text


@functools.cache
def asked_for() -> frozenset[tuple[str, str]]:
    """What the tests ask `given` for: page and content."""
    asked = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        source = path.read_text()
        for node in ast.walk(ast.parse(source)) if "given(" in source else ():
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "given":
                match node.args:
                    case [ast.Constant(str() as page), ast.Constant(str() as contains)]:
                        asked.add((page, contains))
    return frozenset(asked)


def is_run(snippet: Snippet) -> bool:
    """Whether a test asks for this block in order to run it."""
    return any(page == snippet.of and contains in snippet.text for page, contains in asked_for())
