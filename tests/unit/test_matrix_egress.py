"""Which addresses are on the public internet."""

import ipaddress
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sfu_delegate.matrix.egress import forbidden, public_socket
from sfu_delegate.matrix.http import NotAllowed


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("0.0.0.0", "unspecified"),
        ("0.1.2.3", "unspecified"),
        ("10.0.0.1", "private"),
        ("100.64.0.1", "shared"),
        ("100.127.255.255", "shared"),
        ("127.0.0.1", "loopback"),
        ("127.255.255.254", "loopback"),
        ("169.254.169.254", "link-local"),
        ("172.16.0.1", "private"),
        ("172.31.255.255", "private"),
        ("192.0.0.170", "reserved"),
        ("192.168.1.1", "private"),
        ("198.18.0.1", "reserved"),
        ("203.0.113.9", "reserved"),
        ("224.0.0.1", "multicast"),
        ("240.0.0.1", "reserved"),
        ("255.255.255.255", "reserved"),
        ("::", "unspecified"),
        ("::1", "loopback"),
        ("::127.0.0.1", "reserved"),
        ("::ffff:127.0.0.1", "loopback"),
        ("::ffff:10.1.2.3", "private"),
        ("64:ff9b::7f00:1", "loopback"),
        ("64:ff9b:1::1", "reserved"),
        ("fe80::1", "link-local"),
        ("fe80::1%eth0", "link-local"),
        ("fec0::1", "private"),
        ("fc00::1", "private"),
        ("fd12:3456::1", "private"),
        ("ff02::1", "multicast"),
        ("2001:db8::1", "reserved"),
        ("2001::1", "reserved"),
        ("2002:7f00:1::", "reserved"),
        ("100::1", "reserved"),
        ("localhost", "unknown"),
        ("", "unknown"),
    ],
)
def test_forbidden(address: str, kind: str) -> None:
    """What is not on the public internet has a kind that says why."""
    assert forbidden(address) == kind


@pytest.mark.parametrize(
    "address",
    ["1.1.1.1", "100.63.255.255", "100.128.0.0", "172.15.0.1", "172.32.0.1", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"],
)
def test_public(address: str) -> None:
    """Public addresses may be reached, those of IPv4 in their IPv6 form too."""
    assert forbidden(address) is None


@given(st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)))
def test_never_more_than_the_standard_library_allows(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    """Nothing that Python's own tables call private, multicast or otherwise special is public here (NAT64 is judged by its IPv4 address)."""
    if not ip.is_global or ip.is_multicast or ip.is_reserved or ip.is_link_local or ip.is_unspecified:
        assert forbidden(str(ip)) is not None or ip in ipaddress.ip_network("64:ff9b::/96") or getattr(ip, "ipv4_mapped", None)


@given(st.ip_addresses(v=4))
def test_mapped_like_plain(ip: ipaddress.IPv4Address) -> None:
    """An IPv4 address is judged alike in all its forms."""
    assert forbidden(str(ip)) == forbidden(f"::ffff:{ip}") == forbidden(str(ipaddress.IPv6Address((0x64FF9B << 96) + int(ip))))


def test_socket() -> None:
    """A forbidden address gets no socket, and the error does not name it; a public one gets one."""
    with pytest.raises(NotAllowed) as raised:
        public_socket((socket.AF_INET, socket.SOCK_STREAM, 0, "", ("10.11.12.13", 443)))
    assert "10.11" not in str(raised.value)
    with public_socket((socket.AF_INET, socket.SOCK_STREAM, 0, "", ("1.1.1.1", 443))) as s:
        assert s.family == socket.AF_INET
