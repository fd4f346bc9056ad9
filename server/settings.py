"""Settings of the server, from the environment. hello.py repeats these functions, to run without this folder."""

import os
import sys
from typing import NamedTuple, NoReturn, TypeVar

Number = TypeVar("Number", int, float)


class Setting(NamedTuple):
    """An environment variable: a number between two bounds, or a word, perhaps one of `choices`."""

    name: str
    default: int | float | str
    unit: str
    minimum: float | None
    meaning: str
    maximum: float | None = None
    choices: tuple[str, ...] = ()


SETTINGS: dict[str, Setting] = {}


def number(name: str, default: Number, unit: str, minimum: float, meaning: str, maximum: float = 1_000_000) -> Number:
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


def word(name: str, default: str, meaning: str, choices: tuple[str, ...] = ()) -> str:
    """Declare and read a word; exit with one line if there are choices and it is none of them."""
    SETTINGS[name] = Setting(name, default, "word", None, meaning, choices=choices)
    text = os.environ.get(name) or default
    if choices and text not in choices:
        reject(name, text, f"one of {', '.join(choices)}")
    return text


def reject(name: str, text: str, right: str) -> NoReturn:
    """Exit with one line that names the setting and says which values are valid."""
    sys.exit(f"{name}={text!r} must be {right}; the default is {SETTINGS[name].default}")


HOST = word("HOST", "127.0.0.1", "Address that the service listens on; 0.0.0.0 is every IPv4 address")
PORT = number("PORT", 8080, "port", 1, "Port of the service", maximum=65535)
METRICS_HOST = word("METRICS_HOST", "127.0.0.1", "Address that /metrics is served on")
METRICS_PORT = number("METRICS_PORT", 8081, "port", 0, "Port of /metrics; 0 serves none", maximum=65535)

WEB_CONCURRENCY = number("WEB_CONCURRENCY", 2, "processes", 1, "Worker processes: one for each core they may use")
WORKER_CONNECTIONS = number("WORKER_CONNECTIONS", 1000, "connections", 1, "Clients that a worker serves at once")
GRACEFUL_TIMEOUT = number("GRACEFUL_TIMEOUT", 8, "seconds", 2, "Time a stop may take; requests end before it")

KEEPALIVE_TIMEOUT = number("KEEPALIVE_TIMEOUT", 75.0, "seconds", 0.001, "Time an idle connection is kept")
HEAD_TIMEOUT = number("HEAD_TIMEOUT", 10.0, "seconds", 0.001, "Time a client has to send the head of a request")
CONTENT_TIMEOUT = number("CONTENT_TIMEOUT", 10.0, "seconds", 0.001, "Time a client has to send the content")
SEND_TIMEOUT = number("SEND_TIMEOUT", 10.0, "seconds", 0.001, "Time a client has to receive a response")

LEVELS = ("debug", "info", "warning", "error", "critical")
LOG_LEVEL = word("LOG_LEVEL", "info", "Lowest level that is logged; requests are info", LEVELS)
LOG_FORMAT = word("LOG_FORMAT", "auto", "Form of a log line; auto is text in a terminal", ("auto", "json", "text"))
TELEMETRY = word("TELEMETRY", "on", "off: no metrics, no log lines of requests, no request ids", ("on", "off"))

if METRICS_PORT == PORT and TELEMETRY == "on":
    sys.exit(f"PORT and METRICS_PORT are both {PORT}: choose another for one of them")


def addresses() -> dict[str, tuple[str, int]]:
    """Return the addresses to listen on: host and port for each setting of a port."""
    listened = {"PORT": (HOST, PORT)}
    if METRICS_PORT and TELEMETRY == "on":
        listened["METRICS_PORT"] = (METRICS_HOST, METRICS_PORT)
    return listened
