"""The models with HTTP on loopback: thin, and in real time. What is true is decided in the models; here are only sockets, timers and encodings.

Each sandbox has two listeners: the one that it plays, which really closes when the model is down, and one for control, by which another process
drives it (`POST /sandbox/{operation}` with a JSON object of the operation's arguments). Both are on 127.0.0.1 only, and neither is protected.
"""

import asyncio
import inspect
import json
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, fields
from email.utils import formatdate, parsedate_to_datetime
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qsl, urlencode

import aiohttp
from aiohttp import web
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message import DecodeError, Message
from livekit.protocol import models, room
from yarl import URL

from .answer import Answer, Fate, Impossible
from .homeserver import FED_PROXY, Errand, FedCall, HomeserverModel, MatrixError, Mode, RateLimit, is_proxied
from .sfu import Delivery, JoinRefused, SfuModel, bad_route

HOST = "127.0.0.1"
STOP_WITHIN = 0.2  # seconds that answers under way get at the end; hung ones are cut off
LONGEST_SLEEP = 3600.0
RELAYED_WITHIN = 30.0  # seconds that Synapse gives an application service
ORIGIN = "X-Sandbox-Origin"  # the server that asks, of a request to the federation API: there are no signatures here
TWIRP = "/twirp/livekit.RoomService/"

_MESSAGES: dict[str, tuple[type[Message], type[Message]]] = {
    "CreateRoom": (room.CreateRoomRequest, models.Room),
    "DeleteRoom": (room.DeleteRoomRequest, room.DeleteRoomResponse),
    "GetParticipant": (room.RoomParticipantIdentity, models.ParticipantInfo),
    "ListParticipants": (room.ListParticipantsRequest, room.ListParticipantsResponse),
    "ListRooms": (room.ListRoomsRequest, room.ListRoomsResponse),
    "RemoveParticipant": (room.RoomParticipantIdentity, room.RemoveParticipantResponse),
}

_SFU_OPERATIONS = frozenset(
    {
        "abort",
        "activate",
        "begin_join",
        "create_room",
        "delete_room",
        "freeze_node",
        "hang",
        "join",
        "join_with_token",
        "kill",
        "leave",
        "publish_track",
        "remove",
        "resume",
        "shutdown",
        "shutdown_forced",
        "start",
        "thaw_node",
        "unpublish_track",
        "vanish",
    }
)
_HOMESERVER_OPERATIONS = frozenset(
    {
        "application_service",
        "is_joined",
        "join",
        "leave",
        "manage",
        "openid_token",
        "put_state",
        "register",
        "schedule",
        "scoped_token",
    }
)
_SETTINGS = frozenset(
    {"b_needs_token", "generations", "limit", "mode", "msc4502", "msc4512", "openid_sub", "unrecognized_status", "unstable_features"}
)
_PASSED_ON = ("Accept", "Accept-Language", "Content-Type")  # of a proxied request's headers, by Synapse
_HOP_BY_HOP = frozenset({"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailers", "transfer-encoding", "upgrade"})

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class _Listener:
    """One address that can be closed and opened again on the same port."""

    def __init__(self, handler: Handler, port: int) -> None:
        self._handler = handler
        self.port = port
        self._runner: web.AppRunner | None = None

    @property
    def is_open(self) -> bool:
        return self._runner is not None

    async def open(self) -> None:
        if self._runner is not None:
            return
        app = web.Application(client_max_size=1 << 20)
        app.router.add_route("*", "/{path:.*}", self._handler)
        # A client that gave up must not leave a hung handler behind.
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=STOP_WITHIN)
        await runner.setup()
        listening = socket.create_server((HOST, self.port))
        self.port = listening.getsockname()[1]
        await web.SockSite(runner, listening).start()
        self._runner = runner

    async def close(self) -> None:
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()


class _Sandbox:
    """What both have in common: listeners, the task that follows the model's timers, and the control API."""

    operations: frozenset[str]

    def __init__(self, model: Any, port: int, control_port: int, clock: Callable[[], float]) -> None:
        self._model = model
        self._clock = clock
        self._listener = _Listener(self._serve, port)
        self._control = _Listener(self._serve_control, control_port)
        self._nudged = asyncio.Event()
        self._settling = asyncio.Lock()
        self._follower: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """Where it plays its part."""
        return f"http://{HOST}:{self._listener.port}"

    @property
    def control_url(self) -> str:
        """Where it is driven from."""
        return f"http://{HOST}:{self._control.port}"

    async def __aenter__(self) -> Self:
        await self._listener.open()
        await self._control.open()
        self._follower = asyncio.create_task(self._follow())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._follower is not None:
            self._follower.cancel()
            await asyncio.gather(self._follower, return_exceptions=True)
        await self._stop()
        await self._control.close()
        await self._listener.close()

    async def call(self, operation: str, *args: Any, **kwargs: Any) -> Any:
        """An operation of the model at the present time, or of the control API, with its effects: `await sfu.call("join", "room", "alice")`.

        Raises what the model raises, KeyError for an unknown operation.
        """
        result = self._operate(operation, kwargs | ({"args": list(args)} if args else {}))
        await self.settle()
        return result

    def nudge(self) -> None:
        """The model was changed from outside, or the injected clock has moved: look at it now."""
        self._nudged.set()

    async def settle(self) -> None:
        """As `nudge`, and the listener is open or closed as the model has it when this returns."""
        async with self._settling:
            self._model.tick(self._clock())
            if self._listening():
                await self._listener.open()
            else:
                await self._listener.close()
        self._nudged.set()

    async def _follow(self) -> None:
        while True:
            self._nudged.clear()
            now = self._clock()
            self._model.tick(now)
            self._work(now)
            if self._listening() != self._listener.is_open:
                await self.settle()
            at = self._model.next_event()
            pause = LONGEST_SLEEP if at is None else min(max(0.0, at - self._clock()), LONGEST_SLEEP)
            try:
                async with asyncio.timeout(pause):
                    await self._nudged.wait()
            except TimeoutError:
                continue

    def _listening(self) -> bool:
        raise NotImplementedError

    def _work(self, now: float) -> None:
        """Start what the model has to be done now."""

    async def _stop(self) -> None:
        """End what `_work` started."""

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        raise NotImplementedError

    async def _respond(self, request: web.Request, answer: Answer) -> web.StreamResponse:
        """Give the answer, or not, as its fate says."""
        self._nudged.set()
        if answer.delay > 0:
            await asyncio.sleep(answer.delay)
        if answer.fate is Fate.HANG:
            await asyncio.Event().wait()
        if answer.fate is not Fate.ANSWER:
            if request.transport is not None:
                request.transport.abort()
            return web.Response(status=500)
        response = web.Response(status=answer.status, headers=answer.headers, body=answer.body)
        response.headers.setdefault("Date", formatdate(self._clock(), usegmt=True))  # by the server's clock, which may be wrong
        return response

    async def _serve_control(self, request: web.Request) -> web.StreamResponse:
        name = request.path.removeprefix("/sandbox/")
        try:
            arguments = await request.json() if request.can_read_body else {}
        except ValueError:
            return web.json_response({"error": "the body is not JSON"}, status=400)
        if not isinstance(arguments, dict):
            return web.json_response({"error": "the body is not an object"}, status=400)
        try:
            result = self._operate(name, arguments)
        except (Impossible, JoinRefused, MatrixError) as error:
            return web.json_response({"error": str(error)}, status=409)
        except KeyError as error:
            return web.json_response({"error": f"{name}: {error.args[0]}"}, status=400)  # str() of it would put it in quotes
        except (TypeError, ValueError) as error:
            return web.json_response({"error": str(error)}, status=400)
        await self.settle()
        return web.json_response({"result": result})

    def _operate(self, name: str, arguments: dict[str, Any]) -> Any:
        if name == "faults":
            set_fields(self._model.faults, arguments)
            return None
        if name not in self.operations:
            raise ValueError(f"there is no operation {name!r}; there are: {', '.join(sorted([*self.operations, 'faults']))}")
        operation = getattr(self._model, name)
        signature = inspect.signature(operation)
        positional, named = arguments.get("args", []), {key: value for key, value in arguments.items() if key != "args"}
        if "now" in signature.parameters:
            named["now"] = self._clock()
        try:
            signature.bind(*positional, **named)
        except TypeError as error:
            taken = ", ".join(_described(parameter) for parameter in signature.parameters.values() if parameter.name != "now")
            raise ValueError(f"{name}: {error}. It takes {taken or 'no arguments'}.") from None
        return operation(*positional, **named)


def _described(parameter: inspect.Parameter) -> str:
    """An argument of an operation, as its caller is told of it."""
    if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
        return f"more {parameter.name}, in 'args'"
    return parameter.name if parameter.default is inspect.Parameter.empty else f"{parameter.name} (optional)"


class SandboxSfu(_Sandbox):
    """The stand-in SFU: RoomService in JSON and protobuf, and webhooks by POST to the model's `urls`.

    ::

        async with SandboxSfu(SfuModel(urls=["http://127.0.0.1:8080/webhooks/livekit"])) as sfu:
            await sfu.call("create_room", "room")
            await sfu.call("join", "room", "alice")
    """

    operations = _SFU_OPERATIONS

    def __init__(self, model: SfuModel | None = None, *, port: int = 0, control_port: int = 0, clock: Callable[[], float] = time.time) -> None:
        self.model = model or SfuModel()
        super().__init__(self.model, port, control_port, clock)
        self._http: aiohttp.ClientSession | None = None
        self._deliveries: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        # LiveKit waits for ever for a webhook's answer.
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
            skip_auto_headers=("Accept", "User-Agent"),
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return await super().__aenter__()

    @property
    def deliveries(self) -> int:
        """How many webhook requests are under way."""
        return len(self._deliveries)

    def _listening(self) -> bool:
        return self.model.running and not self.model.faults.down

    def _work(self, now: float) -> None:
        for delivery in self.model.due(now):
            task = asyncio.create_task(self._deliver(delivery))
            self._deliveries.add(task)
            task.add_done_callback(self._deliveries.discard)

    async def _deliver(self, delivery: Delivery) -> None:
        assert self._http is not None  # noqa: S101 - made by __aenter__
        status, retry_after = None, None
        try:
            request = self._http.post(delivery.url, data=delivery.body, headers=delivery.headers, allow_redirects=False)
            async with request as response:
                await response.read()
                status, retry_after = response.status, seconds(response.headers.get("Retry-After"), self._clock())
        except (aiohttp.ClientError, OSError):
            pass  # a transport error: status None
        self.model.answered(delivery.ticket, status, self._clock(), retry_after)
        self._nudged.set()

    async def _stop(self) -> None:
        for task in list(self._deliveries):
            task.cancel()
        await asyncio.gather(*self._deliveries, return_exceptions=True)
        if self._http is not None:
            await self._http.close()

    def _operate(self, name: str, arguments: dict[str, Any]) -> Any:
        if name == "delivery_faults":
            set_fields(self.model.delivery_faults, arguments)
            return None
        if name == "urls":
            if not isinstance(arguments.get("urls"), list):
                raise ValueError('urls takes "urls", a list')
            self.model.urls = [str(url) for url in arguments["urls"]]
            return None
        if name == "rooms":
            return {
                held.name: {session.identity: {"sid": session.sid, "state": session.state} for session in held.sessions.values()}
                for held in self.model.rooms.values()
            }
        if name == "lost":
            return dict(self.model.lost)
        return super()._operate(name, arguments)

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        in_protobuf = request.content_type == "application/protobuf"
        method = request.path.removeprefix(TWIRP)
        routed = request.method == "POST" and request.path.startswith(TWIRP) and (in_protobuf or request.content_type == "application/json")
        if not routed:
            return await self._respond(request, bad_route("no handler for path, method or content type", f"{request.method} {request.path}"))
        header = request.headers.get("Authorization")
        token = header.removeprefix("Bearer ") if header else None
        answer = self.model.room_service(method, _request(method, body, in_protobuf), token, self._clock())
        if in_protobuf and answer.status == 200:
            message = ParseDict(answer.json(), _MESSAGES[method][1](), ignore_unknown_fields=True)
            answer = answer._replace(body=message.SerializeToString(), headers={**answer.headers, "Content-Type": "application/protobuf"})
        return await self._respond(request, answer)


class Proxy(NamedTuple):
    """The application service that answers for the homeserver (MSC4512), by its `proxy_url`, and how the homeserver authenticates to it."""

    url: str
    hs_token: str


class SandboxHomeserver(_Sandbox):
    """The stand-in homeserver: its client-server API, as far as delayed events, OpenID tokens and application services go, and its federation API
    for the latter two.

    Requests below `…/rtc/livekit` are answered by the application service behind `proxy`; a server that asks by federation says its name in
    `X-Sandbox-Origin`. `remotes` are other servers by name, each with the URL of its federation API, which may be that of another sandbox::

        await homeserver.call("set_proxy", "http://127.0.0.1:8080", "an-hs-token")
        await homeserver.call("set_remote", other.model.server_name, other.url)

    A server that the model has in its own `remotes` as well is asked by HTTP.
    """

    operations = _HOMESERVER_OPERATIONS

    def __init__(self, model: HomeserverModel | None = None, *, port: int = 0, control_port: int = 0, clock: Callable[[], float] = time.time) -> None:
        self.model = model or HomeserverModel()
        self.proxy: Proxy | None = None
        self.remotes: dict[str, str] = {}
        self._http: aiohttp.ClientSession | None = None
        super().__init__(self.model, port, control_port, clock)

    async def __aenter__(self) -> Self:
        # What Synapse does not send of itself is not to be added here, and what comes back is passed on as it is.
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=RELAYED_WITHIN),
            skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        await super().__aenter__()
        self.model.base_url = self.model.base_url or self.url
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await super().__aexit__(kind, error, trace)
        if self._http is not None:
            await self._http.close()

    def set_proxy(self, url: str | None, hs_token: str = "") -> None:
        """Whose answers are given below `…/rtc/livekit`; None: nobody's."""
        self.proxy = None if url is None else Proxy(url.rstrip("/"), hs_token)

    def set_remote(self, server_name: str, url: str | None) -> None:
        """Where another server is reached; None: nowhere."""
        if url is None:
            self.remotes.pop(server_name, None)
        else:
            self.remotes[server_name] = url.rstrip("/")

    def _listening(self) -> bool:
        faults = self.model.faults
        # Only when everybody is refused; else the connection of the unlucky ones is closed.
        return not (faults.down and faults.only is None and faults.probability >= 1)

    def _operate(self, name: str, arguments: dict[str, Any]) -> Any:
        model = self.model
        match name:
            case "set":
                for key in arguments.keys() - _SETTINGS:
                    raise KeyError(f"no setting {key!r}")
                settings = dict(arguments)
                if settings.get("limit") is not None:
                    settings["limit"] = RateLimit(**settings["limit"])
                if "mode" in settings:
                    settings["mode"] = Mode(settings["mode"])
                for key, value in settings.items():
                    setattr(model, key, value)
                return None
            case "log":
                return [asdict(event) for event in model.events.values()]
            case "state":
                return [
                    {"room": name, "type": type_, "state_key": state_key, "content": event.content, "sender": event.sender, "at": event.at}
                    for name, held in model.state.items()
                    for (type_, state_key), event in held.items()
                ]
            case "set_proxy" | "set_remote":
                positional = arguments.pop("args", [])
                getattr(self, name)(*positional, **arguments)
                return None
            case "fed_calls":
                return [call._asdict() for call in model.fed_calls]
            case "answers":
                return [{"kind": kind, "status": status, "count": count} for (kind, status), count in model.answers.items()]
        return super()._operate(name, arguments)

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        header = request.headers.get("Authorization")
        token = header.removeprefix("Bearer ") if header else request.query.get("access_token")
        path, query = request.rel_url.raw_path, dict(request.query)
        if not self._is_for_others(path, body):
            answer = self.model.request(request.method, path, self._clock(), query=query, token=token, body=body, ip=request.remote or "")
            return await self._respond(request, answer)
        origin = request.headers.get(ORIGIN)
        told = self.model.receive(request.method, path, self._clock(), query=query, token=token, body=body, origin=origin)
        if isinstance(told, Errand):
            asked = self._ask_service(request, told, body) if told.call is None else self._ask_server(told.call)
            told = self.model.relay(told, await asked)
        return await self._respond(request, told)

    def _is_for_others(self, path: str, body: bytes) -> bool:
        """Whether somebody else answers this request, who is known here."""
        if path != FED_PROXY:
            return self.proxy is not None and is_proxied(path)
        try:
            return json.loads(body)["destination"] in self.remotes
        except (ValueError, TypeError, KeyError):
            return False

    async def _ask_service(self, request: web.Request, errand: Errand, body: bytes) -> Answer | None:
        if self.proxy is None:
            return None
        headers = {name: request.headers[name] for name in _PASSED_ON if name in request.headers}
        headers |= {"Authorization": f"Bearer {self.proxy.hs_token}", **errand.asker}
        pairs = [pair for pair in parse_qsl(request.rel_url.raw_query_string, keep_blank_values=True) if pair[0].lower() != "access_token"]
        return await self._ask(request.method, self.proxy.url + request.rel_url.raw_path, pairs, headers, body)

    async def _ask_server(self, call: FedCall) -> Answer | None:
        headers = {ORIGIN: self.model.server_name}
        body = b""
        if call.body:  # Synapse sends no body for an empty object
            headers["Content-Type"] = "application/json"
            body = json.dumps(call.body).encode()
        return await self._ask(call.method, self.remotes[call.destination] + call.path, list(call.query.items()), headers, body)

    async def _ask(self, method: str, url: str, query: list[tuple[str, str]], headers: dict[str, str], body: bytes) -> Answer | None:
        """None if nobody is there, or does not answer in time."""
        assert self._http is not None  # noqa: S101 - made by __aenter__
        where = URL(f"{url}?{urlencode(query)}" if query else url, encoded=True)
        try:
            async with self._http.request(method, where, headers=headers, data=body or None, allow_redirects=False) as response:
                content = await response.read()
        except (aiohttp.ClientError, OSError):
            return None
        kept = response.headers.copy()
        for name in _HOP_BY_HOP.union(part.strip() for part in kept.get("Connection", "").split(",")):
            kept.popall(name, None)
        return Answer(response.status, kept, content)


def _request(method: str, body: bytes, in_protobuf: bool) -> dict[str, Any] | None:
    """The decoded request; None where that is impossible."""
    if not in_protobuf:
        try:
            value = json.loads(body or b"{}")
        except ValueError:
            return None
        return value if isinstance(value, dict) else None
    if method not in _MESSAGES:
        return {}
    message = _MESSAGES[method][0]()
    try:
        message.ParseFromString(body)
    except DecodeError:
        return None
    return MessageToDict(message, preserving_proto_field_name=True)


def seconds(retry_after: str | None, now: float) -> float | None:
    """A `Retry-After` header (seconds, or an HTTP date) in seconds; None where it says nothing."""
    if retry_after is None:
        return None
    if retry_after.isdecimal():
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - now)
    except ValueError:
        return None


def set_fields(target: Any, values: Mapping[str, Any]) -> None:
    """Set fields of a dataclass by name. Raises KeyError for one that it has not."""
    known = {item.name for item in fields(target)}
    for name in values:
        if name not in known:
            raise KeyError(f"there is no {name!r}; there are: {', '.join(sorted(known))}")
    for name, value in values.items():
        setattr(target, name, frozenset(value) if name == "only" and value is not None else value)
