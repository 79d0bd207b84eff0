"""The configuration: one YAML file, every key of which the environment can override, checked as a whole before anything starts.

All problems are found at once, each with its key, its value and what to do; a secret must never be shown, neither in a problem nor in a repr.
The descriptions below are also the comments of `config/sfu-delegate.yaml`, which `example` writes: change them here.
"""

import base64
import binascii
import difflib
import ipaddress
import re
import stat
import textwrap
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Annotated, Any, Final, Literal, NamedTuple, Union, cast, get_args, get_origin
from urllib.parse import SplitResult, urlsplit

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PrivateAttr,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsError

from sfu_delegate.delegation.policy import DEPARTURES, MISSING, OTHER, ROOM_MISSING, Departure, Policy, Unasked

PREFIX: Final = "SFU_DELEGATE_"
HIDDEN: Final = "(hidden)"
NOT_SET: Final = "(not set)"
EXAMPLE_SECRET: Final = "put-the-secret-of-this-key-here-"  # noqa: S105 (it is no secret, and a warning says so)
_MOST_FILE_BYTES: Final = 4 * 1024 * 1024

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, or risky, in the configuration. `value` never holds a secret."""

    key: str  # such as homeservers[0].url; "" for the file as a whole
    value: str
    problem: str
    remedy: str
    where: str = ""  # the line of the file, or the environment variable, that it comes from

    def __str__(self) -> str:
        where = f" ({self.where})" if self.where else ""
        if not self.key:
            return f"{self.value or 'the file'}{where}: {self.problem}; {self.remedy}"
        value = f" = {self.value}" if self.value else ""
        return f"{self.key}{where}{value}: {self.problem}; {self.remedy}"


class ConfigInvalid(Exception):
    """The configuration cannot be used; `problems` has everything that is wrong with it."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = tuple(problems)


def _wrong(problem: str, remedy: str = "") -> PydanticCustomError:
    """What a validator raises. The text must not repeat the value: it may be a secret, or be shown beside it."""
    return PydanticCustomError("sfu_delegate", cast(Any, "{problem}"), {"problem": problem, "remedy": remedy})


_UNITS: Final = {"d": Decimal(86400), "h": Decimal(3600), "m": Decimal(60), "s": Decimal(1), "ms": Decimal("0.001")}
_DURATION_PART: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", re.ASCII)
_SIZES: Final = {"GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10, "GB": 10**9, "MB": 10**6, "KB": 1000, "B": 1}
_SIZE: Final = re.compile(r"(\d{1,18})\s*([kmg]?i?b)?", re.ASCII | re.IGNORECASE)
_DURATION_REMEDY: Final = "write a number with its unit, such as 500ms, 30s, 2m, 1h or 7d, or a number of seconds"
_SIZE_REMEDY: Final = "write a number with its unit, such as 64KiB or 1MiB, or a number of bytes"
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


def _duration(value: object) -> float:
    try:
        return parse_duration(value)
    except ValueError as error:
        raise _wrong(str(error), _DURATION_REMEDY) from None


def _size(value: object) -> int:
    try:
        return parse_size(value)
    except ValueError as error:
        raise _wrong(str(error), _SIZE_REMEDY) from None


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
    return value.rstrip("/")


def _homeserver_name(value: str) -> str:
    name = value.lower()
    remedy = "a server name such as example.org, a pattern such as '*.example.org', or '*' for every homeserver"
    if "://" in name:
        raise _wrong("is a URL, and a server name is asked for: the part behind the colon of @user:example.org", remedy)
    plain = name.removeprefix("*.")
    if name != "*" and not re.fullmatch(r"(?:[a-z0-9](?:[a-z0-9.-]{0,253}[a-z0-9])?|\[[0-9a-f:.]{2,45}\])(?::\d{1,5})?", plain, re.ASCII):
        raise _wrong("is not a server name", remedy)
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
Duration = Annotated[float, BeforeValidator(_duration), PlainSerializer(format_duration, when_used="json")]
Size = Annotated[int, BeforeValidator(_size), PlainSerializer(format_size, when_used="json")]
Count = Annotated[int, BeforeValidator(_no_flag)]
Fraction = Annotated[float, BeforeValidator(_no_flag)]
Port = Annotated[int, BeforeValidator(_no_flag), Field(ge=0, le=65535)]
Host = Annotated[str, AfterValidator(_host)]
SfuUrl = Annotated[str, AfterValidator(_sfu_url)]
HomeserverUrl = Annotated[str, AfterValidator(_homeserver_url)]
HomeserverName = Annotated[str, AfterValidator(_homeserver_name)]
DatabaseUrl = Annotated[str, AfterValidator(_database)]
Origin = Annotated[str, AfterValidator(_origin)]


class Level(StrEnum):
    """How much is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


_POLICY: Final = Policy()


class Section(BaseModel):
    """Part of the file. A key without a value (YAML's null) counts as not given, so that a section may be all comments."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, use_attribute_docstrings=False)

    @model_validator(mode="before")
    @classmethod
    def _empty_is_not_given(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            return {key: value for key, value in data.items() if value is not None or key not in cls.model_fields}
        return data


class Listen(Section):
    """The public listener."""

    host: Host = Field("127.0.0.1", description="Address to listen on. It speaks plain HTTP, so keep it behind your reverse proxy.")
    port: Port = Field(8080, description="Port to listen on.")


class Admin(Section):
    """The listener for operators."""

    host: Host = Field("127.0.0.1", description="Address to listen on. There is no password: never make it reachable from outside.")
    port: Port = Field(8081, description="Port to listen on.")


class Encryption(Section):
    """Keys for what is secret in the database."""

    keys: tuple[Secret, ...] = Field(
        (),
        description="Fernet keys (32 bytes in base64url): the first encrypts, all decrypt. To change the key, put a new one in front.",
    )
    keys_file: Path | None = Field(None, description="The same in a file, one key a line.", examples=["/etc/sfu-delegate/encryption-keys"])


class Sfu(Section):
    """One LiveKit server, or one cluster of them."""

    url: SfuUrl = Field(
        description="The SFU's URL, as clients use it and as it is handed to them, to the letter.", examples=["wss://sfu.example.org"]
    )
    keys: dict[str, Secret] = Field(
        {},
        description="API keys and their secrets: the `keys:` of LiveKit's own configuration. They prove webhooks and participants' tokens. "
        "No two SFUs may share a key: it tells which SFU a webhook comes from.",
        examples=[{"APIexample": EXAMPLE_SECRET}],
    )
    key_file: Path | None = Field(
        None, description="LiveKit's own `key_file`, in place of `keys`: YAML with one `key: secret` a line.", examples=["/etc/livekit/keys.yaml"]
    )
    api_key: str | None = Field(None, description="Which of the keys asks the SFU who is in a room. Not set: the first one.", examples=["APIexample"])
    request_timeout: Duration = Field(5.0, gt=0, le=60, description="How long the SFU may take to answer.")
    in_flight: Count = Field(4, ge=1, le=1000, description="How many questions to this SFU may be open at the same time.")


class Homeserver(Section):
    """One homeserver, or a pattern of them, whose users may delegate."""

    name: HomeserverName = Field(
        description="Server name (what stands behind the colon of @user:example.org), a pattern such as '*.example.org', or '*' for all. "
        "The most exact entry counts.",
        examples=["example.org"],
    )
    url: HomeserverUrl | None = Field(
        None,
        description="Client-server URL. Not set: found by https://<name>/.well-known/matrix/client, as clients do.",
        examples=["https://matrix.example.org"],
    )
    as_token: Secret | None = Field(
        None,
        description="Token of an application service that is registered there with `rate_limited: false`. Without it, Synapse allows the "
        "daemon only 1 action a second for all its users together.",
    )
    as_token_file: Path | None = Field(None, description="The same in a file.", examples=["/etc/sfu-delegate/as-token"])
    ca_file: Path | None = Field(
        None, description="Certificates (PEM) to trust for it, in place of the system's.", examples=["/etc/ssl/private-ca.pem"]
    )
    in_flight: Count = Field(16, ge=1, le=1000, description="How many requests may be open there at the same time.")
    allow_private_addresses: bool = Field(
        False,
        description="May discovery lead to a private or loopback address? A URL that is written here is always reached.",
    )


class DepartureRule(Section):
    """How a departure with one reason is checked."""

    look_after: Duration = Field(le=3600, description="Time until the SFU is asked whether the participant is back; 0s: believed at once.")
    unasked: Unasked = Field(description="What counts while the SFU cannot be asked: gone, connected, or after (gone, after `unasked_after`).")
    unasked_after: Duration = Field(Departure(0, Unasked.GONE).unasked_after, le=86400, description="For `unasked: after`.")

    def departure(self) -> Departure:
        """The same in the words of the rules."""
        return Departure(self.look_after, self.unasked, self.unasked_after)


def _departures(data: Any) -> Any:
    """What is given for a reason is laid over its default, and reasons that are not given keep theirs."""
    if not isinstance(data, Mapping):
        return data
    given: dict[Any, Any] = {key.upper() if isinstance(key, str) else key: value for key, value in data.items()}
    rules: dict[Any, Any] = {reason: _rule(DEPARTURES[reason]) for reason in DEPARTURES}
    for reason, value in given.items():
        if isinstance(value, Mapping):
            default = DEPARTURES.get(reason, DEPARTURES[OTHER])
            rules[reason] = {**_rule(default), **{k: v for k, v in value.items() if v is not None}}
        elif value is not None:
            rules[reason] = value
    return rules


def _rule(departure: Departure) -> dict[str, Any]:
    return {"look_after": departure.look_after, "unasked": departure.unasked, "unasked_after": departure.unasked_after}


class Presence(Section):
    """When is a participant gone?"""

    join_timeout: Duration = Field(
        _POLICY.join_timeout,
        gt=0,
        description="How long a participant that delegated may take to appear in the call, counted from its last sign of life.",
    )
    first_looks: tuple[Duration, ...] = Field(
        _POLICY.first_looks, description="When to look for a participant that delegated, unless a webhook has announced it."
    )
    unseen_departure: Duration = Field(
        _POLICY.unseen_departure, description="The least wait for a look when a participant leaves that was never seen under this delegation."
    )
    joining_limit: Duration = Field(
        _POLICY.joining_limit, gt=0, description="How long somebody may be seen joining, but not joined, before that counts as absent."
    )
    look_again: Duration = Field(_POLICY.look_again, gt=0, description="Between looks that could not decide; doubled with each look that fails.")
    look_again_most: Duration = Field(_POLICY.look_again_most, gt=0, description="… up to this.")
    look_gap: Duration = Field(_POLICY.look_gap, description="The least time between two looks at one room.")
    settled: Duration = Field(_POLICY.settled, description="A look says nothing about what had changed less than this before it was sent.")
    doubt: Duration = Field(
        _POLICY.doubt,
        description="For an SFU of several nodes: how long absences prove nothing after one of its nodes was away, since its lists are then wrong.",
    )
    doubt_after: Duration = Field(
        _POLICY.doubt_after,
        description="An old session that ends this long after the newer one joined shows that a node was away.",
    )


class Restart(Section):
    """When delayed events are restarted."""

    at: Fraction = Field(_POLICY.restart_at, gt=0, lt=1, description="The latest normal time of a restart, as a fraction of the event's delay.")
    spread: Fraction = Field(
        _POLICY.restart_spread,
        ge=0,
        lt=1,
        description="Restarts come earlier by up to this fraction of the delay, so that the members of a call do not come at once.",
    )


class Actions(Section):
    """How failed requests to homeservers are repeated."""

    retry_first: Duration = Field(
        _POLICY.retry_first, gt=0, description="Wait after the first failure; doubled with each further one, with some randomness."
    )
    retry_most: Duration = Field(_POLICY.retry_most, gt=0, description="… up to this.")
    vanished_wait: Duration = Field(
        _POLICY.vanished_wait,
        gt=0,
        description="When a homeserver no longer knows the event of somebody connected: how long until that counts as lost. Mostly the client "
        "has just hung up, or delegates anew.",
    )
    lease: Duration = Field(
        _POLICY.lease,
        gt=0,
        le=600,
        description="An action whose outcome is unknown for this long is taken up again. Must be longer than any request may take.",
    )


class Delegations(Section):
    """What clients may delegate."""

    min_delay: Duration = Field(
        30.0, gt=0, description="Shortest delay of an event. Each event costs a restart every 3/4 of its delay, from a rate that all share."
    )
    max_delay: Duration = Field(7 * 86400.0, gt=0, description="Longest delay of an event.")
    max_events: Count = Field(8, ge=1, le=1000, description="Delayed events in one delegation.")
    max_per_participant: Count = Field(4, ge=1, le=1000, description="Delegations of one participant whose events have not ended yet.")
    max_per_homeserver: Count = Field(100_000, ge=1, description="Delegations of one homeserver's users.")
    verify_timeout: Duration = Field(
        2.0, ge=0, le=60, description="How long a client waits for the homeserver to confirm its event; later it is told `verified: false`."
    )
    allow_scoped_tokens: bool = Field(
        True, description="Accept tokens that allow nothing but managing delayed events? Full access tokens are always refused."
    )


class Limits(Section):
    """Limits of requests."""

    body: Size = Field(64 << 10, ge=1024, le=64 << 20, description="Largest body of a request to the API.")
    webhook_body: Size = Field(1 << 20, ge=16 << 10, le=256 << 20, description="Largest body of a webhook.")
    inbox: Count = Field(
        20_000, ge=100, le=10_000_000, description="Requests and webhooks that may wait for the database. Beyond that, 503: LiveKit tries again."
    )


class Timeouts(Section):
    """Timeouts of requests to homeservers, and of the shutdown."""

    connect: Duration = Field(5.0, gt=0, le=60, description="To connect to a homeserver.")
    request: Duration = Field(10.0, gt=0, le=300, description="For a whole request to a homeserver, from connecting to the answer's end.")
    shutdown: Duration = Field(10.0, ge=0, le=300, description="How long a shutdown waits for requests in flight.")


class History(Section):
    """What remains of delegations that are over."""

    keep: Duration = Field(_POLICY.keep, description="How long finished delegations and their history are kept.")


class Log(Section):
    """The log."""

    level: Level = Field(Level.INFO, description="debug, info, warning or error.")
    format: Literal["auto", "json", "console"] = Field("auto", description="json, console, or auto: console on a terminal, json elsewhere.")


class Cors(Section):
    """Browsers' access."""

    origins: tuple[Origin, ...] = Field(
        ("*",),
        description="Web pages that may use the API, by origin. Clients are hosted anywhere, and nothing here depends on cookies: '*' is safe.",
    )


def _defaults(departures: Mapping[str, Departure]) -> dict[str, DepartureRule]:
    return {reason: DepartureRule(**_rule(departure)) for reason, departure in departures.items()}


class Config(Section):
    """The whole file, with the environment laid over it. Made by `load` or `from_mapping`, which check more than single values."""

    listen: Listen = Field(
        Listen(), description="Public listener: the delegation API, and LiveKit's webhooks (POST /webhooks/livekit).", validate_default=False
    )
    admin: Admin = Field(Admin(), description="Listener for operators: /metrics, /health/live, /health/ready.")
    database: DatabaseUrl = Field(
        "sqlite:///sfu-delegate.db",
        description="Where delegations are kept: sqlite:///relative.db or sqlite:////absolute/path.db. Everything that was acknowledged is in "
        "there, so put it on a disk that lasts.",
    )
    encryption: Encryption = Field(
        Encryption(),
        description="Encrypts clients' tokens in the database, and signs the tokens by which clients manage their delegations. Without any key "
        "here, one is made at the first start and kept beside the database, in <database>.key.",
    )
    sfus: dict[str, Sfu] = Field({}, description="The LiveKit servers, by a name of your choice, which appears in metrics and logs. Required.")
    homeservers: tuple[Homeserver, ...] = Field((), description="The homeservers whose users may delegate. Required.")
    departures: Annotated[dict[str, DepartureRule], BeforeValidator(_departures)] = Field(
        _defaults(DEPARTURES),
        description="What to do when a participant left, by LiveKit's reason. A departure is a claim to be checked: after `look_after` the SFU "
        "is asked whether the participant is back (0s: it is believed at once, and not asked). `unasked` says what counts while the SFU cannot "
        "be asked: `gone`, `connected`, or `after`: gone when `unasked_after` has passed. Shorter times end memberships sooner, and let people "
        "who only reconnect vanish from the call. MISSING is somebody whom the SFU no longer lists without having said why; ROOM_MISSING the "
        "same of a whole room, as after a restart of the SFU; OTHER stands for every reason that is not named here.",
    )
    presence: Presence = Field(Presence(), description="How the SFU is watched.")
    restart: Restart = Field(Restart(), description="When a connected participant's delayed events are restarted.")
    actions: Actions = Field(Actions(), description="How requests to homeservers are repeated.")
    delegations: Delegations = Field(Delegations(), description="What clients may delegate.")
    limits: Limits = Field(Limits(), description="Limits of incoming requests.")
    timeouts: Timeouts = Field(Timeouts(), description="Timeouts.")
    history: History = Field(History(), description="What remains of delegations that are over.")
    log: Log = Field(Log(), description="The log, written to standard error.")
    cors: Cors = Field(Cors(), description="Which web pages may use the API from a browser.")

    _risks: tuple[Problem, ...] = PrivateAttr(())

    @property
    def database_path(self) -> Path:
        """The embedded database's file; a relative one is seen from the working directory."""
        return Path(self.database.removeprefix("sqlite:///"))

    @property
    def key_file(self) -> Path:
        """Where the daemon keeps its own encryption key when the configuration has none."""
        path = self.database_path
        return path.with_name(path.name + ".key")

    def encryption_keys(self) -> tuple[str, ...]:
        """The configured Fernet keys, the encrypting one first; empty where the daemon is to keep its own in `key_file`."""
        return tuple(key.get_secret_value() for key in self.encryption.keys)

    def policy(self) -> Policy:
        """The part that the rules work with."""
        return Policy(
            departures=MappingProxyType({reason: rule.departure() for reason, rule in self.departures.items()}),
            join_timeout=self.presence.join_timeout,
            first_looks=self.presence.first_looks,
            unseen_departure=self.presence.unseen_departure,
            joining_limit=self.presence.joining_limit,
            look_again=self.presence.look_again,
            look_again_most=self.presence.look_again_most,
            look_gap=self.presence.look_gap,
            settled=self.presence.settled,
            doubt=self.presence.doubt,
            doubt_after=self.presence.doubt_after,
            restart_at=self.restart.at,
            restart_spread=self.restart.spread,
            retry_first=self.actions.retry_first,
            retry_most=self.actions.retry_most,
            vanished_wait=self.actions.vanished_wait,
            lease=self.actions.lease,
            keep=self.history.keep,
        )

    def shown(self) -> dict[str, Any]:
        """The effective configuration as plain data, with every secret hidden."""
        return self.model_dump(mode="json")


def load(path: Path, environ: Mapping[str, str] = MappingProxyType({})) -> Config:
    """Read and check a file, with the environment laid over it. Raises ConfigInvalid with all problems."""
    text, problems = _read_text(path, "", "the configuration file")
    if text is None:
        raise ConfigInvalid(problems)
    parsed = _parse(text)
    if parsed.data is _NOTHING:
        raise ConfigInvalid(parsed.problems)
    config = from_mapping(parsed.data, environ, lines=parsed.lines, before=parsed.problems)
    inline = [f"sfus.{name}.keys" for name, sfu in config.sfus.items() if sfu.keys and sfu.key_file is None]
    inline += [f"homeservers[{i}].as_token" for i, h in enumerate(config.homeservers) if h.as_token and h.as_token_file is None]
    inline += ["encryption.keys"] if config.encryption.keys and config.encryption.keys_file is None else []
    if inline and _world_readable(path):
        config._risks += (
            Problem("", str(path), f"holds secrets ({', '.join(inline)}) and every user of this machine may read it", f"chmod o= {path}"),
        )
    return config


def from_mapping(
    data: object,
    environ: Mapping[str, str] = MappingProxyType({}),
    *,
    lines: Mapping[KeyPath, int] = MappingProxyType({}),
    before: Sequence[Problem] = (),
) -> Config:
    """Check plain data, with the environment laid over it. Raises ConfigInvalid with all problems, those from `before` included.

    `lines` gives the line of each key in the file, for the problems.
    """
    problems = list(before)
    where: dict[KeyPath, str] = {path: f"line {line}" for path, line in lines.items()}
    try:
        plain = _plain(data, (), frozenset(), problems, where)
    except RecursionError:
        raise ConfigInvalid([*problems, Problem("", "", "is nested too deeply", "write it as in the example-config")]) from None
    if plain is None:
        plain = {}
    if not isinstance(plain, dict):
        raise ConfigInvalid([*problems, Problem("", _kind(plain), "must be keys with values", "begin with the output of example-config")])
    plain, risks = _overlay(plain, environ, problems, where)
    config, pruned = _validate(plain, problems, where)
    if config is not None:
        config = _read_secrets(config, problems, risks, pruned, where)
        for problem, involved in _contradictions(config):
            if not any(_related(one, other) for one in involved for other in pruned):
                problems.append(_located(problem, involved[0], where))
    if problems or config is None:
        raise ConfigInvalid(_unique(problems))
    config._risks = tuple(risks)
    return config


def _unique(problems: Iterable[Problem]) -> list[Problem]:
    return list(dict.fromkeys(problems))


def _located(problem: Problem, path: KeyPath, where: Mapping[KeyPath, str]) -> Problem:
    return Problem(problem.key, problem.value, problem.problem, problem.remedy, problem.where or _where(path, where))


def _where(path: KeyPath, where: Mapping[KeyPath, str]) -> str:
    for length in range(len(path), 0, -1):
        if found := where.get(path[:length]):
            return found
    return ""


def _related(one: KeyPath, other: KeyPath) -> bool:
    shorter = min(len(one), len(other))
    return one[:shorter] == other[:shorter]


def _dotted(path: KeyPath) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _kind(value: object) -> str:
    match value:
        case None:
            return "(empty)"
        case bool():
            return "(true or false)"
        case str():
            return "(a text)"
        case int() | float():
            return "(a number)"
        case Mapping():
            return "(keys with values)"
        case list() | tuple():
            return "(a list)"
        case _:
            return "(something else)"


def _read_text(path: Path, key: str, what: str) -> tuple[str | None, list[Problem]]:
    remedy = "check the path, and that the daemon's user may read it"
    if not key:
        remedy += "; `sfu-delegate example-config` prints a file to begin with"
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_FILE_BYTES + 1)
        if len(content) > _MOST_FILE_BYTES:
            return None, [Problem(key, str(path), f"{what} is larger than 4 MiB", "check the path")]
        return content.decode("utf-8-sig"), []
    except UnicodeDecodeError:
        return None, [Problem(key, str(path), f"{what} is not UTF-8 text", "check that it is the right file, and save it as UTF-8")]
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "not a path"
        return None, [Problem(key, str(path), f"{what} cannot be read: {reason}", remedy)]


def _world_readable(path: Path) -> bool:
    try:
        return bool(path.stat().st_mode & stat.S_IROTH)
    except OSError:
        return False


class _Nothing:
    """The file could not be parsed."""


_NOTHING: Final = _Nothing()


class _Parsed(NamedTuple):
    data: object
    lines: dict[KeyPath, int]
    problems: list[Problem]


class _Loader(yaml.SafeLoader):
    """YAML without dates: a secret or a name that looks like one stays a text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _parse(text: str, key: str = "") -> _Parsed:
    lines: dict[KeyPath, int] = {}
    problems: list[Problem] = []
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return _Parsed(None, {}, [])
            _index(node, (), lines, problems, frozenset())
            return _Parsed(loader.construct_document(node), lines, problems)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        # PyYAML quotes what it stumbled over, which may be part of a secret.
        said = re.sub(r"(['\"])(?![<\[{,:?\]}>-])[^'\"]{2,}\1", HIDDEN, error.problem or "it cannot be read")
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = Problem(key, "", f"is not YAML: {said}", "check the indentation, quotes and colons there", where)
    except RecursionError:
        problem = Problem(key, "", "is nested too deeply", "write it as in the example-config")
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError):
        # What PyYAML raises for characters that are not allowed, and for values that contradict their tag (`!!int x`).
        problem = Problem(key, "", "is not YAML that can be read", "remove control characters and tags (words that begin with !)")
    return _Parsed(_NOTHING, lines, [*problems, problem])


def _index(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], problems: list[Problem], above: frozenset[int]) -> None:
    """Note the line of each key, and report keys that are there twice, of which YAML silently takes the last."""
    if id(node) in above:
        return
    above |= {id(node)}
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for name, value in node.value:
            if not isinstance(name, yaml.ScalarNode) or name.value == "<<":
                continue
            line = name.start_mark.line + 1
            inner = (*path, name.value)
            if name.value in seen:
                problems.append(Problem(_dotted(inner), "", f"is there twice, first in line {seen[name.value]}", "keep one of them", f"line {line}"))
            seen.setdefault(name.value, line)
            lines[inner] = line
            _index(value, inner, lines, problems, above)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            lines[(*path, number)] = value.start_mark.line + 1
            _index(value, (*path, number), lines, problems, above)


def _plain(data: object, path: KeyPath, above: frozenset[int], problems: list[Problem], where: Mapping[KeyPath, str]) -> Any:
    """The same data, made of dict with text keys, list and scalars only."""
    if isinstance(data, Mapping | list | tuple | set | frozenset):
        if id(data) in above:
            problems.append(Problem(_dotted(path), "", "contains itself", "write it without the alias (*)", _where(path, where)))
            return None
        above |= {id(data)}
    if isinstance(data, Mapping):
        result: dict[str, Any] = {}
        for key, value in data.items():
            if isinstance(key, str) or (isinstance(key, int) and not isinstance(key, bool)):
                result[str(key)] = _plain(value, (*path, str(key)), above, problems, where)
            else:
                problems.append(
                    Problem(_dotted(path), "", f"has a key that is not a text, but {_kind(key)}", "put the key into quotes", _where(path, where))
                )
        return result
    if isinstance(data, list | tuple):
        return [_plain(value, (*path, number), above, problems, where) for number, value in enumerate(data)]
    return data


class _Environment(EnvSettingsSource):
    """What one variable says, as nested data. Names are matched in any case, except for API keys, which have one."""

    def __init__(self, name: str, value: str) -> None:
        self._only = {re.sub(r"(?i)^(.+?)(__keys__.+)?$", lambda m: m[1].lower() + "__keys__" + m[2][8:] if m[2] else m[1].lower(), name): value}
        super().__init__(
            # Only the model's fields are asked for: it need not be one that reads the environment whenever it is made.
            cast("type[BaseSettings]", Config),
            case_sensitive=False,
            env_prefix=PREFIX,
            env_nested_delimiter="__",
        )

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return self._only

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:  # noqa: ARG002
        parsed = _parse(str(value))
        if parsed.data is _NOTHING:
            raise ValueError("not YAML")
        odd: list[Problem] = []
        plain = _plain(parsed.data, (), frozenset(), odd, {})
        if odd:
            raise ValueError("not plain data")
        return plain


# Kubernetes puts these into every container of a namespace with a service named sfu-delegate.
_KUBERNETES: Final = re.compile(r"SFU_DELEGATE_(?:SERVICE_.*|PORT(?:_\d+_(?:TCP|UDP).*)?)")
_NOT_KEYS: Final = frozenset({"SFU_DELEGATE_CONFIG"})


def _overlay(
    data: dict[str, Any], environ: Mapping[str, str], problems: list[Problem], where: dict[KeyPath, str]
) -> tuple[dict[str, Any], list[Problem]]:
    risks: list[Problem] = []
    for name in sorted(environ, key=lambda n: (n.count("__"), n)):  # whole sections first, then what is in them
        if not name.upper().startswith(PREFIX) or name.upper() in _NOT_KEYS or _KUBERNETES.fullmatch(name):
            continue
        try:
            said = _Environment(name, environ[name])()
        except (SettingsError, ValueError):
            remedy = "give a YAML or JSON value, such as {key: value} or [one, two]"
            problems.append(Problem(_env_key(name), HIDDEN, "is not YAML that can be read", remedy, name))
            continue
        if not said:
            first = name[len(PREFIX) :].lower().split("__", maxsplit=1)[0]
            close = difflib.get_close_matches(first, Config.model_fields, 1)
            meant = f"did you mean {PREFIX}{close[0].upper()}…? " if close else ""
            risks.append(Problem(name, "", "is no key of the configuration, and was ignored", f"{meant}sections are followed by two underscores"))
            continue
        plain = _nothing_is_null(_plain(said, (), frozenset(), problems, {}))
        _mark(plain, (), name, where)
        data = _merge(data, plain, (), name, problems)
    return data, risks


def _nothing_is_null(data: Any) -> Any:
    """An environment variable is always a text; "null" takes a key away, as in the file."""
    if isinstance(data, dict):
        return {key: _nothing_is_null(value) for key, value in data.items()}
    return None if data == "null" else data


def _env_key(name: str) -> str:
    return name[len(PREFIX) :].lower().replace("__", ".")


def _mark(data: object, path: KeyPath, name: str, where: dict[KeyPath, str]) -> None:
    if isinstance(data, dict) and data:
        for key, value in data.items():
            _mark(value, (*path, int(key) if _is_index(path, key) else key), name, where)
    elif path:
        where[path] = name


def _is_index(path: KeyPath, key: str) -> bool:
    return bool(path) and key.isdecimal() and key.isascii() and _type_at(path).kind == "list"


def _merge(base: Any, over: Any, path: KeyPath, name: str, problems: list[Problem]) -> Any:
    """`over` laid over `base`: keys one by one, lists by their numbers."""
    if not isinstance(over, dict):
        return over
    if _type_at(path).kind == "list":
        items = list(base) if isinstance(base, list) else []
        for key, value in over.items():
            if not key.isdecimal() or not key.isascii() or len(key) > 6 or int(key) > len(items):
                remedy = f"use a number from 0 to {len(items)}: a list's items are numbered from 0, and a new one comes next"
                problems.append(Problem(_dotted(path), "", "is a list, and this is not the number of one of its items", remedy, name))
                continue
            number = int(key)
            items[number : number + 1] = [_merge(items[number] if number < len(items) else None, value, (*path, number), name, problems)]
        return items
    if not isinstance(base, dict):
        base = {}
    return {**base, **{key: _merge(base.get(key), value, (*path, key), name, problems) for key, value in over.items()}}


class _Type(NamedTuple):
    kind: Literal["section", "map", "list", "scalar", "unknown"]
    type: Any  # the section's class, or the items' or the value's type
    secret: bool
    field: FieldInfo | None


def _type_at(path: KeyPath) -> _Type:
    """What the model says of a key. Walks sections, maps and lists."""
    found = _Type("section", Config, False, None)
    for part in path:
        match found.kind:
            case "section" if part in found.type.model_fields:
                field = found.type.model_fields[part]
                found = _type_of(field.annotation, field)
            case "map" | "list":
                found = _type_of(found.type, None)
            case _:
                return _Type("unknown", None, True, None)
    return found


def _type_of(annotation: Any, field: FieldInfo | None) -> _Type:
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, UnionType):
        inner = [a for a in get_args(annotation) if a is not type(None)]
        return _type_of(inner[0], field)
    secret = "SecretStr" in str(annotation)
    if get_origin(annotation) is dict:
        return _Type("map", get_args(annotation)[1], secret, field)
    if get_origin(annotation) is tuple:
        return _Type("list", get_args(annotation)[0], secret, field)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return _Type("section", annotation, False, field)
    return _Type("scalar", annotation, secret, field)


def _all_keys(annotation: Any = Config, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    found = _type_of(annotation, None)
    if found.kind == "section":
        for name, field in found.type.model_fields.items():
            yield (*path, name)
            yield from _all_keys(field.annotation, (*path, name))
    elif found.kind in ("map", "list"):
        yield from _all_keys(found.type, (*path, "…"))


def _validate(data: dict[str, Any], problems: list[Problem], where: Mapping[KeyPath, str]) -> tuple[Config | None, list[KeyPath]]:
    """The configuration without what is wrong in it, and the paths of what was left out, so that the rest can be checked as well."""
    pruned: list[KeyPath] = []
    for _round in range(8):
        try:
            return Config.model_validate(data), pruned
        except ValidationError as error:
            details = error.errors(include_url=False)
        for detail in details:
            path = tuple(part for part in detail["loc"] if part != "[key]")
            if not any(_related(path, other) for other in pruned):
                problems.append(_explain(detail, path, where))
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


def _explain(detail: ErrorDetails, path: KeyPath, where: Mapping[KeyPath, str]) -> Problem:
    kind, found = detail["type"], _type_at(path)
    context = detail.get("ctx", {})
    value, remedy = _shown(path, detail.get("input")), _expected(path)
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
    return Problem(_dotted(path), value, problem, remedy, _where(path, where))


def _shown(path: KeyPath, value: object) -> str:
    """A value as a problem may show it: only of keys that are known to hold no secret."""
    found = _type_at(path)
    if found.secret or found.kind == "unknown":
        return HIDDEN
    if found.kind != "scalar" or not isinstance(value, str | int | float):
        return _kind(value)
    text = value if isinstance(value, str) else yaml.safe_dump(value).partition("\n")[0]
    text = re.sub(r"//[^/@]*@", f"//{HIDDEN}@", text)
    text = "".join(c if c.isprintable() else "?" for c in text)
    return (text if len(text) <= 100 else text[:99] + "…") or '""'


def _bound(path: KeyPath, bound: object) -> str:
    match _unit_of(path):
        case "duration":
            return format_duration(float(cast(float, bound)))
        case "size":
            return format_size(int(cast(int, bound)))
        case _:
            return f"{bound}"


def _unit_of(path: KeyPath) -> Literal["duration", "size", ""]:
    found = _type_at(path)
    metadata: Iterable[object] = found.field.metadata if found.field else ()
    functions = {m.func for m in metadata if isinstance(m, BeforeValidator)}
    return "duration" if _duration in functions else "size" if _size in functions else ""


def _expected(path: KeyPath) -> str:
    """What may stand at a key, for somebody who wrote something else."""
    found = _type_at(path)
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
            return _DURATION_REMEDY
        case "size":
            return _SIZE_REMEDY
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
    name, parent = str(path[-1]), _type_at(path[:-1])
    names = list(parent.type.model_fields) if parent.kind == "section" else []
    if close := difflib.get_close_matches(name.lower().replace("-", "_"), names, 1, 0.6):
        return f"did you mean {close[0]}?"
    if elsewhere := [".".join(keys) for keys in _all_keys() if keys[-1] == name]:
        return f"there is {' and '.join(elsewhere)}: put it there"
    return f"remove it; the keys here are {', '.join(names)}" if names else "remove it"


def _read_secrets(config: Config, problems: list[Problem], risks: list[Problem], pruned: list[KeyPath], where: Mapping[KeyPath, str]) -> Config:
    """The same configuration with the content of its secret files. What cannot be read is a problem, and counts as pruned."""

    def read(path: Path, key: KeyPath, what: str) -> str | None:
        text, wrong = _read_text(path, _dotted(key), what)
        problems.extend(_located(problem, key, where) for problem in wrong)
        if text is None:
            pruned.append(key[:-1])
        elif _world_readable(path):
            risks.append(Problem(_dotted(key), str(path), "every user of this machine may read this secret", f"chmod o= {path}"))
        return text

    def empty(key: KeyPath, path: Path, what: str, remedy: str) -> None:
        problems.append(Problem(_dotted(key), str(path), what, remedy, _where(key, where)))
        pruned.append(key[:-1])

    def both(inline: KeyPath, file: str) -> None:
        remedy = f"keep one of the two; {inline[-1]}: null in the file, or in the environment, takes it away"
        problems.append(Problem(_dotted(inline), HIDDEN, f"is given here, and {file} as well", remedy, _where(inline, where)))

    encryption = config.encryption
    if encryption.keys_file is not None and encryption.keys:
        both(("encryption", "keys"), "keys_file")
    elif encryption.keys_file is not None:
        at: KeyPath = ("encryption", "keys_file")
        path = encryption.keys_file
        if (text := read(path, at, "the key file")) is not None:
            found = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
            encryption = encryption.model_copy(update={"keys": tuple(SecretStr(key) for key in found)})
            if not found:
                empty(at, path, "holds no key", "write one Fernet key a line")

    sfus: dict[str, Sfu] = {}
    for name, sfu in config.sfus.items():
        sfus[name], at = sfu, ("sfus", name, "key_file")
        if sfu.key_file is None:
            continue
        if sfu.keys:
            both(("sfus", name, "keys"), "key_file")
            continue
        if (text := read(sfu.key_file, at, "the key file")) is not None:
            parsed = _parse(text).data
            pairs = parsed if isinstance(parsed, dict) else {}
            if pairs and all(isinstance(k, str) and k and isinstance(s, str) and s.strip() for k, s in pairs.items()):
                sfus[name] = sfu.model_copy(update={"keys": {key: SecretStr(secret.strip()) for key, secret in pairs.items()}})
            else:
                empty(at, sfu.key_file, "is not a key file of LiveKit's", "write one `key: secret` a line, with a space behind the colon")

    homeservers: list[Homeserver] = []
    for number, homeserver in enumerate(config.homeservers):
        homeservers.append(homeserver)
        at = ("homeservers", number, "as_token_file")
        if homeserver.as_token_file is not None and homeserver.as_token is not None:
            both(("homeservers", number, "as_token"), "as_token_file")
        elif homeserver.as_token_file is not None:
            text = read(homeserver.as_token_file, at, "the token's file")
            if text is not None and text.strip():
                homeservers[-1] = homeserver.model_copy(update={"as_token": SecretStr(text.strip())})
            elif text is not None:
                empty(at, homeserver.as_token_file, "is empty", "put the token into it")
        if homeserver.ca_file is not None:
            at = ("homeservers", number, "ca_file")
            _, wrong = _read_text(homeserver.ca_file, _dotted(at), "the certificate file")
            problems.extend(_located(problem, at, where) for problem in wrong)

    return config.model_copy(update={"encryption": encryption, "sfus": sfus, "homeservers": tuple(homeservers)})


_SFU_NAME: Final = re.compile(r"[a-z](?:[a-z0-9-]|_(?!_)){0,62}", re.ASCII)


def _contradictions(config: Config) -> Iterator[tuple[Problem, tuple[KeyPath, ...]]]:
    """What is wrong between keys, each with the keys that it depends on."""

    def one(path: KeyPath, value: str, problem: str, remedy: str, *also: KeyPath) -> tuple[Problem, tuple[KeyPath, ...]]:
        return Problem(_dotted(path), value, problem, remedy), (path, *also)

    if not config.sfus:
        yield one(("sfus",), NOT_SET, "is required: without an SFU there is nobody to watch", "name one, with its url and its keys")
    if not config.homeservers:
        yield one(("homeservers",), NOT_SET, "is required: without a homeserver nobody may delegate", "name one: `- name: example.org`")

    encryption = config.encryption
    keys: KeyPath = ("encryption", "keys")
    for number, fernet in enumerate(encryption.keys):
        if not _is_fernet_key(fernet.get_secret_value()):
            command = "python3 -c 'import base64, os; print(base64.urlsafe_b64encode(os.urandom(32)).decode())'"
            yield one((*keys, number), HIDDEN, "is not a Fernet key (32 bytes in base64url)", f"make one: {command}", ("encryption", "keys_file"))

    owners: dict[str, str] = {}
    for name, sfu in config.sfus.items():
        at: KeyPath = ("sfus", name)
        if not _SFU_NAME.fullmatch(name):
            remedy = "use lower-case letters, digits, - and _, a letter first, 63 at most"
            yield one(at, "", "is not a name for an SFU", remedy)
        if not sfu.keys:
            yield one((*at, "keys"), NOT_SET, "is required", "give `keys` as in LiveKit's configuration, or its `key_file`", (*at, "key_file"))
        if sfu.api_key is not None and sfu.keys and sfu.api_key not in sfu.keys:
            yield one((*at, "api_key"), sfu.api_key, "is not among this SFU's keys", f"one of: {', '.join(sfu.keys)}", (*at, "keys"))
        for key in sfu.keys:
            if key in owners:
                remedy = "give each SFU a key of its own: it tells which SFU a webhook comes from"
                yield one((*at, "keys", key), HIDDEN, f"is also a key of {owners[key]}", remedy, ("sfus", owners[key], "keys"))
            owners.setdefault(key, name)
        if sfu.request_timeout >= config.actions.lease:
            yield one(
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
            yield one((*at, "name"), homeserver.name, f"is there twice, first as homeservers[{first}]", "keep one", ("homeservers", first))
        names.setdefault(homeserver.name, number)
        if "*" in homeserver.name and homeserver.url is None and (homeserver.as_token or homeserver.as_token_file):
            yield one(
                (*at, "as_token"),
                HIDDEN,
                "would be sent to whatever server the discovery leads to, as name is a pattern",
                "give the url, or name the one homeserver",
                (*at, "name"),
                (*at, "url"),
                (*at, "as_token_file"),
            )

    for reason in config.departures:
        if not re.fullmatch(r"[A-Z][A-Z0-9_]{0,63}|\d{1,6}", reason, re.ASCII):
            yield one(("departures", reason), "", "is not the name of a disconnect reason", f"one of: {', '.join(DEPARTURES)}")

    for low, high in (
        (("delegations", "min_delay"), ("delegations", "max_delay")),
        (("actions", "retry_first"), ("actions", "retry_most")),
        (("presence", "look_again"), ("presence", "look_again_most")),
        (("timeouts", "connect"), ("timeouts", "request")),
    ):
        least, most = (getattr(getattr(config, section), key) for section, key in (low, high))
        if least > most:
            yield one(low, format_duration(least), f"must be at most {_dotted(high)} ({format_duration(most)})", "swap or change them", high)
    if config.timeouts.request >= config.actions.lease:
        yield one(
            ("timeouts", "request"),
            format_duration(config.timeouts.request),
            f"must be less than actions.lease ({format_duration(config.actions.lease)}), or an action could be done twice",
            "shorten it, or lengthen the lease",
            ("actions", "lease"),
        )
    if config.restart.spread >= config.restart.at:
        problem = f"must be less than restart.at ({config.restart.at})"
        yield one(("restart", "spread"), str(config.restart.spread), problem, "0.1 is usual", ("restart", "at"))
    if list(config.presence.first_looks) != sorted(config.presence.first_looks):
        yield one(("presence", "first_looks"), "", "must be in ascending order", "such as [1s, 3s, 8s, 20s, 45s]")
    same = (config.listen.host, config.listen.port) == (config.admin.host, config.admin.port)
    if same and config.listen.port:
        value = f"{config.admin.host}:{config.admin.port}"
        yield one(("admin", "port"), value, "is the address of listen, too", "give each its own port", ("listen",), ("admin",))


def _is_fernet_key(key: str) -> bool:
    try:
        return len(base64.b64decode(key.encode("ascii"), altchars=b"-_", validate=True)) == 32
    except (binascii.Error, ValueError):
        return False


_TAKEOVERS: Final = ("DUPLICATE_IDENTITY", "MIGRATION", "SERVER_SHUTDOWN", MISSING, ROOM_MISSING)
# LiveKit 1.13 knows these as well; they are treated as OTHER.
_KNOWN_REASONS: Final = frozenset(DEPARTURES) | {"UNKNOWN_REASON", "SIP_TRUNK_FAILURE", "AGENT_ERROR"}


def warnings(config: Config) -> list[Problem]:
    """What works, but is risky or surely not meant."""
    return [*config._risks, *_unique(_risks_of(config))]


def _risks_of(config: Config) -> Iterator[Problem]:
    if not _is_loopback(config.listen.host):
        yield Problem(
            "listen.host",
            config.listen.host,
            "is reached without TLS by everybody who reaches this address",
            "fine inside a container or behind a firewall; otherwise listen on 127.0.0.1 behind your reverse proxy",
        )
    if not _is_loopback(config.admin.host):
        yield Problem("admin.host", config.admin.host, "metrics and health are open to everybody who reaches this address", "listen on 127.0.0.1")
    if not config.database_path.parent.is_dir():
        directory = str(config.database_path.parent)
        yield Problem("database", config.database, f"there is no directory {directory}", "create it, writable for the daemon's user")

    for name, sfu in config.sfus.items():
        at = f"sfus.{name}"
        if sfu.url.lower().startswith(("ws://", "http://")) and not _is_loopback(urlsplit(sfu.url).hostname or ""):
            yield Problem(f"{at}.url", sfu.url, "tokens go there unencrypted, and browsers refuse it on https pages", "use wss://")
        for key, secret in sfu.keys.items():
            text = secret.get_secret_value()
            if (key, text) == ("devkey", "secret"):
                yield Problem(f"{at}.keys.{key}", HIDDEN, "is the key that LiveKit uses with --dev and that everybody knows", "make a new one")
            elif text == EXAMPLE_SECRET:
                yield Problem(f"{at}.keys.{key}", HIDDEN, "is still the example's secret", "put the SFU's own key and secret here")
            elif len(text) < 32:
                problem = "is short for a secret: who guesses it can speak for the SFU and for every participant"
                yield Problem(f"{at}.keys.{key}", HIDDEN, problem, "make one of 32 characters or more: `livekit-server generate-keys`")

    for number, homeserver in enumerate(config.homeservers):
        at = f"homeservers[{number}]"
        url = homeserver.url
        if url and url.lower().startswith("http://") and not _is_loopback(urlsplit(url).hostname or ""):
            yield Problem(f"{at}.url", url, "tokens and delay_ids go there unencrypted", "use https://, or a loopback address")
        if homeserver.name == "*" and url is None:
            yield Problem(f"{at}.name", "'*'", "users of any homeserver in the world may delegate", "name the homeservers that you serve")
        if homeserver.allow_private_addresses and "*" in homeserver.name and url is None:
            problem = "any homeserver that matches can make the daemon send requests into your own network"
            yield Problem(f"{at}.allow_private_addresses", "true", problem, "name the homeserver, or give its url")

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


def _is_loopback(host: str) -> bool:
    if host.lower().rstrip(".") == "localhost" or host.lower().endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


_FIXED: Final = ("listen", "admin", "database", "encryption", "log.format", "timeouts.connect")


def reloadable_changes(old: Config, new: Config) -> tuple[bool, list[str]]:
    """Can a running daemon go from one to the other? Also names the changed keys that it can take over at a restart only."""
    changed = sorted(set(_differences(old, new, ())))
    fixed = [key for key in changed if any(key == name or key.startswith((f"{name}.", f"{name}[")) for name in _FIXED)]
    return not fixed, fixed


def _differences(old: object, new: object, path: KeyPath) -> Iterator[str]:
    if isinstance(old, Section) and type(old) is type(new):
        for name in type(old).model_fields:
            yield from _differences(getattr(old, name), getattr(new, name), (*path, name))
    elif old != new:
        yield _dotted(path)


_EXAMPLE_HEAD: Final = """\
# The configuration of sfu-delegate.
#
# Only sfus and homeservers are required. Every other key is shown with its default, after a #: remove it to change one.
#
# Durations are numbers with a unit (500ms, 30s, 2m, 1h30m, 7d) or numbers of seconds; sizes likewise (64KiB, 1MiB) or
# numbers of bytes.
#
# Every key can be overridden by an environment variable: SFU_DELEGATE_ and the keys, joined by two underscores:
#   SFU_DELEGATE_LISTEN__PORT=8081
#   SFU_DELEGATE_SFUS__MAIN__URL=wss://sfu.example.org
#   SFU_DELEGATE_HOMESERVERS__0__AS_TOKEN=…
#   SFU_DELEGATE_CORS__ORIGINS='["https://call.example.org"]'      (lists and maps as YAML or JSON; null: not set)
#
# `sfu-delegate check-config` finds everything that is wrong here. SIGHUP makes the daemon read this file again; listen,
# admin, database, encryption and log.format need a restart.
"""
_EXAMPLE_WIDTH: Final = 118


def example() -> str:
    """The commented example: every key with its description and default; `config/sfu-delegate.yaml` is this text."""
    lines = [_EXAMPLE_HEAD.rstrip("\n")]
    for name, field in Config.model_fields.items():
        lines.append("")
        lines += _comment(field, 0)
        found = _type_of(field.annotation, field)
        if name == "sfus":
            lines += ["sfus:", "  main:", *_section(Sfu, 4)]
        elif name == "homeservers":
            first, *rest = _section(Homeserver, 4)
            body = [first, *rest]
            start = next(number for number, line in enumerate(body) if line.startswith("    name:"))
            lines += ["homeservers:", *(line[2:] for line in body[:start]), "  - " + body[start].lstrip(), *body[start + 1 :]]
        elif name == "departures":
            lines.append("departures:")
            for reason, departure in DEPARTURES.items():
                rule: dict[str, str] = {"look_after": format_duration(departure.look_after), "unasked": departure.unasked.value}
                if departure.unasked is Unasked.AFTER:
                    rule["unasked_after"] = format_duration(departure.unasked_after)
                lines.append(f"  #{reason}: {_flow(rule)}")
        elif found.kind == "section":
            lines += [f"{name}:", *_section(found.type, 2)]
        else:
            lines.append(f"#{name}: {_flow(field.default)}")
    return "\n".join(lines) + "\n"


def _section(section: type[Section], indent: int) -> list[str]:
    blank = " " * indent
    defaults = section.model_construct().model_dump(mode="json", warnings=False)
    lines: list[str] = []
    for name, field in section.model_fields.items():
        required = field.is_required() or (section, name) in _EXAMPLE_GIVEN
        lines += _comment(field, indent, sample=not required)
        if required:
            sample = (field.examples or [""])[0]
            if isinstance(sample, dict):
                lines += [f"{blank}{name}:", *(f"{blank}  {key}: {_flow(value)}" for key, value in sample.items())]
            else:
                lines.append(f"{blank}{name}: {_flow(sample)}")
        else:
            lines.append(f"{blank}#{name}: {_flow(defaults[name])}")
    return lines


# Optional, but shown in use: hardly anybody goes without them.
_EXAMPLE_GIVEN: Final = {(Sfu, "keys"), (Homeserver, "url")}


def _comment(field: FieldInfo, indent: int, *, sample: bool = False) -> list[str]:
    text = field.description or ""
    if sample and field.default is None and field.examples:
        text += f" For example: {field.examples[0]}"
    start = " " * indent + "# "
    return textwrap.wrap(text, _EXAMPLE_WIDTH, initial_indent=start, subsequent_indent=start, break_long_words=False, break_on_hyphens=False)


def _flow(value: Hashable | Mapping[str, Any] | Sequence[Any]) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, width=100_000, sort_keys=False, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
