"""Metrics and request ids, asked of real gunicorns on a real Postgres."""

import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg2
import pytest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

import hello
from server import metrics, telemetry
from server.telemetry import Outage, reason
from tests.support.monitored import MonitoredService, PipedService
from tests.support.network import exchange
from tests.support.postgres import Database
from tests.support.service import SHORT_TIMEOUTS
from tests.support.wait import in_thread, wait_until

HELLO = hello.USER_ROUTE
TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
Figures = dict[tuple[str, ...], float]
IDS = f"{TRACE_ID}-{PARENT_ID}"


@pytest.fixture(scope="module")
def shared(database: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[MonitoredService]:
    """A service for the tests that leave it as they found it; with one worker, whose counts are never late."""
    own = {"WEB_CONCURRENCY": "1", "TMPDIR": str(tmp_path_factory.mktemp("temporary"))}
    with MonitoredService(tmp_path_factory.mktemp("shared"), database, **own) as service:
        yield service


def kill_a_worker(service: MonitoredService) -> None:
    """Kill a worker, and wait until another has taken its place."""
    before = service.workers()
    wait_until(lambda: service.metrics()["hello_workers"][()] == len(before))  # none is still starting
    starts = service.metrics()["hello_worker_starts_total"][()]
    os.kill(before[0], signal.SIGKILL)
    wait_until(lambda: before[0] not in service.workers() and len(service.workers()) == len(before))
    wait_until(lambda: service.metrics()["hello_worker_starts_total"][()] == starts + 1)


def increase(before: Figures, after: Figures) -> Figures:
    """Return by how much each sample grew; without those that did not."""
    return {labels: value - before.get(labels, 0) for labels, value in after.items() if value != before.get(labels, 0)}


# --- Requests ---------------------------------------------------------------------------------------


def test_metrics_after_a_worker_was_killed_add_up_to_what_the_client_counted(
    database: dict[str, str], tmp_path: Path
) -> None:
    def add_up() -> bool:
        metrics = service.metrics()
        requests = increase({}, metrics["http_requests_total"])
        durations = increase({}, metrics["http_request_duration_seconds_count"])
        return requests == durations == service.answered and metrics["hello_workers"] == {(): 2}

    with MonitoredService(tmp_path, database) as service:
        for kills in range(3):
            if kills:
                kill_a_worker(service)
            service.work(rounds=3)
            wait_until(add_up)
            assert service.metrics()["hello_worker_starts_total"] == {(): 2 + kills}
        service.process.send_signal(signal.SIGTTOU)  # one worker less, for good
        wait_until(lambda: service.metrics()["hello_workers"] == {(): 1})


def test_counters_never_fall_while_workers_are_killed_under_load(database: dict[str, str], tmp_path: Path) -> None:
    key = ("GET", HELLO, "404")
    failures: list[Exception] = []
    shown: list[float] = []
    done = threading.Event()

    def client() -> None:
        while not done.is_set():
            try:
                service.ask("GET", "/hello/Nobody")
            except OSError as error:
                failures.append(error)

    def watch() -> None:
        while not done.is_set():
            with contextlib.suppress(OSError):
                shown.append(service.metrics()["http_requests_total"][key])

    with MonitoredService(tmp_path, database) as service:
        threads = [in_thread(call) for call in (watch, client, client, client, client)]
        try:
            for count in (20, 40):
                wait_until(lambda count=count: service.answered[key] >= count)  # type: ignore[misc]
                kill_a_worker(service)
        finally:
            done.set()
        for future in threads:
            future.result(30)
    assert shown == sorted(shown)
    # A worker may die between counting and answering.
    assert 0 < shown[-1] <= service.answered[key] + len(failures)


def reload(service: MonitoredService) -> None:
    """Have the worker replaced, and wait until it is."""
    before = service.workers()
    service.process.send_signal(signal.SIGHUP)
    wait_until(lambda: len(now := service.workers()) == 1 and now != before)


def test_reloads_lose_no_count_and_later_requests_are_answered(database: dict[str, str], tmp_path: Path) -> None:
    with MonitoredService(tmp_path, database, WEB_CONCURRENCY="1") as service:
        for reloads in range(3):  # the worker of the third generation has the number of the first
            if reloads:
                reload(service)
            service.work(clients=1, rounds=3)
            wait_until(lambda: service.requests() == service.answered)
            assert service.metrics()["hello_workers"] == {(): 1}
            assert service.metrics()["hello_worker_starts_total"] == {(): 1 + reloads}


def test_metrics_of_unknown_paths_share_one_name(shared: MonitoredService) -> None:
    before = shared.requests()
    for word in ("odd", "Odd", "hello", "%6Fdd", "openapi"):
        shared.ask("GET", f"/{word}?odd={word}")
    assert increase(before, shared.requests()) == {("GET", "unmatched", "404"): 5}
    assert not any("odd" in name.lower() for key in shared.requests() for name in key)


def test_protocol_errors_are_counted_by_status_from_zero(shared: MonitoredService) -> None:
    before = shared.metrics()["http_requests_refused_total"]
    assert {status for (status,) in before} == {"400", "408", "413", "414", "417", "431", "501", "505"}
    for request in (b"sesame\r\n\r\n", b"GET /sesame HTTP/1.1\r\n\r\n", b"GET /" + b"a" * 9000):
        assert exchange(shared.port, request).startswith(b"HTTP/1.1 4")
    refused = shared.metrics()["http_requests_refused_total"]
    assert increase(before, refused) == {("400",): 2, ("414",): 1}


def test_metrics_tell_what_runs(shared: MonitoredService) -> None:
    version = ".".join(map(str, sys.version_info[:3]))
    [(labels, value)] = shared.metrics()["hello_build_info"].items()
    assert (sorted(labels), value) == (sorted([hello.__version__, version]), 1)


# --- Snapshots --------------------------------------------------------------------------------------


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Memory for snapshots without any."""
    file = os.memfd_create("test")
    monkeypatch.setattr(metrics, "MEMORY", file)
    yield file
    os.close(file)


def counted(value: float) -> list[Metric]:
    return [CounterMetricFamily("words", "Words.", value), GaugeMetricFamily("size", "Size.", 1)]


def test_snapshot_of_each_worker_is_the_last_that_it_wrote(memory: int) -> None:
    for value in (1, 2, 3):
        metrics.write_snapshot(1, counted(value))
    metrics.write_snapshot(3, counted(10))
    found = [metrics.read_snapshot(number) for number in (1, 2, 3, 4)]
    assert found == [counted(3), [], counted(10), []]


def test_snapshot_of_a_worker_that_was_killed_while_it_wrote_is_the_one_before(
    memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics.write_snapshot(1, counted(1))
    metrics.write_snapshot(1, counted(2))

    def write_half(file: int, data: bytes, offset: int) -> None:
        monkeypatch.undo()
        os.pwrite(file, data[: len(data) // 2], offset)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "pwrite", write_half)
    with pytest.raises(KeyboardInterrupt):
        metrics.write_snapshot(1, counted(3))
    monkeypatch.setattr(metrics, "MEMORY", memory)
    assert metrics.read_snapshot(1) == counted(2)


def test_snapshot_of_a_worker_that_ended_has_no_gauges(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics.write_snapshot(1, counted(1))
    later = time.monotonic() + metrics.ALIVE_SECONDS
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert metrics.read_snapshot(1) == counted(1)[:1]


def test_a_worker_goes_on_from_the_counters_of_the_last_one_with_its_number(memory: int) -> None:
    metrics.write_snapshot(1, counted(5))
    shared = metrics.SharedMetrics(1, "2.0.0")
    shared.share()
    totals = {metric.name: metric for metric in metrics.read_snapshot(1)}
    assert totals["words"] == counted(5)[0]
    assert "size" not in totals


# --- Database ---------------------------------------------------------------------------------------


def test_metrics_of_each_statement_count_its_requests(shared: MonitoredService) -> None:
    before = shared.metrics()
    for _ in range(3):
        shared.put("Zoe")
    shared.ask("GET", "/hello/Zoe")
    after = shared.metrics()
    for name in ("database_batch_size_sum", "database_query_duration_seconds_count"):
        assert increase(before[name], after[name]) == {("find",): 1, ("save",): 3}


def test_metrics_while_statements_wait_show_the_pool_and_the_requests_in_progress(
    postgres: Database, shared: MonitoredService
) -> None:
    def is_busy() -> bool:
        metrics = shared.metrics()
        return metrics["database_pool_in_use"]["read",] > 0 and metrics["database_pool_waiting"]["find",] > 0

    def is_idle() -> bool:
        metrics = shared.metrics()
        names = "http_requests_in_progress", "database_pool_in_use", "database_pool_waiting"
        return not any(value for name in names for value in metrics[name].values())

    def ask() -> None:
        while not done.is_set():
            shared.ask("GET", "/hello/Zoe")

    assert shared.metrics()["database_pool_size"] == {("read",): 1, ("write",): 1}
    done = threading.Event()
    with postgres.locked("LOCK TABLE users IN ACCESS EXCLUSIVE MODE"):
        clients = [in_thread(ask) for _ in range(6)]
        wait_until(is_busy)
        assert shared.metrics()["http_requests_in_progress"][()] > 0
        done.set()
    for client in clients:
        client.result(20)
    wait_until(is_idle)  # a worker that looks at its idle connections uses them for a moment


def test_an_outage_is_counted_by_class_and_logged_as_two_warnings(tmp_path: Path) -> None:
    database = Database(tmp_path / "data")
    database.start()
    try:
        database.prepare()
        with MonitoredService(tmp_path, database.service_environment, WEB_CONCURRENCY="1", **SHORT_TIMEOUTS) as service:
            assert service.ask("GET", "/hello/Nobody").status == 404
            database.kill()
            for _ in range(3):
                assert service.ask("GET", "/hello/Nobody").status == 503
            assert service.metrics()["database_errors_total"]["OperationalError",] >= 3
            database.start()
            wait_until(lambda: service.ask("GET", "/hello/Nobody").status == 404)
            wait_until(lambda: service.ask("GET", "/hello/Nobody").status and service.lines("database: back"))
            first, last = service.lines("database: ")
            assert first["level"] == last["level"] == "warning"
            assert first["message"].startswith("database: find failed: ")
            assert "SQLSTATE None" not in first["message"]
            count = service.answered["GET", HELLO, "503"]
            assert re.fullmatch(rf"database: back after \d+\.\d s, {count} requests got 503", last["message"])
    finally:
        database.stop()


def test_a_success_soon_after_a_failure_does_not_end_an_outage(caplog: pytest.LogCaptureFixture) -> None:
    outage = Outage()
    for now in (10, 10.5, 11):
        outage.failure("save", TimeoutError("Postgres does not answer in time"), now)
        outage.success(now + 0.4)
    assert caplog.messages == ["database: save failed: Postgres does not answer in time"]


def test_an_outage_lasts_until_the_first_success_after_it(caplog: pytest.LogCaptureFixture) -> None:
    outage = Outage()
    outage.failure("find", TimeoutError("Postgres does not answer in time"), 10)
    for now in (14.5, 15.5):
        outage.success(now)
    assert caplog.messages[1:] == ["database: back after 4.5 s, 0 requests got 503"]


def test_the_reason_of_a_refused_value_quotes_no_row(database: dict[str, str], postgres: Database) -> None:
    with pytest.raises(psycopg2.Error) as caught:
        postgres.query("SELECT 'Quetzalcoatl'::date")
    assert reason(caught.value) == "InvalidDatetimeFormat, SQLSTATE 22007"


def test_the_reason_of_a_failed_connection_names_the_server() -> None:
    with pytest.raises(psycopg2.OperationalError) as caught:
        psycopg2.connect(host="/nowhere", port=5432)
    assert reason(caught.value).startswith('connection to server on socket "/nowhere/.s.PGSQL.5432" failed')


def test_the_reason_of_a_defect_is_its_class() -> None:
    assert reason(ValueError("year 10000 is out of range")) == "ValueError"


# --- The port of the metrics ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/metrics", 200), ("HEAD", "/metrics", 200), ("POST", "/metrics", 405)]
    + [("GET", "/hello/Zoe", 404), ("OPTIONS", "*", 400)],
)
def test_the_port_of_the_metrics_serves_nothing_else(
    shared: MonitoredService, method: str, path: str, status: int
) -> None:
    response = shared.ask_for_metrics(method, path)
    assert response.status == status
    assert "PUT" not in response.headers.get("Allow", "")
    assert int(response.headers["Content-Length"]) == len(response.content) or method == "HEAD"


def test_the_port_of_the_service_serves_no_metrics(shared: MonitoredService) -> None:
    request = f"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1:{shared.metrics_port}\r\n\r\n"
    assert exchange(shared.port, request.encode()).startswith(b"HTTP/1.1 404 ")


def test_both_ports_listen_on_this_machine_only(shared: MonitoredService) -> None:
    [line] = shared.lines("Listening")
    assert f"http://127.0.0.1:{shared.port},http://127.0.0.1:{shared.metrics_port}" in line["message"]


def test_telemetry_off_leaves_out_metrics_request_ids_and_lines(database: dict[str, str], tmp_path: Path) -> None:
    with MonitoredService(tmp_path, database, WEB_CONCURRENCY="1", TELEMETRY="off") as service:
        assert service.ask("GET", "/metrics").status == 404
        with pytest.raises(ConnectionRefusedError):
            service.ask_for_metrics()
        assert "X-Request-Id" not in service.ask("GET", "/hello/Zoe").headers
        service.process.terminate()
        service.process.wait(20)
        assert service.lines() == []


# --- Identity of a request --------------------------------------------------------------------------


@pytest.mark.parametrize("sent", ["a", "order-66", "A.b_c-9", "x" * 128])
def test_a_valid_request_id_is_returned(shared: MonitoredService, sent: str) -> None:
    assert shared.ask("GET", "/hello/Nobody", None, f"X-Request-Id: {sent}").headers["X-Request-Id"] == sent


@pytest.mark.parametrize("sent", ["", " ", "x" * 129, "a b", 'a"b', "a,b", "é", "a\\n", "<script>", "{}", "a/b"])
def test_another_request_id_is_replaced(shared: MonitoredService, sent: str) -> None:
    headers = shared.ask("GET", "/hello/Nobody", None, f"X-Request-Id: {sent}").headers
    assert re.fullmatch("[0-9a-f]{32}", headers["X-Request-Id"])


def test_request_ids_are_made_for_every_answer_and_differ(shared: MonitoredService) -> None:
    paths = ["/hello/Nobody", "/hello/4", "/nowhere", "/livez", "/readyz", "/hello/Nobody"]
    assert len({shared.ask("GET", path).headers["X-Request-Id"] for path in paths}) == len(paths)


@pytest.mark.parametrize("sent", [f"00-{IDS}-00", f"00-{IDS}-ff", f"01-{IDS}-01", f"01-{IDS}-01-more"])
def test_a_valid_traceparent_gives_its_trace_id(sent: str) -> None:
    assert telemetry.trace_id_of({"HTTP_TRACEPARENT": sent}) == TRACE_ID


@pytest.mark.parametrize(
    "sent",
    ["", TRACE_ID, f"00-{'0' * 32}-{PARENT_ID}-01", f"00-{TRACE_ID}-{'0' * 16}-01", f"00-{IDS.upper()}-01"]
    + [f"ff-{IDS}-01", f"00-{IDS}-01-more", f"00-{IDS}-01-", f"01-{IDS}-01more", f"00-{IDS[1:]}-01", f"00-{IDS}-1"]
    + [f"0-{IDS}-01", f"00-{IDS}", f"00-{IDS}-01,00-{IDS}-01", f"00-{IDS}-01".replace("-", "_")],
)
def test_another_traceparent_gives_no_trace_id(sent: str) -> None:
    assert telemetry.trace_id_of({"HTTP_TRACEPARENT": sent}) == ""


# --- Failures that cost figures only ----------------------------------------------------------------


def test_a_full_disk_stops_no_worker_and_metrics_still_count(database: dict[str, str], tmp_path: Path) -> None:
    no_file_grows = ["sh", "-c", 'ulimit -f 0; exec "$@"', "sh"]
    with PipedService(tmp_path, database, prefix=no_file_grows) as service:
        assert service.ask("GET", "/hello/Nobody").status == 404
        assert service.requests()["GET", HELLO, "404"] == 1
        [worker] = service.workers()
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: service.workers() not in ([], [worker]))
        wait_until(service.is_up)
        assert service.metrics()["hello_workers"] == {(): 1}


def test_the_service_has_no_file_that_others_could_remove_or_fill(shared: MonitoredService) -> None:
    shared.work(clients=1, rounds=1)
    for pid in [shared.process.pid, *shared.workers()]:
        assert " /dev/shm/" not in Path(f"/proc/{pid}/maps").read_text()
    assert os.listdir(shared.environment["TMPDIR"]) == []
