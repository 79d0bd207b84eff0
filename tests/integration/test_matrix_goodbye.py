"""Leave events that are sent in their owners' names: what a homeserver refuses by the owner's limit, and forgets, gets into the room nevertheless."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
from sfu_delegate.delegation.model import Action, Verdict
from sfu_delegate.matrix.discovery import Homeserver
from sfu_delegate.matrix.egress import Egress
from sfu_delegate.matrix.management import Answer, ManagementClient
from sfu_delegate.sandbox.homeserver import HomeserverModel
from sfu_delegate.sandbox.server import SandboxHomeserver

from tests.integration.matrix_stand_in import Clock

ALICE, ROOM, KIND, KEY = "@alice:hs.test", "!room/1:hs.test", "org.matrix.msc3401.call.member", "_@alice:hs.test_DEVICE_m.call"


@dataclass
class Desk:
    """A client and its homeserver."""

    client: ManagementClient
    sandbox: SandboxHomeserver
    homeserver: Homeserver

    @property
    def model(self) -> HomeserverModel:
        return self.sandbox.model

    async def schedule(self, state_key: str | None = KEY) -> str:
        delay_id: str = await self.sandbox.call("schedule", ALICE, ROOM, KIND, state_key, 3_600_000, {"left": True})
        return delay_id

    async def act(self, delay_id: str, action: Action = Action.SEND, user: str | None = ALICE) -> Answer:
        return await self.client.act(self.homeserver, action, delay_id, user=user, timeout=10.0)

    def in_room(self) -> object:
        """What the room's state has."""
        event = self.model.state.get(ROOM, {}).get((KIND, KEY))
        return None if event is None else (event.content, event.sender)


LEFT = ({"left": True}, ALICE)


@asynccontextmanager
async def desk(*, rate_limited: bool = False) -> AsyncIterator[Desk]:
    model = HomeserverModel()
    as_token = model.application_service(rate_limited=rate_limited)
    egress = Egress.open()
    async with SandboxHomeserver(model) as sandbox:
        client = ManagementClient(egress, Clock())
        try:
            yield Desk(client, sandbox, Homeserver("hs.test", sandbox.url, as_token))
        finally:
            await client.aclose()
            await egress.aclose()


async def test_what_can_be_sent_is_sent() -> None:
    """As without a token: nothing is put, and it is over."""
    async with desk() as d:
        answer = await d.act(await d.schedule())
        assert (answer.verdict, answer.detail, d.in_room()) == (Verdict.DONE, "200", LEFT)
        assert d.model.answers["room", 200] == 0


async def test_what_the_owners_limit_refuses_is_put() -> None:
    """At once, with the content that it had, as its owner."""
    async with desk() as d:
        delay_id = await d.schedule()
        d.model.faults.owner_limited = True
        answer = await d.act(delay_id)
        assert (answer.verdict, d.in_room()) == (Verdict.DONE, LEFT)
        assert "owner" in answer.detail
        assert delay_id not in answer.detail


async def test_what_could_not_be_put_is_put_later() -> None:
    """It is not forgotten here, though it is there."""
    async with desk() as d:
        delay_id = await d.schedule()
        d.model.faults.owner_limited, d.model.faults.only, d.model.faults.status = True, frozenset({"room"}), 502
        answer = await d.act(delay_id)
        assert (answer.verdict, d.in_room()) == (Verdict.FAILED, None)
        d.model.faults.only, d.model.faults.status = None, None
        answer = await d.act(delay_id)
        assert (answer.verdict, d.in_room()) == (Verdict.DONE, LEFT)
        assert (await d.act(delay_id)).verdict is Verdict.NOT_FOUND


async def test_our_own_limit_is_not_the_owners() -> None:
    """Where the application service is limited, a refused event is still there, and is sent later."""
    async with desk(rate_limited=True) as d:
        delay_ids = [await d.schedule() for _ in range(8)]
        answers = [await d.act(delay_id) for delay_id in delay_ids]
        assert {answer.verdict for answer in answers} == {Verdict.DONE, Verdict.LIMITED}
        assert d.model.answers["room", 200] == 0
        for delay_id, answer in zip(delay_ids, answers, strict=True):
            pending = d.model.events[delay_id].end.value == ""
            assert pending is (answer.verdict is Verdict.LIMITED)


async def test_what_is_no_state_event_cannot_be_put() -> None:
    """Nobody else can send it as it was to be: it is not there any more, and that is what is said."""
    async with desk() as d:
        delay_id = await d.schedule(None)
        d.model.faults.owner_limited = True
        answer = await d.act(delay_id)
        assert (answer.verdict, "rc_message" in answer.detail) == (Verdict.NOT_FOUND, True)


@pytest.mark.parametrize("action", [Action.RESTART, Action.CANCEL])
async def test_other_actions_are_done_without_a_look(action: Action) -> None:
    """They are no messages."""
    async with desk() as d:
        assert (await d.act(await d.schedule(), action)).verdict is Verdict.DONE
        assert d.model.answers["read", 200] == 0


async def test_an_event_that_has_ended_is_not_put() -> None:
    """Its client was faster; nobody else's membership is touched."""
    async with desk() as d:
        delay_id = await d.schedule()
        await d.sandbox.call("manage", delay_id, "cancel")
        assert (await d.act(delay_id)).verdict is Verdict.NOT_FOUND
        assert d.in_room() is None


async def test_an_owner_that_is_not_known_is_not_spoken_for() -> None:
    """The event is sent by its id alone, as ever."""
    async with desk() as d:
        assert (await d.act(await d.schedule(), user=None)).verdict is Verdict.DONE
        assert d.model.answers["read", 200] == 0


async def test_where_it_cannot_be_looked_at_it_is_sent_all_the_same() -> None:
    """A look that fails keeps nobody in the call."""
    async with desk() as d:
        delay_id = await d.schedule()
        d.model.faults.only, d.model.faults.status = frozenset({"read"}), 500
        assert (await d.act(delay_id)).verdict is Verdict.DONE
        assert d.in_room() == LEFT


async def test_a_look_that_hangs_does_not_take_the_time_of_what_matters() -> None:
    """The event is sent without it."""
    async with desk() as d:
        delay_id = await d.schedule()
        d.model.faults.only, d.model.faults.hang = frozenset({"read"}), True
        answer = await d.client.act(d.homeserver, Action.SEND, delay_id, user=ALICE, timeout=2.0)
        assert (answer.verdict, d.in_room()) == (Verdict.DONE, LEFT)


async def test_a_look_that_finds_nothing_is_not_believed_alone() -> None:
    """Something on the way may answer it, or the owner may be another one: the event is sent by its id."""
    async with desk() as d:
        delay_id = await d.schedule()
        assert (await d.act(delay_id, user="@bob:hs.test")).verdict is Verdict.DONE
        assert d.in_room() == LEFT


async def test_by_whose_limit_it_was_refused() -> None:
    """The owner's says nothing of ours, and everybody else's event is managed as before. Where nobody can tell, it may be the owner's."""
    async with desk(rate_limited=True) as d:
        for _ in range(7):
            answer = await d.act(await d.schedule())
        assert (answer.verdict, answer.of_owner) == (Verdict.LIMITED, False)
    async with desk() as d:
        d.model.faults.owner_limited = True
        answer = await d.act(await d.schedule(), user=None)
        assert (answer.verdict, answer.of_owner) == (Verdict.LIMITED, True)
        delay_id = await d.schedule()
        d.model.faults.only, d.model.faults.status = frozenset({"read"}), 500
        answer = await d.act(delay_id)
        assert (answer.verdict, answer.of_owner) == (Verdict.LIMITED, True)


async def test_what_was_sent_anew_by_its_client_is_not_put_over() -> None:
    """An event that is there after it was refused was not forgotten: its end is its client's, which may have joined again."""
    async with desk() as d:
        delay_id = await d.schedule()
        d.model.faults.only, d.model.faults.status = frozenset({"send"}), 429
        assert (await d.act(delay_id)).verdict is Verdict.LIMITED
        d.model.faults.only, d.model.faults.status = None, None
        await d.sandbox.call("manage", delay_id, "cancel")
        assert (await d.act(delay_id)).verdict is Verdict.NOT_FOUND
        assert d.in_room() is None


async def test_the_owners_limit_is_waited_for() -> None:
    """While there is time: another instance, or the next start, would not know what the event was."""
    async with desk() as d:
        delay_id = await d.schedule()
        d.model.faults.owner_limited, d.model.faults.only, d.model.faults.status = True, frozenset({"room"}), 429
        acting = asyncio.create_task(d.act(delay_id))
        while not d.model.answers["room", 429]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        d.model.faults.only, d.model.faults.status = None, None
        assert ((await acting).verdict, d.in_room()) == (Verdict.DONE, LEFT)
