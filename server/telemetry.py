"""Metrics and request ids of hello, and the log lines of its requests: a wrapper around the application in each worker.

What is counted and logged is about a route, never about a user: see logs.py.
"""

import contextlib
import platform
import re
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from http import HTTPMethod
from random import getrandbits
from time import perf_counter, process_time
from types import ModuleType
from typing import Any, NamedTuple
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

import psycopg2
from prometheus_client import Counter, Gauge, Histogram, generate_latest, multiprocess, values
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from server import settings
from server.logs import LOG, WRITER, logs_requests, request_template

METRICS_PORT = str(settings.METRICS_PORT)  # as SERVER_PORT has it
METHODS = {method.value for method in HTTPMethod}
UNMATCHED = "unmatched"  # the route of an unknown path
PROBES = {"/livez", "/readyz"}  # counted, not logged: probes repeat every few seconds
# 0.25 s is the bound of the alert on latency; with a database that fails, a request takes 4.5 s at most.
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
ROWS = (1, 2, 5, 10, 20, 50, 100, 200)  # BATCH_SIZE is 100
SAMPLE_SECONDS = 1  # far below any scrape interval

# --- Identity of a request --------------------------------------------------------------------------

REQUEST_ID = re.compile("[A-Za-z0-9._-]{1,128}")
# W3C Trace Context, section 3.2: version ff and ids of zeros are invalid, and only later versions may say more.
TRACEPARENT = re.compile(
    "(?!ff|00.{54})[0-9a-f]{2}-(?!0{32})(?P<trace_id>[0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?"
)


def method_label(method: str) -> str:
    """Return a method that HTTP defines, or "other": a client cannot create series."""
    return method if method in METHODS else "other"


def new_request_id() -> str:
    return f"{getrandbits(128):032x}"


def request_id_of(environ: WSGIEnvironment) -> str:
    """Return the client's X-Request-Id if it is valid, else a new one."""
    sent = environ.get("HTTP_X_REQUEST_ID")
    return sent if sent and REQUEST_ID.fullmatch(sent) else new_request_id()


def trace_id_of(environ: WSGIEnvironment) -> str:
    """Return the trace id of a valid traceparent header, else nothing."""
    sent = environ.get("HTTP_TRACEPARENT")
    match = TRACEPARENT.fullmatch(sent) if sent else None
    return match["trace_id"] if match else ""


# --- Metrics ----------------------------------------------------------------------------------------


def histogram(name: str, text: str, *labels: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
    return Histogram(name, text, labels, registry=None, buckets=buckets)


def counter(name: str, text: str, *labels: str) -> Counter:
    return Counter(name, text, labels, registry=None)


def gauge(name: str, text: str, *labels: str, mode: Any = "livesum") -> Gauge:
    """Return a gauge; the default mode is the sum over the running workers."""
    return Gauge(name, text, labels, registry=None, multiprocess_mode=mode)


class Metrics:
    """The metrics of one worker."""

    def __init__(self, version: str) -> None:
        labels = ("method", "route", "status")
        self.durations = histogram(
            "http_request_duration_seconds", "Time from the arrival of a whole request to its response.", *labels
        )
        self.in_progress = gauge("http_requests_in_progress", "Requests not yet answered.")
        self.refused = counter("http_requests_refused_total", "Malformed requests refused.", "status")
        self.queries = histogram(
            "database_query_duration_seconds", "Time of a statement, including connecting.", "operation"
        )
        self.batches = histogram("database_batch_size", "Requests served by one statement.", "operation", buckets=ROWS)
        self.errors = counter("database_errors_total", "Statements that failed.", "class")
        self.pool_size = gauge("database_pool_size", "Maximum connections.", "operation")
        self.pool_in_use = gauge("database_pool_in_use", "Connections that run a statement.", "operation")
        self.pool_waiting = gauge("database_pool_waiting", "Requests that wait for a connection.", "operation")
        self.dropped = counter("log_lines_dropped_total", "Log lines dropped because nobody read the earlier ones.")
        self.cpu = counter("process_cpu_seconds_total", "User and system CPU time of the workers.")
        counter("hello_worker_starts_total", "Workers started.").inc()
        gauge("hello_workers", "Running workers.").set(1)
        build = gauge("hello_build_info", "Build information; always 1.", "version", "python", mode="livemax")
        build.labels(version, platform.python_version()).set(1)

    def start_at_zero(self, user_route: str) -> None:
        """Create the series of the alerts at 0: rate() ignores a series' first value."""
        series = [("GET", user_route, status) for status in ("200", "400", "404", "503")]
        series += [("PUT", user_route, status) for status in ("204", "400", "503")]
        series += [("GET", "/readyz", status) for status in ("200", "503")]
        for labels in series:
            self.durations.labels(*labels)
        for status in ("400", "408", "413", "414", "417", "431", "501", "505"):
            self.refused.labels(status)
        for name in ("OperationalError", "QueryCanceled", "TimeoutError"):
            self.errors.labels(name)


# --- Database ---------------------------------------------------------------------------------------


def reason(error: Exception) -> str:
    """Describe an error without quoting a row: libpq's text if the connection failed, else class and SQLSTATE."""
    text = str(error).strip().partition("\n")[0]
    code = getattr(error, "pgcode", None)
    if code:
        return f"{type(error).__name__}, SQLSTATE {code}"
    return text if text and isinstance(error, (psycopg2.OperationalError, OSError)) else type(error).__name__


class Outage:
    """Log two warnings for each outage of the database: at its begin, and at its end with its duration.

    The methods take the time in monotonic seconds.
    """

    def __init__(self) -> None:
        self.began: float | None = None
        self.failed = 0.0  # time of the last failure
        self.recovered: float | None = None  # time of the first success after it
        self.unavailable = 0  # responses with 503 since the outage began

    def failure(self, operation: str, error: Exception, now: float) -> None:
        self.failed, self.recovered = now, None
        if self.began is None:
            self.began, self.unavailable = now, 0
            LOG.warning("database: %s failed: %s", operation, reason(error))

    def success(self, now: float) -> None:
        """End the outage if no statement failed for a second: until then, others may still fail."""
        if self.began is None:
            return
        self.recovered = self.recovered or now
        if now - self.failed >= 1:
            seconds = self.recovered - self.began
            LOG.warning("database: back after %.1f s, %d requests got 503", seconds, self.unavailable)
            self.began = None


# --- The wrapper ------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """What requests with the same method, route and status have in common."""

    observe: Callable[[float], None]  # takes a duration in seconds
    template: str | None  # of the log line; None if they are not logged


class Telemetry:
    """Wrap the application: add request ids, metrics and log lines.

    Args:
        application: the WSGI application.
        service: the module hello, whose two batchers are observed.
        number: the worker's number, from 1 up; its counters go on from those of the last worker with that number.
    """

    def __init__(self, application: WSGIApplication, service: ModuleType, number: int) -> None:
        # The default, the process id, leaves files of each worker that ever ran: client_python's issue 509.
        values.ValueClass = values.MultiProcessValue(lambda: number)  # type: ignore[no-untyped-call]
        self.application = application
        self.kinds: dict[tuple[str, str, str], Kind] = {}
        self.running = 0
        self.outage = Outage()
        self.metrics = Metrics(service.__version__)
        self.metrics.start_at_zero(service.USER_ROUTE)
        self.pools = [service.find_date_of_birth, service.save_date_of_birth]
        self.statements = {}
        for pool in self.pools:
            metrics = self.metrics.queries.labels(pool.name), self.metrics.batches.labels(pool.name)
            self.statements[pool.name] = metrics[0].observe, metrics[1].observe
            self.metrics.pool_size.labels(pool.name).set(pool.slots)
            pool.observe = self.statement
        threading.Thread(target=self.sample, daemon=True).start()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Call the application (PEP 3333); add X-Request-Id, count and log the request."""
        if environ["SERVER_PORT"] == METRICS_PORT:
            return serve_metrics(environ, start_response)
        start = perf_counter()
        request_id = request_id_of(environ)
        status = ""

        def start_with_id(line: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
            nonlocal status
            status = line[:3]
            headers.append(("X-Request-Id", request_id))  # PEP 3333 lets a server change the list
            return start_response(line, headers, exc_info)

        self.running += 1
        try:
            content = self.application(environ, start_with_id)
        finally:
            self.running -= 1
        seconds = perf_counter() - start
        key = environ["REQUEST_METHOD"], environ.get("hello.route", UNMATCHED), status
        kind = self.kinds.get(key) or self.add_kind(*key)
        kind.observe(seconds)
        if kind.template:
            size = len(b"".join(content))
            WRITER.add((kind.template, time.time(), seconds, size, request_id, trace_id_of(environ)))
        if status == "503":
            self.outage.unavailable += 1
        return content

    def add_kind(self, method: str, route: str, status: str) -> Kind:
        """Create and cache the kind of a request: prometheus_client finds a series by its labels slowly."""
        word = method_label(method)
        template = request_template(word, route, status) if route not in PROBES and logs_requests(status) else None
        kind = Kind(self.metrics.durations.labels(word, route, status).observe, template)
        return self.kinds.setdefault((method, route, status), kind)

    def protocol_error(self, method: str, status: int, size: int) -> str:
        """Count and log the response to a malformed request; return its X-Request-Id."""
        self.metrics.refused.labels(str(status)).inc()
        request_id = new_request_id()
        if logs_requests(str(status)):
            template = request_template(method_label(method), UNMATCHED, str(status))
            WRITER.add((template, time.time(), 0.0, size, request_id, ""))
        return request_id

    def statement(self, operation: str, rows: int, seconds: float, error: Exception | None) -> None:
        """Count a statement; log the begin and the end of an outage."""
        observe_seconds, observe_rows = self.statements[operation]
        observe_seconds(seconds)
        observe_rows(rows)
        if error is not None:
            self.metrics.errors.labels(type(error).__name__).inc()
            self.outage.failure(operation, error, time.monotonic())
        elif self.outage.began is not None:
            self.outage.success(time.monotonic())

    def sample(self) -> None:
        """Update the metrics that are sampled, every SAMPLE_SECONDS."""
        spent, dropped = 0.0, 0
        while True:
            self.metrics.in_progress.set(self.running)
            for pool in self.pools:
                self.metrics.pool_in_use.labels(pool.name).set(pool.slots - pool.idle.qsize())
                self.metrics.pool_waiting.labels(pool.name).set(sum(len(batch.rows) for batch in pool.waiting))
            spent_before, spent = spent, process_time()
            self.metrics.cpu.inc(spent - spent_before)
            dropped_before, dropped = dropped, WRITER.dropped
            self.metrics.dropped.inc(dropped - dropped_before)
            time.sleep(SAMPLE_SECONDS)


# --- /metrics ---------------------------------------------------------------------------------------


def all_metrics() -> list[Metric]:
    """Return the metrics added up over all workers; wait for a worker that is just making its files."""
    collector = multiprocess.MultiProcessCollector(None)  # type: ignore[no-untyped-call]
    for _ in range(20):
        with contextlib.suppress(struct.error, RuntimeError):  # the library's, of a file without its first entries
            return list(collector.collect())  # type: ignore[no-untyped-call]
        time.sleep(0.01)
    return list(collector.collect())  # type: ignore[no-untyped-call]


class AggregatedMetrics(Collector):
    """The metrics added up over all workers, and http_requests_total: each duration is one request."""

    def collect(self) -> Iterator[Metric]:
        for metric in all_metrics():
            yield metric
            if metric.name == "http_request_duration_seconds":
                requests = CounterMetricFamily("http_requests", "Requests answered.")
                for sample in metric.samples:
                    if sample.name.endswith("_count"):
                        requests.add_sample("http_requests_total", sample.labels, sample.value)
                yield requests


def serve_metrics(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
    """Answer on the port of the metrics: GET /metrics in Prometheus' text format."""
    headers = [("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff")]
    if environ["PATH_INFO"] != "/metrics":
        status, kind, content = "404 Not Found", "application/json", b'{"message": "There is only /metrics here."}'
    elif environ["REQUEST_METHOD"] not in {"GET", "HEAD"}:
        status, kind, content = "405 Method Not Allowed", "application/json", b'{"message": "Use GET or HEAD."}'
        headers.append(("Allow", "GET, HEAD"))
    else:
        status, kind, content = "200 OK", CONTENT_TYPE_PLAIN_0_0_4, generate_latest(AggregatedMetrics())
    start_response(status, [*headers, ("Content-Type", kind), ("Content-Length", str(len(content)))])
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [content]
