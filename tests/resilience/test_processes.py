"""Workers are killed, replaced and stopped while clients are at work."""

import contextlib
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.support.load import Load
from tests.support.network import RESET_ON_CLOSE, Connection, read_all, responses
from tests.support.postgres import Database
from tests.support.service import CONNECTIONS, Service, body
from tests.support.wait import in_thread, wait_until

ROW_LOCK = "SELECT FROM users WHERE username = 'Locked' FOR UPDATE"
# A lock makes nobody give up.
PATIENT = dict.fromkeys(("QUEUE_TIMEOUT", "STATEMENT_TIMEOUT", "LOCK_TIMEOUT", "DATABASE_TIMEOUT"), "6")
GRACEFUL_TIMEOUT = 8  # seconds, the default; what ends sooner was not cut off


def ports_of(pid: int) -> set[int]:
    """Return the clients' ports of a process's established connections."""
    return {c.raddr.port for c in psutil.Process(pid).net_connections("tcp4") if c.raddr and c.status == "ESTABLISHED"}


def idle_connections(service: Service, stack: contextlib.ExitStack, count: int) -> list[Connection]:
    """Open connections that have had an answer and are kept alive."""
    idle = [stack.enter_context(contextlib.closing(service.connect())) for _ in range(count)]
    for connection in idle:
        assert connection.ask("GET", "/livez").status == 200
    return idle


def is_closed(connection: Connection) -> bool:
    """Wait until the service sends something on an idle connection; return whether that is its end."""
    assert connection.sock is not None
    return connection.sock.recv(1) == b""


def is_refused(service: Service) -> bool:
    """Return whether the service accepts no more connections."""
    with contextlib.suppress(ConnectionRefusedError), service.open_socket():
        return False
    return True


def test_worker_killed_affects_only_its_own_clients_and_is_replaced(
    database: Database, tmp_path: Path, report: Callable[[str], None]
) -> None:
    with Service(tmp_path, database.service_environment) as service, Load(service, database, 32) as load:
        load.wait_for_answers(32 * 4)
        victim, other = service.workers()
        ports = {client: client.connection.sock.getsockname()[1] for client in load.clients if client.connection.sock}
        of_the_victim = {client for client, port in ports.items() if port in ports_of(victim)}
        with database.connection_counts(service.name) as counts:
            psutil.Process(victim).kill()
            killed = time.monotonic()
            wait_until(lambda: len(set(service.workers()) - {victim}) == 2)
            replaced = time.monotonic() - killed
            load.wait_for_answers(300)
        assert other in service.workers()
    report(f"{load.report()}; {load.retried} sent again; replaced after {replaced:.2f} s")
    assert len(ports) == 32
    assert set(load.statuses) == {200, 204}
    assert {client for client in load.clients if client.retried} == of_the_victim
    assert {client.retried for client in of_the_victim} <= {1}
    # The connections of the killed worker may be there for a moment while the new one opens its own.
    assert max(counts) <= CONNECTIONS + CONNECTIONS // 2


def test_sigterm_answers_what_was_begun_and_closes_what_is_idle(
    database: Database, tmp_path: Path, report: Callable[[str], None]
) -> None:
    with Service(tmp_path, database.service_environment | PATIENT) as service, contextlib.ExitStack() as stack:
        assert service.put("Locked").status == 204
        idle = idle_connections(service, stack, 10)
        half = stack.enter_context(service.open_socket())
        request = b"PUT /hello/Halves HTTP/1.1\r\nHost: a\r\nContent-Length: 29\r\n\r\n" + body("1990-05-17")
        half.sendall(request[:40])
        with Load(service, database, 32, pause=0, service_stops=True) as load:
            load.wait_for_answers(200)
            with database.locked(ROW_LOCK):
                slow = in_thread(service.put, "Locked", "1991-01-01")
                database.wait_for_lock_wait()
                service.process.terminate()
                stopping = time.monotonic()
                with contextlib.suppress(ConnectionRefusedError):
                    stack.enter_context(service.open_socket())  # and sends nothing
                assert all(is_closed(connection) for connection in idle)
            half.sendall(request[40:])
            assert slow.result().status == 204
            assert [response.status for response in responses(read_all(half))] == [204]
            assert service.process.wait(20) == 0
            seconds = time.monotonic() - stopping
            wait_until(lambda: not any(client.is_alive() for client in load.clients))
    report(f"{load.report()}; {load.retried} sent again; stopped after {seconds:.2f} s")
    assert seconds < GRACEFUL_TIMEOUT
    assert set(load.statuses) <= {200, 204}
    assert load.retried == 0
    assert database.rows()["Halves"].year == 1990
    assert database.rows()["Locked"].year == 1991


def test_sigterm_closes_the_idle_connections_although_some_were_reset(database: Database, tmp_path: Path) -> None:
    service = Service(tmp_path, database.service_environment, WEB_CONCURRENCY="1")
    with service, contextlib.ExitStack() as stack:
        idle = idle_connections(service, stack, 12)
        probe = stack.enter_context(contextlib.closing(service.connect()))
        (worker,) = map(psutil.Process, service.workers())
        worker.terminate()
        wait_until(lambda: probe.ask("GET", "/livez").headers["Connection"] == "close")  # it drains
        worker.suspend()  # so that it learns of the resets no sooner than it closes the others
        for connection in idle[::2]:
            assert connection.sock is not None
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            connection.close()
        time.sleep(1)  # its time to close them comes while it is suspended
        worker.resume()
        assert all(is_closed(connection) for connection in idle[1::2])
        worker.wait(GRACEFUL_TIMEOUT)
        assert "uncaught" not in service.log_text()


def test_sigterm_answers_all_pipelined_requests_that_have_arrived(database: Database, tmp_path: Path) -> None:
    requests = [b"GET /hello/Nobody HTTP/1.1\r\nHost: a\r\n\r\n"] * 3
    service = Service(tmp_path, database.service_environment | PATIENT, WEB_CONCURRENCY="1")
    with service, contextlib.ExitStack() as stack:
        clients = {together: stack.enter_context(service.open_socket()) for together in (3, 2, 1)}
        with database.locked("LOCK TABLE users"):
            for together, client in clients.items():
                client.sendall(b"".join(requests[:together]))
            database.wait_for_lock_wait()
            for together, client in clients.items():
                client.sendall(b"".join(requests[together:]))
            service.process.terminate()
            wait_until(lambda: is_refused(service))
        for client in clients.values():
            found = responses(read_all(client))
            assert [response.status for response in found] == [404, 404, 404]
            assert [response.headers["Connection"] for response in found] == ["keep-alive", "keep-alive", "close"]
        assert service.process.wait(20) == 0


def test_answer_that_outlasts_the_draining_closes_its_connection(database: Database, tmp_path: Path) -> None:
    service = Service(tmp_path, database.service_environment | PATIENT, WEB_CONCURRENCY="1")
    with service, contextlib.ExitStack() as stack:
        assert service.put("Locked", "1990-01-01").status == 204
        idle = idle_connections(service, stack, 1)
        connection = stack.enter_context(contextlib.closing(service.connect()))
        with database.locked(ROW_LOCK):
            slow = in_thread(connection.ask, "PUT", "/hello/Locked", body("1991-01-01"))
            database.wait_for_lock_wait()
            service.process.terminate()
            assert is_closed(idle[0])  # the idle ones are closed now
        released = time.monotonic()
        assert slow.result().status == 204
        assert slow.result().headers["Connection"] == "close"
        assert service.process.wait(20) == 0
        assert time.monotonic() - released < GRACEFUL_TIMEOUT - 2
    assert database.rows()["Locked"].year == 1991


def test_sighup_replaces_the_workers_and_loses_no_request(
    database: Database, tmp_path: Path, report: Callable[[str], None]
) -> None:
    with Service(tmp_path, database.service_environment) as service:
        before = set(service.workers())
        with (
            Load(service, database, 8) as kept,
            Load(service, database, 8, is_fresh=True) as fresh,
            database.connection_counts(service.name) as counts,
        ):
            kept.wait_for_answers(100)
            service.process.send_signal(signal.SIGHUP)
            start = time.monotonic()
            wait_until(lambda: len(workers := set(service.workers())) == 2 and not workers & before)
            seconds = time.monotonic() - start
            kept.wait_for_answers(100)
            fresh.wait_for_answers(100)
    report(f"kept alive: {kept.report()}; a connection each: {fresh.report()}; done after {seconds:.2f} s")
    assert set(kept.statuses) == set(fresh.statuses) == {200, 204}
    assert kept.retried == 0
    assert max(counts) <= 2 * CONNECTIONS  # the old workers finish while the new ones begin
