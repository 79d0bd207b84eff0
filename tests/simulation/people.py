"""A person's client: it schedules its delayed event, joins the SFU, delegates, and goes away in one of the ways in which people go away.

The truth about who is in the call is kept here, for those who judge the daemon: `present` says whether the person is in the call as people see it.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from sfu_delegate.delegation import model
from sfu_delegate.delegation.model import Accept, NewEvent, OnEnd, Withdraw
from sfu_delegate.delegation.replies import Accepted, Reply, TooMany
from sfu_delegate.sandbox.answer import Impossible
from sfu_delegate.sandbox.homeserver import DelayedEvent, End, MatrixError

if TYPE_CHECKING:
    from tests.simulation.world import World

SFU = "main"
MEMBER = "org.matrix.msc3401.call.member"
TRY_AGAIN = 3.0  # seconds between two tries of a client that does not get through
THROUGH = 0.7  # of the delegations of those who delegate through their homeserver
GIVES_UP = 60.0  # seconds after which a client stops looking for its SFU


class Person:
    """One participant. `restarts`: the client also restarts its event itself, which clients that delegate do not. `through`: it delegates through its
    homeserver, and changes over to the other way and back; whichever it is, it is in the call under the identity of that other way.
    """

    def __init__(self, world: "World", name: str, room: str, homeserver: str, delay: float, *, restarts: bool = False, through: bool = False) -> None:
        self.world = world
        self.name = name
        self.room = room
        self.homeserver = homeserver
        self.delay = delay
        self.restarts = restarts
        self.through = through
        self.user = f"@{name}:{homeserver}"
        self.identity = f"{self.user}:DEVICE"
        self.sid: str | None = None  # the session that the client has or tries to have
        self.wants = False  # to be in the call
        self.asleep = False  # vanished: its client does nothing
        self.events: list[DelayedEvent] = []  # all that were scheduled, oldest first
        self.accepted: dict[str, float] = {}  # by delay_id: when the daemon acknowledged it
        self.ended_by_operator: set[str] = set()  # delay_ids
        self.delegations: dict[str, str] = {}  # by delay_id
        self.stays: list[list[float | None]] = []  # [from, until] of being in the call, until None while it goes on
        self.sids: list[str] = []  # all sessions, oldest first
        self.last_try = 0.0  # when the client last began to connect
        self._active: list[list[float | None]] = []  # [from, until] of having an ACTIVE session and being awake
        self._looking_since: float | None = None
        self._delegating = 0  # counts, so that an older try does not go on
        self._numbers = 0

    @property
    def active(self) -> bool:
        """Has the client an ACTIVE session?"""
        return bool(self._active) and self._active[-1][1] is None

    @active.setter
    def active(self, value: bool) -> None:
        if value and not self.active:
            self._active.append([self.world.now, None])
        elif not value and self.active:
            self._active[-1][1] = self.world.now

    def active_at(self, at: float) -> bool:
        """Had the client an ACTIVE session then?"""
        return _in(self._active, at)

    @property
    def present(self) -> bool:
        """In the call, as people see it."""
        return bool(self.stays) and self.stays[-1][1] is None

    @property
    def present_since(self) -> float | None:
        """Since when without a gap."""
        return self.stays[-1][0] if self.present else None

    @property
    def left_at(self) -> float | None:
        """When they were last seen to go; None while they are there, and if they never were."""
        return self.stays[-1][1] if self.stays else None

    # ── coming ──

    def come(self, delegate_after: float = 0.0, join_after: float = 0.0) -> None:
        """Schedule an event, join, and delegate it."""
        self.schedule()
        self.world.after(join_after, self.join)
        number = len(self.events)
        self.world.after(delegate_after, lambda: self.delegate() if self.wants and len(self.events) == number else None)

    def schedule(self) -> None:
        """A new delayed event at the homeserver: the older ones are left to themselves."""
        homeserver = self.world.homeservers[self.homeserver]
        state_key = f"_{self.user}_DEVICE"
        delay_id = homeserver.schedule(self.user, self.room, MEMBER, state_key, round(self.delay * 1000), {}, self.world.now)
        event = homeserver.events[delay_id]
        self.events.append(event)
        self.world.owner[delay_id] = self
        self.world.note(f"{self.name} schedules #{len(self.events)}")
        if self.restarts:
            self._restart(event)

    def _restart(self, event: DelayedEvent) -> None:
        def again() -> None:
            if event.end is End.PENDING and self.wants and not self.asleep:
                if self.world.reachable[self.homeserver]:
                    self.world.homeservers[self.homeserver].manage(event.delay_id, "restart", self.world.now, self.user)
                self._restart(event)

        self.world.after(self.delay / 2, again)

    def join(self, active_after: float | None = None) -> None:
        """Connect to the SFU; a session that is there is taken over. Tried again while the SFU is away, for a minute."""
        world = self.world
        self.wants = True
        if self.asleep:
            return
        if not world.sfu.running:
            self._look_for_it()
            return
        self._looking_since = None
        self.active = False
        self.sid = ""  # what the model says of the old session while it opens the new one is about another
        sid = self.sid = world.sfu.begin_join(self.room, self.identity, world.now)
        self.sids.append(sid)
        self.last_try = world.now
        world.note(f"{self.name} joins as {sid}")

        def activate() -> None:
            if self.sid == sid and world.sfu.running and not self.asleep:
                self._attempt(lambda: world.sfu.activate(self.room, self.identity, world.now))

        world.after(world.random.uniform(0.02, 0.09) if active_after is None else active_after, activate)

    def _look_for_it(self) -> None:
        world = self.world
        if self._looking_since is None:
            self._looking_since = world.now
        since = self._looking_since
        if world.now - since > GIVES_UP:
            self._looking_since = None
            self.give_up()
            return

        def again() -> None:
            if self._looking_since == since and self.wants:
                self.join()

        world.after(world.random.uniform(1.0, TRY_AGAIN), again)

    def hang(self) -> None:
        """Connect the signalling and never send media: given up by the SFU after a minute."""
        self.wants = True
        if self.world.sfu.running and not self.asleep:
            self.sid = ""
            self.active = False
            self.sid = self.world.sfu.hang(self.room, self.identity, self.world.now)
            self.sids.append(self.sid)
            self.last_try = self.world.now

    def delegate(self, delay: float | None = None) -> None:
        """Hand the newest event to the daemon; again after a few seconds until that is acknowledged."""
        self._delegating += 1
        attempt = self._delegating
        self._hand_over(attempt, self.events[-1], delay or self.delay)

    def _hand_over(self, attempt: int, event: DelayedEvent, delay: float) -> None:
        world = self.world
        if attempt != self._delegating or event.end is not End.PENDING or self.asleep:
            return
        self._numbers += 1
        number, begun, asked = self._numbers, None, world.now
        if self.through and world.luck.random() < THROUGH:
            if not world.reachable[self.homeserver]:  # which cannot be asked: 503
                world.after(TRY_AGAIN, lambda: self._hand_over(attempt, event, delay))
                return
            begun = event.since - world.luck.random()  # by a clock that tells whole seconds

        def then(reply: Reply | Exception) -> None:
            if isinstance(reply, Accepted):
                self.accepted[event.delay_id] = world.now
                self.delegations[event.delay_id] = reply.delegation
                world.note(f"{self.name} has delegated #{self.events.index(event) + 1}")
            elif not isinstance(reply, TooMany):
                world.after(TRY_AGAIN, lambda: self._hand_over(attempt, event, delay))

        world.after(world.latency(), lambda: world.put(self._accept(number, event, delay, begun, asked), then))

    def _accept(self, number: int, event: DelayedEvent, delay: float, begun: float | None, asked: float) -> Accept:
        """As the daemon's API makes it: of somebody who delegates through its homeserver, if that was `asked` and has said when the countdown had
        `begun`.
        """
        clock = self.world.daemons[0].clock()
        since = None if begun is None else clock - (self.world.now - begun)
        asked_at = 0.0 if begun is None else clock - (self.world.now - asked)
        member = f"{self.identity}#member"
        return Accept(
            f"{self.name}-{number}",
            SFU,
            self.room,
            self.identity if begun is None else member,
            self.homeserver,
            (NewEvent(event.delay_id, delay, OnEnd.SEND, since, asked_at),),
            user=self.user,
            twin=None if not self.through else member if begun is None else self.identity,
        )

    def withdraw(self) -> None:
        """Take the delegation of the newest event back; from then on the client restarts it itself."""
        world = self.world
        delay_id = self.events[-1].delay_id
        delegation = self.delegations.get(delay_id)
        self._delegating += 1
        if delegation is None:
            return

        def then(reply: Reply | Exception) -> None:
            if isinstance(reply, Exception):
                world.after(TRY_AGAIN, lambda: world.put(Withdraw(delegation), then))
                return
            self.accepted.pop(delay_id, None)

        world.put(Withdraw(delegation), then)

    def be_ended(self) -> None:
        """The operator has the delegation of the newest event ended, whether the person is there or not."""
        world = self.world
        delay_id = self.events[-1].delay_id
        delegation = self.delegations.get(delay_id)
        if delegation is None:
            return

        def then(reply: Reply | Exception) -> None:
            if isinstance(reply, Exception):
                world.after(TRY_AGAIN, lambda: world.put(model.End(delegation), then))

        self.ended_by_operator.add(delay_id)
        world.put(model.End(delegation), then)

    # ── being there ──

    def publish(self) -> None:
        """A track: what tells the SFU of somebody who had fallen out of its lists."""
        if self.world.sfu.running and self.active and not self.asleep:
            self._attempt(lambda: self.world.sfu.publish_track(self.room, self.identity, self.world.now))

    # ── going ──

    def leave(self, *, say_goodbye: bool = False, reason: str = "CLIENT_INITIATED") -> None:
        """Out of the call. `say_goodbye`: the client also ends its own event, as far as the homeserver can be reached."""
        world = self.world
        self.wants = False
        self._looking_since = None
        self._delegating += 1
        self._gone()
        if self.sid and world.sfu.running:
            self._attempt(lambda: world.sfu.leave(self.room, self.identity, world.now, reason))
        self.sid, self.active = None, False
        if say_goodbye and world.reachable[self.homeserver] and self.events:
            try:
                world.homeservers[self.homeserver].manage(self.events[-1].delay_id, "send", world.now, self.user)
            except MatrixError:
                world.note(f"{self.name} could not end its event itself")
        world.note(f"{self.name} leaves")

    def vanish(self) -> None:
        """The client is gone without a word. The SFU notices after some 20 s."""
        self.asleep = True
        self._gone()
        if self.sid and self.world.sfu.running:
            self._attempt(lambda: self.world.sfu.vanish(self.room, self.identity, self.world.now))
        self.world.note(f"{self.name} vanishes")

    def wake_up(self) -> None:
        """A vanished client goes on: in the same session if that is still there, else in a new one."""
        world = self.world
        if not self.asleep:
            return
        self.asleep = False
        world.note(f"{self.name} wakes up")
        if not self.wants:
            return
        if world.sfu.running and self.sid and world.sfu.resume(self.room, self.identity, world.now):
            if self.active:
                self._here()
        else:
            self.join()

    def reconnect(self, gap: float | None = None) -> None:
        """A full reconnect: a new session that takes over, or with a gap (seconds) leave and join again, as browsers do."""
        world = self.world
        if self.asleep or not self.wants:
            return
        if gap is None:
            self.join()
            return
        if self.sid and world.sfu.running:
            self._attempt(lambda: world.sfu.leave(self.room, self.identity, world.now))
        self.sid, self.active = None, False
        self._gone()
        world.after(gap, lambda: self.join() if self.wants and not self.active else None)

    def reload(self, gap: float = 1.0, *, say_goodbye: bool = False) -> None:
        """The page is loaded anew: leave, and come back with a new delayed event."""
        self.leave(say_goodbye=say_goodbye)
        self.wants = True
        self.world.after(gap, lambda: self.come() if self.wants and not self.asleep else None)

    def be_removed(self) -> None:
        """An administrator removes the person."""
        self.leave(reason="PARTICIPANT_REMOVED")

    def give_up(self) -> None:
        """The client stops trying."""
        self.world.note(f"{self.name} gives up")
        self.wants = False
        self.sid, self.active = None, False
        self._gone()

    def cut_off(self) -> None:
        """Its SFU node is gone: it looks for another, and people still count it as in the call."""
        if self.sid is None:
            return
        self.sid, self.active = None, False
        if self.wants and not self.asleep:
            self.world.after(self.world.random.uniform(0.3, 3.0), lambda: self.join() if self.wants and self.sid is None else None)

    # ── what the SFU says ──

    def sfu_says(self, event: str, sid: str, reason: str) -> None:
        """A webhook about this identity was made."""
        if sid != self.sid:
            return
        if event == "participant_joined":
            self.active = True
            if not self.asleep:
                self._here()
            return
        self.sid, self.active = None, False
        if reason == "SERVER_SHUTDOWN":
            if self.wants and not self.asleep:
                self.world.after(self.world.random.uniform(0.3, 3.0), lambda: self.join() if self.wants and self.sid is None else None)
            return
        self._gone()
        if reason in ("JOIN_FAILURE", "PARTICIPANT_REMOVED", "ROOM_DELETED"):
            self.wants = False

    def _here(self) -> None:
        if not self.present:
            self.stays.append([self.world.now, None])
            self.world.note(f"{self.name} is in the call")

    def _gone(self) -> None:
        if self.present:
            self.stays[-1][1] = self.world.now

    def _attempt(self, do: Callable[[], object]) -> None:
        try:
            do()
        except Impossible as impossible:
            self.world.note(f"{self.name}: {impossible}")


def _in(spans: list[list[float | None]], at: float) -> bool:
    return any(start is not None and start <= at and (end is None or at < end) for start, end in reversed(spans))
