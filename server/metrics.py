"""The metrics of hello.

Each worker counts for itself, with prometheus_client. Once a second it leaves a snapshot in memory that all workers
share. Prometheus asks any worker, which adds up the snapshots.

gunicorn's master imports this module before gevent patches the standard library in its workers. The memory is therefore
the same in all of them, and the locks of the metrics are those of the operating system, which are faster.
"""

import os
import pickle
import platform
import time
from collections.abc import Iterable, Iterator
from functools import cache, partial
from struct import Struct
from types import ModuleType

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, Sample
from prometheus_client.registry import Collector

from server.logs import LOG, WRITER

# 0.25 s is the bound of the alert on latency. With a database that fails, a request takes up to 4.5 s; rarely 5.5 s.
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
REQUESTS = (1, 2, 5, 10, 20, 50, 100, 200)  # BATCH_SIZE is 100 by default
SHARE_SECONDS = 1  # between two snapshots of a worker; far below any scrape interval
ALIVE_SECONDS = 5  # a worker without a newer snapshot counts as ended

REGISTRY = CollectorRegistry()


class ProcessCollector(Collector):
    """Counters that Python and the log writer keep."""

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily("process_cpu_seconds", "CPU time of the workers.", time.process_time())
        yield CounterMetricFamily("log_lines_dropped", "Log lines that were lost.", WRITER.dropped)


disable_created_metrics()  # type: ignore[no-untyped-call]  # one more series for each counter
REGISTRY.register(ProcessCollector())
histogram = partial(Histogram, registry=REGISTRY)

REQUEST = ["method", "route", "status"]
DURATIONS = histogram("http_request_duration_seconds", "Time to answer a whole request.", REQUEST, buckets=SECONDS)
IN_PROGRESS = Gauge("http_requests_in_progress", "Requests not yet answered.", registry=REGISTRY)
REFUSED = Counter("http_requests_refused_total", "Malformed requests refused.", ["status"], registry=REGISTRY)
STATEMENTS = histogram("database_query_duration_seconds", "Time of a statement.", ["operation"], buckets=SECONDS)
BATCHES = histogram("database_batch_size", "Requests served by one statement.", ["operation"], buckets=REQUESTS)
ERRORS = Counter("database_errors_total", "Statements that failed.", ["class"], registry=REGISTRY)
POOL_SIZE = Gauge("database_pool_size", "Maximum connections.", ["pool"], registry=REGISTRY)
POOL_IN_USE = Gauge("database_pool_in_use", "Connections that run a statement.", ["pool"], registry=REGISTRY)
POOL_WAITING = Gauge("database_pool_waiting", "Requests that wait for a connection.", ["operation"], registry=REGISTRY)
STARTS = Counter("hello_worker_starts_total", "Workers started.", registry=REGISTRY)
WORKERS = Gauge("hello_workers", "Running workers.", registry=REGISTRY)
duration_of = cache(DURATIONS.labels)  # labels() alone takes longer than the observation


def watch_pools(service: ModuleType) -> None:
    """Create the series of each pool and operation; read their state whenever the metrics are collected."""
    for pool in service.POOLS:
        POOL_SIZE.labels(pool.name).set(pool.size)
        POOL_IN_USE.labels(pool.name).set_function(pool.in_use)
    for batcher in service.BATCHERS:
        STATEMENTS.labels(batcher.name)
        BATCHES.labels(batcher.name)
        POOL_WAITING.labels(batcher.name).set_function(batcher.waiting_requests)


def start_at_zero(service: ModuleType) -> None:
    """Create the series of the alerts at 0: rate() ignores a series' first value."""
    for method in service.ROUTES[service.USER_ROUTE]:
        success = "200" if method == "GET" else "204"
        for status in (success, "400", "404", "500", "503"):
            DURATIONS.labels(method, service.USER_ROUTE, status)
    for status in ("200", "500", "503"):
        DURATIONS.labels("GET", "/readyz", status)
    for status in ("400", "408", "413", "414", "417", "431", "501", "505"):
        REFUSED.labels(status)
    for name in ("LockNotAvailable", "OperationalError", "QueryCanceled", "TimeoutError"):
        ERRORS.labels(name)


# A file without a name: no other program can fill, remove or damage it, and it goes with the last of our processes.
# A worker has a header in it, and two areas that it fills in turn, so that it may be killed while it writes.
MEMORY = os.memfd_create("hello-metrics")
AREA_BYTES = 4 * 1024 * 1024  # far above any snapshot; what is never written takes no memory
HEADER = Struct("=QQd")  # the area of the last snapshot (1 or 2), its bytes, and its time in monotonic seconds


def offset(number: int, area: int) -> int:
    """Return where an area of a worker begins; area 0 is the header. Numbers begin at 1."""
    return (3 * number + area) * AREA_BYTES


def header(number: int) -> tuple[int, int, float]:
    """Return the header of a worker; zeros if it has left no snapshot."""
    data = os.pread(MEMORY, HEADER.size, offset(number, 0))
    return HEADER.unpack(data.ljust(HEADER.size, b"\0"))


def write_snapshot(number: int, metrics: list[Metric]) -> None:
    """Replace the snapshot of a worker."""
    content = pickle.dumps(metrics)
    area = 2 if header(number)[0] == 1 else 1
    os.pwrite(MEMORY, content, offset(number, area))
    os.pwrite(MEMORY, HEADER.pack(area, len(content), time.monotonic()), offset(number, 0))


def read_snapshot(number: int) -> list[Metric]:
    """Return the snapshot of a worker; without gauges if it has ended."""
    area, size, written = header(number)
    content = os.pread(MEMORY, size, offset(number, area))
    metrics = pickle.loads(content) if content else []
    return metrics if time.monotonic() < written + ALIVE_SECONDS else without_gauges(metrics)


def without_gauges(metrics: list[Metric]) -> list[Metric]:
    return [metric for metric in metrics if metric.type != "gauge"]


def add_up(metrics: Iterable[Metric]) -> list[Metric]:
    """Return one metric for each name, whose samples are the sums of those with the same labels."""
    totals: dict[str, Metric] = {}
    sums: dict[tuple[str, str, tuple[tuple[str, str], ...]], float] = {}
    for metric in metrics:
        totals.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
        for sample in metric.samples:
            key = metric.name, sample.name, tuple(sample.labels.items())
            sums[key] = sums.get(key, 0) + sample.value
    for (name, sample_name, labels), value in sums.items():
        totals[name].samples.append(Sample(sample_name, dict(labels), value))
    return list(totals.values())


class SharedMetrics(Collector):
    """The metrics of all workers; those of this one go on from the last worker with its number."""

    def __init__(self, number: int, version: str) -> None:
        self.number = number
        self.version = version
        self.inherited = without_gauges(read_snapshot(number))

    def share_for_ever(self) -> None:
        """Share what this worker counts, every SHARE_SECONDS."""
        while True:
            self.share()
            time.sleep(SHARE_SECONDS)

    def share(self, *, is_last: bool = False) -> list[Metric]:
        """Share and return what this worker has counted."""
        metrics = add_up([*REGISTRY.collect(), *self.inherited])
        try:
            write_snapshot(self.number, without_gauges(metrics) if is_last else metrics)
        except OSError as error:
            LOG.warning("metrics: only worker %d knows what it counts: %s", self.number, error)
        return metrics

    def collect(self) -> Iterator[Metric]:
        """Yield the sums: of counters over all workers there were, of gauges over those that run."""
        metrics = self.share()  # so the next scrape, by another worker, does not find less
        workers = os.fstat(MEMORY).st_size // offset(1, 0)  # the file ends within the highest number's areas
        for number in {*range(1, workers + 1)} - {self.number}:
            metrics += read_snapshot(number)
        for metric in add_up(metrics):
            yield metric
            if metric.name == "http_request_duration_seconds":  # each duration is one request
                counts = [sample for sample in metric.samples if sample.name.endswith("_count")]
                requests = Metric("http_requests", "Requests answered.", "counter")
                requests.samples = [sample._replace(name="http_requests_total") for sample in counts]
                yield requests
        build = GaugeMetricFamily("hello_build_info", "Build information; always 1.", labels=["version", "python"])
        build.add_metric([self.version, platform.python_version()], 1)
        yield build
