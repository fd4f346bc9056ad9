"""Turn the bytes of a client into WSGI environs (PEP 3333), one request at a time.

httptools, which is llhttp, the parser of Node.js, reads the head and the framing of chunked content. What llhttp lets
through is checked here where RFC 9110 and 9112 demand an error. docs/configuration.md lists the deviations.
"""

import io
import re
from functools import lru_cache
from http import HTTPMethod, HTTPStatus
from urllib.parse import unquote_to_bytes
from wsgiref.types import WSGIEnvironment

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser

MAX_TARGET_BYTES = 8190  # a username of 2,500 bytes, percent-encoded, has 7,500
MAX_HEADERS, MAX_HEADER_BYTES = 64, 16384
MAX_HEAD_BYTES = 32768
MAX_CONTENT_BYTES = 4096  # hello.MAX_CONTENT_BYTES
MAX_READ_BYTES = 65536  # content up to this size is read to its end, which keeps the connection open after a 413
MAX_LENGTH_DIGITS = 18  # of a Content-Length, as in hello.py; int() refuses more than 4,300
MAX_REQUEST_BYTES = 163840  # head, content, chunk framing and trailers

METHODS = {method.encode(): method.value for method in HTTPMethod if method is not HTTPMethod.CONNECT}
METHODS[b"QUERY"] = "QUERY"  # which later Pythons have
PROTOCOLS = {b"HTTP/1.1": "HTTP/1.1", b"HTTP/1.0": "HTTP/1.0"}
BLANK_LINE = b"\r\n\r\n"  # with the end of the line before it
CHUNKED_HEAD = b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
# No pattern may take longer than linear time.
METHOD = re.compile(rb"([!#-'*+.0-9A-Z^-z|~-]+)( |\Z)")
REQUEST_LINE = re.compile(rb"([!#-'*+.0-9A-Z^-z|~-]+) +([^ \r\n]+) +(HTTP/[0-9]\.[0-9])")
HOST_AND_PORT = r"(?:\[[0-9A-Fa-f:.]+\]|(?:[A-Za-z0-9._~!$&'()*+,;=-]++|%[0-9A-Fa-f]{2})*+)(?::[0-9]*)?"
HOST = re.compile(HOST_AND_PORT)  # RFC 9110, section 7.2
match_host = lru_cache(maxsize=64)(HOST.fullmatch)  # 2 MB with the longest texts
ABSOLUTE_TARGET = re.compile(rf"https?://(?=[^:/?])({HOST_AND_PORT})((?:[/?].*)?)", re.IGNORECASE)

BAD_REQUEST_LINE = (HTTPStatus.BAD_REQUEST, "The request line must be a method, a target and HTTP/1.1.")
BAD_TARGET = (HTTPStatus.BAD_REQUEST, "The target must be a path, or a URL with a host.")
BAD_HEAD = (HTTPStatus.BAD_REQUEST, "The request must be well-formed HTTP/1.1.")
BAD_HOST = (HTTPStatus.BAD_REQUEST, "Host must be a host name or an address, with at most a port after it.")
NOT_ONE_HOST = (HTTPStatus.BAD_REQUEST, "There must be one Host.")
CODING_IN_HTTP_1_0 = (HTTPStatus.BAD_REQUEST, "Transfer-Encoding needs HTTP/1.1.")
BAD_CODING = (HTTPStatus.BAD_REQUEST, "Transfer-Encoding must be chunked.")
BAD_CONTENT = (HTTPStatus.BAD_REQUEST, "The content must be complete and well-formed.")
LATE = (HTTPStatus.REQUEST_TIMEOUT, "The request must arrive sooner.")
LONG_CONTENT = (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"The content must be at most {MAX_CONTENT_BYTES} bytes long.")
LONG_TARGET = (HTTPStatus.REQUEST_URI_TOO_LONG, f"The target must be at most {MAX_TARGET_BYTES} bytes long.")
BAD_EXPECTATION = (HTTPStatus.EXPECTATION_FAILED, "Expect must be 100-continue.")
LONG_HEAD = (HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "Send fewer and shorter headers.")
UNKNOWN_METHOD = (HTTPStatus.NOT_IMPLEMENTED, "The method must be one that HTTP defines, and not CONNECT.")
UNKNOWN_CODING = (HTTPStatus.NOT_IMPLEMENTED, "Transfer-Encoding must be chunked.")
BAD_VERSION = (HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "The version must be HTTP/1.1.")


class ProtocolError(Exception):
    """The client broke the protocol; the status and the message are those of the response."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


def parse_request_line(line: bytes) -> tuple[str, str, str]:
    """Return method, target and protocol (RFC 9112, section 3)."""
    found = REQUEST_LINE.fullmatch(line)
    if found is None:
        start = METHOD.match(line)
        is_unknown = start and start[2] and start[1] not in METHODS  # start[2] is the space behind the method
        raise ProtocolError(*(UNKNOWN_METHOD if is_unknown else BAD_REQUEST_LINE))
    method, target, protocol = found.groups()
    if len(target) > MAX_TARGET_BYTES:
        raise ProtocolError(*LONG_TARGET)
    if protocol not in PROTOCOLS:
        raise ProtocolError(*BAD_VERSION)
    if method not in METHODS:
        raise ProtocolError(*UNKNOWN_METHOD)
    return METHODS[method], target.decode("latin-1"), PROTOCOLS[protocol]


def check_unfinished_line(line: bytes) -> None:
    """Raise ProtocolError if a line of which more may come cannot become a request line."""
    if METHOD.match(line) is None:
        raise ProtocolError(*BAD_REQUEST_LINE)
    _, _, rest = line.partition(b" ")
    target, _, _ = rest.lstrip(b" ").partition(b" ")
    if len(target) > MAX_TARGET_BYTES:
        raise ProtocolError(*LONG_TARGET)


class Headers(list[tuple[bytes, bytes]]):
    """The names and values of headers."""

    def on_header(self, name: bytes, value: bytes) -> None:
        """Add a header (a callback of httptools)."""
        self.append((name, value))


def parse_headers(head: bytes) -> Headers:
    """Return the headers of a whole head."""
    headers = Headers()
    parser = HttpRequestParser(headers)
    # llhttp would refuse every coding that it does not know with one error; is_chunked tells 400 from 501.
    parser.set_dangerous_leniencies(lenient_transfer_encoding=True)
    try:
        parser.feed_data(head)
    except HttpParserUpgrade:
        pass  # a server may ignore it (RFC 9110, section 7.8)
    except HttpParserError:
        raise ProtocolError(*BAD_HEAD) from None
    longest = 0
    if len(head) > MAX_HEADER_BYTES:  # no header of a shorter head is too long
        longest = max(len(name) + len(value) for name, value in headers)
    if longest > MAX_HEADER_BYTES or len(headers) > MAX_HEADERS:
        raise ProtocolError(*LONG_HEAD)
    return headers


@lru_cache(maxsize=64)  # 2 MB with the longest names
def environ_key(name: bytes) -> str:
    """Return a header's environ key; "" for Upgrade, and for a name with an underscore, which would equal a hyphen."""
    key = name.decode("latin-1").upper().replace("-", "_")
    if b"_" in name or key == "UPGRADE":
        return ""
    return key if key in {"CONTENT_TYPE", "CONTENT_LENGTH"} else f"HTTP_{key}"


def add_headers(environ: WSGIEnvironment, headers: Headers) -> None:
    """Put headers into an environ, equal ones joined by commas, and check Host (RFC 9112, section 3.2)."""
    hosts = 0
    for name, value in headers:
        key, text = environ_key(name), value.strip(b" \t").decode("latin-1")
        if key == "HTTP_HOST":
            hosts += 1
        if key:
            environ[key] = f"{environ[key]},{text}" if key in environ else text
    if hosts > 1 or (not hosts and environ["SERVER_PROTOCOL"] == "HTTP/1.1"):
        raise ProtocolError(*NOT_ONE_HOST)
    if hosts and not match_host(environ["HTTP_HOST"]):
        raise ProtocolError(*BAD_HOST)


def split_target(target: str, environ: WSGIEnvironment) -> tuple[str, str]:
    """Return path, decoded (PEP 3333), and query; a host in the target replaces Host (RFC 9112, section 3.2)."""
    if not target.startswith("/"):
        absolute = ABSOLUTE_TARGET.fullmatch(target)
        if absolute is None:
            raise ProtocolError(*BAD_TARGET)
        environ["HTTP_HOST"], target = absolute.groups()
        target = target if target.startswith("/") else f"/{target}"
    path, _, query = target.partition("?")
    return unquote_to_bytes(path).decode("latin-1") if "%" in path else path, query


def list_elements(text: str) -> list[str]:
    """Return the elements of a header that is a list, in lower case; empty ones do not count."""
    elements = [part.strip(" \t") for part in text.lower().split(",")]
    return [element for element in elements if element]


def is_last_request(environ: WSGIEnvironment) -> bool:
    """Return whether the connection ends with this request (RFC 9112, section 9.3)."""
    is_old: bool = environ["SERVER_PROTOCOL"] == "HTTP/1.0"
    if "HTTP_CONNECTION" not in environ:
        return is_old
    options = list_elements(environ["HTTP_CONNECTION"])
    return "close" in options or (is_old and "keep-alive" not in options)


def is_chunked(environ: WSGIEnvironment) -> bool:
    """Return whether the content is chunked; raise ProtocolError for another coding (RFC 9112, section 6)."""
    if "HTTP_TRANSFER_ENCODING" not in environ:
        return False
    if environ["SERVER_PROTOCOL"] == "HTTP/1.0":  # a proxy that forwards a coding may not know it
        raise ProtocolError(*CODING_IN_HTTP_1_0)
    codings = list_elements(environ["HTTP_TRANSFER_ENCODING"])
    if codings[-1:] != ["chunked"] or "chunked" in codings[:-1]:
        raise ProtocolError(*BAD_CODING)
    if len(codings) > 1:
        raise ProtocolError(*UNKNOWN_CODING)
    return True


def expects_continue(environ: WSGIEnvironment) -> bool:
    """Return whether the client waits for `100 Continue` (RFC 9110, section 10.1.1)."""
    if "HTTP_EXPECT" not in environ or environ["SERVER_PROTOCOL"] == "HTTP/1.0":
        return False
    expectations = list_elements(environ["HTTP_EXPECT"])
    if any(expectation != "100-continue" for expectation in expectations):
        raise ProtocolError(*BAD_EXPECTATION)
    if expectations and int(environ.get("CONTENT_LENGTH", 0)) > MAX_CONTENT_BYTES:  # PUT would be refused later
        raise ProtocolError(*LONG_CONTENT)
    return bool(expectations)


class Content:
    """Content as it arrives; one byte above the limit is kept, from which the application sees that it is too long."""

    def __init__(self) -> None:
        self.size = 0
        self.kept = b""
        self.is_complete = False

    def on_body(self, part: bytes) -> None:
        """Take a part (a callback of httptools)."""
        self.size += len(part)
        self.kept += part[: MAX_CONTENT_BYTES + 1 - len(self.kept)]

    def on_message_complete(self) -> None:
        """Note the end (a callback of httptools)."""
        self.is_complete = True


class FixedReader:
    """Reads content whose length is known."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.content = Content()

    def feed(self, data: bytes) -> bytes:
        """Take bytes; return those behind the content."""
        left = self.length - self.content.size
        self.content.on_body(data[:left])
        self.content.is_complete = self.content.size == self.length
        return data[left:]


class ChunkReader:
    """Reads chunked content; llhttp, which gets a head of our own before it, checks the framing and the trailers."""

    def __init__(self) -> None:
        self.content = Content()
        self.tail = b""  # the last three bytes: a blank line may have begun in them
        self.parser = HttpRequestParser(self.content)
        self.parser.feed_data(CHUNKED_HEAD)

    def feed(self, data: bytes) -> bytes:
        """Take bytes; return those behind the content.

        llhttp gets the bytes up to one blank line at a time, because it does not tell where the content ends.
        """
        while data and not self.content.is_complete:
            found = (self.tail + data).find(BLANK_LINE)
            end = len(data)
            if found >= 0:
                end = found + len(BLANK_LINE) - len(self.tail)
            part, data = data[:end], data[end:]
            self.tail = (self.tail + part)[-3:]
            try:
                self.parser.feed_data(part)
            except HttpParserError:
                raise ProtocolError(*BAD_CONTENT) from None
        return data


Reader = FixedReader | ChunkReader


class Request:
    """A request as it arrives."""

    def __init__(self, common: WSGIEnvironment) -> None:
        self.common = common  # what all environs of a connection have
        self.received = 0  # bytes
        self.head = b""  # what has arrived of it; nothing once it is in the environ
        self.environ: WSGIEnvironment = {}  # empty until the head has arrived; has `wsgi.input` once the content has
        self.reader: Reader | None = None  # while content is read
        self.is_complete = False
        self.is_last = False  # what the client sends behind it is not read
        self.awaits_continue = False  # the client sends the content after `100 Continue`

    @property
    def method(self) -> str:
        """The method; "other" for one that HTTP does not define, and before it is known."""
        if self.environ:
            return str(self.environ["REQUEST_METHOD"])
        found = METHOD.match(self.head)
        return METHODS.get(found[1], "other") if found else "other"

    def feed(self, data: bytes) -> bytes:
        """Take bytes; return those behind the request; raise ProtocolError if it is refused."""
        self.received += len(data)
        rest = data
        if not self.environ:
            rest = self.read_head(data)
        if self.reader:
            rest = self.read_content(self.reader, rest)
        self.received -= len(rest)
        return rest

    def read_head(self, data: bytes) -> bytes:
        """Take bytes of the head; return those behind it."""
        known = len(self.head)
        self.head += data if self.head else data.lstrip(b"\r\n")  # RFC 9112, section 2.2
        found = self.head.find(BLANK_LINE, max(0, known - 3))
        if found < 0:
            self.check_unfinished_head()
            return b""
        end = found + len(BLANK_LINE)
        self.parse_head(self.head[:end])
        rest = self.head[end:]
        self.head = b""
        return rest

    def check_unfinished_head(self) -> None:
        """Raise ProtocolError for what cannot become a head: its client may send no more before it has an answer."""
        line, line_end, _ = self.head.partition(b"\r\n")
        if line_end or b"\n" in line:
            parse_request_line(line)
        elif line:
            check_unfinished_line(line)
        if self.received > MAX_HEAD_BYTES:
            raise ProtocolError(*LONG_HEAD)

    def parse_head(self, head: bytes) -> None:
        """Check a whole head, and make the environ."""
        line, _, _ = head.partition(b"\r\n")
        method, target, protocol = parse_request_line(line)
        if len(head) > MAX_HEAD_BYTES:
            raise ProtocolError(*LONG_HEAD)
        environ = self.common.copy()
        environ["REQUEST_METHOD"] = method
        environ["SERVER_PROTOCOL"] = protocol
        add_headers(environ, parse_headers(head))
        if len(environ.get("CONTENT_LENGTH", "")) > MAX_LENGTH_DIGITS:
            raise ProtocolError(*BAD_HEAD)
        environ["PATH_INFO"], environ["QUERY_STRING"] = split_target(target, environ)
        self.is_last = is_last_request(environ)
        self.awaits_continue = expects_continue(environ)
        if is_chunked(environ):
            self.reader = ChunkReader()
        elif length := int(environ.get("CONTENT_LENGTH", 0)):
            self.reader = FixedReader(length)
        else:
            environ["wsgi.input"] = io.BytesIO()
            self.is_complete = True
        self.environ = environ

    def read_content(self, reader: Reader, data: bytes) -> bytes:
        """Take bytes of the content; return those behind it."""
        rest = reader.feed(data)
        content = reader.content
        if content.size > MAX_READ_BYTES:
            self.is_last = True  # the rest is never read; the application refuses what is kept
        elif not content.is_complete:
            if self.received > MAX_REQUEST_BYTES:
                raise ProtocolError(*BAD_CONTENT)
            return rest
        self.environ["wsgi.input"] = io.BytesIO(content.kept)
        self.is_complete = True
        self.reader = None
        return rest
