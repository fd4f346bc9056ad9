"""Say where a worker's time goes, by part of the code: `make bench-profile`.

py-spy samples one of hello's two workers while wrk's 32 clients GET, then PUT, 100,000 users; what both workers and
Postgres use of the CPU for a request is measured meanwhile, and the system calls of a request where strace is there.
"""

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

from run import BIN, METHODS, Contestant, create, hello, load, postgres, running, say

USERS = 100_000
SECONDS = 6
# The first that a stack has a function of names its part; a function is as py-spy writes it, without its class.
PARTS = {
    "the statement: libpq and the wait for it": ["find (hello.py", "save (hello.py"],
    "the batcher: lock, event, handing over": ["__call__ (hello.py"],
    "the application without these: routing, checks, birthday, JSON": ["application (hello.py"],
    "telemetry: request id, counts, log line": ["__call__ (telemetry.py", "flush_now_and_then (telemetry.py"],
    "parsing: httptools and the environ": ["feed (worker.py"],
    "receiving, with the wait for a client": ["receive (worker.py"],
    "sending": ["send (worker.py"],
    "the response's head": ["respond (worker.py", "answer (worker.py"],
    "the event loop, and the rest": [""],
}


def part_of(stack: str) -> str:
    return next(part for part, functions in PARTS.items() if any(function in stack for function in functions))


def samples(pid: int, path: Path) -> "subprocess.Popen[bytes]":
    """Start py-spy on a worker; its samples are in the file when it ends."""
    command = [
        BIN / "py-spy",
        "record",
        "-r",
        "400",
        "-d",
        str(SECONDS - 2),
        "-f",
        "raw",
        "-o",
        path,
        "--pid",
        str(pid),
    ]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def cpu_seconds(pids: list[int]) -> float:
    """Return the CPU time of processes, threads included (Linux)."""
    tasks = [task for pid in pids for task in Path(f"/proc/{pid}/task").iterdir()]
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def backends() -> list[int]:
    """Return Postgres' processes that serve the one service there is."""
    found = subprocess.run(["pgrep", "-f", "postgres: postgres million "], capture_output=True, text=True, check=True)
    return list(map(int, found.stdout.split()))


def system_calls(pid: int, folder: Path, service: Contestant, method: str) -> str:
    """Return a worker's system calls for each `sendto` (an answer or a statement), but those that are rare."""
    path = folder / "strace"
    command = ["timeout", "-s", "INT", str(SECONDS - 2), "strace", "-c", "-f", "-o", path, "-p", str(pid)]
    tracer = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    load(service, method, SECONDS, users=USERS)
    tracer.wait()
    rows = re.findall(r"^ *[\d.]+ +[\d.]+ +\d+ +(\d+)(?: +\d+)? +(\w+)$", path.read_text(), re.MULTILINE)
    counts = {name: int(calls) for calls, name in rows}
    share = {name: count / counts["sendto"] for name, count in counts.items() if name != "total"}
    return ", ".join(f"{calls:.2f} `{name}`" for name, calls in share.items() if calls > 0.02)


def main() -> None:
    """Print a table of parts and their shares, and what a request costs."""
    with tempfile.TemporaryDirectory() as folder, postgres():
        create("million", USERS)
        service = hello("hello")
        shares, costs = {}, []
        with running([service]):
            workers = children(service.processes[0].pid)
            for method in METHODS:
                raw = Path(folder) / method
                process = samples(workers[0], raw)
                load(service, method, SECONDS, users=USERS)
                process.wait()
                stacks = [re.sub(r"\w+\.(?=\w+ \()", "", line).rsplit(" ", 1) for line in raw.read_text().splitlines()]
                counts: Counter[str] = Counter()
                for stack, count in stacks:
                    counts[part_of(stack)] += int(count)
                shares[method] = {part: counts[part] / counts.total() for part in PARTS}
                before = cpu_seconds(workers), cpu_seconds(backends())
                rate = load(service, method, SECONDS, users=USERS).rate
                spent = cpu_seconds(workers) - before[0], cpu_seconds(backends()) - before[1]
                worker, database = (seconds / (rate * SECONDS) * 1e6 for seconds in spent)
                costs.append(
                    f"{method}: {rate:,.0f}/s; CPU for each: {worker:.0f} µs of a worker, {database:.0f} µs of Postgres"
                )
                if shutil.which("strace"):
                    costs[-1] += (
                        f"; system calls for each `sendto`: {system_calls(workers[0], Path(folder), service, method)}"
                    )
    say("\n| part of a worker's time | GET | PUT |\n| --- | --- | --- |")
    for part in PARTS:
        say(f"| {part} | {shares['GET'][part]:.0%} | {shares['PUT'][part]:.0%} |")
    say("\n" + "\n\n".join(costs))


if __name__ == "__main__":
    main()
