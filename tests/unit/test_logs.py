"""One event is one line, no secret gets into it, and the level follows the operator."""

import io
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import structlog
from hypothesis import example, given
from hypothesis import strategies as st
from sfu_delegate.api.listener import AtOnce, Usual, _Request
from sfu_delegate.api.plain import Answer, Asked, Asker
from sfu_delegate.api.service_body import Asked as ServiceAsked
from sfu_delegate.delegation.model import Action, Carried, DelayedEvent, NewEvent, OnEnd, Task
from sfu_delegate.matrix.service import Federated
from sfu_delegate.observe import logs
from sfu_delegate.observe.logs import HIDDEN, Seldom, configure, get_logger, redact, set_level, short

from tests.rows import NOW, row

JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJAYWxpY2UifQ.c2lnbmF0dXJlLXNpZ25hdHVyZQ"
DELAY_ID = "syd_qWertZuiOpAsdfGhjkl"


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Each test leaves the process's logging as it found it."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    logging.captureWarnings(False)
    root.handlers[:] = before
    root.setLevel(level)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


Lines = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def lines() -> Lines:
    """JSON logging into memory; call it for the lines so far."""
    stream = io.StringIO()
    configure(level="info", format="json", stream=stream)
    return lambda: [json.loads(line) for line in stream.getvalue().splitlines()]


def redacted(**event: Any) -> dict[str, Any]:
    return dict(redact(None, "info", event))


def test_an_event_is_one_line_with_its_facts(lines: Lines) -> None:
    """Time, level and event name come first, then what was bound and given."""
    get_logger("sfu_delegate.daemon").bind(delegation="d1").info("delegation_accepted", sfu="main", note="two\nlines")
    (line,) = lines()
    assert list(line)[:3] == ["time", "level", "event"]
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "info",
        "event": "delegation_accepted",
        "logger": "sfu_delegate.daemon",
        "delegation": "d1",
        "sfu": "main",
        "note": "two\nlines",
    }


def test_context_is_in_every_line(lines: Lines) -> None:
    """What is bound to the context appears in our lines and in those of other libraries."""
    with structlog.contextvars.bound_contextvars(delegation="d1"):
        get_logger().info("ours")
        logging.getLogger("other").warning("theirs")
    assert [line["delegation"] for line in lines()] == ["d1", "d1"]


def test_other_libraries_write_the_same_lines(lines: Lines) -> None:
    """What a library logs is a JSON line with its logger's name, with its arguments filled in and redacted."""
    logging.getLogger("aiohttp.client").warning("failed: %s", f"Bearer {JWT}")
    (line,) = lines()
    assert (line["event"], line["logger"], line["level"]) == (f"failed: Bearer {HIDDEN}", "aiohttp.client", "warning")


def test_warnings_are_log_lines(lines: Lines) -> None:
    """Python's own warnings end up in the log."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        logging.captureWarnings(True)
        warnings.warn("old thing", UserWarning, stacklevel=1)
    assert "old thing" in lines()[0]["event"]


def test_access_logs_are_off(lines: Lines) -> None:
    """The HTTP server's access log writes nothing, whatever the level."""
    logging.getLogger("aiohttp.access").error("GET /v1/delegations/d1")
    assert lines() == []


def test_sql_parameters_stay_out_at_debug(lines: Lines) -> None:
    """Also at debug, the database library does not log statements with their parameters."""
    set_level("debug")
    logging.getLogger("sqlalchemy.engine").info("INSERT …")
    assert lines() == []


def test_the_level_changes_at_run_time(lines: Lines) -> None:
    """A logger that was used before follows a change of level in both directions."""
    log = get_logger("sfu_delegate.engine")
    log.debug("one")
    set_level("debug")
    log.debug("two")
    set_level("ERROR")
    log.warning("three")
    assert [line["event"] for line in lines()] == ["two"]


def test_unknown_words_are_refused() -> None:
    """A level or a format that does not exist is an error."""
    with pytest.raises(ValueError, match="log level"):
        set_level("loud")
    with pytest.raises(ValueError, match="log format"):
        configure(format="xml")


def test_configuring_again_replaces_the_output() -> None:
    """After a second configuration each event is still written once, to the new stream."""
    first, second = io.StringIO(), io.StringIO()
    configure(format="json", stream=first)
    log = get_logger()
    log.info("one")
    configure(format="json", stream=second)
    log.info("two")
    assert "two" not in first.getvalue()
    assert second.getvalue().count("two") == 1


def test_auto_is_console_on_a_terminal_and_json_elsewhere() -> None:
    """The automatic format depends on the stream."""
    terminal, pipe = Terminal(), io.StringIO()
    configure(format="auto", stream=terminal)
    get_logger().info("seen_by_eyes")
    configure(format="auto", stream=pipe)
    get_logger().info("seen_by_programs")
    assert "seen_by_eyes" in terminal.getvalue()
    assert not terminal.getvalue().startswith("{")
    assert json.loads(pipe.getvalue())["event"] == "seen_by_programs"


def test_a_client_cannot_forge_a_line_on_the_console() -> None:
    """Newlines and terminal codes in values are shown as text."""
    stream = io.StringIO()
    configure(format="console", stream=stream)
    get_logger().info("body\nlevel=error forged", user="@a:b\n2026 [info] forged", odd="\x1b[31mred\u2028")
    logging.getLogger("x").warning("their\nline")
    assert len(stream.getvalue().splitlines()) == 2
    assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize("format", ["json", "console"])
def test_exceptions_are_redacted_and_show_no_variables(format: str) -> None:
    """A traceback names the error without the secrets in its text or in local variables."""
    stream = io.StringIO()
    configure(format=format, stream=stream)
    local_variable = "local-hunter2"
    try:
        raise RuntimeError(f"no answer from https://hs/_matrix/client/v1/delayed_events/{DELAY_ID}/send?access_token=hunter2")
    except RuntimeError:
        get_logger().exception("request_failed")
        logging.getLogger("library").exception("it failed")
    written = stream.getvalue()
    assert written.count("RuntimeError: no answer") == 2
    for secret in (DELAY_ID, "=hunter2", local_variable + "'"):
        assert secret not in written
    if format == "json":
        assert len(written.splitlines()) == 2


SECRET_NAMES = "token tokens as_token access_token management_token openid_token accessToken secret api_secret delay_id delay_ids jwt"
MORE_SECRET_NAMES = "authorization Authorization password turnPassword turn_password encryption_key keys body"


@pytest.mark.parametrize("key", [*SECRET_NAMES.split(), *MORE_SECRET_NAMES.split()])
def test_secret_names_hide_their_value(key: str) -> None:
    """What is secret by its name is hidden at any depth, whatever its type."""
    for value in ("hunter2", b"hunter2", ["hunter2"], {"a": "hunter2"}, 12345):
        assert redacted(**{key: value}) == {key: HIDDEN}
        assert redacted(answer={"list": [{key: value}]}) == {"answer": {"list": [{key: HIDDEN}]}}


@pytest.mark.parametrize("key", ["key", "event", "delegation", "sfu", "room_sid", "delay_ms", "token_verified", "delayed_event"])
def test_harmless_names_keep_their_value(key: str) -> None:
    """Names that only resemble secrets stay readable."""
    assert redacted(**{key: "value"}) == {key: "value"}


def test_missing_secrets_are_seen_to_be_missing() -> None:
    """None and flags are not secrets: that there is no token is worth knowing."""
    assert redacted(token=None, as_token=True) == {"token": None, "as_token": True}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"got {JWT}, refused", "got eyJ…, refused"),
        (f"event {DELAY_ID} is gone", "event syd_qWer… is gone"),
        (
            "POST https://hs/_matrix/client/v1/delayed_events/abc/restart",
            f"POST https://hs/_matrix/client/v1/delayed_events/{HIDDEN}/restart",
        ),
        ("GET /userinfo?access_token=abc&x=1", f"GET /userinfo?access_token={HIDDEN}&x=1"),
        ("Authorization: Bearer abc.def", f"Authorization: Bearer {HIDDEN}"),
        ("postgresql://me:pw@db/x", f"postgresql://{HIDDEN}@db/x"),
        ("syt_YWxpY2U_abcdefghij_012345", "syt_…"),
        ("nothing secret: keys=3", "nothing secret: keys=3"),
    ],
)
def test_secrets_inside_texts_are_shortened(text: str, shown: str) -> None:
    """Tokens and delay_ids are recognized inside any text, also in keys, lists and objects' texts."""
    assert redacted(event=text) == {"event": shown}
    assert redacted(event="x", data=[{text: (text,)}]) == {"event": "x", "data": [{shown: [shown]}]}
    assert redacted(event="x", error=ValueError(text)) == {"event": "x", "error": shown}


def test_a_named_tuple_is_written_by_its_fields() -> None:
    """Those that are secret by their names are hidden, also where it is within another value; that there is none can be seen."""
    task = Task(Action.SEND, 7, 3, "main", "room", "hs.test", "D1", "hunter2", b"hunter2", lease_ends=NOW)
    written = redacted(task=task, tasks=[task._replace(delay_id="", token=None)])
    assert written["task"] | {"delay_id": HIDDEN, "token": HIDDEN} == written["task"]
    assert (written["task"]["action"], written["task"]["event"], written["task"]["delegation"], written["task"]["user"]) == ("send", 7, "D1", None)
    assert written["tasks"][0]["token"] is None
    event = redacted(row=row(delay_id="hunter2", token=b"hunter2"))["row"]
    assert list(event) == list(DelayedEvent._fields)
    assert (event["delay_id"], event["token"], event["identity"], event["state"]) == (HIDDEN, HIDDEN, "alice", "live")
    assert event["sessions"] == [{"sid": "S1", "joined_at_ms": 1000, "live": True, "heard_at": NOW - 60.0}]
    asked = redacted(asked=Asked(Asker("192.0.2.1", ("a",)), "hunter2", None, b"hunter2"))["asked"]
    assert asked == {"asker": {"peer": "192.0.2.1", "forwarded": ["a"]}, "authorization": HIDDEN, "origin": None, "body": HIDDEN}


def test_a_named_tuple_in_a_line_is_an_object(lines: Lines) -> None:
    """With its fields' names, in JSON."""
    get_logger().info("asked", event_row=row(delay_id="hunter2", token=b"hunter2"))
    (line,) = lines()
    assert line["event_row"]["delay_id"] == HIDDEN
    assert "hunter2" not in json.dumps(line)


USUAL: Usual = AtOnce(lambda asked, told: None, lambda: 1000)

HOLDING_SECRETS = [
    row(delay_id="hunter2", token=b"hunter2"),
    NewEvent("hunter2", 60.0, OnEnd.SEND),
    Carried(1, "D1", "alice", None, None, None, 60.0, OnEnd.SEND, b"hunter2", NOW, None),
    Task(Action.SEND, 7, 3, "main", "room", delay_id="hunter2", token=b"hunter2"),
    Federated(200, "", {"jwt": "hunter2"}),
    ServiceAsked("wss://sfu.example.org", "!room", "slot", "member", None, None, None, "hunter2"),
    Asked(Asker("192.0.2.1", ()), "hunter2", "hunter2", b"hunter2"),
    Answer(200, {"Location": "hunter2"}, b"hunter2"),
    _Request(b"POST /hunter2 HTTP/1.1", USUAL, "hunter2", "hunter2", (), b"hunter2", 7),
]


@pytest.mark.parametrize("value", HOLDING_SECRETS, ids=lambda value: type(value).__name__)
def test_a_repr_has_no_secret(value: object) -> None:
    """Not in an assertion, a traceback of another library's, or a list of them, either."""
    for text in (repr(value), str(value), f"{value}", repr([value]), repr({"a": (value,)})):
        assert "hunter2" not in text
        assert type(value).__name__ in text


def test_a_repr_shows_what_is_no_secret() -> None:
    """So that it is of use: all other fields, and whether there is a secret."""
    shown = repr(row(delay_id="hunter2", token=None, room="the-room"))
    assert "delay_id=…" in shown
    assert "token=None" in shown
    assert "room='the-room'" in shown
    assert repr(NewEvent("hunter2", 60.0, OnEnd.SEND)) == f"NewEvent(delay_id=…, delay=60.0, on_end={OnEnd.SEND!r}, running_since=None, shown_at=0.0)"


def changed_by_patterns(text: str) -> bool:
    """Is there anything in it that a pattern would hide?"""
    return any(pattern.sub(replacement, text) != text for pattern, replacement in logs._SECRET_TEXT)


PIECES = (
    *("delayed_", "events", "/", "access_", "token", "as_", "hs_", "jwt", "secret", "password", "="),
    *("Bearer", "bear", "er", " ", "\t", ":", "//", "@"),
    *("ey", "J", "gAAAA", "gAA", "syd", "syt", "syr", "sya", "mct", "mcr", "mat", "mar", "_", ".", "-", "abcdef0123456789abcdef", "x", "&", "'"),
    # What is no ASCII, and one of these letters to a pattern that ignores case: a long s, and the sign of the kelvin.
    *("\u017f", "\u212a", "to\u212aen", "\u017fecret", "pa\u017f\u017fword", "ä", "\ud800"),
)


@example("\u017fecret=hunter2")
@example("to\u212aen=hunter2")
@example("pas\u017fword=hunter2")
@example("half of a character: \ud800")
@given(st.lists(st.sampled_from(PIECES).flatmap(lambda piece: st.sampled_from([piece, piece.upper(), piece.lower(), piece.title()]))).map("".join))
def test_what_is_harmless_at_first_sight_has_nothing_to_be_hidden(text: str) -> None:
    """Whatever it is made of, no pattern would have changed it."""
    assert not (logs._is_harmless(text) and changed_by_patterns(text))


@pytest.mark.parametrize("number", range(len(logs._SECRET_TEXT)))
@given(data=st.data())
def test_nothing_that_is_to_be_hidden_is_harmless_at_first_sight(number: int, data: st.DataObject) -> None:
    """Each pattern's matches are seen to need it, wherever they stand."""
    pattern, _ = logs._SECRET_TEXT[number]
    around = st.text("ab _=./:\n", max_size=4)
    text = data.draw(around) + data.draw(st.from_regex(pattern, fullmatch=True, alphabet=st.characters(codec="ascii"))) + data.draw(around)
    assert not (logs._is_harmless(text) and changed_by_patterns(text))


@given(st.text(alphabet="abcdefghijklmnopqrstuvwxyzABCXYZ0123456789_-", min_size=12))
def test_no_delay_id_survives_in_a_path(delay_id: str) -> None:
    """Whatever a homeserver's delay_ids look like, their place in a URL is hidden."""
    assert delay_id not in redacted(event=f"404 at /delayed_events/{delay_id}")["event"].replace("/delayed_events/", "")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
        max_leaves=12,
    )
)
def test_any_value_can_be_logged(value: Any) -> None:
    """No value makes the redaction fail, and the result is JSON."""
    json.dumps(redacted(event="x", value=value))


def test_a_value_that_contains_itself_is_cut_off() -> None:
    """A circular value ends after some levels."""
    loop: list[Any] = []
    loop.append(loop)
    assert "…" in str(redacted(event="x", value=loop))


def test_short_gives_a_hint_only() -> None:
    """A hint has 8 characters at most, never more than a third of the id, and passes the redaction."""
    assert short(DELAY_ID) == "syd_qWe…"
    assert short("a" * 100) == "a" * 8 + "…"
    assert short("abc") == "a…"
    assert short("") == "…"
    assert redacted(delay_id=short(DELAY_ID)) == {"delay_id": "syd_qWe…"}


def test_half_a_character_can_be_written() -> None:
    """Texts that are no valid Unicode, as JSON bodies may hold them, reach a UTF-8 stream."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="utf-8")
    configure(format="json", stream=stream)
    get_logger().info("odd_text", room="\ud800")
    assert json.loads(raw.getvalue())["room"] == "?"


class Unprintable:
    """Something whose text cannot be made."""

    def __str__(self) -> str:
        raise RuntimeError("hunter2")


def test_a_line_that_cannot_be_written_does_no_harm() -> None:
    """The caller goes on, and a line says that one was lost, without its content."""
    stream = io.StringIO()
    configure(format="json", stream=stream)
    get_logger("sfu_delegate.x").info("fine", thing=Unprintable(), other="hunter3")
    line = json.loads(stream.getvalue())
    assert line == {"level": "error", "event": "log_line_failed", "logger": "sfu_delegate.x", "error": "RuntimeError"}


def test_a_closed_stream_does_no_harm() -> None:
    """When nobody reads the log any more, logging is silent."""
    stream = io.StringIO()
    configure(format="json", stream=stream)
    stream.close()
    get_logger().info("into_the_void")


def test_what_anybody_can_set_off_does_not_fill_the_log() -> None:
    """One line a minute for each kind, with the number since the last one."""
    now = 0.0
    seldom = Seldom(every=60.0, clock=lambda: now)
    assert seldom.times("bad_signature") == 1
    assert [seldom.times("bad_signature") for _ in range(5)] == [0] * 5
    assert seldom.times("expired") == 1
    now = 60.0
    assert seldom.times("bad_signature") == 6
    assert seldom.times("bad_signature") == 0


# ── many lines at once ──

FACTS: list[dict[str, str | int]] = [
    {"delegation": "dlg_1", "what": "sent", "row": 7, "detail": f"Bearer {JWT}", "identity": "a\ud800b\nc", "delay_id": DELAY_ID},
    {"delegation": "dlg_2", "what": "gone", "row": 8, "detail": "200", "identity": "@alice:example.org:DEVICE", "delay_id": short(DELAY_ID)},
]


@pytest.mark.parametrize("format", ["json", "console"])
def test_many_lines_are_what_as_many_calls_write(format: str) -> None:
    """To the letter, but for the time; what is secret is hidden in them, too."""
    written = []
    for many in (True, False):
        stream = io.StringIO()
        configure(level="info", format=format, stream=stream)
        if many:
            logs.lines("sfu_delegate.daemon", "delegation", FACTS, ours=("delegation", "what", "row"))
        else:
            for fact in FACTS:
                get_logger("sfu_delegate.daemon").info("delegation", **fact)
        written.append([re.sub(r"20\d\d-\d\d-\d\dT[0-9:.]+Z", "(time)", line) for line in stream.getvalue().splitlines()])
    assert written[0] == written[1]
    assert len(written[0]) == len(FACTS)
    assert JWT not in "".join(written[0])
    assert DELAY_ID not in "".join(written[0])


def test_many_lines_follow_the_level(lines: Lines) -> None:
    """None of them where the operator wants warnings only, and none where there are none."""
    logs.lines("sfu_delegate.daemon", "delegation", [])
    set_level("warning")
    logs.lines("sfu_delegate.daemon", "delegation", FACTS)
    assert lines() == []
