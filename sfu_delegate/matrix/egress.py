"""Which addresses the daemon's requests may reach.

A URL that the operator configured may lead anywhere. One that was discovered comes from somebody else's server: it must never lead into the
daemon's own network. That is decided for each connection, for the very address that is about to be connected to, so that neither an IP
literal, nor a DNS answer that changes between check and use, nor a redirect can get around it.
"""

import ipaddress
import socket
from dataclasses import dataclass
from typing import Final, Self

from aiohttp.abc import AbstractResolver

from sfu_delegate.matrix.http import CONNECT_TIMEOUT, AddressInfo, Http, NotAllowed
from sfu_delegate.matrix.keep_alive import KeepAliveClient
from sfu_delegate.matrix.resolver import DnsResolver

# The IANA special-purpose registries. Tables of our own, because those of `ipaddress` differ between the releases of Python.
_V4_FORBIDDEN: Final = tuple(
    (ipaddress.IPv4Network(network), kind)
    for network, kind in (
        ("0.0.0.0/8", "unspecified"),
        ("10.0.0.0/8", "private"),
        ("100.64.0.0/10", "shared"),
        ("127.0.0.0/8", "loopback"),
        ("168.63.129.16/32", "link-local"),  # the host of a virtual machine at Azure, which no registry lists
        ("169.254.0.0/16", "link-local"),
        ("172.16.0.0/12", "private"),
        ("192.0.0.0/24", "reserved"),
        ("192.0.2.0/24", "reserved"),
        ("192.88.99.0/24", "reserved"),
        ("192.168.0.0/16", "private"),
        ("198.18.0.0/15", "reserved"),
        ("198.51.100.0/24", "reserved"),
        ("203.0.113.0/24", "reserved"),
        ("224.0.0.0/4", "multicast"),
        ("240.0.0.0/4", "reserved"),
    )
)
_V6_NAMED: Final = tuple(
    (ipaddress.IPv6Network(network), kind)
    for network, kind in (
        ("::/128", "unspecified"),
        ("::1/128", "loopback"),
        ("fe80::/10", "link-local"),
        ("fec0::/10", "private"),
        ("fc00::/7", "private"),
        ("ff00::/8", "multicast"),
        ("2001::/23", "reserved"),
        ("2001:db8::/32", "reserved"),
        ("2002::/16", "reserved"),
        ("3fff::/20", "reserved"),
    )
)
_V6_PUBLIC: Final = ipaddress.IPv6Network("2000::/3")  # all that IANA has given out
_V4_MAPPED: Final = ipaddress.IPv6Network("::ffff:0:0/96")
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")  # on IPv6-only networks, the way to public IPv4 addresses


def forbidden(address: str) -> str | None:
    """The kind of an address that is not on the public internet, such as "loopback"; None for a public one.

    IPv4 addresses inside IPv6 ones (mapped, NAT64) are judged by the IPv4 address. What is no address at all is forbidden too.
    """
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return "unknown"
    if isinstance(ip, ipaddress.IPv6Address):
        if ip not in _V4_MAPPED and ip not in _NAT64:
            return next((kind for network, kind in _V6_NAMED if ip in network), None if ip in _V6_PUBLIC else "reserved")
        ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return next((kind for network, kind in _V4_FORBIDDEN if ip in network), None)


def public_socket(info: AddressInfo) -> socket.socket:
    """A socket for an address on the public internet. Raises NotAllowed for any other; nothing is sent to it."""
    family, kind_of_socket, protocol, _, address = info
    kind = forbidden(str(address[0]))
    if kind is not None:
        raise NotAllowed(f"the host name leads to an address that must not be reached ({kind})")
    return socket.socket(family, kind_of_socket, protocol)


@dataclass(frozen=True, slots=True)
class Egress:
    """The ways out: for URLs that the operator configured, for those that were discovered, and for those that strangers made us discover.

    The last has connections and a resolver of its own, so that no name of theirs holds up those of others. None: as the second.
    """

    configured: Http
    discovered: Http
    strangers: Http | None = None

    @classmethod
    def open(cls, *, allow_private: bool = False, connect_timeout: float = CONNECT_TIMEOUT, resolver: AbstractResolver | None = None) -> Self:
        """Make the clients, inside a running event loop.

        `allow_private` lifts the restriction of discovered URLs. `resolver` is for the discovered ones.
        """
        return cls(
            configured=KeepAliveClient(connect_timeout=connect_timeout),
            discovered=KeepAliveClient(connect_timeout=connect_timeout, socket_factory=None if allow_private else public_socket, resolver=resolver),
            strangers=KeepAliveClient(
                connect_timeout=connect_timeout, socket_factory=None if allow_private else public_socket, resolver=resolver or DnsResolver()
            ),
        )

    def way(self, *, discovered: bool, stranger: bool = False) -> Http:
        """The client for a URL of that origin."""
        if not discovered:
            return self.configured
        return self.strangers if stranger and self.strangers is not None else self.discovered

    async def aclose(self) -> None:
        """Close all connections."""
        await self.configured.aclose()
        await self.discovered.aclose()
        if self.strangers is not None:
            await self.strangers.aclose()
