"""Settings, init-db and `python hello.py`."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import date
from pathlib import Path
from typing import Any

import psycopg2
import pytest

import hello
from tests.support.network import LOOPBACK, exchange, free_port
from tests.support.postgres import RIGHTS, Database
from tests.support.replication import replicated
from tests.support.service import body
from tests.support.wait import in_thread, wait_until

ROOT = Path(__file__).parents[1]
RIGHT_HOSTS = "one or more host names or addresses, with commas between them and no port or URL"


def run_hello(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python hello.py` to its end."""
    command = [sys.executable, "hello.py", *arguments]
    return subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=ROOT, env=os.environ | environment, timeout=30
    )


def failure_of_init_db() -> str:
    """Run init-db in this process, with the environment of now; return the line that it ends with."""
    with pytest.raises(SystemExit) as stopped:
        hello.init_db()
    line = str(stopped.value)
    assert line.startswith("init-db: ")
    assert "\n" not in line
    return line


@pytest.fixture(scope="module")
def empty_database(database: dict[str, str], postgres: Database) -> Iterator[None]:
    """Create a database, and drop it afterwards."""
    postgres.query("CREATE DATABASE fresh")
    yield
    postgres.query("DROP DATABASE fresh WITH (FORCE)")


@pytest.fixture
def fresh(empty_database: None, postgres: Database, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A cursor in a database without the table; init-db uses this database."""
    monkeypatch.setenv("PGDATABASE", "fresh")
    with closing(postgres.connect(database="fresh")) as connection, connection.cursor() as cursor:
        cursor.execute("DROP TABLE IF EXISTS users")
        yield cursor


# --- Settings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("zone", ["Mars/Olympus", "Europe", "../etc/passwd", "/etc/localtime", "UTC\n"])
def test_unknown_time_zone_is_one_line_that_names_the_setting(monkeypatch: pytest.MonkeyPatch, zone: str) -> None:
    monkeypatch.setenv("TZ", zone)
    with pytest.raises(SystemExit) as stopped:
        hello.time_zone("TZ", "UTC", hello.SETTINGS["TZ"].meaning)
    assert str(stopped.value) == f"TZ={zone!r} must be an IANA time zone such as Europe/Berlin; the default is UTC"


NUMBERS = [name for name, declared in hello.SETTINGS.items() if declared.minimum is not None]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["many", "-1", "0", "nan", "inf", "1e", "10000000"])
def test_unusable_number_is_one_line_that_names_the_setting(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stopped:
        hello.number(*hello.SETTINGS[name])  # type: ignore[arg-type, type-var]
    assert str(stopped.value).startswith(f"{name}={value!r} must be ")
    assert "\n" not in str(stopped.value)


@pytest.mark.parametrize(
    "hosts",
    ["db1, db2", "db 1", "db1\n", "db1:5432", "[::1]", "postgres://hello:Sesame@db1/hello", "hello:Sesame@db1", "::g"],
)
def test_pghost_that_can_never_be_right_is_one_line_without_a_password(
    monkeypatch: pytest.MonkeyPatch, hosts: str
) -> None:
    monkeypatch.setenv("PGHOST", hosts)
    with pytest.raises(SystemExit) as stopped:
        hello.check_hosts()
    assert str(stopped.value) == f"PGHOST must be {RIGHT_HOSTS}"


def test_pgport_with_fewer_ports_than_hosts_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGHOST", "db1,db2,db3")
    monkeypatch.setenv("PGPORT", "5432,5433")
    with pytest.raises(SystemExit, match=r"^PGPORT must be one port or as many as PGHOST has hosts: 3\Z"):
        hello.check_hosts()


@pytest.mark.parametrize(
    ("command", "name", "value", "line"),
    [
        ("initdb", "TZ", "UTC", "usage: python hello.py [init-db]"),
        ("init-db", "BATCH_SIZE", "0", "BATCH_SIZE='0' must be an integer from 1 to 1000000; the default is 100"),
        ("init-db", "PGHOST", "db 1", f"PGHOST must be {RIGHT_HOSTS}"),
    ],
)
def test_what_is_wrong_stops_the_start_with_one_line(command: str, name: str, value: str, line: str) -> None:
    done = run_hello(command, **{name: value})
    assert (done.returncode, done.stderr) == (1, f"{line}\n")


# --- What would fail for ever -----------------------------------------------------------------------


def test_init_db_where_nothing_answers_says_once_what_it_waits_for_and_names_the_database(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    for name, value in {"PGHOST": LOOPBACK, "PGPORT": str(port), "PGDATABASE": "hello"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(hello, "INIT_TIMEOUT", 2)  # it gives up a second before
    monkeypatch.setattr(hello, "sleep", lambda seconds: time.sleep(0.05))
    line = failure_of_init_db()
    assert f"PGHOST=127.0.0.1 PGPORT={port} PGDATABASE=hello" in line
    [waiting] = capsys.readouterr().err.splitlines()
    assert waiting.startswith("init-db waits: ")
    assert "Connection refused" in waiting


def test_init_db_that_fails_on_rows_quotes_none(
    table: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table.query("INSERT INTO users VALUES ('Zoe', '1990-05-17'), ('Adam', '1990-05-17')")
    schema = tmp_path / "schema.sql"
    schema.write_text("CREATE UNIQUE INDEX ON users (date_of_birth)")
    monkeypatch.setattr(hello, "SCHEMA", schema)
    monkeypatch.setattr(hello, "INIT_TIMEOUT", 0.5)
    line = failure_of_init_db()
    assert "could not create unique index" in line
    assert "1990" not in line
    assert table.rows() == {"Zoe": date(1990, 5, 17), "Adam": date(1990, 5, 17)}


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
def test_init_db_of_a_database_that_is_not_utf8_is_one_line(
    table: Database, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    table.query(f"CREATE DATABASE encoded ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0")
    monkeypatch.setenv("PGDATABASE", "encoded")
    try:
        assert f"the database's encoding is {encoding}" in failure_of_init_db()
    finally:
        table.query("DROP DATABASE encoded WITH (FORCE)")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("id int, email text", "schema.sql cannot be applied: column"),
        ("username text PRIMARY KEY, date_of_birth date NOT NULL, email text NOT NULL", "email"),
        ("username text, date_of_birth date", "ON CONFLICT"),
        ("username varchar(20) PRIMARY KEY, date_of_birth date", "too long"),
        ("username text PRIMARY KEY, date_of_birth int", "schema.sql cannot be applied: invalid input"),
    ],
)
def test_init_db_where_another_application_has_a_table_users_is_one_line(
    fresh: Any, columns: str, message: str
) -> None:
    fresh.execute(f"CREATE TABLE users ({columns})")
    assert message in failure_of_init_db()


@pytest.mark.parametrize("right", RIGHTS)
def test_init_db_of_a_role_without_a_right_is_one_line(fresh: Any, monkeypatch: pytest.MonkeyPatch, right: str) -> None:
    hello.init_db()
    fresh.execute("CREATE ROLE few")
    fresh.execute("GRANT ALL ON users TO few; GRANT CREATE ON SCHEMA public TO few")
    fresh.execute(f"REVOKE {right} ON users FROM few")
    fresh.execute("CREATE ROLE limited LOGIN IN ROLE few")
    monkeypatch.setenv("PGUSER", "limited")
    try:
        assert "permission denied for table users" in failure_of_init_db()
    finally:
        fresh.execute("DROP OWNED BY few; DROP ROLE limited; DROP ROLE few")


# --- init-db ----------------------------------------------------------------------------------------


def test_init_db_again_writes_no_row_and_keeps_those_that_there_are(table: Database) -> None:
    table.query("INSERT INTO users VALUES ('Zoe', '1990-05-17')")
    updates = "SELECT n_tup_upd FROM pg_stat_user_tables WHERE relname = 'users'"
    before = table.query(updates)
    done = run_hello("init-db")
    assert (done.returncode, done.stderr) == (0, "")
    assert table.rows() == {"Zoe": date(1990, 5, 17)}
    assert table.query(updates) == before


def test_init_db_passes_over_a_standby_that_stands_first(monkeypatch: pytest.MonkeyPatch) -> None:
    with replicated() as (primary, standby, _):
        hosts = primary.hosts((LOOPBACK, standby.port), (LOOPBACK, primary.port))
        for name, value in (hosts | {"PGUSER": "postgres"}).items():
            monkeypatch.setenv(name, value)
        hello.init_db()


def test_init_db_that_must_wait_for_a_long_reader_lets_no_get_wait(
    fresh: Any, table: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh.execute('CREATE TABLE users (username text COLLATE "C" PRIMARY KEY, date_of_birth date NOT NULL)')
    fresh.execute("BEGIN; SELECT FROM users")
    monkeypatch.setattr(hello, "INIT_TIMEOUT", 2)
    run = in_thread(failure_of_init_db)
    slowest = 0.0
    with closing(table.connect(database="fresh")) as reader, reader.cursor() as reading:
        while not run.done():
            start = time.monotonic()
            reading.execute("SELECT username, date_of_birth FROM users")
            slowest = max(slowest, time.monotonic() - start)
            time.sleep(0.005)
    assert "lock timeout" in run.result()
    assert slowest < 0.25


def test_schema_adds_one_constraint_a_statement_as_citus_demands() -> None:
    statements = (ROOT / "schema.sql").read_text().split(";")
    assert max(statement.count("ADD CONSTRAINT") for statement in statements) == 1


def test_init_db_by_several_at_once_creates_the_table(fresh: Any) -> None:
    runs = [in_thread(run_hello, "init-db") for _ in range(4)]
    assert [run.result(30).stderr for run in runs] == [""] * 4


def test_table_of_version_1_gets_constraints_that_keep_out_what_the_service_could_not_read(fresh: Any) -> None:
    fresh.execute('CREATE TABLE users (username text COLLATE "C" PRIMARY KEY, date_of_birth date NOT NULL)')
    fresh.execute("INSERT INTO users VALUES ('Old', '10000-01-01')")
    hello.init_db()
    unreadable = [("", "1990-05-17"), ("Zoe\u0308", "1990-05-17")]
    unreadable += [("Zoe", born) for born in ("infinity", "10000-01-01", "0001-01-01 BC")]
    for row in unreadable:
        with pytest.raises(psycopg2.errors.CheckViolation):
            fresh.execute("INSERT INTO users VALUES (%s, %s)", row)


def test_service_runs_on_the_standard_librarys_server(table: Database) -> None:
    port = free_port()
    environment = os.environ | {"PORT": str(port)}
    command = [sys.executable, "hello.py"]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: not socket.socket().connect_ex((LOOPBACK, port)))
            request = b"PUT /hello/Zoe HTTP/1.1\r\nContent-Length: 29\r\n\r\n" + body("1990-05-17")
            assert exchange(port, request).startswith(b"HTTP/1.0 204 ")
        finally:
            process.terminate()
    assert table.rows() == {"Zoe": date(1990, 5, 17)}
