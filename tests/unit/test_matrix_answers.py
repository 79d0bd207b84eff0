"""What the answers of homeservers, and of proxies in front of them, mean."""

import json
from datetime import UTC, datetime
from email.utils import format_datetime

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sfu_delegate.delegation.model import Verdict
from sfu_delegate.matrix.answers import MAX_RETRY_AFTER, MIN_RETRY_AFTER, Answer, no_such_endpoint, read_reply, read_retry_after, understand
from sfu_delegate.matrix.http import HttpAnswer

NOW = 1_700_000_000.0
HTML = b"<html><body>Bad Gateway</body></html>"


def meaning(status: int, body: bytes | dict[str, object] = b"", *, own_token: bool = False, whole: bool = True, **headers: str) -> Answer:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = HttpAnswer(status, {k.replace("_", "-"): v for k, v in headers.items()}, raw, whole)
    return understand(read_reply(answer, NOW), own_token=own_token)


def error(errcode: str, **more: object) -> dict[str, object]:
    return {"errcode": errcode, "error": "secret-delay-id was not liked", **more}


@pytest.mark.parametrize(
    ("status", "body", "verdict"),
    [
        (200, {}, Verdict.DONE),
        (200, {"something": "else"}, Verdict.UNCERTAIN),
        (200, b"", Verdict.UNCERTAIN),
        (204, b"", Verdict.UNCERTAIN),
        (202, b" \n", Verdict.UNCERTAIN),
        (200, b"[]", Verdict.UNCERTAIN),
        (200, HTML, Verdict.UNCERTAIN),
        (200, b'{"half": ', Verdict.UNCERTAIN),
        (200, b"[" * 100_000, Verdict.UNCERTAIN),
        (200, b"\xff\xfe", Verdict.UNCERTAIN),
        (200, error("M_UNKNOWN"), Verdict.UNCERTAIN),
        (301, b"", Verdict.FAILED),
        (302, HTML, Verdict.FAILED),
        (308, {}, Verdict.FAILED),
        (400, error("M_BAD_JSON"), Verdict.REFUSED),
        (400, HTML, Verdict.UNCERTAIN),
        (400, error("M_UNRECOGNIZED"), Verdict.FAILED),
        (401, error("M_UNKNOWN_TOKEN"), Verdict.REFUSED),
        (401, error("M_MISSING_TOKEN"), Verdict.REFUSED),
        (401, HTML, Verdict.UNCERTAIN),
        (403, error("M_FORBIDDEN"), Verdict.REFUSED),
        (403, error("M_RESOURCE_LIMIT_EXCEEDED"), Verdict.FAILED),
        (403, HTML, Verdict.UNCERTAIN),
        (403, {"errcode": 5}, Verdict.UNCERTAIN),
        (403, {"errcode": "what an odd code"}, Verdict.UNCERTAIN),
        (403, ["errcode"], Verdict.UNCERTAIN),
        (404, error("M_NOT_FOUND"), Verdict.NOT_FOUND),
        (404, error("M_UNRECOGNIZED"), Verdict.FAILED),
        (404, error("M_UNKNOWN"), Verdict.UNCERTAIN),
        (404, HTML, Verdict.UNCERTAIN),
        (404, b"", Verdict.UNCERTAIN),
        (404, {}, Verdict.UNCERTAIN),
        (405, error("M_UNRECOGNIZED"), Verdict.FAILED),
        (405, HTML, Verdict.FAILED),
        (409, error("M_UNKNOWN"), Verdict.CONFLICT),
        (409, HTML, Verdict.UNCERTAIN),
        (413, error("M_TOO_LARGE"), Verdict.UNCERTAIN),
        (414, HTML, Verdict.UNCERTAIN),
        (429, error("M_LIMIT_EXCEEDED"), Verdict.LIMITED),
        (429, HTML, Verdict.LIMITED),
        (400, error("M_LIMIT_EXCEEDED"), Verdict.LIMITED),
        (500, error("M_UNKNOWN"), Verdict.UNCERTAIN),
        (502, HTML, Verdict.UNCERTAIN),
        (503, error("M_LIMIT_EXCEEDED"), Verdict.UNCERTAIN),
        (504, b"", Verdict.UNCERTAIN),
        (599, error("M_NOT_FOUND"), Verdict.UNCERTAIN),
        (999, b"", Verdict.UNCERTAIN),
    ],
)
def test_table(status: int, body: bytes | dict[str, object], verdict: Verdict) -> None:
    """Only Matrix errors of the homeserver itself are final."""
    answer = meaning(status, body)
    assert (answer.verdict, answer.status) == (verdict, status)


@pytest.mark.parametrize(
    ("status", "errcode", "verdict"),
    [
        (401, "M_UNKNOWN_TOKEN", Verdict.FAILED),
        (401, "M_MISSING_TOKEN", Verdict.FAILED),
        (403, "M_FORBIDDEN", Verdict.FAILED),
        (403, "M_EXCLUSIVE", Verdict.FAILED),
        (400, "M_BAD_JSON", Verdict.REFUSED),
        (404, "M_NOT_FOUND", Verdict.NOT_FOUND),
    ],
)
def test_own_token(status: int, errcode: str, verdict: Verdict) -> None:
    """A refusal of the application service's own token is the operator's to repair, and not final."""
    assert meaning(status, error(errcode), own_token=True).verdict is verdict


def test_truncated() -> None:
    """An answer that is longer than is read is not the homeserver's."""
    assert meaning(200, b"{}", whole=False).verdict is Verdict.UNCERTAIN


def test_no_server_text_in_detail() -> None:
    """The server's own error text, which may repeat the delay_id, is not passed on."""
    answer = meaning(403, error("M_FORBIDDEN"))
    assert answer.detail == "403 M_FORBIDDEN"
    assert "secret" not in repr(answer)


def test_bodies_stay_out_of_reprs() -> None:
    """Neither an HTTP answer nor what was read of it shows its body when printed."""
    answer = HttpAnswer(200, {"x": "secret"}, b'{"a": "secret"}')
    assert "secret" not in repr(answer) + repr(read_reply(answer, NOW))


def test_no_such_endpoint_is_not_no_such_event() -> None:
    """M_UNRECOGNIZED and M_NOT_FOUND are told apart, though both are 404."""
    unrecognized, not_found = (
        read_reply(HttpAnswer(404, {}, json.dumps({"errcode": code}).encode()), NOW) for code in ("M_UNRECOGNIZED", "M_NOT_FOUND")
    )
    assert no_such_endpoint(unrecognized)
    assert not no_such_endpoint(not_found)


@pytest.mark.parametrize("status", [429, 500, 502, 503, 403])
def test_retry_after_is_passed_on(status: int) -> None:
    """Whoever asks for patience is heard, whatever the status."""
    assert meaning(status, HTML, retry_after="7").retry_after == 7.0


def test_done_needs_no_retry() -> None:
    """A Retry-After of a success means nothing."""
    assert meaning(200, {}, retry_after="7").retry_after is None


@pytest.mark.parametrize(
    ("header", "body", "seconds"),
    [
        (None, None, None),
        (None, {}, None),
        ("5", None, 5.0),
        (" 5 ", None, 5.0),
        ("0", None, MIN_RETRY_AFTER),
        ("-3", None, MIN_RETRY_AFTER),
        ("1.5", None, 1.5),
        ("9" * 400, None, MAX_RETRY_AFTER),
        ("soon", None, None),
        ("nan", None, None),
        ("inf", None, None),
        ("٣", None, None),
        ("", None, None),
        (None, {"retry_after_ms": 1500}, 1.5),
        (None, {"retry_after_ms": 1500.5}, 1.5005),
        (None, {"retry_after_ms": -1}, MIN_RETRY_AFTER),
        (None, {"retry_after_ms": True}, None),
        (None, {"retry_after_ms": "1500"}, None),
        (None, {"retry_after_ms": None}, None),
        (None, {"retry_after_ms": float("nan")}, None),
        (None, {"retry_after_ms": float("inf")}, None),
        (None, {"retry_after_ms": 10**400}, None),
        ("1", {"retry_after_ms": 1500}, 1.5),
        ("2", {"retry_after_ms": 1500}, 1.5),
        ("2", {"retry_after_ms": 1000}, 1.0),
        ("2", {"retry_after_ms": 999}, 2.0),
        ("2", {"retry_after_ms": 2001}, 2.001),
        ("7", {"retry_after_ms": 1500}, 7.0),
        ("garbage", {"retry_after_ms": 1500}, 1.5),
        ("2", {"retry_after_ms": "garbage"}, 2.0),
        ("Tue, 14 Nov 2023 22:13:30 GMT", None, 10.0),
        ("Tue, 14 Nov 2023 22:13:30 -0000", None, 10.0),
        ("Tue, 14 Nov 2023 22:13:00 GMT", None, MIN_RETRY_AFTER),
        ("Mon, 14 Nov 2033 22:13:00 GMT", None, MAX_RETRY_AFTER),
        ("Mon, 01 Jan 0001 00:00:00 +2359", None, MIN_RETRY_AFTER),
        ("Mon, 99 Jan 2033 00:00:00 GMT", None, None),
    ],
)
def test_retry_after(header: str | None, body: dict[str, object] | None, seconds: float | None) -> None:
    """Seconds, dates and retry_after_ms are understood; the larger counts, within bounds, but a header that only rounds up
    the milliseconds says nothing new; garbage says nothing."""
    assert read_retry_after(header, body, NOW) == (None if seconds is None else pytest.approx(seconds))


@given(st.one_of(st.none(), st.text(), st.from_regex(r"[A-Z][a-z]{2}, [0-9]{1,3} [A-Z][a-z]{2} [0-9]{1,6} [0-9:]{1,9} ?[A-Z+0-9-]*")), st.data())
@example("Mon, 01 Jan 9999 00:00:00 -2359", None)
def test_retry_after_of_anything(header: str | None, data: st.DataObject | None) -> None:
    """Whatever a server sends, the result is nothing or a number within the bounds."""
    ms = data.draw(st.one_of(st.none(), st.integers(), st.floats(), st.text(), st.lists(st.integers()))) if data else None
    seconds = read_retry_after(header, {"retry_after_ms": ms}, NOW)
    assert seconds is None or MIN_RETRY_AFTER <= seconds <= MAX_RETRY_AFTER


@given(st.integers(min_value=0, max_value=3600))
def test_retry_after_forms_agree(seconds: int) -> None:
    """The same time means the same in all three forms."""
    date = format_datetime(datetime.fromtimestamp(NOW + seconds, UTC), usegmt=True)
    asked = {
        read_retry_after(str(seconds), None, NOW),
        read_retry_after(date, None, NOW),
        read_retry_after(None, {"retry_after_ms": seconds * 1000}, NOW),
    }
    assert asked == {max(float(seconds), MIN_RETRY_AFTER)}


@given(st.integers(min_value=100, max_value=999), st.binary(), st.booleans())
def test_any_answer_has_a_meaning(status: int, body: bytes, own_token: bool) -> None:
    """No status and no body makes the reading of an answer fail, and none but 2xx means done."""
    answer = meaning(status, body, own_token=own_token)
    assert answer.verdict is not Verdict.DONE or 200 <= status < 300
