"""Keep dates of birth and say how long it is until the birthday: a WSGI application (PEP 3333).

Routes
    PUT     /hello/<username>   {"dateOfBirth": "YYYY-MM-DD"}: save or replace it, 204
    GET     /hello/<username>   200 {"message": "Hello, <username>! Your birthday is in N day(s)"}
    GET     /livez              200 while the process answers; never asks the database
    GET     /readyz             200 while the database answers, else 503
    GET     /openapi.yaml       200, the description of all this (OpenAPI 3.1)
    HEAD and OPTIONS work on each. Every error is {"message": "<what is wrong and what would be right>"}.

Settings (environment variables)
    PGHOST, PGUSER, ...     where Postgres is: every setting of libpq, and nothing else
    TZ                      time zone whose today counts, an IANA name (default UTC)
    DATABASE_CONNECTIONS    connections a process keeps for each of its two operations (default 1)
    BATCH_SIZE              requests that may share one statement (default 100)
    QUEUE_TIMEOUT           seconds a request waits for a connection (default 1.5)
    CONNECT_TIMEOUT         seconds one attempt to connect may take (default 1)
    STATEMENT_TIMEOUT       seconds Postgres may work on one statement (default 1)
    DATABASE_TIMEOUT        seconds a statement may take with connecting and second tries (default 3)
    INIT_TIMEOUT            seconds init-db tries to reach the database (default 60)
    PORT                    port of `python hello.py` (default 8080)
    Once its content is read, a request takes QUEUE_TIMEOUT + DATABASE_TIMEOUT at most.

Run it with `gunicorn hello:application`, or `python hello.py` for the standard library's server;
`python hello.py init-db` applies schema.sql and exits. Any WSGI server will do: nothing here knows which.
"""

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
from calendar import isleap
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import MAXYEAR, date, datetime
from functools import partial
from http import HTTPStatus
from itertools import cycle
from pathlib import Path
from queue import Empty, SimpleQueue
from time import monotonic, sleep
from typing import Any, NamedTuple
from wsgiref.simple_server import make_server
from wsgiref.types import StartResponse, WSGIEnvironment
from zoneinfo import ZoneInfo

import psycopg2
from psycopg2 import errors, extensions

__version__ = "1.0.0"

# --- Settings ---------------------------------------------------------------------------------------


def setting(name: str, default: float, least: float = 0.001) -> float:
    """Read a number from the environment; exit with a one-line error where it is none or too small."""
    text = os.environ.get(name) or str(default)
    try:
        if least <= (value := type(default)(text)) < float("inf"):
            return value
    except ValueError:
        pass
    sys.exit(f"{name}={text!r} is no number from {least} up; the default is {default}")


def time_zone(name: str) -> ZoneInfo:
    """Return a time zone by its IANA name; exit with a one-line error where it is unknown."""
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):  # not found, not a name, a folder of names
        sys.exit(f"TZ={name!r} is not a known time zone; use an IANA name such as Europe/Berlin")


ZONE = time_zone(os.environ.get("TZ") or "UTC")
DATABASE_CONNECTIONS = setting("DATABASE_CONNECTIONS", 1, least=1)
BATCH_SIZE = setting("BATCH_SIZE", 100, least=1)
QUEUE_TIMEOUT = setting("QUEUE_TIMEOUT", 1.5)
CONNECT_TIMEOUT = setting("CONNECT_TIMEOUT", 1.0)
STATEMENT_TIMEOUT = setting("STATEMENT_TIMEOUT", 1.0)
DATABASE_TIMEOUT = setting("DATABASE_TIMEOUT", 3.0)

DATE = re.compile("[0-9]{4}-[0-9]{2}-[0-9]{2}")  # date.fromisoformat accepts more than that
EXAMPLE = '{"dateOfBirth": "YYYY-MM-DD"}'
MAX_CONTENT_BYTES = 4096
MAX_USERNAME_LETTERS = 255
MAX_USERNAME_BYTES = 2500  # Postgres' index takes 2,704, a target of 8,190 bytes 2,727

ENCODE = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would make one each time
OPENAPI = Path(__file__).with_name("openapi.yaml").read_bytes()
LOG = logging.getLogger("hello")

# --- SQL --------------------------------------------------------------------------------------------

# SET LOCAL in the same message as the statement it bounds: nothing stays behind in a session that a
# transaction-mode PgBouncer may lend to somebody else, and it costs no round trip.
FIND_DATES_OF_BIRTH = """
    SET LOCAL statement_timeout = %s;
    SELECT username, date_of_birth FROM users WHERE username = ANY(%s)
"""
# WHERE: a statement that we gave up on may still reach Postgres, late, from a network or a server that hung. It must
# not overwrite what was acknowledged meanwhile.
SAVE_DATES_OF_BIRTH = """
    SET LOCAL statement_timeout = %s;
    INSERT INTO users (username, date_of_birth)
    SELECT username, date_of_birth FROM unnest(%s, %s) AS batch (username, date_of_birth)
    ON CONFLICT (username) DO UPDATE SET date_of_birth = EXCLUDED.date_of_birth
    WHERE clock_timestamp() < to_timestamp(%s)
"""
# What a new connection asks first: the server's clock, for that WHERE; and it ends what an earlier one may have left
# behind, a commit's wait for a synchronous standby, which goes on without a client and without a bound.
GREET_SERVER = """
    SELECT extract(epoch FROM clock_timestamp())::float8, count(pg_terminate_backend(pid)) FROM pg_stat_activity
    WHERE usename = current_user AND wait_event = 'SyncRep' AND clock_timestamp() - query_start > %s * interval '1 s'
"""

# --- Database ---------------------------------------------------------------------------------------


class Unavailable(Exception):
    """The database was down, slow or unwilling; the same request may well succeed later."""


class Connection(extensions.connection):
    """A connection that never waits for Postgres past its `deadline`, in monotonic seconds."""

    clock: float  # the server's time of day at our monotonic zero, in seconds

    def __init__(self, dsn: str, deadline: float, **arguments: Any) -> None:
        self.deadline = deadline
        try:
            super().__init__(dsn, **arguments)
            self.autocommit = True
            with self.cursor() as cursor:
                cursor.execute(GREET_SERVER, (DATABASE_TIMEOUT,))
                self.clock = cursor.fetchone()[0] - monotonic()
        except BaseException:
            self.close()  # now: as garbage it would wait for the collector, and Postgres might yet let it in
            raise


def wait(connection: Connection) -> None:
    """Wait for libpq's next answer; raise TimeoutError at the connection's deadline.

    psycopg2 calls it wherever libpq would block, which has no bound of its own on a server that
    accepts and never answers. Where the server made `select` cooperative, this is, too.
    """
    while (state := connection.poll()) != extensions.POLL_OK:
        poller = select.poll()
        poller.register(connection, select.POLLIN if state == extensions.POLL_READ else select.POLLOUT)
        if not poller.poll(max(0, connection.deadline - monotonic()) * 1000):
            raise TimeoutError


extensions.set_wait_callback(wait)
resolver = ThreadPoolExecutor(4)
silent_hosts = 0  # how often a host accepted and then said nothing


def addresses(host: str, deadline: float) -> list[str]:
    """Look a host up, beside: libpq would do it itself, without a bound, and stop all else in the process."""
    if host.startswith(("/", "@")) or not host:
        return [""]  # a folder of sockets, or libpq's default: libpq knows
    lookup = resolver.submit(socket.getaddrinfo, host, None, type=socket.SOCK_STREAM)
    try:
        found = lookup.result(deadline - monotonic())
    except OSError:  # unknown, or TimeoutError
        lookup.cancel()
        return []
    return list(dict.fromkeys(address[4][0] for address in found))


def endpoints(first: int, deadline: float) -> dict[str, str]:
    """Return libpq's lists host, hostaddr and port from PGHOST and PGPORT, beginning with the `first`-th."""
    if os.environ.get("PGHOSTADDR") or os.environ.get("PGSERVICE"):
        return {}  # libpq needs no help with the one, and knows more of the other
    pairs = zip(os.environ.get("PGHOST", "").split(","), cycle(os.environ.get("PGPORT", "").split(",")))
    found = [(host, address, port) for host, port in pairs for address in addresses(host, deadline)]
    if not found:
        raise psycopg2.OperationalError("PGHOST has no address")
    turn = first % len(found)
    return dict(zip(("host", "hostaddr", "port"), map(",".join, zip(*found[turn:], *found[:turn])), strict=True))


def connect() -> Connection:
    """Open a connection with libpq's own settings; raise psycopg2.Error or TimeoutError.

    Of several hosts libpq goes on to the next when one refuses. When one is silent, the time is up: the next
    attempt then begins with the next host.
    """
    global silent_hosts
    first, deadline = silent_hosts, monotonic() + CONNECT_TIMEOUT
    try:
        return psycopg2.connect(
            connection_factory=partial(Connection, deadline=deadline),
            fallback_application_name="hello",
            client_encoding="UTF8",
            tcp_user_timeout=round(CONNECT_TIMEOUT * 1000),  # how long a vanished peer is believed in
            **endpoints(first, deadline),
        )
    except TimeoutError:
        silent_hosts = first + 1
        raise


class Line:
    """A place for one connection to Postgres: opened when it is needed, replaced when it died."""

    connection: Connection | None = None

    @property
    def is_open(self) -> bool:
        return self.connection is not None and not self.connection.closed

    def execute(self, statement: "Statement", rows: list[Any], deadline: float) -> list[Any]:
        """Run a statement, and once more if its connection was lost: each of ours can be repeated safely.

        Raise psycopg2.Error or TimeoutError where it fails; `is_open` tells whether the connection did, too.
        """
        for may_repeat in (True, False):
            try:
                if not self.is_open:
                    self.connection = connect()
                self.connection.deadline = deadline
                with self.connection.cursor() as cursor:
                    return statement(cursor, rows)
            except (psycopg2.Error, TimeoutError) as error:
                if isinstance(error, errors.ReadOnlySqlTransaction):
                    self.connection.close()  # a primary no more: libpq knows how to find the new one
                if self.is_open or not may_repeat or monotonic() + CONNECT_TIMEOUT > deadline:
                    raise
        raise AssertionError


Statement = Callable[[Any, list[Any]], list[Any]]


def find(cursor: Any, usernames: list[str]) -> list[date | None]:
    """Return the date of birth of each username, None where there is none."""
    cursor.execute(FIND_DATES_OF_BIRTH, (round(STATEMENT_TIMEOUT * 1000), usernames))
    found = dict(cursor.fetchall())
    return [found.get(username) for username in usernames]


def save(cursor: Any, rows: list[tuple[str, date]]) -> list[None]:
    """Save dates of birth (rows are pairs): of each username the last, and in one order, so that no two batches deadlock."""
    connection = cursor.connection
    usernames, dates = map(list, zip(*sorted(dict(rows).items()), strict=True))
    connection.notices.clear()  # of the login, for example
    expiry = connection.deadline + connection.clock
    cursor.execute(SAVE_DATES_OF_BIRTH, (round(STATEMENT_TIMEOUT * 1000), usernames, dates, expiry))
    # That the wait for a synchronous standby was cancelled is a mere warning: the rows may be on one server only.
    # Fewer rows than sent: their time was over, or the server's clock jumped, and a new connection reads it anew.
    if connection.notices or cursor.rowcount < len(usernames):
        connection.close()
        raise psycopg2.OperationalError("not safely committed")
    return [None] * len(rows)


class Batch:
    """Rows that share a statement, and what came of each: a result or an exception."""

    def __init__(self) -> None:
        self.began = monotonic()
        self.rows: list[Any] = []
        self.results: list[Any] = []
        self.done = threading.Event()

    @property
    def is_open(self) -> bool:
        """Whether it may grow: not for long, because all of it gives up when the first row has waited too long."""
        return len(self.rows) < BATCH_SIZE and monotonic() - self.began < QUEUE_TIMEOUT / 10


class Batcher:
    """Run one statement for all who wait for a connection.

    Whoever finds no batch waiting begins one and leads it: takes the next idle connection, at once where there is
    one, and runs the statement for all who have joined by then. So nobody waits for company, and nobody gets the
    answer of a statement that was sent before the request came.
    """

    def __init__(self, statement: Statement) -> None:
        self.statement = statement
        self.waiting: list[Batch] = []  # for a connection; only the last one grows
        self.lock = threading.Lock()
        self.idle: SimpleQueue[Line] = SimpleQueue()
        for _ in range(DATABASE_CONNECTIONS):
            self.idle.put(Line())

    def __call__(self, row: Any) -> Any:
        """Return the statement's result for a row; raise Unavailable."""
        with self.lock:
            if not self.waiting or not self.waiting[-1].is_open:
                self.waiting.append(Batch())
            batch = self.waiting[-1]
            place = len(batch.rows)
            batch.rows.append(row)
        if place == 0:
            self.lead(batch)
        else:
            batch.done.wait()  # which the leader's bounds bound
        if isinstance(result := batch.results[place], Exception):
            raise Unavailable from result
        return result

    def lead(self, batch: Batch) -> None:
        """Run a batch's statement with the next idle connection."""
        try:
            line = self.take_line(batch)
            try:
                batch.results = self.run(line, batch.rows, monotonic() + DATABASE_TIMEOUT)
            finally:
                self.idle.put(line)
        except Empty:
            pass  # no connection came free
        finally:  # also when the server ends this request: the others must not wait for ever
            batch.results = batch.results or [Unavailable()] * len(batch.rows)
            batch.done.set()

    def take_line(self, batch: Batch) -> Line:
        """Wait for an idle connection and close the batch; raise Empty."""
        try:
            return self.idle.get(timeout=QUEUE_TIMEOUT)
        finally:
            with self.lock:
                self.waiting.remove(batch)

    def run(self, line: Line, rows: list[Any], deadline: float) -> list[Any]:
        """Return each row's result or its error; try row by row after an error that may be one row's."""
        start, error = monotonic(), None
        try:
            return line.execute(self.statement, rows, deadline)
        except (psycopg2.Error, TimeoutError) as failure:
            error = failure
        finally:
            observe(self.statement.__name__, len(rows), monotonic() - start, error)
        if len(rows) == 1:
            return [error]
        return [
            self.run(line, [row], deadline)[0] if line.is_open and monotonic() < deadline else error for row in rows
        ]


def observe(statement: str, rows: int, seconds: float, error: BaseException | None) -> None:
    """Do nothing: where telemetry is on, it puts itself here to learn of each statement sent."""


find_date_of_birth = Batcher(find)
save_date_of_birth = Batcher(save)


def reason(error: psycopg2.Error | TimeoutError) -> str:
    """Say in one line what went wrong, without the DETAIL: there, Postgres quotes rows."""
    primary = error.diag.message_primary if isinstance(error, psycopg2.Error) else None
    return " ".join((primary or str(error)).split()) or "no answer"


def init_db() -> None:
    """Apply schema.sql as soon as the database answers, and say what it waits for; exit with it after INIT_TIMEOUT."""
    deadline, said = monotonic() + setting("INIT_TIMEOUT", 60.0), ""
    schema = Path(__file__).with_name("schema.sql").read_text()
    while True:
        try:
            return Line().execute(lambda cursor, _: cursor.execute(schema), [], deadline)
        except (psycopg2.Error, TimeoutError) as error:
            text = reason(error)
            if monotonic() + 1 > deadline:
                sys.exit(f"init-db: {text}; check PGHOST, PGUSER, PGPASSWORD")
            if text != said:
                print("init-db waits:", text, file=sys.stderr, flush=True)
            said = text
        sleep(1)


# --- Birthday arithmetic ----------------------------------------------------------------------------


def today() -> date:
    """Return today in the service's time zone."""
    return datetime.now(ZONE).date()


def birthday_in(year: int, born: date) -> date:
    """Return the birthday in a year; of 29 February it is 1 March in common years, as UK law counts age."""
    if (born.month, born.day) == (2, 29) and not isleap(year):
        return date(year, 3, 1)
    return born.replace(year=year)


def days_until_birthday(born: date, on: date) -> int:
    """Return the days from a date to the next birthday: 0 on the day, 365 at most."""
    if on.year == MAXYEAR:
        on = on.replace(year=MAXYEAR - 400)  # `date` has no year 10000, but the calendar repeats
    birthday = birthday_in(on.year, born)
    if birthday < on:
        birthday = birthday_in(on.year + 1, born)
    return (birthday - on).days


# --- Requests and responses -------------------------------------------------------------------------


class Response(NamedTuple):
    """A status code, content and its media type (None for no content), and headers of this response only."""

    status: int
    content: bytes | None = None
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()


def say(status: int, message: str, *headers: tuple[str, str]) -> Response:
    """Return a response with {"message": ...} in readable UTF-8."""
    content = ENCODE({"message": message}).encode()
    return Response(status, content, headers=headers)


class Refused(Exception):
    """The answer to a request that cannot be served as it is: what is wrong, what would be right."""

    def __init__(self, status: int, message: str, *headers: tuple[str, str]) -> None:
        self.response = say(status, message, *headers)


def parse_username(text: str) -> str:
    """Read a username from PATH_INFO: letters with their combining marks, in NFC (Unicode UAX #15); or 400."""
    try:
        name = unicodedata.normalize("NFC", text.encode("latin-1").decode())  # PEP 3333: bytes as latin-1
    except UnicodeError:
        raise Refused(400, "The username must be percent-encoded UTF-8.") from None
    kinds = ["L" if character.isalpha() else unicodedata.category(character) for character in name]
    if not {*kinds} <= {"L", "Mn", "Mc"} or kinds[:1] != ["L"]:
        raise Refused(400, "The username must be one or more letters and nothing else.")
    if kinds.count("L") > MAX_USERNAME_LETTERS or len(name.encode()) > MAX_USERNAME_BYTES:
        raise Refused(400, f"The username must be at most {MAX_USERNAME_LETTERS} letters and 2,500 bytes long.")
    return name


def read_content(environ: WSGIEnvironment) -> bytes:
    """Read the content, as long as stated or (chunked) to its end: 400 if cut short, 413 if over 4 KiB."""
    stated = environ.get("CONTENT_LENGTH") or ("" if environ.get("wsgi.input_terminated") else "0")
    if not re.fullmatch("[0-9]{0,18}", stated):
        raise Refused(400, "Content-Length must be a number of bytes.")
    length = int(stated or MAX_CONTENT_BYTES + 1)
    try:
        content = b"" if stated and length > MAX_CONTENT_BYTES else environ["wsgi.input"].read(length)
    except Exception:  # noqa: BLE001 - each server has errors of its own for a bad chunk or a client that left
        raise Refused(400, "The content must arrive whole and well-formed.") from None
    if len(content) > MAX_CONTENT_BYTES or (stated and length > MAX_CONTENT_BYTES):
        raise Refused(413, f"Send at most {MAX_CONTENT_BYTES} bytes.")
    if stated and len(content) < length:
        raise Refused(400, "The content must be as long as its Content-Length says.")
    return content


def parse_document(content: bytes) -> dict[str, Any]:
    """Read a JSON object (RFC 8259); or 400."""
    if not content:
        raise Refused(400, f"The content is missing: send {EXAMPLE}.")
    try:
        document = json.loads(content.decode(), parse_constant=int)  # which refuses NaN
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise Refused(400, f"The content is not a JSON object in UTF-8: send {EXAMPLE}.")
    return document


def parse_date_of_birth(document: dict[str, Any]) -> date:
    """Read {"dateOfBirth": "YYYY-MM-DD"}: a real date, before today; or 400."""
    if not isinstance(text := document.get("dateOfBirth"), str):
        raise Refused(400, f"There is no dateOfBirth string: send {EXAMPLE}.")
    try:
        born = date.fromisoformat(text if DATE.fullmatch(text) else "")
    except ValueError:
        raise Refused(400, "dateOfBirth must be a real date, written YYYY-MM-DD.") from None
    if born >= today():
        raise Refused(400, "dateOfBirth must be before today.")
    return born


# --- Handlers ---------------------------------------------------------------------------------------


def get_hello(environ: WSGIEnvironment, username: str) -> Response:
    """Greet a user with the days until the birthday: 200, 404."""
    born = find_date_of_birth(username)
    if born is None:
        raise Refused(404, "No date of birth is saved for this username: PUT it first.")
    days = days_until_birthday(born, today())
    wish = f"Your birthday is in {days} day(s)" if days else "Happy birthday!"
    return say(200, f"Hello, {username}! {wish}")


def put_hello(environ: WSGIEnvironment, username: str) -> Response:
    """Save or replace a user's date of birth: 204 once Postgres has committed it, 400, 413."""
    document = parse_document(read_content(environ))
    save_date_of_birth((username, parse_date_of_birth(document)))
    return Response(204)


def get_livez(environ: WSGIEnvironment) -> Response:
    """Say that the process answers: 200."""
    return say(200, "alive")


def get_readyz(environ: WSGIEnvironment) -> Response:
    """Ask the database what a greeting asks it, of a name that nobody has: 200, 503."""
    find_date_of_birth("")
    return say(200, "ready")


def get_openapi(environ: WSGIEnvironment) -> Response:
    """Describe the service in OpenAPI 3.1 (media type: RFC 9512): 200."""
    return Response(200, OPENAPI, "application/yaml")


# --- Routing ----------------------------------------------------------------------------------------

HELLO = "/hello/<username>"
ROUTES: dict[str, dict[str, Callable[..., Response]]] = {
    HELLO: {"GET": get_hello, "PUT": put_hello},
    "/livez": {"GET": get_livez},
    "/readyz": {"GET": get_readyz},
    "/openapi.yaml": {"GET": get_openapi},
}


def route(environ: WSGIEnvironment) -> Response:
    """Call the path's handler for the method, or 404, 405; leave the path's template in `hello.route`."""
    path, method = environ.get("PATH_INFO", ""), environ["REQUEST_METHOD"]
    template = HELLO if path.startswith("/hello/") else path
    if template not in ROUTES:
        raise Refused(404, f"There is nothing here: try {', '.join(ROUTES)}.")
    environ["hello.route"] = template
    arguments = [parse_username(path.removeprefix("/hello/"))] if template is HELLO else []
    if handler := ROUTES[template].get("GET" if method == "HEAD" else method):
        return handler(environ, *arguments)
    methods = ", ".join(sorted({*ROUTES[template], "HEAD", "OPTIONS"}))
    if method == "OPTIONS":
        return Response(204, headers=(("Allow", methods),))
    raise Refused(405, f"The method must be one of {methods}.", ("Allow", methods))


# --- Application ------------------------------------------------------------------------------------

UNAVAILABLE = say(503, "The database does not answer at the moment: try again in a second.", ("Retry-After", "1"))


def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Answer a request (PEP 3333); whatever happens, the client sees no 500 and no traceback."""
    try:
        response = route(environ)
    except Refused as refused:
        response = refused.response
    except Unavailable:
        response = UNAVAILABLE
    except Exception as error:  # noqa: BLE001 - a defect of ours; its text may hold personal data, its place not
        place = traceback.extract_tb(error.__traceback__)[-1]
        LOG.error("%s in %s, line %s", type(error).__name__, place.filename, place.lineno)
        response = UNAVAILABLE
    headers = [("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff"), *response.headers]
    if response.content is not None:
        headers += [("Content-Type", response.content_type), ("Content-Length", str(len(response.content)))]
    start_response(f"{response.status} {HTTPStatus(response.status).phrase}", headers)
    return [] if response.content is None or environ["REQUEST_METHOD"] == "HEAD" else [response.content]


def main(arguments: list[str]) -> None:
    """Run `init-db`, or serve on PORT with the standard library's server."""
    if arguments == ["init-db"]:
        init_db()
    elif arguments:
        sys.exit("usage: python hello.py [init-db]")
    else:
        make_server("127.0.0.1", setting("PORT", 8080, least=1), application).serve_forever()


if __name__ == "__main__":
    main(sys.argv[1:])
