"""Asking homeservers by their server-server (federation) API: where it is, by server discovery, and one GET to it.

The steps are those of the server-server specification, "Resolving server names". What a server name leads to is somebody else's word at
every step: `.well-known`, DNS and redirects are all held to the egress rule for discovered addresses, and the certificate is always checked
for the name that the specification tells, never for what the DNS led to.

What it must never do: put a path or a query into an error, for they hold tokens; or let one slow or hostile homeserver cost the others
anything.
"""

import asyncio
import contextlib
import ssl as tls
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from random import SystemRandom
from typing import Final, Generic, Protocol, TypeVar

import dns.asyncresolver
import dns.exception
import dns.name
import dns.rdatatype
import dns.resolver

from sfu_delegate.matrix.answers import read_reply
from sfu_delegate.matrix.discovery import LOOKUP_TIMEOUT, STALE_LIFE, STALE_PATIENCE, DiscoveryFailed, get_following, life_of
from sfu_delegate.matrix.egress import Egress
from sfu_delegate.matrix.http import HttpAnswer, HttpFailed
from sfu_delegate.matrix.inflight import InFlight
from sfu_delegate.matrix.memory import keep
from sfu_delegate.matrix.names import ServerName
from sfu_delegate.matrix.resolver import TIMEOUT, UNANSWERED, ask
from sfu_delegate.matrix.turns import Crowded, Turns

DEFAULT_PORT: Final = 8448
SERVICES: Final = ("_matrix-fed._tcp", "_matrix._tcp")  # the second one is deprecated, and the older servers' only one

# Seconds that things are remembered. The first three are the specification's recommendations.
DELEGATION_LIFE: Final = 86_400.0  # a `.well-known` without Cache-Control
MAX_DELEGATION_LIFE: Final = 172_800.0
NONE_LIFE: Final = 3600.0  # a definite "there is none": no or no valid `.well-known`, no SRV record
MIN_SRV_LIFE: Final = 60.0
MAX_SRV_LIFE: Final = 86_400.0
DOWN_LIFE: Final = 30.0  # a failure that may pass (a timeout, 5xx, SERVFAIL), doubled for each one in a row
MAX_DOWN_LIFE: Final = 600.0
AVOIDED: Final = 60.0  # that a target which failed is tried after the others

MAX_KEPT: Final = 10_000  # names, targets
MAX_TARGETS: Final = 8  # of one name that are tried for one request
MAX_WAITING: Final = 100  # requests for one name, beyond those in flight
STRANGERS: Final = 32  # requests at a time for all the names that anybody may think of
STRANGERS_WAITING: Final = 500
OF_A_STRANGER: Final = 8  # at a time for one of them

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Terms:
    """How a homeserver is reached: the operator's word."""

    url: str | None = None  # of the server-server API; replaces discovery, and may lead anywhere
    allow_private: bool = False  # may discovery lead into private networks?
    ssl: tls.SSLContext | None = field(default=None, repr=False)  # None: the system's certificate authorities. Each time the same object:
    # connections and what was discovered are not shared between two of them
    in_flight: int = 4  # requests at a time
    stranger: bool = False  # the configuration does not name it: whoever asks has chosen the name


@dataclass(frozen=True, slots=True)
class SrvRecord:
    """One SRV record (RFC 2782)."""

    priority: int
    weight: int
    port: int
    target: str  # without a dot at its end; "." where there is expressly no such service


@dataclass(frozen=True, slots=True)
class SrvRecords:
    """All SRV records of a name; none, if it has none."""

    records: tuple[SrvRecord, ...]
    life: float  # seconds, as the DNS has it


class SrvFailed(Exception):
    """The DNS did not answer, or not understandably: whether there are records is not known."""


class SrvLookup(Protocol):
    """What this module knows of the DNS. Raises SrvFailed, and nothing else."""

    async def __call__(self, name: str) -> SrvRecords:
        """The SRV records of an absolute name."""


class DnsSrv:
    """`SrvLookup` with dnspython, by the name servers of /etc/resolv.conf, which is read anew for each question."""

    def __init__(self, resolver: Callable[[], dns.asyncresolver.Resolver] = dns.asyncresolver.Resolver, timeout: float = TIMEOUT) -> None:
        self._resolver = resolver
        self._timeout = timeout

    async def __call__(self, name: str) -> SrvRecords:
        """See `SrvLookup`."""
        try:
            absolute = dns.name.from_text(name).derelativize(dns.name.root)
        except dns.exception.DNSException:  # no name that the DNS could have
            return SrvRecords((), NONE_LIFE)
        try:
            answer = await ask(self._resolver, absolute, dns.rdatatype.SRV, self._timeout)
            records = tuple(
                SrvRecord(record.priority, record.weight, record.port, record.target.to_text(omit_final_dot=True).lower()) for record in answer
            )
            return SrvRecords(records, float(answer.chaining_result.minimum_ttl))
        except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
            return SrvRecords((), NONE_LIFE)
        except UNANSWERED as error:
            reason = type(error).__name__
        raise SrvFailed(reason)


def in_order(records: Sequence[SrvRecord], random: Callable[[], float]) -> list[SrvRecord]:
    """The order in which to try them: by priority, and by chance within one, as RFC 2782 has it for weights."""
    ordered: list[SrvRecord] = []
    for priority in sorted({record.priority for record in records}):
        group = sorted((record for record in records if record.priority == priority), key=lambda record: record.weight > 0)
        while group:
            picked = int(random() * (sum(record.weight for record in group) + 1))
            running = 0
            for index, record in enumerate(group):
                running += record.weight
                if running >= picked:
                    ordered.append(group.pop(index))
                    break
    return ordered


def _is_host(target: str) -> bool:
    try:
        return ServerName.parse(target.replace("_", "-")).port is None  # names of targets have underscores
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class _Target:
    """Where a request goes."""

    authority: str  # host and port, as in a URL
    host_header: str
    certificate: str | None  # whom it must be for; None: the host of the authority


@dataclass(frozen=True, slots=True)
class _Result(Generic[V]):
    """What a lookup came to."""

    value: V
    life: float | None  # seconds that it holds; None: it is only the best that can be said after a failure that may pass


@dataclass(slots=True)
class _Kept(Generic[V]):
    """The result of the latest lookup."""

    value: V
    certain: bool
    at: float
    expires: float  # when to look again
    usable_until: float  # while looking again fails
    failures: int  # in a row


class _Memory(Generic[K, V]):
    """Results of lookups, by key: one lookup at a time for each, and old results where a new lookup fails or takes long."""

    def __init__(self, now: Callable[[], float], patience: float) -> None:
        self._now = now
        self._patience = patience
        self._kept: OrderedDict[K, _Kept[V]] = OrderedDict()
        self._lookups: InFlight[V] = InFlight()

    def fresh(self, key: K) -> tuple[V] | None:
        """What is known, and need not be looked up again."""
        kept = self._kept.get(key)
        if kept is None or self._now() >= kept.expires:
            return None
        self._kept.move_to_end(key)
        return (kept.value,)

    async def recall(self, key: K, look_up: Callable[[], Awaitable[_Result[V]]]) -> V:
        """What is known, or comes of `look_up`, which must not raise."""
        if (known := self.fresh(key)) is not None:
            return known[0]
        kept, now = self._kept.get(key), self._now()
        lookup = self._lookups.share(key, lambda: self._look_again(key, look_up))
        if kept is None or now >= kept.usable_until:
            return await lookup
        try:
            async with asyncio.timeout(self._patience):
                return await lookup
        except TimeoutError:  # the lookup goes on
            return kept.value

    def doubt(self, key: K) -> None:
        """It led nowhere: look again before its time, though not more often than after a failure."""
        kept = self._kept.get(key)
        if kept is not None:
            kept.expires = min(kept.expires, kept.at + DOWN_LIFE)

    async def aclose(self) -> None:
        """Stop lookups that are under way."""
        await self._lookups.aclose()

    async def _look_again(self, key: K, look_up: Callable[[], Awaitable[_Result[V]]]) -> V:
        result = await look_up()
        old, now = self._kept.get(key), self._now()
        if result.life is not None:
            kept = _Kept(result.value, True, now, now + result.life, now + result.life + STALE_LIFE, 0)
        else:
            failures = old.failures + 1 if old is not None else 1
            expires = now + min(DOWN_LIFE * 2.0 ** min(failures - 1, 10), MAX_DOWN_LIFE)
            if old is not None and old.certain and now < old.usable_until:
                kept = _Kept(old.value, True, now, expires, old.usable_until, failures)
            else:
                kept = _Kept(result.value, False, now, expires, expires + STALE_LIFE, failures)
        keep(self._kept, key, kept, MAX_KEPT)
        return kept.value


_Lookup = tuple[str, bool, tls.SSLContext | None]
"""A host, and what the answer of its `.well-known` depends on beside it."""


def _as_looked_up(server: ServerName, terms: Terms) -> _Lookup:
    return server.host, terms.allow_private, terms.ssl


@dataclass(slots=True)
class _Line:
    """Those who want something of one homeserver."""

    turns: Turns
    people: int = 0


def _at(server: ServerName) -> _Target:
    """A server that is where its name says."""
    return _Target(f"{server.host}:{server.port or DEFAULT_PORT}", str(server), None)


class Federation:
    """The server-server API of all homeservers.

    `terms` says how the server of a (lower-case) name is reached; `now` gives Unix seconds.
    """

    def __init__(
        self,
        terms: Callable[[str], Terms],
        egress: Egress,
        now: Callable[[], float],
        *,
        srv: SrvLookup | None = None,
        stale_patience: float = STALE_PATIENCE,
        random: Callable[[], float] | None = None,
    ) -> None:
        self._terms = terms
        self._egress = egress
        self._now = now
        self._srv = srv or DnsSrv()
        self._random = random or SystemRandom().random
        self._delegations: _Memory[_Lookup, ServerName | None] = _Memory(now, stale_patience)
        self._services: _Memory[str, tuple[SrvRecord, ...]] = _Memory(now, stale_patience)
        self._failed: OrderedDict[_Target, float] = OrderedDict()  # when
        self._lines: dict[str, _Line] = {}
        self._strangers = Turns(STRANGERS, STRANGERS_WAITING)

    async def get(self, name: str, path_and_query: str, deadline: float, who: str = "") -> HttpAnswer:
        """GET `path_and_query`, which is used to the letter, from the homeserver of that name.

        `deadline` is in the time of the event loop, and covers finding the server too. A server with several targets is asked at the next
        one where a target does not answer. Redirects are answers. `who` asks: where places are short, each gets one in turn. Raises
        DiscoveryFailed, HttpFailed.
        """
        try:
            server = ServerName.parse(name)
        except ValueError as error:
            raise DiscoveryFailed(f"the server name {error}") from None
        terms = self._terms(str(server))
        targets = None if terms.stranger else self._known_targets(server, terms)
        if targets is not None:
            with self._place_now(str(server), terms.in_flight) as given:
                if given:  # as usual: nobody waits, and nothing has to be looked up
                    return await self._ask(server, targets, path_and_query, deadline, terms)
        async with contextlib.AsyncExitStack() as held:
            try:
                async with asyncio.timeout_at(deadline) as limit:
                    if terms.stranger:
                        # Whoever gets a place has half of the time left. With less the places would change hands so fast that the lookups,
                        # which go on when nobody waits for them any more, were many more than places.
                        now = asyncio.get_running_loop().time()
                        limit.reschedule(now + (deadline - now) / 2)
                    await held.enter_async_context(self._turn(str(server), terms.in_flight, who))
                    if terms.stranger:  # after its own: one that hangs must not keep the places of all others
                        await held.enter_async_context(self._strangers.turn(who))
                        limit.reschedule(deadline)
                    targets = await self._targets(server, terms)
            except Crowded:
                raise HttpFailed(True, "too many requests to it, or to servers like it, are waiting already") from None
            except TimeoutError:
                raise HttpFailed(True, "it could not be found, or earlier requests to it were not answered, in time") from None
            return await self._ask(server, targets, path_and_query, deadline, terms)

    async def aclose(self) -> None:
        """Stop lookups that are under way. The connections belong to the egress."""
        await self._delegations.aclose()
        await self._services.aclose()

    @contextlib.contextmanager
    def _place_now(self, name: str, in_flight: int) -> Iterator[bool]:
        """A place for one more request to this homeserver, if one is free now."""
        line = self._lines.setdefault(name, _Line(Turns(in_flight, MAX_WAITING)))
        line.people += 1
        given = line.turns.take()
        try:
            yield given
        finally:
            if given:
                line.turns.give_back()
            line.people -= 1
            if not line.people:
                del self._lines[name]

    @contextlib.asynccontextmanager
    async def _turn(self, name: str, in_flight: int, who: str) -> AsyncIterator[None]:
        line = self._lines.setdefault(name, _Line(Turns(in_flight, MAX_WAITING)))
        line.people += 1
        try:
            async with line.turns.turn(who):
                yield
        finally:
            line.people -= 1
            if not line.people:
                del self._lines[name]

    async def _ask(self, server: ServerName, targets: list[_Target], path_and_query: str, deadline: float, terms: Terms) -> HttpAnswer:
        if terms.url is not None:
            return await self._egress.way(discovered=False).get(terms.url.rstrip("/") + path_and_query, {}, deadline, ssl=terms.ssl)
        way, failures = self._egress.way(discovered=not terms.allow_private, stranger=terms.stranger), []
        for target in targets:
            try:
                answer = await way.get(
                    f"https://{target.authority}{path_and_query}",
                    {"Host": target.host_header},
                    deadline,
                    ssl=terms.ssl,
                    server_hostname=target.certificate,
                )
            except HttpFailed as failed:
                failures.append(failed)
                keep(self._failed, target, self._now(), MAX_KEPT)
                if asyncio.get_running_loop().time() >= deadline:
                    break
            else:
                self._failed.pop(target, None)
                return answer
        nowhere = all(failed.certainly_not_sent for failed in failures)
        if nowhere:
            self._doubt(server, targets, terms)
        raise HttpFailed(nowhere, failures[-1].reason)

    def _doubt(self, server: ServerName, targets: list[_Target], terms: Terms) -> None:
        self._delegations.doubt(_as_looked_up(server, terms))
        for target in targets:
            self._services.doubt(target.host_header)

    def _known_targets(self, server: ServerName, terms: Terms) -> list[_Target] | None:
        """As `_targets`, if nothing has to be looked up; None: something has."""
        if terms.url is not None:
            return []
        if not server.literal and server.port is None:
            delegation = self._delegations.fresh(_as_looked_up(server, terms))
            if delegation is None:
                return None
            server = delegation[0] or server
        if server.literal or server.port is not None:
            return [_at(server)]
        services = self._services.fresh(server.host)
        return None if services is None else self._of_service(server.host, services[0])

    async def _targets(self, server: ServerName, terms: Terms) -> list[_Target]:
        """Where to ask, in this order: steps 1 to 6 of "Resolving server names". Raises DiscoveryFailed."""
        if terms.url is not None:
            return []
        if not server.literal and server.port is None:
            asked = server.host
            server = await self._delegations.recall(_as_looked_up(server, terms), lambda: self._delegation(asked, terms)) or server
        if server.literal or server.port is not None:
            return [_at(server)]
        host = server.host
        return self._of_service(host, await self._services.recall(host, lambda: self._service(host)))

    def _of_service(self, host: str, records: Sequence[SrvRecord]) -> list[_Target]:
        """The targets that a host's SRV records name, in the order in which to try them. Raises DiscoveryFailed."""
        if not records:
            return [_Target(f"{host}:{DEFAULT_PORT}", host, None)]
        usable = [record for record in records if record.port and _is_host(record.target)]
        if not usable:
            raise DiscoveryFailed(f"the SRV records of {host} say that there is no server")
        targets = [_Target(f"{record.target}:{record.port}", host, host) for record in in_order(usable, self._random)]
        now = self._now()
        return sorted(targets, key=lambda target: now - self._failed.get(target, -AVOIDED) < AVOIDED)[:MAX_TARGETS]

    async def _delegation(self, host: str, terms: Terms) -> _Result[ServerName | None]:
        """The server name in `https://{host}/.well-known/matrix/server`; None where there is none. Never raises."""
        none: _Result[ServerName | None] = _Result(None, NONE_LIFE)
        deadline = asyncio.get_running_loop().time() + LOOKUP_TIMEOUT
        way = self._egress.way(discovered=not terms.allow_private, stranger=terms.stranger)
        try:
            answer = await get_following(way, f"https://{host}/.well-known/matrix/server", deadline, terms.ssl)
        except HttpFailed:
            return _Result(None, None)
        except ValueError:
            return none
        reply = read_reply(answer, self._now())
        if reply.status in {408, 429} or reply.status >= 500:
            return _Result(None, None)
        delegated = reply.content.get("m.server") if reply.status == 200 and reply.content is not None else None
        if not isinstance(delegated, str):
            return none
        try:
            life = life_of(answer.headers.get("cache-control"), default=DELEGATION_LIFE, most=MAX_DELEGATION_LIFE)
            return _Result(ServerName.parse(delegated), life)
        except ValueError:
            return none

    async def _service(self, host: str) -> _Result[tuple[SrvRecord, ...]]:
        """The records of the first service that has any. Never raises."""
        life, certain = MAX_SRV_LIFE, True
        found: tuple[SrvRecord, ...] = ()
        for service in SERVICES:
            try:
                answer = await self._srv(f"{service}.{host}")
            except SrvFailed:
                certain = False
                continue
            life = min(life, answer.life)
            found = answer.records
            if found:
                break
        return _Result(found, max(life, MIN_SRV_LIFE) if certain else None)
