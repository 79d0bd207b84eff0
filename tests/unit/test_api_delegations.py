"""`/v1/delegations` on the real engine, with a homeserver that answers by a script."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from sfu_delegate.api.delegations import matrix_user, new_id
from sfu_delegate.api.port import Overloaded, Unavailable
from sfu_delegate.api.services import Settings
from sfu_delegate.delegation.model import Action, Outcome, Presence, Seen, Sighting, State, Task, Verdict
from sfu_delegate.delegation.replies import TooMany
from sfu_delegate.engine import Limits
from sfu_delegate.livekit.keys import SfuKey
from sfu_delegate.matrix.management import Scope
from yarl import URL

from tests.engine_port import NOW, SERVER, Bench, agrees, delayed, delegation, only_restarts, serving, silent, until
from tests.garbage import left_for_the_collector

PATH = "/v1/delegations"
FIRST, SECOND, THIRD = "syd_first_firstfirstfirst", "syd_second_secondsecond", "syd_third_thirdthirdthird"
NOT_FOUND = (Verdict.NOT_FOUND, "404 M_NOT_FOUND")


async def error_of(response: Any) -> tuple[int, str, str]:
    """Status, errcode and sentence of an error, whose form is checked on the way."""
    body = await response.json()
    assert set(body) >= {"errcode", "error"}
    assert response.headers["Access-Control-Allow-Origin"] == "*"
    assert ("retry_after_ms" in body) == ("Retry-After" in response.headers)
    return response.status, body["errcode"], body["error"]


# ── delegating ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_delegation_is_accepted_and_verified() -> None:
    """The homeserver restarted the event while the client waited: 201, and everything that it needs to go on."""
    bench = Bench()
    async with serving(bench) as client:
        response = await client.post(PATH, json=delegation(delayed(FIRST), delayed(SECOND, 60_000, on_disconnect="cancel")), headers=bench.bearer())
        body = await response.json()
        assert response.status == 201
        assert response.headers["Location"] == f"{PATH}/{body['id']}"
        assert response.headers["Cache-Control"] == "no-store"
        assert bench.sealer.check_management_token(body["id"], body.pop("management_token"))
        assert body == {
            "id": body["id"],
            "state": "live",
            "homeserver": SERVER,
            "participant": {
                "sfu": "main",
                "room": "room",
                "identity": "alice",
                "presence": "expected",
                "since_ts": int(NOW * 1000),
                "reason": None,
            },
            "verified": True,
            "restart_interval_ms": 45_000,
            "delayed_events": [
                {
                    "delay_id_hint": "syd_firs…",
                    "delay_ms": 3_600_000,
                    "on_disconnect": "send",
                    "state": "live",
                    "outcome": None,
                    "verified": True,
                    "restarts": 1,
                    "restart_due_ts": body["delayed_events"][0]["restart_due_ts"],
                    "deadline_ts": int(NOW * 1000) + 3_600_000,
                    "departed_ts": None,
                    "ended_ts": None,
                },
                {
                    "delay_id_hint": "syd_sec…",
                    "delay_ms": 60_000,
                    "on_disconnect": "cancel",
                    "state": "live",
                    "outcome": None,
                    "verified": True,
                    "restarts": 1,
                    "restart_due_ts": body["delayed_events"][1]["restart_due_ts"],
                    "deadline_ts": int(NOW * 1000) + 60_000,
                    "departed_ts": None,
                    "ended_ts": None,
                },
            ],
        }
        assert NOW * 1000 < body["delayed_events"][1]["restart_due_ts"] <= NOW * 1000 + 45_000
        assert [(row.delay_id, row.delay, row.user, row.token) for row in bench.port.rows()] == [
            (FIRST, 3600.0, None, None),
            (SECOND, 60.0, None, None),
        ]


async def test_a_slow_homeserver_keeps_nobody_waiting() -> None:
    """No answer within the configured time: 201 with `verified: false`, and the delegation stands."""
    bench = Bench(silent, settings=Settings(verify_timeout=0.01))
    async with serving(bench) as client:
        response = await client.post(PATH, json=delegation(), headers=bench.bearer())
        body = await response.json()
        assert (response.status, body["verified"], body["state"]) == (201, False, "live")
        assert body["delayed_events"][0]["deadline_ts"] is None
        assert [row.state for row in bench.port.rows()] == [State.LIVE]


async def test_a_homeserver_that_limits_us_is_no_error() -> None:
    """429 from the homeserver: 201 with `verified: false`, and the restart stays due."""
    bench = Bench(lambda _: (Verdict.LIMITED, "429"), settings=Settings(verify_timeout=0.01))
    async with serving(bench) as client:
        response = await client.post(PATH, json=delegation(), headers=bench.bearer())
        body = await response.json()
        assert (response.status, body["verified"]) == (201, False)
        assert body["delayed_events"][0]["restart_due_ts"] == int(NOW * 1000)


async def test_an_unknown_delay_id_is_not_delegated() -> None:
    """The homeserver has never heard of one of them: 404, and nothing of the delegation goes on."""
    bench = Bench(only_restarts(*NOT_FOUND, SECOND))
    async with serving(bench) as client:
        response = await client.post(PATH, json=delegation(delayed(FIRST), delayed(SECOND)), headers=bench.bearer())
        status, errcode, sentence = await error_of(response)
        assert (status, errcode) == (404, "M_NOT_FOUND")
        assert "delayed_events[1] (syd_sec…)" in sentence
        assert SECOND not in sentence
        assert {row.delay_id: row.outcome for row in bench.port.rows()} == {FIRST: Outcome.WITHDRAWN, SECOND: Outcome.UNKNOWN}


async def test_a_refused_delegation_gives_back_what_it_had_taken_over() -> None:
    """What an older delegation had goes back to it when the newer one turns out to be wrong."""
    bench = Bench(only_restarts(*NOT_FOUND, SECOND))
    async with serving(bench) as client:
        old = await (await client.post(PATH, json=delegation(delayed(FIRST)), headers=bench.bearer())).json()
        response = await client.post(PATH, json=delegation(delayed(FIRST), delayed(SECOND)), headers=bench.bearer())
        assert response.status == 404
        assert {row.delay_id: (row.delegation == old["id"], row.state) for row in bench.port.rows()} == {
            FIRST: (True, State.LIVE),
            SECOND: (False, State.DONE),
        }


async def test_a_homeserver_that_refuses_is_quoted() -> None:
    """A final Matrix error to the first restart: 400 with the homeserver's errcode, and no delegation."""
    bench = Bench(only_restarts(Verdict.REFUSED, "401 M_UNKNOWN_TOKEN", FIRST))
    async with serving(bench) as client:
        response = await client.post(PATH, json=delegation(delayed(FIRST)), headers=bench.bearer())
        body = await response.json()
        assert (response.status, body["errcode"], body["homeserver_errcode"]) == (400, "M_FORBIDDEN", "M_UNKNOWN_TOKEN")
        assert "the homeserver example.org refused to restart it (401 M_UNKNOWN_TOKEN)" in body["error"]
        assert [row.state for row in bench.port.rows()] == [State.DONE]


async def test_a_refusal_is_quoted_though_the_event_went_back() -> None:
    """The event had been taken over from an older delegation, unverified: what the homeserver said is found there."""
    answers: list[tuple[Verdict, str] | None] = [None, (Verdict.DONE, "200"), (Verdict.REFUSED, "403 M_FORBIDDEN")]
    bench = Bench(lambda task: answers.pop(0) if task.delay_id == FIRST else (Verdict.DONE, "200"), settings=Settings(verify_timeout=0.01))
    async with serving(bench) as client:
        await client.post(PATH, json=delegation(delayed(FIRST)), headers=bench.bearer())
        answers.pop(0)
        bench.configure(verify_timeout=5.0)
        bench.port.at += 30.0  # the lease of the silent restart is over
        response = await client.post(PATH, json=delegation(delayed(FIRST), delayed(SECOND)), headers=bench.bearer())
        assert response.status == 400
        assert (await response.json())["homeserver_errcode"] == "M_FORBIDDEN"


async def test_delegating_the_same_again_changes_nothing() -> None:
    """The same events of the same participant: 200, with the id and the token that it had."""
    bench = Bench()
    async with serving(bench) as client:
        first = await client.post(PATH, json=delegation(delayed(FIRST), delayed(SECOND)), headers=bench.bearer())
        again = await client.post(PATH, json=delegation(delayed(SECOND), delayed(FIRST)), headers=bench.bearer())
        assert (first.status, again.status) == (201, 200)
        bodies = [await response.json() for response in (first, again)]
        assert bodies[0]["management_token"] == bodies[1]["management_token"]
        assert {body["id"] for body in bodies} == {row.delegation for row in bench.port.rows()}


async def test_a_repeated_request_waits_for_the_answer_to_the_first() -> None:
    """A client that repeats its request while the homeserver is still being asked gets the same id, and is told of the answer."""
    bench = Bench(silent)
    async with serving(bench) as client:
        first = asyncio.create_task(client.post(PATH, json=delegation(), headers=bench.bearer()))
        await until(lambda: bench.port.tasks)
        second = asyncio.create_task(client.post(PATH, json=delegation(), headers=bench.bearer()))
        await until(lambda: len(bench.port.given) == 3)  # two accepts, and the question that follows the second
        bench.port.script = agrees
        await bench.port._act(bench.port.tasks[:1])
        responses = await asyncio.gather(first, second)
        assert sorted(response.status for response in responses) == [200, 201]
        bodies = [await response.json() for response in responses]
        assert bodies[0]["id"] == bodies[1]["id"]
        assert all(body["verified"] for body in bodies)


async def test_a_newer_delegation_replaces_the_older_one() -> None:
    """Once the new one is verified, the old event is cancelled at the homeserver; the participant is still in the call."""
    bench = Bench()
    async with serving(bench) as client:
        old = await (await client.post(PATH, json=delegation(delayed(FIRST)), headers=bench.bearer())).json()
        await bench.port.put(Seen("main", "room", "alice", Sighting.JOINED, "PA_1"))
        new = await (await client.post(PATH, json=delegation(delayed(SECOND)), headers=bench.bearer())).json()
        await bench.port.settled()
        assert old["id"] != new["id"]
        assert new["participant"]["presence"] == "connected"
        assert (Action.CANCEL, FIRST) in [(task.action, task.delay_id) for task in bench.port.tasks]
        assert {row.delay_id: row.outcome for row in bench.port.rows()} == {FIRST: Outcome.REPLACED, SECOND: Outcome.OPEN}


async def test_a_client_that_hangs_up_has_delegated_all_the_same() -> None:
    """Its handler is cancelled while the homeserver is being asked: what was accepted stays, and nobody watches it any more."""
    bench = Bench(silent)
    async with serving(bench) as client:
        waiting = asyncio.create_task(client.post(PATH, json=delegation(), headers=bench.bearer()))
        await until(lambda: bench.port.tasks)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await until(lambda: not bench.port.watched)
        bench.configure(verify_timeout=0.0)
        again = await client.post(PATH, json=delegation(), headers=bench.bearer())
        assert again.status == 200
        assert [row.state for row in bench.port.rows()] == [State.LIVE]


@pytest.mark.parametrize(
    ("identity", "homeserver", "user"),
    [
        ("@alice:example.org:DEVICE", "example.org", "@alice:example.org"),
        ("@alice:Example.ORG:DEVICE", "example.org", "@alice:Example.ORG"),
        ("@alice:example.org:8448:DEVICE", "example.org:8448", "@alice:example.org:8448"),
        ("@alice:[::1]:8448:DEVICE", "[::1]:8448", "@alice:[::1]:8448"),
        ("@alice:example.org:8448:DEVICE", "example.org", None),
        ("@alice:example.org:DEVICE", "evil.org", None),
        ("@alice:example.org:DEVICE", "example.or", None),
        ("@alice:example.org:", "example.org", None),
        ("@alice:example.org", "example.org", None),
        ("@:example.org:DEVICE", "example.org", None),
        ("alice:example.org:DEVICE", "example.org", None),
        ("@al\nice:example.org:DEVICE", "example.org", None),
        ("@" + "a" * 300 + ":example.org:DEVICE", "example.org", None),
        ("M3VnsLXrkbxIDINXO64u8PZzFyD9ZYFiQULR2dshWYs", "example.org", None),
    ],
)
def test_the_user_in_a_plain_identity(identity: str, homeserver: str, user: str | None) -> None:
    """A user is read out of an identity only where it surely is one of that homeserver."""
    assert matrix_user(identity, homeserver) == user


async def test_the_user_of_a_plain_identity_is_passed_on() -> None:
    """With the plain form of the identity the daemon knows whose event it is."""
    bench = Bench()
    async with serving(bench) as client:
        await client.post(PATH, json=delegation(homeserver="EXAMPLE.org"), headers=bench.bearer("@alice:example.org:DEVICE"))
        assert [(accept.user, accept.homeserver) for accept in bench.accepted()] == [("@alice:example.org", "example.org")]


async def test_the_user_to_whom_the_token_was_given() -> None:
    """Our own access tokens tell it, also where the identity does not, and then no other homeserver can be named."""
    bench = Bench()
    async with serving(bench) as client:
        for user in ("@alice:example.org", "@alice:Example.ORG"):
            bearer = {"Authorization": f"Bearer {bench.access_token('hashed', user=user)}"}
            assert (await client.post(PATH, json=delegation(), headers=bearer)).status in {200, 201}
        assert [accept.user for accept in bench.accepted()] == ["@alice:example.org", "@alice:Example.ORG"]
        for user in ("@alice:elsewhere.org", "@alice:example.org:8448", "alice", ""):
            for identity in ("hashed", "@alice:example.org:DEVICE"):
                bearer = {"Authorization": f"Bearer {bench.access_token(identity, user=user)}"}
                response = await client.post(PATH, json=delegation(), headers=bearer)
                assert (response.status, (await response.json())["errcode"]) == (403, "M_FORBIDDEN")
        assert len(bench.accepted()) == 2


def test_ids_are_random() -> None:
    """No two delegations get the same id."""
    assert len({new_id() for _ in range(1000)}) == 1000


# ── refusing ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _tokens(bench: Bench) -> dict[str, str | None]:
    other = SfuKey("main", "APIkey", "not-the-secret-of-forty-characters-00000")
    stranger = SfuKey("main", "APIother", "not-the-secret-of-forty-characters-00000")
    return {
        "missing": None,
        "empty": "",
        "no scheme": bench.access_token(),
        "another scheme": f"Basic {bench.access_token()}",
        "no token": "Bearer ",
        "garbage": "Bearer garbage",
        "wrong secret": f"Bearer {bench.access_token(key=other)}",
        "unknown key": f"Bearer {bench.access_token(key=stranger)}",
        "expired": f"Bearer {bench.access_token(ttl=-3600)}",
        "not a participant's": f"Bearer {bench.access_token(join=False)}",
        "no room": f"Bearer {bench.access_token(room='')}",
        "no identity": f"Bearer {bench.access_token(identity='')}",
    }


@pytest.mark.parametrize(
    "case",
    [
        *("missing", "empty", "no scheme", "another scheme", "no token", "garbage"),
        *("wrong secret", "unknown key", "expired", "not a participant's", "no room", "no identity"),
    ],
)
async def test_who_is_no_participant_may_not_delegate(case: str) -> None:
    """Without a participant's own valid token: 401, and nothing is stored; the token is not repeated."""
    bench = Bench()
    header = _tokens(bench)[case]
    async with serving(bench) as client:
        response = await client.post(PATH, json=delegation(), headers={} if header is None else {"Authorization": header})
        status, errcode, sentence = await error_of(response)
        assert (status, errcode) == (401, "M_MISSING_TOKEN" if case in ("missing", "empty") else "M_UNKNOWN_TOKEN")
        assert response.headers["WWW-Authenticate"] == "Bearer"
        assert len(header or "") < 10 or str(header).split()[-1] not in sentence
        assert not bench.port.given


@pytest.mark.parametrize(
    ("homeserver", "problem"),
    [("other.org", "must add it to the key `homeservers`"), ("net", "must add it to the key `homeservers`")],
)
async def test_a_homeserver_that_is_not_served(homeserver: str, problem: str) -> None:
    """403, with the key that the operator would have to change."""
    bench = Bench()
    async with serving(bench) as client:
        status, errcode, sentence = await error_of(await client.post(PATH, json=delegation(homeserver=homeserver), headers=bench.bearer()))
        assert (status, errcode) == (403, "M_FORBIDDEN")
        assert problem in sentence
        assert not bench.port.given


async def test_a_homeserver_that_cannot_be_found() -> None:
    """503 with Retry-After; what was tried to find it is for the operator, not for the client."""
    bench = Bench()
    async with serving(bench) as client:
        status, errcode, sentence = await error_of(await client.post(PATH, json=delegation(homeserver="unreachable.org"), headers=bench.bearer()))
        assert (status, errcode) == (503, "M_UNKNOWN")
        assert "unreachable.org" in sentence
        assert "10.0.0.1" not in sentence
        assert "well-known" not in sentence
        assert not bench.port.given


async def test_a_scoped_token_is_encrypted() -> None:
    """What is stored is not the token, and opens only with the key."""
    bench = Bench()
    async with serving(bench) as client:
        response = await client.post(PATH, json=delegation(token="scoped-token"), headers=bench.bearer())
        assert response.status == 201
        assert "scoped-token" not in await response.text()
        sealed = bench.port.rows()[0].token
        assert sealed is not None
        assert b"scoped-token" not in sealed
        assert bench.sealer.unseal(sealed) == "scoped-token"


@pytest.mark.parametrize(("scope", "status", "errcode"), [(Scope.FULL_ACCESS, 400, "M_INVALID_PARAM"), (Scope.UNKNOWN, 503, "M_UNKNOWN")])
async def test_a_token_that_may_do_too_much_is_refused(scope: Scope, status: int, errcode: str) -> None:
    """A full access token, or one of which nobody can tell: an error that explains, and nothing is stored."""
    bench = Bench()
    bench.scopes.scope = scope
    async with serving(bench) as client:
        response = await client.post(PATH, json=delegation(token="secret-token"), headers=bench.bearer())
        given = await error_of(response)
        assert given[:2] == (status, errcode)
        assert "not stored" in given[2]
        assert "secret-token" not in given[2]
        assert not bench.port.given


async def test_scoped_tokens_can_be_forbidden() -> None:
    """Where the operator does not want them: 400, without asking the homeserver about it."""
    bench = Bench(settings=Settings(allow_scoped_tokens=False))
    async with serving(bench) as client:
        status, errcode, sentence = await error_of(await client.post(PATH, json=delegation(token="t"), headers=bench.bearer()))
        assert (status, errcode) == (400, "M_INVALID_PARAM")
        assert "delegations.allow_scoped_tokens" in sentence
        assert not bench.scopes.asked


async def test_too_many_delegations_of_one_participant() -> None:
    """429 with Retry-After, beyond the configured number."""
    bench = Bench(silent, limits=Limits(max_per_participant=1), settings=Settings(verify_timeout=0.0))
    async with serving(bench) as client:
        assert (await client.post(PATH, json=delegation(delayed(FIRST)), headers=bench.bearer())).status == 201
        response = await client.post(PATH, json=delegation(delayed(SECOND)), headers=bench.bearer())
        assert (await error_of(response))[:2] == (429, "M_LIMIT_EXCEEDED")
        assert int(response.headers["Retry-After"]) * 1000 == (await response.json())["retry_after_ms"]
        assert len(bench.port.rows()) == 1


async def test_a_client_that_asks_too_often() -> None:
    """429 with Retry-After, whether its tokens are any good or not."""
    bench = Bench(settings=Settings(client_rate=0.0001, client_burst=2))
    async with serving(bench) as client:
        assert (await client.post(PATH, json=delegation(), headers=bench.bearer())).status == 201
        assert (await client.post(PATH, json=delegation())).status == 401
        response = await client.post(PATH, json=delegation(), headers=bench.bearer())
        assert (await error_of(response))[:2] == (429, "M_LIMIT_EXCEEDED")
        assert 9000 < int(response.headers["Retry-After"]) <= 10_000


async def test_a_participant_that_asks_too_often() -> None:
    """429 with Retry-After; others are not concerned, and nobody can use up the requests of somebody else."""
    bench = Bench(settings=Settings(user_rate=0.0001, user_burst=1))
    forged = {"Authorization": f"Bearer {bench.access_token(key=SfuKey('main', 'APIkey', 'not-the-secret-of-forty-characters-00000'))}"}
    async with serving(bench) as client:
        for _ in range(3):
            assert (await client.post(PATH, json=delegation(), headers=forged)).status == 401
        assert (await client.post(PATH, json=delegation(), headers=bench.bearer())).status == 201
        response = await client.post(PATH, json=delegation(), headers=bench.bearer())
        assert (await error_of(response))[:2] == (429, "M_LIMIT_EXCEEDED")
        assert 9000 < int(response.headers["Retry-After"]) <= 10_000
        assert (await client.post(PATH, json=delegation(delayed(SECOND)), headers=bench.bearer("bob"))).status == 201
        assert (await client.post(PATH, json=delegation(delayed(THIRD)), headers=bench.bearer(room="another"))).status == 201


@pytest.mark.parametrize("error", [Overloaded("Too much to do.", 1.5), Unavailable("The database /var/lib/x failed.", 1.5)])
async def test_nothing_can_be_kept_now(error: Exception) -> None:
    """503 with Retry-After, without the operator's details."""
    bench = Bench()
    bench.port.error = error
    async with serving(bench) as client:
        response = await client.post(PATH, json=delegation(), headers=bench.bearer())
        status, errcode, sentence = await error_of(response)
        assert (status, errcode) == (503, "M_UNKNOWN")
        assert "/var" not in sentence
        assert (response.headers["Retry-After"], (await response.json())["retry_after_ms"]) == ("2", 1500)


async def test_no_new_delegations_while_stopping() -> None:
    """503 with Retry-After for new ones; those that there are can still be seen."""
    bench = Bench()
    async with serving(bench) as client:
        made = await (await client.post(PATH, json=delegation(), headers=bench.bearer())).json()
        bench.stopping = True
        response = await client.post(PATH, json=delegation(), headers=bench.bearer())
        assert (await error_of(response))[:2] == (503, "M_UNKNOWN")
        assert "Retry-After" in response.headers
        assert (await client.get(f"{PATH}/{made['id']}", headers=bench.bearer())).status == 200


async def test_settings_are_asked_anew() -> None:
    """A reload takes effect with the next request."""
    bench = Bench()
    async with serving(bench) as client:
        bench.configure(max_events=1)
        response = await client.post(PATH, json=delegation(delayed(FIRST), delayed(SECOND)), headers=bench.bearer())
        assert (await error_of(response))[:2] == (400, "M_INVALID_PARAM")
        bench.configure(max_body=10)
        response = await client.post(PATH, json=delegation(), headers=bench.bearer())
        assert (await error_of(response))[:2] == (413, "M_TOO_LARGE")


# ── seeing and withdrawing ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_delegation_can_be_seen_with_either_token() -> None:
    """With its management token, and with an access token of its participant: everything but the secrets."""
    bench = Bench()
    async with serving(bench) as client:
        made = await (await client.post(PATH, json=delegation(delayed(FIRST)), headers=bench.bearer())).json()
        bench.port.at += 1.5
        await bench.port.put(Seen("main", "room", "alice", Sighting.JOINED, "PA_1"))
        seen = [
            await client.get(f"{PATH}/{made['id']}", headers=headers)
            for headers in ({"Authorization": f"bearer {made['management_token']}"}, bench.bearer())
        ]
        bodies = [await response.json() for response in seen]
        assert [response.status for response in seen] == [200, 200]
        assert bodies[0] == bodies[1]
        assert bodies[0]["participant"]["presence"] == "connected"
        assert bodies[0]["participant"]["since_ts"] == int((NOW + 1.5) * 1000)
        assert [(line["what"], line["detail"], line["delay_id_hint"]) for line in bodies[0]["history"]] == [
            ("delegated", made["id"], "syd_firs…"),
            ("verified", None, "syd_firs…"),
            ("connected", None, "syd_firs…"),
        ]
        assert bodies[0]["history"][-1]["at_ts"] == int((NOW + 1.5) * 1000)
        assert FIRST not in json.dumps(bodies)
        assert made["management_token"] not in json.dumps(bodies)


async def test_how_it_ended_can_be_seen() -> None:
    """After the departure: the event was sent, and when and why."""
    bench = Bench()
    async with serving(bench) as client:
        made = await (await client.post(PATH, json=delegation(delayed(FIRST)), headers=bench.bearer())).json()
        await bench.port.put(Seen("main", "room", "alice", Sighting.JOINED, "PA_1"))
        await bench.port.put(Seen("main", "room", "alice", Sighting.LEFT, "PA_1", reason="PARTICIPANT_REMOVED"))
        await bench.port.settled()
        body = await (await client.get(f"{PATH}/{made['id']}", headers=bench.bearer())).json()
        assert body["state"] == "done"
        assert (body["participant"]["presence"], body["participant"]["reason"]) == (Presence.GONE.value, "PARTICIPANT_REMOVED")
        event = body["delayed_events"][0]
        assert (event["state"], event["outcome"], event["restart_due_ts"], event["deadline_ts"]) == ("done", "sent", None, None)
        assert event["departed_ts"] == event["ended_ts"] == int(NOW * 1000)


async def test_an_ending_is_under_way() -> None:
    """As long as the homeserver has not answered, the delegation is ending."""

    def never_sends(task: Task) -> tuple[Verdict, str] | None:
        return agrees(task) if task.action is Action.RESTART else None

    bench = Bench(never_sends)
    async with serving(bench) as client:
        made = await (await client.post(PATH, json=delegation(delayed(FIRST)), headers=bench.bearer())).json()
        await bench.port.put(Seen("main", "room", "alice", Sighting.JOINED, "PA_1"))
        await bench.port.put(Seen("main", "room", "alice", Sighting.LEFT, "PA_1", reason="PARTICIPANT_REMOVED"))
        body = await (await client.get(f"{PATH}/{made['id']}", headers=bench.bearer())).json()
        assert (body["state"], body["delayed_events"][0]["ended_ts"]) == ("ending", None)


def always(error: Callable[[], Exception]) -> Callable[..., Any]:
    """What raises a new error at each call, and keeps none."""

    async def fail(*_: object) -> Any:
        raise error()

    return fail


REFUSALS: dict[str, tuple[bytes, Callable[[Bench], object]]] = {
    "no JSON": (b'{"needle', lambda _: None),
    "wrong fields": (json.dumps(delegation(delayed(FIRST), needle="needle")).encode(), lambda _: None),
    "not served": (json.dumps(delegation(delayed("needle"), homeserver="needle.example")).encode(), lambda _: None),
    "not found": (json.dumps(delegation(delayed("needle"), homeserver="unreachable.org")).encode(), lambda _: None),
    "full": (
        json.dumps(delegation(delayed("needle"))).encode(),
        lambda bench: setattr(bench.port, "put", always(lambda: Overloaded("Too many.", 1.0))),
    ),
    "limited": (
        json.dumps(delegation(delayed("needle"))).encode(),
        lambda bench: setattr(bench.port, "put", always(lambda: TooMany("delegations.max_per_user", 1, "Too many."))),
    ),
    "stopping": (json.dumps(delegation(delayed("needle"))).encode(), lambda bench: setattr(bench, "stopping", True)),
}


@pytest.mark.parametrize("why", REFUSALS)
async def test_a_refused_request_is_forgotten_at_once(why: str) -> None:
    """Neither its error nor its body waits for a garbage collection: bodies can be large, and many."""
    bench = Bench()
    body, spoil = REFUSALS[why]
    async with serving(bench) as client:
        headers = bench.bearer()
        spoil(bench)
        await client.post(PATH, headers=headers)
        with left_for_the_collector("needle") as left:
            response = await client.post(PATH, data=body, headers=headers)
            assert response.status >= 400
            await response.read()
            await asyncio.sleep(0)
        assert left == []


async def test_withdrawing() -> None:
    """The event is forgotten without being touched; doing it again is no error."""
    bench = Bench()
    async with serving(bench) as client:
        made = await (await client.post(PATH, json=delegation(delayed(FIRST)), headers=bench.bearer())).json()
        for headers in (bench.bearer(), {"Authorization": f"Bearer {made['management_token']}"}):
            response = await client.delete(f"{PATH}/{made['id']}", headers=headers)
            assert (response.status, await response.json()) == (200, {})
        assert [row.outcome for row in bench.port.rows()] == [Outcome.WITHDRAWN]
        assert [task.action for task in bench.port.tasks] == [Action.RESTART]


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_somebody_elses_delegation_does_not_exist(method: str) -> None:
    """Another participant, another room, an id that was never given, and no id at all: the same answer, to the letter."""
    bench = Bench()
    async with serving(bench) as client:
        made = await (await client.post(PATH, json=delegation(), headers=bench.bearer())).json()
        unknown = new_id()
        answers = [
            await client.request(method, f"{PATH}/{made['id']}", headers=bench.bearer("mallory")),
            await client.request(method, f"{PATH}/{made['id']}", headers=bench.bearer(room="another")),
            await client.request(method, f"{PATH}/{unknown}", headers=bench.bearer()),
            await client.request(method, f"{PATH}/{unknown}", headers={"Authorization": f"Bearer {bench.sealer.management_token(unknown)}"}),
            await client.request(method, f"{PATH}/no-id", headers=bench.bearer()),
        ]
        assert {(answer.status, await answer.text()) for answer in answers} == {(404, await answers[0].text())}
        assert (await answers[0].json())["errcode"] == "M_NOT_FOUND"
        assert [row.state for row in bench.port.rows()] == [State.LIVE]


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_wrong_tokens_open_nothing(method: str) -> None:
    """No token, the management token of another delegation, garbage: 401, without looking into the database."""
    bench = Bench()
    async with serving(bench) as client:
        made = await (await client.post(PATH, json=delegation(), headers=bench.bearer())).json()
        bench.port.given.clear()
        for token in (None, bench.sealer.management_token(new_id()), "garbage", made["management_token"] + "a", bench.access_token(ttl=-3600)):
            headers = {} if token is None else {"Authorization": f"Bearer {token}"}
            status, errcode, sentence = await error_of(await client.request(method, f"{PATH}/{made['id']}", headers=headers))
            assert (status, errcode) == (401, "M_MISSING_TOKEN" if token is None else "M_UNKNOWN_TOKEN")
            assert token is None or token not in sentence
        assert not bench.port.given


@pytest.mark.parametrize(
    "id",
    ["x", "dlg_", "dlg_" + "0" * 31, "dlg_" + "G" * 32, "dlg_" + "0" * 33, "%2e%2e", "%00", "%ff%fe", "a%2Fb", "%F0%9F%92%A9"],
)
async def test_what_is_no_id_does_not_reach_the_database(id: str) -> None:
    """An id of the wrong form is refused before anything is looked up."""
    bench = Bench()
    async with serving(bench) as client:
        response = await client.get(URL(f"{PATH}/{id}", encoded=True), headers=bench.bearer())
        assert (await error_of(response))[0] == 404
        assert not bench.port.given
