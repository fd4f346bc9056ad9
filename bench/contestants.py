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
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.database import ROOT, USERS, database_name, hello_messages
from bench.load import METHODS, Load, Sample, run_pgbench, run_wrk

BIN = Path(sys.executable).parent
GO_PATH = Path("/usr/share/gocode")  # where Debian's golang-* packages are
START_SECONDS = 20
STOP_SECONDS = 12
WARM_UP_SECONDS = 2
USER_COUNTS = (10_000, USERS, 10_000_000)

ports = itertools.count(int(os.environ.get("PORT") or 18500))


class Contestant:
    """What is loaded. This base class needs no start and has no memory of its own.

    Args:
        name: for `--only` and for progress lines.
        label: for the report, in Markdown.
        users: how many its database has.
    """

    def __init__(self, name: str, label: str = "", users: int = USERS) -> None:
        self.name = name
        self.label = label
        self.users = users

    def start(self) -> None:
        """Start it, and return when it is ready."""

    def stop(self) -> None:
        """Stop it."""

    def memory(self) -> float | None:
        """Return the memory of all its processes in MB, None if it is not known."""
        return None

    def run(self, load: Load) -> Sample:
        """Load it, and return what was measured; exit if anything failed."""
        raise NotImplementedError


class Service(Contestant):
    """A service.

    Args:
        command: a program of the virtual environment and its arguments; PORT stands for the port.
        settings: environment variables.
        folder: where it runs, and where Python finds its modules.
    """

    def __init__(
        self,
        name: str,
        label: str,
        command: str,
        settings: dict[str, str] | None = None,
        users: int = USERS,
        folder: Path = ROOT,
    ) -> None:
        super().__init__(name, label, users)
        self.command = command
        self.settings = settings or {}
        self.folder = folder
        self.port = 0
        self.processes: list[subprocess.Popen[bytes]] = []

    def environment(self) -> dict[str, str]:
        """Return the variables of its environment."""
        own = {"PORT": str(self.port), "METRICS_PORT": str(self.port + 200), "PYTHONPATH": str(self.folder)}
        return os.environ | own | {"PGDATABASE": database_name(self.users)} | self.settings

    def start(self) -> None:
        """Start the service and a reader of its log lines; wait for the first 200."""
        self.port = next(ports)
        program, *arguments = self.command.replace("PORT", str(self.port)).split()
        service = subprocess.Popen(
            [BIN / program, *arguments],
            cwd=self.folder,
            env=self.environment(),
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        # Log lines go through a pipe to a reader, as with a container.
        reader = subprocess.Popen(["cat"], stdin=service.stdout, stdout=subprocess.DEVNULL)
        self.processes = [service, reader]
        self.wait_ready()

    def wait_ready(self) -> None:
        """Wait for a 200; exit if it takes too long or the service ended."""
        deadline = time.monotonic() + START_SECONDS
        while not self.is_ready():
            if self.processes[0].poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{self.name} did not start: {self.command}")
            time.sleep(0.02)

    def is_ready(self) -> bool:
        """Return whether a GET of the second user is answered with a success."""
        url = f"http://127.0.0.1:{self.port}/hello/Useraaaaaab"
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except OSError:
            return False
        return True

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
        if not Path("/proc/self/smaps_rollup").exists():
            return None
        maps = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in process_tree(self.processes[0].pid)]
        kilobytes = [int(size) for text in maps for size in re.findall(r"^Pss: +(\d+)", text, re.MULTILINE)]
        return sum(kilobytes) * 1024 / 1e6

    def run(self, load: Load) -> Sample:
        """Load it with wrk."""
        return run_wrk(self.name, self.port, load)


class Pgbench(Contestant):
    """pgbench with hello's messages for one row."""

    def run(self, load: Load) -> Sample:
        """Send hello's messages for the load's method."""
        return run_pgbench(database_name(self.users), hello_messages(load.method), load)


def process_tree(pid: int) -> list[int]:
    """Return a process and its descendants (Linux)."""
    family = [pid]
    for member in family:
        for task in Path(f"/proc/{member}/task").iterdir():
            family += map(int, (task / "children").read_text().split())
    return family


HELLO = "gunicorn hello:application"
OFF = {"TELEMETRY": "off"}
UVICORN = (
    "uvicorn --host 127.0.0.1 --port PORT --workers 2 --loop uvloop --http httptools"
    " --log-level warning --no-access-log bench.peers.fastapi_peer:application"
)
FLASK = (
    "gunicorn -c python:bench.peers.plain --bind 127.0.0.1:PORT --workers 2 --worker-class gthread --threads 8"
    " --log-level warning --no-control-socket bench.peers.flask_peer:application"
)
CONTESTANTS: list[Contestant] = [
    Service("hello", "**hello, as it ships**", HELLO),
    Service("hello-off", "hello, `TELEMETRY=off`", HELLO, OFF),
    Service("hello-1", "hello, `BATCH_SIZE=1`: a statement a request", HELLO, {"BATCH_SIZE": "1"}),
    Service("go", "Go, net/http, pgx pool", "go_peer", {"GOMAXPROCS": "2", "CONNECTIONS": "16"}),
    Service("fastapi", "FastAPI, asyncpg pool, uvicorn", UVICORN, {"CONNECTIONS": "8"}),
    Service("flask", "Flask, a connection a request, gunicorn", FLASK),
    Service("constant", "a constant under hello's server", "gunicorn bench.peers.constant:application", OFF),
    Pgbench("pgbench", "pgbench, hello's messages for one row"),
]


def growth_contestants() -> list[Contestant]:
    """Return hello and pgbench with fewer and with more users than the others."""
    contestants: list[Contestant] = []
    for users in USER_COUNTS:
        if users != USERS:
            contestants.append(Service(f"hello {users}", "", HELLO, users=users))
            contestants.append(Pgbench(f"pgbench {users}", "", users))
    return contestants


def hello_of(folder: Path) -> Service:
    """Return the hello of another checkout, started as its `make run` does."""
    command = "python -m server" if (folder / "server/__main__.py").exists() else HELLO
    return Service("hello-against", f"hello in `{folder}`", command, folder=folder.resolve())


def build_go_peer() -> str:
    """Build peers/go into the virtual environment; return what is missing or wrong, in one line."""
    if not shutil.which("go") or not (GO_PATH / "src/github.com/jackc/pgx").exists():
        return "it needs Go and pgx (Debian: apt-get install golang-go golang-github-jackc-pgx-v4-dev)."
    environment = os.environ | {"GO111MODULE": "off", "GOPATH": str(GO_PATH), "GOFLAGS": ""}
    command = ["go", "build", "-o", str(BIN / "go_peer"), "."]
    folder = ROOT / "bench/peers/go"
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return " ".join(done.stderr.split())


@contextlib.contextmanager
def running(contestants: Sequence[Contestant]) -> Iterator[None]:
    """Start contestants and warm them up; stop them."""
    with contextlib.ExitStack() as stack:
        for contestant in contestants:
            stack.callback(contestant.stop)
            contestant.start()
        for contestant in contestants:
            for method in METHODS:
                contestant.run(Load(method, WARM_UP_SECONDS, contestant.users))
        yield
