"""What the daemon promises, as checks on a world: each with its honest condition, and each allowed exception named and counted.

1. `dropped by time`: no delayed event of somebody in the call runs out, if its homeserver could be reached in time.
2. `dropped by us`: the daemon neither sends nor cancels the event of somebody in the call (a superseded one is cancelled).
3. `forgotten`: the event of somebody who left is ended, soon after the daemon could know of it.
4. `lost`: what was acknowledged has its effect, and is there after every crash.
5. `rate`: few refusals.
6. `busy loop`, `counts`: the engine comes to rest, and counts as its database does.
7. `fence`: an answer to an older claim ends nothing.
"""

from collections import Counter
from math import inf
from typing import TYPE_CHECKING

from sfu_delegate.daemon.sharing import REFRESH_EVERY
from sfu_delegate.delegation.model import Accept, Action, Answered, Input, Listed, Outcome, Presence, Seen, Sighting, State, Task, Verdict
from sfu_delegate.delegation.model import DelayedEvent as Row
from sfu_delegate.delegation.policy import MISSING, Departure, Policy, Unasked
from sfu_delegate.delegation.presence import KEPT_SESSIONS
from sfu_delegate.delegation.replies import Accepted, Reply
from sfu_delegate.engine import COVERED_WITHIN, Step
from sfu_delegate.sandbox.homeserver import DelayedEvent, End, RateLimit
from sfu_delegate.store.postgresql import DEAD_AFTER

from tests.simulation.daemon import AGREE, SFU
from tests.simulation.people import Person
from tests.simulation.watching import Spans, Violation, Watch
from tests.simulation.world import DAEMON, START

if TYPE_CHECKING:
    from tests.simulation.daemon import Daemon
    from tests.simulation.world import World

NEWS = 0.1  # seconds that news needs from the moment in which it is in the database until it can make a difference
NOTICED = 21.0  # seconds after which the SFU notices at the latest that a client is gone
NEVER_JOINED = 61.0  # … that a client which only hangs will never be there
FORGETS = 400.0  # seconds of calm after which nobody who left may still have a delayed event: a routine look, a look that confirms it, tries
IDLE_STEPS = 1.5  # steps a second, on average, that find nothing to do: where the rate is limited, it is planned anew every second
LOOKS = 0.25  # looks a second at one room, on average
AT_ONCE = 15.0  # seconds from a start until every room has been looked at
EARLY = 0.2  # of the delay: nobody need restart an event again before
IN_VAIN = 5  # early restarts of an event that one process may make
CROWDED = 0.75  # the part of what a homeserver allows that the daemon is held to
LIMIT_SLACK = 8  # refusals for learning


def all_of(start: float, end: float, *conditions: Spans) -> list[tuple[float, float]]:
    """The parts of [start, end] in which all conditions hold."""
    spans = [(start, end)]
    for condition in conditions:
        spans = [(a, b) for start, end in spans for a, b in condition.times(start, end)]
    return spans


class Judge(Watch):
    """Watches one world, and raises Violation. `excused` counts the exceptions that were allowed."""

    world: "World"

    def __init__(self) -> None:
        self.excused: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self._lies: dict[str, list[float]] = {}  # by name: when looks missed somebody who was there
        self._ghosts: dict[str, float] = {}  # by name: when a look last showed somebody who was not
        self._absent: dict[str, float] = {}  # by name: when a look last truly did not show them
        self._rows: dict[int, str] = {}  # acknowledged rows, with their delay_ids
        self._restarted: dict[str, float] = {}  # by delay_id: the last restart that the daemon knows of
        self._in_vain: Counter[str] = Counter()
        self._looks: Counter[str] = Counter()
        self._looked_at: dict[str, float] = {}  # by room: when the last look was asked that got an answer
        self._idle = 0
        self._lives = 0
        self._learnt = 0  # starts at which nobody was there to tell what is known of limits
        self._refused: Counter[str] = Counter()
        self._granted: Counter[str] = Counter()
        self.limits: list[tuple[float, RateLimit | None]] = []  # which limit was in force since when

    @property
    def policy(self) -> Policy:
        """The daemon's."""
        return self.world.policy

    def excuse(self, why: str) -> None:
        """An allowed exception."""
        self.excused[why] += 1
        self.world.note(f"excused: {why}")

    # ── 1, 2: dropped ──

    def ended(self, event: DelayedEvent, task: Task | None, decided_at: float) -> None:
        person = self.world.owner[event.delay_id]
        self.outcomes[f"{event.end}{' by the daemon' if task else ''}"] += 1
        if person.present:
            if task is not None:
                self._dropped_by_us(person, event, task, decided_at)
            elif event.end is End.RAN_OUT:
                self._dropped_by_time(person, event)
        if event.delay_id in person.accepted and not person.present:
            self._in_time(person, event)

    def _dropped_by_us(self, person: Person, event: DelayedEvent, task: Task, decided_at: float) -> None:
        # Also one that was taken over by a process that died before it could say so.
        there = {row.delay_id: row.accepted_at for row in self.world.rows_of(person.room, person.identity, finished=True)}
        newer = any(other.delay_id in there for other in person.events[person.events.index(event) + 1 :])
        # What an instance that was stopped had been handed is accepted when it goes on, and takes the place of what the client has delegated since.
        later = any(at > there.get(event.delay_id, inf) for at in there.values())
        if task.action is Action.CANCEL and (newer or (later and self.world.several)):
            return
        operator = event.delay_id in person.ended_by_operator
        why = "the operator had it ended" if operator else self._why_we_might(person, event, decided_at)
        if why is None:
            raise Violation("dropped by us", self._about(person, event))
        self.excuse(why)

    def _why_we_might(self, person: Person, event: DelayedEvent, decided_at: float) -> str | None:
        since = person.present_since
        assert since is not None
        if since >= decided_at:
            return "came back after the decision"
        if self._lied_to(person, decided_at):
            return "the SFU lied"
        if self._known(person, decided_at):
            return None
        if self._absent.get(person.name, 0.0) >= since:
            return None  # it was asked since, and did say so
        if since >= decided_at - self.policy.look_gap:
            return "came back while the decision was made"
        if person.name in self._absent:
            return "came back after the look, and nobody told"
        return self._believed(person, decided_at)

    def _lied_to(self, person: Person, decided_at: float) -> bool:
        """One wrong list must not drop anybody of whom no departure was told; two with some time between them cannot be told from the truth."""
        lies = [at for at in self._lies.get(person.name, ()) if decided_at - 200.0 <= at <= decided_at]
        confirmed = lies and lies[-1] - lies[0] >= self.policy.departure(MISSING).look_after - 1.0
        told = any(decided_at - 200.0 <= self.world.said_goodbye.get(sid, (0.0, ""))[0] <= decided_at for sid in person.sids)
        return bool(confirmed or (lies and told))

    def _believed(self, person: Person, decided_at: float) -> str | None:
        """A departure may be believed where the SFU cannot be asked, or where its reason needs no look."""
        for sid in person.sids:
            told_at, reason = self.world.said_goodbye.get(sid, (0.0, ""))
            if sid == person.sid or not told_at or told_at > decided_at:
                continue
            departure: Departure = self.policy.departure(reason)
            if departure.look_after <= 0:
                return "removed is believed at once"
            asked_from = told_at + departure.look_after
            if departure.unasked is not Unasked.CONNECTED and not self._asked(asked_from - 10.0, decided_at):
                return "a departure is believed when the SFU cannot be asked"
        return None

    def _asked(self, start: float, end: float) -> bool:
        """Could the SFU be asked all the time from start to end? By anybody, where there are several: one that cannot is outvoted."""
        world = self.world
        return world.askable.always(start, end) and (not world.several or world.looking.always(start, end))

    def _known(self, person: Person, at: float) -> bool:
        """Did the daemon know by then that the present session is in the call?"""
        heard = self.world.heard.get(person.sid or "")
        return heard is not None and heard < at - NEWS

    def _dropped_by_time(self, person: Person, event: DelayedEvent) -> None:
        world = self.world
        later = [other.delay_id for other in person.events[person.events.index(event) + 1 :]]
        known = [person.accepted[delay_id] for delay_id in (event.delay_id, *later) if delay_id in person.accepted]
        if event.delay_id not in person.accepted or not known:
            return
        if any(delay_id in person.accepted for delay_id in later):
            known = [max(known)]
        start = max(event.since + event.delay * self.policy.restart_at, known[-1]) + 1.0
        if event.delay_id in person.ended_by_operator:
            self.excuse("the operator had it ended")
            return
        if self._let_run(person, event):
            self.excuse("let run: the SFU had been silent for long")
            return
        # Where the rate is limited, it is planned for the time of the burst.
        queue = 0.0 if world.homeservers[person.homeserver].limit is None else 5.0
        for x, y in all_of(start, event.deadline, world.reachable[person.homeserver], world.managing):
            held_up = 10.5 if world.hanging[person.homeserver].ever(x - 11.0, x) else 0.7
            held_up += self._taken_over(x, y)
            if y - x >= held_up + 1.0 + (event.deadline - x) / 8 + queue:
                if self._restarted.get(event.delay_id, 0.0) < event.since - 1.0 and person.restarts:
                    self.excuse("its client had restarted it last, which nobody tells the daemon")
                    return
                if self._crowded(person, event):
                    self.excuse("there was more to do than the rate allows")
                    return
                raise Violation("dropped by time", self._about(person, event))
        self.excuse("the homeserver could not be reached in time")

    def _taken_over(self, start: float, end: float) -> float:
        """How long instances that are in trouble may have held up in vain what is to be done between two times, in seconds.

        What somebody has claimed who has died since, is stopped, or hears of nothing, is somebody else's when the lease ends. That can happen again.
        """
        return self.world.takeover * sum(start - self.world.takeover <= at <= end for at in self.world.upsets) if self.world.several else 0.0

    def _held_up(self, start: float, wait: float) -> float:
        """How long something may take that takes `wait` seconds otherwise."""
        longer = wait
        while (now := wait + self._taken_over(start, start + longer)) > longer:
            longer = now
        return longer

    def _crowded(self, person: Person, event: DelayedEvent) -> bool:
        """Was there, while this countdown went on, more to do at the homeserver than fits into most of what it allows?"""
        world = self.world
        start, end = event.since, event.deadline
        limits = [limit for at, limit in self.limits if at <= end]
        changed = [limit for at, limit in self.limits[1:] if start - 60.0 <= at <= end]
        if limits[-1] is None:
            return False
        if changed:
            return True
        needed = 0.0
        for other in world.owner:
            needed += self._actions(other, start, end)
        open_for = sum(b - a for a, b in all_of(start, end, world.reachable[person.homeserver], world.managing))
        return needed > CROWDED * limits[-1].per_second * open_for

    def _actions(self, delay_id: str, start: float, end: float) -> float:
        """What the daemon has to do with one delayed event between two times, at the least."""
        person = self.world.owner[delay_id]
        event = next(event for event in person.events if event.delay_id == delay_id)
        accepted_at = person.accepted.get(delay_id)
        if accepted_at is None or accepted_at >= end or (event.ended_at or end) <= start:
            return 0.0
        span = min(end, event.ended_at or end) - max(start, accepted_at)
        arrived, left = accepted_at > start - 5.0, event.ended_at is not None or not person.present
        return max(0.0, span) / event.delay + arrived + left

    def _let_run(self, person: Person, event: DelayedEvent) -> bool:
        lost_after = self.policy.lost(SFU)
        changes = self.world.askable.changes
        for (at, holds), (until, _) in zip(changes, [*changes[1:], (self.world.now, True)], strict=True):
            if not holds and until - at >= lost_after and until >= event.since:
                return True
        return False

    # ── 3: forgotten ──

    def _in_time(self, person: Person, event: DelayedEvent) -> None:
        """The event of somebody who is not in the call: has it been waiting for too long?"""
        world = self.world
        left = person.left_at if person.left_at is not None else person.accepted[event.delay_id] + self.policy.join_timeout
        noticed = max(left + NOTICED, person.last_try + NEVER_JOINED, person.accepted[event.delay_id], self._ghosts.get(person.name, 0.0))
        until = event.ended_at if event.ended_at is not None else world.now
        calm = all_of(noticed, until, world.managing, world.looking, world.askable, world.truthful, world.reachable[person.homeserver])
        limit = world.homeservers[person.homeserver].limit
        queue = 0.0 if limit is None else 2 * (len(world.owner) + LIMIT_SLACK) / limit.per_second
        bound = FORGETS + queue + self.policy.join_timeout
        if any(b - a > bound + self._taken_over(a, b) for a, b in calm):
            # Absences are doubted for an hour, and then the event is let run.
            run_out = world.doubtful_until + event.delay
            if world.doubtful_until > noticed and not any(b - max(a, run_out) > bound for a, b in calm):
                self.excuse("a node had been away: absences are doubted for an hour")
                return
            raise Violation("forgotten", f"{self._about(person, event)}; had left {until - left:.0f} s before")
        self._prompt(person, event, until)

    def _prompt(self, person: Person, event: DelayedEvent, until: float) -> None:
        """A departure that was told, with everybody well, is acted on at once."""
        world = self.world
        told = [(world.said_goodbye[sid], sid) for sid in person.sids if sid in world.said_goodbye]
        if not told or person.left_at is None or person.wants or world.homeservers[person.homeserver].limit is not None:
            return
        (told_at, reason), sid = max(told)
        if sid != person.sids[-1] or told_at < person.left_at or len(person.events) > 1 or any(s not in world.said_goodbye for s in person.sids):
            return
        wait = max(self.policy.departure(reason).look_after, self.policy.unseen_departure if person.accepted[event.delay_id] > told_at - 5.0 else 0.0)
        start = max(told_at, person.accepted[event.delay_id])
        wait += self.policy.look_again + 2.0
        if sid not in world.heard or world.doubtful_until > start:
            return
        if world.several:
            # Looks, and endings, that were claimed by somebody who is no more.
            wait = self._held_up(start, wait)
        calm = (world.up, world.unanimous, world.askable, world.truthful, world.reachable[person.homeserver])
        if until > start + wait and all(condition.always(start - 130.0, start + wait) for condition in calm):
            raise Violation("forgotten", f"{self._about(person, event)}; {reason} had been told {until - told_at:.1f} s before")

    def _about(self, person: Person, event: DelayedEvent) -> str:
        world = self.world
        rows = [row for row in world.rows() if row.delay_id == event.delay_id]
        state = ", ".join(f"{row.presence}/{row.state}{f'/{row.outcome}' if row.outcome else ''} {row.reason}" for row in rows) or "no row"
        return f"{world.name_of(event.delay_id)} at {world.now - START:.3f} s: {event.end or 'pending'} ({state})"

    # ── 4: lost ──

    def kept(self, given: Input, reply: Reply, at: float) -> None:
        world = self.world
        if isinstance(given, Accept) and isinstance(reply, Accepted):
            self._rows |= {row.id: row.delay_id for row in reply.rows}
        elif isinstance(given, Seen):
            told_over = world.said_goodbye.get(given.sid, (0.0, ""))[0]
            for row in world.rows_of(given.room, given.identity):
                if world.several and row.accepted_at > at - 2 * AGREE:
                    continue  # another instance has accepted it since
                over = given.what is not Sighting.JOINED or told_over > row.accepted_at - world.offset
                if row.state is State.DONE or row.presence is Presence.GONE or len(row.sessions) >= KEPT_SESSIONS:
                    continue
                known = {session.sid: session.live for session in row.sessions}
                if given.sid not in known or (over and known[given.sid]):
                    raise Violation("lost", f"{given.what} of {given.sid} was acknowledged, and row {row.id} has {known}")

    def _nothing_lost(self) -> None:
        there = {row.id: row for row in self.world.rows()}
        for id, delay_id in self._rows.items():
            if id not in there or there[id].delay_id != delay_id:
                raise Violation("lost", f"row {id} was acknowledged, and is not there")

    # ── 5, 6 ──

    def answered(self, homeserver: str, verdict: Verdict) -> None:
        if verdict is Verdict.LIMITED:
            self._refused[homeserver] += 1
        elif verdict in (Verdict.DONE, Verdict.NOT_FOUND):
            self._granted[homeserver] += 1
        learnt = self._learnt + len(self.limits) - 1
        if self._refused[homeserver] > self._granted[homeserver] / 4 + LIMIT_SLACK * learnt:
            raise Violation("rate", f"{self._refused[homeserver]} refusals for {self._granted[homeserver]} successes")

    def stepped(self, daemon: "Daemon", step: Step, inputs: int) -> None:
        world = self.world
        apart = 2 * AGREE if world.several else 0.0  # of two instances' clocks
        if daemon.engine.in_flight != len(daemon.outstanding):
            raise Violation("counts", f"{daemon.engine.in_flight} in flight for the engine, and {len(daemon.outstanding)} in truth")
        for change in step.changes:
            if isinstance(change.given, Answered) and change.old is not None and change.given.claim != change.old.claim:
                self._fenced(change.old, change.new)
            if isinstance(change.given, Answered) and change.new.restarts != (change.old.restarts if change.old else 0):
                event = self.world.homeservers[change.new.homeserver].events[change.new.delay_id]
                if world.agreed and change.new.running_since - world.offset > event.since + 1e-3 + apart:
                    raise Violation("countdown", f"{self.world.name_of(event.delay_id)} is believed to run longer than it does")
                # Answers may be kept long after they came, many of one event at once.
                self._not_in_vain(event, min(event.since, change.given.sent_at - world.offset))
        for task in step.tasks:
            if task.action is Action.LOOK:
                self._looks[task.room] += 1
                if self._looks[task.room] > 100 + LOOKS * (self.world.now - START):
                    raise Violation("busy loop", f"{self._looks[task.room]} looks at {task.room} in {self.world.now - START:.0f} s")
        if not inputs and not step.tasks and not step.changes:
            self._idle += 1
            if self._idle > (50 + IDLE_STEPS * (self.world.now - START)) * len(world.daemons):
                raise Violation("busy loop", f"{self._idle} steps found nothing to do")

    @staticmethod
    def _fenced(old: Row, new: Row) -> None:
        """An answer to what another claim has replaced ends nothing, and leaves that claim as it is."""
        if new.state is not old.state or (old.claimed and (new.claimed, new.due, new.lane) != (old.claimed, old.due, old.lane)):
            raise Violation("fence", f"row {old.id} went from {old.state}/{old.claimed} to {new.state}/{new.claimed} by the answer to an older claim")

    def _not_in_vain(self, event: DelayedEvent, at: float) -> None:
        """A restart soon after the last one is good for nothing, but where the last one is not known of."""
        soon = at - self._restarted.get(event.delay_id, -inf) < event.delay * EARLY
        self._restarted[event.delay_id] = at
        self._in_vain[event.delay_id] += soon
        if self._in_vain[event.delay_id] > IN_VAIN * self._lives:
            raise Violation("busy loop", f"{self.world.name_of(event.delay_id)} is restarted again and again")

    def looked(self, room: str, asked_at: float, listed: tuple[Listed, ...] | None) -> None:
        if listed is None:
            return
        self._looked_at[room] = asked_at
        active = {entry.identity: entry.sid for entry in listed if entry.state == "ACTIVE"}
        shown = {entry.identity for entry in listed}
        for person in self.world.people.values():
            if person.room != room:
                continue
            there = person.active_at(asked_at)
            if there and person.identity not in active:
                self._lies.setdefault(person.name, []).append(asked_at)
            elif not there and person.identity not in shown:
                self._absent[person.name] = asked_at
            elif not there and person.identity in active and not person.present:
                self._ghosts[person.name] = asked_at
            if active.get(person.identity):
                self.world.heard.setdefault(active[person.identity], self.world.now)

    def stopped(self, daemon: "Daemon") -> None:
        self._count(daemon)

    def started(self, daemon: "Daemon") -> None:
        self._lives += 1
        self._learnt += not any(other.up for other in self.world.daemons if other is not daemon)
        if self._lives > 1:
            self._nothing_lost()
            world, since, life = self.world, self.world.now, daemon.life
            within = AT_ONCE
            if world.several:
                # Whatever came while another one listened is known; and LiveKit tries again for longer than a moment.
                within += COVERED_WITHIN + REFRESH_EVERY
                if any(other.up for other in world.daemons if other is not daemon) or world.up.ever(since - DEAD_AFTER - REFRESH_EVERY, since - 1e-3):
                    return
            world.after(within, lambda: self._looked_since(since, daemon, life))

    def _looked_since(self, start: float, daemon: "Daemon", life: int) -> None:
        """What happened while nobody listened is found out soon after the start."""
        world = self.world
        well = world.askable.always(start - 60.0, world.now) and world.looking.always(start, world.now) and daemon.up.always(start, world.now)
        if not well or life != daemon.life:
            return
        for row in world.rows():
            looked = self._looked_at.get(row.room, 0.0) >= start
            if not looked and row.state not in (State.DONE, State.ADRIFT) and row.accepted_at - world.offset < start:
                raise Violation("forgotten", f"{row.room} was not looked at within {world.now - start:.0f} s of the start")

    def _count(self, daemon: "Daemon") -> None:
        if self.world.several:
            return  # each counts what it does itself, and is told the truth now and then
        counted = {key: n for key, n in daemon.engine.states.items() if n}
        stored = dict(daemon.store.census().states)
        if counted != stored:
            raise Violation("counts", f"the engine counts {counted}, its database {stored}")

    # ── at the end ──

    def quiet(self) -> None:
        """Nothing has been wrong for a while, and everybody is still there."""
        world = self.world
        # Looks keep to a grid of their own; after a step of the clock a room seems to have been the same for long.
        interval = 1.5 * (self.policy.interval_most if world.offset else self.policy.look_interval(world.now - START)) + AT_ONCE
        for row in world.rows():
            told = max(self._looked_at.get(row.room, 0.0), row.accepted_at - world.offset)
            if row.state not in (State.DONE, State.ADRIFT) and world.now - told > interval:
                raise Violation("forgotten", f"{row.room} has not been looked at for {world.now - told:.0f} s")

    def _told_truly(self) -> None:
        """What the daemon ended at a departure is not told as the work of others."""
        for row in self.world.rows():
            event = self.world.homeservers[row.homeserver].events[row.delay_id]
            by_us = event.ended_by == DAEMON and event.end is End.SENT
            if by_us and row.outcome in (Outcome.ALREADY_ENDED, Outcome.LOST, Outcome.REJECTED):
                raise Violation("outcome", f"{self.world.name_of(event.delay_id)} was sent by the daemon, which tells {row.outcome}")

    def close(self) -> None:
        """Everything is over: nothing may be left."""
        self._nothing_lost()
        self._count(self.world.daemon)
        self._told_truly()
        for person in self.world.people.values():
            for event in person.events:
                if event.end is End.PENDING and event.delay_id in person.accepted and not person.present:
                    self._in_time(person, event)
        # What was let run is kept for a while after it must have fired.
        open_rows = [row for row in self.world.rows() if row.state not in (State.DONE, State.ADRIFT)]
        if open_rows:
            raise Violation("forgotten", f"never finished: {[(row.identity, row.presence, row.state, row.reason) for row in open_rows]}")
