"""Request ids, metrics and log lines of requests and statements, about routes and never about users; and /metrics."""

import atexit
import re
import threading
import time
from random import getrandbits
from types import ModuleType
from wsgiref.types import StartResponse, WSGIEnvironment

import psycopg2
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from server import metrics
from server.logs import LOG, WRITER, AnsweredRequest, log_requests

REQUEST_ID = re.compile("[A-Za-z0-9._-]{1,128}")
# W3C Trace Context, section 3.2: ids of zeros and version ff are invalid; only later versions than 00 may be longer.
TRACEPARENT = re.compile(
    "(?!ff|00.{54})[0-9a-f]{2}-(?!0{32})(?P<trace_id>[0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?"
)


def request_id_of(environ: WSGIEnvironment) -> str:
    """Return the client's X-Request-Id if it is valid, else a new one."""
    sent = environ.get("HTTP_X_REQUEST_ID")
    return sent if sent and REQUEST_ID.fullmatch(sent) else f"{getrandbits(128):032x}"


def trace_id_of(environ: WSGIEnvironment) -> str:
    """Return the trace id of a valid traceparent header, else nothing."""
    sent = environ.get("HTTP_TRACEPARENT")
    match = TRACEPARENT.fullmatch(sent) if sent else None
    return match["trace_id"] if match else ""


def describe(environ: WSGIEnvironment, method: str, status: str, size: int, seconds: float) -> AnsweredRequest:
    """Return what is counted and logged of a request that is answered now."""
    route = environ.get("hello.route", "unmatched")  # of an unknown path
    request_id = request_id_of(environ)
    trace_id = trace_id_of(environ)
    return AnsweredRequest(time.time(), method, route, status, seconds, size, request_id, trace_id)


def reason(error: Exception) -> str:
    """Describe an error without quoting a row: libpq's text if the connection failed, else class and SQLSTATE."""
    text = str(error).strip().partition("\n")[0]
    code = getattr(error, "pgcode", None)
    if code:
        return f"{type(error).__name__}, SQLSTATE {code}"
    return text if text and isinstance(error, (psycopg2.OperationalError, OSError)) else type(error).__name__


class Outage:
    """Log when statements begin to fail, and when they work again. Times are monotonic seconds."""

    def __init__(self) -> None:
        self.began: float | None = None
        self.failed = 0.0  # time of the last failure
        self.recovered: float | None = None  # time of the first success after it
        self.unavailable = 0  # responses with 503 since the outage began

    def failure(self, operation: str, error: Exception, now: float) -> None:
        """Begin an outage, or go on with it."""
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


class Telemetry:
    """Counts and logs a worker's statements one by one, and its requests many at a time, which is faster."""

    def __init__(self, service: ModuleType, shared: metrics.SharedMetrics) -> None:
        self.shared = shared
        self.answered: list[AnsweredRequest] = []  # not yet counted
        self.outage = Outage()
        metrics.STARTS.inc()
        metrics.WORKERS.set(1)
        metrics.watch_pools(service)
        metrics.start_at_zero(service)
        for batcher in service.BATCHERS:
            batcher.observe = self.statement
        atexit.register(self.close)
        threading.Thread(target=shared.share_for_ever, daemon=True).start()

    def note_answer(self, environ: WSGIEnvironment, status: str, size: int, seconds: float) -> str:
        """Note a request that is answered, for count_requests; return its X-Request-Id."""
        method = environ["REQUEST_METHOD"]  # one of few: the parser refuses others
        request = describe(environ, method, status, size, seconds)
        self.answered.append(request)
        if status == "503":
            self.outage.unavailable += 1
        return request.request_id

    def count_refusal(self, environ: WSGIEnvironment, method: str, status: str, size: int) -> str:
        """Count and log a request that is refused; return its X-Request-Id."""
        request = describe(environ, method, status, size, 0)
        metrics.REFUSED.labels(status).inc()
        log_requests([request])
        return request.request_id

    def count_requests(self) -> None:
        """Count and log the requests that have been answered since the last call."""
        answered = self.answered
        self.answered = []
        for request in answered:
            duration = metrics.duration_of(request.method, request.route, request.status)
            duration.observe(request.seconds)
        log_requests(answered)

    def close(self) -> None:
        """Count, log and share what is left."""
        self.count_requests()
        WRITER.close()  # before the last snapshot, which has the number of lines that it gives up
        self.shared.share(is_last=True)

    def statement(self, operation: str, requests: int, seconds: float, error: Exception | None) -> None:
        """Count a statement; log the begin and the end of an outage."""
        metrics.STATEMENTS.labels(operation).observe(seconds)
        metrics.BATCHES.labels(operation).observe(requests)
        if error is not None:
            metrics.ERRORS.labels(type(error).__name__).inc()
            self.outage.failure(operation, error, time.monotonic())
        else:
            self.outage.success(time.monotonic())

    def serve_metrics(self, environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        """Answer on the port of the metrics: GET /metrics in Prometheus' text format."""
        self.count_requests()
        headers = [("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff")]
        if environ["PATH_INFO"] != "/metrics":
            status, kind, content = "404 Not Found", "application/json", b'{"message": "There is only /metrics here."}'
        elif environ["REQUEST_METHOD"] not in {"GET", "HEAD"}:
            status, kind, content = "405 Method Not Allowed", "application/json", b'{"message": "Use GET or HEAD."}'
            headers.append(("Allow", "GET, HEAD"))
        else:
            status, kind, content = "200 OK", CONTENT_TYPE_PLAIN_0_0_4, generate_latest(self.shared)
        start_response(status, [*headers, ("Content-Type", kind), ("Content-Length", str(len(content)))])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [content]
