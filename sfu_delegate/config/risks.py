"""A valid configuration, judged: what works but is risky or surely not meant, and what a running daemon can take over.

Nothing here may refuse a configuration, and a warning must never show a secret.
"""

import difflib
import ipaddress
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from pydantic import SecretStr

from sfu_delegate.config.model import EXAMPLE_SECRET, Config, Level, Section
from sfu_delegate.config.problems import HIDDEN, KeyPath, Problem, dotted, unique
from sfu_delegate.config.registration import parse
from sfu_delegate.config.values import MAKE_A_TOKEN, format_duration
from sfu_delegate.delegation.policy import DEPARTURES, MISSING, ROOM_MISSING, Unasked

_TAKEOVERS: Final = ("DUPLICATE_IDENTITY", "MIGRATION", "SERVER_SHUTDOWN", MISSING, ROOM_MISSING)
# LiveKit 1.13 knows these as well; they are treated as OTHER.
_KNOWN_REASONS: Final = frozenset(DEPARTURES) | {"UNKNOWN_REASON", "SIP_TRUNK_FAILURE", "AGENT_ERROR"}


# What people leave in place of a secret.
_PLACEHOLDER: Final = re.compile(
    r"^(?:put|your|insert|replace|change)[-_ ]?(?:\w+[-_ ]|me|this)|^made-by-|example|placeholder|…|\.\.\.|^<", re.IGNORECASE
)


def warnings(config: Config) -> list[Problem]:
    """What works, but is risky or surely not meant."""
    return [*config._risks, *unique(_risks_of(config))]


def _risks_of(config: Config) -> Iterator[Problem]:
    if not is_loopback(config.listen.host):
        yield Problem(
            "listen.host",
            config.listen.host,
            "is reached without TLS by everybody who reaches this address",
            "fine inside a container or behind a firewall; otherwise listen on 127.0.0.1 behind your reverse proxy",
        )
    yield from _risks_of_admin(config)
    for number, network in enumerate(config.listen.trusted_proxies):
        if network.prefixlen == 0:
            problem = "everybody can claim any address, and limits.client_rate stops nobody"
            yield Problem(f"listen.trusted_proxies[{number}]", str(network), problem, "name your reverse proxies")
    yield from _risks_of_postgresql(config) if config.is_postgresql else _risks_of_sqlite(config)

    for name, sfu in config.sfus.items():
        at = f"sfus.{name}"
        if _is_in_clear(sfu.url):
            yield Problem(f"{at}.url", sfu.url, "tokens go there unencrypted, and browsers refuse it on https pages", "use wss://")
        for key, secret in sfu.keys.items():
            text = secret.get_secret_value()
            if (key, text) == ("devkey", "secret"):
                yield Problem(f"{at}.keys.{key}", HIDDEN, "is the key that LiveKit uses with --dev and that everybody knows", "make a new one")
            elif text == EXAMPLE_SECRET or is_placeholder(text):
                yield Problem(f"{at}.keys.{key}", HIDDEN, "is a placeholder, no secret", "put the SFU's own key and secret here")
            elif len(text) < 32:
                problem = "is short for a secret: who guesses it can speak for the SFU and for every participant"
                yield Problem(f"{at}.keys.{key}", HIDDEN, problem, "make one of 32 characters or more: `livekit-server generate-keys`")

    paths = config.matrixrtc_paths
    for name in config.sfus:
        if paths and name not in paths.values():
            problem = "no MatrixRTC client can reach this SFU: only the first one is handed out without a path"
            yield Problem(
                f"sfus.{name}.path_prefixes", "[]", problem, "give it one, such as /livekit/jwt, or ignore this if other services hand it out"
            )

    for number, homeserver in enumerate(config.homeservers):
        at = f"homeservers[{number}]"
        url = homeserver.url
        if url and _is_in_clear(url):
            yield Problem(f"{at}.url", url, "tokens and delay_ids go there unencrypted", "use https://, or a loopback address")
        federation_url = homeserver.federation_url
        if federation_url and _is_in_clear(federation_url):
            problem = "OpenID tokens go there unencrypted, and anybody on the way can pose as any of its users"
            yield Problem(f"{at}.federation_url", federation_url, problem, "use https://, or a loopback address")
        if federation_url and "*" in homeserver.name:
            problem = "this one server vouches for the users of every homeserver that matches"
            yield Problem(f"{at}.federation_url", federation_url, problem, "fine if it answers for all of them; otherwise an entry for each")
        yield from _risks_of_token(at, "as_token", homeserver.token_key, homeserver.as_token)
        yield from _risks_of_token(at, "hs_token", homeserver.hs_token_key, homeserver.hs_token)
        if homeserver.registration_file is not None:
            yield from _risks_of_proxy_url(config, f"{at}.registration_file", homeserver.registration_file)
        if homeserver.name == "*" and (url is None or paths):
            problem = "users of any homeserver in the world may " + ("create rooms on your SFU, and delegate" if paths else "delegate")
            yield Problem(f"{at}.name", "'*'", problem, "name the homeservers that you serve")
        discovered = url is None or (paths and federation_url is None)
        if homeserver.allow_private_addresses and "*" in homeserver.name and discovered:
            problem = "any homeserver that matches can make the daemon send requests into your own network"
            yield Problem(f"{at}.allow_private_addresses", "true", problem, "name the homeserver, or give its url and its federation_url")

    tells = [h for h in config.homeservers if h.as_token or h.as_token_file or h.registration_file]
    if config.membership.enforce and config.homeservers and not tells:
        problem = "does nothing: no homeserver has an application service, by which it would tell who is in a room"
        yield Problem("membership.enforce", "true", problem, "make one with `sfu-delegate appservice`, and name its file as registration_file")

    if not config.federation.verify_tls:
        problem = "ANYBODY ON THE NETWORK CAN POSE AS ANY HOMESERVER'S USER: join calls, create rooms and delegate"
        yield Problem("federation.verify_tls", "false", problem, "true, with a ca_file for certificates of your own; false is for test networks only")
    if config.federation.allow_private_addresses and paths and config.matrixrtc.other_homeservers:
        problem = "strangers choose where we connect to: anybody can make the daemon send requests into your own network"
        remedy = "false, with allow_private_addresses in the entry of the homeserver that needs it; or matrixrtc.other_homeservers: false"
        yield Problem("federation.allow_private_addresses", "true", problem, remedy)

    for reason, rule in config.departures.items():
        at = f"departures.{reason}"
        if reason not in _KNOWN_REASONS and not reason.isdecimal():
            close = difflib.get_close_matches(reason, sorted(_KNOWN_REASONS), 1)
            remedy = f"did you mean {close[0]}?" if close else "fine, if your SFU is newer than LiveKit 1.13"
            yield Problem(at, "", "is no reason that is known here", remedy)
        if reason in _TAKEOVERS and (rule.look_after == 0 or rule.unasked is Unasked.GONE):
            problem = "people who only reconnect, or whose SFU restarts, will vanish from their call"
            yield Problem(at, "", problem, "look after some seconds, with `unasked: connected`")

    headroom = (1 - config.restart.at) * config.delegations.min_delay
    if config.restart.at > 0.9 or headroom < 5:
        left = format_duration(round(headroom, 1))
        problem = f"leaves {left} of the shortest delay to repeat a restart that failed"
        yield Problem("restart.at", str(config.restart.at), problem, "lower it, or raise delegations.min_delay")
    if config.delegations.min_delay < 10:
        value = format_duration(config.delegations.min_delay)
        yield Problem("delegations.min_delay", value, "tiny delays of one client use up the homeserver's rate for all", "10s or more")
    if config.history.keep < 3600:
        value = format_duration(config.history.keep)
        yield Problem("history.keep", value, "what happened in a call is forgotten before anybody can ask", "1h or more")
    if config.log.level is Level.DEBUG:
        yield Problem("log.level", "debug", "writes a great deal, and slows the daemon down", "info, except while you look for something")


def _risks_of_token(at: str, name: str, key: str, secret: SecretStr | None) -> Iterator[Problem]:
    token = "" if secret is None else secret.get_secret_value()
    which, remedy = "", f"put the {name} here that the registration has: `openssl rand -hex 32` makes one"
    if key == "registration_file":
        which, remedy = f"its {name} ", "`sfu-delegate appservice --new-tokens` makes new ones, and tells in which order to use them"
    if is_placeholder(token):
        yield Problem(f"{at}.{key}", HIDDEN, f"{which}is a placeholder, no token", remedy)
    elif token and len(token) < 32:
        problem = f"{which}is short for a token: who guesses it can act as any user of the registration's namespaces"
        yield Problem(f"{at}.{key}", HIDDEN, problem, f"use one of 32 characters or more; {remedy}")


def _risks_of_proxy_url(config: Config, at: str, path: Path) -> Iterator[Problem]:
    """Does the homeserver, on this machine, forward requests to another port than ours?"""
    from sfu_delegate.config.loading import read_text  # which needs this module

    text, _ = read_text(path, at, "the registration")
    try:
        url = urlsplit(parse(text or "").proxy_url)
        host, port = url.hostname or "", url.port or {"http": 80, "https": 443}.get(url.scheme, 0)
    except ValueError:  # what is wrong with the file is told elsewhere
        return
    if is_loopback(host) and config.listen.port not in (0, port):
        # Not the whole URL: anything may stand there.
        there = f"{url.scheme}://{_in_url(host)}:{port}"
        problem = f"its proxy_url is {there}, and the daemon listens on {_in_url(config.listen.host)}:{config.listen.port}"
        yield Problem(at, str(path), problem, "fine if a proxy listens there; otherwise `sfu-delegate appservice` writes it anew")


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _risks_of_sqlite(config: Config) -> Iterator[Problem]:
    directory = config.database_path.parent
    try:
        there = stat.S_ISDIR(directory.stat().st_mode)
    except PermissionError:
        there = True  # below systemd's /var/lib/private only the daemon itself can see it
    except OSError:
        there = False
    if not there:
        remedy = "create it, writable for the daemon's user; systemd makes /var/lib/sfu-delegate when it starts the daemon"
        yield Problem("database", config.database, f"there is no directory {directory}", remedy)
    if given := [name for name in type(config.postgresql).model_fields if name in config.postgresql.model_fields_set]:
        problem = f"does nothing, as the database is SQLite: {', '.join(given)}"
        yield Problem("postgresql", "", problem, "remove it, or name the PostgreSQL database in `database`")


def _risks_of_postgresql(config: Config) -> Iterator[Problem]:
    options = config.database_options()
    hosts = (options.get("hostaddr") or options.get("host", "")).split(",")
    mode, authorities = options.get("sslmode", "prefer"), options.get("sslrootcert")
    if not all(host == "" or host.startswith(("/", "@")) or is_loopback(host) for host in hosts):
        # libpq: with a file of authorities, `require` is `verify-ca`.
        if not mode.startswith("verify-") and not (mode == "require" and authorities):
            readable = "" if mode == "require" else "delay_ids, by which memberships can be ended, may cross the network readable, and "
            problem = f"{readable}anybody on the way can pose as the database (sslmode is {mode})"
            yield Problem("database", config.database, problem, "add ?sslmode=verify-full&sslrootcert=/path/of/the/ca.pem, or use a Unix socket")
        elif not authorities:
            problem = "the certificates to trust are looked for in the home directory of the daemon's user (.postgresql/root.crt)"
            yield Problem("database", config.database, problem, "add sslrootcert=/path/of/the/ca.pem, or /etc/ssl/certs/ca-certificates.crt")
    if len(hosts) > 1 and options.get("target_session_attrs", "any") == "any":
        problem = "the first host that answers is taken, though it be a standby, where nothing can be written"
        yield Problem("database", config.database, problem, "add target_session_attrs=read-write")
    password = config.postgresql.password
    if password is not None and is_placeholder(password.get_secret_value()):
        yield Problem(f"postgresql.{config.postgresql.password_key}", HIDDEN, "is a placeholder, no password", "put the database's own password here")


def _is_in_clear(url: str) -> bool:
    """Does what goes there cross a network unencrypted?"""
    return url.lower().startswith(("ws://", "http://")) and not is_loopback(urlsplit(url).hostname or "")


def is_placeholder(secret: str) -> bool:
    """Is it what people leave, or find in the documentation, in place of a secret?"""
    return _PLACEHOLDER.search(secret) is not None


def is_loopback(host: str) -> bool:
    """Is it this machine alone?"""
    if host.lower().rstrip(".") == "localhost" or host.lower().endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _risks_of_admin(config: Config) -> Iterator[Problem]:
    admin = config.admin
    if admin.tcp and not is_loopback(admin.host):
        open_to_all = "metrics and health are" if admin.token else "metrics, health and the pages that show who is in which call are"
        remedy = "listen on 127.0.0.1" if admin.token else "listen on 127.0.0.1, or give admin.token_file"
        yield Problem("admin.host", admin.host, f"{open_to_all} open to everybody who reaches this address", remedy)
    if admin.token is not None and len(admin.token.get_secret_value()) < 32:
        remedy = f"use a random one of 32 characters or more: {MAKE_A_TOKEN}"
        yield Problem(f"admin.{admin.token_key}", HIDDEN, "has less than 32 characters, and can be guessed", remedy)
    if admin.token is not None and not admin.tcp:
        yield Problem(f"admin.{admin.token_key}", HIDDEN, "is not asked for: over the socket nobody needs it", "remove it, or leave admin.tcp on")


_FIXED: Final = ("listen", "admin", "database", "postgresql", "encryption", "log.format", "timeouts.connect", "matrixrtc.enabled")


def reloadable_changes(old: Config, new: Config) -> tuple[bool, list[str]]:
    """Can a running daemon go from one to the other? Also names the changed keys that it can take over at a restart only."""
    changed = sorted(set(_differences(old, new, ())))
    fixed = [key for key in changed if any(key == name or key.startswith((f"{name}.", f"{name}[")) for name in _FIXED)]
    # The listener's routes are made at the start: which there are, and which SFU each of them stands for.
    names = [*new.sfus, *(name for name in old.sfus if name not in new.sfus)]
    fixed += [f"sfus.{name}.path_prefixes" for name in names if _prefixes(old, name) != _prefixes(new, name)]
    if next(iter(old.sfus)) != next(iter(new.sfus)):
        fixed.append("sfus (which is the first)")
    return not fixed, fixed


def reloaded(old: Config, new: Config) -> Config:
    """What is in force after a running daemon has read `new`: what cannot be changed keeps its old value, also for the next reload to compare with.

    An SFU that is not in `new` is gone with its paths, though their routes stay until the restart.
    """
    first = next(iter(old.sfus))
    order = [name for name in (first, *new.sfus) if name in new.sfus]  # the first one twice; a dict keeps its first place
    return new.model_copy(
        update={
            **{section: getattr(old, section) for section in ("listen", "admin", "database", "postgresql", "encryption")},
            "log": new.log.model_copy(update={"format": old.log.format}),
            "timeouts": new.timeouts.model_copy(update={"connect": old.timeouts.connect}),
            "matrixrtc": new.matrixrtc.model_copy(update={"enabled": old.matrixrtc.enabled}),
            "sfus": {name: new.sfus[name].model_copy(update={"path_prefixes": _prefixes(old, name)}) for name in order},
        }
    )


def _prefixes(config: Config, name: str) -> tuple[str, ...]:
    return config.sfus[name].path_prefixes if name in config.sfus else ()


def _differences(old: object, new: object, path: KeyPath) -> Iterator[str]:
    if isinstance(old, Section) and type(old) is type(new):
        for name in type(old).model_fields:
            yield from _differences(getattr(old, name), getattr(new, name), (*path, name))
    elif old != new:
        yield dotted(path)
