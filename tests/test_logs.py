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
import subprocess
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

ROOT = Path(__file__).parents[1]
HELLO = hello.USER_ROUTE
TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


@pytest.fixture(scope="module")
def shared(database: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[MonitoredService]:
    """A service of one worker, which logs requests in their order."""
    with MonitoredService(tmp_path_factory.mktemp("shared"), database, WEB_CONCURRENCY="1") as service:
        yield service


def line_of(service: MonitoredService, request_id: str | None) -> dict[str, Any]:
    """Return the log line of a request, except for its time, once it is there."""
    [line] = wait_until(lambda: [line for line in service.lines() if line["request_id"] == request_id])
    assert TIME.fullmatch(line.pop("time"))
    return line


# --- Form -------------------------------------------------------------------------------------------


def test_a_request_is_logged_with_all_that_may_be_told(shared: MonitoredService) -> None:
    headers = f"traceparent: 00-{TRACE_ID}-{PARENT_ID}-01", "X-Request-Id: order-66"
    response = shared.ask("GET", "/hello/Nobody?secret=1", None, *headers)
    line = line_of(shared, "order-66")
    assert 0 < line.pop("duration_seconds") < 5
    expected = {"level": "info", "message": "request", "method": "GET", "route": HELLO, "status": 404}
    assert line == expected | {"bytes": len(response.content), "request_id": "order-66", "trace_id": TRACE_ID}


def test_a_protocol_error_is_logged_under_the_request_id_that_its_client_got(shared: MonitoredService) -> None:
    [response] = responses(exchange(shared.port, b"GET /sesame HTTP/1.1\r\n\r\n"))
    request_id = response.headers["X-Request-Id"]
    expected: dict[str, Any] = {"level": "info", "message": "request", "method": "GET", "route": "unmatched"}
    expected |= {"status": 400, "duration_seconds": 0, "bytes": len(response.content), "request_id": request_id}
    assert line_of(shared, request_id) == expected


def test_probes_and_metrics_are_not_logged(shared: MonitoredService) -> None:
    before = len(shared.lines())
    assert [shared.ask("GET", path).status for path in ("/livez", "/readyz")] == [200, 200]
    shared.metrics()
    shared.ask("GET", "/nowhere", None, "X-Request-Id: after-probes")
    line_of(shared, "after-probes")
    assert len(shared.lines()) == before + 1


def test_lines_of_gunicorn_have_the_same_form(shared: MonitoredService) -> None:
    os.kill(shared.workers()[0], signal.SIGKILL)
    [line] = shared.wait_for_lines(1, "SIGKILL")
    assert TIME.fullmatch(line.pop("time"))
    assert line.pop("message").startswith("Worker (pid:")
    assert line == {"level": "error"}
    wait_until(shared.is_up)


def test_a_server_error_is_a_warning_and_text_is_for_reading(database: dict[str, str], tmp_path: Path) -> None:
    own = {"PGHOST": "/nowhere", "LOG_LEVEL": "warning", "LOG_FORMAT": "text", "WEB_CONCURRENCY": "1"}
    with MonitoredService(tmp_path, database, **own) as service:
        assert service.ask("GET", "/hello/Zoe", None, "X-Request-Id: order-66").status == 503
        assert service.ask("GET", "/nowhere").status == 404
        wait_until(lambda: "order-66" in service.log_text())
        outage, request = service.log_text().splitlines()
    assert re.fullmatch(rf"{TIME.pattern} warning  database: find failed: .*", outage)
    assert re.fullmatch(rf"{TIME.pattern} warning  GET {HELLO} 503 [\d.]+ ms, \d+ bytes, order-66", request)


def test_a_time_is_written_as_rfc_3339() -> None:
    assert logs.timestamp(0) == "1970-01-01T00:00:00.000Z"
    assert logs.timestamp(951_782_400_001) == "2000-02-29T00:00:00.001Z"


# --- What may be told -------------------------------------------------------------------------------


def test_no_line_and_no_metric_holds_personal_data(shared: MonitoredService) -> None:
    before = len(shared.lines())
    secrets = ["Quetzalcoatl", "Wilhelmine", "1987-06-05", "1987-13-45", "hunter2", "Xanthippe", "Świętosława"]
    path = f"/hello/{secrets[0]}"
    quoted = urllib.parse.quote(secrets[6])
    shared.ask("PUT", path, body(secrets[2]))
    shared.ask("PUT", path, body(secrets[3]))
    shared.ask("PUT", path, f"{secrets[1]} {secrets[2]}".encode())
    shared.ask("GET", f"{path}?password={secrets[4]}")
    shared.ask("GET", f"/{secrets[5]}/{secrets[0]}")
    shared.ask("GET", f"{path}1")
    shared.ask("GET", f"/hello/{quoted}", None, f"User-Agent: {secrets[1]}", f"Referer: {secrets[2]}")
    shared.ask("GET", path, None, f"X-Request-Id: {secrets[1]} {secrets[2]}", f"traceparent: {secrets[4]}")
    for request in (  # protocol errors
        f"{secrets[5].upper()} {path} HTTP/1.1\r\nHost: a\r\n\r\n",
        f"GET {path} HTTP/9.9\r\n\r\n",
        f"GET {path} {secrets[1]}\r\n\r\n",
        f"GET {path} HTTP/1.1\r\nHost: a\r\n{secrets[1]} {secrets[4]}: x\r\n\r\n",
        f"PUT {path} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{secrets[1]}\r\n",
        f"GET {path}{'a' * 9000} HTTP/1.1\r\nHost: a\r\n\r\n",
    ):
        assert re.match(rb"HTTP/1.1 [45]", exchange(shared.port, request.encode()))
    shared.wait_for_lines(before + 14)
    written = shared.log_text() + shared.ask_for_metrics().content.decode()
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


BROKEN = """
import builtins, hello
def get_hello(environ, username):
    raise RuntimeError(username)
hello.ROUTES[hello.USER_ROUTE]["GET"] = get_hello
def application(environ, start_response):
    if environ["PATH_INFO"].startswith("/raise/"):
        raise getattr(builtins, environ["QUERY_STRING"])(environ["PATH_INFO"])
    return hello.application(environ, start_response)
"""


@pytest.fixture(scope="module")
def broken(database: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[MonitoredService]:
    """A service whose application raises exceptions; their text is never in its log."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "broken.py").write_text(BROKEN)
    own = {"application": "broken:application", "PYTHONPATH": str(folder), "WEB_CONCURRENCY": "1"}
    with MonitoredService(folder, database, **own) as service:
        yield service
        assert "Quetzalcoatl" not in service.log_text()


@pytest.mark.parametrize("error", ["RuntimeError", "TimeoutError"])  # a TimeoutError is an OSError, and no client's
def test_an_exception_that_nothing_caught_is_logged_without_its_text(broken: MonitoredService, error: str) -> None:
    before = len(broken.lines("uncaught"))
    request = f"GET /raise/Quetzalcoatl?{error} HTTP/1.1\r\nHost: a\r\n\r\n"
    assert exchange(broken.port, request.encode()) == b""
    line = broken.wait_for_lines(before + 1, "uncaught")[-1]
    assert line["exception"] == f"{error} at broken.py:8 in application"


def test_a_bug_is_a_500_that_is_counted_and_whose_place_is_logged(broken: MonitoredService) -> None:
    assert broken.ask("GET", "/hello/Quetzalcoatl").status == 500
    [place] = broken.wait_for_lines(1, "RuntimeError")
    assert place["level"] == "error"
    assert re.fullmatch(r"RuntimeError at hello\.py:\d+, hello\.py:\d+, broken\.py:4", place["message"])
    [request] = broken.wait_for_lines(1)
    assert (request["level"], request["status"]) == ("warning", 500)
    assert broken.requests()["GET", HELLO, "500"] == 1


# --- Writing ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def piped(database: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[PipedService]:
    """A service that lets few lines wait."""
    folder = tmp_path_factory.mktemp("piped")
    (folder / "few_lines.py").write_text("""if True:
        from hello import application
        from server import logs
        logs.MAX_WAITING_LINES = 100
    """)
    with PipedService(folder, database, application="few_lines:application", PYTHONPATH=str(folder)) as service:
        yield service


def test_a_reader_that_stopped_does_not_stop_the_service(piped: PipedService) -> None:
    piped.send_requests(1000)
    assert piped.ask("GET", "/livez").status == 200
    assert piped.put("Zoe").status == 204


def test_lines_that_nobody_reads_are_dropped_and_counted_and_the_next_ones_arrive(piped: PipedService) -> None:
    before = piped.dropped_lines()
    piped.send_requests(1000)
    wait_until(lambda: len(piped.lines()) + piped.dropped_lines() == piped.logged_answers())
    assert piped.dropped_lines() > before
    piped.ask("GET", "/nowhere", None, "X-Request-Id: order-66")
    assert line_of(piped, "order-66")["status"] == 404


def test_a_reader_that_stopped_stops_neither_the_replacement_of_a_worker_nor_the_end(
    database: dict[str, str], tmp_path: Path
) -> None:
    with PipedService(tmp_path, database) as service:
        service.send_requests(1000)  # whose lines do not fit into the pipe, which holds 64 KiB
        [worker] = service.workers()
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: len(service.workers()) == 1 and service.workers() != [worker])
        wait_until(service.is_up)
        service.process.terminate()
        assert service.process.wait(30) == 0


def test_lines_that_a_worker_drops_at_its_end_are_counted(database: dict[str, str], tmp_path: Path) -> None:
    with PipedService(tmp_path, database) as service:
        service.send_requests(1000)
        service.process.send_signal(signal.SIGHUP)
        wait_until(lambda: service.dropped_lines() > 500)


def test_a_reader_that_went_away_does_not_stop_the_service(database: dict[str, str], tmp_path: Path) -> None:
    with PipedService(tmp_path, database) as service:
        service.close_pipe()
        service.send_requests(300)
        assert service.put("Zoe").status == 204
        wait_until(lambda: service.dropped_lines() >= 300)


def test_a_graceful_stop_writes_the_line_of_every_answer(database: dict[str, str], tmp_path: Path) -> None:
    def ask_until_refused() -> int:
        count = 0
        with contextlib.suppress(OSError):
            while service.ask("GET", "/nowhere").status == 404:
                count += 1
                time.sleep(0.005)  # a worker without open connections stops at once
        return count

    with MonitoredService(tmp_path, database) as service:
        clients = [in_thread(ask_until_refused) for _ in range(4)]
        wait_until(lambda: service.answered["GET", "unmatched", "404"] > 100)
        service.process.terminate()
        service.process.wait(20)
        ids = {line["request_id"] for line in service.lines()}
        assert len(ids) == len(service.lines()) == sum(client.result(30) for client in clients)
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


def test_lines_for_a_slow_reader_of_a_non_blocking_pipe_all_arrive() -> None:
    lines = [f"{number} " + "x" * 200 for number in range(200)] + ["y" * 10_000]  # the last needs several writes
    reader, end = os.pipe()
    with open(reader, "rb", buffering=0) as reading, open(end, "wb", buffering=0) as writing:
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
        os.set_blocking(end, False)
        writer = logs.LineWriter(end)
        writer.add(lines)
        data = b""
        while not data.endswith(b"y\n") and select.select([reading], [], [], 3)[0]:
            data += reading.read(300)
    assert data.decode().splitlines() == lines
    assert writer.dropped == 0


def test_lines_that_a_full_disk_refuses_are_counted() -> None:
    with Path("/dev/full").open("wb", buffering=0) as file:
        writer = logs.LineWriter(file.fileno())
        writer.add(["x" * 200] * 200)
        writer.close()
        assert writer.dropped == 200


# Its file may have so many bytes, and then as many as it likes.
FILL_THE_DISK = """
import resource, sys
from server import logs
with open(sys.argv[1], "wb", buffering=0) as file:
    writer = logs.LineWriter(file.fileno())
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
    writer.add(["a" * 200, "b" * 200])
    writer.close()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    writer.add(["c", "d"])
    writer.close()
    print(writer.dropped)
"""


@pytest.mark.parametrize("room", [201, 300])
def test_a_line_after_those_that_a_full_disk_refused_or_cut_is_a_line_of_its_own(tmp_path: Path, room: int) -> None:
    command = [sys.executable, "-c", FILL_THE_DISK, str(tmp_path / "log"), str(room)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "1\n"
    cut = ["b" * 99] if room == 300 else []
    assert (tmp_path / "log").read_text().splitlines() == ["a" * 200, *cut, "c", "d"]


def test_lines_that_still_wait_when_the_writer_gives_up_are_counted() -> None:
    reader, end = os.pipe()
    with open(end, "wb", buffering=0):
        fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, 4096)
        writer = logs.LineWriter(end)
        writer.add(["x" * 200] * 50)
        wait_until(lambda: writer.taken == 20)  # which fit into the pipe
        writer.close()
        assert writer.dropped == 30
        os.close(reader)
        wait_until(lambda: writer.taken == 50)  # now the thread no longer writes


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
