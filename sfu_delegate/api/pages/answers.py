"""How pages are answered: templates, files that do not change, and headers by which a browser keeps to this origin.

It must never let a page run or load anything that is not of the package, nor be shown inside of another page.
"""

import mimetypes
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from aiohttp import web
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from sfu_delegate import __version__
from sfu_delegate.api.errors import MatrixError
from sfu_delegate.api.pages import wording
from sfu_delegate.observe import story

_HERE: Final = Path(__file__).parent
STATIC: Final = "/static/"

HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=(), display-capture=(), payment=(), usb=()",
}


# ── files ──


@dataclass(frozen=True, slots=True)
class File:
    """A file of the package, under a name that has its content's hash in it."""

    name: str
    body: bytes
    etag: str
    content_type: str


def _files() -> dict[str, File]:
    found = {}
    for path in sorted((_HERE / "static").iterdir()):
        body = path.read_bytes()
        digest = sha256(body).hexdigest()[:16]
        content_type = mimetypes.types_map[path.suffix] if path.suffix != ".js" else "text/javascript"
        text = "; charset=utf-8" if content_type.startswith("text/") else ""
        found[path.name] = File(f"{path.stem}.{digest}{path.suffix}", body, f'"{digest}"', content_type + text)
    return found


FILES: Final = _files()
_BY_NAME: Final = {file.name: file for file in FILES.values()}


async def static(request: web.Request) -> web.Response:
    """A file of the package, which a browser may keep for ever: another content has another name."""
    file = _BY_NAME.get(request.match_info["name"])
    if file is None:
        raise MatrixError(404, "M_NOT_FOUND", "There is no such file here: it may be one of another version. Load the page again.")
    headers = {**HEADERS, "Cache-Control": "public, max-age=31536000, immutable", "ETag": file.etag}
    if file.etag in request.headers.get("If-None-Match", ""):
        return web.Response(status=304, headers=headers)
    return web.Response(body=file.body, headers={**headers, "Content-Type": file.content_type})


# ── pages ──


def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        auto_reload=False,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "name": wording.name,
        "plain": wording.plain,
        "prose": wording.prose,
        "many": wording.many,
        "seconds": wording.seconds,
        "span": story.span,
        "often": story.often,
        "part": lambda text: quote(text, safe=""),
    }
    made.globals |= {"file": lambda name: FILES[name].name, "version": __version__, "LONG": wording.LONG}
    return made


_TEMPLATES: Final = _environment()


def root_of(path: str) -> str:
    """From a path to the listener's root, relative: a reverse proxy may have put all of it below a path of its own."""
    return "../" * (path.count("/") - 1) or "./"


def rendered(template: str, path: str, now: float, **given: Any) -> str:
    """A page. `path`: the raw path that was asked for; `now` in Unix seconds."""
    here = {
        "root": root_of(path),
        "now": now,
        "zone": wording.zone(now),
        "when": lambda at, **more: wording.when(at, now, **more),
        "ago": lambda at: wording.ago(at, now),
    }
    return _TEMPLATES.get_template(template).render(**here, **given)


def page(html: str, *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """A page as it goes to the browser; nobody may keep it."""
    return web.Response(
        text=html, status=status, content_type="text/html", charset="utf-8", headers={"Cache-Control": "no-store", **HEADERS, **(headers or {})}
    )
