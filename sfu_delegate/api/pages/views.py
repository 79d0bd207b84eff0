"""What each page shows.

Pages are put together apart from the event loop: nobody's webhook waits for them. A browser asks again and again, so a page tells it how long to
wait, by what it took.
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple
from urllib.parse import quote, urlencode

from aiohttp import web

from sfu_delegate.api.admin import Query, Questions, full_stop, sentence_of
from sfu_delegate.api.errors import MatrixError
from sfu_delegate.api.pages.answers import STATIC, page, rendered, static
from sfu_delegate.api.pages.timeline import drawings
from sfu_delegate.api.services import AdminServices
from sfu_delegate.delegation.model import DelayedEvent, OnEnd, Outcome, Presence, Room, State
from sfu_delegate.observe import story
from sfu_delegate.store.reading import RoomCount

PAGE: Final = 50
IN_ROOM: Final = 500  # open delayed events of a room that are shown
FINISHED: Final = 25  # … and finished ones
REFRESH: Final = 10.0
"""Seconds until a browser asks again, at the least."""
REFRESH_MOST: Final = 120.0
COST: Final = 30
"""It takes no more than one part of so many of the time."""

_FILTERS: Final[tuple[str, ...]] = (
    *("room", "user", "homeserver", "sfu", "presence", "state", "outcome", "open"),
    *("newer_than_s", "older_than_s", "finished_within_s", "limit"),
)
_WORDS: Final = {
    State.LIVE: "kept alive",
    State.ENDING: "saying goodbye",
    State.SUPERSEDED: "being replaced",
    State.VANISHED: "vanished",
    State.ADRIFT: "let run",
    State.DONE: "finished",
}
_ENDED: Final = {
    Outcome.SENT: ("leave event sent", "good"),
    Outcome.CANCELLED: ("cancelled, as asked for", "good"),
    Outcome.ALREADY_ENDED: ("ended by the client itself", "good"),
    Outcome.REPLACED: ("replaced by a newer one", "good"),
    Outcome.RAN_OUT: ("ran out after the departure", "notice"),
    Outcome.WITHDRAWN: ("taken back", "notice"),
    Outcome.LOST: ("lost while connected", "bad"),
    Outcome.REJECTED: ("refused by the homeserver", "bad"),
    Outcome.UNKNOWN: ("never known to the homeserver", "bad"),
}

Handler = Callable[[web.Request], Awaitable[web.Response]]


PATHS: Final = ("/", "/rooms", "/rooms/{sfu}/{room}", "/delegations", "/delegations/{id}", STATIC + "{name}")
"""What is for people and their browsers: no program is promised that it stays as it is."""


def page_routes(services: AdminServices, questions: Questions) -> list[tuple[str, Handler]]:
    """Path and handler of each page; all are asked for by GET."""
    pages = Pages(services, questions)
    handlers = (pages.overview, pages.rooms, pages.room, pages.delegations, pages.delegation, static)
    return list(zip(PATHS, handlers, strict=True))


# ── errors ──

_FOR_PROGRAMS: Final = ("/admin/", "/health/", "/metrics")
_TITLES: Final = {
    400: "This cannot be understood",
    401: "Who are you?",
    403: "Not from here",
    404: "Nothing is here",
    405: "The page only reads",
    503: "Not now",
}


def error_form(now: Callable[[], float]) -> Callable[[web.Request, MatrixError], web.Response]:
    """Errors as pages, for browsers; as JSON for all others, and in the API."""

    def form(request: web.Request, error: MatrixError) -> web.Response:
        if request.path.startswith(_FOR_PROGRAMS) or "text/html" not in request.headers.get("Accept", ""):
            return error.response()
        title = _TITLES.get(error.status, "Something went wrong")
        # A path that is none is told to programs with where the paths are described, which is nothing to a person.
        sentence = "There is no such page here." if (error.status, error.errcode) == (404, "M_UNRECOGNIZED") else error.error
        html = rendered("error.html", request.rel_url.raw_path, now(), title=title, error=error, sentence=sentence, here="", refresh=None)
        return page(html, status=error.status, headers=error.form()[1])

    return form


# ── rates ──


_LIVE: Final = {"connected": "in a call", "away": "away", "expected": "expected to join", "gone": "gone"}
"""How those are whose delayed events are kept alive."""


class Rates:
    """How often things happened lately: the difference to an earlier look at the counts."""

    OVER: Final = 300.0  # seconds
    LEAST: Final = 5.0

    def __init__(self) -> None:
        self._looks: deque[tuple[float, Mapping[str, int]]] = deque()

    def lately(self, now: float, started: float, counts: Mapping[str, int]) -> tuple[float, dict[str, float]]:
        """Over how many seconds, and how often in a second. `started`: when all counts were zero."""
        while len(self._looks) > 1 and self._looks[1][0] <= now - self.OVER:
            self._looks.popleft()
        since: float = started
        before: Mapping[str, int] = {}
        if self._looks and self.LEAST <= now - self._looks[0][0] <= self.OVER * 2:
            since, before = self._looks[0]
        if not self._looks or now - self._looks[-1][0] >= self.LEAST:
            self._looks.append((now, dict(counts)))
        over = max(now - since, 1.0)
        return over, {name: max(0, count - before.get(name, 0)) / over for name, count in counts.items()}


class Happening(NamedTuple):
    """A line of the table of rates."""

    name: str
    total: int
    rate: float  # a second
    tone: str
    detail: str = ""


_TAKEN: Final = frozenset({"stored", "ignored"})
_LIMITED: Final = "limited"
_FAILED: Final = frozenset({"failed", "uncertain", "refused"})


def _counts(status: Mapping[str, Any]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for hook in status["webhooks"]:
        counts["webhooks" if hook["result"] in _TAKEN else "webhooks_refused"] += hook["count"]
    for action in status["actions"]:
        what, how = action["action"], action["outcome"]
        if how == _LIMITED:
            counts["limited"] += action["count"]
        elif how in _FAILED:
            counts["failed"] += action["count"]
        else:
            counts["restarts" if what == "restart" else "goodbyes"] += action["count"]
    return counts


def _happenings(status: Mapping[str, Any], rates: Mapping[str, float], counts: Mapping[str, int]) -> list[Happening]:
    refused: Counter[str] = Counter()
    for hook in status["webhooks"]:
        if hook["result"] not in _TAKEN:
            refused[hook["result"]] += hook["count"]
    failed: Counter[str] = Counter()
    for action in status["actions"]:
        if action["outcome"] in _FAILED:
            failed[f"{action['action']} {action['outcome']}"] += action["count"]

    def line(key: str, name: str, tone: str = "plain", detail: Mapping[str, int] | None = None) -> Happening:
        count = counts.get(key, 0)
        more = ", ".join(f"{n} × {what.replace('_', ' ')}" for what, n in sorted((detail or {}).items(), key=lambda item: -item[1]))
        return Happening(name, count, rates.get(key, 0.0), tone if count else "plain", more)

    return [
        line("webhooks", "Webhooks taken"),
        line("webhooks_refused", "Webhooks refused", "notice", refused),
        line("restarts", "Restarts"),
        line("goodbyes", "Goodbyes and cancellations"),
        line("limited", "Refused by a homeserver’s rate limit", "notice"),
        line("failed", "Failed otherwise, and tried again", "notice", failed),
    ]


# ── pages ──


class Pages:
    """Answers browsers."""

    def __init__(self, services: AdminServices, questions: Questions) -> None:
        self._services = services
        self._questions = questions
        self._rates = Rates()

    def _now(self) -> float:
        return self._services.inspection.overview().now

    async def _page(self, template: str, request: web.Request, begun: float, now: float, make: Callable[[], dict[str, Any]]) -> web.Response:
        def render() -> str:
            given = make()
            refresh = min(REFRESH_MOST, max(REFRESH, (time.monotonic() - begun) * COST))
            return rendered(template, request.rel_url.raw_path, now, refresh=refresh, **given)

        return page(await asyncio.to_thread(render))

    async def overview(self, request: web.Request) -> web.Response:
        """How the daemon is: the promises first."""
        Query(request.query, 0.0).no_more()
        begun = time.monotonic()
        status = await self._questions.status()
        now = status["now_ts"] / 1000
        counts = _counts(status)
        over, rates = self._rates.lately(now, status["started_ts"] / 1000, counts)

        def make() -> dict[str, Any]:
            return {
                "here": "overview",
                "status": status,
                "live": [
                    (status["events"]["live_by_presence"].get(presence, 0), words)
                    for presence, words in _LIVE.items()
                    if status["events"]["live_by_presence"].get(presence, 0)
                ],
                "happenings": _happenings(status, rates, counts),
                "over": over if over < now - status["started_ts"] / 1000 else None,
                "troubles": _troubles(status),
                "endings": [
                    (*_ENDED[Outcome(outcome)], count) for outcome, count in sorted(status["promises"]["ended"].items(), key=lambda item: -item[1])
                ],
                "homeservers": [_homeserver(server) for server in status["homeservers"]],
                "sfus": [_sfu(sfu) for sfu in status["sfus"]],
            }

        return await self._page("overview.html", request, begun, now, make)

    async def rooms(self, request: web.Request) -> web.Response:
        """Rooms with delegations."""
        begun, now = time.monotonic(), self._now()
        given = _given(request)
        query = Query(given, now)
        named, sfu = query.rooms(), query.text("sfu")
        after = (query.text("after_sfu") or "", query.text("after") or "")
        query.no_more()
        rooms, counts = await self._questions.rooms(PAGE + 1, after if any(after) else None, sfu=sfu, named=named)
        shown = rooms[:PAGE]

        def make() -> dict[str, Any]:
            kept = {name: value for name, value in given.items() if name in ("room", "sfu")}
            last = shown[-1] if shown else None
            more = len(rooms) > PAGE and last is not None and last.name.isprintable()
            return {
                "here": "rooms",
                "rooms": [_room(room, counts) for room in shown],
                "given": given,
                "kept": kept,
                "sfus": self._sfus(sfu),
                "first": any(after),
                "following": urlencode({**kept, "after_sfu": last.sfu, "after": last.name}) if more and last is not None else None,
            }

        return await self._page("rooms.html", request, begun, now, make)

    async def room(self, request: web.Request) -> web.Response:
        """One room: who is in it, and what the SFU says."""
        Query(request.query, 0.0).no_more()
        begun, now = time.monotonic(), self._now()
        sfu, name = request.match_info["sfu"], request.match_info["room"]
        found = await self._questions.in_room(sfu, name, IN_ROOM, FINISHED)

        def make() -> dict[str, Any]:
            present = Counter(presence for _, presence in {(row.identity, row.presence) for row in found.open})
            return {
                "here": "rooms",
                "sfu": sfu,
                "name": name,
                "room": found.room,
                "present": [(presence.value, present[presence]) for presence in _ORDER],
                "open": [shown(row, now) for row in sorted(found.open, key=lambda row: (row.user or row.identity, -row.id))],
                "finished": [shown(row, now) for row in found.finished],
                "complete": len(found.open) < IN_ROOM,
                "all": urlencode({"sfu": sfu, "room": name}) if name.isprintable() else None,
            }

        return await self._page("room.html", request, begun, now, make)

    async def delegations(self, request: web.Request) -> web.Response:
        """Delayed events that match, the newest first."""
        begun, now = time.monotonic(), self._now()
        given = _given(request)
        query = Query(given, now)
        wanted, before = query.selection(), query.number("before")
        limit = query.page() if "limit" in given else PAGE
        query.no_more()
        rows = await self._questions.events(wanted, limit + 1, before)

        def make() -> dict[str, Any]:
            kept = {name: given[name] for name in _FILTERS if name in given}
            return {
                "here": "delegations",
                "rows": [shown(row, now) for row in rows[:limit]],
                "given": given,
                "kept": kept,
                "filtered": [(name.removesuffix("_s").replace("_", " "), value) for name, value in kept.items() if name != "limit"],
                "choices": _choices(given),
                "sfus": self._sfus(wanted.sfu),
                "first": before is not None,
                "newest": urlencode(kept),
                "older": urlencode({**kept, "before": rows[limit - 1].id}) if len(rows) > limit else None,
            }

        return await self._page("delegations.html", request, begun, now, make)

    async def delegation(self, request: web.Request) -> web.Response:
        """One delegation, with its story drawn to scale."""
        Query(request.query, 0.0).no_more()
        begun, now = time.monotonic(), self._now()
        rows, notes = await self._questions.delegation(request.match_info["id"])

        def make() -> dict[str, Any]:
            return {
                "here": "delegations",
                "id": rows[0].delegation,
                "who": rows[0],
                "room_path": room_path(rows[0].sfu, rows[0].room),
                "rows": [shown(row, now) for row in rows],
                "several": len(rows) > 1,
                "drawings": drawings(rows, notes, now),
                "lines": _grouped(story.tell(rows, notes)),
                "is_open": any(row.state is not State.DONE for row in rows),
                "user_query": urlencode({"user": user}) if (user := rows[0].user or rows[0].identity).isprintable() else None,
            }

        return await self._page("delegation.html", request, begun, now, make)

    def _sfus(self, chosen: str | None) -> list[str]:
        names = [sfu.name for sfu in self._services.inspection.overview().sfus]
        return names if chosen is None or chosen in names else [*names, chosen]


def _given(request: web.Request) -> dict[str, str]:
    """What was asked for: a form sends what was left empty, too. Raises MatrixError."""
    pairs = [(name, value) for name, value in request.query.items() if value]
    given = dict(pairs)
    if len(given) != len(pairs):
        raise MatrixError(400, "M_INVALID_PARAM", "A parameter is there twice.")
    return given


# ── what is shown ──

_ORDER: Final = (Presence.CONNECTED, Presence.AWAY, Presence.EXPECTED, Presence.GONE)


class Shown(NamedTuple):
    """A delayed event in a table."""

    row: DelayedEvent
    path: str
    room_path: str
    sentence: str
    brief: str
    tone: str
    word: str
    goodbye: str


def shown(row: DelayedEvent, now: float) -> Shown:
    """A delayed event, as it is now."""
    sentence, tone = story.now_so(row, now)
    brief = story.briefly(row, now)
    word = _ENDED[row.outcome][0] if row.outcome in _ENDED else _WORDS[row.state]
    path = f"delegations/{quote(row.delegation, safe='')}"
    return Shown(row, path, room_path(row.sfu, row.room), sentence, brief, tone.value, word, "sent" if row.on_end is OnEnd.SEND else "cancelled")


def room_path(sfu: str, room: str) -> str:
    """Where a room's page is, below the root. In a path, browsers take some names for steps."""
    if {sfu, room} & {"", ".", ".."}:
        return f"delegations?{urlencode({'sfu': sfu, 'room': room})}"
    return f"rooms/{quote(sfu, safe='')}/{quote(room, safe='')}"


class ShownRoom(NamedTuple):
    """A room in a table."""

    room: Room
    path: str
    present: dict[str, int]
    events: int


def _room(room: Room, counts: Sequence[RoomCount]) -> ShownRoom:
    here = [count for count in counts if (count.sfu, count.room) == (room.sfu, room.name)]
    present = {presence.value: sum(count.participants for count in here if count.presence == presence.value) for presence in Presence}
    return ShownRoom(room, room_path(room.sfu, room.name), present, sum(count.events for count in here))


class Condition(NamedTuple):
    """A homeserver or an SFU: what it is like, in words."""

    its: Mapping[str, Any]
    tone: str
    words: list[str]


_ASKED: Final = {True: "Answers.", False: "Has not been asked yet."}
_LIMITS: Final = {
    "exempt": "No rate limit holds for the daemon",
    "none": "No rate limit has shown",
    "unknown": "Its rate limit is not known yet",
}


def _homeserver(server: Mapping[str, Any]) -> Condition:
    words = [sentence_of(server["problem"]) if server["problem"] else _ASKED[server["asked"]]]
    tone = "bad" if server["problem"] else "good" if server["asked"] else "plain"
    if server["application_service"] not in ("none", "ok"):
        words.append(f"Its application service does not work: {full_stop(server['application_service'])}")
        tone = "bad" if tone == "bad" else "notice"
    if server["rate"] is not None:
        words.append(f"Allows {server['rate']:.2g} action{'' if server['rate'] == 1 else 's'} a second, {server['burst']:.2g} at once.")
    else:
        words.append(f"{_LIMITS.get(server['limit'], server['limit'])}.")
    if server["restart_lateness_s"] > 0:
        words.append(f"Restarts will be {story.span(server['restart_lateness_s'])} late.")
        tone = "bad"
    endings = server["endings_waiting"]
    if endings["count"] and (endings["oldest_s"] or 0) > story.LATE:
        tone = "bad"
    return Condition(server, tone, words)


def _sfu(sfu: Mapping[str, Any]) -> Condition:
    words = [sentence_of(sfu["problem"]) if sfu["problem"] else _ASKED[sfu["asked"]]]
    tone = "bad" if sfu["problem"] else "good" if sfu["asked"] else "plain"
    if sfu["several_nodes"]:
        words.append("Has several nodes: its lists may be wrong for a while.")
    if sfu["asked"] and not sfu["webhooks"]:
        words.append("No webhook of it has come since the start.")
        tone = "notice" if tone == "good" else tone
    return Condition(sfu, tone, words)


def _troubles(status: Mapping[str, Any]) -> list[str]:
    """What is wrong right now."""
    database = status["database"]
    if database["problem"] or not database["reading_problem"]:
        return list(status["causes"])
    return [*status["causes"], f"The database cannot be read for this page: {full_stop(database['reading_problem'])}"]


class Line(NamedTuple):
    """A line of the story, or several that say the same."""

    lines: list[story.Line]
    after: float | None  # seconds since what was before, where it was soon
    of_event: bool  # only of this delayed event: what happens to the participant, all of its events hear

    @property
    def first(self) -> story.Line:
        """The oldest."""
        return self.lines[0]

    @property
    def last(self) -> story.Line:
        """The newest."""
        return self.lines[-1]


_SOON: Final = 60.0
_PRESENCES: Final = frozenset(presence.value for presence in Presence)


def _grouped(lines: Iterable[story.Line]) -> list[Line]:
    """What is repeated again and again is one line, and so is what several events hear of their participant."""
    grouped: list[Line] = []
    heard: set[tuple[float, str, str]] = set()
    for line in lines:
        of_event = line.what not in _PRESENCES
        if not of_event:
            if (line.at, line.what, line.detail) in heard:
                continue
            heard.add((line.at, line.what, line.detail))
        before = grouped[-1] if grouped else None
        if before is not None and (line.what, line.event, line.sentence) == (before.first.what, before.first.event, before.first.sentence):
            before.lines.append(line)
            continue
        after = None if before is None else line.at - before.last.at
        grouped.append(Line([line], after if after is not None and 0.05 <= after < _SOON else None, of_event))
    return grouped


class Choice(NamedTuple):
    """A list to choose from, in the form."""

    name: str
    label: str
    options: list[tuple[str, str]]
    chosen: str


_AGES: Final = (("3600", "the last hour"), ("86400", "the last day"), ("604800", "the last week"))


def _choices(given: Mapping[str, str]) -> list[Choice]:
    lists: list[tuple[str, str, Sequence[tuple[str, str]]]] = [
        ("open", "Finished?", (("true", "not finished"), ("false", "finished"))),
        ("presence", "Participant", [(presence.value, presence.value) for presence in _ORDER]),
        ("outcome", "How it ended", [(outcome.value, words) for outcome, (words, _) in _ENDED.items()]),
        ("state", "Delayed event", [(state.value, _WORDS[state]) for state in State]),
        ("newer_than_s", "Handed over in", _AGES),
    ]
    choices = []
    for name, label, options in lists:
        chosen = given.get(name, "")
        own = [] if not chosen or chosen in dict(options) else [(chosen, f"{chosen} s" if name.endswith("_s") else chosen.replace(",", " or "))]
        choices.append(Choice(name, label, [*options, *own], chosen))
    return choices
