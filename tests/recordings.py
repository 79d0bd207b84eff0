"""The recordings in `tests/fixtures`, typed. They are what a real LiveKit server sent, and are never changed to suit a test."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

DIRECTORY = Path(__file__).parent / "fixtures" / "livekit-1.13.3"


@dataclass(frozen=True, slots=True)
class RecordedWebhook:
    """One webhook request as it arrived; a repeated attempt is another one."""

    t_ms: float  # since the recording's start
    headers: dict[str, str]
    body: bytes
    answered: int | None  # the status; None where the recording ended before the answer

    @property
    def authorization(self) -> str:
        return self.headers["Authorization"]

    @property
    def event(self) -> dict[str, Any]:
        """The body as plain JSON."""
        value: dict[str, Any] = json.loads(self.body)
        return value


@dataclass(frozen=True, slots=True)
class Recording:
    """One scenario: what was done, what the clients saw (`timeline`), and every webhook in the order of arrival."""

    name: str
    description: str
    api_key: str
    api_secret: str
    started_at: float  # Unix seconds at `t_ms` 0
    timeline: tuple[dict[str, Any], ...]
    webhooks: tuple[RecordedWebhook, ...]

    def at(self, webhook: RecordedWebhook) -> float:
        """The wall clock when it arrived, in Unix seconds: its token is valid around this time only."""
        return self.started_at + webhook.t_ms / 1000


@dataclass(frozen=True, slots=True)
class RecordedAnswer:
    """One call of RoomService and the server's answer to it, raw."""

    case: str
    call: str
    path: str
    request: bytes
    status: int
    headers: dict[str, str]
    body: bytes


def names() -> tuple[str, ...]:
    """The names of all recordings of webhooks."""
    return tuple(path.stem for path in sorted(DIRECTORY.glob("*.json")) if not path.stem.startswith("room_service_"))


@cache
def load(name: str) -> Recording:
    """One recording of webhooks, by the name of its file."""
    raw = json.loads((DIRECTORY / f"{name}.json").read_text(encoding="utf-8"))
    return Recording(
        name=name,
        description=raw["description"],
        api_key=raw["api_key"],
        api_secret=raw["api_secret"],
        started_at=raw["started_at_unix_ms"] / 1000,
        timeline=tuple(raw["timeline"]),
        webhooks=tuple(
            RecordedWebhook(
                t_ms=webhook["t_ms"],
                headers=webhook["headers"],
                body=webhook["body"].encode(),
                answered=webhook["answered"]["status"] if webhook.get("answered") else None,
            )
            for webhook in raw["webhooks"]
        ),
    )


@cache
def room_service_answers() -> tuple[RecordedAnswer, ...]:
    """What the server answered to each kind of RoomService call, proper and improper."""
    return tuple(
        RecordedAnswer(
            case=raw["case"],
            call=raw["call"],
            path=raw["request"]["path"],
            request=(raw["request"]["body"] or "").encode(),
            status=raw["status"],
            headers=raw["headers"],
            body=raw["body"].encode(),
        )
        for raw in json.loads((DIRECTORY / "room_service_answers.json").read_text(encoding="utf-8"))
    )


@cache
def room_service_polling() -> dict[str, Any]:
    """ListParticipants polled every 20 ms around reconnects, as it was written down."""
    value: dict[str, Any] = json.loads((DIRECTORY / "room_service_polling.json").read_text(encoding="utf-8"))
    return value
