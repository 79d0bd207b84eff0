"""The site of the documentation is built without a warning, has every page, and asks nobody else for anything."""

import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest

from tests.snippets import DOCS, ROOT

LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "object": "data", "link": "href"}


def builder() -> ModuleType:
    """docs/build.py."""
    spec = importlib.util.spec_from_file_location("docs_build", DOCS / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site: as `make docs` builds it, where every warning is an error."""
    target = tmp_path_factory.mktemp("docs")
    command, environment = [sys.executable, "docs/build.py", "--target", str(target)], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return target / "html"


class Links(HTMLParser):
    """What a page loads, what it leads to, and what can be led to in it."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.targets: list[str] = []
        self.ids: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id",) if name in given}
        if tag in LOADS and LOADS[tag] in given:
            self.loaded.append(given[LOADS[tag]])
        if tag == "a" and "href" in given:
            self.targets.append(given["href"])


def test_every_page_is_on_the_site(site: Path) -> None:
    """Each page of docs/, the README in its parts, CONTRIBUTING and CHANGELOG."""
    built = {path.stem for path in site.glob("*.html")}
    assert {page.name for page in builder().pages()} <= built
    assert {"index", "quickstart", "how-it-works", "api", "commands", "clients", "troubleshooting", "contributing"} <= built


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    """Pages, style sheets and scripts load what the site has, and nothing of another origin."""
    for page in site.rglob("*.html"):
        for url in Links(page).loaded:
            assert not urlsplit(url).netloc, f"{page.name}: {url}"
            if url not in ("#", ""):
                assert (page.parent / unquote(urlsplit(url).path)).exists(), f"{page.name}: {url}"
    for sheet in site.rglob("*.css"):
        for url in re.findall(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)", sheet.read_text()):
            assert not re.match(r"(https?:)?//", url[0] or url[1]), f"{sheet.name}: {url}"
    for script in site.rglob("*.js"):
        assert not re.search(r"(fetch|import|open|sendBeacon)\(\s*['\"`](https?:)?//", script.read_text()), script.name


def test_links_of_the_site_lead_somewhere(site: Path) -> None:
    """Each link within the site leads to a page that there is, and to a place in it."""
    pages = {page.name: Links(page) for page in site.glob("*.html")}
    for name, links in pages.items():
        for target in links.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            file = parts.path or name
            assert (site / unquote(file)).exists(), f"{name}: {target}"
            if parts.fragment and file in pages:
                assert unquote(parts.fragment) in pages[file].ids, f"{name}: {target}"


def test_anchors_are_those_of_the_code_host(site: Path) -> None:
    """A link into a page from elsewhere, such as an alert's, is the same there and here."""
    ids = Links(site / "troubleshooting.html").ids
    headings = re.findall(r"(?m)^##+ (.+)$", re.sub(r"(?ms)^```.*?^```$", "", (DOCS / "troubleshooting.md").read_text()))
    slug = builder().slug
    assert len(headings) > 20
    assert {slug(heading) for heading in headings} <= ids


def test_the_quickstart_has_one_title_and_nothing_to_scroll() -> None:
    """Its page begins with its title, not with two, and no line of its blocks is wider than a window of 1280 pixels has place for."""
    build = builder()
    text = build.Gathering().text(next(page for page in build.pages() if page.name == "quickstart"))
    assert text.startswith("# Quickstart\n\nTen minutes")
    assert re.findall(r"(?m)^(#+) 1\. Install$", text) == ["##"]
    for block in re.findall(r"(?ms)^```\w+\n(.*?)^```$", text):
        assert max(map(len, block.splitlines())) <= 90, block


def test_a_broken_link_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gathering refuses a link to a file that there is not, and a section of the README that has no page."""
    build = builder()
    gathering = build.Gathering()
    page = next(page for page in build.pages() if page.name == "security")
    monkeypatch.setitem(gathering._texts, page.file, "# Security\n\n[gone](gone.md)\n")
    with pytest.raises(build.LinkBroken, match=r"gone\.md"):
        gathering.linked(page)
    readme = next(page for page in build.pages() if page.name == "quickstart")
    monkeypatch.setitem(gathering._texts, readme.file, gathering._texts[readme.file] + "\n## Something new\n")
    with pytest.raises(build.LinkBroken, match="Something new"):
        gathering.text(readme)
