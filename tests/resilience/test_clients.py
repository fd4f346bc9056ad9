"""Clients are too many, too slow, or send without end."""

import contextlib
import errno
import itertools
import selectors
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.load import letters
from tests.support.network import LOOPBACK, read_all, responses, split_response
from tests.support.postgres import Database
from tests.support.service import CONNECTIONS, Service, body
from tests.support.wait import in_thread, wait_until

pytestmark = pytest.mark.usefixtures("many_files")

LIVEZ = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"


# --- Too many ---------------------------------------------------------------------------------------


def requests_at_once(port: int, size: int, rounds: int) -> Counter[int]:
    """Let clients send a request all at once, some rounds of it; return the statuses."""
    statuses: Counter[int] = Counter()
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        clients = [stack.enter_context(socket.create_connection((LOOPBACK, port))) for _ in range(size)]
        for client in clients:
            selector.register(client, selectors.EVENT_READ)
        for turn in range(rounds):
            for index, client in enumerate(clients):
                path = f"/hello/Crowd{letters(index)} HTTP/1.1\r\nHost: a\r\n".encode()
                put = b"PUT " + path + b"Content-Length: 29\r\n\r\n" + body("1990-05-17")
                client.sendall(b"GET " + path + b"\r\n" if (index + turn) % 2 and turn else put)
            pending = set(clients)
            while pending:
                ready = selector.select(20)
                assert ready, f"{len(pending)} without an answer"
                for key, _ in ready:
                    assert isinstance(key.fileobj, socket.socket)
                    split = split_response(key.fileobj.recv(65536))
                    assert split, "a response in pieces"
                    statuses[split[0].status] += 1
                    pending.remove(key.fileobj)
    return statuses


@pytest.fixture(scope="module")
def patient_service(database: Database, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service in which no request waits too long, which depends on the machine."""
    limits = {"QUEUE_TIMEOUT": "20", "STATEMENT_TIMEOUT": "20"}
    with Service(tmp_path_factory.mktemp("patient"), database.service_environment, **limits) as service:
        yield service


def test_thousand_clients_at_once_are_all_answered_in_bounded_memory(
    database: Database, patient_service: Service, report: Callable[[str], None]
) -> None:
    requests_at_once(patient_service.port, 10, 2)
    before = patient_service.pss()
    with database.connection_counts(patient_service.name) as counts:
        start = time.monotonic()
        statuses = requests_at_once(patient_service.port, 1000, 2)
        seconds = time.monotonic() - start
    after = patient_service.pss()
    report(
        f"2,000 sent in 2 rounds, answered {dict(statuses)} in {seconds:.1f} s; memory {before:.0f} MB before, "
        f"{after:.0f} MB after (PSS of master and workers); connections at most {max(counts)}"
    )
    assert statuses.total() == 2000
    assert set(statuses) == {200, 204}
    assert after - before < 60
    assert max(counts) <= CONNECTIONS
    assert sum(name.startswith("Crowd") for name in database.rows()) >= 1000


def keep_busy(port: int, size: int, done: threading.Event) -> int:
    """Let clients send their next request as soon as they have an answer; return how many were answered."""
    answered = 0
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        for _ in range(size):
            client = stack.enter_context(socket.create_connection((LOOPBACK, port)))
            client.sendall(LIVEZ)
            selector.register(client, selectors.EVENT_READ)
        while not done.is_set():
            for key, _ in selector.select(1):
                assert isinstance(key.fileobj, socket.socket)
                assert key.fileobj.recv(65536).startswith(b"HTTP/1.1 200 ")
                key.fileobj.sendall(LIVEZ)
                answered += 1
    return answered


def test_clients_that_arrive_while_others_keep_the_workers_busy_are_answered(
    patient_service: Service, report: Callable[[str], None]
) -> None:
    done = threading.Event()
    busy = [in_thread(keep_busy, patient_service.port, 300, done) for _ in range(2)]
    time.sleep(0.5)  # until all 600 are at it; fewer would only make it easier
    start = time.monotonic()
    statuses = requests_at_once(patient_service.port, 300, 1)
    seconds = time.monotonic() - start
    done.set()
    answered = sum(future.result(10) for future in busy)
    report(f"{answered} answers to 600 clients; 300 more arrive, answered {dict(statuses)} in {seconds:.2f} s")
    assert statuses == {204: 300}
    assert seconds < 15  # much of it is this process's own: 900 clients share an interpreter


# --- Too slow ---------------------------------------------------------------------------------------


def latencies(service: Service, count: int) -> list[float]:
    """Return the seconds that each GET of a client took, one after the other."""
    with contextlib.closing(service.connect()) as connection:
        answers = [connection.ask("GET", "/hello/Normal") for _ in range(count)]
    assert {answer.status for answer in answers} == {200}
    return [answer.seconds for answer in answers]


def trickle(port: int, opening: bytes, count: int) -> list[float]:
    """Send a byte every 0.1 s on many connections; return after how many seconds each was closed."""
    ends: list[float] = []
    with contextlib.ExitStack() as stack:
        clients = {stack.enter_context(socket.create_connection((LOOPBACK, port))) for _ in range(count)}
        start = time.monotonic()
        for client in clients:
            client.sendall(opening)
            client.setblocking(False)
        while clients and time.monotonic() < start + 20:
            for client in list(clients):
                try:
                    client.send(b"x")
                    while client.recv(4096):  # an answer, and then the end
                        pass
                except BlockingIOError:
                    continue
                except OSError as error:
                    assert error.errno in {errno.EPIPE, errno.ECONNRESET}
                clients.remove(client)
                ends.append(time.monotonic() - start)
            time.sleep(0.1)
    return ends


def test_slow_clients_are_closed_and_do_not_slow_a_normal_one(
    database: Database, tmp_path: Path, report: Callable[[str], None]
) -> None:
    timeouts = {"HEAD_TIMEOUT": "1.5", "CONTENT_TIMEOUT": "1.5", "KEEPALIVE_TIMEOUT": "2", "WEB_CONCURRENCY": "1"}
    head = b"GET /hello/Slow HTTP/1.1\r\nHost: a\r\nX-Slow: "
    content = b"PUT /hello/Slow HTTP/1.1\r\nHost: a\r\nContent-Length: 4000\r\n\r\n"
    with Service(tmp_path, database.service_environment | timeouts) as service, contextlib.ExitStack() as stack:
        assert service.put("Normal").status == 204
        idle = [stack.enter_context(service.open_socket()) for _ in range(200)]
        opened = time.monotonic()
        slow = [in_thread(trickle, service.port, opening, 250) for opening in (head, content)]
        among: list[float] = []
        while not all(future.done() for future in slow):
            among += latencies(service, 10)
        ends = sorted(itertools.chain(*[future.result() for future in slow]))
        assert [connection.recv(1) for connection in idle] == [b""] * len(idle)
        idle_end = time.monotonic() - opened
    report(
        f"500 slow and 200 idle clients; a normal one's median {statistics.median(among) * 1000:.2f} ms; slow ones "
        f"closed after {ends[0]:.1f} to {ends[-1]:.1f} s (timeout 1.5), idle ones after {idle_end:.1f} s (timeout 2)"
    )
    assert len(ends) == 500
    assert ends[0] > 1.2
    assert ends[-1] < 1.5 + 5
    assert idle_end < 2 + 5
    assert max(among) < 1.4  # a worker that waited for a slow client would take 1.5 s


def test_time_for_sending_does_not_run_while_the_next_request_waits_for_the_database(
    database: Database, tmp_path: Path
) -> None:
    limits = {"SEND_TIMEOUT": "0.4", "STATEMENT_TIMEOUT": "5", "DATABASE_TIMEOUT": "5", "QUEUE_TIMEOUT": "5"}
    limits["WEB_CONCURRENCY"] = "1"
    with Service(tmp_path, database.service_environment | limits) as service, service.open_socket() as client:
        with database.locked("LOCK TABLE users"):
            client.sendall(LIVEZ + LIVEZ.replace(b"/livez", b"/hello/Nobody"))
            database.wait_for_lock_wait()
            time.sleep(0.9)  # twice the limit, and a sweep
        client.shutdown(socket.SHUT_WR)
        assert [response.status for response in responses(read_all(client))] == [200, 404]


# --- Without end ------------------------------------------------------------------------------------


def send_until_closed(client: socket.socket, data: bytes, done: threading.Event) -> tuple[int, bool]:
    """Send data again and again; return how many bytes went out, and whether the peer closed the connection."""
    sent = 0
    while not done.is_set():
        try:
            client.sendall(data)
        except TimeoutError:
            continue
        except OSError:
            return sent, True
        sent += len(data)
    return sent, False


def drop_all(client: socket.socket) -> None:
    """Read until the peer closes or resets; read_all keeps the data, and would slow down a client with much of it."""
    with contextlib.suppress(ConnectionResetError):
        while client.recv(1 << 20):
            pass


@pytest.fixture(scope="module")
def single_worker(database: Database, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    # CONTENT_TIMEOUT: a request without end must be refused for its size.
    settings = {"WEB_CONCURRENCY": "1", "CONTENT_TIMEOUT": "60"}
    with Service(tmp_path_factory.mktemp("single"), database.service_environment, **settings) as service:
        yield service


CHUNKED = b"PUT /hello/Flood HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("opening", "flood", "is_closed"),
    [(b"", LIVEZ * 2000, False), (CHUNKED + b"0\r\nA: ", b"a" * 65536, True), (CHUNKED + b"1;", b"a" * 65536, True)],
    ids=["requests", "trailer", "chunk extension"],
)
def test_client_that_sends_without_end_does_not_stop_the_others_of_its_worker(
    single_worker: Service, report: Callable[[str], None], opening: bytes, flood: bytes, is_closed: bool
) -> None:
    done = threading.Event()
    with contextlib.closing(single_worker.connect()) as normal, single_worker.open_socket() as greedy:
        before = single_worker.pss()
        in_thread(drop_all, greedy)
        greedy.sendall(opening)
        sending = in_thread(send_until_closed, greedy, flood, done)
        answers = [normal.ask("GET", "/livez") for _ in range(30)]
        growth = single_worker.pss() - before
        if is_closed:
            wait_until(sending.done, 30)
        done.set()
        sent, was_closed = sending.result(20)
    slowest = max(answer.seconds for answer in answers)
    report(f"{sent / 1e6:.0f} MB sent; 30 requests of another meanwhile, slowest {slowest * 1000:.0f} ms")
    assert {answer.status for answer in answers} == {200}
    assert slowest < 5  # one that starves waits for its timeout, which is 20 s
    assert growth < 40  # MB
    assert was_closed == is_closed
