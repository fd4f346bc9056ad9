"""Format log lines, and write them in a thread: a reader that stops does not block the process.

A line names a route, never a user: no path, query string, username or date of birth, and of an exception its class and
its location: its text may quote any of these.

gunicorn's master imports this module before gevent patches the standard library in its workers. The thread, the queue
and the lock are therefore those of the operating system.
"""

import atexit
import contextlib
import json
import logging
import os
import signal
import traceback
from _thread import allocate_lock, start_new_thread
from collections.abc import Iterator
from functools import lru_cache
from queue import SimpleQueue
from select import PIPE_BUF
from time import gmtime, sleep, strftime
from types import TracebackType
from typing import Any

from server import settings

LOG = logging.getLogger("hello")
STDOUT = 1
IS_TEXT = settings.LOG_FORMAT == "text" or (settings.LOG_FORMAT == "auto" and os.isatty(STDOUT))
MAX_WAITING_LINES = 10_000  # about 5 MB; 1 second of requests at full load
WRITE_SECONDS = 0.05  # lines are collected for this time: each write wakes the reader
STOP_SECONDS = 1.0  # how long a process waits at its exit for its last lines to be written

# --- Form -------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)  # under load, many lines share a millisecond
def timestamp(milliseconds: int) -> str:
    """Return a time since 1970 as RFC 3339 in UTC."""
    seconds, rest = divmod(milliseconds, 1000)
    return f"{strftime('%Y-%m-%dT%H:%M:%S', gmtime(seconds))}.{rest:03d}Z"


def location(error: BaseException) -> str:
    """Return the class of an exception and where it was raised, without its text."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno} in {frames[-1].name}" if frames else ""
    return type(error).__name__ + where


class Formatter(logging.Formatter):
    """Format the records of gunicorn and hello like the lines of requests."""

    def format(self, record: logging.LogRecord) -> str:
        moment, level, message = timestamp(int(record.created * 1000)), record.levelname.lower(), record.getMessage()
        error = record.exc_info[1] if record.exc_info else None
        if IS_TEXT:
            return f"{moment} {level:8} {message}{': ' + location(error) if error else ''}"
        entry = {"time": moment, "level": level, "message": message}
        return json.dumps(entry | {"exception": location(error)} if error else entry)


# A request's template (see below), time in seconds since 1970, duration in seconds, bytes of content, request id and
# trace id. A plain tuple: one is made for each request.
RequestEntry = tuple[str, float, float, int, str, str]


def request_line(entry: RequestEntry) -> str:
    """Return the log line of a request; the fields of the entry must not need escaping in JSON."""
    template, moment, seconds, size, request_id, trace_id = entry
    if IS_TEXT:
        trace, duration = f" trace {trace_id}" if trace_id else "", seconds * 1000
    else:
        trace, duration = f', "trace_id": "{trace_id}"' if trace_id else "", seconds
    return template % (timestamp(int(moment * 1000)), duration, size, request_id, trace)


def request_template(method: str, route: str, status: str) -> str:
    """Return the template of the log lines of requests with this method, route and status.

    The arguments must not need escaping in JSON.
    """
    level = request_level(status)
    if IS_TEXT:
        return f"%s {level:8} {method} {route} {status} %.1f ms, %d bytes, %s%s"
    return (
        f'{{"time": "%s", "level": "{level}", "message": "request", "method": "{method}", "route": "{route}", '
        f'"status": {status}, "duration_seconds": %.6f, "bytes": %d, "request_id": "%s"%s}}'
    )


def request_level(status: str) -> str:
    return "warning" if status.startswith("5") else "info"


def logs_requests(status: str) -> bool:
    """Return whether requests with this status are logged at LOG_LEVEL."""
    return LOG.isEnabledFor(logging.getLevelName(request_level(status).upper()))


# --- Writing ----------------------------------------------------------------------------------------


class LineWriter:
    """Write lines to a file descriptor in a thread; drop and count lines if too many wait.

    A forked process starts with no waiting lines and a new thread.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.reset()
        os.register_at_fork(after_in_child=self.reset)
        atexit.register(self.close)

    def reset(self) -> None:
        self.waiting: SimpleQueue[str | RequestEntry | None] = SimpleQueue()
        self.dropped = 0
        self.finished: Any = None  # a lock, held by the thread while it runs

    def add(self, line: str | RequestEntry) -> None:
        """Queue a line; drop it if MAX_WAITING_LINES wait."""
        if self.waiting.qsize() >= MAX_WAITING_LINES:
            self.dropped += 1
            return
        self.waiting.put(line)
        if self.finished is None:
            self.start()

    def start(self) -> None:
        """Start the thread, with every signal blocked: they are for the main thread."""
        self.finished = allocate_lock()
        self.finished.acquire()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            start_new_thread(self.run, (self.waiting, self.finished))
        except RuntimeError:  # the system allows no more threads; the next line tries again
            self.finished = None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def run(self, waiting: "SimpleQueue[str | RequestEntry | None]", finished: Any) -> None:
        """Write lines until None is queued."""
        is_last = False
        while not is_last:
            entries = [waiting.get()]
            sleep(WRITE_SECONDS if entries[0] else 0)
            entries += [waiting.get() for _ in range(waiting.qsize())]
            is_last = None in entries
            lines = [entry if isinstance(entry, str) else request_line(entry) for entry in entries if entry]
            for piece in pieces(lines):
                with contextlib.suppress(OSError):  # the reader is gone
                    os.write(self.descriptor, piece)
        finished.release()

    def close(self) -> None:
        """Write the waiting lines; give up after STOP_SECONDS."""
        finished, self.finished = self.finished, None
        if finished:
            self.waiting.put(None)
            finished.acquire(timeout=STOP_SECONDS)


def pieces(lines: list[str]) -> Iterator[bytes]:
    """Join lines to pieces of at most PIPE_BUF bytes, which are written atomically to a pipe."""
    piece: list[str] = []
    size = 0
    for line in lines:
        length = 1 + (len(line) if line.isascii() else len(line.encode(errors="backslashreplace")))
        if piece and size + length > PIPE_BUF:
            yield "".join(piece).encode(errors="backslashreplace")
            piece, size = [], 0
        piece += (line, "\n")
        size += length
    if piece:
        yield "".join(piece).encode(errors="backslashreplace")


WRITER = LineWriter(STDOUT)


class Handler(logging.Handler):
    """Queue the records of gunicorn and hello."""

    def emit(self, record: logging.LogRecord) -> None:
        WRITER.add(self.format(record))


# gunicorn's `logconfig_dict`.
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"()": Formatter}},
    "handlers": {"stdout": {"()": Handler, "formatter": "line"}},
    "root": {"level": settings.LOG_LEVEL.upper(), "handlers": ["stdout"]},
    "loggers": {"gunicorn.error": {"propagate": True}, "gunicorn.access": {"propagate": False}},
}


def log_uncaught(
    context: object, kind: type[BaseException] | None, error: BaseException | str | None, trace: TracebackType | None
) -> None:
    """Log an uncaught exception without its text; replaces gevent's `Hub.print_exception`."""
    if kind and isinstance(error, BaseException):
        LOG.error("uncaught exception", exc_info=(kind, error.with_traceback(trace), trace))
