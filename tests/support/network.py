"""Free ports, raw HTTP, and ports and proxies that misbehave."""

import contextlib
import email
import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from email.message import Message

LOOPBACK = "127.0.0.1"
RESET_ON_CLOSE = b"\x01\x00\x00\x00\x00\x00\x00\x00"  # of SO_LINGER: close() sends RST

_reserved: list[socket.socket] = []


def free_port() -> int:
    """Return a port of 127.0.0.1 that no other call returns, in any process, while this process runs.

    A bound socket that does not listen keeps a port from being given out again; a server with SO_REUSEADDR can
    still listen there.
    """
    probe = socket.socket()
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    probe.bind((LOOPBACK, 0))
    port: int = probe.getsockname()[1]
    _reserved.append(probe)
    return port


# --- HTTP, byte by byte -----------------------------------------------------------------------------


@dataclass
class Response:
    """A response as it arrived; `seconds` is the time from the request to it, where that was measured."""

    status: int
    headers: Message
    content: bytes
    seconds: float = 0.0

    @property
    def message(self) -> str:
        """The message of a JSON document; empty where there is no content."""
        return str(json.loads(self.content)["message"]) if self.content else ""


def split_response(data: bytes, method: str = "GET") -> tuple[Response, bytes] | None:
    """Split the response to a request with this method off some bytes; return None where it is not complete."""
    head, end, rest = data.partition(b"\r\n\r\n")
    if not end:
        return None
    status_line, _, fields = head.partition(b"\r\n")
    match = re.fullmatch(rb"HTTP/1\.[01] ([1-5]\d\d) [ -~]*", status_line)
    assert match, f"not a response: {data[:100]!r}"
    status, headers = int(match[1]), email.message_from_bytes(fields + b"\r\n\r\n")
    is_empty = status < 200 or status in {204, 304}
    assert not (is_empty and "Content-Length" in headers), "Content-Length where no content can be"
    assert is_empty or headers["Content-Length"], "no Content-Length"
    length = 0 if is_empty or method == "HEAD" else int(headers["Content-Length"])
    if len(rest) < length:
        return None
    return Response(status, headers, rest[:length]), rest[length:]


def responses(data: bytes, methods: Sequence[str] = ()) -> list[Response]:
    """Parse all of the bytes as responses; fail where one is incomplete or has content where none may be.

    Args:
        data: what a server sent.
        methods: those of the requests, in order; what is missing counts as GET.
    """
    found: list[Response] = []
    while data:
        split = split_response(data, methods[len(found)] if len(found) < len(methods) else "GET")
        assert split, f"an incomplete response: {data[:200]!r}"
        response, data = split
        found.append(response)
    return found


def read_all(client: socket.socket) -> bytes:
    """Return all that arrives until the peer closes or resets."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while received := client.recv(65536):
            data += received
    return data


def exchange(port: int, *parts: bytes, pause: float = 0.0) -> bytes:
    """Send parts with a pause between them, then end one's own side; return all that comes back."""
    with socket.create_connection((LOOPBACK, port), timeout=20) as client:
        with contextlib.suppress(ConnectionError):
            for part in parts:
                client.sendall(part)
                time.sleep(pause)
            client.shutdown(socket.SHUT_WR)
        return read_all(client)


class Connection:
    """An HTTP connection that is kept alive and opened when it is needed."""

    def __init__(self, port: int, timeout: float = 20) -> None:
        self.port = port
        self.timeout = timeout
        self.sock: socket.socket | None = None

    def ask(self, method: str, path: str, content: bytes | None = None, *headers: str) -> Response:
        """Send a request and return its response.

        Raises:
            ConnectionError: refused, reset, or closed before the response was complete.
        """
        start = time.monotonic()
        length = [] if content is None else [f"Content-Length: {len(content)}"]
        lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *length, *headers, "", ""]
        if self.sock is None:
            self.sock = socket.create_connection((LOOPBACK, self.port), timeout=self.timeout)
        self.sock.sendall("\r\n".join(lines).encode() + (content or b""))
        data = b""
        while (split := split_response(data, method)) is None:
            received = self.sock.recv(65536)
            if not received:
                self.close()
                raise ConnectionResetError(f"closed after {len(data)} bytes of a response")
            data += received
        response, rest = split
        response.seconds = time.monotonic() - start
        if response.headers["Connection"] == "close":
            rest += read_all(self.sock)
            self.close()
        assert rest == b"", f"bytes after a response with status {response.status}: {rest[:100]!r}"
        return response

    def close(self) -> None:
        """Close the socket, if there is one; the next request opens another."""
        if self.sock is not None:
            self.sock.close()
            self.sock = None


def ask(port: int, method: str, path: str, content: bytes | None = None, *headers: str) -> Response:
    """Ask on a connection of its own; fail where anything follows the response, such as content after a 204."""
    with contextlib.closing(Connection(port)) as connection:
        response = connection.ask(method, path, content, *headers)
        if connection.sock is not None:
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_WR)
            rest = read_all(connection.sock)
            assert rest == b"", f"bytes after a response with status {response.status}: {rest[:100]!r}"
    return response


# --- Ports and proxies that misbehave ---------------------------------------------------------------


@contextlib.contextmanager
def silent_port(*, drops: bool = False) -> Iterator[int]:
    """Yield a port that accepts connections and sends nothing, or that drops every packet."""
    with (
        socket.create_server((LOOPBACK, 0), backlog=0 if drops else 100) as listener,
        contextlib.ExitStack() as stack,
    ):
        address = listener.getsockname()
        while drops:  # with a full backlog the kernel answers no further SYN
            probe = stack.enter_context(socket.socket())
            probe.settimeout(0.3)
            try:
                probe.connect(address)
            except TimeoutError:
                break
        yield address[1]


def pump(source: socket.socket, sink: socket.socket) -> None:
    """Pass on what arrives until either side ends, then end both."""
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def tls_proxy(target: str, context: ssl.SSLContext) -> Iterator[int]:
    """Yield a port that speaks Postgres over TLS and passes it on to a server's Unix socket."""

    def serve(client: socket.socket) -> None:
        with contextlib.suppress(OSError), client, socket.socket(socket.AF_UNIX) as server:
            assert client.recv(8)[4:] == b"\x04\xd2\x16\x2f", "not an SSLRequest"
            client.sendall(b"S")
            with context.wrap_socket(client, server_side=True) as secured:
                server.connect(target)
                back = threading.Thread(target=pump, args=(server, secured), daemon=True)
                back.start()
                pump(secured, server)
                back.join()

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server((LOOPBACK, 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
