"""A minute of the soak with few people: that it is played to its end, that it sees what happens, and that nobody is dropped or forgotten."""

from pathlib import Path

import pytest
from sfu_delegate.sandbox.homeserver import DelayedEvent, End

from tests.soak.disturbances import DAEMON, DATABASE, INSTANCE, SFU, WEBHOOKS, Disturbances
from tests.soak.report import as_text
from tests.soak.run import Soak
from tests.soak.settings import FAIR_CHANCE, GHOST_AFTER, Settings
from tests.soak.truth import Harm, Membership, Truth

HOME = "hs.test"


class Watched:
    """The truth about one membership, on a clock that is set by hand. Its event has a delay of 60 s, is confirmed at 0 and restarted at 0."""

    def __init__(self) -> None:
        self.now = 0.0
        self.disturbances = Disturbances(lambda: self.now)
        self.told: list[Harm] = []
        self.truth = Truth(lambda: self.now, self.disturbances, self.told.append)
        self.event = DelayedEvent("syd_x", "@a:hs.test", "!r", "m", "", {}, 60.0, 0.0, 0.0)
        self.membership = Membership(HOME, "call", "@a:hs.test:DEVICE", self.event, delegation="dlg_x", accepted_at=0.0, confirmed_at=0.0)
        self.truth.add(self.membership)

    def look(self, at: float, end: End = End.PENDING, by: str = "127.0.0.1") -> list[Harm]:
        self.now = at
        if end is not End.PENDING:
            self.event.end, self.event.ended_at, self.event.ended_by = end, at, by
        self.truth.look()
        return self.told


def test_an_event_that_runs_out_while_its_participant_is_there_is_lost() -> None:
    """The harm that the soak is there to find."""
    watched = Watched()
    assert watched.look(60.0, End.RAN_OUT, "timer") == watched.truth.lost
    assert len(watched.truth.lost) == 1


def test_an_event_that_is_sent_while_its_participant_is_there_is_lost() -> None:
    """Also after a goodbye to reconnect, or two, as long as the SFU could be asked and webhooks came through."""
    watched = Watched()
    watched.membership.goodbyes += [18.0, 20.0]
    watched.look(23.0, End.SENT)
    assert len(watched.truth.lost) == 1


def test_nobody_could_help_it() -> None:
    """Daemon or homeserver were away from the latest normal restart to the deadline, but for less than a fair chance."""
    watched = Watched()
    watched.disturbances.add(DAEMON, "killed", 40.0, 60.0 - FAIR_CHANCE + 0.1)
    watched.look(60.0, End.RAN_OUT, "timer")
    assert not watched.truth.lost
    assert len(watched.truth.excused) == 1


def test_an_instance_that_was_away_is_no_excuse_and_their_database_is() -> None:
    """There are others, but they can do nothing without what they share."""
    for target, lost in ((INSTANCE, 1), (DATABASE, 0)):
        watched = Watched()
        watched.disturbances.add(target, "killed", 40.0, 60.0)
        watched.look(60.0, End.RAN_OUT, "timer")
        assert len(watched.truth.lost) == lost, target


def test_a_disturbance_that_left_a_fair_chance_is_no_excuse() -> None:
    """It was over early enough, or it was somebody else's."""
    for target, until in ((DAEMON, 60.0 - FAIR_CHANCE - 0.1), ("other.test", 60.0), (SFU, 60.0)):
        watched = Watched()
        watched.disturbances.add(target, "down", 40.0, until)
        watched.look(60.0, End.RAN_OUT, "timer")
        assert len(watched.truth.lost) == 1, target


def test_a_definite_departure_while_the_sfu_cannot_be_asked_is_the_named_exception() -> None:
    """Only after a goodbye, and only while the SFU was disturbed."""
    watched = Watched()
    watched.membership.goodbyes.append(20.0)
    watched.disturbances.add(SFU, "hang", 19.0, 24.0)
    watched.look(23.0, End.SENT)
    assert not watched.truth.lost
    assert len(watched.truth.excused) == 1


def test_two_goodbyes_within_a_look_while_webhooks_go_astray_are_the_other_one() -> None:
    """Of the return in between nobody heard, and the look came when the participant was away again."""
    for between, excused in ((2.0, 1), (10.0, 0)):
        watched = Watched()
        watched.membership.goodbyes += [20.0 - between, 20.0]
        watched.disturbances.add(WEBHOOKS, "astray", 0.0, 19.0)
        watched.look(22.0, End.SENT)
        assert len(watched.truth.excused) == excused


def test_the_end_after_a_departure_is_no_harm_and_its_lateness_is_kept() -> None:
    """The normal case."""
    watched = Watched()
    watched.membership.left_at = watched.membership.departed_at = 20.0
    assert watched.look(22.5, End.SENT) == []
    assert watched.truth.lateness == [(HOME, True, 2.5)]


def test_a_pending_event_long_after_the_departure_is_a_ghost_once() -> None:
    """However often it is looked at; and only the time counts in which nothing was disturbed."""
    watched = Watched()
    watched.membership.left_at = watched.membership.departed_at = 20.0
    watched.disturbances.add(SFU, "hang", 30.0, 40.0)
    assert watched.look(20.0 + GHOST_AFTER + 9.0) == []
    watched.look(20.0 + GHOST_AFTER + 11.0)
    watched.look(20.0 + GHOST_AFTER + 12.0)
    assert len(watched.truth.ghosts) == 1


def test_an_old_event_that_fires_after_its_replacement_was_confirmed_is_harm() -> None:
    """It removes the new membership."""
    watched = Watched()
    watched.membership.left_at = watched.membership.departed_at = 20.0
    watched.membership.replaced_at = 22.0
    watched.look(60.0, End.RAN_OUT, "timer")
    assert len(watched.truth.stale) == 1


@pytest.mark.slow
@pytest.mark.parametrize("instances", [0, 3], ids=["one daemon", "three instances"])
async def test_a_minute_with_few_people(tmp_path: Path, instances: int) -> None:
    """The whole thing: it ends by itself, with restarts, departures and kills of the daemon behind it, and nobody is dropped or forgotten."""
    found = await Soak(Settings(minutes=1.0, seed=7, people=60, instances=instances), tmp_path, talkative=False).run()

    assert found["failures"] == [], as_text(found)
    assert found["daemon"]["started"] > max(1, instances)
    assert found["restarted"]["by_the_daemon"] > found["delegated"]["rows"]  # more than the one that confirms each
    assert found["ended"]["sent"] > 0
    assert found["database"]["states"] == {"done": found["delegated"]["rows"]}
