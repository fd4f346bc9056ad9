"""How gunicorn serves hello; `gunicorn hello:application` in this folder reads it by itself.

Settings (environment variables)
    PORT                port of the service, on every IPv4 address (default 8080)
    WEB_CONCURRENCY     worker processes (default 2): one for each core it may use
    WORKER_CONNECTIONS  clients a worker holds at once (default 1000); the next wait to be accepted
    GRACEFUL_TIMEOUT    seconds a stopping worker may take for what it has begun (default 8)
Those of a connection's phases are in worker.py, those of the database in hello.py, those of metrics and logs in
telemetry.py.
"""

import os
import resource
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

# On every address: in a container or a pod, others must reach it.
bind = [f"0.0.0.0:{os.environ.get('PORT') or 8080}"]
# A port of its own, so that metrics can be kept from those who may use the service.
metrics_port = os.environ.get("METRICS_PORT") or "8081"
if not metrics_port.isdecimal() or not 0 <= int(metrics_port) <= 65535:
    sys.exit(f"METRICS_PORT={metrics_port!r} is no port: use a number up to 65535, or 0 for none")
if metrics_port != "0" and os.environ.get("TELEMETRY") != "off":
    bind.append(f"{os.environ.get('METRICS_HOST') or '127.0.0.1'}:{metrics_port}")

# With gunicorn's threads or its plain gevent worker, a hundred slow clients shut the others out, or hold their
# place without a bound. Every wait of this one ends.
worker_class = "server.worker.Worker"
workers = int(os.environ.get("WEB_CONCURRENCY") or 2)
worker_connections = int(os.environ.get("WORKER_CONNECTIONS") or 1000)

# Docker gives ten seconds between SIGTERM and SIGKILL. The longest request takes 4.5 s.
graceful_timeout = int(os.environ.get("GRACEFUL_TIMEOUT") or 8)
# A worker that does not run at all for this long (in seconds) is replaced. It is no bound on a request.
timeout = 30

# The heartbeat: in memory, because on a slow disk it stalls the worker; and the root may be read-only.
worker_tmp_dir = next((path for path in ("/dev/shm",) if os.access(path, os.W_OK)), None)
# It would be a socket in the home folder, which need not exist.
control_socket_disable = True

# Each client is an open file; the usual soft limit of 1,024 would be reached first.
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
wanted = 2 * worker_connections + 100
if soft != resource.RLIM_INFINITY and soft < wanted:
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))

chdir = str(Path(__file__).parent)

# --- Logs and metrics (telemetry.py) ----------------------------------------------------------------

for name, choices in {
    "LOG_LEVEL": ("debug", "info", "warning", "error", "critical"),
    "LOG_FORMAT": ("json", "text"),
    "TELEMETRY": ("on", "off"),
}.items():
    if os.environ.get(name) and os.environ[name] not in choices:
        sys.exit(f"{name}={os.environ[name]!r} is none of {', '.join(choices)}")
loglevel = os.environ.get("LOG_LEVEL") or "info"
logconfig_dict = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"()": "server.telemetry.Formatter"}},
    "handlers": {"stdout": {"class": "logging.StreamHandler", "stream": "ext://sys.stdout", "formatter": "line"}},
    "root": {"level": loglevel.upper(), "handlers": ["stdout"]},
    "loggers": {"gunicorn.error": {"propagate": True}, "gunicorn.access": {"propagate": False}},
}

# Where the workers keep their counts, for whichever of them is asked to add them up.
counts = Path(worker_tmp_dir or tempfile.gettempdir()) / f"hello-metrics-{os.getpid()}"
os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(counts)


def when_ready(server: Any) -> None:
    """Make the folder of the counts, and empty it of those of an earlier master with the same process id."""
    shutil.rmtree(counts, ignore_errors=True)
    counts.mkdir(mode=0o700)


def on_exit(server: Any) -> None:
    """Remove the folder of the counts."""
    shutil.rmtree(counts, ignore_errors=True)


def pre_fork(server: Any, worker: Any) -> None:
    """Give a worker the lowest number that no living one has."""
    taken = {other.number for other in server.WORKERS.values()}
    worker.number = next(number for number in range(1, len(taken) + 2) if number not in taken)


def post_worker_init(worker: Any) -> None:
    """Put telemetry around the application and the refusals, and its log line in the place of gevent's traceback."""
    import gevent  # here, and not above: the master must not

    import hello
    from server import telemetry

    gevent.get_hub().print_exception = telemetry.log_defect
    if telemetry.IS_ON:
        worker.wsgi = telemetry.Telemetry(worker.wsgi, hello, worker.number)
        worker.observe_refusal = worker.wsgi.observe_refusal


def child_exit(server: Any, worker: Any) -> None:
    """Forget how busy a worker was that is dead, however it died; what it counted stays."""
    from prometheus_client.multiprocess import mark_process_dead

    mark_process_dead(worker.number)
