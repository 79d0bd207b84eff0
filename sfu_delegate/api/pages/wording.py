"""How names, times and numbers stand on a page.

Names of rooms, participants and users are strangers' choice. They must never become markup, turn the text around them, or hide a character: whatever
cannot be seen by itself is shown by its number.
"""

import unicodedata
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Final

from markupsafe import Markup, escape

from sfu_delegate.observe import story

LONG: Final = 120
"""Characters of a name that a table shows."""

_UNSEEN: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def _number(character: str) -> str:
    return f"U+{ord(character):04X}"


def _is_unseen(text: str, at: int) -> bool:
    character = text[at]
    if character == " ":
        return at in (0, len(text) - 1) or text[at - 1] == " "
    return unicodedata.category(character) in _UNSEEN or unicodedata.category(character) == "Zs"


def _parts(text: str) -> Iterator[tuple[str, bool]]:
    """The text in pieces, each with whether it is a character that cannot be seen."""
    seen = 0
    for at in range(len(text)):
        if _is_unseen(text, at):
            if at > seen:
                yield text[seen:at], False
            yield _number(text[at]), True
            seen = at + 1
    if seen < len(text):
        yield text[seen:], False


def name(text: str, most: int | None = None) -> Markup:
    """A name, apart from the direction of the text around it. `most`: shortened to so many characters, with the rest in what a pointer shows."""
    short = text if most is None or len(text) <= most else text[:most]
    inner = Markup("").join(Markup('<span class="unseen">{}</span>').format(piece) if unseen else escape(piece) for piece, unseen in _parts(short))
    if not text:
        inner = Markup('<span class="unseen">empty</span>')
    if short is not text:
        return Markup('<bdi class="name" title="{}">{}…</bdi>').format(plain(text), inner)
    return Markup('<bdi class="name">{}</bdi>').format(inner)


def plain(text: str, most: int | None = None) -> str:
    """A name where no markup can stand: in a title, or in what is read aloud."""
    short = text if most is None or len(text) <= most else text[:most] + "…"
    return "".join(f"[{piece}]" if unseen else piece for piece, unseen in _parts(short))


def prose(sentence: str) -> Markup:
    """A sentence of ours, with what stands between backticks as code."""
    pieces = (Markup("<code>{}</code>").format(piece) if number % 2 else escape(piece) for number, piece in enumerate(sentence.split("`")))
    return Markup("").join(pieces)


# ── times ──


def local(at: float) -> datetime:
    """A time in Unix seconds, in the server's time zone."""
    return datetime.fromtimestamp(at, UTC).astimezone()


def clock(at: float, now: float, *, seconds: bool = True) -> str:
    """A time of day, with the day where it is not today's."""
    there, here = local(at), local(now)
    time = f"{there:%H:%M:%S}" if seconds else f"{there:%H:%M}"
    if there.date() == here.date():
        return time
    return f"{day(there)} {time}" if there.year == here.year else f"{day(there)} {there.year} {time}"


def day(there: datetime) -> str:
    """A day, without the year."""
    return f"{there.day} {('Jan', 'Feb', 'Mar', 'Apr', 'May', 'Jun', 'Jul', 'Aug', 'Sep', 'Oct', 'Nov', 'Dec')[there.month - 1]}"


def when(at: float, now: float, *, seconds: bool = True) -> Markup:
    """A time of day for people and programs."""
    return Markup('<time datetime="{}">{}</time>').format(local(at).isoformat(timespec="milliseconds"), clock(at, now, seconds=seconds))


def ago(at: float, now: float) -> str:
    """How long ago it is, or how far ahead."""
    if abs(now - at) < 0.5:
        return "now"
    return f"{story.span(now - at)} ago" if at < now else f"in {story.span(at - now)}"


def zone(now: float) -> str:
    """The server's time zone by its name, with its distance from UTC."""
    there = local(now)
    offset = there.strftime("%z")
    hours = f"{offset[:3]}:{offset[3:5]}"
    named = there.tzname() or ""
    return (
        "UTC"
        if hours == "+00:00" and named in ("UTC", "")
        else f"{named} (UTC{hours})"
        if named and not named.startswith(("+", "-"))
        else f"UTC{hours}"
    )


# ── numbers ──


def seconds(value: float) -> str:
    """A short time, with two digits that count where it is below ten seconds."""
    if value < 0.0005:
        return "0 s"
    if value < 0.995:
        return f"{value * 1000:.0f} ms"
    return f"{value:.1f} s" if value < 9.95 else story.span(value)


def many(value: float) -> str:
    """A count."""
    return f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")
