"""Check gunicorn's options: exit with one line if the service ignores one, half does it, or has a setting for it."""

import socket
import sys
from collections.abc import Iterable
from typing import Any

from gunicorn.config import make_settings

from server import settings

# What to do instead, and the options to which it applies
REFUSED = {
    "let a proxy in front of the service do it": (
        "certfile", "keyfile", "ca_certs", "ssl_context", "http_protocols", "http2_cleartext", "protocol",
        "proxy_protocol", "proxy_allow_ips", "uwsgi_allow_ips", "root_path",
    ),
    "the service ignores addresses of clients": ("forwarded_allow_ips", "secure_scheme_headers", "forwarder_headers"),
    "server/parser.py reads requests, and docs/configuration.md lists its limits": (
        "limit_request_line", "limit_request_fields", "limit_request_field_size", "http_parser", "header_map",
        "permit_obsolete_folding", "permit_unconventional_http_method", "permit_unconventional_http_version",
        "casefold_http_method", "strip_header_spaces",
    ),
    "the log goes to standard output; LOG_LEVEL and LOG_FORMAT set what it has": (
        "accesslog", "access_log_format", "errorlog", "capture_output", "loglevel", "logconfig", "logconfig_json",
        "logger_class", "syslog", "daemon",
    ),
    "/metrics has the figures": ("statsd_host", "statsd_prefix", "dogstatsd_tags", "enable_backlog_metric"),
    "set KEEPALIVE_TIMEOUT": ("keepalive",),
    "set WEB_CONCURRENCY": ("threads",),
    "set GRACEFUL_TIMEOUT": ("graceful_timeout",),
    "set the variable in gunicorn's own environment": ("raw_env",),
    "only server.worker.Worker has the limits, the metrics and the log of the service": ("worker_class",),
    "workers cannot share connections to Postgres": ("preload_app",),
    "workers need not be replaced": ("max_requests", "max_requests_jitter"),
    "the worker does not call it": ("pre_request", "post_request"),
    "gunicorn.conf.py disables it": ("control_socket",),
}  # fmt: skip


def check_options(config: Any) -> None:
    """Exit with one line if an option is set that is not supported."""
    defaults = {name: setting.get() for name, setting in make_settings().items()}
    # What gunicorn.conf.py sets
    defaults |= {"loglevel": settings.LOG_LEVEL, "graceful_timeout": settings.GRACEFUL_TIMEOUT}
    defaults["worker_class"] = "server.worker.Worker"
    for advice, names in REFUSED.items():
        for name in names:
            setting = config.settings[name]
            if setting.get() != defaults[name]:
                option = setting.cli[-1] if setting.cli else name
                sys.exit(f"gunicorn's option {option} is not supported: {advice}")


def check_addresses(addresses: Iterable[Any], *, reuse_port: bool = False) -> None:
    """Exit with one line if a TCP address cannot be listened on: gunicorn would try five times, and log each."""
    advice = {"PORT": "HOST or PORT", "METRICS_PORT": "METRICS_HOST or METRICS_PORT"}
    names = {address: advice[setting] for setting, address in settings.addresses().items()}
    for host, port in [address for address in addresses if isinstance(address, tuple)]:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(reuse_port))
            try:
                probe.bind((host, port))
            except (OSError, OverflowError, UnicodeError) as error:
                reason = getattr(error, "strerror", None) or error
                name = names.get((host, port), "--bind")
                sys.exit(f"cannot listen on {host} port {port} ({reason}): set another {name}")
