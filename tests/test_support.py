"""The helpers that other tests believe: a response with too much in it and a lost write show."""

import socket
from datetime import date
from email.message import Message

import pytest

from tests.support.load import Journal
from tests.support.network import Response, responses, silent_port

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


def test_port_that_drops_packets_times_out() -> None:
    with silent_port(drops=True) as port, pytest.raises(TimeoutError):
        socket.create_connection(("127.0.0.1", port), timeout=0.2)
