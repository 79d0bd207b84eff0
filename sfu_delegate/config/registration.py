"""The registration of an application service, the file that Synapse and the daemon share: read, judged, and made.

Nothing here may read or write a file, or quote what a registration holds: two tokens, by which one can act as any user.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import yaml

from sfu_delegate.config.values import odd_character
from sfu_delegate.config.yaml_text import NOTHING, parse_yaml

SERVICE: Final = "sfu-delegate"
"""Its id at the homeserver, and the local part of the user that it is there."""

PROXY_PREFIX: Final = "rtc/livekit"
"""Where the homeserver has its MatrixRTC endpoints (MSC4195), behind /_matrix/client/…/."""

IS_JOINED: Final = "urn:matrix:client:io.element.msc4502:rooms:is_joined"
"""The scope that lets an application service ask whether a user is in a room (MSC4502)."""

MAKE_ONE: Final = "make one with `sfu-delegate appservice`"

_PREFIX_KEYS: Final = ("io.element.msc4512.proxy_prefix", "proxy_prefix")
_URL_KEYS: Final = ("io.element.msc4512.proxy_url", "proxy_url")
_SCOPES_KEY: Final = "io.element.msc4502.scopes"
_OURS: Final = (
    *("id", "url", "as_token", "hs_token", "sender_localpart", "rate_limited", "namespaces"),
    *(_PREFIX_KEYS[0], _URL_KEYS[0], _SCOPES_KEY),
)


class NotARegistration(ValueError):
    """The text is no registration of an application service; says why, and never quotes it."""


@dataclass(frozen=True, slots=True)
class Registration:
    """What a registration says, as far as it concerns the daemon. No repr shows what it holds."""

    as_token: str = field(repr=False)  # proves the daemon to the homeserver
    hs_token: str = field(repr=False)  # proves the homeserver to the daemon
    said: Mapping[str, object] = field(repr=False)  # all of it, by its keys

    @property
    def id(self) -> str:
        """By what name the homeserver tells it from other application services; "" where there is none."""
        return self._text("id")

    @property
    def proxy_url(self) -> str:
        """Where the homeserver forwards its users' requests to (MSC4512); "" where there is none."""
        return self._text(*_URL_KEYS)

    @property
    def proxy_prefix(self) -> str:
        """Which requests it forwards; "" where there is none."""
        return self._text(*_PREFIX_KEYS).rstrip("/")

    @property
    def foreign_keys(self) -> tuple[str, ...]:
        """The keys that `make` does not write."""
        return tuple(key for key in self.said if key not in _OURS)

    def _text(self, *keys: str) -> str:
        return next((value for key in keys if isinstance(value := self.said.get(key), str)), "")


def parse(text: str) -> Registration:
    """The registration that a file's text is. Raises NotARegistration."""
    parsed = parse_yaml(text)
    for problem in parsed.problems:
        # A problem with a key quotes it, and what stands there may be anything.
        what = "has a key that is there twice" if problem.key else problem.problem
        raise NotARegistration(f"{what} ({problem.where})" if problem.where else what)
    if parsed.data is NOTHING or not isinstance(parsed.data, Mapping):
        raise NotARegistration("is not a registration: it must have keys with values")
    said = {key: value for key, value in parsed.data.items() if isinstance(key, str)}
    return Registration(_token(said, "as_token"), _token(said, "hs_token"), said)


def _token(said: Mapping[str, object], key: str) -> str:
    token = said.get(key)
    if token is None:
        raise NotARegistration(f"is not a registration: it has no {key}")
    if not isinstance(token, str):
        raise NotARegistration(f"has an {key} that is not a text, but something else to YAML: it must be in quotes")
    if not token:
        raise NotARegistration(f"has an {key} that is empty")
    if odd := odd_character(token):
        raise NotARegistration(f"has an {key} with {odd} in it")
    if not re.fullmatch(r"[!-~]+", token):
        raise NotARegistration(f"has an {key} that cannot be sent: it has a character that is not ASCII")
    return token


def judge(registration: Registration, server_name: str) -> Iterator[tuple[str, str]]:
    """What will not do what people expect of it at the homeserver of this name: each a problem and a remedy."""
    said = registration.said
    again = "`sfu-delegate appservice` writes it anew, with the same tokens"
    if missing := [key for key in ("id", "sender_localpart") if not isinstance(said.get(key), str)]:
        yield f"has no {' and no '.join(missing)}, and Synapse does not start with it", again
    if "url" not in said:
        yield "has no url, and Synapse does not start with it", "add `url: null`"
    elif said["url"] is not None:
        yield "has a url: Synapse pushes every event of every room there", "set `url: null`; requests of users come by the proxy_url"
    if said.get("rate_limited") is not False:
        yield "does not say `rate_limited: false`: the homeserver's limits hold for the daemon", "set it to false"
    users = _user_namespaces(said)
    if not speaks_for(registration, server_name):
        problem = f"has no namespace that the users of {server_name} are in: Synapse does not let the daemon speak for them"
        yield problem, f"add to `namespaces`: `users: [{{exclusive: false, regex: {scalar(user_regex(server_name))}}}]`"
    if any(exclusive and _matches(regex, f"@user:{server_name}") for regex, exclusive in users):
        yield "claims the server's users for itself alone: Synapse lets nobody register or log in", "set `exclusive: false`"
    if bool(registration.proxy_prefix) != bool(registration.proxy_url):
        half = f"proxy_prefix and no {_URL_KEYS[0]}" if registration.proxy_prefix else f"proxy_url and no {_PREFIX_KEYS[0]}"
        yield f"has a {half}, and Synapse does not start with it", again
    elif registration.proxy_prefix != PROXY_PREFIX:
        problem = f"has {PROXY_PREFIX} forwarded nowhere ({_PREFIX_KEYS[0]}, proxy_url): clients cannot reach the daemon through the homeserver"
        yield problem, f"fine if it is there for the limits only; otherwise {again}"
    scopes = said.get(_SCOPES_KEY)
    if not isinstance(scopes, list) or IS_JOINED not in scopes:
        problem = "lacks the scope to ask who is in a room: memberships cannot be checked, and no token be given through the homeserver"
        yield problem, f"add it: `{_SCOPES_KEY}: ['{IS_JOINED}']`"


def speaks_for(registration: Registration, server_name: str) -> bool:
    """Are the users of that server in its namespaces?"""
    return any(_matches(regex, f"@user:{server_name}") for regex, _ in _user_namespaces(registration.said))


def _user_namespaces(said: Mapping[str, object]) -> list[tuple[str, bool]]:
    """The expressions for users, and whether each is claimed for the application service alone."""
    namespaces = said.get("namespaces")
    users = namespaces.get("users") if isinstance(namespaces, Mapping) else None
    found = [user for user in users if isinstance(user, Mapping)] if isinstance(users, list) else []
    return [(regex, user.get("exclusive") is True) for user in found if isinstance(regex := user.get("regex"), str)]


def _matches(regex: str, user_id: str) -> bool:
    """Is the user in the namespace, as Synapse sees it?"""
    try:
        return re.match(regex, user_id) is not None
    except (re.error, RecursionError, OverflowError):
        return False


def user_regex(server_name: str) -> str:
    """The namespace of all users of a server."""
    return rf"@.*:{re.escape(server_name)}$"


def make(server_name: str, as_token: str, hs_token: str, proxy_url: str) -> str:
    """The text of a registration with all that the daemon can use."""
    return f"""\
# The registration of sfu-delegate as an application service of {server_name}, for Synapse (app_service_config_files) and for the daemon
# (homeservers[].registration_file). Made by `sfu-delegate appservice`, which keeps the tokens when it writes this file again.
#
# IT HOLDS SECRETS: who has them can act as any user of {server_name}. Only Synapse and the daemon may read it.

id: {SERVICE}
url: null
as_token: {scalar(as_token)}
hs_token: {scalar(hs_token)}
sender_localpart: {SERVICE}
rate_limited: false
namespaces:
  users:
    - exclusive: false
      regex: {scalar(user_regex(server_name))}
  rooms: []
  aliases: []

# Requests of users below this path are forwarded to the daemon (MSC4512).
{_PREFIX_KEYS[0]}: {PROXY_PREFIX}
{_URL_KEYS[0]}: {scalar(proxy_url)}

# The daemon may ask whether a user is in a room (MSC4502).
{_SCOPES_KEY}:
  - {scalar(IS_JOINED)}
"""


def scalar(value: str) -> str:
    """A text in one line of YAML."""
    text: str = yaml.safe_dump(value, width=1 << 30, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
