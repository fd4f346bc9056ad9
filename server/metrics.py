"""The metrics of hello, and /metrics.

Each worker counts for itself, and once a second leaves a snapshot in memory that all workers share. Prometheus asks any
worker, which adds up the snapshots.

gunicorn's master imports this module before it starts workers: so they share SNAPSHOTS, and the locks of
prometheus_client are those of the operating system, which are faster than gevent's.
"""

import json
import platform
import time
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import TypedDict
from wsgiref.types import StartResponse, WSGIEnvironment

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, Sample
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from server.logs import LOG, WRITER
from server.snapshots import Snapshots

# 0.25 s is the bound of the alert on latency; with a database that fails, a request takes 4.5 s at most.
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
ROWS = (1, 2, 5, 10, 20, 50, 100, 200)  # BATCH_SIZE is 100
SHARE_SECONDS = 1  # between two snapshots of a worker; far below any scrape interval
ALIVE_SECONDS = 5  # a worker without a newer snapshot counts as dead

SNAPSHOTS = Snapshots()

disable_created_metrics()  # type: ignore[no-untyped-call]  # they would double the number of series

# --- What one worker counts -------------------------------------------------------------------------


class ProcessCollector(Collector):
    """Counters that others keep: Python's, and that of the log writer."""

    def collect(self) -> Iterator[Metric]:
        """Yield their values now."""
        cpu = time.process_time()
        yield CounterMetricFamily("process_cpu_seconds", "User and system CPU time of the workers.", cpu)
        yield CounterMetricFamily("log_lines_dropped", "Log lines that could not be written.", WRITER.dropped)


class Metrics:
    """The metrics of one worker."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(ProcessCollector())
        labels = ("method", "route", "status")
        self.durations = self.histogram(
            "http_request_duration_seconds", "Time from the arrival of a whole request to its response.", *labels
        )
        self.in_progress = self.gauge("http_requests_in_progress", "Requests not yet answered.")
        self.refused = self.counter("http_requests_refused_total", "Malformed requests refused.", "status")
        self.queries = self.histogram(
            "database_query_duration_seconds", "Time of a statement, including connecting.", "operation"
        )
        self.batches = self.histogram(
            "database_batch_size", "Requests served by one statement.", "operation", buckets=ROWS
        )
        self.errors = self.counter("database_errors_total", "Statements that failed.", "class")
        self.pool_size = self.gauge("database_pool_size", "Maximum connections.", "pool")
        self.pool_in_use = self.gauge("database_pool_in_use", "Connections that run a statement.", "pool")
        self.pool_waiting = self.gauge("database_pool_waiting", "Requests that wait for a connection.", "operation")
        self.counter("hello_worker_starts_total", "Workers started.").inc()
        self.gauge("hello_workers", "Running workers.").set(1)

    def histogram(self, name: str, text: str, *labels: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
        return Histogram(name, text, labels, registry=self.registry, buckets=buckets)

    def counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def watch_pools(self, service: ModuleType) -> None:
        """Read the state of the pools of hello with each snapshot, and the number of requests that wait for them."""
        for pool in service.POOLS:
            self.pool_size.labels(pool.name).set(pool.size)
            self.pool_in_use.labels(pool.name).set_function(pool.in_use)
        for batcher in service.BATCHERS:
            self.pool_waiting.labels(batcher.name).set_function(batcher.waiting_requests)

    def start_at_zero(self, user_route: str) -> None:
        """Create the series of the alerts at 0: rate() ignores a series' first value."""
        series = [("GET", user_route, status) for status in ("200", "400", "404", "500", "503")]
        series += [("HEAD", user_route, "500")]
        series += [("PUT", user_route, status) for status in ("204", "400", "500", "503")]
        series += [("GET", "/readyz", status) for status in ("200", "500", "503")]
        for labels in series:
            self.durations.labels(*labels)
        for status in ("400", "408", "413", "414", "417", "431", "501", "505"):
            self.refused.labels(status)
        for name in ("OperationalError", "QueryCanceled", "TimeoutError"):
            self.errors.labels(name)


# --- What all workers counted -----------------------------------------------------------------------

Samples = list[tuple[str, dict[str, str], float]]  # name, labels and value of each


class Snapshot(TypedDict):
    """What a worker has counted until now; the keys of counters and gauges are the names of the metrics."""

    alive_until: float  # monotonic seconds
    counters: dict[str, Samples]  # with those of earlier workers with the same number
    gauges: dict[str, Samples]


def add_up(parts: Iterable[Samples]) -> Samples:
    """Return the sums of the samples with the same name and labels."""
    sums: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for samples in parts:
        for name, labels, value in samples:
            key = name, tuple(labels.items())
            sums[key] = sums.get(key, 0) + value
    return [(name, dict(labels), value) for (name, labels), value in sums.items()]


class SharedMetrics(Collector):
    """The metrics of all workers.

    Args:
        metrics: those of this worker.
        snapshots: those that the workers share.
        number: that of this worker; its counters go on from those of the last worker with this number.
        version: the version of hello.
    """

    def __init__(self, metrics: Metrics, snapshots: Snapshots, number: int, version: str) -> None:
        self.registry = metrics.registry
        self.snapshots = snapshots
        self.number = number
        self.version = version
        self.has_warned = False
        content = snapshots.read(number)
        self.earlier: dict[str, Samples] = json.loads(content)["counters"] if content else {}

    def share_for_ever(self) -> None:
        """Share what this worker counts, every SHARE_SECONDS."""
        while True:
            self.share(ALIVE_SECONDS)
            time.sleep(SHARE_SECONDS)

    def share(self, alive_seconds: float) -> Snapshot:
        """Share and return what this worker has counted; a failure costs only the share."""
        snapshot = self.take_snapshot(time.monotonic() + alive_seconds)
        try:
            self.snapshots.write(self.number, json.dumps(snapshot).encode())
        except OSError as error:
            if not self.has_warned:
                LOG.warning("metrics: the other workers cannot see those of worker %d: %s", self.number, error)
            self.has_warned = True
        return snapshot

    def take_snapshot(self, alive_until: float) -> Snapshot:
        """Return what this worker has counted."""
        snapshot = Snapshot(alive_until=alive_until, counters={}, gauges={})
        for metric in self.registry.collect():
            samples = [(sample.name, sample.labels, sample.value) for sample in metric.samples]
            if metric.type == "gauge":
                snapshot["gauges"][metric.name] = samples
            else:
                snapshot["counters"][metric.name] = add_up([samples, self.earlier.get(metric.name, [])])
        return snapshot

    def collect(self) -> Iterator[Metric]:
        """Yield the sums over all workers: of the counters since the start, of the gauges those that live."""
        snapshots = [self.share(ALIVE_SECONDS)]  # so that the next scrape, by another worker, finds no less
        others = (number for number in self.snapshots.numbers() if number != self.number)
        snapshots += [json.loads(content) for content in map(self.snapshots.read, others) if content]
        now = time.monotonic()
        counters = [snapshot["counters"] for snapshot in snapshots]
        gauges = [snapshot["gauges"] for snapshot in snapshots if snapshot["alive_until"] > now]
        for metric in self.registry.collect():
            parts = gauges if metric.type == "gauge" else counters
            sums = add_up(part.get(metric.name, []) for part in parts)
            metric.samples = [Sample(*sample) for sample in sums]
            yield metric
            if metric.name == "http_request_duration_seconds":
                yield requests_total(metric)
        build = GaugeMetricFamily("hello_build_info", "Build information; always 1.", labels=["version", "python"])
        build.add_metric([self.version, platform.python_version()], 1)
        yield build


def requests_total(durations: Metric) -> Metric:
    """Return http_requests_total: each duration is one request."""
    requests = CounterMetricFamily("http_requests", "Requests answered.")
    for sample in durations.samples:
        if sample.name.endswith("_count"):
            requests.add_sample("http_requests_total", sample.labels, sample.value)
    return requests


def serve_metrics(metrics: SharedMetrics, environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
    """Answer on the port of the metrics: GET /metrics in Prometheus' text format."""
    headers = [("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff")]
    if environ["PATH_INFO"] != "/metrics":
        status, kind, content = "404 Not Found", "application/json", b'{"message": "There is only /metrics here."}'
    elif environ["REQUEST_METHOD"] not in {"GET", "HEAD"}:
        status, kind, content = "405 Method Not Allowed", "application/json", b'{"message": "Use GET or HEAD."}'
        headers.append(("Allow", "GET, HEAD"))
    else:
        status, kind, content = "200 OK", CONTENT_TYPE_PLAIN_0_0_4, generate_latest(metrics)
    start_response(status, [*headers, ("Content-Type", kind), ("Content-Length", str(len(content)))])
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [content]
