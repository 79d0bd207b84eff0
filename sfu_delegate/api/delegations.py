"""The native delegation API: `/v1/delegations`.

Who may delegate for a participant is whoever holds the LiveKit access token that it joins with: that proves SFU, room and identity, and nobody has
to be asked. An access token may expire during a call, so the delegation comes with a management token of its own.

A full delay_id or a token of a client must never be answered or logged, and a token that can do more than it should must never be stored.
"""

import asyncio
import re
import secrets
import time
from collections.abc import Sequence
from typing import Any, Final

from aiohttp import web

from sfu_delegate.api.body import read_body
from sfu_delegate.api.delegation_body import DelegationBody, read_delegation
from sfu_delegate.api.errors import MatrixError, form_of, json_response, stopping
from sfu_delegate.api.plain import Asker
from sfu_delegate.api.port import Overloaded, Unavailable, Watch
from sfu_delegate.api.services import Services, Settings
from sfu_delegate.api.throttle import Throttle
from sfu_delegate.delegation.model import Accept, DelayedEvent, Find, Lane, NewEvent, Note, OnEnd, Outcome, Presence, Refuse, State, Withdraw
from sfu_delegate.delegation.replies import Accepted, Found, Withdrawn
from sfu_delegate.livekit import tokens
from sfu_delegate.livekit.tokens import Access, TokenRefused
from sfu_delegate.matrix.discovery import DiscoveryFailed, Homeserver, NotServed
from sfu_delegate.matrix.management import Scope
from sfu_delegate.matrix.names import server_of
from sfu_delegate.observe.logs import Seldom, short

HOMESERVER_RETRY_AFTER: Final = 30.0  # seconds; a failed discovery is remembered for a minute
_ID: Final = re.compile(r"dlg_[0-9a-f]{32}")
_ERRCODE: Final = re.compile(r"\b[A-Z][A-Z0-9_]*_[A-Z0-9_.]+\b")
# Withdrawn or replaced while it waited: that is no fault of this request. Everything else that ended before it was confirmed is not there any more.
_NOT_REFUSED: Final = (Outcome.OPEN, Outcome.WITHDRAWN, Outcome.REPLACED)
_NO_SUCH_DELEGATION: Final = "There is no such delegation, or it belongs to another participant, or it ended so long ago that it is forgotten."


def new_id() -> str:
    """A fresh delegation id: 80 random bits, after the time in milliseconds, so that new ones are neighbours in the database."""
    return f"dlg_{time.time_ns() // 1_000_000:012x}{secrets.token_hex(10)}"


def matrix_user(identity: str, homeserver: str) -> str | None:
    """The user in a participant identity of the plain form `@user:server:DEVICE`, if it is one of that homeserver; else None.

    Strict, since the result is asserted to the homeserver: with a colon in the device, `example.org:8448` could be taken for `example.org`.
    """
    local, _, rest = identity.partition(":")
    server, device = rest[: len(homeserver)], rest[len(homeserver) :]
    plain = re.fullmatch(r":[^:]+", device) is not None
    if not (local.startswith("@") and len(local) > 1 and server.lower() == homeserver.lower() and plain):
        return None
    user = f"{local}:{server}"
    return user if user.isprintable() and len(user) <= 255 else None


class Delegations:
    """Answers `/v1/delegations`."""

    def __init__(self, services: Services, throttle: Throttle) -> None:
        self._services = services
        self._throttle = throttle
        self._refused = Seldom()

    # ── POST /v1/delegations ──

    async def delegate(self, request: web.Request) -> web.Response:
        """Take over delayed events; wait a short time for the homeserver to confirm them."""
        status = 0
        try:
            answer = await self._delegate(request)
            status = answer.status
            return answer
        except Exception as error:
            status, errcode, _ = form_of(error)
            if errcode and (times := self._refused.times(f"{status} {errcode}")):
                self._services.log.info("delegation_refused", status=status, errcode=errcode, times=times)
            raise
        finally:
            if status:  # else whoever asked has hung up
                self._services.hooks.on_delegation(status)

    async def _delegate(self, request: web.Request) -> web.Response:
        services = self._services
        settings = services.settings()
        if services.stopping():
            raise stopping()
        self._throttle.client(Asker.of(request), settings)
        access = self._participant(_bearer(request))
        self._throttle.user(access.user or f"{access.sfu} {access.room} {access.identity}", settings)
        wanted = read_delegation(await read_body(request, settings.max_body), settings)
        if access.user is not None and (server_of(access.user) or "").lower() != wanted.homeserver:
            sentence = "homeserver: is not that of the user to whom this access token was given. Name the one that scheduled the delayed events."
            raise MatrixError(403, "M_FORBIDDEN", sentence)
        homeserver = await self._homeserver(wanted.homeserver)
        token = await self._sealed(wanted.token, homeserver, settings)
        accept = _accept(new_id(), access, wanted, token)
        return await self._accepted(accept, settings)

    async def _accepted(self, accept: Accept, settings: Settings) -> web.Response:
        port = self._services.port
        with port.watch(accept.delegation) as watch:
            reply = await port.put(accept)
            assert isinstance(reply, Accepted)  # noqa: S101 — an Accept is answered so
            rows: Sequence[DelayedEvent] = reply.rows
            if reply.created:
                rows = await _decided(watch, rows, settings.verify_timeout)
        if not reply.created:
            rows = await self._of_an_earlier_request(reply, settings)
        refused = next((row for row in rows if row.verified_at is None and row.outcome not in _NOT_REFUSED), None)
        if refused is not None:
            number = next(n for n, row in enumerate(rows) if row.id == refused.id)
            detail = await self._take_back(reply, refused)
            raise _refusal(refused, number, detail)
        delegation = _delegation(reply.delegation, rows, settings)
        delegation["management_token"] = self._services.sealer.management_token(reply.delegation)
        return json_response(delegation, status=201 if reply.created else 200, headers={"Location": f"/v1/delegations/{reply.delegation}"})

    async def _of_an_earlier_request(self, reply: Accepted, settings: Settings) -> Sequence[DelayedEvent]:
        """The participant has delegated exactly this before, perhaps a moment ago, and the client did not wait for the answer."""
        if all(row.verified_at is not None for row in reply.rows):
            return reply.rows
        port = self._services.port
        with port.watch(reply.delegation) as watch:
            # Once more, now that it is watched: the answer may have come in between.
            found = await port.put(Find(reply.delegation))
            assert isinstance(found, Found)  # noqa: S101
            latest = {row.id: row for row in found.rows}
            return await _decided(watch, [latest.get(row.id, row) for row in reply.rows], settings.verify_timeout)

    async def _take_back(self, reply: Accepted, refused: DelayedEvent) -> str:
        """Nothing remains of a refused delegation. Returns what the homeserver said, where it said something."""
        port = self._services.port
        holder = refused.delegation
        if reply.created:  # else it is the earlier request's to take back, which knows what there was before
            gone = await port.put(Refuse(reply.delegation, back=reply.carried))
            assert isinstance(gone, Withdrawn)  # noqa: S101
            holder = next((row.delegation for row in gone.rows if row.id == refused.id), holder)
        if refused.outcome is not Outcome.REJECTED:
            return ""
        try:
            found = await port.put(Find(holder))
        except (Overloaded, Unavailable):
            return ""
        assert isinstance(found, Found)  # noqa: S101
        return next((note.detail for note in reversed(found.history) if note.event == refused.id and note.what == Outcome.REJECTED.value), "")

    async def _homeserver(self, name: str) -> Homeserver:
        services = self._services
        if services.homeservers.rule_for(name) is None:
            raise _not_served(name)
        try:
            async with asyncio.timeout(services.settings().request_timeout):
                return await services.homeservers.resolve(name)
        except NotServed:  # a reload came in between
            raise _not_served(name) from None
        except (DiscoveryFailed, TimeoutError) as error:
            # Its text is for the operator: it tells what can be reached from here.
            services.log.warning("homeserver_not_found", homeserver=name, error=str(error) or "no answer in time")
            raise MatrixError(
                503,
                "M_UNKNOWN",
                f"homeserver: the client-server API of {name} cannot be found at the moment, so nothing was done. Try again later.",
                retry_after=HOMESERVER_RETRY_AFTER,
            ) from None

    async def _sealed(self, token: str | None, homeserver: Homeserver, settings: Settings) -> bytes | None:
        """The client's token, encrypted, after it was found out that it can do nothing but manage delayed events."""
        if token is None:
            return None
        match await self._services.management.is_scoped(homeserver, token, settings.request_timeout):
            case Scope.SCOPED:
                return self._services.sealer.seal(token)
            case Scope.FULL_ACCESS:
                self._services.log.warning("full_access_token_refused", homeserver=homeserver.name)
                raise MatrixError(
                    400,
                    "M_INVALID_PARAM",
                    "token: this is a full access token, which can do everything that its user can. It was not stored. "
                    "Give a token that is scoped to managing delayed events, or leave it out: the delay_id is enough for most homeservers.",
                )
            case _:
                raise MatrixError(
                    503,
                    "M_UNKNOWN",
                    "token: the homeserver could not be asked what this token allows, so it was not stored and nothing was done. Try again later, "
                    "or leave the token out.",
                    retry_after=HOMESERVER_RETRY_AFTER,
                )

    # ── GET and DELETE /v1/delegations/{id} ──

    async def show(self, request: web.Request) -> web.Response:
        """What is known of a delegation, and what happened to it."""
        found = await self._find(request)
        settings = self._services.settings()
        delegation = _delegation(found.rows[0].delegation, found.rows, settings)
        hints = {row.id: short(row.delay_id) for row in found.rows}
        delegation["history"] = [_history(note, hints[note.event]) for note in found.history]
        return json_response(delegation)

    async def withdraw(self, request: web.Request) -> web.Response:
        """The client takes its events back: they are forgotten without being touched."""
        found = await self._find(request)
        await self._services.port.put(Withdraw(found.rows[0].delegation))
        return json_response({})

    async def _find(self, request: web.Request) -> Found:
        """The delegation that the path names, for somebody who may see it. Raises MatrixError."""
        id = request.match_info["id"]
        token = _bearer(request)
        well_formed = _ID.fullmatch(id) is not None
        manager = well_formed and self._services.sealer.check_management_token(id, token)
        access = None if manager else self._participant(token, or_management=True)
        if not well_formed:
            raise MatrixError(404, "M_NOT_FOUND", _NO_SUCH_DELEGATION)
        found = await self._services.port.put(Find(id))
        assert isinstance(found, Found)  # noqa: S101
        if not found.rows or (access is not None and not all(_is_theirs(row, access) for row in found.rows)):
            raise MatrixError(404, "M_NOT_FOUND", _NO_SUCH_DELEGATION)
        return found

    # ── who is asking? ──

    def _participant(self, token: str, *, or_management: bool = False) -> Access:
        try:
            return tokens.access(token, self._services.keys, self._services.clock())
        except TokenRefused as refused:
            needed = "the delegation's management token, or the LiveKit access token of its participant"
            needed = needed if or_management else "the LiveKit access token that the participant joins with"
            raise _unauthorized("M_UNKNOWN_TOKEN", f"{refused.sentence} Needed is {needed}.") from None


# ── requests ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _bearer(request: web.Request) -> str:
    header = request.headers.get("Authorization", "").strip()
    if not header:
        raise _unauthorized("M_MISSING_TOKEN", "The token is missing: send it as `Authorization: Bearer <token>`.")
    scheme, _, token = header.partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise _unauthorized("M_UNKNOWN_TOKEN", "The Authorization header is not understood: send the token as `Authorization: Bearer <token>`.")
    return token.strip()


def _unauthorized(errcode: str, sentence: str) -> MatrixError:
    return MatrixError(401, errcode, sentence, headers={"WWW-Authenticate": "Bearer"})


def _not_served(name: str) -> MatrixError:
    return MatrixError(
        403,
        "M_FORBIDDEN",
        f"homeserver: {name} is not served here. The operator of this service must add it to the key `homeservers` of its configuration.",
    )


def _accept(delegation: str, access: Access, wanted: DelegationBody, token: bytes | None) -> Accept:
    return Accept(
        delegation=delegation,
        sfu=access.sfu,
        room=access.room,
        identity=access.identity,
        homeserver=wanted.homeserver,
        events=tuple(NewEvent(event.delay_id, event.delay_ms / 1000, OnEnd(event.on_disconnect)) for event in wanted.delayed_events),
        user=access.user or matrix_user(access.identity, wanted.homeserver),
        token=token,
    )


def _is_theirs(row: DelayedEvent, access: Access) -> bool:
    return (row.sfu, row.room) == (access.sfu, access.room) and access.identity in row.forms


# ── what becomes of a fresh delegation ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def _decided(watch: Watch, rows: Sequence[DelayedEvent], timeout: float) -> list[DelayedEvent]:  # noqa: ASYNC109
    """The rows after the homeserver's answers, or after `timeout` seconds, in the same order."""
    open_ = {row.id for row in rows if row.verified_at is None and row.state is not State.DONE}
    if open_:
        await watch.until_decided(open_, timeout)
    return [watch.rows.get(row.id, row) for row in rows]


def _refusal(row: DelayedEvent, number: int, detail: str) -> MatrixError:
    which = f"delayed_events[{number}] ({short(row.delay_id)})"
    if row.outcome is not Outcome.REJECTED:
        return MatrixError(
            404,
            "M_NOT_FOUND",
            f"{which}: the homeserver {row.homeserver} does not know this delayed event: it was sent or cancelled, its time is over, or it is of "
            "another homeserver. Nothing was delegated. Schedule a new one, and delegate that.",
        )
    errcode = _ERRCODE.search(detail)
    extra: dict[str, Any] = {"homeserver_errcode": errcode.group()} if errcode else {}
    return MatrixError(
        400,
        "M_FORBIDDEN",
        f"{which}: the homeserver {row.homeserver} refused to restart it{f' ({detail})' if detail else ''}. Nothing was delegated. "
        "Is the token, if there is one, meant for this delayed event?",
        **extra,
    )


# ── answers ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _delegation(id: str, rows: Sequence[DelayedEvent], settings: Settings) -> dict[str, Any]:
    row = max(rows, key=lambda row: (row.state is not State.DONE, row.presence_since))
    return {
        "id": id,
        "state": _state(rows),
        "homeserver": row.homeserver,
        "participant": {
            "sfu": row.sfu,
            "room": row.room,
            "identity": row.identity,
            "presence": row.presence.value,
            "since_ts": _ts(row.presence_since),
            "reason": row.reason or None,
        },
        "verified": all(row.verified_at is not None for row in rows),
        "restart_interval_ms": min(int(round(row.delay * 1000) * settings.restart_at) for row in rows),
        "delayed_events": [_event(row) for row in rows],
    }


def _state(rows: Sequence[DelayedEvent]) -> str:
    """Live while one of the events is kept alive, or let run; ending until the last of them has ended."""
    states = {row.state for row in rows}
    if states & {State.LIVE, State.ADRIFT}:
        return State.LIVE.value
    return State.DONE.value if states == {State.DONE} else State.ENDING.value


def _event(row: DelayedEvent) -> dict[str, Any]:
    live = row.state is State.LIVE
    planned = live and row.lane is Lane.RESTART and not row.claimed and row.due is not None
    running = row.verified_at is not None and row.state is not State.DONE
    return {
        "delay_id_hint": short(row.delay_id),
        "delay_ms": round(row.delay * 1000),
        "on_disconnect": row.on_end.value,
        "state": row.state.value,
        "outcome": row.outcome.value or None,
        "verified": row.verified_at is not None,
        "restarts": row.restarts,
        "restart_due_ts": _ts(row.due) if planned else None,
        "deadline_ts": _ts(row.deadline) if running else None,
        "departed_ts": _ts(row.ended_at) if row.presence is Presence.GONE else None,
        "ended_ts": _ts(row.finished_at),
    }


def _history(note: Note, hint: str) -> dict[str, Any]:
    return {"at_ts": _ts(note.at), "delay_id_hint": hint, "what": note.what, "detail": note.detail or None}


def _ts(seconds: float | None) -> int | None:
    """Unix milliseconds, as Matrix has them."""
    return None if seconds is None else int(seconds * 1000)
