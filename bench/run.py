"""Measure hello beside pgbench, a constant and what people would pick instead: `make bench`.

Everything runs on this machine in one run: one Postgres, all services at once, loaded one after the other in rounds, so
that a disturbance hurts all alike. README.md here says what is compared, and where the time goes.
"""

import argparse
import contextlib
import importlib.metadata
import os
import platform
import random
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parent
BIN = Path(sys.executable).parent
sys.path.insert(0, str(ROOT))

from tools import embedded_postgres as embedded  # found through the path above

USERS = 1_000_000
CLIENTS = 32
CLIENT_COUNTS = (1, 8, 32, 128, 1000)
METHODS = ("GET", "PUT")
FIRST_PORT = int(os.environ.get("PORT") or 18500)
# Beside Postgres' defaults, of which fsync and synchronous_commit are two. Nothing here makes a commit less durable.
SETTINGS = {"shared_buffers": "1GB", "max_wal_size": "8GB", "max_connections": "200"}

NAME = "'User' || translate(to_char({}, 'FM0000000'), '0123456789', 'abcdefghij')"
# The users arrive in no order, as users do: the index is as full as it will be in use. The factor is prime.
LOAD = (
    f"INSERT INTO users SELECT {NAME.format('number::bigint * 7368787 % {users}')}, '1930-01-01'::date + number % 32000"
    " FROM generate_series(1, {users}) AS number"
)
LETTERS = str.maketrans("0123456789", "abcdefghij")
# As plain as it can be, and what hello sends for one row: `\\;` makes pgbench send both statements in one message.
PGBENCH = {
    "pgbench": {
        "GET": "SELECT date_of_birth FROM users WHERE username = '{}';\n",
        "PUT": "INSERT INTO users (username, date_of_birth) VALUES ('{}', '1990-05-17')"
        " ON CONFLICT (username) DO UPDATE SET date_of_birth = EXCLUDED.date_of_birth;\n",
    },
}
PGBENCH["pgbench-same"] = {
    "GET": "SET LOCAL statement_timeout = 1000 \\; SELECT username, date_of_birth FROM users"
    " WHERE username = ANY(ARRAY['{}']);\n",
    "PUT": "SET LOCAL statement_timeout = 1000 \\; INSERT INTO users (username, date_of_birth) SELECT username, date_of_birth"
    " FROM unnest(ARRAY['{}'], ARRAY['1990-05-17'::date]) AS batch (username, date_of_birth) ON CONFLICT (username)"
    " DO UPDATE SET date_of_birth = EXCLUDED.date_of_birth WHERE clock_timestamp() < to_timestamp(4102444800.5);\n",
}
PGBENCH_SCRIPTS = 100  # it takes 128


def say(text: str) -> None:
    print(text, flush=True)


# --- What is measured -------------------------------------------------------------------------------


@dataclass(eq=False)
class Contestant:
    """A service with two worker processes, as it is started; without a command it is pgbench."""

    name: str
    label: str
    command: str = ""
    settings: dict[str, str] = field(default_factory=dict)
    database: str = "million"
    port: int = 0
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    seconds_to_ready: float = 0.0

    def start(self) -> None:
        """Start the service and the reader of its log lines; wait until it greets."""
        self.port = self.port or next(ports)
        settings = {"PORT": str(self.port), "METRICS_PORT": str(self.port + 50), "PYTHONPATH": f"{ROOT}:{HERE}/peers"}
        environment = (
            os.environ | settings | {"THREADS": "8", "CONNECTIONS": "8"} | {"PGDATABASE": self.database} | self.settings
        )
        command = [str(BIN / word) if (BIN / word).exists() else word for word in self.command.split()]
        command = [word.replace("PORT", str(self.port)) for word in command]
        began = time.monotonic()
        service = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, start_new_session=True)
        # As a container's runtime does, something reads its lines from a pipe.
        reader = subprocess.Popen(["cat"], stdin=service.stdout, stdout=subprocess.DEVNULL)
        self.processes = [service, reader]
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/hello/Useraaaaaab", timeout=5).close()
                break
            except OSError:
                if service.poll() is not None or time.monotonic() - began > 20:
                    sys.exit(f"{self.name} did not start: {' '.join(command)}")
                time.sleep(0.005)
        self.seconds_to_ready = time.monotonic() - began

    def stop(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(12)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes = []

    def memory(self) -> float | None:
        """Return the proportional set size of all its processes in MB (Linux; None elsewhere)."""
        if not self.processes or not Path("/proc/self/smaps_rollup").exists():
            return None
        family, total = [self.processes[0].pid], 0
        for pid in family:
            for task in Path(f"/proc/{pid}/task").iterdir():
                family += map(int, (task / "children").read_text().split())
            total += int(re.search(r"^Pss: +(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)[1])
        return total * 1024 / 1e6


HELLO = "gunicorn hello:application"
GRANIAN = "granian --interface wsgi --host 127.0.0.1 --port PORT --workers 2 --no-ws --log-level warning"
UVICORN = "uvicorn --host 127.0.0.1 --port PORT --workers 2 --loop uvloop --http httptools --log-level warning"
GTHREAD = (
    "gunicorn -c python:plain --bind 127.0.0.1:PORT --workers 2 --worker-class gthread --threads 8"
    " --log-level warning --no-control-socket"
)
ONE_ROW = {"BATCH_SIZE": "1"}
CONTESTANTS = [
    Contestant("hello", "**hello, as it ships**", HELLO),
    Contestant("hello-1", "hello, `BATCH_SIZE=1`", HELLO, ONE_ROW),
    Contestant("hello-1x8", "hello, `BATCH_SIZE=1 DATABASE_CONNECTIONS=8`", HELLO, ONE_ROW | {"DATABASE_CONNECTIONS": "8"}),
    Contestant("granian", "hello's `application` under Granian", f"{GRANIAN} --blocking-threads 16 hello:application"),
    Contestant("fastapi", "FastAPI, asyncpg pool, uvicorn", f"{UVICORN} --no-access-log fastapi_peer:application"),
    Contestant("falcon", "Falcon, psycopg2 pool, gunicorn gthread", f"{GTHREAD} falcon_peer:application"),
    Contestant("flask-pool", "Flask, psycopg2 pool, gunicorn gthread", f"{GTHREAD} flask_peer:application", {"POOL": "1"}),
    Contestant("flask", "Flask, a connection a request, gunicorn gthread", f"{GTHREAD} flask_peer:application"),
    Contestant("constant", "limit: a constant under hello's gunicorn", "gunicorn constant:application", {"TELEMETRY": "off"}),
    Contestant("pgbench-same", "limit: pgbench, hello's message for one row"),
    Contestant("pgbench", "limit: pgbench, the bare statement"),
]  # fmt: skip
ports = iter(range(FIRST_PORT, FIRST_PORT + 50))


class Sample(NamedTuple):
    """What one slice of load saw: requests a second, latencies in ms."""

    rate: float
    median: float
    p99: float


def load(
    contestant: Contestant, method: str, seconds: int, clients: int = CLIENTS, users: int = USERS, pause: float = 0
) -> Sample:
    """Load a contestant for some seconds; exit where anything but a success came back."""
    if not contestant.command:
        return run_pgbench(contestant, method, seconds, clients, users)
    command = ["wrk", "-t1", f"-c{clients}", f"-d{seconds}s", "--timeout", "10s", "-s", HERE / "requests.lua"]
    command += [f"http://127.0.0.1:{contestant.port}", "--", method, str(users), str(pause), str(next(seeds))]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    requests, duration, median, p99, errors = map(int, re.search("^RESULT (.*)", report, re.MULTILINE)[1].split())
    if errors or not requests:
        sys.exit(f"{contestant.name}: not every {method} succeeded\n{report}")
    return Sample(requests / duration * 1e6, median / 1000, p99 / 1000)


def run_pgbench(contestant: Contestant, method: str, seconds: int, clients: int, users: int) -> Sample:
    """Run statements with one row as scripts of pgbench's, each of 100 random users written out."""
    dice = random.Random(next(seeds))
    with tempfile.TemporaryDirectory() as folder:
        scripts = [Path(folder) / f"{number}.sql" for number in range(PGBENCH_SCRIPTS)]
        for script in scripts:
            names = ["User" + f"{dice.randrange(users):07d}".translate(LETTERS) for _ in range(100)]
            script.write_text("".join(PGBENCH[contestant.name][method].format(name) for name in names))
        command = [embedded.binaries() / "pgbench", "-n", "-M", "simple", "-j1", f"-c{clients}", f"-T{seconds}"]
        command += [word for script in scripts for word in ("-f", script)]
        done = subprocess.run([*command, contestant.database], check=True, capture_output=True, text=True)
    rate = float(re.search(r"tps = ([\d.]+)", done.stdout)[1]) * 100
    return Sample(rate, clients / rate * 1000, float("nan"))


seeds = iter(range(time.time_ns() % 1_000_000, 1 << 60))

# --- Sections ---------------------------------------------------------------------------------------


def psql(statement: str, database: str = "postgres") -> str:
    command = [embedded.binaries() / "psql", "-qAtX", "-v", "ON_ERROR_STOP=1", "-d", database, "-c", statement]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def create(database: str, users: int) -> None:
    """Make a database with so many users, as new as after a night's vacuum."""
    began = time.monotonic()
    psql(f"CREATE DATABASE {database}")
    subprocess.run(
        [sys.executable, ROOT / "hello.py", "init-db"], check=True, env=os.environ | {"PGDATABASE": database}
    )
    psql(LOAD.format(users=users), database)
    psql("VACUUM ANALYZE users", database)
    psql("CHECKPOINT", database)
    say(f"loaded {users:,} users in {time.monotonic() - began:.1f} s")


def rounds_of(
    cases: dict[str, tuple[Contestant, str, dict[str, int]]], rounds: int, seconds: int
) -> dict[str, list[Sample]]:
    """Load each case once a round, each round beginning with another."""
    results: dict[str, list[Sample]] = {case: [] for case in cases}
    order = list(cases)
    for number in range(rounds):
        at = number * len(order) // rounds
        for case in order[at:] + order[:at]:
            contestant, method, options = cases[case]
            results[case].append(load(contestant, method, seconds, **options))
        say(
            f"  round {number + 1} of {rounds}: "
            + ", ".join(f"{case} {samples[-1].rate:,.0f}" for case, samples in results.items())
        )
    return results


@contextlib.contextmanager
def running(contestants: list[Contestant], seconds: int = 2) -> Iterator[None]:
    """Start and warm up contestants; stop them."""
    try:
        for contestant in contestants:
            if contestant.command:
                contestant.start()
        for contestant in contestants:
            for method in ("GET", "PUT"):
                load(contestant, method, seconds, users=10_000)
        yield
    finally:
        for contestant in contestants:
            contestant.stop()


def compare(contestants: list[Contestant], rounds: int, seconds: int) -> dict[str, dict[str, Any]]:
    """Return of each contestant GET and PUT (lists of samples) and its memory in MB after all that load."""
    say("compare: 32 clients")
    with running(contestants):
        cases = {f"{c.name} {m}": (c, m, {}) for m in METHODS for c in contestants}
        results = rounds_of(cases, rounds, seconds)
        return {
            c.name: {"label": c.label, "memory": c.memory()} | {m: results[f"{c.name} {m}"] for m in METHODS}
            for c in contestants
        }


def clients(rounds: int, seconds: int) -> dict[str, list[Sample]]:
    """Return the samples of "<clients> <GET or PUT>", of "1 GET unbatched" too, and of "1 readiness"."""
    say("clients: 1 to 1,000")
    batched, unbatched = hello("batched"), hello("unbatched", **ONE_ROW)
    with running([batched, unbatched]):
        cases = {f"{n} {m}": (batched, m, {"clients": n}) for n in CLIENT_COUNTS for m in METHODS}
        results = rounds_of(cases, max(2, rounds // 2), seconds)
        lone = {f"1 {m}": (batched, m, {"clients": 1}) for m in METHODS}
        lone |= {f"1 {m} unbatched": (unbatched, m, {"clients": 1}) for m in METHODS}
        return results | rounds_of(lone, rounds * 2, 1)


def workers(rounds: int, seconds: int) -> dict[str, list[Sample]]:
    """Return the samples of "<workers> <GET or PUT>"."""
    say("workers: 1, 2, 4")
    counts = {n: hello(f"{n} workers", WEB_CONCURRENCY=str(n)) for n in (1, 2, 4)}
    with running(list(counts.values())):
        cases = {f"{n} {m}": (c, m, {}) for n, c in counts.items() for m in METHODS}
        return rounds_of(cases, max(2, rounds // 2), seconds)


def paced(seconds: int, capacity: dict[str, float]) -> dict[str, list[Sample]]:
    """Return samples of each method at half of its capacity.

    wrk has no rate: each of 32 clients pauses after each answer, exponentially distributed, its mean found by trial.
    """
    say("latency: half of the capacity")
    service = hello("paced")
    results: dict[str, list[Sample]] = {}
    with running([service]):
        for method in METHODS:
            rate = capacity[method] / 2
            pause = CLIENTS / rate * 1000 - 2
            for _ in range(3):
                sample = load(service, method, 2, pause=max(pause, 0.5))
                pause += CLIENTS * 1000 * (1 / rate - 1 / sample.rate)
            results[method] = [load(service, method, seconds, pause=max(pause, 0.5)) for _ in range(3)]
    return results


def starts(times: int) -> list[float]:
    """Return the seconds from the start of gunicorn to the first greeting, several times."""
    seconds = []
    for _ in range(times):
        service = hello("start")
        try:
            service.start()
            seconds.append(service.seconds_to_ready)
        finally:
            service.stop()
    return seconds


def growth(rounds: int, seconds: int) -> tuple[dict[str, list[Sample]], dict[int, tuple[float, float]]]:
    """Return the samples of "<users> <GET or PUT>", and the bytes a row takes in table and index before the load."""
    say("growth: 10 thousand, one million and ten million users")
    bytes_a_row, services = {}, {}
    for users in (10_000, 1_000_000, 10_000_000):
        database = f"users_{users}"
        create(database, users)
        sizes = psql("SELECT pg_relation_size('users'), pg_relation_size('users_pkey')", database).split("|")
        bytes_a_row[users] = tuple(int(size) / users for size in sizes)
        services[users] = hello(database)
        services[users].database = database
    with running(list(services.values())):
        cases = {f"{n} {m}": (c, m, {"users": n}) for n, c in services.items() for m in METHODS}
        for contestant, method, options in cases.values():  # the pages that a restart's cold cache would lack
            load(contestant, method, 3, **options)
        return rounds_of(cases, rounds, seconds), bytes_a_row


def hello(name: str, **settings: str) -> Contestant:
    return Contestant(name, name, HELLO, settings)


# --- Report -----------------------------------------------------------------------------------------


def median(samples: list[Sample]) -> float:
    return statistics.median(sample.rate for sample in samples)


def spread(samples: list[Sample]) -> str:
    rates = [sample.rate for sample in samples]
    return f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"


def p99(samples: list[Sample]) -> float:
    return statistics.median(sample.p99 for sample in samples)


def described() -> str:
    """Say on what this ran."""
    model = ""
    with contextlib.suppress(OSError):
        model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1] + ", "
    packages = (
        "gunicorn",
        "gevent",
        "httptools",
        "psycopg2-binary",
        "flask",
        "falcon",
        "fastapi",
        "asyncpg",
        "uvicorn",
        "granian",
    )
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    settings = ", ".join(f"{name}={value}" for name, value in SETTINGS.items())
    return (
        f"{time.strftime('%Y-%m-%d')}, {model}{os.cpu_count()} cores shared by services, Postgres and wrk;"
        f" Python {platform.python_version()}, Postgres {psql('SHOW server_version')} ({settings},"
        f" fsync={psql('SHOW fsync')}, synchronous_commit={psql('SHOW synchronous_commit')}); {versions}."
    )


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    """Return the comparison as Markdown."""
    base = results.get("hello") or next(iter(results.values()))
    lines = ["| 32 clients | GET/s | hello is | p99, ms | PUT/s | hello is | p99, ms | memory |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, result in results.items():
        cells = [result["label"]]
        for method in METHODS:
            slow = f"{p99(result[method]):.0f}" if not name.startswith("pgbench") else ""
            cells += [spread(result[method]), f"{median(base[method]) / median(result[method]):.2f} ×", slow]
        cells.append(f"{result['memory']:.0f} MB" if result["memory"] else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def bars(found: dict[str, Any]) -> list[str]:
    """Return each bar, and whether it was met, as Markdown."""
    compared = found["compare"]

    def ratio(method: str, other: str) -> float:
        return median(compared["hello"][method]) / median(compared[other][method])

    lone = {m: median(found["clients"][f"1 {m}"]) / median(found["clients"][f"1 {m} unbatched"]) for m in METHODS}
    slow = {m: p99(found["latency"][m]) for m in METHODS}
    share = {m: median(found["latency"][m]) / median(compared["hello"][m]) for m in METHODS}
    ready, memory = statistics.median(found["starts"]), compared["hello"]["memory"] or 0
    rows = [
        ("GET at least 2 × FastAPI with asyncpg", f"{ratio('GET', 'fastapi'):.2f} ×", ratio("GET", "fastapi") >= 2),
        ("PUT at least 2 × FastAPI with asyncpg", f"{ratio('PUT', 'fastapi'):.2f} ×", ratio("PUT", "fastapi") >= 2),
        ("GET at least 20 × a connection a request", f"{ratio('GET', 'flask'):.1f} ×", ratio("GET", "flask") >= 20),
        ("GET at least 0.35 of pgbench (same message)", f"{ratio('GET', 'pgbench-same'):.2f}",
         ratio("GET", "pgbench-same") >= 0.35),
        *(
            (f"{m}: p99 at half of the capacity at most 10 ms", f"{slow[m]:.1f} ms at {share[m]:.0%}", slow[m] <= 10)
            for m in METHODS
        ),
        ("under 150 MB for master and two workers (PSS)", f"{memory:.0f} MB", 0 < memory < 150),
        ("ready within 1 s of start", f"{ready:.2f} s", ready <= 1),
        *((f"{m} of a lone client within 5 % of unbatched", f"{lone[m] - 1:+.1%}", lone[m] >= 0.95) for m in METHODS),
    ]  # fmt: skip
    lines = ["| bar | measured | |", "| --- | --- | --- |"]
    return lines + [f"| {bar} | {value} | {'met' if met else '**missed**'} |" for bar, value, met in rows]


def counts_table(results: dict[str, list[Sample]], what: str) -> list[str]:
    """Return throughput by a number of something as Markdown."""
    counts = sorted({int(case.split()[0]) for case in results})
    lines = [f"| {what} | GET/s | p99, ms | PUT/s | p99, ms |", "| --- | --- | --- | --- | --- |"]
    for count in counts:
        samples = [results[f"{count} {method}"] for method in METHODS]
        lines.append(f"| {count:,} | " + " | ".join(f"{spread(s)} | {p99(s):.0f}" for s in samples) + " |")
    return lines


def plot(found: dict[str, Any], path: Path) -> None:
    """Draw the comparison and the throughput by clients; in colours that show on white and on black."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    grey, colours = "#808890", {"GET": "#3b8eea", "PUT": "#e0823d"}
    pyplot.rcParams.update(
        {f"{name}color": grey for name in ("text.", "axes.label", "axes.edge", "xtick.", "ytick.")}
        | {"font.size": 10, "svg.hashsalt": "hello", "legend.frameon": False, "font.family": "sans-serif"}
    )
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5.5), width_ratios=(3, 2), layout="constrained")
    results = list(found["compare"].values())[::-1]
    for offset, method in ((0.2, "GET"), (-0.2, "PUT")):
        middle = [median(result[method]) for result in results]
        low = [m - min(s.rate for s in result[method]) for m, result in zip(middle, results, strict=True)]
        high = [max(s.rate for s in result[method]) - m for m, result in zip(middle, results, strict=True)]
        at = [position + offset for position in range(len(results))]
        left.barh(at, middle, 0.38, xerr=(low, high), color=colours[method], ecolor=grey, label=method)
        for y, value, up in zip(at, middle, high, strict=True):
            left.text(value + up, y, f" {value:,.0f}", va="center", fontsize=8)
    left.set_yticks(range(len(results)), [re.sub("[*`]", "", result["label"]) for result in results])
    left.set_title("requests/s, 32 clients: medians, smallest and largest")
    for method in METHODS:
        rates = [median(found["clients"][f"{count} {method}"]) for count in CLIENT_COUNTS]
        right.plot(CLIENT_COUNTS, rates, "o-", color=colours[method], label=method)
    right.set(
        xscale="log", ylim=(0, 1.1 * right.get_ylim()[1]), xlabel="clients", title="hello's requests/s by clients"
    )
    right.set_xticks(CLIENT_COUNTS, [f"{count:,}" for count in CLIENT_COUNTS])
    for axes in (left, right):
        axes.set_facecolor("none")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="lower right")
    figure.savefig(path, transparent=True, metadata={"Date": None})


# --- Command ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def postgres() -> Iterator[None]:
    """Run one Postgres on a disk (not in memory), and point libpq's environment at it."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="hello-bench-") as folder:
        Path(folder).chmod(0o755)  # Postgres does not run as root
        server = embedded.Postgres(Path(folder) / "data", **SETTINGS)
        try:
            server.start()
            os.environ.update(server.environment)
            yield
        finally:
            server.stop()


def full(rounds: int, seconds: int) -> dict[str, Any]:
    """Measure all but the growth; return what was found by section."""
    found: dict[str, Any] = {"starts": starts(5)}
    found["compare"] = compare(CONTESTANTS, rounds, seconds)
    found["clients"] = clients(rounds, 2)
    found["workers"] = workers(rounds, 2)
    found["latency"] = paced(4, {m: median(found["compare"]["hello"][m]) for m in METHODS})
    return found


def report(found: dict[str, Any], command: str) -> list[str]:
    return [
        f"`{command}`, {described()}",
        'Medians (smallest to largest) of interleaved rounds; "hello is": its median over this one\'s.',
        "",
        *table(found["compare"]),
        "",
        *bars(found),
        "",
        *counts_table({case: s for case, s in found["clients"].items() if "unbatched" not in case}, "clients"),
        "",
        *counts_table(found["workers"], "workers"),
    ]


def growth_report(results: dict[str, list[Sample]], bytes_a_row: dict[int, tuple[float, float]]) -> list[str]:
    lines = [f"`make bench-growth`, {described()}", "", *counts_table(results, "users"), ""]
    lines += ["| users | bytes a row in the table | in the index |", "| --- | --- | --- |"]
    lines += [f"| {users:,} | {row:.0f} | {index:.0f} |" for users, (row, index) in bytes_a_row.items()]
    for method in METHODS:
        rates = [median(results[f"{users} {method}"]) for users in bytes_a_row]
        change = min(rates) / max(rates) - 1
        verdict = "met" if change >= -0.15 else "**missed**"
        lines += ["", f"{method}, slowest size against fastest: {change:+.0%} (bar: within 15 %): {verdict}"]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench ARGS=...", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--only", help="compare only these, and write no files: " + ",".join(c.name for c in CONTESTANTS)
    )
    parser.add_argument("--growth", action="store_true", help="measure the growth with the number of users, only")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=int, default=3, help="of each slice of a round of the comparison")
    arguments = parser.parse_args()
    only = arguments.only.split(",") if arguments.only else []
    if unknown := set(only) - {c.name for c in CONTESTANTS}:
        parser.error(f"unknown: {', '.join(unknown)}")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, embedded.stop)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard) if hard != resource.RLIM_INFINITY else 4096, hard))
    began = time.monotonic()
    with postgres():
        if arguments.growth:
            lines, file = growth_report(*growth(arguments.rounds, arguments.seconds)), "growth.md"
        else:
            create("million", USERS)
            if only:
                chosen = [c for c in CONTESTANTS if c.name in only]
                lines, file = table(compare(chosen, arguments.rounds, arguments.seconds)), None
            else:
                found = full(arguments.rounds, arguments.seconds)
                lines, file = report(found, "make bench"), "results.md"
                plot(found, HERE / "results.svg")
    say("\n".join(["", *lines, "", f"took {time.monotonic() - began:.0f} s"]))
    if file:
        (HERE / file).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
