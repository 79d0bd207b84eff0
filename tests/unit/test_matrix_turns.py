"""Places that are given in turn: nobody waits for what somebody else asks for in heaps."""

import asyncio
from random import Random

import pytest
from sfu_delegate.matrix.turns import Crowded, Turns


class Crowd:
    """People who take turns; each keeps its place until it is told to go."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.inside: list[str] = []
        self.served: list[str] = []
        self.told_to_stay: dict[str, list[asyncio.Event]] = {}

    def come(self, who: str) -> "asyncio.Task[None]":
        return asyncio.create_task(self._visit(who))

    async def _visit(self, who: str) -> None:
        async with self.turns.turn(who):
            self.inside.append(who)
            self.served.append(who)
            go = asyncio.Event()
            self.told_to_stay.setdefault(who, []).append(go)
            try:
                await go.wait()
            finally:
                self.inside.remove(who)
                if go in self.told_to_stay[who]:
                    self.told_to_stay[who].remove(go)

    async def settle(self) -> None:
        for _ in range(6):
            await asyncio.sleep(0)

    async def leave(self) -> None:
        """Whoever is inside first goes."""
        self.told_to_stay[self.inside[0]].pop(0).set()
        await self.settle()


async def test_as_many_as_there_are_places() -> None:
    """The others wait, and come in as places become free."""
    crowd = Crowd(Turns(2, 10))
    tasks = [crowd.come("a") for _ in range(3)]
    await crowd.settle()
    assert crowd.inside == ["a", "a"]
    await crowd.leave()
    assert crowd.served == ["a", "a", "a"]
    await crowd.leave()
    await crowd.leave()
    await asyncio.gather(*tasks)
    assert crowd.turns.idle


async def test_one_turn_each() -> None:
    """Whoever comes last and wants one thing waits for one turn of the one who wants many, not for all of them."""
    crowd = Crowd(Turns(1, 100))
    tasks = [crowd.come("greedy") for _ in range(20)]
    await crowd.settle()
    tasks += [crowd.come("modest"), crowd.come("other")]
    await crowd.settle()
    for _ in range(4):
        await crowd.leave()
    assert crowd.served[:5] == ["greedy", "greedy", "modest", "other", "greedy"]
    for _ in range(18):
        await crowd.leave()
    await asyncio.gather(*tasks)


async def test_whoever_wants_most_is_turned_away() -> None:
    """When too many wait, a newcomer takes the place of the last one in the longest line."""
    crowd = Crowd(Turns(1, 5))
    first = crowd.come("greedy")
    await crowd.settle()
    waiting = [crowd.come("greedy") for _ in range(5)]
    await crowd.settle()
    with pytest.raises(Crowded):
        await crowd.come("greedy")
    modest = crowd.come("modest")
    await crowd.settle()
    with pytest.raises(Crowded):
        await waiting[-1]
    await crowd.leave()
    await crowd.leave()
    assert crowd.served == ["greedy", "greedy", "modest"]
    for _ in range(4):
        await crowd.leave()
    await asyncio.gather(first, modest, *waiting[:-1])
    assert crowd.turns.idle


async def test_those_who_give_up_take_no_place_with_them() -> None:
    """At any moment: while they wait, and when their turn has just come."""
    random = Random(1)
    for _ in range(200):
        turns = Turns(2, 50)
        crowd = Crowd(turns)
        tasks = [crowd.come(random.choice("abc")) for _ in range(8)]
        for _ in range(30):
            match random.randrange(3):
                case 0:
                    random.choice(tasks).cancel()
                case 1 if waiting := [who for who in crowd.inside if crowd.told_to_stay[who]]:
                    crowd.told_to_stay[waiting[0]].pop(0).set()
                case _:
                    await asyncio.sleep(0)
            assert len(crowd.inside) <= 2
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert turns.idle
        async with asyncio.timeout(5), turns.turn("a"), turns.turn("b"):
            pass


async def test_a_newcomer_meets_somebody_who_has_just_given_up() -> None:
    """The last in the longest line is cancelled, and has not run since: the newcomer gets that place all the same."""
    crowd = Crowd(Turns(1, 2))
    first = crowd.come("first")
    await crowd.settle()
    waiting = [crowd.come("greedy") for _ in range(2)]
    await crowd.settle()
    modest = crowd.come("modest")
    waiting[-1].cancel()
    await crowd.settle()
    for _ in range(3):
        await crowd.leave()
    await asyncio.gather(first, modest, waiting[0])
    assert crowd.served == ["first", "greedy", "modest"]
    assert crowd.turns.idle
