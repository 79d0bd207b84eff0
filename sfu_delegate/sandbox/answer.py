"""What a model answers to an HTTP request. It must know nothing of sockets: the skin decides how a connection is closed."""

import json
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, NamedTuple


class Fate(StrEnum):
    """What becomes of the answer on its way."""

    ANSWER = "answer"  # it is given
    REFUSE = "refuse"  # nobody listens: the request was certainly not seen
    CLOSE = "close"  # the connection is closed without an answer; whether the request was carried out, the client cannot know
    HANG = "hang"  # no answer ever


class Answer(NamedTuple):
    """An HTTP answer, how long it is held back (seconds), and whether it arrives at all."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    delay: float = 0.0
    fate: Fate = Fate.ANSWER

    def json(self) -> Any:
        """The decoded body. Raises ValueError when it is not JSON."""
        return json.loads(self.body)


def json_answer(status: int, content: Any, headers: Mapping[str, str] | None = None, delay: float = 0.0) -> Answer:
    """An answer with a compact JSON body."""
    body = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    return Answer(status, {"Content-Type": "application/json", **(headers or {})}, body, delay)


def text_answer(status: int, text: str, content_type: str = "text/plain; charset=utf-8") -> Answer:
    """An answer that is not JSON."""
    return Answer(status, {"Content-Type": content_type}, text.encode())


def no_answer(fate: Fate, delay: float = 0.0) -> Answer:
    """No answer, in one of the ways that `Fate` names."""
    return Answer(0, {}, b"", delay, fate)


class Impossible(Exception):
    """An operation on a model that makes no sense in its present state, such as leaving a room that one is not in."""
