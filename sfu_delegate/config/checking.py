"""Plain data against the model: all that is wrong with single values, then what is wrong between keys, each with what to do.

It must never stop at the first mistake, and never show a value of a key that may hold a secret, or that is unknown.
"""

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from typing import Any, Final, Literal, cast, get_args, get_origin

import yaml
from pydantic import BeforeValidator, ValidationError
from pydantic_core import ErrorDetails

from sfu_delegate.config.model import Config, Homeserver, all_keys, type_at
from sfu_delegate.config.problems import HIDDEN, NOT_SET, KeyPath, Problem, dotted, kind_of, place_of, related
from sfu_delegate.config.values import (
    DURATION_REMEDY,
    MAKE_A_TOKEN,
    SIZE_REMEDY,
    format_duration,
    format_size,
    read_duration,
    read_size,
    shown_database,
)
from sfu_delegate.delegation.policy import DEPARTURES
from sfu_delegate.sealing import key_bytes


def validate(data: dict[str, Any], problems: list[Problem], where: Mapping[KeyPath, str]) -> tuple[Config | None, list[KeyPath]]:
    """The configuration without what is wrong in it, and the paths of what was left out, so that the rest can be checked as well."""
    pruned: list[KeyPath] = []
    for _round in range(8):
        try:
            return Config.model_validate(data), pruned
        except ValidationError as error:
            details = error.errors(include_url=False)
        for detail in details:
            path = tuple(part for part in detail["loc"] if part != "[key]")
            if not any(related(path, other) for other in pruned):
                problems.append(_explain(detail, path, where, data))
        for detail in details:
            path = tuple(part for part in detail["loc"] if part != "[key]")
            cut = path[:-1] if detail["type"] == "missing" or any(p == path for p in pruned) else path
            data = _without(data, cut)
            pruned.append(cut)
    return None, pruned


def _without(data: Any, path: KeyPath) -> Any:
    if not path:
        return {}
    first, rest = path[0], path[1:]
    if isinstance(data, dict) and first in data:
        if not rest:
            return {key: value for key, value in data.items() if key != first}
        return {**data, first: _without(data[first], rest)}
    if isinstance(data, list) and isinstance(first, int) and first < len(data):
        if rest and isinstance(data[first], dict):
            return [*data[:first], _without(data[first], rest), *data[first + 1 :]]
        if isinstance(data[first], dict) or any(isinstance(item, dict) for item in data):
            # The others keep their numbers, by which problems name them.
            return [*data[:first], {"name": f"left-out-{first}.invalid"}, *data[first + 1 :]]
        return []
    return {} if isinstance(data, dict) and not data else None


def _written(data: Any, path: KeyPath, read: object) -> object:
    """What stands at a key, as it was written; `read`, what became of it, where that is not to be found."""
    for part in path:
        inside: Any = data if isinstance(data, dict) else dict(enumerate(data)) if isinstance(data, list) else {}
        if part not in inside:
            return read
        data = inside[part]
    return data


def _explain(detail: ErrorDetails, path: KeyPath, where: Mapping[KeyPath, str], data: dict[str, Any]) -> Problem:
    kind, found = detail["type"], type_at(path)
    context = detail.get("ctx", {})
    value, remedy = _shown(path, _written(data, path, detail.get("input"))), _expected(path)
    match kind:
        case "missing":
            value, problem = NOT_SET, "is required"
        case "extra_forbidden":
            value, problem, remedy = HIDDEN, "is not a key that exists here", _did_you_mean(path)
        case "sfu_delegate":
            problem, remedy = str(context.get("problem")), str(context.get("remedy")) or remedy
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            words = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}
            bound = next((f"{words[name]} {_bound(path, context[name])}" for name in words if name in context), "in its range")
            problem = f"must be {bound}"
        case "enum" | "literal_error":
            problem = "is not one of the words for this"
        case _ if found.kind in ("section", "map"):
            problem = "must be keys with values"
        case _ if found.kind == "list":
            problem = "must be a list"
        case _:
            problem = {"int": "must be a whole number", "float": "must be a number", "bool": "must be true or false", "path": "must be a path"}.get(
                kind.partition("_")[0], "must be a text" if kind.startswith("string") else "is not a valid value"
            )
    return Problem(dotted(path), value, problem, remedy, place_of(path, where))


def _shown(path: KeyPath, value: object) -> str:
    """A value as a problem may show it: only of keys that are known to hold no secret."""
    found = type_at(path)
    if found.secret or found.kind == "unknown":
        return HIDDEN
    if found.kind != "scalar" or not isinstance(value, str | int | float):
        return kind_of(value)
    text = value if isinstance(value, str) else yaml.safe_dump(value).partition("\n")[0]
    # Up to the last @: a password may have a slash or an @ in it.
    text = shown_database(text) if path == ("database",) else re.sub(r"//.*@", f"//{HIDDEN}@", text)
    text = "".join(c if c.isprintable() else "?" for c in text)
    return (text if len(text) <= 100 else text[:99] + "…") or '""'


def _bound(path: KeyPath, bound: object) -> str:
    match _unit_of(path):
        case "duration":
            return format_duration(float(cast(float, bound)))
        case "size":
            return format_size(int(cast(int, bound)))
        case _:
            return f"{bound}".removesuffix(".0")


def _unit_of(path: KeyPath) -> Literal["duration", "size", ""]:
    found = type_at(path)
    metadata: Iterable[object] = found.field.metadata if found.field else ()
    functions = {m.func for m in metadata if isinstance(m, BeforeValidator)}
    return "duration" if read_duration in functions else "size" if read_size in functions else ""


def _expected(path: KeyPath) -> str:
    """What may stand at a key, for somebody who wrote something else."""
    found = type_at(path)
    match found.kind:
        case "section":
            names = ", ".join(found.type.model_fields)
            return f"write its keys below it, indented: {names}"
        case "map":
            return "write a name and its value a line, indented below it"
        case "list":
            return "write its items below it, each with a dash, or [one, two]"
        case "unknown":
            return "see the output of example-config"
    match _unit_of(path):
        case "duration":
            return DURATION_REMEDY
        case "size":
            return SIZE_REMEDY
    if found.secret:
        return "put the secret here, in quotes, or into the environment or a file"
    if found.type is bool:
        return "write true or false"
    if isinstance(found.type, type) and issubclass(found.type, StrEnum):
        return f"write one of: {', '.join(found.type)}"
    if get_origin(found.type) is Literal:
        return f"write one of: {', '.join(get_args(found.type))}"
    if found.field and found.field.examples:
        return f"such as {found.field.examples[0]}"
    if found.field and not found.field.is_required() and isinstance(found.field.default, str | int | float):
        return f"the default is {found.field.default}"
    return "see the output of example-config"


def _did_you_mean(path: KeyPath) -> str:
    name, parent = str(path[-1]), type_at(path[:-1])
    names = list(parent.type.model_fields) if parent.kind == "section" else []
    if close := difflib.get_close_matches(name.lower().replace("-", "_"), names, 1, 0.6):
        return f"did you mean {close[0]}?"
    if elsewhere := [".".join(keys) for keys in all_keys() if keys[-1] == name]:
        return f"there is {' and '.join(elsewhere)}: put it there"
    return f"remove it; the keys here are {', '.join(names)}" if names else "remove it"


FERNET_REMEDY: Final = "make one: python3 -c 'import base64, os; print(base64.urlsafe_b64encode(os.urandom(32)).decode())'"

_SFU_NAME: Final = re.compile(r"[a-z](?:[a-z0-9-]|_(?!_)){0,62}", re.ASCII)

_Found = tuple[Problem, tuple[KeyPath, ...]]


def _one(path: KeyPath, value: str, problem: str, remedy: str, *also: KeyPath) -> _Found:
    return Problem(dotted(path), value, problem, remedy), (path, *also)


def contradictions(config: Config) -> Iterator[_Found]:
    """What is wrong between keys, each with the keys that it depends on."""
    if not config.sfus:
        yield _one(("sfus",), NOT_SET, "is required: without an SFU there is nobody to watch", "name one, with its url and its keys")
    if not config.homeservers:
        yield _one(("homeservers",), NOT_SET, "is required: without a homeserver nobody may delegate", "name one: `- name: example.org`")

    if not config.is_postgresql and os.path.isdir(config.database_path):
        yield _one(("database",), config.database, "is a directory", "name a file in it: the database, which need not be there yet")

    encryption = config.encryption
    keys: KeyPath = ("encryption", "keys")
    if config.is_postgresql and not encryption.keys:
        problem = "is required with PostgreSQL: all instances need the same keys, and one that is kept beside what it encrypts protects nothing"
        remedy = f"{FERNET_REMEDY}; give it to all instances, here or in `keys_file`"
        yield _one(keys, NOT_SET, problem, remedy, ("encryption", "keys_file"), ("database",))
    for number, fernet in enumerate(encryption.keys):
        text = fernet.get_secret_value()
        if text != text.strip() or key_bytes(text) is None:
            yield _one((*keys, number), HIDDEN, "is not a Fernet key (32 bytes in base64url)", FERNET_REMEDY, ("encryption", "keys_file"))

    owners: dict[str, str] = {}
    prefixes: dict[str, str] = {}
    for name, sfu in config.sfus.items():
        at: KeyPath = ("sfus", name)
        if not _SFU_NAME.fullmatch(name):
            remedy = "use lower-case letters, digits, - and _, a letter first, 63 at most"
            yield _one(at, "", "is not a name for an SFU", remedy)
        if not sfu.keys:
            yield _one((*at, "keys"), NOT_SET, "is required", "give `keys` as in LiveKit's configuration, or its `key_file`", (*at, "key_file"))
        if sfu.api_key is not None and sfu.keys and sfu.api_key not in sfu.keys:
            yield _one((*at, "api_key"), sfu.api_key, "is not among this SFU's keys", f"one of: {', '.join(sfu.keys)}", (*at, "keys"))
        for key in sfu.keys:
            if key in owners:
                remedy = "give each SFU a key of its own: it tells which SFU a webhook comes from"
                yield _one((*at, "keys", key), HIDDEN, f"is also a key of {owners[key]}", remedy, ("sfus", owners[key], "keys"))
            owners.setdefault(key, name)
        for index, prefix in enumerate(sfu.path_prefixes):
            if prefix in prefixes:
                remedy = "give each its own: it tells which SFU is handed out"
                other = prefixes[prefix]
                said = "is there twice" if other == name else f"is also a path of {other}"
                yield _one((*at, "path_prefixes", index), prefix, said, remedy, ("sfus", other, "path_prefixes"))
            prefixes.setdefault(prefix, name)
        if sfu.request_timeout >= config.actions.lease:
            yield _one(
                (*at, "request_timeout"),
                format_duration(sfu.request_timeout),
                f"must be less than actions.lease ({format_duration(config.actions.lease)})",
                "shorten it, or lengthen the lease",
                ("actions", "lease"),
            )

    names: dict[str, int] = {}
    for number, homeserver in enumerate(config.homeservers):
        at = ("homeservers", number)
        if homeserver.name in names:
            first = names[homeserver.name]
            yield _one((*at, "name"), homeserver.name, f"is there twice, first as homeservers[{first}]", "keep one", ("homeservers", first))
        names.setdefault(homeserver.name, number)
        yield from _of_tokens(config, number)

    for reason in config.departures:
        if not re.fullmatch(r"[A-Z][A-Z0-9_]{0,63}|\d{1,6}", reason, re.ASCII):
            yield _one(("departures", reason), "", "is not the name of a disconnect reason", f"one of: {', '.join(DEPARTURES)}")

    for low, high in (
        (("delegations", "min_delay"), ("delegations", "max_delay")),
        (("actions", "retry_first"), ("actions", "retry_most")),
        (("presence", "look_again"), ("presence", "look_again_most")),
        (("timeouts", "connect"), ("timeouts", "request")),
    ):
        least, most = (getattr(getattr(config, section), key) for section, key in (low, high))
        if least > most:
            yield _one(low, format_duration(least), f"must be at most {dotted(high)} ({format_duration(most)})", "swap or change them", high)
    if config.timeouts.request >= config.actions.lease:
        yield _one(
            ("timeouts", "request"),
            format_duration(config.timeouts.request),
            f"must be less than actions.lease ({format_duration(config.actions.lease)}), or an action could be done twice",
            "shorten it, or lengthen the lease",
            ("actions", "lease"),
        )
    if config.restart.spread >= config.restart.at:
        problem = f"must be less than restart.at ({config.restart.at})"
        yield _one(("restart", "spread"), str(config.restart.spread), problem, "0.1 is usual", ("restart", "at"))
    if list(config.presence.first_looks) != sorted(config.presence.first_looks):
        yield _one(("presence", "first_looks"), "", "must be in ascending order", "such as [1s, 3s, 8s, 20s, 45s]")
    yield from _of_admin(config)


SOCKET_PATH_MOST: Final = 107
"""Bytes that the path of a Unix socket may have on Linux."""


def _of_admin(config: Config) -> Iterator[_Found]:
    admin, socket = config.admin, config.admin.socket
    if admin.tcp and config.listen.port == admin.port != 0 and _overlap(config.listen.host, admin.host):
        value = f"{admin.host}:{admin.port}"
        yield _one(("admin", "port"), value, "is the address of listen, too", "give each its own port", ("listen",), ("admin",))
    if not admin.tcp and socket is None:
        remedy = "give a socket, such as /run/sfu-delegate/admin.sock, or leave tcp on"
        yield _one(("admin", "tcp"), "false", "leaves no way to ask for health and metrics", remedy, ("admin", "socket"))
    if socket is not None and not socket.is_absolute():
        yield _one(("admin", "socket"), str(socket), "is not an absolute path", "such as /run/sfu-delegate/admin.sock")
    elif socket is not None and len(os.fsencode(socket)) > SOCKET_PATH_MOST:
        problem = f"is longer than the {SOCKET_PATH_MOST} bytes that the path of a Unix socket may have"
        yield _one(("admin", "socket"), str(socket), problem, "take a shorter one, such as /run/sfu-delegate/admin.sock")
    token = admin.token.get_secret_value() if admin.token else None
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        shown = HIDDEN if admin.token_file is None else str(admin.token_file)
        problem = "cannot be sent: it has a character that is no printable ASCII, or none at all"
        yield _one(("admin", admin.token_key), shown, problem, f"put a token there, in one line: {MAKE_A_TOKEN}")


def _of_tokens(config: Config, number: int) -> Iterator[_Found]:
    """What is wrong with the tokens of a homeserver's application service."""
    homeserver = config.homeservers[number]
    at: KeyPath = ("homeservers", number)
    as_at: KeyPath = (*at, homeserver.token_key)
    hs_at: KeyPath = (*at, homeserver.hs_token_key)
    as_token = homeserver.as_token.get_secret_value() if homeserver.as_token else None
    hs_token = homeserver.hs_token.get_secret_value() if homeserver.hs_token else None
    vouches = bool(hs_token or homeserver.hs_token_file or homeserver.registration_file)
    for token, where in ((as_token, as_at), (hs_token, hs_at)):
        if token is not None and not re.fullmatch(r"[!-~]+", token):
            problem = "cannot be sent: it has a character that is not ASCII"
            yield _one(where, HIDDEN, problem, f"put the token here that the registration has: {MAKE_A_TOKEN}")
    if "*" in homeserver.name and vouches:
        problem = f"vouches for the users of one server, and {homeserver.name} stands for several"
        yield _one(hs_at, _place(homeserver, hs_at), problem, "name the one homeserver, in an entry of its own", (*at, "name"))
    elif "*" in homeserver.name and homeserver.url is None and (as_token or homeserver.as_token_file):
        problem = "would be sent to whatever server the discovery leads to, as name is a pattern"
        yield _one(as_at, HIDDEN, problem, "give the url, or name the one homeserver", (*at, "name"), (*at, "url"))
    if hs_token and not as_token:
        problem = "is given without an as_token: the two come from one registration"
        yield _one(hs_at, HIDDEN, problem, "give its as_token as well, or the registration_file", (*at, "as_token"), (*at, "as_token_file"))
    if hs_token and hs_token == as_token:
        problem = "is the same as the as_token: who is sent the one could pose as the other"
        yield _one(hs_at, _place(homeserver, hs_at), problem, f"give each its own, in the registration as well: {MAKE_A_TOKEN}", as_at)
    for first, other in enumerate(config.homeservers[:number]):
        shared = homeserver.registration_file is not None and homeserver.registration_file == other.registration_file
        if shared or (hs_token and other.hs_token and hs_token == other.hs_token.get_secret_value()):
            problem = f"is also that of homeservers[{first}]: it tells which homeserver a request comes from"
            remedy = "give each homeserver a registration of its own: `sfu-delegate appservice --homeserver NAME`"
            yield _one(hs_at, _place(homeserver, hs_at), problem, remedy, ("homeservers", first))
            break


def _place(homeserver: Homeserver, path: KeyPath) -> str:
    """What may be shown of a token: the file that it comes from."""
    return HIDDEN if path[-1] in ("as_token", "hs_token") else str(getattr(homeserver, str(path[-1])))


def _overlap(one: str, other: str) -> bool:
    """Do two hosts to listen on have an address in common? `::` is IPv4 as well."""
    return one == other or "::" in (one, other) or ("0.0.0.0" in (one, other) and not any(":" in host for host in (one, other)))  # noqa: S104
