"""Histories that once broke a promise, or that must never: each with a name and what is right about its end."""

from collections.abc import Mapping
from types import MappingProxyType

import pytest
from sfu_delegate.sandbox.homeserver import End

from tests.simulation.histories import History, Op, Play, Someone
from tests.simulation.world import START

ALICE = Someone("alice", "red", 60.0)
BOB = Someone("bob", "red", 120.0)
CAROL = Someone("carol", "red", 300.0)

HISTORIES: Mapping[str, History] = MappingProxyType(
    {
        # A homeserver that is well again two seconds before the deadline is noticed: the pause between tries heeds the deadline.
        "back_just_before_the_deadline": History(
            5006, (ALICE,), (Op(13.425, "come late", "alice", 1.0), Op(92.483, "homeserver error", "red", 19.0)), 364.8
        ),
        "well_again_eight_seconds_before_the_deadline": History(
            2, (BOB,), (Op(67.0, "come", "bob"), Op(95.0, "homeserver error", "red", 87.0)), 300.0
        ),
        # After the clock was set back, rooms are looked at as often as else.
        "clock_set_back_two_hours": History(5001, (ALICE,), (Op(12.0, "come", "alice"), Op(139.0, "clock", "red", -7200.0)), 140.4),
        # A clock that was set forward while nobody looked: countdowns seem to be long over, and are tried as often as any that may be about to end.
        "clock_set_forward_a_day_in_an_outage": History(
            1796050061,
            (Someone(name="p2", room="blue", delay=120.0, through=True),),
            (
                *(Op(34.0, "come", "p2"), Op(67.0, "clock", "blue", 86400.0)),
                *(Op(69.0, "homeserver error", "red", 101.0), Op(118.0, "homeserver down", "blue", 21.0)),
            ),
            447.425,
        ),
        "clock_set_back_a_day": History(5003, (CAROL,), (Op(100.0, "come", "carol", 23.0), Op(118.0, "clock", "red", -86400.0)), 118.7),
        # Somebody who is expected, and is to be looked for later, must not keep the room from being looked at when the daemon starts.
        "start_while_somebody_is_expected": History(7050, (BOB,), (Op(12.0, "come never", "bob"), Op(110.0, "crash", "red", 6.0)), 117.0),
        "start_while_somebody_is_expected_and_others_left": History(
            115,
            (ALICE, BOB, CAROL),
            (
                Op(4.0, "come", "alice"),
                Op(5.0, "come", "carol"),
                Op(60.0, "come never", "bob"),
                Op(83.0, "crash", "red", 40.0),
                Op(84.0, "leave", "alice"),
            ),
            130.0,
        ),
        # The SFU tells that it shuts down, and is back after the time of the look: its clients need some more seconds.
        "sfu_shut_down_for_forty_seconds": History(2, (BOB,), (Op(174.0, "come", "bob"), Op(476.0, "shut sfu down", "red", 40.0)), 560.0),
        # Somebody comes back while the goodbye cannot be sent: the room is looked at again as every other.
        "back_while_the_goodbye_fails": History(
            20115,
            (Someone("alice", "red", 3600.0),),
            (Op(30.0, "come", "alice"), Op(35.0, "homeserver error", "red", 269.0), Op(65.0, "rejoin", "alice", 98.0)),
            170.0,
        ),
        # Webhooks that arrive late because of us, or out of order, are no sign of a node that was away: a `left` that was tried again for some
        # seconds, and a `room_started` that a `joined` of the same room has overtaken.
        "late_because_the_daemon_was_down": History(
            346,
            (BOB, CAROL),
            (
                Op(5.0, "come", "bob"),
                Op(6.0, "come", "carol"),
                Op(50.0, "lose all webhooks", "red", 1.0),
                Op(50.2, "reconnect", "carol"),
                Op(99.9, "crash", "red", 8.0),
                Op(100.0, "reconnect", "bob"),
                Op(230.0, "leave", "carol"),
            ),
            300.0,
        ),
        "room_started_after_its_first_joined": History(
            20176,
            (ALICE, BOB, Someone("carol", "red", 120.0)),
            (
                Op(19.0, "come", "bob"),
                Op(27.0, "come", "carol", 21.0),
                Op(36.0, "come", "alice"),
                Op(389.0, "reconnect", "alice", 35.0),
                Op(393.0, "kill sfu", "red", 1.0),
                Op(393.0, "reorder webhooks", "red", 5.0),
            ),
            394.5,
        ),
        # Looks at a doubtful room back off.
        "frozen_node_and_a_shutdown": History(
            7069,
            (BOB, ALICE, Someone("carol", "red", 600.0)),
            (
                Op(45.0, "come late", "bob", 1.0),
                Op(78.0, "come", "alice"),
                Op(129.0, "come", "carol", 3.0),
                Op(285.0, "publish", "alice"),
                Op(304.0, "freeze node", "red", 269.0),
                Op(380.0, "lose webhooks", "red", 37.0),
                Op(381.0, "shut sfu down", "red", 13.0),
            ),
            418.7,
        ),
        # An event that was never restarted, because its homeserver was down, is tried often enough for as long as it may be there.
        "delegated_while_the_homeserver_is_down": History(5, (ALICE,), (Op(40.0, "homeserver down", "red", 47.0), Op(43.6, "come", "alice")), 150.0),
        # A restart that was perhaps done is perhaps the last one for a whole delay: an event is tried as often as one whose deadline is to come.
        "restarted_and_not_told_for_long": History(
            700057,
            (Someone("p0", "red", 60.0), Someone("p2", "red", 300.0)),
            (
                Op(33.0, "come", "p0", 1.0),
                Op(40.0, "come late", "p2"),
                Op(161.0, "homeserver does not tell", "red", 282.0),
                Op(333.0, "homeserver html", "red", 48.0),
            ),
            365.348,
        ),
        # What was restarted early is not restarted again by the same plan.
        "planned_and_done": History(
            17, (ALICE, BOB), (Op(7.0, "come", "bob", 36.0), Op(39.0, "homeserver down", "red", 46.0), Op(44.0, "come", "alice", 9.0)), 231.0
        ),
        # What every delegate must be able to live through.
        "every_webhook_is_lost": History(
            1,
            (ALICE, BOB, CAROL),
            (Op(0.0, "lose all webhooks", "red", 900.0), Op(5.0, "come", "alice"), Op(6.0, "come", "bob"), Op(200.0, "leave", "bob")),
            600.0,
        ),
        "reconnect_with_overlap_again_and_again": History(
            2, (ALICE,), (Op(5.0, "come", "alice"), *(Op(30.0 + 7.0 * number, "reconnect", "alice") for number in range(20))), 300.0
        ),
        "killed_between_commit_and_send": History(
            3,
            (ALICE, BOB),
            (Op(5.0, "come", "alice"), Op(6.0, "come", "bob"), Op(60.0, "leave", "alice"), Op(61.0, "crash after commit", "red", 12.0)),
            180.0,
        ),
        "sent_and_not_told": History(
            4,
            (ALICE, BOB),
            (Op(5.0, "come", "alice"), Op(6.0, "come", "bob"), Op(60.0, "homeserver does not tell", "red", 30.0), Op(61.0, "leave", "alice")),
            180.0,
        ),
        "full_disk_while_people_leave": History(
            5,
            (ALICE, BOB, CAROL),
            (
                Op(5.0, "come", "alice"),
                Op(6.0, "come", "bob"),
                Op(7.0, "come", "carol"),
                Op(100.0, "store", "red", 60.0),
                Op(110.0, "leave", "carol"),
            ),
            300.0,
        ),
        "sfu_restarts_under_a_call": History(
            6,
            (ALICE, BOB, CAROL),
            (Op(5.0, "come", "alice"), Op(6.0, "come", "bob"), Op(7.0, "come", "carol"), Op(100.0, "kill sfu", "red", 20.0)),
            400.0,
        ),
        # An instance that alone cannot reach a homeserver leaves to the other one what is due there: refused at once, it would be the first to try
        # again and again; where nothing is answered, each of its tries takes a lease.
        "one_instance_cannot_reach_the_homeserver": History(
            36, (Someone("p1", "red", 60.0),), (Op(154.0, "come late", "p1"), Op(295.0, "no homeserver", "i0", 47.0)), 527.581, instances=2
        ),
        "one_instance_hears_nothing_of_the_homeserver": History(
            123,
            (Someone("p4", "red", 60.0),),
            (Op(55.0, "restart", "blue", 39.0), Op(122.0, "homeserver silent", "i0", 248.0), Op(123.0, "come", "p4", 1.0)),
            277.445,
            instances=2,
        ),
        # When the homeserver fails for the other one as well, for a moment, the first one must not take a lease that it cannot make use of.
        "a_moments_trouble_while_one_instance_is_cut_off": History(
            2,
            (ALICE,),
            (Op(5.0, "come", "alice"), Op(50.0, "homeserver silent", "i0", 400.0), Op(224.0, "homeserver error", "red", 5.0)),
            500.0,
            instances=2,
        ),
        # The look of an instance that alone cannot ask the SFU says nothing of who left and came back, though the other one has not looked yet.
        "one_instance_cannot_ask_the_sfu": History(
            1,
            (ALICE, BOB),
            (
                Op(5.0, "come", "alice"),
                Op(6.0, "come", "bob"),
                Op(50.0, "no sfu", "i1", 300.0),
                Op(98.0, "lose webhooks", "red", 190.0),
                Op(100.0, "rejoin", "alice"),
            ),
            400.0,
            instances=2,
        ),
        "two_nodes_one_freezes": History(
            7, (ALICE, BOB), (Op(5.0, "come", "alice"), Op(6.0, "come", "bob"), Op(100.0, "freeze node", "red", 50.0)), 400.0
        ),
    }
)


@pytest.mark.parametrize("name", HISTORIES)
def test_history(name: str) -> None:
    """It keeps all promises."""
    Play(HISTORIES[name]).run()


def test_a_departure_during_an_outage_of_ours_is_found_at_the_start() -> None:
    """Her webhooks are lost for good, and her event is sent within seconds of the start."""
    history = History(
        8, (CAROL, BOB), (Op(5.0, "come", "carol"), Op(6.0, "come", "bob"), Op(60.0, "crash", "red", 50.0), Op(65.0, "leave", "carol")), 200.0
    )
    play = Play(history)
    play.run()
    event = play.world.people["carol"].events[0]
    assert event.end is End.SENT
    assert event.ended_at is not None
    assert event.ended_at < START + 130.0
