"""The reports of `make bench` and `make bench-growth`, in Markdown."""

import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.contestants import CONTESTANTS
from bench.database import SETTINGS, psql
from bench.load import CLIENTS, METHODS, Samples
from bench.measure import CLIENT_COUNTS, USER_COUNTS, WORKER_COUNTS, Case, Growth, Measurements, worker_case

PACKAGES = [
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
]
GROWTH_POINTS = 5
README_ROWS = {contestant.label for contestant in CONTESTANTS if contestant.name in {"hello", "go", "fastapi"}}
README_BLOCK = re.compile("(?<=<!-- speed -->\n).*(?=\n<!-- /speed -->)", re.DOTALL)


class Bar(NamedTuple):
    """A bound on a measured value, in the same unit."""

    text: str
    measured: float | None
    bound: float
    at_least: bool = True
    form: str = "{:.2f} ×"

    def row(self) -> str:
        """Return the bar as a row of a Markdown table."""
        if self.measured is None:
            return f"| {self.text} | | not measured |"
        met = self.measured >= self.bound if self.at_least else self.measured <= self.bound
        distance = self.form.format(abs(self.measured - self.bound))
        verdict = f"met, by {distance}" if met else f"**missed**, by {distance}"
        return f"| {self.text} | {self.form.format(self.measured)} | {verdict} |"


def report(measured: Measurements) -> list[str]:
    """Return the report of `make bench`."""
    most = max(CLIENT_COUNTS)
    clients = {f"{n:,}": [Case("hello", m, n) for m in METHODS] for n in CLIENT_COUNTS}
    clients[f"{most:,}, `--reuse-port`"] = [Case("hello-reuse-port", m, most) for m in METHODS]
    return [
        f"`make bench`, {machine()}",
        "Medians (smallest to largest) of interleaved rounds. \"hello is\" divides hello's median by the row's.",
        "",
        *comparison(measured),
        "",
        *bars(measured),
        "",
        *by_count("clients", clients, measured),
        "",
        *by_count("workers", {f"{n}": [Case(worker_case(n), m) for m in METHODS] for n in WORKER_COUNTS}, measured),
    ]


def machine() -> str:
    """Return the date, the machine and the versions."""
    model = ""
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        model = f"{found[1]}, " if found else ""
    versions = [f"{package} {importlib.metadata.version(package)}" for package in PACKAGES]
    if shutil.which("go"):
        output = subprocess.run(["go", "version"], capture_output=True, text=True, check=True).stdout
        versions.append(f"Go {output.split()[2].removeprefix('go')}")
    settings = [f"{name}={value}" for name, value in SETTINGS.items()]
    settings += [f"{name}={psql(f'SHOW {name}')}" for name in ("fsync", "synchronous_commit")]
    return (
        f"{time.strftime('%Y-%m-%d')}, {model}{os.cpu_count()} cores shared by services, Postgres and wrk;"
        f" Python {platform.python_version()}, Postgres {psql('SHOW server_version')} ({', '.join(settings)});"
        f" {', '.join(versions)}."
    )


def spread(samples: Samples) -> str:
    """Return median, smallest and largest rate."""
    return f"{samples.rate:,.0f} ({min(samples.rates):,.0f} to {max(samples.rates):,.0f})"


def number(value: float | None, form: str = "{:.1f}") -> str:
    """Return a formatted number, empty for None."""
    return "" if value is None else form.format(value)


def ratio(value: float | None, other: float | None) -> float | None:
    """Return the quotient of two values, None where one is missing."""
    return value / other if value and other else None


def table(head: str, rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a Markdown table; `head` has its columns separated by ` | `."""
    lines = [f"| {head} |", f"|{' --- |' * len(head.split(' | '))}"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def comparison(measured: Measurements) -> list[str]:
    """Return the table of all contestants with 32 clients."""
    base = measured.contestants[0].name
    rows = []
    for contestant in measured.contestants:
        cells = [contestant.label]
        for method in METHODS:
            samples = measured.results[Case(contestant.name, method)]
            factor = ratio(measured.rate(base, method), samples.rate)
            cells += [spread(samples), number(factor, "{:.2f} ×"), number(samples.p99)]
        rows.append([*cells, number(measured.memory[contestant.name], "{:.0f} MB")])
    first = "hello" if base == "hello" else base
    head = f"{CLIENTS} clients | GET/s | {first} is | p99, ms | PUT/s | {first} is | p99, ms | memory"
    return table(head, rows)


def readme_table(lines: Iterable[str]) -> str:
    """Return the README's table of rates and latencies, from the lines of the report of `make bench`."""
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    cells = [
        [row[0], *(re.sub(r" \(.*", "", row[column]) for column in (1, 3, 4, 6))]
        for row in rows
        if row[0] in README_ROWS
    ]
    return "\n".join(table(f"{CLIENTS} clients | GET/s | p99, ms | PUT/s | p99, ms", cells))


def bars(measured: Measurements) -> list[str]:
    """Return each bar, what was measured, and whether it is met."""

    def against(method: str, other: str) -> float | None:
        return ratio(measured.rate("hello", method), measured.rate(other, method))

    rows = [Bar(f"{m} at least 1 × Go", against(m, "go"), 1) for m in METHODS]
    rows += [
        Bar(f"{m}: p99 at most Go's", ratio(measured.p99("hello", m), measured.p99("go", m)), 1, False) for m in METHODS
    ]
    rows += [Bar(f"{m} at least 3 × FastAPI with asyncpg", against(m, "fastapi"), 3) for m in METHODS]
    rows += [Bar("GET at least 20 × a connection a request", against("GET", "flask"), 20)]
    rows += [
        Bar(f"{m} at least {bound} × pgbench with hello's message", against(m, "pgbench-same"), bound)
        for m, bound in (("GET", 0.5), ("PUT", 0.8))
    ]
    rows += [telemetry_bar(measured), *latency_bars(measured)]
    rows += [
        Bar("memory of master and two workers (PSS) at most 150 MB", measured.memory["hello"], 150, False, "{:.0f} MB"),
        Bar("first 200 at most 1 s after the start", measured.start_seconds, 1, False, "{:.2f} s"),
    ]
    return ["| bar | measured | |", "| --- | --- | --- |", *(bar.row() for bar in rows)]


def telemetry_bar(measured: Measurements) -> Bar:
    """Return the bar of what metrics and log lines cost."""
    share = ratio(measured.rate("hello", "GET"), measured.rate("hello-off", "GET"))
    price = None if share is None else 100 * (1 - share)
    return Bar("metrics and log lines cost at most 15 % of GET throughput", price, 15, False, "{:.1f} %")


def latency_bars(measured: Measurements) -> list[Bar]:
    """Return the bars at half of the capacity and of a lone client."""
    rows = []
    for method, samples in measured.paced.items():
        share = ratio(samples.rate, measured.rate("hello", method)) or 0
        text = f"{method}: p99 at {share:.0%} of the capacity at most 10 ms"
        rows.append(Bar(text, samples.p99, 10, False, "{:.1f} ms"))
    for method in METHODS:
        lone = ratio(measured.rate("hello", method, 1), measured.rate("hello-1", method, 1))
        rows.append(Bar(f"{method} of one client at least 0.95 × `BATCH_SIZE=1`", lone, 0.95))
    return rows


def by_count(what: str, cases: dict[str, list[Case]], measured: Measurements) -> list[str]:
    """Return throughput and latency by a number of something."""
    rows = []
    for count, (get, put) in cases.items():
        samples = [measured.results[case] for case in (get, put)]
        rows.append([count, *(cell for s in samples for cell in (spread(s), number(s.p99)))])
    return table(f"{what} | GET/s | p99, ms | PUT/s | p99, ms", rows)


def growth_report(growth: Growth) -> list[str]:
    """Return the report of `make bench-growth`."""
    return [
        f"`make bench-growth`, {machine()}",
        f"Medians (smallest to largest) of interleaved rounds with {CLIENTS} clients; pgbench sends hello's message.",
        "",
        *growth_table(growth),
        "",
        *table(
            "change, 10 thousand to 10 million users | hello | pgbench | hello's minus pgbench's",
            growth_changes(growth),
        ),
        "",
        *table(
            "users | bytes of a row in the table | in the index",
            [[f"{users:,}", f"{row:.0f}", f"{index:.0f}"] for users, (row, index) in growth.row_bytes.items()],
        ),
    ]


def growth_table(growth: Growth) -> list[str]:
    """Return the rates by number of users."""
    rows = []
    for users in USER_COUNTS:
        cases = [Case(name, method, users=users) for method in METHODS for name in ("hello", "pgbench-same")]
        rows.append([f"{users:,}", *(spread(growth.results[case]) for case in cases)])
    return table("users | hello GET/s | pgbench GET/s | hello PUT/s | pgbench PUT/s", rows)


def growth_changes(growth: Growth) -> list[list[str]]:
    """Return by method how much the rate changes, in percent, and whether hello's change is within the bar."""
    rows = []
    for method in METHODS:
        changes = []
        for name in ("hello", "pgbench-same"):
            few, many = (growth.results[Case(name, method, users=n)].rate for n in (USER_COUNTS[0], USER_COUNTS[-1]))
            changes.append(100 * (many / few - 1))
        points = changes[0] - changes[1]
        verdict = "met" if points >= -GROWTH_POINTS else "**missed**"
        difference = f"{points:+.1f} points (bar: at least -{GROWTH_POINTS}): {verdict}"
        rows.append([method, *(f"{change:+.1f} %" for change in changes), difference])
    return rows
