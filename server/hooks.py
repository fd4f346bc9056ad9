"""gunicorn's server hooks, which gunicorn.conf.py names: https://docs.gunicorn.org/en/stable/settings.html#server-hooks."""

import os
import resource
from threading import Thread
from typing import Any

from server import metrics, options, settings

MEMORY_FOLDER = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def bind_addresses() -> list[str]:
    """Return the addresses to listen on: of the service, and of /metrics if it is served."""
    addresses = settings.addresses().values()
    return [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in addresses]


def on_starting(server: Any) -> None:
    """Check options and addresses, and allow the open files that a worker may need: the usual limit is 1,024."""
    options.check_options(server.cfg)
    if not os.environ.keys() & {"GUNICORN_FD", "LISTEN_FDS"}:  # it takes over sockets
        options.check_addresses(server.cfg.address, reuse_port=server.cfg.reuse_port)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # A stopping worker also serves what waits to be accepted.
    wanted = 2 * server.cfg.worker_connections + server.cfg.backlog + 100
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def pre_fork(server: Any, worker: Any) -> None:
    """Give the worker the lowest free number; it continues the metrics of the last worker with that number."""
    taken = {other.number for other in server.WORKERS.values()}
    worker.number = 1
    while worker.number in taken:
        worker.number += 1


def post_worker_init(worker: Any) -> None:
    """Wrap the application in telemetry, log uncaught exceptions, and open the connections to Postgres."""
    import gevent  # in the worker, because the master must import neither gevent nor hello

    import hello
    from server import logs
    from server.telemetry import TelemetryMiddleware

    gevent.get_hub().print_exception = logs.log_uncaught  # type: ignore[method-assign, assignment]
    if settings.TELEMETRY == "on":
        shared = metrics.SharedMetrics(worker.number, hello.__version__)
        worker.wsgi = worker.telemetry = TelemetryMiddleware(worker.wsgi, hello, shared)
    # A greenlet, since gevent has patched threads. The worker does not wait for it.
    Thread(target=hello.keep_connected, name="keep-connected", daemon=True).start()
