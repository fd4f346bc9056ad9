"""The measurements of `make bench` and `make bench-growth`."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from bench.contestants import CONTESTANTS, Contestant, Pgbench, Service, available, hello_service, running
from bench.database import USERS, create_database, psql
from bench.load import CLIENTS, METHODS, Load, Samples

CLIENT_COUNTS = (1, 8, CLIENTS, 128, 1000)
WORKER_COUNTS = (1, 2, 4)  # two is the default
USER_COUNTS = (10_000, 1_000_000, 10_000_000)


class Case(NamedTuple):
    """One load of one contestant; its samples are those of all rounds."""

    contestant: str
    method: str
    clients: int = CLIENTS
    users: int = USERS


Results = dict[Case, Samples]


@dataclass
class Measurements:
    """Everything that `make bench` measures."""

    contestants: Sequence[Contestant]
    results: Results
    memory: Mapping[str, float | None]  # of each contestant after all load, in MB
    paced: Mapping[str, Samples] = field(default_factory=dict)  # by method: at half of the capacity
    start_seconds: float = 0.0  # from the start of gunicorn to the first 200

    def rate(self, contestant: str, method: str, clients: int = CLIENTS) -> float | None:
        """Return a case's median rate, None where it was not measured."""
        samples = self.results.get(Case(contestant, method, clients))
        return samples.rate if samples else None

    def p99(self, contestant: str, method: str, clients: int = CLIENTS) -> float | None:
        """Return a case's median 99th percentile in ms, None where it was not measured."""
        samples = self.results.get(Case(contestant, method, clients))
        return samples.p99 if samples else None


def run_rounds(contestants: Sequence[Contestant], cases: Iterable[Case], rounds: int, seconds: int) -> Results:
    """Load each case once a round; each round begins with another case."""
    by_name = {contestant.name: contestant for contestant in contestants}
    order = list(cases)
    results = {case: Samples() for case in order}
    for number in range(rounds):
        first = number * len(order) // rounds
        for case in order[first:] + order[:first]:
            load = Load(case.method, seconds, case.clients, case.users)
            results[case].append(by_name[case.contestant].run(load))
        progress = (f"{c.contestant} {c.method} {c.clients} {samples[-1].rate:,.0f}" for c, samples in results.items())
        print(f"round {number + 1} of {rounds}: {', '.join(progress)}", flush=True)
    return results


def compare(names: Sequence[str], rounds: int, seconds: int, against: Path | None = None) -> Measurements:
    """Measure some contestants with 32 clients, and the hello of another checkout."""
    contestants = available([contestant for contestant in CONTESTANTS if contestant.name in names])
    if against:
        label = f"hello in `{against}`"
        contestants.append(Service("hello-against", label, "gunicorn hello:application", folder=against.resolve()))
    with running(contestants):
        cases = [Case(contestant.name, method) for method in METHODS for contestant in contestants]
        results = run_rounds(contestants, cases, rounds, seconds)
        return Measurements(contestants, results, {c.name: c.memory() for c in contestants})


def measure(rounds: int, seconds: int) -> Measurements:
    """Measure all contestants, hello with more and fewer clients and workers, its latency and its start."""
    start_seconds = statistics.median(measure_start() for _ in range(5))
    contestants = available(CONTESTANTS)
    workers = [hello_service(worker_case(count), WEB_CONCURRENCY=str(count)) for count in WORKER_COUNTS if count != 2]
    cases = [Case(contestant.name, method) for method in METHODS for contestant in (*contestants, *workers)]
    cases += [
        Case("hello", method, count) for count in CLIENT_COUNTS if count not in {1, CLIENTS} for method in METHODS
    ]
    cases += [Case("hello-reuse-port", method, max(CLIENT_COUNTS)) for method in METHODS]
    # More often than the rest: this bar is narrower than the noise of a few samples.
    cases += 3 * [Case(name, method, 1) for method in METHODS for name in ("hello", "hello-1")]
    with running([*contestants, *workers]):
        results = run_rounds([*contestants, *workers], cases, rounds, seconds)
        memory = {contestant.name: contestant.memory() for contestant in contestants}
        paced = {
            method: measure_paced(contestants[0], method, results[Case("hello", method)].rate / 2) for method in METHODS
        }
    return Measurements(contestants, results, memory, paced, start_seconds)


def worker_case(count: int) -> str:
    """Return the name of the service with so many workers."""
    return "hello" if count == 2 else f"hello-{count}-workers"


def measure_paced(service: Contestant, method: str, rate: float) -> Samples:
    """Return samples of a service at about this rate.

    wrk has no rate: each client pauses after each response, for a mean time that is found by trial.
    """
    pause = CLIENTS / rate * 1000 - 2
    for _ in range(3):
        sample = service.run(Load(method, 2, pause=max(pause, 0.5)))
        pause += CLIENTS * 1000 * (1 / rate - 1 / sample.rate)
    return Samples(service.run(Load(method, 4, pause=max(pause, 0.5))) for _ in range(3))


def measure_start() -> float:
    """Return the seconds from the start of gunicorn to the first 200."""
    service = hello_service()
    try:
        service.start()
        return service.seconds_to_ready
    finally:
        service.stop()


@dataclass
class Growth:
    """What `make bench-growth` measures."""

    results: Results  # of the contestants "hello" and "pgbench-same"
    row_bytes: dict[int, tuple[float, float]]  # by users: of a row in the table and in the index, before any load


def measure_growth(rounds: int, seconds: int) -> Growth:
    """Measure hello and pgbench with hello's message, on three databases in turn."""
    row_bytes = {}
    contestants: list[Contestant] = []
    cases = []
    for users in USER_COUNTS:
        database = f"users_{users}"
        create_database(database, users)
        table, index = psql("SELECT pg_relation_size('users'), pg_relation_size('users_pkey')", database).split("|")
        row_bytes[users] = (int(table) / users, int(index) / users)
        pair = [hello_service(f"hello {users}", database=database), Pgbench(f"pgbench-same {users}", "", database)]
        contestants += pair
        cases += [Case(contestant.name, method, users=users) for method in METHODS for contestant in pair]
    with running(contestants):
        for contestant, case in ((c, case) for c in contestants for case in cases if case.contestant == c.name):
            contestant.run(Load(case.method, 3, users=case.users))  # read what the measured loads need into memory
        results = run_rounds(contestants, cases, rounds, seconds)
    return Growth({case._replace(contestant=case.contestant.split()[0]): results[case] for case in cases}, row_bytes)
