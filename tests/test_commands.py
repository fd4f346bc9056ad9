"""Settings, init-db and `python hello.py`, each as a process of its own."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from datetime import date
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psycopg2
import pytest

import hello
from tests.support.network import LOOPBACK, free_port
from tests.support.postgres import Database
from tests.support.replication import replicated
from tests.support.service import body
from tests.support.wait import in_thread, wait_until

ROOT = Path(__file__).parents[1]


def run_hello(*arguments: str, folder: Path = ROOT, **environment: Any) -> subprocess.CompletedProcess[str]:
    """Run `python hello.py` to its end."""
    command = [sys.executable, "hello.py", *arguments]
    return subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=folder, env=os.environ | environment, timeout=30
    )


@pytest.fixture
def fresh_database(table: Database) -> Iterator[str]:
    """Create an empty database, and drop it afterwards."""
    table.query("CREATE DATABASE fresh")
    yield "fresh"
    table.query("DROP DATABASE fresh WITH (FORCE)")


@pytest.mark.parametrize("zone", ["Mars/Olympus", "Europe", "../etc/passwd", "/etc/localtime", "UTC\n"])
def test_unknown_time_zone_stops_the_start_with_one_line(zone: str) -> None:
    result = run_hello(TZ=zone)
    assert result.returncode == 1
    assert result.stderr.startswith("TZ=")
    assert result.stderr.count("\n") == 1


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


@pytest.mark.parametrize("name", NUMBERS)
def test_unusable_number_stops_the_start_with_one_line(name: str) -> None:
    result = run_hello("init-db", folder=ROOT, **{name: "0"})
    assert result.returncode == 1
    assert result.stderr.startswith(f"{name}='0' must be ")
    assert result.stderr.count("\n") == 1


def test_unknown_command_is_one_line() -> None:
    result = run_hello("initdb")
    assert (result.returncode, result.stderr) == (1, "usage: python hello.py [init-db]\n")


def test_init_db_where_nothing_answers_says_once_what_it_waits_for_and_names_the_database() -> None:
    port = str(free_port())
    result = run_hello("init-db", PGHOST="127.0.0.1", PGPORT=port, PGDATABASE="hello", INIT_TIMEOUT="2.5")
    assert result.returncode == 1
    waiting, ended = result.stderr.splitlines()
    assert waiting.startswith("init-db waits: ")
    assert "Connection refused" in waiting
    assert ended.startswith("init-db: ")
    assert f"PGHOST=127.0.0.1 PGPORT={port} PGDATABASE=hello" in ended


def test_init_db_that_fails_on_rows_quotes_none(table: Database, tmp_path: Path) -> None:
    table.query("INSERT INTO users VALUES ('Zoe', '1990-05-17'), ('Adam', '1990-05-17')")
    for name in ("hello.py", "openapi.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "schema.sql").write_text("CREATE UNIQUE INDEX ON users (date_of_birth)")
    result = run_hello("init-db", folder=tmp_path, INIT_TIMEOUT="0.5")
    assert "could not create unique index" in result.stderr
    assert "1990" not in result.stderr
    assert table.rows() == {"Zoe": date(1990, 5, 17), "Adam": date(1990, 5, 17)}


@pytest.mark.parametrize(
    "hosts",
    ["db1, db2", "db 1", "db1\n", "db1:5432", "[::1]", "postgres://hello:Sesame@db1/hello", "hello:Sesame@db1", "::g"],
)
def test_pghost_that_can_never_be_right_stops_the_start_with_one_line_without_a_password(hosts: str) -> None:
    result = run_hello("init-db", PGHOST=hosts)
    assert result.returncode == 1
    assert result.stderr.startswith("PGHOST must be ")
    assert result.stderr.count("\n") == 1
    assert "Sesame" not in result.stderr


def test_pgport_with_fewer_ports_than_hosts_stops_the_start_with_one_line() -> None:
    result = run_hello("init-db", PGHOST="db1,db2,db3", PGPORT="5432,5433")
    assert (result.returncode, result.stderr) == (1, "PGPORT must be one port or as many as PGHOST has hosts: 3\n")


# --- What would fail for ever -----------------------------------------------------------------------


def fails_at_once(database: str, message: str, **environment: Any) -> None:
    """Check that init-db ends with one line that contains a message."""
    result = run_hello("init-db", PGDATABASE=database, **environment)
    assert result.returncode == 1
    assert result.stderr.startswith("init-db: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
def test_init_db_of_a_database_that_is_not_utf8_is_one_line(table: Database, encoding: str) -> None:
    table.query(f"CREATE DATABASE encoded ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0")
    try:
        fails_at_once("encoded", f"the database's encoding is {encoding}")
    finally:
        table.query("DROP DATABASE encoded WITH (FORCE)")


OTHER_TABLES = {
    "other columns": ("id int, email text", "schema.sql cannot be applied: column"),
    "a column more": ("username text PRIMARY KEY, date_of_birth date NOT NULL, email text NOT NULL", "email"),
    "no primary key": ("username text, date_of_birth date", "ON CONFLICT"),
    "short names": ("username varchar(20) PRIMARY KEY, date_of_birth date", "too long"),
    "a number for a date": (
        "username text PRIMARY KEY, date_of_birth int",
        "schema.sql cannot be applied: invalid input",
    ),
}


@pytest.mark.parametrize(("columns", "message"), OTHER_TABLES.values(), ids=OTHER_TABLES.keys())
def test_init_db_where_another_application_has_a_table_users_is_one_line(
    fresh_database: str, table: Database, columns: str, message: str
) -> None:
    with closing(table.connect(database=fresh_database)) as connection, connection.cursor() as cursor:
        cursor.execute(f"CREATE TABLE users ({columns})")
        fails_at_once(fresh_database, message)


@pytest.mark.parametrize("right", ["INSERT", "UPDATE", "SELECT"])
def test_init_db_of_a_role_without_a_right_is_one_line(fresh_database: str, table: Database, right: str) -> None:
    assert run_hello("init-db", PGDATABASE=fresh_database).returncode == 0
    with closing(table.connect(database=fresh_database)) as connection, connection.cursor() as cursor:
        cursor.execute("CREATE ROLE few")
        cursor.execute("GRANT ALL ON users TO few; GRANT CREATE ON SCHEMA public TO few")
        cursor.execute(f"REVOKE {right} ON users FROM few")
        cursor.execute("CREATE ROLE limited LOGIN IN ROLE few")
        try:
            fails_at_once(fresh_database, "permission denied for table users", PGUSER="limited")
        finally:
            cursor.execute("DROP OWNED BY few; DROP ROLE limited; DROP ROLE few")


def test_init_db_writes_no_row(table: Database) -> None:
    updates = "SELECT n_tup_upd FROM pg_stat_user_tables WHERE relname = 'users'"
    before = table.query(updates)
    assert run_hello("init-db").returncode == 0
    assert table.rows() == {}
    assert table.query(updates) == before


def test_init_db_passes_over_a_standby_that_stands_first(tmp_path: Path) -> None:
    with replicated() as (primary, standby, _):
        hosts: dict[str, Any] = primary.hosts((LOOPBACK, standby.port), (LOOPBACK, primary.port))
        result = run_hello("init-db", **hosts | {"PGUSER": "postgres"})
    assert (result.returncode, result.stderr) == (0, "")


def test_init_db_that_must_wait_for_a_long_reader_lets_no_get_wait(fresh_database: str, table: Database) -> None:
    with closing(table.connect(database=fresh_database)) as connection, connection.cursor() as cursor:
        cursor.execute('CREATE TABLE users (username text COLLATE "C" PRIMARY KEY, date_of_birth date NOT NULL)')
        cursor.execute("BEGIN; SELECT FROM users")
        run = in_thread(lambda: run_hello("init-db", PGDATABASE=fresh_database, INIT_TIMEOUT="4"))
        slowest = 0.0
        with closing(table.connect(database=fresh_database)) as reader, reader.cursor() as reading:
            while not run.done():
                start = time.monotonic()
                reading.execute("SELECT username, date_of_birth FROM users")
                slowest = max(slowest, time.monotonic() - start)
                time.sleep(0.005)
    assert "lock timeout" in run.result().stderr
    assert slowest < 0.25


def test_schema_adds_one_constraint_a_statement_as_citus_demands() -> None:
    statements = (ROOT / "schema.sql").read_text().split(";")
    assert max(statement.count("ADD CONSTRAINT") for statement in statements) == 1


# --- init-db ----------------------------------------------------------------------------------------


def test_init_db_by_several_at_once_creates_the_table(fresh_database: str) -> None:
    runs = [in_thread(lambda: run_hello("init-db", PGDATABASE=fresh_database)) for _ in range(4)]
    assert [run.result(30).stderr for run in runs] == [""] * 4


def test_init_db_again_keeps_the_rows(table: Database) -> None:
    table.query("INSERT INTO users VALUES ('Zoe', '1990-05-17')")
    assert run_hello("init-db").returncode == 0
    assert table.rows() == {"Zoe": date(1990, 5, 17)}


@pytest.mark.parametrize(
    "row",
    ["('', '1990-05-17')", "(E'Zoe\\u0308', '1990-05-17')", "('Zoe', 'infinity')"]
    + ["('Zoe', '10000-01-01')", "('Zoe', '0001-01-01 BC')"],
)
def test_table_of_version_1_gets_constraints_that_keep_out_what_the_service_could_not_read(
    fresh_database: str, table: Database, row: str
) -> None:
    with closing(table.connect(database=fresh_database)) as connection, connection.cursor() as cursor:
        cursor.execute('CREATE TABLE users (username text COLLATE "C" PRIMARY KEY, date_of_birth date NOT NULL)')
        cursor.execute("INSERT INTO users VALUES ('Old', '10000-01-01')")
        assert run_hello("init-db", PGDATABASE=fresh_database).stderr == ""
        with pytest.raises(psycopg2.errors.CheckViolation):
            cursor.execute(f"INSERT INTO users VALUES {row}")


def test_service_runs_on_the_standard_librarys_server(table: Database) -> None:
    port = free_port()
    environment = os.environ | {"PORT": str(port)}
    with subprocess.Popen(
        [sys.executable, "hello.py"], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL
    ) as process:
        client = HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            wait_until(lambda: connects(port))
            client.request("PUT", "/hello/Zoe", body("1990-05-17"))
            assert client.getresponse().status == 204
        finally:
            client.close()
            process.terminate()
    assert table.rows() == {"Zoe": date(1990, 5, 17)}


def connects(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False
