"""The sections of the file and their defaults, and what the model says of a key.

The descriptions are also the comments of `config/sfu-delegate.yaml`, which `example` writes: change them here. Nothing here may read a file or the
environment, and a secret must never be shown in a repr.
"""

from collections.abc import Iterator, Mapping
from enum import StrEnum
from ipaddress import ip_network
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Annotated, Any, Final, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, model_validator
from pydantic.fields import FieldInfo

from sfu_delegate.config.problems import KeyPath, Problem
from sfu_delegate.config.values import (
    Count,
    DatabaseUrl,
    Duration,
    Fraction,
    HomeserverName,
    HomeserverUrl,
    Host,
    Label,
    Network,
    Origin,
    PathPrefix,
    Port,
    Rate,
    Secret,
    SfuUrl,
    Size,
    database_options,
    is_postgresql,
)
from sfu_delegate.delegation.policy import DEPARTURES, LOST_AFTER, OTHER, Departure, Policy, Unasked

EXAMPLE_SECRET: Final = "put-the-secret-of-this-key-here-"  # noqa: S105 (it is no secret, and a warning says so)


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


# Loopback, private (RFC 1918, RFC 4193) and link-local addresses: where reverse proxies are.
_NEAR: Final = ("127.0.0.0/8", "::1/128", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16", "fc00::/7", "fe80::/10")


class Listen(Section):
    """The public listener."""

    host: Host = Field("127.0.0.1", description="Address to listen on. It speaks plain HTTP, so keep it behind your reverse proxy.")
    port: Port = Field(8080, description="Port to listen on.")

    trusted_proxies: tuple[Network, ...] = Field(
        tuple(map(ip_network, _NEAR)),
        description="Addresses and networks of your reverse proxies: the last address in X-Forwarded-For that is not one of them is the client's, by "
        "which limits.client_rate counts. Not counted are clients that lie in these networks themselves, and those of a proxy that sends no "
        "X-Forwarded-For. []: the address that connects is always the client's.",
    )


class Admin(Section):
    """The listener for operators."""

    host: Host = Field(
        "127.0.0.1",
        description="Address to listen on. Health and metrics need no token here: never make it reachable from outside.",
    )
    port: Port = Field(8081, description="Port to listen on.")
    tcp: bool = Field(True, description="Listen on host and port at all? false: only on the socket.")
    socket: Path | None = Field(
        None,
        description="Listen on this Unix socket, too. Whoever may open it (the daemon's user and group: mode 0660) may do everything, without a "
        "token.",
        examples=["/run/sfu-delegate/admin.sock"],
    )
    token: Secret | None = Field(
        None,
        description="The pages and the operator's commands need this token over host and port: as a bearer token, or as the password in a browser. "
        "Without it they are read-only there, and open to whoever reaches the address; changes are made over the socket only.",
    )
    token_file: Path | None = Field(None, description="The same in a file, which is read at the start.", examples=["/etc/sfu-delegate/admin-token"])

    @property
    def token_key(self) -> str:
        """The key that gives the token."""
        return "token" if self.token_file is None else "token_file"


class Postgresql(Section):
    """What a PostgreSQL database needs beside its URL, and what tells instances apart that share one."""

    password: Secret | None = Field(
        None,
        description="Password of the user in `database`, where it must not stand. Not needed where a Unix socket or a client certificate (sslcert, "
        "sslkey) tells who we are.",
    )
    password_file: Path | None = Field(
        None, description="The same in a file, which is read at the start.", examples=["/etc/sfu-delegate/postgresql-password"]
    )
    connect_timeout: Duration = Field(
        3.0, ge=2, le=60, description="How long each host in `database` may take to accept a connection, until the next one is tried."
    )
    instance: Label = Field(
        "",
        description="Name of this instance in logs and in the table of instances; no two may have the same. '': the host name and `listen.port`, "
        "which containers can have in common.",
    )
    address: Label = Field(
        "",
        description="What homeservers count our requests by, where they limit them by address: instances behind the same address give the same text "
        "here, and those with an address of their own each another one. '': all instances share one, which is always safe.",
    )

    @property
    def password_key(self) -> str:
        """The key that the password comes from."""
        return "password" if self.password_file is None else "password_file"


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
    path_prefixes: tuple[PathPrefix, ...] = Field(
        (),
        description="Paths under which the MatrixRTC endpoints (<path>/get_token and so on) hand out this SFU: the path of a client's "
        "`livekit_service_url`, where the reverse proxy passes it on. The first SFU in this file is handed out at the root as well.",
        examples=[["/livekit/jwt"]],
    )
    request_timeout: Duration = Field(5.0, gt=0, le=60, description="How long the SFU may take to answer.")
    in_flight: Count = Field(4, ge=1, le=1000, description="How many questions to this SFU may be open at the same time.")
    lost_after: Duration = Field(
        LOST_AFTER,
        gt=0,
        description="When it has neither answered nor sent a webhook for this long, its delegations are let run, neither restarted nor ended, until "
        "it is back: an SFU that is gone for good must not keep ghosts in calls.",
    )


class Homeserver(Section):
    """One homeserver, or a pattern of them, whose users may create rooms on the SFU and delegate."""

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
    federation_url: HomeserverUrl | None = Field(
        None,
        description="URL of its federation API, where users' OpenID tokens are checked. Not set: found by server discovery, as other homeservers "
        "do (.well-known/matrix/server, SRV records, port 8448).",
        examples=["https://matrix.example.org:8448"],
    )
    as_token: Secret | None = Field(
        None,
        description="Token of an application service that is registered there with `rate_limited: false`. Without it, Synapse allows the "
        "daemon only 1 action a second for all its users together.",
    )
    as_token_file: Path | None = Field(None, description="The same in a file.", examples=["/etc/sfu-delegate/as-token"])
    hs_token: Secret | None = Field(
        None,
        description="Token of the same application service by which the homeserver proves itself when it forwards its users' requests (MSC4512).",
    )
    hs_token_file: Path | None = Field(None, description="The same in a file.", examples=["/etc/sfu-delegate/hs-token"])
    registration_file: Path | None = Field(
        None,
        description="The registration of the application service, as `sfu-delegate appservice` writes it and Synapse reads it: both tokens are taken "
        "from it, in place of the four keys above.",
        examples=["/etc/matrix-synapse/sfu-delegate-registration.yaml"],
    )
    ca_file: Path | None = Field(
        None, description="Certificates (PEM) to trust for it, in place of the system's.", examples=["/etc/ssl/private-ca.pem"]
    )
    rate_limited: bool | None = Field(
        None,
        description="Does its rate limit for delayed events (Synapse: rc_delayed_event_mgmt) hold for the daemon? Not set: not with an as_token, and "
        "otherwise it is found out, which costs a few refused requests.",
    )
    in_flight: Count = Field(64, ge=1, le=1000, description="How many requests may be open there at the same time.")
    allow_private_addresses: bool = Field(
        False,
        description="May discovery lead to a private or loopback address? A URL that is written here is always reached.",
    )

    @property
    def token_key(self) -> str:
        """The key that the application service's token comes from."""
        return self._token_key("as_token", self.as_token_file)

    @property
    def hs_token_key(self) -> str:
        """The key that the homeserver's own token comes from."""
        return self._token_key("hs_token", self.hs_token_file)

    def _token_key(self, name: str, file: Path | None) -> str:
        if self.registration_file is not None:
            return "registration_file"
        return name if file is None else f"{name}_file"


class Federation(Section):
    """How servers are reached whose users' OpenID tokens are checked."""

    verify_tls: bool = Field(
        True,
        description="Check the certificates of federation APIs, those of `homeservers` included? Without it, anybody on the network can pose as any "
        "homeserver's user: for test networks only.",
    )
    allow_private_addresses: bool = Field(
        False, description="May the discovery of a server that no entry of `homeservers` matches lead to a private or loopback address?"
    )
    ca_file: Path | None = Field(
        None,
        description="Certificates (PEM) to trust for servers that no entry of `homeservers` matches, in place of the system's.",
        examples=["/etc/ssl/private-ca.pem"],
    )


class MatrixRtc(Section):
    """The endpoints that MatrixRTC clients such as Element Call speak (MSC4195, as it is deployed)."""

    enabled: bool = Field(
        True,
        description="Serve the standalone ones: /get_token, /sfu/get and /delegate_delayed_leave, at the root and under `sfus.*.path_prefixes`? "
        "(/sfu_webhook and /healthz are always there, and what homeservers pass on is always answered.)",
    )
    other_homeservers: bool = Field(
        True,
        description="Do users of homeservers that are not served get tokens as well? By the standalone endpoints only for rooms that exist on the "
        "SFU, so they can join a call that a served user has begun; by federation, if they have joined the Matrix room, to listen. They cannot "
        "delegate.",
    )
    openid_cache: Duration = Field(
        300.0, le=3600, description="How long a homeserver's word for an OpenID token is remembered; 0s: it is asked each time."
    )


class Membership(Section):
    """What becomes of participants who are no longer in the Matrix room."""

    enforce: bool = Field(
        False,
        description="When a user leaves the Matrix room or is banned from it, remove its participant from the call on the SFU, and again if it comes "
        "back with an access token from before? Only where the homeserver has an application service and can tell who is in a room (MSC4502).",
    )
    interval: Duration = Field(
        300.0,
        ge=10,
        le=86400,
        description="How often each participant is checked while its access token is good or it is in the call; those who join are checked at once.",
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
    interval: Duration = Field(
        _POLICY.interval,
        gt=0,
        description="Between two looks at a room where nothing is the matter: webhooks get lost without a trace. One request for a whole room.",
    )
    interval_most: Duration = Field(_POLICY.interval_most, gt=0, description="… up to this, where nothing has changed for long.")
    late_after: Duration = Field(
        _POLICY.late_after,
        gt=0,
        description="A webhook that arrives this much later than others, counted from when it was made, is a reason to look at once.",
    )
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
        description="An action whose outcome is unknown for this long is taken up again, also by another instance when one has died. Must be longer "
        "than any request may take. With PostgreSQL the default is 10s.",
    )


class Delegations(Section):
    """What clients may delegate."""

    min_delay: Duration = Field(
        30.0, ge=2, description="Shortest delay of an event. Each event costs a restart every 3/4 of its delay, from a rate that all share."
    )
    max_delay: Duration = Field(7 * 86400.0, gt=0, description="Longest delay of an event.")
    max_events: Count = Field(8, ge=1, le=1000, description="Delayed events in one delegation.")
    max_per_participant: Count = Field(4, ge=1, le=1000, description="Delegations of one participant that its homeserver has not confirmed yet.")
    max_per_user: Count = Field(
        10,
        ge=1,
        le=100_000,
        description="Delayed events of one Matrix user that the homeserver has not confirmed yet. One that it had never heard of counts for a minute "
        "more: made-up ones must not use up what the homeserver allows for all. Participants whose user is not known, since another service made "
        "their access token, may have ten times as many, all of one homeserver together.",
    )
    max_per_homeserver: Count = Field(100_000, ge=1, description="Delayed events of one homeserver's users that have not ended yet.")
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
    client_rate: Rate = Field(
        50.0,
        ge=0,
        le=1_000_000,
        description="Requests a second from one address (an IPv6 network of 64 bits), beyond which they get 429; webhooks are not counted. An office "
        "is one address. 0: no limit.",
    )
    client_burst: Count = Field(1000, ge=1, le=1_000_000, description="How many of them may come at once.")
    user_rate: Rate = Field(
        1.0,
        ge=0,
        le=1_000_000,
        description="Requests a second of one Matrix user to the MatrixRTC endpoints, and delegations of one participant to /v1/delegations, beyond "
        "which they get 429. 0: no limit.",
    )
    user_burst: Count = Field(30, ge=1, le=1_000_000, description="How many of them may come at once.")


class Timeouts(Section):
    """Timeouts of requests to homeservers, and of the shutdown."""

    connect: Duration = Field(5.0, gt=0, le=60, description="To connect to a homeserver.")
    request: Duration = Field(
        10.0,
        gt=0,
        le=300,
        description="For a whole request to a homeserver, from connecting to the answer's end. With PostgreSQL the default is 8s.",
    )
    shutdown: Duration = Field(
        5.0,
        ge=0,
        le=300,
        description="How long a shutdown waits for requests in flight; meanwhile everything is refused, and LiveKit tries a webhook for 15 s. The "
        "process ends 7 s after that at the latest, whatever hangs. systemd is told how long it takes; a container's --stop-timeout of 45 s has to "
        "be raised, too.",
    )


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


# Defaults that differ from those of SQLite, where nobody waits for a lease: a process that starts takes up at once what the last one left. With
# PostgreSQL others wait for the lease of an instance that has died, and a request must end before it.
_ON_POSTGRESQL: Final = MappingProxyType({"actions": {"lease": 10.0}, "timeouts": {"request": 8.0}})


class Config(Section):
    """The whole file, with the environment laid over it. Made by `load` or `from_mapping`, which check more than single values."""

    listen: Listen = Field(
        Listen(),
        description="Public listener: the MatrixRTC endpoints, the delegation API, and LiveKit's webhooks (POST /webhooks/livekit).",
        validate_default=False,
    )
    admin: Admin = Field(Admin(), description="Listener for operators: /metrics, /health/live, /health/ready.")
    database: DatabaseUrl = Field(
        "sqlite:///sfu-delegate.db",
        description="Where delegations are kept: sqlite:///relative.db, sqlite:////absolute/path.db, or PostgreSQL, which several instances can "
        "share. Everything that was acknowledged is in there, so put it on a disk that lasts. PostgreSQL is "
        "postgresql://user@host:5432/name?sslmode=verify-full&sslrootcert=/path/ca.pem, with several hosts "
        "postgresql://user@one,two/name?target_session_attrs=read-write, or by a Unix socket postgresql:///name?host=/run/postgresql, with options "
        "as libpq has them. The password is not part of it: see `postgresql`.",
    )
    postgresql: Postgresql = Field(Postgresql(), description="For a PostgreSQL database; with SQLite nothing of it counts.")
    encryption: Encryption = Field(
        Encryption(),
        description="Encrypts clients' tokens in the database, and signs the tokens by which clients manage their delegations. Without any key "
        "here, one is made at the first start and kept beside the SQLite database, in <database>.key. With PostgreSQL keys are required, for all "
        "instances the same.",
    )
    sfus: dict[str, Sfu] = Field({}, description="The LiveKit servers, by a name of your choice, which appears in metrics and logs. Required.")
    homeservers: tuple[Homeserver, ...] = Field((), description="The homeservers whose users may create rooms on the SFU, and delegate. Required.")
    federation: Federation = Field(Federation(), description="How homeservers are asked whose an OpenID token is, which a MatrixRTC client presents.")
    matrixrtc: MatrixRtc = Field(
        MatrixRtc(), description="The endpoints of MatrixRTC clients such as Element Call, which give tokens for the SFU and take delegations."
    )
    membership: Membership = Field(Membership(), description="Who has to be in the Matrix room to be in its call.")
    departures: Annotated[dict[str, DepartureRule], BeforeValidator(_departures)] = Field(
        _defaults(DEPARTURES),
        description="What to do when a participant left, by LiveKit's reason. A departure is a claim to be checked: after `look_after` the SFU "
        "is asked whether the participant is back (0s: it is believed at once, and not asked). `unasked` says what counts while the SFU cannot "
        "be asked: `gone`, `connected`, or `after`: gone when `unasked_after` has passed. Shorter times end memberships sooner, and let people "
        "who only reconnect vanish from the call. MISSING is somebody whom the SFU no longer lists without having said why; ROOM_MISSING the "
        "same of a whole room, as after a restart of the SFU; ROOM_RESTARTED somebody who had joined before the room came up anew, and has not "
        "come back; OTHER stands for every reason that is not named here.",
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

    @model_validator(mode="before")
    @classmethod
    def _defaults_follow_the_database(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or not isinstance(data.get("database"), str) or not is_postgresql(data["database"]):
            return data
        result = dict(data)
        for section, defaults in _ON_POSTGRESQL.items():
            given = {} if data.get(section) is None else data[section]
            if isinstance(given, Mapping):
                result[section] = {**defaults, **{key: value for key, value in given.items() if value is not None}}
        return result

    @property
    def is_postgresql(self) -> bool:
        """Are delegations kept in PostgreSQL? Otherwise in SQLite."""
        return is_postgresql(self.database)

    def database_options(self) -> dict[str, str]:
        """What the URL of a PostgreSQL database says, by libpq's names for it; empty for SQLite. The password is not among it."""
        return (database_options(self.database) or {}) if self.is_postgresql else {}

    @property
    def database_path(self) -> Path:
        """The SQLite database's file; a relative one is seen from the working directory. Raises ValueError for PostgreSQL, which has none."""
        if self.is_postgresql:
            raise ValueError("a PostgreSQL database is no file")
        return Path(self.database.removeprefix("sqlite:///"))

    @property
    def key_file(self) -> Path:
        """Where the daemon keeps its own encryption key when the configuration has none. Raises ValueError for PostgreSQL, where it must have one."""
        path = self.database_path
        return path.with_name(path.name + ".key")

    def encryption_keys(self) -> tuple[str, ...]:
        """The configured Fernet keys, the encrypting one first; empty where the daemon is to keep its own in `key_file`: never with PostgreSQL."""
        return tuple(key.get_secret_value() for key in self.encryption.keys)

    @property
    def matrixrtc_paths(self) -> dict[str, str]:
        """Where the MatrixRTC endpoints are: path prefix → name of the SFU that is handed out there; "" is the root. Empty: there are none."""
        if not self.matrixrtc.enabled or not self.sfus:
            return {}
        return {"": next(iter(self.sfus)), **{prefix: name for name, sfu in self.sfus.items() for prefix in sfu.path_prefixes}}

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
            interval=self.presence.interval,
            interval_most=self.presence.interval_most,
            late_after=self.presence.late_after,
            lost_after=MappingProxyType({name: sfu.lost_after for name, sfu in self.sfus.items()}),
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


class _Type(NamedTuple):
    kind: Literal["section", "map", "list", "scalar", "unknown"]
    type: Any  # the section's class, or the items' or the value's type
    secret: bool
    field: FieldInfo | None


def type_at(path: KeyPath) -> _Type:
    """What the model says of a key. Walks sections, maps and lists."""
    found = _Type("section", Config, False, None)
    for part in path:
        match found.kind:
            case "section" if part in found.type.model_fields:
                field = found.type.model_fields[part]
                found = type_of(field.annotation, field)
            case "map" | "list":
                found = type_of(found.type, None)
            case _:
                return _Type("unknown", None, True, None)
    return found


def type_of(annotation: Any, field: FieldInfo | None) -> _Type:
    """What an annotation of the model stands for; `field` is passed on."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, UnionType):
        inner = [a for a in get_args(annotation) if a is not type(None)]
        return type_of(inner[0], field)
    secret = "SecretStr" in str(annotation)
    if get_origin(annotation) is dict:
        return _Type("map", get_args(annotation)[1], secret, field)
    if get_origin(annotation) is tuple:
        return _Type("list", get_args(annotation)[0], secret, field)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return _Type("section", annotation, False, field)
    return _Type("scalar", annotation, secret, field)


def all_keys(annotation: Any = Config, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of all keys of the model; … stands for a name or a number."""
    found = type_of(annotation, None)
    if found.kind == "section":
        for name, field in found.type.model_fields.items():
            yield (*path, name)
            yield from all_keys(field.annotation, (*path, name))
    elif found.kind in ("map", "list"):
        yield from all_keys(found.type, (*path, "…"))
