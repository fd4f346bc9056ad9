"""Requests that are hidden, pipelined, cut or made up: none is answered 5xx, and each gets its own answer."""

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.load import letters
from tests.support.network import exchange, responses
from tests.support.postgres import Database
from tests.support.raw_requests import CHUNKED, DATE, GET, PUT
from tests.support.service import Service, body
from tests.support.wait import in_thread

SMUGGLED = b"GET /hello/Smuggled HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.fixture(scope="module")
def quick_service(database: Database, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that waits no longer than a second for the rest of a request."""
    bounds = {"HEAD_TIMEOUT": "1", "CONTENT_TIMEOUT": "1", "WEB_CONCURRENCY": "1"}
    with Service(tmp_path_factory.mktemp("quick"), database.service_environment | bounds) as service:
        assert service.put("Smuggled").status == 204
        workers = service.workers()
        yield service
        assert service.workers() == workers


def test_request_hidden_in_a_body_is_not_executed(database: Database, quick_service: Service) -> None:
    inner = b"PUT /hello/Hidden HTTP/1.1\r\nHost: a\r\nContent-Length: 29\r\n\r\n" + DATE
    for method, status in {"PUT": 400, "GET": 200, "HEAD": 200, "POST": 405, "OPTIONS": 204}.items():
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


def test_pipelined_requests_in_pieces_are_answered_in_order_each_with_its_own(
    database: Database, quick_service: Service
) -> None:
    data, users, expected = pipeline(50, "i")
    cuts = sorted(random.Random(1).sample(range(len(data)), 200))
    parts = [data[start:end] for start, end in itertools.pairwise([0, *cuts, len(data)])]
    found = responses(exchange(quick_service.port, *parts, pause=0.001))
    assert [answer.status for answer in found] == [204, 200] * len(users)
    assert [answer.message for answer in found] == expected
    assert database.rows().keys() >= set(users)


def test_clients_on_connections_side_by_side_get_their_own_answers(quick_service: Service) -> None:
    plans = [pipeline(10, f"x{letters(index).capitalize()}") for index in range(8)]
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


def test_request_that_waits_behind_others_of_its_pipeline_is_not_late(
    database: Database, quick_service: Service
) -> None:
    requests = SMUGGLED * 2 + b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"
    with database.locked("LOCK TABLE users"):  # for longer than HEAD_TIMEOUT, which is 1 here
        found = responses(exchange(quick_service.port, requests[:-9], requests[-9:], pause=0.1))
    assert [answer.status for answer in found] == [503, 503, 200]


# --- Fuzz -------------------------------------------------------------------------------------------

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


def test_any_bytes_are_never_5xx(database: Database, quick_service: Service, report: Callable[[str], None]) -> None:
    statuses: Counter[int] = Counter()

    @given(st.sampled_from(SEEDS), MUTATIONS)
    @settings(max_examples=150)
    def check(seed: bytes, mutations: list[tuple[int, int, bytes]]) -> None:
        for index, dropped, piece in mutations:
            seed = seed[:index] + piece + seed[index + dropped :]
        for answer in responses(exchange(quick_service.port, seed)):
            statuses[answer.status] += 1
            assert answer.status < 500 or answer.status in {501, 505}

    check()
    report(f"150 mutated requests, answered {dict(sorted(statuses.items()))}")
    assert statuses[400]
    assert set(statuses) & {200, 204}
