"""How often one client, and one user, may ask: a token bucket for each.

An address is no person: everybody in an office has the same one. So the limit for an address is high, and the one that matters is the user's, which
counts only what somebody has vouched for: nobody can use up the requests of somebody else.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from sfu_delegate.api.client import client_of
from sfu_delegate.api.errors import MatrixError
from sfu_delegate.api.plain import Asker
from sfu_delegate.api.services import Settings
from sfu_delegate.matrix.memory import keep

PEERS: Final = 1000  # addresses whose reading is remembered
MOST: Final = 100_000  # buckets; the one that was used least recently is forgotten first


class Throttle:
    """Token buckets by key. `clock` gives seconds, of any origin, and never goes back."""

    def __init__(self, clock: Callable[[], float], most: int = MOST) -> None:
        self._clock = clock
        self._most = most
        # By the address at the other end of the connection: whose request it is, where no proxy tells. For the settings of now.
        self._clients: OrderedDict[str, str | None] = OrderedDict()
        self._settings: Settings | None = None
        # Key → when its bucket is full again. That is all there is to know of a bucket (GCRA).
        self._full_at: OrderedDict[str, float] = OrderedDict()

    def take(self, key: str, rate: float, burst: int) -> float:
        """Take one token: 0 if there was one, else the seconds until there is. `rate` in tokens a second; 0: no limit."""
        if rate <= 0:
            return 0.0
        now = self._clock()
        # No emptier than empty by the limits of now, which a reload may have changed.
        full_at = min(max(now, self._full_at.get(key, now)), now + burst / rate) + 1 / rate
        wait = full_at - now - burst / rate
        if wait > 1e-9:  # less is the error of the sums above
            return wait
        keep(self._full_at, key, full_at, self._most)
        return 0.0

    def client(self, asker: Asker, settings: Settings) -> str:
        """One more request of this client; its address, "" where that is not known. Raises MatrixError (429)."""
        client = self._client(asker, settings)
        if client is not None:
            self._check(f"client {client}", settings.client_rate, settings.client_burst, "Too many requests come from this address.")
        return client or ""

    def _client(self, asker: Asker, settings: Settings) -> str | None:
        peer = asker.peer
        if asker.forwarded:
            return client_of(peer, asker.forwarded, settings.trusted_proxies)
        if settings is not self._settings:
            self._clients.clear()
            self._settings = settings
        if peer not in self._clients:
            keep(self._clients, peer, client_of(peer, (), settings.trusted_proxies), PEERS)
        return self._clients[peer]

    def user(self, user: str, settings: Settings) -> None:
        """One more request of this user, whom somebody has vouched for. Raises MatrixError (429)."""
        self._check(f"user {user}", settings.user_rate, settings.user_burst, "This user makes too many requests.")

    def origin(self, homeserver: str, settings: Settings) -> None:
        """One more request that comes by federation from this homeserver, as another one vouches. Raises MatrixError (429)."""
        self._check(f"origin {homeserver}", settings.client_rate, settings.client_burst, "Too many requests come from this homeserver.")

    def _check(self, key: str, rate: float, burst: int, sentence: str) -> None:
        wait = self.take(key, rate, burst)
        if wait > 0:
            raise MatrixError(429, "M_LIMIT_EXCEEDED", f"{sentence} Try again later.", retry_after=wait)
