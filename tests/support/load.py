"""Clients at work that compare what they are answered, and the table at the end, with what was acknowledged."""

import itertools
import re
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any, NamedTuple, Self

import hello
from tests.support.network import Connection, Response
from tests.support.postgres import Database
from tests.support.service import CONNECTIONS, Service, body
from tests.support.wait import wait_until


def letters(number: int) -> str:
    """Write a number in letters, for it to be part of a username."""
    text = ""
    while True:
        number, digit = divmod(number, 26)
        text = chr(ord("a") + digit) + text
        if not number:
            return text


class Journal:
    """What a client sent for each user, and which of it was acknowledged; tells which dates may be stored."""

    def __init__(self) -> None:
        self.sent: dict[str, list[date]] = {}
        self.acknowledged: dict[str, int] = {}  # the index of the last acknowledged date

    def send(self, user: str, born: date) -> None:
        """Note that a date is about to be sent."""
        self.sent.setdefault(user, []).append(born)

    def acknowledge(self, user: str) -> None:
        """Note that the last date sent was acknowledged."""
        self.acknowledged[user] = len(self.sent[user]) - 1

    def possible(self, user: str) -> Sequence[date | None]:
        """Return the last acknowledged date and those sent after it; or None (no date) and all, if none was."""
        if user in self.acknowledged:
            return self.sent[user][self.acknowledged[user] :]
        return [None, *self.sent.get(user, [])]

    def lost(self, rows: Mapping[str, date]) -> list[str]:
        """Return the users whose row holds an older date than the last acknowledged one, or a date nobody sent."""
        return [user for user in self.sent if rows.get(user) not in self.possible(user)]

    def explains(self, user: str, response: Response, days: Sequence[date]) -> bool:
        """Return whether a response to a GET on one of these days tells of a date that may be stored."""
        if response.status != 200:
            return response.status == 503 or (response.status == 404 and None in self.possible(user))
        match = re.fullmatch(
            rf"Hello, {user}! (?:Your birthday is in (\d+) day\(s\)|Happy birthday!)", response.message
        )
        counts = {hello.days_until_birthday(born, day) for born in self.possible(user) if born for day in days}
        return match is not None and int(match[1] or 0) in counts


class Answer(NamedTuple):
    """One answer: when it came (monotonic seconds), its status, and how long it took, with a first try that failed."""

    moment: float
    status: int
    seconds: float


class Client(threading.Thread):
    """A client that PUTs and GETs on one connection and keeps a journal.

    Every other PUT is of a new user, the others of one of its own; every PUT has another date. So a write that was
    acknowledged and is lost, overtaken or undone shows in the table.
    """

    def __init__(self, load: "Load", name: str) -> None:
        super().__init__(daemon=True)
        self.load = load
        self.name = name
        self.connection = Connection(load.service.port)
        self.journal = Journal()
        self.answers: list[Answer] = []
        self.sent = self.retried = 0
        self.defects: list[str] = []

    def run(self) -> None:
        """Send until the load is over, or until a service that stops refuses connections."""
        try:
            for number in itertools.count():
                if self.load.done.wait(self.load.pause):
                    return
                user = self.name + (f"Z{letters(number)}" if number % 2 == 0 else "")
                self.put(user, date(1000, 1, 1) + timedelta(days=number))
                self.get(user)
        except Exception as error:
            if not (self.load.service_stops and isinstance(error, ConnectionRefusedError)):
                self.defects.append(f"{type(error).__name__}: {error}")

    def has_met(self, status: int) -> bool:
        """Return whether it has had an answer with this status."""
        return any(answer.status == status for answer in list(self.answers))

    def put(self, user: str, born: date) -> None:
        """Save a date and note whether it was acknowledged."""
        self.journal.send(user, born)
        response = self.ask("PUT", user, body(born))
        if response.status == 204:
            self.journal.acknowledge(user)
        elif response.status != 503:
            self.defects.append(f"PUT was answered {response.status}")

    def get(self, user: str) -> None:
        """Ask for the greeting; it must be the user's own, with the days of a date that may be stored."""
        before = datetime.now(UTC).date()
        response = self.ask("GET", user)
        days = sorted({before, datetime.now(UTC).date()})
        if not self.journal.explains(user, response, days):
            possible = [str(born) for born in self.journal.possible(user)[:3]]
            self.defects.append(f"GET was answered {response.status} {response.message!r}, stored can be {possible}")

    def ask(self, method: str, user: str, content: bytes | None = None) -> Response:
        """Ask, and once more if the connection turns out to be closed, as HTTP clients do.

        A new connection may be reset only if the next one is refused: it came while the service closed its socket.
        """
        self.sent += 1
        if self.load.is_fresh:
            self.connection.close()
        is_reused = self.connection.sock is not None
        start = time.monotonic()
        try:
            response = self.connection.ask(method, f"/hello/{user}", content)
        except ConnectionRefusedError:
            raise
        except ConnectionError:
            self.connection.close()
            response = self.connection.ask(method, f"/hello/{user}", content)
            self.retried += 1
            if not is_reused:
                self.defects.append("a new connection was reset")
        moment = time.monotonic()
        self.answers.append(Answer(moment, response.status, moment - start))
        return response


def defects_of(clients: Sequence[Any]) -> list[str]:
    """Wait until threads of clients end, close their connections, and return what they were answered wrongly."""
    for client in clients:
        client.join()
        client.connection.close()
    return [defect for client in clients for defect in client.defects]


class Load:
    """Clients at work. At its end no acknowledged write may be missing in the database, and no answer may be wrong.

    Args:
        service: what they ask.
        database: where the acknowledged writes must be at the end.
        clients: how many there are, each with one request at a time.
        pause: seconds between a client's rounds of a PUT and a GET.
        is_fresh: whether each request has a connection of its own.
        service_stops: whether the service stops meanwhile; then a refused connection is the end of a client.
    """

    runs = itertools.count()

    def __init__(
        self,
        service: Service,
        database: Database,
        clients: int = 16,
        pause: float = 0.01,
        *,
        is_fresh: bool = False,
        service_stops: bool = False,
    ) -> None:
        self.service = service
        self.database = database
        self.pause = pause
        self.is_fresh = is_fresh
        self.service_stops = service_stops
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
        defects = defects_of(self.clients)
        self.end = max((answer.moment for answer in self.answers), default=self.start)
        if not error[0]:
            assert not defects, f"{len(defects)} wrong answers, such as {sorted(set(defects))[:3]}"
            rows = self.database.rows()
            lost = [user for client in self.clients for user in client.journal.lost(rows)]
            assert not lost, f"acknowledged dates are lost: {lost}"

    @property
    def answers(self) -> list[Answer]:
        return sorted(answer for client in self.clients for answer in list(client.answers))

    @property
    def statuses(self) -> Counter[int]:
        return Counter(answer.status for client in self.clients for answer in list(client.answers))

    @property
    def retried(self) -> int:
        return sum(client.retried for client in self.clients)

    @property
    def slowest(self) -> float:
        return max(answer.seconds for answer in self.answers)

    def wait_for_answers(self, count: int, statuses: Sequence[int] = (200, 204), seconds: float = 20) -> None:
        """Wait until so many more answers with one of these statuses have come."""

        def total() -> int:
            found = self.statuses
            return sum(found[status] for status in statuses)

        before = total()
        wait_until(lambda: total() >= before + count, seconds)

    def first_success(self, since: float) -> float:
        """Return the seconds from a moment to the next success."""
        return (
            min((a.moment for a in self.answers if a.status < 300 and a.moment >= since), default=float("inf")) - since
        )

    def report(self) -> str:
        """Return what happened, in one line."""
        successes = [self.start, *(answer.moment for answer in self.answers if answer.status < 300), self.end]
        outage = max(after - before for before, after in itertools.pairwise(successes))
        by_status = ", ".join(f"{count} x {status}" for status, count in sorted(self.statuses.items()))
        return (
            f"{sum(client.sent for client in self.clients)} sent, answered {by_status}, slowest {self.slowest:.2f} s; "
            f"{self.statuses[204]} acknowledged writes, 0 lost; longest outage {outage:.2f} s"
        )


def open_all_connections(service: Service, database: Database) -> None:
    """Let every worker open its connections to the database."""
    with Load(service, database, 32, is_fresh=True):
        wait_until(lambda: database.connections(service.name) == CONNECTIONS)
