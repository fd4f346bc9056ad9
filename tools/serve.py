"""Serve hello with a Postgres of its own: `python -m tools.serve FOLDER COMMAND [ARGUMENT ...]`, as `make run` does.

With PGHOST, PGHOSTADDR or PGSERVICE set, no Postgres is started. The schema is applied, and the command is run until
SIGINT, SIGTERM or SIGHUP; then the command is stopped, then Postgres. FOLDER has the data, and a list of what runs.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from server import settings
from tools.embedded_postgres import Postgres
from tools.environment import one_line_if_not_writable
from tools.processes import Processes

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def stop(number: int, frame: FrameType | None) -> None:
    """Leave `main` at the first signal; ignore the others."""
    ignore_signals()
    raise KeyboardInterrupt


def ignore_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def check_ports() -> None:
    """Exit with one line if the service cannot listen on a port."""
    for name, (host, port) in settings.addresses().items():
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
            except OSError as error:
                reason = os.strerror(error.errno or 0)
                sys.exit(f"Port {port} cannot be used ({reason}): choose another, as in `make run {name}=9000`.")


def start_postgres(folder: Path, processes: Processes) -> dict[str, str]:
    """Start a Postgres unless the environment names one; return the environment that reaches it."""
    if any(os.environ.get(name) for name in ("PGHOST", "PGHOSTADDR", "PGSERVICE")):
        return dict(os.environ)
    if not (folder / "data").exists():
        print(f"Creating the database in {folder} ...", flush=True)
    server = Postgres(folder / "data")
    server.sockets = processes.temporary_folder()
    server.popen = lambda command, **options: processes.start(command, signal.SIGINT, **options)
    try:
        server.start()
    except SystemExit as error:
        sys.exit(
            f"{error}\nIf you do not need its data: `make clean WITH_DATA=yes` removes it, `make run` creates it again."
        )
    return os.environ | server.environment


def wait_until_serving(process: subprocess.Popen[bytes]) -> bool:
    """Wait until the service accepts connections; return False if it ends before that."""
    while process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection((reachable_host(), settings.PORT)):
            return True
        time.sleep(0.02)
    return False


def reachable_host() -> str:
    """Return HOST, or the loopback address where it stands for every address."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.HOST, settings.HOST)


def greet() -> None:
    """Print how to use the service."""
    host = reachable_host()
    url = f"http://{f'[{host}]' if ':' in host else host}:{settings.PORT}/hello/Zoe"
    print(f"\nhello serves on {settings.HOST}:{settings.PORT}; Ctrl-C stops it. In another terminal:\n")
    print(f"""  curl -i -X PUT {url} -d '{{"dateOfBirth": "1990-05-17"}}'\n  curl {url}\n""", flush=True)


def main(folder: Path, command: list[str]) -> int:
    """Start the database and the command, wait until the command ends, and return its exit status."""
    for number in SIGNALS:
        signal.signal(number, stop)
    processes = Processes(folder / "lock", stop_seconds=settings.GRACEFUL_TIMEOUT + 10)
    try:
        check_ports()
        environment = start_postgres(folder, processes)
        init_db = [sys.executable, "hello.py", "init-db"]
        limits = {"INIT_TIMEOUT": "5"} | environment
        # Sessions of their own: Ctrl-C reaches this process only, which stops them in order.
        if subprocess.run(init_db, check=False, env=limits, start_new_session=True).returncode != 0:
            return 1
        service = processes.start([*command], signal.SIGTERM, env=environment, start_new_session=True)
        if wait_until_serving(service):
            greet()
        return service.wait()
    finally:
        ignore_signals()
        processes.stop()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt), one_line_if_not_writable():
        sys.exit(main(Path(sys.argv[1]).absolute(), sys.argv[2:]))
