"""Serve hello with a Postgres of its own: `python -m tools.serve FOLDER COMMAND [ARGUMENT ...]`, as `make run` does.

With PGHOST, PGHOSTADDR or PGSERVICE set, no Postgres is started. The schema is applied, and the command is run until
SIGINT, SIGTERM or SIGHUP; then the command is stopped, then Postgres. FOLDER has the data and a lock.

Every process of a start keeps the lock until it ends, so the next start waits for all of them. If this process is
killed, the kernel stops the others.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from server import options, settings
from tools.embedded_postgres import Postgres, environment_without_libpq, stop_process

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# An address to listen on that stands for every address, and the one to connect to
REACHABLE = {"0.0.0.0": "127.0.0.1", "::": "::1"}
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


def leave_at_signals() -> None:
    """Raise KeyboardInterrupt at the first signal; one that is ignored, as nohup does with SIGHUP, stays ignored."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, leave)


def leave(number: int, frame: FrameType | None) -> None:
    ignore_signals()
    raise KeyboardInterrupt


def ignore_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def take_lock(folder: Path) -> int:
    """Return the lock of the folder as a file descriptor; wait until the processes of another start have ended."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"Waiting for another `make run` on {folder} to stop. To run both, give this one its own folder and")
        print("ports, as in `make run DATA=.postgres2 PORT=9000 METRICS_PORT=9001`.", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def stopped_with_this_process(stop_signal: str) -> tuple[str, ...]:
    """Return the command that runs another one, to which the kernel sends a signal when this process ends."""
    return ("setpriv", "--pdeathsig", stop_signal) if shutil.which("setpriv") else ()


@contextlib.contextmanager
def database(folder: Path, lock: int) -> Iterator[dict[str, str]]:
    """Run a Postgres unless the environment names one; give the environment that reaches it."""
    if any(os.environ.get(name) for name in ("PGHOST", "PGHOSTADDR", "PGSERVICE")):
        yield dict(os.environ)
        return
    if not (folder / "data").exists():
        print(f"Creating the database in {folder} ...", flush=True)
    server = Postgres(folder / "data")
    server.prefix = stopped_with_this_process("INT")
    server.inherited = (lock,)
    try:
        server.start()
        yield environment_without_libpq() | server.environment
    finally:
        ignore_signals()
        server.stop()


def serve(command: list[str], environment: dict[str, str], lock: int) -> int:
    """Run the service until it ends or a signal arrives; return its exit status."""
    # In a session of its own: Ctrl-C reaches this process only, which stops the others in order.
    service = subprocess.Popen(
        [*stopped_with_this_process("TERM"), *command], env=environment, pass_fds=[lock], start_new_session=True
    )
    try:
        if wait_until_serving(service):
            greet()
        return service.wait()
    finally:
        ignore_signals()
        stop_process(service, signal.SIGTERM, settings.GRACEFUL_TIMEOUT + 10)


def wait_until_serving(process: subprocess.Popen[bytes]) -> bool:
    """Wait until the service accepts connections; return False if it ends before that."""
    while process.poll() is None:
        try:
            socket.create_connection((REACHABLE.get(settings.HOST, settings.HOST), settings.PORT)).close()
        except OSError:
            time.sleep(0.02)
        else:
            return True
    return False


def url(host: str, port: int) -> str:
    """Return the URL of an address that the service listens on."""
    reachable = REACHABLE.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def greet() -> None:
    """Print how to use the service."""
    service, *metrics = [url(*address) for address in settings.addresses().values()]
    print(f"\nhello serves on {settings.HOST}:{settings.PORT}; Ctrl-C stops it. In another terminal:\n")
    print(f"""  curl -i -X PUT {service}/hello/Zoe -d '{{"dateOfBirth": "1990-05-17"}}'""")
    print(f"  curl {service}/hello/Zoe")
    for address in metrics:
        print(f"  curl {address}/metrics")
    print(flush=True)


def main(folder: Path, command: list[str]) -> int:
    """Start the database and the command, wait until the command ends, and return its exit status."""
    leave_at_signals()
    lock = take_lock(folder)
    options.check_addresses(settings.addresses().values())
    with database(folder, lock) as environment:
        limits = {"INIT_TIMEOUT": "5"} | environment
        init_db = [sys.executable, "hello.py", "init-db"]
        if subprocess.run(init_db, check=False, env=limits, start_new_session=True).returncode != 0:
            return 1
        return serve(command, environment, lock)


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1]).absolute(), sys.argv[2:]))
    except KeyboardInterrupt:
        pass
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        sys.exit(f'{error.filename} cannot be written: name another folder, as in `make run DATA="$HOME/data"`.')
