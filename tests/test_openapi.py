"""openapi.yaml and the service agree: each example is sent to a gunicorn, and schemathesis makes up other requests."""

import json
import os
import re
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, urlsplit
from zoneinfo import ZoneInfo

import hypothesis
import jsonschema_rs
import openapi_spec_validator
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import hello
from server import parser
from tests.support.network import LOOPBACK, Response, free_port, read_all, responses
from tests.support.postgres import Database
from tests.support.service import Service

ROOT = Path(__file__).parents[1]
FILE = ROOT / "openapi.yaml"
DESCRIPTION: dict[str, Any] = yaml.safe_load(FILE.read_text())
# Headers that HTTP itself defines for every response; the description has Content-Type as a key.
HEADERS_OF_HTTP = {"date", "connection", "content-length", "content-type"}
ZONE = f"Etc/GMT{datetime.now(UTC).hour - 12:+d}"  # where it is noon, so that today does not change meanwhile
USUAL = {"dateOfBirth": "1990-05-17"}
USERS = {"Zoe": 68, "Łukasz": 0}  # and the days until their birthdays


class Request(NamedTuple):
    """What an example's request has that its operation's usual request has not."""

    username: str = "Zoe"
    method: str | None = None
    path: str | None = None
    content: bytes | None = None
    database: str = "running"


# The requests that get the examples of responses, by the names of these
REQUESTS = {
    "inDays": Request("Zoe"),
    "today": Request("Łukasz"),
    "notLetters": Request("Zoe1"),
    "notUtf8": Request(path="/hello/%FF"),
    "tooLong": Request("a" * 256),
    "neverSaved": Request("Nobody"),
    "byteOrderMark": Request(content=json.dumps(USUAL).encode("utf-8-sig")),
    "notJson": Request(content=b"dateOfBirth=1990-05-17"),
    "notAnObject": Request(content=b'"1990-05-17"'),
    "noDateOfBirth": Request(content=b'{"dateOfBirth": 19900517}'),
    "notADate": Request(content=b'{"dateOfBirth": "1990-02-30"}'),
    "inTheFuture": Request(content=b'{"dateOfBirth": "9999-12-31"}'),
    "aByteTooLong": Request(content=json.dumps(USUAL).encode().ljust(4097)),
    "stopped": Request(database="stopped"),
    "alive": Request(),
    "ready": Request(),
    "root": Request(method="GET", path="/"),
    "postUser": Request(method="POST", path="/hello/Zoe"),
    "postProbe": Request(method="POST", path="/livez"),
}
HEAD = b"GET /livez HTTP/1.1\r\nHost: a\r\n"
# The bytes that get the examples of a protocol error
PROTOCOL_ERRORS = {
    "notHttp": HEAD + b"No colon\r\n\r\n",
    "noVersion": b"GET /livez\r\n\r\n",
    "unknownScheme": b"GET ftp://a/livez HTTP/1.1\r\nHost: a\r\n\r\n",
    "noHost": b"GET /livez HTTP/1.1\r\n\r\n",
    "spaceInHost": b"GET /livez HTTP/1.1\r\nHost: a b\r\n\r\n",
    "notChunked": HEAD + b"Transfer-Encoding: gzip\r\n\r\n",
    "chunkedInOldHttp": b"GET /livez HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "malformedChunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "halfAHead": b"GET /livez HTTP/1.1\r\nHost: ",
    "tooMuchExpected": HEAD + b"Expect: 100-continue\r\nContent-Length: 4097\r\n\r\n",
    "longQuery": b"GET /livez?" + b"a" * 8190 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    "expectMagic": HEAD + b"Expect: magic\r\n\r\n",
    "manyHeaders": HEAD + b"X: a\r\n" * 64 + b"\r\n",
    "unknownMethod": b"MKCOL /livez HTTP/1.1\r\nHost: a\r\n\r\n",
    "compressedContent": HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n",
    "otherVersion": b"GET /livez HTTP/2.0\r\nHost: a\r\n\r\n",
}


# --- What the file describes ------------------------------------------------------------------------


def expand(node: Any) -> Any:
    """Return a part of the description with what its references name in their place."""
    if isinstance(node, list):
        return [expand(value) for value in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        target: Any = DESCRIPTION
        for key in node["$ref"].removeprefix("#/").split("/"):
            target = target[key]
        return expand(target)
    return {key: expand(value) for key, value in node.items()}


class Operation(NamedTuple):
    """A method of a path, and what the file says about it."""

    path: str
    method: str
    described: dict[str, Any]


def operations() -> Iterator[Operation]:
    """Yield each operation; the parameters of its path are among what is described."""
    for path, item in expand(DESCRIPTION["paths"]).items():
        for method in item.keys() - {"parameters"}:
            yield Operation(path, method.upper(), item[method] | {"parameters": item["parameters"]})


COMPONENTS = expand(DESCRIPTION["components"])
OPERATIONS = sorted(operations(), key=lambda operation: operation[:2])
PROTOCOL_ERROR = COMPONENTS["responses"]["ProtocolError"]
USERNAME = COMPONENTS["parameters"]["Username"]["schema"]
DATE_OF_BIRTH = jsonschema_rs.Draft202012Validator(COMPONENTS["schemas"]["DateOfBirth"], validate_formats=True)


def is_username(name: str) -> bool:
    """Return whether a name is one or more letters and nothing else, in the words of openapi.yaml."""
    kinds = [unicodedata.category(character)[0] for character in unicodedata.normalize("NFC", name)]
    return kinds[:1] == ["L"] and set(kinds) <= {"L", "M"}


class Example(NamedTuple):
    """An example of a response: its name, the status and the description of the response, the content."""

    name: str
    status: int
    response: dict[str, Any]
    value: dict[str, str]


def examples(status: str, response: dict[str, Any]) -> Iterator[Example]:
    """Yield the examples of a response; those of a protocol error have the status as their summary."""
    for content in response.get("content", {}).values():
        for name, example in content.get("examples", {}).items():
            yield Example(name, int(example.get("summary", status)), response, example["value"])


def examples_of_operations() -> Iterator[tuple[Operation, Example]]:
    """Yield each example that a request can get, with its operation."""
    for operation in OPERATIONS:
        for status, response in operation.described["responses"].items():
            if status not in {"500", "default"}:
                yield from ((operation, example) for example in examples(status, response))
    of_no_operation = {"404": "UnknownPath", "405": "MethodNotAllowed"}
    for status, name in of_no_operation.items():
        for example in examples(status, COMPONENTS["responses"][name]):
            yield Operation("", "", {}), example


EXAMPLES = list(examples_of_operations())
EXAMPLES_OF_PROTOCOL_ERRORS = list(examples("", PROTOCOL_ERROR))
MESSAGES = {(example.status, example.value["message"]) for _, example in EXAMPLES}
MESSAGES_OF_PROTOCOL_ERRORS = {(example.status, example.value["message"]) for example in EXAMPLES_OF_PROTOCOL_ERRORS}


# --- The service ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def services(database: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Service]]:
    """The service with its database running, and with its database stopped."""
    folder = tmp_path_factory.mktemp("openapi")
    options = {"TZ": ZONE, "WEB_CONCURRENCY": "1", "HEAD_TIMEOUT": "0.5"}
    nowhere = {"PGHOST": LOOPBACK, "PGPORT": str(free_port())}
    with Service(folder, database, **options) as running, Service(folder, database | nowhere, **options) as stopped:
        yield {"running": running, "stopped": stopped}


@pytest.fixture
def users(table: Database) -> Database:
    """The database with USERS."""
    today = datetime.now(ZoneInfo(ZONE)).date()
    for username, days in USERS.items():
        birthday = (today + timedelta(days)).replace(year=1992)  # a leap year has every day
        table.query("INSERT INTO users (username, date_of_birth) VALUES (%s, %s)", username, birthday)
    return table


def path_of(path: str, username: str) -> str:
    return path.replace("{username}", quote(username, safe=""))


def check(response: Response, method: str, described: dict[str, Any]) -> None:
    """Compare a response with its description: each header, the media type, the content."""
    received = {name.lower(): value for name, value in response.headers.items()}
    headers = {name.lower(): header for name, header in described.get("headers", {}).items()}
    assert received.keys() - HEADERS_OF_HTTP == headers.keys()
    for name, header in headers.items():
        value = int(received[name]) if header["schema"]["type"] == "integer" else received[name]
        jsonschema_rs.Draft202012Validator(header["schema"]).validate(value)
    if method == "HEAD" or "content" not in described:
        assert response.content == b""
    else:
        schema = described["content"][received["content-type"]]["schema"]
        if received["content-type"] == "application/json":
            jsonschema_rs.Draft202012Validator(schema).validate(json.loads(response.content))
            assert response.content.endswith(b"}\n")


# --- The file ---------------------------------------------------------------------------------------


def test_openapi_file_is_valid() -> None:
    openapi_spec_validator.validate(DESCRIPTION)


def test_openapi_version_is_that_of_the_service() -> None:
    assert DESCRIPTION["info"]["version"] == hello.__version__


def test_paths_and_methods_of_openapi_and_of_the_code_are_the_same() -> None:
    described: dict[str, set[str]] = {}
    for operation in OPERATIONS:
        described.setdefault(operation.path.replace("{username}", "<username>"), set()).add(operation.method)
    assert described == {template: {*handlers, "HEAD", "OPTIONS"} for template, handlers in hello.ROUTES.items()}


def test_every_operation_may_get_a_protocol_error_and_may_meet_a_bug() -> None:
    for operation in OPERATIONS:
        assert operation.described["responses"]["default"] == PROTOCOL_ERROR
        assert operation.described["responses"]["500"] == COMPONENTS["responses"]["Bug"]


def test_every_example_of_a_response_has_a_request() -> None:
    assert {example.name for _, example in EXAMPLES} == REQUESTS.keys()
    assert {example.name for example in EXAMPLES_OF_PROTOCOL_ERRORS} == PROTOCOL_ERRORS.keys()


def test_no_pattern_needs_the_tables_of_unicode() -> None:
    """JavaScript without `u`, Python and Java without a flag do not know them."""
    patterns = re.findall(r"pattern: (.*)", FILE.read_text())
    assert patterns
    assert not [pattern for pattern in patterns if r"\p" in pattern]


# --- Examples ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "example"), EXAMPLES, ids=[f"{o.method} {o.path} {e.status} {e.name}" for o, e in EXAMPLES]
)
@pytest.mark.usefixtures("users")
def test_example_of_a_response_is_what_its_request_gets(
    services: dict[str, Service], operation: Operation, example: Example
) -> None:
    request = REQUESTS[example.name]
    method = request.method or operation.method
    content = request.content or (json.dumps(USUAL).encode() if method == "PUT" else None)
    path = request.path or path_of(operation.path, request.username)
    response = services[request.database].ask(method, path, content)
    assert response.status == example.status
    check(response, method, example.response)
    assert method == "HEAD" or json.loads(response.content) == example.value


@pytest.mark.parametrize("example", EXAMPLES_OF_PROTOCOL_ERRORS, ids=lambda example: example.name)
def test_example_of_a_protocol_error_is_what_its_bytes_get(services: dict[str, Service], example: Example) -> None:
    with services["running"].open_socket() as client:
        client.sendall(PROTOCOL_ERRORS[example.name])
        (response,) = responses(read_all(client))
    assert response.status == example.status
    check(response, "GET", PROTOCOL_ERROR)
    assert json.loads(response.content) == example.value


def test_examples_of_protocol_errors_are_the_errors_of_the_parser() -> None:
    values = [value for value in vars(parser).values() if isinstance(value, tuple)]
    assert {value for value in values if isinstance(value[0], HTTPStatus)} == MESSAGES_OF_PROTOCOL_ERRORS


def test_example_of_a_bug_is_the_message_of_the_code() -> None:
    (example,) = examples("500", COMPONENTS["responses"]["Bug"])
    assert example.value == {"message": hello.BUG}


@pytest.mark.usefixtures("users")
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: f"{operation.method} {operation.path}")
def test_success_is_what_the_operation_describes(services: dict[str, Service], operation: Operation) -> None:
    content = json.dumps(USUAL).encode() if operation.method == "PUT" else None
    path = path_of(operation.path, "Zoe")
    response = services["running"].ask(operation.method, path, content, "X-Request-Id: checkout-42")
    (status,) = [status for status in operation.described["responses"] if status.startswith("2")]
    assert response.status == int(status)
    assert response.headers["X-Request-Id"] == "checkout-42"
    check(response, operation.method, operation.described["responses"][status])


def test_served_file_is_that_of_the_repository(services: dict[str, Service]) -> None:
    response = services["running"].ask("GET", "/openapi.yaml")
    assert response.headers["Content-Type"] == "application/yaml"
    assert response.content == FILE.read_bytes()


# --- Schemas against the code's own rules -----------------------------------------------------------


def accepts(parse: Callable[[Any], object], value: Any) -> bool:
    try:
        parse(value)
    except hello.HTTPError:
        return False
    return True


def accepts_username(name: str) -> bool:
    return accepts(hello.parse_username, name.encode().decode("latin-1"))


def test_each_character_of_unicode_is_accepted_by_the_code_as_the_rule_says_and_then_by_the_pattern() -> None:
    """The validator's regular expressions are those of Rust; Python's are those of many generated clients."""
    in_rust = jsonschema_rs.Draft202012Validator(USERNAME)
    in_python = re.compile(USERNAME["pattern"])
    for character in map(chr, range(sys.maxunicode + 1)):
        if unicodedata.category(character) in {"Cn", "Co", "Cs"}:  # not assigned, private, half a character
            continue
        for name in (character, f"a{character}"):
            accepted = accepts_username(name)
            assert accepted == is_username(name), ascii(name)
            if accepted or character.isascii():
                assert in_rust.is_valid(name) == accepted, ascii(name)
                assert bool(in_python.search(name)) == accepted or name == "a\n", ascii(name)


def test_examples_of_requests_are_accepted_by_the_code() -> None:
    """The made-up requests have them, too."""
    (put,) = [operation.described for operation in OPERATIONS if operation.method == "PUT"]
    for example in put["requestBody"]["content"]["application/json"]["examples"].values():
        assert hello.parse_date_of_birth(example["value"])
    for example in COMPONENTS["parameters"]["Username"]["examples"].values():
        assert accepts_username(example["value"])


NUMBERS = st.builds("{:04}-{:02}-{:02}".format, st.integers(0, 9999), st.integers(0, 99), st.integers(0, 99))


@hypothesis.example("0000-01-01")
@hypothesis.example("1990-02-30")
@given(st.dates().map(str) | NUMBERS | st.text("0123456789-+. TZW\n٣", max_size=11))
@settings(max_examples=100)
def test_date_is_accepted_just_where_the_schema_says_so_and_it_is_from_year_1_and_before_today(text: str) -> None:
    fits = DATE_OF_BIRTH.is_valid({"dateOfBirth": text}) and not text.startswith("0000")
    assert accepts(hello.parse_date_of_birth, {"dateOfBirth": text}) == (
        fits and date.fromisoformat(text) < hello.today()
    )


# --- Made-up requests -------------------------------------------------------------------------------


class MadeUp(NamedTuple):
    """What a run of schemathesis printed, its requests and responses (HAR 1.2), and what the table then had."""

    output: str
    status: int
    entries: list[dict[str, Any]]
    rows: dict[str, date]


def description_for_schemathesis() -> str:
    """Return the description with the exact rule of usernames: the format of tests/support/schemathesis_hooks.py."""
    description = yaml.safe_load(FILE.read_text())
    description["components"]["parameters"]["Username"]["schema"]["format"] = "username"
    content = description["paths"]["/openapi.yaml"]["get"]["responses"]["200"]["content"]
    content["application/yaml"] = {}  # schemathesis would compare the parsed content with the schema of the bytes
    return yaml.safe_dump(description)


@pytest.fixture(scope="module")
def made_up(services: dict[str, Service], postgres: Database, tmp_path_factory: pytest.TempPathFactory) -> MadeUp:
    """A run of schemathesis on an empty table."""
    postgres.query("TRUNCATE users")
    folder = tmp_path_factory.mktemp("schemathesis")
    (folder / "openapi.yaml").write_text(description_for_schemathesis())
    program = str(Path(sys.executable).with_name("schemathesis"))
    command = [program, f"--config-file={ROOT / 'schemathesis.toml'}", "run", "openapi.yaml", "--no-color"]
    fixed = ["--seed=1", "--max-examples=3", "--generation-database=none"]
    options = [f"--url=http://{LOOPBACK}:{services['running'].port}", "--report-har-path=har.json"]
    environment = os.environ | {"SCHEMATHESIS_HOOKS": "tests.support.schemathesis_hooks", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *fixed, *options], check=False, capture_output=True, text=True, cwd=folder, env=environment
    )
    report = json.loads((folder / "har.json").read_text())
    return MadeUp(done.stdout + done.stderr, done.returncode, report["log"]["entries"], postgres.rows())


def date_of(entry: dict[str, Any]) -> date | None:
    """Return the date of birth of a PUT, None unless it fits its schema and is before today."""
    try:
        document = json.loads(entry["request"].get("postData", {}).get("text", ""))
    except ValueError:
        return None
    if not DATE_OF_BIRTH.is_valid(document):
        return None
    born = date.fromisoformat(document["dateOfBirth"])
    return born if born < datetime.now(ZoneInfo(ZONE)).date() else None


def test_made_up_requests_get_what_openapi_says(made_up: MadeUp) -> None:
    assert made_up.status == 0, made_up.output
    assert f"Tested: {len(OPERATIONS)}" in made_up.output


def test_errors_of_made_up_requests_have_examples(made_up: MadeUp) -> None:
    errors = {
        (entry["response"]["status"], json.loads(entry["response"]["content"]["text"])["message"])
        for entry in made_up.entries
        if entry["response"]["status"] >= 400 and entry["request"]["method"] != "HEAD"
    }
    assert errors <= MESSAGES | MESSAGES_OF_PROTOCOL_ERRORS


def test_made_up_put_is_saved_just_where_it_fits_the_rules(made_up: MadeUp) -> None:
    saved = {}
    for entry in made_up.entries:
        if entry["request"]["method"] != "PUT":
            continue
        name = unquote(urlsplit(entry["request"]["url"]).path.removeprefix("/hello/"))
        born = date_of(entry)
        is_valid = is_username(name) and born is not None
        assert (entry["response"]["status"] == 204) == is_valid, entry
        if is_valid:
            saved[unicodedata.normalize("NFC", name)] = born
    assert saved
    assert made_up.rows == saved
