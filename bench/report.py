"""The report of `make bench`, in Markdown."""

import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.contestants import USER_COUNTS, Contestant
from bench.database import SETTINGS, USERS, psql
from bench.load import CLIENTS, METHODS, Samples

PACKAGES = ("gunicorn", "gevent", "httptools", "psycopg2-binary", "flask", "fastapi", "asyncpg", "uvicorn")
README_ROWS = ("hello", "go", "fastapi")
README_BLOCK = re.compile("(?<=<!-- speed -->\n).*(?=\n<!-- /speed -->)", re.DOTALL)


@dataclass
class Results:
    """What one run of the benchmark measured."""

    contestants: Sequence[Contestant]
    samples: Mapping[tuple[str, str], Samples]  # by name of the contestant and method
    memory: Mapping[str, float | None]  # of each contestant after all load, in MB

    @property
    def rounds(self) -> int:
        """The number of rounds."""
        return len(next(iter(self.samples.values())))


def table(head: str, rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a Markdown table; `head` has its columns separated by ` | `."""
    lines = [f"| {head} |", f"|{' --- |' * len(head.split(' | '))}"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def spread(samples: Samples) -> str:
    """Return median, smallest and largest rate."""
    return f"{samples.rate:,.0f} ({min(samples.rates):,.0f} to {max(samples.rates):,.0f})"


def number(value: float | None, form: str) -> str:
    """Return a formatted number, empty for None."""
    return "" if value is None else form.format(value)


def comparison(results: Results) -> list[str]:
    """Return the table of the contestants."""
    first = results.contestants[0]
    rows = []
    for contestant in results.contestants:
        cells = [contestant.label]
        for method in METHODS:
            samples = results.samples[contestant.name, method]
            factor = results.samples[first.name, method].rate / samples.rate
            cells += [spread(samples), f"{factor:.2f} ×", number(samples.p99, "{:.1f}")]
        rows.append([*cells, number(results.memory[contestant.name], "{:.0f} MB")])
    head = f"{CLIENTS} clients | GET/s | {first.name} is | p99, ms | PUT/s | {first.name} is | p99, ms | memory"
    return table(head, rows)


def growth(results: Results) -> list[str]:
    """Return the table of the rates by number of users."""
    rows = []
    for users in USER_COUNTS:
        suffix = "" if users == USERS else f" {users}"
        cells = [f"{users:,}"]
        for method in METHODS:
            cells.append(spread(results.samples[f"hello{suffix}", method]))
            cells.append(spread(results.samples[f"pgbench{suffix}", method]))
        rows.append(cells)
    return table("users | hello GET/s | pgbench GET/s | hello PUT/s | pgbench PUT/s", rows)


def report(results: Results) -> list[str]:
    """Return the report."""
    return [
        f"`make bench`, {time.strftime('%Y-%m-%d')}, {machine()}; {versions()}.",
        f"Medians (smallest to largest) of {results.rounds} interleaved rounds.",
        "",
        *comparison(results),
        "",
        *growth(results),
    ]


def machine() -> str:
    """Return the machine's processor, and who shares it."""
    model = ""
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        model = f"{found[1]}, " if found else ""
    return f"{model}{os.cpu_count()} cores shared by services, Postgres and wrk"


def versions() -> str:
    """Return the versions of what runs, and the settings of Postgres."""
    settings = [f"{name}={value}" for name, value in SETTINGS.items()]
    settings += [f"{name}={psql(f'SHOW {name}')}" for name in ("fsync", "synchronous_commit")]
    python = f"Python {platform.python_version()} ({Path(sys.executable).resolve()})"
    found = [python, f"Postgres {psql('SHOW server_version')} ({', '.join(settings)})"]
    found += [f"{package} {importlib.metadata.version(package)}" for package in PACKAGES]
    if shutil.which("go"):
        output = subprocess.run(["go", "version"], capture_output=True, text=True, check=True).stdout
        found.append(f"Go {output.split()[2].removeprefix('go')}")
    return ", ".join(found)


def readme_block(results: Results) -> str:
    """Return what the README says about the speed."""
    rows = []
    for contestant in results.contestants:
        if contestant.name not in README_ROWS:
            continue
        cells = [contestant.label]
        for method in METHODS:
            samples = results.samples[contestant.name, method]
            cells += [spread(samples), number(samples.p99, "{:.1f}")]
        rows.append(cells)
    get, put = (results.samples["hello-1", method].rate for method in METHODS)
    return "\n".join(
        [
            *table(f"{CLIENTS} clients | GET/s | p99, ms | PUT/s | p99, ms", rows),
            "",
            f"Measured on {machine()}.",
            f"Each rate is the median (smallest to largest) of {results.rounds} rounds.",
            "hello sends one statement for all requests that wait, the others one for each request.",
            f"Without sharing (`BATCH_SIZE=1`) hello has {get:,.0f} GET/s and {put:,.0f} PUT/s.",
        ]
    )
