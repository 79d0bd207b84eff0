"""What MatrixRTC clients send to the standalone endpoints (MSC4195 as it is deployed): their forms, and the errors that say how to mend them.

Everything that can be refused without asking anybody is refused here, as `M_NOT_JSON` or `M_BAD_JSON`.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Final, NamedTuple

from pydantic import AfterValidator, Field, model_validator

from sfu_delegate.api.body import parse_object
from sfu_delegate.api.errors import MatrixError
from sfu_delegate.api.form import DelayId, Form, Integer, ServerName, plain_text, read, wrong
from sfu_delegate.api.services import Settings
from sfu_delegate.livekit import names

MAX_NAME: Final = 255  # characters: Matrix's own limit for IDs, in bytes
MAX_MEMBER_ID: Final = 512  # … of which some are made of a user and a device
MAX_TOKEN: Final = 4096  # characters
_MODEL: Final = 'must be an object; see "MatrixRTC endpoints" in docs/openapi.yaml'
_TEXTS: Final = {"model_type": _MODEL, "model_attributes_type": _MODEL}


def _device(value: str) -> str:
    if ":" in value:
        # In `user:device`, `@a:example.org` with `8448:D` would be `@a:example.org:8448` with `D`.
        raise wrong("must not have a colon: the participant could be taken for another user's")
    return value


Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME), AfterValidator(plain_text)]
Device = Annotated[Name, AfterValidator(_device)]


class OpenIdBody(Form):
    """The OpenID token, as the homeserver gave it to the client. `matrix_server_name` is in lower case."""

    access_token: Annotated[str, Field(min_length=1, max_length=MAX_TOKEN), AfterValidator(plain_text)] = Field(repr=False)
    matrix_server_name: ServerName
    token_type: str | None = None
    expires_in: Integer | None = None


class MemberBody(Form):
    """Who the client says that it is."""

    id: Annotated[str, Field(min_length=1, max_length=MAX_MEMBER_ID)]
    claimed_user_id: Name
    claimed_device_id: Device


class _Delay(Form):
    """The delayed event, in three fields of which the last counts for nothing: a caller does not choose where requests go."""

    delay_id: DelayId | None = Field(None, repr=False)
    delay_timeout: Integer | None = None
    delay_cs_api_url: Any = Field(None, repr=False)

    @model_validator(mode="after")
    def _both_or_none(self) -> "_Delay":
        if (self.delay_id is None) is not (self.delay_timeout is None):
            raise wrong("delay_id and delay_timeout belong together: give both or none")
        return self


class GetTokenBody(_Delay):
    """The body of `POST /get_token`."""

    room_id: Name
    slot_id: Name
    openid_token: OpenIdBody
    member: MemberBody


class SfuGetBody(_Delay):
    """The body of the legacy `POST /sfu/get`."""

    room: Name
    openid_token: OpenIdBody
    device_id: Device


class DelegateBody(GetTokenBody):
    """The body of `POST /delegate_delayed_leave`: as for a token, but the delayed event must be there."""

    delay_id: DelayId = Field(repr=False)
    delay_timeout: Integer


class Identities(NamedTuple):
    """The forms of one participant's identity: see `Accept`."""

    identity: str
    alias: str | None = None
    twin: str | None = None


@dataclass(frozen=True, slots=True)
class Delay:
    """A delayed event that is to be delegated; `seconds` is its delay."""

    id: str = field(repr=False)
    seconds: float


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked for, in whatever form it came."""

    server: str  # in lower case
    token: str = field(repr=False)
    user: str | None  # the claimed one; None: whoever the token belongs to
    device: str
    room_id: str  # Matrix's
    room: str  # LiveKit's
    member: str | None  # its id, from which the newer form of the identity is made; None: the legacy form
    delay: Delay | None

    def identities(self, user: str) -> Identities:
        """The identity that the token is for, and the other forms in which the same client may have got one.

        A client that got its token from `/sfu/get` and delegates by a newer endpoint is connected under the plain form. The other way round the
        newer forms are not known: the legacy request has no member id.
        """
        plain = names.plain_identity(user, self.device)
        if self.member is None:
            return Identities(plain)
        return Identities(names.identity(user, self.device, self.member), plain, names.member_identity(user, self.member))


def read_get_token(body: bytes, settings: Settings) -> Wanted:
    """Raises MatrixError (400)."""
    return _of(read(GetTokenBody, parse_object(body), _TEXTS), settings)


def read_delegate(body: bytes, settings: Settings) -> Wanted:
    """Raises MatrixError (400)."""
    return _of(read(DelegateBody, parse_object(body), _TEXTS), settings)


def read_sfu_get(body: bytes, settings: Settings) -> Wanted:
    """Raises MatrixError (400)."""
    form = read(SfuGetBody, parse_object(body), _TEXTS)
    openid = form.openid_token
    room = names.room_name(form.room)
    return Wanted(openid.matrix_server_name, openid.access_token, None, form.device_id, form.room, room, None, _delay(form, settings))


def _of(form: GetTokenBody, settings: Settings) -> Wanted:
    openid, member = form.openid_token, form.member
    room = names.room_name(form.room_id, form.slot_id)
    delay = _delay(form, settings)
    user, device = member.claimed_user_id, member.claimed_device_id
    return Wanted(openid.matrix_server_name, openid.access_token, user, device, form.room_id, room, member.id, delay)


def _delay(form: _Delay, settings: Settings) -> Delay | None:
    if form.delay_id is None or form.delay_timeout is None:
        return None
    least, most = round(settings.min_delay * 1000), round(settings.max_delay * 1000)
    if not least <= form.delay_timeout <= most:
        sentence = f"delay_timeout: must be from {least} to {most} milliseconds; schedule the event with such a delay."
        raise MatrixError(400, "M_BAD_JSON", sentence)
    return Delay(form.delay_id, form.delay_timeout / 1000)
