"""Fixtures of the life tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.life.harness_ranks import Ranks
from tests.life.tiny_life import Forker
from tests.machine_cache import own_machine_cache


@pytest.fixture(scope="package", autouse=True)
def machine_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is measured of the machine is made up."""
    with own_machine_cache(tmp_path_factory.mktemp("cache")):
        yield


@pytest.fixture(scope="package")
def forker(machine_cache: None) -> Iterator[Forker]:
    """The fork server, started when the first test asks for it."""
    server = Forker()
    yield server
    server.close()


@pytest.fixture(scope="package")
def ranks(machine_cache: None) -> Iterator[Ranks]:
    """The server of several processes, started when the first test asks for it."""
    server = Ranks()
    yield server
    server.close()
