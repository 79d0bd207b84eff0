"""How many delegations of a user are in doubt, by a virtual clock."""

import pytest
from sfu_delegate.delegation.doubts import FORGOTTEN_AFTER, Doubts, party
from sfu_delegate.delegation.model import DelayedEvent, Outcome, State

from tests.rows import HOMESERVER, NOW, row

ALICE = "@alice:hs.test"
WAITING = row(user=ALICE, verified_at=None)
CONFIRMED = WAITING._replace(verified_at=NOW)


def done(outcome: Outcome, **changes: object) -> DelayedEvent:
    return WAITING._replace(state=State.DONE, outcome=outcome, **changes)  # type: ignore[arg-type]


def test_it_counts_until_it_is_confirmed() -> None:
    """As many as there are, for as long as it takes, and none when the homeserver has restarted them."""
    doubts = Doubts()
    for id in range(3):
        doubts.changed(id, WAITING, NOW)
        doubts.changed(id, WAITING._replace(attempts=1), NOW)
    assert doubts.of(ALICE, NOW + 10 * FORGOTTEN_AFTER) == 3
    for id in range(3):
        doubts.changed(id, CONFIRMED, NOW)
    assert doubts.of(ALICE, NOW) == 0
    assert doubts.of("@bob:hs.test", NOW) == 0


@pytest.mark.parametrize(
    ("end", "left"),
    [
        (done(Outcome.UNKNOWN), 1),
        (done(Outcome.REJECTED), 1),
        (done(Outcome.ALREADY_ENDED), 1),
        (done(Outcome.WITHDRAWN, claim=1), 1),
        (done(Outcome.WITHDRAWN, claim=0), 0),
        (done(Outcome.SENT), 0),
        (done(Outcome.CANCELLED), 0),
        (done(Outcome.REPLACED), 0),
        (WAITING._replace(token=b"sealed"), 0),
    ],
)
def test_what_never_was_confirmed_is_forgotten_slowly(end: DelayedEvent, left: int) -> None:
    """Unless the homeserver did what was asked, or nothing was asked for."""
    doubts = Doubts()
    doubts.changed(1, WAITING, NOW)
    doubts.changed(1, end, NOW)
    assert doubts.of(ALICE, NOW) == pytest.approx(left)
    doubts.changed(1, None, NOW)  # its history is deleted
    assert doubts.of(ALICE, NOW) == pytest.approx(left)
    assert doubts.of(ALICE, NOW + FORGOTTEN_AFTER / 2) == pytest.approx(left / 2)
    assert doubts.of(ALICE, NOW + FORGOTTEN_AFTER) == 0


def test_one_that_is_delegated_again_after_its_end_counts_again() -> None:
    """The same made-up delay_id is no way around."""
    doubts = Doubts()
    for _ in range(4):
        doubts.changed(1, WAITING, NOW)
        doubts.changed(1, done(Outcome.UNKNOWN), NOW)
    assert doubts.of(ALICE, NOW) == pytest.approx(4)


@pytest.mark.parametrize("other", [WAITING._replace(token=b"sealed"), WAITING._replace(user="@bob:hs.test"), CONFIRMED])
def test_only_what_was_counted_is_taken_off(other: DelayedEvent) -> None:
    """A row of somebody else, of a client's token (which has a rate of its own), or of before the start gives nobody credit."""
    doubts = Doubts()
    doubts.changed(1, WAITING, NOW)
    for change in (other, done(Outcome.WITHDRAWN, user=other.user, claim=0), None):
        doubts.changed(2, change, NOW)
    assert doubts.of(ALICE, NOW) == 1


def test_an_event_that_changes_hands_counts_for_its_new_user() -> None:
    """And for that one only."""
    doubts = Doubts()
    doubts.changed(1, WAITING._replace(user=None), NOW)
    assert doubts.of(party(None, HOMESERVER), NOW) == 1
    doubts.changed(1, WAITING, NOW)
    assert (doubts.of(party(None, HOMESERVER), NOW), doubts.of(ALICE, NOW)) == (0, 1)


def test_only_so_many_users_are_remembered() -> None:
    """The one that was heard of least recently is forgotten first."""
    doubts = Doubts(most=2)
    for id, user in enumerate(("a", "b", "a", "c")):
        doubts.changed(id, WAITING._replace(user=user), NOW)
        doubts.changed(id, done(Outcome.UNKNOWN, user=user), NOW)
    assert [doubts.of(user, NOW) for user in ("a", "b", "c")] == pytest.approx([2, 0, 1])
