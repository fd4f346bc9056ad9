"""Store dates of birth and tell how long it is until the birthday: a WSGI application (PEP 3333).

PUT /hello/<username> with {"dateOfBirth": "YYYY-MM-DD"} saves or replaces it and answers 204. GET /hello/<username>
answers {"message": "Hello, <username>! Your birthday is in N day(s)"}. ROUTES lists all paths; HEAD and OPTIONS work on
each. Every error is {"message": "<what is wrong and what would be right>"}.

Run it with `gunicorn hello:application`, or with `python hello.py` on the standard library's server; `python hello.py
init-db` applies schema.sql. Settings are the environment variables below and those of libpq (PGHOST, PGUSER, ...).
"""

import json
import logging
import os
import select
import socket
import sys
import threading
import traceback
import unicodedata
from collections import namedtuple
from collections.abc import Callable, Iterable
from concurrent import futures
from contextlib import suppress
from datetime import date, datetime
from functools import partial
from http.client import responses
from pathlib import Path
from queue import Empty, SimpleQueue
from time import monotonic, sleep
from typing import Any, NamedTuple, cast
from wsgiref.simple_server import make_server
from wsgiref.types import StartResponse, WSGIEnvironment
from zoneinfo import ZoneInfo

import psycopg2
from psycopg2 import errors, extensions

__version__ = "1.0.0"

# --- Settings ---------------------------------------------------------------------------------------

Setting = namedtuple("Setting", "default unit minimum meaning maximum", defaults=[1e6])
SETTINGS: dict[str, Setting] = {}


def setting(kind: Callable[[str], Any], name: str, *declaration: Any) -> Any:
    """Declare a setting (its name, then Setting's fields); return its value, or exit with one line if it is invalid."""
    default, _, minimum, meaning, maximum = SETTINGS[name] = Setting(*declaration)
    text = os.environ.get(name) or default
    with suppress(ValueError, KeyError, OSError):  # the last two are ZoneInfo's
        value = kind(text)
        if not isinstance(value, int | float) or minimum <= value <= maximum:
            return value
    bound = f" from {minimum:g} to {maximum:.0f}" if minimum else ""
    sys.exit(f"{name}={text!r} cannot be used: it must be the {meaning}{bound}; the default is {default}")


HOST = setting(str, "HOST", "127.0.0.1", "", 0, "address that the service listens on")
PORT = setting(int, "PORT", "8080", "", 1, "port of the service", 65535)
TZ = setting(ZoneInfo, "TZ", "UTC", "", 0, "IANA time zone that decides the date of today, such as Europe/Berlin")
DATABASE_CONNECTIONS = setting(int, "DATABASE_CONNECTIONS", "1", "", 1, "number of connections for GET, and for PUT")
BATCH_SIZE = setting(int, "BATCH_SIZE", "100", "", 1, "number of requests that may share one statement")
QUEUE_TIMEOUT = setting(float, "QUEUE_TIMEOUT", "1.5", "s", 0.001, "time that a request waits for a connection")
CONNECT_TIMEOUT = setting(float, "CONNECT_TIMEOUT", "1", "s", 0.001, "time that an attempt to connect may take")
STATEMENT_TIMEOUT = setting(float, "STATEMENT_TIMEOUT", "1", "s", 0.001, "time that Postgres may work on a statement")
DATABASE_TIMEOUT = setting(float, "DATABASE_TIMEOUT", "3", "s", 0.001, "time for connecting and a statement together")
INIT_TIMEOUT = setting(float, "INIT_TIMEOUT", "60", "s", 0.001, "time that init-db waits for the database")
MAX_CONTENT_BYTES = 4096
MAX_NAME_LETTERS, MAX_NAME_BYTES = 255, 2500  # an index entry of Postgres holds at most 2,704 bytes
EXAMPLE = '{"dateOfBirth": "YYYY-MM-DD"}'
encode_json = json.JSONEncoder(ensure_ascii=False).encode
OPENAPI = Path(__file__).with_name("openapi.yaml").read_bytes()

# --- SQL --------------------------------------------------------------------------------------------

# Each is sent as one message, which is one transaction; SET LOCAL leaves no setting in a session that PgBouncer shares.
FIND_DATES_OF_BIRTH = (
    "SET LOCAL statement_timeout = %s; SELECT username, date_of_birth FROM users WHERE username = ANY(%s)"
)
# After the given moment the SELECT divides by zero, which undoes the INSERT: a delayed write must not overwrite a later
# acknowledged one. It follows the INSERT because the clock must be read when the rows are locked.
SAVE_DATES_OF_BIRTH = """
    SET LOCAL statement_timeout = %s; SET LOCAL client_min_messages = error;
    INSERT INTO users (username, date_of_birth) VALUES {rows}
    ON CONFLICT (username) DO UPDATE SET date_of_birth = EXCLUDED.date_of_birth;
    SET LOCAL client_min_messages = warning;
    SELECT 1 / (clock_timestamp() < to_timestamp(%s))::int
"""
# The server's time, which server it is, and how many commits have waited for a standby for longer than some seconds.
ON_CONNECT = """
    SELECT extract(epoch FROM clock_timestamp())::float8, concat(inet_server_addr(), ' ', pg_postmaster_start_time()),
        (SELECT count(*) FROM pg_stat_activity WHERE usename = current_user AND wait_event = 'SyncRep'
            AND clock_timestamp() - query_start > %s * interval '1 second')"""


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
    return (min(day for day in (birthday_in(on.year, born), birthday_in(on.year + 1, born)) if day >= on) - on).days


# --- Requests and responses -------------------------------------------------------------------------
class Response(NamedTuple):
    """A status code, content and its media type (None for no content), and additional headers."""

    status: int
    content: bytes | None = None
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()


def message_response(status: int, message: str, *headers: tuple[str, str]) -> Response:
    """Return a response with the content {"message": ...}."""
    return Response(status, encode_json({"message": message}).encode(), headers=headers)


class HTTPError(Exception):
    """An error response; the arguments are those of message_response."""


def parse_username(text: str) -> str:
    """Return the username in PATH_INFO in NFC (Unicode UAX #15): a letter, then letters and marks; or 400."""
    try:
        name = unicodedata.normalize("NFC", text.encode("latin-1").decode())  # PEP 3333: bytes as latin-1
    except UnicodeError:
        raise HTTPError(400, "The username must be percent-encoded UTF-8.") from None
    kinds = "".join([unicodedata.category(character)[0] for character in name])
    if kinds[:1] != "L" or set(kinds) - {"L", "M"}:
        raise HTTPError(400, "The username must be one or more letters and nothing else.")
    if kinds.count("L") > MAX_NAME_LETTERS or len(name.encode()) > MAX_NAME_BYTES:
        raise HTTPError(400, f"The username must be at most {MAX_NAME_LETTERS} letters and {MAX_NAME_BYTES:,} bytes.")
    return name


def read_content(environ: WSGIEnvironment) -> bytes:
    """Return the content, as long as stated or (chunked) to its end: 400 if incomplete, 413 if over 4 KiB."""
    stated = environ.get("CONTENT_LENGTH") or ("" if environ.get("wsgi.input_terminated") else "0")
    try:
        length = max(0, min(int(stated or MAX_CONTENT_BYTES + 1), MAX_CONTENT_BYTES + 1))
        content: bytes = environ["wsgi.input"].read(length)
    except Exception:  # each server has its own for a bad chunk or a closed connection
        raise HTTPError(400, "The content must be complete and well-formed.") from None
    if len(content) > MAX_CONTENT_BYTES:
        raise HTTPError(413, f"The content must be at most {MAX_CONTENT_BYTES} bytes long.")
    if stated and len(content) < length:
        raise HTTPError(400, "The content must be as long as its Content-Length.")
    return content


def parse_document(content: bytes) -> dict[str, Any]:
    """Return the JSON object in the content (RFC 8259); or 400."""
    with suppress(ValueError, RecursionError):
        document = json.loads(content.decode(), parse_constant=int)  # int refuses NaN and Infinity
        if isinstance(document, dict):
            return document
    raise HTTPError(400, f"The content must be a JSON object in UTF-8: send {EXAMPLE}.")


def parse_date_of_birth(document: dict[str, Any]) -> date:
    """Return the date in {"dateOfBirth": "YYYY-MM-DD"}: a real date before today; or 400."""
    if not isinstance(text := document.get("dateOfBirth"), str):
        raise HTTPError(400, f"There is no dateOfBirth string: send {EXAMPLE}.")
    born = None
    with suppress(ValueError):
        born = date.fromisoformat(text)
    if born is None or born.isoformat() != text:  # fromisoformat accepts more than YYYY-MM-DD
        raise HTTPError(400, "dateOfBirth must be a real date, written YYYY-MM-DD.")
    if born >= today():
        raise HTTPError(400, "dateOfBirth must be before today.")
    return born


# --- Handlers, routing, application -----------------------------------------------------------------
def get_hello(environ: WSGIEnvironment, username: str) -> Response:
    """Return the greeting with the days until the birthday: 200, 404."""
    if (born := find_date_of_birth(username)) is None:
        raise HTTPError(404, "No date of birth is saved for this username: PUT it first.")
    wish = f"Your birthday is in {days} day(s)" if (days := days_until_birthday(born, today())) else "Happy birthday!"
    return message_response(200, f"Hello, {username}! {wish}")


def put_hello(environ: WSGIEnvironment, username: str) -> Response:
    """Save or replace a user's date of birth: 204 once Postgres has committed it, 400, 413."""
    save_date_of_birth((username, parse_date_of_birth(parse_document(read_content(environ)))))
    return Response(204)


def get_readyz(environ: WSGIEnvironment) -> Response:
    """Return 200 if the database answers a lookup (of a name that no user has), else 503."""
    find_date_of_birth("")
    return message_response(200, "ready")


USER_ROUTE = "/hello/<username>"
ROUTES: dict[str, dict[str, Callable[..., Response]]] = {
    USER_ROUTE: {"GET": get_hello, "PUT": put_hello},
    "/livez": {"GET": lambda environ: message_response(200, "alive")},
    "/readyz": {"GET": get_readyz},
    "/openapi.yaml": {"GET": lambda environ: Response(200, OPENAPI, "application/yaml")},  # RFC 9512
}
UNAVAILABLE = (503, "The database does not answer: try again in a second.", ("Retry-After", "1"))


def route(environ: WSGIEnvironment) -> Response:
    """Call the handler of the path and the method, or 404, 405; put the path's template into `hello.route`."""
    path, method = environ.get("PATH_INFO", ""), environ["REQUEST_METHOD"]
    template = USER_ROUTE if path.startswith("/hello/") else path
    if template not in ROUTES:
        raise HTTPError(404, f"This path does not exist: try {', '.join(ROUTES)}.")
    environ["hello.route"] = template
    arguments = [parse_username(path.removeprefix("/hello/"))] if template is USER_ROUTE else []
    if handler := ROUTES[template].get("GET" if method == "HEAD" else method):
        return handler(environ, *arguments)
    methods = ", ".join(sorted({*ROUTES[template], "HEAD", "OPTIONS"}))
    if method == "OPTIONS":
        return Response(204, headers=(("Allow", methods),))
    raise HTTPError(405, f"The method must be one of {methods}.", ("Allow", methods))


def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Answer a request (PEP 3333); an error of any kind is a response, never a 500 or a traceback."""
    try:
        response = route(environ)
    except HTTPError as error:
        response = message_response(*error.args)
    except Exception as error:  # a bug; its text may contain personal data, its location does not
        where = traceback.extract_tb(error.__traceback__)[-1]
        logging.getLogger("hello").error("%s in %s, line %s", type(error).__name__, where.filename, where.lineno)
        response = message_response(*UNAVAILABLE)
    headers = [("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff"), *response.headers]
    if response.content is not None:
        headers += [("Content-Type", response.content_type), ("Content-Length", str(len(response.content)))]
    start_response(f"{response.status} {responses[response.status]}", headers)
    return [] if response.content is None or environ["REQUEST_METHOD"] == "HEAD" else [response.content]


# --- Access to Postgres -----------------------------------------------------------------------------

# Errors that one row of a batch can cause (QueryCanceled: the row was locked). They undo the whole batch.
ROW_ERRORS = (psycopg2.DataError, psycopg2.IntegrityError, errors.QueryCanceled, ValueError)
Batch = namedtuple("Batch", "began done rows results")  # a result is that of a row, or an exception
resolver = futures.ThreadPoolExecutor(16)
lookups: dict[str, "futures.Future[Any]"] = {}  # of host names, at most one at a time for each


class Connection(extensions.connection):
    """A connection that waits for Postgres until its `deadline` (monotonic seconds) and no longer."""

    offset = 0  # with which server of PGHOST the next attempt to connect begins
    writer, writer_since = "", 0.0  # the server of the last write; connections to others must be opened after this

    def __init__(self, deadline: float, dsn: str, **arguments: Any) -> None:
        self.offset, self.deadline, self.opened = Connection.offset, deadline, monotonic()
        try:
            super().__init__(dsn, **arguments)
            self.autocommit = True
            with self.cursor() as cursor:
                cursor.execute(ON_CONNECT, (DATABASE_TIMEOUT / 2,))  # a commit that was given up has waited that long
                ((server_time, self.server, self.waiting_commits),) = cursor.fetchall()
            self.host = self.info.host  # which a closed connection does not know
            self.clock_offset = server_time - monotonic()  # from our monotonic time to the server's time
        except BaseException:
            self.leave()  # now, because the server could still complete the connection
            raise

    def leave(self) -> None:
        """Close the connection, and begin the next attempt with the server after it."""
        hosts = extensions.parse_dsn(self.dsn).get("host", "").split(",")
        host = getattr(self, "host", self.info.host)  # of an attempt to connect: which libpq has come to
        self.close()
        Connection.offset = max(Connection.offset, self.offset + 1 + [*hosts, host].index(host))


def wait(connection: extensions.connection) -> None:
    """Wait, where libpq would block, until it can go on; raise TimeoutError at the connection's deadline."""
    start, deadline = monotonic(), getattr(connection, "deadline", monotonic() + 3600)
    while (state := connection.poll()) != extensions.POLL_OK:
        if state not in {extensions.POLL_READ, extensions.POLL_WRITE}:
            raise psycopg2.OperationalError("the connection failed")
        poller = select.poll()
        poller.register(connection, select.POLLIN if state == extensions.POLL_READ else select.POLLOUT)
        if not poller.poll(max(0, deadline - monotonic()) * 1000):
            raise TimeoutError(f"no answer within {deadline - start:.1f} s")


def servers(deadline: float) -> dict[str, str]:
    """Return host, hostaddr and port for libpq, whose own lookup of names would block the process."""
    hosts, ports = (os.environ.get(name, "").split(",") for name in ("PGHOST", "PGPORT"))
    names = {host for host in hosts if host[:1] not in {"", "/", "@"}}  # the others are sockets
    for name in names:
        if name not in lookups or lookups[name].done():
            lookups[name] = resolver.submit(socket.getaddrinfo, name, None, type=socket.SOCK_STREAM)
    started = {name: lookups[name] for name in names}
    found: list[tuple[str, str, str]] = []
    for moment in ((monotonic() + deadline) / 2, deadline):  # go on at half-time with what is found
        futures.wait(started.values(), 0 if found else moment - monotonic())
        known = {name: lookup.result() for name, lookup in started.items() if lookup.done() and not lookup.exception()}
        addresses = {name: list(dict.fromkeys(str(entry[4][0]) for entry in known[name])) for name in known}
        pairs = list(zip(hosts, ports * len(hosts), strict=False))
        found = [(host, at, port) for host, port in pairs for at in addresses.get(host, [] if host in names else [""])]
    if not found:
        raise psycopg2.OperationalError(f"PGHOST={','.join(hosts)} has no address")
    offset = Connection.offset % len(found)
    lists = zip(*found[offset:], *found[:offset], strict=True)
    return dict(zip(("host", "hostaddr", "port"), map(",".join, lists), strict=True))


def connect(until: float) -> Connection:
    """Open a connection with libpq's settings; if a server is silent, try the next one if it can answer by `until`."""
    deadline = min(monotonic() + CONNECT_TIMEOUT, until)
    options: dict[str, Any] = servers(deadline) if os.environ.get("PGHOST") and not os.environ.get("PGHOSTADDR") else {}
    options |= {"fallback_application_name": "hello", "client_encoding": "UTF8"}
    options["tcp_user_timeout"] = round(CONNECT_TIMEOUT * 1000)
    try:
        return cast(Connection, psycopg2.connect(None, partial(Connection, deadline), **options))
    except TimeoutError:
        if monotonic() + CONNECT_TIMEOUT > until:
            raise
    return connect(until)


def usable(connection: Connection | None, until: float, *, writes: bool) -> Connection:
    """Return the connection, or a new one if its server has closed it or another server takes the writes now."""
    if connection and connection.server != Connection.writer and connection.opened < Connection.writer_since:
        connection.leave()
    if connection:
        with suppress(psycopg2.Error):  # it was closed, here or by the server
            connection.poll()  # the server may have sent why it closes the connection
            connection.poll()  # the end of what it sent is an error
            return connection
    connection = connect(until)
    if writes and connection.waiting_commits:
        connection.leave()
        sleep(max(0, min(CONNECT_TIMEOUT, until - monotonic())))  # limits the rate of new connections
        raise psycopg2.OperationalError("earlier writes still wait for a synchronous standby")
    return connection


def find(cursor: Any, usernames: list[str]) -> list[date | None]:
    """Return the date of birth of each username, None if there is none."""
    cursor.execute(FIND_DATES_OF_BIRTH, (round(STATEMENT_TIMEOUT * 1000), usernames))
    return list(map(dict(cursor.fetchall()).get, usernames))


def save(cursor: Any, rows: list[tuple[str, date]]) -> list[None]:
    """Save pairs of a username and a date of birth, of each username the last; sorted, so that no batches deadlock."""
    connection, unique = cursor.connection, sorted(dict(rows).items())
    connection.notices.clear()
    parameters = (round(STATEMENT_TIMEOUT * 1000), *unique, connection.deadline + connection.clock_offset)
    try:
        cursor.execute(SAVE_DATES_OF_BIRTH.format(rows=", ".join(["%s"] * len(unique))), parameters)
        if not connection.notices:  # the one that can come is the commit's: no standby has confirmed it
            since = monotonic() - (DATABASE_TIMEOUT if connection.server == Connection.writer else 0)
            Connection.writer, Connection.writer_since = connection.server, max(since, Connection.writer_since)
            return [None] * len(rows)
    except psycopg2.Error as error:
        if (error.pgcode or "08").startswith("08"):  # none from libpq, 08 from PgBouncer
            raise ConnectionResetError("the connection was lost") from None
        if not isinstance(error, errors.DivisionByZero):
            raise
    connection.close()  # the next one reads the server's clock again
    raise psycopg2.OperationalError("the statement was late, or no standby confirmed its commit")


class Batcher:
    """Run one statement for all requests that wait for a connection (natural batching).

    The first request of a batch leads it: it takes the next idle connection, at once if there is one, and runs the
    statement for all rows that have joined. After each statement it calls `observe(name, rows, seconds, error)`.
    """

    def __init__(self, statement: Callable[[Any, list[Any]], list[Any]]) -> None:
        self.name, self.statement, self.slots = statement.__name__, statement, DATABASE_CONNECTIONS
        self.observe: Callable[[str, int, float, Exception | None], None] = lambda *_: None
        self.lock = threading.Lock()
        self.waiting: list[Batch] = []  # for a connection; rows join the last one
        self.idle: SimpleQueue[Connection | None] = SimpleQueue()
        for _ in range(self.slots):
            self.idle.put(None)

    def __call__(self, row: Any) -> Any:
        """Return the statement's result for a row; raise HTTPError (503)."""
        with self.lock:
            batch = self.waiting[-1] if self.waiting else None
            # Rows join for a tenth of QUEUE_TIMEOUT only, because all of a batch give up with its first row.
            if not batch or len(batch.rows) >= BATCH_SIZE or monotonic() - batch.began > QUEUE_TIMEOUT / 10:
                batch = Batch(monotonic(), threading.Event(), [], [])
                self.waiting.append(batch)
            index = len(batch.rows)
            batch.rows.append(row)
        if index == 0:
            self.lead(batch)
        batch.done.wait()
        if not batch.results or isinstance(batch.results[index], Exception):
            raise HTTPError(*UNAVAILABLE)
        return batch.results[index]

    def lead(self, batch: Batch) -> None:
        """Run a batch's statement with the next idle connection, if one becomes idle in time."""
        try:
            with suppress(Empty):
                try:
                    connection = self.idle.get(timeout=QUEUE_TIMEOUT)
                finally:
                    with self.lock:
                        self.waiting.remove(batch)
                deadline = monotonic() + DATABASE_TIMEOUT
                try:
                    connection, batch.results[:] = self.run(connection, batch.rows, deadline)
                    if self.waiting and ConnectionResetError not in map(type, batch.results):
                        batch.done.set()
                        sleep(1e-6)  # the next requests of these clients can share the next statement
                finally:
                    self.idle.put(connection)
                if ConnectionResetError in map(type, batch.results):
                    sleep(max(0, deadline - monotonic()))  # from then on Postgres refuses the write: a 503 is final
        finally:  # also if the WSGI server kills this request
            batch.done.set()

    def run(self, connection: Connection | None, rows: list[Any], deadline: float) -> tuple[Any, list[Any]]:
        """Return the connection, and each row's result or error; after one of ROW_ERRORS, run row by row."""
        start, error = monotonic(), None
        try:
            connection = usable(connection, deadline, writes=self.statement is save)
            connection.deadline = deadline
            with connection.cursor() as cursor:
                return connection, self.statement(cursor, rows)
        except Exception as failure:  # of any kind: each request of the batch gets an answer
            error = failure
            if connection and isinstance(error, TimeoutError | errors.ReadOnlySqlTransaction):
                connection.leave()
        finally:
            self.observe(self.name, len(rows), monotonic() - start, error)
        results: list[Any] = [error] * len(rows)
        for index, row in enumerate(rows if len(rows) > 1 and isinstance(error, ROW_ERRORS) else []):
            if monotonic() < deadline:
                connection, (results[index],) = self.run(connection, [row], deadline)
        return connection, results


extensions.set_wait_callback(wait)
find_date_of_birth = Batcher(find)
save_date_of_birth = Batcher(save)


def init_db() -> None:
    """Apply schema.sql once the database answers; print the reason for waiting, and exit with it after INIT_TIMEOUT."""
    schema, deadline, reason = Path(__file__).with_name("schema.sql").read_text(), monotonic() + INIT_TIMEOUT, ""
    while True:
        try:
            connection = connect(monotonic() + CONNECT_TIMEOUT)  # one attempt
            connection.deadline = deadline
            return connection.cursor().execute(schema)
        except (psycopg2.Error, TimeoutError) as error:
            where = " ".join(f"{name}={os.getenv(name) or 'default'}" for name in ("PGHOST", "PGPORT", "PGDATABASE"))
            printed, reason = reason, f"{str(error).splitlines()[0]} ({where})"  # the other lines may quote rows
        if monotonic() + 1 > deadline:
            sys.exit(f"init-db: {reason}")
        if reason != printed:
            print("init-db waits:", reason, file=sys.stderr, flush=True)
        sleep(1)


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["init-db"]):
        sys.exit("usage: python hello.py [init-db]")
    init_db() if sys.argv[1:] == ["init-db"] else make_server(HOST, PORT, application).serve_forever()
