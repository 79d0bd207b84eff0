"""What a MatrixRTC client says to the daemon: Element Call's bodies, with an OpenID token of its homeserver."""

import uuid
from dataclasses import dataclass, field
from typing import Any

from sfu_delegate.demo.matrix import V3, Account

from tests.e2e.call import HOUR_MS, Client, MatrixCall

GET_TOKEN, SFU_GET, DELEGATE = "/get_token", "/sfu/get", "/delegate_delayed_leave"
SLOT = "m.call#ROOM"

Json = dict[str, Any]


@dataclass(slots=True)
class RtcClient(Client):
    """One device; `token` is the LiveKit token that it got last."""

    openid: Json = field(default_factory=dict, repr=False)
    member_id: str = field(default_factory=lambda: str(uuid.uuid4()))

    def body(self, endpoint: str, room_id: str, *, delayed: bool = False) -> Json:
        """What it sends to that endpoint for a call in this room; `delayed`: with its leave event."""
        body: Json = {"openid_token": self.openid}
        if endpoint == SFU_GET:
            body |= {"room": room_id, "device_id": self.account.device_id}
        else:
            member = {"id": self.member_id, "claimed_user_id": self.account.user_id, "claimed_device_id": self.account.device_id}
            body |= {"room_id": room_id, "slot_id": SLOT, "member": member}
        if delayed:
            body |= {"delay_id": self.delay_id, "delay_timeout": self.delay_ms, "delay_cs_api_url": "http://192.0.2.1"}
        return body


async def user_with_openid(call: MatrixCall, account: Account, delay_ms: int = HOUR_MS) -> RtcClient:
    """A device to which its homeserver has just issued an OpenID token."""
    token = await call.homeserver.client.call("POST", f"{V3}/user/{account.user_id}/openid/request_token", account, {})
    return RtcClient(account, "", delay_ms, openid=token)


async def post(call: MatrixCall, endpoint: str, body: Json) -> tuple[int, Json]:
    """HTTP status and decoded answer."""
    async with call.http.post(call.daemon.public_url + endpoint, json=body) as response:
        return response.status, await response.json()


async def ask(call: MatrixCall, endpoint: str, client: RtcClient, *, delayed: bool = False) -> tuple[int, Json]:
    """The client asks, and keeps the LiveKit token that it gets."""
    status, answer = await post(call, endpoint, client.body(endpoint, call.room_id, delayed=delayed))
    client.token = answer.get("jwt", client.token)
    return status, answer
