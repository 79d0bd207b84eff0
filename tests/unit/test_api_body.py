"""What is taken for a body, and what is said of one that is not taken."""

import json
from typing import Any

import pytest
from sfu_delegate.api.body import parse_object
from sfu_delegate.api.delegation_body import read_delegation
from sfu_delegate.api.errors import MatrixError
from sfu_delegate.api.services import Settings

from tests.engine_port import delayed, delegation

SETTINGS = Settings(max_events=3)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"", "it is empty"),
        (b"  \n", "it is empty"),
        (b"{", "malformed at line 1, column 2"),
        (b'{"a": 1} {}', "malformed at line 1, column 10"),
        (b'{"a": 1}x', "malformed"),
        (b"{'a': 1}", "malformed"),
        (b'{"a": NaN}', "NaN or Infinity"),
        (b'{"a": -Infinity}', "NaN or Infinity"),
        (b'{"a": 1, "a": 1}', "two fields of the same name"),
        (b'{"b": [{"a": 1, "a": 2}]}', "two fields of the same name"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"\xef\xbb\xbf{}", "malformed"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b'{"a": ' + b"1" * 10_000 + b"}", "too many digits"),
    ],
)
def test_what_is_no_json(body: bytes, problem: str) -> None:
    """400 M_NOT_JSON, with the place of the problem and nothing of the body."""
    with pytest.raises(MatrixError) as caught:
        parse_object(body)
    assert (caught.value.status, caught.value.errcode) == (400, "M_NOT_JSON")
    assert problem in caught.value.error
    assert caught.value.__context__ is None


@pytest.mark.parametrize("body", [b"[]", b"1", b'"text"', b"null", b"true"])
def test_what_is_json_but_no_object(body: bytes) -> None:
    """400 M_BAD_JSON."""
    with pytest.raises(MatrixError) as caught:
        parse_object(body)
    assert (caught.value.errcode, caught.value.error) == ("M_BAD_JSON", "The body must be a JSON object.")


def without(field: str) -> dict[str, Any]:
    body = delegation()
    del body[field]
    return body


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (without("homeserver"), "homeserver: is required."),
        (without("delayed_events"), "delayed_events: is required."),
        (delegation(homeserver="https://example.org"), "homeserver: is not a Matrix server name; give what stands"),
        (delegation(homeserver=""), "homeserver: is not a Matrix server name"),
        (delegation(homeserver=7), "homeserver: must be a string."),  # type: ignore[arg-type]
        (delegation(homeserver="\ud800"), "homeserver: is not a Matrix server name"),
        (delegation() | {"delayed_events": []}, "delayed_events: must have at least one delayed event."),
        (delegation() | {"delayed_events": {}}, "delayed_events: must be a list of objects."),
        (delegation() | {"delayed_events": ["syd_x"]}, "delayed_events[0]: must be an object such as"),
        (delegation(delayed(delay_id="")), "delayed_events[0].delay_id: must not be empty."),
        (delegation(delayed(delay_id="x" * 256)), "delayed_events[0].delay_id: is too long; 255 characters are the most."),
        (delegation(delayed(delay_id="a\nb")), "delayed_events[0].delay_id: must not have control characters"),
        (delegation(delayed(delay_id="a\x9fb")), "delayed_events[0].delay_id: must not have control characters"),
        (delegation(delayed(delay_id="\udfff")), "delayed_events[0].delay_id: is not valid Unicode"),
        (delegation(delayed(delay_id=None)), "delayed_events[0].delay_id: must be a string."),  # type: ignore[arg-type]
        (delegation(delayed(delay_ms="60000")), "delayed_events[0].delay_ms: must be an integer, in milliseconds, without quotes"),
        (delegation(delayed(delay_ms=60000.5)), "delayed_events[0].delay_ms: must be an integer"),
        (delegation(delayed(delay_ms=True)), "delayed_events[0].delay_ms: must be an integer"),
        (delegation(delayed(delay_ms=None)), "delayed_events[0].delay_ms: must be an integer"),
        (delegation(delayed(), delayed("b", on_disconnect="explode")), 'delayed_events[1].on_disconnect: must be "send" or "cancel".'),
        (delegation(delayed(action="send")), "delayed_events[0].action: is not a field that is known here; remove it."),
        (delegation(url="https://evil.org"), "url: is not a field that is known here; remove it."),
        (delegation() | {"a\nb": 1}, "?: is not a field that is known here; remove it."),
        (delegation() | {"\ud800": 1}, "the body: is not valid Unicode"),
        (delegation(token=""), "token: must not be empty."),
        (delegation(token="x" * 4097), "token: is too long; 4096 characters are the most."),
        (delegation(token="Bearer x"), "token: must be printable ASCII without spaces; give the scoped token alone, without Bearer."),
        (delegation(token="tök"), "token: must be printable ASCII"),
        (delegation(token=["x"]), "token: must be a string."),
    ],
)
def test_what_does_not_have_the_form(body: dict[str, Any], sentence: str) -> None:
    """400 M_BAD_JSON that names the field, the problem and the remedy."""
    with pytest.raises(MatrixError) as caught:
        read_delegation(json.dumps(body).encode(), SETTINGS)
    assert (caught.value.status, caught.value.errcode) == (400, "M_BAD_JSON")
    assert caught.value.error.startswith(sentence)
    assert caught.value.__context__ is None


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (delegation(delayed(delay_ms=29_999)), "delayed_events[0].delay_ms: must be from 30000 to 604800000 milliseconds"),
        (delegation(delayed(delay_ms=604_800_001)), "delayed_events[0].delay_ms: must be from 30000 to 604800000 milliseconds"),
        (delegation(delayed(delay_ms=-1)), "delayed_events[0].delay_ms: must be from 30000"),
        (delegation(delayed(delay_ms=10**40)), "delayed_events[0].delay_ms: must be from 30000"),
        (delegation(*[delayed(f"syd_{n}") for n in range(4)]), "delayed_events: has too many; 3 are the most in one delegation."),
        (delegation(delayed("a"), delayed("b"), delayed("a")), "delayed_events[2].delay_id: is that of delayed_events[0], too; give"),
    ],
)
def test_what_is_beyond_the_limits(body: dict[str, Any], sentence: str) -> None:
    """400 M_INVALID_PARAM that names the field and the limit."""
    with pytest.raises(MatrixError) as caught:
        read_delegation(json.dumps(body).encode(), SETTINGS)
    assert (caught.value.status, caught.value.errcode) == (400, "M_INVALID_PARAM")
    assert caught.value.error.startswith(sentence)


def test_all_problems_are_told_at_once() -> None:
    """A client's developer need not find them one by one; but an error does not become a flood."""
    body = {"delayed_events": [{"delay_id": "", "delay_ms": "1"} for _ in range(50)]}
    with pytest.raises(MatrixError) as caught:
        read_delegation(json.dumps(body).encode(), SETTINGS)
    assert "homeserver: is required. delayed_events[0].delay_id: must not be empty. delayed_events[0].delay_ms: must be" in caught.value.error
    assert caught.value.error.endswith("… and 96 more.")
    assert len(caught.value.error) < 1000


def test_no_value_is_repeated() -> None:
    """What may be a secret never gets into an error, wherever in the body it stands."""
    secret = "syd_verysecretverysecret!"
    bodies: list[Any] = [
        secret,
        {secret: 1},
        {"homeserver": secret},
        delegation(delayed(on_disconnect=secret)),
        delegation(delayed(delay_ms=secret)),
        delegation(delayed(delay_id=secret, delay_ms=1), delayed(delay_id=secret)),
        delegation(token=secret + " "),
        delegation() | {"delayed_events": [{secret: secret}]},
    ]
    for body in bodies:
        with pytest.raises(MatrixError) as caught:
            read_delegation(json.dumps(body).encode(), SETTINGS)
        assert secret not in caught.value.error
        assert secret not in str(caught.value)


def test_the_defaults() -> None:
    """`send` is what a leave event needs; a missing token and a null one are the same."""
    body = delegation(delayed("a"), delayed("b", on_disconnect="cancel"), homeserver="Example.ORG:8448", token=None)
    wanted = read_delegation(json.dumps(body).encode(), SETTINGS)
    assert (wanted.homeserver, wanted.token) == ("example.org:8448", None)
    assert [event.on_disconnect for event in wanted.delayed_events] == ["send", "cancel"]
    assert read_delegation(json.dumps(delegation(delayed(delay_ms=60000.0))).encode(), SETTINGS).delayed_events[0].delay_ms == 60_000
    assert "syd" not in repr(read_delegation(json.dumps(delegation()).encode(), SETTINGS))
