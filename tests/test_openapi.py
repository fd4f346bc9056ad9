"""openapi.yaml against the service: neither may say what the other does not do.

Every example of the description is sent to a real gunicorn; schemathesis makes up the requests that no example shows.
"""

import json
import os
import re
import socket
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime
from http.client import HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote


import hypothesis
import jsonschema_rs
import openapi_spec_validator
import pytest
import schemathesis
import worker
import yaml
from embedded import free_port
from hypothesis import given, settings
from hypothesis import strategies as st

import hello
from test_hello import Table

ROOT = Path(__file__).parents[1]
FILE = ROOT / "openapi.yaml"
DESCRIPTION: dict[str, Any] = yaml.safe_load(FILE.read_text())
METHODS = {"get", "put", "post", "delete", "options", "head", "patch", "trace"}
# Headers that HTTP itself defines for every response; Content-Type stands in the description as a key.
HEADERS_OF_HTTP = {"date", "connection", "content-length", "content-type"}
HEAD_TIMEOUT = 0.5  # seconds, so that the examples of a 408 do not take ten each


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


PATHS = expand(DESCRIPTION["paths"])
OPERATIONS = [
    (path, method, item[method] | {"parameters": item["parameters"]})
    for path, item in PATHS.items()
    for method in item
    if method in METHODS
]

# --- The service ------------------------------------------------------------------------------------


@pytest.fixture
def table(database: dict[str, str]) -> Iterator[Table]:
    """The users of `x-given`, seen through a connection of our own."""
    table = Table(database)
    table.execute("TRUNCATE users")
    for username, born in DESCRIPTION["x-given"]["users"].items():
        table.execute("INSERT INTO users (username, date_of_birth) VALUES (%s, %s)", username, born)
    yield table
    table.connection.close()


@pytest.fixture(scope="session")
def start(database: dict[str, str]) -> Iterator[Callable[..., int]]:
    """A function that starts a gunicorn and returns its port."""
    processes = []

    def start(application: str, **environment: str) -> int:
        port = free_port()
        environment = os.environ | database | {"PORT": str(port), "METRICS_PORT": "0"} | environment
        command = [Path(sys.executable).with_name("gunicorn"), application]
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment))
        assert embedded.wait_for_port(processes[-1], port)
        return port

    yield start
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait()


@pytest.fixture(scope="session")
def servers(start: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """The ports of the service on the day of `x-given`: with its database running, and with it stopped."""
    folder = tmp_path_factory.mktemp("given")
    year, month, day = map(int, DESCRIPTION["x-given"]["today"].split("-"))
    (folder / "given.py").write_text(
        f"from datetime import date\nimport hello\nhello.today = lambda: date({year}, {month}, {day})\n"
        "application = hello.application\n"
    )
    options = {"PYTHONPATH": str(folder), "HEAD_TIMEOUT": str(HEAD_TIMEOUT), "WEB_CONCURRENCY": "1"}
    nobody = {"PGHOST": "127.0.0.1", "PGPORT": str(free_port())}
    return {
        "running": start("given:application", **options),
        "stopped": start("given:application", **options | nobody),
    }


def exchange(port: int, request: bytes, method: str) -> tuple[HTTPResponse, bytes]:
    """Send bytes, and read one response."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(request)
        response = HTTPResponse(client, method=method)
        response.begin()
        return response, response.read()


def request_bytes(path: str, method: str, body: dict[str, Any], given: dict[str, Any]) -> bytes:
    """Return the request that an `x-request` names, as it is on the wire."""
    target = given.get("path") or path.replace("{username}", quote(given.get("username", "Zoe"), safe=""))
    method = given.get("method", method.upper())
    if "raw" in given:
        return given["raw"].format(method=method, path=target).encode()
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


def check(response: HTTPResponse, content: bytes, method: str, documented: dict[str, Any]) -> None:
    """Compare a response with its description: each header, the media type, the content."""
    received = {name.lower(): value for name, value in response.getheaders()}
    headers = {name.lower(): header for name, header in documented.get("headers", {}).items()}
    assert received.keys() - HEADERS_OF_HTTP <= headers.keys()
    assert {name for name, header in headers.items() if header.get("required")} <= received.keys()
    for name in headers.keys() & received.keys():
        value = int(received[name]) if headers[name]["schema"].get("type") == "integer" else received[name]
        jsonschema_rs.Draft202012Validator(headers[name]["schema"]).validate(value)
    if method == "HEAD":
        assert content == b""
    elif "content" in documented:
        assert received["content-length"] == str(len(content))
        schema = documented["content"][received["content-type"]]["schema"]
        jsonschema_rs.Draft202012Validator(schema).validate(yaml.safe_load(content))
    else:
        assert content == b""
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


def test_statuses_of_openapi_and_of_the_code_are_the_same() -> None:
    written = re.findall(r"(?:Refused|Response|say)\((\d{3})\b", (ROOT / "hello.py").read_text())
    refusals = [refusal.status for refusal in worker.REFUSALS]
    described = [status for _, _, operation in OPERATIONS for status in operation["responses"]]
    assert {*described, "405"} == {*written, *[str(status.value) for status in refusals]}


# --- Examples ---------------------------------------------------------------------------------------


def examples_of_responses() -> Iterator[Any]:
    """Yield each example of a response: path, method, status or name, response, example."""
    places = [(path, method, operation["responses"]) for path, method, operation in OPERATIONS]
    for name, status in {"UnknownPath": "404", "MethodNotAllowed": "405"}.items():
        places.append(("", "", {status: expand(DESCRIPTION["components"]["responses"][name])}))
    for path, method, responses in places:
        for status, response in responses.items():
            for content in response.get("content", {}).values():
                for name, example in content.get("examples", {}).items():
                    identity = f"{method.upper()} {path} {status} {name}".strip()
                    yield pytest.param(path, method, int(status), response, example, id=identity)


@pytest.mark.parametrize(("path", "method", "status", "documented", "example"), list(examples_of_responses()))
@pytest.mark.usefixtures("table")
def test_example_of_a_response_is_what_its_request_gets(
    servers: dict[str, int], path: str, method: str, status: int, documented: dict[str, Any], example: dict[str, Any]
) -> None:
    given = example["x-request"]
    method = given.get("method", method.upper())
    request = request_bytes(path, method, {"dateOfBirth": "1990-05-17"}, given)
    response, content = exchange(servers[given.get("database", "running")], request, method)
    assert response.status == status
    check(response, content, method, documented)
    if method != "HEAD":
        assert json.loads(content) == example["value"]


def examples_of_requests() -> Iterator[Any]:
    """Yield each example of a parameter or of a content: path, method, operation, headers, username, content."""
    for path, method, operation in OPERATIONS:
        contents = {"": {}}
        if "requestBody" in operation:
            examples = operation["requestBody"]["content"]["application/json"]["examples"]
            contents = {name: example["value"] for name, example in examples.items()}
        for name, content in contents.items():
            yield pytest.param(path, method, operation, {"content": content}, id=f"{method.upper()} {path} {name}")
        for parameter in operation["parameters"]:
            for name, example in parameter["examples"].items():
                value = example["value"]
                given = {"username": value} if parameter["in"] == "path" else {"headers": {parameter["name"]: value}}
                yield pytest.param(path, method, operation, given, id=f"{method.upper()} {path} {name}")


@pytest.mark.parametrize(("path", "method", "operation", "given"), list(examples_of_requests()))
def test_example_of_a_request_succeeds(
    servers: dict[str, int], table: Table, path: str, method: str, operation: dict[str, Any], given: dict[str, Any]
) -> None:
    body = given.pop("content", None) or {"dateOfBirth": "1990-05-17"}
    response, content = exchange(servers["running"], request_bytes(path, method, body, given), method.upper())
    (status,) = [status for status in operation["responses"] if status.startswith("2")]
    assert response.status == int(status)
    check(response, content, method.upper(), operation["responses"][status])
    if method == "put":
        assert table.rows()[given.get("username", "Zoe")] == date.fromisoformat(body["dateOfBirth"])
    if "X-Request-Id" in given.get("headers", {}):
        assert response.getheader("X-Request-Id") == given["headers"]["X-Request-Id"]


def test_every_response_with_content_but_the_file_itself_has_an_example() -> None:
    without = [
        (path, method, status)
        for path, method, operation in OPERATIONS
        for status, response in operation["responses"].items()
        for content in response.get("content", {}).values()
        if not content.get("examples")
    ]
    assert without == [("/openapi.yaml", "get", "200")]


def test_served_file_is_that_of_the_repository(servers: dict[str, int]) -> None:
    request = request_bytes("/openapi.yaml", "GET", {}, {})
    response, content = exchange(servers["running"], request, "GET")
    assert response.getheader("Content-Type") == "application/yaml"
    assert content == FILE.read_bytes()


# --- Schemas against the code's own rules -----------------------------------------------------------

SCHEMAS = expand(DESCRIPTION["components"]["schemas"])
USERNAME = jsonschema_rs.Draft202012Validator(expand(DESCRIPTION["components"]["parameters"]["Username"]["schema"]))
DATE_OF_BIRTH = jsonschema_rs.Draft202012Validator(SCHEMAS["DateOfBirth"], validate_formats=True)


def is_accepted(parse: Callable[[Any], Any], argument: Any) -> bool:
    try:
        parse(argument)
    except hello.HTTPError:
        return False
    return True


def test_pattern_of_a_username_takes_the_same_characters_as_the_code() -> None:
    """Every character that Python knows, as the first and as a later one; it may know fewer than the validator."""
    for character in map(chr, range(sys.maxunicode + 1)):
        if unicodedata.category(character) not in {"Cn", "Cs"}:
            for name in (character, f"a{character}"):
                parsed = is_accepted(hello.parse_username, name.encode().decode("latin-1"))
                assert USERNAME.is_valid(name) == parsed, ascii(name)


LETTERS_AND_MARKS = st.text(st.characters(categories=["L", "Mn", "Mc"]), min_size=200, max_size=256)


@hypothesis.example("a" * 255)
@hypothesis.example("a" * 256)
@given(LETTERS_AND_MARKS | st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=10))
@settings(max_examples=300, deadline=None)
def test_name_that_fits_the_schema_is_accepted_and_another_only_for_its_marks(name: str) -> None:
    accepted = is_accepted(hello.parse_username, name.encode().decode("latin-1"))
    if USERNAME.is_valid(name):
        assert accepted
    elif accepted:
        assert len(name) > 255 or unicodedata.normalize("NFC", name) != name


DATES = st.dates().map(str) | st.from_regex(r"\A[0-9]{4}-[0-9]{2}-[0-9]{2}\Z") | st.text(max_size=10)


@given(DATES)
@settings(max_examples=500, deadline=None)
def test_date_is_accepted_just_where_the_schema_says_so_and_it_is_before_today(text: str) -> None:
    document = {"dateOfBirth": text}
    accepted = is_accepted(hello.parse_date_of_birth, document)
    assert accepted == (DATE_OF_BIRTH.is_valid(document) and date.fromisoformat(text) < hello.today())


# --- Made-up requests -------------------------------------------------------------------------------
# schemathesis reads this file for what JSON Schema cannot say of a request, or schemathesis cannot make.


@schemathesis.hook
def before_load_schema(context: Any, raw_schema: dict[str, Any]) -> None:
    """Let it make marks of any kind, the only class of them that it can make."""
    schema = raw_schema["components"]["parameters"]["Username"]["schema"]
    schema["pattern"] = schema["pattern"].replace(r"\p{Mn}\p{Mc}", r"\p{M}")


@schemathesis.hook
def filter_path_parameters(context: Any, path_parameters: Any) -> bool:
    """Leave out what its class of marks has too much: enclosing marks, and what Unicode does not know."""
    return not {unicodedata.category(character) for character in unquote(str(path_parameters))} & {"Me", "Cn"}


@schemathesis.hook
def filter_body(context: Any, body: Any) -> bool:
    """Leave out what only words say: a date must be before today, the content within 4,096 bytes."""
    try:
        text = json.dumps(body, ensure_ascii=False)
        return len(text.encode()) <= 4096 and date.fromisoformat(body["dateOfBirth"]) < datetime.now(UTC).date()
    except (TypeError, KeyError, ValueError):
        return True


@pytest.mark.usefixtures("table")
def test_made_up_requests_get_what_openapi_says(start: Callable[..., int], table: Table, tmp_path: Path) -> None:
    port = start("hello:application")
    command = [Path(sys.executable).with_name("schemathesis"), "run", FILE, f"--url=http://127.0.0.1:{port}"]
    options = ["--checks=all", "--max-time=5", "--max-response-time=5", "--no-color", "--continue-on-failure"]
    environment = os.environ | {"SCHEMATHESIS_HOOKS": "tests.test_openapi", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *options], check=False, capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Tested: {len(OPERATIONS)}" in done.stdout
    examples = FILE.read_text()
    assert [name for name, born in table.rows().items() if name not in examples or str(born) not in examples]
