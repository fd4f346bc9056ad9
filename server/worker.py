"""The gunicorn worker that serves hello: httptools' parser, gevent's server, and a bound for every wait.

What it does that gunicorn's own gevent worker does not, each seen to matter (test_resilience.py, bench/README.md):
a bound of its own for each phase of a connection (idle, head, content, sending); errors as JSON, and no word of a
request in them or in the log; requests parsed by llhttp, the compiled parser of Node.js; one `send` a response;
idle connections closed when the worker stops; and a closing that does not destroy the answer just sent.
It serves applications that, like hello, return their content as a list and never call `write`. gunicorn's settings and
hooks about requests (limit_request_*, keepalive, max_requests, access log, pre_request) have no effect here.

Settings (environment variables)
    KEEPALIVE_TIMEOUT   seconds an idle connection is kept (default 75)
    HEAD_TIMEOUT        seconds a client may take to send a request's head (default 10)
    CONTENT_TIMEOUT     seconds a client may take to send a request's content (default 10)
    SEND_TIMEOUT        seconds a client may take to receive an answer (default 10)
"""

import contextlib
import io
import mmap
import os
import signal
import socket
import sys
from collections import deque
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from time import monotonic, time
from typing import Any, NamedTuple, NoReturn
from urllib.parse import unquote_to_bytes, urlsplit
from wsgiref.types import WSGIEnvironment

import gevent
from gevent.server import StreamServer
from gunicorn.workers import ggevent
from httptools import HttpParserCallbackError, HttpParserError, HttpParserUpgrade, HttpRequestParser


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

RECEIVE_BYTES = 8192
MAX_TARGET_BYTES = 8190  # a name of 2,500 bytes, percent-encoded, has 7,500
MAX_HEADERS, MAX_HEADER_BYTES = 64, 4096  # those of a browser or a proxy are far below
MAX_HEAD_BYTES = 32768  # while it is incomplete
MAX_CONTENT_BYTES = 65536  # read, so that the connection can go on; hello refuses far less
MAX_REQUEST_BYTES = 163840  # with what chunks add, and with trailers
MAX_ACCEPT = 16  # arrivals taken in at once
SHARE_SECONDS = 0.001  # how long a worker with more connections than another leaves the next one to it
DRAIN_SECONDS = 1  # how long a connection that is being closed may still talk
STOPPING = {signal.SIGTERM, signal.SIGQUIT, signal.SIGINT}
YIELD_SECONDS = 1e-6  # with 0, gevent would not look for what others have sent

# --- Requests ---------------------------------------------------------------------------------------


class Refusal(NamedTuple):
    """The answer to what is no request."""

    status: HTTPStatus
    message: str


MALFORMED = Refusal(
    HTTPStatus.BAD_REQUEST, "The request must be well-formed HTTP/1.1, with a known method, one Host and one length."
)
BAD_CONTENT = Refusal(HTTPStatus.BAD_REQUEST, "The content must arrive whole and well-formed.")
LATE = Refusal(HTTPStatus.REQUEST_TIMEOUT, "The request must arrive sooner.")
LONG_TARGET = Refusal(HTTPStatus.REQUEST_URI_TOO_LONG, "The request line must be shorter.")
LONG_HEAD = Refusal(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "Send fewer and shorter headers.")
UNEXPECTED = Refusal(HTTPStatus.EXPECTATION_FAILED, "Expect must be 100-continue.")
REFUSALS = (MALFORMED, BAD_CONTENT, LATE, LONG_TARGET, LONG_HEAD, UNEXPECTED)


class Stop(Exception):
    """Raised in a callback, for the parser to read no further."""


@lru_cache(maxsize=256)
def key_of(name: bytes) -> str:
    """Return a header's key in the environ (PEP 3333), none for one whose underscore could pass for a hyphen."""
    key = name.decode("latin-1").upper().replace("-", "_")
    return "" if b"_" in name else key if key in {"CONTENT_TYPE", "CONTENT_LENGTH"} else f"HTTP_{key}"


class Reader:
    """Makes environs (PEP 3333) of what the client of one connection sends; `on_...` are httptools' callbacks.

    Args:
        common: what all environs of the connection have in common.
    """

    def __init__(self, common: WSGIEnvironment) -> None:
        self.common = common
        self.parser = HttpRequestParser(self)
        self.whole: deque[tuple[WSGIEnvironment, bool]] = deque()  # requests, and whether each is the last
        self.refusal: Refusal | None = None  # of what follows them; nothing is read after it
        self.expect_next()

    def expect_next(self) -> None:
        self.has_begun = False
        self.phase_began: float | None = None  # when its head, then when its content was first waited for
        self.received = 0  # bytes
        self.target = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.environ: WSGIEnvironment | None = None  # where its head is complete
        self.content = bytearray()
        self.is_expectant = False  # waits for 100 Continue

    def feed(self, data: bytes) -> None:
        """Read bytes; leave the requests that are complete in `whole`."""
        self.has_begun = True
        self.received += len(data)
        try:
            self.parser.feed_data(data)
        except HttpParserUpgrade as upgrade:
            if self.environ:  # not CONNECT, which is complete, and the last one
                self.ignore_upgrade(data[upgrade.args[0] :])
        except HttpParserError as error:
            if not isinstance(error, HttpParserCallbackError):
                self.refusal = BAD_CONTENT if self.environ else MALFORMED
            elif not isinstance(error.__context__, Stop):
                raise
        if self.received > MAX_REQUEST_BYTES:
            self.refusal = BAD_CONTENT
        elif self.received > MAX_HEAD_BYTES and not self.environ:
            self.refusal = LONG_HEAD

    def ignore_upgrade(self, rest: bytes) -> None:
        """Read a request again without its Upgrade: a server may ignore it (RFC 9110, section 7.8), httptools may not."""
        line = b"%b %b %b" % (
            self.environ["REQUEST_METHOD"].encode(),
            self.target,
            self.environ["SERVER_PROTOCOL"].encode(),
        )
        headers = [b"%b: %b" % (name, value) for name, value in self.headers if name.lower() != b"upgrade"]
        self.parser = HttpRequestParser(self)
        self.expect_next()
        self.feed(b"\r\n".join([line, *headers, b"", rest]))

    def seconds_left(self) -> float:
        """Return how long the client may take for what it has begun; the first call for a phase begins it."""
        now = monotonic()
        if self.phase_began is None:
            self.phase_began = now
        return self.phase_began + (CONTENT_TIMEOUT if self.environ else HEAD_TIMEOUT) - now

    def on_message_begin(self) -> None:
        self.has_begun = True

    def on_url(self, part: bytes) -> None:
        self.target += part
        if len(self.target) > MAX_TARGET_BYTES:
            self.refuse(LONG_TARGET)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name, value))
        if len(self.headers) > MAX_HEADERS or len(name) + len(value) > MAX_HEADER_BYTES:
            self.refuse(LONG_HEAD)

    def on_headers_complete(self) -> None:
        environ = self.common.copy()
        hosts = 0
        for name, value in self.headers:
            key, text = key_of(name), value.strip(b" \t").decode("latin-1")
            hosts += key == "HTTP_HOST"
            if key:
                environ[key] = f"{environ[key]},{text}" if key in environ else text
        version = self.parser.get_http_version()
        environ["REQUEST_METHOD"] = self.parser.get_method().decode()
        environ["SERVER_PROTOCOL"] = f"HTTP/{version}"
        environ["PATH_INFO"], environ["QUERY_STRING"] = self.split_target()
        if version == "1.1":
            if hosts != 1:
                self.refuse(MALFORMED)
            self.is_expectant = self.expects_100_continue(environ.get("HTTP_EXPECT"))
        elif version != "1.0" or "HTTP_TRANSFER_ENCODING" in environ:
            # RFC 9112, section 6.1: version 1.0 has no codings, and who forwards one may not know where content ends.
            self.refuse(MALFORMED)
        self.environ, self.phase_began = environ, None

    def expects_100_continue(self, expectation: str | None) -> bool:
        if expectation and expectation.lower() != "100-continue":
            self.refuse(UNEXPECTED)
        return expectation is not None

    def split_target(self) -> tuple[str, str]:
        """Return the path, its percent-encoded bytes as latin-1 (PEP 3333), and the query."""
        target = self.target.decode("ascii")
        if not target.startswith("/"):  # a whole URL, or "*" (RFC 9112, section 3.2)
            try:
                target = urlsplit(target)._replace(scheme="", netloc="").geturl()
            except ValueError:
                self.refuse(MALFORMED)
        path, _, query = target.partition("?")
        return unquote_to_bytes(path).decode("latin-1") if "%" in path else path, query

    def on_body(self, part: bytes) -> None:
        self.content += part
        if len(self.content) > MAX_CONTENT_BYTES:
            self.finish(is_last=True)
            raise Stop

    def on_message_complete(self) -> None:
        is_tunnel = self.environ["REQUEST_METHOD"] == "CONNECT"
        if is_tunnel or not self.parser.should_upgrade():
            self.finish(is_last=is_tunnel or not self.parser.should_keep_alive())

    def finish(self, *, is_last: bool) -> None:
        self.environ["wsgi.input"] = io.BytesIO(self.content)
        self.whole.append((self.environ, is_last))
        self.expect_next()

    def refuse(self, refusal: Refusal) -> NoReturn:
        self.refusal = refusal
        raise Stop


# --- Connections ------------------------------------------------------------------------------------

# How many connections each worker holds, at its number (gunicorn.conf.py's pre_fork); ABSENT where none is. Made by the master, so shared by all.
HELD = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("i")[:64]
ABSENT = 2**31 - 1
close = os.close  # the system's own: gevent will put another in its place
for place in range(len(HELD)):
    HELD[place] = ABSENT


class Server(StreamServer):
    """A server that shares arrivals out, and that, when it closes, first takes in those whom the kernel has let in.

    A worker that happens to run would take a whole burst of arrivals, and the other cores stay idle. So one that
    holds more than another, by an eighth where they are many, waits a moment, once, before it takes the next.
    To close would reset those not taken in.
    """

    number = 0
    has_waited = False

    def start(self) -> None:
        self.max_accept = MAX_ACCEPT  # in a round of the loop, which takes long where many have something to say
        super().start()

    def do_read(self) -> Any:
        least = min(HELD)
        self.has_waited = not self.has_waited and HELD[self.number] > least + least // 8
        if not self.has_waited:
            if arrival := super().do_read():
                HELD[self.number] += 1
            return arrival
        self.stop_accepting()
        gevent.spawn_later(SHARE_SECONDS, self.accept_again)
        return None

    def accept_again(self) -> None:
        if self.started:
            self.start_accepting()

    def close(self) -> None:
        HELD[self.number] = ABSENT
        if self.started:
            self.stop_accepting()
            with contextlib.suppress(OSError):  # no file is left to take one in with
                while not self.full() and (arrival := super().do_read()):
                    self.do_handle(*arrival)
            close(self.socket.detach())  # at once: gevent's close waits a round of its loop, and more arrive meanwhile
        super().close()


ggevent.StreamServer = Server  # which gunicorn's worker makes one of for each listening socket


@lru_cache(maxsize=1)  # the same for a second, and dear to make
def http_date(second: int) -> str:
    return formatdate(second, usegmt=True)


class Worker(ggevent.GeventWorker):
    """Serve keep-alive connections, one greenlet each."""

    def init_process(self) -> None:
        """Start the worker; a signal to stop that comes before it has its handlers waits until it has."""
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        self.idle: set[Any] = set()
        Server.number = self.number % len(HELD)
        HELD[Server.number] = 0
        super().init_process()

    def init_signals(self) -> None:
        super().init_signals()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Stop gracefully: answers say `Connection: close`, then connections with nothing to say are closed."""
        super().handle_exit(sig, frame)
        gevent.spawn_later(DRAIN_SECONDS, self.close_idle)

    def close_idle(self) -> None:
        while self.idle:
            with contextlib.suppress(OSError):  # it went away by itself
                self.idle.pop().shutdown(socket.SHUT_RD)

    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        """Serve one connection until either side has had enough."""
        try:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            reader = Reader(self.common_environ(client.getsockname()))
            try:
                self.converse(client, reader)
            finally:
                reader.parser = None  # and with it the cycle that would keep the last request until it is collected
            self.close_gently(client)
        except OSError:
            pass  # the client went away
        finally:
            client.close()
            if self.alive:
                HELD[Server.number] -= 1

    def common_environ(self, server: tuple[str, int]) -> WSGIEnvironment:
        """Return what all requests to one of the server's addresses have in common (PEP 3333)."""
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

    def converse(self, client: Any, reader: Reader) -> None:
        """Read requests and answer them, one after the other."""
        while not reader.refusal and (data := self.receive(client, reader)):
            reader.feed(data)
            is_busy = len(reader.whole) > 1 or len(data) == RECEIVE_BYTES
            while reader.whole:
                environ, is_last = reader.whole.popleft()
                if not self.answer(client, environ, is_last=is_last):
                    return
            if is_busy:  # neither receiving nor sending may ever have to wait, and then nobody else would run
                gevent.sleep(YIELD_SECONDS)
            if reader.is_expectant and not reader.refusal:
                reader.is_expectant = False
                self.send(client, b"HTTP/1.1 100 Continue\r\n\r\n")
        if refusal := reader.refusal or (BAD_CONTENT if reader.environ else None):
            self.refuse(client, refusal)

    def receive(self, client: Any, reader: Reader) -> bytes:
        """Return what the client sends next; nothing where that is the end, or comes too late."""
        if not reader.has_begun:
            return self.wait_idle(client)
        try:
            if (seconds_left := reader.seconds_left()) > 0:
                client.settimeout(seconds_left)
                return client.recv(RECEIVE_BYTES)
        except TimeoutError:
            pass
        reader.refusal = LATE if reader.target else None  # a blank line is no request yet
        return b""

    def wait_idle(self, client: Any) -> bytes:
        """Return the first bytes of the next request, none where none come."""
        if self.alive:
            self.idle.add(client)
        try:
            client.settimeout(KEEPALIVE_TIMEOUT if self.alive else DRAIN_SECONDS)
            return client.recv(RECEIVE_BYTES)
        except TimeoutError:
            return b""
        finally:
            self.idle.discard(client)

    def answer(self, client: Any, environ: WSGIEnvironment, *, is_last: bool) -> bool:
        """Answer a request; return whether the connection can go on."""
        response: list[Any] = []
        content = b"".join(self.wsgi(environ, lambda *status_and_headers: response.extend(status_and_headers)))
        is_last = is_last or not self.alive  # asked last: a stop may have come meanwhile
        self.respond(client, response[0], response[1], content, is_last=is_last)
        return not is_last

    def observe_refusal(self, status: int) -> None:
        """Do nothing: where telemetry is on, it puts itself here to learn of each refusal."""

    def refuse(self, client: Any, refusal: Refusal) -> None:
        """Answer what is no request."""
        self.observe_refusal(refusal.status.value)
        content = b'{"message": "%b"}' % refusal.message.encode()
        headers = [
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(content))),
        ]
        self.respond(client, f"{refusal.status.value} {refusal.status.phrase}", headers, content, is_last=True)

    def respond(
        self, client: Any, status: str, headers: list[tuple[str, str]], content: bytes, *, is_last: bool
    ) -> None:
        """Send a response, head and content at once."""
        connection = "close" if is_last else "keep-alive"
        lines = [f"HTTP/1.1 {status}\r\nDate: {http_date(int(time()))}\r\nConnection: {connection}\r\n"]
        lines += [f"{name}: {value}\r\n" for name, value in headers]
        self.send(client, "".join([*lines, "\r\n"]).encode("latin-1") + content)

    def send(self, client: Any, data: bytes) -> None:
        """Send all of it; raise TimeoutError where the client does not read."""
        client.settimeout(SEND_TIMEOUT)
        if (sent := client.send(data)) < len(data):  # seldom: sendall() asks the kernel more than that
            client.sendall(data[sent:])

    def close_gently(self, client: Any) -> None:
        """Let the client read what was sent: to close with its bytes unread would reset the connection."""
        client.shutdown(socket.SHUT_WR)
        with gevent.Timeout(DRAIN_SECONDS, False):
            while client.recv(65536):
                pass
