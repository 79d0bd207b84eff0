"""A delegation's story as a drawing to scale: what is where, in hundredths of the width. The template makes SVG of it.

It draws what the history and the rows tell, and nothing that they do not: where restarts left no line each (see `lifecycle.story`), it shows that the
event was kept alive, and not when.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from typing import Final, NamedTuple

from sfu_delegate.api.pages.wording import clock, day, local, many
from sfu_delegate.delegation.lifecycle import RESTARTED
from sfu_delegate.delegation.model import DelayedEvent, Note, Outcome, Presence, State
from sfu_delegate.observe import story
from sfu_delegate.observe.story import Span, Tone

_FINEST: Final = 0.8
"""Hundredths of the width that a countdown must have to be drawn by itself: on a phone, two pixels."""
_LABELLED: Final = 14.0
"""… and that a span must have for its name to stand in it."""
_STEPS: Final = (
    *(1.0, 2.0, 5.0, 10.0, 15.0, 30.0),
    *(60.0, 120.0, 300.0, 600.0, 900.0, 1800.0),
    *(3600.0, 7200.0, 10_800.0, 21_600.0, 43_200.0),
    *(86_400.0, 172_800.0, 604_800.0, 1_209_600.0, 2_592_000.0),
)
_TICKS: Final = 6
_CLOSE: Final = 0.12
"""What takes less than this part of the width is drawn once more, from near."""

PRESENT: Final = {
    Presence.EXPECTED: "expected",
    Presence.CONNECTED: "connected",
    Presence.AWAY: "away",
    Presence.GONE: "gone",
}


class Window(NamedTuple):
    """From when until when is drawn, in Unix seconds."""

    since: float
    until: float

    def x(self, at: float) -> float:
        """Where a time is, in hundredths of the width; what is outside is at the edge."""
        return round(min(100.0, max(0.0, (at - self.since) / (self.until - self.since) * 100)), 3)

    def has(self, at: float) -> bool:
        """Is it drawn?"""
        return self.since <= at <= self.until


class Tick(NamedTuple):
    """A time at the axis."""

    x: float
    label: str
    anchor: str
    every: bool  # also where there is little room


class Bar(NamedTuple):
    """How the participant was for a time."""

    x: float
    width: float
    presence: str
    label: str  # "" where there is no room
    title: str


class Countdown(NamedTuple):
    """A countdown at the homeserver from its beginning until it began anew, was over, or ended. `high`, `low`: what was left, in hundredths."""

    x: float
    width: float
    high: float
    low: float
    kind: str  # ran; coming: it has not come to that yet; many: several that are too close to each other, or that nobody noted
    title: str


class Mark(NamedTuple):
    """Something that happened at one time."""

    x: float
    kind: str  # begun, failed, ended
    tone: str
    title: str


class Lane(NamedTuple):
    """One delayed event."""

    label: str
    countdowns: list[Countdown]
    marks: list[Mark]


class Drawing(NamedTuple):
    """All of it."""

    key: str  # for the ids in it
    heading: str
    window: Window
    ticks: list[Tick]
    presence: list[Bar]
    lanes: list[Lane]
    now: float | None  # where it is; None where it is not drawn
    text: str  # what it shows, in words


def drawings(rows: Sequence[DelayedEvent], notes: Sequence[Note], now: float) -> list[Drawing]:
    """The whole story; and where what decides takes too little of it to be seen, that from near."""
    spans = presence_of(rows, notes)
    whole = _whole(rows, now)
    found = [_drawing("whole", "The whole story" if (near := _near(rows, spans, whole, now)) else "", rows, notes, spans, whole, now)]
    if near is not None:
        found.append(_drawing("near", near[0], rows, notes, spans, near[1], now))
    return found


def presence_of(rows: Sequence[DelayedEvent], notes: Sequence[Note]) -> list[Span]:
    """How the participant was, by the event that tells the most: all events of a delegation hear the same."""
    longest = max(rows, key=lambda row: (row.finished_at is None, row.finished_at or 0.0, -row.accepted_at))
    return story.course(longest, notes)


# ── from when until when ──


def _whole(rows: Sequence[DelayedEvent], now: float) -> Window:
    since = min(row.accepted_at for row in rows)
    until = max(now if row.finished_at is None else row.finished_at for row in rows)
    ahead = max((row.deadline - now for row in rows if _runs(row)), default=0.0)
    if ahead > 0:
        # A countdown of hours must not press the minutes that there were into a corner.
        until = max(until, now + min(ahead, max(60.0, (now - since) * 2)))
    length = max(until - since, 1.0)
    return Window(since - length * 0.02, until + length * 0.02)


def _near(rows: Sequence[DelayedEvent], spans: Sequence[Span], whole: Window, now: float) -> tuple[str, Window] | None:
    length = whole.until - whole.since
    ended = all(row.finished_at is not None for row in rows)
    end = max(row.finished_at or now for row in rows) if ended else now
    if spans[-1].presence in (Presence.AWAY, Presence.GONE) and len(spans) > 1:
        last = len(spans) - 1
        while last > 1 and spans[last - 1].presence in (Presence.AWAY, Presence.GONE):
            last -= 1
        heading, since = "The departure, from near", spans[last].since
    elif ended:
        heading, since = "The end, from near", end - min(60.0, *(row.delay for row in rows))
    else:
        running = [row for row in rows if _runs(row)]
        if not running:
            return None
        shortest = min(running, key=lambda row: row.delay)
        heading, since, end = "The countdown, from near", now - shortest.delay, max(now, shortest.deadline)
    if end - since > length * _CLOSE:
        return None
    pad = max(2.0, (end - since) * 0.25)
    return heading, Window(max(whole.since, since - pad), end + pad)


def _runs(row: DelayedEvent) -> bool:
    return row.verified_at is not None and row.state in (State.LIVE, State.ADRIFT, State.SUPERSEDED, State.ENDING)


# ── what is where ──


def _drawing(
    key: str, heading: str, rows: Sequence[DelayedEvent], notes: Sequence[Note], spans: Sequence[Span], window: Window, now: float
) -> Drawing:
    return Drawing(
        key=key,
        heading=heading,
        window=window,
        ticks=list(_ticks(window)),
        presence=list(_bars(spans, window, now)),
        lanes=[_lane(row, [note for note in notes if note.event == row.id], window, now, several=len(rows) > 1) for row in rows],
        now=window.x(now) if window.has(now) and any(row.finished_at is None for row in rows) else None,
        text=_in_words(rows, spans, window, now),
    )


def _bars(spans: Sequence[Span], window: Window, now: float) -> Iterator[Bar]:
    for span in spans:
        until = now if span.until is None else span.until
        x, end = window.x(span.since), window.x(until)
        if until < window.since or span.since > window.until:
            continue
        word = PRESENT[span.presence]
        lasted = f"{word} for {story.span(until - span.since)}"
        yield Bar(
            x,
            round(end - x, 3),
            span.presence.value,
            word if end - x >= _LABELLED else "",
            f"{lasted}: {story.why(span.reason)}" if span.reason else lasted,
        )


def _lane(row: DelayedEvent, notes: Sequence[Note], window: Window, now: float, *, several: bool) -> Lane:
    label = f"countdown of {story.span(row.delay)}"
    return Lane(
        f"event {row.id}: {label}" if several else label,
        list(_joined(_countdowns(row, notes, window, now))),
        list(_marks(row, notes, window, now)),
    )


def _begins(row: DelayedEvent, notes: Sequence[Note]) -> list[float]:
    """When the countdown began anew, as far as anybody noted it."""
    if row.verified_at is None:
        return []
    noted = [note.at for note in notes if note.what == RESTARTED]
    first = [row.verified_at] if row.restarts > 0 else []
    begins: list[float] = []
    # The answer to a restart comes a little later than it was sent.
    for at in sorted([*first, *noted, row.running_since]):
        if not begins or at - begins[-1] > min(1.0, row.delay / 100):
            begins.append(at)
    return begins


def _countdowns(row: DelayedEvent, notes: Sequence[Note], window: Window, now: float) -> Iterator[Countdown]:
    end = min(now if row.finished_at is None else row.finished_at, _vanished_at(notes))
    begins = _begins(row, notes)

    def left(begin: float, at: float) -> float:
        return round(max(0.0, 100 * (1 - (at - begin) / row.delay)), 2)

    for begin, following in itertools.zip_longest(begins, begins[1:]):
        until = end if following is None else min(following, end)
        if following is not None and following - begin > row.delay * 1.02:
            # It was alive for longer than a countdown lasts, so there were restarts that left no line each.
            if (cut := _cut(begin, until, window)) is not None:
                yield Countdown(*_place(cut, window), 100.0, 100.0, "many", "kept alive: restarts of short countdowns leave no line each")
            continue
        over = begin + row.delay
        if (cut := _cut(begin, min(until, over), window)) is not None:
            yield Countdown(*_place(cut, window), left(begin, cut[0]), left(begin, cut[1]), "ran", f"began anew at {clock(begin, now)}")
        comes = following is None and row.finished_at is None and _runs(row) and over > now
        if comes and (cut := _cut(max(now, begin), over, window)) is not None:
            title = f"would run out at {clock(over, now)}, in {story.span(over - now)}"
            yield Countdown(*_place(cut, window), left(begin, cut[0]), left(begin, cut[1]), "coming", title)


def _vanished_at(notes: Sequence[Note]) -> float:
    """Since when the homeserver has not known the event any more: there is no countdown of what is not there. Infinite if it knows it."""
    at = math.inf
    for note in notes:
        if note.what == State.VANISHED:
            at = min(at, note.at)
        elif note.what == State.LIVE:
            at = math.inf
    return at


def _cut(since: float, until: float, window: Window) -> tuple[float, float] | None:
    since, until = max(since, window.since), min(until, window.until)
    return (since, until) if until > since else None


def _place(cut: tuple[float, float], window: Window) -> tuple[float, float]:
    x = window.x(cut[0])
    return x, round(window.x(cut[1]) - x, 3)


def _joined(countdowns: Iterator[Countdown]) -> Iterator[Countdown]:
    """Those that are too narrow to be drawn each by itself are one."""
    narrow: list[Countdown] = []

    def flushed() -> Iterator[Countdown]:
        if len(narrow) > 1:
            first, last = narrow[0], narrow[-1]
            width = round(last.x + last.width - first.x, 3)
            yield Countdown(first.x, width, 100.0, 100.0, "many", f"began anew {many(len(narrow))} times")
        else:
            yield from narrow
        narrow.clear()

    for countdown in countdowns:
        if countdown.kind == "ran" and countdown.width < _FINEST:
            narrow.append(countdown)
            continue
        yield from flushed()
        yield countdown
    yield from flushed()


def _marks(row: DelayedEvent, notes: Sequence[Note], window: Window, now: float) -> Iterator[Mark]:
    lines = story.tell([row], notes)
    for line in lines:
        if not window.has(line.at):
            continue
        title = f"{clock(line.at, now)}: {line.sentence}"
        if line.what == "delegated":
            yield Mark(window.x(line.at), "begun", Tone.PLAIN.value, title)
        elif line.what.endswith("_failed") or line.what == State.VANISHED:
            yield Mark(window.x(line.at), "failed", Tone.NOTICE.value, title)
        elif line.what in _ENDS:
            yield Mark(window.x(line.at), "ended", line.tone.value, title)


_ENDS: Final = frozenset(outcome.value for outcome in Outcome if outcome)


def _ticks(window: Window) -> Iterator[Tick]:
    """Round times, so many that they can be read."""
    length = window.until - window.since
    step = next((step for step in _STEPS if length / step <= _TICKS), _STEPS[-1])
    while length / step > _TICKS:
        step *= 2
    at = local(window.since).replace(hour=0, minute=0, second=0, microsecond=0, tzinfo=None)
    if step > 86_400:
        at -= timedelta(days=at.toordinal() % round(step / 86_400))
    at += max(0, int((window.since - at.timestamp()) / step) - 2) * timedelta(seconds=step)
    number = 0
    while (when := at.timestamp()) <= window.until:
        if window.has(when):
            x = window.x(when)
            yield Tick(x, _label(at, step), "start" if x < 6 else "end" if x > 94 else "middle", number % 2 == 0)
            number += 1
        at += timedelta(seconds=step)


def _label(at: datetime, step: float) -> str:
    if step >= 86_400 or (step >= 60 and (at.hour, at.minute) == (0, 0)):
        return day(at)
    return f"{at:%H:%M}" if step >= 60 else f"{at:%H:%M:%S}"


def _in_words(rows: Sequence[DelayedEvent], spans: Sequence[Span], window: Window, now: float) -> str:
    since, until = max(window.since, min(row.accepted_at for row in rows)), min(window.until, max(row.finished_at or now for row in rows))
    words = [f"From {clock(since, now)} to {clock(until, now)}, {story.span(until - since)}."]
    course = [
        f"{PRESENT[span.presence]} for {story.span(min(end, window.until) - max(span.since, window.since))}"
        for span in spans
        if (end := now if span.until is None else span.until) >= window.since and span.since <= window.until
    ]
    if course:
        words.append(f"The participant was {', then '.join(course[:12])}{' and more' if len(course) > 12 else ''}.")
    for row in rows:
        what = f"The countdown of {story.span(row.delay)} was begun anew {_times(row.restarts)}"
        if row.finished_at is not None:
            words.append(f"{what}; {clock(row.finished_at, now)}: {story.now_so(row, now)[0]}")
        elif row.verified_at is None:
            words.append("The homeserver has not confirmed the delayed event yet.")
        elif row.deadline > now:
            words.append(f"{what}, and would run out in {story.span(row.deadline - now)}.")
        else:
            words.append(f"{what}, and its time is over.")
    return " ".join(words)


def _times(count: int) -> str:
    return "never" if count == 0 else "once" if count == 1 else "twice" if count == 2 else f"{many(count)} times"
