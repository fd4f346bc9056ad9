"""Log lines: their form, what they may tell, and that writing them never stops a process."""

import contextlib
import fcntl
import json
import logging
import os
import re
import select
import signal
import socket
import sys
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hello
from server import logs
from tests.support.monitored import MonitoredService, PipedService
from tests.support.network import exchange, responses
from tests.support.service import body
from tests.support.wait import in_thread, wait_until

HELLO = hello.USER_ROUTE
TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


@pytest.fixture
def service(database: dict[str, str], tmp_path: Path) -> Iterator[MonitoredService]:
    with MonitoredService(tmp_path, database) as service:
        yield service


@pytest.fixture
def piped(database: dict[str, str], tmp_path: Path) -> Iterator[PipedService]:
    with PipedService(tmp_path, database) as service:
        yield service


# --- Form -------------------------------------------------------------------------------------------


def test_a_request_is_logged_with_all_that_may_be_told(service: MonitoredService) -> None:
    headers = f"traceparent: 00-{TRACE_ID}-{PARENT_ID}-01", "X-Request-Id: order-66"
    response = service.ask("GET", "/hello/Nobody?secret=1", None, *headers)
    [line] = service.wait_for_lines(1)
    assert TIME.fullmatch(line.pop("time"))
    assert 0 < line.pop("duration_seconds") < 5
    assert line == {
        "level": "info",
        "message": "request",
        "method": "GET",
        "route": HELLO,
        "status": 404,
        "bytes": len(response.content),
        "request_id": "order-66",
        "trace_id": TRACE_ID,
    }


def test_a_protocol_error_is_logged_under_the_request_id_that_its_client_got(service: MonitoredService) -> None:
    [response] = responses(exchange(service.port, b"GET /sesame HTTP/1.1\r\n\r\n"))
    [line] = service.wait_for_lines(1)
    assert TIME.fullmatch(line.pop("time"))
    assert line == {
        "level": "info",
        "message": "request",
        "method": "GET",
        "route": "unmatched",
        "status": 400,
        "duration_seconds": 0,
        "bytes": len(response.content),
        "request_id": response.headers["X-Request-Id"],
    }


def test_a_server_error_is_a_warning(database: dict[str, str], tmp_path: Path) -> None:
    with MonitoredService(tmp_path, database, PGHOST="/nowhere", LOG_LEVEL="warning") as service:
        assert service.ask("GET", "/hello/Zoe").status == 503
        assert service.ask("GET", "/nowhere").status == 404
        [line] = service.wait_for_lines(1)
        assert (line["level"], line["status"]) == ("warning", 503)
        assert len(service.lines("")) == 2  # with that of the outage


def test_probes_and_metrics_are_not_logged(service: MonitoredService) -> None:
    for path in ("/livez", "/readyz"):
        assert service.ask("GET", path).status == 200
    service.metrics()
    service.process.terminate()
    service.process.wait(20)
    assert service.lines() == []


def test_lines_of_gunicorn_have_the_same_form(service: MonitoredService) -> None:
    os.kill(service.workers()[0], signal.SIGKILL)
    [line] = service.wait_for_lines(1, "SIGKILL")
    assert TIME.fullmatch(line.pop("time"))
    assert line.pop("message").startswith("Worker (pid:")
    assert line == {"level": "error"}


def test_text_format_is_for_reading(database: dict[str, str], tmp_path: Path) -> None:
    with MonitoredService(tmp_path, database, LOG_FORMAT="text") as service:
        service.ask("GET", "/hello/Nobody", None, "X-Request-Id: order-66")
        wait_until(lambda: "order-66" in service.log_text())
        [line] = [line for line in service.log_text().splitlines() if "order-66" in line]
        assert re.fullmatch(rf"{TIME.pattern} info     GET {HELLO} 404 [\d.]+ ms, \d+ bytes, order-66", line)


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [
        (0, "1970-01-01T00:00:00.000Z"),
        (999, "1970-01-01T00:00:00.999Z"),
        (951_782_400_001, "2000-02-29T00:00:00.001Z"),
    ],
)
def test_a_time_is_written_as_rfc_3339(milliseconds: int, text: str) -> None:
    assert logs.timestamp(milliseconds) == text


# --- What may be told -------------------------------------------------------------------------------


def test_no_line_and_no_metric_holds_personal_data(service: MonitoredService) -> None:
    secrets = ["Quetzalcoatl", "Wilhelmine", "1987-06-05", "1987-13-45", "hunter2", "Xanthippe", "Świętosława"]
    path = f"/hello/{secrets[0]}"
    quoted = urllib.parse.quote(secrets[6])
    service.ask("PUT", path, body(secrets[2]))
    service.ask("PUT", path, body(secrets[3]))
    service.ask("PUT", path, f"{secrets[1]} {secrets[2]}".encode())
    service.ask("GET", f"{path}?password={secrets[4]}")
    service.ask("GET", f"/{secrets[5]}/{secrets[0]}")
    service.ask("GET", f"{path}1")
    service.ask("GET", f"/hello/{quoted}", None, f"User-Agent: {secrets[1]}", f"Referer: {secrets[2]}")
    service.ask("GET", path, None, f"X-Request-Id: {secrets[1]} {secrets[2]}", f"traceparent: {secrets[4]}")
    for request in (  # protocol errors
        f"{secrets[5].upper()} {path} HTTP/1.1\r\nHost: a\r\n\r\n",
        f"GET {path} HTTP/9.9\r\n\r\n",
        f"GET {path} {secrets[1]}\r\n\r\n",
        f"GET {path} HTTP/1.1\r\nHost: a\r\n{secrets[1]} {secrets[4]}: x\r\n\r\n",
        f"PUT {path} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{secrets[1]}\r\n",
        f"GET {path}{'a' * 9000} HTTP/1.1\r\nHost: a\r\n\r\n",
    ):
        assert re.match(rb"HTTP/1.1 [45]", exchange(service.port, request.encode()))
    service.wait_for_lines(14)
    written = service.log_text() + service.ask_for_metrics().content.decode()
    for secret in (*secrets, "Quetz", quoted, "tosława"):
        assert secret.lower() not in written.lower()


def test_an_exception_is_logged_by_its_class_and_location_only() -> None:
    try:
        int("Quetzalcoatl")
    except ValueError:
        record = logging.LogRecord("hello", logging.ERROR, "", 0, "no %s", ("luck",), sys.exc_info())
    line = json.loads(logs.record_line(record))
    assert line["message"] == "no luck"
    assert re.fullmatch(r"ValueError at test_logs\.py:\d+ in test_\w+", line["exception"])
    assert "Quetzalcoatl" not in str(line)


@pytest.mark.parametrize("error", ["RuntimeError", "TimeoutError"])  # a TimeoutError is an OSError, and no client's
def test_an_exception_that_nothing_caught_is_logged_without_its_text(
    database: dict[str, str], tmp_path: Path, error: str
) -> None:
    (tmp_path / "broken.py").write_text(f"""if True:
        import hello
        def application(environ, start_response):
            if environ["PATH_INFO"] == "/hello/Quetzalcoatl":
                raise {error}(environ["PATH_INFO"])
            return hello.application(environ, start_response)
    """)
    own = {"application": "broken:application", "PYTHONPATH": str(tmp_path)}
    with MonitoredService(tmp_path, database, **own) as service:
        assert exchange(service.port, b"GET /hello/Quetzalcoatl HTTP/1.1\r\nHost: a\r\n\r\n") == b""
        [line] = service.wait_for_lines(1, "uncaught")
        assert re.fullmatch(rf"{error} at broken\.py:5 in application", line["exception"])
        assert "Quetzalcoatl" not in service.log_text()


def test_a_bug_is_a_500_that_is_counted_and_whose_place_is_logged(database: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("""if True:
        import hello
        def get_hello(environ, username):
            raise RuntimeError(username)
        hello.ROUTES[hello.USER_ROUTE]["GET"] = get_hello
        application = hello.application
    """)
    own = {"application": "broken:application", "PYTHONPATH": str(tmp_path)}
    with MonitoredService(tmp_path, database, **own) as service:
        assert service.ask("GET", "/hello/Quetzalcoatl").status == 500
        [place] = service.wait_for_lines(1, "RuntimeError")
        assert place["level"] == "error"
        assert re.fullmatch(r"RuntimeError at hello\.py:\d+, hello\.py:\d+, broken\.py:4", place["message"])
        [request] = service.wait_for_lines(1)
        assert (request["level"], request["status"]) == ("warning", 500)
        wait_until(lambda: service.requests().get(("GET", HELLO, "500")) == 1)
        assert "Quetzalcoatl" not in service.log_text()


# --- Writing ----------------------------------------------------------------------------------------


def test_lines_of_several_workers_do_not_mix(service: MonitoredService) -> None:
    service.work()
    ids = [line["request_id"] for line in service.wait_for_lines(service.logged_answers())]
    assert len(ids) == len(set(ids)) == service.logged_answers()


def test_a_reader_that_stopped_does_not_stop_the_service(piped: PipedService) -> None:
    piped.send_requests(5000)
    assert piped.ask("GET", "/livez").status == 200
    assert piped.put("Zoe").status == 204


def test_a_reader_that_stopped_does_not_stop_gunicorn_from_replacing_a_worker(piped: PipedService) -> None:
    piped.fill_pipe()
    [worker] = piped.workers()
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: len(piped.workers()) == 1 and piped.workers() != [worker])
    wait_until(piped.is_up)


def test_lines_that_nobody_reads_are_dropped_and_counted(piped: PipedService) -> None:
    piped.send_requests(3 * logs.MAX_WAITING_LINES)
    answered = piped.logged_answers()

    def accounted() -> bool:
        return len(piped.lines()) + piped.metrics()["log_lines_dropped_total"][()] == answered

    wait_until(accounted, 20)
    assert piped.metrics()["log_lines_dropped_total"][()] > 0


def test_a_reader_that_reads_again_gets_the_next_lines(piped: PipedService) -> None:
    piped.send_requests(2 * logs.MAX_WAITING_LINES)
    wait_until(lambda: len(piped.lines()) >= logs.MAX_WAITING_LINES)
    piped.ask("GET", "/nowhere", None, "X-Request-Id: order-66")
    wait_until(lambda: piped.lines()[-1]["request_id"] == "order-66")


def test_a_reader_that_went_away_does_not_stop_the_service(piped: PipedService) -> None:
    piped.close_pipe()
    piped.send_requests(1000)
    assert piped.put("Zoe").status == 204


def test_a_stop_that_nobody_reads_of_is_bounded(piped: PipedService) -> None:
    piped.fill_pipe()
    piped.process.terminate()
    assert piped.process.wait(30) == 0


def test_a_graceful_stop_writes_the_line_of_every_answer(service: MonitoredService) -> None:
    def ask_until_refused() -> int:
        count = 0
        with contextlib.suppress(OSError):
            while service.ask("GET", "/nowhere").status == 404:
                count += 1
                time.sleep(0.005)  # a worker without open connections stops at once
        return count

    clients = [in_thread(ask_until_refused) for _ in range(4)]
    wait_until(lambda: service.answered["GET", "unmatched", "404"] > 100)
    service.process.terminate()
    service.process.wait(20)
    assert len(service.lines()) == sum(client.result(30) for client in clients)
    assert len(service.lines("Worker exiting")) == 2  # each process's last line
    assert len(service.lines("Shutting down: Master")) == 1


def test_lines_are_joined_to_pieces_that_a_pipe_takes_whole() -> None:
    lines = ["x" * 1000] * 9 + ["é" * 1500] * 3 + ["y" * 5000, "z"]
    reader, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)  # each write is one message
    with reader, end:
        writer = logs.LineWriter(end.fileno())
        writer.add(lines)
        found = [reader.recv(10_000) for _ in range(7)]
    assert b"".join(found).decode() == "".join(line + "\n" for line in lines)
    assert [len(piece) for piece in found] == [4004, 4004, 1001 + 3001, 3001, 3001, 5001, 2]


@pytest.fixture
def small_pipe() -> Iterator[tuple[int, int]]:
    """The reading and the writing end of a pipe that holds 4 KB, and whose writer must not wait."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(writer, False)
    yield reader, writer
    os.close(reader)
    os.close(writer)


def test_lines_for_a_slow_reader_of_a_non_blocking_pipe_all_arrive(small_pipe: tuple[int, int]) -> None:
    lines = [f"{number} " + "x" * 200 for number in range(200)] + ["y" * 10_000]  # the last needs several writes
    reader, end = small_pipe
    writer = logs.LineWriter(end)
    writer.add(lines)
    data = b""
    while not data.endswith(b"y\n") and select.select([reader], [], [], 3)[0]:
        data += os.read(reader, 300)
    assert data.decode().splitlines() == lines
    assert writer.dropped == 0


def test_a_stop_while_a_non_blocking_pipe_is_full_is_bounded(small_pipe: tuple[int, int]) -> None:
    _, end = small_pipe
    writer = logs.LineWriter(end)
    writer.add(["x" * 200] * 200)
    start = time.monotonic()
    writer.close()
    assert time.monotonic() - start < logs.STOP_SECONDS + 1


def test_lines_that_a_full_disk_refuses_are_counted() -> None:
    with Path("/dev/full").open("wb", buffering=0) as file:
        writer = logs.LineWriter(file.fileno())
        writer.add(["x" * 200] * 200)
        writer.close()
        assert writer.dropped == 200


def test_lines_that_a_full_disk_refuses_are_in_the_metrics(database: dict[str, str], tmp_path: Path) -> None:
    prefix = ["sh", "-c", 'exec "$@" > /dev/full', "sh"]
    with MonitoredService(tmp_path, database, prefix=prefix, WEB_CONCURRENCY="1") as service:
        for _ in range(3):
            assert service.ask("GET", "/nowhere").status == 404
        wait_until(lambda: service.metrics()["log_lines_dropped_total"][()] >= 3)


@pytest.mark.parametrize("count", [0, 1, 1000])
def test_a_writer_that_is_closed_has_written_every_line(tmp_path: Path, count: int) -> None:
    with (tmp_path / "log").open("wb") as file:
        writer = logs.LineWriter(file.fileno())
        for number in range(count):
            writer.add([str(number)])
        writer.close()
        assert (tmp_path / "log").read_text().split() == [str(number) for number in range(count)]


def test_a_fork_leaves_the_waiting_lines_to_the_parent(tmp_path: Path) -> None:
    with (tmp_path / "log").open("ab") as file:
        writer: Any = logs.LineWriter(file.fileno())
        writer.add(["parent"])
        if not (child := os.fork()):
            writer.add(["child"])
            writer.close()
            os._exit(0)
        os.waitpid(child, 0)
        writer.close()
        assert sorted((tmp_path / "log").read_text().split()) == ["child", "parent"]
