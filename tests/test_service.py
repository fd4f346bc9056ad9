"""The whole service: gunicorn, hello.py and Postgres, over connections that are kept alive."""

from collections.abc import Iterator
from contextlib import closing
from datetime import date
from urllib.parse import quote

import pytest

from tests.support.network import Connection, exchange, responses
from tests.support.postgres import Database
from tests.support.service import Service, body

BODY = body("1990-05-17")


@pytest.fixture(scope="module")
def service(database: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with Service(tmp_path_factory.mktemp("service"), database) as service:
        yield service


@pytest.fixture
def connection(service: Service, table: Database) -> Iterator[Connection]:
    """One connection, which each test uses throughout."""
    with closing(service.connect()) as connection:
        yield connection


def chunked(method: str, path: str, *chunks: bytes) -> bytes:
    """Return a request with chunked content."""
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    return head + b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in [*chunks, b""])


def test_put_and_get_of_a_name_in_utf_8(connection: Connection, table: Database) -> None:
    assert connection.ask("PUT", f"/hello/{quote('Zoë')}", BODY).status == 204
    assert table.rows() == {"Zoë": date(1990, 5, 17)}
    response = connection.ask("GET", f"/hello/{quote('Zoë')}?a=b")
    assert response.status == 200
    assert response.message.startswith("Hello, Zoë! ")


def test_put_of_chunked_content(service: Service, table: Database) -> None:
    data = exchange(service.port, chunked("PUT", "/hello/Zoe", *[bytes([byte]) for byte in BODY]))
    assert [response.status for response in responses(data)] == [204]
    assert table.rows() == {"Zoe": date(1990, 5, 17)}


def test_put_of_chunked_content_over_4_kib_is_413_and_the_next_request_is_answered(
    service: Service, table: Database
) -> None:
    requests = chunked("PUT", "/hello/Zoe", BODY.ljust(4000), b" " * 97) + b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"
    assert [response.status for response in responses(exchange(service.port, requests))] == [413, 200]
    assert table.rows() == {}


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("PUT", "/hello/Zoe1", BODY.ljust(100), 400),
        ("PUT", "/hello/Zoe", b"{", 400),
        ("PUT", "/hello/Zoe", BODY.ljust(50_000), 413),
        ("GET", "/hello/Nobody", BODY.ljust(100), 404),
        ("POST", "/hello/Zoe", BODY.ljust(3000), 405),
        ("PUT", "/nowhere", BODY.ljust(3000), 404),
        ("OPTIONS", "/hello/Zoe", BODY.ljust(3000), 204),
        ("HEAD", "/hello/Nobody", None, 404),
    ],
)
def test_error_leaves_the_connection_usable(
    connection: Connection, table: Database, method: str, path: str, content: bytes | None, status: int
) -> None:
    assert connection.ask(method, path, content).status == status
    before = connection.sock
    assert connection.ask("PUT", "/hello/Next", BODY).status == 204
    assert connection.sock is before
    assert table.rows() == {"Next": date(1990, 5, 17)}


def test_content_that_is_not_read_whole_ends_the_connection(connection: Connection, table: Database) -> None:
    response = connection.ask("PUT", "/hello/Zoe", BODY.ljust(1_000_000))
    assert response.status == 413
    assert response.headers["Connection"] == "close"
    assert response.message == "The content must be at most 4096 bytes long."
    assert table.rows() == {}
