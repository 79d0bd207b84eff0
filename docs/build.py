"""Makes the site of the documentation: `.venv/bin/python docs/build.py` writes build/docs/html.

The pages are the Markdown files that can be read on a code host as well. They are gathered into build/docs/source, so that README.md, which the
quickstart is in, and CONTRIBUTING.md have their place on the site, and links between all of them lead to one another there. Nothing is written by
hand twice. It must never change a page in its place.
"""

import argparse
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).parents[1]
TARGET: Final = ROOT / "build" / "docs"

_FENCE = re.compile(r"(?ms)^( *)(```+).*?^\1\2 *$")
_CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)
_LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")
_HEADING = re.compile(r"^(#+) (.+)$", re.MULTILINE)


class Page(NamedTuple):
    """A page of the site: the file that it is in, and, where it is a part of that, the headings that it has of it."""

    name: str  # on the site
    file: str  # in the repository
    title: str = ""  # of a part
    sections: tuple[str, ...] = ()  # headings of the second level; none: the whole file


class Part(NamedTuple):
    """A part of the contents."""

    title: str
    pages: tuple[Page, ...]


_QUICKSTART: Final = ("Quickstart", "More than one instance")
_OVERVIEW: Final = (
    "Why",
    "See it work",
    "How a client delegates",
    "How it decides",
    "What is not there yet",
    "Security",
)

CONTENTS: Final = (
    Part(
        "Begin",
        (
            Page("overview", "README.md", "Overview", _OVERVIEW),
            Page("quickstart", "README.md", "Quickstart", _QUICKSTART),
            Page("how-it-works", "docs/how-it-works.md"),
        ),
    ),
    Part(
        "Operators",
        tuple(
            Page(name, f"docs/{name}.md")
            for name in (
                "operating",
                "configuration",
                "commands",
                "troubleshooting",
                "metrics",
                "alerts",
                "scaling",
                "security",
                "migrate-from-lk-jwt-service",
            )
        ),
    ),
    Part("Client developers", (Page("clients", "docs/clients.md"), Page("api", "docs/api.md"))),
    Part(
        "Contributors",
        (
            Page("architecture", "docs/architecture.md"),
            Page("performance", "docs/performance.md"),
            Page("report", "docs/benchmarks/report.md"),
            Page("contributing", "CONTRIBUTING.md"),
            Page("changelog", "CHANGELOG.md"),
        ),
    ),
)
INDEX: Final = Page("index", "docs/README.md")
_LEFT_OUT: Final = ("More",)
"""What README.md leads to elsewhere: the site has its contents beside every page."""


class LinkBroken(ValueError):
    """A link leads nowhere, or a page is not on the site."""


def slug(heading: str) -> str:
    """The anchor of a heading, as code hosts make it."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")


def pages() -> list[Page]:
    """All pages, the index first. Raises LinkBroken where docs/ has one that is in none of the parts."""
    found = [INDEX, *(page for part in CONTENTS for page in part.pages)]
    known = {page.file for page in found}
    missing = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md") if str(path.relative_to(ROOT)) not in known)
    if missing:
        raise LinkBroken(f"docs/build.py has no place for {', '.join(missing)}: name it in CONTENTS.")
    return found


def _masked(text: str) -> str:
    """The text with all code blanked out, of the same length, so that what is found in it can be changed in the text."""
    for pattern in (_FENCE, _CODE):
        text = pattern.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)
    return text


def _parts(text: str) -> Iterator[tuple[str, str]]:
    """The second-level sections of a page, each with its heading; what is before the first one has none."""
    starts = [found for found in _HEADING.finditer(_masked(text)) if found[1] == "##"]
    ends = [found.start() for found in starts] + [len(text)]
    yield "", text[: ends[0]]
    for number, found in enumerate(starts):
        yield found[2].strip(), text[found.start() : ends[number + 1]]


class Gathering:
    """The pages as the site has them."""

    def __init__(self) -> None:
        self._pages = pages()
        self._texts = {page.file: (ROOT / page.file).read_text(encoding="utf-8") for page in self._pages}
        self._anchors: dict[tuple[str, str], str] = {}  # (file, anchor) of a page in parts: the page that has it
        for page in self._pages:
            if page.sections:
                for heading in _HEADING.findall(_masked(self.text(page))):
                    self._anchors[page.file, slug(heading[1])] = page.name

    def text(self, page: Page) -> str:
        """The page, or its part of a file, with links as they are there."""
        if not page.sections:
            return self._texts[page.file]
        parts = dict(_parts(self._texts[page.file]))
        unknown = set(parts) - {"", *_LEFT_OUT} - {name for other in self._pages if other.file == page.file for name in other.sections}
        if unknown or not set(page.sections) <= set(parts):
            told = unknown or set(page.sections) - set(parts)
            raise LinkBroken(f"The sections of {page.file} are not those that docs/build.py knows: {', '.join(sorted(told))}")
        return f"# {page.title}\n\n" + "".join(self._part(page, name, parts[name]) for name in page.sections)

    @staticmethod
    def _part(page: Page, name: str, text: str) -> str:
        """A section. One that the page has its title from has no heading of its own there, and those within it are a level higher."""
        if name != page.title:
            return text
        for found in reversed([*_HEADING.finditer(_masked(text))]):
            text = text[: found.start()] + ("" if found[1] == "##" else found[0][1:]) + text[found.end() :]
        return text.lstrip()

    def _home(self, file: str, anchor: str) -> str | None:
        """The page of the site that has this file, or this place in it."""
        whole = next((page.name for page in self._pages if page.file == file and not page.sections), None)
        first = next((page.name for page in self._pages if page.file == file), None)
        return whole or self._anchors.get((file, anchor), first)

    def _target(self, page: Page, target: str) -> str:
        if re.match(r"[a-z]+:", target):
            return target
        path, _, anchor = target.partition("#")
        file = os.path.relpath((ROOT / page.file).parent / path if path else ROOT / page.file, ROOT)
        if not (ROOT / file).exists():
            raise LinkBroken(f"{page.file} leads to {target}, which is not there.")
        home = self._home(file, anchor)
        if home == page.name:
            return f"#{anchor}" if anchor else f"{home}.md"
        if home is not None:
            return f"{home}.md#{anchor}" if anchor else f"{home}.md"
        return f"files/{file}"

    def linked(self, page: Page) -> tuple[str, set[str]]:
        """The page with links that lead to the site's pages, and the files of the repository that it leads to besides."""
        text, out, last, files = self.text(page), "", 0, set[str]()
        for found in _LINK.finditer(_masked(text)):
            target = self._target(page, found[1])
            if target.startswith("files/"):
                files.add(target.removeprefix("files/"))
            out += text[last : found.start()] + target
            last = found.end()
        return out + text[last:], files

    def write(self, place: Path) -> None:
        """Put all of it into a directory."""
        for page in self._pages:
            text, files = self.linked(page)
            if page == INDEX:
                text += "\n" + "\n".join(_contents())
            (place / f"{page.name}.md").write_text(text, encoding="utf-8")
            for file in files:
                copied = place / "files" / file
                copied.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / file, copied)


def _contents() -> Iterator[str]:
    """The table of contents, which stands beside every page."""
    for part in CONTENTS:
        yield from ("```{toctree}", ":hidden:", f":caption: {part.title}", "", *(page.name for page in part.pages), "```", "")


def build(target: Path, options: Sequence[str] = ()) -> int:
    """Gather the pages and build the site in `target`/html. Returns Sphinx's exit code: not 0 if it had a warning."""
    from sphinx.cmd.build import main as sphinx

    source = target / "source"
    for old in (source, target / "html"):
        shutil.rmtree(old, ignore_errors=True)
    source.mkdir(parents=True)
    Gathering().write(source)
    given = ["-b", "html", "-c", str(ROOT / "docs"), "-d", str(target / "doctrees"), "-W", "--keep-going", "-n", "-q", *options]
    return sphinx([*given, str(source), str(target / "html")])


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Make the site of the documentation.")
    parser.add_argument("--target", type=Path, default=TARGET, metavar="DIRECTORY", help="where to (default: build/docs)")
    target = parser.parse_args().target
    try:
        code = build(target)
    except LinkBroken as error:
        return int(bool(sys.stderr.write(f"{error}\n")))
    if code == 0:
        sys.stdout.write(f"The site is in {target / 'html' / 'index.html'}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
