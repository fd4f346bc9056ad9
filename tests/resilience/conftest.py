"""A Postgres to break, and services on it."""

import resource
from collections.abc import Iterator

import pytest

from tests.support.postgres import Database
from tests.support.service import SHORT_TIMEOUTS, Service


@pytest.fixture(scope="module")
def database() -> Iterator[Database]:
    """A Postgres that a file's tests break and mend."""
    server = Database(max_connections="30")
    server.start()
    server.prepare()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def service(database: Database, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with a quarter of the default timeouts; no test may cost it a worker."""
    with Service(tmp_path_factory.mktemp("service"), database.service_environment, **SHORT_TIMEOUTS) as service:
        workers = service.workers()
        yield service
        assert service.workers() == workers


@pytest.fixture(scope="module")
def default_service(database: Database, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with the default timeouts; no test may cost it a worker."""
    with Service(tmp_path_factory.mktemp("default"), database.service_environment) as service:
        workers = service.workers()
        yield service
        assert service.workers() == workers


@pytest.fixture(scope="session")
def many_files() -> None:
    """Let this process open thousands of sockets."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192) if hard > 0 else 8192, hard))
