"""The gunicorn worker that serves hello: gunicorn's parser and gevent's server, every wait bounded.

What it does that gunicorn's own gevent worker does not, each seen to matter (see test_resilience.py):
a bound of its own for each phase of a connection (idle, head, content, sending), errors as JSON and
without a word of the request in them or in the log, one `send` a response instead of two, idle
connections closed when the worker stops, and a closing that does not destroy the answer just sent.
"""

import io
import mmap
import os
import signal
import socket
import sys
from functools import lru_cache
from http import HTTPStatus
from time import time
from typing import Any

import gevent
from gevent.server import StreamServer
from gunicorn import util
from gunicorn.http import RequestParser, errors, wsgi
from gunicorn.http.message import Request
from gunicorn.http.wsgi import Response, create
from gunicorn.workers import ggevent


def seconds(name: str, default: float) -> float:
    """Read a time from the environment; exit with a one-line error where it is none."""
    text = os.environ.get(name) or str(default)
    try:
        if 0 < (value := float(text)) < float("inf"):
            return value
    except ValueError:
        pass
    sys.exit(f"{name}={text!r} is no number of seconds; the default is {default}")


KEEPALIVE_TIMEOUT = seconds("KEEPALIVE_TIMEOUT", 75)
HEAD_TIMEOUT = seconds("HEAD_TIMEOUT", 10)
CONTENT_TIMEOUT = seconds("CONTENT_TIMEOUT", 10)
SEND_TIMEOUT = seconds("SEND_TIMEOUT", 10)

MAX_CONTENT_BYTES = 65536  # read, so that the connection can go on; hello refuses far less
SHARE_SECONDS = 0.001  # how long a worker with more connections than another leaves the next one to it
DRAIN_SECONDS = 1  # how long a connection that is being closed may still talk
REFUSALS: dict[type[Exception], tuple[HTTPStatus, str]] = {
    errors.LimitRequestLine: (HTTPStatus.REQUEST_URI_TOO_LONG, "The request line must be shorter."),
    errors.LimitRequestHeaders: (HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "Send fewer and shorter headers."),
    errors.ExpectationFailed: (HTTPStatus.EXPECTATION_FAILED, "Expect must be 100-continue."),
    gevent.Timeout: (HTTPStatus.REQUEST_TIMEOUT, "The request must arrive sooner."),
}
MALFORMED = (HTTPStatus.BAD_REQUEST, "The request must be well-formed HTTP/1.1, with one Host and one length.")


http_date = lru_cache(maxsize=1)(util.http_date)  # the same for a second, and dear to make


class OneSend(Response):
    """A response whose head waits for its content."""

    def whole(self, content: bytes) -> bytes:
        """Return the response's bytes: status line, headers and content."""
        connection = "close" if self.should_close() else "keep-alive"
        head = f"HTTP/1.1 {self.status}\r\nServer: gunicorn\r\nDate: {http_date(int(time()))}\r\n"
        lines = [f"{name}: {value}\r\n" for name, value in self.headers]
        return "".join([head, f"Connection: {connection}\r\n", *lines, "\r\n"]).encode("latin-1") + content


# How many connections each worker holds, at its number; ABSENT where none is. Made by the master, so shared by all.
HELD = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("i")[:64]
ABSENT = 2**31 - 1
for place in range(len(HELD)):
    HELD[place] = ABSENT


class Server(StreamServer):
    """A server that shares arrivals out, and that, when it closes, first takes in those whom the kernel has let in.

    A worker that happens to run would take a whole burst of arrivals, and the other cores stay idle. So one that
    holds more than another waits a moment, once, before it takes the next. To close would reset those not taken in.
    """

    number = 0
    has_waited = False

    def do_read(self) -> Any:
        self.has_waited = not self.has_waited and HELD[self.number] > min(HELD)
        if not self.has_waited:
            return super().do_read()
        self.stop_accepting()
        gevent.spawn_later(SHARE_SECONDS, self.accept_again)
        return None

    def accept_again(self) -> None:
        if self.started:
            self.start_accepting()

    def close(self) -> None:
        HELD[self.number] = ABSENT
        while self.started and not self.full() and (arrival := super().do_read()):
            self.do_handle(*arrival)
        super().close()


ggevent.StreamServer = Server  # which gunicorn's worker makes one of for each listening socket


class Worker(ggevent.GeventWorker):
    """Serve keep-alive connections, one greenlet each."""

    def init_process(self) -> None:
        """Start the worker; a SIGTERM that comes before it has its handlers waits until it has."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        self.idle: set[Any] = set()
        base = wsgi.base_environ(self.cfg)  # which gunicorn would make anew, with a look for loggers, for each request
        wsgi.base_environ = lambda cfg: base.copy()
        Server.number = self.number % len(HELD)
        HELD[Server.number] = 0
        super().init_process()

    def init_signals(self) -> None:
        super().init_signals()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Stop gracefully: answers say `Connection: close`, then connections with nothing to say are closed."""
        super().handle_exit(sig, frame)
        gevent.spawn_later(DRAIN_SECONDS, self.close_idle)

    def close_idle(self) -> None:
        while self.idle:
            self.idle.pop().shutdown(socket.SHUT_RD)

    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        """Serve one connection until either side has had enough."""
        if self.alive:
            HELD[Server.number] += 1
        try:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.converse(client.getsockname(), client, addr)
            self.close_gently(client)
        except (OSError, errors.NoMoreData):
            pass  # the client went away
        finally:
            client.close()
            if self.alive:
                HELD[Server.number] -= 1

    def converse(self, name: Any, client: Any, addr: Any) -> None:
        """Read requests and answer them, one after the other."""
        # Without its address: gunicorn would look in each request whether the client is a proxy it may trust. None is,
        # for gunicorn.conf.py lets no header set anything.
        parser = RequestParser(self.cfg, client, None)
        try:
            while data := parser.unreader.take_buffered() or self.wait_idle(client):
                parser.unreader.unread(data)
                with gevent.Timeout(HEAD_TIMEOUT):
                    request = next(parser)
                if not self.answer(request, client, addr, name):
                    return
        except StopIteration:
            pass
        except (errors.ParseException, gevent.Timeout, UnicodeError) as error:
            self.refuse(client, *REFUSALS.get(type(error), MALFORMED))

    def wait_idle(self, client: Any) -> bytes:
        """Return the first bytes of the next request, none where none come."""
        if self.alive:
            self.idle.add(client)
        try:
            with gevent.Timeout(KEEPALIVE_TIMEOUT if self.alive else DRAIN_SECONDS, False):
                return client.recv(8192)
        finally:
            self.idle.discard(client)
        return b""

    def answer(self, request: Request, client: Any, addr: Any, name: Any) -> bool:
        """Answer a request; return whether the connection can go on."""
        if request.version >= (1, 1) and not any(name == "HOST" for name, _ in request.headers):
            raise errors.InvalidHeader("Host")
        has_content = any(name in {"CONTENT-LENGTH", "TRANSFER-ENCODING"} for name, _ in request.headers)
        with gevent.Timeout(CONTENT_TIMEOUT if has_content else None):  # a timer has a price
            response, environ = create(request, client, addr, name, self.cfg, response_class=OneSend)
            received = request.body.read(MAX_CONTENT_BYTES + 1)
        environ["wsgi.multithread"] = True
        environ["wsgi.input"] = io.BytesIO(received)
        content = b"".join(self.wsgi(environ, response.start_response))
        if len(received) > MAX_CONTENT_BYTES or not self.alive:  # asked last: a stop may have come meanwhile
            response.force_close()
        self.send(client, response.whole(content))
        return not response.should_close()

    def send(self, client: Any, data: bytes) -> None:
        """Send all of it; raise TimeoutError where the client does not read."""
        client.settimeout(SEND_TIMEOUT)
        if (sent := client.send(data)) < len(data):  # seldom: sendall() asks the kernel more than that
            client.sendall(data[sent:])
        client.settimeout(None)

    def refuse(self, client: Any, status: HTTPStatus, message: str) -> None:
        """Answer what is no request."""
        content = b'{"message": "%s"}' % message.encode()
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\nConnection: close\r\nCache-Control: no-store\r\n"
            "X-Content-Type-Options: nosniff\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n"
        )
        self.send(client, head.encode() + content)

    def close_gently(self, client: Any) -> None:
        """Let the client read what was sent: to close with its bytes unread would reset the connection."""
        client.shutdown(socket.SHUT_WR)
        with gevent.Timeout(DRAIN_SECONDS, False):
            while client.recv(65536):
                pass
