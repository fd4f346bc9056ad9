"""gunicorn's configuration: `gunicorn hello:application` finds it in the folder where it starts."""

import os

from server import logs, settings
from server.hooks import on_starting, post_worker_init, pre_fork

__all__ = ["on_starting", "post_worker_init", "pre_fork"]

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
