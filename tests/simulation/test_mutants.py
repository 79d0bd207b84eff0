"""The simulation can fail: rules that are broken on purpose are found within a few histories of the right kind, and the real rules pass the same."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import pytest
from sfu_delegate.delegation import lifecycle, presence, urgency
from sfu_delegate.delegation.model import Accept, Answered, DelayedEvent, Looked, Outcome, Presence, Seen, Sighting, State, Verdict
from sfu_delegate.delegation.policy import Policy
from sfu_delegate.delegation.presence import Finding, Sign
from sfu_delegate.delegation.reach import Reach
from sfu_delegate.delegation.replies import Accepted, Touched
from sfu_delegate.engine import Engine, _Work
from sfu_delegate.store.sqlite import SqliteStore, SqliteTransaction

from tests.simulation.daemon import Daemon
from tests.simulation.histories import History, Op, Someone, make
from tests.simulation.shrinking import failure

Patch = pytest.MonkeyPatch


def by_identity(patch: Patch) -> None:
    """A `left` ends whatever session its participant has."""
    real = presence.of_webhook

    def of_webhook(row: DelayedEvent, seen: Seen, now: float, policy: Policy) -> Finding:
        return real(row, seen if seen.what is Sighting.JOINED else seen._replace(sid=""), now, policy)

    patch.setattr(presence, "of_webhook", of_webhook)


def no_tombstones(patch: Patch) -> None:
    """A late `joined` of a session that has ended brings it back."""
    real = presence.of_webhook

    def of_webhook(row: DelayedEvent, seen: Seen, now: float, policy: Policy) -> Finding:
        if seen.what is Sighting.JOINED:
            row = row._replace(sessions=tuple(session for session in row.sessions if session.live))
        return real(row, seen, now, policy)

    patch.setattr(presence, "of_webhook", of_webhook)


def first_absence(patch: Patch) -> None:
    """Who is missing from one list is gone."""
    real = presence.of_look

    def of_look(row: DelayedEvent, look: Looked, now: float, policy: Policy) -> Finding:
        finding = real(row, look, now, policy)
        absent = finding.sign is Sign.ABSENT and row.presence is Presence.CONNECTED
        return finding._replace(sign=Sign.REMOVED) if absent else finding

    patch.setattr(presence, "of_look", of_look)


def failing_look(patch: Patch) -> None:
    """An SFU that cannot be asked has nobody in its rooms."""
    real = presence.of_look

    def of_look(row: DelayedEvent, look: Looked, now: float, policy: Policy) -> Finding:
        return real(row, look if look.participants is not None else replace(look, participants=(), recovered_at=0.0), now, policy)

    patch.setattr(presence, "of_look", of_look)


def for_ever_expected(patch: Patch) -> None:
    """Somebody who never comes is waited for."""
    real = presence.of_look

    def of_look(row: DelayedEvent, look: Looked, now: float, policy: Policy) -> Finding:
        finding = real(row, look, now, policy)
        return finding._replace(sign=Sign.ABSENT) if row.presence is Presence.EXPECTED and finding.sign is Sign.GIVEN_UP else finding

    patch.setattr(presence, "of_look", of_look)


def forgetful(patch: Patch) -> None:
    """Whether an ending was tried before is not remembered."""
    real = lifecycle.advance

    def advance(row: DelayedEvent, given: lifecycle.Given, now: float, policy: Policy, random: float) -> DelayedEvent:
        return real(row._replace(end_tried=False) if row.state is not State.DONE else row, given, now, policy, random)

    patch.setattr(lifecycle, "advance", advance)


def mistake_answers(patch: Patch, how: Callable[[DelayedEvent, Answered, float], Answered]) -> None:
    """An answer is taken for what `how` makes of it."""
    real = lifecycle.advance

    def advance(row: DelayedEvent, given: lifecycle.Given, now: float, policy: Policy, random: float) -> DelayedEvent:
        return real(row, how(row, given, now) if isinstance(given, Answered) else given, now, policy, random)

    patch.setattr(lifecycle, "advance", advance)


def answer_time(patch: Patch) -> None:
    """A countdown is thought to have begun when the answer came."""
    mistake_answers(patch, lambda _, answer, now: answer._replace(sent_at=now))


def never_again(patch: Patch) -> None:
    """A restart that failed waits for its normal time."""
    real = lifecycle.advance

    def advance(row: DelayedEvent, given: lifecycle.Given, now: float, policy: Policy, random: float) -> DelayedEvent:
        new = real(row, given, now, policy, random)
        failed = isinstance(given, Answered) and given.verdict in (Verdict.FAILED, Verdict.UNCERTAIN) and new is not row
        return new._replace(due=now + 60.0) if failed and new.state is State.LIVE else new

    patch.setattr(lifecycle, "advance", advance)


def left_alone(patch: Patch) -> None:
    """A superseded event is forgotten, and not cancelled."""

    def supersede(row: DelayedEvent, now: float, policy: Policy, random: float) -> DelayedEvent:
        return row._replace(state=State.DONE, outcome=Outcome.REPLACED, finished_at=now, look_at=None, lane=None, due=None, harm=None, claimed=False)

    patch.setattr(lifecycle, "supersede", supersede)


def without_limits(patch: Patch) -> None:
    """A refusal is just one more answer."""

    def refused(pace: urgency.Pace, sent_at: float, retry_after: float | None, now: float) -> None:
        pace.in_flight = max(0, pace.in_flight - 1)

    patch.setattr(urgency.Pace, "refused", refused)


def no_routine(patch: Patch) -> None:
    """Rooms are looked at only if a webhook was a reason."""
    patch.setattr(Engine, "_next_routine", lambda *_: inf)


def no_looks_at_start(patch: Patch) -> None:
    """A start believes what the last process knew."""
    patch.setattr(SqliteTransaction, "ask_rooms", lambda *_: None)


def clock_is_right(patch: Patch) -> None:
    """A start takes the times in the database for those of its own clock."""
    real = SqliteStore.recover

    def recover(store: SqliteStore, now: float, policy: Policy, *, clock_unsure: bool) -> int:
        return real(store, now, policy, clock_unsure=False)

    patch.setattr(SqliteStore, "recover", recover)


def leases_for_ever(patch: Patch) -> None:
    """What a process that is dead had claimed stays claimed."""
    real = lifecycle.claim
    patch.setattr(lifecycle, "claim", lambda row, now, policy, **how: real(row, now, replace(policy, lease=1e6), **how))
    patch.setattr(SqliteStore, "recover", lambda *_, **__: 0)


def dropped_webhooks(patch: Patch) -> None:
    """A departure is acknowledged, and now and then forgotten."""
    real: Callable[..., Any] = Engine._seen
    seen_so_far: list[Seen] = []

    def seen(engine: Engine, work: Any, given: Seen) -> Any:
        seen_so_far.append(given)
        if given.what is Sighting.LEFT and len(seen_so_far) % 3 == 0:
            return Touched(0)
        return real(engine, work, given)

    patch.setattr(Engine, "_seen", seen)


# ── several instances ──


def cut_off_unaware(patch: Patch) -> None:
    """An instance that alone cannot reach a homeserver goes on claiming what others could do."""
    patch.setattr(Engine, "_weigh_words_of", lambda *_: None)


def never_outvoted(patch: Patch) -> None:
    """An instance that alone cannot ask the SFU judges who is there."""
    patch.setattr(Reach, "outvoted", lambda *_: False)


def nothing_taken_over(patch: Patch) -> None:
    """Nobody asks for what others have left."""
    patch.setattr(Engine, "refresh", lambda engine, now: engine._wake(now))


def believed_to_be_covered(patch: Patch) -> None:
    """An instance that starts takes it for granted that another one has listened."""
    patch.setattr(Engine, "_cover", lambda *_: None)


def acts_on_old_claims(patch: Patch) -> None:
    """An instance that was stopped does what it had claimed, however long ago."""
    patch.setattr(Daemon, "_is_over", lambda *_: False)


def believes_any_answer(patch: Patch) -> None:
    """An answer counts, whoever has claimed its action since."""
    mistake_answers(patch, lambda row, answer, _: answer._replace(claim=row.claim))


def countdown_from_now(patch: Patch) -> None:
    """What a homeserver shows has begun just now."""
    real = lifecycle._shown

    def shown(row: DelayedEvent, _: float, now: float, policy: Policy, random: float) -> DelayedEvent:
        return real(row, now, now, policy, random)

    patch.setattr(lifecycle, "_shown", shown)


def one_form_only(patch: Patch) -> None:
    """Whoever delegates by another endpoint is somebody else."""
    real = Engine._accept

    def accepted(engine: Engine, work: _Work, accept: Accept) -> Accepted:
        return real(engine, work, replace(accept, twin=None))

    patch.setattr(Engine, "_accept", accepted)


@dataclass(frozen=True)
class Mutant:
    """A broken rule, the kind of trouble that shows it, and the promises that may be found broken."""

    mutate: Callable[[Patch], None]
    profile: str | Callable[[int], History]
    found: frozenset[str]
    seeds: range

    def history(self, seed: int) -> History:
        """The one of that seed."""
        return make(seed, self.profile) if isinstance(self.profile, str) else self.profile(seed)


def _mutant(mutate: Callable[[Patch], None], profile: str | Callable[[int], History], *found: str, seeds: int = 40, first: int = 0) -> Mutant:
    return Mutant(mutate, profile, frozenset(found), range(first, first + seeds))


def coming_back_unheard(seed: int) -> History:
    """One of two instances cannot ask the SFU, and people leave and come back, of which most webhooks are lost."""
    people = (Someone("alice", "red", 300.0), Someone("bob", "red", 300.0))
    back = [Op(100.0 + 20.0 * number, "rejoin", who.name, 0.5) for number in range(8) for who in people]
    ops = (Op(5.0, "come", "alice"), Op(6.0, "come", "bob"), Op(50.0, "no sfu", f"i{seed % 2}", 300.0), Op(98.0, "lose webhooks", "red", 190.0))
    return History(seed, people, (*ops, *back), 400.0, instances=2)


DROPPED = ("dropped by us", "dropped by time")
MUTANTS = [
    _mutant(by_identity, "webhooks", "lost", *DROPPED),
    _mutant(no_tombstones, "webhooks", "lost", "forgotten", seeds=150),
    _mutant(first_absence, "lies", *DROPPED, seeds=200),
    _mutant(failing_look, "sfu", *DROPPED, seeds=200),
    _mutant(for_ever_expected, "calm", "forgotten"),
    _mutant(forgetful, "homeserver", "outcome"),
    _mutant(answer_time, "calm", "countdown"),
    _mutant(never_again, "homeserver", "dropped by time"),
    _mutant(left_alone, "webhooks", "dropped by time", "forgotten"),
    _mutant(without_limits, "crowd", "rate", "dropped by time"),
    _mutant(no_routine, "webhooks", "forgotten"),
    _mutant(no_looks_at_start, "process", "forgotten"),
    _mutant(clock_is_right, "process", "dropped by time", "forgotten", "busy loop"),
    _mutant(leases_for_ever, "process", "dropped by time", "forgotten"),
    _mutant(dropped_webhooks, "calm", "lost", "forgotten"),
    _mutant(countdown_from_now, "service", "countdown", "dropped by time"),
    _mutant(one_form_only, "service", "lost", *DROPPED),
    _mutant(cut_off_unaware, "instances", "dropped by time", seeds=200),
    _mutant(never_outvoted, coming_back_unheard, *DROPPED),
    _mutant(nothing_taken_over, "instances", "dropped by time", "forgotten"),
    _mutant(believed_to_be_covered, "instances", "forgotten", seeds=100),
    _mutant(acts_on_old_claims, "instances", *DROPPED, first=400),
    _mutant(believes_any_answer, "instances", "fence", *DROPPED, seeds=200),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.mutate.__name__)
def test_a_broken_rule_is_found(mutant: Mutant, monkeypatch: Patch) -> None:
    """Within so many histories, by a promise that it breaks; with the real rules that history keeps all promises."""
    history = how = None
    with monkeypatch.context() as patch:
        mutant.mutate(patch)
        for seed in mutant.seeds:
            history = mutant.history(seed)
            how = failure(history)
            if how is not None:
                break
    assert how in mutant.found, f"{mutant.mutate.__doc__} Found: {how}"
    assert history is not None
    assert failure(history) is None
