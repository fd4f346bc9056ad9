"""Of several hosts one refuses, is silent, is a standby, or loses its part."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.fault_proxy import FaultProxy
from tests.support.load import Load, open_all_connections
from tests.support.network import LOOPBACK, free_port, silent_port
from tests.support.postgres import Database
from tests.support.replication import replicated
from tests.support.service import SHORT_TIMEOUTS, Service
from tests.support.wait import in_thread, wait_until

READ_WRITE = {"PGTARGETSESSIONATTRS": "read-write"}
IN_TIME = 1.125 + 2  # seconds: QUEUE_TIMEOUT + DATABASE_TIMEOUT of SHORT_TIMEOUTS, and a margin for a busy machine
SOON = 5  # seconds within which a success must follow once there is a server to write to
ANSWERED = {200, 204, 404}  # 404: the PUT of a new user was answered 503


@pytest.fixture(scope="module")
def second() -> Iterator[Database]:
    """A writable server that knows nothing of `database`."""
    server = Database()
    server.start()
    server.prepare()
    yield server
    server.stop()


# --- One of two hosts -------------------------------------------------------------------------------


def test_standby_is_passed_over_until_it_is_promoted_and_then_has_every_acknowledged_put(
    tmp_path: Path, report: Callable[[str], None]
) -> None:
    with replicated() as (primary, standby, _), silent_port() as silent, silent_port(drops=True) as dropping:
        ports = [free_port(), silent, dropping, standby.port, primary.port]
        environment = primary.hosts(*((LOOPBACK, port) for port in ports)) | READ_WRITE
        timeouts = {"CONNECT_TIMEOUT": "0.5", "QUEUE_TIMEOUT": "10", "DATABASE_TIMEOUT": "10"}  # nobody gives up
        with Service(tmp_path, environment, **timeouts) as service, Load(service, primary) as load:
            load.wait_for_answers(200)
        assert set(load.statuses) == {200, 204}

        environment = primary.hosts(*((LOOPBACK, server.port) for server in (primary, standby))) | READ_WRITE
        with Service(tmp_path, environment, **SHORT_TIMEOUTS) as service:
            workers = service.workers()
            with Load(service, standby) as load:
                load.wait_for_answers(200)
                primary.kill()
                load.wait_for_answers(50, [503])
                standby.query("SELECT pg_promote()")
                promoted = time.monotonic()
                load.wait_for_answers(200)
            assert service.workers() == workers
    report(f"{load.report()}; first success {load.first_success(promoted):.2f} s after the promotion")
    assert set(load.statuses) <= ANSWERED | {503}
    assert load.first_success(promoted) < SOON
    assert load.slowest < IN_TIME


def test_operations_that_meet_a_silent_host_together_both_go_on_to_the_next(database: Database, tmp_path: Path) -> None:
    with silent_port() as port:
        environment = database.hosts((LOOPBACK, port), (database.sockets_folder, database.port))
        with Service(tmp_path, environment, WEB_CONCURRENCY="1") as service:
            futures = [in_thread(service.put, "Together"), in_thread(service.ask, "GET", "/readyz")]
            assert [future.result().status for future in futures] == [204, 200]


def test_primary_that_becomes_read_only_is_left_for_the_writable_host_by_put_and_get(
    database: Database, second: Database, tmp_path: Path, report: Callable[[str], None]
) -> None:
    environment = database.hosts(*((server.sockets_folder, server.port) for server in (database, second))) | READ_WRITE
    with Service(tmp_path, environment) as service:
        open_all_connections(service, database)
        with database.set(default_transaction_read_only="on"), Load(service, second) as load:
            load.wait_for_answers(200)
    report(load.report())
    assert set(load.statuses) <= ANSWERED | {503}  # the PUT that met the read-only server is not sent again
    assert load.statuses[503] <= 16  # one batch of each of the two workers, in which each client has one PUT at most


def test_get_that_was_sent_to_another_host_than_puts_returns_to_theirs(
    database: Database, second: Database, tmp_path: Path
) -> None:
    with FaultProxy(f"{database.sockets_folder}/.s.PGSQL.{database.port}") as proxy:
        hosts = database.hosts((LOOPBACK, proxy.port), (second.sockets_folder, second.port))
        timeouts = {"CONNECT_TIMEOUT": "1", "DATABASE_TIMEOUT": "1.5"}
        with Service(tmp_path, hosts, WEB_CONCURRENCY="1", **timeouts) as service:
            assert service.put("Return").status == 204
            assert service.ask("GET", "/hello/Return").status == 200
            proxy.blackhole()
            assert service.ask("GET", "/hello/Return").status == 503
            proxy.heal()
            assert service.ask("GET", "/hello/Return").status == 404  # of the second host, as the first one was silent
            wait_until(
                lambda: service.put("Return").status == 204 and service.ask("GET", "/hello/Return").status == 200
            )
    assert "Return" not in second.rows()
