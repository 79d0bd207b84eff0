"""Homeservers and SFUs that this instance cannot reach, though others can: a firewall, a resolver, a route of its own. No I/O, no clock.

Each instance tells the others which homeservers and SFUs fail for it, and of the homeservers that fail for somebody, when they last answered it. One
for which a homeserver fails leaves what is due there to those for which it does not, for a while: then it is tried by whoever is there. One whose
look at a room fails concludes nothing from that while somebody is there for whom the SFU does not fail. What fails for all, nobody leaves to anybody.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from math import inf
from typing import NamedTuple

LEFT = 2.5
"""Seconds for which what is due is left to others who may be able to do it: they hear of it within one."""

LEFT_TO_THE_ABLE = 15.0
"""The same where the homeserver has answered one of them since it began to fail for us."""

PROBE_EVERY = 10.0
"""Seconds between two requests by which is found out whether the homeserver can be reached again."""

NAMED_MOST = 500
"""Homeservers that are told. Where more fail, something else is wrong than that one instance cannot reach them."""


class Word(NamedTuple):
    """What one instance says of homeservers, and of SFUs."""

    failing: frozenset[str]
    answered: Mapping[str, float]  # Unix seconds: when the latest of the requests that were answered had been sent
    sfus: frozenset[str] = frozenset()  # those that fail


NOTHING_SAID = Word(frozenset(), {})


def told(failing: Collection[str], answered: Mapping[str, float], sfus: Collection[str]) -> str:
    """As text, for the others; empty if there is nothing to say."""
    if not failing and not answered and not sfus:
        return ""
    some = dict(sorted(answered.items())[:NAMED_MOST])
    return json.dumps({"failing": sorted(failing)[:NAMED_MOST], "answered": some, "sfus": sorted(sfus)})


def understood(text: str) -> Word:
    """What `told` gave; nothing where it cannot be read: another version may say it in another way."""
    if not text:
        return NOTHING_SAID
    try:
        said = json.loads(text)
        answered = {str(name): float(at) for name, at in said["answered"].items()}
        return Word(frozenset(map(str, said["failing"])), answered, frozenset(map(str, said["sfus"])))
    except (ValueError, TypeError, KeyError, AttributeError):
        return NOTHING_SAID


def left_for(homeserver: str, failing_since: float, others: Iterable[Word]) -> float:
    """Seconds for which what is due at a homeserver that fails for us is left to the others that are alive."""
    able = [other for other in others if homeserver not in other.failing]
    if not able:
        return 0.0
    return LEFT_TO_THE_ABLE if any(other.answered.get(homeserver, -inf) > failing_since for other in able) else LEFT
