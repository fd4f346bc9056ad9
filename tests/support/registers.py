"""Writers and readers of the same users at several instances of the service, who record what they see and when."""

import itertools
import re
import threading
import time
from collections.abc import Sequence
from datetime import date, datetime, timedelta
from typing import Self
from zoneinfo import ZoneInfo

import hello
from tests.support.linearizability import NEVER, Operation, first_lost, first_violation
from tests.support.load import defects_of, letters
from tests.support.network import Connection
from tests.support.postgres import Database
from tests.support.service import Service, body
from tests.support.wait import wait_until

NOON = f"Etc/GMT{datetime.now(ZoneInfo('UTC')).hour - 12:+d}"  # a time zone in which no day ends during a test
LAST_DAY_COUNT = 364


def date_with(days: int) -> date:
    """Return the date of birth of someone whose birthday is in so many days."""
    return (datetime.now(ZoneInfo(NOON)).date() + timedelta(days)).replace(year=1996)


def days_of(born: date | None) -> int | None:
    """Return the days to the birthday; None of None."""
    return None if born is None else hello.days_until_birthday(born, datetime.now(ZoneInfo(NOON)).date())


class Client(threading.Thread):
    """A client that writes or reads one user's date of birth again and again on one connection.

    Args:
        values: the day counts that it writes, in this order; a reader has none.
    """

    def __init__(self, load: "Registers", user: str, service: Service, values: Sequence[int] = ()) -> None:
        super().__init__(daemon=True)
        self.load = load
        self.user = user
        self.connection = Connection(service.port)
        self.values = itertools.cycle(values) if values else None
        self.history: list[Operation] = []
        self.failures: list[float] = []  # when 503 was answered, or a connection was lost
        self.defects: list[str] = []

    def run(self) -> None:
        """Ask until the load is over."""
        try:
            while not self.load.done.wait(self.load.pause):
                if self.values:
                    self.write(next(self.values))
                else:
                    self.read()
        except Exception as error:
            self.defects.append(f"{type(error).__name__}: {error}")

    def ask(self, method: str, content: bytes | None = None) -> tuple[int, str]:
        """Return the status and the message; status 0 if there was no answer."""
        try:
            response = self.connection.ask(method, f"/hello/{self.user}", content)
        except ConnectionError:
            self.connection.close()
            return 0, ""
        return response.status, response.message

    def write(self, days: int) -> None:
        """Send a PUT and record it."""
        start = time.monotonic()
        status, message = self.ask("PUT", body(date_with(days)))
        end = time.monotonic()
        if status not in {0, 204, 503}:
            self.defects.append(f"PUT was answered {status} {message!r}")
        if status != 204:
            self.failures.append(end)
        self.history.append(Operation(start, end if status else NEVER, days, is_write=True, is_certain=status == 204))

    def read(self) -> None:
        """Send a GET and record what it shows."""
        start = time.monotonic()
        status, message = self.ask("GET")
        end = time.monotonic()
        if status in {0, 503}:
            self.failures.append(end)
            return
        match = re.fullmatch(rf"Hello, {self.user}! Your birthday is in (\d+) day\(s\)", message)
        if (status, match is not None) in {(200, True), (404, False)}:
            self.history.append(Operation(start, end, int(match[1]) if match else None))
        else:
            self.defects.append(f"GET was answered {status} {message!r}")


class Registers:
    """Clients at work; a context manager that stops them.

    Each user has a reader at each service. Every other user has a writer at each, the others have one writer in all.

    Args:
        services: what they ask; each runs with TZ=NOON.
        users: how many there are.
        pause: seconds between the requests of a client.
    """

    runs = itertools.count()

    def __init__(self, services: Sequence[Service], users: int = 4, pause: float = 0.02) -> None:
        self.pause = pause
        self.done = threading.Event()
        self.tables: list[tuple[float, float, dict[str, date]]] = []
        run = letters(next(self.runs)).capitalize()
        self.writers: list[Client] = []
        self.readers: list[Client] = []
        for number in range(users):
            user = f"Quux{run}{letters(number).capitalize()}"
            self.readers += [Client(self, user, service) for service in services]
            writing = services if number % 2 == 0 else [services[number // 2 % len(services)]]
            for index, service in enumerate(writing):
                values = range(1 + index, LAST_DAY_COUNT, len(writing))
                self.writers.append(Client(self, user, service, values))

    @property
    def clients(self) -> list[Client]:
        return [*self.writers, *self.readers]

    def __enter__(self) -> Self:
        for client in self.clients:
            client.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.done.set()
        defects = defects_of(self.clients)
        assert error[0] or not defects, f"{len(defects)} wrong answers, such as {sorted(set(defects))[:3]}"

    def wait_for_successes(self, count: int, clients: Sequence[Client] | None = None) -> None:
        """Wait until each client, or each of some clients, has had so many more successes."""
        goals = [(client, self.successes(client) + count) for client in clients or self.clients]
        wait_until(lambda: all(self.successes(client) >= goal for client, goal in goals), 30)

    def wait_for_failures(self, count: int, clients: Sequence[Client] | None = None) -> None:
        """Wait until each client, or each of some clients, has had so many more answers 503."""
        goals = [(client, len(client.failures) + count) for client in clients or self.clients]
        wait_until(lambda: all(len(client.failures) >= goal for client, goal in goals), 30)

    @staticmethod
    def successes(client: Client) -> int:
        """Count a client's successes so far."""
        return sum(operation.is_certain for operation in list(client.history))

    @property
    def last_failure(self) -> float:
        """The moment of the last answer 503."""
        return max(moment for client in self.clients for moment in client.failures)

    def history(self, user: str) -> list[Operation]:
        """Return all operations on a user."""
        return [operation for client in self.clients if client.user == user for operation in client.history]

    def record(self, survivor: Database) -> None:
        """Read the table of the server that survives, as one more reader of each user."""
        start = time.monotonic()
        rows = survivor.rows()
        self.tables.append((start, time.monotonic(), rows))

    def table_reads(self, user: str) -> list[Operation]:
        """Return what the recorded tables show of a user."""
        return [Operation(start, end, days_of(rows.get(user))) for start, end, rows in self.tables]

    def check_nothing_lost(self, shown: Database) -> None:
        """Fail if a recorded table lacks a date that was acknowledged, or shown by a GET or by another server."""
        rows = shown.rows()
        for user in {client.user for client in self.clients}:
            seen = Operation(NEVER, NEVER, days_of(rows.get(user)))
            lost = first_lost([*self.history(user), seen], self.table_reads(user))
            assert lost is None, f"{user}: something was lost or undone before {lost}"

    def check_linearizable(self, in_doubt_until: float = 0) -> None:
        """Fail if a user's history is not linearizable; it includes the recorded tables.

        A PUT that was answered 503 may take effect before its answer, or before the moment `in_doubt_until`.
        """
        for user in {client.user for client in self.clients}:
            history = [
                operation if operation.is_certain else operation._replace(end=max(operation.end, in_doubt_until))
                for operation in self.history(user)
            ]
            violation = first_violation(history + self.table_reads(user))
            assert violation is None, f"{user}: the operations before it contradict {violation}"
