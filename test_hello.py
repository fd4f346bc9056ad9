"""The contract of hello.py, through WebTest, against a real Postgres.

Every write is checked through a second connection, the fixture `table`.
"""

import io
import json
import re
import unicodedata
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from urllib.parse import quote
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webtest import TestApp, TestResponse

import hello
from tests.support.postgres import Database

ROOT = Path(__file__).parent
TODAY = date(2026, 3, 10)
BODY = {"dateOfBirth": "1990-05-17"}
EXPECTED_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


@pytest.fixture
def app(table: Database) -> TestApp:
    return TestApp(hello.application)


@pytest.fixture
def on_a_fixed_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hello, "today", lambda: TODAY)


def path_of(username: str) -> str:
    return f"/hello/{quote(username, safe='')}"


def message(response: TestResponse) -> str:
    """Return the message of a JSON response, after a check of its headers."""
    assert response.headers["Content-Type"] == "application/json"
    assert response.headers["Content-Length"] == str(len(response.body))
    assert response.body.endswith(b"}\n")
    assert list(response.json) == ["message"]
    assert EXPECTED_HEADERS.items() <= dict(response.headers).items()
    return str(response.json["message"])


# --- The seven first cases --------------------------------------------------------------------------


def test_valid_put_stores_the_date_and_answers_204_without_content(app: TestApp, table: Database) -> None:
    response = app.put_json("/hello/Zoe", BODY, status=204)
    assert response.body == b""
    assert "Content-Type" not in response.headers
    assert EXPECTED_HEADERS.items() <= dict(response.headers).items()
    assert table.rows() == {"Zoe": date(1990, 5, 17)}


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
def test_get_greets_with_message_and_status(app: TestApp, table: Database, born: date, wish: str) -> None:
    table.query("INSERT INTO users (username, date_of_birth) VALUES ('Zoe', %s)", born)
    assert message(app.get("/hello/Zoe", status=200)) == f"Hello, Zoe! {wish}"


def test_get_of_an_unknown_user_is_404(app: TestApp) -> None:
    assert "PUT it first" in message(app.get("/hello/Nobody", status=404))


def test_put_without_a_body_is_400(app: TestApp, table: Database) -> None:
    assert 'send {"dateOfBirth": "YYYY-MM-DD"}' in message(app.put("/hello/Zoe", status=400))
    assert table.rows() == {}


@pytest.mark.parametrize(
    "born",
    ["", "today", "1990-5-17", "90-05-17", "19900517", "1990-W20-4", "1990-137", "1990/05/17", "17-05-1990"]
    + ["1990-05-17T00:00", "1990-05-17Z", " 1990-05-17", "1990-05-17 ", "1990-05-17\n", "+1990-05-17", "-990-05-17"]
    + ["1990-13-01", "1990-00-10", "1990-01-00", "1990-04-31", "2001-02-29", "1900-02-29", "0000-01-01", "10000-01-01"]
    + ["١٩٩٠-٠٥-١٧", "１９９０-05-17", "1990\N{MINUS SIGN}05\N{MINUS SIGN}17", "1990-05-17\x00", "\ud800"],
)
def test_put_with_an_invalid_date_is_400(app: TestApp, table: Database, born: str) -> None:
    response = app.put_json("/hello/Zoe", {"dateOfBirth": born}, status=400)
    assert message(response) == "dateOfBirth must be a real date, written YYYY-MM-DD."
    assert table.rows() == {}


@pytest.mark.usefixtures("on_a_fixed_day")
@pytest.mark.parametrize("born", ["2026-03-10", "2026-03-11", "2027-01-01", "9999-12-31"])
def test_put_with_a_date_of_today_or_in_the_future_is_400(app: TestApp, table: Database, born: str) -> None:
    assert message(app.put_json("/hello/Zoe", {"dateOfBirth": born}, status=400)) == "dateOfBirth must be before today."
    assert table.rows() == {}


INVALID_PATHS = {
    "empty": "/hello/",
    "digit": "/hello/Zoe1",
    "line end": "/hello/Zoe%0A",
    "slash": "/hello/Zoe/B",
    "encoded slash": "/hello/Zoe%2FB",
    "trailing slash": "/hello/Zoe/",
    "dot": "/hello/..",
    "quote for SQL": path_of("a';DROP TABLE users"),
    "nul": "/hello/Zoe%00",
    "encoded twice": "/hello/%255Aoe",
    "no hexadecimal": "/hello/%zz",
    "no UTF-8": "/hello/%FF",
    "surrogate": "/hello/%ED%A0%80",
    "too long": "/hello/" + "a" * 256,
    "too long in letters of four bytes": path_of("𝔘" * 256),
    "too many marks": path_of("a" + "\N{COMBINING TILDE BELOW}" * 1300),
}


@pytest.mark.parametrize("path", INVALID_PATHS.values(), ids=INVALID_PATHS.keys())
def test_get_with_an_invalid_username_is_400(app: TestApp, path: str) -> None:
    assert message(app.get(path, status=400)).startswith("The username must be")


# --- PUT and GET ------------------------------------------------------------------------------------


def test_put_again_replaces_the_date(app: TestApp, table: Database) -> None:
    app.put_json("/hello/Zoe", {"dateOfBirth": "1980-01-01"}, status=204)
    app.put_json("/hello/Adam", {"dateOfBirth": "1970-01-01"}, status=204)
    app.put_json("/hello/Zoe", BODY, status=204)
    assert table.rows() == {"Adam": date(1970, 1, 1), "Zoe": date(1990, 5, 17)}


def test_case_of_a_username_matters(app: TestApp, table: Database) -> None:
    app.put_json("/hello/zoe", BODY, status=204)
    app.get("/hello/Zoe", status=404)
    assert list(table.rows()) == ["zoe"]


def test_head_has_the_status_and_headers_of_get_and_no_content(app: TestApp, table: Database) -> None:
    table.query("INSERT INTO users (username, date_of_birth) VALUES ('Zoe', '1990-05-17')")
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


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("POST", "/hello/Zoe", "GET, HEAD, OPTIONS, PUT"),
        ("TRACE", "/hello/Zoe", "GET, HEAD, OPTIONS, PUT"),
        ("PUT", "/livez", "GET, HEAD, OPTIONS"),
    ],
)
def test_another_method_is_405_with_allow(app: TestApp, table: Database, method: str, path: str, allow: str) -> None:
    response = app.request(path, method=method, status=405)
    assert response.headers["Allow"] == allow
    assert allow in message(response)
    assert table.rows() == {}


@pytest.mark.parametrize("path", ["/", "", "/hello", "/Hello/Zoe", "//hello/Zoe", "/livez/", "/metrics"])
def test_another_path_is_404_and_says_which_exist(app: TestApp, path: str) -> None:
    assert "/hello/<username>" in message(app.get(path, status=404))


# --- Usernames --------------------------------------------------------------------------------------


NAMES = {
    "one letter": "a",
    "Polish": "Łukasz",
    "Hindi": "हिन्दी",
    "Thai": "ไทยน้ำ",
    "Hebrew": "עִבְרִית",
    "mathematical": "𝔘𝔫𝔦",
    "255 letters": "a" * 255,
    "255 letters of three bytes": "名" * 255,
    "255 letters with marks": "नि" * 255,
    "2,500 bytes": "ab" + "\N{COMBINING TILDE BELOW}" * 1249,
    "enclosing mark": "Z\N{COMBINING ENCLOSING CIRCLE}oe",
}


@pytest.mark.parametrize("username", NAMES.values(), ids=NAMES.keys())
def test_put_and_get_of_a_name_in_any_script(app: TestApp, table: Database, username: str) -> None:
    app.put_json(path_of(username), BODY, status=204)
    assert list(table.rows()) == [unicodedata.normalize("NFC", username)]
    response = app.get(path_of(username), status=200)
    assert message(response).startswith(f"Hello, {unicodedata.normalize('NFC', username)}! ")
    assert username[:1].encode() in response.body  # readable, not as \u escapes


def test_decomposed_and_composed_letters_are_one_user(app: TestApp, table: Database) -> None:
    app.put_json(path_of("Rene\N{COMBINING ACUTE ACCENT}"), BODY, status=204)
    app.get(path_of("Ren\N{LATIN SMALL LETTER E WITH ACUTE}"), status=200)
    assert list(table.rows()) == ["Ren\N{LATIN SMALL LETTER E WITH ACUTE}"]


@pytest.mark.parametrize("method", ["PUT", "HEAD", "OPTIONS", "POST"])
def test_invalid_username_is_400_on_every_method(app: TestApp, table: Database, method: str) -> None:
    app.request("/hello/Zoe1", method=method, body=json.dumps(BODY).encode() if method == "PUT" else b"", status=400)
    assert table.rows() == {}


LETTERS = st.text(st.characters(categories=["L", "M"]), max_size=5)
ODD = st.characters(exclude_categories=["L", "M", "Cs"]) | st.sampled_from("-'._ 0")
ONE_ODD_CHARACTER = st.builds("{}{}{}".format, LETTERS, ODD, LETTERS)
ANYTHING = st.text(st.characters(exclude_categories=["Cs"]))


@given(LETTERS | ONE_ODD_CHARACTER | ANYTHING)
@settings(max_examples=500)
def test_any_text_as_a_username_is_accepted_just_where_the_rule_says_so(text: str) -> None:
    name = unicodedata.normalize("NFC", text)
    kinds = ",".join(unicodedata.category(character) for character in name)
    valid = re.fullmatch("L.(,[LM].)*", kinds) is not None and kinds.count("L") <= 255
    try:
        assert hello.parse_username(text.encode().decode("latin-1")) == name
        accepted = True
    except hello.HTTPError as error:
        assert error.status == 400
        accepted = False
    assert accepted == valid


# --- Dates and content ------------------------------------------------------------------------------


@pytest.mark.usefixtures("on_a_fixed_day")
@pytest.mark.parametrize("born", ["2026-03-09", "0001-01-01", "2000-02-29", "1582-10-10"])
def test_put_with_a_date_at_the_edges_is_204(app: TestApp, table: Database, born: str) -> None:
    app.put_json("/hello/Zoe", {"dateOfBirth": born}, status=204)
    assert table.rows() == {"Zoe": date.fromisoformat(born)}


INVALID_CONTENT = {
    "text": b"1990-05-17",
    "two documents": b'{"dateOfBirth": "1990-05-17"} {}',
    "NaN": b'{"dateOfBirth": "1990-05-17", "n": NaN}',
    "byte order mark": b'\xef\xbb\xbf{"dateOfBirth": "1990-05-17"}',
    "Latin-1": '{"dateOfBirth": "1990-05-17", "n": "é"}'.encode("latin-1"),
    "nested deep": b"[" * 4096,
    "huge number": b"9" * 4096,
    "array of pairs": b'[["dateOfBirth", "1990-05-17"]]',
    "string": b'"1990-05-17"',
    "other case": b'{"dateofbirth": "1990-05-17"}',
    "number date": b'{"dateOfBirth": 19900517}',
}


@pytest.mark.parametrize("content", INVALID_CONTENT.values(), ids=INVALID_CONTENT.keys())
def test_put_of_anything_but_an_object_with_a_date_is_400(app: TestApp, table: Database, content: bytes) -> None:
    assert 'send {"dateOfBirth": "YYYY-MM-DD"}' in message(
        app.request("/hello/Zoe", method="PUT", body=content, status=400)
    )
    assert table.rows() == {}


@pytest.mark.parametrize(
    "content_type", ["application/x-www-form-urlencoded", "text/plain", "application/json", "", "?"]
)
def test_put_with_any_content_type_is_204(app: TestApp, table: Database, content_type: str) -> None:
    content = json.dumps(BODY | {"other": [1, {"é": None}]}, ensure_ascii=False).encode()
    app.request("/hello/Zoe", method="PUT", body=content, content_type=content_type, status=204)
    assert table.rows() == {"Zoe": date(1990, 5, 17)}


@pytest.mark.parametrize(
    ("environ", "content"),
    [
        ({"CONTENT_LENGTH": "3"}, b"abc"),
        ({"CONTENT_LENGTH": ""}, b""),
        ({}, b""),
        ({"wsgi.input_terminated": False}, b""),
        ({"wsgi.input_terminated": True}, b"abcd" * 1024),
    ],
)
def test_content_is_read_to_the_stated_length_or_to_its_end(environ: dict[str, Any], content: bytes) -> None:
    assert hello.read_content({**environ, "wsgi.input": io.BytesIO(b"abcd" * 1024)}) == content


@pytest.mark.parametrize(
    ("length", "text"),
    [
        ("4", "The content must be as long as its Content-Length."),
        ("a", "The Content-Length must be a number of bytes."),
    ],
)
def test_content_that_cannot_be_read_is_400(length: str, text: str) -> None:
    with pytest.raises(hello.HTTPError) as raised:
        hello.read_content({"CONTENT_LENGTH": length, "wsgi.input": io.BytesIO(b"abc")})
    assert (raised.value.status, raised.value.message) == (400, text)


def padded(size: int) -> bytes:
    return json.dumps(BODY).encode().ljust(size)


def test_put_of_4_kib_is_204_and_of_a_byte_more_413(app: TestApp, table: Database) -> None:
    assert "4096 bytes" in message(app.request("/hello/Zoe", method="PUT", body=padded(4097), status=413))
    assert table.rows() == {}
    app.request("/hello/Zoe", method="PUT", body=padded(4096), status=204)
    assert table.rows() == {"Zoe": date(1990, 5, 17)}


@pytest.mark.parametrize("length", ["100", "-1", "+29", "2_9", "29.0", "a", "0x1d", "9" * 5000])
def test_put_whose_content_length_is_invalid_or_too_long_is_400(table: Database, length: str) -> None:
    """WebTest would correct the length."""
    start_response = Mock()
    content = io.BytesIO(json.dumps(BODY).encode())
    environ = {"REQUEST_METHOD": "PUT", "PATH_INFO": "/hello/Zoe", "CONTENT_LENGTH": length, "wsgi.input": content}
    hello.application(environ, start_response)
    assert start_response.call_args.args[0] == "400 Bad Request"
    assert table.rows() == {}


VALUES = st.recursive(
    st.none() | st.booleans() | st.text() | st.floats() | st.integers(),
    lambda inner: st.lists(inner) | st.dictionaries(st.just("dateOfBirth") | st.text(), inner),
)


@given(st.binary(max_size=200) | VALUES.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=50)
def test_any_content_is_a_date_or_400(content: bytes) -> None:
    try:
        assert hello.parse_date_of_birth(hello.parse_document(content)) < hello.today()
    except hello.HTTPError as error:
        assert error.status == 400


# --- Birthday arithmetic ----------------------------------------------------------------------------


def walk(born: date, on: date) -> int:
    """Count the days one by one, on a calendar of the test's own."""
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
DATES = st.dates() | LEAP_DAYS | DAYS_BY_THE_SEAM


@given(born=DATES, on=DATES.filter(lambda day: day.year < 9999))
@settings(max_examples=500)
def test_days_until_birthday_are_those_of_a_calendar_walk(born: date, on: date) -> None:
    assert hello.days_until_birthday(born, on) == walk(born, on)


@pytest.mark.parametrize(
    ("on", "days"),
    [("2027-02-28", 1), ("2027-03-01", 0), ("2027-03-02", 364), ("2028-02-28", 1), ("2028-02-29", 0)]
    + [("2028-03-01", 365), ("2100-02-28", 1), ("2100-03-01", 0), ("2000-02-29", 0)],
)
def test_birthday_of_29_february_is_1_march_in_common_years(on: str, days: int) -> None:
    assert hello.days_until_birthday(date(1996, 2, 29), date.fromisoformat(on)) == days


# --- Bugs ----------------------------------------------------------------------------------------------


def test_bug_is_500_that_says_so_and_its_place_is_logged_without_its_text(
    app: TestApp, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(username: str) -> None:
        raise ZeroDivisionError(username)

    monkeypatch.setattr(hello, "find_date_of_birth", fail)
    response = app.get("/hello/Zoe", status=500)
    assert "bug" in message(response)
    assert "database" not in response.text
    assert "Retry-After" not in response.headers
    assert "ZeroDivisionError at hello.py:" in caplog.text
    assert "Zoe" not in response.text + caplog.text


# --- Today and settings -----------------------------------------------------------------------------


@pytest.mark.parametrize("zone", ["Pacific/Kiritimati", "Pacific/Pago_Pago", "UTC"])
def test_today_is_today_in_the_time_zone_at_each_request(monkeypatch: pytest.MonkeyPatch, zone: str) -> None:
    instants = iter([datetime(2026, 3, 10, 9, 59, tzinfo=UTC), datetime(2026, 3, 11, 12, 1, tzinfo=UTC)])

    class Clock:
        @staticmethod
        def now(zone: ZoneInfo) -> datetime:
            return next(instants).astimezone(zone)

    monkeypatch.setattr(hello, "datetime", Clock)
    monkeypatch.setattr(hello, "TZ", ZoneInfo(zone))
    expected = {"Pacific/Kiritimati": (10, 12), "Pacific/Pago_Pago": (9, 11), "UTC": (10, 11)}[zone]
    assert (hello.today().day, hello.today().day) == expected
