"""Draw dashboard.json's graphs from real data, for the README: `.venv/bench/bin/python monitoring/picture.py`.

It starts a Postgres, the service and a Prometheus of their own and sends requests for three minutes: a table is locked
in between, and a worker is killed. Needs prometheus on the PATH (Debian's package), and matplotlib beside what
`make test` needs. It is no Grafana: the queries are those of the dashboard, the colours and the layout are not.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tools import embedded_postgres as embedded

PORT, METRICS_PORT, PROMETHEUS_PORT = 18150, 18151, 18152
SECONDS, LOCK_AT, KILL_AT = 180, 70, 125
CLIENTS = 12  # each sends some 20 requests a second at most
LEFT_OUT = {"Requests in progress", "Requests a statement", "Pool: wait for a connection"}
UNITS = {"reqps": "requests/s", "percentunit": "%", "s": "ms", "ops": "/s"}
FACTORS = {"percentunit": 100, "s": 1000}


def send_requests(number: int, until: float) -> None:
    """Be a client: greetings, dates of birth, unknown users."""
    name = chr(ord("a") + number)
    while time.monotonic() < until:
        for method, path, content in (
            ("PUT", f"/hello/User{name}", b'{"dateOfBirth": "1990-05-17"}'),
            ("GET", f"/hello/User{name}", None),
            ("GET", f"/hello/User{name}", None),
            ("GET", f"/hello/Nobody{name}", None),
        ):
            request = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", content, method=method)
            with contextlib.suppress(OSError, urllib.error.URLError):
                urllib.request.urlopen(request, timeout=10).close()
            time.sleep(0.05)


def record(folder: Path) -> list[tuple[dict[str, Any], list[tuple[str, list[float], list[float]]]]]:
    """Let it all run; return each graph with its curves: their names, seconds and values."""
    settings = json.dumps(
        {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(ROOT / "monitoring/rules.yml")],
            "scrape_configs": [
                {"job_name": "hello", "static_configs": [{"targets": [f"127.0.0.1:{METRICS_PORT}"]}]},
            ],
        }
    )
    (folder / "prometheus.yml").write_text(settings)  # JSON is YAML
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb"]
    command += [f"--web.listen-address=127.0.0.1:{PROMETHEUS_PORT}", "--log.level=error"]
    environment = os.environ | {"PORT": str(PORT), "METRICS_PORT": str(METRICS_PORT)}
    subprocess.run([sys.executable, ROOT / "hello.py", "init-db"], check=True)
    gunicorn = [sys.executable, "-m", "gunicorn", "hello:application"]
    with (
        subprocess.Popen(gunicorn, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as service,
        subprocess.Popen(command) as prometheus,
    ):
        try:
            time.sleep(5)
            start, until = time.time(), time.monotonic() + SECONDS
            for number in range(CLIENTS):
                threading.Thread(target=send_requests, args=(number, until)).start()
            time.sleep(LOCK_AT)
            lock = "BEGIN; LOCK TABLE users; SELECT pg_sleep(12); COMMIT"
            subprocess.run([embedded.binaries() / "psql", "-qc", lock], check=True, stdout=subprocess.DEVNULL)
            time.sleep(start + KILL_AT - time.time())
            children = Path(f"/proc/{service.pid}/task/{service.pid}/children").read_text().split()
            os.kill(int(children[0]), signal.SIGKILL)
            time.sleep(start + SECONDS - time.time())
            panels = json.loads((ROOT / "monitoring/dashboard.json").read_text())["panels"]
            graphs = [panel for panel in panels if panel["type"] == "timeseries" and panel["title"] not in LEFT_OUT]
            return [(graph, curves(graph, start)) for graph in graphs]
        finally:
            service.terminate()
            prometheus.terminate()


def curves(graph: dict[str, Any], start: float) -> list[tuple[str, list[float], list[float]]]:
    """Ask Prometheus for what a graph of the dashboard shows."""
    found = []
    for target in graph["targets"]:
        expression = target["expr"].replace("$__rate_interval", "10s").replace("$instance", ".*")
        options = urllib.parse.urlencode({"query": expression, "start": start, "end": start + SECONDS, "step": 2})
        url = f"http://127.0.0.1:{PROMETHEUS_PORT}/api/v1/query_range?{options}"
        with urllib.request.urlopen(url, timeout=10) as response:
            for series in json.load(response)["data"]["result"]:
                labels = series["metric"]
                name = re.sub(r"{{(\w+)}}", lambda match, labels=labels: labels[match[1]], target["legendFormat"])
                seconds, values = zip(*[(at - start, float(value)) for at, value in series["values"]], strict=True)
                if any(value > 0 for value in values):
                    factor = FACTORS.get(graph["fieldConfig"]["defaults"].get("unit"), 1)
                    found.append((name, list(seconds), [value * factor for value in values]))
    return found


def draw(graphs: list[tuple[dict[str, Any], list[tuple[str, list[float], list[float]]]]]) -> None:
    """Draw the graphs, three in a row, on white so that it can be read on a dark page, too."""
    plt.rcParams.update({"font.size": 8, "svg.fonttype": "path", "svg.hashsalt": "hello", "axes.titlesize": 10})
    rows = -(-len(graphs) // 3)
    figure, axes = plt.subplots(rows, 3, figsize=(15, 3.4 * rows), layout="constrained")
    for (graph, found), axis in zip(graphs, axes.flat, strict=False):
        unit = UNITS.get(graph["fieldConfig"]["defaults"].get("unit"), "")
        axis.set_title(f"{graph['title']}{f' ({unit})' if unit else ''}", loc="left", fontweight="bold")
        for name, seconds, values in found:
            axis.plot(seconds, values, label=name, linewidth=1.4)
        axis.set_xlim(0, SECONDS)
        axis.set_ylim(0, 1.15 * max((max(values) for _, _, values in found), default=1))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.axvspan(LOCK_AT, LOCK_AT + 12, color="tab:red", alpha=0.08)
        axis.axvline(KILL_AT, color="tab:gray", linestyle=":", linewidth=1)
        if found:
            axis.legend(loc="best", frameon=True, framealpha=0.8, fontsize=7)
    for axis in axes.flat[len(graphs) :]:
        axis.remove()
    figure.supxlabel("seconds; red: the table is locked for 12 s; dotted: a worker is killed", fontsize=9)
    figure.savefig(ROOT / "monitoring/dashboard.svg", facecolor="white", metadata={"Date": None})


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # Postgres does not run as root
        server = embedded.Postgres(Path(folder) / "data")
        server.start()
        os.environ.update(server.environment)
        try:
            draw(record(Path(folder)))
        finally:
            server.stop()


if __name__ == "__main__":
    main()
