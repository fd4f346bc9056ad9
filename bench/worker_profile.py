"""Show where a worker's time goes, by part of the code: `make bench-profile`.

py-spy samples the main thread of one of hello's two workers while wrk's clients GET, then PUT. A sample belongs to the
innermost function of ours on its stack, and to the section of its file if the file has sections (`# --- Name ---`).
Then the CPU time of a request is measured without py-spy, and its system calls with strace where that is installed.
Linux only.
"""

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from bench.contestants import BIN, Contestant, hello_service, process_tree, running
from bench.database import ROOT, create_database, postgres, psql
from bench.load import METHODS, Load
from bench.report import machine, number, table

USERS = 100_000
SECONDS = 6
SMALLEST_SHARE = 0.01
REST = "gevent's event loop, and the rest"
FRAME = re.compile(r"([^;\s]+) \(([^():]+):(\d+)\)")  # as in py-spy's raw format
OUTPUT = Path(__file__).with_name("profile.md")


@cache
def sections(file: str) -> list[tuple[int, str]]:
    """Return the first line and the name of each section of one of our files, none if the file is not ours."""
    path = ROOT / file
    if file.startswith(("/", ".")) or not path.exists():
        return []
    lines = enumerate(path.read_text().splitlines(), 1)
    found = [(line, heading[1]) for line, text in lines if (heading := re.match(r"# --- (.+?) -+$", text))]
    return [(1, ""), *found]


def part_of(stack: str) -> str:
    """Return the part of the code that a stack is in; the innermost frame is the last."""
    for function, file, line in reversed(FRAME.findall(stack)):
        if known := sections(file.removeprefix(f"{ROOT}/")):
            section = next(name for first, name in reversed(known) if first <= int(line))
            return f"`{file.removeprefix(f'{ROOT}/')}`: {section or f'`{function}`'}"
    return REST


def sample_stacks(service: Contestant, worker: int, method: str, path: Path) -> Counter[str]:
    """Return the number of py-spy's samples of each part while a service is loaded."""
    command = [str(BIN / "py-spy"), "record", "--rate", "400", "--duration", str(SECONDS - 2), "--format", "raw"]
    # Only the main thread: py-spy takes the sleep of the other one, which writes log lines, for work.
    command += ["--threads", "--output", str(path), "--pid", str(worker)]
    profiler = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    service.run(Load(method, SECONDS, users=USERS))
    profiler.wait()
    counts: Counter[str] = Counter()
    for line in path.read_text().splitlines():
        stack, count = line.rsplit(" ", 1)
        if stack.startswith(f"thread ({worker})"):
            counts[part_of(stack)] += int(count)
    return counts


def cpu_seconds(pids: Sequence[int], thread: str = "*") -> float:
    """Return the CPU time of processes, of all their threads or of the main ones (`{pid}`)."""
    tasks = [task for pid in pids for task in Path(f"/proc/{pid}/task").glob(thread.format(pid=pid))]
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def request_cost(service: Contestant, workers: Sequence[int], method: str) -> str:
    """Return throughput, and the CPU time of a request in the workers and in Postgres."""
    query = "SELECT pid FROM pg_stat_activity WHERE datname = 'million' AND application_name = 'hello'"
    backends = [int(pid) for pid in psql(query).split()]
    before = [cpu_seconds(workers), cpu_seconds(workers, "{pid}"), cpu_seconds(backends)]
    rate = service.run(Load(method, SECONDS, users=USERS)).rate
    after = [cpu_seconds(workers), cpu_seconds(workers, "{pid}"), cpu_seconds(backends)]
    worker, main, database = (1e6 * (b - a) / (rate * SECONDS) for a, b in zip(before, after, strict=True))
    return (
        f"{method}: {rate:,.0f}/s; CPU time of a request: {worker:.0f} µs in a worker, of which"
        f" {worker - main:.0f} µs in the thread that writes log lines, and {database:.0f} µs in Postgres"
    )


def system_calls(service: Contestant, worker: int, method: str, path: Path) -> str:
    """Return a worker's system calls for each `sendto` (a response or a statement), without the rare ones."""
    if not shutil.which("strace"):
        return "no strace is installed"
    command = ["timeout", "-s", "INT", str(SECONDS - 2), "strace", "-c", "-f", "-o", str(path), "-p", str(worker)]
    tracer = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    service.run(Load(method, SECONDS, users=USERS))
    tracer.wait()
    rows = re.findall(r"^ *[\d.]+ +[\d.]+ +\d+ +(\d+)(?: +\d+)? +(\w+)$", path.read_text(), re.MULTILINE)
    counts = {name: int(calls) for calls, name in rows if name != "total"}
    shares = {name: count / counts["sendto"] for name, count in counts.items()}
    return ", ".join(f"{share:.2f} `{name}`" for name, share in shares.items() if share > 0.02)


def parts_table(counts: dict[str, Counter[str]]) -> list[str]:
    """Return the share of each part; those below 1 % in one row."""
    shares = {m: {part: count / counts[m].total() for part, count in counts[m].items()} for m in METHODS}
    largest = {part: max(shares[m].get(part, 0) for m in METHODS) for m in METHODS for part in shares[m]}
    parts = sorted((part for part in largest if largest[part] >= SMALLEST_SHARE), key=lambda part: -largest[part])
    rows = [[part, *(number(100 * shares[m].get(part, 0), "{:.0f} %") for m in METHODS)] for part in parts]
    small = [sum(share for part, share in shares[m].items() if part not in parts) for m in METHODS]
    rows.append(["parts below 1 %", *(number(100 * share, "{:.0f} %") for share in small)])
    return table("part of a worker's time | GET | PUT", rows)


def profile(folder: Path) -> list[str]:
    """Return the report."""
    service = hello_service(WEB_CONCURRENCY="1")  # with two, all clients could be at the other worker
    counts, costs = {}, []
    with running([service]):
        workers = process_tree(service.processes[0].pid)[1:]
        for method in METHODS:
            counts[method] = sample_stacks(service, workers[0], method, folder / method)
            calls = system_calls(service, workers[0], method, folder / "strace")
            costs += ["", f"{request_cost(service, workers, method)}; system calls for each `sendto`: {calls}."]
    return [f"`make bench-profile`, {machine()}", "", *parts_table(counts), *costs]


def main() -> None:
    """Print the report and write it to profile.md."""
    with tempfile.TemporaryDirectory() as folder, postgres():
        create_database("million", USERS)
        lines = profile(Path(folder))
    print("\n".join(lines))
    OUTPUT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
