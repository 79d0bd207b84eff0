"""How often one client, and one user, may ask: by a virtual clock."""

from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_network
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from hypothesis import given
from hypothesis import strategies as st
from sfu_delegate.api.errors import MatrixError
from sfu_delegate.api.plain import Asker
from sfu_delegate.api.services import Settings
from sfu_delegate.api.throttle import MOST, Throttle

LIMITED = Settings(client_rate=10, client_burst=3, user_rate=0.5, user_burst=2, trusted_proxies=(ip_network("127.0.0.0/8"),))
WHEN = 1e6  # seconds; the clock's origin does not matter


class Clock:
    """A clock that is set by hand."""

    def __init__(self, at: float = WHEN) -> None:
        self.at = at

    def __call__(self) -> float:
        return self.at


def request_of(peer: str, **headers: str) -> Asker:
    request = make_mocked_request("POST", "/get_token", headers).clone(remote=peer)
    assert isinstance(request, web.Request)
    return Asker.of(request)


def refused(taking: Callable[[], object]) -> MatrixError:
    """The error that somebody gets."""
    with pytest.raises(MatrixError) as caught:
        taking()
    return caught.value


gaps = st.one_of(st.just(0.0), st.floats(0.0, 0.5), st.floats(0.0, 200.0))
keys = st.sampled_from(["a", "b", "c"])
rates = st.floats(0.01, 100.0)
bursts = st.integers(1, 20)


@given(st.lists(st.tuples(gaps, keys), max_size=120), rates, bursts)
def test_never_more_than_burst_and_rate_allow(tries: list[tuple[float, str]], rate: float, burst: int) -> None:
    """In any time span of `t` seconds one key gets `burst + rate * t` tokens at most."""
    clock = Clock()
    throttle = Throttle(clock)
    granted: dict[str, list[float]] = {}
    for gap, key in tries:
        clock.at += gap
        if throttle.take(key, rate, burst) == 0:
            granted.setdefault(key, []).append(clock.at)
    for times in granted.values():
        for first in range(len(times)):
            for last in range(first, len(times)):
                assert last - first + 1 <= burst + rate * (times[last] - times[first]) + 1e-3


@given(st.lists(gaps, max_size=60), rates, bursts)
def test_nobody_waits_for_nothing(pauses: list[float], rate: float, burst: int) -> None:
    """Whoever is refused gets a token after exactly the time that it was told, and not a hundredth earlier; one interval at most."""
    clock = Clock()
    throttle = Throttle(clock)
    for pause in pauses:
        clock.at += pause
        wait = throttle.take("a", rate, burst)
        assert 0 <= wait <= 1 / rate + 1e-6
        if wait > 1e-6:
            clock.at += wait * 0.99
            assert throttle.take("a", rate, burst) > 0
            clock.at += wait * 0.01 + 1e-6
            assert throttle.take("a", rate, burst) == 0


@given(st.lists(st.tuples(gaps, keys), max_size=100), rates, bursts)
def test_keys_do_not_disturb_each_other(tries: list[tuple[float, str]], rate: float, burst: int) -> None:
    """One key is answered as if there was no other, however much the others ask."""
    clock, alone = Clock(), Clock()
    shared, private = Throttle(clock), Throttle(alone)
    for gap, key in tries:
        clock.at += gap
        alone.at = clock.at
        answer = shared.take(key, rate, burst)
        if key == "a":
            assert answer == private.take(key, rate, burst)


def test_a_burst_and_then_the_rate() -> None:
    """Three at once, then one every tenth of a second; and after a pause the burst again, no larger than it was."""
    clock = Clock()
    throttle = Throttle(clock)
    assert [throttle.take("a", 10, 3) for _ in range(3)] == [0, 0, 0]
    assert throttle.take("a", 10, 3) == pytest.approx(0.1)
    clock.at += 0.1
    assert throttle.take("a", 10, 3) == 0
    assert throttle.take("a", 10, 3) > 0
    clock.at += 86_400
    assert [throttle.take("a", 10, 3) > 0 for _ in range(4)] == [False, False, False, True]


def test_a_refusal_costs_nothing() -> None:
    """Whoever knocks all the time does not have to wait longer."""
    clock = Clock()
    throttle = Throttle(clock)
    throttle.take("a", 1, 1)
    for _ in range(9):
        clock.at += 0.1
        assert throttle.take("a", 1, 1) > 0
    clock.at += 0.1
    assert throttle.take("a", 1, 1) == 0


def test_no_limit() -> None:
    """A rate of 0: always, and nothing is remembered."""
    throttle = Throttle(Clock())
    assert {throttle.take("a", 0, 1) for _ in range(1000)} == {0}
    assert not throttle._full_at


def test_the_limits_of_now_count() -> None:
    """After a reload with higher limits nobody is held to the time that it would have had to wait under the old ones."""
    clock = Clock()
    throttle = Throttle(clock)
    while throttle.take("a", 0.01, 1000) == 0:
        pass
    assert throttle.take("a", 50, 10) <= 1 / 50 + 1e-6


def test_memory_is_bounded() -> None:
    """Of very many keys the one that was used least recently is forgotten first: it has its full burst again, the others have not."""
    throttle = Throttle(Clock(), most=10)
    for number in range(10):
        assert throttle.take(f"key {number}", 1, 1) == 0
    throttle.take("key 10", 1, 1)
    assert len(throttle._full_at) == 10
    assert throttle.take("key 1", 1, 1) > 0
    assert throttle.take("key 0", 1, 1) == 0
    for number in range(1000):
        throttle.take(f"stranger {number}", 1, 1)
        assert len(throttle._full_at) <= 10


def test_who_uses_its_bucket_is_not_forgotten() -> None:
    """Many strangers do not give a busy client a new burst."""
    clock = Clock()
    throttle = Throttle(clock, most=3)
    granted = 0
    for number in range(300):
        clock.at += 0.1
        granted += throttle.take("busy", 1, 1) == 0
        if number % 5 == 0:
            throttle.take(f"stranger {number}", 1, 1)
    assert granted <= 31


def test_there_is_room_for_a_large_site() -> None:
    """A hundred thousand people have a bucket each."""
    assert MOST == 100_000


def test_a_client_is_told_how_long_to_wait() -> None:
    """429 with the time in both forms; another client is not concerned."""
    clock = Clock()
    throttle = Throttle(clock)
    for _ in range(3):
        throttle.client(request_of("203.0.113.5"), LIMITED)
    error = refused(lambda: throttle.client(request_of("203.0.113.5"), LIMITED))
    assert (error.status, error.errcode) == (429, "M_LIMIT_EXCEEDED")
    assert error.retry_after == pytest.approx(0.1)
    assert error.response().headers["Retry-After"] == "1"  # whole seconds, never 0
    throttle.client(request_of("203.0.113.6"), LIMITED)
    clock.at += 0.1
    throttle.client(request_of("203.0.113.5"), LIMITED)


def test_a_user_has_a_bucket_of_its_own() -> None:
    """A user's requests are not counted with a client's, though both had the same name."""
    throttle = Throttle(Clock())
    for _ in range(2):
        throttle.user("203.0.113.5", LIMITED)
    error = refused(lambda: throttle.user("203.0.113.5", LIMITED))
    assert (error.status, error.errcode) == (429, "M_LIMIT_EXCEEDED")
    assert error.retry_after == pytest.approx(2.0)
    throttle.client(request_of("203.0.113.5"), LIMITED)
    throttle.user("@bob:example.org", LIMITED)


def test_the_error_names_nobody() -> None:
    """Neither the address nor the user is repeated."""
    throttle = Throttle(Clock())
    settings = replace(LIMITED, client_burst=1, user_burst=1)
    takers: list[Callable[[], object]] = [
        lambda: throttle.client(request_of("203.0.113.5"), settings),
        lambda: throttle.user("@alice:example.org", settings),
    ]
    for taking in takers:
        taking()
        error = refused(taking)
        assert "203.0" not in error.error
        assert "alice" not in error.error


@pytest.mark.parametrize(("peer", "headers"), [("127.0.0.1", {}), ("", {}), ("127.0.0.1", {"X-Forwarded-For": "127.0.0.2"})])
def test_who_cannot_be_told_apart_is_not_limited(peer: str, headers: dict[str, Any]) -> None:
    """Behind a proxy that does not say whom it serves, one noisy client would lock out all."""
    throttle = Throttle(Clock())
    for _ in range(100):
        throttle.client(request_of(peer, **headers), LIMITED)
