"""The gunicorn worker that serves hello: llhttp parses requests, gevent runs a greenlet for each connection.

Differences from gunicorn's own gevent worker, each with a test in tests/test_server.py or tests/resilience:
- Each phase of a connection (idle, head, content, sending) has a time limit of its own.
- Protocol errors are JSON, and no part of a request is in them or in the log.
- A worker that stops lets open requests finish, closes idle connections and resets none.
- A connection is closed in a way that does not destroy the response that was just sent.

It serves applications that return their content as a list and do not call `write`, as hello does. gunicorn's settings
and hooks about requests (limit_request_*, keepalive, max_requests, access log, pre_request) have no effect.
"""

import signal
import socket
import struct
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from email.utils import formatdate
from enum import Enum, auto
from functools import lru_cache
from http import HTTPStatus
from time import monotonic, time
from typing import Any, NoReturn, Protocol
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

import gevent
from gunicorn.arbiter import Arbiter
from gunicorn.workers import ggevent

from server import settings
from server.listener import Listener
from server.parser import ProtocolError, RequestParser, bad_content

READ = 1  # the event of gevent's watchers
RECEIVE_BYTES = 8192
DRAIN_SECONDS = 1  # a connection that is being closed is read for this long
STOPPING_IDLE_SECONDS = 1  # a stopping worker keeps idle connections for this long
RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # a struct linger: l_onoff, l_linger
SWEEP_SECONDS = 0.1  # between two checks of the deadlines
STOP_SIGNALS = {signal.SIGTERM, signal.SIGQUIT, signal.SIGINT}

SERVER_METHODS = "GET, HEAD, OPTIONS, PUT"  # the Allow of `OPTIONS *`

Headers = list[tuple[str, str]]


class Telemetry(Protocol):
    """Counts and logs protocol errors; requests are counted by a wrapper around the application."""

    def protocol_error(self, method: str, status: int, size: int) -> str:
        """Count and log a protocol error with the size of its response in bytes; return its X-Request-Id."""


class Phase(Enum):
    """What a connection waits for."""

    IDLE = auto()  # the next request
    REQUEST = auto()  # the rest of a request
    APPLICATION = auto()
    SEND = auto()


IDLE, REQUEST, APPLICATION, SEND = Phase


@lru_cache(maxsize=64)
def response_start(status: str, second: int, is_last: bool) -> str:
    """Return a response's status line and the headers that all responses of one second share."""
    connection = "close" if is_last else "keep-alive"
    return f"HTTP/1.1 {status}\r\nDate: {formatdate(second, usegmt=True)}\r\nConnection: {connection}"


def write(data: bytes) -> NoReturn:
    """Raise: PEP 3333's `write` is not supported."""
    raise NotImplementedError("return the content instead")


def with_server_options(application: WSGIApplication) -> WSGIApplication:
    """Answer `OPTIONS *`, which asks about the server (RFC 9110, section 9.3.7); pass on other requests."""

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"] != "*":
            return application(environ, start_response)
        start_response("204 No Content", [("Cache-Control", "no-store"), ("Allow", SERVER_METHODS)])
        return []

    return answer


class Connection:
    """A client's connection: its requests are answered one after the other."""

    def __init__(self, worker: "Worker", client: Any) -> None:
        self.worker = worker
        self.socket = client
        self.readable = gevent.get_hub().loop.io(client.fileno(), READ)
        self.parser = RequestParser(worker.common_environ(client.getsockname()))
        self.phase = IDLE
        self.deadline = monotonic() + settings.KEEPALIVE_TIMEOUT  # of the phase; APPLICATION has none
        self.is_late = False  # a deadline has passed

    def serve(self) -> None:
        """Serve requests until either side closes."""
        try:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                self.serve_requests()
            finally:
                self.parser.close()
            self.close_gently()
        except OSError:
            pass  # the client went away
        finally:
            self.readable.close()
            self.socket.close()

    def serve_requests(self) -> None:
        """Read requests and answer them."""
        parser = self.parser
        while not parser.is_closed and (data := self.receive()):
            parser.feed(data)
            while parser.complete:
                environ, is_last = parser.complete.popleft()
                if not self.answer(environ, is_last=is_last):
                    return
            if parser.awaits_continue and not parser.is_closed:
                parser.awaits_continue = False
                self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        if error := parser.error or (bad_content() if parser.environ else None):
            self.refuse(error)

    def receive(self) -> bytes:
        """Return the next bytes of the client; none at the end of its data, or after the deadline."""
        self.start_waiting()
        data = b""
        # Without it, a client that sends without a pause would keep the worker; and recv would mostly fail once.
        gevent.get_hub().wait(self.readable)
        try:
            data = self.socket.recv(RECEIVE_BYTES)
        except OSError:
            if not self.is_late:
                raise
        self.phase = APPLICATION
        if not data and self.is_late and self.parser.head.strip(b"\r\n"):  # a blank line is not a request yet
            self.parser.error = ProtocolError(HTTPStatus.REQUEST_TIMEOUT, "The request must arrive sooner.")
        return data

    def start_waiting(self) -> None:
        """Set the phase and the deadline of the next receive."""
        parser, now = self.parser, monotonic()
        if not parser.in_progress:
            self.phase, limit = IDLE, settings.KEEPALIVE_TIMEOUT if self.worker.alive else STOPPING_IDLE_SECONDS
        else:
            limit = settings.CONTENT_TIMEOUT if parser.environ else settings.HEAD_TIMEOUT
            self.phase, parser.waiting_since = REQUEST, parser.waiting_since or now
        self.deadline = (parser.waiting_since or now) + limit

    def expire(self) -> None:
        """Wake the greenlet that waits for the client after the deadline."""
        self.is_late = True
        with suppress(OSError):  # the client went away
            self.socket.shutdown(socket.SHUT_RDWR if self.phase is SEND else socket.SHUT_RD)

    def start_response(self, status: str, headers: Headers, exc_info: object = None) -> Callable[[bytes], object]:
        """Keep the head of the response to the request that is being answered (PEP 3333)."""
        self.status, self.headers = status, headers
        return write

    def answer(self, environ: WSGIEnvironment, *, is_last: bool) -> bool:
        """Answer a request; return whether the connection goes on."""
        content = b"".join(self.worker.wsgi(environ, self.start_response))
        is_last = is_last or not self.worker.alive  # after the call, during which the worker may have been told to stop
        self.respond(self.status, self.headers, content, is_last=is_last)
        return not is_last

    def refuse(self, error: ProtocolError) -> None:
        """Answer a protocol error."""
        method = self.parser.method
        content = b'{"message": "%b"}' % error.message.encode()
        headers = [
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(content))),
        ]
        if method == "HEAD":
            content = b""
        if telemetry := self.worker.telemetry:
            headers.append(("X-Request-Id", telemetry.protocol_error(method, error.status.value, len(content))))
        self.respond(f"{error.status.value} {error.status.phrase}", headers, content, is_last=True)

    def respond(self, status: str, headers: Headers, content: bytes, *, is_last: bool) -> None:
        """Send a response, head and content together."""
        lines = [response_start(status, int(time()), is_last), *map(": ".join, headers), "", ""]
        self.send("\r\n".join(lines).encode("latin-1") + content)

    def send(self, data: bytes) -> None:
        """Send all of it; raise OSError if the client does not read it in time."""
        self.phase, self.deadline = SEND, monotonic() + settings.SEND_TIMEOUT
        if (sent := self.socket.send(data)) < len(data):  # rare; sendall alone makes one more system call
            self.socket.sendall(data[sent:])

    def close_gently(self) -> None:
        """Read what the client still sends: closing with unread bytes would reset the connection."""
        if self.is_late and not self.parser.error:  # it was idle
            return
        self.socket.shutdown(socket.SHUT_WR)
        end = monotonic() + DRAIN_SECONDS
        self.phase, self.deadline = REQUEST, end
        while ((data := self.socket.recv(65536)) or self.is_late) and monotonic() < end:
            gevent.sleep(DRAIN_SECONDS / 20)  # a client that sends without end must not keep the worker busy
        if data:  # without a reset, Linux lets a client that may not send at this moment wait for a minute
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)


class Worker(ggevent.GeventWorker):
    """Serve keep-alive connections, one greenlet each.

    Attributes:
        telemetry: None, or what counts and logs protocol errors; gunicorn's hook `post_worker_init` may set it.
    """

    wsgi: Any  # the application; the stub of gunicorn has a type that is not PEP 3333's
    telemetry: Telemetry | None = None
    number: int  # 1 for the first worker; gunicorn's hook `pre_fork` sets it

    def init_process(self) -> None:
        """Start the worker; block the stop signals until their handlers are set."""
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        self.connections: set[Connection] = set()
        super().init_process()

    def load_wsgi(self) -> None:
        """Load the application; if it exits, for a wrong setting, stop the server with the first worker's message.

        gunicorn would go on to replace the worker for ever.
        """
        try:
            super().load_wsgi()
            self.wsgi = with_server_options(self.wsgi)
        except SystemExit as error:
            if self.number == 1:
                print(error, file=sys.stderr)
                sys.exit(Arbiter.WORKER_BOOT_ERROR)
            while self.alive:  # until gunicorn stops the others
                gevent.sleep(SWEEP_SECONDS)
            sys.exit()

    def init_signals(self) -> None:
        """Set the signal handlers."""
        super().init_signals()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def run(self) -> None:
        """Serve until told to stop."""
        gevent.spawn(self.watch_deadlines)
        super().run()

    def server_class(self, listener: Any, *, spawn: Any, **_: Any) -> Listener:  # type: ignore[override]
        """Return what accepts connections; gunicorn calls it once for each listening socket."""
        return Listener(listener, self.serve, spawn=spawn)

    def serve(self, client: Any, address: Any) -> None:
        """Serve one connection."""
        connection = Connection(self, client)
        self.connections.add(connection)
        try:
            connection.serve()
        finally:
            self.connections.remove(connection)

    def watch_deadlines(self) -> None:
        """Expire the connections whose deadlines have passed: one loop is cheaper than a timer for each."""
        while True:
            gevent.sleep(SWEEP_SECONDS)
            now = monotonic()
            for connection in list(self.connections):
                if connection.phase is IDLE and not self.alive:
                    connection.deadline = min(connection.deadline, now + STOPPING_IDLE_SECONDS)
                if connection.deadline < now and connection.phase is not APPLICATION:
                    connection.expire()

    def common_environ(self, server: tuple[str, int]) -> WSGIEnvironment:
        """Return what the environs of all requests to one of the server's addresses have in common (PEP 3333)."""
        return {
            "SCRIPT_NAME": "",
            "SERVER_NAME": server[0],
            "SERVER_PORT": str(server[1]),
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": True,
            "wsgi.multiprocess": self.cfg.workers > 1,
            "wsgi.run_once": False,
            "wsgi.input_terminated": True,
        }
