"""Turn the bytes of one connection into WSGI environs (PEP 3333), with httptools, which is llhttp, Node.js' parser.

What llhttp lets through is checked here where RFC 9110 and 9112 demand an error: the protocol and its version, the
number and form of Host, the authority of an absolute target, unknown transfer codings. These deviations remain:
- A target may hold characters that a URI may not, such as `"`, `<` or `#`. They reach the application as they are.
- Versions 1.2 to 1.9 are answered with 505; they should be read as 1.1.
- White space between the size of a chunk and its extension is an error.
- A Transfer-Encoding that ends with an empty list element (`chunked,`) is an error.
- Field values may hold bytes from 0x80 to 0xff, which become latin-1 text.
"""

import io
import re
from collections import deque
from functools import lru_cache
from http import HTTPMethod, HTTPStatus
from urllib.parse import unquote_to_bytes
from wsgiref.types import WSGIEnvironment

from httptools import HttpParserCallbackError, HttpParserError, HttpRequestParser

MAX_TARGET_BYTES = 8190  # a username of 2,500 bytes, percent-encoded, has 7,500
MAX_HEADERS, MAX_HEADER_BYTES = 64, 4096
MAX_HEAD_BYTES = 32768
MAX_EXPECTED_BYTES = 4096  # hello.MAX_CONTENT_BYTES: a request with `Expect: 100-continue` gets its 413 at once
MAX_READ_BYTES = 65536  # content up to this size is read whole, which keeps the connection open after a 413
MAX_REQUEST_BYTES = 163840  # head, content, chunk framing and trailers

METHODS = {method.encode(): method.value for method in HTTPMethod if method is not HTTPMethod.CONNECT}
METHODS[b"QUERY"] = "QUERY"  # which later Pythons have
PROTOCOLS = {b"HTTP/1.1": "HTTP/1.1", b"HTTP/1.0": "HTTP/1.0"}
METHOD = re.compile(rb"[\r\n]*([!#-'*+.0-9A-Z^-z|~-]+)(?: |\Z)")
START = re.compile(rb"[\r\n]*[^ \r\n]+ +([^ \r\n]*)")  # up to the target, or what has arrived of it
REQUEST_LINE = re.compile(rb"[\r\n]*([!#-'*+.0-9A-Z^-z|~-]+) +([^ \r\n]+) +(HTTP/[0-9]\.[0-9])\r\n")
HOST_AND_PORT = r"(?:\[[0-9A-Fa-f:.]+\]|(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*)(?::[0-9]*)?"
ABSOLUTE_TARGET = re.compile(rf"https?://(?=[^:/?])({HOST_AND_PORT})((?:[/?].*)?)", re.IGNORECASE)
UPGRADE_OR_TRAILING_SPACE = re.compile(rb"\r\nUpgrade:[^\r]*|[ \t]+(?=\r\n)", re.IGNORECASE)


class ProtocolError(Exception):
    """The client broke the protocol; the status and the message are those of the response."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class StopReading(Exception):
    """Raised in a callback after the last request of a connection."""


class ReparseHead(Exception):
    """Raised in a callback for a head that must be parsed again without what llhttp misreads."""


def bad_request(message: str) -> ProtocolError:
    """Return an error with status 400."""
    return ProtocolError(HTTPStatus.BAD_REQUEST, message)


def bad_content() -> ProtocolError:
    """Return the error of content that ends too early, or whose chunks are not well-formed."""
    return bad_request("The content must be complete and well-formed.")


def unknown_method() -> ProtocolError:
    """Return the error of a method that HTTP does not define, or that no origin server needs."""
    return ProtocolError(HTTPStatus.NOT_IMPLEMENTED, "The method must be one that HTTP defines, and not CONNECT.")


def long_target() -> ProtocolError:
    """Return the error of a target that is too long."""
    return ProtocolError(HTTPStatus.REQUEST_URI_TOO_LONG, f"The target must be at most {MAX_TARGET_BYTES} bytes long.")


def long_head() -> ProtocolError:
    """Return the error of too many headers, or too long ones."""
    return ProtocolError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "Send fewer and shorter headers.")


@lru_cache(maxsize=256)
def environ_key(name: bytes) -> str:
    """Return the environ key of a header; empty if the name has an underscore, which would pass for a hyphen."""
    key = name.decode("latin-1").upper().replace("-", "_")
    if b"_" in name:
        return ""
    return key if key in {"CONTENT_TYPE", "CONTENT_LENGTH"} else f"HTTP_{key}"


@lru_cache(maxsize=256)
def is_host(text: str) -> bool:
    """Return whether a Host header is well-formed (RFC 9110, section 7.2)."""
    return re.fullmatch(HOST_AND_PORT, text) is not None


def list_elements(text: str) -> list[str]:
    """Return the elements of a header that is a list, in lower case; empty ones do not count."""
    return [element for part in text.split(",") if (element := part.strip(" \t").lower())]


def split_target(target: str, environ: WSGIEnvironment) -> tuple[str, str]:
    """Return the path, its percent-encoded bytes as latin-1 (PEP 3333), and the query (RFC 9112, section 3.2)."""
    if not target.startswith("/") and not (target == "*" and environ["REQUEST_METHOD"] == "OPTIONS"):
        absolute = ABSOLUTE_TARGET.fullmatch(target)
        if absolute is None:
            raise bad_request("The target must be a path, or a URL with a host.")
        environ["HTTP_HOST"], target = absolute.groups()
        target = target if target.startswith("/") else f"/{target}"
    path, _, query = target.partition("?")
    return unquote_to_bytes(path).decode("latin-1") if "%" in path else path, query


def check_codings(text: str) -> None:
    """Raise ProtocolError unless a Transfer-Encoding is `chunked` (RFC 9112, sections 6.1 and 6.3)."""
    codings = list_elements(text)
    if codings[-1:] != ["chunked"]:
        raise bad_request("Transfer-Encoding must be chunked.")
    if len(codings) > 1:
        raise ProtocolError(HTTPStatus.NOT_IMPLEMENTED, "Transfer-Encoding must be chunked.")


class RequestParser:
    """Parse what the client of one connection sends; the `on_...` methods are httptools' callbacks.

    Args:
        common: what the environs of the connection have in common.
    """

    def __init__(self, common: WSGIEnvironment) -> None:
        self.common = common
        self.parser = HttpRequestParser(self)
        self.complete: deque[tuple[WSGIEnvironment, bool]] = deque()  # (environ, is_last)
        self.error: ProtocolError | None = None  # in the bytes after the complete requests
        self.is_closed = False  # after an error or the last request; further bytes are ignored
        self.expect_request()

    def expect_request(self) -> None:
        """Reset the state of the request in progress."""
        self.in_progress = False
        self.waiting_since: float | None = None  # set by the worker: start of its wait for the head or the content
        self.received = 0  # bytes
        self.tail = b""  # the last three bytes
        self.head = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.environ: WSGIEnvironment | None = None  # None until the head is complete
        self.content = bytearray()
        self.content_left = 0  # bytes, if there is a Content-Length
        self.awaits_continue = False

    def feed(self, data: bytes) -> None:
        """Parse bytes; append complete requests to `complete`, and set `error` at the first error."""
        while data and not self.is_closed:
            part = data[: self.part_end(data)]
            data = data[len(part) :]
            self.in_progress = True
            if self.environ is None:
                self.head += part
            try:
                self.parser.feed_data(part)
            except HttpParserCallbackError as error:
                self.handle_callback_error(error)
            except HttpParserError:
                self.fail(self.diagnose())
            if self.in_progress and not self.is_closed:
                self.expect_rest(part)

    def part_end(self, data: bytes) -> int | None:
        """Return where the request may end, so that no part has bytes of two requests; None for the end of the data."""
        if self.content_left:
            return self.content_left
        found = (self.tail + data).find(b"\r\n\r\n")
        return None if found < 0 else found + 4 - len(self.tail)

    def expect_rest(self, part: bytes) -> None:
        """Check the limits of a request that is not complete."""
        self.tail = (self.tail + part)[-3:]
        self.received += len(part)
        if self.received > MAX_REQUEST_BYTES:
            self.fail(bad_content())
        elif self.environ is None and len(self.head) > MAX_TARGET_BYTES:
            start = START.match(self.head)
            if start and len(start[1]) > MAX_TARGET_BYTES:
                self.fail(long_target())
            elif len(self.head) > MAX_HEAD_BYTES:
                self.fail(long_head())

    def handle_callback_error(self, error: HttpParserCallbackError) -> None:
        """Handle an exception that a callback raised."""
        cause = error.__context__
        if isinstance(cause, ProtocolError):
            self.fail(cause.with_traceback(None))  # the traceback would keep the request in memory
        elif isinstance(cause, ReparseHead):
            head = UPGRADE_OR_TRAILING_SPACE.sub(b"", self.head)
            self.parser = HttpRequestParser(self)
            self.expect_request()
            self.feed(head)
        elif not isinstance(cause, StopReading):
            raise error

    def fail(self, error: ProtocolError) -> None:
        self.error = error
        self.is_closed = True

    def diagnose(self) -> ProtocolError:
        """Return the error of a request that llhttp rejected."""
        if self.environ is not None:
            return bad_content()
        try:
            self.check_request_line()
        except ProtocolError as error:
            return error.with_traceback(None)
        return bad_request("The request must be well-formed HTTP/1.1.")

    @property
    def method(self) -> str:
        """The method of the request in progress; empty before it is known."""
        found = METHOD.match(self.head)
        return found[1].decode() if found else ""

    def check_request_line(self) -> tuple[str, str, str]:
        """Return method, target and protocol."""
        line = REQUEST_LINE.match(self.head)
        if line is None:
            start = METHOD.match(self.head)
            if start and start[1] not in METHODS:
                raise unknown_method()
            raise bad_request("The request line must be a method, a target and HTTP/1.1.")
        method, target, protocol = line.groups()
        if len(target) > MAX_TARGET_BYTES:
            raise long_target()
        if protocol not in PROTOCOLS:
            raise ProtocolError(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "The version must be HTTP/1.1.")
        if method not in METHODS:
            raise unknown_method()
        return METHODS[method], target.decode("latin-1"), PROTOCOLS[protocol]

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name, value))
        if len(self.headers) > MAX_HEADERS or len(name) + len(value) > MAX_HEADER_BYTES:
            raise long_head()

    def on_headers_complete(self) -> None:
        method, target, protocol = self.check_request_line()
        if len(self.head) > MAX_HEAD_BYTES:
            raise long_head()
        environ = self.common.copy()
        environ["REQUEST_METHOD"] = method
        environ["SERVER_PROTOCOL"] = protocol
        self.add_headers(environ)
        environ["PATH_INFO"], environ["QUERY_STRING"] = split_target(target, environ)
        if "HTTP_TRANSFER_ENCODING" in environ or "HTTP_UPGRADE" in environ:
            self.check_coding(environ)
        elif "CONTENT_LENGTH" in environ:
            self.content_left = int(environ["CONTENT_LENGTH"])
        self.environ, self.waiting_since = environ, None
        if "HTTP_EXPECT" in environ and protocol == "HTTP/1.1":
            self.check_expectation(environ["HTTP_EXPECT"])

    def add_headers(self, environ: WSGIEnvironment) -> None:
        """Put the headers into an environ, equal ones joined by commas, and check Host (RFC 9112, section 3.2)."""
        hosts = 0
        for name, value in self.headers:
            key, text = environ_key(name), value.strip(b" \t").decode("latin-1")
            hosts += key == "HTTP_HOST"
            if key:
                environ[key] = f"{environ[key]},{text}" if key in environ else text
        if hosts != 1 and (hosts or environ["SERVER_PROTOCOL"] == "HTTP/1.1"):
            raise bad_request("There must be one Host.")
        if hosts and not is_host(environ["HTTP_HOST"]):
            raise bad_request("Host must be a host name or an address, with at most a port after it.")

    def check_coding(self, environ: WSGIEnvironment) -> None:
        """Check Transfer-Encoding; ignore Upgrade, as a server may (RFC 9110, section 7.8) and httptools cannot."""
        if "HTTP_TRANSFER_ENCODING" in environ:
            if environ["SERVER_PROTOCOL"] == "HTTP/1.0":  # a proxy that forwards a coding may not know it
                raise bad_request("Transfer-Encoding needs HTTP/1.1.")
            check_codings(environ["HTTP_TRANSFER_ENCODING"])
        if UPGRADE_OR_TRAILING_SPACE.search(self.head):
            raise ReparseHead

    def check_expectation(self, text: str) -> None:
        """Check Expect (RFC 9110, section 10.1.1), and refuse content that the application would refuse later."""
        expectations = list_elements(text)
        if any(expectation != "100-continue" for expectation in expectations):
            raise ProtocolError(HTTPStatus.EXPECTATION_FAILED, "Expect must be 100-continue.")
        self.awaits_continue = bool(expectations)
        if self.awaits_continue and self.content_left > MAX_EXPECTED_BYTES:
            message = f"The content must be at most {MAX_EXPECTED_BYTES} bytes long."
            raise ProtocolError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message)

    def on_body(self, part: bytes) -> None:
        self.content += part
        if self.content_left:
            self.content_left -= len(part)
        if len(self.content) > MAX_READ_BYTES:
            self.finish(is_last=True)
            raise StopReading

    def on_message_complete(self) -> None:
        self.finish(is_last=not self.parser.should_keep_alive())

    def finish(self, *, is_last: bool) -> None:
        """Append the request to `complete`."""
        assert self.environ is not None
        self.environ["wsgi.input"] = io.BytesIO(self.content)
        self.complete.append((self.environ, is_last))
        self.is_closed = is_last
        self.expect_request()

    def close(self) -> None:
        """Break the reference cycle with httptools' parser, which would keep the last request in memory for a while."""
        del self.parser
