"""How LiveKit 1.13 delivers webhooks: one queue per room and URL, sent one after another. Pure: `now` is an argument, nothing is sent
here.

Recorded: 200 events wait at most (the one being sent not counted), an event that waited longer than 30 s is dropped when its turn comes,
a failed request is tried at 0, 1, 3, 7 and 15 s and then given up, while all later events of the room wait behind it. What is lost is
lost without a trace.
"""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

DEPTH = 200
MAX_AGE = 30.0
PAUSES = (1.0, 2.0, 4.0, 8.0)  # seconds after each failed attempt but the last


class Webhook(NamedTuple):
    """One event on its way to one URL."""

    url: str
    room: str
    event: str
    id: str
    body: bytes
    authorization: str
    queued_at: float
    ready_at: float  # not to be sent before: later than `queued_at` only by a fault


class Attempt(NamedTuple):
    """A request to be made now."""

    webhook: Webhook
    number: int  # 1 for the first


def retryable(status: int | None) -> bool:
    """Whether LiveKit tries again: None is a transport error. 501, every 3xx and every 4xx but 429 count as delivered."""
    return status is None or status == 429 or (status >= 500 and status != 501)


class WebhookQueue:
    """The events of one room for one URL. `lost` is told of each event that is dropped, and why: `age`, `queue is full`, `failed`."""

    def __init__(self, lost: Callable[[Webhook, str], None], *, depth: int = DEPTH, max_age: float = MAX_AGE) -> None:
        self._lost = lost
        self._depth = depth
        self._max_age = max_age
        self._waiting: deque[Webhook] = deque()
        self._current: Webhook | None = None
        self._attempts = 0
        self._next_at: float | None = None  # None while a request is under way, and when there is nothing to send

    def __len__(self) -> int:
        return len(self._waiting) + (self._current is not None)

    @property
    def next_at(self) -> float | None:
        """When the next request is due; None while one is under way, and when there is nothing to send."""
        return self._next_at

    def put(self, webhook: Webhook, now: float) -> bool:
        """Queue an event. False: the queue was full, and it is lost."""
        if self._current is not None and len(self._waiting) >= self._depth:
            self._lost(webhook, "queue is full")
            return False
        self._waiting.append(webhook)
        if self._current is None:
            self._advance(now)
        return True

    def next_attempt(self, now: float) -> Attempt | None:
        """The request to be made now, if one is due. The next one comes only after `answered`."""
        if self._current is None or self._next_at is None or self._next_at > now:
            return None
        self._next_at = None
        self._attempts += 1
        return Attempt(self._current, self._attempts)

    def answered(self, status: int | None, now: float, retry_after: float | None = None) -> None:
        """The request under way ended: with an HTTP status, or with None for a transport error. `retry_after` in seconds counts for 429
        and 503 only.
        """
        if self._current is None or self._next_at is not None:
            return
        if retryable(status):
            if self._attempts <= len(PAUSES):
                pause = PAUSES[self._attempts - 1]
                if retry_after is not None and status in (429, 503):
                    pause = max(0.0, retry_after)
                self._next_at = now + pause
                return
            self._lost(self._current, "failed")
        self._advance(now)

    def _advance(self, now: float) -> None:
        self._current, self._attempts, self._next_at = None, 0, None
        while self._waiting:
            webhook = self._waiting.popleft()
            if now - webhook.queued_at > self._max_age:
                self._lost(webhook, "age")
                continue
            self._current = webhook
            self._next_at = max(now, webhook.ready_at)
            return
