"""Requests that are malformed, cut, pipelined, slow or made up: none is answered 5xx, and none hides another."""

import contextlib
import itertools
import json
import random
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.load import letters
from tests.support.network import RESET_ON_CLOSE, exchange, read_all, responses
from tests.support.postgres import Database
from tests.support.service import Service, body
from tests.support.wait import in_thread

HOST = b"Host: a\r\n"
PUT = b"PUT /hello/Sesame HTTP/1.1\r\nHost: a\r\n"
GET = b"GET /hello/Sesame HTTP/1.1\r\nHost: a\r\n"
CHUNKED = PUT + b"Transfer-Encoding: chunked\r\n\r\n"
DATE = body("1990-05-17")
SMUGGLED = b"GET /hello/Smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
MALFORMED = {
    "both lengths": PUT + b"Content-Length: 29\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "both lengths, the other order": PUT + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
    "two lengths": PUT + b"Content-Length: 29\r\nContent-Length: 0\r\n\r\n",
    "two equal lengths": PUT + b"Content-Length: 29\r\nContent-Length: 29\r\n\r\n" + DATE,
    "length with a sign": PUT + b"Content-Length: +29\r\n\r\n" + DATE,
    "negative length": PUT + b"Content-Length: -1\r\n\r\n",
    "length in hexadecimal": PUT + b"Content-Length: 0x1d\r\n\r\n" + DATE,
    "list of lengths": PUT + b"Content-Length: 29, 29\r\n\r\n" + DATE,
    "empty length": PUT + b"Content-Length: \r\n\r\n",
    "length of another script": PUT + "Content-Length: ²\r\n\r\n12".encode("latin-1"),
    "unknown coding": PUT + b"Transfer-Encoding: sesame\r\n\r\n",
    "hidden coding": PUT + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "coding and vertical tab": PUT + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "chunked twice": PUT + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "chunked in two headers": PUT + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked not last": PUT + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    "coding without chunked": PUT + b"Transfer-Encoding: gzip\r\n\r\n",
    "chunked in HTTP/1.0": b"PUT /hello/Sesame HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "space before colon": PUT + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "folded coding": PUT + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    "folded header": GET + b"X-A: b\r\n c\r\n\r\n",
    "chunk size no number": CHUNKED + b"sesame\r\n" + DATE + b"\r\n0\r\n\r\n",
    "chunk size with prefix": CHUNKED + b"0x1d\r\n" + DATE + b"\r\n0\r\n\r\n",
    "negative chunk size": CHUNKED + b"-1\r\n\r\n0\r\n\r\n",
    "empty chunk size": CHUNKED + b"\r\n" + DATE + b"\r\n0\r\n\r\n",
    "endless chunk size": CHUNKED + b"0" * 10000,
    "chunk too long": CHUNKED + b"1c\r\n" + DATE + b"\r\n0\r\n\r\n",
    "chunk size ends with LF": CHUNKED + b"1d\n" + DATE + b"\n0\n\n",
    "chunk extension with CR": CHUNKED + b"1d;a\rb\r\n" + DATE + b"\r\n0\r\n\r\n",
    "length as trailer": CHUNKED + b"1d\r\n" + DATE + b"\r\n0\r\nContent-Length: 5\r\n\r\n",
    "two hosts": GET + b"Host: b\r\n\r\n",
    "no host": b"GET /hello/Sesame HTTP/1.1\r\n\r\n",
    "nul in a header": GET + b"X-A: b\x00c\r\n\r\n",
    "nul in the target": b"GET /hello/Ses\x00ame HTTP/1.1\r\n" + HOST + b"\r\n",
    "CR in a header": GET + b"X-A: b\rX-C: d\r\n\r\n",
    "header without colon": GET + b"sesame\r\n\r\n",
    "header without name": GET + b": sesame\r\n\r\n",
    "space in a header's name": GET + b"X A: b\r\n\r\n",
    "control in a header's name": GET + b"X\x01A: b\r\n\r\n",
    "line ends of LF": GET.replace(b"\r", b"") + b"\n",
    "one line end of LF": GET + b"X-A: b\nTransfer-Encoding: chunked\r\n\r\n",
    "request line ends with LF": b"GET /hello/Sesame HTTP/1.1\n" + HOST + b"\r\n",
    "line ends of CR": GET.replace(b"\n", b"") + b"\r",
    "no version": b"GET /hello/Sesame\r\n\r\n",
    "version in small letters": b"GET /hello/Sesame http/1.1\r\n" + HOST + b"\r\n",
    "version 2": b"GET /hello/Sesame HTTP/2.0\r\n" + HOST + b"\r\n",
    "version 9.9": b"GET /hello/Sesame HTTP/9.9\r\n" + HOST + b"\r\n",
    "version 1.10": b"GET /hello/Sesame HTTP/1.10\r\n" + HOST + b"\r\n",
    "preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no method": b" /hello/Sesame HTTP/1.1\r\n" + HOST + b"\r\n",
    "method in small letters": b"get /hello/Sesame HTTP/1.1\r\n" + HOST + b"\r\n",
    "method with brackets": b"G(E)T /hello/Sesame HTTP/1.1\r\n" + HOST + b"\r\n",
    "tabs": b"GET\t/hello/Sesame\tHTTP/1.1\r\n" + HOST + b"\r\n",
    "space in the target": b"GET /hello/Ses ame HTTP/1.1\r\n" + HOST + b"\r\n",
    "bytes in the target": b"GET /hello/S\xc3\xa9same HTTP/1.1\r\n" + HOST + b"\r\n",
    "bracket in the target": b"GET http://[sesame/ HTTP/1.1\r\n" + HOST + b"\r\n",
    "long request line": b"GET /hello/" + b"Sesame" * 2000 + b" HTTP/1.1\r\n" + HOST + b"\r\n",
    "endless request line": b"GET /hello/" + b"Sesame" * 20000,
    "long header": GET + b"X-A: " + b"sesame" * 1000 + b"\r\n\r\n",
    "many headers": GET + b"X-A: sesame\r\n" * 100 + b"\r\n",
    "endless head": GET + b"X-A: sesame\r\n" * 100_000,
    "unknown expectation": PUT + b"Expect: sesame\r\nContent-Length: 29\r\n\r\n" + DATE,
    "tunnel": b"CONNECT /hello/Sesame HTTP/1.1\r\n" + HOST + b"\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) * 2,
    "binary": bytes(range(255, -1, -1)) * 4,
    "blank lines without end": b"\r\n" * 50_000,
    "method that nobody knows": b"SESAME /hello/Sesame HTTP/1.1\r\n" + HOST + b"\r\n",
}


@pytest.fixture(scope="module")
def quick_service(database: Database, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that waits no longer than a second for the rest of a request."""
    bounds = {"HEAD_TIMEOUT": "1", "CONTENT_TIMEOUT": "1"}
    with Service(tmp_path_factory.mktemp("quick"), database.service_environment | bounds) as service:
        assert service.put("Smuggled").status == 204
        workers = service.workers()
        yield service
        assert service.workers() == workers


@pytest.mark.parametrize("request_bytes", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_request_is_4xx_or_a_close_and_hides_no_second_one(
    database: Database, quick_service: Service, request_bytes: bytes
) -> None:
    data = exchange(quick_service.port, request_bytes + SMUGGLED)
    answers = responses(data)
    assert len(answers) <= 1
    for answer in answers:
        assert 400 <= answer.status < 500 or answer.status in {501, 505}
        assert answer.headers["Connection"] == "close"
        assert answer.headers["Date"]
        assert "esame" not in answer.message
    assert b"Smuggled" not in data
    assert "Sesame" not in database.rows()


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"\r\n" * 3 + SMUGGLED, 200),
        (SMUGGLED.replace(b" ", b"  ", 1), 200),
        (b"PUT /hello/Smuggled HTTP/1.1\r\nhost:\ta \r\nCONTENT-LENGTH:29 \t\r\n\r\n" + DATE, 204),
    ],
    ids=["blank lines (RFC 9112, 2.2)", "two spaces (RFC 9112, 3)", "white space around a value (RFC 9112, 5)"],
)
def test_request_that_http_tells_to_tolerate_is_answered_once(
    quick_service: Service, request_bytes: bytes, status: int
) -> None:
    answers = responses(exchange(quick_service.port, request_bytes))
    assert [answer.status for answer in answers] == [status]


def read_head(client: socket.socket) -> bytes:
    """Read to the end of a head and no further."""
    data = b""
    while not data.endswith(b"\r\n\r\n"):
        data += client.recv(1)
    return data


def test_client_that_expects_100_continue_is_told_once_and_then_answered(
    database: Database, quick_service: Service
) -> None:
    head = b"PUT /hello/Expected HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 29\r\n\r\n"
    with quick_service.open_socket() as client:
        for content in (DATE, DATE):
            client.sendall(head)
            assert read_head(client) == b"HTTP/1.1 100 Continue\r\n\r\n"
            client.sendall(content[:9])
            client.sendall(content[9:])
            assert read_head(client).startswith(b"HTTP/1.1 204 ")
        client.sendall(head + DATE)  # it did not wait: there is nothing left to tell
        assert read_head(client).startswith(b"HTTP/1.1 204 ")
    assert database.rows()["Expected"].year == 1990


def test_request_hidden_in_a_body_is_not_executed(database: Database, quick_service: Service) -> None:
    inner = b"PUT /hello/Hidden HTTP/1.1\r\nHost: a\r\nContent-Length: 29\r\n\r\n" + DATE
    for method, status in {"PUT": 400, "GET": 200, "HEAD": 200, "DELETE": 405, "OPTIONS": 204}.items():
        outer = f"{method} /hello/Smuggled HTTP/1.1\r\nHost: a\r\nContent-Length: {len(inner)}\r\n\r\n".encode()
        found = responses(exchange(quick_service.port, outer + inner + SMUGGLED), [method])
        assert [answer.status for answer in found] == [status, 200]
    assert "Hidden" not in database.rows()


def pipeline(count: int, mark: str) -> tuple[bytes, list[str], list[str]]:
    """Return PUTs and GETs of so many users in one piece, the users, and the messages of the answers."""
    generator = random.Random(mark)
    users = [f"Pipe{mark}{letters(index).capitalize()}" for index in range(count)]
    data, expected = b"", []
    for user in users:
        days = generator.randrange(2, 360)
        born = (datetime.now(UTC).date() + timedelta(days)).replace(year=1996)
        data += b"PUT /hello/%b HTTP/1.1\r\nHost: a\r\nContent-Length: 29\r\n\r\n%b" % (user.encode(), body(born))
        data += b"GET /hello/%b HTTP/1.1\r\nHost: a\r\n\r\n" % user.encode()
        expected += ["", f"Hello, {user}! Your birthday is in {days} day(s)"]
    return data, users, expected


@pytest.mark.parametrize("cut", ["whole", "in pieces"])
def test_pipelined_requests_are_answered_in_order_each_with_its_own(
    database: Database, quick_service: Service, cut: str
) -> None:
    data, users, expected = pipeline(50, cut[0])
    cuts = sorted(random.Random(1).sample(range(len(data)), 200)) if cut == "in pieces" else []
    parts = [data[start:end] for start, end in itertools.pairwise([0, *cuts, len(data)])]
    found = responses(exchange(quick_service.port, *parts, pause=0.001 if cuts else 0))
    assert [answer.status for answer in found] == [204, 200] * len(users)
    assert [answer.message for answer in found] == expected
    assert database.rows().keys() >= set(users)


def test_clients_on_connections_side_by_side_get_their_own_answers(quick_service: Service) -> None:
    plans = [pipeline(25, f"x{letters(index).capitalize()}") for index in range(16)]
    futures = [in_thread(exchange, quick_service.port, data) for data, _, _ in plans]
    for (_, users, expected), future in zip(plans, futures, strict=True):
        found = responses(future.result(20))
        assert [answer.status for answer in found] == [204, 200] * len(users)
        assert [answer.message for answer in found] == expected


@pytest.mark.parametrize(
    ("sent", "statuses"),
    [
        (PUT[:20], []),
        (PUT, []),
        (PUT + b"Content-Length: 29\r\n\r\n" + DATE[:20], [400]),
        (PUT + b"Content-Length: 40\r\n\r\n" + DATE, [400]),
        (CHUNKED + b"1d\r\n{", [400]),
    ],
    ids=["in the request line", "in the head", "in the body", "after the document", "in a chunk"],
)
def test_request_cut_by_a_half_close_is_4xx_or_a_close(
    database: Database, quick_service: Service, sent: bytes, statuses: list[int]
) -> None:
    assert [answer.status for answer in responses(exchange(quick_service.port, sent))] == statuses
    assert "Sesame" not in database.rows()


@pytest.mark.parametrize("sent", [PUT[:20], PUT, PUT + b"Content-Length: 29\r\n\r\n" + DATE[:20], CHUNKED + b"1d\r\n{"])
def test_request_that_stalls_is_408(database: Database, quick_service: Service, sent: bytes) -> None:
    with quick_service.open_socket() as client:
        client.sendall(sent)
        (answer,) = responses(read_all(client))
    assert answer.status == 408
    assert "Sesame" not in database.rows()


def test_request_that_waits_behind_others_of_its_pipeline_is_not_late(
    database: Database, quick_service: Service
) -> None:
    requests = SMUGGLED * 2 + b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"
    with database.locked("LOCK TABLE users"):  # for longer than HEAD_TIMEOUT, which is 1 here
        found = responses(exchange(quick_service.port, requests[:-9], requests[-9:], pause=0.1))
    assert [answer.status for answer in found] == [503, 503, 200]


def test_blank_line_on_an_idle_connection_is_no_request_that_is_late(quick_service: Service) -> None:
    with quick_service.open_socket() as client:
        client.sendall(SMUGGLED)
        assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
        client.sendall(b"\r\n")
        assert read_all(client) == b""


def test_clients_that_reset_their_connections_leave_no_trace(quick_service: Service) -> None:
    errors = quick_service.log_text().count('"level": "error"')
    for _ in range(100):
        with quick_service.open_socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            client.sendall(pipeline(3, "r")[0])
    assert quick_service.ask("GET", "/readyz").status == 200
    assert quick_service.log_text().count('"level": "error"') == errors


# --- Fuzz -------------------------------------------------------------------------------------------

TEXTS = (
    st.text(st.characters(categories=["L", "Mn", "Mc"]), max_size=40) | st.text(max_size=300) | st.binary(max_size=40)
)


def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(inner, max_size=4) | st.dictionaries(
        st.just("dateOfBirth") | st.text(max_size=9), inner, max_size=4
    )


SCALARS = st.none() | st.booleans() | st.text(max_size=30) | st.floats() | st.integers() | st.dates().map(str)
VALUES = st.recursive(SCALARS, nested)
CONTENTS = st.binary(max_size=300) | VALUES.map(lambda value: json.dumps(value).encode()) | st.dates().map(body)
PIECES = [
    *(b"\r\n", b"\n", b"\r", b"\x00", b" ", b":", b"\xff", b"%00", b"%ff", b"%", b"/", b"?"),
    *(b"0\r\n\r\n", b"HTTP/1.0", b"29", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n"),
    *(b"Expect: 100-continue\r\n", b"Connection: close\r\n"),
]
SEEDS = [
    PUT + b"Content-Length: 29\r\n\r\n" + DATE,
    CHUNKED + b"1d\r\n" + DATE + b"\r\n0\r\n\r\n",
    GET + b"\r\n" + SMUGGLED,
]
MUTATIONS = st.lists(
    st.tuples(st.integers(0, 99), st.integers(0, 9), st.sampled_from(PIECES) | st.binary(max_size=4)),
    min_size=1,
    max_size=4,  # of many, hardly one would reach the application
)


def test_any_name_and_any_body_on_one_connection_are_never_5xx(
    quick_service: Service, report: Callable[[str], None]
) -> None:
    statuses: Counter[int] = Counter()
    with contextlib.closing(quick_service.connect()) as connection:

        @given(TEXTS, CONTENTS)
        @settings(max_examples=300, deadline=None, database=None, derandomize=True)
        def check(name: str | bytes, content: bytes) -> None:
            path = f"/hello/{quote(name, safe='', errors='surrogatepass') if isinstance(name, str) else quote(name)}"
            for method in ("PUT", "GET"):
                answer = connection.ask(method, path, content)
                statuses[answer.status] += 1
                assert answer.status < 500

        check()
    report(f"{statuses.total()} sent, answered {dict(sorted(statuses.items()))}")


def test_any_bytes_are_never_5xx(database: Database, quick_service: Service, report: Callable[[str], None]) -> None:
    statuses: Counter[int] = Counter()

    @given(st.sampled_from(SEEDS), MUTATIONS)
    @settings(max_examples=300, deadline=None, database=None, derandomize=True)
    def check(seed: bytes, mutations: list[tuple[int, int, bytes]]) -> None:
        for index, dropped, piece in mutations:
            seed = seed[:index] + piece + seed[index + dropped :]
        for answer in responses(exchange(quick_service.port, seed)):
            statuses[answer.status] += 1
            assert answer.status < 500 or answer.status in {501, 505}

    check()
    report(f"300 mutated requests, answered {dict(sorted(statuses.items()))}")
    assert statuses[400]
    assert set(statuses) & {200, 204}
