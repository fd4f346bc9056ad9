"""gunicorn's server hooks, which gunicorn.conf.py names: https://docs.gunicorn.org/en/stable/settings.html#server-hooks."""

import os
import resource
from threading import Thread
from typing import Any

from server import metrics, options, settings
from server.telemetry import Telemetry


def on_starting(server: Any) -> None:
    """Check options and addresses, and allow as many open files as the system lets: the usual limit is 1,024."""
    options.check_options(server.cfg)
    if not os.environ.keys() & {"GUNICORN_FD", "LISTEN_FDS"}:  # with these, gunicorn takes over bound sockets
        options.check_addresses(server.cfg.address, reuse_port=server.cfg.reuse_port)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def pre_fork(server: Any, worker: Any) -> None:
    """Give the worker the lowest free number: it goes on with the metrics of the last worker that had it."""
    taken = {other.number for other in server.WORKERS.values()}
    worker.number = 1
    while worker.number in taken:
        worker.number += 1


def post_worker_init(worker: Any) -> None:
    """Begin to count requests, and open the connections to Postgres."""
    import hello  # in the worker, after gevent has patched what hello imports

    if settings.TELEMETRY == "on":
        shared = metrics.SharedMetrics(worker.number, hello.__version__)
        worker.telemetry = Telemetry(hello, shared)
        metrics.IN_PROGRESS.set_function(worker.requests_in_progress)
    # A greenlet, since gevent has patched threads. The worker does not wait for it.
    Thread(target=hello.keep_connected, name="keep-connected", daemon=True).start()
