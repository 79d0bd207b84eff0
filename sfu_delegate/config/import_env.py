"""From the variables of a MatrixRTC authorization service (`LIVEKIT_…`) to a configuration of ours, for `sfu-delegate import-env`.

What is made here is read again by our own loader before anybody sees it, so it can always be used. No problem and no note may show the value of a
variable that may hold a secret, and no file that exists is ever written.
"""

import contextlib
import os
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml

from sfu_delegate.config.loading import from_mapping, from_text, read_text
from sfu_delegate.config.model import Admin, Homeserver, Listen
from sfu_delegate.config.problems import HIDDEN, NOT_SET, ConfigInvalid, Problem, unique
from sfu_delegate.config.risks import warnings
from sfu_delegate.config.values import ODD_REMEDY, odd_character
from sfu_delegate.matrix.names import compile_pattern

PREFIX: Final = "LIVEKIT_"
KEY_FILE_OPTION: Final = "--key-file"
STANDARD_INPUT: Final = Path("-")
DATABASE: Final = "sqlite:////var/lib/sfu-delegate/sfu-delegate.db"
SFU: Final = "main"

_URL: Final = "LIVEKIT_URL"
_KEY: Final = "LIVEKIT_KEY"
_SECRET: Final = "LIVEKIT_SECRET"  # noqa: S105 (the name of a variable)
_KEY_FROM: Final = "LIVEKIT_KEY_FROM_FILE"
_SECRET_FROM: Final = "LIVEKIT_SECRET_FROM_FILE"  # noqa: S105 (the name of a variable)
_KEY_FILE: Final = "LIVEKIT_KEY_FILE"
_BIND: Final = "LIVEKIT_JWT_BIND"
_PORT: Final = "LIVEKIT_JWT_PORT"
_HOMESERVERS: Final = "LIVEKIT_FULL_ACCESS_HOMESERVERS"
_OVERRIDES: Final = "LIVEKIT_CS_API_URL_OVERRIDES"
_INSECURE: Final = "LIVEKIT_INSECURE_SKIP_VERIFY_TLS"
_SANITY: Final = "LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS"
_LEVEL: Final = "LIVEKIT_LOG_LEVEL"
_REDIS: Final = "LIVEKIT_REDIS_URL"
_MEMBERSHIP: Final = "LIVEKIT_REQUIRE_MEMBERSHIP"
_PUBLISHERS: Final = "LIVEKIT_REMOTE_CAN_PUBLISH_HOMESERVERS"
_TAKEN: Final = frozenset(
    {_URL, _KEY, _SECRET, _KEY_FROM, _SECRET_FROM, _KEY_FILE, _BIND, _PORT, _HOMESERVERS, _OVERRIDES, _INSECURE, _SANITY, _LEVEL, _REDIS}
)

# Kubernetes puts these into every container of a namespace with a service named livekit, or livekit-something.
_KUBERNETES: Final = re.compile(r"LIVEKIT_(?:\w+_)?(?:SERVICE_(?:HOST|PORT(?:_\w+)?)|PORT(?:_\d+_(?:TCP|UDP)(?:_\w+)?)?)")
_LEVELS: Final = {"trace": "debug", "debug": "debug", "info": "info", "warn": "warning", "warning": "warning"} | dict.fromkeys(
    ("error", "fatal", "panic"), "error"
)
_OFF: Final = frozenset({"", "0", "false", "no"})
_INSECURE_ON: Final = "YES_I_KNOW_WHAT_I_AM_DOING"  # to the letter: nothing else switches the check off there
# Protections that have no counterpart: what is lost where they were on.
_LOST: Final = {
    _MEMBERSHIP: "whether a user is in the Matrix room was checked, and here it is not: who knows the id of a room can get a token for its call",
    _PUBLISHERS: "which homeservers' users may publish was limited, and here it is not: who gets a token may publish",
}
_LOST_REMEDY: Final = "stay with that service if you need this; matrixrtc.other_homeservers: false keeps users of other homeservers out altogether"
_WIDTH: Final = 118


@dataclass(frozen=True, slots=True)
class Imported:
    """A configuration that was made, and what to say about it."""

    text: str = field(repr=False)  # YAML; holds the secret, unless a key file does
    notes: tuple[str, ...]  # sentences about what could not be taken over
    risks: tuple[Problem, ...]  # what works, but is risky
    written: Path | None  # the key file that was made


# ── env files ──

_ASSIGNMENT: Final = re.compile(r"(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)
_BEGINS: Final = re.compile(r"(?:export\s+)?(LIVEKIT_\w*)")
_YAML_ITEM: Final = re.compile(r"""-\s+["']?(LIVEKIT_\w+)""")  # as Docker Compose has them under `environment`
_ESCAPES: Final = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\", '"': '"', "$": "$", "`": "`"}


class EnvFile(NamedTuple):
    """The variables of an env file that are looked at here, what is wrong in its lines, and sentences about what is odd in them."""

    variables: dict[str, str]
    problems: list[Problem]
    notes: list[str]


def parse_env_file(text: str) -> EnvFile:
    """`KEY=value` lines as Docker Compose and systemd read them; of a variable that is there twice, the last one counts.

    Quotes around a value are taken off; in double ones a backslash makes the next character a plain one, or a line break (`\\n`). A line that begins
    with # or ; is a comment, and so is what follows a # behind a space. Lines of other programs' variables are skipped, whatever they hold.
    """
    variables: dict[str, str] = {}
    problems: list[Problem] = []
    again: dict[str, int] = {}  # variables with several values, and the line of the last one
    for number, line in enumerate(re.split(r"\r?\n", text.removeprefix("\ufeff")), 1):
        if item := _YAML_ITEM.match(line.strip()):
            problems.append(Problem(item[1], HIDDEN, "is an item of a list in YAML", f"write {item[1]}=value, without the dash", f"line {number}"))
            continue
        begins = _BEGINS.match(line.strip())
        if begins is None:
            continue
        name = begins[1]
        assignment = _ASSIGNMENT.fullmatch(line.strip())
        if assignment is None:
            problems.append(Problem(name, HIDDEN, "is not followed by =", f"write {name}=value", f"line {number}"))
            continue
        try:
            value = _value(assignment[2].strip())
        except _Unreadable as error:
            problems.append(Problem(name, HIDDEN, error.problem, error.remedy, f"line {number}"))
            continue
        if variables.setdefault(name, value) != value:
            variables[name], again[name] = value, number
    return EnvFile(variables, problems, [f"{name} is there more than once. The last one counts, in line {line}." for name, line in again.items()])


class _Unreadable(Exception):
    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem)
        self.problem, self.remedy = problem, remedy


def _value(text: str) -> str:
    """The value of an assignment. Raises _Unreadable."""
    if text.startswith("'"):
        value, closed, rest = text[1:].partition("'")
    elif text.startswith('"'):
        parts = re.match(r'"((?:[^"\\]|\\.)*)("?)(.*)', text, re.DOTALL)
        value, closed, rest = parts.groups() if parts else ("", "", "")
        _without_references(re.sub(r"\\.", "", value))
        value = re.sub(r"\\(.)", lambda m: _ESCAPES.get(m[1], m[0]), value)
    else:
        value = re.split(r"\s#|^#", text, maxsplit=1)[0].strip()
        _without_references(value)
        return value
    if not closed:
        raise _Unreadable("has a quote that never ends", "close it in the same line")
    if rest.strip() and not re.match(r"\s+#", rest):
        raise _Unreadable("has something behind its closing quote", "put the whole value into quotes")
    return value


def _without_references(value: str) -> None:
    if "${" in value:
        raise _Unreadable("refers to another variable, and those are not put in here", "write the value itself, or '…' around it if it is meant so")


# ── from variables to keys ──


class _Notes:
    """What is told of an import, in the order of the file."""

    def __init__(self) -> None:
        self.told: list[str] = []  # on standard error
        self.head: list[str] = []  # comments at the head of the file
        self.at: dict[str, list[str]] = {}  # comments above a section

    def lost(self, text: str) -> None:
        self.told.append(text)
        self.head.append(text)

    def above(self, section: str, text: str) -> None:
        self.at.setdefault(section, []).append(text)


def import_env(environ: Mapping[str, str], *, key_file: Path | None = None, before: Sequence[Problem] = ()) -> Imported:
    """Make a configuration. `key_file` is made anew, for the owner alone, and holds the SFU's key and secret.

    Raises ConfigInvalid with all problems, those from `before` included; then nothing has been written.
    """
    problems = list(before)
    given = {name: value.strip() for name, value in environ.items() if name.startswith(PREFIX) and value.strip() and not _kubernetes(name, value)}
    if not given and not problems:
        remedy = "run it where that service's variables are set, or name its env file: --env-file FILE, with lines such as LIVEKIT_URL=wss://sfu.example.org"
        raise ConfigInvalid([Problem(f"{PREFIX}…", NOT_SET, "there is no such variable", remedy)])
    broken = {problem.key for problem in before}  # of these, the value is not known, but there is one
    notes = _Notes()
    listen = _listen(given, problems, notes)
    taken = listen.get("port") == Admin().port
    if taken:
        notes.above("admin", f"Not {Admin().port} as usual, which is the port of {_BIND if _BIND in given else _PORT}.")
    keys = _keys(given, broken, problems)
    homeservers = _homeservers(given, broken, problems, notes)
    data: dict[str, Any] = {
        "listen": listen,
        **({"admin": {"port": Admin().port + 1}} if taken else {}),
        "database": DATABASE,
        "sfus": {SFU: {"url": given.get(_URL, ""), **keys}},
        "homeservers": homeservers,
    }
    if _URL not in given and _URL not in broken:
        problems.append(Problem(_URL, NOT_SET, "is required: the SFU's URL, as clients use it", "such as wss://sfu.example.org"))
    _others(given, data, problems, notes)
    lost = _lost(given, notes)

    if key_file is not None and "key_file" in keys:
        notes.told.append(f"{_KEY_FILE} is a key file already, and is used as it is: nothing was written to {key_file}.")
        key_file = None
    if key_file is not None:
        problems.extend(_not_new(key_file))
    _check(data, given, problems)
    if problems:
        raise ConfigInvalid(unique(problems))

    if key_file is None:
        return _made(data, notes, lost, None)
    key_file = key_file.absolute()
    _write(key_file, data["sfus"][SFU].pop("keys"))
    data["sfus"][SFU]["key_file"] = str(key_file)
    try:
        return _made(data, notes, lost, key_file)
    except ConfigInvalid:
        key_file.unlink()
        raise


def _kubernetes(name: str, value: str) -> bool:
    """Is it Kubernetes' word for a service? That of one named livekit-jwt has the name of a variable that counts."""
    return _KUBERNETES.fullmatch(name) is not None and (name not in _TAKEN or value.startswith(("tcp://", "udp://")))


def _check(data: dict[str, Any], given: Mapping[str, str], problems: list[Problem]) -> None:
    """What our own loader says of it, in the words of the variables, unless there is a problem with the variable already."""
    known = {problem.key for problem in problems}
    try:
        from_mapping(data)
    except ConfigInvalid as error:
        for problem in error.problems:
            variable = next((variable for key, variable in _VARIABLES.items() if problem.key.startswith(key)), "")
            if "homeservers" in problem.key and problem.key.endswith(".url"):
                variable = _OVERRIDES
            if not variable:
                problems.append(problem)
            elif not known & {variable, *_TOGETHER.get(variable, ())}:
                value, remedy = HIDDEN if variable == _SECRET else problem.value, problem.remedy
                if variable == _KEY_FILE:
                    value = _path(given[_KEY_FILE])  # as it was written: the directory before it says nothing of what it is
                    remedy = remedy if remedy == ODD_REMEDY else "the path of a key file that can be read here"
                problems.append(Problem(variable, value, problem.problem, remedy))


_VARIABLES: Final = {
    f"sfus.{SFU}.url": _URL,
    f"sfus.{SFU}.key_file": _KEY_FILE,
    f"sfus.{SFU}.keys": _SECRET,
    "homeservers": _HOMESERVERS,
    "listen": _BIND,
    "presence.interval": _SANITY,
}
# A problem with one of these is the reason for what the loader says of the first.
_TOGETHER: Final = {_SECRET: (_KEY, _KEY_FROM, _SECRET_FROM, _KEY_FILE), _BIND: (_PORT,)}


_PATH: Final = re.compile(r"\.{0,2}(?:/[\w.@-]{1,32})+", re.ASCII)


def _path(text: str) -> str:
    """What may be shown of the name of a file: a secret may have been written in its place, so only what cannot be taken for anything else."""
    return text if len(text) < 200 and _PATH.fullmatch(text) else HIDDEN


def _keys(given: Mapping[str, str], broken: set[str], problems: list[Problem]) -> dict[str, Any]:
    """`keys` or `key_file` of the SFU."""

    def one(variable: str, from_file: str, what: str) -> str:
        if variable in given and from_file in given:
            problems.append(Problem(from_file, HIDDEN, f"is given, and {variable} as well", "keep one of the two"))
            return ""
        if from_file not in given:
            return checked(variable, given.get(variable, ""))
        text, wrong = read_text(Path(given[from_file]), from_file, f"the file with the {what}")
        shown, remedy = _path(given[from_file]), "the path of a regular file that can be read here"
        problems.extend(Problem(from_file, shown, problem.problem, remedy) for problem in wrong)
        if text is not None and not text.strip():
            problems.append(Problem(from_file, shown, "is an empty file", f"put the {what} into it"))
        return checked(from_file, (text or "").strip())

    def checked(variable: str, value: str) -> str:
        if odd := odd_character(value):
            has = "has" if variable in (_KEY, _SECRET) else "names a file with"
            problems.append(Problem(variable, HIDDEN, f"{has} {odd} in it", ODD_REMEDY))
        return value

    if _KEY_FILE in given:
        problems.extend(
            Problem(_KEY_FILE, HIDDEN, f"is given, and {other} as well", f"keep either {_KEY_FILE}, or the key and its secret")
            for other in (_KEY, _KEY_FROM, _SECRET, _SECRET_FROM)
            if other in given
        )
        return {"key_file": os.path.abspath(given[_KEY_FILE])}
    if _KEY_FILE in broken:
        return {}
    key, secret = one(_KEY, _KEY_FROM, "API key"), one(_SECRET, _SECRET_FROM, "API secret")
    for variable, from_file in ((_KEY, _KEY_FROM), (_SECRET, _SECRET_FROM)):
        if not {variable, from_file} & (broken | set(given)):
            remedy = f"{variable} or {from_file}; or {_KEY_FILE}, a file with `key: secret` lines, for both"
            problems.append(Problem(variable, NOT_SET, "is required", remedy))
    return {"keys": {key: secret}}


def _listen(given: Mapping[str, str], problems: list[Problem], notes: _Notes) -> dict[str, Any]:
    bind, port = given.get(_BIND), given.get(_PORT)
    if bind is None and port is None:
        default = Listen()
        notes.above("listen", f"Neither {_BIND} nor {_PORT} is set. In a container, set host to 0.0.0.0.")
        return {"host": default.host, "port": default.port}
    host, _, bound = bind.rpartition(":") if bind is not None else ("", "", port or "")
    variable = _PORT if bind is None else _BIND
    if not re.fullmatch(r"\d{1,5}", bound, re.ASCII) or not 0 < int(bound) < 65536:
        problems.append(
            Problem(variable, _printable(given[variable]), "names no port", "a number from 1 to 65535" if bind is None else "such as :8080")
        )
        return {}
    if bind is not None and port is not None and (not port.isdecimal() or int(port) != int(bound)):
        problems.append(Problem(_PORT, _printable(port), f"is given, and {_BIND} with another port", "keep one of the two"))
    if not host:
        notes.above(
            "listen", "Every IPv4 address of the machine; '::' is IPv6 as well. Behind a reverse proxy on the same machine, 127.0.0.1 will do."
        )
    return {"host": host.removeprefix("[").removesuffix("]") or "0.0.0.0", "port": int(bound)}  # noqa: S104 (what the variable says)


def _items(given: Mapping[str, str], variable: str, problems: list[Problem]) -> list[str]:
    """A list with commas. Empty items name nobody and are skipped; a list of nothing else is a problem."""
    items = [item.strip() for item in given.get(variable, "").split(",")]
    found = [item for item in items if item]
    if variable in given and not found:
        problems.append(
            Problem(variable, _printable(given[variable]), "is a list without anything in it", "items with commas between them, or remove it")
        )
    return found


def _homeservers(given: Mapping[str, str], broken: set[str], problems: list[Problem], notes: _Notes) -> list[dict[str, Any]]:
    served: dict[str, str | None] = dict.fromkeys((name.lower() for name in _items(given, _HOMESERVERS, problems)), None)
    if _HOMESERVERS not in given:
        # Under another name the list would be lost, and everybody served in place of a few.
        if _HOMESERVERS not in broken:
            remedy = f"name the homeservers that you serve in {_HOMESERVERS}, with commas between them, or set it to * for all"
            problem = f"is not known, and {_HOMESERVERS} is not set: everybody's users would be served"
            others = sorted(name for name in set(given) - _TAKEN - set(_LOST) if "HOMESERVER" in name)
            problems.extend(Problem(_printable(name), HIDDEN, problem, remedy) for name in others)
        served = {"*": None}
        notes.above("homeservers", f"{_HOMESERVERS} is not set, which stands for all. Name the homeservers that you serve.")
    patterns = [compile_pattern(name) for name in served if "*" in name]
    urls: dict[str, str] = {}
    for number, item in enumerate(_items(given, _OVERRIDES, problems), 1):
        server, equals, url = (part.strip() for part in item.partition("="))
        server = server.lower()
        if not equals or not _is_override(server, url):
            of = f" (of {_printable(server)})" if equals and "." in server and _is_override(server, "https://example.org") else ""
            problem = f"has an item, number {number}{of}, that is not the name of a server, = and its URL"
            problems.append(Problem(_OVERRIDES, HIDDEN, problem, "such as example.org=https://matrix.example.org, with commas between them"))
        elif urls.setdefault(server, url) != url:
            problems.append(Problem(_OVERRIDES, HIDDEN, f"has two URLs for {_printable(server)}", "keep one of them"))
        elif server in served or any(pattern.fullmatch(server) for pattern in patterns):
            served[server] = url
        else:
            text = (
                f"{_OVERRIDES} also names {_printable(server)}. It is left out: nothing in {_HOMESERVERS} matches it, so its users cannot delegate."
            )
            notes.above("homeservers", text)
            notes.told.append(text)
    # In the order in which they count.
    order = sorted(served, key=lambda name: ("*" in name, -len(name) if "*" in name else 0))
    return [{"name": name, **({"url": served[name]} if served[name] else {})} for name in order]


def _is_override(server: str, url: str) -> bool:
    try:
        Homeserver(name=server, url=url)
    except ValueError:
        return False
    return True


def _others(given: Mapping[str, str], data: dict[str, Any], problems: list[Problem], notes: _Notes) -> None:
    insecure = given.get(_INSECURE, "")
    if insecure != _INSECURE_ON and insecure.lower() not in _OFF:
        notes.lost(f"{_INSECURE} was set, but not to {_INSECURE_ON}, which switches the check of certificates off: they are checked.")
    elif insecure == _INSECURE_ON:
        data["federation"] = {"verify_tls": False}
        notes.above(
            "federation",
            f"{_INSECURE} was set: the certificates of homeservers are not checked when they vouch for their users, so anybody on the network can "
            "pose as any user. For test networks only. The client-server API's certificate is checked nevertheless: homeservers[].ca_file names "
            "authorities of your own. Private addresses are refused, unless homeservers[].allow_private_addresses, or those below, allow them.",
        )
    if _SANITY in given:
        seconds = given[_SANITY]
        if not re.fullmatch(r"\d{1,9}", seconds, re.ASCII):
            problems.append(Problem(_SANITY, _printable(seconds), "is not a number of seconds", "such as 60"))
        elif int(seconds) == 0:
            notes.lost(f"{_SANITY} is 0, and the SFU is asked all the same: webhooks get lost. How often: presence.interval.")
        else:
            data["presence"] = {"interval": int(seconds)}
    if _LEVEL in given:
        level = _LEVELS.get(given[_LEVEL].lower())
        if level is None:
            problems.append(Problem(_LEVEL, _printable(given[_LEVEL]), "is not a level that is known here", f"one of: {', '.join(_LEVELS)}"))
        elif level != "info":
            data["log"] = {"level": level}
    if _REDIS in given:
        notes.lost(
            f"{_REDIS} has no counterpart, and needs none: delegations are kept in the daemon's own database, on a disk that lasts; where several "
            "instances are to share them, in PostgreSQL (`database`)."
        )
    for name in sorted(name for name in set(given) - _TAKEN if name not in _LOST or given[name].lower() in _OFF):
        notes.lost(f"{_printable(name)} has no counterpart, and was not taken over. `sfu-delegate example-config` shows what can be set.")


def _lost(given: Mapping[str, str], notes: _Notes) -> list[Problem]:
    """Protections of that service that end by moving over."""
    lost = [name for name in _LOST if given.get(name, "").lower() not in _OFF]
    notes.head.extend(f"{name} was set: {_LOST[name]}." for name in lost)
    return [Problem(name, "", _LOST[name], _LOST_REMEDY) for name in lost]


# ── the key file ──


def _not_new(path: Path) -> Iterator[Problem]:
    if os.path.lexists(path):
        yield Problem(KEY_FILE_OPTION, _printable(str(path)), "is there already, and is never overwritten", "name another file, or remove it")
    elif not path.absolute().parent.is_dir():
        yield Problem(KEY_FILE_OPTION, _printable(str(path)), "is in a directory that is not there", "make the directory, or name another file")


def _write(path: Path, keys: Mapping[str, str]) -> None:
    """Make a key file in LiveKit's own form. Raises ConfigInvalid, and leaves no half of one."""
    text = "".join(f"{_scalar(key)}: {_scalar(secret)}\n" for key, secret in keys.items())
    try:
        number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(number, "w", encoding="utf-8") as file:
            try:
                os.fchmod(number, 0o600)  # whatever the umask
                file.write(text)
                file.flush()
                os.fsync(number)
            except OSError:
                with contextlib.suppress(OSError):
                    path.unlink()
                raise
    except OSError as error:
        problem = f"cannot be written: {error.strerror}"
        raise ConfigInvalid([Problem(KEY_FILE_OPTION, _printable(str(path)), problem, "name another file")]) from None


# ── the text ──


def _made(data: dict[str, Any], notes: _Notes, lost: Sequence[Problem], written: Path | None) -> Imported:
    """The text, read again by our own loader. Raises ConfigInvalid."""
    text = _text(data, notes)
    config = from_text(text)
    return Imported(text, tuple(notes.told), (*lost, *warnings(config)), written)


def _text(data: dict[str, Any], notes: _Notes) -> str:
    head = ["Made by `sfu-delegate import-env` from the variables of a MatrixRTC authorization service (LIVEKIT_…)."]
    head.append("`sfu-delegate check-config` finds what is risky here, and `sfu-delegate example-config` shows every other key.")
    if "keys" in data["sfus"][SFU]:
        head.append("It holds a secret. The daemon's user must be able to read it, and nobody else: root:sfu-delegate, mode 0640.")
    lines = [line for text in head for line in _comment(text)]
    if notes.head:
        lines += ["#", "# Not as it was:"]
        lines += [line for note in notes.head for line in _comment(f"- {note}", "  ")]
    for section, value in data.items():
        lines.append("")
        lines += [line for note in notes.at.get(section, ()) for line in _comment(note)]
        lines += _block(section, value, 0)
    return "\n".join(lines) + "\n"


def _comment(text: str, indent: str = "") -> list[str]:
    # Nothing that came from a variable may end the comment.
    return textwrap.wrap(
        _printable(text, 1000), _WIDTH, initial_indent="# ", subsequent_indent=f"# {indent}", break_long_words=False, break_on_hyphens=False
    )


def _block(key: str, value: object, indent: int) -> list[str]:
    blank = " " * indent
    match value:
        case dict():
            return [f"{blank}{_scalar(key)}:", *(line for name, inner in value.items() for line in _block(name, inner, indent + 2))]
        case list():
            lines = [f"{blank}{_scalar(key)}:"]
            for item in value:
                first, *rest = [line for name, inner in item.items() for line in _block(name, inner, indent + 4)]
                lines += [f"{blank}  - {first.lstrip()}", *rest]
            return lines
        case _:
            return [f"{blank}{_scalar(key)}: {_scalar(value)}"]


def _scalar(value: object) -> str:
    """A value in one line of YAML, whatever characters it has."""
    style = None if not isinstance(value, str) or re.fullmatch(r"[ -~]*", value) else '"'
    text: str = yaml.safe_dump(value, default_style=style, default_flow_style=True, width=1 << 30)
    return text.removesuffix("\n").removesuffix("\n...")


def _printable(text: str, most: int = 100) -> str:
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= most else text[: most - 1] + "…"


def read_env_file(path: Path) -> EnvFile:
    """The variables of a file, or of standard input (`-`). Raises ConfigInvalid where it cannot be read."""
    text, problems = read_text(Path("/dev/stdin") if path == STANDARD_INPUT else path, "--env-file", "the env file", piped=True)
    if text is None:
        remedy = "a text file in UTF-8 that you may read, or - for standard input"
        raise ConfigInvalid([Problem(problem.key, problem.value, problem.problem, remedy) for problem in problems])
    return parse_env_file(text)
