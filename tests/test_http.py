"""The whole service, gunicorn, hello.py and Postgres, takes HTTP to the letter (RFC 9110, RFC 9112)."""

from collections.abc import Iterator
from contextlib import closing
from datetime import date

import pytest

from server import parser
from tests.support.network import Connection, exchange, responses
from tests.support.postgres import Database
from tests.support.raw_requests import DATE, ERRORS, GOOD, SECOND, TWO_FAULTS
from tests.support.service import Service
from tests.support.wait import wait_until


@pytest.fixture(scope="module")
def service(database: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that no request may cost a worker."""
    with Service(tmp_path_factory.mktemp("http"), database, WEB_CONCURRENCY="1") as service:
        assert service.put("Second").status == 204
        workers = service.workers()
        yield service
        assert service.workers() == workers


@pytest.mark.parametrize(("request_bytes", "status"), ERRORS.values(), ids=ERRORS.keys())
def test_protocol_error_is_answered_once_and_hides_no_second_request(
    service: Service, postgres: Database, request_bytes: bytes, status: int
) -> None:
    (response,) = responses(exchange(service.port, request_bytes + SECOND))
    assert response.status == status
    assert response.headers["Connection"] == "close"
    assert response.headers["Date"]
    assert "esame" not in response.message
    assert postgres.query("DELETE FROM users WHERE username LIKE '%esame' RETURNING username") == []


@pytest.mark.parametrize(("request_bytes", "status"), TWO_FAULTS.values(), ids=TWO_FAULTS.keys())
def test_request_with_two_faults_is_answered_and_logged_and_the_one_before_it_is_answered(
    service: Service, request_bytes: bytes, status: int
) -> None:
    second, refused = responses(exchange(service.port, SECOND + request_bytes + SECOND))
    assert (second.status, refused.status) == (200, status)
    wait_until(lambda: refused.headers["X-Request-Id"] in service.log_text())


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"HEAD /hello/Second HTTP/1.1\r\n\r\n",
        b"HEAD /hello/S\x00econd HTTP/1.1\r\nHost: a\r\n\r\n",
        b"HEAD /hello/Second HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HEAD /hello/" + b"S" * 9000,
    ],
)
def test_protocol_error_of_head_has_no_content(service: Service, request_bytes: bytes) -> None:
    (response,) = responses(exchange(service.port, request_bytes), ["HEAD"])
    assert response.status >= 400
    assert int(response.headers["Content-Length"]) > 0


@pytest.mark.parametrize(("request_bytes", "status"), GOOD.values(), ids=GOOD.keys())
def test_request_that_http_allows_is_answered_and_the_next_one_too(
    service: Service, request_bytes: bytes, status: int
) -> None:
    found = responses(exchange(service.port, request_bytes + SECOND))
    assert [response.status for response in found] == [status, 200]


# --- Expect: 100-continue ---------------------------------------------------------------------------

EXPECTING = b"PUT /hello/Expected HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\n"


@pytest.mark.parametrize("expectation", [b"", b"Expect: 100-Continue\r\n"], ids=["once", "on two lines"])
def test_client_that_expects_100_continue_is_told_and_then_answered(
    service: Service, postgres: Database, expectation: bytes
) -> None:
    with service.open_socket() as client:
        for content in (DATE, DATE):
            client.sendall(EXPECTING + expectation + b"Content-Length: 29\r\n\r\n")
            assert client.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
            client.sendall(content[:9])
            client.sendall(content[9:])
            assert client.recv(1000).startswith(b"HTTP/1.1 204 ")
        client.sendall(EXPECTING + b"Content-Length: 29\r\n\r\n" + DATE)  # it did not wait
        assert client.recv(1000).startswith(b"HTTP/1.1 204 ")
    assert postgres.rows()["Expected"].year == 1990


@pytest.mark.parametrize("expectation", [b"", b","])  # a list may be empty: RFC 9110, section 5.6.1
def test_client_that_expects_nothing_is_not_told_100_continue(service: Service, expectation: bytes) -> None:
    head = b"PUT /hello/Second HTTP/1.1\r\nHost: a\r\nExpect:" + expectation + b"\r\nContent-Length: 29\r\n\r\n"
    assert exchange(service.port, head, DATE, pause=0.1).startswith(b"HTTP/1.1 204 ")


@pytest.mark.parametrize("length", [parser.MAX_CONTENT_BYTES + 1, 100_000, 10**15])
def test_client_that_expects_100_continue_for_too_much_content_is_told_413_at_once(
    service: Service, length: int
) -> None:
    (response,) = responses(exchange(service.port, EXPECTING + b"Content-Length: %d\r\n\r\n" % length))
    assert response.status == 413
    assert response.headers["Connection"] == "close"


# --- Connections that are kept alive ----------------------------------------------------------------


@pytest.fixture
def connection(service: Service, table: Database) -> Iterator[Connection]:
    """One connection, which each test uses throughout, to a service without users."""
    with closing(service.connect()) as connection:
        yield connection
    service.put("Second")


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("PUT", "/hello/Zoe1", DATE.ljust(100), 400),
        ("PUT", "/hello/Zoe", b"{", 400),
        ("PUT", "/hello/Zoe", DATE.ljust(50_000), 413),
        ("GET", "/hello/Nobody", DATE.ljust(100), 404),
        ("POST", "/hello/Zoe", DATE.ljust(3000), 405),
        ("OPTIONS", "/hello/Zoe", DATE.ljust(3000), 204),
        ("HEAD", "/hello/Nobody", None, 404),
    ],
)
def test_error_leaves_the_connection_usable(
    connection: Connection, table: Database, method: str, path: str, content: bytes | None, status: int
) -> None:
    assert connection.ask(method, path, content).status == status
    before = connection.sock
    assert connection.ask("PUT", "/hello/Next", DATE).status == 204
    assert connection.sock is before
    assert table.rows() == {"Next": date(1990, 5, 17)}


def test_content_that_is_not_read_whole_ends_the_connection(connection: Connection, table: Database) -> None:
    response = connection.ask("PUT", "/hello/Zoe", DATE.ljust(1_000_000))
    assert response.status == 413
    assert response.headers["Connection"] == "close"
    assert response.message == "The content must be at most 4096 bytes long."
    assert table.rows() == {}
