"""One Synapse for all end-to-end tests: it takes some seconds to start."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from sfu_delegate.demo.processes import free_ports
from sfu_delegate.demo.synapse import Federation, Synapse, installed

from tests.e2e.federation import HOST
from tests.integration.certificates import Certificates


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Whose certificates the tests' homeservers have."""
    return Certificates(tmp_path_factory.mktemp("authority"))


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def synapse(tmp_path_factory: pytest.TempPathFactory, authority: Certificates) -> AsyncIterator[Synapse]:
    """A real Synapse, with its default rate limit of delayed events' management.

    Its server name has a port, so that server discovery finds its federation API on this machine.
    """
    if not installed():
        pytest.skip("matrix-synapse is not installed")
    [port] = free_ports(1)
    federation = Federation(HOST, port, authority.file(HOST))
    async with Synapse(tmp_path_factory.mktemp("synapse"), server_name=f"{HOST}:{port}", federation=federation) as running:
        yield running
