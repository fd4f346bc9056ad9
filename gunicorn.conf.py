"""gunicorn's configuration: `gunicorn hello:application` finds it in the folder where it starts."""

from server import hooks, logs, settings
from server.hooks import on_starting, post_worker_init, pre_fork

__all__ = ["on_starting", "post_worker_init", "pre_fork"]

bind = hooks.bind_addresses()
worker_class = "server.worker.Worker"
workers = settings.WEB_CONCURRENCY
worker_connections = settings.WORKER_CONNECTIONS
# Docker waits 10 seconds between SIGTERM and SIGKILL.
graceful_timeout = settings.GRACEFUL_TIMEOUT
# A worker whose event loop has not run for this long is replaced. It does not bound a request.
timeout = 30
# The heartbeat file: on a slow disk it would delay the worker, and the root may be read-only.
worker_tmp_dir = hooks.MEMORY_FOLDER
# The control socket would need a home folder.
control_socket_disable = True
loglevel = settings.LOG_LEVEL
logconfig_dict = logs.LOGGING
