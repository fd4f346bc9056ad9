"""Workers open their connections to Postgres when they start, and keep them open while no request comes."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import hello
from tests.support.postgres import PASSWORD, Database
from tests.support.service import Service
from tests.support.wait import wait_until

OPENED = sum(pool.size for pool in hello.POOLS)  # by a worker
PIDS = "SELECT pid FROM pg_stat_activity WHERE application_name = %s"
END_SESSIONS = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s"


@pytest.fixture
def with_passwords() -> Iterator[Database]:
    """A Postgres, not started, that asks the role of the service for its password."""
    server = Database()
    server.start()
    server.prepare()
    server.query(f"ALTER ROLE hello PASSWORD '{PASSWORD}'")
    (server.folder / "pg_hba.conf").write_text("local all postgres trust\nlocal all hello scram-sha-256\n")
    server.kill()
    yield server
    server.stop()


def test_every_connection_is_opened_before_the_first_request_and_again_when_it_is_lost(
    postgres: Database, database: dict[str, str], tmp_path: Path
) -> None:
    with Service(tmp_path, database) as service:
        wait_until(lambda: postgres.connections(service.name) == 2 * OPENED)
        assert service.put("Quux").status == 204
        assert postgres.connections(service.name) == 2 * OPENED
        lost = set(postgres.query(PIDS, service.name))
        postgres.query(END_SESSIONS, service.name)
        wait_until(lambda: len(set(postgres.query(PIDS, service.name)) - lost) == 2 * OPENED)


def test_start_without_a_database_answers_503_and_a_password_that_changes_later_gives_none(
    with_passwords: Database, tmp_path: Path
) -> None:
    with Service(tmp_path, with_passwords.service_environment, WEB_CONCURRENCY="1") as service:
        assert service.ask("GET", "/hello/Quux").status == 503
        with_passwords.start()
        wait_until(lambda: with_passwords.connections(service.name) == OPENED)
        assert service.ask("GET", "/hello/Quux").status == 404
        with_passwords.query("ALTER ROLE hello PASSWORD 'another'")
        saved = {service.put("Quux").status for _ in range(20)}
        found = {service.ask("GET", "/hello/Quux").status for _ in range(20)}
    assert (saved, found) == ({204}, {200})
