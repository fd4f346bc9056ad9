"""Format log lines, and write them in a thread: a reader that stops does not block the process.

A line names a route, never a user: no path, query string, username or date of birth, and of an exception its class and
its location: its text may quote any of these.

gunicorn's master imports this module before gevent patches the standard library in its workers. The thread, the queue
and the lock are therefore those of the operating system.
"""

import atexit
import json
import logging
import os
import signal
import sys
import traceback
from _thread import allocate_lock, start_new_thread
from datetime import UTC, datetime
from functools import lru_cache
from queue import SimpleQueue
from select import PIPE_BUF, select
from typing import Any, NamedTuple

from server import settings

if sys.stdout is None:  # the next file that is opened would get its descriptor
    sys.exit("Standard output is closed, and the log is written to it: open it, as with >/dev/null.")

LOG = logging.getLogger("hello")
STDOUT = 1
PROBES = {"/livez", "/readyz"}  # counted, not logged: probes repeat every few seconds
IS_TEXT = settings.LOG_FORMAT == "text" or (settings.LOG_FORMAT == "auto" and os.isatty(STDOUT))
MAX_WAITING_LINES = 10_000  # about 5 MB; 1 second of requests at full load
STOP_SECONDS = 0.3  # how long an exit waits for the last lines: less than worker.EXIT_SECONDS; the others are lost


@lru_cache(maxsize=2)  # one statement answers many requests, most of them in the same millisecond
def timestamp(milliseconds: int) -> str:
    """Return a time since 1970 as RFC 3339 in UTC."""
    moment = datetime.fromtimestamp(milliseconds / 1000, UTC).replace(tzinfo=None)
    return f"{moment.isoformat(timespec='milliseconds')}Z"


def location(error: BaseException) -> str:
    """Return the class of an exception and where it was raised, without its text."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno} in {frames[-1].name}" if frames else ""
    return type(error).__name__ + where


class AnsweredRequest(NamedTuple):
    """What is counted and logged of a request; no field needs escaping in JSON."""

    at: float  # seconds since 1970
    method: str
    route: str
    status: str
    seconds: float
    size: int  # bytes of content
    request_id: str
    trace_id: str  # perhaps empty


def request_line(request: AnsweredRequest, level: str) -> str:
    """Return the line of a request."""
    at, method, route, status, seconds, size, request_id, trace_id = request
    moment = timestamp(int(at * 1000))
    if IS_TEXT:
        trace = f" trace {trace_id}" if trace_id else ""
        line = f"{method} {route} {status} {seconds * 1000:.1f} ms, {size} bytes, {request_id}{trace}"
        return f"{moment} {level:8} {line}"
    trace = f', "trace_id": "{trace_id}"' if trace_id else ""
    return (
        f'{{"time": "{moment}", "level": "{level}", "message": "request", "method": "{method}", "route": "{route}", '
        f'"status": {status}, "duration_seconds": {seconds:.6f}, "bytes": {size}, "request_id": "{request_id}"{trace}}}'
    )


def record_line(record: logging.LogRecord) -> str:
    """Return the line of a record of gunicorn or hello, in the form of the lines of requests."""
    moment = timestamp(int(record.created * 1000))
    level = record.levelname.lower()
    message = record.getMessage()
    error = record.exc_info[1] if record.exc_info else None
    if IS_TEXT:
        return f"{moment} {level:8} {message}{': ' + location(error) if error else ''}"
    entry = {"time": moment, "level": level, "message": message}
    if error:
        entry["exception"] = location(error)
    return json.dumps(entry)


class LineWriter:
    """Write lines in a thread; drop and count those that find too many waiting, or cannot be written."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.reset()
        os.register_at_fork(after_in_child=self.reset)  # the lines and the thread are those of the parent
        atexit.register(self.close)

    def reset(self) -> None:
        self.waiting: SimpleQueue[list[str] | None] = SimpleQueue()
        self.added = 0  # lines that were queued
        self.taken = 0  # lines that the thread has taken from the queue and written or dropped
        self.refused = 0  # lines that found too many waiting
        self.failed = 0  # lines that could not be written; the thread counts them
        self.line_end = b""  # what the next write begins with: the end of a line that was cut
        self.finished: Any = None  # a lock that the thread releases when it ends; None without a thread

    @property
    def dropped(self) -> int:
        """The number of lines that were lost."""
        return self.refused + self.failed

    def add(self, lines: list[str]) -> None:
        """Queue lines."""
        if self.finished is None:
            self.start()
        if self.added - self.taken >= MAX_WAITING_LINES:
            self.refused += len(lines)
            return
        self.added += len(lines)
        self.waiting.put(lines)

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

    def run(self, waiting: "SimpleQueue[list[str] | None]", finished: Any) -> None:
        """Write lines until None is queued; the arguments stay when `close` and a fork replace the attributes."""
        while (lines := waiting.get()) is not None:
            self.write_lines(lines)
        finished.release()

    def write_lines(self, lines: list[str]) -> None:
        """Write lines, several at once: up to PIPE_BUF bytes, which a pipe takes whole."""
        data = "\n".join([*lines, ""]).encode(errors="backslashreplace")
        start = 0
        while start < len(data):
            end = data.rfind(b"\n", start, start + PIPE_BUF)
            if end < 0:
                end = data.find(b"\n", start)
            piece = data[start : end + 1]
            self.write(piece)
            self.taken += piece.count(b"\n")
            start = end + 1

    def write(self, piece: bytes) -> None:
        """Write whole lines, after the end of a line that was cut; count those that cannot be written."""
        data = self.line_end + piece
        size = self.write_bytes(data)
        if size:
            self.line_end = b"" if data[:size].endswith(b"\n") else b"\n"
        lost = data[size:].count(b"\n")
        self.failed += min(lost, piece.count(b"\n"))  # the line that was cut is counted already

    def write_bytes(self, data: bytes) -> int:
        """Return how many bytes could be written; wait while the reader of a non-blocking pipe is slow."""
        size = 0
        while size < len(data):
            try:
                size += os.write(self.descriptor, data[size:])
            except BlockingIOError:
                select([], [self.descriptor], [])
            except OSError:  # the reader is gone, or the disk is full
                break
        return size

    def close(self) -> None:
        """Write the waiting lines; after STOP_SECONDS, count them as lost."""
        finished, self.finished = self.finished, None
        if finished:
            self.waiting.put(None)
            if not finished.acquire(timeout=STOP_SECONDS):
                self.refused += self.added - self.taken


WRITER = LineWriter(STDOUT)


def log_requests(requests: list[AnsweredRequest]) -> None:
    """Log requests; those with a 5xx are warnings."""
    lines = []
    for request in requests:
        is_failure = request.status.startswith("5")
        level = logging.WARNING if is_failure else logging.INFO
        if request.route not in PROBES and LOG.isEnabledFor(level):
            lines.append(request_line(request, "warning" if is_failure else "info"))
    if lines:
        WRITER.add(lines)


class Handler(logging.Handler):
    """Queue the records of gunicorn and hello."""

    def emit(self, record: logging.LogRecord) -> None:
        WRITER.add(record_line(record).splitlines())
