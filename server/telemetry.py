"""Request ids, metrics and log lines of hello: a wrapper around the application in each worker.

What is counted and logged is about a route, never about a user: see logs.py.
"""

import re
import threading
import time
from collections.abc import Callable, Iterable
from http import HTTPMethod
from random import getrandbits
from types import ModuleType
from typing import Any
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from server import settings
from server.logs import log_request
from server.metrics import Metrics, SharedMetrics, serve_metrics
from server.outage import Outage
from server.snapshots import Snapshots

METRICS_PORT = str(settings.METRICS_PORT)  # as SERVER_PORT has it
METHODS = {method.value for method in HTTPMethod}
UNMATCHED = "unmatched"  # the route of an unknown path
PROBES = {"/livez", "/readyz"}  # counted, not logged: probes repeat every few seconds

Observe = Callable[[float], None]  # of a series; prometheus_client finds a series by its labels slowly

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


class TelemetryMiddleware:
    """Wrap the application (PEP 3333): add request ids, count and log requests, and serve /metrics on its port.

    Args:
        application: the WSGI application.
        service: the module hello, whose statements are observed.
        number: the worker's number, from 1 up.
        snapshots: the metrics that the workers share.
    """

    def __init__(self, application: WSGIApplication, service: ModuleType, number: int, snapshots: Snapshots) -> None:
        self.application = application
        self.running = 0
        self.observers: dict[tuple[str, str, str], Observe] = {}
        self.outage = Outage()
        self.metrics = Metrics()
        self.metrics.start_at_zero(service.USER_ROUTE)
        self.metrics.in_progress.set_function(lambda: self.running)
        self.metrics.watch_pools(service)
        self.statements: dict[str, tuple[Observe, Observe]] = {}
        for batcher in service.BATCHERS:
            histograms = self.metrics.queries.labels(batcher.name), self.metrics.batches.labels(batcher.name)
            self.statements[batcher.name] = histograms[0].observe, histograms[1].observe
            batcher.observe = self.statement
        self.shared = SharedMetrics(self.metrics, snapshots, number, service.__version__)
        threading.Thread(target=self.shared.share_for_ever, daemon=True).start()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer a request."""
        if environ["SERVER_PORT"] == METRICS_PORT:
            return serve_metrics(self.shared, environ, start_response)
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
        seconds = time.perf_counter() - start
        method, route = method_label(environ["REQUEST_METHOD"]), environ.get("hello.route", UNMATCHED)
        self.observe(method, route, status, seconds)
        if route not in PROBES:
            size = sum(map(len, content))
            log_request(method, route, status, seconds, size, request_id, trace_id_of(environ))
        return content

    def observe(self, method: str, route: str, status: str, seconds: float) -> None:
        """Count a request."""
        key = method, route, status
        observer = self.observers.get(key)
        if observer is None:
            observer = self.observers[key] = self.metrics.durations.labels(*key).observe
        observer(seconds)
        if status == "503":
            self.outage.unavailable += 1

    def protocol_error(self, method: str, status: int, size: int) -> str:
        """Count and log the response to a malformed request; return its X-Request-Id."""
        self.metrics.refused.labels(str(status)).inc()
        request_id = new_request_id()
        log_request(method_label(method), UNMATCHED, str(status), 0, size, request_id, "")
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

    def close(self) -> None:
        """Share the last counts of a worker that ends."""
        self.shared.share(alive_seconds=0)
