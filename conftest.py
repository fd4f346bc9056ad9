"""What every test file shares: a Postgres of the tests' own, and the environment that reaches it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools import embedded_postgres as embedded

ROOT = Path(__file__).parent

# The tests say which settings they use; those of whoever runs them, and their database, are not touched.
for name in list(os.environ):
    if name.startswith("PG") or name in {"TZ", "PORT", "METRICS_PORT", "WEB_CONCURRENCY", "BATCH_SIZE"}:
        del os.environ[name]


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[embedded.Postgres]:
    """Start a Postgres for the whole run, and point libpq's environment at it."""
    server = embedded.Postgres(
        tmp_path_factory.mktemp("postgres") / "data", port=str(embedded.free_port()), listen_addresses="localhost"
    )
    server.start()
    os.environ.update(server.environment)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def database(postgres: embedded.Postgres) -> dict[str, str]:
    """The environment of a database with the schema applied."""
    subprocess.run([sys.executable, "hello.py", "init-db"], check=True, cwd=ROOT)
    return postgres.environment


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the figures that tests measured and kept with `record_property("figures", text)`, also where all passed."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])]
    lines = [
        f"{r.nodeid.split('::')[-1]}: {text}" for r in reports for name, text in r.user_properties if name == "figures"
    ]
    if lines:
        terminalreporter.section("figures")
        terminalreporter.write_line("\n".join(lines))
