"""The contract of hello.py: every rule through WebTest or a real gunicorn, against a real Postgres.

Every write is checked through a second connection, `table`.
"""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import quote
from zoneinfo import ZoneInfo

import psutil
import psycopg2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from psycopg2 import extensions
from webtest import TestApp, TestResponse

import hello
from tools import embedded_postgres as embedded
from tools.embedded_postgres import free_port

ROOT = Path(__file__).parent
TODAY = date(2026, 3, 10)
BODY = {"dateOfBirth": "1990-05-17"}
EXPECTED_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


class Patient(extensions.connection):
    """The tests' own connection: hello.wait bounds every connection, this one at an hour."""

    deadline = time.monotonic() + 3600


class Table:
    """The users table, seen through a connection that hello.py knows nothing of."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.connection = psycopg2.connect(
            host=environment["PGHOST"],
            port=environment["PGPORT"],
            user="postgres",
            dbname="postgres",
            connection_factory=Patient,
        )
        self.connection.autocommit = True

    def execute(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        with self.connection.cursor() as cursor:
            cursor.execute(statement, values)
            return cursor.fetchall() if cursor.description else []

    def rows(self) -> dict[str, date]:
        return dict(self.execute("SELECT username, date_of_birth FROM users"))


@pytest.fixture
def table(database: dict[str, str]) -> Iterator[Table]:
    table = Table(database)
    table.execute("TRUNCATE users")
    yield table
    table.connection.close()


@pytest.fixture
def app(table: Table) -> TestApp:
    return TestApp(hello.application)


@pytest.fixture
def on_a_fixed_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hello, "today", lambda: TODAY)


@pytest.fixture
def statements(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, str]]:
    """What was sent to Postgres: the operation, how many rows it had, what went wrong."""
    seen: list[tuple[str, int, str]] = []
    monkeypatch.setattr(hello, "observe", lambda name, rows, _, error: seen.append((name, rows, type(error).__name__)))
    return seen


@pytest.fixture(scope="session")
def server(database: dict[str, str]) -> Iterator[int]:
    """The port of a real gunicorn."""
    port = free_port()
    environment = os.environ | database | {"PORT": str(port), "METRICS_PORT": "0"}
    process = subprocess.Popen(
        [Path(sys.executable).with_name("gunicorn"), "hello:application"], cwd=ROOT, env=environment
    )
    assert embedded.wait_for_port(process, port)
    yield port
    process.terminate()
    process.wait()


@pytest.fixture
def client(server: int, table: Table) -> Iterator[HTTPConnection]:
    """One connection to the real server, kept alive for the whole test."""
    connection = HTTPConnection("127.0.0.1", server, timeout=10)
    connection.connect()
    yield connection
    connection.close()


def path_of(username: str) -> str:
    return f"/hello/{quote(username, safe='')}"


def message(response: TestResponse) -> str:
    """The message of a JSON response, whose headers are checked on the way."""
    assert response.headers["Content-Type"] == "application/json"
    assert response.headers["Content-Length"] == str(len(response.body))
    assert list(response.json) == ["message"]
    assert EXPECTED_HEADERS.items() <= dict(response.headers).items()
    return response.json["message"]


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Run calls at the same time, each in a thread, and return what they returned."""
    results: list[Any] = [None] * len(calls)

    def run(index: int, call: Callable[[], Any]) -> None:
        results[index] = call()

    threads = [threading.Thread(target=run, args=item) for item in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


# --- PUT and GET ------------------------------------------------------------------------------------


def test_database_connection_reaches_a_postgres(app: TestApp, table: Table) -> None:
    assert message(app.get("/readyz", status=200)) == "ready"
    assert hello.find_date_of_birth("Nobody") is None
    applications = table.execute("SELECT DISTINCT application_name FROM pg_stat_activity WHERE datname = 'postgres'")
    assert ("hello",) in applications


def test_valid_put_stores_the_date_and_answers_204_without_content(app: TestApp, table: Table) -> None:
    response = app.put_json("/hello/Zoe", BODY, status=204)
    assert response.body == b""
    assert "Content-Type" not in response.headers
    assert EXPECTED_HEADERS.items() <= dict(response.headers).items()
    assert table.rows() == {"Zoe": date(1990, 5, 17)}


def test_put_again_replaces_the_date(app: TestApp, table: Table) -> None:
    app.put_json("/hello/Zoe", {"dateOfBirth": "1980-01-01"}, status=204)
    app.put_json("/hello/Adam", {"dateOfBirth": "1970-01-01"}, status=204)
    app.put_json("/hello/Zoe", BODY, status=204)
    assert table.rows() == {"Adam": date(1970, 1, 1), "Zoe": date(1990, 5, 17)}


@pytest.mark.usefixtures("on_a_fixed_day")
@pytest.mark.parametrize(
    ("born", "wish"),
    [
        (date(1990, 5, 17), "Your birthday is in 68 day(s)"),
        (date(1990, 3, 11), "Your birthday is in 1 day(s)"),
        (date(1990, 3, 10), "Happy birthday!"),
        (date(1990, 3, 9), "Your birthday is in 364 day(s)"),
    ],
)
def test_get_greets_with_message_and_status(app: TestApp, table: Table, born: date, wish: str) -> None:
    table.execute("INSERT INTO users (username, date_of_birth) VALUES ('Zoe', %s)", born)
    assert message(app.get("/hello/Zoe", status=200)) == f"Hello, Zoe! {wish}"


def test_get_of_an_unknown_user_is_404(app: TestApp) -> None:
    assert "PUT it first" in message(app.get("/hello/Nobody", status=404))


def test_case_of_a_username_matters(app: TestApp, table: Table) -> None:
    app.put_json("/hello/zoe", BODY, status=204)
    app.get("/hello/Zoe", status=404)
    assert list(table.rows()) == ["zoe"]


def test_head_has_the_status_and_headers_of_get_and_no_content(app: TestApp, table: Table) -> None:
    table.execute("INSERT INTO users (username, date_of_birth) VALUES ('Zoe', '1990-05-17')")
    for path, status in {"/hello/Zoe": 200, "/hello/Nobody": 404, "/livez": 200, "/readyz": 200, "/": 404}.items():
        get, head = app.get(path, status=status), app.head(path, status=status)
        assert head.headers == get.headers
        assert head.body == b""


@pytest.mark.parametrize(
    ("path", "allow"),
    [("/hello/Zoe", "GET, HEAD, OPTIONS, PUT"), ("/livez", "GET, HEAD, OPTIONS"), ("/readyz", "GET, HEAD, OPTIONS")],
)
def test_options_is_204_with_allow(app: TestApp, path: str, allow: str) -> None:
    response = app.options(path, status=204)
    assert response.headers["Allow"] == allow
    assert response.body == b""


@pytest.mark.parametrize("method", ["POST", "DELETE", "PATCH", "TRACE"])
def test_another_method_is_405_with_allow(app: TestApp, table: Table, method: str) -> None:
    response = app.request("/hello/Zoe", method=method, status=405)
    assert response.headers["Allow"] == "GET, HEAD, OPTIONS, PUT"
    assert "GET, HEAD, OPTIONS, PUT" in message(response)
    assert table.rows() == {}


def test_put_to_a_probe_is_405(app: TestApp) -> None:
    assert app.put_json("/livez", BODY, status=405).headers["Allow"] == "GET, HEAD, OPTIONS"


@pytest.mark.parametrize("path", ["/", "", "/hello", "/Hello/Zoe", "//hello/Zoe", "/livez/", "/metrics"])
def test_another_path_is_404_and_says_which_exist(app: TestApp, path: str) -> None:
    assert "/hello/<username>" in message(app.get(path, status=404))


def test_livez_answers_without_the_database(app: TestApp, statements: list[Any]) -> None:
    assert message(app.get("/livez", status=200)) == "alive"
    assert statements == []


# --- Usernames --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "username",
    ["a", "Zoe", "Łukasz", "Ωμέγα", "名前", "हिन्दी", "ไทยน้ำ", "עִבְרִית", "𝔘𝔫𝔦", "a" * 255, "名" * 255, "नि" * 255],
    ids=lambda name: f"{name[:6]}-{len(name)}",
)
def test_put_and_get_of_a_name_in_any_script(app: TestApp, table: Table, username: str) -> None:
    app.put_json(path_of(username), BODY, status=204)
    assert list(table.rows()) == [unicodedata.normalize("NFC", username)]
    response = app.get(path_of(username), status=200)
    assert message(response).startswith(f"Hello, {unicodedata.normalize('NFC', username)}! ")
    assert username[:1].encode() in response.body  # readable, not as \u escapes


def test_decomposed_and_composed_letters_are_one_user(app: TestApp, table: Table) -> None:
    app.put_json(path_of("Rene\N{COMBINING ACUTE ACCENT}"), BODY, status=204)
    app.get(path_of("Ren\N{LATIN SMALL LETTER E WITH ACUTE}"), status=200)
    assert list(table.rows()) == ["Ren\N{LATIN SMALL LETTER E WITH ACUTE}"]


def test_percent_encoding_of_letters_changes_nothing(app: TestApp, table: Table) -> None:
    app.put_json("/hello/%5Ao%65", BODY, status=204)
    assert list(table.rows()) == ["Zoe"]


INVALID_PATHS = {
    "empty": "/hello/",
    "digit": "/hello/Zoe1",
    "other digit": path_of("Zoe٣"),
    "roman numeral": path_of("Ⅷ"),
    "space": "/hello/Zoe%20B",
    "line end": "/hello/Zoe%0A",
    "only a line end": "/hello/%0A",
    "no-break space": path_of("Zoe\N{NO-BREAK SPACE}"),
    "slash": "/hello/Zoe/B",
    "encoded slash": "/hello/Zoe%2FB",
    "trailing slash": "/hello/Zoe/",
    "dash": "/hello/Zoe-B",
    "underscore": "/hello/Zoe_B",
    "dot": "/hello/..",
    "apostrophe": path_of("O'Neil"),
    "quote for SQL": path_of("a';DROP TABLE users"),
    "nul": "/hello/Zoe%00",
    "delete": "/hello/Zoe%7F",
    "encoded percent": "/hello/%25",
    "encoded twice": "/hello/%255Aoe",
    "no hexadecimal": "/hello/%zz",
    "half an escape": "/hello/Zoe%4",
    "no UTF-8": "/hello/%FF",
    "cut UTF-8": "/hello/%C3",
    "overlong UTF-8": "/hello/%C1%81",
    "surrogate": "/hello/%ED%A0%80",
    "emoji": path_of("🎂"),
    "zero width joiner": path_of("Zoe\N{ZERO WIDTH JOINER}"),
    "right-to-left override": path_of("Zoe\N{RIGHT-TO-LEFT OVERRIDE}"),
    "private use": path_of("\ue000"),
    "only a mark": path_of("\N{COMBINING ACUTE ACCENT}"),
    "first a mark": path_of("\N{COMBINING GRAVE ACCENT}Zoe"),
    "enclosing mark": path_of("Z\N{COMBINING ENCLOSING CIRCLE}oe"),
    "too long": "/hello/" + "a" * 256,
    "too long in letters of four bytes": path_of("𝔘" * 256),
    "too many marks": path_of("a" + "\N{COMBINING TILDE BELOW}" * 1300),
}


@pytest.mark.parametrize("path", INVALID_PATHS.values(), ids=INVALID_PATHS.keys())
def test_get_with_an_invalid_username_is_400(app: TestApp, path: str) -> None:
    assert message(app.get(path, status=400)).startswith("The username must be")


@pytest.mark.parametrize("method", ["PUT", "HEAD", "OPTIONS", "POST", "DELETE"])
def test_invalid_username_is_400_on_every_method(app: TestApp, table: Table, method: str) -> None:
    app.request("/hello/Zoe1", method=method, body=json.dumps(BODY).encode() if method == "PUT" else b"", status=400)
    assert table.rows() == {}


NAMES_AND_NOT = st.text(st.characters(categories=["L", "Mn", "Mc"])) | st.text(st.characters(exclude_categories=["Cs"]))


@given(NAMES_AND_NOT)
@settings(max_examples=300, deadline=None)
def test_any_text_as_a_username_is_accepted_just_where_the_rule_says_so(text: str) -> None:
    name = unicodedata.normalize("NFC", text)
    kinds = ",".join(unicodedata.category(character) for character in name)
    valid = re.fullmatch("L.(,(L.|Mn|Mc))*", kinds) is not None and kinds.count("L") <= 255
    try:
        assert hello.parse_username(text.encode().decode("latin-1")) == name
        accepted = True
    except hello.Refused as refused:
        assert refused.response.status == 400
        accepted = False
    assert accepted == valid


# --- Dates and content ------------------------------------------------------------------------------


@pytest.mark.usefixtures("on_a_fixed_day")
@pytest.mark.parametrize("born", ["2026-03-10", "2026-03-11", "2027-01-01", "9999-12-31"])
def test_put_with_a_date_of_today_or_in_the_future_is_400(app: TestApp, table: Table, born: str) -> None:
    assert message(app.put_json("/hello/Zoe", {"dateOfBirth": born}, status=400)) == "dateOfBirth must be before today."
    assert table.rows() == {}


@pytest.mark.usefixtures("on_a_fixed_day")
@pytest.mark.parametrize("born", ["2026-03-09", "0001-01-01", "2000-02-29", "1582-10-10"])
def test_put_with_a_date_at_the_edges_is_204(app: TestApp, table: Table, born: str) -> None:
    app.put_json("/hello/Zoe", {"dateOfBirth": born}, status=204)
    assert table.rows() == {"Zoe": date.fromisoformat(born)}


@pytest.mark.parametrize(
    "born",
    ["", "today", "1990-5-17", "90-05-17", "19900517", "1990-W20-4", "1990-137", "1990/05/17", "17-05-1990"]
    + ["1990-05-17T00:00", "1990-05-17Z", " 1990-05-17", "1990-05-17 ", "1990-05-17\n", "+1990-05-17", "-990-05-17"]
    + ["1990-13-01", "1990-00-10", "1990-01-00", "1990-04-31", "2001-02-29", "1900-02-29", "0000-01-01", "10000-01-01"]
    + ["١٩٩٠-٠٥-١٧", "１９９０-05-17", "1990\N{MINUS SIGN}05\N{MINUS SIGN}17", "1990-05-17\x00", "\ud800"],
)
def test_put_with_an_invalid_date_is_400(app: TestApp, table: Table, born: str) -> None:
    response = app.put_json("/hello/Zoe", {"dateOfBirth": born}, status=400)
    assert message(response) == "dateOfBirth must be a real date, written YYYY-MM-DD."
    assert table.rows() == {}


def test_put_without_a_body_is_400(app: TestApp, table: Table) -> None:
    assert message(app.put("/hello/Zoe", status=400)).startswith("The content is missing: send {")
    assert table.rows() == {}


INVALID_CONTENT = {
    "text": b"1990-05-17",
    "form": b"dateOfBirth=1990-05-17",
    "cut": b'{"dateOfBirth": "1990-05-17"',
    "two documents": b'{"dateOfBirth": "1990-05-17"} {}',
    "single quotes": b"{'dateOfBirth': '1990-05-17'}",
    "trailing comma": b'{"dateOfBirth": "1990-05-17",}',
    "NaN": b'{"dateOfBirth": "1990-05-17", "n": NaN}',
    "Infinity": b'{"dateOfBirth": "1990-05-17", "n": -Infinity}',
    "byte order mark": b'\xef\xbb\xbf{"dateOfBirth": "1990-05-17"}',
    "Latin-1": '{"dateOfBirth": "1990-05-17", "n": "é"}'.encode("latin-1"),
    "UTF-16": '{"dateOfBirth": "1990-05-17"}'.encode("utf-16"),
    "nested deep": b"[" * 4096,
    "nul": b"\x00",
    "white space": b"  \n",
    "null": b"null",
    "number": b"19900517",
    "huge number": b"9" * 4096,
    "array": b'["1990-05-17"]',
    "array of pairs": b'[["dateOfBirth", "1990-05-17"]]',
    "string": b'"1990-05-17"',
    "empty object": b"{}",
    "other case": b'{"dateofbirth": "1990-05-17"}',
    "null date": b'{"dateOfBirth": null}',
    "number date": b'{"dateOfBirth": 19900517}',
    "list date": b'{"dateOfBirth": ["1990-05-17"]}',
    "object date": b'{"dateOfBirth": {}}',
    "true": b'{"dateOfBirth": true}',
}


@pytest.mark.parametrize("content", INVALID_CONTENT.values(), ids=INVALID_CONTENT.keys())
def test_put_of_anything_but_an_object_with_a_date_is_400(app: TestApp, table: Table, content: bytes) -> None:
    assert 'send {"dateOfBirth": "YYYY-MM-DD"}' in message(app.put("/hello/Zoe", content, status=400))
    assert table.rows() == {}


@pytest.mark.parametrize(
    "content_type", ["application/x-www-form-urlencoded", "text/plain", "application/json", "", "?"]
)
def test_put_with_any_content_type_is_204(app: TestApp, table: Table, content_type: str) -> None:
    content = json.dumps(BODY | {"other": [1, {"é": None}]}, ensure_ascii=False).encode()
    app.put("/hello/Zoe", content, content_type=content_type, status=204)
    assert table.rows() == {"Zoe": date(1990, 5, 17)}


def test_put_of_less_than_its_content_length_is_400(table: Table) -> None:
    environ = {"REQUEST_METHOD": "PUT", "PATH_INFO": "/hello/Zoe", "CONTENT_LENGTH": "100"}
    statuses: list[str] = []
    start_response = lambda status, headers: statuses.append(status)
    hello.application(environ | {"wsgi.input": io.BytesIO(json.dumps(BODY).encode())}, start_response)
    assert statuses == ["400 Bad Request"]
    assert table.rows() == {}


def padded(size: int) -> bytes:
    return json.dumps(BODY).encode().ljust(size)


def test_put_of_4_kib_is_204_and_of_a_byte_more_413(app: TestApp, table: Table) -> None:
    assert "4096 bytes" in message(app.put("/hello/Zoe", padded(4097), status=413))
    assert table.rows() == {}
    app.put("/hello/Zoe", padded(4096), status=204)
    assert table.rows() == {"Zoe": date(1990, 5, 17)}


@pytest.mark.parametrize("length", ["-1", "+29", "2_9", "29.0", "a", "٢٩", "9" * 30])
def test_put_with_an_odd_content_length_is_400(app: TestApp, table: Table, length: str) -> None:
    environ = {"REQUEST_METHOD": "PUT", "PATH_INFO": "/hello/Zoe", "CONTENT_LENGTH": length, "wsgi.input": None}
    statuses: list[str] = []
    hello.application(environ, lambda status, headers: statuses.append(status))  # type: ignore[arg-type]
    assert statuses == ["400 Bad Request"]
    assert table.rows() == {}


VALUES = st.recursive(
    st.none() | st.booleans() | st.text() | st.floats() | st.integers(),
    lambda inner: st.lists(inner) | st.dictionaries(st.just("dateOfBirth") | st.text(), inner),
)


@given(st.binary(max_size=200) | VALUES.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=100, deadline=None)
def test_any_content_is_a_date_or_400(content: bytes) -> None:
    try:
        assert hello.parse_date_of_birth(hello.parse_document(content)) < hello.today()
    except hello.Refused as refused:
        assert refused.response.status == 400


# --- Birthday arithmetic ----------------------------------------------------------------------------


def walk(born: date, on: date) -> int:
    """Count the days one by one, on a calendar of our own that does not end in 9999."""
    year, month, day = on.year, on.month, on.day
    for days in range(367):
        leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
        if (month, day) == (born.month, born.day):
            return days
        if (month, day) == (3, 1) and (born.month, born.day) == (2, 29) and not leap:
            return days
        day += 1
        if day > [31, 29 if leap else 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31][month - 1]:
            month, day = month + 1, 1
        if month > 12:
            year, month = year + 1, 1
    raise AssertionError("no birthday in 366 days")


LEAP_DAYS = (
    st.integers(1, 2400).map(lambda n: 4 * n).filter(lambda n: n % 100 or n % 400 == 0).map(lambda y: date(y, 2, 29))
)
DAYS_BY_THE_SEAM = st.builds(
    lambda year, days: date(year, 2, 26) + timedelta(days), st.integers(1, 9999), st.integers(0, 5)
)
DATES = st.dates() | LEAP_DAYS | DAYS_BY_THE_SEAM | st.dates(date(9999, 1, 1))


@given(born=DATES, on=DATES)
@settings(max_examples=1000, deadline=None)
def test_days_until_birthday_are_those_of_a_calendar_walk(born: date, on: date) -> None:
    assert hello.days_until_birthday(born, on) == walk(born, on)


@pytest.mark.parametrize(
    ("on", "days"),
    [
        ("2027-02-28", 1),
        ("2027-03-01", 0),
        ("2027-03-02", 364),
        ("2028-02-28", 1),
        ("2028-02-29", 0),
        ("2028-03-01", 365),
    ]
    + [("2100-02-28", 1), ("2100-03-01", 0), ("2000-02-29", 0)],
)
def test_birthday_of_29_february_is_1_march_in_common_years(on: str, days: int) -> None:
    assert hello.days_until_birthday(date(1996, 2, 29), date.fromisoformat(on)) == days


# --- Today and settings -----------------------------------------------------------------------------


@pytest.mark.parametrize("zone", ["Pacific/Kiritimati", "Pacific/Pago_Pago", "UTC"])
def test_today_is_today_in_the_time_zone_at_each_request(monkeypatch: pytest.MonkeyPatch, zone: str) -> None:
    instants = iter([datetime(2026, 3, 10, 9, 59, tzinfo=UTC), datetime(2026, 3, 11, 12, 1, tzinfo=UTC)])

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return next(instants).astimezone(tz)

    monkeypatch.setattr(hello, "datetime", Clock)
    monkeypatch.setattr(hello, "ZONE", ZoneInfo(zone))
    expected = {"Pacific/Kiritimati": (10, 12), "Pacific/Pago_Pago": (9, 11), "UTC": (10, 11)}[zone]
    assert (hello.today().day, hello.today().day) == expected


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


@pytest.mark.parametrize(
    ("name", "value"),
    [("BATCH_SIZE", "0"), ("BATCH_SIZE", "many"), ("QUEUE_TIMEOUT", "-1"), ("DATABASE_TIMEOUT", "nan")]
    + [("CONNECT_TIMEOUT", "inf"), ("DATABASE_CONNECTIONS", "1.5"), ("STATEMENT_TIMEOUT", "0")],
)
def test_unusable_setting_stops_the_start_with_one_line(name: str, value: str) -> None:
    result = run_hello(**{name: value})
    assert result.returncode == 1
    assert result.stderr.startswith(f"{name}=")
    assert result.stderr.count("\n") == 1


def test_init_db_where_nothing_answers_exits_with_one_line() -> None:
    result = run_hello("init-db", PGHOST="127.0.0.1", PGPORT=str(free_port()), INIT_TIMEOUT="0.5")
    assert result.returncode == 1
    assert result.stderr.startswith("init-db: ")
    assert result.stderr.count("\n") == 1


def test_init_db_says_once_what_it_waits_for() -> None:
    result = run_hello("init-db", PGHOST="127.0.0.1", PGPORT=str(free_port()), INIT_TIMEOUT="2.5")
    waiting, ended = result.stderr.splitlines()
    assert waiting.startswith("init-db waits: ")
    assert "Connection refused" in waiting
    assert ended.startswith("init-db: ")


def test_init_db_that_fails_on_rows_quotes_none(app: TestApp, table: Table, tmp_path: Path) -> None:
    app.put_json("/hello/Zoe", BODY, status=204)
    app.put_json("/hello/Adam", BODY, status=204)
    for name in ("hello.py", "openapi.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "schema.sql").write_text("CREATE UNIQUE INDEX ON users (date_of_birth)")
    result = run_hello("init-db", folder=tmp_path, INIT_TIMEOUT="0.5")
    assert "could not create unique index" in result.stderr
    assert "1990" not in result.stderr
    assert table.rows() == {"Zoe": date(1990, 5, 17), "Adam": date(1990, 5, 17)}


def test_init_db_again_and_by_several_at_once_keeps_the_rows(app: TestApp, table: Table) -> None:
    app.put_json("/hello/Zoe", BODY, status=204)
    results = together(*[lambda: run_hello("init-db")] * 4)
    assert [result.returncode for result in results] == [0] * 4
    assert table.rows() == {"Zoe": date(1990, 5, 17)}


def test_init_db_by_several_at_once_makes_the_table(table: Table) -> None:
    table.execute("CREATE DATABASE fresh")
    results = together(*[lambda: run_hello("init-db", PGDATABASE="fresh")] * 4)
    assert [result.stderr for result in results] == [""] * 4
    table.execute("DROP DATABASE fresh WITH (FORCE)")


def test_hello_runs_on_the_standard_librarys_server(database: dict[str, str], table: Table) -> None:
    port = free_port()
    with subprocess.Popen([sys.executable, "hello.py"], cwd=ROOT, env=os.environ | {"PORT": str(port)}) as process:
        try:
            assert embedded.wait_for_port(process, port)
            client = HTTPConnection("127.0.0.1", port, timeout=10)
            client.request("PUT", "/hello/Zoe", json.dumps(BODY))
            assert client.getresponse().status == 204
        finally:
            process.terminate()
    assert table.rows() == {"Zoe": date(1990, 5, 17)}


# --- Database ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(database: dict[str, str], statement: str, *values: Any) -> Iterator[None]:
    """Hold a lock in a transaction of its own."""
    other = Table(database)
    other.execute("BEGIN")
    other.execute(statement, *values)
    try:
        yield
    finally:
        other.execute("ROLLBACK")
        other.connection.close()


def put(app: TestApp, username: str, born: str = "1990-05-17") -> Callable[[], int]:
    """Return a call that PUTs and returns the status."""
    return lambda: app.put_json(path_of(username), {"dateOfBirth": born}, expect_errors=True).status_int


def wait_until_waiting(batcher: hello.Batcher, count: int) -> None:
    """Wait until so many requests wait for a connection, and none is idle."""
    deadline = time.monotonic() + 1
    while sum(len(batch.rows) for batch in batcher.waiting) < count or batcher.idle.qsize():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def connection_of(batcher: hello.Batcher) -> hello.Connection:
    """Return a batcher's idle connection, which stays in its place."""
    line = batcher.idle.get(timeout=1)
    batcher.idle.put(line)
    assert line.connection is not None
    return line.connection


def after(seconds: float, call: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: (time.sleep(seconds), call())[1]


NAMES = [a + b for a in "ABCDEFGH" for b in "abcd"]


def test_requests_that_wait_share_one_statement(
    app: TestApp, table: Table, database: dict[str, str], statements: list[Any]
) -> None:
    with locked(database, "LOCK TABLE users IN SHARE MODE"):
        blocked = threading.Thread(target=put(app, "First"))
        blocked.start()
        wait_until_waiting(hello.save_date_of_birth, 0)
        threads = [threading.Thread(target=put(app, name)) for name in NAMES]
        for thread in threads:
            thread.start()
        wait_until_waiting(hello.save_date_of_birth, len(NAMES))
    for thread in [blocked, *threads]:
        thread.join()
    assert statements == [("save", 1, "NoneType"), ("save", len(NAMES), "NoneType")]
    assert table.rows() == dict.fromkeys(["First", *NAMES], date(1990, 5, 17))


def test_gets_that_wait_share_one_statement_and_each_has_its_own_answer(
    app: TestApp, table: Table, database: dict[str, str], statements: list[Any]
) -> None:
    for index, name in enumerate(NAMES):
        table.execute(
            "INSERT INTO users (username, date_of_birth) VALUES (%s, %s)", name, date(1990, 1, 1 + index % 28)
        )
    found: dict[str, date | None] = {}
    with locked(database, "LOCK TABLE users"):
        threads = [
            threading.Thread(target=lambda name=name: found.update({name: hello.find_date_of_birth(name)}))
            for name in [*NAMES, "Nobody"]
        ]
        for thread in threads:
            thread.start()
        wait_until_waiting(hello.find_date_of_birth, len(NAMES))
    for thread in threads:
        thread.join()
    assert found == table.rows() | {"Nobody": None}
    assert statements == [("find", 1, "NoneType"), ("find", len(NAMES), "NoneType")]


def test_batch_holds_batch_size_at_most(
    app: TestApp, table: Table, database: dict[str, str], statements: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hello, "BATCH_SIZE", 10)
    with locked(database, "LOCK TABLE users IN SHARE MODE"):
        threads = [threading.Thread(target=put(app, name)) for name in NAMES]
        for thread in threads:
            thread.start()
        wait_until_waiting(hello.save_date_of_birth, len(NAMES) - 1)
    for thread in threads:
        thread.join()
    assert sorted(rows for _, rows, _ in statements) == [1, 1, 10, 10, 10]  # threads may overtake each other
    assert sorted(table.rows()) == sorted(NAMES)


def test_puts_of_one_user_in_one_batch_store_the_last(
    app: TestApp, table: Table, database: dict[str, str], statements: list[Any]
) -> None:
    with locked(database, "LOCK TABLE users IN SHARE MODE"):
        calls = [put(app, "First"), *[after(0.02 * n, put(app, "Zoe", f"1990-01-0{n}")) for n in range(1, 6)]]
        release = threading.Thread(target=together, args=calls)
        release.start()
        wait_until_waiting(hello.save_date_of_birth, 5)
    release.join()
    assert [rows for _, rows, _ in statements] == [1, 5]
    assert table.rows()["Zoe"] == date(1990, 1, 5)


def test_put_of_a_locked_row_is_503_and_the_rest_of_its_batch_204(
    app: TestApp, table: Table, database: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hello, "STATEMENT_TIMEOUT", 0.3)
    table.execute("INSERT INTO users (username, date_of_birth) VALUES ('Locked', '1990-01-01')")
    with locked(database, "SELECT FROM users WHERE username = 'Locked' FOR UPDATE"):
        calls = [put(app, "Locked"), *[after(0.1, put(app, name)) for name in ["Adam", "Locked", "Zoe"]]]
        statuses = together(*calls)
    assert statuses == [503, 204, 503, 204]
    assert table.rows() == {"Locked": date(1990, 1, 1), "Adam": date(1990, 5, 17), "Zoe": date(1990, 5, 17)}


def test_request_that_waits_too_long_for_a_connection_is_503(
    app: TestApp, table: Table, database: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hello, "QUEUE_TIMEOUT", 0.2)
    with locked(database, "LOCK TABLE users IN SHARE MODE"):
        first, (second, seconds) = together(put(app, "First"), after(0.1, lambda: timed(put(app, "Second"))))
    assert (first, second) == (503, 503)
    assert 0.2 <= seconds < 0.6
    assert put(app, "Third")() == 204
    assert table.rows() == {"Third": date(1990, 5, 17)}


def test_request_that_joins_a_waiting_batch_late_does_not_give_up_with_it(
    app: TestApp, table: Table, database: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hello, "QUEUE_TIMEOUT", 0.4)
    with locked(database, "LOCK TABLE users IN SHARE MODE"):
        calls = [after(0.1 * n, lambda n=n: timed(put(app, f"User{'abcdef'[n]}"))) for n in range(5)]
        answers = together(*calls)
    assert [status for status, _ in answers] == [503] * 5
    assert min(seconds for _, seconds in answers[1:]) >= 0.9 * 0.4
    assert table.rows() == {}


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.monotonic()
    return call(), time.monotonic() - start


def test_unavailable_database_is_503_with_retry_after(app: TestApp, table: Table, database: dict[str, str]) -> None:
    with locked(database, "LOCK TABLE users"):
        for response in together(
            lambda: app.get("/hello/Zoe", status=503),
            lambda: app.put_json("/hello/Zoe", BODY, status=503),
            lambda: app.get("/readyz", status=503),
        ):
            assert "try again" in message(response)
            assert response.headers["Retry-After"] == "1"
        app.get("/livez", status=200)
    assert table.rows() == {}


@pytest.mark.parametrize("operation", ["find", "save"])
def test_connection_that_died_while_idle_is_replaced_unnoticed(
    app: TestApp, table: Table, statements: list[Any], operation: str
) -> None:
    app.put_json("/hello/Zoe", BODY, status=204)
    app.get("/hello/Zoe", status=200)
    table.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'hello'")
    if operation == "find":
        app.get("/hello/Zoe", status=200)
    else:
        app.put_json("/hello/Zoe", {"dateOfBirth": "1980-01-01"}, status=204)
        assert table.rows() == {"Zoe": date(1980, 1, 1)}
    assert [error for _, _, error in statements] == ["NoneType"] * 3


def test_read_only_database_refuses_put_and_serves_get(app: TestApp, table: Table) -> None:
    app.put_json("/hello/Zoe", BODY, status=204)
    table.execute("ALTER DATABASE postgres SET default_transaction_read_only = on")
    table.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'hello'")
    try:
        app.put_json("/hello/Adam", BODY, status=503)
        app.get("/hello/Zoe", status=200)
    finally:
        table.execute("SET default_transaction_read_only = off")
        table.execute("ALTER DATABASE postgres RESET default_transaction_read_only")
    app.put_json("/hello/Adam", BODY, status=204)
    assert sorted(table.rows()) == ["Adam", "Zoe"]


def test_put_answered_503_does_not_overwrite_a_later_acknowledged_one(
    app: TestApp, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hello, "DATABASE_TIMEOUT", 1.5)
    app.put_json("/hello/Zoe", BODY, status=204)
    pid = connection_of(hello.save_date_of_birth).info.backend_pid
    os.kill(pid, signal.SIGSTOP)
    try:
        app.put_json("/hello/Zoe", {"dateOfBirth": "1991-01-01"}, status=503)
        app.put_json("/hello/Zoe", {"dateOfBirth": "1992-02-02"}, status=204)
    finally:
        os.kill(pid, signal.SIGCONT)
    while table.execute("SELECT 1 FROM pg_stat_activity WHERE pid = %s", pid):
        time.sleep(0.01)
    assert table.rows() == {"Zoe": date(1992, 2, 2)}


def test_client_encoding_of_the_environment_does_not_matter(
    app: TestApp, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    table.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'hello'")
    app.put_json(path_of("名前"), BODY, status=204)
    assert list(table.rows()) == ["名前"]


@pytest.mark.parametrize(
    "hosts", ["localhost", "127.0.0.1,localhost", "no-such-host.invalid,localhost", "::1,127.0.0.1"]
)
def test_host_names_are_looked_up_and_tried_in_turn(
    app: TestApp, table: Table, monkeypatch: pytest.MonkeyPatch, hosts: str
) -> None:
    monkeypatch.setenv("PGHOST", hosts)
    connection = hello.connect()
    assert connection.info.host in hosts.split(",")
    connection.close()


def test_host_without_an_address_is_503(app: TestApp, table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGHOST", "no-such-host.invalid")
    table.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'hello'")
    app.put_json("/hello/Zoe", BODY, status=503)
    assert table.rows() == {}


def test_silent_name_server_holds_a_request_no_longer_than_an_attempt_to_connect(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PGHOST", "database")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(3))
    with pytest.raises(psycopg2.OperationalError):
        hello.connect()
    _, seconds = timed(lambda: pytest.raises(psycopg2.OperationalError, hello.connect))
    assert seconds < hello.CONNECT_TIMEOUT + 0.5


def test_warning_at_the_login_is_none_of_the_statement(app: TestApp, table: Table) -> None:
    table.execute(
        "CREATE FUNCTION warn() RETURNS event_trigger LANGUAGE plpgsql AS $$BEGIN RAISE WARNING 'collation'; END$$"
    )
    table.execute("CREATE EVENT TRIGGER warn ON login EXECUTE FUNCTION warn()")
    table.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'hello'")
    try:
        app.put_json("/hello/Zoe", BODY, status=204)
        app.put_json("/hello/Adam", BODY, status=204)
    finally:
        table.execute("DROP EVENT TRIGGER warn")
        table.execute("DROP FUNCTION warn")
    assert sorted(table.rows()) == ["Adam", "Zoe"]


def test_statements_leave_nothing_behind_in_the_session(app: TestApp, table: Table) -> None:
    app.put_json("/hello/Zoe", BODY, status=204)
    app.get("/hello/Zoe", status=200)
    for batcher in (hello.find_date_of_birth, hello.save_date_of_birth):
        connection = connection_of(batcher)
        with connection.cursor() as cursor:
            cursor.execute("SELECT current_setting('statement_timeout'), (SELECT count(*) FROM pg_prepared_statements)")
            assert cursor.fetchone() == ("0", 0)
        assert connection.info.transaction_status == extensions.TRANSACTION_STATUS_IDLE


def test_connections_are_as_many_as_the_formula_says(app: TestApp, table: Table) -> None:
    together(*[put(app, name) for name in NAMES], *[lambda: app.get("/hello/Zoe", status="*")] * 32)
    count = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'hello' AND datname = 'postgres'"
    assert table.execute(count) == [(2 * hello.DATABASE_CONNECTIONS,)]


def test_defect_of_ours_is_503_and_logged_without_its_text(
    app: TestApp, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(username: str) -> None:
        raise ZeroDivisionError(username)

    monkeypatch.setattr(hello, "find_date_of_birth", fail)
    response = app.get("/hello/Zoe", status=503)
    assert response.headers["Retry-After"] == "1"
    assert "Zoe" not in message(response)
    assert "ZeroDivisionError" in caplog.text
    assert "Zoe" not in caplog.text


# --- A real server ----------------------------------------------------------------------------------


def ask(client: HTTPConnection, method: str, path: str, *arguments: Any, **options: Any) -> tuple[HTTPResponse, bytes]:
    client.request(method, path, *arguments, **options)
    response = client.getresponse()
    return response, response.read()


def test_server_puts_and_gets(client: HTTPConnection, table: Table) -> None:
    response, content = ask(client, "PUT", "/hello/Zo%C3%AB", json.dumps(BODY))
    assert (response.status, content) == (204, b"")
    assert response.headers["Content-Length"] is None
    assert table.rows() == {"Zoë": date(1990, 5, 17)}
    response, content = ask(client, "GET", "/hello/Zo%C3%AB?a=b")
    assert response.status == 200
    assert content.decode().startswith('{"message": "Hello, Zoë! ')
    assert response.headers["Content-Length"] == str(len(content))


def test_server_takes_a_chunked_body(client: HTTPConnection, table: Table) -> None:
    chunks = [bytes([byte]) for byte in json.dumps(BODY).encode()]
    response, _ = ask(client, "PUT", "/hello/Zoe", iter(chunks), encode_chunked=True)
    assert response.status == 204
    assert table.rows() == {"Zoe": date(1990, 5, 17)}


def test_server_refuses_a_chunked_body_beyond_4_kib_with_413(client: HTTPConnection, table: Table) -> None:
    assert ask(client, "PUT", "/hello/Zoe", iter([padded(4000), b" " * 97]), encode_chunked=True)[0].status == 413
    assert ask(client, "GET", "/livez")[0].status == 200
    assert table.rows() == {}


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("PUT", "/hello/Zoe1", padded(100), 400),
        ("PUT", "/hello/Zoe", b"{", 400),
        ("PUT", "/hello/Zoe", padded(50_000), 413),
        ("GET", "/hello/Nobody", padded(100), 404),
        ("POST", "/hello/Zoe", padded(3000), 405),
        ("PUT", "/nowhere", padded(3000), 404),
        ("OPTIONS", "/hello/Zoe", padded(3000), 204),
        ("HEAD", "/hello/Nobody", b"", 404),
    ],
)
def test_error_leaves_the_connection_in_step_for_the_next_request(
    client: HTTPConnection, table: Table, method: str, path: str, content: bytes, status: int
) -> None:
    socket_before = client.sock
    assert ask(client, method, path, content)[0].status == status
    assert ask(client, "PUT", "/hello/Next", json.dumps(BODY))[0].status == 204
    assert client.sock is socket_before
    assert table.rows() == {"Next": date(1990, 5, 17)}


def test_server_closes_after_a_body_it_did_not_read_whole(client: HTTPConnection, table: Table) -> None:
    response, content = ask(client, "PUT", "/hello/Zoe", padded(1_000_000))
    assert response.status == 413
    assert json.loads(content) == {"message": "Send at most 4096 bytes."}
    assert response.headers["Connection"] == "close"
    assert table.rows() == {}


# --- make run ---------------------------------------------------------------------------------------


def make_run(data: Path, **environment: str) -> subprocess.Popen[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "MAKE"))} | environment
    command = ["make", "run", f"DATA={data}", f"VENV={Path(sys.executable).parents[1]}"]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=clean,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_make_run_serves_keeps_its_data_and_leaves_no_process(tmp_path: Path) -> None:
    for dates in ("1990-05-17", None):
        port = free_port()
        process = make_run(tmp_path / "data", PORT=str(port), METRICS_PORT="0")
        output = ""
        while "curl http" not in output:
            output += (line := process.stdout.readline())
            assert line, output
        client = HTTPConnection("127.0.0.1", port, timeout=10)
        if dates:
            assert ask(client, "PUT", "/hello/Zoe", json.dumps(BODY))[0].status == 204
        assert ask(client, "GET", "/hello/Zoe")[0].status == 200
        started = psutil.Process(process.pid).children(recursive=True)
        assert len(started) > 3
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=20)
        assert [child for child in started if child.is_running() and child.status() != psutil.STATUS_ZOMBIE] == []


def test_make_run_on_a_taken_port_says_so_in_one_line(tmp_path: Path) -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:
        process = make_run(tmp_path / "data", PORT=str(taken.getsockname()[1]))
        output, _ = process.communicate(timeout=20)
    assert output.splitlines()[0].startswith("Port ")
    assert "make run PORT=" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("name", "value"), [("PORT", "abc"), ("PORT", "70000"), ("METRICS_PORT", "-1"), ("METRICS_PORT", "8080")]
)
def test_make_run_with_an_unusable_port_says_so_in_one_line(tmp_path: Path, name: str, value: str) -> None:
    settings = {"PORT": "8080", "METRICS_PORT": "8081"} | {name: value}
    output, _ = make_run(tmp_path / "data", **settings).communicate(timeout=20)
    assert output.splitlines()[0].startswith(
        (f"{name}='{value}' is no port", "PORT and METRICS_PORT", "Port 8080 cannot")
    )
    assert "Traceback" not in output


def test_make_run_with_a_database_that_refuses_says_so_in_one_line(tmp_path: Path) -> None:
    process = make_run(
        tmp_path,
        PORT=str(free_port()),
        METRICS_PORT="0",
        PGHOST="127.0.0.1",
        PGPORT=str(free_port()),
        INIT_TIMEOUT="0.5",
    )
    output, _ = process.communicate(timeout=20)
    assert output.splitlines()[0].startswith("init-db: ")
    assert "check PGHOST" in output
    assert "Traceback" not in output
