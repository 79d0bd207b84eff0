"""The benchmarks' pure parts, and one scenario with a handful of webhooks through the real daemon. Nothing here says how long anything takes."""

import json
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import asdict
from getpass import getuser
from pathlib import Path
from typing import Any

import pytest
from benchmarks import machine, report, scaling, scaling_report, scaling_steps, scenarios, wire
from benchmarks.__main__ import NAMES, arguments, chosen
from benchmarks.figures import FIGURES, GOALS, Need, Run, difference, figure_of, percentile, remarks, scale, slope, spread, summaries, verdict
from benchmarks.limits import Limits, Work
from benchmarks.machine import Cores, Span
from benchmarks.process import Metrics
from benchmarks.rows import IN_A_ROOM, PRESENCE, Filling, scattered
from benchmarks.scaling_instances import Idle, Lives, Load
from benchmarks.scaling_rows import PostgresFilling
from benchmarks.scaling_server import new_database
from benchmarks.scaling_steps import Beside, Clockwork, Cost, StepSizes
from benchmarks.scaling_storage import Dead, Life, Unvacuumed, Vacuum, Wear
from benchmarks.scenarios import QUICK, Bench, Sizes
from benchmarks.wire import Asked, Given
from benchmarks.world import Failed, Ports, World, configuration
from sfu_delegate.config import from_mapping

from tests import postgresql
from tests.integration.certificates import Certificates

LIMITS = Limits(handler=80.0, handler_wide=60.0, request=30.0, commit=90.0, commit_wall=250.0, commit_wall_p99=900.0)


def run(values: Mapping[str, float], handler: float = 80.0, **more: Any) -> Run:
    """A run with a bare handler of so many microseconds."""
    return Run(dict(values), {**asdict(LIMITS), "handler": handler, "handler_wide": handler}, **more)


# ── figures ──


@pytest.mark.parametrize(("part", "value"), [(0.0, 1.0), (0.5, 3.0), (0.99, 5.0), (1.0, 5.0)])
def test_percentile(part: float, value: float) -> None:
    """The nearest rank, whatever the order."""
    assert percentile([5.0, 1.0, 4.0, 2.0, 3.0], part) == value


def test_percentile_of_nothing() -> None:
    """There is none."""
    with pytest.raises(ValueError, match="no value"):
        percentile([], 0.5)


def test_slope() -> None:
    """A line comes out as it went in."""
    each, none = slope([(10.0, 25.0), (20.0, 45.0), (40.0, 85.0)])
    assert each == pytest.approx(2.0)
    assert none == pytest.approx(5.0)


def test_spread() -> None:
    """From the least to the most, by the median; nothing spreads around nothing."""
    assert spread([90.0, 100.0, 120.0]) == pytest.approx(0.3)
    assert spread([0.0, 0.0]) == 0.0


def test_every_goal_is_of_a_figure() -> None:
    """And beyond it lies something better."""
    assert set(GOALS) <= set(FIGURES)
    assert all(goal.beyond < goal.goal for goal in GOALS.values())


def test_figure_by_rows() -> None:
    """The number of rows stands in the title, and a figure that there is not is an error."""
    assert figure_of("start.after.100000").title.endswith("100,000 rows")
    assert figure_of("noise.cpu").unit == "µs"
    with pytest.raises(KeyError):
        figure_of("noise.speed")


@pytest.mark.parametrize(
    ("value", "words"),
    [(60.0, "met"), (60.1, "missed by 0 %"), (90.0, "missed by 50 %"), (15.0, "beyond"), (15.1, "met")],
)
def test_verdict(value: float, words: str) -> None:
    """The noise's goal is 60 µs, and 15 is beyond it."""
    assert verdict("noise.cpu", value, 1.0).words == words


def test_goals_are_scaled_but_memory() -> None:
    """On a machine of half the speed everything may take twice as long, and nothing may be twice as large."""
    slow = verdict("noise.cpu", 100.0, 2.0)
    assert (slow.goal, slow.beyond, slow.words) == (120.0, 30.0, "met")
    assert verdict("memory.slope", 1500.0, 2.0).words == "missed by 50 %"


def test_scale_is_by_the_bare_handler_over_many_connections() -> None:
    """40 µs is the reference machine; of several runs the middle one counts."""
    runs = [run({}, handler=handler) for handler in (40.0, 60.0, 400.0)]
    assert scale(runs) == 1.5


def test_summary() -> None:
    """Each run's value is compared with that run's own bare handler."""
    runs = [run({"noise.cpu": value}, handler, needs={"noise.cpu": Need("handler", handler)}) for value, handler in ((90, 60), (100, 100), (60, 30))]
    (summary,) = summaries(runs)
    assert summary.median == 90
    assert summary.ratios == (1.5, 1.0, 2.0)
    assert summary.handlers == 1.5
    assert summary.needs == 1.5


def test_latency_is_so_many_handlers() -> None:
    """Whatever its unit."""
    (summary,) = summaries([run({"one_room.p50": 0.8})])
    assert summary.handlers == pytest.approx(10.0)


def test_ratio_of_what_speed_does_not_change() -> None:
    """Memory is compared as it is, and what a faster machine has more of the other way round."""
    by_name = {summary.name: summary for summary in summaries([run({"memory.slope": 900.0, "accept.per_second": 1000.0})])}
    assert by_name["memory.slope"].ratios == (900.0,)
    assert by_name["memory.slope"].handlers is None
    assert by_name["accept.per_second"].ratios == (80_000.0,)


def test_remarks() -> None:
    """Of how many runs one of the spans was disturbed."""
    quiet, loud = {"a": {"noisy": False, "driver_bound": False}}, {"a": {"noisy": False}, "b": {"noisy": True}}
    assert remarks([run({}, spans=quiet)]) == ()
    assert remarks([run({}, spans=quiet), run({}, spans=loud)]) == ("noisy in 1 of 2 runs",)


def test_span_judges_itself() -> None:
    """By the driver's core, and by what others used."""
    assert Span(1.0, 0.5, driver_share=0.95).driver_bound
    assert Span(1.0, 0.5, other_share=0.3).noisy
    assert not Span(1.0, 0.5, driver_share=0.5, other_share=0.1).noisy


@pytest.mark.parametrize(
    ("now", "then", "marked"),
    [
        ([1.0, 1.1, 1.2], [1.0, 1.1, 1.15], False),
        ([2.0, 2.1, 2.2], [1.0, 1.1, 1.2], True),
        ([1.0, 2.0, 3.0], [1.0, 1.1, 1.2], False),  # it changes from run to run by as much
        ([1.5, 1.5, 1.5], [0.5, 1.0, 1.6], False),  # … or did
        ([0.5, 0.5], [1.0, 1.0], True),
        ([2.0], [1.0], False),  # one run has no spread
    ],
)
def test_difference(now: list[float], then: list[float], marked: bool) -> None:
    """Marked is what changed by more than the runs of either report differ among themselves."""
    assert difference("noise.cpu", now, then).marked is marked


def test_difference_from_nothing() -> None:
    """What was 0 and is 0 has not changed."""
    assert difference("steady.expired", [0.0, 0.0], [0.0, 0.0]).change == 0.0


# ── reports ──


def a_report(**values: float) -> dict[str, Any]:
    """A report with two runs of `noise` and one of `idle`."""
    idle = {name: {"seconds": 60.0, "sfu_calls": 10, "restarts": 4, "commits": 9} for name in ("rarest_looks", "default_looks")}
    runs = {
        "noise": [run({"noise.cpu": value}, needs={"noise.cpu": Need("handler", 80.0)}) for value in (70.0, 74.0)],
        "rows.1000": [run({"rows.idle.join.1000": values.get("join", 300.0)})],
        "idle": [run({"idle.looks": 0.0004}, raw=idle)],
        "join": [],
    }
    about = {"cpu": "a processor", "packages": {"uvloop": "1"}, "pinned": True, "file_system": "ext4"}
    return report.document(about, {"runs": 2}, runs, {"join": "5 of 10 webhooks were refused"})


def test_report_survives_json() -> None:
    """What is written is what is read when reports are compared."""
    written = a_report()
    read = report.runs_of(json.loads(json.dumps(written)))
    assert report.document(written["machine"], written["options"], read, written["failures"]) == written


def test_report_of_another_format() -> None:
    """It is refused before anything is measured."""
    with pytest.raises(ValueError, match="format"):
        report.runs_of({"format": 0})


def test_markdown() -> None:
    """Figures with their spread and their multiples, goals, failures, and why there are no plots."""
    text = report.markdown(a_report(), [])
    assert "| noise.cpu: webhook that concerns nobody: CPU | 72.0 µs | 70.0–74.0 | 0.90 | 0.90 × (handler) |  |" in text
    assert "| noise.cpu: webhook that concerns nobody: CPU | 72.0 µs | 120.0 | 30.0 | met |" in text
    assert "- **join**: 5 of 10 webhooks were refused" in text
    assert "matplotlib is not installed" in text
    assert "joined, 1,000 other rows: CPU" in text
    assert "| default_looks | 60 | 10 | 4 | 9 |" in text


def test_markdown_says_under_which_conditions() -> None:
    """Without a second core, or with databases in memory, figures mean something else."""
    usual = report.markdown(a_report(), [])
    assert "a core of its own" in usual
    assert "in memory" not in usual
    other = a_report()
    other["machine"] |= {"pinned": False, "file_system": "tmpfs"}
    text = report.markdown(other, [])
    assert "nothing is pinned" in text
    assert "Databases are in memory" in text


def test_markdown_with_plots_and_comparison() -> None:
    """Plots are linked, and every figure that both reports have is compared."""
    text = report.markdown(a_report(), [("Costs", "costs.svg")], a_report(join=200.0))
    assert "![Costs](costs.svg)" in text
    assert "| rows.idle.join.1000 | 3.75 | 2.5 | +50.0 % |  |" in text


def test_every_line_of_a_table_has_as_many_cells() -> None:
    """Else it would not be a table."""
    for part in report.markdown(a_report(), [], a_report()).split("\n\n"):
        if part.startswith("| "):
            assert len({line.count("|") for line in part.splitlines()}) == 1


def test_small_numbers_do_not_vanish() -> None:
    """What would be 0.00 is shown with the digits that it has."""
    assert report.number(0.00042, 2) == "0.00042"
    assert report.number(0.0, 2) == "0.00"
    assert report.number(12345.6, 0) == "12,346"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("The database /home/alice/x.db failed: disk full.", "The database … failed: disk full."),
        ("not within 60 s: 5 events are sent", "not within 60 s: 5 events are sent"),
        ("answered 404 at http://127.0.0.1:80/x", "answered 404 at http://127.0.0.1:80/x"),
        ("2/s", "2/s"),
    ],
)
def test_without_paths(text: str, told: str) -> None:
    """A report may be shown to anybody."""
    assert report.without_paths(text) == told


# ── the machine ──


def test_description_names_nobody(tmp_path: Path) -> None:
    """No host name, no user name, no path."""
    described = machine.describe(tmp_path, Cores(0, 1))
    text = json.dumps(described)
    for name in (socket.gethostname(), getuser()):
        assert not re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w.-])", text)
    assert not re.search(r'"/|/(home|root|tmp|work|Users)/', text)
    assert str(tmp_path) not in text
    assert {"cpu", "cores", "kernel", "python", "sqlite", "openssl", "packages", "file_system", "load_before"} <= set(described)


def test_file_system() -> None:
    """The mount that a directory is on, not one above it."""
    assert machine.file_system(Path("/proc/self")) == "proc"


def test_processor_time_of_this_process() -> None:
    """It grows with work."""
    before = machine.cpu_of(os.getpid())
    sum(range(2_000_000))
    assert machine.cpu_of(os.getpid()) > before
    assert machine.rss_of(os.getpid()) > 1_000_000


# ── the command ──


def test_quick_leaves_out_what_takes_long() -> None:
    """Unless it is asked for."""
    quick = chosen(arguments().parse_args(["--quick"]), QUICK)
    assert {"noise", "steady"} <= set(quick)
    assert not {name.partition(".")[0] for name in quick} & {"rows", "idle", "start"}
    rows = chosen(arguments().parse_args(["--quick", "--only", "rows"]), QUICK)
    assert list(rows) == [f"rows.{count}" for count in QUICK.rows]


def test_all_scenarios_are_run_by_default() -> None:
    """Each has a sentence that says what it does."""
    every = chosen(arguments().parse_args([]), Sizes())
    assert {name.partition(".")[0] for name in every} == set(NAMES)
    assert all(scenario.__doc__ for scenario in every.values())


def test_unknown_scenario(capsys: pytest.CaptureFixture[str]) -> None:
    """The ones that there are, are named."""
    with pytest.raises(SystemExit):
        arguments().parse_args(["--only", "everything"])
    assert "many_rooms" in capsys.readouterr().err


def test_metrics_are_summed() -> None:
    """By name, and by what stands in the labels."""
    metrics = Metrics('# HELP a x\na{s="1",p="c"} 2\na{s="2",p="c"} 3\nab 7\nsfu_delegate_batch_inputs_count 12.0\n')
    assert metrics.sum("a") == 5
    assert metrics.sum("a", 's="2"') == 3
    assert metrics.commits == 12


# ── the wire ──


def test_request_and_answer() -> None:
    """Both are what the other side reads."""
    raw = wire.request("POST", "/x", "127.0.0.1:1", {"Authorization": "Bearer abc"}, b"{}")
    assert raw == b"POST /x HTTP/1.1\r\nHost: 127.0.0.1:1\r\nAuthorization: Bearer abc\r\nContent-Length: 2\r\n\r\n{}"
    assert Asked("POST", "/x", raw, b"{}").token == "abc"
    assert Asked("POST", "/x", b"POST /x HTTP/1.1\r\n", b"").token is None
    assert wire.rendered(Given(404, {"A": "b"}, b"no")) == b"HTTP/1.1 404 Not Found\r\nA: b\r\nContent-Length: 2\r\n\r\nno"


# ── the other side ──


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A world that does not listen."""
    return World(Ports(1, 2, 3), Certificates(tmp_path))


def listed(world: World, room: str) -> list[str]:
    """Whom the SFU lists."""
    return [entry["identity"] for entry in world.sfu.look(room, world.now()).json()["participants"]]


def test_lists_do_not_tell_what_webhooks_are_to_tell(world: World) -> None:
    """Who joins is listed when the webhook is sent, and who leaves is listed until then."""
    people = world.populate(2, 2)
    (room,) = {person.room for person in people}
    joined = world.joined(people, 80)
    assert listed(world, room) == []
    world.appear(people[0])
    assert listed(world, room) == [people[0].identity]
    world.appear(people[1])
    left = world.left(people, 80)
    assert sorted(listed(world, room)) == sorted(person.identity for person in people)
    world.vanish(people)
    assert listed(world, room) == []
    assert (joined.people, left.people) == (people, people)


def test_webhooks_of_a_room_are_in_one_lane_in_their_order(world: World) -> None:
    """However many rooms share a connection."""
    people = world.populate(100, 2)
    joined = world.joined(people, 80)
    assert len(joined.lanes) == 50
    shared = joined.shared()
    assert len(shared.lanes) == 32
    for made in (joined, shared):
        assert sorted(number for lane in made.lanes for number in lane) == list(range(100))
        for lane in made.lanes:
            told = [made.people[number] for number in lane]
            for room in {person.room for person in told}:
                assert [person for person in told if person.room == room] == [person for person in people if person.room == room]
    for person, raw in zip(joined.people, joined.requests, strict=True):
        assert b'"participant_joined"' in raw
        assert person.identity.encode() in raw


def test_a_world_with_the_same_seed_is_the_same(tmp_path: Path) -> None:
    """So that a database that was filled once fits all runs."""
    certificates = Certificates(tmp_path)
    one, other = (scattered(World(Ports(1, 2, 3), certificates), 1000, 100) for _ in range(2))
    assert one.delay_ids == other.delay_ids
    assert one.room_sids == other.room_sids
    assert len(one.delay_ids) == 100


def test_filled_rooms_list_whom_the_database_has() -> None:
    """All of a room but those who are expected; nobody answers for other rooms."""
    filling = Filling(25, "hs.test", 1000.0, delay=3600.0, calm=0.0, expected=frozenset({3}))
    room = filling.person(3).room
    there = filling.residents(room)
    assert there is not None
    assert [entry["identity"] for entry in there] == [filling.person(number).identity for number in range(IN_A_ROOM) if number != 3]
    last = filling.residents(filling.person(24).room)
    assert last is not None
    assert len(last) == 5
    assert filling.residents("elsewhere") is None


def test_countdowns_are_spread_over_a_cycle() -> None:
    """Restarts are due at any time, and none of the countdowns has run out by then."""
    filling = Filling(1000, "hs.test", 1000.0, delay=100.0, calm=0.0)
    dues = []
    for number in range(1000):
        since, due = filling.countdown(number)
        assert since <= filling.at <= due < since + filling.delay
        dues.append(due)
    assert max(dues) - min(dues) > 60


@pytest.mark.parametrize("more", [{}, scenarios.BELIEVED, {"presence": PRESENCE, "delegations": {"max_per_homeserver": 5}}])
def test_configurations_are_valid(world: World, tmp_path: Path, more: Mapping[str, Any]) -> None:
    """The daemon takes them, and keeps what is common to all."""
    config = from_mapping(configuration(world, tmp_path / "x.db", 8080, 8081, more, True))
    assert config.delegations.min_delay == 5.0
    assert config.homeservers[0].rate_limited is False


async def test_what_does_not_arrive_is_a_failure(world: World) -> None:
    """With a sentence that says what was waited for."""
    with pytest.raises(Failed, match="not within 0 s: 5 events are sent"):
        await world.until(lambda: False, 0.0, "5 events are sent")


async def test_defect_of_the_other_side_is_not_the_daemons(world: World) -> None:
    """It is raised where somebody waits, and not taken for an answer that is missing."""
    broken = world.guarded(lambda _: Given(200, {}, bytes(int("no number"))))
    assert broken(Asked("GET", "/", b"", b"")).status == 500
    with pytest.raises(ValueError, match="no number"):
        await world.until(lambda: False, 10.0, "anything")


# ── all of it ──


async def test_noise_through_the_real_daemon(tmp_path: Path) -> None:
    """A few webhooks, everybody's delegations, and the leaves that show that the daemon was listening."""

    async def beside(work: Work, *_: object) -> Limits:
        assert len(work.requests) == 20
        return LIMITS

    sizes = Sizes(noise=20, noise_people=5, quiet=0.1)
    bench = Bench(sizes, Cores(None, None), tmp_path, tmp_path, Certificates(tmp_path), beside=beside)
    done = await scenarios.noise(bench)
    assert done.values["noise.cpu"] > 0
    assert done.raw["webhooks"] == 20
    assert set(done.spans) == {"webhooks"}
    assert report.line("noise", done).startswith("noise: cpu ")


# ── scaling ──

COST = Cost(100, 2.0, 9.0, 80.0, 120.0, 3.0, 4200.0, 0.4, 0.03, 2.0, 0.5)
DEAD = Dead(20_000, 3.0, 80.0, 210.0, 4200.0)
LOAD = Load(
    2,
    100,
    0.5,
    200.0,
    90.0,
    2.0,
    60.0,
    3300.0,
    0.1,
    0.05,
    16.0,
    dict.fromkeys(("daemons", "PostgreSQL", "driver", "others"), 0.5),
    (3, 9),
    (5, 12),
    "",
)


def a_scaling_report() -> dict[str, Any]:
    """One part of each name."""
    beside = asdict(Beside(0.5, 300.0, 250.0, 160.0, 1200.0, 900.0))
    rows = {
        "steps": {
            f"{kind}.{how}": asdict(COST) for kind in scaling_report.KINDS for how in ("alone", "together") if (kind, how) != ("backlog", "alone")
        },
        "sizes": {"delayed_event": 640_000_000, "pk_delayed_event": 22_000_000, "history": 180_000_000, "meta": 8192},
        "idle": asdict(Idle(1.5, 0.9, 0.7, 100 << 20, 101 << 20, 0.002, 0.001, 0.0, 300.0)),
        "beside": beside,
        "compressed": {"off": asdict(COST), "on": asdict(COST)},
        "unvacuumed": asdict(Unvacuumed([DEAD], [Vacuum(20_000, 0.5, 2e6, 0.3)], [DEAD])),
    }
    wear, life = Wear(80, 0.02, 100_000, 640, 650, 520, 560, 0.98, 2300.0, 300.0, 120.0, 30.0, 12, 9.0), Life(80, 0.78, 640, 600, 5500.0, 270.0)
    parts: dict[str, Any] = {
        "rows.1000000": rows,
        "homeservers.1000": {"rows": 50_000, "beside": beside},
        "storage": {"rows": 20_000, "wear": [asdict(wear)], "lives": [asdict(life)], "others": 0.5},
        "instances.2": {"loads": {kind: asdict(LOAD) for kind in scaling_report.LOADS}, "lives": asdict(Lives(6.0, {"history": 600.0}))},
    }
    about = {"cpu": "a processor", "packages": {"uvloop": "1"}}
    return {"format": scaling_report.FORMAT, "machine": about, "options": {"quick": False}, "parts": parts, "failures": {"instances.3": "no"}}


def test_scaling_tables() -> None:
    """All of them are made of what is written as JSON, and in each all lines have as many cells."""
    told = json.loads(json.dumps(a_scaling_report()))
    tables = scaling_report.tables(told)
    assert set(tables) == set(scaling_report.TABLES)
    for text in tables.values():
        assert len({line.count("|") for line in text.splitlines()}) == 1
    assert "| `participant_left`, with its send | 2 | 200 | 5 / 12 |" in tables["instances"]
    assert "| `delayed_event` | 640 | 0 |" in tables["sizes"]
    assert "meta" not in tables["sizes"]
    text = scaling_report.markdown(told)
    assert "Others used 0.50 cores meanwhile: storage." in text
    assert "**instances.3 failed**: no" in text


def test_scaling_page_has_a_place_for_each_table() -> None:
    """And what was not measured stays as it is there."""
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
    assert set(scaling_report.names_in(page)) == set(scaling_report.TABLES)
    told = a_scaling_report()
    filled = scaling_report.filled(page, told)
    assert scaling_report.tables(told)["wear"] in filled
    assert scaling_report.filled(filled, told | {"parts": {}, "machine": {}}) == filled


def test_all_parts_of_scaling_are_run_by_default() -> None:
    """Each has a sentence that says what it does; PostgreSQL's own settings are among those that are compared."""
    parts = scaling.all_of(scaling.Sizes())
    assert {name.partition(".")[0] for name in parts} == set(scaling.NAMES)
    assert all(part.__doc__ for part in parts.values())
    assert scaling.Sizes().storage[0] == (100, 0.2)


@pytest.mark.slow
def test_steps_on_postgresql() -> None:
    """A handful of people delegate, join and leave, and others are restarted; each kind costs something, and is in the table."""
    sizes = StepSizes(alone=2, batch=2, together=4, restarts_alone=1, restarts=2, backlog=2, news=1, census=1)
    alone, together = scaling_steps.scattered_people(40, sizes)
    filling = PostgresFilling(40, "hs.test", 1_800_000_000.0, 600.0, 60.0, frozenset([*alone, *together]))
    with new_database(postgresql.shared()) as database:
        filling.fill_database(database)
        clock = Clockwork(database, filling.at)
        try:
            found = scaling_steps.steps(clock, filling, sizes)
            found["backlog.together"] = scaling_steps.backlog(clock, filling, sizes)
        finally:
            clock.close()
        assert {name.partition(".")[0] for name in found} == set(scaling_report.KINDS)
        assert found["joined.alone"].hot == 1.0
        assert found["left.alone"].hot == 0.0
        assert all(cost.wal > 0 for cost in found.values())
        assert scaling_steps.beside(database, filling.at, sizes).news_ms > 0
