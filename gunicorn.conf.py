"""gunicorn's configuration: `gunicorn hello:application` finds it in the folder where it starts.

The functions are server hooks: https://docs.gunicorn.org/en/stable/settings.html#server-hooks.
"""

import os
import resource
import signal
from threading import Thread
from typing import Any

from server import logs, metrics, options, settings
from server.telemetry import Telemetry
from server.worker import STOP_SIGNALS

bind = [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in settings.addresses().values()]
worker_class = "server.worker.Worker"
workers = settings.WEB_CONCURRENCY
worker_connections = settings.WORKER_CONNECTIONS
# 8 s by default: Docker waits 10 s between SIGTERM and SIGKILL.
graceful_timeout = settings.GRACEFUL_TIMEOUT
# A worker whose event loop has not run for this long is replaced. It does not bound a request.
timeout = 30
# A worker touches its heartbeat file twenty times a second. A disk may be slow or read-only.
worker_tmp_dir = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
# The control socket would need a home folder.
control_socket_disable = True
loglevel = settings.LOG_LEVEL
logconfig_dict = {
    "handlers": {"stdout": {"()": logs.Handler}},
    "root": {"level": settings.LOG_LEVEL.upper(), "handlers": ["stdout"]},
    "loggers": {"gunicorn.error": {"propagate": True}},
}


def allow_stop_signals() -> None:
    """Undo what pre_fork does to the master."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def on_starting(server: Any) -> None:
    """Check options and addresses, and allow as many open files as the system lets: the usual limit is 1,024."""
    options.check_options(server.cfg)
    if not os.environ.keys() & {"GUNICORN_FD", "LISTEN_FDS"}:  # with these, gunicorn takes over bound sockets
        options.check_addresses(server.cfg.address, reuse_port=server.cfg.reuse_port)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.register_at_fork(after_in_parent=allow_stop_signals)


def pre_fork(server: Any, worker: Any) -> None:
    """Give the worker the lowest free number: it goes on with the metrics of the last worker that had it.

    Also block the stop signals, which the worker would lose until it has handlers: Worker.init_signals unblocks them.
    """
    taken = {other.number for other in server.WORKERS.values()}
    worker.number = 1
    while worker.number in taken:
        worker.number += 1
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def post_worker_init(worker: Any) -> None:
    """Begin to count requests, and open the connections to Postgres."""
    import hello  # in the worker, after gevent has patched what hello imports

    if settings.TELEMETRY == "on":
        shared = metrics.SharedMetrics(worker.number, hello.__version__)
        worker.telemetry = Telemetry(hello, shared)
        metrics.IN_PROGRESS.set_function(worker.requests_in_progress)
    # A greenlet, since gevent has patched threads. The worker does not wait for it.
    Thread(target=hello.keep_connected, name="keep-connected", daemon=True).start()
