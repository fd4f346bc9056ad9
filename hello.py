"""Store dates of birth and tell how long it is until the birthday: a WSGI application (PEP 3333).

Requests:  settings, SQL, the birthday rule, requests and responses, handlers and routing, `application`.
Postgres:  hosts, connections, statements, batches of requests that share a statement.
Commands:  `gunicorn hello:application` serves it; `python hello.py` does too, with the standard library's server;
           `python hello.py init-db` applies schema.sql.

PUT /hello/<username> with {"dateOfBirth": "YYYY-MM-DD"} saves or replaces it and answers 204. GET /hello/<username>
answers {"message": "Hello, <username>! Your birthday is in N day(s)"}. ROUTES lists all paths; HEAD and OPTIONS work on
each. Every error is {"message": "<what is wrong and what would be right>"}.

A server runs it in several processes, with threads or greenlets. Each process has its own connections and batches. What
waits or sleeps here lets the other requests of the process run.

Settings are the environment variables below, HOST and PORT (in serve), and those of libpq (PGHOST, PGUSER, ...).
"""

import contextlib
import ipaddress
import json
import logging
import os
import re
import select
import socket
import sys
import threading
import traceback
import unicodedata
import uuid
from collections.abc import Callable, Iterable, Iterator
from datetime import date, datetime
from http.client import responses
from pathlib import Path
from queue import Empty, SimpleQueue
from time import monotonic, sleep
from typing import Any, NamedTuple, NoReturn, TypeVar
from wsgiref.simple_server import make_server
from wsgiref.types import StartResponse, WSGIEnvironment
from zoneinfo import ZoneInfo

import psycopg2
from psycopg2 import errors, extensions

__version__ = "2.0.0"

# --- Settings ---------------------------------------------------------------------------------------

Number = TypeVar("Number", int, float)


class Setting(NamedTuple):
    """An environment variable: a number between two bounds, or a name."""

    name: str
    default: int | float | str
    unit: str
    minimum: float | None
    meaning: str
    maximum: float | None = None


SETTINGS: dict[str, Setting] = {}  # docs/configuration.md and .env.example are compared with it


def number(
    name: str,
    default: Number,
    unit: str,
    minimum: float,
    meaning: str,
    maximum: float = 1_000_000,
) -> Number:
    """Declare and read a number of the default's type; exit with one line if the value is wrong."""
    SETTINGS[name] = Setting(name, default, unit, minimum, meaning, maximum)
    text = os.environ.get(name) or str(default)
    kind = "an integer" if isinstance(default, int) else "a number"
    try:
        value = type(default)(text)
        if minimum <= float(value) <= maximum:
            return value
    except (ValueError, OverflowError):
        pass
    reject(name, text, f"{kind} from {minimum:g} to {maximum:.0f}")


def time_zone(name: str, default: str, meaning: str) -> ZoneInfo:
    """Declare and read a time zone; exit with one line if there is none with this name."""
    SETTINGS[name] = Setting(name, default, "time zone", None, meaning)
    text = os.environ.get(name) or default
    try:
        return ZoneInfo(text)
    except (ValueError, KeyError, OSError):  # zoneinfo raises each of them for some wrong names
        reject(name, text, "an IANA time zone such as Europe/Berlin")


def reject(name: str, text: str, right: str) -> NoReturn:
    """Exit with one line that names the setting and says which values are valid."""
    sys.exit(f"{name}={text!r} must be {right}; the default is {SETTINGS[name].default}")


TZ = time_zone("TZ", "UTC", "Time zone that decides the date of today, an IANA name such as Europe/Berlin")
DATABASE_CONNECTIONS = number(
    "DATABASE_CONNECTIONS", 1, "connections", 1, "Connections of a worker for reads, and as many for writes"
)
BATCH_SIZE = number("BATCH_SIZE", 100, "requests", 1, "Requests that may share one statement")
QUEUE_TIMEOUT = number("QUEUE_TIMEOUT", 1.5, "seconds", 0.001, "Time a request waits for a connection")
CONNECT_TIMEOUT = number("CONNECT_TIMEOUT", 1.0, "seconds", 0.001, "Time an attempt to connect may take")
STATEMENT_TIMEOUT = number("STATEMENT_TIMEOUT", 1.0, "seconds", 0.001, "Time Postgres may work on a statement")
# A batch is the requests that share one statement (Batcher). It takes new requests for this time, so that the last one
# can still wait for 3/4 of QUEUE_TIMEOUT.
JOIN_SECONDS = QUEUE_TIMEOUT / 4
# Less than STATEMENT_TIMEOUT, or no write ends with LockNotAvailable. A batch with one locked row waits for it twice:
# its statement fails, and then each row has one of its own. By default both waits are shorter than JOIN_SECONDS: up to
# BATCH_SIZE requests that arrive meanwhile share the next batch, and are answered in time.
LOCK_TIMEOUT = number("LOCK_TIMEOUT", 0.15, "seconds", 0.001, "Time a write may wait for a lock of another transaction")
DATABASE_TIMEOUT = number("DATABASE_TIMEOUT", 3.0, "seconds", 0.001, "Time for connecting and for a statement together")
INIT_TIMEOUT = number("INIT_TIMEOUT", 60.0, "seconds", 0.001, "Time `python hello.py init-db` waits for the database")

MAX_CONTENT_BYTES = 4096
MAX_NAME_LETTERS = 255
MAX_NAME_BYTES = 2500  # an index entry of Postgres holds at most 2,704 bytes
DEFAULT_PORT = "5432"
EXAMPLE = '{"dateOfBirth": "YYYY-MM-DD"}'
BUG = "This is a bug of the service: its place is in the log."
LOG = logging.getLogger("hello")
OPENAPI = Path(__file__).with_name("openapi.yaml").read_bytes()
SCHEMA = Path(__file__).with_name("schema.sql")


def postgres_hosts() -> list[str]:
    """Return the hosts in PGHOST; one that is empty if it is not set."""
    return os.environ.get("PGHOST", "").split(",")


def postgres_ports() -> list[str]:
    """Return the ports in PGPORT, one for each host or one for all; one that is empty if it is not set."""
    return os.environ.get("PGPORT", "").split(",")


def is_host(text: str) -> bool:
    """Return whether libpq can take a part of PGHOST: a folder of sockets, an address, a name, or nothing."""
    if text.startswith(("/", "@")):
        return "\n" not in text
    if ":" in text:
        return is_ipv6_address(text)
    return not re.search(r"[\s/@?#\[\]]", text)


def is_ipv6_address(text: str) -> bool:
    """Return whether a text is an IPv6 address, perhaps with a network interface after it."""
    address = text.partition("%")[0]
    try:
        ipaddress.IPv6Address(address)
    except ValueError:
        return False
    return True


def check_hosts() -> None:
    """Exit with one line if PGHOST is malformed, or has another number of hosts than PGPORT has ports.

    libpq would find such a PGHOST only when it connects, and print it. It may hold a password, so this does not.
    """
    hosts = postgres_hosts()
    ports = postgres_ports()
    if not all(map(is_host, hosts)):
        sys.exit("PGHOST must be one or more host names or addresses, with commas between them and no port or URL")
    ports_fit = len(ports) in {1, len(hosts)}
    if os.environ.get("PGHOST") and not ports_fit:
        sys.exit(f"PGPORT must be one port or as many as PGHOST has hosts: {len(hosts)}")


check_hosts()

# --- SQL --------------------------------------------------------------------------------------------

FIND_DATES_OF_BIRTH = """
    SELECT username, date_of_birth FROM users WHERE username = ANY(%s)
"""
SAVE_DATES_OF_BIRTH = """
    INSERT INTO users (username, date_of_birth) VALUES {rows}
    ON CONFLICT (username) DO UPDATE SET date_of_birth = EXCLUDED.date_of_birth
"""
# {...} is filled in by str.format, %s by psycopg2. Postgres runs one query string as one transaction. Settings are SET
# LOCAL, so that they end with it: PgBouncer then lends the session to others.
READ = """
    SET LOCAL statement_timeout = %s;
    SET LOCAL transaction_read_only = on;
    {statement}
"""
# A write may reach Postgres late, after its 503 and after the 204 of a newer one. It must not be committed then.
# So COMMIT is a message of its own, sent after Postgres has answered WRITE in time.
# The COMMIT may be late too. Until it arrives, or idle_in_transaction_session_timeout ends the transaction, the rows
# are locked: nobody saves a newer date in between.
# COMMIT waits for a synchronous standby. If somebody cancels the wait, it succeeds and warns (client_min_messages).
WRITE = """
    BEGIN;
    SET LOCAL statement_timeout = %s;
    SET LOCAL lock_timeout = %s;
    SET LOCAL idle_in_transaction_session_timeout = %s;
    SET LOCAL client_min_messages = warning;
    {statement}
"""
COMMIT = "COMMIT"
ROLLBACK = "ROLLBACK"
# The start time, with microseconds, identifies the server. The count is of the role's commits that wait for a standby
# (SyncRep) for more than %s seconds.
ABOUT_SERVER = """
    SELECT extract(epoch FROM pg_postmaster_start_time())::text,
        (SELECT count(*) FROM pg_stat_activity WHERE usename = current_user AND wait_event = 'SyncRep'
            AND clock_timestamp() - query_start > %s * interval '1 second')
"""


# --- Birthday rule ----------------------------------------------------------------------------------
def today() -> date:
    """Return today in the service's time zone."""
    return datetime.now(TZ).date()


def birthday_in(year: int, born: date) -> date:
    """Return the birthday in a year; for 29 February it is 1 March in common years, as in UK law."""
    try:
        return born.replace(year=year)
    except ValueError:
        return date(year, 3, 1)


def days_until_birthday(born: date, on: date) -> int:
    """Return the days from a date to the next birthday: 0 on the day, 365 at most."""
    birthday = birthday_in(on.year, born)
    if birthday < on:
        birthday = birthday_in(on.year + 1, born)
    return (birthday - on).days


# --- Requests and responses -------------------------------------------------------------------------
# "Or 400" in a docstring: it raises HTTPError(400).

Header = tuple[str, str]
COMMON_HEADERS = (("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff"))


class Response(NamedTuple):
    """A status code, content and its media type (None for no content), and additional headers."""

    status: int
    content: bytes | None = None
    content_type: str = "application/json"
    headers: tuple[Header, ...] = ()


class HTTPError(Exception):
    """An error that is answered with a status, a message and additional headers."""

    def __init__(
        self,
        status: int,
        message: str,
        *headers: Header,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = headers


class Unavailable(HTTPError):
    """The database is down or slow, or refuses the statement."""

    def __init__(self) -> None:
        super().__init__(503, "The database cannot do this now: try again in a second.", ("Retry-After", "1"))


encode_json = json.JSONEncoder(ensure_ascii=False).encode  # of a text: several times as fast as of a dict


def message_response(status: int, message: str, *headers: Header) -> Response:
    """Return a response with the content {"message": ...} and a line end."""
    content = f'{{"message": {encode_json(message)}}}\n'
    return Response(status, content.encode(), headers=headers)


def parse_username(text: str) -> str:
    """Return the username in PATH_INFO in NFC (Unicode UAX #15): a letter, then letters and marks; or 400."""
    try:
        decoded = text.encode("latin-1").decode()  # PEP 3333: bytes as latin-1
    except UnicodeError:
        raise HTTPError(400, "The username must be percent-encoded UTF-8.") from None
    name = unicodedata.normalize("NFC", decoded)
    kinds = [unicodedata.category(character)[0] for character in name]  # L is a letter, M a mark
    begins_with_a_letter = kinds[:1] == ["L"]
    if not begins_with_a_letter or set(kinds) - {"L", "M"}:
        raise HTTPError(400, "The username must be one or more letters and nothing else.")
    size = len(name.encode())
    if kinds.count("L") > MAX_NAME_LETTERS or size > MAX_NAME_BYTES:
        raise HTTPError(400, f"The username must be at most {MAX_NAME_LETTERS} letters and {MAX_NAME_BYTES:,} bytes.")
    return name


def content_length(environ: WSGIEnvironment) -> int | None:
    """Return the stated Content-Length in bytes; None for chunked content, which the server ends; or 400."""
    stated = environ.get("CONTENT_LENGTH")
    if not stated:
        # This key is not in PEP 3333. With it, the server ends the content itself.
        return None if environ.get("wsgi.input_terminated") else 0
    if not re.fullmatch("[0-9]{1,18}", stated):
        raise HTTPError(400, "The Content-Length must be a number of bytes.")
    return int(stated)


def read_content(environ: WSGIEnvironment) -> bytes:
    """Return the content, as long as stated or (chunked) to its end: 400 if incomplete, 413 if over 4 KiB."""
    length = content_length(environ)
    limit = MAX_CONTENT_BYTES + 1
    size = limit if length is None else min(length, limit)
    try:
        content: bytes = environ["wsgi.input"].read(size)
    except Exception:  # each server has its own for a bad chunk or a closed connection
        raise HTTPError(400, "The content must be complete and well-formed.") from None
    if len(content) > MAX_CONTENT_BYTES:
        raise HTTPError(413, f"The content must be at most {MAX_CONTENT_BYTES} bytes long.")
    if length is not None and len(content) < size:
        raise HTTPError(400, "The content must be as long as its Content-Length.")
    return content


def refuse_constant(name: str) -> NoReturn:
    """Raise ValueError for NaN and Infinity, which JSON does not have."""
    raise ValueError(name)


decode_json = json.JSONDecoder(parse_constant=refuse_constant).decode


def parse_document(content: bytes) -> dict[str, Any]:
    """Return the JSON object in the content (RFC 8259); or 400."""
    if content.startswith(b"\xef\xbb\xbf"):
        raise HTTPError(400, f"The content must not begin with a byte order mark: send {EXAMPLE}.")
    try:
        document = decode_json(content.decode())
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise HTTPError(400, f"The content must be a JSON object in UTF-8: send {EXAMPLE}.")
    return document


def parse_date_of_birth(document: dict[str, Any]) -> date:
    """Return the date in {"dateOfBirth": "YYYY-MM-DD"}: a real date before today; or 400."""
    text = document.get("dateOfBirth")
    if not isinstance(text, str):
        raise HTTPError(400, f"There is no dateOfBirth string: send {EXAMPLE}.")
    try:
        born = date.fromisoformat(text)
    except ValueError:
        born = None
    if born is None or born.isoformat() != text:  # fromisoformat accepts more than YYYY-MM-DD
        raise HTTPError(400, "dateOfBirth must be a real date, written YYYY-MM-DD.")
    if born >= today():
        raise HTTPError(400, "dateOfBirth must be before today.")
    return born


# --- Handlers and routing ---------------------------------------------------------------------------
# find_date_of_birth and save_date_of_birth are defined below, after Batcher: requests share their statements.
def get_hello(environ: WSGIEnvironment, username: str) -> Response:
    """Return the greeting with the days until the birthday: 200, 404."""
    born = find_date_of_birth(username)
    if born is None:
        raise HTTPError(404, "No date of birth is saved for this username: PUT it first.")
    days = days_until_birthday(born, today())
    wish = f"Your birthday is in {days} day(s)" if days else "Happy birthday!"
    return message_response(200, f"Hello, {username}! {wish}")


def put_hello(environ: WSGIEnvironment, username: str) -> Response:
    """Save or replace a user's date of birth: 204 once Postgres has committed it, 400, 413."""
    document = parse_document(read_content(environ))
    save_date_of_birth(username, parse_date_of_birth(document))
    return Response(204)


def get_livez(environ: WSGIEnvironment) -> Response:
    """Return 200: the process answers."""
    return message_response(200, "alive")


def get_readyz(environ: WSGIEnvironment) -> Response:
    """Return 200 if the database answers (about a name that no user has), else 503."""
    find_date_of_birth("")
    return message_response(200, "ready")


def get_openapi(environ: WSGIEnvironment) -> Response:
    """Return the description of the API (OpenAPI 3.1); RFC 9512 defines its media type."""
    return Response(200, OPENAPI, "application/yaml")


USER_ROUTE = "/hello/<username>"
ROUTES: dict[str, dict[str, Callable[..., Response]]] = {
    USER_ROUTE: {"GET": get_hello, "PUT": put_hello},
    "/livez": {"GET": get_livez},
    "/readyz": {"GET": get_readyz},
    "/openapi.yaml": {"GET": get_openapi},
}


def route(environ: WSGIEnvironment) -> Response:
    """Call the handler of the path and the method; or 404, 405. Set `hello.route` to the path's template."""
    path = environ.get("PATH_INFO", "")
    template = USER_ROUTE if path.startswith("/hello/") else path
    if template not in ROUTES:
        raise HTTPError(404, f"This path does not exist: try {', '.join(ROUTES)}.")
    environ["hello.route"] = template  # for log lines and metrics, which must not name users
    arguments = []  # of the handler, after the environ
    if template == USER_ROUTE:
        arguments.append(parse_username(path.removeprefix("/hello/")))
    method = environ["REQUEST_METHOD"]
    handlers = ROUTES[template]
    handler = handlers.get("GET" if method == "HEAD" else method)
    if handler:
        return handler(environ, *arguments)
    methods = ", ".join(sorted([*handlers, "HEAD", "OPTIONS"]))
    if method == "OPTIONS":
        return Response(204, headers=(("Allow", methods),))
    raise HTTPError(405, f"The method must be one of {methods}.", ("Allow", methods))


def log_bug(error: Exception) -> None:
    """Log the lines that led to an exception, and not its text, which may hold personal data."""
    kind = type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames]
    LOG.error("%s at %s", kind, ", ".join(places))


def respond(environ: WSGIEnvironment) -> Response:
    """Return the response to a request; an exception that is no HTTPError is a bug, and 500."""
    try:
        return route(environ)
    except HTTPError as error:
        return message_response(error.status, error.message, *error.headers)
    except Exception as error:
        log_bug(error)
        return message_response(500, BUG)


def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Answer a request (PEP 3333)."""
    response = respond(environ)
    headers = [*COMMON_HEADERS, *response.headers]
    if response.content is not None:
        headers.append(("Content-Type", response.content_type))
        headers.append(("Content-Length", str(len(response.content))))
    start_response(f"{response.status} {responses[response.status]}", headers)
    if response.content is None or environ["REQUEST_METHOD"] == "HEAD":
        return []
    return [response.content]


# --- Postgres: what can go wrong --------------------------------------------------------------------
# What a PUT is promised:
# - 204: Postgres has committed the row, or a newer one of the same batch; the synchronous standby, if any, has it.
# - 503: the row is not committed, and never will be. There are two exceptions:
#     UnconfirmedWrite: it is committed, on one server alone.
#     LostCommit, or the WSGI server has killed a request during its COMMIT: it may be committed. The 503 is sent when
#     Postgres can no longer begin to commit. A commit that waits for a standby then becomes visible after the 503.
# - Order: a PUT that got 503 never overwrites a later one that got 204. Nothing that may have been committed is sent
#   again, and a transaction that waits for its COMMIT keeps its rows locked.
#
# The name of an error's class is its label in the metrics.


class HostNotFound(psycopg2.OperationalError):
    """No host in PGHOST has an address."""


class LostConnection(psycopg2.OperationalError):
    """The connection was lost while Postgres worked on a statement."""


class LostCommit(psycopg2.OperationalError):
    """Postgres has not answered to COMMIT. After `final_at` (monotonic seconds) it does not begin to commit."""

    def __init__(self, reason: str, final_at: float) -> None:
        super().__init__(reason)
        self.final_at = final_at


class UnconfirmedWrite(psycopg2.OperationalError):
    """Postgres has committed a write, and no synchronous standby has confirmed it."""


class StandbyMissing(psycopg2.OperationalError):
    """Earlier writes still wait for a synchronous standby."""


class UnreadableRow(psycopg2.DataError):
    """The table holds a date that Python does not have."""


# While serving, each of these is a 503. Any other exception of a statement is a bug.
DATABASE_ERRORS = (psycopg2.Error, TimeoutError)
# One row can cause these, and they undo the whole statement. ConnectionFailure: Citus has lost the node of the row.
ROW_ERRORS = (
    psycopg2.DataError,
    psycopg2.IntegrityError,
    errors.ConnectionFailure,
    errors.LockNotAvailable,
)
# init-db does not try again after these. HostNotFound to StandbyMissing are in neither list.
LASTING_ERRORS = (
    psycopg2.DataError,
    psycopg2.IntegrityError,
    psycopg2.NotSupportedError,
    psycopg2.ProgrammingError,
)


# After an error, the session
# - goes on: Postgres has answered with an ERROR (session_goes_on),
# - was ended by Postgres: the error is FATAL. Connection.is_open finds it closed, or
# - is lost: libpq or PgBouncer says so (is_lost).
def is_lost(error: psycopg2.Error) -> bool:
    """Return whether libpq or PgBouncer says that the connection is lost."""
    if error.pgcode is None:  # libpq's; a ProgrammingError is psycopg2's own
        return not isinstance(error, psycopg2.ProgrammingError)
    # PgBouncer's. Citus reports a node that it has lost with class 08 too, but as an ERROR.
    return error.pgcode.startswith("08") and error.diag.severity_nonlocalized == "FATAL"


def session_goes_on(error: Exception) -> bool:
    """Return whether Postgres has answered with an ERROR."""
    return isinstance(error, psycopg2.Error) and error.diag.severity_nonlocalized == "ERROR"


# --- Postgres: hosts --------------------------------------------------------------------------------
LOOKUP_INTERVAL = 0.002  # seconds between two looks at the lookups that have begun
LOOKUP_LIFETIME = 5.0  # seconds that an answer is used: one that is late for an attempt to connect serves the next


class Address(NamedTuple):
    """A host in PGHOST, its IP address (empty if libpq has nothing to look up) and its port: three options of libpq."""

    host: str
    hostaddr: str
    port: str


class Lookup:
    """The lookup of a host name, in a thread that nobody has to wait for: a name server may never answer."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.hostaddrs: list[str] = []
        self.ended = 0.0  # monotonic seconds
        self.done = threading.Event()
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        """Look up the name."""
        try:
            entries = socket.getaddrinfo(self.name, None, type=socket.SOCK_STREAM)
            hostaddrs = [str(entry[4][0]) for entry in entries]
            self.hostaddrs = list(dict.fromkeys(hostaddrs))
        except (OSError, UnicodeError):
            return  # there is no such name, or the name server has failed
        finally:
            self.ended = monotonic()
            self.done.set()

    def is_current(self) -> bool:
        """Return whether it runs, or has just found the name."""
        if not self.done.is_set():
            return True
        return bool(self.hostaddrs) and monotonic() - self.ended < LOOKUP_LIFETIME


lookups: dict[str, Lookup] = {}  # the last one of each name
failed_at: dict[Address, float] = {}  # monotonic seconds


def needs_lookup(host: str) -> bool:
    """Return whether a host is a name or an IPv4 address, which need not be told apart."""
    is_socket = host.startswith(("/", "@"))
    is_ipv6 = ":" in host
    return bool(host) and not is_socket and not is_ipv6


def look_up(name: str) -> Lookup:
    """Begin the lookup of a name, or return one that is current."""
    if name not in lookups or not lookups[name].is_current():
        lookups[name] = Lookup(name)
    return lookups[name]


def known_addresses(lookup_of: dict[str, Lookup]) -> list[Address]:
    """Return the addresses that are known, in the order of PGHOST."""
    hosts = postgres_hosts()
    ports = postgres_ports()
    if len(ports) == 1:
        ports = ports * len(hosts)
    addresses = []
    for host, port in zip(hosts, ports, strict=True):
        hostaddrs = lookup_of[host].hostaddrs if host in lookup_of else [""]
        addresses += [Address(host, hostaddr, port) for hostaddr in hostaddrs]
    return addresses


def find_addresses(deadline: float) -> list[Address]:
    """Return the addresses of the hosts in PGHOST, those that failed last at the end.

    The list is empty without PGHOST, and with PGHOSTADDR, which replaces it. libpq's own lookup of a name would block
    the process.

    Raises:
        HostNotFound: no host has an address.
        TimeoutError: no name server has answered in time.
    """
    if os.environ.get("PGHOSTADDR") or not os.environ.get("PGHOST"):
        return []
    names = [host for host in postgres_hosts() if needs_lookup(host)]
    lookup_of = {name: look_up(name) for name in names}
    half_time = (monotonic() + deadline) / 2
    while True:
        are_done = all(lookup.done.is_set() for lookup in lookup_of.values())
        addresses = known_addresses(lookup_of)
        if addresses and (are_done or monotonic() > half_time):  # half of the time is left for connecting
            return sorted(addresses, key=lambda address: failed_at.get(address, 0))
        if are_done:
            raise HostNotFound(f"PGHOST={','.join(names)} has no address")
        if monotonic() > deadline:
            raise TimeoutError("no name server answers in time")
        sleep(LOOKUP_INTERVAL)


# --- Postgres: connections --------------------------------------------------------------------------
Row = tuple[Any, ...]
SENT_AT_ONCE = 8192  # bytes; psycopg2 sends a shorter statement before `execute` returns


class Connection:
    """A connection to Postgres whose waits all end at a deadline, in monotonic seconds.

    After a TimeoutError, a LostConnection, or if the WSGI server kills the request, it is closed. After another error
    it is left as it is; is_open finds out.

    Attributes:
        opened: when it began to be opened, in monotonic seconds.
        server_id: which server it led to when it was opened. Behind a pooler it may lead to another one later.
        stuck_commits: how many commits of the role waited too long for a standby when ask_about_server was last called.
    """

    end_of_write = COMMIT  # see TrialConnection

    def __init__(self, deadline: float) -> None:
        """Connect with libpq's settings; raise TimeoutError or psycopg2.Error."""
        self.addresses = find_addresses(deadline)
        self.opened = monotonic()
        options = connection_options(self.addresses)
        self.psycopg = psycopg2.connect(async_=True, **options)
        self.wait(deadline)
        self.ask_about_server(deadline)

    def ask_about_server(self, deadline: float) -> None:
        """Read `server_id` and `stuck_commits`."""
        stuck_after = DATABASE_TIMEOUT / 2  # a slow standby takes less
        [row] = self.execute(ABOUT_SERVER, deadline, (stuck_after,))
        self.server_id, self.stuck_commits = row

    def wait(self, deadline: float, *, is_sent: bool = False) -> None:
        """Wait until Postgres has answered; after a TimeoutError the connection is closed.

        Args:
            is_sent: nothing is left to send, so begin with a wait for the socket, and not with a poll. During the wait,
                under gevent, other requests run and join the next batch, even if the answer is already there.
        """
        try:
            state = extensions.POLL_READ if is_sent else self.psycopg.poll()
            while state != extensions.POLL_OK:
                self.wait_for_socket(state, deadline)
                state = self.psycopg.poll()
        except psycopg2.Error:
            raise  # not closed here: the connection may be usable
        except TimeoutError:
            self.close_and_try_last()  # Postgres rolls back when it notices
            raise
        except BaseException:  # the WSGI server kills this request
            self.close()
            raise

    def wait_for_socket(self, state: int, deadline: float) -> None:
        """Wait until the socket is as psycopg2 needs it; raise TimeoutError at the deadline."""
        events = select.POLLIN if state == extensions.POLL_READ else select.POLLOUT
        poller = select.poll()
        poller.register(self.psycopg, events)
        seconds = max(0, deadline - monotonic())
        if not poller.poll(seconds * 1000):
            raise TimeoutError("Postgres does not answer in time")

    def execute(
        self,
        statement: str,
        deadline: float,
        parameters: Row | None = None,
    ) -> list[Row]:
        """Run a statement and return the rows of its last part; raise TimeoutError or psycopg2.Error."""
        try:
            with self.psycopg.cursor() as cursor:
                cursor.execute(statement, parameters)
                is_sent = len(cursor.query) < SENT_AT_ONCE
                self.wait(deadline, is_sent=is_sent)
                return cursor.fetchall() if cursor.description else []
        except psycopg2.Error as error:
            if not is_lost(error):
                raise
            self.close()
            raise LostConnection(str(error)) from None

    def take_warnings(self) -> list[str]:
        """Return the warnings that have come since the last call."""
        self.psycopg.poll()  # psycopg2 fills its notices only in a poll
        warnings = list(self.psycopg.notices)
        self.psycopg.notices.clear()
        return warnings

    def is_open(self) -> bool:
        """Return whether neither side has closed the connection."""
        try:
            self.psycopg.poll()  # may read no more than why the server closes
            self.psycopg.poll()  # then this one finds the end
        except psycopg2.Error:
            return False
        return True

    def close(self) -> None:
        """Close the connection."""
        self.psycopg.close()

    def close_and_try_last(self) -> None:
        """Close the connection; from now on, find_addresses puts its address last."""
        info = self.psycopg.info
        host_and_port = (info.host, str(info.port))
        self.close()
        # psycopg2 tells the host, and not which of its addresses failed. So take the first: it moves to the end, and
        # further failures take the next ones.
        for address in self.addresses:
            if (address.host, address.port or DEFAULT_PORT) == host_and_port:
                failed_at[address] = monotonic()
                return


class TrialConnection(Connection):
    """A connection for the trial of init-db: `write` ends with a rollback, and so waits for no standby."""

    end_of_write = ROLLBACK

    def ask_about_server(self, deadline: float) -> None:
        """Set `server_id` and `stuck_commits` without asking: nothing is committed, so they do not matter."""
        self.server_id = ""
        self.stuck_commits = 0


def connection_options(addresses: list[Address]) -> dict[str, Any]:
    """Return what libpq is given beside its own variables."""
    options: dict[str, Any] = {
        "fallback_application_name": "hello",
        "client_encoding": "UTF8",
        "tcp_user_timeout": milliseconds(CONNECT_TIMEOUT),  # for data that is not acknowledged
    }
    if addresses:
        options["host"] = ",".join([address.host for address in addresses])
        options["hostaddr"] = ",".join([address.hostaddr for address in addresses])
        options["port"] = ",".join([address.port for address in addresses])
    hosts = os.environ.get("PGHOST", "")
    hostaddrs = os.environ.get("PGHOSTADDR", "")
    are_several = "," in (hostaddrs or hosts)
    if are_several and not os.environ.get("PGTARGETSESSIONATTRS"):
        options["target_session_attrs"] = "read-write"  # only one of several hosts is the primary
    return options


def milliseconds(seconds: float) -> int:
    """Return a time in the unit of Postgres' settings, where 0 would be no limit."""
    return max(1, round(seconds * 1000))


def connect(deadline: float) -> Connection:
    """Open a connection; after a TimeoutError try again while there is time for a whole attempt.

    The address that did not answer then comes last (close_and_try_last). After one that refuses, libpq itself tries the
    next one.
    """
    while True:
        try:
            return Connection(min(deadline, monotonic() + CONNECT_TIMEOUT))
        except TimeoutError:
            if monotonic() + CONNECT_TIMEOUT > deadline:
                raise


class LastWrites:
    """Tells which connections may lead to an old server: after a failover it still answers, with old rows.

    Only a write shows which server is the primary. A connection to another server than that of the last write is
    replaced if it was opened
    1. before the first write to the server of the last write: it may be from before the failover, or
    2. more than DATABASE_TIMEOUT before the last write: a name may have led to the old server again.
    A younger one is kept, because there may have been another failover.
    """

    def __init__(self) -> None:
        self.server_id = ""
        self.replace_if_opened_before = 0.0  # monotonic seconds

    def note(self, server_id: str) -> None:
        """Remember that a server has just committed a write."""
        now = monotonic()
        if server_id != self.server_id:
            self.server_id = server_id
            self.replace_if_opened_before = now  # 1.
        self.replace_if_opened_before = max(self.replace_if_opened_before, now - DATABASE_TIMEOUT)  # 2.

    def must_replace(self, connection: Connection) -> bool:
        """Return whether a connection may lead to an old server."""
        leads_elsewhere = connection.server_id != self.server_id
        return leads_elsewhere and connection.opened < self.replace_if_opened_before


last_writes = LastWrites()


# --- Postgres: statements ---------------------------------------------------------------------------
# A batch waits for a slot (QUEUE_TIMEOUT). Its deadline is DATABASE_TIMEOUT after it got one. Until then it must end
# - connecting, if necessary: CONNECT_TIMEOUT an attempt,
# - the statement: STATEMENT_TIMEOUT in Postgres, LOCK_TIMEOUT of it for a lock,
# - COMMIT. If it is not answered by then, the 503 waits until `final_at`.
ByUser = dict[str, Any]  # a value for each username


def read(
    connection: Connection,
    statement: str,
    parameters: Row,
    deadline: float,
) -> list[Row]:
    """Run a statement that only reads, and return its rows; one that writes is an error."""
    read_only = READ.format(statement=statement)
    values = (milliseconds(STATEMENT_TIMEOUT), *parameters)
    try:
        return connection.execute(read_only, deadline, values)
    except ValueError:  # psycopg2's, of a year that Python does not have
        raise UnreadableRow("a date is not from 0001 to 9999") from None


def write(
    connection: Connection,
    statement: str,
    parameters: Row,
    deadline: float,
) -> list[Row]:
    """Run a statement that writes, at most once; return its rows when the commit is safe.

    After UnconfirmedWrite it is committed, on this server alone. After LostCommit it is committed, or will be before
    `final_at`, or never. After any other error it is not committed, and never will be.
    """
    check_standby(connection, deadline)
    idle_limit = deadline - monotonic()
    rows = begin_write(connection, statement, parameters, deadline, idle_limit)
    # Postgres counts idle time from its answer, which is already here. So it ends the transaction before `final_at`,
    # which is later than the deadline.
    final_at = monotonic() + idle_limit
    commit(connection, deadline, final_at)
    last_writes.note(connection.server_id)
    return rows


def check_standby(connection: Connection, deadline: float) -> None:
    """Raise StandbyMissing while earlier writes wait for a standby.

    No timeout of Postgres ends such a wait, and neither does closing the connection. So each further write would leave
    one more session.
    """
    if connection.stuck_commits:  # when it was opened
        connection.ask_about_server(deadline)
    if connection.stuck_commits:
        connection.close_and_try_last()  # another server may have been promoted
        pause = min(CONNECT_TIMEOUT, deadline - monotonic())
        sleep(max(0, pause))  # so that writes do not open one connection after the other
        raise StandbyMissing("earlier writes still wait for a synchronous standby")


def begin_write(
    connection: Connection,
    statement: str,
    parameters: Row,
    deadline: float,
    idle_limit: float,
) -> list[Row]:
    """Run a statement in a transaction that Postgres ends if no COMMIT follows for some seconds; return its rows."""
    begun = WRITE.format(statement=statement)
    timeouts = [milliseconds(seconds) for seconds in (STATEMENT_TIMEOUT, LOCK_TIMEOUT, idle_limit)]
    try:
        return connection.execute(begun, deadline, (*timeouts, *parameters))
    except errors.ReadOnlySqlTransaction:  # a failover has made the server a standby
        connection.close_and_try_last()
        raise
    except psycopg2.Error as error:
        if session_goes_on(error):
            connection.execute(ROLLBACK, deadline)  # the transaction has begun
        raise


def commit(connection: Connection, deadline: float, final_at: float) -> None:
    """Commit a write; raise LostCommit, UnconfirmedWrite, or the error with which Postgres has rolled it back."""
    connection.take_warnings()  # of the statement
    try:
        connection.execute(connection.end_of_write, deadline)
        warnings = connection.take_warnings()
    except errors.IdleInTransactionSessionTimeout:  # the COMMIT was late: the transaction is rolled back
        raise
    except DATABASE_ERRORS as error:
        if session_goes_on(error):  # Postgres has rolled back
            raise
        raise LostCommit(str(error), final_at) from None
    if warnings:
        connection.close()  # the next one asks how many commits wait
        raise UnconfirmedWrite("no synchronous standby has confirmed a write")


def find(
    connection: Connection,
    users: ByUser,
    deadline: float,
) -> ByUser:
    """Return the date of birth of each user, None if there is none; of `users`, only the keys count."""
    names = list(users)
    rows = read(connection, FIND_DATES_OF_BIRTH, (names,), deadline)
    return {**dict.fromkeys(names), **dict(rows)}


def save(connection: Connection, dates: ByUser, deadline: float) -> ByUser:
    """Save the date of birth of each user; return None for each, which is a result."""
    parameters: list[str] = []
    for username, born in sorted(dates.items()):  # in one order, so that two statements do not deadlock
        parameters += [username, born.isoformat()]  # psycopg2 takes longer to format a date than a text
    placeholders = ", ".join(["(%s, %s)"] * len(dates))
    statement = SAVE_DATES_OF_BIRTH.format(rows=placeholders)
    write(connection, statement, tuple(parameters), deadline)
    return dict.fromkeys(dates)


# --- Postgres: batches ------------------------------------------------------------------------------
YIELD_SECONDS = 1e-6  # other threads and greenlets run
KEEP_OPEN_INTERVAL = 5.0  # seconds between two looks at idle connections


class PoolTimeout(Exception):
    """No connection of a pool has become idle in time."""


class Slot:
    """A place for a connection in a pool."""

    def __init__(self) -> None:
        self.connection: Connection | None = None

    def ready(self, deadline: float) -> Connection:
        """Return the connection, or a new one if it is missing or closed, or may lead to an old server."""
        old = self.connection
        if old and last_writes.must_replace(old):
            old.close_and_try_last()
        elif old and old.is_open():
            return old
        elif old:
            old.close()  # our side, too
        self.connection = connect(deadline)
        return self.connection


class Pool:
    """A fixed number of slots; each runs one statement at a time.

    Args:
        name: of the pool, for metrics.
        size: the number of slots.
    """

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size
        self.idle: SimpleQueue[Slot] = SimpleQueue()
        for _ in range(size):
            self.idle.put(Slot())

    @contextlib.contextmanager
    def slot(self, timeout: float) -> Iterator[Slot]:
        """Lend the next idle slot; raise PoolTimeout if there is none within some seconds."""
        try:
            slot = self.idle.get(timeout=timeout)
        except Empty:
            raise PoolTimeout from None
        try:
            yield slot
        finally:
            self.idle.put(slot)

    def in_use(self) -> int:
        """Return how many slots are not idle."""
        return self.size - self.idle.qsize()

    def keep_open(self) -> None:
        """Open the connection of each idle slot, unless it is open."""
        for _ in range(self.size):
            with self.slot(timeout=0) as slot:
                slot.ready(monotonic() + CONNECT_TIMEOUT)


class Batch:
    """Requests that share a statement, at most one row for each user."""

    def __init__(self) -> None:
        self.began = monotonic()
        self.request_count = 0
        self.rows: ByUser = {}
        self.results: ByUser = {}  # a result may be None; a user without one gets 503
        self.has_bug = False  # then 500
        self.final_at = 0.0  # monotonic seconds; a 503 waits until then, because a COMMIT may still reach Postgres
        self.done = threading.Event()


Operation = Callable[[Connection, ByUser, float], ByUser]
Observer = Callable[[str, int, float, Exception | None], None]


def log_failure(
    operation: str,
    requests: int,
    seconds: float,
    error: Exception | None,
) -> None:
    """Log the class of a statement's error."""
    if error:
        LOG.warning("database: %s failed: %s", operation, type(error).__name__)


class Batcher:
    """Run one statement for all requests that wait for a connection (natural batching).

    The first request of a batch leads it: it takes the next idle connection, at once if there is one, and runs the
    statement for all that have joined meanwhile.

    Args:
        operation: runs the statement; takes a connection, a value for each user, and a deadline in monotonic seconds;
            returns a result for each user.
        pool: whose connections it uses.

    Attributes:
        observe: is called after each statement, and after an attempt to connect that failed, with the operation's name,
            the number of requests, the seconds that it took, and its error. By default it logs errors.
    """

    def __init__(self, operation: Operation, pool: Pool) -> None:
        self.name = operation.__name__
        self.operation = operation
        self.pool = pool
        self.observe: Observer = log_failure
        self.lock = threading.Lock()
        self.waiting: list[Batch] = []  # for a connection; requests join only the last one

    def __call__(self, username: str, value: Any = None) -> Any:
        """Return the operation's result for a user; raise Unavailable."""
        batch, leads = self.join(username, value)
        if leads:
            self.lead(batch)
        batch.done.wait()
        if username in batch.results:
            return batch.results[username]
        if batch.has_bug:
            raise HTTPError(500, BUG)
        if batch.final_at:
            sleep(max(0, batch.final_at - monotonic()))
        raise Unavailable

    def join(
        self,
        username: str,
        value: Any,
    ) -> tuple[Batch, bool]:
        """Join the batch that waits, or begin one; return it, and whether this request leads it."""
        with self.lock:
            batch = self.batch_to_join()
            batch.rows[username] = value  # of several requests for a user, the last one counts
            batch.request_count += 1
            return batch, batch.request_count == 1

    def batch_to_join(self) -> Batch:
        """Return the last batch that waits, or a new one."""
        if self.waiting:
            last = self.waiting[-1]
            is_young = monotonic() - last.began < JOIN_SECONDS
            if is_young and last.request_count < BATCH_SIZE:
                return last
        batch = Batch()
        self.waiting.append(batch)
        return batch

    def stop_waiting(self, batch: Batch) -> None:
        """Remove a batch from those that wait: no more requests join it."""
        with self.lock:
            if batch in self.waiting:
                self.waiting.remove(batch)

    def waiting_requests(self) -> int:
        """Return how many requests wait for a connection."""
        with self.lock:
            return sum([batch.request_count for batch in self.waiting])

    def lead(self, batch: Batch) -> None:
        """Run a batch on the next idle connection, and wake its requests."""
        try:
            with self.pool.slot(QUEUE_TIMEOUT) as slot:
                self.stop_waiting(batch)
                self.run(slot, batch)
                batch.done.set()  # its requests are answered while this lingers
                self.linger()
        except PoolTimeout:
            return  # without results
        except Exception as error:
            log_bug(error)
            batch.has_bug = True
        finally:  # also after PoolTimeout, or if this request is killed
            self.stop_waiting(batch)
            batch.done.set()

    def linger(self) -> None:
        """Let the requests that were just answered run: the next ones of their clients join the batch that waits."""
        if self.waiting:
            sleep(YIELD_SECONDS)

    def run(self, slot: Slot, batch: Batch) -> None:
        """Run a batch's statement; if one of its rows may have made it fail, run it for each row."""
        deadline = monotonic() + DATABASE_TIMEOUT
        try:
            self.run_rows(slot, batch, batch.rows, batch.request_count, deadline)
        except ROW_ERRORS:
            if len(batch.rows) > 1:
                self.run_row_by_row(slot, batch, deadline)
        except DATABASE_ERRORS:
            return  # without results

    def run_row_by_row(self, slot: Slot, batch: Batch, deadline: float) -> None:
        """Run the statement for each row of a batch, while Postgres answers in time."""
        for username, value in batch.rows.items():
            if monotonic() > deadline - 2 * LOCK_TIMEOUT:  # the row may be locked, and then there is a COMMIT
                return
            try:
                self.run_rows(slot, batch, {username: value}, 1, deadline)
            except ROW_ERRORS:
                continue
            except DATABASE_ERRORS:
                return

    def run_rows(
        self,
        slot: Slot,
        batch: Batch,
        rows: ByUser,
        requests: int,
        deadline: float,
    ) -> None:
        """Run the statement for some rows of a batch and keep their results; raise one of DATABASE_ERRORS."""
        start = monotonic()
        try:
            connection = slot.ready(deadline)
            results = self.operation(connection, rows, deadline)
        except DATABASE_ERRORS as error:
            if isinstance(error, LostCommit):
                batch.final_at = error.final_at
            self.observe(self.name, requests, monotonic() - start, error)
            raise
        except BaseException:  # a bug, which is a 500, or the WSGI server kills this request
            # A COMMIT may be under way. After a kill, the others of the batch wait until its transaction has ended.
            batch.final_at = monotonic() + DATABASE_TIMEOUT
            raise
        batch.results.update(results)
        self.observe(self.name, requests, monotonic() - start, None)


READ_POOL = Pool("read", DATABASE_CONNECTIONS)
WRITE_POOL = Pool("write", DATABASE_CONNECTIONS)
find_date_of_birth = Batcher(find, READ_POOL)
save_date_of_birth = Batcher(save, WRITE_POOL)
# For telemetry, init-db and keep_connected
POOLS = [READ_POOL, WRITE_POOL]
BATCHERS = [find_date_of_birth, save_date_of_birth]


def keep_connected() -> NoReturn:
    """Open the connections of all pools, and replace those that their server closes.

    A WSGI server may run it in a thread of its own, as gunicorn.conf.py does.
    """
    while True:
        for pool in POOLS:
            try:
                pool.keep_open()
            except (PoolTimeout, *DATABASE_ERRORS):
                continue  # requests report it
            except Exception as error:
                log_bug(error)
        sleep(KEEP_OPEN_INTERVAL)


# --- init-db ----------------------------------------------------------------------------------------
class UnusableDatabase(psycopg2.NotSupportedError):
    """The database cannot hold every name, or schema.sql or a statement of the service fails in it."""


def first_line(error: Exception) -> str:
    """Return the first line of an error's text; the others may quote rows."""
    return str(error).partition("\n")[0]


def check_encoding(connection: Connection, deadline: float) -> None:
    """Raise UnusableDatabase unless the database is in UTF8."""
    [(encoding,)] = connection.execute("SHOW server_encoding", deadline)
    if encoding != "UTF8":
        raise UnusableDatabase(
            f"the database's encoding is {encoding}: create it with ENCODING 'UTF8' TEMPLATE template0"
        )


def run_schema(connection: Connection, deadline: float) -> None:
    """Run schema.sql; raise UnusableDatabase."""
    try:
        connection.execute(SCHEMA.read_text(), deadline)
    except LASTING_ERRORS as error:
        raise UnusableDatabase(f"schema.sql cannot be applied: {first_line(error)}") from None


def try_statements(connection: TrialConnection, deadline: float) -> None:
    """Run the service's statements, without a commit; raise UnusableDatabase."""
    # No user has this name: it is not only letters. It is as long as a name may be: the column may be too narrow.
    username = f"init-db {uuid.uuid4()} ".ljust(MAX_NAME_BYTES, "-")
    try:
        for batcher in BATCHERS:
            batcher.operation(connection, {username: date.min}, deadline)
    except LASTING_ERRORS as error:
        raise UnusableDatabase(f"the service cannot use the table users: {first_line(error)}") from None


def apply_schema(deadline: float) -> None:
    """Connect once, apply schema.sql, and check that the service can work with the result."""
    connection = TrialConnection(min(deadline, monotonic() + CONNECT_TIMEOUT))
    try:
        check_encoding(connection, deadline)
        run_schema(connection, deadline)
        try_statements(connection, deadline)
    finally:
        connection.close()


def init_db() -> None:
    """Apply schema.sql once the database answers; print the reason for waiting, and exit with it after INIT_TIMEOUT."""
    names = ("PGHOST", "PGPORT", "PGDATABASE")
    where = " ".join([f"{name}={os.environ.get(name) or 'default'}" for name in names])
    deadline = monotonic() + INIT_TIMEOUT
    printed = ""
    while True:
        try:
            return apply_schema(deadline)
        except LASTING_ERRORS as error:
            sys.exit(f"init-db: {first_line(error)} ({where})")
        except DATABASE_ERRORS as error:
            reason = f"{first_line(error)} ({where})"
        if monotonic() + 1 > deadline:
            sys.exit(f"init-db: {reason}")
        if reason != printed:
            print("init-db waits:", reason, file=sys.stderr, flush=True)
        printed = reason
        sleep(1)


# --- Commands ---------------------------------------------------------------------------------------
def serve() -> None:
    """Serve with the standard library's server, one request at a time, on HOST and PORT."""
    host = os.environ.get("HOST") or "127.0.0.1"
    port = os.environ.get("PORT") or "8080"
    try:
        server = make_server(host, int(port), application)
    except (OSError, ValueError, OverflowError) as error:
        sys.exit(f"HOST={host} PORT={port} cannot be used: {error}")
    server.serve_forever()


def main(arguments: list[str]) -> None:
    """Run the command in the arguments."""
    if arguments == ["init-db"]:
        init_db()
    elif not arguments:
        serve()
    else:
        sys.exit("usage: python hello.py [init-db]")


if __name__ == "__main__":
    main(sys.argv[1:])
