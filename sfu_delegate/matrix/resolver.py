"""Questions to the DNS that need no threads; above all, for addresses of host names that strangers thought of.

The system's resolver can neither be given a time nor be stopped: each name with a DNS that hangs, which anybody can have, holds one of its threads
for half a minute, and with them everybody else's lookups. So these names are looked up without threads, by the name servers of /etc/resolv.conf.
"""

import asyncio
import socket
from collections.abc import Callable
from typing import Final

import dns.asyncresolver
import dns.exception
import dns.name
import dns.rdatatype
import dns.resolver
from aiohttp.abc import AbstractResolver, ResolveResult

TIMEOUT: Final = 5.0  # seconds for one question, with all its repetitions and name servers
UNANSWERED: Final = (dns.exception.DNSException, OSError, ValueError, RuntimeError, EOFError)
"""What may come of a question: no or a broken /etc/resolv.conf is one of them, and that there is no such name."""
_KINDS: Final = {socket.AF_INET: "A", socket.AF_INET6: "AAAA"}


async def ask(
    make: Callable[[], dns.asyncresolver.Resolver],
    name: dns.name.Name | str,
    kind: dns.rdatatype.RdataType | str,
    timeout: float,  # noqa: ASYNC109
) -> dns.resolver.Answer:
    """One question about an absolute name, within `timeout` seconds; `make` reads /etc/resolv.conf anew. Raises UNANSWERED."""
    resolver = make()
    # dnspython measures by the system's clock, which can be set meanwhile.
    async with asyncio.timeout(timeout + 1.0):
        return await resolver.resolve(name, kind, lifetime=timeout, search=False)


class DnsResolver(AbstractResolver):
    """For aiohttp's connector. What /etc/hosts says does not count."""

    def __init__(self, resolver: Callable[[], dns.asyncresolver.Resolver] = dns.asyncresolver.Resolver, timeout: float = TIMEOUT) -> None:
        self._resolver = resolver
        self._timeout = timeout

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        """All addresses of the name, IPv4 first. Raises OSError."""
        families = [socket.AF_INET, socket.AF_INET6] if family == socket.AF_UNSPEC else [family]
        answers = await asyncio.gather(*(self._ask(host, kind) for kind in families))
        found = [
            ResolveResult(hostname=host, host=address, port=port, family=kind, proto=0, flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV)
            for kind, addresses in zip(families, answers, strict=True)
            for address in addresses
        ]
        if not found:
            raise OSError("the name has no address")
        return found

    async def _ask(self, host: str, family: socket.AddressFamily) -> list[str]:
        try:
            answer = await ask(self._resolver, f"{host.rstrip('.')}.", _KINDS[family], self._timeout)
            return [str(record.address) for record in answer]
        except UNANSWERED:
            return []

    async def close(self) -> None:
        """Nothing is kept open."""
