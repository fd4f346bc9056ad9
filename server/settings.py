"""Every setting of the server, read from the environment; hello.py has those of the application.

gunicorn's master imports this module, so it must not import gevent or hello.
"""

import os
import sys
from typing import NamedTuple, NoReturn, TypeVar

Value = TypeVar("Value", int, float, str)


class Setting(NamedTuple):
    """An environment variable: a number between two bounds, one of some words, or an address."""

    name: str
    default: int | float | str
    unit: str
    minimum: float | None
    meaning: str
    maximum: float | None = None
    choices: tuple[str, ...] = ()


SETTINGS: dict[str, Setting] = {}


def number(name: str, default: Value, unit: str, minimum: float, meaning: str, maximum: float = 1_000_000) -> Value:
    """Declare and read a number of the default's type; exit with one line if the value is wrong."""
    SETTINGS[name] = Setting(name, default, unit, minimum, meaning, maximum)
    text = os.environ.get(name) or str(default)
    kind = "an integer" if isinstance(default, int) else "a number"
    try:
        value = type(default)(text)
        if minimum <= float(value) <= maximum:
            return value
    except (ValueError, OverflowError):
        pass
    reject(name, text, f"{kind} from {minimum:g} to {maximum:.0f}")


def word(name: str, choices: tuple[str, ...], default: str, meaning: str) -> str:
    """Declare and read one of some words; exit with one line if the value is another."""
    SETTINGS[name] = Setting(name, default, "word", None, meaning, choices=choices)
    if (text := os.environ.get(name) or default) not in choices:
        reject(name, text, f"one of {', '.join(choices)}")
    return text


def host(name: str, default: str, meaning: str) -> str:
    """Declare and read an address to listen on, which server/options.py checks."""
    SETTINGS[name] = Setting(name, default, "address", None, meaning)
    return os.environ.get(name) or default


def reject(name: str, text: str, right: str) -> NoReturn:
    """Exit with one line that names the setting and says which values are valid."""
    sys.exit(f"{name}={text!r} must be {right}; the default is {SETTINGS[name].default}")


HOST = host("HOST", "127.0.0.1", "Address that the service listens on; 0.0.0.0 is every IPv4 address")
PORT = number("PORT", 8080, "port", 1, "Port of the service", maximum=65535)
METRICS_HOST = host("METRICS_HOST", "127.0.0.1", "Address that /metrics is served on")
METRICS_PORT = number("METRICS_PORT", 8081, "port", 0, "Port of /metrics; 0 serves none", maximum=65535)

WEB_CONCURRENCY = number("WEB_CONCURRENCY", 2, "processes", 1, "Worker processes: one for each core they may use")
WORKER_CONNECTIONS = number(
    "WORKER_CONNECTIONS", 1000, "connections", 1, "Clients a worker serves at once; others wait to be accepted"
)
GRACEFUL_TIMEOUT = number(
    "GRACEFUL_TIMEOUT", 8, "seconds", 0, "Time a worker that was told to stop has for the requests it has begun"
)

KEEPALIVE_TIMEOUT = number("KEEPALIVE_TIMEOUT", 75.0, "seconds", 0.001, "Time an idle connection is kept")
HEAD_TIMEOUT = number("HEAD_TIMEOUT", 10.0, "seconds", 0.001, "Time a client has to send the head of a request")
CONTENT_TIMEOUT = number(
    "CONTENT_TIMEOUT", 10.0, "seconds", 0.001, "Time a client has to send the content of a request"
)
SEND_TIMEOUT = number("SEND_TIMEOUT", 10.0, "seconds", 0.001, "Time a client has to receive a response")

LOG_LEVEL = word(
    "LOG_LEVEL",
    ("debug", "info", "warning", "error", "critical"),
    "info",
    "Lowest level that is logged; requests are info",
)
LOG_FORMAT = word(
    "LOG_FORMAT", ("auto", "json", "text"), "auto", "Form of a log line; auto is text in a terminal, else json"
)
TELEMETRY = word("TELEMETRY", ("on", "off"), "on", "off: no metrics, no log lines of requests, no request ids")

if METRICS_PORT == PORT and TELEMETRY == "on":
    sys.exit(f"PORT and METRICS_PORT are both {PORT}: choose another for one of them")


def addresses() -> dict[str, tuple[str, int]]:
    """Return host and port of each address that the service listens on, by the setting of the port."""
    listened = {"PORT": (HOST, PORT)}
    if METRICS_PORT and TELEMETRY == "on":
        listened["METRICS_PORT"] = (METRICS_HOST, METRICS_PORT)
    return listened
