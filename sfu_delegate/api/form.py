"""What the bodies of all endpoints have in common: how a form is checked, and the sentences that say how to mend it.

Values are never repeated in an error, only names of fields: delay_ids and tokens are secrets.
"""

import unicodedata
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Final, TypeVar, cast

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from sfu_delegate.api.errors import MatrixError, printable
from sfu_delegate.matrix.names import is_server_name

MAX_DELAY_ID: Final = 255  # characters
_MOST_PROBLEMS: Final = 5


class Form(BaseModel):
    """A JSON object with known fields only."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, hide_input_in_errors=True)


F = TypeVar("F", bound=Form)


def wrong(sentence: str) -> PydanticCustomError:
    """What a validator raises; `sentence` continues the name of the field."""
    return PydanticCustomError("sfu_delegate", cast(Any, sentence))


def plain_text(value: str) -> str:
    """A validator: no control characters."""
    if not value.isprintable() and any(unicodedata.category(character) == "Cc" for character in value):
        raise wrong("must not have control characters; give it as the homeserver gave it")
    return value


def _server_name(value: str) -> str:
    if not is_server_name(value):
        raise wrong("is not a Matrix server name; give what stands behind the first colon of the user ID, such as example.org, and no URL")
    return value.lower()


def whole(value: object) -> object:
    """A validator: to JSON, 60000.0 is the same number as 60000, and some serialisers write it so."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


DelayId = Annotated[str, Field(min_length=1, max_length=MAX_DELAY_ID), AfterValidator(plain_text)]
"""To be given `Field(repr=False)`: whoever knows it can end the event."""
Integer = Annotated[int, BeforeValidator(whole)]
ServerName = Annotated[str, AfterValidator(_server_name)]
"""In lower case."""


def read(form: type[F], fields: Mapping[str, Any], texts: Mapping[str, str] | None = None) -> F:
    """The form, filled in. `texts` say what is wrong, for some of pydantic's types of errors. Raises MatrixError (400 M_BAD_JSON)."""
    try:
        return form.model_validate(fields)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=True, include_input=False)
    # Out here: pydantic's error must not travel along as the context.
    raise MatrixError(400, "M_BAD_JSON", sentences(_problem(details, texts or {}) for details in problems))


def sentences(problems: Iterable[str]) -> str:
    """All problems in one text; of very many the first ones."""
    found = list(dict.fromkeys(problems))
    more = [f"… and {len(found) - _MOST_PROBLEMS} more"] if len(found) > _MOST_PROBLEMS else []
    return " ".join(f"{problem}." for problem in [*found[:_MOST_PROBLEMS], *more])


def _problem(details: ErrorDetails, texts: Mapping[str, str]) -> str:
    context = details.get("ctx", {})
    match details["type"]:
        case "sfu_delegate":
            text = details["msg"]
        case kind if kind in texts:
            text = texts[kind]
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
            text = "must be an integer, without quotes and without a fraction"
        case "model_type" | "model_attributes_type":
            text = "must be an object"
        case _:
            text = "has a value that is not accepted"
    return f"{_path(details['loc'])}: {text}"


def _path(location: tuple[int | str, ...]) -> str:
    parts = [f"[{part}]" if isinstance(part, int) else f".{printable(part)}" for part in location]
    return "".join(parts).removeprefix(".") or "the body"
