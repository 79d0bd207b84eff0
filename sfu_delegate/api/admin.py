"""The operator's API, on the admin listener: what there is, why it is so, and the two things that an operator can have done to a delegation.

`admin_access` says who may ask. It must never tell a delay_id or a token; a hint of a delay_id is all that the database's reader gives.
"""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from struct import unpack
from typing import Any, Final, NamedTuple, TypeVar

from aiohttp import web

from sfu_delegate.api.admin_access import over_socket
from sfu_delegate.api.errors import MatrixError, json_response, printable
from sfu_delegate.api.health import READY_TIMEOUT, detail_of
from sfu_delegate.api.overview import HomeserverState, Overview, SfuState
from sfu_delegate.api.port import Overloaded, Unavailable
from sfu_delegate.api.services import AdminServices, Phase
from sfu_delegate.delegation.model import DelayedEvent, End, Lane, Note, Outcome, Presence, Room, State, Withdraw
from sfu_delegate.delegation.replies import Withdrawn
from sfu_delegate.livekit import names
from sfu_delegate.observe import story
from sfu_delegate.store.reading import Reader, RoomCount, Selection, Size

T = TypeVar("T")

PREFIX: Final = "/admin/v1"
PAGE: Final = 100
PAGE_MOST: Final = 1000
EXPLAINED_MOST: Final = 200
"""Delayed events that are explained at a time: the newest."""
EXPLAINED_LINES: Final = 20_000
"""Lines of their histories, about: the newest of each."""

TEXT_MOST: Final = 1000  # characters of a parameter; LiveKit allows 256 in names

_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_IMPOSSIBLE: Final = re.compile("[\x00\ud800-\udfff]")  # what no text in a database has
_NO_ID: Final = "This is no id of a delegation, which begins with dlg_, and no number of a row: `sfu-delegate list` shows them."
_NO_SUCH: Final = "There is no such delegation here. It may have been removed: finished ones are kept for `history.keep`."


def admin_routes(services: AdminServices, questions: "Questions") -> list[tuple[str, str, Callable[[web.Request], Awaitable[web.Response]]]]:
    """Method, path and handler of each endpoint."""
    admin = AdminApi(services, questions)
    return [
        ("GET", f"{PREFIX}/status", admin.status),
        ("GET", f"{PREFIX}/delegations", admin.list),
        ("GET", f"{PREFIX}/delegations/{{id}}", admin.show),
        ("POST", f"{PREFIX}/delegations/{{id}}/end", admin.end),
        ("POST", f"{PREFIX}/delegations/{{id}}/release", admin.release),
        ("GET", f"{PREFIX}/rooms", admin.rooms),
        ("GET", f"{PREFIX}/explain", admin.explain),
        ("GET", f"{PREFIX}/webhooks/{{room}}", admin.webhooks),
    ]


class AdminApi:
    """Answers in JSON."""

    def __init__(self, services: AdminServices, questions: "Questions") -> None:
        self._services = services
        self._questions = questions

    async def status(self, _: web.Request) -> web.Response:
        """The overview."""
        return json_response(await self._questions.status())

    async def list(self, request: web.Request) -> web.Response:
        """Delayed events that match, the newest first."""
        query = Query(request.query, self._services.port.now())
        wanted, limit, before = query.selection(), query.page(), query.number("before")
        query.no_more()
        found = await self._questions.events(wanted, limit, before)
        now = self._services.port.now()
        more = {"before": found[-1].id} if len(found) == limit else {}
        return json_response({"now_ts": _ts(now), "events": [event_json(row, now) for row in found], **more})

    async def show(self, request: web.Request) -> web.Response:
        """One delegation, with its story."""
        rows, notes = await self._questions.delegation(request.match_info["id"])
        now = self._services.port.now()
        told = await asyncio.to_thread(story_json, rows, notes, now)  # a long one must not hold up webhooks
        return json_response({"id": rows[0].delegation, "now_ts": _ts(now), **told})

    async def rooms(self, request: web.Request) -> web.Response:
        """Rooms with delegations, by SFU and name."""
        query = Query(request.query, self._services.port.now())
        named, sfu, limit = query.rooms(), query.text("sfu"), query.page()
        after = (query.text("after_sfu") or "", query.text("after") or "")
        query.no_more()
        rooms, counts = await self._questions.rooms(limit, after if any(after) else None, sfu=sfu, named=named)
        more = {"after_sfu": rooms[-1].sfu, "after": rooms[-1].name} if len(rooms) == limit else {}
        now = self._services.port.now()
        return json_response({"now_ts": _ts(now), "rooms": rooms_json(rooms, counts), **more})

    async def explain(self, request: web.Request) -> web.Response:
        """Why it is, or was, so: the story of each delayed event of a room, or of a user."""
        query = Query(request.query, self._services.port.now())
        wanted = query.selection()
        query.no_more()
        if not wanted.rooms and wanted.user is None:
            raise _bad("room, or user, is missing: name the room (Matrix's id, or LiveKit's name), the user, or both.")
        return json_response(await self._questions.explained(wanted))

    async def end(self, request: web.Request) -> web.Response:
        """Have the leave events sent now."""
        return await self._change(request, "operator_ended", End)

    async def release(self, request: web.Request) -> web.Response:
        """Forget the delegation, and leave its events at the homeserver as they are."""
        return await self._change(request, "operator_released", partial(Withdraw, by_operator=True))

    async def webhooks(self, request: web.Request) -> web.Response:
        """What came about a room that was made to see whether webhooks come."""
        room = request.match_info["room"]
        told = self._services.probes.of(room)
        return json_response({"room": room, "webhooks": [{"at_ts": _ts(probe.at), "sfu": probe.sfu, "event": probe.event} for probe in told]})

    async def _change(self, request: web.Request, what: str, change: Callable[[str], End | Withdraw]) -> web.Response:
        id = request.match_info["id"]
        if not _ID.fullmatch(id):
            raise _none(id)
        before, _ = await self._questions.delegation(id)
        row, by = before[0], _who(request)
        try:
            reply = await self._services.port.put(change(row.delegation))
        except Unavailable as error:  # it may have been kept all the same
            self._services.log.warning(what, delegation=row.delegation, room=row.room, identity=row.identity, by=by, problem=str(error))
            raise
        assert isinstance(reply, Withdrawn)  # noqa: S101
        if not reply.rows:
            raise MatrixError(404, "M_NOT_FOUND", _NO_SUCH)
        changed = sum(row.state is not State.DONE for row in before)
        self._services.log.warning(what, delegation=row.delegation, room=row.room, identity=row.identity, events=changed, by=by)
        now = self._services.port.now()
        return json_response({"id": row.delegation, "changed": changed, "events": [event_json(row._replace(delay_id=""), now) for row in reply.rows]})


def _none(id: str) -> MatrixError:
    """There is no such delegation: because it has gone, or because that is none."""
    could_be = id.startswith("dlg_") or (id.isdecimal() and id.isascii())
    return MatrixError(404, "M_NOT_FOUND", _NO_SUCH if could_be else _NO_ID)


def _who(request: web.Request) -> str:
    """Who has it done, as far as anybody can tell: at a Unix socket the kernel does."""
    if not over_socket(request) or request.transport is None:
        return f"token, from {request.remote}"
    import socket  # the constants are Linux's

    sock = request.transport.get_extra_info("socket")
    _, user, _ = unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return f"socket, by user {user}"


# ── questions ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Query:
    """The parameters of a question. Raises MatrixError where one cannot be understood, and so does each method."""

    def __init__(self, given: Mapping[str, str], now: float) -> None:
        self._given = dict(given)
        if len(self._given) != len(given):  # in a query, one name may have several values
            raise _bad("a parameter is there twice.")
        self._now = now
        self._known: set[str] = set()

    def text(self, name: str) -> str | None:
        """A parameter, if it is there. Names are what clients have chosen: whatever the database can have is one."""
        self._known.add(name)
        value = self._given.get(name)
        if value is not None and (not value or len(value) > TEXT_MOST or _IMPOSSIBLE.search(value)):
            raise _bad(f"{name} must be a text of 1 to {TEXT_MOST} characters, without NUL.")
        return value

    def number(self, name: str) -> int | None:
        """A whole number, if it is there."""
        value = self.text(name)
        if value is None:
            return None
        if not value.isdecimal() or not value.isascii() or len(value) > 18:
            raise _bad(f"{name} must be a whole number.")
        return int(value)

    def page(self) -> int:
        """How many are wanted."""
        limit = self.number("limit")
        if limit is not None and not 1 <= limit <= PAGE_MOST:
            raise _bad(f"limit must be from 1 to {PAGE_MOST}.")
        return limit or PAGE

    def rooms(self) -> tuple[str, ...]:
        """LiveKit's names of the room that is meant: a Matrix room id stands for its call, too."""
        room = self.text("room")
        return () if room is None else livekit_names(room)

    def _words(self, name: str, allowed: Sequence[str]) -> tuple[str, ...]:
        value = self.text(name)
        words = () if value is None else tuple(value.split(","))
        for word in words:
            if word not in allowed:
                raise _bad(f"{name} cannot be {printable(word)}: it is one of {', '.join(allowed)}, or several with commas between.")
        return words

    def _seconds(self, name: str) -> float | None:
        value = self.number(name)
        return None if value is None else self._now - value

    def selection(self) -> Selection:
        """Which delayed events are wanted."""
        opened = self.text("open")
        if opened not in (None, "true", "false"):
            raise _bad("open must be true or false.")
        return Selection(
            sfu=self.text("sfu"),
            rooms=self.rooms(),
            user=self.text("user"),
            homeserver=self.text("homeserver"),
            states=self._words("state", [state.value for state in State]),
            presences=self._words("presence", [presence.value for presence in Presence]),
            outcomes=self._words("outcome", [outcome.value for outcome in Outcome if outcome]),
            open=None if opened is None else opened == "true",
            accepted_before=self._seconds("older_than_s"),
            accepted_after=self._seconds("newer_than_s"),
            finished_after=self._seconds("finished_within_s"),
        )

    def no_more(self) -> None:
        """What nobody asked for is a mistake: a filter that is not understood would show too much."""
        for name in self._given:
            if name not in self._known:
                shown = name if re.fullmatch(r"[a-z_]{1,40}", name) else "?"
                raise _bad(f"{shown} is no parameter here: there are {', '.join(sorted(self._known))}.")


def livekit_names(room: str) -> tuple[str, ...]:
    """A room as an operator names it: as it is, and a Matrix room id as the LiveKit room of its call."""
    try:
        return (room, names.room_name(room)) if room.startswith("!") else (room,)
    except UnicodeEncodeError:
        return (room,)


class Sizes:
    """How much the database holds. To find it out reads the whole table, so it is remembered, for a time in proportion to what it took: browsers
    that show the overview all night ask for it again and again.
    """

    SHARE: Final = 50
    """It takes no more than one part of so many of the time of whoever reads the database."""
    LONGEST: Final = 300.0
    """Seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: Size | None = None
        self._until = 0.0
        self._reading: asyncio.Task[Size] | None = None

    async def read(self, read: Callable[[Callable[[Reader], Size]], Awaitable[Size]]) -> Size:
        """As it was found last, or is found by `read` now. Raises what `read` raises, which is not remembered."""
        if self._known is not None and self._clock() < self._until:
            return self._known
        if self._reading is None:  # one for all who ask: where the database hangs, they must not wait one after the other
            self._known = None
            self._reading = asyncio.ensure_future(self._read(read))
            self._reading.add_done_callback(self._is_read)
        return await asyncio.shield(self._reading)

    async def _read(self, read: Callable[[Callable[[Reader], Size]], Awaitable[Size]]) -> Size:
        self._known = size = await read(self._measured)
        return size

    def _is_read(self, task: "asyncio.Task[Size]") -> None:
        self._reading = None
        if not task.cancelled():
            task.exception()  # whoever has asked may have gone

    def _measured(self, reader: Reader) -> Size:
        begun = self._clock()
        size = reader.size()
        done = self._clock()
        self._until = done + min(self.LONGEST, (done - begun) * self.SHARE)
        return size


class InRoom(NamedTuple):
    """A room of an SFU, and the delayed events in it. `room` is None where the SFU is not looked at for it any more."""

    room: Room | None
    open: list[DelayedEvent]
    finished: list[DelayedEvent]  # the newest


@dataclass(frozen=True, slots=True)
class Questions:
    """What is asked of the daemon, for JSON and for pages. All but the status raise MatrixError."""

    services: AdminServices
    sizes: Sizes = field(default_factory=Sizes)

    async def _read(self, work: Callable[[Reader], T]) -> T:
        """Whoever asks here is told what is wrong with the database."""
        try:
            return await self.services.inspection.read(work)
        except Unavailable as error:
            raise MatrixError(503, "M_UNKNOWN", f"The database cannot be asked. {error}", retry_after=error.retry_after) from None

    async def status(self) -> dict[str, Any]:
        """All of the overview, also where the database does not answer."""
        readiness = await self.services.readiness(READY_TIMEOUT)
        overview = self.services.inspection.overview()
        size: Size | None = None
        try:
            size = await self.sizes.read(self.services.inspection.read)
        except (Unavailable, Overloaded) as error:
            problem = str(error)
        else:
            problem = ""
        return status_json(overview, detail_of(readiness), size, problem)

    async def events(self, wanted: Selection, limit: int, before: int | None = None) -> list[DelayedEvent]:
        """The newest that match."""
        return await self._read(lambda reader: reader.events(wanted, limit, before))

    async def delegation(self, id: str) -> tuple[list[DelayedEvent], list[Note]]:
        """One delegation by its id, or by the number of one of its events, which logs call `row`."""

        def read(reader: Reader) -> tuple[list[DelayedEvent], list[Note]]:
            rows = reader.delegation(id) if _ID.fullmatch(id) else []
            if not rows and id.isdecimal() and id.isascii() and len(id) < 19 and (event := reader.event(int(id))) is not None:
                rows = reader.delegation(event.delegation)
            return rows, reader.history([row.id for row in rows])

        rows, notes = await self._read(read)
        if not rows:
            raise _none(id)
        return rows, notes

    async def rooms(
        self, limit: int, after: tuple[str, str] | None = None, *, sfu: str | None = None, named: Sequence[str] = ()
    ) -> tuple[list[Room], list[RoomCount]]:
        """Rooms, and who is in them."""

        def read(reader: Reader) -> tuple[list[Room], list[RoomCount]]:
            rooms = reader.rooms(limit, after, sfu=sfu, named=named)
            return rooms, reader.in_rooms([(room.sfu, room.name) for room in rooms])

        return await self._read(read)

    async def in_room(self, sfu: str, name: str, limit: int, finished: int) -> InRoom:
        """One room, with so many of its open delayed events and of its finished ones, the newest first."""

        def read(reader: Reader) -> InRoom:
            (room,) = reader.rooms(1, sfu=sfu, named=[name]) or (None,)
            here = Selection(sfu=sfu, rooms=(name,), open=True)
            return InRoom(room, reader.events(here, limit), reader.events(replace(here, open=False), finished))

        found = await self._read(read)
        if not any(found):
            raise MatrixError(404, "M_NOT_FOUND", "There is no such room here: nobody in it has delegated, or it was removed when all was over.")
        return found

    async def explained(self, wanted: Selection) -> dict[str, Any]:
        """The stories of what matches, by participant."""

        overview = self.services.inspection.overview()

        def read(reader: Reader) -> tuple[list[DelayedEvent], dict[str, Any]]:
            """All of it in the reader's thread: long stories must not hold up webhooks."""
            rows = reader.events(wanted, EXPLAINED_MOST)
            notes = reader.history([row.id for row in rows], EXPLAINED_LINES // max(len(rows), 1))
            theirs = {(row.sfu, row.room) for row in rows}
            rooms = reader.rooms(PAGE_MOST, named=sorted({room for _, room in theirs})) if rows else []
            rooms = [room for room in rooms if (room.sfu, room.name) in theirs]
            counts = reader.in_rooms([(room.sfu, room.name) for room in rooms])
            told = {"rooms": rooms_json(rooms, counts), "participants": participants_json(rows, notes, overview.now)}
            return rows, told

        rows, told = await self._read(read)
        concerned = {row.homeserver for row in rows}, {row.sfu for row in rows}
        return {
            "now_ts": _ts(overview.now),
            "complete": len(rows) < EXPLAINED_MOST,
            "kept_s": overview.keep,
            "searched": list(wanted.rooms),
            **told,
            "causes": [cause for cause in causes(overview) if cause["homeserver"] in concerned[0] or cause["sfu"] in concerned[1]],
        }


def causes(overview: Overview) -> list[dict[str, Any]]:
    """What is wrong right now, and what it does."""
    found: list[dict[str, Any]] = []

    def add(sentence: str, *, homeserver: str | None = None, sfu: str | None = None) -> None:
        found.append({"homeserver": homeserver, "sfu": sfu, "sentence": sentence})

    for server in overview.homeservers:
        if server.problem:
            add(
                f"{server.name} cannot be asked ({server.problem.rstrip('.')}). Restarts and goodbyes there wait, and are repeated.",
                homeserver=server.name,
            )
        if server.service:
            add(f"The application service does not work at {server.name}: {full_stop(server.service)}", homeserver=server.name)
        if server.lateness > 0:
            add(
                f"At the rate of {server.name}, restarts will be {story.span(server.lateness)} late: connected people will be dropped.",
                homeserver=server.name,
            )
        waiting, since = server.waiting.get(Lane.END, (0, overview.now))
        if waiting and overview.now - since > story.LATE:
            limited = f", which allows {server.rate:.2g} action{'' if server.rate == 1 else 's'} a second" if server.limit == "some" else ""
            late = story.span(overview.now - since)
            wait = f"{waiting} goodbyes wait" if waiting > 1 else "A goodbye waits"
            add(f"{wait} for {server.name}{limited}; the oldest for {late}: ghosts in calls.", homeserver=server.name)
    for sfu in overview.sfus:
        if sfu.problem:
            add(f"The SFU {sfu.name} cannot be asked. {sentence_of(sfu.problem)} Whoever is in doubt counts as connected.", sfu=sfu.name)
    return found


def sentence_of(problem: str) -> str:
    """A problem by itself: conditions begin with a capital, or do not."""
    return full_stop(problem[:1].upper() + problem[1:])


def full_stop(problem: str) -> str:
    """A problem as a sentence: conditions end with a full stop, or do not."""
    return problem if problem.endswith((".", "!", "?")) else f"{problem}."


def _own_causes(readiness: Mapping[str, Any]) -> list[str]:
    """What is wrong with the daemon itself."""
    found = []
    if readiness["phase"] != Phase.RUNNING.value:
        found.append(f"The daemon is {readiness['phase']}: it takes no delegations and no webhooks.")
    if readiness["database"] != "ok":
        found.append(f"The database takes nothing: {full_stop(readiness['database'])} No delegation and no webhook is taken, and no goodbye is sent.")
    return found


# ── answers ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def event_json(row: DelayedEvent, now: float) -> dict[str, Any]:
    """One delayed event."""
    sentence, tone = story.now_so(row, now)
    open_ = row.state is not State.DONE
    return {
        "id": row.delegation,
        "row": row.id,
        "sfu": row.sfu,
        "room": row.room,
        "identity": row.identity,
        "user": row.user,
        "homeserver": row.homeserver,
        "state": row.state.value,
        "outcome": row.outcome.value or None,
        "presence": row.presence.value,
        "presence_since_ts": _ts(row.presence_since),
        "reason": row.reason or None,
        "delay_id_hint": row.delay_id or None,
        "delay_ms": round(row.delay * 1000),
        "on_disconnect": row.on_end.value,
        "verified": row.verified_at is not None,
        "restarts": row.restarts,
        "attempts": row.attempts,
        "accepted_ts": _ts(row.accepted_at),
        "running_since_ts": _ts(row.running_since) if row.verified_at is not None else None,
        "restart_due_ts": _ts(row.due) if row.state is State.LIVE and row.lane is Lane.RESTART and not row.claimed else None,
        "deadline_ts": _ts(row.deadline) if open_ and row.verified_at is not None else None,
        "look_ts": _ts(row.look_at),
        "departed_ts": _ts(row.ended_at) if row.presence is Presence.GONE else None,
        "finished_ts": _ts(row.finished_at),
        "sentence": sentence,
        "tone": tone.value,
    }


def story_json(rows: Sequence[DelayedEvent], notes: Sequence[Note], now: float) -> dict[str, Any]:
    """Delayed events, and what happened to them."""
    return {
        "events": [event_json(row, now) for row in rows],
        "story": [
            {
                "at_ts": _ts(line.at),
                "row": line.event,
                "what": line.what,
                "detail": line.detail or None,
                "sentence": line.sentence,
                "tone": line.tone.value,
            }
            for line in story.tell(rows, notes)
        ],
    }


def participants_json(rows: Sequence[DelayedEvent], notes: Sequence[Note], now: float) -> list[dict[str, Any]]:
    """The stories of delayed events, by participant."""
    people: dict[tuple[str, str, str], list[DelayedEvent]] = {}
    for row in sorted(rows, key=lambda row: row.id):
        people.setdefault((row.sfu, row.room, row.user or row.identity), []).append(row)
    by_event: dict[int, list[Note]] = {}
    for note in notes:
        by_event.setdefault(note.event, []).append(note)
    return [
        {
            "sfu": sfu,
            "room": room,
            "user": theirs[-1].user,
            "identity": theirs[-1].identity,
            **story_json(theirs, [note for row in theirs for note in by_event.get(row.id, ())], now),
        }
        for (sfu, room, _), theirs in people.items()
    ]


def rooms_json(rooms: Sequence[Room], counts: Sequence[RoomCount]) -> list[dict[str, Any]]:
    """Rooms, and who is in them."""
    by_room: dict[tuple[str, str], list[RoomCount]] = {}
    for count in counts:
        by_room.setdefault((count.sfu, count.room), []).append(count)
    return [room_json(room, by_room.get((room.sfu, room.name), ())) for room in rooms]


def room_json(room: Room, counts: Sequence[RoomCount]) -> dict[str, Any]:
    """One room."""
    here = [count for count in counts if (count.sfu, count.room) == (room.sfu, room.name)]
    by_presence = {presence.value: sum(count.participants for count in here if count.presence == presence.value) for presence in Presence}
    return {
        "sfu": room.sfu,
        "room": room.name,
        "events": sum(count.events for count in here),
        "participants": by_presence,
        "looked_ts": _ts(room.looked_at or None),
        "look_due_ts": _ts(room.due),
        "failures": room.failures,
        "doubt_until_ts": _ts(room.doubt_until or None),
    }


def status_json(overview: Overview, readiness: dict[str, Any], size: Size | None, problem: str) -> dict[str, Any]:
    """The overview."""
    now, promises = overview.now, overview.promises
    by_presence = {
        presence.value: sum(n for (state, was), n in overview.states.items() if was == presence.value and state == State.LIVE.value)
        for presence in Presence
    }
    by_state = {state.value: sum(n for (was, _), n in overview.states.items() if was == state.value) for state in State}
    # The size may be remembered, and the goodbye may have got through since.
    waiting = size is not None and size.oldest_ending is not None and by_state[State.ENDING.value] > 0
    ending = max(0.0, now - size.oldest_ending) if waiting and size is not None and size.oldest_ending is not None else None
    return {
        "status": readiness["status"],
        "phase": readiness["phase"],
        "version": overview.version,
        "instance": overview.instance or None,
        "instances": overview.instances,
        "now_ts": _ts(now),
        "started_ts": _ts(overview.started_at),
        "database": {
            "name": overview.database,
            "problem": None if readiness["database"] == "ok" else readiness["database"],
            "reading_problem": problem or None,
            "events": None if size is None else size.events,
            "finished": None if size is None else size.finished,
            "rooms": None if size is None else size.rooms,
            "oldest_open_ts": None if size is None else _ts(size.oldest_open),
        },
        "promises": {
            "lost_while_connected": promises.lost_while_connected,
            "restart_lateness_s": max((server.lateness for server in overview.homeservers), default=0.0),
            "ending": by_state[State.ENDING.value],
            "oldest_ending_s": ending,
            "departures": promises.departures,
            "disconnect_to_end_p50_s": promises.p50,
            "disconnect_to_end_p99_s": promises.p99,
            "disconnect_to_end_longest_s": promises.longest,
            "disconnect_to_end_of": promises.told,
            "ended": dict(promises.ended),
        },
        "events": {"states": by_state, "live_by_presence": by_presence},
        "homeservers": [_homeserver_json(server, now) for server in overview.homeservers],
        "sfus": [_sfu_json(sfu, overview) for sfu in overview.sfus],
        "webhooks": [{"sfu": sfu, "event": event, "result": result, "count": n} for (sfu, event, result), n in sorted(overview.webhooks.items())],
        "actions": [{"action": action, "outcome": outcome, "count": n} for (action, outcome), n in sorted(overview.actions.items())],
        "causes": [
            *_own_causes(readiness),
            *(cause["sentence"] for cause in causes(overview)),
            *_unsaid(overview, by_state[State.ENDING.value], ending),
        ],
    }


def _unsaid(overview: Overview, endings: int, oldest: float | None) -> list[str]:
    """Goodbyes that wait for their next try are not due, so no homeserver has them waiting; but their participants are still shown in calls."""
    if oldest is None or oldest <= story.LATE or any(server.waiting.get(Lane.END, (0, 0.0))[0] for server in overview.homeservers):
        return []
    said = f"{endings} goodbyes have" if endings > 1 else "A goodbye has"
    return [f"{said} not got through; the oldest waits for {story.span(oldest)}: ghosts in calls."]


def _homeserver_json(server: HomeserverState, now: float) -> dict[str, Any]:
    def waits(lane: Lane) -> dict[str, Any]:
        count, since = server.waiting.get(lane, (0, now))
        return {"count": count, "oldest_s": max(0.0, now - since) if count else None}

    limited = server.limit == "some"
    return {
        "name": server.name,
        "entry": server.entry,
        "problem": server.problem or None,
        "asked": server.problem is not None,
        "application_service": {None: "none", "": "ok"}.get(server.service, server.service),
        "events": server.events,
        "limit": "exempt" if server.exempt else server.limit,
        "rate": server.rate if limited else None,
        "burst": server.burst if limited else None,
        "restart_lateness_s": server.lateness,
        "endings_waiting": waits(Lane.END),
        "restarts_waiting": waits(Lane.RESTART),
    }


def _sfu_json(sfu: SfuState, overview: Overview) -> dict[str, Any]:
    ours = [(result, n) for (name, _, result), n in overview.webhooks.items() if name == sfu.name]
    return {
        "name": sfu.name,
        "url": sfu.url,
        "problem": sfu.problem or None,
        "asked": sfu.problem is not None,
        "webhook_ts": _ts(sfu.heard_at or None),
        "answered_ts": _ts(sfu.answered_at if sfu.answered_at > 0 else None),
        "failing_since_ts": _ts(sfu.failing_since),
        "several_nodes": sfu.several_nodes,
        "webhooks": sum(n for _, n in ours),
    }


def _bad(sentence: str) -> MatrixError:
    return MatrixError(400, "M_INVALID_PARAM", sentence)


def _ts(seconds: float | None) -> int | None:
    """Unix milliseconds, as Matrix has them."""
    return None if seconds is None else int(seconds * 1000)
