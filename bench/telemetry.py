"""Measure what metrics and log lines cost: GET throughput with and without them, in turns, in one run.

`.venv/bin/python bench/telemetry.py [ROUNDS [SECONDS]]` (default 6 rounds of 5 seconds) needs wrk on the PATH. Three
services run on one embedded Postgres: telemetry off, the metrics alone, and all of it, its lines going through a pipe
to a reader, as under Docker or Kubernetes. Each is loaded in turn by 32 connections that ask for 1,000 users.
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tools import embedded_postgres as embedded

CONNECTIONS = 32
USERS = 1000
FIRST_PORT = int(os.environ.get("PORT") or 18180)
KINDS = {
    "off": {"TELEMETRY": "off", "LOG_LEVEL": "warning"},
    "metrics": {"LOG_LEVEL": "warning"},
    "metrics and logs": {"LOG_LEVEL": "info"},
}
# A name is of letters only: "User" and the number in letters a to j.
REQUESTS = f"""
function request()
  local number = string.format("%03d", math.random(0, {USERS - 1}))
  return wrk.format("GET", "/hello/User" .. number:gsub("%d", function(d) return string.char(97 + d) end))
end
"""
USERNAME = "'User' || translate(to_char(number, 'FM000'), '0123456789', 'abcdefghij')"
SEED = f"INSERT INTO users SELECT {USERNAME}, '1990-05-17' FROM generate_series(0, {USERS - 1}) AS number"


def start(port: int, environment: dict[str, str]) -> tuple[subprocess.Popen[bytes], subprocess.Popen[bytes]]:
    """Start a service and the reader of its lines; wait until it is ready."""
    command = [sys.executable, "-m", "gunicorn", "hello:application"]
    settings = {"PORT": str(port), "METRICS_PORT": str(port + 10), "LOG_FORMAT": "json"} | environment
    service = subprocess.Popen(command, cwd=ROOT, env=os.environ | settings, stdout=subprocess.PIPE)
    reader = subprocess.Popen(["cat"], stdin=service.stdout, stdout=subprocess.DEVNULL)
    for _ in range(100):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5).close()
            break
        except OSError:
            time.sleep(0.1)
    else:
        sys.exit(f"Nothing serves on port {port}.")
    return service, reader


def cpu_seconds(service: subprocess.Popen[bytes]) -> float:
    """Return the CPU time that the workers of a service have used (Linux; 0 elsewhere)."""
    try:
        workers = Path(f"/proc/{service.pid}/task/{service.pid}/children").read_text().split()
        return sum(int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) for pid in workers) / 1e9
    except OSError:
        return 0.0


def throughput(port: int, seconds: int, script: str) -> float:
    """Return the GET a second that wrk saw; exit where one was not answered with 200."""
    command = ["wrk", f"-c{CONNECTIONS}", "-t1", f"-d{seconds}s", "-s", script, f"http://127.0.0.1:{port}"]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    if "Non-2xx" in report or "Socket errors" in report:
        sys.exit(report)
    return float(re.search(r"Requests/sec: +([0-9.]+)", report)[1])


def main(rounds: int = 6, seconds: int = 5) -> None:
    """Print a table of medians, and of the price as the median over the rounds."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # Postgres does not run as root
        server = embedded.Postgres(Path(folder) / "data")
        server.start()
        os.environ.update(server.environment)
        processes = []
        try:
            subprocess.run([sys.executable, ROOT / "hello.py", "init-db"], check=True)
            subprocess.run([embedded.binaries() / "psql", "-qc", SEED], check=True)
            script = Path(folder) / "requests.lua"
            script.write_text(REQUESTS)
            ports = dict(zip(KINDS, range(FIRST_PORT, FIRST_PORT + 3), strict=True))
            services = {}
            for kind, port in ports.items():
                services[kind], reader = start(port, KINDS[kind])
                processes += [services[kind], reader]
                throughput(port, 1, str(script))
            cpu: dict[str, list[float]] = {kind: [] for kind in KINDS}
            order = list(KINDS)
            results: dict[str, list[float]] = {kind: [] for kind in KINDS}
            for number in range(rounds):
                for kind in order[number % 3 :] + order[: number % 3]:
                    before = cpu_seconds(services[kind])
                    results[kind].append(throughput(ports[kind], seconds, str(script)))
                    cpu[kind].append((cpu_seconds(services[kind]) - before) / (results[kind][-1] * seconds) * 1e6)
            print(f"{'telemetry':18} {'GET/s':>7} {'price':>7} {'CPU':>9}   medians of {rounds} rounds of {seconds} s")
            for kind, values in results.items():
                prices = [1 - value / off for value, off in zip(values, results["off"], strict=True)]
                print(
                    f"{kind:18} {statistics.median(values):7,.0f} {statistics.median(prices):7.1%} {statistics.median(cpu[kind]):6.0f} µs"
                )
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait()
            server.stop()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
