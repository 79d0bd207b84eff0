"""The federation on loopback: a second homeserver that vouches as it is told."""

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from tests.integration.federation_stand_in import Server

HOST = "localhost"  # in a server name with a port, it is found without `.well-known` and SRV records
USERINFO = "/_matrix/federation/v1/openid/userinfo"


class Vouching:
    """A homeserver of which there is only what says whose an OpenID token is."""

    def __init__(self) -> None:
        self.owners: dict[str, str] = {}  # what it says, by token: it may lie
        self._server = Server(self._answer)

    @property
    def name(self) -> str:
        """Its server name."""
        return f"{HOST}:{self._server.port}"

    @property
    def asked(self) -> list[str]:
        """The paths of the requests that came, with their queries."""
        return [path for _, path in self._server.asked]

    @property
    def handshakes(self) -> int:
        """How many connections got as far as a TLS handshake."""
        return len(self._server.tls_names)

    def issue(self, token: str, user_id: str) -> dict[str, Any]:
        """An OpenID token as its users get it, which belongs to this user by its word."""
        self.owners[token] = user_id
        return {"access_token": token, "token_type": "Bearer", "matrix_server_name": self.name, "expires_in": 3600}

    @asynccontextmanager
    async def listening(self, context: ssl.SSLContext) -> AsyncIterator["Vouching"]:
        """On a port of its own, as whoever the certificate says."""
        async with self._server.listening(context):
            yield self

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        owner = self.owners.get(request.query.get("access_token", "")) if request.path == USERINFO else None
        if owner is None:
            return web.json_response({"errcode": "M_UNKNOWN_TOKEN", "error": "Unknown token"}, status=401)
        return web.json_response({"sub": owner})
