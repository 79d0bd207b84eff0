"""Do the clocks agree? Seen by the `Date` of an HTTP answer, which has whole seconds."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from sfu_delegate.doctor.findings import Finding, ok, problem, skipped, warning
from sfu_delegate.doctor.words import listed, spoken
from sfu_delegate.livekit.tokens import LEEWAY

NOTICED: Final = 5.0  # seconds: time synchronisation stays far below


@dataclass(frozen=True, slots=True)
class Offset:
    """By how many seconds a server's clock is ahead of ours: no less and no more than these."""

    least: float
    most: float

    @property
    def surely(self) -> float:
        """What it is ahead by, or behind (negative), for certain."""
        return self.least if self.least > 0 else min(self.most, 0.0)


def offset(date: float | None, sent_at: float, answered_at: float) -> Offset | None:
    """What the `Date` of an answer says, in Unix seconds; the other two are ours. None: there was none."""
    return None if date is None else Offset(date - answered_at, date + 1.0 - sent_at)


def judge_clock(seen: Offset | None, whose: str) -> Finding:
    """The clock of a server. `whose` is its kind, such as "SFU"."""
    if seen is None:
        return skipped("it does not tell the time: its answers have no Date")
    off = seen.surely
    if abs(off) < NOTICED:
        return ok("it agrees with ours" if not off else f"it differs from ours by {spoken(abs(off))}")
    evidence = f"it is {spoken(abs(off))} {'ahead of' if off > 0 else 'behind'} ours"
    remedy = f"synchronise the clocks (chrony, systemd-timesyncd) of this machine and of the {whose}'s: `timedatectl` on both tells which is wrong"
    if abs(off) < LEEWAY:
        return warning(f"{evidence}; up to {LEEWAY:g} s are tolerated", remedy)
    if whose == "SFU":
        return problem(f"{evidence}: webhooks and access tokens are signed with times, of which {LEEWAY:g} s of difference are tolerated", remedy)
    return warning(f"{evidence}: when countdowns began cannot be told, so that events are restarted more often", remedy)


def judge_own_clock(seen: Mapping[str, Offset | None]) -> Finding:
    """This machine's own, by all others: where most of them say that it is wrong, it is."""
    told = {name: one for name, one in seen.items() if one is not None}
    if not told:
        return skipped("no server that was asked told the time")
    off = {name: one.surely for name, one in told.items() if abs(one.surely) >= NOTICED}
    if not off:
        return ok(f"it agrees with {'that' if len(told) == 1 else 'those'} of {listed(list(told))}")
    same_side = all(value > 0 for value in off.values()) or all(value < 0 for value in off.values())
    if len(told) > 1 and len(off) == len(told) and same_side:
        nearest = min(off.values(), key=abs)
        wrong = (
            f"all that were asked ({listed(list(told))}) are at least {spoken(abs(nearest))} {'ahead of' if nearest > 0 else 'behind'} this machine"
        )
        remedy = "synchronise this machine's clock (chrony, systemd-timesyncd): `timedatectl` tells whether that is on"
        return problem(wrong, remedy) if abs(nearest) >= LEEWAY else warning(wrong, remedy)
    return warning(
        f"it differs from that of {listed(list(off))}"
        + (f", and agrees with that of {listed([n for n in told if n not in off])}" if len(off) < len(told) else ""),
        "see there",
    )
