"""What a client sends to `POST /v1/delegations`: its form, and the errors that say how to mend it."""

import re
from collections.abc import Iterable
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, Field

from sfu_delegate.api.body import parse_object
from sfu_delegate.api.errors import MatrixError
from sfu_delegate.api.form import DelayId, Form, Integer, ServerName, read, sentences, wrong
from sfu_delegate.api.services import Settings

MAX_TOKEN: Final = 4096  # characters
_TOKEN = re.compile(r"[!-~]+")
_INTEGER: Final = "must be an integer, in milliseconds, without quotes and without a fraction"
_TEXTS: Final = {
    "int_type": _INTEGER,
    "int_from_float": _INTEGER,
    "int_parsing": _INTEGER,
    "int_parsing_size": _INTEGER,
    "literal_error": 'must be "send" or "cancel"',
    "list_type": "must be a list of objects",
    "too_short": "must have at least one delayed event",
    "model_type": 'must be an object such as {"delay_id": …, "delay_ms": 3600000}',
    "model_attributes_type": 'must be an object such as {"delay_id": …, "delay_ms": 3600000}',
}


def _token(value: str) -> str:
    if not _TOKEN.fullmatch(value):
        raise wrong("must be printable ASCII without spaces; give the scoped token alone, without Bearer")
    return value


class DelayedEventBody(Form):
    """One delayed event, as a client hands it over."""

    delay_id: DelayId = Field(repr=False)
    delay_ms: Integer
    on_disconnect: Literal["send", "cancel"] = "send"


class DelegationBody(Form):
    """The body of `POST /v1/delegations`. `homeserver` is in lower case."""

    homeserver: ServerName
    delayed_events: Annotated[list[DelayedEventBody], Field(min_length=1)]
    token: Annotated[str, Field(min_length=1, max_length=MAX_TOKEN), AfterValidator(_token)] | None = Field(None, repr=False)


def read_delegation(body: bytes, settings: Settings) -> DelegationBody:
    """The body, checked against its form and the configured limits. Raises MatrixError (400)."""
    wanted = read(DelegationBody, parse_object(body), _TEXTS)
    beyond = list(_beyond_limits(wanted, settings))
    if beyond:
        raise MatrixError(400, "M_INVALID_PARAM", sentences(beyond))
    return wanted


def _beyond_limits(wanted: DelegationBody, settings: Settings) -> Iterable[str]:
    if len(wanted.delayed_events) > settings.max_events:
        yield f"delayed_events: has too many; {settings.max_events} are the most in one delegation"
    least, most = round(settings.min_delay * 1000), round(settings.max_delay * 1000)
    seen: dict[str, int] = {}
    for number, event in enumerate(wanted.delayed_events):
        if not least <= event.delay_ms <= most:
            yield f"delayed_events[{number}].delay_ms: must be from {least} to {most} milliseconds; schedule the event with such a delay"
        first = seen.setdefault(event.delay_id, number)
        if first != number:
            yield f"delayed_events[{number}].delay_id: is that of delayed_events[{first}], too; give each event once"
    if wanted.token is not None and not settings.allow_scoped_tokens:
        yield "token: is not accepted here; leave it out (or its operator allows it by delegations.allow_scoped_tokens)"
