"""Which homeservers are served, and where their client-server API is.

Both are the operator's decision: by URL, or by leaving it to the homeserver's own `.well-known`. A client only names a homeserver; it never
chooses a URL.
"""

import asyncio
import hmac
import re
import ssl as tls
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Final
from urllib.parse import urljoin

from sfu_delegate.matrix.answers import Reply, read_reply
from sfu_delegate.matrix.egress import Egress
from sfu_delegate.matrix.http import Http, HttpAnswer, HttpFailed
from sfu_delegate.matrix.inflight import InFlight
from sfu_delegate.matrix.memory import keep
from sfu_delegate.matrix.names import checked_base_url, compile_pattern, is_pattern, is_server_name

LOOKUP_TIMEOUT: Final = 10.0  # seconds for a lookup with all its redirects
MAX_REDIRECTS: Final = 5
MIN_LIFE: Final = 300.0  # seconds that a found URL is kept at least, whatever Cache-Control says
MAX_LIFE: Final = 86_400.0
DEFAULT_LIFE: Final = 3600.0
FAILURE_LIFE: Final = 10.0  # seconds until a failed lookup is repeated
STALE_LIFE: Final = 86_400.0  # seconds beyond its time that a found URL is used while it cannot be looked up again
STALE_PATIENCE: Final = 2.0  # seconds that somebody with a stale URL waits for a new one
MAX_CACHED: Final = 10_000  # names

_MAX_AGE = re.compile(r"(?:^|[\s,])max-age\s*=\s*\"?([0-9]{1,18})", re.IGNORECASE)
_NOT_TO_BE_KEPT = re.compile(r"(?:^|[\s,])no-(?:store|cache)(?:$|[\s,=])", re.IGNORECASE)
_HEADER_VALUE = re.compile(r"[!-~]+")


class DiscoveryFailed(Exception):
    """A homeserver's API cannot be found. Its text is a sentence for the operator, with the remedy, and holds no secrets."""


class NotServed(DiscoveryFailed):
    """The operator does not serve this homeserver."""


@dataclass(frozen=True, slots=True)
class HomeserverRule:
    """What the operator says of a homeserver, or of all whose names match a pattern. Raises ValueError with a plain sentence."""

    pattern: str  # a server name, or a pattern in which `*` stands for any text
    url: str | None = None  # of the client-server API; None: by .well-known
    as_token: str | None = field(default=None, repr=False)  # of the application service
    ca_file: str | None = None  # certificate authorities (PEM) to be trusted there, in place of the system's
    allow_http: bool = False  # may the URL that is discovered be without TLS?
    allow_private: bool = False  # may discovery lead into private networks?
    max_in_flight: int = 64  # requests at a time, for whoever plans them
    limited: bool | None = None  # does its rate limit hold for us? None: that depends on the as_token, or is to be found out
    federation_url: str | None = None  # of the server-server API; None: by server discovery
    hs_token: str | None = field(default=None, repr=False)  # by which the homeserver proves itself to the application service

    def __post_init__(self) -> None:
        if not is_pattern(self.pattern):
            raise ValueError(f"{self.pattern!r} is neither a Matrix server name nor a pattern of them")
        for what, url in (("base URL", self.url), ("federation_url", self.federation_url)):
            if url is not None:
                try:
                    checked_base_url(url, allow_http=True)
                except ValueError as error:
                    raise ValueError(f"{self.pattern}: the {what} {error}") from None
        if self.max_in_flight < 1:
            raise ValueError(f"{self.pattern}: max_in_flight is less than 1")
        if self.as_token is not None:
            if not _HEADER_VALUE.fullmatch(self.as_token):
                raise ValueError(f"{self.pattern}: as_token is empty, or has characters that a header cannot have")
            if "*" in self.pattern and self.url is None:
                raise ValueError(
                    f"{self.pattern}: as_token with a pattern needs a url; otherwise it would be sent to every server whose name matches"
                )

    @property
    def anybodys(self) -> bool:
        """Can anybody have a name that matches? So it is unless the pattern ends in a domain, as `*.example.org` does."""
        _, star, suffix = self.pattern.rpartition("*")
        return bool(star) and not (suffix.startswith(".") and "." in suffix[1:])

    @property
    def terms(self) -> tuple[bool, bool, str | None]:
        """What the result of a lookup depends on, beside the name."""
        return (self.allow_http, self.allow_private, self.ca_file)


@dataclass(frozen=True, slots=True)
class Homeserver:
    """A homeserver that can be asked."""

    name: str  # lower-case
    base_url: str  # of the client-server API, without a trailing slash
    as_token: str | None = field(default=None, repr=False)
    ssl: tls.SSLContext | None = field(default=None, repr=False)  # None: the system's certificate authorities
    discovered: bool = False  # the URL is the homeserver's word, not the operator's, and must not lead into private networks
    stranger: bool = False  # … and anybody may have chosen the name


@dataclass(frozen=True, slots=True)
class _Found:
    """The result of the latest lookup of a name."""

    terms: tuple[bool, bool, str | None]
    base_url: str | None
    problem: str  # why there is none
    expires: float  # when to look again
    usable_until: float  # while looking again fails


class _Rules:
    """One configuration: exact names before patterns, and the more of a name a pattern gives, the earlier it comes."""

    def __init__(self, rules: Sequence[HomeserverRule]) -> None:
        self.exact: dict[str, HomeserverRule] = {}
        self.patterns: list[tuple[re.Pattern[str], HomeserverRule]] = []
        self.contexts: dict[str, tls.SSLContext] = {}
        for rule in rules:
            if "*" in rule.pattern:
                self.patterns.append((compile_pattern(rule.pattern), rule))
            else:
                self.exact.setdefault(rule.pattern.lower(), rule)
        self.patterns.sort(key=lambda pattern: len(pattern[1].pattern.replace("*", "")), reverse=True)
        for rule in rules:
            if rule.ca_file is not None and rule.ca_file not in self.contexts:
                self.contexts[rule.ca_file] = _context(rule)
        # By what a homeserver proves itself: for one server, since it vouches for its users.
        self.hs_tokens = [(rule.hs_token.encode(), rule.pattern.lower()) for rule in rules if rule.hs_token is not None and "*" not in rule.pattern]
        # Asked for with every request and every change of a row, for few names: an answer each from a bounded memory.
        self.find = lru_cache(MAX_CACHED)(self._find)
        self.configured = lru_cache(MAX_CACHED)(self._configured)

    def _find(self, name: str) -> HomeserverRule | None:
        """The rule of a name, whatever its case; None: not served, or no server name at all."""
        if not is_server_name(name):
            return None
        name = name.lower()
        exact = self.exact.get(name)
        if exact is not None:
            return exact
        return next((rule for pattern, rule in self.patterns if pattern.fullmatch(name)), None)

    def _configured(self, name: str) -> "Homeserver | None":
        """The homeserver of that name, where no lookup is needed to find it."""
        rule = self.find(name)
        if rule is None or rule.url is None:
            return None
        return Homeserver(name.lower(), checked_base_url(rule.url, allow_http=True), rule.as_token, self.ssl(rule), discovered=False)

    def ssl(self, rule: HomeserverRule) -> tls.SSLContext | None:
        return None if rule.ca_file is None else self.contexts[rule.ca_file]


class Homeservers:
    """The homeservers that are served. `now` gives Unix seconds. Raises ValueError where a CA file cannot be used."""

    def __init__(self, rules: Sequence[HomeserverRule], egress: Egress, now: Callable[[], float], *, stale_patience: float = STALE_PATIENCE) -> None:
        self._rules = _Rules(rules)
        self._egress = egress
        self._now = now
        self._stale_patience = stale_patience
        self._cache: OrderedDict[str, _Found] = OrderedDict()
        self._lookups: InFlight[_Found] = InFlight()

    def replace_rules(self, rules: Sequence[HomeserverRule]) -> None:
        """Use a new configuration from now on; CA files are read again, and URLs that were found are kept where the new rules would look
        for them in the same way.

        Raises ValueError, and then leaves the old rules in force.
        """
        self._rules = _Rules(rules)

    def rule_for(self, name: str) -> HomeserverRule | None:
        """The rule of a server name, whatever its case: that of the exact name, else of the pattern that gives most of it.

        None: not served, or no server name at all.
        """
        return self._rules.find(name)

    def ssl_for(self, rule: HomeserverRule) -> tls.SSLContext | None:
        """What is trusted there, of a rule that `rule_for` has just given: the same object until the rules are replaced. None: the system's
        certificate authorities.
        """
        return self._rules.ssl(rule)

    @property
    def has_services(self) -> bool:
        """Does any homeserver have an application service by which it passes requests on?"""
        return bool(self._rules.hs_tokens)

    def has_service(self, name: str) -> bool:
        """Does this homeserver, whatever the case of its name, pass requests on to us?"""
        return any(name.lower() == served for _, served in self._rules.hs_tokens)

    def vouched_by(self, hs_token: str) -> str | None:
        """The homeserver whose `hs_token` this is. How long that takes tells nothing of the tokens."""
        given = hs_token.encode("utf-8", "surrogatepass")
        found = None
        for token, name in self._rules.hs_tokens:
            if hmac.compare_digest(token, given):
                found = name
        return found

    def configured(self, name: str) -> Homeserver | None:
        """Where the homeserver of that name is, if the configuration says it; else `resolve` has to look."""
        return self._rules.configured(name)

    async def resolve(self, name: str) -> Homeserver:
        """Where the homeserver of that name is. Raises DiscoveryFailed."""
        configured = self.configured(name)
        if configured is not None:
            return configured
        if not is_server_name(name):
            raise NotServed("this is not a valid Matrix server name")
        name = name.lower()
        rules = self._rules
        rule = rules.find(name)
        if rule is None:
            raise NotServed(f"the homeserver {name} is not served here")
        found = self._remembered(name, rule)
        now = self._now()
        if found is None or now >= found.expires:
            found = await self._look_again(name, rule, found if found and found.base_url and now < found.usable_until else None)
        if found.base_url is None:
            raise DiscoveryFailed(found.problem)
        return Homeserver(name, found.base_url, rule.as_token, rules.ssl(rule), discovered=not rule.allow_private, stranger=rule.anybodys)

    async def aclose(self) -> None:
        """Stop lookups that are under way. The connections belong to the egress."""
        await self._lookups.aclose()

    def _remembered(self, name: str, rule: HomeserverRule) -> _Found | None:
        found = self._cache.get(name)
        if found is None or found.terms != rule.terms:
            return None
        self._cache.move_to_end(name)
        return found

    async def _look_again(self, name: str, rule: HomeserverRule, stale: _Found | None) -> _Found:
        lookup = self._lookups.share((name, rule.terms), lambda: self._look_up(name, rule))
        if stale is None:
            return await lookup
        try:
            async with asyncio.timeout(self._stale_patience):
                return await lookup
        except TimeoutError:  # the lookup goes on; a departure does not wait for it
            return stale

    async def _look_up(self, name: str, rule: HomeserverRule) -> _Found:
        """Look the name up and remember what came of it. Never raises DiscoveryFailed."""
        try:
            base_url, life = await self._well_known(name, rule)
            now = self._now()
            found = _Found(rule.terms, base_url, "", now + life, now + life + STALE_LIFE)
        except DiscoveryFailed as failed:
            now = self._now()
            old = self._remembered(name, rule)
            if old is not None and old.base_url is not None and now < old.usable_until:
                found = _Found(rule.terms, old.base_url, "", now + FAILURE_LIFE, old.usable_until)
            else:
                found = _Found(rule.terms, None, str(failed), now + FAILURE_LIFE, 0.0)
        keep(self._cache, name, found, MAX_CACHED)
        return found

    async def _well_known(self, name: str, rule: HomeserverRule) -> tuple[str, float]:
        """Base URL and seconds that it may be kept, from `https://{name}/.well-known/matrix/client`. Raises DiscoveryFailed."""
        where = f"https://{name}/.well-known/matrix/client"

        def failed(why: str) -> DiscoveryFailed:
            return DiscoveryFailed(f"the client-server API of {name} cannot be found by {where}: {why}; configure its url to do without")

        try:
            answer, reply = await self._fetch(where, rule)
        except HttpFailed as error:
            raise failed(error.reason) from None
        except ValueError as error:
            raise failed(str(error)) from None
        if reply.status != 200:
            raise failed(f"it answers {reply.status}")
        if reply.content is None:
            raise failed("it answers with something that is not a JSON object, or too long")
        try:
            base_url = checked_base_url(_base_url_in(reply.content), allow_http=rule.allow_http)
        except ValueError as error:
            raise failed(f"the base_url in its m.homeserver {error}") from None
        return base_url, life_of(answer.headers.get("cache-control"))

    async def _fetch(self, url: str, rule: HomeserverRule) -> tuple[HttpAnswer, Reply]:
        """GET by .well-known's rules. Raises HttpFailed, ValueError."""
        deadline = asyncio.get_running_loop().time() + LOOKUP_TIMEOUT
        context = self._rules.ssl(rule) if rule.ca_file in self._rules.contexts else None
        answer = await get_following(self._egress.way(discovered=not rule.allow_private, stranger=rule.anybodys), url, deadline, context)
        return answer, read_reply(answer, self._now())


async def get_following(way: Http, url: str, deadline: float, ssl: tls.SSLContext | None) -> HttpAnswer:
    """GET, following a few redirects to https URLs, each by the same way as the first.

    Raises HttpFailed; and ValueError, with a sentence about "it", where a redirect is not followed.
    """
    for _ in range(MAX_REDIRECTS + 1):
        answer = await way.get(url, {}, deadline, ssl=ssl)
        if answer.status not in {301, 302, 303, 307, 308}:
            return answer
        try:
            url = _checked_redirect(url, answer.headers.get("location", ""))
        except ValueError as error:
            raise ValueError(f"it redirects to a URL that {error}") from None
    raise ValueError(f"it redirects more than {MAX_REDIRECTS} times")


def life_of(cache_control: str | None, *, default: float = DEFAULT_LIFE, most: float = MAX_LIFE) -> float:
    """Seconds that what was found is kept, by the answer's Cache-Control, within MIN_LIFE and `most`; `default` where it says nothing."""
    if _NOT_TO_BE_KEPT.search(cache_control or ""):
        return MIN_LIFE
    asked = _MAX_AGE.search(cache_control or "")
    return default if asked is None else min(max(float(asked[1]), MIN_LIFE), most)


def _base_url_in(content: Any) -> object:
    homeserver = content.get("m.homeserver")
    return homeserver.get("base_url") if isinstance(homeserver, dict) else None


def _checked_redirect(base: str, location: str) -> str:
    target = urljoin(base, location)
    if not location:
        raise ValueError("is missing")
    target = target.partition("#")[0]
    if not target.isascii() or not target.isprintable() or " " in target:
        raise ValueError("has characters that a URL cannot have")
    checked_base_url(target.partition("?")[0], allow_http=False)
    return target


def _context(rule: HomeserverRule) -> tls.SSLContext:
    try:
        return trusting(rule.ca_file)
    except ValueError as error:
        raise ValueError(f"{rule.pattern}: the ca_file {error}") from None


def trusting(ca_file: str | Path | None) -> tls.SSLContext:
    """For clients that trust these certificates (None: the system's). Raises ValueError, with a sentence about the file."""
    try:
        context = tls.create_default_context(cafile=ca_file)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        why = error.strerror if isinstance(error, OSError) and error.strerror else "it holds no certificates"
        raise ValueError(f"cannot be used: {why}") from None
    context.set_alpn_protocols(["http/1.1"])
    return context
