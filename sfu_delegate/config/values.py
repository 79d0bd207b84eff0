"""Single values: durations and sizes as people write them, and what a host, a URL, a name or a secret may be.

Nothing here knows which key a value stands at, and no error's text may repeat the value: it may be a secret.
"""

import difflib
import ipaddress
import re
import unicodedata
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from ipaddress import IPv4Network, IPv6Network
from typing import Annotated, Any, Final, cast
from urllib.parse import SplitResult, unquote, urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, SecretStr
from pydantic_core import PydanticCustomError

from sfu_delegate.config.problems import HIDDEN
from sfu_delegate.matrix.names import checked_base_url, is_pattern


def _wrong(problem: str, remedy: str = "") -> PydanticCustomError:
    """What a validator raises. The text must not repeat the value: it may be a secret, or be shown beside it."""
    return PydanticCustomError("sfu_delegate", cast(Any, "{problem}"), {"problem": problem, "remedy": remedy})


_UNITS: Final = {"d": Decimal(86400), "h": Decimal(3600), "m": Decimal(60), "s": Decimal(1), "ms": Decimal("0.001")}
_DURATION_PART: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", re.ASCII)
_SIZES: Final = {"GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10, "GB": 10**9, "MB": 10**6, "KB": 1000, "B": 1}
_SIZE: Final = re.compile(r"(\d{1,18})\s*([kmg]?i?b)?", re.ASCII | re.IGNORECASE)
DURATION_REMEDY: Final = "write a number with its unit, such as 500ms, 30s, 2m, 1h or 7d, or a number of seconds"
SIZE_REMEDY: Final = "write a number with its unit, such as 64KiB or 1MiB, or a number of bytes"
_LONGEST_TEXT: Final = 400


def parse_duration(value: object) -> float:
    """Seconds, from a number of seconds or a text such as "500ms", "30s", "2m", "1h30m", "7d". Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("must be a duration")
    try:
        if isinstance(value, str):
            text = value.strip()
            if len(text) > _LONGEST_TEXT:
                raise ValueError("must be a duration")
            parts = _DURATION_PART.findall(text)
            if parts and "".join(number + unit for number, unit in parts) == text:
                seconds = float(sum(Decimal(number) * _UNITS[unit] for number, unit in parts))
            else:
                seconds = float(Decimal(text))
        else:
            seconds = float(value)
    except (InvalidOperation, ValueError, OverflowError):
        raise ValueError("must be a duration") from None
    if not 0 <= seconds < float("inf"):
        raise ValueError("must be a duration that is not negative")
    return seconds


def format_duration(seconds: float) -> str:
    """The shortest text with one unit that `parse_duration` reads as exactly this many seconds."""
    exact = Decimal(repr(float(seconds)))
    for unit, length in _UNITS.items():
        count = exact / length
        if exact and count == count.to_integral_value() and count * length == exact:
            return f"{count:f}".partition(".")[0] + unit
    return f"{exact:f}s" if exact else "0s"


def parse_size(value: object) -> int:
    """Bytes, from a number of bytes or a text such as "64KiB", "1MiB". Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError("must be a size in bytes")
    number, unit = match.groups()
    return int(number) * next(length for name, length in _SIZES.items() if name.lower() == (unit or "B").lower())


def format_size(size: int) -> str:
    """The shortest text that `parse_size` reads as exactly this many bytes."""
    for unit, length in _SIZES.items():
        if size and size % length == 0:
            return f"{size // length}{unit}"
    return "0B"


def read_duration(value: object) -> float:
    """`parse_duration` as a validator, with what to write instead."""
    try:
        return parse_duration(value)
    except ValueError as error:
        raise _wrong(str(error), DURATION_REMEDY) from None


def read_size(value: object) -> int:
    """`parse_size` as a validator, with what to write instead."""
    try:
        return parse_size(value)
    except ValueError as error:
        raise _wrong(str(error), SIZE_REMEDY) from None


def _no_flag(value: object) -> object:
    if isinstance(value, bool):
        raise _wrong("must be a number, and YAML reads this as true or false")
    return value


def _host(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.:-]{1,255}", value, re.ASCII):
        raise _wrong("is not an address or a host name", "such as 127.0.0.1, ::1, or 0.0.0.0 for every address of the machine")
    return value


def _split(value: str, schemes: Sequence[str], example: str) -> SplitResult:
    remedy = f"such as {example}"
    try:
        url = urlsplit(value)
        host, _ = url.hostname, url.port
    except ValueError:
        raise _wrong("is not a URL", remedy) from None
    if re.search(r"[\s\x00-\x1f\x7f]", value) or url.scheme.lower() not in schemes or not host:
        raise _wrong(f"is not a URL that begins with {' or '.join(f'{scheme}://' for scheme in schemes)}", remedy)
    if url.username is not None or url.password is not None:
        raise _wrong("must not carry a user name or a password", remedy)
    if url.query or url.fragment or "?" in value or "#" in value:
        raise _wrong("must end with the path: no ? and no #", remedy)
    return url


def _sfu_url(value: str) -> str:
    _split(value, ("wss", "ws", "https", "http"), "wss://sfu.example.org")
    return value


def _homeserver_url(value: str) -> str:
    _split(value, ("https", "http"), "https://matrix.example.org")
    try:
        return checked_base_url(value, allow_http=True)
    except ValueError as error:
        raise _wrong(str(error), "such as https://matrix.example.org") from None


def _proxy_url(value: str) -> str:
    example = "http://127.0.0.1:8080"
    _split(value, ("https", "http"), example)
    try:
        return checked_base_url(value, allow_http=True)
    except ValueError as error:
        raise _wrong(str(error), f"such as {example}") from None


def _homeserver_name(value: str) -> str:
    name = value.lower()
    remedy = "a server name such as example.org, a pattern such as '*.example.org', or '*' for every homeserver"
    if "://" in name:
        raise _wrong("is a URL, and a server name is asked for: the part behind the colon of @user:example.org", remedy)
    plain = name.removeprefix("*.")
    if name != "*" and not re.fullmatch(r"(?:[a-z0-9](?:[a-z0-9.-]{0,253}[a-z0-9])?|\[[0-9a-f:.]{2,45}\])(?::\d{1,5})?", plain, re.ASCII):
        raise _wrong("is not a server name", remedy)
    if not is_pattern(name):
        raise _wrong("is not a server name: its address or port cannot be", remedy)
    return name


_SQLITE: Final = "sqlite:///"
_POSTGRESQL_REMEDY: Final = (
    "such as postgresql://sfu_delegate@db.example.org/sfu_delegate?sslmode=verify-full&sslrootcert=/etc/ssl/certs/ca-certificates.crt"
)
_KEPT_APART: Final = "take it out, and put it into postgresql.password_file, or postgresql.password"


def is_postgresql(database: str) -> bool:
    """Is it the URL of a PostgreSQL database? Every other one that is valid is SQLite's."""
    return database.startswith(("postgresql://", "postgres://"))


def _database(value: str) -> str:
    if is_postgresql(value):
        return _postgresql(value)
    remedy = "such as sqlite:////var/lib/sfu-delegate/sfu-delegate.db (four slashes before an absolute path)"
    if not value.startswith(_SQLITE):
        postgresql = value.partition(":")[0].lower().startswith("postgres")
        raise _wrong("is not a database URL that begins with sqlite:/// or postgresql://", _POSTGRESQL_REMEDY if postgresql else remedy)
    path = value.removeprefix(_SQLITE)
    if not path or path == ":memory:" or path.endswith("/"):
        raise _wrong("names no file, and nothing would survive a restart", remedy)
    if "?" in path or "#" in path or "\0" in path:
        raise _wrong("must be a plain path without ?, # or options", remedy)
    return value


# Options of libpq's that have a key of their own, or would let something secret or unchecked in: each with what to do instead.
_NO_OPTIONS: Final = {
    "connect_timeout": "set postgresql.connect_timeout",
    "passfile": "put the password into postgresql.password_file",
    "service": "write what it stands for into the URL, where it can be checked",
    "sslpassword": "give an sslkey that needs no password, and that only the daemon's user can read",
    **dict.fromkeys(("client_encoding", "replication", "sslkeylogfile", "scram_client_key", "scram_server_key"), "remove it"),
    **dict.fromkeys(("oauth_client_id", "oauth_client_secret", "oauth_issuer", "oauth_scope"), "remove it, and use postgresql.password_file"),
}
_OPTION_WORDS: Final = {
    "sslmode": ("verify-full", "verify-ca", "require", "prefer", "allow", "disable"),
    "target_session_attrs": ("read-write", "primary", "any"),  # those of libpq's that lead to where the daemon can write
    "load_balance_hosts": ("disable", "random"),
    "channel_binding": ("require", "prefer", "disable"),
}


def _postgresql(value: str) -> str:
    if any(character.isspace() or not character.isprintable() for character in value):
        raise _wrong("has a space or a control character in it", "write it in one line; a space in a name is %20")
    rest = value.partition("://")[2]
    # libpq takes what stands before the first @ for the user, unless a slash comes first: a password with a slash in it would become a name, and
    # be shown. So nothing but a user may stand before the last @, whatever libpq would make of it.
    user, _, behind = rest.rpartition("@")
    names = [unquote(pair.partition("=")[0]) for pair in behind.partition("?")[2].split("&") if pair]
    if ":" in unquote(user) or "password" in names:
        raise _wrong("carries a password", _KEPT_APART)
    if re.search(r"[/?#@]", user):
        raise _wrong("has an @ that does not stand between user and host", f"an @ in a name or an option is %40; {_POSTGRESQL_REMEDY}")
    _check_options(names)
    options = database_options(value)
    if options is None:
        raise _wrong("is not a URL that libpq can read", _POSTGRESQL_REMEDY)
    if ":" in options.get("user", ""):
        raise _wrong("carries a password", _KEPT_APART)
    if not options.get("dbname"):
        raise _wrong("names no database", _POSTGRESQL_REMEDY)
    if re.search(r"[/?#@:=]", options["dbname"]):
        raise _wrong("has a database name with / ? # @ : or = in it", _POSTGRESQL_REMEDY)
    _check_hosts(options)
    for name, words in _OPTION_WORDS.items():
        if name in options and options[name] not in words:
            raise _wrong(f"has another {name} than the daemon can work with", f"write one of: {', '.join(words)}")
    if options.get("sslrootcert") == "system":
        # psycopg's wheels bring an OpenSSL of their own, which looks for the system's certificates where there are none.
        raise _wrong("has sslrootcert=system, which finds no certificates", "name a file: sslrootcert=/etc/ssl/certs/ca-certificates.crt")
    return value


def _check_options(names: Sequence[str]) -> None:
    from psycopg.pq import Conninfo  # loads libpq, which who keeps to SQLite can do without

    known = {option.keyword.decode() for option in Conninfo.get_defaults()} | {"ssl"}  # the latter is what JDBC calls sslmode=require
    if unknown := [name for name in names if name not in known]:
        if not all(re.fullmatch(r"[A-Za-z_]{1,40}", name) for name in unknown):  # who knows what that is a part of
            raise _wrong("has an option that libpq does not know", _POSTGRESQL_REMEDY)
        close = difflib.get_close_matches(unknown[0], known - set(_NO_OPTIONS) - {"password"}, 1)
        raise _wrong(f"has what is no option of libpq's: {', '.join(unknown)}", f"did you mean {close[0]}?" if close else "remove it")
    for name in names:
        if name in _NO_OPTIONS:
            raise _wrong(f"has the option {name}, which cannot be used here", _NO_OPTIONS[name])


def _check_hosts(options: Mapping[str, str]) -> None:
    hosts, addresses, ports = (options[name].split(",") if options.get(name) else [] for name in ("host", "hostaddr", "port"))
    if not all(re.fullmatch(r"[/@].+|[A-Za-z0-9_.:%-]{0,255}", host, re.ASCII) for host in hosts):
        raise _wrong("has something else than a host name, an address or a directory for its host", _POSTGRESQL_REMEDY)
    try:
        for address in addresses:
            ipaddress.ip_address(address)
    except ValueError:
        raise _wrong("has a hostaddr that is no IP address", "write the name of the host before the slash, and leave hostaddr out") from None
    if not all(port == "" or (re.fullmatch(r"\d{1,5}", port, re.ASCII) and 0 < int(port) < 65536) for port in ports):
        raise _wrong("has a port that is not a number from 1 to 65535", _POSTGRESQL_REMEDY)
    count = max(len(hosts), len(addresses), 1)
    if (hosts and addresses and len(hosts) != len(addresses)) or len(ports) not in (0, 1, count):
        raise _wrong(
            "does not have as many ports or addresses as hosts", "give each host its own, or one port for all: postgresql://one:5432,two:5432/…"
        )


def database_options(url: str) -> dict[str, str] | None:
    """What the URL of a PostgreSQL database says, by libpq's names for it; None when libpq cannot read it. What it leaves out is not there."""
    from psycopg import Error
    from psycopg.conninfo import conninfo_to_dict

    try:
        return {name: str(value) for name, value in conninfo_to_dict(url).items() if value is not None}
    except (Error, ValueError):  # its text quotes the URL
        return None


_SHOWN_OPTIONS: Final = re.compile(
    rf"(?:host|hostaddr|port|sslcert|sslkey|sslrootcert|connect_timeout|{'|'.join(_OPTION_WORDS)})=[\w./,-]*", re.ASCII
)
_HOST_AND_PORT: Final = r"(?:\[[0-9A-Fa-f:.]+\]|(?:[\w.-]|%2[Ff])*)(?::\d{0,5})?"
_HARMLESS: Final = re.compile(rf"(postgres(?:ql)?://)([\w.~-]+@)?({_HOST_AND_PORT}(?:,{_HOST_AND_PORT})*(?:/[\w./-]*)?)(?:\?([^@#]*))?", re.ASCII)


def shown_database(text: str) -> str:
    """What was written as the database, as a problem may show it: with nothing in it that could be a password, or a part of one."""
    if text.startswith(_SQLITE):
        path, mark, _ = text.partition("?")
        return path + (f"?{HIDDEN}" if mark else "")
    if found := _HARMLESS.fullmatch(text):
        scheme, user, place, query = found.groups()
        harmless = all(_SHOWN_OPTIONS.fullmatch(pair) for pair in (query or "").split("&") if pair)
        return f"{scheme}{f'{HIDDEN}@' if user else ''}{place}" + ("" if query is None else f"?{query if harmless else HIDDEN}")
    if re.fullmatch(r"[\w./-]*", text):
        return text
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]{0,30}://", text)
    return (scheme[0] if scheme else "") + HIDDEN


def _label(value: str) -> str:
    if not re.fullmatch(r"(?:[!-~](?:[ -~]{0,62}[!-~])?)?", value, re.ASCII):
        raise _wrong("is not a name: printable ASCII, 64 characters at most, is asked for", "such as delegate-1, or 192.0.2.7")
    return value


def _origin(value: str) -> str:
    if value != "*" and not re.fullmatch(r"https?://[A-Za-z0-9.\[\]:-]+", value, re.ASCII):
        raise _wrong("is not an origin", "such as https://call.example.org (no slash at the end), or '*' for all")
    return value


RESERVED_PATHS: Final = ("/v1", "/webhooks", "/healthz", "/get_token", "/sfu/get", "/sfu_webhook", "/delegate_delayed_leave")
"""What the public listener answers at the root: no prefix may be one of these, or lead below one."""


def _path_prefix(value: str) -> str:
    remedy = "such as /livekit/jwt"
    if not value.startswith("/") or value.endswith("/"):
        raise _wrong("must begin with a slash, and not end with one", remedy)
    if "//" in value or {".", ".."} & set(value.split("/")):
        raise _wrong("must not have // or .. in it: reverse proxies change such paths", remedy)
    if not re.fullmatch(r"[A-Za-z0-9._~!$&'()*+,;=:@/-]{1,200}", value, re.ASCII):
        raise _wrong("has characters that the path of a URL cannot have, or is very long", f"{remedy}: letters, digits, - and _")
    for taken in RESERVED_PATHS:
        if f"{value}/".startswith(f"{taken}/"):
            raise _wrong(f"belongs to {taken}, which is there already", f"another path, {remedy}")
    return value


def _network(value: object) -> object:
    if isinstance(value, IPv4Network | IPv6Network):
        return value
    remedy = "such as 10.0.0.0/8, 192.0.2.7 or ::1"
    if not isinstance(value, str):
        raise _wrong("must be a text, and YAML reads this as something else", f"put it into quotes, {remedy}")
    try:
        network = ipaddress.ip_network(value.strip(), strict=False)
    except ValueError:
        raise _wrong("is not an IP address or a network of them", remedy) from None
    if value.strip().partition("/")[2] and network.network_address != ipaddress.ip_address(value.strip().partition("/")[0]):
        raise _wrong("has more bits set than its /… says", f"{network} is the network that it lies in")
    if isinstance(network, IPv6Network) and network.network_address.ipv4_mapped is not None:
        raise _wrong("is an IPv4 address in the form of an IPv6 one", "write it as an IPv4 address or network")
    return network


MAKE_A_TOKEN: Final = "`openssl rand -hex 32` makes one"  # noqa: S105 (it is none)
ODD_REMEDY: Final = "write it in one line and nothing beside it; if it really has this in it, make a new one"


def odd_character(text: str) -> str | None:
    """What a key or a secret has in it that no generator puts there, but a slip in copying does; None: nothing of the kind."""
    for character in text:
        kind = unicodedata.category(character)
        if character in "\r\n" or kind in ("Zl", "Zp"):
            return "a line break"
        if character == "\t" or kind == "Zs":
            return "a space"
        if kind == "Cc":
            return "a control character"
        if kind in ("Cf", "Cs"):
            return "a character that cannot be seen"
    return None


def _secret(value: object) -> object:
    if isinstance(value, SecretStr):
        return value
    if not isinstance(value, str):
        raise _wrong("must be a text, and YAML reads this as something else", "put it into quotes")
    if not value.strip():
        raise _wrong("is empty", "put the secret here, or into the environment or a file")
    if odd := odd_character(value.strip()):
        raise _wrong(f"has {odd} in it", ODD_REMEDY)
    return value.strip()


Network = Annotated[IPv4Network | IPv6Network, BeforeValidator(_network), PlainSerializer(str, when_used="json")]
PathPrefix = Annotated[str, AfterValidator(_path_prefix)]
Secret = Annotated[SecretStr, BeforeValidator(_secret), PlainSerializer(lambda _: HIDDEN, when_used="json")]
Duration = Annotated[float, BeforeValidator(read_duration), PlainSerializer(format_duration, when_used="json")]
Size = Annotated[int, BeforeValidator(read_size), PlainSerializer(format_size, when_used="json")]
Count = Annotated[int, BeforeValidator(_no_flag)]
Fraction = Annotated[float, BeforeValidator(_no_flag)]
Rate = Annotated[float, BeforeValidator(_no_flag), PlainSerializer(lambda rate: int(rate) if rate == int(rate) else rate, when_used="json")]
Port = Annotated[int, BeforeValidator(_no_flag), Field(ge=0, le=65535)]
Host = Annotated[str, AfterValidator(_host)]
SfuUrl = Annotated[str, AfterValidator(_sfu_url)]
HomeserverUrl = Annotated[str, AfterValidator(_homeserver_url)]
ProxyUrl = Annotated[str, AfterValidator(_proxy_url)]
HomeserverName = Annotated[str, AfterValidator(_homeserver_name)]
DatabaseUrl = Annotated[str, AfterValidator(_database)]
Label = Annotated[str, AfterValidator(_label)]
Origin = Annotated[str, AfterValidator(_origin)]
