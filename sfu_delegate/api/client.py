"""Who is asking, by address: the client behind the operator's reverse proxies."""

import ipaddress
from collections.abc import Sequence
from typing import Final

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

FORWARDED_FOR: Final = "X-Forwarded-For"
_SUBSCRIBER: Final = 64  # bits of an IPv6 address that a provider gives to one subscriber


def client_of(remote: str, forwarded: Sequence[str], trusted: Sequence[Network]) -> str | None:
    """The client's address, as a key; None where it is not known. `remote` is the address at the other end of the connection, `forwarded` are the
    headers in which proxies say whose request it is.

    A request of a trusted proxy is its client's: the last address in `X-Forwarded-For` that is not itself a trusted proxy's. If the proxy does not
    name one, its clients cannot be told apart, and limiting them all as one would be an outage.
    """
    peer = _address(remote)
    if peer is None or not _within(peer, trusted):
        return None if peer is None else _key(peer)
    told = [part for header in forwarded for part in header.split(",")]
    for part in reversed(told):
        address = _address(part.strip())
        if address is None:  # a proxy that passes on what anybody writes there
            return _key(peer)
        if not _within(address, trusted):
            return _key(address)
        peer = address
    return None


def _address(text: str) -> Address | None:
    """An IP address, perhaps with a port, as proxies write it."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return (isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped) or address


def _within(address: Address, networks: Sequence[Network]) -> bool:
    return any(address in network for network in networks if network.version == address.version)


def _key(address: Address) -> str:
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.IPv6Network((address, _SUBSCRIBER), strict=False))
    return str(address)
