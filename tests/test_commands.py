"""Settings, init-db and `python hello.py`, each as a process of its own."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from datetime import date
from http.client import HTTPConnection
from pathlib import Path

import psycopg2
import pytest

import hello
from tests.support.network import free_port
from tests.support.postgres import Database
from tests.support.service import body
from tests.support.wait import in_thread, wait_until

ROOT = Path(__file__).parents[1]


def run_hello(*arguments: str, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python hello.py` to its end."""
    command = [sys.executable, "hello.py", *arguments]
    return subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=folder, env=os.environ | environment, timeout=30
    )


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


@pytest.fixture
def fresh_database(table: Database) -> Iterator[str]:
    """Create an empty database, and drop it afterwards."""
    table.query("CREATE DATABASE fresh")
    yield "fresh"
    table.query("DROP DATABASE fresh WITH (FORCE)")


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
    where = f"host={table.sockets_folder} port={table.port} user=postgres dbname={fresh_database}"
    with closing(psycopg2.connect(where)) as connection, connection.cursor() as cursor:
        connection.autocommit = True
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
