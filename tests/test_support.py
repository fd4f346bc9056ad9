"""The helpers that other tests believe: a response with too much in it, a lost write and a late statement show."""

import socket
from collections.abc import Iterator
from datetime import date
from email.message import Message

import psycopg2
import pytest

from tests.support.fault_proxy import FaultProxy
from tests.support.load import Journal, days_until_birthday
from tests.support.network import Response, free_port, responses, silent_port
from tests.support.postgres import Database
from tests.support.wait import in_thread, wait_until

TODAY = date(2026, 3, 10)


@pytest.mark.parametrize(
    ("data", "methods"),
    [
        (b"HTTP/1.1 204 No Content\r\n\r\nx", ["PUT"]),
        (b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", ["PUT"]),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx", ["HEAD"]),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nx", ["GET"]),
        (b"HTTP/1.1 200 OK\r\n\r\nx", ["GET"]),
        (b"HTTP/1.1 200 OK\r\nContent-Le", ["GET"]),
        (b"HTTP/1.1 2000 OK\r\nContent-Length: 0\r\n\r\n", ["GET"]),
    ],
    ids=["204 content", "204 length", "HEAD content", "cut short", "no length", "half a head", "no status"],
)
def test_bytes_that_are_no_complete_response_fail(data: bytes, methods: list[str]) -> None:
    with pytest.raises(AssertionError):
        responses(data, methods)


def test_pipelined_responses_are_split() -> None:
    data = b"HTTP/1.1 204 No Content\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"
    data += b'HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n{"message":"a"}'
    found = responses(data, ["PUT", "HEAD", "GET"])
    assert [(response.status, response.message) for response in found] == [(204, ""), (200, ""), (200, "a")]


def test_journal_notices_a_date_that_is_lost_or_overtaken() -> None:
    journal = Journal()
    first, second, third = date(1990, 1, 1), date(1990, 1, 2), date(1990, 1, 3)
    journal.send("Zoe", first)
    assert journal.lost({}) == []
    journal.send("Zoe", second)
    journal.acknowledge("Zoe")
    journal.send("Zoe", third)
    assert journal.lost({"Zoe": second}) == journal.lost({"Zoe": third}) == []
    assert journal.lost({}) == journal.lost({"Zoe": first}) == ["Zoe"]


@pytest.mark.parametrize(
    ("status", "text", "is_right"),
    [
        (200, "Hello, Zoe! Your birthday is in 1 day(s)", True),
        (200, "Hello, Zoe! Your birthday is in 2 day(s)", False),
        (200, "Hello, Zoe! Happy birthday!", False),
        (200, "Hello, Ann! Your birthday is in 1 day(s)", False),
        (404, "", False),
        (503, "", True),
    ],
)
def test_journal_explains_only_an_answer_with_the_acknowledged_birthday(status: int, text: str, is_right: bool) -> None:
    journal = Journal()
    journal.send("Zoe", date(1990, 3, 11))
    journal.acknowledge("Zoe")
    response = Response(status, Message(), b'{"message": "%b"}' % text.encode())
    assert journal.explains("Zoe", response, [TODAY]) == is_right


@pytest.mark.parametrize(
    ("born", "today", "days"),
    [
        (date(2000, 2, 29), date(2027, 3, 1), 0),
        (date(2000, 2, 29), date(2027, 3, 2), 364),
        (date(2000, 3, 1), date(2027, 3, 2), 365),
        (date(2000, 3, 10), TODAY, 0),
    ],
)
def test_days_until_birthday_are_counted(born: date, today: date, days: int) -> None:
    assert days_until_birthday(born, today) == days


def test_free_ports_are_distinct_and_can_be_listened_on() -> None:
    ports = [free_port() for _ in range(50)]
    assert len(set(ports)) == 50
    with socket.create_server(("127.0.0.1", ports[0])):
        socket.create_connection(("127.0.0.1", ports[0])).close()


def test_port_that_drops_packets_times_out() -> None:
    with silent_port(drops=True) as port, pytest.raises(TimeoutError):
        socket.create_connection(("127.0.0.1", port), timeout=0.2)


# --- FaultProxy -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[Database]:
    server = Database()
    server.start()
    server.query("CREATE TABLE seen (n int)")
    yield server
    server.stop()


@pytest.fixture
def proxy(server: Database) -> Iterator[FaultProxy]:
    server.query("TRUNCATE seen")
    with FaultProxy(f"{server.sockets_folder}/.s.PGSQL.{server.port}") as proxy:
        yield proxy


def insert(connection: "psycopg2.extensions.connection", number: int) -> None:
    with connection.cursor() as cursor:
        cursor.execute("INSERT INTO seen VALUES (%s)", (number,))


def connect(proxy: FaultProxy) -> "psycopg2.extensions.connection":
    connection = psycopg2.connect(host="127.0.0.1", port=proxy.port, user="postgres", dbname="postgres")
    connection.autocommit = True
    return connection


def test_statement_held_and_cut_is_done_when_it_is_delivered(server: Database, proxy: FaultProxy) -> None:
    connection = connect(proxy)
    insert(connection, 1)
    proxy.hold()
    late = in_thread(insert, connection, 2)
    wait_until(lambda: proxy.held)
    proxy.cut()
    assert isinstance(late.exception(10), psycopg2.OperationalError)
    insert(connect(proxy), 3)
    assert server.query("SELECT n FROM seen") == [(1,), (3,)]
    proxy.deliver()
    assert server.query("SELECT n FROM seen") == [(1,), (3,), (2,)]


def test_replies_that_are_dropped_leave_the_statement_done(server: Database, proxy: FaultProxy) -> None:
    connection = connect(proxy)
    proxy.drop_replies()
    unanswered = in_thread(insert, connection, 1)
    wait_until(lambda: server.query("SELECT n FROM seen") == [(1,)])
    assert not unanswered.done()
    proxy.cut()
    assert isinstance(unanswered.exception(10), psycopg2.OperationalError)


def test_blackhole_passes_nothing_on_until_it_heals(server: Database, proxy: FaultProxy) -> None:
    connection = connect(proxy)
    proxy.blackhole()
    unanswered = in_thread(insert, connection, 1)
    opening = in_thread(connect, proxy)
    with pytest.raises(TimeoutError):
        opening.result(0.2)
    assert server.query("SELECT n FROM seen") == []
    proxy.heal()
    proxy.cut()
    assert isinstance(unanswered.exception(10), psycopg2.OperationalError)
    assert isinstance(opening.exception(10), psycopg2.OperationalError)
    insert(connect(proxy), 2)
    assert server.query("SELECT n FROM seen") == [(2,)]
