"""openapi.yaml and the service agree: each example is sent to a gunicorn, and schemathesis makes up other requests."""

import contextlib
import json
import socket
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
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
from server.parser import RequestParser
from tests.support.network import LOOPBACK, Response, free_port, read_all, split_response
from tests.support.postgres import Database
from tests.support.raw_requests import ERRORS, SECOND, pieces
from tests.support.service import Service

ROOT = Path(__file__).parents[1]
FILE = ROOT / "openapi.yaml"
DESCRIPTION: dict[str, Any] = yaml.safe_load(FILE.read_text())
GIVEN: dict[str, int] = DESCRIPTION["x-given"]
METHODS = {"get", "put", "post", "delete", "options", "head", "patch", "trace"}
# Headers that HTTP itself defines for every response; the description has Content-Type as a key.
HEADERS_OF_HTTP = {"date", "connection", "content-length", "content-type"}
ZONE = f"Etc/GMT{datetime.now(UTC).hour - 12:+d}"  # where it is noon, so that today does not change meanwhile
USUAL = {"dateOfBirth": "1990-05-17"}


def expand(node: Any) -> Any:
    """Return a part of the description with what its references name in their place."""
    if isinstance(node, dict) and "$ref" in node:
        target: Any = DESCRIPTION
        for key in node["$ref"].removeprefix("#/").split("/"):
            target = target[key]
        return expand(target)
    if isinstance(node, dict):
        return {key: expand(value) for key, value in node.items()}
    return [expand(value) for value in node] if isinstance(node, list) else node


COMPONENTS = expand(DESCRIPTION["components"])
OPERATIONS = [
    (path, method, item[method] | {"parameters": item["parameters"]})
    for path, item in expand(DESCRIPTION["paths"]).items()
    for method in item
    if method in METHODS
]
USERNAME = jsonschema_rs.Draft202012Validator(COMPONENTS["parameters"]["Username"]["schema"])
DATE_OF_BIRTH = jsonschema_rs.Draft202012Validator(COMPONENTS["schemas"]["DateOfBirth"], validate_formats=True)


class Example(NamedTuple):
    """An example of a response; `given` is its x-request."""

    method: str
    path: str
    status: int
    response: dict[str, Any]
    given: dict[str, Any]
    value: Any


def examples_of_responses() -> Iterator[tuple[str, Example]]:
    """Yield the name and the example, for each example of a response."""
    responses = [
        (method.upper(), path, status, response)
        for path, method, operation in OPERATIONS
        for status, response in operation["responses"].items()
        if status != "default"
    ]
    others = {"ServerMethods": "204", "UnknownPath": "404", "MethodNotAllowed": "405", "ProtocolError": "default"}
    responses += [("GET", "/hello/{username}", key, COMPONENTS["responses"][name]) for name, key in others.items()]
    responses.append(("HEAD", "/hello/{username}", "default", COMPONENTS["responses"]["ProtocolError"]))
    for method, path, key, response in responses:
        if "x-request" in response:
            given = response["x-request"]
            yield f"{given['method']} {given['path']}", Example(given["method"], path, int(key), response, given, None)
        for content in response.get("content", {}).values():
            for name, example in content.get("examples", {}).items():
                given, status = example["x-request"], example.get("x-status") or int(key)
                found = Example(given.get("method", method), path, status, response, given, example["value"])
                yield f"{method} {path} {status} {name}", found


EXAMPLES = dict(examples_of_responses())
MESSAGES = {(example.status, example.value["message"]) for example in EXAMPLES.values() if example.value}


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
    """The database with the users of `x-given`, so many days before their birthdays."""
    today = datetime.now(ZoneInfo(ZONE)).date()
    birthdays = [(today + timedelta(days)).replace(year=1992) for days in GIVEN.values()]  # a leap year has every day
    table.query("INSERT INTO users (username, date_of_birth) SELECT * FROM unnest(%s, %s)", [*GIVEN], birthdays)
    return table


def request_bytes(method: str, path: str, body: Any, given: dict[str, Any]) -> bytes:
    """Return the request that an `x-request` names, as it is on the wire."""
    target = given.get("path") or path.replace("{username}", quote(given.get("username", "Zoe"), safe=""))
    if "raw" in given:
        return str(given["raw"]).format(method=method, path=target).encode()
    if "queryLength" in given:
        target += "?" + given["queryLength"] * "a"
    content = given.get("content", json.dumps(body) if method == "PUT" else "").encode()
    content = content.ljust(given.get("contentLength", 0))
    headers = {"Host": "localhost"} | given.get("headers", {})
    if content:
        headers["Content-Length"] = str(len(content))
    headers |= {f"X-{n}": "" for n in range(given.get("headerCount", len(headers)) - len(headers))}
    lines = [f"{method} {target} HTTP/1.1", *[f"{name}: {value}" for name, value in headers.items()], "", ""]
    return "\r\n".join(lines).encode() + content


def send(service: Service, request: bytes, method: str) -> Response:
    """Send a request, whole or not, and return its response; fail where anything follows that."""
    with service.open_socket() as client:
        client.sendall(request)
        data = b""
        while (split := split_response(data, method)) is None:
            received = client.recv(65536)
            assert received, f"closed after {data!r}"
            data += received
        with contextlib.suppress(OSError):  # the service may have closed first
            client.shutdown(socket.SHUT_WR)
        response, rest = split
        assert rest + read_all(client) == b""
    return response


def check(response: Response, method: str, documented: dict[str, Any]) -> None:
    """Compare a response with its description: each header, the media type, the content."""
    received = {name.lower(): value for name, value in response.headers.items()}
    headers = {name.lower(): header for name, header in documented.get("headers", {}).items()}
    assert received.keys() - HEADERS_OF_HTTP <= headers.keys()
    assert {name for name, header in headers.items() if header.get("required")} <= received.keys()
    for name in headers.keys() & received.keys():
        value = int(received[name]) if headers[name]["schema"].get("type") == "integer" else received[name]
        jsonschema_rs.Draft202012Validator(headers[name]["schema"]).validate(value)
    if method == "HEAD":
        assert response.content == b""
    elif "content" in documented:
        schema = documented["content"][received["content-type"]]["schema"]
        jsonschema_rs.Draft202012Validator(schema).validate(yaml.safe_load(response.content))
    else:
        assert response.content == b""
        assert "content-type" not in received


# --- The file ---------------------------------------------------------------------------------------


def test_openapi_file_is_valid() -> None:
    openapi_spec_validator.validate(DESCRIPTION)


def test_openapi_version_is_that_of_the_service() -> None:
    assert DESCRIPTION["info"]["version"] == hello.__version__


def test_paths_and_methods_of_openapi_and_of_the_code_are_the_same() -> None:
    described: dict[str, set[str]] = {}
    for path, method, _ in OPERATIONS:
        described.setdefault(path.replace("{username}", "<username>"), set()).add(method.upper())
    assert described == {template: {*handlers, "HEAD", "OPTIONS"} for template, handlers in hello.ROUTES.items()}


def test_every_response_with_content_but_the_file_itself_has_an_example() -> None:
    without = [
        (path, method, status)
        for path, method, operation in OPERATIONS
        for status, response in operation["responses"].items()
        for content in response.get("content", {}).values()
        if not content.get("examples")
    ]
    assert without == [("/openapi.yaml", "get", "200")]


def test_every_operation_may_get_a_protocol_error() -> None:
    protocol_error = COMPONENTS["responses"]["ProtocolError"]
    assert [path for path, _, operation in OPERATIONS if operation["responses"]["default"] != protocol_error] == []


@pytest.mark.parametrize("request_bytes", [data for data, _ in ERRORS.values()], ids=ERRORS.keys())
def test_protocol_error_has_an_example(request_bytes: bytes) -> None:
    parser = RequestParser({})
    for piece in pieces(request_bytes + SECOND):
        parser.feed(piece)
    error = parser.error
    parser.close()
    assert error
    assert (error.status.value, error.message) in MESSAGES


# --- Examples ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES.keys())
@pytest.mark.usefixtures("users")
def test_example_of_a_response_is_what_its_request_gets(services: dict[str, Service], example: Example) -> None:
    service = services[example.given.get("database", "running")]
    request = request_bytes(example.method, example.path, USUAL, example.given)
    response = send(service, request, example.method)
    assert response.status == example.status
    check(response, example.method, example.response)
    if example.value and example.method != "HEAD":
        assert json.loads(response.content) == example.value


def examples_of_requests() -> Iterator[Any]:
    """Yield each example of a parameter or of a content: path, method, operation, content, x-request."""
    for path, method, operation in OPERATIONS:
        contents: dict[str, Any] = {"": {"value": {}}}
        if "requestBody" in operation:
            contents = operation["requestBody"]["content"]["application/json"]["examples"]
        for name, content in contents.items():
            yield pytest.param(path, method, operation, content["value"], {}, id=f"{method.upper()} {path} {name}")
        for parameter in operation["parameters"]:
            for name, example in parameter["examples"].items():
                value = example["value"]
                given = {"username": value} if parameter["in"] == "path" else {"headers": {parameter["name"]: value}}
                yield pytest.param(path, method, operation, USUAL, given, id=f"{method.upper()} {path} {name}")


@pytest.mark.parametrize(("path", "method", "operation", "body", "given"), list(examples_of_requests()))
def test_example_of_a_request_succeeds(
    services: dict[str, Service],
    users: Database,
    path: str,
    method: str,
    operation: dict[str, Any],
    body: Any,
    given: dict[str, Any],
) -> None:
    method = method.upper()
    response = send(services["running"], request_bytes(method, path, body, given), method)
    (status,) = [status for status in operation["responses"] if status.startswith("2")]
    assert response.status == int(status)
    check(response, method, operation["responses"][status])
    if method == "PUT":
        assert users.rows()[given.get("username", "Zoe")] == date.fromisoformat(body["dateOfBirth"])
    if "X-Request-Id" in given.get("headers", {}):
        assert response.headers["X-Request-Id"] == given["headers"]["X-Request-Id"]


def test_served_file_is_that_of_the_repository(services: dict[str, Service]) -> None:
    response = services["running"].ask("GET", "/openapi.yaml")
    assert response.headers["Content-Type"] == "application/yaml"
    assert response.content == FILE.read_bytes()


# --- Schemas against the code's own rules -----------------------------------------------------------


def is_accepted(parse: Callable[[Any], Any], argument: Any) -> bool:
    try:
        parse(argument)
    except hello.HTTPError:
        return False
    return True


def test_pattern_of_a_username_takes_the_same_characters_as_the_code() -> None:
    """Every character that Python knows, as the first and as a later one; it may know fewer than the validator."""
    for character in map(chr, range(sys.maxunicode + 1)):
        if unicodedata.category(character) not in {"Cn", "Co", "Cs"}:
            for name in (character, f"a{character}"):
                parsed = is_accepted(hello.parse_username, name.encode().decode("latin-1"))
                assert USERNAME.is_valid(name) == parsed, ascii(name)


@hypothesis.example("a" * 255)
@hypothesis.example("a" * 256)
@hypothesis.example("a" + "\u0344" * 254)  # two marks each in NFC
@given(
    st.text(st.characters(categories=["L", "M"]), min_size=200, max_size=256)
    | st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=10)
)
@settings(max_examples=100)
def test_name_that_fits_the_schema_is_accepted_and_another_only_for_its_marks(name: str) -> None:
    accepted = is_accepted(hello.parse_username, name.encode().decode("latin-1"))
    if USERNAME.is_valid(name):
        assert accepted
    elif accepted:
        assert len(name) > 255 or unicodedata.normalize("NFC", name) != name


@hypothesis.example("0000-01-01")
@hypothesis.example("1990-02-30")
@given(st.dates().map(str) | st.from_regex(r"\A[0-9]{4}-[0-9]{2}-[0-9]{2}\Z") | st.text(max_size=10))
@settings(max_examples=200)
def test_date_is_accepted_just_where_the_schema_says_so_and_it_is_before_today(text: str) -> None:
    document = {"dateOfBirth": text}
    accepted = is_accepted(hello.parse_date_of_birth, document)
    assert accepted == (DATE_OF_BIRTH.is_valid(document) and date.fromisoformat(text) < hello.today())


# --- Made-up requests -------------------------------------------------------------------------------


class MadeUp(NamedTuple):
    """What a run of schemathesis printed, its requests and responses (HAR 1.2), and what the table then had."""

    output: str
    status: int
    entries: list[dict[str, Any]]
    rows: dict[str, date]


@pytest.fixture(scope="module")
def made_up(services: dict[str, Service], postgres: Database, tmp_path_factory: pytest.TempPathFactory) -> MadeUp:
    """A run of schemathesis on an empty table."""
    postgres.query("TRUNCATE users")
    folder = tmp_path_factory.mktemp("schemathesis")
    program = str(Path(sys.executable).with_name("schemathesis"))
    command = [program, f"--config-file={ROOT / 'schemathesis.toml'}", "run", str(FILE), "--no-color"]
    fixed = ["--seed=1", "--max-examples=10", "--generation-database=none"]
    options = [f"--url=http://{LOOPBACK}:{services['running'].port}", "--report-har-path=har.json"]
    done = subprocess.run([*command, *fixed, *options], check=False, capture_output=True, text=True, cwd=folder)
    report = json.loads((folder / "har.json").read_text())
    return MadeUp(done.stdout + done.stderr, done.returncode, report["log"]["entries"], postgres.rows())


def put_of(entry: dict[str, Any]) -> tuple[str, date | None]:
    """Return the username of a PUT, and the date of birth where both fit their schemas and the date is before today."""
    name = unquote(urlsplit(entry["request"]["url"]).path.removeprefix("/hello/"))
    with contextlib.suppress(ValueError):
        document = json.loads(entry["request"].get("postData", {}).get("text", ""))
        if USERNAME.is_valid(name) and DATE_OF_BIRTH.is_valid(document):
            born = date.fromisoformat(document["dateOfBirth"])
            return name, born if born < datetime.now(ZoneInfo(ZONE)).date() else None
    return name, None


def test_made_up_requests_get_what_openapi_says(made_up: MadeUp) -> None:
    assert made_up.status == 0, made_up.output
    assert f"Tested: {len(OPERATIONS)}" in made_up.output


def test_errors_of_made_up_requests_have_examples(made_up: MadeUp) -> None:
    errors = {
        (entry["response"]["status"], json.loads(entry["response"]["content"]["text"])["message"])
        for entry in made_up.entries
        if entry["response"]["status"] >= 400 and entry["request"]["method"] != "HEAD"
    }
    assert errors <= MESSAGES


def test_made_up_put_is_saved_just_where_it_fits_the_schemas_with_a_date_before_today(made_up: MadeUp) -> None:
    puts = [entry for entry in made_up.entries if entry["request"]["method"] == "PUT"]
    saved = {}
    for entry in puts:
        name, born = put_of(entry)
        assert (entry["response"]["status"] == 204) == (born is not None), entry
        if born is not None:
            saved[unicodedata.normalize("NFC", name)] = born
    assert saved
    assert made_up.rows == saved
