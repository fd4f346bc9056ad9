"""How hello.py uses Postgres: what is sent, how often, to which server, and what a 204 is worth."""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from psycopg2 import errors, extensions
from webtest import TestApp

import hello
from tests.support.fault_proxy import FaultProxy
from tests.support.network import free_port
from tests.support.postgres import Database
from tests.support.wait import in_thread, wait_until

CONTENT = b'{"dateOfBirth": "1990-05-17"}'


def disconnect() -> None:
    """Close the idle connections of hello.py."""
    for pool in hello.POOLS:
        for _ in range(pool.size):
            with pool.slot(timeout=10) as slot:
                if slot.connection:
                    slot.connection.close()
                slot.connection = None


@pytest.fixture
def app(table: Database) -> Iterator[TestApp]:
    """The application, with new connections for this test."""
    disconnect()
    yield TestApp(hello.application)
    disconnect()


@pytest.fixture
def proxy(app: TestApp, table: Database, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy in front of the database that the application uses, with connections open through it."""
    with FaultProxy(table.port) as proxy:
        monkeypatch.setenv("PGHOST", "127.0.0.1")
        monkeypatch.setenv("PGPORT", str(proxy.port))
        assert put(app, "Zoe", "1990-01-01") == 204
        app.get("/hello/Zoe", status=200)
        yield proxy
        disconnect()


def put(app: TestApp, username: str, born: str = "1990-05-17") -> int:
    return int(app.put_json(f"/hello/{quote(username)}", {"dateOfBirth": born}, expect_errors=True).status_int)


def get(app: TestApp, username: str) -> int:
    return int(app.get(f"/hello/{quote(username)}", expect_errors=True).status_int)


def idle_connection(pool: hello.Pool) -> hello.Connection:
    """Return a pool's idle connection, which stays in its place."""
    with pool.slot(timeout=10) as slot:
        assert slot.connection is not None
        return slot.connection


def timed(call: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    start = time.monotonic()
    return call(*arguments), time.monotonic() - start


# --- A write is sent once, and a late one undoes itself ---------------------------------------------


@pytest.mark.parametrize("delay", [0.1, 1.2])  # shorter and longer than DATABASE_TIMEOUT
def test_put_that_reaches_postgres_late_does_not_overwrite_one_acknowledged_after_it_was_answered(
    app: TestApp, table: Database, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, delay: float
) -> None:
    monkeypatch.setattr(hello, "DATABASE_TIMEOUT", 1)
    proxy.hold()
    first = in_thread(put, app, "Zoe", "1991-01-01")
    wait_until(lambda: proxy.held)
    proxy.cut()
    is_late = threading.Timer(delay, lambda: None)
    is_late.start()
    assert first.result(10) == 503
    assert put(app, "Zoe", "1992-01-01") == 204
    is_late.join()
    proxy.deliver()
    assert table.rows() == {"Zoe": date(1992, 1, 1)}


def test_put_whose_reply_is_lost_is_503_and_is_not_sent_again(
    app: TestApp, table: Database, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hello, "CONNECT_TIMEOUT", 0.2)  # so that there is time for another attempt
    monkeypatch.setattr(hello, "DATABASE_TIMEOUT", 2)
    with counted_writes(table) as writes:
        with table.set(synchronous_standby_names="absent"):
            first = in_thread(put, app, "Adam")
            wait_until(lambda: table.query("SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'"))
            proxy.drop_replies()
        wait_until(lambda: "Adam" in table.rows())
        proxy.drops_replies = False  # on later connections
        proxy.cut()
        assert first.result(10) == 503
        assert writes() == 1


@contextlib.contextmanager
def counted_writes(table: Database, level: str = "NOTICE") -> Iterator[Callable[[], int]]:
    """Count the rows that statements write to the table, and undo that afterwards."""
    table.query("CREATE SEQUENCE writes")
    table.query(
        "CREATE FUNCTION count_write() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$BEGIN PERFORM nextval('writes'); RAISE {level} 'counted'; RETURN NEW; END$$"
    )
    table.query("CREATE TRIGGER count_write BEFORE INSERT ON users FOR EACH ROW EXECUTE FUNCTION count_write()")
    try:
        yield lambda: int(table.query("SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM writes")[0][0])
    finally:
        table.query("DROP TRIGGER count_write ON users")
        table.query("DROP FUNCTION count_write")
        table.query("DROP SEQUENCE writes")


@pytest.mark.parametrize(("timeout", "expected"), [(10, 204), (1, 503)], ids=["resumed in time", "resumed too late"])
def test_put_of_a_frozen_backend_does_not_overwrite_one_acknowledged_after_it_was_answered(
    app: TestApp, table: Database, monkeypatch: pytest.MonkeyPatch, timeout: int, expected: int
) -> None:
    monkeypatch.setattr(hello, "DATABASE_TIMEOUT", timeout)
    assert put(app, "Zoe", "1990-01-01") == 204
    pid = idle_connection(hello.WRITE_POOL).psycopg.info.backend_pid
    os.kill(pid, signal.SIGSTOP)
    try:
        first = in_thread(put, app, "Zoe", "1991-01-01")
        time.sleep(0.3)  # until it is sent
        if expected == 503:
            first.result(10)
    finally:
        os.kill(pid, signal.SIGCONT)
    status = first.result(10)
    assert put(app, "Zoe", "1992-01-01") == 204
    wait_until(lambda: status == 204 or not table.query("SELECT pid FROM pg_stat_activity WHERE pid = %s", pid))
    assert status == expected
    assert table.rows() == {"Zoe": date(1992, 1, 1)}


@pytest.mark.parametrize(
    ("lock", "zoe"),
    [
        ("SELECT FROM users WHERE username = 'Zoe' FOR UPDATE", {"Zoe": date(1990, 1, 1)}),
        ("DELETE FROM users; COMMIT; BEGIN; INSERT INTO users VALUES ('Zoe', '1980-01-01')", {}),  # is rolled back
    ],
    ids=["known user", "new user"],
)
def test_put_whose_wait_for_a_lock_ends_after_its_deadline_writes_nothing(
    app: TestApp, table: Database, monkeypatch: pytest.MonkeyPatch, lock: str, zoe: dict[str, date]
) -> None:
    monkeypatch.setattr(hello, "STATEMENT_TIMEOUT", 30)
    monkeypatch.setattr(hello, "LOCK_TIMEOUT", 30)
    monkeypatch.setattr(hello, "DATABASE_TIMEOUT", 0.5)
    table.query("INSERT INTO users VALUES ('Zoe', '1990-01-01')")
    with table.locked(lock):
        assert put(app, "Zoe", "1991-01-01") == 503
        assert put(app, "Adam") == 204
    wait_until(lambda: not table.query("SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))
    assert table.rows() == {**zoe, "Adam": date(1990, 5, 17)}


@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_connection_that_died_while_idle_is_replaced_unnoticed(app: TestApp, table: Database, method: str) -> None:
    assert (put(app, "Zoe"), get(app, "Zoe")) == (204, 200)
    table.query("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = 'hello'")
    if method == "GET":
        assert get(app, "Zoe") == 200
    else:
        assert put(app, "Zoe", "1980-01-01") == 204
        assert table.rows() == {"Zoe": date(1980, 1, 1)}


def test_get_whose_connection_is_cut_in_flight_is_503_at_once(app: TestApp, proxy: FaultProxy) -> None:
    proxy.hold()
    first = in_thread(timed, get, app, "Zoe")
    wait_until(lambda: proxy.held)
    proxy.cut()
    status, seconds = first.result(10)
    assert status == 503
    assert seconds < hello.DATABASE_TIMEOUT
    assert get(app, "Zoe") == 200


# --- A COMMIT that is lost --------------------------------------------------------------------------


@contextlib.contextmanager
def held_commit(app: TestApp, table: Database, proxy: FaultProxy) -> Iterator["Future[tuple[int, float]]"]:
    """Let Postgres run the statement of a PUT of Zoe, and hold its COMMIT back in the network."""
    with table.locked("SELECT FROM users WHERE username = 'Zoe' FOR UPDATE"):
        first = in_thread(timed, put, app, "Zoe", "1991-01-01")
        table.wait_for_lock_wait()
        proxy.hold()
    wait_until(lambda: proxy.held)
    yield first


@pytest.fixture
def patient_with_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hello, "LOCK_TIMEOUT", 1)
    monkeypatch.setattr(hello, "DATABASE_TIMEOUT", 1)


@pytest.mark.usefixtures("patient_with_locks")
def test_put_whose_commit_is_lost_is_503_when_postgres_has_ended_its_transaction(
    app: TestApp, table: Database, proxy: FaultProxy
) -> None:
    with held_commit(app, table, proxy) as first:
        proxy.cut()
        status, seconds = first.result(10)
        assert status == 503
        assert seconds > 0.9
        assert put(app, "Zoe", "1992-01-01") == 204
        proxy.deliver()
    assert table.rows() == {"Zoe": date(1992, 1, 1)}


@pytest.mark.usefixtures("patient_with_locks")
def test_put_whose_commit_is_delayed_keeps_its_row_locked_until_it_is_undone(
    app: TestApp, table: Database, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    with held_commit(app, table, proxy) as first:
        proxy.cut()
        monkeypatch.setattr(hello, "LOCK_TIMEOUT", 0.05)
        with hello.WRITE_POOL.slot(timeout=10) as slot, pytest.raises(errors.LockNotAvailable):
            hello.save(slot.ready(time.monotonic() + 5), {"Zoe": date(1992, 1, 1)}, time.monotonic() + 5)
        assert first.result(10)[0] == 503
    assert table.rows() == {"Zoe": date(1990, 1, 1)}


@pytest.mark.usefixtures("patient_with_locks")
def test_put_whose_commit_is_not_answered_is_503_in_time(app: TestApp, table: Database, proxy: FaultProxy) -> None:
    with held_commit(app, table, proxy) as first:
        status, seconds = first.result(10)
    assert status == 503
    assert seconds < 1 + 0.75  # the transaction began before the lock was released
    assert table.rows() == {"Zoe": date(1990, 1, 1)}


@pytest.mark.parametrize("error", ["check_violation", "serialization_failure"])
def test_commit_that_is_refused_is_503_at_once_and_the_connection_is_kept(
    app: TestApp, table: Database, error: str
) -> None:
    table.query(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN"
        f" RAISE EXCEPTION 'no' USING ERRCODE = '{error}'; END$$;"
        "CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON users DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW WHEN (NEW.username = 'Eve') EXECUTE FUNCTION refuse()"
    )
    try:
        assert put(app, "Zoe") == 204
        pid = idle_connection(hello.WRITE_POOL).psycopg.info.backend_pid
        status, seconds = timed(put, app, "Eve")
        assert (status, seconds < 0.9) == (503, True)
        assert put(app, "Adam") == 204
        assert idle_connection(hello.WRITE_POOL).psycopg.info.backend_pid == pid
    finally:
        table.query("DROP TRIGGER refuse ON users; DROP FUNCTION refuse")
    assert sorted(table.rows()) == ["Adam", "Zoe"]


def test_read_cannot_write(table: Database) -> None:
    with hello.READ_POOL.slot(timeout=10) as slot:
        connection = slot.ready(time.monotonic() + 5)
        with pytest.raises(errors.ReadOnlySqlTransaction):
            hello.read(connection, "DELETE FROM users WHERE username = %s", ("Zoe",), time.monotonic() + 5)


# --- Messages of Postgres ---------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["NOTICE", "WARNING"])
def test_message_of_a_trigger_is_no_failure(app: TestApp, table: Database, level: str) -> None:
    with counted_writes(table, level) as writes:
        assert put(app, "Zoe") == 204
        assert writes() == 1
    assert table.rows() == {"Zoe": date(1990, 5, 17)}


def test_warning_at_the_login_is_no_failure(app: TestApp, table: Database) -> None:
    table.query("CREATE FUNCTION warn() RETURNS event_trigger LANGUAGE plpgsql AS $$BEGIN RAISE WARNING 'a'; END$$")
    table.query("CREATE EVENT TRIGGER warn ON login EXECUTE FUNCTION warn()")
    try:
        assert (put(app, "Zoe"), put(app, "Adam")) == (204, 204)
    finally:
        table.query("DROP EVENT TRIGGER warn")
        table.query("DROP FUNCTION warn")
    assert sorted(table.rows()) == ["Adam", "Zoe"]


@pytest.mark.parametrize(
    "role_setting", ["client_min_messages = warning", "client_min_messages = error", "lc_messages = 'C'"]
)
def test_warning_of_the_commit_is_503(app: TestApp, table: Database, role_setting: str) -> None:
    waiting = "FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
    table.query(f"ALTER ROLE postgres SET {role_setting}")
    try:
        with table.set(synchronous_standby_names="absent"):
            first = in_thread(timed, put, app, "Zoe")
            wait_until(lambda: table.query(f"SELECT pg_cancel_backend(pid) {waiting}"))
            status, seconds = first.result(10)
    finally:
        table.query(f"ALTER ROLE postgres RESET {role_setting.partition(' ')[0]}")
    assert status == 503
    assert seconds < 2.5  # and not DATABASE_TIMEOUT, which is 3 s
    assert table.rows() == {"Zoe": date(1990, 5, 17)}  # on one server, without its standby


def test_standby_that_is_missing_costs_one_connection_and_puts_are_503_until_it_is_back(
    app: TestApp, table: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hello, "DATABASE_TIMEOUT", 0.3)
    monkeypatch.setattr(hello, "CONNECT_TIMEOUT", 0.3)
    sessions = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'hello'"
    with table.set(synchronous_standby_names="absent"):
        name = first_refused(app)
        wait_until(lambda: waiting_commits(table))
        assert [put(app, "Adam") for _ in range(5)] == [503] * 5
        assert get(app, name) == 404  # its commit is not visible yet
        assert table.query(sessions)[0][0] <= 3
    wait_until(lambda: put(app, "Adam") == 204)
    saved = [name[:length] for length in range(len("Zoe"), len(name) + 1)]
    assert sorted(table.rows()) == ["Adam", *saved]


def first_refused(app: TestApp) -> str:
    """Save Zoe, Zoex and so on until one is refused: commits wait once Postgres' checkpointer has read the setting."""
    name = "Zoe"
    while put(app, name) == 204:
        name += "x"
    return name


def waiting_commits(table: Database) -> int:
    """Return how many commits wait for a standby for longer than DATABASE_TIMEOUT."""
    with contextlib.closing(table.connect()) as connection, connection.cursor() as cursor:
        cursor.execute(hello.ABOUT_SERVER, (hello.DATABASE_TIMEOUT,))
        return int(cursor.fetchone()[1])


# --- Errors of class 08 -----------------------------------------------------------------------------


@pytest.fixture
def lost_node(table: Database) -> Iterator[None]:
    """Let each write of the user Lost fail as Citus lets it fail whose worker node is away."""
    table.query(
        "CREATE FUNCTION lose_node() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN"
        " IF NEW.username = 'Lost' THEN RAISE EXCEPTION 'node is away' USING ERRCODE = '08006'; END IF;"
        " RETURN NEW; END$$"
    )
    table.query("CREATE TRIGGER lose_node BEFORE INSERT ON users FOR EACH ROW EXECUTE FUNCTION lose_node()")
    yield
    table.query("DROP TRIGGER lose_node ON users; DROP FUNCTION lose_node")


@pytest.mark.usefixtures("lost_node")
def test_put_whose_node_of_citus_is_away_is_503_at_once_and_others_204_on_the_same_connection(
    app: TestApp, table: Database
) -> None:
    assert put(app, "Zoe") == 204
    pid = idle_connection(hello.WRITE_POOL).psycopg.info.backend_pid
    with hello.WRITE_POOL.slot(timeout=10):  # so that the requests share a statement
        puts = [in_thread(timed, put, app, name) for name in ("Adam", "Lost", "Nora")]
        wait_until(lambda: hello.save_date_of_birth.waiting_requests() == len(puts))
    answers = [call.result(10) for call in puts]
    assert [status for status, _ in answers] == [204, 503, 204]
    assert max(seconds for _, seconds in answers) < hello.DATABASE_TIMEOUT
    assert idle_connection(hello.WRITE_POOL).psycopg.info.backend_pid == pid
    assert sorted(table.rows()) == ["Adam", "Nora", "Zoe"]


# --- Sessions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_locked_table_is_503_with_retry_after(
    app: TestApp, table: Database, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(hello, "STATEMENT_TIMEOUT", 0.2)
    with table.locked("LOCK TABLE users"):
        response = app.request("/hello/Zoe", method=method, body=CONTENT if method == "PUT" else b"", status=503)
    assert "try again" in response.json["message"]
    assert response.headers["Retry-After"] == "1"
    assert table.rows() == {}


def test_read_only_database_refuses_put_and_serves_get(app: TestApp, table: Database) -> None:
    assert put(app, "Zoe") == 204
    with table.set(default_transaction_read_only="on"):
        assert put(app, "Adam") == 503
        assert get(app, "Zoe") == 200
    wait_until(lambda: put(app, "Adam") == 204)
    assert sorted(table.rows()) == ["Adam", "Zoe"]


def test_client_encoding_of_the_environment_does_not_matter(
    app: TestApp, table: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    assert put(app, "名前") == 204
    monkeypatch.delenv("PGCLIENTENCODING")
    assert list(table.rows()) == ["名前"]


def test_statements_leave_nothing_behind_in_the_session(app: TestApp, table: Database) -> None:
    assert (put(app, "Zoe"), get(app, "Zoe")) == (204, 200)
    names = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout", "client_min_messages")
    settings = ", ".join(f"current_setting('{name}')" for name in names)
    left = f"SELECT {settings}, (SELECT count(*) FROM pg_prepared_statements)"
    for pool in hello.POOLS:
        connection = idle_connection(pool)
        assert connection.execute(left, time.monotonic() + 10) == [("0", "0", "0", "notice", 0)]
        assert connection.psycopg.info.transaction_status == extensions.TRANSACTION_STATUS_IDLE


@pytest.fixture
def pgbouncer(table: Database) -> Iterator[int]:
    """The port of a PgBouncer in transaction mode."""
    program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.skip("PgBouncer is not installed: on Debian, apt-get install pgbouncer")
    port, folder = free_port(), Path(tempfile.mkdtemp(prefix="hello-"))
    folder.chmod(0o755)  # PgBouncer does not run as root
    (folder / "pgbouncer.ini").write_text(
        f"[databases]\npostgres = host=127.0.0.1 port={table.port} user=postgres\n"
        f"[pgbouncer]\nauth_type = any\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
        "pool_mode = transaction\ndefault_pool_size = 2\n"
    )
    user = ["-u", "nobody"] if os.geteuid() == 0 else []
    with subprocess.Popen([program, *user, folder / "pgbouncer.ini"]) as process:
        yield port
        process.terminate()
    shutil.rmtree(folder)


def test_pgbouncer_in_transaction_mode_serves_put_and_get(
    app: TestApp, table: Database, monkeypatch: pytest.MonkeyPatch, pgbouncer: int
) -> None:
    monkeypatch.setenv("PGHOST", "127.0.0.1")
    monkeypatch.setenv("PGPORT", str(pgbouncer))
    wait_until(lambda: put(app, "Zoe") == 204)
    puts = [in_thread(put, app, name) for name in ("Adam", "Eve", "Kim")]
    assert [call.result(30) for call in puts] == [204] * 3
    assert get(app, "Zoe") == 200
    disconnect()
    assert sorted(table.rows()) == ["Adam", "Eve", "Kim", "Zoe"]


def test_put_whose_connection_is_lost_behind_pgbouncer_is_503_and_writes_nothing(
    app: TestApp, table: Database, monkeypatch: pytest.MonkeyPatch, pgbouncer: int
) -> None:
    monkeypatch.setenv("PGHOST", "127.0.0.1")
    monkeypatch.setenv("PGPORT", str(pgbouncer))
    monkeypatch.setattr(hello, "LOCK_TIMEOUT", 1)
    monkeypatch.setattr(hello, "DATABASE_TIMEOUT", 1)
    wait_until(lambda: put(app, "Zoe") == 204)
    failures: list[str] = []
    monkeypatch.setattr(hello.save_date_of_birth, "observe", lambda *seen: failures.append(type(seen[-1]).__name__))
    with table.locked("SELECT FROM users FOR UPDATE"):
        first = in_thread(timed, put, app, "Zoe", "1991-01-01")
        table.wait_for_lock_wait()
        table.query("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
        status, seconds = first.result(10)
    assert status == 503
    assert seconds < 1
    assert failures == ["LostConnection"]
    assert table.rows() == {"Zoe": date(1990, 5, 17)}
    assert put(app, "Zoe", "1992-01-01") == 204
