"""Webhook requests, signed as LiveKit signs them."""

import json
from base64 import b64encode
from hashlib import sha256
from typing import Any

import jwt
from sfu_delegate.livekit.keys import SfuKey

PATH = "/webhooks/livekit"


def signature(key: SfuKey, body: bytes, now: float, ttl: float = 300.0) -> str:
    """The `Authorization` header: the bare JWT with the body's hash."""
    claims = {"iss": key.key, "nbf": int(now), "exp": int(now + ttl), "sha256": b64encode(sha256(body).digest()).decode()}
    return jwt.encode(claims, key.secret, "HS256")


async def send(client: Any, key: SfuKey, event: Any, now: float) -> Any:
    """Send one; `event` is its body, or what becomes its JSON."""
    body = event if isinstance(event, bytes) else json.dumps(event).encode()
    headers = {"Authorization": signature(key, body, now), "Content-Type": "application/webhook+json"}
    return await client.post(PATH, data=body, headers=headers)
