"""What every test file shares: a Postgres of the tests' own, and the environment that reaches it."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.support.network import free_port
from tests.support.postgres import Database

ROOT = Path(__file__).parent

# The tests choose the settings that they need; those of the shell, and its database, must not reach them.
settings = {line.partition("=")[0] for line in (ROOT / ".env.example").read_text().splitlines()}
for name in list(os.environ):
    if name in settings or name.startswith("PG"):
        del os.environ[name]

# The same examples in each run
hypothesis.settings.register_profile("reproducible", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("reproducible")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Database]:
    """Start a Postgres for the whole run, and point libpq's environment at it."""
    server = Database(port=str(free_port()), listen_addresses="localhost")
    server.start()
    os.environ.update(server.environment)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def database(postgres: Database) -> dict[str, str]:
    """The environment of a database with the schema applied."""
    subprocess.run([sys.executable, "hello.py", "init-db"], check=True, cwd=ROOT)
    return postgres.environment


@pytest.fixture
def table(postgres: Database, database: dict[str, str]) -> Database:
    """The database with the table emptied; its methods use connections of their own."""
    postgres.query("TRUNCATE users")
    return postgres


@pytest.fixture
def report(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Keep a line about what a test measured; the end of the run shows it."""
    return lambda text: record_property("report", text)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests gave to the fixture `report`, also those that passed."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])]
    lines = [
        f"{r.nodeid.split('::')[-1]}: {text}" for r in reports for name, text in r.user_properties if name == "report"
    ]
    if lines:
        terminalreporter.section("measured")
        terminalreporter.write_line("\n".join(lines))
