"""The gunicorn worker that serves hello: llhttp parses requests, gevent runs a greenlet for each connection.

It serves applications that return their content as a list, and neither call `write` (PEP 3333) nor raise exceptions.
"""

import ctypes
import fcntl
import math
import signal
import socket
import struct
import sys
import termios
from contextlib import suppress
from email.utils import formatdate
from enum import Enum
from functools import lru_cache
from time import monotonic, time
from typing import Any
from wsgiref.types import WSGIEnvironment

import gevent
from gunicorn.arbiter import Arbiter
from gunicorn.workers import ggevent

from server import settings
from server.listener import Listener
from server.parser import BAD_CONTENT, LATE, ProtocolError, Request
from server.telemetry import Telemetry

METRICS_PORT = str(settings.METRICS_PORT)  # SERVER_PORT is text
RECEIVE_BYTES = 8192
DRAIN_BYTES = 65536
DRAIN_SECONDS = 1  # a connection that is being closed is read for this long
# A stopping worker keeps connections that are idle for less than this, because a request may be on its way, and accepts
# new ones for as long, because the workers that replace it after SIGHUP are not ready at once.
STOPPING_SECONDS = 1
EXIT_SECONDS = 0.5  # a stopping worker ends this long before gunicorn would kill it
RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # a struct linger: l_onoff, l_linger
SWEEP_SECONDS = 0.05  # between two checks of the time limits, and two counts of requests
TRIM_SECONDS = 5  # between two times that freed memory goes back to the system
STOP_SIGNALS = {signal.SIGTERM, signal.SIGQUIT, signal.SIGINT}
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

# What a connection does. It waits for its client to send in the first three phases, and to receive in SEND.
Phase = Enum("Phase", ["IDLE", "HEAD", "CONTENT", "APPLICATION", "SEND", "CLOSE"])
IDLE, HEAD, CONTENT, APPLICATION, SEND, CLOSE = Phase


@lru_cache(maxsize=64)
def response_start(status: str, second: int, is_last: bool) -> str:
    """Return a response's status line and the headers that all responses of one second share."""
    connection = "close" if is_last else "keep-alive"
    return f"HTTP/1.1 {status}\r\nDate: {formatdate(second, usegmt=True)}\r\nConnection: {connection}"


def return_memory() -> None:
    """Give freed memory back to the system every TRIM_SECONDS; glibc would keep most of it."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    while malloc_trim:
        gevent.sleep(TRIM_SECONDS)
        malloc_trim(0)  # takes less than a millisecond, or some if there is much to give back


class ClientConnection:
    """A client's connection: its requests are read and answered one after the other."""

    def __init__(self, worker: "Worker", client: Any) -> None:
        self.worker = worker
        self.socket = client
        self.readable = gevent.get_hub().loop.io(client.fileno(), 1)  # 1 is READ
        self.common = worker.common_environ(client.getsockname())
        self.application = worker.wsgi
        self.telemetry = worker.telemetry
        if self.telemetry and self.common["SERVER_PORT"] == METRICS_PORT:
            self.application = self.telemetry.serve_metrics
            self.telemetry = None
        self.request = Request(self.common)
        self.unread = b""  # what has arrived behind the request
        self.is_late = False  # a time limit has passed
        self.enter(IDLE, settings.KEEPALIVE_TIMEOUT)

    def enter(self, phase: Phase, limit: float) -> None:
        """Begin a phase with a time limit in seconds."""
        self.phase = phase
        self.since = monotonic()
        self.limit = limit

    def serve(self) -> None:
        """Serve requests until either side closes."""
        try:
            self.serve_requests()
            if self.phase is SEND:  # the last response was sent; the client may still send
                self.close_gently()
        except Exception as error:
            # Outside the application, only the client's socket raises OSError.
            has_left = isinstance(error, OSError) and self.phase is not APPLICATION
            if not has_left:
                self.worker.log.error("uncaught exception", exc_info=error)
        finally:
            self.worker.connections.remove(self)
            self.readable.close()
            self.socket.close()

    def serve_requests(self) -> None:
        """Read requests and answer them."""
        try:
            while self.read_request() and self.answer():
                self.request = Request(self.common)
        except ProtocolError as error:
            self.refuse(error)

    def read_request(self) -> bool:
        """Read a request; return False if the client sends none; raise ProtocolError if it is refused."""
        request = self.request
        while not request.is_complete:
            data = self.unread or self.receive()
            if not data:
                self.check_end()
                return False
            self.unread = request.feed(data)
            if request.awaits_continue and not request.is_complete:
                request.awaits_continue = False
                self.send(CONTINUE)
        return True

    def receive(self) -> bytes:
        """Return what the client sends next; nothing at its end or once its time is up. A phase has one time limit."""
        request = self.request
        if not request.received:
            self.enter(IDLE, settings.KEEPALIVE_TIMEOUT)
        elif not request.environ and self.phase is not HEAD:
            self.enter(HEAD, settings.HEAD_TIMEOUT)
        elif request.environ and self.phase is not CONTENT:
            self.enter(CONTENT, settings.CONTENT_TIMEOUT)
        # recv alone would not wait, nor let other greenlets run, while a client keeps sending.
        gevent.get_hub().wait(self.readable)
        data: bytes = self.socket.recv(RECEIVE_BYTES)
        return data

    def check_end(self) -> None:
        """Raise ProtocolError if the client's time ended within a request, or its data within the content."""
        if self.is_late and (self.request.head or self.request.environ):  # more than a blank line has arrived
            raise ProtocolError(*LATE)
        if self.request.environ:
            raise ProtocolError(*BAD_CONTENT)

    def expire(self) -> None:
        """Wake the greenlet, which waits for the client, after the time limit."""
        self.is_late = True
        with suppress(OSError):  # the client went away
            self.socket.shutdown(socket.SHUT_RDWR if self.phase is SEND else socket.SHUT_RD)

    def start_response(self, status: str, headers: list[tuple[str, str]], exc_info: object = None) -> None:
        """Keep the head of the response to the request that is being answered (PEP 3333)."""
        self.status, self.headers = status, headers

    def answer(self) -> bool:
        """Answer the request; return whether another may follow."""
        environ = self.request.environ
        self.enter(APPLICATION, math.inf)
        content = b"".join(self.application(environ, self.start_response))
        if self.telemetry:
            seconds = monotonic() - self.since
            request_id = self.telemetry.note_answer(environ, self.status[:3], len(content), seconds)
            self.headers.append(("X-Request-Id", request_id))
        # The worker may have been told to stop meanwhile. What has arrived by then is answered too.
        is_stopping = not self.worker.alive and not self.has_more()
        is_last = self.request.is_last or self.is_late or is_stopping
        self.respond(self.status, self.headers, content, is_last=is_last)
        return not is_last

    def has_more(self) -> bool:
        """Return whether the client has sent something behind the request."""
        unread_bytes = fcntl.ioctl(self.socket.fileno(), termios.FIONREAD, bytes(4))  # ioctl fills in a C int
        return bool(self.unread or any(unread_bytes))

    def refuse(self, error: ProtocolError) -> None:
        """Answer a protocol error."""
        method = self.request.method
        content = b'{"message": "%b"}\n' % error.message.encode()
        headers = [
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(content))),
        ]
        if method == "HEAD":
            content = b""
        if telemetry := self.worker.telemetry:  # also on the port of the metrics
            environ = self.request.environ
            request_id = telemetry.count_refusal(environ, method, str(error.status.value), len(content))
            headers.append(("X-Request-Id", request_id))
        status = f"{error.status.value} {error.status.phrase}"
        self.respond(status, headers, content, is_last=True)

    def respond(self, status: str, headers: list[tuple[str, str]], content: bytes, *, is_last: bool) -> None:
        """Send a response, head and content together."""
        start = response_start(status, int(time()), is_last)
        lines = [start, *map(": ".join, headers), "", ""]
        self.send("\r\n".join(lines).encode("latin-1") + content)

    def send(self, data: bytes) -> None:
        """Send all of it; raise OSError if the client does not read it in time."""
        self.enter(SEND, settings.SEND_TIMEOUT)
        if (sent := self.socket.send(data)) < len(data):  # rare; sendall alone makes one more system call
            self.socket.sendall(memoryview(data)[sent:])

    def close_gently(self) -> None:
        """Read what the client still sends: closing with unread bytes would reset the connection."""
        self.socket.shutdown(socket.SHUT_WR)
        self.enter(CLOSE, DRAIN_SECONDS)
        data = b""
        while monotonic() < self.since + DRAIN_SECONDS:
            data = self.socket.recv(DRAIN_BYTES)
            if not data and not self.is_late:  # after expire(), recv finds nothing although the client may send
                return
            gevent.sleep(DRAIN_SECONDS / 20)  # a client that sends without end must not keep the worker busy
        if data:  # without a reset, a client that waits until it may send would wait for a minute
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)


class Worker(ggevent.GeventWorker):
    """Serve keep-alive connections, one greenlet each; gunicorn.conf.py sets `telemetry` and `number`."""

    wsgi: Any  # the application; the stub of gunicorn has a type that is not PEP 3333's
    telemetry: Telemetry | None = None
    number: int  # 1 for the first worker

    def init_process(self) -> None:
        """Start the worker."""
        self.connections: set[ClientConnection] = set()
        super().init_process()

    def load_wsgi(self) -> None:
        """Load the application; if it exits, end the server with its message: gunicorn would retry for ever."""
        try:
            super().load_wsgi()
        except SystemExit as error:
            # All workers fail alike. Worker n waits 2 (n - 1) s: the first one prints, and its end stops the rest.
            turn = monotonic() + 2 * ((self.number - 1) % self.cfg.workers)
            while self.alive and monotonic() < turn:
                gevent.sleep(SWEEP_SECONDS)
            if not self.alive:
                sys.exit()
            print(error, file=sys.stderr)
            sys.exit(Arbiter.WORKER_BOOT_ERROR)

    def init_signals(self) -> None:
        """Set the signal handlers, and unblock the signals that gunicorn.conf.py blocks before the fork."""
        super().init_signals()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def run(self) -> None:
        """Serve until told to stop; then answer what has arrived, for `graceful_timeout` seconds at most."""
        listeners = [Listener(each, self.serve, spawn=self.worker_connections) for each in self.sockets]
        for listener in listeners:
            listener.start()
        gevent.spawn(return_memory)
        while self.alive:
            self.sweep()
        stopped = monotonic()
        while monotonic() < stopped + STOPPING_SECONDS:
            self.sweep()
        for listener in listeners:
            listener.close()
        self.sweep()  # now the last ones are in self.connections
        while self.connections and monotonic() < stopped + self.cfg.graceful_timeout - EXIT_SECONDS:
            self.sweep()
        if self.connections:
            self.log.warning("Worker graceful timeout (pid:%s)", self.pid)

    def sweep(self) -> None:
        """Tell gunicorn that this worker lives, count requests, and expire connections: a timer for each costs more."""
        self.notify()
        if self.telemetry:
            self.telemetry.count_requests()
        now = monotonic()
        for connection in list(self.connections):
            is_leaving = connection.phase is IDLE and not self.alive
            limit = min(connection.limit, STOPPING_SECONDS) if is_leaving else connection.limit
            if now - connection.since > limit:
                connection.expire()
        gevent.sleep(SWEEP_SECONDS)

    def serve(self, client: Any, address: Any) -> None:
        """Serve one connection."""
        connection = ClientConnection(self, client)
        self.connections.add(connection)
        connection.serve()

    def requests_in_progress(self) -> int:
        """Return how many requests the application works on; one for /metrics does not count."""
        running = [connection for connection in self.connections if connection.phase is APPLICATION]
        return len([connection for connection in running if connection.application is self.wsgi])

    def common_environ(self, own_address: Any) -> WSGIEnvironment:
        """Return what the environs of all requests of a connection have in common (PEP 3333)."""
        host, port = settings.HOST, settings.PORT
        if isinstance(own_address, tuple):  # not the path of a Unix socket
            host, port = own_address[:2]
        return {
            "SCRIPT_NAME": "",
            "SERVER_NAME": host,
            "SERVER_PORT": str(port),
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": True,
            "wsgi.multiprocess": self.cfg.workers > 1,
            "wsgi.run_once": False,
            "wsgi.input_terminated": True,
        }
