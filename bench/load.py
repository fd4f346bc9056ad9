"""Load on a service (by wrk) or on Postgres (by pgbench), and what it measures."""

import itertools
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bench.database import LETTERS
from tools.embedded_postgres import binaries

METHODS = ("GET", "PUT")
CLIENTS = 32
SCRIPT = Path(__file__).with_name("requests.lua")
PGBENCH_SCRIPTS = 100  # pgbench takes at most 128
STATEMENTS_A_SCRIPT = 20

seeds = itertools.count(time.time_ns() % 1_000_000)


class Load(NamedTuple):
    """What CLIENTS clients send: a method, for some seconds, for random ones of so many users."""

    method: str
    seconds: int
    users: int


class Sample(NamedTuple):
    """What one load measured: successful requests a second, and the 99th percentile of the latencies in ms."""

    rate: float
    p99: float | None = None


class Samples(list[Sample]):
    """The samples of one contestant and method, one a round."""

    @property
    def rates(self) -> list[float]:
        """All rates, in the order of the rounds."""
        return [sample.rate for sample in self]

    @property
    def rate(self) -> float:
        """The median rate."""
        return statistics.median(self.rates)

    @property
    def p99(self) -> float | None:
        """The median 99th percentile in ms, None where it was not measured."""
        values = [sample.p99 for sample in self if sample.p99 is not None]
        return statistics.median(values) if values else None


def run_wrk(name: str, port: int, load: Load) -> Sample:
    """Load a service on a port; exit if any response was not a success."""
    command = ["wrk", "-t1", f"-c{CLIENTS}", f"-d{load.seconds}s", "--timeout", "10s", "-s", str(SCRIPT)]
    command += [f"http://127.0.0.1:{port}", "--", load.method, str(load.users), str(next(seeds))]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result = re.search(r"^RESULT (\d+) (\d+) (\d+) (\d+)$", output, re.MULTILINE)
    requests, duration, p99, errors = map(int, result.groups()) if result else (0, 1, 0, 1)
    if errors or not requests:
        sys.exit(f"{name}: not every {load.method} succeeded\n{output}")
    return Sample(requests / duration * 1e6, p99 / 1000)


def run_pgbench(database: str, statement: str, load: Load) -> Sample:
    """Run a statement for random users, which stand in the scripts, with the simple protocol as hello does."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(binaries() / "pgbench"), "-n", "-M", "simple", "-j1", f"-c{CLIENTS}", f"-T{load.seconds}"]
        for script in write_scripts(Path(folder), statement, load.users):
            command += ["-f", str(script)]
        output = subprocess.run([*command, database], check=True, capture_output=True, text=True).stdout
    found = re.search(r"tps = ([\d.]+)", output)
    if not found or not re.search("failed transactions: 0 ", output):
        sys.exit(f"pgbench: not every {load.method} succeeded\n{output}")
    return Sample(float(found[1]) * STATEMENTS_A_SCRIPT)


def write_scripts(folder: Path, statement: str, users: int) -> Iterator[Path]:
    """Write pgbench's scripts, and yield their paths."""
    dice = random.Random(next(seeds))
    for number in range(PGBENCH_SCRIPTS):
        names = ["User" + f"{dice.randrange(users):07d}".translate(LETTERS) for _ in range(STATEMENTS_A_SCRIPT)]
        script = folder / f"{number}.sql"
        script.write_text("".join(statement.format(name) for name in names))
        yield script
