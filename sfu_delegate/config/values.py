"""Single values: durations and sizes as people write them, and what a host, a URL, a name or a secret may be.

Nothing here knows which key a value stands at, and no error's text may repeat the value: it may be a secret.
"""

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
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


def _secret(value: object) -> object:
    if isinstance(value, SecretStr):
        return value
    if not isinstance(value, str):
        raise _wrong("must be a text, and YAML reads this as something else", "put it into quotes")
    if not value.strip():
        raise _wrong("is empty", "put the secret here, or into the environment or a file")
    return value.strip()


Secret = Annotated[SecretStr, BeforeValidator(_secret), PlainSerializer(lambda _: HIDDEN, when_used="json")]
Duration = Annotated[float, BeforeValidator(read_duration), PlainSerializer(format_duration, when_used="json")]
Size = Annotated[int, BeforeValidator(read_size), PlainSerializer(format_size, when_used="json")]
Count = Annotated[int, BeforeValidator(_no_flag)]
Fraction = Annotated[float, BeforeValidator(_no_flag)]
Port = Annotated[int, BeforeValidator(_no_flag), Field(ge=0, le=65535)]
Host = Annotated[str, AfterValidator(_host)]
SfuUrl = Annotated[str, AfterValidator(_sfu_url)]
HomeserverUrl = Annotated[str, AfterValidator(_homeserver_url)]
HomeserverName = Annotated[str, AfterValidator(_homeserver_name)]
DatabaseUrl = Annotated[str, AfterValidator(_database)]
Origin = Annotated[str, AfterValidator(_origin)]
