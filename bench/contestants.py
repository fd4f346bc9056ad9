"""The contestants: services with two worker processes or cores each, and pgbench."""

import contextlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bench.database import BARE_STATEMENTS, ROOT, hello_statements
from bench.load import METHODS, Load, Sample, run_pgbench, run_wrk

BIN = Path(sys.executable).parent
GO_PATH = Path("/usr/share/gocode")  # where Debian's golang-* packages are
START_SECONDS = 20
STOP_SECONDS = 12

ports = itertools.count(int(os.environ.get("PORT") or 18500))


class Contestant:
    """What is loaded. This base class needs no start and has no memory of its own.

    Args:
        name: for `--only` and for progress lines.
        label: for the report, in Markdown.
        database: the database it uses.
    """

    def __init__(self, name: str, label: str = "", database: str = "million") -> None:
        self.name, self.label, self.database = name, label or name, database

    def start(self) -> None:
        """Start it, and return when it is ready."""

    def stop(self) -> None:
        """Stop it."""

    def memory(self) -> float | None:
        """Return the proportional set size of all its processes in MB (Linux), else None."""
        return None

    def run(self, load: Load) -> Sample:
        """Load it, and return what was measured; exit if anything failed."""
        raise NotImplementedError


class Service(Contestant):
    """A service: a command, whose programs are those of the virtual environment, with settings in the environment.

    Args:
        folder: where it runs, and where Python finds its modules.
    """

    def __init__(
        self,
        name: str,
        label: str,
        command: str,
        settings: Mapping[str, str] | None = None,
        database: str = "million",
        folder: Path = ROOT,
    ) -> None:
        super().__init__(name, label, database)
        self.folder = folder
        self.command, self.settings = command, dict(settings or {})
        self.port = 0
        self.processes: list[subprocess.Popen[bytes]] = []
        self.seconds_to_ready = 0.0

    def start(self) -> None:
        """Start the service and a reader of its log lines; wait for the first 200."""
        self.port = next(ports)
        settings = {"PORT": str(self.port), "METRICS_PORT": str(self.port + 200), "PYTHONPATH": str(self.folder)}
        settings |= {"THREADS": "8", "CONNECTIONS": "8", "PGDATABASE": self.database} | self.settings
        words = [word.replace("PORT", str(self.port)) for word in self.command.split()]
        command = [str(BIN / words[0]), *words[1:]]
        began = time.monotonic()
        service = subprocess.Popen(
            command, cwd=self.folder, env=os.environ | settings, stdout=subprocess.PIPE, start_new_session=True
        )
        # Log lines go through a pipe to a reader, as with a container.
        reader = subprocess.Popen(["cat"], stdin=service.stdout, stdout=subprocess.DEVNULL)
        self.processes = [service, reader]
        self.wait_ready(began + START_SECONDS)
        self.seconds_to_ready = time.monotonic() - began

    def wait_ready(self, deadline: float) -> None:
        """Wait for a 200; exit at the deadline or when the service ended."""
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/hello/Useraaaaaab", timeout=5).close()
                return
            if self.processes[0].poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{self.name} did not start: {self.command}")
            time.sleep(0.005)

    def stop(self) -> None:
        """Stop the service, then its reader."""
        for process in self.processes:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes = []

    def memory(self) -> float | None:
        """Return the proportional set size of all its processes in MB (Linux), else None."""
        if not self.processes or not Path("/proc/self/smaps_rollup").exists():
            return None
        maps = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in process_tree(self.processes[0].pid)]
        sizes = [re.search(r"^Pss: +(\d+)", text, re.MULTILINE) for text in maps]
        return sum(int(size[1]) for size in sizes if size) * 1024 / 1e6

    def run(self, load: Load) -> Sample:
        """Load it with wrk."""
        return run_wrk(self.name, self.port, load)


class Pgbench(Contestant):
    """pgbench with one statement a request."""

    def __init__(self, name: str, label: str, database: str = "million", bare: bool = False) -> None:
        super().__init__(name, label, database)
        self.bare = bare
        self.statements: Mapping[str, str] = BARE_STATEMENTS

    def start(self) -> None:
        """Find out hello's statements."""
        if not self.bare:
            self.statements = hello_statements(self.database)

    def run(self, load: Load) -> Sample:
        """Run the statement of the load's method."""
        return run_pgbench(self.database, self.statements[load.method], load)


def process_tree(pid: int) -> list[int]:
    """Return a process and its descendants (Linux)."""
    family = [pid]
    for member in family:
        for task in Path(f"/proc/{member}/task").iterdir():
            family += map(int, (task / "children").read_text().split())
    return family


def hello_service(name: str = "hello", label: str = "", database: str = "million", **settings: str) -> Service:
    """Return hello as it ships, but for the given settings."""
    return Service(name, label, "gunicorn hello:application", settings, database)


GTHREAD = (
    "gunicorn -c python:bench.peers.plain --bind 127.0.0.1:PORT --workers 2 --worker-class gthread --threads 8"
    " --log-level warning --no-control-socket bench.peers."
)
GRANIAN = (
    "granian --interface wsgi --host 127.0.0.1 --port PORT --workers 2 --blocking-threads 16 --no-ws"
    " --log-level warning hello:application"
)
UVICORN = (
    "uvicorn --host 127.0.0.1 --port PORT --workers 2 --loop uvloop --http httptools"
    " --log-level warning --no-access-log bench.peers.fastapi_peer:application"
)
CONSTANT = "gunicorn bench.peers.constant:application"
CONTESTANTS: list[Contestant] = [
    hello_service("hello", "**hello, as it ships**"),
    hello_service("hello-off", "hello, `TELEMETRY=off`", TELEMETRY="off"),
    Service("hello-reuse-port", "hello, `gunicorn --reuse-port`", "gunicorn --reuse-port hello:application"),
    Service("go", "Go, net/http, pgx pool", "go_peer", {"GOMAXPROCS": "2", "CONNECTIONS": "16"}),
    Service("fastapi", "FastAPI, asyncpg pool, uvicorn", UVICORN),
    Service("granian", "hello's `application` under Granian", GRANIAN),
    Service("falcon", "Falcon, psycopg2 pool, gunicorn gthread", f"{GTHREAD}falcon_peer:application"),
    Service("flask-pool", "Flask, psycopg2 pool, gunicorn gthread", f"{GTHREAD}flask_peer:application", {"POOL": "1"}),
    Service("flask", "Flask, a connection a request, gunicorn gthread", f"{GTHREAD}flask_peer:application"),
    hello_service("hello-1", "hello, `BATCH_SIZE=1`", BATCH_SIZE="1"),
    hello_service("hello-1x8", "hello, `BATCH_SIZE=1`, 8 connections", BATCH_SIZE="1", DATABASE_CONNECTIONS="8"),
    Service("constant", "limit: a constant under hello's gunicorn", CONSTANT, {"TELEMETRY": "off"}),
    Pgbench("pgbench-same", "limit: pgbench, hello's message for one row"),
    Pgbench("pgbench", "limit: pgbench, the bare statement", bare=True),
]


def available(contestants: Sequence[Contestant]) -> list[Contestant]:
    """Return the contestants that can run here: all, or all but Go, with a line that says why."""
    problem = build_go_peer() if any(contestant.name == "go" for contestant in contestants) else ""
    if problem:
        print(f"The Go peer is left out: {problem}", flush=True)
    return [contestant for contestant in contestants if not (problem and contestant.name == "go")]


def build_go_peer() -> str:
    """Build peers/go into the virtual environment; return what is missing or wrong, in one line."""
    if not shutil.which("go") or not (GO_PATH / "src/github.com/jackc/pgx").exists():
        return "it needs Go and pgx (Debian: apt-get install golang-go golang-github-jackc-pgx-v4-dev)."
    environment = os.environ | {"GO111MODULE": "off", "GOPATH": str(GO_PATH), "GOFLAGS": ""}
    command = ["go", "build", "-o", str(BIN / "go_peer"), "."]
    done = subprocess.run(
        command, cwd=ROOT / "bench/peers/go", env=environment, capture_output=True, text=True, check=False
    )
    return " ".join(done.stderr.split())


@contextlib.contextmanager
def running(contestants: Sequence[Contestant], warm_up_seconds: int = 1) -> Iterator[None]:
    """Start contestants and warm them up; stop them."""
    with contextlib.ExitStack() as stack:
        for contestant in contestants:
            stack.callback(contestant.stop)
            contestant.start()
        for contestant in contestants:
            for method in METHODS:
                contestant.run(Load(method, warm_up_seconds, users=10_000))
        yield
