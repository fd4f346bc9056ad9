"""How requests share statements: hello.Batcher, with threads, against a real Postgres.

Each test lets requests wait behind a statement that a lock holds up, and looks at the statements that follow.
"""

import time
from collections.abc import Iterator
from concurrent.futures import Future
from datetime import date
from typing import Any

import pytest
from webtest import TestApp

import hello
from tests.support.postgres import Database
from tests.support.wait import in_thread, wait_until

NAMES = [a + b for a in "ABCDEFGH" for b in "abcd"]
LOCK_WRITES = "LOCK TABLE users IN SHARE MODE"
Statements = list[tuple[str, int, str]]


@pytest.fixture
def app(table: Database) -> TestApp:
    return TestApp(hello.application)


@pytest.fixture
def statements(monkeypatch: pytest.MonkeyPatch) -> Statements:
    """What was sent to Postgres: the operation, how many rows it had, the class of its error."""
    seen: Statements = []
    for batcher in hello.BATCHERS:
        monkeypatch.setattr(batcher, "observe", lambda name, rows, _, error: seen.append((name, rows, kind(error))))
    return seen


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no timeout end a wait that a busy machine makes longer."""
    for name in ("QUEUE_TIMEOUT", "JOIN_SECONDS", "STATEMENT_TIMEOUT", "LOCK_TIMEOUT"):
        monkeypatch.setattr(hello, name, 60)
    monkeypatch.setattr(hello, "DATABASE_TIMEOUT", 300)


@pytest.fixture
def first_put(app: TestApp, table: Database, patient: None) -> Iterator["Future[int]"]:
    """A PUT that waits for a lock in Postgres, on the only connection for writes."""
    with table.locked(LOCK_WRITES):
        future = in_thread(put, app, "First")
        table.wait_for_lock_wait()
        yield future
    assert future.result(30) == 204


def kind(error: Exception | None) -> str:
    return type(error).__name__ if error else ""


def put(app: TestApp, username: str, born: str = "1990-05-17") -> int:
    return int(app.put_json(f"/hello/{username}", {"dateOfBirth": born}, expect_errors=True).status_int)


def wait_for_waiting(batcher: hello.Batcher, count: int) -> None:
    """Wait until so many requests wait for a connection."""
    wait_until(lambda: batcher.waiting_requests() == count)


def results(futures: "list[Future[Any]]") -> list[Any]:
    return [future.result(30) for future in futures]


def test_request_alone_is_sent_at_once(app: TestApp, table: Database, statements: Statements) -> None:
    assert put(app, "Zoe") == 204
    app.get("/hello/Zoe", status=200)
    assert statements == [("save", 1, ""), ("find", 1, "")]
    assert table.rows() == {"Zoe": date(1990, 5, 17)}


@pytest.mark.usefixtures("patient")
def test_puts_that_wait_share_one_statement(app: TestApp, table: Database, statements: Statements) -> None:
    with table.locked(LOCK_WRITES):
        first = in_thread(put, app, "First")
        table.wait_for_lock_wait()
        others = [in_thread(put, app, name) for name in NAMES]
        wait_for_waiting(hello.save_date_of_birth, len(NAMES))
    assert results([first, *others]) == [204] * 33
    assert statements == [("save", 1, ""), ("save", len(NAMES), "")]
    assert table.rows() == dict.fromkeys(["First", *NAMES], date(1990, 5, 17))


@pytest.mark.usefixtures("patient")
def test_gets_that_wait_share_one_statement_and_each_has_its_own_answer(
    table: Database, statements: Statements
) -> None:
    for index, name in enumerate(NAMES):
        table.query("INSERT INTO users VALUES (%s, %s)", name, date(1990, 1, 1 + index % 28))
    with table.locked("LOCK TABLE users"):
        first = in_thread(hello.find_date_of_birth, "Nobody")
        table.wait_for_lock_wait()
        others = {name: in_thread(hello.find_date_of_birth, name) for name in [*NAMES, "Noone"]}
        wait_for_waiting(hello.find_date_of_birth, len(others))
    assert first.result(30) is None
    assert {name: future.result(30) for name, future in others.items()} == table.rows() | {"Noone": None}
    assert statements == [("find", 1, ""), ("find", len(others), "")]


def test_batch_holds_batch_size_at_most(
    app: TestApp, table: Database, statements: Statements, monkeypatch: pytest.MonkeyPatch, first_put: "Future[int]"
) -> None:
    monkeypatch.setattr(hello, "BATCH_SIZE", 10)
    others = [in_thread(put, app, name) for name in NAMES]
    wait_for_waiting(hello.save_date_of_birth, len(NAMES))
    table.query(
        "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE mode = 'ShareLock' AND relation = 'users'::regclass"
    )
    assert results(others) == [204] * len(NAMES)
    assert max(rows for _, rows, _ in statements) == 10
    assert sorted(table.rows()) == sorted(["First", *NAMES])


@pytest.mark.usefixtures("patient")
def test_puts_of_one_user_in_one_batch_store_the_last(app: TestApp, table: Database, statements: Statements) -> None:
    with table.locked(LOCK_WRITES):
        puts = [in_thread(put, app, "First")]
        table.wait_for_lock_wait()
        for count in range(1, 6):
            puts.append(in_thread(put, app, "Zoe", f"1990-01-0{count}"))
            wait_for_waiting(hello.save_date_of_birth, count)
    assert results(puts) == [204] * 6
    assert [rows for _, rows, _ in statements] == [1, 5]
    assert table.rows()["Zoe"] == date(1990, 1, 5)


@pytest.mark.usefixtures("patient")
def test_batches_in_two_orders_do_not_deadlock(table: Database) -> None:
    rows = [(chr(0x4E00 + number), date(1990, 5, 17)) for number in range(500)]  # so many that the statements overlap
    connections = [hello.connect(time.monotonic() + 5) for _ in range(2)]

    def save_again_and_again(connection: hello.Connection, batch: list[tuple[str, date]]) -> None:
        for _ in range(20):
            hello.save(connection, dict(batch), time.monotonic() + 30)

    runs = [in_thread(save_again_and_again, *pair) for pair in zip(connections, (rows, rows[::-1]), strict=True)]
    results(runs)
    for connection in connections:
        connection.close()
    assert len(table.rows()) == len(rows)


def test_put_of_a_locked_row_is_503_and_the_rest_of_its_batch_204(
    app: TestApp, table: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hello, "STATEMENT_TIMEOUT", 0.3)
    monkeypatch.setattr(hello, "DATABASE_TIMEOUT", 30)
    monkeypatch.setattr(hello, "QUEUE_TIMEOUT", 30)
    table.query("INSERT INTO users VALUES ('Locked', '1990-01-01')")
    with table.locked("SELECT FROM users WHERE username = 'Locked' FOR UPDATE"):
        puts = [in_thread(put, app, "Locked")]
        table.wait_for_lock_wait()
        puts += [in_thread(put, app, name) for name in ("Adam", "Locked", "Zoe")]
        assert results(puts) == [503, 204, 503, 204]
    assert table.rows() == {"Locked": date(1990, 1, 1), "Adam": date(1990, 5, 17), "Zoe": date(1990, 5, 17)}


def test_batch_whose_rows_are_all_locked_is_503_before_its_deadline_on_the_same_connection(
    app: TestApp, table: Database, statements: Statements, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hello, "LOCK_TIMEOUT", 0.3)
    monkeypatch.setattr(hello, "DATABASE_TIMEOUT", 1.45)  # a fifth wait would reach it
    for name in NAMES:
        table.query("INSERT INTO users VALUES (%s, '1990-01-01')", name)
    with table.locked("SELECT FROM users FOR UPDATE"):
        with hello.WRITE_POOL.slot(timeout=10):  # so that the requests share a batch
            puts = [in_thread(put, app, name) for name in NAMES]
            wait_for_waiting(hello.save_date_of_birth, len(NAMES))
        assert results(puts) == [503] * len(NAMES)
    assert {error for _, _, error in statements} == {"LockNotAvailable"}


@pytest.mark.usefixtures("patient")
def test_error_of_one_row_fails_that_row_only(table: Database, statements: Statements) -> None:
    table.query("ALTER TABLE users DROP CONSTRAINT users_date_of_birth_has_four_digits")
    table.query("INSERT INTO users VALUES ('Zoe', '1990-05-17'), ('Late', '10000-01-01')")
    try:
        with table.locked("LOCK TABLE users"):
            first = in_thread(hello.find_date_of_birth, "Zoe")
            table.wait_for_lock_wait()
            others = [in_thread(hello.find_date_of_birth, name) for name in ("Late", "Zoe")]
            wait_for_waiting(hello.find_date_of_birth, 2)
        assert [future.result(30) for future in (first, others[1])] == [date(1990, 5, 17)] * 2
        with pytest.raises(hello.HTTPError):
            others[0].result(30)
    finally:
        table.query("TRUNCATE users")
        table.query(
            "ALTER TABLE users ADD CONSTRAINT users_date_of_birth_has_four_digits"
            " CHECK (date_of_birth BETWEEN '0001-01-01' AND '9999-12-31')"
        )
    assert statements[:2] == [("find", 1, ""), ("find", 2, "UnreadableRow")]
    assert sorted(statements[2:]) == [("find", 1, ""), ("find", 1, "UnreadableRow")]


@pytest.mark.usefixtures("patient")
def test_error_that_no_row_causes_fails_the_batch_after_one_statement(
    app: TestApp, table: Database, statements: Statements
) -> None:
    table.query("ALTER TABLE users RENAME TO people")
    with hello.WRITE_POOL.slot(timeout=10):  # so that the requests must wait for it
        puts = [in_thread(put, app, name) for name in NAMES]
        wait_for_waiting(hello.save_date_of_birth, len(NAMES))
    assert results(puts) == [503] * len(NAMES)
    table.query("ALTER TABLE people RENAME TO users")
    assert statements == [("save", len(NAMES), "UndefinedTable")]


def test_request_that_waits_too_long_for_a_connection_is_503(
    app: TestApp, table: Database, monkeypatch: pytest.MonkeyPatch, first_put: "Future[int]"
) -> None:
    monkeypatch.setattr(hello, "QUEUE_TIMEOUT", 0.2)
    start = time.monotonic()
    assert put(app, "Second") == 503
    assert 0.2 <= time.monotonic() - start < 2
    assert table.rows() == {}


def test_request_that_joins_a_waiting_batch_late_does_not_give_up_with_it(
    app: TestApp, table: Database, monkeypatch: pytest.MonkeyPatch, first_put: "Future[int]"
) -> None:
    monkeypatch.setattr(hello, "QUEUE_TIMEOUT", 1)
    monkeypatch.setattr(hello, "JOIN_SECONDS", 0.25)
    second = in_thread(put, app, "Second")
    wait_for_waiting(hello.save_date_of_birth, 1)
    wait_until(lambda: time.monotonic() - hello.save_date_of_birth.waiting[0].began > 0.5)
    start = time.monotonic()
    assert put(app, "Third") == 503
    assert time.monotonic() - start >= 0.9
    assert second.result(30) == 503
    assert table.rows() == {}
