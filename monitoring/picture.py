"""Draw the graphs of dashboard.json from real data: `.venv/bench/bin/python -m monitoring.picture`.

Starts a Postgres, the service and a Prometheus, and sends requests for two minutes; meanwhile it locks the table and
kills a worker. The queries are those of the dashboard; colours and layout are not Grafana's.
Needs prometheus on the PATH (a package of Debian).
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt

from tests.support.network import free_port
from tools.embedded_postgres import Postgres, binaries

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "monitoring/dashboard.png"
SECONDS, LOCK_AT, LOCK_SECONDS, KILL_AT = 120, 40, 12, 85
CLIENTS = 12  # each sends at most 20 requests a second
LEFT_OUT = {"Requests in progress", "Requests a statement", "Pool: wait for a connection", "Log lines dropped"}
UNITS = {"reqps": "requests/s", "percentunit": "%", "s": "ms", "ops": "/s"}
FACTORS = {"percentunit": 100, "s": 1000}


class Curve(NamedTuple):
    """A line of a graph: its name, and its values at some seconds."""

    name: str
    seconds: list[float]
    values: list[float]


def send_requests(port: int, number: int, until: float) -> None:
    """Send greetings, dates of birth and requests for unknown users."""
    name = chr(ord("a") + number)
    while time.monotonic() < until:
        for method, path, content in (
            ("PUT", f"/hello/User{name}", b'{"dateOfBirth": "1990-05-17"}'),
            ("GET", f"/hello/User{name}", None),
            ("GET", f"/hello/User{name}", None),
            ("GET", f"/hello/Nobody{name}", None),
        ):
            request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", content, method=method)
            with contextlib.suppress(OSError):
                urllib.request.urlopen(request, timeout=10).close()
            time.sleep(0.05)


def prometheus_command(folder: Path, port: int, metrics_port: int) -> list[str]:
    """Return the command of a Prometheus that scrapes the service each second."""
    settings = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(ROOT / "monitoring/rules.yml")],
        "scrape_configs": [
            {"job_name": "hello", "static_configs": [{"targets": [f"127.0.0.1:{metrics_port}"]}]},
        ],
    }
    (folder / "prometheus.yml").write_text(json.dumps(settings))  # JSON is YAML
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb"]
    return [*command, f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"]


def record(folder: Path) -> list[tuple[dict[str, Any], list[Curve]]]:
    """Let it all run; return each graph with its curves."""
    port, metrics_port, prometheus_port = free_port(), free_port(), free_port()
    environment = os.environ | {"PORT": str(port), "METRICS_PORT": str(metrics_port)}
    subprocess.run([sys.executable, ROOT / "hello.py", "init-db"], check=True)
    gunicorn = [sys.executable, "-m", "gunicorn", "hello:application"]
    with (
        subprocess.Popen(gunicorn, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as service,
        subprocess.Popen(prometheus_command(folder, prometheus_port, metrics_port)) as prometheus,
    ):
        try:
            time.sleep(5)
            start, until = time.time(), time.monotonic() + SECONDS
            for number in range(CLIENTS):
                threading.Thread(target=send_requests, args=(port, number, until)).start()
            time.sleep(LOCK_AT)
            lock = f"BEGIN; LOCK TABLE users; SELECT pg_sleep({LOCK_SECONDS}); COMMIT"
            subprocess.run([binaries() / "psql", "-qc", lock], check=True, stdout=subprocess.DEVNULL)
            time.sleep(start + KILL_AT - time.time())
            children = Path(f"/proc/{service.pid}/task/{service.pid}/children").read_text().split()
            os.kill(int(children[0]), signal.SIGKILL)
            time.sleep(start + SECONDS - time.time())
            panels = json.loads((ROOT / "monitoring/dashboard.json").read_text())["panels"]
            graphs = [panel for panel in panels if panel["type"] == "timeseries" and panel["title"] not in LEFT_OUT]
            return [(graph, curves(graph, prometheus_port, start)) for graph in graphs]
        finally:
            service.terminate()
            prometheus.terminate()


def curves(graph: dict[str, Any], port: int, start: float) -> list[Curve]:
    """Ask Prometheus for what a graph of the dashboard shows."""
    found = []
    factor = FACTORS.get(graph["fieldConfig"]["defaults"].get("unit"), 1)
    for target in graph["targets"]:
        expression = target["expr"].replace("$__rate_interval", "10s").replace("$instance", ".*")
        options = urllib.parse.urlencode({"query": expression, "start": start, "end": start + SECONDS, "step": 2})
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/query_range?{options}", timeout=10) as response:
            series = json.load(response)["data"]["result"]
        for one in series:
            name = target["legendFormat"]
            for label, text in (one["metric"] | {"instance": "api:8081"}).items():
                name = name.replace(f"{{{{{label}}}}}", text)
            seconds, values = zip(*[(at - start, float(value) * factor) for at, value in one["values"]], strict=True)
            if any(value > 0 for value in values):
                found.append(Curve(name, list(seconds), list(values)))
    return found


def draw_graph(axis: Any, graph: dict[str, Any], found: list[Curve]) -> None:
    """Draw a graph; the first curve is the widest, so that each shows where several are the same."""
    unit = UNITS.get(graph["fieldConfig"]["defaults"].get("unit"), "")
    axis.set_title(f"{graph['title']}{f' ({unit})' if unit else ''}", loc="left", fontweight="bold")
    for index, curve in enumerate(found):
        width = 1.2 + 1.1 * (len(found) - 1 - index)
        axis.plot(curve.seconds, curve.values, label=curve.name, linewidth=width, solid_capstyle="butt")
    axis.set_xlim(0, SECONDS)
    axis.set_ylim(0, 1.15 * max((max(curve.values) for curve in found), default=1))
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.axvspan(LOCK_AT, LOCK_AT + LOCK_SECONDS, color="tab:red", alpha=0.08)
    axis.axvline(KILL_AT, color="tab:gray", linestyle=":", linewidth=1)
    if found:  # below the graph, where it hides nothing
        axis.legend(
            loc="upper left",
            bbox_to_anchor=(0, -0.1),
            ncols=2,
            frameon=False,
            fontsize=6.5,
            columnspacing=1,
            handlelength=1.6,
        )


def draw(graphs: list[tuple[dict[str, Any], list[Curve]]]) -> None:
    """Draw the graphs, three in a row, on white."""
    plt.rcParams.update({"font.size": 8, "axes.titlesize": 10})
    rows = -(-len(graphs) // 3)
    figure, axes = plt.subplots(rows, 3, figsize=(12, 3.4 * rows), layout="constrained")
    for (graph, found), axis in zip(graphs, axes.flat, strict=False):
        draw_graph(axis, graph, found)
    for axis in axes.flat[len(graphs) :]:
        axis.remove()
    marks = f"red: the table is locked for {LOCK_SECONDS} s; dotted: a worker is killed"
    figure.supxlabel(f"seconds; {marks}", fontsize=9)
    figure.savefig(PICTURE, dpi=110, facecolor="white", metadata={"Software": None})


def main() -> None:
    """Record and draw."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # Postgres does not run as root
        server = Postgres(Path(folder) / "data")
        server.start()
        os.environ.update(server.environment)
        try:
            draw(record(Path(folder)))
        finally:
            server.stop()


if __name__ == "__main__":
    main()
