"""The server's connections: time limits, clients that misbehave, empty content, a stop under load. Raw bytes."""

import contextlib
import itertools
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gevent
import gevent.pool
import gevent.socket
import pytest

import hello
from server import settings
from server.listener import Listener
from server.worker import ClientConnection, Worker
from tests.support.network import LOOPBACK, RESET_ON_CLOSE, Response, exchange, read_all, responses
from tests.support.service import Service
from tests.support.wait import in_thread, wait_until

LIVEZ = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"
PUT = b"PUT /hello/Slow HTTP/1.1\r\nHost: a\r\nContent-Length: 29\r\n\r\n"
CHUNKED = b"PUT /hello/Slow HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def service(database: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service of one worker that no client may cost."""
    with Service(tmp_path_factory.mktemp("server"), database, WEB_CONCURRENCY="1", SEND_TIMEOUT="1") as service:
        workers = service.workers()
        yield service
        assert service.workers() == workers


# --- Content ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"HEAD /hello/Sesame HTTP/1.1\r\nHost: a\r\n\r\n", 404),
        (b"HEAD /livez HTTP/1.1\r\nHost: a\r\n\r\n", 200),
        (b"OPTIONS /hello/Sesame HTTP/1.1\r\nHost: a\r\n\r\n", 204),
        (PUT + b'{"dateOfBirth": "1990-05-17"}', 204),
    ],
    ids=["HEAD 404", "HEAD 200", "OPTIONS", "PUT"],
)
def test_response_that_has_no_content_ends_with_its_head(service: Service, request_bytes: bytes, status: int) -> None:
    data = exchange(service.port, request_bytes)
    assert data.startswith(b"HTTP/1.1 %d " % status)
    assert data.index(b"\r\n\r\n") == len(data) - 4


# --- Time limits ----------------------------------------------------------------------------------------


def connection_on(ours: socket.socket) -> ClientConnection:
    """Return a connection of a worker that does nothing by itself."""
    worker: Any = SimpleNamespace(wsgi=hello.application, telemetry=None, alive=True)
    worker.notify = worker.common_environ = lambda *address: {}
    worker.connections = {connection := ClientConnection(worker, ours)}
    return connection


def sweep_without_end(worker: Worker) -> None:
    """Look after the connections of a worker, as it does."""
    while True:
        Worker.sweep(worker)


def send_and_wait(
    monkeypatch: pytest.MonkeyPatch, limit: str, opening: bytes, *, drips: bool = False
) -> tuple[list[Response], float]:
    """Send something, perhaps a byte now and then too, to a server with one short time limit.

    Returns:
        its responses, and after how many seconds it closed the connection
    """
    for name in ("HEAD", "CONTENT", "KEEPALIVE"):
        monkeypatch.setattr(settings, f"{name}_TIMEOUT", 0.3 if name == limit else 60.0)

    def drip() -> None:
        with contextlib.suppress(OSError):
            while drips:
                client.sendall(b"x")
                gevent.sleep(0.02)

    with socket.create_server((LOOPBACK, 0)) as server, gevent.socket.create_connection(server.getsockname()) as client:
        connection = connection_on(gevent.socket.socket(fileno=server.accept()[0].detach()))
        client.sendall(opening)
        start = time.monotonic()
        greenlets = gevent.pool.Group()
        greenlets.spawn(sweep_without_end, connection.worker)
        greenlets.spawn(connection.serve)
        greenlets.spawn(drip)
        try:
            with gevent.Timeout(10):
                return responses(read_all(client)), time.monotonic() - start
        finally:
            greenlets.kill()


@pytest.mark.parametrize(
    ("sent", "limit"),
    [(PUT[:20], "HEAD"), (PUT[:-2], "HEAD"), (PUT + b"{", "CONTENT"), (CHUNKED + b"1d\r\n{", "CONTENT")],
    ids=["request line", "head", "content", "chunk"],
)
def test_request_that_stalls_is_408_after_the_time_limit_of_its_phase(
    monkeypatch: pytest.MonkeyPatch, sent: bytes, limit: str
) -> None:
    [response], seconds = send_and_wait(monkeypatch, limit, sent)
    assert response.status == 408
    assert response.headers["Connection"] == "close"
    assert 0.25 < seconds < 5


def test_head_that_arrives_byte_by_byte_has_one_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    _, seconds = send_and_wait(monkeypatch, "HEAD", LIVEZ[:-2] + b"X-A: ", drips=True)
    assert 0.25 < seconds < 5


@pytest.mark.parametrize(
    ("opening", "limit"), [(b"", "KEEPALIVE"), (b"\r\n", "HEAD"), (LIVEZ, "KEEPALIVE"), (LIVEZ + b"\r\n", "HEAD")]
)
def test_idle_connection_is_closed_without_a_response(
    monkeypatch: pytest.MonkeyPatch, opening: bytes, limit: str
) -> None:
    found, seconds = send_and_wait(monkeypatch, limit, opening)
    assert [response.status for response in found] == [200] * opening.count(b"GET")
    assert 0.25 < seconds < 5


@pytest.mark.parametrize(("idle_seconds", "is_closed"), [(0.5, False), (1.2, True)])  # around STOPPING_SECONDS
def test_connection_that_was_idle_for_longer_is_closed_at_once_when_the_service_stops(
    idle_seconds: float, is_closed: bool
) -> None:
    ours, _ = gevent.socket.socketpair()
    connection = connection_on(ours)
    connection.since -= idle_seconds
    connection.worker.alive = False
    Worker.sweep(connection.worker)
    assert connection.is_late == is_closed


def test_client_that_does_not_read_is_closed(service: Service) -> None:
    with service.open_socket() as client:
        end = time.monotonic() + 15
        with pytest.raises(ConnectionError):
            while time.monotonic() < end:
                client.sendall(b"GET /openapi.yaml HTTP/1.1\r\nHost: a\r\n\r\n" * 100)
    assert service.ask("GET", "/livez").status == 200


def test_client_that_does_not_read_and_stalls_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEAD_TIMEOUT", "SEND_TIMEOUT"):
        monkeypatch.setattr(settings, name, 0.1)
    ours, client = gevent.socket.socketpair()
    connection = connection_on(ours)
    client.sendall(LIVEZ[:20])
    with pytest.raises(TimeoutError):  # the send buffer is full
        ours.settimeout(0.1)
        ours.sendall(b"x" * 10_000_000)
    ours.settimeout(None)
    watching = gevent.spawn(sweep_without_end, connection.worker)
    try:
        with pytest.raises(OSError, match=r"closed in another greenlet|Broken pipe"):
            gevent.spawn(connection.serve_requests).get(timeout=10)
    finally:
        watching.kill()


def test_deadline_of_a_client_that_reset_its_connection_is_no_error() -> None:
    with socket.create_server((LOOPBACK, 0)) as server, socket.create_connection(server.getsockname()) as client:
        ours = server.accept()[0]
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        client.close()
        assert select.select([ours], [], [], 20)[0]
        with ours:
            connection = connection_on(ours)
            connection.expire()
            assert connection.is_late


# --- Clients that send without end ---------------------------------------------------------------------


FLOOD_BYTES = 64 << 20


def flood(client: socket.socket, file: int) -> int:
    """Send to a connection that is being closed until it is reset, for 5 seconds at most; return the number of bytes.

    sendfile does not copy: the client is faster than any reader.
    """
    assert client.recv(1000).startswith(b"HTTP/1.1 ")
    client.setblocking(True)
    sent, end = 0, time.monotonic() + 5
    with client, contextlib.suppress(ConnectionError):
        while time.monotonic() < end:
            sent += os.sendfile(client.fileno(), file, 0, FLOOD_BYTES)
    return sent


def test_clients_that_flood_connections_that_are_being_closed_do_not_stop_the_others(
    service: Service, tmp_path: Path, report: Callable[[str], None]
) -> None:
    with (tmp_path / "zeros").open("w+b") as file:
        file.truncate(FLOOD_BYTES)
        floods = []
        for opening in (b"SESAME / HTTP/1.1\r\n\r\n", LIVEZ[:-2] + b"Connection: close\r\n\r\n") * 2:
            client = service.open_socket()
            client.sendall(opening)
            floods.append(in_thread(flood, client, file.fileno()))
        seconds = []
        while not all(each.done() for each in floods):
            seconds.append(service.ask("GET", "/livez").seconds)
            time.sleep(0.01)  # so that this client uses little of the processor
    megabytes = max(each.result() for each in floods) / 1e6
    report(f"slowest of {len(seconds)} answers {max(seconds):.3f} s, at most {megabytes:.0f} MB taken from a client")
    assert max(seconds) < 0.5
    assert megabytes < 100


def send_until_reset(client: socket.socket) -> None:
    """Send an invalid request and then data until the connection is reset; fail if that takes longer than 5 s."""
    client.settimeout(5)
    with client, contextlib.suppress(ConnectionError):
        client.sendall(b"SESAME / HTTP/1.1\r\n\r\n")
        while True:
            client.sendall(bytes(65536))


def test_clients_that_do_not_stop_sending_to_a_connection_that_is_being_closed_are_reset(service: Service) -> None:
    clients = []
    for _ in range(60):
        clients.append(in_thread(send_until_reset, service.open_socket()))
        time.sleep(0.01)  # whether the worker can leave a client without a reset depends on the moment
    for client in clients:
        client.result(30)


def test_clients_that_reset_their_connections_leave_nothing_in_the_log(service: Service) -> None:
    before = service.log_text().count('"level": "error"')
    for _ in range(100):
        with service.open_socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            client.sendall(LIVEZ * 3)
    assert service.ask("GET", "/nowhere", None, "X-Request-Id: last-of-all").status == 404
    wait_until(lambda: "last-of-all" in service.log_text())
    assert service.log_text().count('"level": "error"') == before


def test_request_that_is_refused_in_its_content_keeps_its_request_id(service: Service) -> None:
    head = CHUNKED.replace(b"\r\n\r\n", b"\r\nX-Request-Id: order-66\r\n\r\n")
    [response] = responses(exchange(service.port, head + b"no size\r\n"))
    assert (response.status, response.headers["X-Request-Id"]) == (400, "order-66")


# --- A stop ----------------------------------------------------------------------------------------------


def test_request_that_outlasts_a_stop_is_cut_before_gunicorn_kills_the_worker(
    database: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text("""if True:
        import hello, time
        def application(environ, start_response):
            time.sleep(60 if environ["PATH_INFO"] == "/slow" else 0)
            return hello.application(environ, start_response)
    """)
    own = {"application": "own:application", "PYTHONPATH": str(tmp_path), "GRACEFUL_TIMEOUT": "2"}
    with Service(tmp_path, database, WEB_CONCURRENCY="1", **own) as service:
        slow = in_thread(exchange, service.port, b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n")
        with service.open_socket() as later:
            later.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            assert responses(read_all(later))
        service.process.terminate()
        assert service.process.wait(10) == 0
        assert slow.result(10) == b""
        assert "Worker graceful timeout" in service.log_text()
        assert "SIGKILL" not in service.log_text()


def test_application_that_exits_when_the_workers_are_replaced_ends_the_service_with_its_message(
    database: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "own.py"
    file.write_text("from hello import application\n")
    own = {"application": "own:application", "PYTHONPATH": str(tmp_path)}
    with Service(tmp_path, database, WEB_CONCURRENCY="1", **own) as service:
        file.write_text("raise SystemExit('a setting is wrong')\n")
        service.process.send_signal(signal.SIGHUP)
        assert service.process.wait(10) == 3
        assert service.log_text().count("a setting is wrong") == 1


@contextlib.contextmanager
def burst(seconds: float) -> Iterator[list[Any]]:
    """Let a listener find ten connections that are served for some seconds; yield those that it accepts."""
    accepted: list[Any] = []

    def serve(client: Any, address: Any) -> None:
        accepted.append(client)
        gevent.sleep(seconds)

    with gevent.socket.socket() as ours, contextlib.ExitStack() as clients:
        ours.bind((LOOPBACK, 0))
        ours.listen()
        for _ in range(10):
            clients.enter_context(socket.create_connection(ours.getsockname()))
        listener = Listener(ours, serve, spawn=100)
        listener.start()
        for _ in range(40):
            gevent.sleep(1e-6)  # a turn of the event loop
        yield accepted
        listener.close()


def test_burst_of_connections_is_left_to_the_other_workers_in_between() -> None:
    with burst(seconds=5) as accepted, gevent.Timeout(20):
        assert 1 <= len(accepted) < 10
        while len(accepted) < 10:
            gevent.sleep(0.01)


def test_connections_that_end_at_once_are_accepted_without_a_pause() -> None:
    with burst(seconds=0) as accepted:
        assert len(accepted) == 10


def connect_until_refused(port: int, answers: list[bytes]) -> list[str]:
    """Ask on one new connection after the other until connections are refused; return what went wrong before.

    The last one may be reset: it came while the service closed its socket.
    """
    defects: list[str] = []
    was_reset = False
    while True:
        try:
            with socket.create_connection((LOOPBACK, port), timeout=20) as client:
                client.sendall(LIVEZ)
                answers.append(client.recv(1000))
        except ConnectionRefusedError:
            return defects
        except ConnectionError:
            was_reset = True
            continue
        if was_reset:
            defects.append("reset, and the next one was answered")
        if not answers[-1].startswith(b"HTTP/1.1 200 "):
            defects.append("closed without a response")


def test_connections_that_arrive_while_the_service_stops_are_answered_or_refused(
    database: dict[str, str], tmp_path: Path
) -> None:
    with Service(tmp_path, database) as service:
        answers: list[bytes] = []
        clients = [in_thread(connect_until_refused, service.port, answers) for _ in range(16)]
        wait_until(lambda: len(answers) > 100)
        service.process.terminate()
        assert service.process.wait(20) == 0
        defects = list(itertools.chain(*[client.result(20) for client in clients]))
    assert defects == []


def test_clients_that_wait_for_a_full_worker_that_stops_are_answered(database: dict[str, str], tmp_path: Path) -> None:
    with (
        Service(tmp_path, database, WEB_CONCURRENCY="1", WORKER_CONNECTIONS="5") as service,
        contextlib.ExitStack() as stack,
    ):
        idle = [stack.enter_context(service.open_socket()) for _ in range(5)]
        for client in idle:
            client.sendall(LIVEZ)
            assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
        waiting = [stack.enter_context(service.open_socket()) for _ in range(3)]
        for client in waiting:
            client.sendall(LIVEZ)
        service.process.terminate()
        found = [response.status for client in waiting for response in responses(read_all(client))]
        assert found == [200, 200, 200]
        assert service.process.wait(20) == 0
