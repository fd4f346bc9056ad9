"""What every test file shares: a Postgres of the tests' own, and the environment that reaches it."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import embedded

ROOT = Path(__file__).parent

# The tests say which settings they use; those of whoever runs them, and their database, are not touched.
for name in list(os.environ):
    if name.startswith("PG") or name in {"TZ", "PORT", "METRICS_PORT", "WEB_CONCURRENCY", "BATCH_SIZE"}:
        del os.environ[name]


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[embedded.Postgres]:
    """Start a Postgres for the whole run, and point libpq's environment at it."""
    server = embedded.Postgres(tmp_path_factory.mktemp("postgres") / "data")
    server.start()
    os.environ.update(server.environment)
    yield server
    server.stop()
