"""A batch of inputs becomes one transaction, and replies and claimed actions come out.

The engine must never do I/O but through its store, never read a clock and never wait: `now` is an argument, and what it returns says when it wants
to be called again. It keeps no delegation between steps; what is due is asked of the database. In memory are counts, what is under way, and for
each homeserver a `Pace` and a `Plan`, for each SFU a `Reach`.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from math import ceil, floor, inf
from random import Random
from typing import NamedTuple
from zlib import crc32

from sfu_delegate.delegation import lifecycle, others
from sfu_delegate.delegation.doubts import Doubts, party
from sfu_delegate.delegation.model import (
    Accept,
    Action,
    Answered,
    Carried,
    DelayedEvent,
    Due,
    End,
    Find,
    Input,
    Lane,
    Looked,
    Missed,
    Note,
    Presence,
    Refuse,
    Room,
    RoomChanged,
    RoomNews,
    Seen,
    SfuFound,
    SfuLost,
    Sighting,
    State,
    Task,
    Verdict,
    Withdraw,
)
from sfu_delegate.delegation.others import CutOff
from sfu_delegate.delegation.policy import Policy
from sfu_delegate.delegation.reach import Reach
from sfu_delegate.delegation.replies import Accepted, Found, Reply, TooMany, Touched, Withdrawn
from sfu_delegate.delegation.urgency import FEASIBLE, NOTHING_PLANNED, Countdown, Limit, Pace, Plan, Wait, choose, may_be_restarted
from sfu_delegate.delegation.urgency import plan as plan_restarts
from sfu_delegate.store.base import (
    Census,
    Heard,
    Instance,
    KnownHomeserver,
    KnownSfu,
    Participant,
    RoomKey,
    Store,
    StoreUnavailable,
    Transaction,
    ValueRefused,
)

TIMERS_A_STEP = 256  # a step stays short, however much there is to tidy up
ROOMS_A_STEP = 64  # the same for rooms of an SFU that is not asked because it fails
LONG_DELAY = 600.0  # restarts in so many actions' time: an event with such a delay hardly adds to what a homeserver has to bear
NOT_ASKED = "it keeps failing"  # a look that was not made
TOGETHER = 0.25  # seconds: restarts that are due in such a part of a second are claimed in one transaction, at its end
PLANNED_MOST = 5000  # open events of a homeserver whose limit is unknown; reading a million deadlines takes seconds
BUSY_ELSEWHERE = 0.05  # seconds until rows that another instance is about to take are asked for again
DOUBTS_A_TIME = 1000
TELL_EVERY = 5.0  # seconds between words to the other instances
COVERED_WITHIN = 4.0  # seconds in which another instance that is alive shows it
RATE_CHANGE = 0.2  # a rate that changed by less is not worth writing down


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is accepted."""

    max_per_participant: int = 4  # delegations of one participant that its homeserver has not confirmed yet
    max_per_user: int = 10  # delayed events of one Matrix user that its homeserver has not confirmed yet, see `delegation.doubts`
    max_unnamed: int = 1_000_000  # … of all the participants of a homeserver whose user is not known
    max_per_homeserver: int = 100_000  # delayed events


# ── what comes out ──


class Change(NamedTuple):
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
    hurry: bool = False  # a departure waits for a place: an answer would free one
    company: int = 0  # something else does: so many answers free half of the places; 0: nothing waits


class HomeserverPace(NamedTuple):
    """How fast a homeserver may be asked, and by how many events."""

    limit: Limit = Limit.UNKNOWN
    rate: float = 0.0  # actions a second
    burst: float = 0.0
    exempt: bool = False
    events: int = 0


# ── the working set of one step ──


@dataclass(slots=True)
class _Work:
    """What a step has read and changed. Rows are read once, and written once at the end."""

    tx: Transaction
    now: float
    held: Mapping[int, DelayedEvent]  # rows that need not be read; where others may have changed them, they only tell the room
    shared: bool = False
    rows: dict[int, DelayedEvent] = field(default_factory=dict)
    before: dict[int, DelayedEvent | None] = field(default_factory=dict)
    known: dict[Participant, list[int]] = field(default_factory=dict)  # rows by either form of their identity, open ones …
    known_all: dict[Participant, list[int]] = field(default_factory=dict)  # … or all of them
    made: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    opened: Counter[str] = field(default_factory=Counter)  # by homeserver, and by user: delayed events accepted in this step
    load: dict[str, float] = field(default_factory=dict)  # by homeserver: restarts a second that these need
    rooms: dict[RoomKey, Room | None] = field(default_factory=dict)
    rooms_before: dict[RoomKey, Room | None] = field(default_factory=dict)
    deleted: set[int] = field(default_factory=set)
    tried: list[CutOff] = field(default_factory=list)  # homeservers at which was looked for what may be tried
    learned: dict[str, KnownHomeserver] = field(default_factory=dict)
    learned_sfus: dict[str, KnownSfu] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    # What the present input has changed, and what was there before. No closures: they would hold this, and this them, until a garbage collection.
    rows_undo: list[tuple[int, DelayedEvent | None]] = field(default_factory=list)
    rooms_undo: list[tuple[RoomKey, Room | None]] = field(default_factory=list)
    deleted_undo: list[int] = field(default_factory=list)
    changes_undo: int = 0

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

    def lock(self, inputs: Sequence[Input]) -> None:
        """Have the rooms of all inputs to ourselves: whatever happens in a room happens to one instance after the other."""
        keys: dict[RoomKey, Room | None] = {}
        made: set[RoomKey] = set()
        events: set[int] = set()
        delegations: set[str] = set()
        for given in inputs:
            if isinstance(given, Seen | RoomChanged | Looked | Accept):
                keys[given.sfu, given.room] = None
                if isinstance(given, Accept):
                    made.add((given.sfu, given.room))
            elif isinstance(given, Answered | Due):
                row = self.held.get(given.event)
                if row is not None:
                    keys[row.sfu, row.room] = None
                else:
                    events.add(given.event)
            elif isinstance(given, Withdraw | End | Refuse | Find):
                delegations.add(given.delegation)
        if events or delegations:
            keys.update((key, None) for key in self.tx.rooms_of(events, delegations))
        keys.update({(room.sfu, room.name): room for room in self.tx.lock_rooms(keys, made) if (room.sfu, room.name) in keys})
        self.rooms.update(keys)
        self.rooms_before.update(keys)

    def foresee(self, inputs: Sequence[Input]) -> None:
        """Read at once what most inputs ask for one by one: a statement takes as long as several rows."""
        if self.shared:
            self.lock(inputs)
        held = {} if self.shared else self.held
        answered = {given.event: None for given in inputs if type(given) is Answered}
        rows = self.taken([held[event] for event in answered if event in held])
        wanted_rows = [event for event in answered if event not in held]
        if wanted_rows:
            rows += self.taken(self.tx.get_all(wanted_rows))
        seen: dict[Participant, None] = {(given.sfu, given.room, given.identity): None for given in inputs if type(given) is Seen}
        # What is confirmed takes the place of what its participant had delegated before.
        wanted = seen | {key: None for row in rows if row.verified_at is None for key in _forms(row)}
        wanted_all = {key: None for given in inputs if type(given) is Accept for key in _forms(given)}
        if wanted:
            self._foresee(wanted, self.known, finished=False)
        if wanted_all:
            self._foresee(wanted_all, self.known_all, finished=True)
        if self.shared:
            return
        rooms: dict[RoomKey, Room | None] = {key[:2]: None for key in (*(key for key in seen if self.known[key]), *wanted_all)}
        rooms.update({(given.sfu, given.room): None for given in inputs if type(given) is Looked})
        if rooms:
            rooms.update({(room.sfu, room.name): room for room in self.tx.rooms(rooms)})
            self.rooms.update(rooms)
            self.rooms_before.update(rooms)

    def _foresee(self, wanted: Collection[Participant], known: dict[Participant, list[int]], *, finished: bool) -> None:
        known.update((key, []) for key in wanted)
        rows = self.tx.of_participants(wanted, finished=finished)
        for row in self.taken(rows):
            for key in _forms(row):
                ids = known.get(key)
                if ids is not None:
                    ids.append(row.id)

    def participant(self, sfu: str, room: str, identity: str, *, finished: bool = False) -> list[DelayedEvent]:
        """A participant's rows; `finished`: also those that are, as far as they are kept for their history."""
        key = (sfu, room, identity)
        if not self._is_known(key, finished=finished):
            self._learn((key,), finished=finished)
        ids = self.known_all.get(key)
        if ids is None:
            ids = self.known[key]
        if not ids:
            return []
        found = []
        for id in ids:
            row = self.rows[id]
            # One that had come under this identity may have been put back.
            if id not in self.deleted and identity in (row.identity, row.alias, row.twin) and (finished or row.state is not State.DONE):
                found.append(row)
        return found

    def _is_known(self, key: Participant, *, finished: bool) -> bool:
        return key in self.known_all or (not finished and key in self.known)

    def _learn(self, keys: Collection[Participant], *, finished: bool) -> None:
        """Ask the database for the rows of some participants."""
        learned: dict[Participant, list[int]] = {}
        self._foresee(keys, learned, finished=finished)
        for sfu, room in {key[:2] for key in keys}:
            for row in self._made(sfu, room):
                for key in _forms(row):
                    if key in learned and row.id not in learned[key]:
                        learned[key].append(row.id)
        (self.known_all if finished else self.known).update(learned)

    def same_participant(self, whose: DelayedEvent | Accept, *, finished: bool = False) -> list[DelayedEvent]:
        """As `participant`, and those that were delegated under another form of the identity.

        Two events that share nothing but the alias are two participants': another member id is another membership.
        """
        sfu, room, alias, twin = whose.sfu, whose.room, whose.alias, whose.twin
        keys = _forms(whose)
        if len(keys) > 1 and not self._is_known(keys[0], finished=finished):
            self._learn(keys, finished=finished)
        rows = self.participant(sfu, room, whose.identity, finished=finished)
        others = [] if alias is None else [row for row in self.participant(sfu, room, alias, finished=finished) if row.identity == alias]
        if twin is not None:
            others += [row for row in self.participant(sfu, room, twin, finished=finished) if twin in (row.identity, row.twin)]
        if not others:
            return rows
        return list({row.id: row for row in (*rows, *others)}.values())

    def _made(self, sfu: str, room: str) -> list[DelayedEvent]:
        """What this step has opened in a room: the database does not know of it yet."""
        return [self.rows[id] for id in dict.fromkeys(self.made.get((sfu, room), ())) if id not in self.deleted]

    def of_user(self, sfu: str, room: str, user: str, homeserver: str) -> list[DelayedEvent]:
        """A user's rows in a room that are not finished, whatever their identities are. A user is known by what its homeserver says alone."""
        rows = {row.id: row for row in (*self.taken(self.tx.of_user(sfu, room, user)), *self._made(sfu, room))}
        return [row for row in rows.values() if (row.user, row.homeserver) == (user, homeserver) and row.state is not State.DONE]

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
        # A new one, one that is taken up again, or one that was delegated anew in the other form of the identity.
        if old is None or old.state is State.DONE or (old.identity, old.alias, old.twin) != (row.identity, row.alias, row.twin):
            self.made.setdefault((row.sfu, row.room), []).append(row.id)
            self._know(row)
        self.rows[row.id] = row
        if given is not None:
            self.changes.append(Change(old, row, given))
        self.rows_undo.append((row.id, old))

    def _know(self, row: DelayedEvent) -> None:
        for key in _forms(row):
            for known in (self.known, self.known_all):
                ids = known.get(key)
                if ids is not None and row.id not in ids:
                    ids.append(row.id)

    def begin(self) -> None:
        """What is changed from here on can be taken back."""
        self.rows_undo.clear()
        self.rooms_undo.clear()
        self.deleted_undo.clear()
        self.changes_undo = len(self.changes)

    def take_back(self) -> None:
        """Everything is as it was at `begin`."""
        for id, row in reversed(self.rows_undo):
            if row is not None:
                self.rows[id] = row
                continue
            del self.rows[id], self.before[id]
            for ids in (*self.known.values(), *self.known_all.values(), *self.made.values()):
                if id in ids:
                    ids.remove(id)
        for key, room in reversed(self.rooms_undo):
            self.rooms[key] = room
        self.deleted.difference_update(self.deleted_undo)
        del self.changes[self.changes_undo :]

    def room(self, sfu: str, name: str) -> Room | None:
        key = (sfu, name)
        if key not in self.rooms:
            self.rooms[key] = self.rooms_before[key] = self.tx.room(sfu, name)
        return self.rooms[key]

    def take_room(self, room: Room) -> None:
        """A room from the database, where this step does not have it yet."""
        key = (room.sfu, room.name)
        if key not in self.rooms:
            self.rooms[key] = self.rooms_before[key] = room

    def put_room(self, sfu: str, name: str, room: Room | None) -> None:
        old = self.room(sfu, name)
        self.rooms[sfu, name] = room
        self.rooms_undo.append(((sfu, name), old))

    def delete(self, row: DelayedEvent) -> None:
        self.deleted.add(row.id)
        self.deleted_undo.append(row.id)

    def _story(self) -> list[Note]:
        """What this step adds to the history."""
        return [note for change in self.changes for note in lifecycle.story(change.old, change.new, change.given, self.now)]

    def history(self, events: list[int]) -> list[Note]:
        """The history of some rows, with what this step has added so far."""
        return [*self.tx.history(events), *(note for note in self._story() if note.event in events)]

    def save(self) -> list[Note]:
        """Write everything; returns the lines of history that were added."""
        notes = self._story()
        for id in self.deleted:  # first: what is deleted may be in the way of a row that changes
            if self.before[id] is not None:
                self.tx.delete(id)
        for id, row in self.rows.items():
            before = self.before[id]
            if id in self.deleted:
                continue
            if before is None:
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

    `in_flight(homeserver)` says how many requests a homeserver gets at the most, `looks_in_flight(sfu)` the same for looks, and
    `limited(homeserver)` whether its rate limit holds for us; None: that is to be found out.
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
        limited: Callable[[str], bool | None] = lambda _: None,
    ):
        self.store = store
        # What is wrong with the transaction, and not with an input.
        self._of_all_inputs: tuple[type[Exception], ...] = (StoreUnavailable, ValueRefused, *store.begin_anew)
        self.policy = policy
        self.limits = limits
        self.stopping = False  # when set, nothing is claimed any more
        self._random = random.random
        self._in_flight = in_flight
        self._looks_in_flight = looks_in_flight
        self._limited = limited
        census = store.census()
        self.late: Counter[str] = Counter()  # by SFU: webhooks that came much later than others
        self.states: Counter[tuple[str, str, str]] = Counter(census.states)  # (homeserver, state, presence) → delayed events
        self._due: dict[str, float] = dict(census.schedule)  # by homeserver: nothing is due before
        self._rooms_due: dict[str, float] = dict(census.rooms)  # by SFU: no look is due before
        self._now = -inf
        self._stepped_at = -inf
        self._paces: dict[str, Pace] = {}
        self._plans: dict[str, Plan] = {}
        self._replan: set[str] = set(census.schedule)  # homeservers without a plan, or whose plan may be too hopeful: there are new deadlines
        self._waiting: dict[str, frozenset[Wait]] = {}  # what could not be begun when it was last asked for
        self._departing: set[str] = set()  # homeservers where a departure waits for a place
        self._known_homeservers = {known.name: known for known in census.homeservers}
        self._reaches: dict[str, Reach] = {}
        self._known_sfus = {known.name: known for known in census.sfus}
        # By event, restarts that were answered since the last transaction: when they were sent, and whether they got through.
        self._kept_alive: dict[int, tuple[float, bool]] = {}
        self._unclaimed = 0  # restarts that were made without a claim
        self._was_exempt: dict[str, bool] = {}  # homeservers that the configuration exempted from rate limits
        self._learned: set[str] = set()  # homeservers and SFUs of which something new is known
        self._ask: set[str | None] = set()  # SFUs all of whose rooms are to be looked at; None: every SFU's
        # What the other instances are known to have done, where some share the store.
        self._shared_paces: dict[str, str] = {}  # by homeserver: its limit, as it was last told
        self._told: dict[str, Heard] = {}  # by SFU: what the others were told of it
        self._told_at = -inf
        self._joined_at: float | None = None  # when this instance first asked for news
        self._doubted = 0  # of the rows in doubt, how many were asked for lately
        self._was_covered = False  # somebody has listened while this instance was not there
        self.instances: list[Instance] = []  # the others
        self.has_namesake = False  # one of them has the name of this one
        self._words: dict[str, others.Word] = {}  # by instance: what these say of homeservers and SFUs
        self._heard_at = -inf  # when they were last heard
        self._cut_off: dict[str, CutOff] = {}  # homeservers that fail for us, while others are there
        self._failed = False  # the last step could not be kept
        self._busy_elsewhere: set[str] = set()  # homeservers and SFUs of which others have what is due
        self._load: dict[str, float] = dict(census.load)  # by homeserver: restarts a second that its open events need at the least
        self._doubts = Doubts()
        self._under_way: set[tuple[str, int | str, int]] = set()  # (homeserver, event, claim) and (SFU, room, claim)
        self._held: dict[int, DelayedEvent] = {}  # rows as they are in the database, of actions that are under way
        self._open: Counter[str] = Counter()  # delayed events by homeserver that are not finished
        for (homeserver, state, _), count in census.states.items():
            if state != State.DONE:
                self._open[homeserver] += count

    # ── one step ──

    def step(
        self,
        inputs: Sequence[Input],
        now: float,
        *,
        answered: Sequence[Answered] = (),
        about_to_wait: Callable[[], object] | None = None,
    ) -> Step:
        """Apply `inputs` in order, in one transaction, and claim actions for the places that are free.

        An input that raises is answered with its exception, alone. Raises StoreUnavailable when nothing could be kept. `answered`: what has come
        back, and will be an input later; its places are free from now on. `about_to_wait`: see `Store.atomically`.
        """
        self._now = now
        if self._words and not 0 <= now - self._heard_at < others.WORDS_COUNT:
            self._words.clear()
            self._weigh_words()
        self._came_back(answered, now)
        self._came_back(inputs, now)
        try:
            if self.store.shared:
                self._ask_rooms(inputs, now)
            step, work, due, rooms_due = self.store.atomically(lambda tx: self._step(tx, inputs, now), about_to_wait=about_to_wait)
        except StoreUnavailable:
            self._held.clear()  # what was kept of a commit that failed is not known everywhere
            self._failed = True
            raise
        except Exception as error:
            # Something that only came out when it was written. Whoever it belongs to is answered alone.
            if not inputs:
                raise
            return self._one_by_one(inputs, now) if len(inputs) > 1 else replace(self.step((), now), replies=[error])
        for homeserver, at in due.items():
            if at == inf:
                self._due.pop(homeserver, None)  # of homeservers there may be any number, with patterns
                if homeserver not in self._open and not self.store.shared:
                    self._forget(homeserver)
            else:
                self._due[homeserver] = at
        self._rooms_due.update(rooms_due)
        self._failed = False
        for cut_off in work.tried:
            cut_off.was_tried(now)
        self._count(work)
        self._hold(work, inputs, step.tasks)
        for task in step.tasks:
            self._under_way.add((task.homeserver or task.sfu, task.event or task.room, task.claim))
            if task.action is Action.LOOK:
                self._reach(task.sfu).began(self.policy)
            else:
                pace = self._pace(task.homeserver)
                if task.claim < 0 and task.homeserver in self._cut_off:
                    self._cut_off[task.homeserver].tries(task.event, now)
                # From a bucket that others take from as well, it was taken in the transaction.
                pace.began(now, alone=task.token is not None or (self.store.shared and pace.limit is Limit.SOME))
        step = replace(step, wake=self._wake(now), hurry=bool(self._departing), company=self._company(now))
        self._stepped_at = now
        return step

    def _ask_rooms(self, inputs: Sequence[Input], now: float) -> None:
        """Have all rooms of some SFUs looked at. Where others work on them, in transactions of their own, and before the answer to anybody."""
        self._ask |= {given.sfu for given in inputs if isinstance(given, Missed)}
        for sfu in [None] if None in self._ask else sorted(self._ask, key=str):
            self.store.ask_rooms(sfu, now)
            self._rooms_due.update((name, now) for name in ([*self._rooms_due] if sfu is None else [sfu]))
            self._ask.discard(sfu)
        self._ask.clear()

    def _company(self, now: float) -> int:
        """See `Step.company`: by the homeserver with the fewest places of those where something is due."""
        return min((self._pace(homeserver).half() for homeserver in self._due if self._begins(homeserver) <= now), default=0)

    def _hold(self, work: _Work, inputs: Sequence[Input], tasks: Sequence[Task]) -> None:
        """Keep the rows that an answer will ask for, as they are in the database now."""
        for given in inputs:
            if type(given) is Answered:
                self._held.pop(given.event, None)
        if self._held:
            for id in self._held.keys() & work.rows.keys():
                self._held[id] = work.rows[id]
            for id in work.deleted:
                self._held.pop(id, None)
        for task in tasks:
            if task.event and task.claim > 0:
                self._held[task.event] = work.rows[task.event]

    def keep_alive(self, now: float) -> list[Task]:
        """Restarts to be made while the database takes no transaction, but can be read: nobody who is connected should be dropped because a disk
        is full. They are not claimed; a restart too many harms nobody. Hand in the answers as always. Raises StoreUnavailable."""
        if self.stopping:
            return []
        self._now = now
        late = [homeserver for homeserver, due in self._due.items() if due <= now]
        rows = self.store.reading(lambda tx: [row for homeserver in late for row in self._overdue(tx, homeserver, now)])
        tasks: list[Task] = []
        for homeserver in late:
            pace = self._pace(homeserver)
            candidates = [row for row in rows if row.homeserver == homeserver]
            for row in choose(candidates, pace, self._plans.get(homeserver, NOTHING_PLANNED), now).rows:
                task = self._without_claim(row, now)
                self._under_way.add((homeserver, row.id, task.claim))
                pace.began(now, alone=row.token is not None)
                tasks.append(task)
        return tasks

    def _overdue(self, tx: Transaction, homeserver: str, now: float) -> list[DelayedEvent]:
        """Enough of them for the places that are free, however many others are due that are kept alive already, or are not to be."""
        places, most = self._pace(homeserver).places(now), TIMERS_A_STEP
        while True:
            due = tx.todo(homeserver, Lane.RESTART, most, now) if places else []
            rows = [self._as_kept(row) for row in due if row.state is State.LIVE and self._needs_keeping(row, now)]
            if len(rows) >= places or len(due) < most:
                return rows
            most *= 4

    def _as_kept(self, row: DelayedEvent) -> DelayedEvent:
        sent_at, done = self._kept_alive.get(row.id, (-inf, False))
        return row._replace(harm=sent_at + row.delay) if done else row

    def _needs_keeping(self, row: DelayedEvent, now: float) -> bool:
        sent_at, done = self._kept_alive.get(row.id, (-inf, False))
        again = sent_at + (row.delay * self.policy.restart_at if done else self.policy.retry_first)
        under_way = any(homeserver == row.homeserver and event == row.id for homeserver, event, _ in self._under_way)
        return now >= again and not under_way and not self._reach(row.sfu).lost(row.sfu, now, self.policy)

    def _one_by_one(self, inputs: Sequence[Input], now: float) -> Step:
        steps: list[Step] = []
        for given in inputs:
            try:
                steps.append(self.step((given,), now))
            except Exception as error:
                # What the steps before it have claimed must still be carried out.
                steps.append(Step([error], [], now, [], []))
        return Step(
            replies=[reply for step in steps for reply in step.replies],
            tasks=[task for step in steps for task in step.tasks],
            wake=steps[-1].wake,
            changes=[change for step in steps for change in step.changes],
            notes=[note for step in steps for note in step.notes],
            hurry=steps[-1].hurry,
            company=steps[-1].company,
        )

    def _step(self, tx: Transaction, inputs: Sequence[Input], now: float) -> tuple[Step, _Work, dict[str, float], dict[str, float]]:
        work = _Work(tx, now, self._held, self.store.shared)
        self._busy_elsewhere.clear()
        work.foresee(inputs)
        replies: list[Reply | Exception] = []
        for given in inputs:
            work.begin()
            try:
                replies.append(self._apply(work, given))
            except self._of_all_inputs:
                raise
            except Exception as error:
                # The error of one must not undo the others of its batch; whoever waits for the answer reports it.
                work.take_back()
                replies.append(error)
        tx.no_more_waiting()
        self._fail_looks(work)
        tasks, asked = self._claim(work)
        self._schedule_looks(work)
        looks, rooms_asked = self._claim_looks(work)
        notes = work.save()
        rooms_asked += self._write_down(work)
        due = {homeserver: tx.next_due(homeserver) for homeserver in asked}
        rooms_due = {sfu: tx.next_room_due(sfu) for sfu in rooms_asked}
        step = Step(replies, tasks + looks, None, work.changes, notes)
        return step, work, self._merged_due(work, due), self._merged_rooms_due(work, rooms_due)

    def _merged_due(self, work: _Work, asked: dict[str, float | None]) -> dict[str, float]:
        due = {homeserver: self._not_before(work, homeserver, at) for homeserver, at in asked.items()}
        for id, row in work.rows.items():
            if row.due is not None and id not in work.deleted and row.homeserver not in asked and work.before[id] is not row:
                due[row.homeserver] = min(row.due, due.get(row.homeserver, self._due.get(row.homeserver, inf)))
        return due

    def _merged_rooms_due(self, work: _Work, asked: dict[str, float | None]) -> dict[str, float]:
        due = {sfu: self._not_before(work, sfu, at) for sfu, at in asked.items()}
        for (sfu, _), room in work.rooms.items():
            if room is not None and room.due is not None and sfu not in asked:
                due[sfu] = min(room.due, due.get(sfu, self._rooms_due.get(sfu, inf)))
        return due

    def _not_before(self, work: _Work, name: str, at: float | None) -> float:
        """When something is due at a homeserver or SFU: what another instance is about to take is not asked for again at once."""
        if at is None:
            return inf
        return max(at, work.now + BUSY_ELSEWHERE) if name in self._busy_elsewhere else at

    # ── inputs ──

    def _came_back(self, inputs: Sequence[Input], now: float) -> None:
        """Free the places of what was answered, whether or not the answer can be kept; once, even if it is handed in again."""
        heard: str | None = None
        for given in inputs:
            if isinstance(given, Seen):
                if given.sfu != heard:  # once is enough
                    heard = given.sfu
                    self.heard(heard, now)
            elif isinstance(given, Answered):
                key = (given.homeserver, given.event, given.claim)
                if key in self._under_way:
                    self._under_way.discard(key)
                    self._answer_came(given, now)
            elif isinstance(given, Looked):
                look = (given.sfu, given.room, given.claim)
                if look in self._under_way:
                    self._under_way.discard(look)
                    reach = self._reach(given.sfu)
                    if not given.made:
                        reach.dropped()
                    elif reach.ended(given.sent_at, now, self.policy, answered=given.participants is not None, reached=given.reached):
                        self._ask.add(given.sfu)  # what happened while it could not be asked is found out now
                    if self._words:
                        self._weigh_words_of_sfu(given.sfu, reach)
                    self._learned.add(given.sfu)
            elif isinstance(given, RoomChanged):
                self.heard(given.sfu, now)

    def _answer_came(self, given: Answered, now: float) -> None:
        limits = given.verdict is Verdict.LIMITED and not given.alone
        if self.store.shared and not given.alone and (limits or self._pace(given.homeserver).limit is Limit.SOME):
            counted: list[str] = []

            def count(known: str | None) -> str:
                counted.append(self._answer_counts(given, now, known))
                return counted[0]

            with suppress(StoreUnavailable):  # then it counts for this instance alone
                self.store.exchange_pace(given.homeserver, count)
            if counted:
                return
        self._answer_counts(given, now)

    def _answer_counts(self, given: Answered, now: float, known: str | None = None) -> str:
        """What an answer says of its homeserver's limit; `known`: what all instances have found out. Returns what they know now."""
        pace = self._pace(given.homeserver)
        if known is not None:
            pace.adopt(known, now)
        if given.verdict is Verdict.LIMITED and not given.alone:
            pace.refused(given.sent_at, given.retry_after, now)
            self._replan.add(given.homeserver)
        else:
            answered = given.verdict not in (Verdict.FAILED, Verdict.UNCERTAIN)
            pace.ended(given.sent_at, now, ending=given.action is not Action.RESTART, answered=answered, alone=given.alone)
        self._learned.add(given.homeserver)
        if self._words:
            self._weigh_words_of(given.homeserver)
        if given.action is Action.RESTART:
            self._kept_alive[given.event] = (given.sent_at, given.verdict is Verdict.DONE)
        return pace.shared() if self.store.shared else ""

    def heard(self, sfu: str, now: float) -> None:
        """A webhook came from this SFU, perhaps one that is no input. May be called from any thread."""
        self._reach(sfu).heard(now, self.policy)

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
            case Withdraw() | End():
                rows = work.delegation(given.delegation)
                return Withdrawn(tuple(self._advance(work, row, given) for row in rows))
            case Refuse():
                return self._refuse(work, given)
            case Find():
                rows = work.delegation(given.delegation)
                return Found(tuple(rows), tuple(work.history([row.id for row in rows])))
            case RoomChanged():
                return self._room_changed(work, given)
            case Missed():
                if not self.store.shared:
                    self._ask.add(given.sfu)
                return Touched(0)
            case SfuLost() | SfuFound():
                raise TypeError("that is for the engine to find out")
            case Due():
                row = work.get(given.event)
                return Touched(0 if row is None else len([self._advance(work, row, given)]))

    def _advance(self, work: _Work, row: DelayedEvent, given: lifecycle.Given) -> DelayedEvent:
        new = lifecycle.advance(row, given, work.now, self.policy, self._random())
        work.put(new, given)
        return new

    def _seen(self, work: _Work, seen: Seen) -> Touched:
        rows = work.participant(seen.sfu, seen.room, seen.identity)
        if not rows:
            return Touched(0)
        reach = self._reach(seen.sfu)
        joined = seen.what is Sighting.JOINED
        late = reach.is_late(seen.created_at, work.now, self.policy.late_after)
        if late:
            self.late[seen.sfu] += 1
            # A look says nothing about somebody who has just been heard of.
            self._suspect(work, seen.sfu, seen.room, self.policy.settled if joined else 0.0)
        if late or not joined:
            seen = seen._replace(late=late, made_at=reach.made_at(seen.created_at, work.now))
        if joined:
            self._in_room(work, seen)
        for row in rows:
            new = self._advance(work, row, seen)
            if not joined and new.presence is Presence.CONNECTED and seen.what is Sighting.LEFT and new.sessions != row.sessions:
                self._doubt_if_late(work, row, new, seen)
        return Touched(len(rows))

    def _in_room(self, work: _Work, seen: Seen) -> None:
        """A `joined` tells which instance of the room it is. The old instance's doubts do not concern another one."""
        room = work.room(seen.sfu, seen.room)
        if room is None or seen.late or not (room.finished or (seen.room_sid and seen.room_sid != room.room_sid)):
            return
        if seen.room_sid not in ("", room.room_sid):
            doubt = 0.0 if room.room_sid else room.doubt_until
            room = room._replace(started_by="", instance_at=seen.joined_at_ms / 1000, doubt_until=doubt)
        work.put_room(seen.sfu, seen.room, room._replace(room_sid=seen.room_sid or room.room_sid, finished=False))

    def _suspect(self, work: _Work, sfu: str, name: str, after: float = 0.0) -> None:
        """Something was heard that is a reason to look at the room at once, or `after` seconds; not by the look that is under way."""
        room = work.room(sfu, name)
        if room is None:
            return
        room = room._replace(asked=work.now + after)
        if not room.claimed and not (room.failures and room.due is not None):
            due = max(work.now + after, room.looked_at + self.policy.look_gap)
            if room.due is None or room.routine or due < room.due:
                room = room._replace(due=due, routine=False)
        work.put_room(sfu, name, room)

    def _doubt_if_late(self, work: _Work, row: DelayedEvent, new: DelayedEvent, left: Seen) -> None:
        """An old session ended and a newer one goes on. Usually the one ends as the other begins; long after, it shows that a node had been away,
        and then lists are wrong for long (recorded with LiveKit 1.13: somebody connected was missing from the list until they published a track).
        """
        room = work.room(row.sfu, row.room)
        newest = max((session for session in new.sessions if session.live), key=lambda session: session.heard_at)
        if left.created_at and newest.joined_at_ms:  # by the clocks of the SFU's nodes: a webhook may be late, and the daemon may have been away
            late = left.created_at > newest.joined_at_ms / 1000 + self.policy.doubt_after
        else:
            late = work.now > newest.heard_at + self.policy.doubt_after
        if room is not None and new.live_sids < row.live_sids and late:
            work.put_room(row.sfu, row.room, room._replace(doubt_until=work.now + self.policy.doubt))
            self._several_nodes(row.sfu, work.now)

    def _several_nodes(self, sfu: str, now: float) -> None:
        self._reach(sfu).several_nodes_at = now
        self._learned.add(sfu)

    def _room_changed(self, work: _Work, news: RoomChanged) -> Touched:
        room = work.room(news.sfu, news.room)
        if room is None:
            return Touched(0)
        if self._reach(news.sfu).is_late(news.created_at, work.now, self.policy.late_after):
            self.late[news.sfu] += 1
            self._suspect(work, news.sfu, news.room)
        return self._room_started(work, room, news) if news.what is RoomNews.STARTED else self._room_finished(work, room, news)

    def _room_started(self, work: _Work, room: Room, news: RoomChanged) -> Touched:
        told_before = news.id and news.id == room.started_by
        if told_before or (room.started_by and news.created_at and news.created_at < room.instance_at):
            return Touched(0)
        rows = work.in_room(news.sfu, news.room)
        older = [row for row in rows if self._advance(work, row, news) is not row]
        same = bool(news.room_sid) and news.room_sid == room.room_sid
        # The same sid a second time: the room came up on another node of a distributed SFU, or again with the memory that they share.
        # Where the first start was not heard, somebody's `joined` had told the sid, and this is the second one if it came after that.
        again = same and bool(room.started_by or (older and news.created_at > room.instance_at > 0))
        doubt = work.now + self.policy.doubt if again else room.doubt_until if same or not news.room_sid else 0.0
        room = work.room(news.sfu, news.room) or room
        sid = news.room_sid or room.room_sid
        room = room._replace(room_sid=sid, started_by=news.id, instance_at=news.created_at, finished=False, doubt_until=doubt)
        work.put_room(news.sfu, news.room, room)
        if again:
            self._several_nodes(news.sfu, work.now)
        if again or older:
            self._suspect(work, news.sfu, news.room)
        return Touched(len(older))

    def _room_finished(self, work: _Work, room: Room, news: RoomChanged) -> Touched:
        if news.room_sid and room.room_sid and news.room_sid != room.room_sid:
            return Touched(0)  # another instance's end, told late
        rows = work.in_room(news.sfu, news.room)
        several = self._reach(news.sfu).several_nodes_at is not None
        if several and room.doubt_until <= work.now and any(row.presence is Presence.CONNECTED for row in rows):
            # A node that thaws finishes its own, empty instance of the room (recorded), while people are in the other one.
            work.put_room(news.sfu, news.room, room._replace(doubt_until=work.now + self.policy.doubt))
        for row in rows:
            self._advance(work, row, news)
        room = work.room(news.sfu, news.room) or room
        work.put_room(news.sfu, news.room, room._replace(finished=True))
        self._suspect(work, news.sfu, news.room)
        return Touched(len(rows))

    def _looked(self, work: _Work, look: Looked) -> Touched:
        room = work.room(look.sfu, look.room)
        if room is None or not room.claimed or room.claim != look.claim:
            return Touched(0)
        given_back = look.participants is None and self.store.shared and self._reach(look.sfu).outvoted(work.now)
        if given_back and look.made:
            self._reach(look.sfu).gave_back(work.now)
        if given_back or not look.made:
            work.put_room(look.sfu, look.room, room._replace(claimed=False, due=work.now))
            return Touched(0)
        if look.participants is None and not room.failures and self._reach(look.sfu).outdated(look.sent_at):
            # It hung, and meanwhile the SFU has answered others: that says nothing of now. If this one room fails again, that does.
            work.put_room(look.sfu, look.room, room._replace(failures=1, claimed=False, due=work.now))
            return Touched(0)
        return self._conclude(work, room, look)

    def _conclude(self, work: _Work, room: Room, look: Looked) -> Touched:
        """What a look at a room means for everybody in there, and when to look next."""
        reach = self._reach(look.sfu)
        look = replace(
            look,
            doubtful=work.now < room.doubt_until,
            doubted_until=room.doubt_until,
            finished=room.finished,
            failed_since=reach.failed_since,
            recovered_at=work.now if room.failures else reach.recovered_at,
        )
        rows = [self._advance(work, row, look) for row in work.in_room(look.sfu, look.room)]
        rows = [row for row in rows if row.state is not State.DONE]
        if not rows:
            work.put_room(look.sfu, look.room, None)
            return Touched(0)
        failures = 0 if look.participants is not None else max(1, room.failures) if look.error == NOT_ASKED else room.failures + 1
        asked = room.asked if room.asked is not None and (failures or look.sent_at < room.asked) else None
        at = self._next_look(work.now, look.sent_at, failures, asked, rows)
        routine = self._next_routine(work.now, room, rows)
        soonest = min(at, routine)
        room = room._replace(failures=failures, asked=asked, claimed=False, routine=routine < at, due=None if soonest == inf else soonest)
        work.put_room(look.sfu, look.room, room)
        return Touched(len(rows))

    def _next_look(self, now: float, sent_at: float, failures: int, asked: float | None, rows: Sequence[DelayedEvent]) -> float:
        """When somebody needs the next look at a room, or the suspicion of `asked`; infinite: nobody."""
        if not failures:
            at = self._soonest([lifecycle.look_due(row, sent_at, now, self.policy) for row in rows], asked)
            return max(at, sent_at + self.policy.look_gap)
        pause = min(self.policy.look_again * 2.0 ** min(failures - 1, 10), self.policy.look_again_most) * (0.75 + self._random() / 4)
        looks = [(row, lifecycle.look_due(row, now, now, self.policy, pause)) for row in rows]
        at = self._soonest([at for _, at in looks], asked)
        if at == inf:
            at = now  # that the SFU is back should be noticed, though nobody waits for it
        # Not even an SFU that does not answer holds up a departure, which has its own rule for that case.
        departed = [at for row, at in looks if at is not None and row.presence is Presence.AWAY and not row.live_sids]
        return min([max(at, now + pause), *(max(due, now + self.policy.look_gap) for due in departed)])

    @staticmethod
    def _soonest(looks: Sequence[float | None], asked: float | None) -> float:
        return min((at for at in (*looks, asked) if at is not None), default=inf)

    def _next_routine(self, now: float, room: Room, rows: Sequence[DelayedEvent]) -> float:
        """When a room is looked at although nobody asks for it: each at its own time of the interval, so that they are spread evenly."""
        there = [row for row in rows if row.presence is not Presence.GONE]
        if not there:
            return inf
        changed_at = max(max(row.presence_since, *(s.heard_at for s in row.sessions)) if row.sessions else row.presence_since for row in there)
        interval = self.policy.look_interval(now - changed_at)
        phase = crc32(f"{room.sfu} {room.name}".encode()) / 2**32 * interval
        # The last of its times that is not later than an interval from now: they are half an interval apart.
        return floor((now + interval - phase) / (interval / 2)) * (interval / 2) + phase

    def _accept(self, work: _Work, accept: Accept) -> Accepted:
        rows = work.same_participant(accept, finished=True)
        # An event belongs to one membership: handed over for another one of the user's, it is that one's from now on.
        seen, wanted = {row.id for row in rows}, {event.delay_id for event in accept.events}
        rows += [row for row in self._perhaps_theirs(work, accept) if row.id not in seen and row.delay_id in wanted]
        rows = self._once(work, rows, accept) if rows else rows
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
        stamp = max(work.now, *(row.accepted_at + 0.001 for row in current)) if current else work.now
        by_delay_id = {row.delay_id: row for row in rows} | {row.delay_id: row for row in current}
        made = []
        carried = []
        newest = max((row.accepted_at for row in current), default=-inf)
        for given in accept.events:
            # Where the client has delegated something since the homeserver was asked, it may have ended this one before.
            event = given._replace(running_since=None) if newest >= given.shown_at else given
            old = by_delay_id.get(event.delay_id)
            others = (row.accepted_at for row in current if old is not None and row.delegation != old.delegation)
            doubtful = 0.0 < given.shown_at <= max(others, default=-inf)
            if old is not None and old.state is State.LIVE:
                before = (
                    old.delegation,
                    old.identity,
                    old.alias,
                    old.twin,
                    old.user,
                    old.delay,
                    old.on_end,
                    old.token,
                    old.accepted_at,
                    old.verified_at,
                )
                carried.append(Carried(old.id, *before))
            jitter = 0.0 if event.running_since is None else self._random()
            new = lifecycle.delegate(
                old, old.id if old else work.tx.new_id(), accept, event, like, work.now, stamp, self.policy, jitter, doubtful=doubtful
            )
            work.put(new, accept)
            made.append(new)
        if all(row.verified_at is not None for row in made):
            self._supersede_others(work, made[0])
        work.opened[accept.homeserver] += len(made)
        work.opened[party(accept.user, accept.homeserver)] += len(made)
        if accept.token is None:
            work.load[accept.homeserver] = work.load.get(accept.homeserver, 0.0) + sum(1 / event.delay for event in accept.events)
        return Accepted(accept.delegation, True, tuple(work.rows[row.id] for row in made), tuple(carried))

    def _perhaps_theirs(self, work: _Work, accept: Accept) -> list[DelayedEvent]:
        """Open events of the same client, as far as can be told: of the same device, where that is known, and else of the same user."""
        if accept.alias is not None:
            return work.participant(accept.sfu, accept.room, accept.alias)
        return [] if accept.user is None else work.of_user(accept.sfu, accept.room, accept.user, accept.homeserver)

    def _once(self, work: _Work, rows: list[DelayedEvent], accept: Accept) -> list[DelayedEvent]:
        """Rows of a participant in which each event that is accepted is there once: it may have been handed over under several identities."""
        kept: dict[str, DelayedEvent] = {}
        for row in sorted(rows, key=lambda row: (row.state is State.DONE, row.state is State.SUPERSEDED, row.identity != accept.identity, row.id)):
            kept.setdefault(row.delay_id, row)
        wanted = {event.delay_id for event in accept.events}
        for row in rows:
            if row.delay_id not in wanted or kept[row.delay_id] is row:
                continue
            if row.identity == accept.identity:
                work.delete(row)  # the one that is kept takes its place
            elif row.state is not State.DONE:
                self._advance(work, row, Withdraw(row.delegation))
        return [row for row in rows if row.delay_id not in wanted or kept[row.delay_id] is row]

    def _refuse(self, work: _Work, refuse: Refuse) -> Withdrawn:
        rows = []
        back = {carried.event: carried for carried in refuse.back}
        for row in work.delegation(refuse.delegation):
            was = back.get(row.id)
            if was is not None and row.state is not State.DONE and not self._is_taken(work, row, was.identity):
                work.put(
                    row._replace(
                        delegation=was.delegation,
                        identity=was.identity,
                        alias=was.alias,
                        twin=was.twin,
                        user=was.user,
                        delay=was.delay,
                        on_end=was.on_end,
                        token=was.token,
                        accepted_at=was.accepted_at,
                        verified_at=row.verified_at or was.verified_at,
                        harm=row.running_since + was.delay if row.state in (State.LIVE, State.SUPERSEDED) else row.harm,
                    ),
                    refuse,
                )
                rows.append(work.rows[row.id])
            else:
                rows.append(self._advance(work, row, Withdraw(refuse.delegation)))
        return Withdrawn(tuple(rows))

    @staticmethod
    def _is_taken(work: _Work, row: DelayedEvent, identity: str) -> bool:
        """Has the same event been handed over under that identity meanwhile?"""
        there = work.participant(row.sfu, row.room, identity, finished=True)
        return any(other.identity == identity and other.delay_id == row.delay_id and other.id != row.id for other in there)

    @staticmethod
    def _same(current: Sequence[DelayedEvent], accept: Accept) -> list[DelayedEvent]:
        """The rows of the participant's newest delegation, if it consists of exactly these events and nothing is the matter with them."""
        if not current:
            return []
        newest = max(current, key=lambda row: (row.accepted_at, row.id)).delegation
        rows = [row for row in current if row.delegation == newest]
        wanted = {(event.delay_id, event.delay, event.on_end) for event in accept.events}
        asked = {(row.delay_id, row.delay, row.on_end) for row in rows} == wanted
        forms = {accept.identity, accept.alias, accept.twin}
        there = all(row.homeserver == accept.homeserver and forms <= {*row.forms, None} for row in rows)
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
        if accept.token is None:
            who, most = party(accept.user, accept.homeserver), self.limits.max_unnamed if accept.user is None else self.limits.max_per_user
            if self._doubts.of(who, work.now) + work.opened[who] + len(accept.events) > most:
                whose = "this user has" if accept.user is not None else "participants whose Matrix user is not known have"
                raise TooMany(
                    "delegations.max_per_user",
                    most,
                    f"{most} delayed events that {whose} delegated lately are not confirmed by the homeserver, and that is the most. Try again "
                    "later.",
                )
        self._admit_load(work, current, accept)

    def _admit_load(self, work: _Work, current: Sequence[DelayedEvent], accept: Accept) -> None:
        """A homeserver's restarts must fit its rate, or there is one that comes too late. What the participant has delegated is replaced."""
        pace = self._pace(accept.homeserver)
        if accept.token is not None or pace.limit is not Limit.SOME or all(event.delay >= LONG_DELAY / pace.rate for event in accept.events):
            return
        load = self._load.get(accept.homeserver, 0.0) + work.load.get(accept.homeserver, 0.0)
        load -= sum(1 / row.delay for row in current if row.homeserver == accept.homeserver and row.token is None)
        if load + sum(1 / event.delay for event in accept.events) > pace.rate * FEASIBLE:
            raise TooMany(
                "homeservers.as_token",
                round(load / pace.rate * 100),
                f"This homeserver allows {pace.rate:.2g} actions a second, and restarting what is delegated already takes {load / pace.rate:.0%} of "
                f"that. Schedule the event with a delay of at least {LONG_DELAY / pace.rate:.0f} s and delegate it again, or have the operators "
                "lift the limit by an application service.",
            )

    def _answered(self, work: _Work, answer: Answered) -> Touched:
        row = work.get(answer.event)
        if row is None:
            return Touched(0)
        if answer.sent_at > work.now:  # the clock was set back meanwhile
            answer = answer._replace(sent_at=work.now)
        new = self._advance(work, row, answer)
        if new.verified_at is not None and row.verified_at is None:
            self._supersede_others(work, new)
        return Touched(1)

    def _supersede_others(self, work: _Work, row: DelayedEvent) -> None:
        """Once a delegation is verified as a whole, the events of older ones of the same participant are to be cancelled."""
        rows = [other for other in work.same_participant(row) if other.state is not State.DONE]
        if all(other.delegation == row.delegation for other in rows):
            return
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
        late = [homeserver for homeserver in self._due if self._begins(homeserver) <= now]
        crowded = [homeserver for homeserver in sorted({*self._plans, *self._replan}) if self._plan_at(homeserver) <= now]
        crowded += [homeserver for homeserver, plan in self._plans.items() if plan.early <= now]
        tasks: list[Task] = []
        asked: list[str] = []
        self._waiting.clear()
        self._departing &= {*fresh, *late}
        for homeserver in dict.fromkeys([*fresh, *late, *crowded]):
            if self._begins(homeserver) <= now:
                asked.append(homeserver)
            if self.store.shared and not self.stopping and self._pace(homeserver).limit is Limit.SOME:
                # The others take from the same bucket: one instance at a time looks into it.
                self.store.exchange_pace(homeserver, partial(self._claim_from_all, work, homeserver, fresh.get(homeserver, ()), tasks))
            else:
                tasks += self._claim_at(work, homeserver, fresh.get(homeserver, ()))
        return tasks, asked

    def _claim_from_all(self, work: _Work, homeserver: str, fresh: Sequence[DelayedEvent], tasks: list[Task], known: str | None) -> str:
        pace = self._pace(homeserver)
        if known is not None:
            pace.adopt(known, work.now)
        new = self._claim_at(work, homeserver, fresh)
        for task in new:
            if task.token is None:
                pace.take(work.now)
        tasks += new
        return pace.shared()

    def _claim_at(self, work: _Work, homeserver: str, fresh: Sequence[DelayedEvent]) -> list[Task]:
        """Claim actions at one homeserver; `fresh`: rows that this step has changed, and that are due."""
        now = work.now
        pace = self._pace(homeserver)
        cut_off = self._cut_off.get(homeserver)
        candidates = {row.id: row for row in fresh if cut_off is None or cut_off.claims(row, now)}
        places = 0 if self.stopping else max(pace.places(now), int(pace.last_try(now)))
        its_time = self._begins(homeserver) <= now
        if its_time:
            found = self._timers(work, homeserver)
            if places:
                for row in self._found(work, homeserver, places) if cut_off is None else self._left_over(work, cut_off, places):
                    found = True
                    # What this step has changed may be due no more.
                    if row.due is not None and row.due <= now and row.lane is not Lane.TIMER:
                        candidates[row.id] = row
                if self.store.shared and not found:
                    self._busy_elsewhere.add(homeserver)
        if self.stopping:
            return []
        plan = self._plan(work, homeserver)
        unclaimed: dict[int, DelayedEvent] = {}
        if cut_off is not None:
            unclaimed = {row.id: row for row in self._to_be_tried(work, cut_off, fresh, places, its_time=its_time)}
            if its_time:
                work.tried.append(cut_off)
        elif places and plan.early <= now:
            candidates.update((row.id, row) for row in self._not_due_yet(work, plan, places))
        ready = [row for row in candidates.values() if not self._let_run(work, row)]
        choice = choose([*ready, *unclaimed.values()], pace, plan, now)
        self._waiting[homeserver] = choice.waiting
        if any(wait.ending for wait in choice.waiting):
            self._departing.add(homeserver)
        elif places:  # without one the database was not asked, and what waited there waits still
            self._departing.discard(homeserver)
        tasks: list[Task] = []
        for row in choice.rows:
            if row.id in unclaimed:
                tasks.append(self._without_claim(row, now))
                continue
            claimed = lifecycle.claim(row, now, self.policy, shared=self.store.shared)
            work.put(claimed, None)
            tasks.append(_task(claimed, now + self.policy.lease))
        return tasks

    def _without_claim(self, row: DelayedEvent, now: float) -> Task:
        """A restart that is in nobody's way; a restart too many harms nobody."""
        self._unclaimed += 1
        return _task(row._replace(claim=-self._unclaimed), now + self.policy.lease)

    def _left_over(self, work: _Work, cut_off: CutOff, places: int) -> list[DelayedEvent]:
        """Endings at a homeserver that fails for us, which others could have made by now."""
        return work.taken(work.tx.todo(cut_off.homeserver, Lane.END, places, work.now - cut_off.left))

    def _to_be_tried(self, work: _Work, cut_off: CutOff, fresh: Sequence[DelayedEvent], places: int, *, its_time: bool) -> list[DelayedEvent]:
        """Restarts at a homeserver that fails for us, to be made without a claim: those that are due, and now and then one that is not."""
        now = work.now
        cut_off.forget(now)
        if not places:
            return []
        under_way = {event for name, event, _ in self._under_way if name == cut_off.homeserver}
        rows = [row for row in fresh if row.lane is Lane.RESTART]
        if its_time:
            rows += [work.rows.get(row.id, row) for row in work.tx.soon(cut_off.homeserver, 2 * places + len(under_way) + len(cut_off.tried))]
        free = [
            row
            for row in rows
            if row.state is State.LIVE and row.lane is Lane.RESTART and not row.claimed and row.id not in work.deleted
            if row.id not in cut_off.tried and row.id not in under_way and not self._reach(row.sfu).lost(row.sfu, now, self.policy)
        ]
        due = [row for row in free if row.due is not None and row.due <= now]
        if due or now < cut_off.probe_at:
            return due
        return free[:1]

    def _begins(self, homeserver: str) -> float:
        """When something is begun that is due at a homeserver: with what else is due in the same part of a second; but what the last step left, at
        once. Where it fails for us, and others are there, not all the time."""
        due = self._due.get(homeserver, inf)
        begins = due if due <= self._stepped_at or due == inf else ceil(due / TOGETHER) * TOGETHER
        if homeserver in self._cut_off:
            return self._cut_off[homeserver].begins(begins)
        return begins

    def _found(self, work: _Work, homeserver: str, places: int) -> list[DelayedEvent]:
        found = work.tx.todo(homeserver, Lane.END, places, work.now)
        # Those whose deadline has passed must not hide those that can still make it.
        found += work.tx.todo(homeserver, Lane.RESTART, places, work.now, harmed=False)
        found += work.tx.todo(homeserver, Lane.RESTART, places, work.now, harmed=True)
        return work.taken(found)

    def _not_due_yet(self, work: _Work, plan: Plan, most: int) -> list[DelayedEvent]:
        """Restarts that are made before they are due, because many deadlines come together."""
        rows: list[DelayedEvent] = []
        for event in plan.soonest:
            row = work.get(event)
            if row is None or row.lane is not Lane.RESTART or row.claimed or row.attempts or row.harm is None:
                continue
            if row.harm > work.now and may_be_restarted(row.harm, row.delay, work.now):
                rows.append(row)
                if len(rows) >= most:
                    break
        return rows

    def _let_run(self, work: _Work, row: DelayedEvent) -> bool:
        """Of an SFU that is lost nobody knows who is there: then nothing is restarted, and ghosts end."""
        if row.lane is not Lane.RESTART or row.state is not State.LIVE:
            return False
        if not self._reach(row.sfu).lost(row.sfu, work.now, self.policy):
            return False
        return self._advance(work, row, SfuLost(row.sfu)).state is not State.LIVE

    def _is_planned(self, homeserver: str) -> bool:
        """Are its restarts planned? A homeserver of which nothing is known, but that it has served so many, has no limit such as Synapse's."""
        limit = self._pace(homeserver).limit
        return limit is Limit.SOME or (limit is Limit.UNKNOWN and self._open[homeserver] <= PLANNED_MOST)

    def _plan_at(self, homeserver: str) -> float:
        """When it is to be planned anew; infinite: never."""
        if not self._is_planned(homeserver):
            return inf
        plan = self._plans.get(homeserver, NOTHING_PLANNED)
        act = -inf if homeserver in self._replan or plan.lateness > 0 else min(plan.early, plan.must - 1 / self._pace(homeserver).rate)
        return max(act, plan.holds_until())

    def _plan(self, work: _Work, homeserver: str) -> Plan:
        """When this homeserver's restarts must begin. What is planned once holds until it is time to act on it: only new deadlines can make it
        worse, and those are remembered."""
        pace = self._pace(homeserver)
        if not self._is_planned(homeserver):
            self._plans.pop(homeserver, None)
            self._replan.discard(homeserver)
            return NOTHING_PLANNED
        if self._plan_at(homeserver) <= work.now:
            countdowns = [self._as_changed(work, countdown) for countdown in work.tx.countdowns(homeserver)]
            begin = pace.next_restart(work.now)
            self._plans[homeserver] = plan_restarts((c for c in countdowns if c is not None), pace.rate, begin, work.now)
            self._replan.discard(homeserver)
        return self._plans.get(homeserver, NOTHING_PLANNED)

    @staticmethod
    def _as_changed(work: _Work, countdown: Countdown) -> Countdown | None:
        row = work.rows.get(countdown.event)
        if row is None or row is work.before[row.id]:
            return countdown
        return countdown._replace(harm=row.harm) if row.lane is Lane.RESTART and row.harm is not None else None

    def _timers(self, work: _Work, homeserver: str) -> bool:
        """What rows have asked for themselves; were there any?"""
        rows = work.taken(work.tx.todo(homeserver, Lane.TIMER, TIMERS_A_STEP, work.now))
        if self.store.shared and rows:
            free = work.tx.free_rooms({(row.sfu, row.room) for row in rows})
            rows = [row for row in rows if (row.sfu, row.room) in free]
        for row in rows:
            if row.lane is not Lane.TIMER or row.due is None or row.due > work.now:
                continue
            if row.state is not State.DONE:
                if row.state is State.ADRIFT and not self._reach(row.sfu).lost(row.sfu, work.now, self.policy):
                    row = self._advance(work, row, SfuFound(row.sfu))  # noqa: PLW2901 - the same row
                self._advance(work, row, Due(row.id))
                continue
            work.delete(row)
            if work.room(row.sfu, row.room) is not None and not work.in_room(row.sfu, row.room):
                work.put_room(row.sfu, row.room, None)
        return bool(rows)

    def _schedule_looks(self, work: _Work) -> None:
        """A room is to be looked at when the first of its participants asks for it."""
        wanted: dict[tuple[str, str], float] = {}
        departed: set[tuple[str, str]] = set()
        for id, row in work.rows.items():
            before = work.before[id]
            if before is row or id in work.deleted or row.state is State.DONE:
                continue
            key = (row.sfu, row.room)
            if row.presence is not Presence.GONE and (before is None or before.state is State.DONE or before.presence is Presence.GONE):
                self._look_now_and_then(work, row)
            if row.look_at is not None and (before is None or before.look_at != row.look_at):
                wanted[key] = min(row.look_at, wanted.get(key, row.look_at))
                if row.presence is Presence.AWAY:
                    departed.add(key)
        for (sfu, name), at in wanted.items():
            room = work.room(sfu, name)
            if room is None or room.claimed:
                continue
            if room.failures and room.due is not None and not room.routine and (sfu, name) not in departed:
                continue  # the SFU does not answer, and the next try is planned
            due = max(at, room.looked_at + self.policy.look_gap)
            if room.due is None or room.routine or due < room.due:
                work.put_room(sfu, name, room._replace(due=due if room.due is None else min(due, room.due), routine=False))

    def _look_now_and_then(self, work: _Work, row: DelayedEvent) -> None:
        """Its room is looked at although nobody asks for it."""
        room = work.room(row.sfu, row.room) or Room(row.sfu, row.room, "", "", 0.0, False, 0.0, 0.0, None, None, True, 0, 0, False)
        if room.due is None:
            due = self._next_routine(work.now, room, [row])
            work.put_room(row.sfu, row.room, room._replace(due=due, routine=True))

    def _fail_looks(self, work: _Work) -> None:
        """Looks at an SFU that keeps failing are not made, but for one now and then: they count as failed at once."""
        reaches = list(self._reaches.items())  # `heard` may add one meanwhile
        failing = [(sfu, reach) for sfu, reach in reaches if reach.shut and not reach.outvoted(work.now)]
        if failing:
            self._schedule_looks(work)
        for sfu, reach in failing:
            due = sorted(self._due_rooms(work, sfu, ROOMS_A_STEP), key=_probed_first)
            if self.store.shared and not due:
                self._busy_elsewhere.add(sfu)
            # The first of them is for the look that tries whether it works again.
            for room in due[1:] if reach.free(work.now, self.policy) else due:
                self._conclude(work, room, Looked(sfu, room.name, room.claim, work.now, None, NOT_ASKED))

    def _due_rooms(self, work: _Work, sfu: str, most: int) -> list[Room]:
        """Rooms of an SFU that are to be looked at: what this step knows, and `most` of what the database does."""
        if most > 0 and self._rooms_due.get(sfu, inf) <= work.now:
            for stored in work.tx.rooms_due(sfu, most, work.now):
                work.take_room(stored)
        rooms = [room for room in work.rooms.values() if room is not None and room.sfu == sfu]
        return [room for room in rooms if room.due is not None and room.due <= work.now]

    def _claim_looks(self, work: _Work) -> tuple[list[Task], list[str]]:
        now = work.now
        changed = [sfu for sfu, _ in work.rooms]
        late = [sfu for sfu, at in self._rooms_due.items() if at <= now]
        tasks: list[Task] = []
        for sfu in dict.fromkeys([*changed, *late]):
            reach = self._reach(sfu)
            free = 0 if self.stopping else reach.free(now, self.policy)
            if free < 1:
                continue
            # Where some fail, more than are needed: those that do not fail come first.
            due = self._due_rooms(work, sfu, free if reach.failing_since is None else ROOMS_A_STEP)
            if self.store.shared and not due:
                self._busy_elsewhere.add(sfu)
            order = _probed_first if reach.open(self.policy) else _urgent_first
            for room in sorted(due, key=order)[:free]:
                claimed = room._replace(claim=room.claim + 1, claimed=True, due=now + self.policy.lease, looked_at=now)
                work.put_room(sfu, room.name, claimed)
                tasks.append(Task(Action.LOOK, 0, claimed.claim, sfu, room.name, lease_ends=now + self.policy.lease))
        return tasks, late

    def _wake(self, now: float) -> float | None:
        """When something can be done next that is not set off by an input."""
        times = []
        for homeserver in self._due:
            at = self._begins(homeserver)
            if at > now:
                times.append(at)
            elif not self._waiting.get(homeserver):
                times.append(self._pace(homeserver).next_for(Wait(urgent=True, ending=False), now))
        for homeserver, waiting in self._waiting.items():
            times += [self._pace(homeserver).next_for(wait, now) for wait in waiting]
        times += [max(now, self._plan_at(homeserver)) for homeserver in {*self._plans, *self._replan}]
        for sfu, due in self._rooms_due.items():
            reach = self._reach(sfu)
            if due > now or reach.free(now, self.policy) > 0 or (reach.shut and not reach.outvoted(now)):
                times.append(due)
        soonest = min(times, default=inf)
        return None if soonest == inf else soonest

    def _write_down(self, work: _Work) -> list[str]:
        """Keep what was learned, and have rooms looked at in bulk; returns the SFUs of those."""
        for name in self._learned:
            pace, before = self._paces.get(name), self._known_homeservers.get(name)
            if pace is not None and self._limited(name) is not False:
                known = KnownHomeserver(name, pace.limit, pace.rate, pace.burst)
                if _is_news(before, known):
                    work.tx.save_homeserver(known)
                    work.learned[name] = known
            reach = self._reaches.get(name)
            if reach is not None:
                since = None if reach.failing_since is None else max(reach.failing_since, reach.heard_at)
                seen = KnownSfu(name, since, reach.several_nodes_at)
                if seen != self._known_sfus.get(name, KnownSfu(name, None, None)):
                    work.tx.save_sfu(seen)
                    work.learned_sfus[name] = seen
        sfus: list[str] = []
        for sfu in () if self.store.shared else self._ask:
            work.tx.ask_rooms(sfu, work.now)
            sfus += [*self._rooms_due] if sfu is None else [sfu]
        return sfus

    # ── counts ──

    def _pace(self, homeserver: str) -> Pace:
        pace = self._paces.get(homeserver)
        if pace is None:
            pace = self._paces[homeserver] = Pace(self._in_flight(homeserver))
            known = self._known_homeservers.get(homeserver)
            self._was_exempt[homeserver] = self._limited(homeserver) is False
            if self._was_exempt[homeserver]:
                pace.reset(Limit.NONE)
            elif known is not None and not (self._limited(homeserver) and known.limit is not Limit.SOME):
                pace.recall(known.limit, known.rate, known.burst, self._now)
            elif self._limited(homeserver):
                pace.reset(Limit.SOME)
            if homeserver in self._shared_paces:
                pace.adopt(self._shared_paces[homeserver], self._now)
        return pace

    def _reach(self, sfu: str) -> Reach:
        reach = self._reaches.get(sfu)
        if reach is None:
            known = self._known_sfus.get(sfu, KnownSfu(sfu, None, None))
            new = Reach(self._looks_in_flight(sfu), failing_since=known.failing_since, several_nodes_at=known.several_nodes_at)
            reach = self._reaches.setdefault(sfu, new)
        return reach

    def _count(self, work: _Work) -> None:
        for id, row in work.rows.items():
            before = work.before[id]
            deleted = id in work.deleted
            if before is row and not deleted:
                continue
            if before is None or before.verified_at is None or row.verified_at is None:
                self._doubts.changed(id, None if deleted else row, work.now)
            if (
                before is None
                or deleted
                or before.state is not row.state
                or before.presence is not row.presence
                or before.homeserver != row.homeserver
            ):
                self._count_states(before, None if deleted else row)
            if not deleted and row.lane is Lane.RESTART and row.harm is not None and row.token is None:
                new = before is None or before.lane is not Lane.RESTART or before.harm is None or row.harm < before.harm
                if new and self._is_planned(row.homeserver):
                    self._replan.add(row.homeserver)
            is_open = None if deleted or row.state is State.DONE else row
            was_open = None if before is None or before.state is State.DONE else before
            if is_open is None or was_open is None or _load(is_open) != _load(was_open) or is_open.homeserver != was_open.homeserver:
                self._count_open(was_open, is_open)
        self._known_homeservers.update(work.learned)
        self._known_sfus.update(work.learned_sfus)
        self._learned.clear()
        self._ask.clear()
        self._kept_alive.clear()

    def _count_states(self, was: DelayedEvent | None, is_now: DelayedEvent | None) -> None:
        if was is not None:
            key = (was.homeserver, was.state, was.presence)
            self.states[key] -= 1
            if not self.states[key]:
                del self.states[key]
        if is_now is not None:
            self.states[is_now.homeserver, is_now.state, is_now.presence] += 1

    def _count_open(self, was: DelayedEvent | None, is_now: DelayedEvent | None) -> None:
        """A delayed event has begun or ended, has another delay, or is another homeserver's."""
        if was is not None:
            self._open[was.homeserver] -= 1
            self._load[was.homeserver] = max(0.0, self._load.get(was.homeserver, 0.0) - _load(was))
        if is_now is not None:
            self._open[is_now.homeserver] += 1
            self._load[is_now.homeserver] = self._load.get(is_now.homeserver, 0.0) + _load(is_now)
        if was is not None and self._open[was.homeserver] <= 0 and not self.store.shared:  # there the census tells
            self._forget(was.homeserver)

    def _forget(self, homeserver: str) -> None:
        """Of a homeserver that has no open events any more, only what was written down is kept."""
        self._open.pop(homeserver, None)
        self._load.pop(homeserver, None)
        self._plans.pop(homeserver, None)
        self._replan.discard(homeserver)
        self._shared_paces.pop(homeserver, None)
        pace = self._paces.get(homeserver)
        if pace is not None and not pace.in_flight and pace.blocked_until <= self._now:
            del self._paces[homeserver], self._was_exempt[homeserver]

    # ── several instances ──

    def refresh(self, now: float) -> float | None:
        """Take over what other instances may have changed, and tell them what this one has heard; when to step next. For stores that are shared,
        about once a second. Raises StoreUnavailable."""
        heard = {sfu: Heard(sfu, reach.heard_at, max(0.0, reach.answered_at)) for sfu, reach in list(self._reaches.items())}
        if now >= self._told_at + TELL_EVERY:
            news_of = [one for sfu, one in heard.items() if one != self._told.get(sfu, Heard(sfu, 0.0, 0.0))]
            if news_of:
                self.store.heard_of(news_of)
            self._told |= heard
            self._told_at = now
            self._resolve_doubts(now)
        news = self.store.news(now, self._word())
        self._now = now
        self._due = dict(news.schedule)
        self._rooms_due = dict(news.rooms)
        for sfu in news.sfus:
            if sfu.name in self._reaches or sfu.several_nodes_at is not None:
                self._reach(sfu.name).overheard(0.0, -inf, sfu.several_nodes_at)
        for one in news.heard:
            if one.name in self._reaches:
                self._reaches[one.name].overheard(one.heard_at, one.answered_at or -inf, None)
        self._shared_paces |= news.paces
        for homeserver, known in news.paces.items():
            if homeserver in self._paces:
                self._paces[homeserver].adopt(known, now)
        # Deadlines that others have added.
        self._replan |= {homeserver for homeserver in self._plans if self._pace(homeserver).limit is Limit.SOME}
        self.instances, self.has_namesake = news.instances, news.namesake
        self._words = {other.name: others.understood(other.word) for other in news.instances}
        self._heard_at = now
        self._weigh_words()
        self._cover(now)
        return now if self._ask else self._wake(now)

    def _word(self) -> str:
        """What the others are to know of homeservers and SFUs."""
        failing = {homeserver for homeserver, pace in self._paces.items() if pace.fails}
        asked = {homeserver for word in self._words.values() for homeserver in word.failing} & self._paces.keys() - failing
        answered = {homeserver: at for homeserver in asked if (at := self._paces[homeserver].answered_at) > -inf}
        sfus = [sfu for sfu, reach in list(self._reaches.items()) if reach.failing_since is not None]
        return others.told(failing, answered, sfus, busy=self.stopping or self._failed)

    def _weigh_words(self) -> None:
        """What do others say of homeservers and SFUs that fail for us?"""
        for homeserver in {*self._cut_off, *(homeserver for homeserver, pace in self._paces.items() if pace.fails)}:
            self._weigh_words_of(homeserver)
        for sfu, reach in list(self._reaches.items()):
            self._weigh_words_of_sfu(sfu, reach)

    def _weigh_words_of(self, homeserver: str) -> None:
        """Has a homeserver begun to fail for us, or ceased to, and what do others say of it?"""
        pace = self._paces.get(homeserver)
        if pace is None or not pace.fails or pace.failing_since is None or not self._words:
            self._cut_off.pop(homeserver, None)
            return
        cut_off = self._cut_off.setdefault(homeserver, CutOff(homeserver, self._now + others.PROBE_EVERY))
        cut_off.left = others.left_for(homeserver, pace.failing_since, self._words.values())

    def _weigh_words_of_sfu(self, sfu: str, reach: Reach) -> None:
        """The same for an SFU."""
        reach.others_may = reach.failing_since is not None and any(word.asks(sfu) for word in self._words.values())

    def clock_moved(self, by: float, now: float) -> None:
        """The clock that all follow was set: what is in memory was of another time. What is in the store, the store is told of by itself."""
        self._now, self._stepped_at, self._told_at = now, -inf, -inf
        self._told.clear()
        self._words.clear()
        self._cut_off.clear()
        self._replan |= self._plans.keys()
        self._plans.clear()
        self._waiting.clear()
        for pace in self._paces.values():
            pace.clock_moved(now)
        for reach in list(self._reaches.values()):
            reach.clock_moved(by)
        self._kept_alive.clear()

    def _resolve_doubts(self, now: float) -> None:
        """What others have confirmed, or ended, is in doubt no more."""
        waiting = list(self._doubts.waiting)
        # Some of them each time, so that it takes no longer however many there are.
        begin = self._doubted % len(waiting) if waiting else 0
        waiting = waiting[begin : begin + DOUBTS_A_TIME]
        self._doubted = begin + DOUBTS_A_TIME
        if waiting:
            for event in set(waiting) - self.store.unverified(waiting):
                self._doubts.changed(event, None, now)

    def _cover(self, now: float) -> None:
        """Webhooks that came while no instance listened are lost. That another one did is known when it is seen alive after this one has begun."""
        if self._was_covered:
            return
        if self._joined_at is None:
            self._joined_at = now
        if any(other.started_at < self._joined_at < other.alive_at for other in self.instances):
            self._was_covered = True
        elif not self.instances or now >= self._joined_at + COVERED_WITHIN:
            self._was_covered = True
            self._ask.add(None)

    def recount(self, census: Census) -> None:
        """Take over what was counted, where others change it as well."""
        self.states = Counter(census.states)
        self._load = dict(census.load)
        self._open = Counter()
        for (homeserver, state, _), count in census.states.items():
            if state != State.DONE:
                self._open[homeserver] += count
        for homeserver in [name for name in self._paces if name not in self._open]:
            self._forget(homeserver)

    def reconfigure(self, policy: Policy, limits: Limits) -> None:
        """Take new rules from the next step on. In-flight limits, and who is exempt from rate limits, are asked for anew, too."""
        self.policy = policy
        self.limits = limits
        for homeserver, pace in self._paces.items():
            pace.most = self._in_flight(homeserver)
            limited = self._limited(homeserver)
            if limited is False and not pace.exempt:
                pace.reset(Limit.NONE)
            elif limited is not False and (self._was_exempt[homeserver] or (limited and pace.limit is not Limit.SOME)):
                pace.reset(Limit.SOME if limited else Limit.UNKNOWN)
                self._replan.add(homeserver)
            self._was_exempt[homeserver] = limited is False
        for sfu, reach in list(self._reaches.items()):
            reach.most = self._looks_in_flight(sfu)

    def backlog(self, now: float) -> dict[tuple[str, Lane], tuple[int, float]]:
        """By homeserver and lane: how many rows are due, and since when the first of them. Asks the database only where something is."""
        late = [homeserver for homeserver, due in self._due.items() if due <= now]
        return {(homeserver, lane): found for homeserver in late for lane, found in self.store.backlog(homeserver, now).items()}

    def waiting_since(self) -> dict[str, float]:
        """By homeserver: the earliest departure whose event is not ended yet. Asks the database only where there are some."""
        ending = {homeserver for (homeserver, state, _), count in self.states.items() if state == State.ENDING and count > 0}
        found = {homeserver: self.store.waiting_since(homeserver) for homeserver in ending}
        return {homeserver: at for homeserver, at in found.items() if at is not None}

    def forecast(self, now: float) -> dict[str, float]:
        """By homeserver: the seconds by which the most endangered restart will miss its deadline at the current rate, 0 when all is well."""
        late = {homeserver for homeserver, due in self._due.items() if due <= now}
        lateness: dict[str, float] = {}
        for homeserver in self._paces:
            plan = self._plans.get(homeserver, NOTHING_PLANNED)
            overdue = self.store.overdue(homeserver, now) if homeserver in late else None
            lateness[homeserver] = max(plan.lateness, 0.0 if overdue is None else now - overdue)
        return lateness

    def rates(self) -> Mapping[str, tuple[Limit, float]]:
        """By homeserver: what is known about its rate limit, and the actions a second that it allows."""
        return {homeserver: (pace.limit, pace.rate) for homeserver, pace in self._paces.items()}

    def paces(self) -> dict[str, "HomeserverPace"]:
        """By homeserver: what it takes, and how many open events there are. May be called from any thread: numbers, for people to look at."""
        paces = list(self._paces.items())
        found = {name: HomeserverPace(pace.limit, pace.rate, pace.burst, bool(pace.exempt), self._open.get(name, 0)) for name, pace in paces}
        return found | {name: HomeserverPace(events=count) for name, count in list(self._open.items()) if count and name not in found}

    def reaches(self) -> dict[str, Reach]:
        """By SFU, how it can be asked. May be called from any thread, and only looked at."""
        return dict(self._reaches)

    @property
    def in_flight(self) -> int:
        """Requests that are under way, looks included."""
        return len(self._under_way)


def _forms(whose: DelayedEvent | Accept) -> list[Participant]:
    """The participant by all forms of its identity, as far as they are known."""
    key = (whose.sfu, whose.room, whose.identity)
    if whose.alias is None and whose.twin is None:
        return [key]
    return [key, *((whose.sfu, whose.room, form) for form in (whose.alias, whose.twin) if form is not None and form != whose.identity)]


def _urgent_first(room: Room) -> tuple[bool, bool, float]:
    return (room.failures > 0, room.routine, room.due or 0.0)


def _probed_first(room: Room) -> tuple[int, float]:
    """Where some rooms fail and others do not, one that has not failed shows that the SFU can be asked."""
    return (room.failures, room.due or 0.0)


def _is_news(before: KnownHomeserver | None, known: KnownHomeserver) -> bool:
    """Is it worth writing down?"""
    if before is None:
        return known.limit is not Limit.UNKNOWN
    return (known.limit, known.burst) != (before.limit, before.burst) or abs(known.rate / before.rate - 1) > RATE_CHANGE


def _load(row: DelayedEvent | None) -> float:
    """Restarts a second that an event needs at the least from what its homeserver allows us. A client's token has a limit of its own."""
    return 0.0 if row is None or row.token is not None else 1 / row.delay


def _task(row: DelayedEvent, lease_ends: float) -> Task:
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
        lease_ends=lease_ends,
    )
