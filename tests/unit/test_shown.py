"""What the daemon answers its operator is shown so that people understand it, and strangers' names do no harm."""

import json
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from sfu_delegate.api.admin import causes, event_json, room_json, status_json, story_json
from sfu_delegate.api.health import detail_of
from sfu_delegate.api.overview import HomeserverState, Overview, Promises, SfuState
from sfu_delegate.api.services import Phase, Readiness
from sfu_delegate.delegation.model import DelayedEvent, Lane, Note, OnEnd, Outcome, Presence, Room, State
from sfu_delegate.observe.story import Tone
from sfu_delegate.operate import shown
from sfu_delegate.operate.screen import drawn
from sfu_delegate.operate.shown import Around, Line, Times, as_json, limit_words, moment, plain
from sfu_delegate.store.reading import RoomCount, Size

from tests.rows import row

BERLIN = ZoneInfo("Europe/Berlin")
NOON = datetime(2026, 3, 29, 12, 0, tzinfo=BERLIN).timestamp()  # of the day when the clocks were put forward, at two
TIMES = Times(int(NOON * 1000), BERLIN)
NASTY = "a\x1b[31m\x9b2J\u202eb[bold]\ttab\nline\x7f\u2066\ud800"
HARMLESS = "a\\x1b[31m\\x9b2J\\u202eb[bold]\\x09tab\\x0aline\\x7f\\u2066\\ud800"


def ms(seconds: float) -> int:
    return int(seconds * 1000)


def at(hour: int, minute: int, second: int = 0) -> float:
    return datetime(2026, 3, 29, hour, minute, second, tzinfo=BERLIN).timestamp()


def texts(lines: Iterator[Line] | Sequence[Line]) -> list[str]:
    return [line.text for line in lines]


def whole(lines: Iterator[Line] | Sequence[Line]) -> str:
    return "\n".join(texts(lines))


# ── names ──


def test_what_cannot_be_seen_in_a_name_is_shown_as_an_escape() -> None:
    """No control character, none that turns the text around, no half of a character; the rest stays readable."""
    assert plain(NASTY) == HARMLESS
    assert plain("Zoë 🎧 \\ שלום") == "Zoë 🎧 \\\\ שלום"
    assert plain("a\u200d\u2028\U000e0041\xa0b") == "a\\u200d\\u2028\\U000e0041\\xa0b"


def test_json_has_nothing_that_a_terminal_obeys_and_is_the_same_to_programs() -> None:
    """Such characters become escapes of JSON's own."""
    value = {NASTY: ["Zoë", "\U000e0041"]}
    text = as_json(json.dumps(value, indent=2, ensure_ascii=False))
    assert json.loads(text) == value
    assert all(character.isprintable() or character == "\n" for character in text)
    assert "Zoë" in text


# ── times ──


@pytest.mark.parametrize(
    ("when", "said"),
    [
        (at(10, 42, 7), "10:42:07"),
        (at(1, 59), "01:59:00 UTC+01:00"),  # before the clocks were put forward
        (at(0, 0) - 1, "2026-03-28 23:59:59 UTC+01:00"),
    ],
)
def test_times_have_a_date_if_not_of_today_and_a_zone_if_it_is_another_one(when: float, said: str) -> None:
    """Whoever reads 10:42 may take it for the time on the own clock."""
    assert TIMES.when(ms(when)) == said


def test_the_zone_is_said() -> None:
    """By its name and its distance from UTC."""
    assert TIMES.said() == "Times are in CEST (UTC+02:00)."
    assert Times(ms(NOON), UTC).said() == "Times are in UTC."
    assert Times(ms(NOON), ZoneInfo("America/St_Johns")).said() == "Times are in NDT (UTC-02:30)."
    assert Times(ms(NOON), ZoneInfo("Asia/Almaty")).said() == "Times are in UTC+05:00."


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("10:42", at(10, 42)),
        (" 9:05:30 ", at(9, 5, 30)),
        ("12:00", NOON),
        ("12:01", datetime(2026, 3, 28, 12, 1, tzinfo=BERLIN).timestamp()),  # yesterday: it has not been 12:01 today
        ("2026-03-01 10:42", datetime(2026, 3, 1, 10, 42, tzinfo=BERLIN).timestamp()),
        ("2026-03-01T10:42:01", datetime(2026, 3, 1, 10, 42, 1, tzinfo=BERLIN).timestamp()),
    ],
)
def test_a_time_of_day_is_the_last_one(text: str, meant: float) -> None:
    """Today's, or yesterday's if that is yet to come, across a change of the clocks; a date says it for certain."""
    assert moment(text, NOON, BERLIN) == meant


@pytest.mark.parametrize("text", ["", "noon", "24:00", "10:61", "2026-02-30 10:00", "10", "10:42Z", "1٠:42"])
def test_what_is_no_time_of_day_is_refused(text: str) -> None:
    """With words that say what to write, or that there is no such time."""
    with pytest.raises(ValueError, match=r"such as 10:42|no time that there is"):
        moment(text, NOON, BERLIN)


@pytest.mark.parametrize(("zone", "text"), [("America/New_York", "9999-12-31 23:59"), ("Pacific/Kiritimati", "0001-01-01 00:01")])
def test_a_time_that_no_calendar_has_elsewhere_is_refused(zone: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is another day in UTC, which comes before the first, or after the last."""
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        with pytest.raises(ValueError, match="no time that there is"):
            moment(text, NOON)
    finally:
        monkeypatch.undo()
        time.tzset()


# ── the overview ──


def homeserver(**changes: Any) -> HomeserverState:
    fields: dict[str, Any] = {"name": "hs.test", "entry": "hs.test", "problem": "", "service": None, "events": 12, "limit": "none", "rate": 0.0}
    fields |= {"burst": 0.0, "exempt": False, "lateness": 0.0, "waiting": {}}
    return HomeserverState(**fields | changes)


def sfu(**changes: Any) -> SfuState:
    fields: dict[str, Any] = {"name": "main", "url": "ws://10.0.0.7:7880", "problem": "", "heard_at": NOON - 3, "answered_at": NOON - 30}
    fields |= {"failing_since": None, "several_nodes": False}
    return SfuState(**fields | changes)


def status(*, database: str = "", phase: Phase = Phase.RUNNING, **changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {"version": "1.2.3", "instance": "", "instances": 1, "started_at": NOON - 3600, "now": NOON, "database": "x.db"}
    fields |= {
        "keep": 604_800.0,
        "promises": Promises(0, {"sent": 30}, 30, 30, 0.12, 1.5, 2.5),
        "states": {("live", "connected"): 10, ("live", "away"): 2},
    }
    fields |= {"webhooks": {("main", "participant_left", "stored"): 36}, "actions": {("send", "done"): 3, ("restart", "limited"): 9}}
    fields |= {"homeservers": (homeserver(),), "sfus": (sfu(),)}
    overview = Overview(**fields | changes)
    readiness = Readiness(
        phase,
        database,
        homeservers={server.name: server.problem for server in overview.homeservers},
        sfus={each.name: each.problem for each in overview.sfus},
        application_services={server.name: server.service for server in overview.homeservers if server.service is not None},
    )
    return status_json(overview, detail_of(readiness), Size(15, 3, 2, NOON - 3600, None), "")


def test_a_daemon_that_is_well_says_so_in_its_first_line() -> None:
    """A verdict, since when, and how much there is; then the promises, rates and conditions."""
    given = status()
    lines = list(shown.status_lines(given, TIMES))
    text = whole(lines)
    assert lines[0] == Line("ok: sfu-delegate 1.2.3, started 11:00:00 (1 h ago); 12 delegated events open", Tone.GOOD, heading=True)
    assert shown.is_well(given)
    assert "nobody is dropped     kept" in text
    assert "30 departures: half of the goodbyes were through within 0.12 s, 99 % within 1.5 s; the slowest goodbye was through after 2.5 s" in text
    assert "kept alive            12: 10 connected, 2 away" in text
    assert "webhooks              0.01 a second, 36 since the start\n" in text
    assert "restarts              0.0025 a second, 9 since the start, 9 not done at once" in text
    assert "  hs.test  works; 12 open events\n           no limit was found" in text
    assert "  main  answers; last webhook 3 s ago; ws://10.0.0.7:7880" in text
    assert text.endswith("Times are in CEST (UTC+02:00).")


@pytest.mark.parametrize(
    ("changes", "word", "cause"),
    [
        ({"homeservers": (homeserver(problem="no answer"),)}, "degraded", "hs.test cannot be asked: no answer. Restarts and goodbyes there wait"),
        (
            {"homeservers": (homeserver(service="the token is refused."),)},
            "degraded",
            "application service does not work at hs.test: the token is refused.",
        ),
        ({"homeservers": (homeserver(lateness=90.0),)}, "degraded", "restarts will be 1 min 30 s late: connected people will be dropped."),
        (
            {"homeservers": (homeserver(limit="some", rate=1.0, burst=5.0, waiting={Lane.END: (40, NOON - 60)}),)},
            "degraded",
            "40 goodbyes wait for hs.test, which allows 1 actions a second; the oldest for 1 min: ghosts in calls.",
        ),
        ({"sfus": (sfu(problem="connection refused", failing_since=NOON - 60),)}, "degraded", "The SFU main cannot be asked: connection refused."),
        ({"database": "the disk is full"}, "unavailable", "The database takes nothing: the disk is full."),
        ({"phase": Phase.STOPPING}, "unavailable", "The daemon is stopping"),
    ],
)
def test_what_is_wrong_comes_first(changes: dict[str, Any], word: str, cause: str) -> None:
    """Right behind the verdict, each with what it does; nothing that is wrong leaves the verdict at `ok`."""
    changes = dict(changes)
    given = status(database=changes.pop("database", ""), phase=changes.pop("phase", Phase.RUNNING), **changes)
    lines = list(shown.status_lines(given, TIMES))
    assert not shown.is_well(given)
    assert (lines[0].text.partition(":")[0], lines[0].tone) == (word, Tone.BAD)
    assert lines[1].text.startswith("  ! ")
    assert cause in lines[1].text


def test_a_broken_promise_names_the_command_that_tells_more() -> None:
    """How many were dropped, and how to find them."""
    text = whole(shown.status_lines(status(promises=Promises(2, {"lost": 2}, 0, 0, None, None, None)), TIMES))
    assert "BROKEN: 2 events ran out while connected: sfu-delegate list --outcome lost" in text
    assert "nobody has left yet" in text


def test_rates_of_a_watched_status_are_those_since_the_last_look() -> None:
    """What was before counts for nothing then."""
    before = status()
    after = status(now=NOON + 2, webhooks={("main", "participant_left", "stored"): 40, ("unknown", "unknown", "bad_signature"): 1})
    text = whole(shown.status_lines(after, TIMES, before))
    assert "Rates, since the last look" in text
    assert "webhooks              2.5 a second, 41 since the start, 1 refused or not taken" in text


@pytest.mark.parametrize(
    ("server", "said"),
    [
        (homeserver(exempt=True), "no limit: exempt, by the configuration or its application service"),
        (homeserver(limit="none"), "no limit was found"),
        (homeserver(limit="unknown"), "limit: not known yet, it has refused nothing so far"),
        (
            homeserver(limit="some", rate=1.0, burst=5.0, events=500),
            "limit: 1 action a second, burst 5: if all leave at once, the last is gone after 8 min 15 s",
        ),
        (
            homeserver(limit="some", rate=0.5, burst=10.0, events=10),
            "limit: 0.5 actions a second, burst 10: if all leave at once, nobody has to wait for it",
        ),
        (homeserver(limit="some", rate=1.0, burst=5.0, events=0), "limit: 1 action a second, burst 5"),
    ],
)
def test_a_limit_is_told_with_what_it_means(server: HomeserverState, said: str) -> None:
    """How long it takes until everybody is gone who is there now."""
    assert limit_words(status(homeservers=(server,))["homeservers"][0]) == said


# ── lists ──


def alice(**changes: Any) -> DelayedEvent:
    """In the call since eleven, with an event of an hour."""
    fields: dict[str, Any] = {"accepted_at": at(11, 0), "running_since": at(11, 30), "verified_at": at(11, 0), "presence_since": at(11, 0)}
    return row(**fields | {"user": "@alice:hs.test", "delay_id": "syd_abcd…"} | changes)


def test_lists_have_the_number_for_people_and_the_id_for_programs() -> None:
    """The table fits a terminal; the fields are the same each time, with an exact time."""
    table = shown.events_table([event_json(alice(), NOON), event_json(row(state=State.DONE, outcome=Outcome.LOST, user=None), NOON)], TIMES)
    assert table.rows[0] == ("1", "@alice:hs.test", "room", "hs.test", "live", "connected", "1 h", "11:00:00")
    assert table.rows[1][4] == "lost"
    assert table.tones == [Tone.GOOD, Tone.BAD]
    first = alice()
    assert table.fields[0] == (
        first.delegation,
        "1",
        "live",
        "-",
        "connected",
        "2026-03-29T11:00:00+02:00",
        "main",
        "room",
        "@alice:hs.test",
        "hs.test",
    )
    assert {len(fields) for fields in table.fields} == {10}


def looked(**changes: Any) -> Room:
    """A room that was looked at 30 s ago."""
    return Room("main", "room", "", "", 0.0, False, 0.0, NOON - 30, None, NOON + 30, True, 0, 1, False)._replace(**changes)


def test_rooms_say_who_is_there_and_whether_the_sfu_tells() -> None:
    """By presence; a look that failed counts for more than when the last one was."""
    counts = [RoomCount("main", "room", "live", "connected", 3, 2), RoomCount("main", "room", "ending", "gone", 1, 1)]
    given = [looked(), looked(failures=2), looked(doubt_until=NOON + 60), looked(looked_at=0.0)]
    table = shown.rooms_table([room_json(room, counts) for room in given], TIMES)
    assert table.rows[0] == ("room", "main", "2", "0", "0", "1", "4", "30 s")
    assert [row[-1] for row in table.rows[1:]] == ["failed 2×", "in doubt", "-"]
    assert table.fields[0] == ("main", "room", "2", "0", "0", "1", "4", "2026-03-29T11:59:30+02:00", "0")


# ── stories ──

NOTES = [
    Note(1, at(11, 0), "delegated", ""),
    Note(1, at(11, 0), "verified", ""),
    Note(1, at(11, 0, 10), "connected", ""),
    Note(1, at(11, 42, 7), "away", "CONNECTION_TIMEOUT"),
    Note(1, at(11, 42, 37), "gone", "CONNECTION_TIMEOUT"),
    Note(1, at(11, 42, 37), "ending", ""),
    Note(1, at(11, 42, 38), "sent", ""),
]
SENT = alice(presence=Presence.GONE, state=State.DONE, outcome=Outcome.SENT, finished_at=at(11, 42, 38), reason="CONNECTION_TIMEOUT")


def explained(*people: tuple[list[DelayedEvent], list[Note]], **changes: Any) -> dict[str, Any]:
    """As the API answers."""
    return {
        "now_ts": ms(NOON),
        "complete": True,
        "kept_s": 604_800.0,
        "searched": ["!r:hs.test", "hashed"],
        "rooms": [],
        "participants": [
            {"sfu": rows[0].sfu, "room": rows[0].room, "user": rows[0].user, "identity": rows[-1].identity, **story_json(rows, notes, NOON)}
            for rows, notes in people
        ],
        "causes": [],
        **changes,
    }


def test_a_story_tells_when_why_and_how_it_is_now() -> None:
    """Who, the present state, and each line with its time of day; the zone once."""
    told = texts(shown.explanation_lines(explained(([SENT], NOTES)), TIMES, asked="room !r:hs.test"))
    assert told[0] == "1 participant in 1 room: room !r:hs.test. Times are in CEST (UTC+02:00)."
    assert told[2:4] == ["@alice:hs.test in room (SFU main)", "  identity alice"]
    assert told[4] == "  Now: The homeserver sent the leave event: the participant is no longer shown in the call."
    assert [line[:10] for line in told[5:]] == [
        f"  {clock}" for clock in ("11:00:00", "11:00:00", "11:00:10", "11:42:07", *["11:42:37"] * 2, "11:42:38")
    ]
    assert "heard nothing of it any more: a crash, or a network that is gone (CONNECTION_TIMEOUT)" in told[8]


def test_the_time_that_is_asked_about_stands_between_the_lines() -> None:
    """What happened within five minutes of it is marked; what was before it, and what came after, can be seen at a glance."""
    around = Around(ms(at(11, 42, 20)))
    told = texts(shown.explanation_lines(explained(([SENT], NOTES)), TIMES, asked="x", around=around))
    assert told[1] == "Within 5 min of 11:42:20 4 lines are marked with >."
    rule = next(index for index, line in enumerate(told) if "the time that you ask about" in line)
    assert told[rule - 1].startswith("> 11:42:07  Away")
    assert told[rule + 1].startswith("> 11:42:37  Gone")
    assert [line[0] for line in told[rule - 4 : rule]] == [" ", " ", " ", ">"]


def test_when_nothing_happened_then_it_says_so() -> None:
    """The time comes after the last line before it."""
    told = texts(shown.explanation_lines(explained(([alice()], NOTES[:3])), TIMES, asked="x", around=Around(ms(at(11, 50)))))
    assert told[1] == "Within 5 min of 11:50:00 nothing happened."
    assert told[-1] == "  11:50:00  ── the time that you ask about ──"


@pytest.mark.parametrize(
    ("more", "first", "last"),
    [
        ({"limit": 2}, "… 5 lines before: --limit shows more", "11:42:38"),
        ({"limit": 2, "around": Around(ms(at(11, 0, 10)))}, "… 1 line before: --limit shows more", "… 4 lines after: --limit shows more"),
        ({"limit": 3, "around": Around(ms(at(9, 0)))}, "09:00:00  ── the time that you ask about ──", "… 4 lines after: --limit shows more"),
        ({"since": ms(at(11, 30))}, "… 3 earlier lines", "11:42:38"),
        ({"since": ms(NOON)}, "… 7 earlier lines", "nothing happened since then"),
    ],
)
def test_a_long_story_is_cut_where_it_matters_least(more: dict[str, Any], first: str, last: str) -> None:
    """The newest lines are shown, or those nearest to the time; and that there are others."""
    told = texts(shown.story_lines(story_json([SENT], NOTES, NOON), TIMES, **more))
    assert told[0].strip("> ") == first
    assert last in told[-1]


def test_somebody_with_several_events_has_them_told_apart() -> None:
    """By the numbers of their rows; those of another device by its identity, too. What is over is not told as if it were now."""
    second = alice(id=2, identity="alice2", accepted_at=at(11, 50), presence_since=at(11, 50), running_since=at(11, 50))
    told = texts(shown.explanation_lines(explained(([SENT, second], [*NOTES, Note(2, at(11, 50), "delegated", "")])), TIMES, asked="x"))
    assert told[3:5] == ["  identity alice (events 1)", "  identity alice2 (events 2)"]
    assert [line for line in told if line.startswith("  Now")] == [told[5]]
    assert told[5].startswith("  Now [2]: In the call for 10 min.")
    assert told[-1].startswith("  11:50:00  [2] The client handed")


def test_nobody_is_explained_too() -> None:
    """What was searched, for how long it would be known, and what that means."""
    text = whole(shown.explanation_lines(explained(), TIMES, asked="room !r:hs.test"))
    assert text.startswith("Nothing is known of room !r:hs.test.")
    assert "Searched, too: hashed" in text
    assert "kept for 7 d after their end (history.keep), so nobody has delegated there since 2026-03-22 11:00:00 UTC+01:00" in text
    past = whole(shown.explanation_lines(explained(), TIMES, asked="x", around=Around(ms(NOON - 10 * 86_400))))
    assert "That was 10 d ago, and delegations are kept for 7 d" in past
    other = whole(shown.explanation_lines(explained(), TIMES, asked="user x", around=Around(ms(at(10, 42)))))
    assert other.startswith("Nothing is known of user x within 5 min of 10:42:00.")
    assert "the same without the time shows those of other times" in other
    assert "nobody has delegated there since" not in other
    assert whole(shown.explanation_lines(explained(), TIMES, asked="x", since=ms(at(11, 0)))).startswith("Nothing is known of x since 11:00:00.")


@pytest.mark.parametrize(
    ("promises", "said"),
    [
        (Promises(0, {}, 0, 0, None, None, None), "nobody has left yet"),
        (Promises(0, {"sent": 1}, 1, 1, 0.092, 0.092, 0.092), "1 departure: the slowest goodbye was through after"),
        (Promises(0, {"sent": 9}, 9, 9, 0.1, 33.0, 33.0), "9 departures: the slowest goodbye was through after 33 s"),
        (Promises(0, {"sent": 5000}, 5000, 1000, 0.1, 0.9, 1.2), "half of the last 1000 goodbyes were through within"),
    ],
)
def test_of_a_few_departures_the_slowest_is_told(promises: Promises, said: str) -> None:
    """Percentiles of two are nonsense; and of many, only the last ones count."""
    assert said in whole(shown.status_lines(status(promises=promises), TIMES))


def test_causes_come_before_the_people() -> None:
    """As what is wrong now may be why; and that not all were looked at is said."""
    overview = Overview(
        "1", "", 1, NOON, NOON, "x", 60.0, Promises(0, {}, 0, 0, None, None, None), {}, {}, {}, homeservers=(homeserver(problem="gone"),)
    )
    told = texts(shown.explanation_lines(explained(([SENT], NOTES), causes=causes(overview), complete=False), TIMES, asked="x"))
    assert told[1:3] == ["Wrong right now:", "  ! hs.test cannot be asked: gone. Restarts and goodbyes there wait, and are repeated."]
    assert "Only the newest" in told[3]


# ── one delegation, and what becomes of it ──


def delegation(*rows: DelayedEvent) -> dict[str, Any]:
    return {"id": rows[0].delegation, "now_ts": ms(NOON), **story_json(rows, NOTES, NOON)}


def test_a_delegation_is_shown_with_facts_and_story() -> None:
    """Times with how long ago, or in how long, they are; a hint in place of the delay_id."""
    told = whole(shown.delegation_lines(delegation(alice()), TIMES))
    for line in (
        "1 delayed event of @alice:hs.test",
        "Event 1 (syd_abcd…)",
        "  state       live; the participant is connected, since 11:00:00 (1 h ago)",
        "  delay       1 h; to be sent when the participant is gone",
        "  runs out    12:30:00 (in 30 min)",
        "  11:00:10  Connected",
    ):
        assert line in told
    over = whole(shown.delegation_lines(delegation(SENT), TIMES))
    assert "  state       done: sent; the participant was gone then" in over
    assert "runs out" not in over


@pytest.mark.parametrize(
    ("verb", "event", "said"),
    [
        ("end", alice(), "hs.test is told to send the leave event now. The participant will be shown as gone, though it is in the call now."),
        ("end", alice(on_end=OnEnd.CANCEL), "hs.test is told to cancel the delayed event now"),
        ("end", SENT, "is over already"),
        ("release", alice(), "It stays at hs.test, where it runs out at 12:30:00 (in 30 min), unless the client restarts it."),
        ("release", alice(verified_at=None), "where it runs out as its timer says"),
    ],
)
def test_what_will_happen_is_said_before(verb: str, event: DelayedEvent, said: str) -> None:
    """To whom, and what the others will see."""
    assert said in whole(shown.intention(delegation(event), verb, TIMES))


@pytest.mark.parametrize(
    ("verb", "event", "changed", "said", "tone"),
    [
        ("end", SENT, 1, ": sent. The homeserver sent the leave event", Tone.GOOD),
        ("end", SENT, 0, ": nothing to do, it was over already (sent)", Tone.NOTICE),
        (
            "end",
            row(Presence.GONE, attempts=3, reason="ENDED_BY_OPERATOR"),
            1,
            "waits to be made after 3 failed tries. The daemon goes on trying.",
            Tone.NOTICE,
        ),
        ("end", SENT._replace(outcome=Outcome.REJECTED), 1, ": rejected. The homeserver refuses to manage it.", Tone.BAD),
        ("release", SENT._replace(outcome=Outcome.WITHDRAWN), 1, "forgot it, and left it at the homeserver as it was.", Tone.GOOD),
        ("release", SENT._replace(outcome=Outcome.WITHDRAWN, end_tried=True), 1, "under way already, which may have got through", Tone.GOOD),
    ],
)
def test_what_has_become_of_it_is_said_after(verb: str, event: DelayedEvent, changed: int, said: str, tone: Tone) -> None:
    """The outcome, or what it waits for."""
    line = shown.result(delegation(event), verb, changed)
    assert said in line.text
    assert line.tone is tone


# ── all of it ──


def test_no_line_has_a_character_that_a_terminal_obeys() -> None:
    """Wherever a stranger's text can stand: names, reasons, problems, details."""
    event = alice(identity=NASTY, user=NASTY, room=NASTY, homeserver=NASTY, reason=NASTY, presence=Presence.GONE, delay_id=NASTY)
    notes = [*NOTES, Note(1, NOON, NASTY, NASTY), Note(1, NOON, "rejected", NASTY)]
    one = {"id": NASTY, "now_ts": ms(NOON), **story_json([event], notes, NOON)}
    people = explained(([event], notes), causes=[{"sentence": NASTY}])
    given = status(
        database=NASTY, homeservers=(homeserver(name=NASTY, problem=NASTY, service=NASTY),), sfus=(sfu(name=NASTY, url=NASTY, problem=NASTY),)
    )
    lines = [*shown.status_lines(given, TIMES), *shown.delegation_lines(one, TIMES), *shown.explanation_lines(people, TIMES, asked="x")]
    lines += [*shown.intention(one, "end", TIMES), *shown.intention(one, "release", TIMES), shown.result(one, "end", 1)]
    lines += shown.explanation_lines(explained(searched=["x", NASTY]), TIMES, asked="x")
    tables = [shown.events_table(one["events"], TIMES), shown.rooms_table([room_json(looked(sfu=NASTY, name=NASTY), [])], TIMES)]
    cells = [cell for table in tables for row in (*table.rows, *table.fields) for cell in row]
    assert HARMLESS in whole(lines)
    assert HARMLESS in cells
    for text in (*texts(lines), *cells):
        assert text.isprintable(), text


def test_on_a_terminal_long_lines_go_on_under_their_own_column() -> None:
    """So that times and names stand by themselves; markup in a text is none."""
    drawing = drawn([Line("  10:42:07  one two three four [bold] five six"), Line("> " + "x" * 50, Tone.BAD)], 30)
    assert drawing.plain.splitlines()[:3] == ["  10:42:07  one two three", "            four [bold] five", "            six"]
