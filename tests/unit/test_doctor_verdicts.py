"""What the doctor says of what it has seen, in tables: no I/O, and no clock."""

import pytest
from sfu_delegate.config import Problem
from sfu_delegate.doctor.findings import Finding, Report, Result, Verdict
from sfu_delegate.doctor.verdicts.clock import Offset, judge_clock, judge_own_clock, offset
from sfu_delegate.doctor.verdicts.database import Inside, Keys, Speed, judge_connections, judge_keys, judge_space, judge_speed, judge_version
from sfu_delegate.doctor.verdicts.here import Daemon, Port, Public, SecretFile, Seen, judge_config, judge_daemon, judge_files, judge_public
from sfu_delegate.doctor.verdicts.homeserver import (
    Answers,
    Asked,
    Capability,
    Focus,
    Limit,
    Offered,
    Refused,
    Served,
    Tried,
    Way,
    WellKnown,
    judge_delayed_events,
    judge_federation,
    judge_largest_delay,
    judge_limit,
    judge_service,
    judge_well_known,
    measured,
)
from sfu_delegate.doctor.verdicts.sfu import Came, Heard, KeyTried, Wanted, judge_answers, judge_webhooks
from sfu_delegate.doctor.words import in_bytes, spoken
from sfu_delegate.livekit.room_service import Trouble
from sfu_delegate.matrix.management import Generation
from sfu_delegate.matrix.service import Defect, Findings, Part

OK, WARNING, PROBLEM, SKIPPED = Verdict.OK, Verdict.WARNING, Verdict.PROBLEM, Verdict.SKIPPED


def check(finding: Finding, verdict: Verdict, *said: str) -> None:
    """The verdict, and words of the evidence or the remedy; whoever has something to do is told what."""
    assert finding.verdict is verdict, finding
    for words in said:
        assert words in f"{finding.evidence} → {finding.remedy}", finding
    if verdict in (WARNING, PROBLEM):
        assert finding.remedy, finding


# ── numbers ──


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        *((0.0004, "0.4 ms"), (0.031, "31 ms"), (0.9, "900 ms"), (2.25, "2.25 s"), (59.4, "59.4 s")),
        *((59.6, "1 min"), (495, "8 min 15 s"), (3900, "1 h 5 min"), (3 * 86_400 + 3600, "3 d 1 h")),
    ],
)
def test_durations_as_people_say_them(seconds: float, said: str) -> None:
    """Not more exact than anybody wants to know."""
    assert spoken(seconds) == said


@pytest.mark.parametrize(("count", "said"), [(0, "0 B"), (4096, "4.1 kB"), (2_400_000_000, "2.4 GB"), (3e12, "3 TB")])
def test_amounts_as_people_say_them(count: float, said: str) -> None:
    """In decimal units."""
    assert in_bytes(count) == said


# ── the limit, in numbers ──


@pytest.mark.parametrize(
    ("limit", "verdict", "said"),
    [
        (Limit(Way.MEASURED, False, True, 1.0, 5.0), WARNING, ("takes 8 min 15 s to clear", "1 action a second, burst 5; measured", "appservice")),
        (Limit(Way.MEASURED, False, True, 0.2, 2.0), WARNING, ("takes 41 min 30 s", "0.2 actions a second, burst 2")),
        (Limit(Way.MEASURED, False, True, 50.0, 200.0), OK, ("takes 6 s to clear",)),
        (Limit(Way.MEASURED, False, True, 50.0, 600.0), OK, ("is cleared at once",)),
        (Limit(Way.MEASURED, True, True, 1.0, 5.0), WARNING, ("rate_limited: false", "restart Synapse")),
        (Limit(Way.LEARNED, False, True, 1.0), WARNING, ("takes 8 min 20 s", "as the daemon has learned")),
        (Limit(Way.MEASURED, False, True, None), WARNING, ("does not say how long",)),
        (Limit(Way.MEASURED, True, False, tried=8, granted=8), OK, ("8 of 8", "as the application service")),
        (Limit(Way.MEASURED, False, False, tried=8, granted=8), OK, ("8 of 8", "without a token")),
        (Limit(Way.GIVEN, False, False), OK, ("as the configuration says",)),
        (Limit(Way.LEARNED, True, None), OK, ("has met no limit",)),
        (Limit(Way.LEARNED, False, None), SKIPPED, ("has not met a limit yet", "stopped")),
    ],
)
def test_what_a_limit_means(limit: Limit, verdict: Verdict, said: tuple[str, ...]) -> None:
    """In minutes until a call of 500 is cleared, with what lifts it."""
    check(judge_limit(limit), verdict, *said)


@pytest.mark.parametrize(
    ("granted", "first", "again", "rate", "burst"),
    [
        (5, Refused(0.982, 0.018), Refused(0.995, 0.003), 1.0, 5.0),
        (5, Refused(0.982, 0.018), None, 1.0, 5.0),
        (4, Refused(0.48, 0.018), Refused(0.995, 0.003), 1.0, 5.0),  # half a request was still in there
        (0, Refused(0.9, 0.0), Refused(0.995, 0.003), 1.0, None),  # it was full
        (5, Refused(0.9, 0.0), Refused(0.9, 0.0), 1.1, 5.0),
        (1, Refused(5.0, 0.0), None, 0.2, 1.0),
        (5, Refused(0.02, 0.0), Refused(0.02, 0.0), 50.0, 5.0),
        (5, Refused(None, 0.0), None, None, None),
    ],
)
def test_the_rate_follows_from_refusals(granted: int, first: Refused, again: Refused | None, rate: float | None, burst: float | None) -> None:
    """When the bucket is full, the next request may come when one has leaked away; what went through before tells the burst."""
    limit = measured(granted, 8, first, again, service=False)
    assert (limit.limited, limit.rate, limit.burst) == (True, rate, burst)


# ── homeservers ──

ALL = dict.fromkeys(("restart", "send", "cancel"), Served.YES)


@pytest.mark.parametrize(
    ("offered", "verdict", "said"),
    [
        (Offered((Generation.C, Generation.B, Generation.A), ALL), OK, ("generation C", "restart, send and cancel are served")),
        (Offered((Generation.D,), ALL), OK, ("generation D", "stable")),
        (Offered((), {}), PROBLEM, ("off", "max_event_delay_duration: 24h")),
        (Offered((Generation.C,), ALL | {"send": Served.NO}), PROBLEM, ("send is not there", "main process", "/unstable/org.matrix.msc4140/")),
        (Offered((Generation.C,), dict.fromkeys(ALL, Served.ELSE)), PROBLEM, ("restart is answered by something else",)),
        (Offered((Generation.C,), dict.fromkeys(ALL, Served.UNKNOWN) | {"restart": Served.YES}), OK, ("restart is served; whether send or cancel",)),
    ],
)
def test_delayed_events(offered: Offered, verdict: Verdict, said: tuple[str, ...]) -> None:
    """On, and all of the management endpoints are where the announcement says."""
    check(judge_delayed_events(offered), verdict, *said)


@pytest.mark.parametrize(
    ("capability", "verdict", "said"),
    [
        (Capability(86_400.0, 100), OK, ("1d is the longest", "100 at a time")),
        (Capability(3600.0, None), OK, ("1h is the longest",)),
        (Capability(1800.0, 100), WARNING, ("30m", "an hour", "max_event_delay_duration")),
        (Capability(10.0, 100), PROBLEM, ("nothing can be delegated", "delegations.min_delay is 30s")),
        (Capability(0.0, 100), PROBLEM, ("no delay at all",)),
        (Capability(None, None), SKIPPED, ("does not tell",)),
    ],
)
def test_the_largest_delay(capability: Capability, verdict: Verdict, said: tuple[str, ...]) -> None:
    """Clients are told to schedule an hour."""
    check(judge_largest_delay(capability, 30.0), verdict, *said)


def found(*defects: Defect) -> Findings:
    return Findings(frozenset(Part), defects)


PROXY = Defect(Part.PROXY, "it cannot reach this service", "check proxy_url")


@pytest.mark.parametrize(
    ("tried", "verdict", "said"),
    [
        (Tried(found(), True, True), OK, ("token, membership, federation and proxy work",)),
        (Tried(found(PROXY), True, True), PROBLEM, ("proxy: it cannot reach", "check proxy_url")),
        (Tried(found(PROXY), True, False), OK, ("token, membership and federation work", "none runs")),
        (Tried(Findings(frozenset({Part.TOKEN}), ()), False, True), OK, ("token works", "no hs_token")),
        (Tried(found(Defect(Part.MEMBERSHIP, "one", "a"), Defect(Part.FEDERATION, "two", "b")), True, False), PROBLEM, ("membership: one", "a; b")),
    ],
)
def test_the_application_service(tried: Tried, verdict: Verdict, said: tuple[str, ...]) -> None:
    """Each part that does not work is named; that nobody answers where no daemon runs is no defect."""
    check(judge_service(tried), verdict, *said)


@pytest.mark.parametrize(
    ("asked", "needed", "verdict", "said"),
    [
        (Asked(), True, OK, "is refused by the homeserver itself"),
        (Asked("no connection"), True, PROBLEM, "/get_token"),
        (Asked("no connection"), False, WARNING, "matrixrtc.enabled is false"),
        (Asked("it leads to an address that must not be reached (private)"), True, PROBLEM, "allow_private_addresses"),
        (Asked(believed=True), True, PROBLEM, "made up"),
    ],
)
def test_federation(asked: Asked, needed: bool, verdict: Verdict, said: str) -> None:
    """A made-up token has to be refused, by the homeserver."""
    check(judge_federation(asked, needed=needed), verdict, said)


URL = "https://sfu.example.org/livekit/jwt"
GONE = Focus(URL, Answers.NONE, "no connection")


@pytest.mark.parametrize(
    ("seen", "daemon", "standalone", "verdict", "said"),
    [
        (WellKnown(foci=[Focus(URL, Answers.OURS)]), True, True, OK, "where a sfu-delegate answers"),
        (WellKnown(foci=[Focus(URL, Answers.OURS)], cross_origin=False), True, True, WARNING, "Access-Control-Allow-Origin"),
        (WellKnown("404"), True, True, WARNING, "404"),
        (WellKnown("it leads to an address that must not be reached (private)"), True, True, WARNING, "allow_private_addresses"),
        (WellKnown(), True, True, WARNING, "rtc_foci"),
        (WellKnown(), True, False, OK, "endpoints are off"),
        (WellKnown(foci=[GONE]), False, True, SKIPPED, "does not run"),
        (WellKnown(foci=[GONE]), True, True, WARNING, "no connection"),
        (WellKnown(foci=[Focus(URL, Answers.ELSE, "it answers 404")]), False, True, WARNING, "it answers 404"),
        (WellKnown(foci=[Focus(URL, Answers.OURS), GONE]), True, True, WARNING, "1 other one is a sfu-delegate"),
    ],
)
def test_what_clients_find(seen: WellKnown, daemon: bool, standalone: bool, verdict: Verdict, said: str) -> None:
    """The homeserver's `.well-known` leads to a sfu-delegate, and pages may read it."""
    check(judge_well_known(seen, daemon=daemon, standalone=standalone), verdict, said)


# ── SFUs ──


@pytest.mark.parametrize(
    ("keys", "verdict", "said"),
    [
        ((KeyTried("one"),), OK, ("takes the key one",)),
        ((KeyTried("one"), KeyTried("two")), OK, ("takes the keys one and two",)),
        ((KeyTried("one"), KeyTried("two", Trouble.REFUSED, "no")), WARNING, ("takes key one, but not two",)),
        (
            (KeyTried("one", Trouble.REFUSED, "It does not take our token."), KeyTried("two")),
            PROBLEM,
            ("take our token", "to the letter"),
        ),
        ((KeyTried("one", Trouble.CONNECTION, "The SFU could not be connected to."),), PROBLEM, ("could not be connected to", "sfus.*.url")),
    ],
)
def test_the_sfu_answers(keys: tuple[KeyTried, ...], verdict: Verdict, said: tuple[str, ...]) -> None:
    """And takes the keys: first that by which the daemon asks."""
    check(judge_answers(keys, 0.01), verdict, *said)


def test_every_trouble_of_an_sfu_has_a_remedy() -> None:
    """Whatever it is."""
    for trouble in Trouble:
        check(judge_answers([KeyTried("one", trouble, "It is so.")], 0.01), PROBLEM, "It is so →")


def heard(started: float | None = 0.01, finished: float | None = 0.02, sfu: str = "main", **more: object) -> Heard:
    webhooks = {event: Came(after, sfu) for event, after in (("room_started", started), ("room_finished", finished)) if after is not None}
    return Heard("main", 9.0, webhooks=webhooks, **{"by_daemon": True, **more})  # type: ignore[arg-type]


NOTHING = {"started": None, "finished": None}
LIVEKIT = "webhook:\n  api_key: APIone\n  urls:\n    - http://10.0.0.7:8080/webhooks/livekit"


@pytest.mark.parametrize(
    ("seen", "verdict", "said"),
    [
        (heard(), OK, ("came to the daemon within 20 ms",)),
        (heard(by_daemon=False), OK, ("came to 10.0.0.7:8080 (where this command listened)",)),
        (heard(finished=7.2), WARNING, ("late: after 7.2 s",)),
        (heard(finished=None), WARNING, ("room_started came", "room_finished did not")),
        (heard(started=None), WARNING, ("room_finished came", "room_started did not")),
        (heard(sfu="other"), PROBLEM, ("signed with a key of sfus.other", "a key of sfus.main")),
        (heard(**NOTHING), PROBLEM, ("neither room_started nor room_finished came within 9 s", LIVEKIT)),  # type: ignore[arg-type]
        (heard(**NOTHING, others=2), WARNING, ("2 other instances", "run this there")),  # type: ignore[arg-type]
        (heard(**NOTHING, misdirected="/hook"), PROBLEM, ("they come to the path '/hook'", LIVEKIT)),  # type: ignore[arg-type]
        (heard(**NOTHING, refused={"unknown_key": 2}), PROBLEM, ("2 webhooks (unknown_key)", "not one of sfus.*.keys", LIVEKIT)),  # type: ignore[arg-type]
        (heard(**NOTHING, refused={"bad_signature": 1}), PROBLEM, ("1 webhook (bad_signature)", "its secret another one")),  # type: ignore[arg-type]
        (heard(**NOTHING, refused={"expired": 2}), PROBLEM, ("the clocks differ", "synchronise")),  # type: ignore[arg-type]
        (heard(**NOTHING, refused={"missing": 2}, by_daemon=False), PROBLEM, ("refused (401): 2 webhooks", "Authorization header")),  # type: ignore[arg-type]
        (heard(refused={"unknown_key": 2}), OK, ("came to the daemon",)),
        (heard(untold="it does not say"), SKIPPED, ("it does not say", LIVEKIT)),
    ],
)
def test_webhooks(seen: Heard, verdict: Verdict, said: tuple[str, ...]) -> None:
    """Never came, came with another key, to another path, too late, only one of two: each is something else to mend."""
    check(judge_webhooks(seen, Wanted("APIone", "http://10.0.0.7:8080/webhooks/livekit")), verdict, *said)


# ── clocks ──


def test_a_date_has_whole_seconds() -> None:
    """What a server's clock differs by is known to a second, and to the time that the answer took."""
    assert offset(None, 100.0, 100.1) is None
    assert offset(100.0, 100.4, 100.5) == Offset(-0.5, 100.0 + 1.0 - 100.4)
    assert Offset(-0.5, 0.6).surely == 0.0
    assert Offset(9.5, 10.6).surely == 9.5
    assert Offset(-10.6, -9.5).surely == -9.5


@pytest.mark.parametrize(
    ("seen", "whose", "verdict", "said"),
    [
        (Offset(-0.5, 0.6), "SFU", OK, "agrees"),
        (Offset(3.0, 4.1), "SFU", OK, "by 3 s"),
        (Offset(20.0, 21.1), "SFU", WARNING, "20 s ahead"),
        (Offset(-91.1, -90.0), "SFU", PROBLEM, "1 min 30 s behind"),
        (Offset(90.0, 91.1), "homeserver", WARNING, "restarted more often"),
        (None, "SFU", SKIPPED, "no Date"),
    ],
)
def test_a_servers_clock(seen: Offset | None, whose: str, verdict: Verdict, said: str) -> None:
    """Signatures tolerate a minute."""
    check(judge_clock(seen, whose), verdict, said)


@pytest.mark.parametrize(
    ("seen", "verdict", "said"),
    [
        ({"A": Offset(-0.5, 0.6), "B": Offset(-0.5, 0.6)}, OK, "agrees with those of A and B"),
        (
            {"A": Offset(90.0, 91.0), "B": Offset(100.0, 101.0)},
            PROBLEM,
            "all that were asked (A and B) are at least 1 min 30 s ahead",
        ),
        ({"A": Offset(-11.0, -10.0), "B": Offset(-12.0, -11.0)}, WARNING, "behind this machine"),
        ({"A": Offset(90.0, 91.0), "B": Offset(-0.5, 0.6)}, WARNING, "differs from that of A, and agrees with that of B"),
        ({"A": Offset(90.0, 91.0), "B": Offset(-91.0, -90.0)}, WARNING, "differs from that of A and B"),
        ({"A": Offset(90.0, 91.0), "B": None}, WARNING, "differs from that of A"),
        ({"A": None}, SKIPPED, "no server that was asked"),
    ],
)
def test_this_machines_clock(seen: dict[str, Offset | None], verdict: Verdict, said: str) -> None:
    """Wrong where all others say so."""
    check(judge_own_clock(seen), verdict, said)


# ── the database ──


@pytest.mark.parametrize(
    ("speed", "verdict", "said"),
    [
        (Speed(0.0004, 0.002, 20, "a write"), OK, "a write takes 0.4 ms (median of 20; worst 2.0 ms)"),
        (Speed(0.04, 0.2, 20, "a write"), WARNING, "40 ms"),
        (Speed(0.4, 0.9, 4, "a write"), PROBLEM, "in time"),
        (Speed(0.0, 0.0, 0, "a write", trouble="it is read-only", remedy="mend it"), PROBLEM, "it is read-only → mend it"),
    ],
)
def test_the_speed_of_the_disk(speed: Speed, verdict: Verdict, said: str) -> None:
    """Every webhook waits for a write."""
    check(judge_speed(speed), verdict, said)


@pytest.mark.parametrize(
    ("inside", "verdict", "said"),
    [
        (Inside(False), OK, "first start"),
        (Inside(True, revision="0004"), OK, "that of this program"),
        (Inside(True, revision="0002"), OK, "brings it to 0004"),
        (Inside(True, revision="0009", oldest="0004"), WARNING, "newer program"),
        (Inside(True, revision="0009", oldest="0008"), PROBLEM, "does not know"),
        (Inside(True, server="16.2", revision="0004"), OK, "PostgreSQL 16.2"),
    ],
)
def test_the_version_of_the_schema(inside: Inside, verdict: Verdict, said: str) -> None:
    """Made by this program, an older or a newer one."""
    check(judge_version(inside, "0004", ["0001", "0002", "0003", "0004"]), verdict, said)


@pytest.mark.parametrize(
    ("free", "verdict", "said"), [(50e9, OK, "50 GB of 100 GB"), (5e8, WARNING, "500 MB"), (1e6, PROBLEM, "1 MB"), (None, OK, "cannot be seen")]
)
def test_space(free: float | None, verdict: Verdict, said: str) -> None:
    """A full disk keeps nothing."""
    check(judge_space(4096, free, 100e9, ""), verdict, said)


@pytest.mark.parametrize(
    ("inside", "verdict", "said"),
    [
        (Inside(True, connections=10, most_connections=97), OK, "10 of 97"),
        (Inside(True, connections=92, most_connections=97, others=2), WARNING, "2 are alive"),
        (Inside(True, connections=96, most_connections=97), PROBLEM, "max_connections"),
        (Inside(True, connections=10, most_connections=97, written=False), PROBLEM, "may not write"),
    ],
)
def test_connections(inside: Inside, verdict: Verdict, said: str) -> None:
    """Each instance needs some."""
    check(judge_connections(inside, 3), verdict, said)


@pytest.mark.parametrize(
    ("keys", "inside", "verdict", "said"),
    [
        (Keys("x.key"), Inside(False), OK, "there is none yet"),
        (Keys("x.key", ("aa",)), Inside(True, keys="aa"), OK, "with which the database was written"),
        (Keys("x.key", ("bb", "aa")), Inside(True, keys="aa"), OK, "2 usable keys"),
        (Keys("x.key", ("bb",)), Inside(True, keys="aa"), PROBLEM, "another one"),
        (Keys("x.key"), Inside(True, keys="aa", tokens=2), PROBLEM, "2 tokens in it cannot be opened"),
        (Keys("x.key", ("aa",)), None, OK, "was not looked at"),
        (Keys("x.key", trouble="it holds no key", remedy="restore it"), Inside(False), PROBLEM, "it holds no key → restore it"),
    ],
)
def test_the_encryption_keys(keys: Keys, inside: Inside | None, verdict: Verdict, said: str) -> None:
    """They can be used, and are those of this database."""
    check(judge_keys(keys, inside), verdict, said)


# ── this machine ──


def test_the_configuration() -> None:
    """Its problems, or else its risks, each with its key; who may read files is told elsewhere."""
    wrong, risky = Problem("listen.port", "x", "is no number", "write one", "line 3"), Problem("log.level", "debug", "is slow", "info")
    readable = Problem("", "/etc/x.yaml", "every user of this machine may read this secret", "chmod o= /etc/x.yaml")
    check(judge_config([wrong], [risky]), PROBLEM, "listen.port (line 3): is no number → write one")
    check(judge_config([], [risky, readable]), WARNING, "log.level: is slow → info")
    check(judge_config([], [readable]), OK)
    check(judge_config([wrong, wrong], []), PROBLEM, "listen.port: write one")


def test_who_may_read_secrets() -> None:
    """Files that every user may read, or write, are named."""
    check(judge_files([]), OK, "none yet")
    check(judge_files([SecretFile("/a", 0o640), SecretFile("/b", 0o600)]), OK, "2 files")
    check(judge_files([SecretFile("/a", 0o644), SecretFile("/b", 0o600)]), WARNING, "/a: every user of this machine may read it", "chmod o= /a;")
    check(judge_files([SecretFile("/a", 0o666)]), WARNING, "may read and write it")
    check(judge_files([SecretFile("/a", None)]), SKIPPED, "run this as root")


READY = {"status": "ok", "phase": "running", "database": "ok", "homeservers": {"example.org": "ok"}, "sfus": {"main": "not asked yet"}}


@pytest.mark.parametrize(
    ("seen", "verdict", "said"),
    [
        (Seen(Daemon.NONE), SKIPPED, "no daemon runs"),
        (Seen(Daemon.HIDDEN, trouble="No daemon listens", signs=["somebody holds x.lock"]), PROBLEM, "somebody holds x.lock"),
        (Seen(Daemon.RUNS, "http://127.0.0.1:8081", status=200, ready=READY), OK, "is ready"),
        (Seen(Daemon.RUNS, "x", status=200, ready=READY | {"sfus": {"main": "it is down"}}), WARNING, "SFU main: it is down"),
        (Seen(Daemon.RUNS, "x", status=503, ready=READY | {"database": "the disk is full"}), PROBLEM, "database: the disk is full"),
        (Seen(Daemon.RUNS, "x", status=503, ready=READY | {"phase": "stopping"}), PROBLEM, "stopping"),
    ],
)
def test_the_daemon(seen: Seen, verdict: Verdict, said: str) -> None:
    """Not running is no problem before the first start; not being asked is one."""
    check(judge_daemon(seen), verdict, said)


@pytest.mark.parametrize(
    ("port", "daemon", "verdict", "said"),
    [
        (Port.OURS, Daemon.RUNS, OK, "answers"),
        (Port.OURS, Daemon.NONE, WARNING, "none was found"),
        (Port.FREE, Daemon.NONE, OK, "is free"),
        (Port.FREE, Daemon.RUNS, PROBLEM, "nothing listens"),
        (Port.TAKEN, Daemon.NONE, PROBLEM, "another program holds 127.0.0.1:8080: it answers 404"),
        (Port.FORBIDDEN, Daemon.NONE, PROBLEM, "CAP_NET_BIND_SERVICE"),
    ],
)
def test_the_public_listener(port: Port, daemon: Daemon, verdict: Verdict, said: str) -> None:
    """Ours, free, or somebody else's."""
    check(judge_public(Public("127.0.0.1:8080", port, "it answers 404"), daemon), verdict, said)


# ── all of it ──


def test_the_worst_one_counts() -> None:
    """A problem is 1, anything else 0."""

    def report(*verdicts: Verdict) -> Report:
        return Report("x.yaml", [Result("one", "", Finding(verdict, ""), 0.0) for verdict in verdicts], 1.0)

    assert (report(OK, SKIPPED).verdict, report(OK, SKIPPED).exit_code) == (OK, 0)
    assert (report(OK, WARNING).verdict, report(OK, WARNING).exit_code) == (WARNING, 0)
    assert (report(PROBLEM, WARNING).verdict, report(PROBLEM, WARNING).exit_code) == (PROBLEM, 1)
