"""What a client sends to delegate: its form, and the errors that say how to mend it.

Values are never repeated in an error, only names of fields: delay_ids and tokens are secrets.
"""

import re
import unicodedata
from collections.abc import Iterable
from typing import Annotated, Any, Final, Literal, cast

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from sfu_delegate.api.body import parse_object
from sfu_delegate.api.errors import MatrixError, printable
from sfu_delegate.api.services import Settings
from sfu_delegate.matrix.names import is_server_name

MAX_DELAY_ID: Final = 255  # characters
MAX_TOKEN: Final = 4096  # characters
_MOST_PROBLEMS: Final = 5
_TOKEN = re.compile(r"[!-~]+")


def _wrong(sentence: str) -> PydanticCustomError:
    return PydanticCustomError("sfu_delegate", cast(Any, sentence))


def _delay_id(value: str) -> str:
    if any(unicodedata.category(character) == "Cc" for character in value):
        raise _wrong("must not have control characters; give the delay_id as the homeserver gave it")
    return value


def _homeserver(value: str) -> str:
    if not is_server_name(value):
        raise _wrong("is not a Matrix server name; give what stands behind the first colon of the user ID, such as example.org, and no URL")
    return value.lower()


def _token(value: str) -> str:
    if not _TOKEN.fullmatch(value):
        raise _wrong("must be printable ASCII without spaces; give the scoped token alone, without Bearer")
    return value


def _whole(value: object) -> object:
    # To JSON, 60000.0 is the same number as 60000; some serialisers write it so.
    return int(value) if isinstance(value, float) and value.is_integer() else value


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, hide_input_in_errors=True)


class DelayedEventBody(_Strict):
    """One delayed event, as a client hands it over."""

    delay_id: Annotated[str, Field(min_length=1, max_length=MAX_DELAY_ID, repr=False), AfterValidator(_delay_id)]
    delay_ms: Annotated[int, BeforeValidator(_whole)]
    on_disconnect: Literal["send", "cancel"] = "send"


class DelegationBody(_Strict):
    """The body of `POST /v1/delegations`. `homeserver` is in lower case."""

    homeserver: Annotated[str, AfterValidator(_homeserver)]
    delayed_events: Annotated[list[DelayedEventBody], Field(min_length=1)]
    token: Annotated[str, Field(min_length=1, max_length=MAX_TOKEN), AfterValidator(_token)] | None = Field(None, repr=False)


def read_delegation(body: bytes, settings: Settings) -> DelegationBody:
    """The body, checked against its form and the configured limits. Raises MatrixError (400)."""
    fields = parse_object(body)
    try:
        wanted, problems = DelegationBody.model_validate(fields), None
    except ValidationError as error:
        wanted, problems = None, error.errors(include_url=False, include_context=True, include_input=False)
    if wanted is None:  # out here: pydantic's error must not travel along as the context
        raise MatrixError(400, "M_BAD_JSON", _sentences(_problem(details) for details in problems or ()))
    beyond = list(_beyond_limits(wanted, settings))
    if beyond:
        raise MatrixError(400, "M_INVALID_PARAM", _sentences(beyond))
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


def _sentences(problems: Iterable[str]) -> str:
    found = list(dict.fromkeys(problems))
    more = [f"… and {len(found) - _MOST_PROBLEMS} more"] if len(found) > _MOST_PROBLEMS else []
    return " ".join(f"{problem}." for problem in [*found[:_MOST_PROBLEMS], *more])


def _problem(details: ErrorDetails) -> str:
    context = details.get("ctx", {})
    match details["type"]:
        case "sfu_delegate":
            text = details["msg"]
        case "missing":
            text = "is required"
        case "extra_forbidden":
            text = "is not a field that is known here; remove it"
        case "string_type":
            text = "must be a string"
        case "string_unicode":
            text = "is not valid Unicode: it has half of a character (a lone surrogate)"
        case "string_too_short":
            text = "must not be empty"
        case "string_too_long":
            text = f"is too long; {context.get('max_length')} characters are the most"
        case "int_type" | "int_from_float" | "int_parsing" | "int_parsing_size":
            text = "must be an integer, in milliseconds, without quotes and without a fraction"
        case "literal_error":
            text = 'must be "send" or "cancel"'
        case "list_type":
            text = "must be a list of objects"
        case "too_short":
            text = "must have at least one delayed event"
        case "model_type" | "model_attributes_type":
            text = 'must be an object such as {"delay_id": …, "delay_ms": 3600000}'
        case _:
            text = "has a value that is not accepted"
    return f"{_path(details['loc'])}: {text}"


def _path(location: tuple[int | str, ...]) -> str:
    parts = [f"[{part}]" if isinstance(part, int) else f".{printable(part)}" for part in location]
    return "".join(parts).removeprefix(".") or "the body"
