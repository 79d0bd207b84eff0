"""What is in front of several instances of the daemon: a load balancer, which gives every request to one of them."""

from collections.abc import Callable
from enum import StrEnum
from random import Random
from typing import TYPE_CHECKING

from sfu_delegate.delegation.model import Accept, Input, Seen
from sfu_delegate.delegation.replies import Reply

from tests.simulation.daemon import Daemon

if TYPE_CHECKING:
    from tests.simulation.world import World


class Way(StrEnum):
    """Whom the load balancer chooses."""

    EACH = "each"  # anybody, for every request
    SENDER = "sender"  # whoever had the last request of the same sender (the SFU, or one client), for as long as that one is well
    STANDBY = "standby"  # the first that is well: the others do nothing until it is not


NOTICED_AFTER = 3.0  # seconds until it takes an instance that does not answer, or that says that it is in trouble, out of its choice
PATIENCE = 5.0  # seconds that it waits for an answer


class Front:
    """Where requests arrive. With one instance there is nothing in between.

    An instance that has just gone is still chosen now and then: whoever asked gets a connection error, and asks again. One that is stopped keeps its
    requests, and does them when it goes on, long after they have been made elsewhere.
    """

    def __init__(self, world: "World", seed: int) -> None:
        self._world = world
        self._random = Random(f"front {seed}")
        self._way = self._random.choice([*Way])
        self._last: dict[str, Daemon] = {}  # by sender: who had their last request

    def chosen(self, sender: str) -> Daemon | None:
        """Who gets the next request of a sender; None: nobody takes it."""
        daemons = self._world.daemons
        if not self._world.several:
            return daemons[0] if daemons[0].running else None
        now = self._world.now
        choice = [daemon for daemon in daemons if daemon.up or now < daemon.up.changes[-1][0] + NOTICED_AFTER]
        choice = choice or [daemon for daemon in daemons if daemon.running]  # nobody is well: then anybody
        if not choice:
            return None
        daemon = self._last.get(sender)
        if self._way is Way.STANDBY:
            daemon = choice[0]
        elif self._way is Way.EACH or daemon not in choice:
            daemon = self._last[sender] = self._random.choice(choice)
        return daemon if daemon is not None and daemon.running and not daemon.stopping else None

    def put(self, given: Input, then: Callable[[Reply | Exception], None]) -> None:
        """Hand in an input from outside, see `Daemon.put`."""
        daemon = self.chosen(given.identity if isinstance(given, Accept) else "")
        if daemon is None:
            then(ConnectionRefusedError())
        else:
            self.put_to(daemon, given, then)

    def put_to(self, daemon: Daemon, given: Input, then: Callable[[Reply | Exception], None]) -> None:
        """The same for one instance."""
        if not self._world.several:
            daemon.put(given, then)
            return
        told: list[bool] = []

        def tell(reply: Reply | Exception) -> None:
            if not told:
                told.append(True)
                then(reply)
            elif isinstance(given, Seen) and not isinstance(reply, Exception):
                self._world.knows(given)  # its sender has given up, and is not told

        daemon.put(given, tell)
        if not told:
            self._world.after(PATIENCE, lambda: tell(TimeoutError()))
