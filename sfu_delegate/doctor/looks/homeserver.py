"""Looking at a homeserver, as the daemon reaches it. Nothing is asked for that changes anything: made-up delayed events, made-up tokens."""

import asyncio
import secrets
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

from pydantic_core import to_json

from sfu_delegate.delegation.model import Action
from sfu_delegate.doctor.findings import CannotLook, Finding, ok, problem
from sfu_delegate.doctor.looks.here import is_ours
from sfu_delegate.doctor.running import Shared
from sfu_delegate.doctor.verdicts.clock import Offset, offset
from sfu_delegate.doctor.verdicts.homeserver import (
    ACTIONS,
    Answers,
    Asked,
    Capability,
    Focus,
    Limit,
    Offered,
    Refused,
    Served,
    Tried,
    WellKnown,
    measured,
)
from sfu_delegate.doctor.words import spoken
from sfu_delegate.matrix.answers import Reply, read_date, read_reply
from sfu_delegate.matrix.discovery import DiscoveryFailed, Homeserver, HomeserverRule, Homeservers, get_following
from sfu_delegate.matrix.egress import Egress
from sfu_delegate.matrix.http import Http, HttpFailed
from sfu_delegate.matrix.management import Generation, generations_offered
from sfu_delegate.matrix.names import checked_base_url
from sfu_delegate.matrix.openid import OpenId, OpenIdRefused, OpenIdUnavailable
from sfu_delegate.matrix.service import ApplicationService, CannotAsk

MADE_UP: Final = "sfu-delegate-doctor-"
ENOUGH: Final = 8  # requests at once: Synapse's default limit lets 5 through
PATIENCE: Final = 3.0  # seconds that are waited to measure a limit exactly
ROUNDED: Final = 0.01  # … beyond the milliseconds that a homeserver tells
FOCI: Final = 4  # services of a `.well-known` that are looked at
_JSON: Final = {"Content-Type": "application/json"}
_RTC_FOCI: Final = ("org.matrix.msc4143.rtc_foci", "m.rtc_foci")


@dataclass(frozen=True, slots=True)
class Versions:
    """What a homeserver announces."""

    content: dict[str, Any]
    seconds: float
    offset: Offset | None


class HomeserverLook:
    """Looks at one homeserver. `now` gives Unix seconds."""

    def __init__(
        self,
        name: str,
        rule: HomeserverRule,
        homeservers: Homeservers,
        egress: Egress,
        service: ApplicationService,
        openid: OpenId,
        now: Callable[[], float],
        timeout: float,
    ) -> None:
        self.name = name
        self._rule = rule
        self._homeservers = homeservers
        self._egress = egress
        self._service = service
        self._openid = openid
        self._now = now
        self._timeout = timeout
        self._found = Shared(lambda: homeservers.resolve(name))
        self._versions = Shared(self._ask_versions)
        self.offered = Shared(self._what_it_offers)

    async def aclose(self) -> None:
        """Stop what is under way."""
        for shared in (self.offered, self._versions, self._found):
            await shared.end()

    # ── requests ──

    def _deadline(self) -> float:
        return asyncio.get_running_loop().time() + self._timeout

    async def _ask(self, method: str, path: str, *, token: str | None = None, body: dict[str, Any] | None = None) -> Reply:
        """Raises CannotLook."""
        homeserver = await self._reached()
        http = self._egress.way(discovered=homeserver.discovered, stranger=homeserver.stranger)
        headers = {**_JSON, "Authorization": f"Bearer {token}"} if token is not None else _JSON
        url = homeserver.base_url + path
        try:
            if method == "GET":
                answer = await http.get(url, headers, self._deadline(), ssl=homeserver.ssl)
            else:
                answer = await http.post(url, headers, to_json(body or {}), self._deadline(), ssl=homeserver.ssl)
        except HttpFailed as failed:
            raise CannotLook(f"it cannot be reached: {failed.reason}") from None
        return read_reply(answer, self._now())

    async def _reached(self) -> Homeserver:
        try:
            return await self._found()
        except DiscoveryFailed as failed:
            raise CannotLook(str(failed)) from None

    async def _ask_versions(self) -> Versions:
        homeserver = await self._reached()
        http = self._egress.way(discovered=homeserver.discovered, stranger=homeserver.stranger)
        sent_at, began = self._now(), time.monotonic()
        try:
            answer = await http.get(f"{homeserver.base_url}/_matrix/client/versions", {}, self._deadline(), ssl=homeserver.ssl)
        except HttpFailed as failed:
            raise CannotLook(f"it cannot be reached: {failed.reason}") from None
        took = time.monotonic() - began
        reply = read_reply(answer, sent_at)
        if reply.status != 200:
            raise CannotLook(f"it answers {reply.status} {reply.errcode}".rstrip() + " to /_matrix/client/versions")
        if reply.content is None or not isinstance(reply.content.get("versions"), list):
            raise CannotLook("its answer to /_matrix/client/versions is not that of a homeserver: is there a proxy that answers in its place?")
        return Versions(dict(reply.content), took, offset(read_date(answer.headers.get("date")), sent_at, self._now()))

    # ── looks ──

    async def reachable(self) -> Finding:
        """Can it be found and asked?"""
        remedy = "check homeservers[].url, and that this machine reaches it"
        try:
            homeserver = await self._found()
        except DiscoveryFailed as failed:
            return problem(str(failed), "let .well-known/matrix/client name the client-server API, or set homeservers[].url")
        try:
            versions = await self._versions()
        except CannotLook as cannot:
            return problem(f"{homeserver.base_url}: {cannot.finding.evidence}", remedy)
        how = "found by .well-known" if self._rule.url is None else "as configured"
        newest = versions.content["versions"][-1:] or ["?"]
        return ok(f"{homeserver.base_url} ({how}) answers within {spoken(versions.seconds)}; its newest specification is {str(newest[0])[:20]}")

    async def clock(self) -> Offset | None:
        """By how much its clock is off. Raises CannotLook."""
        return (await self._versions()).offset

    async def _what_it_offers(self) -> Offered:
        offered = generations_offered((await self._versions()).content)
        for generation in offered:
            endpoints = await self._endpoints(generation)
            # The announcement does not tell them apart: the first of which anything is there is the one that is used.
            if any(state is not Served.NO for state in endpoints.values()):
                return Offered(offered[offered.index(generation) :], endpoints)
        return Offered(offered, await self._endpoints(offered[0]) if offered else {})

    async def _endpoints(self, generation: Generation) -> dict[str, Served]:
        made_up = MADE_UP + secrets.token_hex(8)
        path, _ = generation.request(made_up, Action.RESTART)
        if generation in (Generation.A, Generation.B):
            # An action that there is not: nobody counts that for a limit.
            state = _served(await self._ask("POST", path, body={"action": "doctor"}), of_post=True)
            return dict.fromkeys(ACTIONS, state)
        paths = {action: path.removesuffix("restart") + action for action in ACTIONS}
        replies = await asyncio.gather(*(self._ask("GET", one) for one in paths.values()))
        states = dict(zip(ACTIONS, map(_served, replies), strict=True))
        if set(states.values()) == {Served.NO} and _served(await self._ask("POST", path), of_post=True) is Served.YES:
            # A homeserver that says of a wrong method what it says of a wrong path: one restart of nothing has told.
            return dict.fromkeys(ACTIONS, Served.UNKNOWN) | {"restart": Served.YES}
        return states

    async def capability(self) -> Capability:
        """The largest delay that it allows. Raises CannotLook."""
        token = self._rule.as_token
        if token is None:
            reason = "it tells that to its users, and to an application service, which there is none of"
            raise CannotLook(reason, "let it be an hour or more (Synapse: max_event_delay_duration)")
        reply = await self._ask("GET", "/_matrix/client/v3/capabilities", token=token)
        if reply.status != 200 or reply.content is None:
            raise CannotLook(
                f"it answers {reply.status} {reply.errcode}".rstrip() + " when it is asked for its capabilities", "see the application service"
            )
        capabilities = reply.content.get("capabilities")
        told = capabilities.get("org.matrix.msc4140.delayed_events") if isinstance(capabilities, dict) else None
        longest, scheduled = (told.get("max_delay_ms"), told.get("max_scheduled")) if isinstance(told, dict) else (None, None)
        number = isinstance(longest, int | float) and not isinstance(longest, bool)
        return Capability(longest / 1000 if number else None, scheduled if isinstance(scheduled, int) else None)  # type: ignore[operator]

    async def limit(self) -> Limit:
        """Restarts of a delayed event that there is not, one after the other, until one is refused. Raises CannotLook."""
        offered = await self.offered()
        if not offered.generations:
            raise CannotLook("delayed events are off")
        token = self._rule.as_token
        path, body = offered.generations[0].request(MADE_UP + secrets.token_hex(8), Action.RESTART)
        sent = {"action": "restart"} if b"action" in body else {}

        async def refused(since: float) -> Refused | None:
            """One restart; None: it was granted."""
            asked = time.monotonic()
            reply = await self._ask("POST", path, token=token, body=sent)
            if reply.status == 429:
                return Refused(reply.retry_after, asked - since)
            if reply.status == 404 and reply.errcode == "M_NOT_FOUND":
                return None
            raise CannotLook(f"it answers {reply.status} {reply.errcode}".rstrip() + " to a restart of a delayed event that there is not")

        service, began = token is not None, time.monotonic()
        granted = 0
        while (first := await refused(began)) is None:
            granted += 1
            if granted == ENOUGH:
                return measured(ENOUGH, ENOUGH, service=service)
        again = None
        if first.wait is not None and first.wait <= PATIENCE:
            allowed = began + first.after + first.wait  # from when it was asked: Synapse holds a refusal back for half a second
            await asyncio.sleep(allowed + ROUNDED - time.monotonic())
            if await refused(allowed) is None:
                again = await refused(allowed)
        return measured(granted, ENOUGH, first, again, service=service)

    async def service(self, *, daemon: bool) -> Tried:
        """Tries all that an application service needs. Raises CannotLook."""
        if self._rule.as_token is None:
            raise CannotLook("there is none for it", "`sfu-delegate appservice` writes the registration, and tells what to do with it")
        homeserver = await self._reached()
        passes_on = self._rule.hs_token is not None
        try:
            return Tried(await self._service.check(homeserver, self._timeout, passes_on=passes_on), passes_on, daemon)
        except CannotAsk as cannot:
            raise CannotLook(str(cannot)) from None

    async def federation(self) -> Asked:
        """Asks whose a token is that nobody has issued."""
        try:
            await self._openid.user(self.name, MADE_UP + secrets.token_hex(16), self._timeout)
        except OpenIdRefused:
            return Asked()
        except OpenIdUnavailable as error:
            return Asked(str(error).partition("OpenID token: ")[2] or str(error))
        return Asked(believed=True)

    async def well_known(self) -> WellKnown:
        """What clients find."""
        rule, where = self._rule, f"https://{quote(self.name, safe=':[]')}/.well-known/matrix/client"
        way = self._egress.way(discovered=not rule.allow_private, stranger=rule.anybodys)
        context = self._homeservers.ssl_for(rule)
        try:
            answer = await get_following(way, where, self._deadline(), context)
        except HttpFailed as failed:
            return WellKnown(failed.reason)
        except ValueError as error:
            return WellKnown(str(error))
        reply = read_reply(answer, self._now())
        if reply.status == 404:
            return WellKnown(f"{where} is not there (404)")
        if reply.status != 200 or reply.content is None:
            return WellKnown(f"it answers {reply.status}" + ("" if reply.status != 200 else ", and no JSON object"))
        urls = [url for key in _RTC_FOCI for url in _services(reply.content.get(key))]
        foci = await asyncio.gather(*(self._focus(way, url, context) for url in list(dict.fromkeys(urls))[:FOCI]))
        return WellKnown(foci=foci, cross_origin=answer.headers.get("access-control-allow-origin") == "*")

    async def _focus(self, way: Http, url: str, context: ssl.SSLContext | None) -> Focus:
        shown = url[:200]
        try:
            base = checked_base_url(url, allow_http=True)
        except ValueError as error:
            return Focus(shown, Answers.ELSE, f"it {error}")
        failure = ""
        for trusted in dict.fromkeys((context, None)):  # it need not have a certificate of the homeserver's own authority
            try:
                answer = await way.get(f"{base}/healthz", {}, self._deadline(), ssl=trusted)
            except HttpFailed as failed:
                failure = failure or failed.reason
                continue
            if is_ours(answer.status, answer.body):
                return Focus(shown, Answers.OURS)
            detail = f"/healthz below it answers {answer.status}" + (", and not as a sfu-delegate does" if answer.status == 200 else "")
            return Focus(shown, Answers.NONE if answer.status >= 500 else Answers.ELSE, detail)
        return Focus(shown, Answers.NONE, failure)


def _services(foci: object) -> list[str]:
    if not isinstance(foci, list):
        return []
    urls = [focus.get("livekit_service_url") for focus in foci if isinstance(focus, dict) and focus.get("type", "livekit") == "livekit"]
    return [url for url in urls if isinstance(url, str)]


def _served(reply: Reply, *, of_post: bool = False) -> Served:
    """What an answer to a request that means nothing says of the endpoint, which is one for POST."""
    if (reply.status == 405 and not of_post) or (reply.errcode and reply.errcode != "M_UNRECOGNIZED"):
        return Served.YES
    if reply.errcode == "M_UNRECOGNIZED" or reply.status == 405:
        return Served.NO
    return Served.UNKNOWN if reply.status >= 500 else Served.ELSE
