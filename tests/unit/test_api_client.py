"""Who is asking, by address: behind which proxies, and under which key."""

from ipaddress import ip_network

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from hypothesis import example, given
from hypothesis import strategies as st
from multidict import CIMultiDict
from sfu_delegate.api.client import Network, client_of
from sfu_delegate.api.plain import Asker

TRUSTED: tuple[Network, ...] = (ip_network("10.0.0.0/8"), ip_network("127.0.0.0/8"), ip_network("fd00::/8"), ip_network("::1/128"))
PROXY = "10.0.0.1"


def client(peer: str | None, *forwarded: str, trusted: tuple[Network, ...] = TRUSTED) -> str | None:
    request = make_mocked_request("POST", "/get_token", CIMultiDict([("X-Forwarded-For", header) for header in forwarded]))
    request = request.clone(remote=peer or "")
    assert isinstance(request, web.Request)
    asker = Asker.of(request)
    assert asker.peer == (peer or "")
    return client_of(asker.peer, asker.forwarded, trusted)


@pytest.mark.parametrize(
    ("peer", "forwarded", "key"),
    [
        ("203.0.113.5", (), "203.0.113.5"),
        ("203.0.113.5", ("198.51.100.9",), "203.0.113.5"),  # anybody can write that
        ("203.0.113.5", (PROXY,), "203.0.113.5"),
        (PROXY, ("203.0.113.5",), "203.0.113.5"),
        ("127.0.0.1", (" 203.0.113.5 ",), "203.0.113.5"),
        ("::1", ("203.0.113.5",), "203.0.113.5"),
        (PROXY, ("198.51.100.9, 203.0.113.5",), "203.0.113.5"),  # what the client wrote stands before what the proxy adds
        (PROXY, ("198.51.100.9", "203.0.113.5"), "203.0.113.5"),  # several headers are one list
        (PROXY, ("203.0.113.5, 10.0.0.2, 10.0.0.3",), "203.0.113.5"),  # proxies behind proxies
        (PROXY, ("198.51.100.9, 203.0.113.5", "10.0.0.2"), "203.0.113.5"),
        (PROXY, ("203.0.113.5:4711",), "203.0.113.5"),
        (PROXY, ("[2001:db8:1:2:3::4]:4711",), "2001:db8:1:2::/64"),
        (PROXY, ("[2001:db8:1:2:3::4]",), "2001:db8:1:2::/64"),
        (PROXY, ("2001:db8:1:2:3::4",), "2001:db8:1:2::/64"),
        (PROXY, ("::ffff:203.0.113.5",), "203.0.113.5"),  # IPv4 in IPv6's dress
        ("::ffff:203.0.113.5", (), "203.0.113.5"),
        ("::ffff:10.0.0.1", ("203.0.113.5",), "203.0.113.5"),
        ("fd00::7", ("2001:db8::1",), "2001:db8::/64"),
        ("2001:db8:1:2:aaaa::1", (), "2001:db8:1:2::/64"),
        ("2001:db8:1:2:bbbb::1", ("203.0.113.5",), "2001:db8:1:2::/64"),
        ("2001:db8:1:3::1", (), "2001:db8:1:3::/64"),
        ("fe80::1%eth0", (), "fe80::/64"),
    ],
)
def test_whose_request_it_is(peer: str, forwarded: tuple[str, ...], key: str) -> None:
    """The address that connects, unless that is a trusted proxy: then the last one in X-Forwarded-For that is not a trusted proxy's."""
    assert client(peer, *forwarded) == key


@pytest.mark.parametrize(
    ("peer", "forwarded"),
    [
        (PROXY, ()),  # a proxy that names nobody
        (PROXY, ("10.0.0.2, 10.0.0.3",)),  # or proxies only
        (None, ()),  # a Unix socket has no address
        (None, ("203.0.113.5",)),
    ],
)
def test_where_clients_cannot_be_told_apart(peer: str | None, forwarded: tuple[str, ...]) -> None:
    """There is no key: to limit all as if they were one would be an outage."""
    assert client(peer, *forwarded) is None


@pytest.mark.parametrize(
    ("forwarded", "key"),
    [
        ("garbage", PROXY),
        ("", PROXY),
        ("203.0.113.5, garbage", PROXY),  # what stands before garbage is not believed
        ("garbage, 10.0.0.2", "10.0.0.2"),
        ("garbage, 203.0.113.5", "203.0.113.5"),
        ("203.0.113.5,", PROXY),
        ("256.0.0.1", PROXY),
        ("[203.0.113.5", "203.0.113.5"),
    ],
)
def test_what_is_no_address(forwarded: str, key: str) -> None:
    """Garbage cannot be used to get out of every limit: it counts as the proxy that passed it on."""
    assert client(PROXY, forwarded) == key


def test_nobody_is_trusted() -> None:
    """Without proxies, the address that connects is the client, whatever it writes."""
    assert client(PROXY, "203.0.113.5", trusted=()) == PROXY


@given(st.lists(st.one_of(st.ip_addresses().map(str), st.sampled_from(["", ",", "a", ":", "[", "]:", "%", "[]", "1:2"])), max_size=6))
@example(["[", "%"])
def test_a_stranger_cannot_choose_its_key(forwarded: list[str]) -> None:
    """Whatever it sends: it is its own address, also where the proxy has added that at the end."""
    assert client("203.0.113.5", ",".join(forwarded)) == "203.0.113.5"
    assert client(PROXY, ",".join([*forwarded, "203.0.113.5"])) == "203.0.113.5"
    assert client(PROXY, *forwarded, "203.0.113.5") == "203.0.113.5"


@given(st.text(max_size=60))
def test_any_text_is_taken(forwarded: str) -> None:
    """Nothing in the header makes a request fail, and the key is an address or a network, or none."""
    key = client(PROXY, forwarded)
    assert key is None or ip_network(key)
