"""Homeservers and SFUs that this instance cannot reach, though others can: a firewall, a resolver, a route of its own. No I/O, no clock.

Each instance tells the others which homeservers and SFUs fail for it, and of the homeservers that fail for somebody, when they last answered it.

- One for which a homeserver fails makes restarts there without claiming them while others are there, so that it is in nobody's way: a restart too
  many harms nobody. By these it finds out that it can reach the homeserver again.
- Endings it leaves for a while to those for which the homeserver does not fail.
- One whose look at a room fails concludes nothing from that while somebody is there for whom the SFU does not fail.

What fails for all, nobody leaves to anybody.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

from sfu_delegate.delegation.model import DelayedEvent, Lane

LEFT = 2.5
"""Seconds for which an ending that is due is left to others who may be able to do it: they hear of it within one."""

LEFT_TO_THE_ABLE = 15.0
"""The same where the homeserver has answered one of them since it began to fail for us."""

TRIED_EVERY = 1.0
"""Seconds after which is looked again at what is due at a homeserver that fails for us."""

RESTARTED_EVERY = 2.0
"""Seconds between two restarts of the same event that are not claimed."""

PROBE_EVERY = 10.0
"""Seconds after which an event is restarted that is not due, if nothing else shows whether the homeserver can be reached again."""

WORDS_COUNT = 10.0
"""Seconds for which words count, when nothing new is heard of anybody."""

NAMED_MOST = 500
"""Homeservers that are told. Where more fail for an instance, nothing is left to it."""


class Word(NamedTuple):
    """What one instance says of homeservers, and of SFUs."""

    failing: frozenset[str]
    answered: Mapping[str, float]  # Unix seconds: when the latest of the requests that were answered had been sent
    sfus: frozenset[str] = frozenset()  # those that fail
    busy: bool = False  # it does nothing for others now: it stops, say

    def able(self, homeserver: str) -> bool:
        """Is there nothing to say against leaving to it what is due at a homeserver?"""
        return not self.busy and homeserver not in self.failing

    def asks(self, sfu: str) -> bool:
        """The same for looks at an SFU's rooms."""
        return not self.busy and sfu not in self.sfus


NOTHING_SAID = Word(frozenset(), {})


def told(failing: Collection[str], answered: Mapping[str, float], sfus: Collection[str], *, busy: bool = False) -> str:
    """As text, for the others; empty if there is nothing to say."""
    if not failing and not answered and not sfus and not busy:
        return ""
    some = dict(sorted(answered.items())[:NAMED_MOST])
    busy = busy or len(failing) > NAMED_MOST
    return json.dumps({"failing": sorted(failing)[:NAMED_MOST], "answered": some, "sfus": sorted(sfus), "busy": busy})


def understood(text: str) -> Word:
    """What `told` gave; nothing where it cannot be read: another version may say it in another way."""
    if not text:
        return NOTHING_SAID
    try:
        said = json.loads(text)
        answered = {str(name): float(at) for name, at in said["answered"].items()}
        return Word(frozenset(map(str, said["failing"])), answered, frozenset(map(str, said["sfus"])), bool(said["busy"]))
    except (ValueError, TypeError, KeyError, AttributeError):
        return NOTHING_SAID


def left_for(homeserver: str, failing_since: float, others: Iterable[Word]) -> float:
    """Seconds for which endings that are due at a homeserver that fails for us are left to the others that are alive."""
    able = [other for other in others if other.able(homeserver)]
    if not able:
        return 0.0
    return LEFT_TO_THE_ABLE if any(other.answered.get(homeserver, -inf) > failing_since for other in able) else LEFT


@dataclass(slots=True)
class CutOff:
    """What this instance does at a homeserver that fails for it, while others are there. Times in Unix seconds."""

    homeserver: str
    probe_at: float  # something is restarted that is not due
    left: float = 0.0  # seconds for which endings are left to the others
    tried_at: float = -inf  # when it was last looked at what is due
    tried: dict[int, float] = field(default_factory=dict)  # by event: when it was lately restarted without a claim

    def claims(self, row: DelayedEvent, now: float) -> bool:
        """Is this row, which is due, ours to claim?"""
        return row.lane is Lane.END and row.due is not None and row.due <= now - self.left

    def begins(self, due: float) -> float:
        """When it is looked at what is due."""
        return max(min(due, self.probe_at), self.tried_at + TRIED_EVERY)

    def was_tried(self, now: float) -> None:
        """It was looked for something to be tried; the next probe is some time from now, whether or not there was anything."""
        self.tried_at = now
        if now >= self.probe_at:
            self.probe_at = now + PROBE_EVERY

    def tries(self, event: int, now: float) -> None:
        """A restart without a claim is on its way."""
        self.tried[event] = now
        self.probe_at = now + PROBE_EVERY

    def forget(self, now: float) -> None:
        """What was tried long enough ago may be tried again."""
        self.tried = {event: at for event, at in self.tried.items() if 0 <= now - at < RESTARTED_EVERY}
