"""A batch of inputs becomes one transaction, and replies and claimed actions come out.

The engine must never do I/O but through its store, never read a clock and never wait: `now` is an argument, and what it returns says when it wants
to be called again. It keeps nothing about single delegations between steps; what is due is asked of the database. In memory are only counts, one
`Pace` and one next due time for each homeserver and SFU.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from random import Random

from sfu_delegate.delegation import lifecycle
from sfu_delegate.delegation.model import (
    Accept,
    Action,
    Answered,
    Carried,
    DelayedEvent,
    Due,
    Find,
    Input,
    Lane,
    Looked,
    Note,
    Presence,
    Refuse,
    Room,
    RoomChanged,
    RoomNews,
    Seen,
    Sighting,
    State,
    Task,
    Verdict,
    Withdraw,
)
from sfu_delegate.delegation.policy import Policy
from sfu_delegate.delegation.replies import Accepted, Found, Reply, TooMany, Touched, Withdrawn
from sfu_delegate.delegation.urgency import Pace, choose
from sfu_delegate.store.base import Store, StoreUnavailable, Transaction

LIMITED_WAIT = 1.0  # seconds to leave a homeserver alone that limits us without saying for how long
TIMERS_A_STEP = 256  # a step stays short, however much there is to tidy up


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is accepted."""

    max_per_participant: int = 4  # delegations of one participant that its homeserver has not confirmed yet
    max_per_homeserver: int = 100_000  # delayed events


# ── what comes out ──


@dataclass(frozen=True, slots=True)
class Change:
    """One row before and after one input; `old` is None for a new row."""

    old: DelayedEvent | None
    new: DelayedEvent
    given: Input


@dataclass(frozen=True, slots=True)
class Step:
    """What one step did. It is durable when this is returned."""

    replies: list[Reply | Exception]  # one for each input, in order
    tasks: list[Task]
    wake: float | None  # when to step again if nothing comes in
    changes: list[Change]
    notes: list[Note]


# ── the working set of one step ──


@dataclass(slots=True)
class _Work:
    """What a step has read and changed. Rows are read once, and written once at the end."""

    tx: Transaction
    now: float
    rows: dict[int, DelayedEvent] = field(default_factory=dict)
    before: dict[int, DelayedEvent | None] = field(default_factory=dict)
    known: dict[tuple[str, str, str], list[int]] = field(default_factory=dict)
    known_all: dict[tuple[str, str, str], list[int]] = field(default_factory=dict)
    made: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    opened: Counter[str] = field(default_factory=Counter)  # by homeserver: delayed events accepted in this step
    rooms: dict[tuple[str, str], Room | None] = field(default_factory=dict)
    rooms_before: dict[tuple[str, str], Room | None] = field(default_factory=dict)
    deleted: set[int] = field(default_factory=set)
    changes: list[Change] = field(default_factory=list)
    undo: list[Callable[[], object]] = field(default_factory=list)

    def taken(self, rows: Iterable[DelayedEvent]) -> list[DelayedEvent]:
        """Rows from the database, as this step has them by now."""
        taken = []
        for row in rows:
            if row.id in self.deleted:
                continue
            if row.id not in self.rows:
                self.rows[row.id] = self.before[row.id] = row
            taken.append(self.rows[row.id])
        return taken

    def participant(self, sfu: str, room: str, identity: str, *, finished: bool = False) -> list[DelayedEvent]:
        """A participant's rows; `finished`: also those that are, as far as they are kept for their history."""
        key = (sfu, room, identity)
        known = self.known_all if finished else self.known
        ids = known.get(key)
        if ids is None:
            rows = self.taken(self.tx.of_participant(*key, finished=finished))
            seen = {row.id for row in rows}
            rows += [row for row in self._made(sfu, room) if row.id not in seen and identity in (row.identity, row.alias)]
            known[key] = [row.id for row in rows]
            return rows
        return [self.rows[id] for id in ids if id not in self.deleted]

    def _made(self, sfu: str, room: str) -> list[DelayedEvent]:
        """What this step has opened in a room: the database does not know of it yet."""
        return [self.rows[id] for id in dict.fromkeys(self.made.get((sfu, room), ())) if id not in self.deleted]

    def in_room(self, sfu: str, room: str) -> list[DelayedEvent]:
        rows = self.taken(self.tx.of_room(sfu, room))
        seen = {row.id for row in rows}
        rows += [row for row in self._made(sfu, room) if row.id not in seen]
        return [row for row in rows if row.state is not State.DONE]

    def delegation(self, delegation: str) -> list[DelayedEvent]:
        rows = {row.id: row for row in self.taken(self.tx.of_delegation(delegation))}
        rows.update({row.id: row for row in self.rows.values() if row.id not in self.deleted})
        return sorted(row for row in rows.values() if row.delegation == delegation)

    def get(self, event: int) -> DelayedEvent | None:
        if event in self.rows:
            return None if event in self.deleted else self.rows[event]
        row = self.tx.get(event)
        return None if row is None else self.taken([row])[0]

    def put(self, row: DelayedEvent, given: Input | None) -> None:
        """Note a change; `given` is None for bookkeeping that is no news (claims)."""
        old = self.rows.get(row.id)
        if old is row:
            return
        if old is None:
            self.before[row.id] = None
        if old is None or old.state is State.DONE:  # a new one, or one that is taken up again
            self.made.setdefault((row.sfu, row.room), []).append(row.id)
            self._know(row)
        self.rows[row.id] = row
        if given is not None:
            self.changes.append(Change(old, row, given))
        self.undo.append(lambda: self._undo(row.id, old))

    def _know(self, row: DelayedEvent) -> None:
        for identity in (row.identity, row.alias):
            for known in (self.known, self.known_all):
                ids = None if identity is None else known.get((row.sfu, row.room, identity))
                if ids is not None and row.id not in ids:
                    ids.append(row.id)

    def _undo(self, id: int, old: DelayedEvent | None) -> None:
        if old is not None:
            self.rows[id] = old
            return
        del self.rows[id], self.before[id]
        for ids in (*self.known.values(), *self.known_all.values(), *self.made.values()):
            if id in ids:
                ids.remove(id)

    def room(self, sfu: str, name: str) -> Room | None:
        key = (sfu, name)
        if key not in self.rooms:
            self.rooms[key] = self.rooms_before[key] = self.tx.room(sfu, name)
        return self.rooms[key]

    def put_room(self, sfu: str, name: str, room: Room | None) -> None:
        old = self.room(sfu, name)
        self.rooms[sfu, name] = room
        self.undo.append(lambda: self.rooms.__setitem__((sfu, name), old))

    def delete(self, row: DelayedEvent) -> None:
        self.deleted.add(row.id)

    def save(self) -> list[Note]:
        """Write everything; returns the lines of history that were added."""
        notes: list[Note] = []
        for change in self.changes:
            notes.extend(lifecycle.story(change.old, change.new, change.given, self.now))
        for id, row in self.rows.items():
            before = self.before[id]
            if id in self.deleted:
                if before is not None:
                    self.tx.delete(id)
            elif before is None:
                self.tx.insert(row)
            elif before is not row:
                self.tx.update(before, row)
        for (sfu, name), room in self.rooms.items():
            if room is None and self.rooms_before[sfu, name] is not None:
                self.tx.delete_room(sfu, name)
            elif room is not None and room != self.rooms_before[sfu, name]:
                self.tx.save_room(room)
        notes = [note for note in notes if note.event not in self.deleted]
        if notes:
            self.tx.note(notes)
        return notes


class Engine:
    """Applies inputs to the store, and claims what is to be done next. Used by one thread at a time.

    `in_flight(homeserver)` says how many requests a homeserver gets at the most, `looks_in_flight(sfu)` the same for looks.
    """

    def __init__(
        self,
        store: Store,
        policy: Policy,
        limits: Limits,
        random: Random,
        *,
        in_flight: Callable[[str], int] = lambda _: 16,
        looks_in_flight: Callable[[str], int] = lambda _: 4,
    ):
        self.store = store
        self.policy = policy
        self.limits = limits
        self.stopping = False  # when set, nothing is claimed any more
        self._random = random.random
        self._in_flight = in_flight
        self._looks_in_flight = looks_in_flight
        census = store.census()
        self.states: Counter[tuple[str, str, str]] = Counter(census.states)  # (homeserver, state, presence) → delayed events
        self._due: dict[str, float] = dict(census.schedule)  # by homeserver: nothing is due before
        self._rooms_due: dict[str, float] = dict(census.rooms)  # by SFU: no look is due before
        self._paces: dict[str, Pace] = {}
        self._looks: dict[str, Pace] = {}
        self._under_way: set[tuple[str, int | str, int]] = set()  # (homeserver, event, claim) and (SFU, room, claim)
        self._open: Counter[str] = Counter()  # delayed events by homeserver that are not finished
        for (homeserver, state, _), count in census.states.items():
            if state != State.DONE:
                self._open[homeserver] += count

    # ── one step ──

    def step(self, inputs: Sequence[Input], now: float) -> Step:
        """Apply `inputs` in order, in one transaction, and claim actions for the places that are free.

        An input that raises is answered with its exception, alone. Raises StoreUnavailable when nothing could be kept.
        """
        self._came_back(inputs, now)
        try:
            step, work, due, rooms_due = self.store.atomically(lambda tx: self._step(tx, inputs, now))
        except StoreUnavailable:
            raise
        except Exception as error:
            # Something that only came out when it was written. Whoever it belongs to is answered alone.
            if not inputs:
                raise
            return self._one_by_one(inputs, now) if len(inputs) > 1 else replace(self.step((), now), replies=[error])
        self._due.update(due)
        self._rooms_due.update(rooms_due)
        self._count(work)
        for task in step.tasks:
            self._under_way.add((task.homeserver or task.sfu, task.event or task.room, task.claim))
            (self._look_pace(task.sfu) if task.action is Action.LOOK else self._pace(task.homeserver)).began()
        return replace(step, wake=self._wake(now))

    def _one_by_one(self, inputs: Sequence[Input], now: float) -> Step:
        steps: list[Step] = []
        for given in inputs:
            try:
                steps.append(self.step((given,), now))
            except StoreUnavailable as error:
                # What the steps before it have claimed must still be carried out.
                steps.append(Step([error], [], now, [], []))
        return Step(
            replies=[reply for step in steps for reply in step.replies],
            tasks=[task for step in steps for task in step.tasks],
            wake=steps[-1].wake,
            changes=[change for step in steps for change in step.changes],
            notes=[note for step in steps for note in step.notes],
        )

    def _step(self, tx: Transaction, inputs: Sequence[Input], now: float) -> tuple[Step, _Work, dict[str, float], dict[str, float]]:
        work = _Work(tx, now)
        replies: list[Reply | Exception] = []
        for given in inputs:
            work.undo.clear()
            changes = len(work.changes)
            try:
                replies.append(self._apply(work, given))
            except StoreUnavailable:
                raise
            except Exception as error:
                # The error of one must not undo the others of its batch; whoever waits for the answer reports it.
                for undo in reversed(work.undo):
                    undo()
                del work.changes[changes:]
                replies.append(error)
        tasks, asked = self._claim(work)
        self._schedule_looks(work)
        looks, rooms_asked = self._claim_looks(work)
        notes = work.save()
        due = {homeserver: tx.next_due(homeserver) for homeserver in asked}
        rooms_due = {sfu: tx.next_room_due(sfu) for sfu in rooms_asked}
        step = Step(replies, tasks + looks, None, work.changes, notes)
        return step, work, self._merged_due(work, due), self._merged_rooms_due(work, rooms_due)

    def _merged_due(self, work: _Work, asked: dict[str, float | None]) -> dict[str, float]:
        due = {homeserver: (at if at is not None else float("inf")) for homeserver, at in asked.items()}
        for id, row in work.rows.items():
            if row.due is not None and id not in work.deleted and row.homeserver not in asked and work.before[id] is not row:
                due[row.homeserver] = min(row.due, due.get(row.homeserver, self._due.get(row.homeserver, float("inf"))))
        return due

    def _merged_rooms_due(self, work: _Work, asked: dict[str, float | None]) -> dict[str, float]:
        due = {sfu: (at if at is not None else float("inf")) for sfu, at in asked.items()}
        for (sfu, _), room in work.rooms.items():
            if room is not None and room.due is not None and sfu not in asked:
                due[sfu] = min(room.due, due.get(sfu, self._rooms_due.get(sfu, float("inf"))))
        return due

    # ── inputs ──

    def _came_back(self, inputs: Sequence[Input], now: float) -> None:
        """Free the places of what was answered, whether or not the answer can be kept; once, even if it is handed in again."""
        for given in inputs:
            if isinstance(given, Answered):
                key = (given.homeserver, given.event, given.claim)
                if key in self._under_way:
                    self._under_way.discard(key)
                    pace = self._pace(given.homeserver)
                    pace.ended(answered=given.verdict not in (Verdict.FAILED, Verdict.UNCERTAIN, Verdict.LIMITED))
                    if given.verdict is Verdict.LIMITED and not given.alone:
                        wait = LIMITED_WAIT if given.retry_after is None else min(given.retry_after, self.policy.retry_most)
                        pace.limited(wait * (1.0 + self._random() / 10), now)  # those who were told the same time do not come at once
            elif isinstance(given, Looked):
                look = (given.sfu, given.room, given.claim)
                if look in self._under_way:
                    self._under_way.discard(look)
                    self._look_pace(given.sfu).ended(answered=given.participants is not None)

    def _apply(self, work: _Work, given: Input) -> Reply:
        match given:
            case Seen():
                return self._seen(work, given)
            case Answered():
                return self._answered(work, given)
            case Looked():
                return self._looked(work, given)
            case Accept():
                return self._accept(work, given)
            case Withdraw():
                rows = work.delegation(given.delegation)
                return Withdrawn(tuple(self._advance(work, row, given) for row in rows))
            case Refuse():
                return self._refuse(work, given)
            case Find():
                rows = work.delegation(given.delegation)
                return Found(tuple(rows), tuple(work.tx.history([row.id for row in rows])))
            case RoomChanged():
                return self._room_changed(work, given)
            case Due():
                row = work.get(given.event)
                return Touched(0 if row is None else len([self._advance(work, row, given)]))

    def _advance(self, work: _Work, row: DelayedEvent, given: Seen | Looked | Answered | Withdraw | Due | Accept) -> DelayedEvent:
        new = lifecycle.advance(row, given, work.now, self.policy, self._random())
        work.put(new, given)
        return new

    def _seen(self, work: _Work, seen: Seen) -> Touched:
        rows = [row for row in work.participant(seen.sfu, seen.room, seen.identity) if row.state is not State.DONE]
        for row in rows:
            new = self._advance(work, row, seen)
            if seen.what is Sighting.LEFT and new.presence is Presence.CONNECTED and new.sessions != row.sessions:
                self._doubt_if_late(work, row, new)
        return Touched(len(rows))

    def _doubt_if_late(self, work: _Work, row: DelayedEvent, new: DelayedEvent) -> None:
        """An old session ended and a newer one goes on. Usually that is told at once; long after, it shows that a node had been away, and then
        lists are wrong for long (recorded with LiveKit 1.13: a connected participant was missing from the list until it published a track)."""
        room = work.room(row.sfu, row.room)
        goes_on = max(session.heard_at for session in new.sessions if session.live)
        if room is not None and new.live_sids < row.live_sids and work.now > goes_on + self.policy.doubt_after:
            work.put_room(row.sfu, row.room, room._replace(doubt_until=work.now + self.policy.doubt))

    def _room_changed(self, work: _Work, news: RoomChanged) -> Touched:
        room = work.room(news.sfu, news.room)
        if room is None:
            return Touched(0)
        doubt = work.now + self.policy.doubt
        if news.what is RoomNews.STARTED:
            if news.id and news.id == room.started_by:
                return Touched(1)  # told twice
            # The same sid a second time: the room came up on another node of a distributed SFU.
            again = bool(news.room_sid) and news.room_sid == room.room_sid
            room = room._replace(room_sid=news.room_sid, started_by=news.id, started_at=work.now, doubt_until=doubt if again else 0.0)
        elif any(row.presence is Presence.CONNECTED for row in work.in_room(news.sfu, news.room)):
            room = room._replace(doubt_until=doubt)
        work.put_room(news.sfu, news.room, room)
        return Touched(1)

    def _looked(self, work: _Work, look: Looked) -> Touched:
        room = work.room(look.sfu, look.room)
        if room is None or not room.claimed or room.claim != look.claim:
            return Touched(0)
        look = replace(look, doubtful=work.now < room.doubt_until)
        rows = [self._advance(work, row, look) for row in work.in_room(look.sfu, look.room)]
        if not any(row.state is not State.DONE for row in rows):
            work.put_room(look.sfu, look.room, None)
            return Touched(len(rows))
        at = min((row.look_at for row in rows if row.look_at is not None), default=None)
        failures = room.failures + 1 if look.participants is None else 0
        if at is not None and failures:
            pause = min(self.policy.look_again * 2.0 ** min(failures - 1, 10), self.policy.look_again_most) * (0.75 + self._random() / 4)
            # Not even an SFU that does not answer holds up a departure, which has its own rule for that case.
            departed = [row.look_at for row in rows if row.look_at is not None and row.presence is Presence.AWAY and not row.live_sids]
            at = min([max(at, work.now + pause), *(max(due, work.now + self.policy.look_gap) for due in departed)])
        elif at is not None:
            at = max(at, look.sent_at + self.policy.look_gap)
        work.put_room(look.sfu, look.room, room._replace(due=at, failures=failures, claimed=False))
        return Touched(len(rows))

    def _accept(self, work: _Work, accept: Accept) -> Accepted:
        rows = work.participant(accept.sfu, accept.room, accept.identity, finished=True)
        if accept.alias is not None:
            seen = {row.id for row in rows}
            rows += [row for row in work.participant(accept.sfu, accept.room, accept.alias, finished=True) if row.id not in seen]
        unfinished = [row for row in rows if row.state is not State.DONE]
        current = [row for row in unfinished if row.state is not State.SUPERSEDED]
        same = self._same(current, accept)
        if same:
            if accept.token is not None:  # a fresh one, perhaps because the old one expires
                for row in same:
                    work.put(row._replace(token=accept.token), accept)
            return Accepted(same[0].delegation, False, tuple(work.rows[row.id] for row in same))
        self._admit(work, current, accept)
        current = [self._advance(work, row, accept) for row in unfinished]
        like = max(current, key=lambda row: (row.accepted_at, row.id), default=rows[-1] if rows else None)
        # Later than what there is, also within one step, so that it is known which delegation is the newest.
        stamp = max([work.now, *(row.accepted_at + 0.001 for row in current)])
        by_delay_id = {row.delay_id: row for row in rows} | {row.delay_id: row for row in current}
        made = []
        carried = []
        for event in accept.events:
            old = by_delay_id.get(event.delay_id)
            if old is not None and old.state is State.LIVE:
                carried.append(Carried(old.id, old.delegation, old.delay, old.on_end, old.token, old.accepted_at, old.verified_at))
            new = lifecycle.delegate(old, old.id if old else work.tx.new_id(), accept, event, like, work.now, self.policy)
            new = new._replace(accepted_at=stamp)
            work.put(new, accept)
            made.append(new)
        self._supersede_others(work, made[0])
        work.opened[accept.homeserver] += len(made)
        return Accepted(accept.delegation, True, tuple(work.rows[row.id] for row in made), tuple(carried))

    def _refuse(self, work: _Work, refuse: Refuse) -> Withdrawn:
        rows = []
        back = {carried.event: carried for carried in refuse.back}
        for row in work.delegation(refuse.delegation):
            was = back.get(row.id)
            if was is not None and row.state is not State.DONE:
                work.put(
                    row._replace(
                        delegation=was.delegation,
                        delay=was.delay,
                        on_end=was.on_end,
                        token=was.token,
                        accepted_at=was.accepted_at,
                        verified_at=row.verified_at or was.verified_at,
                        harm=row.running_since + was.delay,
                    ),
                    refuse,
                )
                rows.append(work.rows[row.id])
            else:
                rows.append(self._advance(work, row, Withdraw(refuse.delegation)))
        return Withdrawn(tuple(rows))

    @staticmethod
    def _same(current: Sequence[DelayedEvent], accept: Accept) -> list[DelayedEvent]:
        """The rows of the participant's newest delegation, if it consists of exactly these events and nothing is the matter with them."""
        if not current:
            return []
        newest = max(current, key=lambda row: (row.accepted_at, row.id)).delegation
        rows = [row for row in current if row.delegation == newest]
        wanted = {(event.delay_id, event.delay, event.on_end) for event in accept.events}
        asked = {(row.delay_id, row.delay, row.on_end) for row in rows} == wanted
        there = all(row.homeserver == accept.homeserver for row in rows)
        sound = all(row.state is State.LIVE and row.lane is Lane.RESTART and not row.end_tried for row in rows)
        return rows if asked and there and sound else []

    def _admit(self, work: _Work, current: Sequence[DelayedEvent], accept: Accept) -> None:
        most = self.limits.max_per_participant
        if len({row.delegation for row in current if row.verified_at is None}) >= most:
            raise TooMany(
                "delegations.max_per_participant",
                most,
                f"This participant has {most} delegations already that its homeserver has not confirmed yet. Withdraw one, or try again later.",
            )
        most = self.limits.max_per_homeserver
        if self._open[accept.homeserver] + work.opened[accept.homeserver] + len(accept.events) > most:
            raise TooMany(
                "delegations.max_per_homeserver",
                most,
                f"{most} delayed events of this homeserver are delegated already, and that is the most. Try again later.",
            )

    def _answered(self, work: _Work, answer: Answered) -> Touched:
        row = work.get(answer.event)
        if row is None:
            return Touched(0)
        new = self._advance(work, row, answer)
        if new.verified_at is not None and row.verified_at is None:
            self._supersede_others(work, new)
        return Touched(1)

    def _supersede_others(self, work: _Work, row: DelayedEvent) -> None:
        """Once a delegation is verified as a whole, the events of older ones of the same participant are to be cancelled."""
        rows = [other for other in work.participant(*row.participant) if other.state is not State.DONE]
        mine = work.delegation(row.delegation)  # also those that have ended: one that was unknown takes the whole delegation back
        if not mine or any(other.verified_at is None for other in mine):
            return
        newest = max((other.accepted_at, other.id) for other in mine)
        for other in rows:
            if other.delegation != row.delegation and (other.accepted_at, other.id) < newest:
                old = lifecycle.supersede(other, work.now, self.policy, self._random())
                work.put(old, Withdraw(other.delegation))

    # ── what to do next ──

    def _claim(self, work: _Work) -> tuple[list[Task], list[str]]:
        """Claim actions at homeservers; the second value names those whose next due time has to be asked of the database afterwards."""
        now = work.now
        fresh: dict[str, list[DelayedEvent]] = {}
        for id, row in work.rows.items():
            if row.due is not None and row.due <= now and row.lane is not Lane.TIMER and work.before[id] is not row and id not in work.deleted:
                fresh.setdefault(row.homeserver, []).append(row)
        late = [homeserver for homeserver, due in self._due.items() if due <= now]
        tasks: list[Task] = []
        asked: list[str] = []
        for homeserver in dict.fromkeys([*fresh, *late]):
            free = 0 if self.stopping else self._pace(homeserver).free(now)
            candidates = {row.id: row for row in fresh.get(homeserver, ())}
            if self._due.get(homeserver, float("inf")) <= now:
                asked.append(homeserver)
                self._timers(work, homeserver)
                if free > 0:
                    found = work.tx.todo(homeserver, Lane.END, free, now)
                    # Those whose deadline has passed must not hide those that can still make it.
                    found += work.tx.todo(homeserver, Lane.RESTART, free, now, harmed_after=now)
                    found += work.tx.todo(homeserver, Lane.RESTART, free, now)
                    for row in work.taken(found):
                        # What this step has changed may be due no more.
                        if row.due is not None and row.due <= now and row.lane is not Lane.TIMER:
                            candidates[row.id] = row
            for row in choose(candidates.values(), free, now):
                claimed = lifecycle.claim(row, now, self.policy)
                work.put(claimed, None)
                tasks.append(_task(claimed))
        return tasks, asked

    def _timers(self, work: _Work, homeserver: str) -> None:
        for row in work.taken(work.tx.todo(homeserver, Lane.TIMER, TIMERS_A_STEP, work.now)):
            if row.lane is not Lane.TIMER or row.due is None or row.due > work.now:
                continue
            if row.state is not State.DONE:
                self._advance(work, row, Due(row.id))
                continue
            work.delete(row)
            if work.room(row.sfu, row.room) is not None and not work.in_room(row.sfu, row.room):
                work.put_room(row.sfu, row.room, None)

    def _schedule_looks(self, work: _Work) -> None:
        """A room is to be looked at when the first of its participants asks for it."""
        wanted: dict[tuple[str, str], float] = {}
        departed: set[tuple[str, str]] = set()
        for id, row in work.rows.items():
            if row.look_at is not None and id not in work.deleted and row.state is not State.DONE:
                before = work.before[id]
                if before is None or before.look_at != row.look_at:
                    key = (row.sfu, row.room)
                    wanted[key] = min(row.look_at, wanted.get(key, row.look_at))
                    if row.presence is Presence.AWAY:
                        departed.add(key)
        for (sfu, name), at in wanted.items():
            room = work.room(sfu, name)
            if room is None:
                work.put_room(sfu, name, Room(sfu, name, "", "", 0.0, 0.0, 0.0, at, 0, 0, False))
            elif not room.claimed:
                if room.failures and room.due is not None and (sfu, name) not in departed:
                    continue  # the SFU does not answer, and the next try is planned
                due = max(at, room.looked_at + self.policy.look_gap)
                if room.due is None or due < room.due:
                    work.put_room(sfu, name, room._replace(due=due))

    def _claim_looks(self, work: _Work) -> tuple[list[Task], list[str]]:
        now = work.now
        due: dict[str, dict[str, Room]] = {}
        for (sfu, name), room in work.rooms.items():
            if room is not None and room.due is not None and room.due <= now:
                due.setdefault(sfu, {})[name] = room
        late = [sfu for sfu, at in self._rooms_due.items() if at <= now]
        tasks: list[Task] = []
        for sfu in dict.fromkeys([*due, *late]):
            free = 0 if self.stopping else self._look_pace(sfu).free(now)
            rooms = due.get(sfu, {})
            if free > 0 and sfu in late:
                for stored in work.tx.rooms_due(sfu, free, now):
                    room = work.room(sfu, stored.name)
                    if room is not None and room.due is not None and room.due <= now:
                        rooms[room.name] = room
            for room in sorted(rooms.values(), key=lambda room: room.due or 0.0)[: max(0, free)]:
                claimed = room._replace(claim=room.claim + 1, claimed=True, due=now + self.policy.lease, looked_at=now)
                work.put_room(sfu, room.name, claimed)
                tasks.append(Task(Action.LOOK, 0, claimed.claim, sfu, room.name, lease_ends=now + self.policy.lease))
        return tasks, late

    def _wake(self, now: float) -> float | None:
        """When something can be done next that is not set off by an input."""
        times = []
        for homeserver, due in self._due.items():
            pace = self._pace(homeserver)
            if due <= now and pace.free(max(now, pace.blocked_until)) <= 0:
                continue  # an answer will come first
            times.append(max(due, pace.blocked_until))
        for sfu, due in self._rooms_due.items():
            if due > now or self._look_pace(sfu).free(now) > 0:
                times.append(due)
        soonest = min(times, default=float("inf"))
        return None if soonest == float("inf") else soonest

    # ── counts ──

    def _pace(self, homeserver: str) -> Pace:
        pace = self._paces.get(homeserver)
        if pace is None:
            pace = self._paces[homeserver] = Pace(self._in_flight(homeserver))
        return pace

    def _look_pace(self, sfu: str) -> Pace:
        pace = self._looks.get(sfu)
        if pace is None:
            pace = self._looks[sfu] = Pace(self._looks_in_flight(sfu))
        return pace

    def _count(self, work: _Work) -> None:
        for id, row in work.rows.items():
            before = work.before[id]
            deleted = id in work.deleted
            if before is row and not deleted:
                continue
            if before is not None:
                self.states[before.homeserver, before.state.value, before.presence.value] -= 1
                self._open[before.homeserver] -= before.state is not State.DONE
            if not deleted:
                self.states[row.homeserver, row.state.value, row.presence.value] += 1
                self._open[row.homeserver] += row.state is not State.DONE

    def reconfigure(self, policy: Policy, limits: Limits) -> None:
        """Take new rules from the next step on. In-flight limits are asked for anew, too."""
        self.policy = policy
        self.limits = limits
        for homeserver, pace in self._paces.items():
            pace.most = self._in_flight(homeserver)
        for sfu, pace in self._looks.items():
            pace.most = self._looks_in_flight(sfu)

    def backlog(self, now: float) -> dict[tuple[str, Lane], tuple[int, float]]:
        """By homeserver and lane: how many rows are due, and since when the first of them. Asks the database only where something is."""
        late = [homeserver for homeserver, due in self._due.items() if due <= now]
        return {(homeserver, lane): found for homeserver in late for lane, found in self.store.backlog(homeserver, now).items()}

    @property
    def in_flight(self) -> int:
        """Actions that were claimed and not answered yet."""
        return len(self._under_way)


def _task(row: DelayedEvent) -> Task:
    return Task(
        action=lifecycle.action(row),
        event=row.id,
        claim=row.claim,
        sfu=row.sfu,
        room=row.room,
        homeserver=row.homeserver,
        delegation=row.delegation,
        delay_id=row.delay_id,
        token=row.token,
        user=row.user,
        urgent_since=row.ended_at if row.state is State.ENDING else None,
        lease_ends=row.due or 0.0,
    )
