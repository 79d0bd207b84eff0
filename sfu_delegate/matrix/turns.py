"""A bounded number of places, given in turn to those who wait: one to each, round and round, however many each of them asks for.

So somebody who asks for thousands delays others by one turn, and is the one who is turned away when too many wait.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Crowded(Exception):
    """Too many wait, and of them nobody waits for more than whoever asks now."""


class Turns:
    """`places` at a time, and `most` who wait."""

    def __init__(self, places: int, most: int) -> None:
        self._free = places
        self._most = most
        self._waiting = 0
        self._lines: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()  # by who; the first is whose turn is next

    @property
    def idle(self) -> bool:
        """Does nobody wait?"""
        return not self._lines

    @asynccontextmanager
    async def turn(self, who: str) -> AsyncIterator[None]:
        """A place, for as long as the block lasts. Raises Crowded, also while waiting, if others who wait for less come."""
        await self._take(who)
        try:
            yield
        finally:
            self._give_back()

    def take(self) -> bool:
        """A place, if one is free; to be given back."""
        if not self._free:
            return False
        self._free -= 1
        return True

    def give_back(self) -> None:
        """The place that `take` gave."""
        self._give_back()

    async def _take(self, who: str) -> None:
        if self.take():
            return
        if self._waiting >= self._most:
            self._make_room(who)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._lines.setdefault(who, deque()).append(turn)
        self._waiting += 1
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                if turn in self._lines.get(who, ()):  # else it has been passed over already
                    self._leave(who, turn)
            elif turn.exception() is None:
                self._give_back()  # it came at the moment of giving up
            raise

    def _make_room(self, who: str) -> None:
        longest = max(self._lines, key=lambda name: len(self._lines[name]), default=who)
        if len(self._lines.get(who, ())) >= len(self._lines.get(longest, ())):
            raise Crowded
        turn = self._lines[longest][-1]
        self._leave(longest, turn)
        if not turn.done():  # it may have been given up just now
            turn.set_exception(Crowded())

    def _leave(self, who: str, turn: asyncio.Future[None]) -> None:
        line = self._lines[who]
        line.remove(turn)
        self._waiting -= 1
        if not line:
            del self._lines[who]

    def _give_back(self) -> None:
        while self._lines:
            who, line = next(iter(self._lines.items()))
            self._lines.move_to_end(who)
            turn = line[0]
            self._leave(who, turn)
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
