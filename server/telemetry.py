"""Metrics, log lines and request ids of hello: a wrapper around its application, put there by gunicorn.conf.py.

Settings (environment variables)
    METRICS_PORT  port where the same workers serve GET /metrics and nothing else (default 8081; 0: nowhere)
    METRICS_HOST  address of that port (default 127.0.0.1: only this machine may look)
    LOG_FORMAT    json, one object a line, or text (default text where standard output is a terminal, else json)
    LOG_LEVEL     debug, info, warning, error or critical (default info); below info, no line for each request
    TELEMETRY     off: no metrics, no request lines, no request ids, to measure what they cost (default on)

Whatever is written here is about a route, never about a user: no path, query string, username, date of birth, and
of an exception its class and its place, because its text may quote any of these. Only the ids of a request and its
trace are as its client chose them.

gunicorn's master imports this module before its workers make the standard library cooperative: so nothing of that
library which waits is imported by name, and neither is hello.
"""

import contextlib
import json
import logging
import os
import platform
import re
import sys
import threading
import time
import traceback
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from random import getrandbits
from select import PIPE_BUF
from time import gmtime, perf_counter, process_time, strftime
from types import ModuleType
from typing import Any
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from prometheus_client import Counter, Gauge, Histogram, generate_latest, multiprocess, values
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

METRICS_PORT = str(int(os.environ.get("METRICS_PORT") or "8081"))  # as the environ has it
LOG_FORMAT = os.environ.get("LOG_FORMAT") or ("text" if sys.stdout.isatty() else "json")
LOG_LEVEL = os.environ.get("LOG_LEVEL") or "info"
IS_ON = os.environ.get("TELEMETRY") != "off"

METHODS = {"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"}  # any other is "other"
UNMATCHED = "unmatched"  # the route of a path that has none
PROBES = {"/livez", "/readyz"}  # asked every few seconds for ever: counted, not logged
# A request takes about 1 ms alone and 10 ms under load; 0.25 s is what the alert on latency counts from, and
# with a database that fails, QUEUE_TIMEOUT + DATABASE_TIMEOUT = 4.5 s is the most.
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
ROWS = (1, 2, 5, 10, 20, 50, 100, 200)  # BATCH_SIZE is 100
SAMPLE_SECONDS = 1  # far below any scrape interval
FLUSH_SECONDS, FLUSH_ENTRIES = 0.05, 100

LOG = logging.getLogger("hello")

# --- Log lines --------------------------------------------------------------------------------------


class Clock:
    """Writes a time as RFC 3339 in UTC with milliseconds; keeps the second's text, which is the costly part."""

    second, text = -1, ""

    def __call__(self, seconds: float) -> str:
        if (second := int(seconds)) != self.second:
            self.text, self.second = strftime("%Y-%m-%dT%H:%M:%S", gmtime(second)), second
        return f"{self.text}.{int((seconds - second) * 1000):03d}Z"


utc = Clock()


def place(error: BaseException) -> str:
    """Say what an exception is and where it was raised, and nothing of what it says."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno} in {frames[-1].name}" if frames else ""
    return type(error).__name__ + where


class Formatter(logging.Formatter):
    """Gives the lines of gunicorn and of hello the same shape as the requests' own."""

    def format(self, record: logging.LogRecord) -> str:
        moment, level, message = utc(record.created), record.levelname.lower(), record.getMessage()
        error = record.exc_info[1] if record.exc_info else None
        if LOG_FORMAT == "text":
            return f"{moment} {level:8} {message}{': ' + place(error) if error else ''}"
        entry = {"time": moment, "level": level, "message": message}
        return json.dumps(entry | {"exception": place(error)} if error else entry)


def log_defect(context: object, kind: type, error: BaseException, trace: object) -> None:
    """Log an exception that nothing caught; gevent would print all it says."""
    LOG.error("uncaught exception", exc_info=(kind, error.with_traceback(trace), trace))


# Of a request: its time, method, route, status, duration in seconds, bytes, request id and trace id. Each is of a
# closed set, or of an alphabet that needs no escaping.
Entry = tuple[float, str, str, str, float, int, str, str]


def json_line(entry: Entry) -> str:
    moment, method, route, status, seconds, size, request_id, trace_id = entry
    trace = f', "trace_id": "{trace_id}"' if trace_id else ""
    return (
        f'{{"time": "{utc(moment)}", "level": "info", "message": "request", "method": "{method}", "route": "{route}", '
        f'"status": {status}, "duration_seconds": {seconds:.6f}, "bytes": {size}, "request_id": "{request_id}"{trace}}}\n'
    )


def text_line(entry: Entry) -> str:
    moment, method, route, status, seconds, size, request_id, trace_id = entry
    trace = f" trace {trace_id}" if trace_id else ""
    return (
        f"{utc(moment)} info     {method} {route} {status} {seconds * 1000:.1f} ms, {size} bytes, {request_id}{trace}\n"
    )


class RequestLog:
    """Writes the lines of requests to standard output, those of FLUSH_SECONDS together.

    One by one they took a tenth of the throughput, for each wakes the reader of the pipe. A worker that is killed
    loses its last lines, but none of its counts.
    """

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.has_entries = threading.Event()
        self.line = text_line if LOG_FORMAT == "text" else json_line
        threading.Thread(target=self.flush_now_and_then, daemon=True).start()

    def add(self, entry: Entry) -> None:
        """Write an entry's line within FLUSH_SECONDS."""
        self.entries.append(entry)
        if len(self.entries) == 1:
            self.has_entries.set()
        elif len(self.entries) == FLUSH_ENTRIES:
            self.flush()

    def flush(self) -> None:
        """Write the lines in pieces of less than PIPE_BUF bytes, which those of other workers cannot tear."""
        entries, self.entries = self.entries, []
        piece = ""
        for line in [*map(self.line, entries), ""]:
            if not line or len(piece) + len(line) > PIPE_BUF:
                with contextlib.suppress(OSError):  # that nobody reads any more is no reason not to serve
                    os.write(1, piece.encode())
                piece = ""
            piece += line

    def flush_now_and_then(self) -> None:
        while self.has_entries.wait():
            time.sleep(FLUSH_SECONDS)
            self.has_entries.clear()
            self.flush()


# --- Identity of a request --------------------------------------------------------------------------

REQUEST_ID = re.compile("[A-Za-z0-9._-]{1,128}")
# W3C Trace Context, section 3.2: version ff and ids of zeros are invalid, and only later versions may say more.
TRACEPARENT = re.compile(
    "(?!ff|00.{54})[0-9a-f]{2}-(?!0{32})(?P<trace_id>[0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?"
)


def request_id_of(environ: WSGIEnvironment) -> str:
    """Return the client's X-Request-Id where it is sane, else a new one."""
    sent = environ.get("HTTP_X_REQUEST_ID")
    return sent if sent and REQUEST_ID.fullmatch(sent) else f"{getrandbits(128):032x}"


def trace_id_of(environ: WSGIEnvironment) -> str:
    """Return the trace id of a valid traceparent header, else nothing."""
    sent = environ.get("HTTP_TRACEPARENT")
    match = sent and TRACEPARENT.fullmatch(sent)
    return match["trace_id"] if match else ""


# --- Metrics ----------------------------------------------------------------------------------------


def observer(histogram: Histogram) -> Callable[[float], None]:
    """Return what a histogram's `observe` does, without the library's layers.

    Those cost as much as all the rest of telemetry. It adds to the same shared
    memory, where the library finds it. A worker is one thread: nothing needs a lock. The attributes are the library's
    own: its version is pinned, and the tests compare the two.
    """
    file = histogram._sum._file
    cells = memoryview(file._m).cast("d")
    bounds = histogram._upper_bounds
    buckets = [file._positions[value._key] // cells.itemsize for value in histogram._buckets]
    total = file._positions[histogram._sum._key] // cells.itemsize

    def observe(amount: float) -> None:
        cells[buckets[bisect_left(bounds, amount)]] += 1
        cells[total] += amount

    return observe


class Telemetry:
    """The metrics of one worker, and the application with them around it.

    Args:
        application: hello's.
        service: the module hello, whose `observe` and whose two batchers tell of the database.
        number: the worker's, from 1 up; a worker takes over the number, and so the counts, of one that died.
    """

    def __init__(self, application: WSGIApplication, service: ModuleType, number: int) -> None:
        # The library would keep a file for each process id: more of them with each death, for ever.
        values.ValueClass = values.MultiProcessValue(lambda: number)
        self.application = application
        self.log = RequestLog().add if LOG_LEVEL in {"debug", "info"} else None
        self.running = 0
        self.series: dict[tuple[str, str, str], Callable[[float], None]] = {}
        self.logged: dict[str, float] = {}  # when a database error of a class was last logged

        def metric(kind: Callable[..., Any], name: str, text: str, *labels: str, **options: Any) -> Any:
            if kind is Gauge:  # summed over the workers that live
                options = {"multiprocess_mode": "livesum"} | options
            return kind(name, text, labels, registry=None, **options)

        labels = ("method", "route", "status")
        text = "Time from a request's whole arrival to its response."
        self.durations = metric(Histogram, "http_request_duration_seconds", text, *labels, buckets=SECONDS)
        self.in_progress = metric(Gauge, "http_requests_in_progress", "Requests not yet answered.")
        text = "Time of a statement, with connecting and a second try."
        queries = metric(Histogram, "database_query_duration_seconds", text, "operation", buckets=SECONDS)
        batches = metric(Histogram, "database_batch_size", "Requests a statement served.", "operation", buckets=ROWS)
        text = "What was no request: malformed, too long or too slow."
        self.refused = metric(Counter, "http_requests_refused_total", text, "status")
        self.errors = metric(Counter, "database_errors_total", "Statements that failed.", "class")
        size = metric(Gauge, "database_pool_size", "Connections there may be.", "operation")
        in_use = metric(Gauge, "database_pool_in_use", "Connections that run a statement.", "operation")
        waiting = metric(Gauge, "database_pool_waiting", "Requests that wait for a connection.", "operation")
        metric(Counter, "hello_worker_starts_total", "Workers started.").inc()
        metric(Gauge, "hello_workers", "Workers that live.").set(1)
        self.cpu = metric(Counter, "process_cpu_seconds_total", "User and system CPU time of the workers.")
        text = "Always 1; the labels tell what runs."
        build = metric(Gauge, "hello_build_info", text, "version", "python", multiprocess_mode="livemax")
        build.labels(service.__version__, platform.python_version()).set(1)

        self.pools = []
        self.statements = {}
        for pool in (service.find_date_of_birth, service.save_date_of_birth):
            operation = pool.statement.__name__
            self.statements[operation] = observer(queries.labels(operation)), observer(batches.labels(operation))
            size.labels(operation).set(pool.idle.qsize())
            gauges = in_use.labels(operation).set, waiting.labels(operation).set
            self.pools.append((pool, pool.idle.qsize(), *gauges))
        # Counters are there from the start: rate() cannot see the step from nothing to the first error.
        hello = [("GET", status) for status in ("200", "400", "404", "503")]
        hello += [("PUT", status) for status in ("204", "400", "503")]
        for method, status in hello:
            self.add_series(method, service.HELLO, status)
        for status in ("200", "503"):
            self.add_series("GET", "/readyz", status)
        for status in ("400", "408", "414", "417", "431"):
            self.refused.labels(status)
        for name in ("OperationalError", "QueryCanceled", "TimeoutError"):
            self.errors.labels(name)
        service.observe = self.observe
        threading.Thread(target=self.sample, daemon=True).start()

    def add_series(self, *key: str) -> Callable[[float], None]:
        """Return what counts and times a request; kept, for the library's own way to it is slow."""
        return self.series.setdefault(key, observer(self.durations.labels(*key)))

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer a request (PEP 3333): as the application does, with X-Request-Id, counted and logged."""
        if environ["SERVER_PORT"] == METRICS_PORT:
            return serve_metrics(environ, start_response)
        start = perf_counter()
        request_id = request_id_of(environ)
        status = ""

        def start_with_id(line: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
            nonlocal status
            status = line[:3]
            return start_response(line, [*headers, ("X-Request-Id", request_id)], exc_info)

        self.running += 1
        try:
            content = self.application(environ, start_with_id)
        finally:
            self.running -= 1
        method, route = environ["REQUEST_METHOD"], environ.get("hello.route", UNMATCHED)
        key = method if method in METHODS else "other", route, status
        observe = self.series.get(key) or self.add_series(*key)
        seconds = perf_counter() - start
        observe(seconds)
        if self.log and route not in PROBES:
            size = sum(map(len, content))
            self.log((time.time(), *key, seconds, size, request_id, trace_id_of(environ)))
        return content

    def observe_refusal(self, status: int) -> None:
        """Count a refusal of worker.py's, which never reaches the application."""
        self.refused.labels(str(status)).inc()

    def observe(self, statement: str, rows: int, seconds: float, error: BaseException | None) -> None:
        """Count a statement; log its failure, at most once a second for each class."""
        observe_seconds, observe_rows = self.statements[statement]
        observe_seconds(seconds)
        observe_rows(rows)
        if error is not None:
            name, now = type(error).__name__, perf_counter()
            self.errors.labels(name).inc()
            if now - self.logged.get(name, -1) >= 1:
                self.logged[name] = now
                LOG.warning("database: %s failed, %s, SQLSTATE %s", statement, name, getattr(error, "pgcode", None))

    def sample(self) -> None:
        """Write down now and then what changes with every request, which is cheaper than each time."""
        spent = 0.0
        while True:
            self.in_progress.set(self.running)
            for pool, size, set_in_use, set_waiting in self.pools:
                set_in_use(size - pool.idle.qsize())
                set_waiting(sum(len(batch.rows) for batch in pool.waiting))
            before, spent = spent, process_time()
            self.cpu.inc(spent - before)
            time.sleep(SAMPLE_SECONDS)


class Sums(Collector):
    """The metrics summed over all workers, and http_requests_total: each duration is one request."""

    def collect(self) -> Iterator[Metric]:
        for metric in multiprocess.MultiProcessCollector(None).collect():
            yield metric
            if metric.name == "http_request_duration_seconds":
                requests = CounterMetricFamily("http_requests", "Requests answered.")
                for sample in metric.samples:
                    if sample.name.endswith("_count"):
                        requests.add_sample("http_requests_total", sample.labels, sample.value)
                yield requests


def serve_metrics(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
    """Answer on the metrics' port: GET /metrics with the sums over all workers, in Prometheus' text format."""
    headers = [("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff")]
    if environ["PATH_INFO"] != "/metrics":
        status, kind, content = "404 Not Found", "application/json", b'{"message": "There is only /metrics here."}'
    elif environ["REQUEST_METHOD"] not in {"GET", "HEAD"}:
        status, kind, content = "405 Method Not Allowed", "application/json", b'{"message": "Use GET or HEAD."}'
        headers.append(("Allow", "GET, HEAD"))
    else:
        status, kind, content = "200 OK", CONTENT_TYPE_PLAIN_0_0_4, generate_latest(Sums())
    start_response(status, [*headers, ("Content-Type", kind), ("Content-Length", str(len(content)))])
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [content]
