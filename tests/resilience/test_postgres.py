"""Postgres is killed, restarted, suspended, locked, full or read-only while clients are at work."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import psycopg2
import pytest

from tests.support.load import Load, letters, open_all_connections
from tests.support.network import silent_port
from tests.support.postgres import Database
from tests.support.service import CONNECTIONS, SHORT_TIMEOUTS, Service, body
from tests.support.wait import in_thread, wait_until

IN_TIME = 1.125 + 2  # seconds: QUEUE_TIMEOUT + DATABASE_TIMEOUT of SHORT_TIMEOUTS, and a margin for a busy machine
DEFAULT_IN_TIME = 4.5 + 2
SOON = 5  # seconds within which a success must follow once the database is back
# Of the roles that are no superusers
ROOM = "SELECT current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int"
ANSWERED = {200, 204, 404}  # 404: the PUT of a new user was answered 503


def test_postgres_killed_under_load_loses_no_acknowledged_put(
    database: Database, service: Service, report: Callable[[str], None]
) -> None:
    with Load(service, database) as load:
        load.wait_for_answers(200)
        database.kill()
        load.wait_for_answers(50, [503])
        database.start()
        started = time.monotonic()
        load.wait_for_answers(200)
    report(f"{load.report()}; first success {load.first_success(started):.2f} s after the recovery")
    assert set(load.statuses) <= ANSWERED | {503}
    assert load.first_success(started) < SOON
    assert load.slowest < IN_TIME


def test_postgres_suspended_is_503_in_time_and_livez_stays_fast_with_the_default_timeouts(
    database: Database, default_service: Service, report: Callable[[str], None]
) -> None:
    open_all_connections(default_service, database)
    alive: list[float] = []
    with Load(default_service, database, 64) as load:
        load.wait_for_answers(200)
        with database.suspended():
            readiness = in_thread(default_service.ask, "GET", "/readyz")
            start = time.monotonic()
            # A request that waits without a bound is not answered here.
            while not readiness.done() or not all(client.has_met(503) for client in load.clients):
                assert time.monotonic() < start + DEFAULT_IN_TIME
                answer = default_service.ask("GET", "/livez")
                assert answer.status == 200
                alive.append(answer.seconds)
                time.sleep(0.01)  # a closed loop would take the CPU from the load
        resumed = time.monotonic()
        load.wait_for_answers(200)
    report(
        f"{load.report()}; /livez {len(alive)} times, slowest {max(alive) * 1000:.0f} ms; "
        f"first success {load.first_success(resumed):.2f} s after SIGCONT"
    )
    assert readiness.result().status == 503
    assert set(load.statuses) <= ANSWERED | {503}
    assert load.slowest < DEFAULT_IN_TIME
    assert max(alive) < 1  # a worker that waited for Postgres would take CONNECT_TIMEOUT, which is 1 s, or longer
    assert load.first_success(resumed) < SOON
    # Connections that timed out while they were opened were closed.
    wait_until(lambda: database.connections(default_service.name) <= CONNECTIONS)


def connections_to(service: Service, port: int) -> list[object]:
    """Return the connections of a service's workers to a port, also those that are still being opened."""
    workers = [psutil.Process(pid) for pid in service.workers()]
    return [c for worker in workers for c in worker.net_connections() if c.raddr[1:] == (port,)]


def test_connection_that_was_not_opened_in_time_is_closed(database: Database, tmp_path: Path) -> None:
    with silent_port() as port:
        nowhere = database.hosts(("127.0.0.1", port))
        with Service(tmp_path, nowhere, WEB_CONCURRENCY="1", **SHORT_TIMEOUTS) as service:
            puts = [in_thread(service.put, f"Silent{letters(index)}") for index in range(8)]
            assert {put.result().status for put in puts} == {503}
            # The server might wake up and complete them. Between two attempts to open them again there are none.
            wait_until(lambda: connections_to(service, port) == [])


@pytest.fixture
def silent_resolver(tmp_path: Path) -> Iterator[tuple[list[str], socket.socket]]:
    """Yield a command prefix that gives a process a name server which does not answer, and that server's socket."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("only root can give a process a resolv.conf of its own")
    address = f"127.53.{os.getpid() // 250 % 250}.{os.getpid() % 250 + 1}"  # of this process alone
    (tmp_path / "resolv.conf").write_text(f"nameserver {address}\noptions timeout:10 attempts:1\n")
    script = f'mount --bind {tmp_path}/resolv.conf /etc/resolv.conf && exec "$@"'
    if subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("mount namespaces are not permitted here")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((address, 53))
        server.setblocking(False)
        yield ["unshare", "--mount", "sh", "-c", script, "sh"], server


def test_silent_name_server_is_503_in_time_and_holds_up_neither_livez_nor_a_stop(
    database: Database, tmp_path: Path, silent_resolver: tuple[list[str], socket.socket]
) -> None:
    prefix, server = silent_resolver
    environment = database.hosts(("database.example", 5432))
    with Service(tmp_path, environment, prefix=prefix, WEB_CONCURRENCY="1", **SHORT_TIMEOUTS) as service:
        puts = [in_thread(service.put, f"Nameless{letters(index)}") for index in range(8)]
        alive = []
        while not all(put.done() for put in puts):
            alive.append(service.ask("GET", "/livez"))
            time.sleep(0.01)
        service.process.terminate()
        start = time.monotonic()
        assert service.process.wait(20) == 0
        assert time.monotonic() - start < 6  # a lookup takes 10 s
    assert server.recv(512)  # it was asked
    assert {put.result().status for put in puts} == {503}
    assert max(put.result().seconds for put in puts) < IN_TIME
    assert {answer.status for answer in alive} == {200}
    assert max(answer.seconds for answer in alive) < 2  # a worker that waited for the name would take 10 s


def put_until(end: float, service: Service) -> list[int]:
    """Send one PUT of the locked row after the other; return their statuses."""
    statuses = []
    while time.monotonic() < end:
        statuses.append(service.put("Locked", "1991-01-01").status)
    return statuses


def test_row_locked_for_long_gives_no_other_user_a_503_at_the_default_settings(
    database: Database, default_service: Service, report: Callable[[str], None]
) -> None:
    assert default_service.put("Locked", "1990-01-01").status == 204
    with Load(default_service, database, 8) as load:
        load.wait_for_answers(50)
        with database.locked("SELECT FROM users WHERE username = 'Locked' FOR UPDATE"):
            end = time.monotonic() + 4
            clients = [in_thread(put_until, end, default_service) for _ in range(32)]  # so each batch has one
            statuses = [status for client in clients for status in client.result()]
    report(f"{load.report()}; {len(statuses)} PUTs of the locked row")
    assert set(statuses) == {503}
    assert set(load.statuses) == {200, 204}
    assert database.rows()["Locked"].year == 1990


@pytest.fixture(scope="module")
def impatient_service(database: Database, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service whose statements end long before it gives up on Postgres."""
    limits = {"STATEMENT_TIMEOUT": "0.25", "DATABASE_TIMEOUT": "10", "WEB_CONCURRENCY": "1"}
    with Service(tmp_path_factory.mktemp("impatient"), database.service_environment, **limits) as service:
        yield service


@pytest.mark.parametrize("operation", ["PUT", "GET"])
def test_row_or_table_that_is_locked_is_503_after_the_statement_timeout(
    database: Database, impatient_service: Service, operation: str
) -> None:
    lock = "SELECT FROM users WHERE username = 'Locked' FOR UPDATE" if operation == "PUT" else "LOCK TABLE users"
    content = body("1991-01-01") if operation == "PUT" else None
    assert impatient_service.put("Locked", "1990-01-01").status == 204
    with database.locked(lock):
        answers = [impatient_service.ask(operation, "/hello/Locked", content) for _ in range(2)]
        other = impatient_service.put("Free")
    assert [answer.status for answer in answers] == [503, 503]
    assert max(answer.seconds for answer in answers) < 5  # and not DATABASE_TIMEOUT
    assert other.status == (204 if operation == "PUT" else 503)  # a row lock affects only that row
    assert database.rows()["Locked"].year == 1990
    assert impatient_service.ask(operation, "/hello/Locked", content).status in {200, 204}


def test_table_locked_under_load_is_503_in_time(
    database: Database, service: Service, report: Callable[[str], None]
) -> None:
    with Load(service, database, 64) as load, database.connection_counts(service.name) as counts:
        load.wait_for_answers(200)
        with database.locked("LOCK TABLE users"):
            load.wait_for_answers(200, [503])
        released = time.monotonic()
        load.wait_for_answers(200)
    report(f"{load.report()}; connections at most {max(counts)}")
    assert set(load.statuses) <= ANSWERED | {503}
    assert load.slowest < IN_TIME
    assert load.first_success(released) < SOON
    # A backend whose client gave up holds its connection until the statement timeout ends its wait for the lock.
    assert max(counts) <= 2 * CONNECTIONS
    wait_until(lambda: database.connections(service.name) <= CONNECTIONS)


def test_server_without_a_free_connection_is_503_until_there_is_one(
    database: Database, service: Service, report: Callable[[str], None]
) -> None:
    open_all_connections(service, database)
    database.query("CREATE ROLE other LOGIN")
    [(room,)] = database.query(ROOM)
    with contextlib.ExitStack() as others:
        taken: list[Any] = []

        def others_have_all() -> bool:
            """Take every connection; one that is just ending is not free yet, and the service could have it later."""
            database.disconnect_service()
            with contextlib.suppress(psycopg2.OperationalError):
                while True:
                    taken.append(others.enter_context(contextlib.closing(database.connect("other"))))
            return len(taken) == room

        wait_until(others_have_all)
        with Load(service, database) as load:
            load.wait_for_answers(100, [503])
            refused = load.statuses
            others.close()
            released = time.monotonic()
            load.wait_for_answers(100)
    report(f"{load.report()}; first success {load.first_success(released):.2f} s after there was room")
    assert set(refused) == {503}
    assert set(load.statuses) <= ANSWERED | {503}
    assert load.first_success(released) < SOON


@contextlib.contextmanager
def file_size_limit(database: Database) -> Iterator[Callable[[], None]]:
    """Let no file of the server grow beyond the table's size; yield what lifts that."""
    if shutil.which("prlimit") is None:
        pytest.skip("there is no prlimit (of util-linux) here")
    # Beyond 16 MiB, which a WAL file has from the start; four rows of this size fill a page to its last byte.
    database.query("INSERT INTO users SELECT lpad(n::text, 2000, 'x'), '1990-05-17' FROM generate_series(1, 8800) n")

    def limit(size: int | str) -> None:
        for process in database.processes():
            command = ["prlimit", f"--pid={process.pid}", f"--fsize={size}:"]
            user: dict[str, Any] = {}
            with contextlib.suppress(psutil.NoSuchProcess):  # a backend that has ended meanwhile
                if os.geteuid() == 0:  # which may not have the capability that the limits of others need
                    user = {"user": process.uids().real, "group": process.gids().real, "extra_groups": []}
                done = subprocess.run(command, check=False, capture_output=True, **user)
                assert done.returncode == 0 or not process.is_running(), done.stderr

    limit(database.query("SELECT pg_relation_size('users')")[0][0])
    try:
        yield lambda: limit("unlimited")
    finally:
        limit("unlimited")
        database.query("DELETE FROM users WHERE username LIKE 'xxx%'")
        database.query("VACUUM FULL users")


def test_disk_that_is_full_refuses_put_and_serves_get(
    database: Database, service: Service, report: Callable[[str], None]
) -> None:
    assert service.put("Early").status == 204
    with file_size_limit(database) as make_room, Load(service, database, pause=0) as load:
        load.wait_for_answers(20, [503])
        during = [service.ask("GET", "/hello/Early").status for _ in range(10)]
        make_room()
        load.wait_for_answers(50, [204])
        after = [service.put(f"Roomy{letters(index)}").status for index in range(10)]
    report(load.report())
    assert during == [200] * 10
    assert set(load.statuses) <= ANSWERED | {503}
    assert after == [204] * 10
