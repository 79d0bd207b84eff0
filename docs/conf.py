"""How Sphinx builds the site: `docs/build.py` hands it the pages, gathered and with links that lead to one another.

The site must never load anything from somewhere else: no fonts, no scripts, no counters. `tests/unit/test_docs_site.py` looks at what comes out.
"""

import re
from typing import Any

from docutils import nodes
from pygments.lexers.special import TextLexer
from sfu_delegate import __version__
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform

project = "sfu-delegate"
author = "the authors of sfu-delegate"
version = release = __version__
language = "en"

extensions = ["myst_parser"]
root_doc = "index"
# As code hosts make anchors of headings, down to the last level.
myst_heading_anchors = 6

html_theme = "furo"
html_title = f"sfu-delegate {release}"
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_use_index = False
# Quotation marks stay as they were written: what is quoted is often searched for.
smartquotes = False
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"
html_theme_options = {"navigation_with_keys": True, "top_of_page_buttons": []}


class CodeHostAnchors(SphinxPostTransform):
    """Headings can be reached by the anchors that code hosts give them, too: links to a page are the same there and here."""

    default_priority = 900

    def run(self, **_: Any) -> None:
        """Add the anchor to each section that does not have it."""
        for section in self.document.findall(nodes.section):
            slug = section.get("slug")
            if slug and slug not in section["ids"] and re.fullmatch(r"[\w-]+", slug):
                section["ids"].append(slug)


def setup(app: Sphinx) -> dict[str, Any]:
    """What Sphinx calls."""
    app.add_post_transform(CodeHostAnchors)
    # No lexer of these is at hand: they are shown as they are.
    app.add_lexer("caddy", TextLexer)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
