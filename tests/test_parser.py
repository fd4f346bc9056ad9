"""server/parser.py: from bytes to environs (PEP 3333) of complete requests, or to a protocol error."""

import gc
import inspect
import itertools
import re
import sys
import time
import weakref
from typing import Any
from wsgiref.types import WSGIEnvironment
from wsgiref.validate import check_environ  # type: ignore[attr-defined]

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hello
from server import parser
from server.parser import ProtocolError, Request
from tests.support.raw_requests import ERRORS, SECOND, UPGRADE, pieces

COMMON = {
    "SCRIPT_NAME": "",
    "SERVER_NAME": "127.0.0.1",
    "SERVER_PORT": "8080",
    "wsgi.version": (1, 0),
    "wsgi.url_scheme": "http",
    "wsgi.errors": sys.stderr,
    "wsgi.multithread": True,
    "wsgi.multiprocess": True,
    "wsgi.run_once": False,
}
GET = b"GET /hello/Zoe HTTP/1.1\r\nHost: a\r\n\r\n"
PUT = b"PUT /hello/Zoe HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc"
CHUNKED = b"PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n2;x=y\r\nbc\r\n0\r\nX: z\r\n\r\n"


class Reading:
    """What became of a connection's bytes, in parts: complete requests, one in progress, an error that ended it."""

    def __init__(self, *parts: bytes) -> None:
        self.complete: list[Request] = []
        self.request = Request(COMMON)
        self.error: ProtocolError | None = None
        for part in parts:
            self.feed(part)

    def feed(self, data: bytes) -> None:
        """Give bytes to the request in progress, and what it leaves to the next one; as the worker does."""
        is_closed = self.error or (self.complete and self.complete[-1].is_last)
        while data and not is_closed:
            try:
                data = self.request.feed(data)
            except ProtocolError as error:
                self.error = error
                return
            if self.request.is_complete:
                is_closed = self.request.is_last
                self.complete.append(self.request)
                self.request = Request(COMMON)


def content_of(request: Request) -> bytes:
    """Return what the application can read of a request's content."""
    content: bytes = request.environ["wsgi.input"].read()
    return content


def first(data: bytes) -> WSGIEnvironment:
    """Return the environ of the one request that there is."""
    reading = Reading(data)
    assert reading.error is None
    [request] = reading.complete
    return request.environ


@pytest.mark.parametrize("request_bytes", [GET, PUT, CHUNKED], ids=["GET", "PUT", "chunked"])
def test_environ_is_what_pep_3333_wants(request_bytes: bytes) -> None:
    check_environ(first(request_bytes))


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        ("/hello/Zoe", "/hello/Zoe", ""),
        ("/hello/Zo%C3%AB?a=%41&b", "/hello/Zo\xc3\xab", "a=%41&b"),
        ("/a%2Fb%00%3Fc??d", "/a/b\0?c", "?d"),
        ("//hello/Zoe", "//hello/Zoe", ""),
        ("/hello/100%", "/hello/100%", ""),
        ("http://b:80/hello/Zoe?a=b", "/hello/Zoe", "a=b"),
        ("http://b", "/", ""),
        ("http://b?a", "/", "a"),
    ],
)
def test_target_is_split_into_path_and_query(target: str, path: str, query: str) -> None:
    environ = first(b"OPTIONS %b HTTP/1.1\r\nHost: a\r\n\r\n" % target.encode())
    assert (environ["PATH_INFO"], environ["QUERY_STRING"]) == (path, query)


def test_host_of_an_absolute_target_replaces_that_of_the_header() -> None:
    assert first(GET.replace(b"/hello", b"http://b:80/hello"))["HTTP_HOST"] == "b:80"  # RFC 9112, section 3.2.2


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        (b"X-Request-Id: a", {"HTTP_X_REQUEST_ID": "a"}),
        (b"x-request-ID:a ", {"HTTP_X_REQUEST_ID": "a"}),
        (b"X-A: b\r\nX-A: c", {"HTTP_X_A": "b,c"}),
        (b"X-A: \xe9", {"HTTP_X_A": "\xe9"}),
        (b"X-A:\t X \t", {"HTTP_X_A": "X"}),
        (b"Content-Type: text/plain", {"CONTENT_TYPE": "text/plain"}),
        (b"Content-Length: 0", {"CONTENT_LENGTH": "0"}),
        (b"X_Request_Id: a", {}),
        (b"Content_Length: 7", {}),
        (b"X-Forwarded-For: b", {"HTTP_X_FORWARDED_FOR": "b"}),
        (b"X-Forwarded-Proto: https", {"HTTP_X_FORWARDED_PROTO": "https"}),
        (b"Script-Name: /hello\r\nServer-Port: 8081", {"HTTP_SCRIPT_NAME": "/hello", "HTTP_SERVER_PORT": "8081"}),
    ],
)  # fmt: skip
def test_header_is_in_the_environ_under_its_own_key_and_sets_nothing_else(
    headers: bytes, expected: dict[str, str]
) -> None:
    environ = first(b"GET / HTTP/1.1\r\nHost: a\r\n%b\r\n\r\n" % headers)
    own = {"HTTP_HOST": "a", "REQUEST_METHOD": "GET", "SERVER_PROTOCOL": "HTTP/1.1", "PATH_INFO": "/"}
    del environ["wsgi.input"]
    assert environ == COMMON | own | {"QUERY_STRING": ""} | expected


@pytest.mark.parametrize(
    ("version", "headers", "is_last"),
    [
        ("1.1", "", False),
        ("1.1", "Connection: close\r\n", True),
        ("1.1", "Connection: x, Close\r\n", True),
        ("1.0", "", True),
        ("1.0", "Connection: keep-alive\r\n", False),
        ("1.1", "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: a\r\n", False),
        ("1.0", "Connection: Upgrade\r\nUpgrade: h2c\r\n", True),
    ],
)
def test_request_says_whether_another_may_follow(version: str, headers: str, is_last: bool) -> None:
    requests = Reading(f"GET / HTTP/{version}\r\nHost: a\r\n{headers}\r\n".encode(), GET)
    assert [request.is_last for request in requests.complete] == ([True] if is_last else [False, False])
    assert requests.error is None


@pytest.mark.parametrize("request_bytes", [GET, PUT, CHUNKED], ids=["GET", "length", "chunked"])
def test_upgrade_is_ignored_and_the_request_read_completely(request_bytes: bytes) -> None:
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: a\r\n"
    head, _, content = request_bytes.partition(b"\r\n\r\n")
    upgrading = head + b"\r\n" + upgrade + b"\r\n" + content
    for parts in ([upgrading * 2 + GET], [upgrading[:-2], upgrading[-2:] + upgrading, GET]):
        requests = Reading(*parts)
        assert requests.error is None
        expected = first(request_bytes)["wsgi.input"].read()
        contents = [content_of(request) for request in requests.complete if not request.is_last]
        assert contents == [expected, expected, b""]
        assert all("HTTP_UPGRADE" not in request.environ for request in requests.complete)


@pytest.mark.parametrize("data", [GET[:-1], PUT[:-1], CHUNKED[:-1]], ids=["head", "length", "chunked"])
def test_request_that_is_given_up_leaves_nothing_for_the_garbage_collector(data: bytes) -> None:
    request = Request(COMMON)
    request.feed(data)
    trace = weakref.ref(request)
    gc.disable()
    try:
        del request
        assert trace() is None
    finally:
        gc.enable()


def head_of(size: int) -> bytes:
    """Return the head of a request with so many bytes, in headers of 4,000 bytes."""
    filled = GET[:-2] + (b"X-A: " + b"a" * 3993 + b"\r\n") * ((size - 100) // 4000)
    return filled + b"X-A: " + b"a" * (size - len(filled) - 9) + b"\r\n\r\n"


STREAM = b"".join([GET, PUT, CHUNKED, b"\r\n", PUT, GET])


@given(st.lists(st.integers(0, len(STREAM))).map(sorted))
@settings(max_examples=300)
def test_requests_are_the_same_however_the_network_cuts_them(cuts: list[int]) -> None:
    parts = [STREAM[start:end] for start, end in zip([0, *cuts], [*cuts, len(STREAM)], strict=True)]
    requests = Reading(*filter(None, parts))
    found = [(request.method, content_of(request)) for request in requests.complete]
    assert found == [("GET", b""), ("PUT", b"abc"), ("PUT", b"abc"), ("PUT", b"abc"), ("GET", b"")]
    assert not requests.request.received
    assert requests.error is None


@pytest.mark.parametrize("rest", [b"\r\n", b"G", GET[:-1], PUT[:-1], CHUNKED[:-1]])
def test_request_that_is_not_complete_is_in_progress(rest: bytes) -> None:
    requests = Reading(GET, rest)
    assert requests.request.received == len(rest)
    assert bool(requests.request.head or requests.request.environ) == (rest != b"\r\n")
    assert len(requests.complete) == 1


@pytest.mark.parametrize(
    ("parts", "status"),
    [
        ([b"GET /" + b"a" * 8190 + GET[14:]], 414),
        ([GET[:-2], b"X-A: " + b"a" * 16382 + b"\r\n\r\n"], 431),
        ([GET[:-2], *[b"X-A: b\r\n"] * 64, b"\r\n"], 431),
        ([head_of(32769)], 431),
        ([head_of(32770)[:-1]], 431),
        ([CHUNKED[:-4], *[b"a" * 8192] * 20], 400),
    ],
)
def test_request_beyond_a_limit_is_an_error_and_those_before_it_are_not(parts: list[bytes], status: int) -> None:
    requests = Reading(GET, *parts)
    assert requests.error
    assert requests.error.status == status
    assert len(requests.complete) == 1


@pytest.mark.parametrize(
    "parts",
    [
        [b"GET /" + b"a" * 8189 + GET[14:]],
        [b"\r\n\r\n\r\nOPTIONS  /" + b"a" * 8189, b" HTTP/1.1\r", b"\nHost: a\r\n\r\n"],
        [head_of(32768)],
        [head_of(32768), head_of(32768)[:-1], b"\n"],
        [PUT.replace(b"3", b"65536", 1) + b"a" * 65533],
        [GET[:-2], b"X-A: " + b"a" * 16381 + b"\r\n", *[b"X-A: b\r\n"] * 62, b"\r\n"],
    ],
)
def test_request_at_a_limit_is_read(parts: list[bytes]) -> None:
    requests = Reading(*parts)
    assert requests.error is None
    assert not requests.request.received
    assert [request.is_last for request in requests.complete] == [False] * b"".join(parts).count(b" HTTP/1.1\r\n")


@pytest.mark.parametrize(("request_bytes", "status"), ERRORS.values(), ids=ERRORS.keys())
def test_error_that_arrives_byte_by_byte_has_its_status_and_ends_the_reading(request_bytes: bytes, status: int) -> None:
    requests = Reading(*pieces(request_bytes + SECOND, 1))
    assert requests.error
    assert requests.error.status == status
    assert not requests.complete


@pytest.mark.parametrize(("method", "status"), [(b"BREW", 501), (b"GET", 400)])
def test_short_line_that_ends_with_lf_is_refused_alike_wherever_it_is_cut(method: bytes, status: int) -> None:
    head = method + b" / HTTP/1.1\nX\r\n\r\n"
    readings = [Reading(head[:cut], head[cut:]) for cut in range(len(head))]
    assert {reading.error and reading.error.status for reading in readings} == {status}


def test_request_in_progress_may_have_160_kib_and_not_a_byte_more() -> None:
    start = CHUNKED[:-11] + b"1;x="
    requests = Reading(GET, start, b"a" * (parser.MAX_REQUEST_BYTES - len(start)))
    assert requests.request.environ
    assert requests.error is None
    requests.feed(b"a")
    assert requests.error


def test_parser_knows_how_much_content_the_application_takes() -> None:
    assert parser.MAX_CONTENT_BYTES == hello.MAX_CONTENT_BYTES


@pytest.mark.parametrize(
    ("headers", "awaits_continue"),
    [("", False), ("Expect: 100-Continue\r\n", True), ("Expect:\r\n", False), ("Expect: ,\r\n", False)],
)
@pytest.mark.parametrize("length", [3, parser.MAX_CONTENT_BYTES])
def test_client_awaits_100_continue_if_it_says_so(headers: str, awaits_continue: bool, length: int) -> None:
    requests = Reading(f"PUT / HTTP/1.1\r\nHost: a\r\n{headers}Content-Length: {length}\r\n\r\n".encode())
    assert requests.request.awaits_continue == awaits_continue
    assert requests.error is None


def test_content_that_is_too_long_is_for_the_application_if_the_client_does_not_wait() -> None:
    requests = Reading(PUT.replace(b"3", b"4097", 1).replace(b"Host", b"Expect:\r\nHost"))
    assert not requests.error


def test_content_beyond_64_kib_ends_the_reading() -> None:
    requests = Reading(PUT.replace(b"3", b"99999", 1), b"a" * 65530)
    assert not requests.complete
    requests.feed(b"a" * 4)
    (request,) = requests.complete
    assert request.is_last


@pytest.mark.parametrize("framing", ["Content-Length: 60000\r\n\r\n", "Transfer-Encoding: chunked\r\n\r\nea60\r\n"])
def test_no_more_content_is_kept_than_shows_that_it_is_too_long(framing: str) -> None:
    requests = Reading(f"PUT / HTTP/1.1\r\nHost: a\r\n{framing}".encode(), b"a" * 60000, b"\r\n0\r\n\r\n")
    assert content_of(requests.complete[0]) == b"a" * (parser.MAX_CONTENT_BYTES + 1)
    assert not requests.complete[0].is_last


def test_defect_of_the_parser_is_not_a_protocol_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(parser, "split_target", fail)
    with pytest.raises(ZeroDivisionError):
        Reading(GET)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x16\x03\x01\x02\x00", 400),  # TLS
        (b"SESAME / HTTP/1.1\r\n", 501),
        (b"GET /\r\n", 400),
        (b"GET / HTTP/2.0\r\n", 505),
        (b"SSH-2.0-OpenSSH_9.2\r\n", 400),
    ],
)
@pytest.mark.parametrize("size", [8192, 1])
def test_what_cannot_become_a_request_is_refused_before_its_head_ends(data: bytes, status: int, size: int) -> None:
    error = Reading(*pieces(data, size)).error
    assert error
    assert error.status == status


# --- Time -------------------------------------------------------------------------------------------

PATTERNS = {name: value for name, value in vars(parser).items() if isinstance(value, re.Pattern)}
SEARCHED = set(re.findall(r"(\w+)\.(?:search|sub|split|findall|finditer)\(", inspect.getsource(parser)))
PIECES = [*"a \t\r\n:%[/?.1", "a ", " a", "\r\n", "a\r\n", " \r\n", "%61", "a:"]
STARTS = ["", "GET ", "GET / ", "http://", "http://[", "a:"]


@pytest.mark.parametrize("name", PATTERNS)
def test_pattern_takes_linear_time_for_its_worst_input(name: str) -> None:
    pattern = PATTERNS[name]
    slowest = 0.0
    for start, piece in itertools.product(STARTS, PIECES):
        text = start + piece * (parser.MAX_HEAD_BYTES // len(piece)) + "\0"
        data: Any = text.encode() if isinstance(pattern.pattern, bytes) else text
        before = time.process_time()
        pattern.match(data)
        pattern.fullmatch(data)
        if name in SEARCHED:
            pattern.search(data)
        slowest = max(slowest, time.process_time() - before)
    assert slowest < 0.05  # quadratic time for 32 KiB would be seconds


@pytest.mark.parametrize("piece", [b"a" + b" " * 4000 + b"b", b"a" + b"\t " * 2000 + b"b", b"a," * 2000, b"%61" * 1300])
@pytest.mark.parametrize("name", [b"X-A", b"Transfer-Encoding", b"Upgrade", b"Connection", b"Host", b"Expect"])
def test_head_with_long_headers_is_read_in_a_moment(name: bytes, piece: bytes) -> None:
    head = GET[:-2] + UPGRADE + b"Transfer-Encoding: x\r\n" + b"".join([name + b": " + piece + b"\r\n"] * 7)
    before = time.process_time()
    Reading(head + b"\r\n")
    assert time.process_time() - before < 0.02


def test_head_that_arrives_in_bytes_is_read_in_a_moment() -> None:
    head = head_of(parser.MAX_HEAD_BYTES)
    before = time.process_time()
    requests = Reading(*pieces(head, 1))
    assert time.process_time() - before < 2
    assert len(requests.complete) == 1
