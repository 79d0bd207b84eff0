"""How many delegations of each user nobody has vouched for yet.

A restart of an event that does not exist costs a homeserver as much as any other, and it may allow few in all: without a bound, one user with made-up
delay_ids takes them from everybody else. So what a user delegates counts until the homeserver has confirmed it, and what ended without is forgotten
slowly.
"""

from collections import Counter, OrderedDict
from collections.abc import Collection
from typing import Final

from sfu_delegate.delegation.model import DelayedEvent, Outcome, State

FORGOTTEN_AFTER: Final = 60.0  # seconds for each
MOST: Final = 100_000  # users of whom what has ended is remembered; the one that was heard of least recently is forgotten first
# A row that ended so was no made-up one: the homeserver has done what we asked for.
_HARMLESS: Final = frozenset({Outcome.SENT, Outcome.CANCELLED, Outcome.REPLACED})


def party(user: str | None, homeserver: str) -> str:
    """Who answers for a delegation. All whose user is not known are one, for each homeserver: participants of their kind are easily made."""
    return user if user is not None else f"somebody of {homeserver}"


class Doubts:
    """The delegations in doubt of each party, in memory: what there was before a restart of the daemon does not count."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._owners: dict[int, str] = {}  # by event that waits
        self._waiting: Counter[str] = Counter()
        self._until: OrderedDict[str, float] = OrderedDict()  # when the last one that has ended is forgotten

    def of(self, who: str, now: float) -> float:
        """How many there are; a fraction where one is half forgotten."""
        return self._waiting[who] + max(0.0, self._until.get(who, now) - now) / FORGOTTEN_AFTER

    @property
    def waiting(self) -> Collection[int]:
        """The rows in doubt."""
        return self._owners.keys()

    def changed(self, id: int, row: DelayedEvent | None, now: float) -> None:
        """A row was made, changed or deleted (None). Those with a client's token are not counted: it has a rate of its own."""
        waits = row is not None and row.verified_at is None and row.state is not State.DONE and row.token is None
        owner = self._owners.pop(id, None)
        if owner is not None:
            self._waiting[owner] -= 1
            if not self._waiting[owner]:
                del self._waiting[owner]
        if row is not None and waits:
            owner = self._owners[id] = party(row.user, row.homeserver)
            self._waiting[owner] += 1
        elif owner is not None and row is not None and row.verified_at is None and not _is_harmless(row):
            self._until[owner] = max(now, self._until.get(owner, now)) + FORGOTTEN_AFTER
            self._until.move_to_end(owner)
            if len(self._until) > self._most:
                self._until.popitem(last=False)


def _is_harmless(row: DelayedEvent) -> bool:
    # Of one that was withdrawn nobody knows whether it was a made-up one; but nothing may have been asked for it.
    return row.outcome in _HARMLESS or (row.outcome is Outcome.WITHDRAWN and not row.claim) or row.token is not None
