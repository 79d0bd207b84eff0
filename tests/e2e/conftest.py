"""One Synapse for all end-to-end tests: it takes some seconds to start."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from sfu_delegate.demo.synapse import Synapse, installed


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def synapse(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Synapse]:
    """A real Synapse, with its default rate limit of delayed events' management."""
    if not installed():
        pytest.skip("matrix-synapse is not installed")
    async with Synapse(tmp_path_factory.mktemp("synapse")) as running:
        yield running
