"""gunicorn's server hooks, which gunicorn.conf.py names: https://docs.gunicorn.org/en/stable/settings.html#server-hooks."""

import os
import resource
import shutil
import tempfile
from pathlib import Path
from typing import Any

from prometheus_client.multiprocess import mark_process_dead

from server import settings

MEMORY_FOLDER = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
METRICS_FOLDER = Path(MEMORY_FOLDER or tempfile.gettempdir()) / f"hello-metrics-{os.getpid()}"


def bind_addresses() -> list[str]:
    """Return the addresses to listen on: of the service, and of /metrics if it is served."""
    addresses = settings.addresses().values()
    return [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in addresses]


def on_starting(server: Any) -> None:
    """Allow the open files that WORKER_CONNECTIONS clients need: the usual soft limit is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * settings.WORKER_CONNECTIONS + 100
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def when_ready(server: Any) -> None:
    """Create the folder in which the workers share their metrics."""
    shutil.rmtree(METRICS_FOLDER, ignore_errors=True)  # left by an earlier master with this process id
    METRICS_FOLDER.mkdir(mode=0o700)
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(METRICS_FOLDER)


def on_exit(server: Any) -> None:
    """Remove the folder of the metrics."""
    shutil.rmtree(METRICS_FOLDER, ignore_errors=True)


def pre_fork(server: Any, worker: Any) -> None:
    """Give the worker the lowest free number; it continues the metrics of the last worker with that number."""
    taken = {other.number for other in server.WORKERS.values()}
    worker.number = next(number for number in range(1, len(taken) + 2) if number not in taken)


def post_worker_init(worker: Any) -> None:
    """Wrap the application in telemetry, and log uncaught exceptions instead of gevent's tracebacks."""
    import gevent  # in the worker, because the master must import neither gevent nor hello

    import hello
    from server import logs
    from server.telemetry import Telemetry

    gevent.get_hub().print_exception = logs.log_uncaught  # type: ignore[method-assign, assignment]
    if settings.TELEMETRY == "on":
        worker.wsgi = worker.telemetry = Telemetry(worker.wsgi, hello, worker.number)


def child_exit(server: Any, worker: Any) -> None:
    """Drop the gauges of a worker that ended; its counters stay."""
    mark_process_dead(worker.number, METRICS_FOLDER)  # type: ignore[no-untyped-call]
