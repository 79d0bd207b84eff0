"""Structured logs: one event is one line, with a snake_case name and its facts beside it, in JSON or for the eyes.

A token, a key, a full `delay_id` or a webhook's body must never get into a line: callers leave them out, and `redact` here is the last line
of defence, also for what other libraries log. A line that cannot be written must never stop the daemon.
"""

import logging
import re
import sys
from collections.abc import Callable, Container, Iterable, Mapping
from contextlib import nullcontext
from datetime import UTC, datetime
from functools import lru_cache
from time import monotonic
from typing import Any, Final, TextIO

import structlog
from pydantic_core import to_json
from structlog.typing import EventDict, WrappedLogger

HIDDEN: Final = "(hidden)"
_MOST_DEPTH: Final = 6

# By the whole name or its last word: `token`, `as_token`, `management_token`; but not `key`, which names a configuration key.
_SECRET_KEY: Final = re.compile(
    r"(?:^|[_-])(?:tokens?|secrets?|delay[_-]?ids?|authorization|jwts?|passwords?|passphrase|credentials?|cookie|api[_-]?keys|"
    r"encryption[_-]?keys?|private[_-]?key)$|^(?:body|keys|webhook)$|token$|password$|secret$|delayid$",
    re.IGNORECASE,
)
_SECRET_TEXT: Final = (
    # The path segment after `delayed_events/` is a delay_id in every generation of the API, whatever it looks like.
    (re.compile(r"(delayed_events/)[^/?#\s\"'<>]+"), r"\1" + HIDDEN),
    (re.compile(r"((?:access_token|token|as_token|hs_token|jwt|secret|password)=)[^&\s\"']+", re.IGNORECASE), r"\1" + HIDDEN),
    (re.compile(r"(\bBearer\s+)[^\s\"',]+", re.IGNORECASE), r"\1" + HIDDEN),
    (re.compile(r"(://)[^/@\s\"']+@"), r"\1" + HIDDEN + "@"),
    (re.compile(r"\beyJ[A-Za-z0-9_=-]{3,}(?:\.[A-Za-z0-9_=-]*){0,4}"), "eyJ…"),
    (re.compile(r"\bgAAAA[A-Za-z0-9_=-]{20,}"), "gAAAA…"),
    (re.compile(r"\b(syd_[A-Za-z0-9]{0,4})[A-Za-z0-9_=.-]+"), r"\1…"),
    (re.compile(r"\b(sy[tra]_|m[ca][tr]_)[A-Za-z0-9_=-]{6,}"), r"\1…"),
)
# What any match of those patterns in ASCII contains, in lower case: most texts have nothing of it, and looking for a few letters costs a tenth of
# eight patterns. Hashed identities have "/" and "=", and must not be held up for that.
_CUES: Final = (
    *("delayed_events/", "token=", "jwt=", "secret=", "password=", "bearer", "://", "eyj", "gaaaa"),
    *("syd_", "syt_", "syr_", "sya_", "mct_", "mcr_", "mat_", "mar_"),
)
_MOST_FRAMES: Final = 12
_SHORTENED: Final = re.compile(r"[^\s…]{0,8}…")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def short(delay_id: str) -> str:
    """A hint of a delay_id, by which people can tell two of them apart and nobody can use one: 8 characters at most, then "…".

    Never more than a third of it, so that a short id is not given away.
    """
    return delay_id[: min(8, len(delay_id) // 3)] + "…"


def get_logger(name: str = "sfu_delegate") -> structlog.stdlib.BoundLogger:
    """The logger for one module; `bind(delegation=…)` it where lines are about a delegation."""
    return structlog.stdlib.get_logger(name)


def lines(logger: str, event: str, facts: Iterable[Mapping[str, str | int]], *, ours: Container[str] = ()) -> None:
    """Many lines at once, as `get_logger(logger).info(event, **fact)` would write each.

    Where lines are JSON they are made and written together, which takes a tenth of the time: a line for each step of each delegation is
    worth having, but must not cost more than what it tells of. `ours`: the facts whose values are our own words and numbers, in which no secret
    can be.
    """
    root = logging.getLogger()
    if not root.isEnabledFor(logging.INFO):
        return
    handler = next((handler for handler in root.handlers if isinstance(handler, _Handler) and handler.json), None)
    if handler is None or len(root.handlers) > 1:
        log = get_logger(logger)
        for fact in facts:
            log.info(event, **fact)
        return
    first = {"time": datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"), "level": "info", "event": event}
    facts = list(facts)
    plain = _is_plain(facts, ours)  # nearly always, and one look at all of them takes a fraction of one at each
    written = []
    for fact in facts:
        line: dict[str, Any] = {**first, **handler.always}
        if plain or _is_plain([fact], ours):
            line.update(fact)
        else:
            for key, value in fact.items():
                line[key] = value if key in ours else _value(key, value, _MOST_DEPTH)
        line["logger"] = logger
        written.append(to_json(line))
    if written:
        handler.write_lines(written)


def _is_plain(facts: Iterable[Mapping[str, str | int]], ours: Container[str]) -> bool:
    """Is there certainly nothing in there that must not be written?"""
    theirs = [(key, value) for fact in facts for key, value in fact.items() if key not in ours]
    if any(_key(key)[1] for key, _ in theirs):
        return False
    return _is_harmless("\n".join([str(value) for _, value in theirs]))


def configure(*, level: str = "info", format: str = "auto", stream: TextIO | None = None, instance: str = "") -> None:
    """Send every log line, our own and other libraries', to `stream` (standard error by default).

    `format` is "json", "console", or "auto": console on a terminal, JSON elsewhere. `instance`, if not empty, is in every line. May be called
    again. ValueError for unknown words.
    """

    def named(_: Any, __: str, line: EventDict) -> EventDict:
        line["instance"] = instance
        return line

    output = sys.stderr if stream is None else stream
    if format not in ("auto", "json", "console"):
        raise ValueError(f"the log format is auto, json or console, not {format!r}")
    console = format == "console" or (format == "auto" and output.isatty())
    renderer: Any = (
        structlog.dev.ConsoleRenderer(colors=output.isatty(), timestamp_key="time", exception_formatter=structlog.dev.plain_traceback)
        if console
        else structlog.processors.JSONRenderer(ensure_ascii=False, default=str, separators=(",", ":"))
    )
    before: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
        *([named] if instance else []),
    ]
    last: list[Any] = [
        structlog.stdlib.ProcessorFormatter.remove_processors_meta,
        structlog.processors.format_exc_info,  # before the redaction, and without the local variables that fancier ones show
        redact,
        *([_one_line] if console else [_order]),
        renderer,
    ]
    handler = _Handler(output, json=not console, instance=instance)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=last,
            foreign_pre_chain=before,
        )
    )
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *before, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h, _Handler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    logging.captureWarnings(True)
    # Access logs would be a line for each webhook, and name paths with delegation ids.
    logging.getLogger("aiohttp.access").disabled = True
    # Its errors come with the request's raw bytes, which anybody can send, as often as they like.
    server = logging.getLogger("aiohttp.server")
    server.filters = [_without_request]
    # These log statements with their parameters, or a line for each request, below the level of a warning.
    for chatty in ("sqlalchemy", "alembic", "asyncio", "livekit"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # It warns of what it could not tell a connection that is closed; why it is closed, the store says.
    logging.getLogger("psycopg").setLevel(logging.ERROR)
    set_level(level)


def _without_request(record: logging.LogRecord) -> bool:
    """Leave the kind of the error, without its text and its traceback; a request that is no HTTP is worth a debug line."""
    kind = record.exc_info[0].__name__ if record.exc_info and record.exc_info[0] else ""
    record.msg, record.args = "http_request_failed: %s", (kind or "unknown",)
    record.exc_info = record.exc_text = None
    if kind.startswith(("Bad", "Invalid", "Line", "Content", "Transfer", "Payload")):
        record.levelno, record.levelname = logging.DEBUG, "DEBUG"
        return logging.getLogger().isEnabledFor(logging.DEBUG)
    return True


def set_level(level: str) -> None:
    """From now on, log this level (debug, info, warning, error) and what is graver. Raises ValueError for an unknown word."""
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError(f"the log level is debug, info, warning or error, not {level!r}")
    logging.getLogger().setLevel(number)


def redact(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Hide what is secret by its name, and shorten what looks like a token or a delay_id within any text.

    Values that are no plain data become text first, so that a repr cannot carry a secret past this.
    """
    return {_key(key)[0]: _value(key, value, _MOST_DEPTH) for key, value in event.items()}


@lru_cache(maxsize=1024)
def _key(key: object) -> tuple[str, bool]:
    """A key as it may be written, and whether its value is secret. Keys are few, and come again with every line."""
    return _text(key), isinstance(key, str) and _SECRET_KEY.search(key) is not None


def _value(key: object, value: object, depth: int) -> Any:
    if type(value) is str and not _key(key)[1]:
        return _text(value)
    if isinstance(key, str) and _key(key)[1] and value is not None and not isinstance(value, bool):
        return value if isinstance(value, str) and _SHORTENED.fullmatch(value) else HIDDEN
    if value is None or isinstance(value, bool | int | float):
        return value
    if depth == 0:
        return "…"
    match value:
        case Mapping():
            return {_key(k)[0]: _value(k, v, depth - 1) for k, v in value.items()}
        case tuple() if (names := getattr(value, "_fields", None)) is not None:
            return {name: _value(name, v, depth - 1) for name, v in zip(names, value, strict=True)}
        case list() | tuple() | set() | frozenset():
            return [_value(None, v, depth - 1) for v in value]
        case bytes() | bytearray() | memoryview():
            return f"({len(value)} bytes)"
        case _:
            return _text(value)


def _text(value: object) -> str:
    text = value if type(value) is str else str(value)
    if _is_harmless(text):
        return text
    if not text.isascii():
        text = text.encode("utf-8", "replace").decode()  # a JSON body may hold halves of characters, which no stream takes
    for pattern, replacement in _SECRET_TEXT:
        text = pattern.sub(replacement, text)
    return text


def _is_harmless(text: str) -> bool:
    if not text.isascii():
        return False
    lowered = text.lower()
    for cue in _CUES:  # noqa: SIM110 — a generator takes twice as long
        if cue in lowered:
            return False
    return True


def _one_line(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """On the console nothing is escaped: without this, a newline in a client's text could forge a line. Tracebacks keep theirs."""
    return {
        key: _CONTROL.sub(lambda c: repr(c.group())[1:-1], value) if isinstance(value, str) and key not in ("exception", "stack") else value
        for key, value in event.items()
    }


def _order(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Time, level and event first: JSON lines are read by people too."""
    first = {key: event.pop(key) for key in ("time", "level", "event") if key in event}
    return {**first, **event}


class _Handler(logging.StreamHandler[TextIO]):
    """Writes lines, and never says what it could not write: logging's own complaint would print the arguments as they are."""

    def __init__(self, stream: TextIO, *, json: bool, instance: str) -> None:
        super().__init__(stream)
        self.json = json
        self.always = {"instance": instance} if instance else {}  # what is in every line

    def write_lines(self, lines: list[bytes]) -> None:
        """Write lines that are ready."""
        with self.lock or nullcontext():
            try:
                self.stream.write((b"\n".join(lines) + b"\n").decode())
                self.flush()
            except (OSError, ValueError):  # the stream is gone, and there is nobody left to tell
                return

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        try:
            self.stream.write(f'{{"level": "error", "event": "log_line_failed", "logger": "{record.name}", "error": "{type(error).__name__}"}}\n')
        except (OSError, ValueError):  # the stream is gone, and there is nobody left to tell
            return


def frames(error: BaseException) -> list[str]:
    """Where an unexpected error happened, innermost last, without any values: its own text could hold what must not be logged."""
    found = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        found.append(f"{trace.tb_frame.f_globals.get('__name__', '?')}:{trace.tb_lineno} {code.co_name}")
        trace = trace.tb_next
    return found[-_MOST_FRAMES:]


class Seldom:
    """Keeps what anybody can set off, as often as they like, from filling the log: each kind of event gets one line in `every` seconds."""

    def __init__(self, every: float = 60.0, clock: Callable[[], float] = monotonic) -> None:
        self._every = every
        self._clock = clock
        self._told: dict[str, tuple[float, int]] = {}  # kind → when there was a line, how many happened since

    def times(self, kind: str) -> int:
        """How many times it happened since the last line, if it is time for another one; else 0. `kind` comes from a fixed set."""
        now = self._clock()
        at, since = self._told.get(kind, (now - self._every, 0))
        due = now - at >= self._every
        self._told[kind] = (now, 0) if due else (at, since + 1)
        return since + 1 if due else 0
