"""What comes through a homeserver to the endpoints of MSC4195: their forms, in the proposal's shape and in that of deployed clients.

Fields that are not known here are ignored, as everywhere in Matrix's APIs: the proposal may get more of them. No value of a body is repeated in an
error.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Final

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from sfu_delegate.api.body import parse_object
from sfu_delegate.api.errors import MatrixError
from sfu_delegate.api.form import DelayId, Form, ServerName, plain_text, read, wrong
from sfu_delegate.api.matrixrtc_body import MAX_MEMBER_ID, Device, Identities, Name
from sfu_delegate.livekit import names

MAX_URL: Final = 2048  # characters

MemberId = Annotated[str, Field(min_length=1, max_length=MAX_MEMBER_ID)]
Url = Annotated[str, Field(min_length=1, max_length=MAX_URL), AfterValidator(plain_text)]


class _Lenient(Form):
    model_config = ConfigDict(extra="ignore")


class MemberBody(_Lenient):
    """Who the client says that it is, as deployed clients do."""

    id: MemberId
    claimed_user_id: Name | None = None
    claimed_device_id: Device | None = None


class _Membership(_Lenient):
    """A member of a call, and the SFU that is meant."""

    url: Url
    room_id: Name
    slot_id: Name
    member_id: MemberId | None = None
    member: MemberBody | None = None

    @model_validator(mode="after")
    def _one_member(self) -> "_Membership":
        if self.member_id is None and self.member is None:
            raise wrong('must have member_id (or, as deployed clients send it, member: {"id", "claimed_device_id"})')
        if self.member_id is not None and self.member is not None and self.member_id != self.member.id:
            raise wrong("has two members: member_id and member.id must be the same; give one of them")
        return self


class _GetToken(_Membership):
    delay_id: Any = Field(None, repr=False)

    @model_validator(mode="after")
    def _not_delegated_here(self) -> "_GetToken":
        if self.delay_id is not None:
            raise wrong("has a delay_id, which would not be delegated by this endpoint: leave it out, and use /delegate_delayed_leave")
        return self


class GetTokenBody(_GetToken):
    """The body of `POST /_matrix/client/v1/rtc/livekit/get_token`."""

    server_name: ServerName | None = None


class FederatedBody(_GetToken):
    """The body of `POST /_matrix/federation/v1/rtc/livekit/get_token`."""

    user_id: Name


class DelegateBody(_Membership):
    """The body of `POST /_matrix/client/v1/rtc/livekit/delegate_delayed_leave`. A `delay_timeout` is ignored: the homeserver tells the true one."""

    delay_id: DelayId = Field(repr=False)


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked for, in whatever form it came."""

    url: str  # of the SFU
    room_id: str  # Matrix's
    slot_id: str
    member: str
    device: str | None
    claimed_user: str | None  # None: it is not said, and the homeserver's word is all there is
    server: str | None = None  # whose SFU it is, in lower case; None: the user's homeserver's
    delay_id: str | None = field(default=None, repr=False)

    @property
    def room(self) -> str:
        """LiveKit's."""
        return names.room_name(self.room_id, self.slot_id)

    def identities(self, user: str, its_device: str | None = None) -> Identities:
        """The identity that the token is for, and the other forms in which the same client may have got one by a standalone endpoint.

        `its_device`: where the request does not tell it.
        """
        own, device = names.member_identity(user, self.member), self.device or its_device
        if device is None:
            return Identities(own)
        return Identities(own, names.plain_identity(user, device), names.identity(user, device, self.member))


def read_get_token(body: bytes) -> Asked:
    """Raises MatrixError (400)."""
    form = read(GetTokenBody, parse_object(body))
    return _asked(form, server=form.server_name)


def read_federated(body: bytes) -> Asked:
    """`claimed_user` is the user of the other homeserver. Raises MatrixError (400)."""
    form = read(FederatedBody, parse_object(body))
    if form.member is not None and form.member.claimed_user_id not in (None, form.user_id):
        raise MatrixError(400, "M_BAD_JSON", "user_id, member.claimed_user_id: are two users. Give one of them.")
    return _asked(form, user=form.user_id)


def read_delegate(body: bytes) -> Asked:
    """Raises MatrixError (400)."""
    form = read(DelegateBody, parse_object(body))
    return _asked(form, delay_id=form.delay_id)


def _asked(form: _Membership, *, user: str | None = None, server: str | None = None, delay_id: str | None = None) -> Asked:
    member = form.member
    id = form.member_id if member is None else member.id
    assert id is not None  # noqa: S101 — its form requires one
    device = None if member is None else member.claimed_device_id
    claimed = user if member is None or user is not None else member.claimed_user_id
    return Asked(form.url, form.room_id, form.slot_id, id, device, claimed, server, delay_id)
