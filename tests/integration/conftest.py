"""The fixture that lets the tests of a daemon run on both databases."""

from collections.abc import Iterator

import pytest

from tests import stores
from tests.integration import databases


@pytest.fixture(params=stores.KINDS)
def database(request: pytest.FixtureRequest) -> Iterator[str]:
    """Which database the daemons of the test have."""
    with databases.chosen(request.param):
        yield request.param
