"""Single values: durations and sizes as people write them, and what a host, a URL, a name or a secret may be.

Nothing here knows which key a value stands at, and no error's text may repeat the value: it may be a secret.
"""

import ipaddress
import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from ipaddress import IPv4Network, IPv6Network
from typing import Annotated, Any, Final, cast
from urllib.parse import SplitResult, urlsplit

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


def _database(value: str) -> str:
    remedy = "such as sqlite:////var/lib/sfu-delegate/sfu-delegate.db (four slashes before an absolute path)"
    scheme = value.partition(":")[0].lower()
    if scheme.startswith("postgres"):
        raise _wrong("only sqlite: in this version", remedy)
    if not value.startswith("sqlite:///"):
        raise _wrong("is not a database URL that begins with sqlite:///", remedy)
    path = value.removeprefix("sqlite:///")
    if not path or path == ":memory:" or path.endswith("/"):
        raise _wrong("names no file, and nothing would survive a restart", remedy)
    if "?" in path or "#" in path or "\0" in path:
        raise _wrong("must be a plain path without ?, # or options", remedy)
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
HomeserverName = Annotated[str, AfterValidator(_homeserver_name)]
DatabaseUrl = Annotated[str, AfterValidator(_database)]
Origin = Annotated[str, AfterValidator(_origin)]
