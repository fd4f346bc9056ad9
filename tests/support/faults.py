"""What test_resilience.py does its damage with: a Postgres to kill, a gunicorn to watch, clients that keep books.

Nothing here is simulated: processes get signals, locks are held, disks are full, sockets stay silent.
"""

import contextlib
import http.client
import itertools
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any, Self

import psutil
import psycopg2
from psycopg2 import extensions

from tools import embedded_postgres as embedded
from tools.embedded_postgres import free_port

ROOT = Path(__file__).parents[2]
LOGS: list[Path] = []  # of every service started here
PASSWORD = "Sesame-password"


class Patient(extensions.connection):
    """The tests' own connection: where hello is imported, hello.wait bounds every connection; this one at an hour."""

    deadline = time.monotonic() + 3600


def until(condition: Callable[[], Any], seconds: float = 10) -> Any:
    """Wait until a condition holds, and return its value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.01)
    return value


def letters(number: int) -> str:
    """Write a number in letters, for it to be part of a username."""
    text = ""
    while True:
        number, digit = divmod(number, 26)
        text = chr(ord("a") + digit) + text
        if not number:
            return text


# --- Postgres ---------------------------------------------------------------------------------------


class Database(embedded.Postgres):
    """A Postgres that may be killed, stopped in place and restarted; the service is a role of few rights there."""

    @property
    def service_environment(self) -> dict[str, str]:
        return self.environment | {"PGUSER": "hello", "PGPASSWORD": PASSWORD}

    def prepare(self) -> None:
        """Apply the schema as its owner, and make the role that serves."""
        environment = os.environ | self.environment
        subprocess.run([sys.executable, "hello.py", "init-db"], check=True, cwd=ROOT, env=environment)
        self.query("CREATE ROLE hello LOGIN; GRANT SELECT, INSERT, UPDATE ON users TO hello")

    def connect(self, user: str = "postgres") -> Any:
        """Open a connection of the test's own."""
        where = {"host": self.sockets, "port": self.environment["PGPORT"], "user": user, "dbname": "postgres"}
        connection = psycopg2.connect(**where, application_name="test", connection_factory=Patient)
        connection.autocommit = True
        return connection

    def query(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        with contextlib.closing(self.connect()) as connection, connection.cursor() as cursor:
            cursor.execute(statement, values or None)
            return cursor.fetchall() if cursor.description else []

    def rows(self) -> dict[str, date]:
        return dict(self.query("SELECT username, date_of_birth FROM users"))

    def connections(self, service: "Service") -> int:
        """Count the connections of a service."""
        return self.query("SELECT count(*) FROM pg_stat_activity WHERE application_name = %s", service.name)[0][0]

    @contextlib.contextmanager
    def set(self, **settings: str) -> Iterator[None]:
        """Change settings of the running server for a while."""
        for name, value in settings.items():
            self.query(f"ALTER SYSTEM SET {name} = '{value}'")
        self.query("SELECT pg_reload_conf()")
        try:
            yield
        finally:
            self.query("ALTER SYSTEM RESET ALL")
            self.query("SELECT pg_reload_conf()")

    @contextlib.contextmanager
    def locked(self, statement: str) -> Iterator[None]:
        """Hold a lock in a transaction of its own."""
        with contextlib.closing(self.connect()) as connection, connection.cursor() as cursor:
            cursor.execute("BEGIN; " + statement)
            yield

    def disconnect_service(self) -> None:
        self.query("SELECT pg_terminate_backend(pid, 1000) FROM pg_stat_activity WHERE usename = 'hello'")

    def processes(self) -> list[psutil.Process]:
        postmaster = psutil.Process(self.process.pid)
        return [postmaster, *postmaster.children(recursive=True)]

    def kill(self) -> None:
        """End every process of the server at once, as a power cut would."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def restart(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait()
        self.start()

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop every process of the server in place: it accepts, and never answers."""
        processes = self.processes()
        for process in processes:
            process.suspend()
        try:
            yield
        finally:
            for process in processes:
                process.resume()

    @contextlib.contextmanager
    def census(self, service: "Service") -> Iterator[list[int]]:
        """Count a service's connections again and again; the list holds every count."""
        counts: list[int] = []
        done = threading.Event()

        def count() -> None:
            while not done.wait(0.02):
                with contextlib.suppress(psycopg2.Error):
                    counts.append(self.connections(service))

        thread = threading.Thread(target=count)
        thread.start()
        try:
            yield counts
        finally:
            done.set()
            thread.join()


@contextlib.contextmanager
def silent_port(*, drops: bool = False) -> Iterator[int]:
    """Yield a port that completes a connection and never says a word, or that drops every packet."""
    with (
        socket.create_server(("127.0.0.1", 0), backlog=0 if drops else 100) as listener,
        contextlib.ExitStack() as stack,
    ):
        if drops:  # a full backlog: the kernel answers no further SYN
            for _ in range(2):
                filler = stack.enter_context(socket.socket())
                filler.setblocking(False)
                filler.connect_ex(listener.getsockname())
            time.sleep(0.1)
            with socket.socket() as probe, contextlib.suppress(TimeoutError):
                probe.settimeout(0.2)
                probe.connect(listener.getsockname())
                raise AssertionError("the port answers")
        yield listener.getsockname()[1]


@contextlib.contextmanager
def tls_proxy(target: str, context: ssl.SSLContext) -> Iterator[int]:
    """Yield a port that speaks Postgres over TLS and passes it on to a server's Unix socket."""

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)

    def serve(client: socket.socket) -> None:
        with contextlib.suppress(OSError), client, socket.socket(socket.AF_UNIX) as server:
            assert client.recv(8)[4:] == b"\x04\xd2\x16\x2f", "not an SSLRequest"
            client.sendall(b"S")
            with context.wrap_socket(client, server_side=True) as secured:
                server.connect(target)
                back = threading.Thread(target=pump, args=(server, secured), daemon=True)
                back.start()
                pump(secured, server)
                back.join()

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


# --- The service ------------------------------------------------------------------------------------


class Service:
    """A gunicorn as `make run` starts it.

    Args:
        folder: where its log goes.
        environment: what reaches its database.
        prefix: a command that runs it in some other way.
        settings: of hello, worker and gunicorn.conf, such as `HEAD_TIMEOUT="1"`.
    """

    def __init__(
        self, folder: Path, environment: dict[str, str], *, prefix: Sequence[str] = (), **settings: str
    ) -> None:
        self.prefix = prefix
        self.port = free_port()
        self.name = f"hello-{self.port}"  # of its connections in the database
        self.log = folder / f"{self.name}.log"
        LOGS.append(self.log)
        own = {"PORT": str(self.port), "METRICS_PORT": "0", "PGAPPNAME": self.name}
        self.environment = os.environ | environment | own | settings

    def __enter__(self) -> Self:
        command = [*self.prefix, Path(sys.executable).with_name("gunicorn"), "hello:application"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=log, stderr=log)
        assert embedded.wait_for_port(self.process, self.port), self.log.read_text()
        # A worker that opened no connection yet would do so at its first request, which a test may want to be fast.
        until(lambda: len(self.workers()) == int(self.environment.get("WEB_CONCURRENCY", 2)))
        until(lambda: self.ask("GET", "/livez").status == 200)
        return self

    def __exit__(self, *error: object) -> None:
        self.process.send_signal(signal.SIGQUIT)  # gunicorn's quick shutdown
        self.process.wait()

    def workers(self) -> list[int]:
        return sorted(child.pid for child in psutil.Process(self.process.pid).children())

    def pss(self) -> float:
        """Return the memory of all processes in MB, what they share counted once (proportional set size)."""
        pages = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in [self.process.pid, *self.workers()]]
        return sum(int(page.split("Pss:")[1].split()[0]) for page in pages) / 1024

    def connect(self) -> "Connection":
        return Connection("127.0.0.1", self.port, timeout=15)

    def ask(self, method: str, path: str, content: bytes | None = None) -> "Answer":
        """Ask on a connection of its own."""
        with contextlib.closing(self.connect()) as connection:
            return connection.ask(method, path, content)

    def put(self, username: str, born: str = "1990-05-17") -> "Answer":
        return self.ask("PUT", f"/hello/{username}", body(born))


def body(born: str | date) -> bytes:
    return json.dumps({"dateOfBirth": str(born)}).encode()


class Answer:
    """A response, read whole, and the seconds it took."""

    def __init__(self, response: http.client.HTTPResponse, start: float) -> None:
        self.status = response.status
        self.headers = response.headers
        self.content = response.read()
        self.seconds = time.monotonic() - start
        if self.status == 503:
            assert self.headers["Retry-After"] == "1"
        if self.content and self.headers["Content-Type"] == "application/json":
            self.message = json.loads(self.content)["message"]


class Connection(http.client.HTTPConnection):
    """A connection to the service that is kept alive, and says whether a failure cost an answer."""

    def ask(self, method: str, path: str, content: bytes | None = None) -> Answer:
        start = time.monotonic()
        self.request(method, path, content)
        return Answer(self.getresponse(), start)


class Client(threading.Thread):
    """A client that PUTs and GETs on one connection and keeps books.

    Every other PUT is of a new user, the others of one of its own; every PUT has a date of its own. So one that was
    acknowledged and is lost, overtaken or undone shows in the table.
    """

    def __init__(self, load: "Load", name: str) -> None:
        super().__init__(daemon=True)
        self.load = load
        self.name = name
        self.connection = load.service.connect()
        self.asked: dict[str, list[date]] = {name: []}  # all dates sent, for each user
        self.kept: dict[str, int] = {}  # the index of the last one that was acknowledged
        self.answers: list[tuple[float, int, float]] = []  # moment, status, seconds
        self.sent = self.retried = self.refused = 0
        self.defects: list[str] = []

    def run(self) -> None:
        try:
            for number in itertools.count():
                if self.load.done.wait(self.load.pause):
                    return
                user = self.name + (f"Z{letters(number)}" if number % 2 == 0 else "")
                dates = self.asked.setdefault(user, [])
                dates.append(date(1000, 1, 1) + timedelta(days=number))
                if self.ask("PUT", user, body(dates[-1])) == 204:
                    self.kept[user] = len(dates) - 1
                self.ask("GET", user)
        except ConnectionRefusedError:
            self.refused += 1  # the service is gone: nobody accepted anything
        except Exception as error:  # noqa: BLE001 - whatever it is, the test must see it
            self.defects.append(f"{type(error).__name__}: {error}")

    def ask(self, method: str, user: str, content: bytes | None = None) -> int:
        """Ask, and once more where a connection in use for long turned out to be closed, as every HTTP client does."""
        self.sent += 1
        is_reused = self.connection.sock is not None and not self.load.is_fresh
        if self.load.is_fresh:
            self.connection.close()
        try:
            answer = self.connection.ask(method, f"/hello/{user}", content)
        except ConnectionRefusedError:
            raise
        except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
            if not is_reused:
                raise
            self.retried += 1
            self.connection.close()
            answer = self.connection.ask(method, f"/hello/{user}", content)
        if answer.status == 200 and not answer.message.startswith(f"Hello, {user}! "):
            self.defects.append("somebody else's answer")
        self.answers.append((time.monotonic(), answer.status, answer.seconds))
        return answer.status


class Load:
    """Clients at work.

    Args:
        service: whom they ask.
        clients: how many there are, each with one request at a time.
        pause: seconds between a client's rounds of a PUT and a GET.
        is_fresh: whether each request has a connection of its own.
    """

    runs = itertools.count()

    def __init__(self, service: Service, clients: int = 16, pause: float = 0.005, *, is_fresh: bool = False) -> None:
        self.service = service
        self.pause = pause
        self.is_fresh = is_fresh
        self.done = threading.Event()
        run = letters(next(self.runs)).capitalize()
        self.clients = [Client(self, f"Quux{run}{letters(index).capitalize()}") for index in range(clients)]

    def __enter__(self) -> Self:
        self.start = time.monotonic()
        for client in self.clients:
            client.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.done.set()
        for client in self.clients:
            client.join()
            client.connection.close()
        self.end = max((moment for moment, _, _ in self.answers), default=self.start)

    @property
    def answers(self) -> list[tuple[float, int, float]]:
        return sorted(answer for client in self.clients for answer in client.answers)

    @property
    def statuses(self) -> Counter[int]:
        return Counter(status for _, status, _ in self.answers)

    @property
    def defects(self) -> list[str]:
        return [defect for client in self.clients for defect in client.defects]

    @property
    def sent(self) -> int:
        return sum(client.sent for client in self.clients)

    @property
    def retried(self) -> int:
        return sum(client.retried for client in self.clients)

    @property
    def slowest(self) -> float:
        return max(seconds for _, _, seconds in self.answers)

    def outage(self) -> float:
        """Return the longest time in seconds without a success of anybody."""
        moments = [self.start, *(moment for moment, status, _ in self.answers if status < 300), self.end]
        return max(after - before for before, after in itertools.pairwise(moments))

    def first_success(self, since: float) -> float:
        """Return the seconds from a moment to the next success."""
        moments = (moment for moment, status, _ in self.answers if status < 300 and moment >= since)
        return min(moments, default=float("inf")) - since

    def check(self, database: Database) -> tuple[int, list[str]]:
        """Hold the table beside the books: return how many acknowledged writes there are, and whose was lost.

        A PUT that got no answer, or 503, may or may not be stored.
        """
        rows = database.rows()
        lost = [
            user
            for client in self.clients
            for user, index in client.kept.items()
            if rows.get(user) not in client.asked[user][index:]
        ]
        return sum(status == 204 for status in self.statuses.elements()), lost

    def figures(self, database: Database) -> str:
        """Say what happened, and fail where an acknowledged write is lost or an answer was none."""
        kept, lost = self.check(database)
        assert not lost, f"lost: {lost}"
        assert not self.defects, f"{len(self.defects)} defects: {set(self.defects)}"
        by_status = ", ".join(f"{count} x {status}" for status, count in sorted(self.statuses.items()))
        return (
            f"{self.sent} sent, answered {by_status}, slowest {self.slowest:.2f} s; "
            f"{kept} acknowledged writes, {len(lost)} lost; longest outage {self.outage():.2f} s"
        )
