"""Request ids, metrics and log lines of requests and statements: about routes, never about users."""

import re
import threading
import time
from collections.abc import Iterable
from random import getrandbits
from types import ModuleType
from typing import Any
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

import psycopg2

from server import metrics, settings
from server.logs import LOG, log_request

METRICS_PORT = str(settings.METRICS_PORT)  # SERVER_PORT is text
UNMATCHED = "unmatched"  # the route of an unknown path
PROBES = {"/livez", "/readyz"}  # counted, not logged: probes repeat every few seconds

REQUEST_ID = re.compile("[A-Za-z0-9._-]{1,128}")
# W3C Trace Context, section 3.2: version ff and ids of zeros are invalid, and only later versions may say more.
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


def reason(error: Exception) -> str:
    """Describe an error without quoting a row: libpq's text if the connection failed, else class and SQLSTATE."""
    text = str(error).strip().partition("\n")[0]
    code = getattr(error, "pgcode", None)
    if code:
        return f"{type(error).__name__}, SQLSTATE {code}"
    return text if text and isinstance(error, (psycopg2.OperationalError, OSError)) else type(error).__name__


class Outage:
    """Log two warnings for each time that statements fail: at its begin and end. Times are monotonic seconds."""

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


class TelemetryMiddleware:
    """Wrap the application (PEP 3333): add request ids, count and log requests, and serve /metrics on its port."""

    def __init__(self, application: WSGIApplication, service: ModuleType, shared: metrics.SharedMetrics) -> None:
        self.application = application
        self.shared = shared
        self.running = 0
        self.outage = Outage()
        metrics.STARTS.inc()
        metrics.WORKERS.set(1)
        metrics.IN_PROGRESS.set_function(lambda: self.running)
        metrics.watch_pools(service)
        metrics.start_at_zero(service.USER_ROUTE)
        for batcher in service.BATCHERS:
            batcher.observe = self.statement
        threading.Thread(target=shared.share_for_ever, daemon=True).start()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer a request."""
        if environ["SERVER_PORT"] == METRICS_PORT:
            return metrics.serve_metrics(self.shared, environ, start_response)
        start = time.perf_counter()
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
        self.count(environ, status, time.perf_counter() - start, sum(map(len, content)), request_id)
        return content

    def count(self, environ: WSGIEnvironment, status: str, seconds: float, size: int, request_id: str) -> None:
        """Count and log a request."""
        method = environ["REQUEST_METHOD"]  # one of few: the parser refuses others
        route = environ.get("hello.route", UNMATCHED)
        metrics.duration_of(method, route, status).observe(seconds)
        if status == "503":
            self.outage.unavailable += 1
        if route not in PROBES:
            log_request(method, route, status, seconds, size, request_id, trace_id_of(environ))

    def protocol_error(self, environ: WSGIEnvironment, method: str, status: int, size: int) -> str:
        """Count and log the response to a request that is refused; return its X-Request-Id."""
        metrics.REFUSED.labels(str(status)).inc()
        request_id = request_id_of(environ)
        log_request(method, UNMATCHED, str(status), 0, size, request_id, trace_id_of(environ))
        return request_id

    def statement(self, operation: str, requests: int, seconds: float, error: Exception | None) -> None:
        """Count a statement; log the begin and the end of an outage."""
        metrics.STATEMENTS.labels(operation).observe(seconds)
        metrics.BATCHES.labels(operation).observe(requests)
        if error is not None:
            metrics.ERRORS.labels(type(error).__name__).inc()
            self.outage.failure(operation, error, time.monotonic())
        else:
            self.outage.success(time.monotonic())
