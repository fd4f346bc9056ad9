"""The service as `make run` starts it: gunicorn with this repository's configuration."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Self

import psutil

from tests.support.network import LOOPBACK, Connection, Response, ask, free_port
from tests.support.wait import wait_until

ROOT = Path(__file__).parents[2]
# A quarter of the defaults, in seconds.
SHORT_TIMEOUTS = {
    "QUEUE_TIMEOUT": "0.375",
    "CONNECT_TIMEOUT": "0.25",
    "STATEMENT_TIMEOUT": "0.25",
    "DATABASE_TIMEOUT": "0.75",
}
CONNECTIONS = 4  # to the database: 2 workers, a connection for GET and one for PUT in each


def body(born: str | date) -> bytes:
    """Return the document of a PUT."""
    return json.dumps({"dateOfBirth": str(born)}).encode()


class Service:
    """A gunicorn.

    Args:
        folder: where its log goes.
        environment: what reaches its database.
        prefix: a command that runs it in another way.
        arguments: of gunicorn.
        application: another one than hello's.
        settings: of hello and its server, such as `HEAD_TIMEOUT="1"`.
    """

    def __init__(
        self,
        folder: Path,
        environment: Mapping[str, str],
        *,
        prefix: Sequence[str] = (),
        arguments: Sequence[str] = (),
        application: str = "hello:application",
        **settings: str,
    ) -> None:
        self.command = [*prefix, str(Path(sys.executable).with_name("gunicorn")), *arguments, application]
        self.descriptors: Sequence[int] = ()  # of files that it inherits
        self.port = free_port()
        self.name = f"hello-{self.port}"  # of its connections in the database
        self.log = folder / f"{self.name}.log"
        own = {"PORT": str(self.port), "METRICS_PORT": "0", "PGAPPNAME": self.name}
        self.environment: dict[str, str] = {**os.environ, **environment, **own, **settings}

    def __enter__(self) -> Self:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, env=self.environment, stdout=log, stderr=log, pass_fds=self.descriptors
            )
        try:
            wait_until(self.is_up, 30)
        except BaseException:
            self.process.kill()
            print(self.log_text())
            raise
        return self

    def is_up(self) -> bool:
        """Return whether every worker runs and the service answers."""
        assert self.process.poll() is None, f"gunicorn ended with {self.process.returncode}"
        with contextlib.suppress(OSError):
            answers = self.ask("GET", "/livez").status == 200
            return answers and len(self.workers()) == int(self.environment.get("WEB_CONCURRENCY") or 2)
        return False

    def __exit__(self, *error: object) -> None:
        self.process.send_signal(signal.SIGQUIT)  # gunicorn's quick shutdown
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:  # what it writes to is full, and nobody reads it
            for pid in [*self.workers(), self.process.pid]:
                os.kill(pid, signal.SIGKILL)
            raise
        if error[0]:  # pytest shows it beside the failure
            print(f"--- the end of {self.log}\n{self.log_text()[-3000:]}")
        else:
            self.check_log()

    def check_log(self) -> None:
        """Fail where the log has a username or a date of birth of the tests."""
        found = re.findall(r"Quux\w*|[Ss]esame\w*|\b1\d{3}-\d\d-\d\d", self.log_text())
        assert not found, f"personal data in the log: {found[:5]}"

    def workers(self) -> list[int]:
        """Return the process ids of the workers."""
        return sorted(child.pid for child in psutil.Process(self.process.pid).children())

    def pss(self) -> float:
        """Return the memory of all processes in MB, what they share counted once (proportional set size)."""
        pages = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in [self.process.pid, *self.workers()]]
        return sum(int(page.split("Pss:")[1].split()[0]) for page in pages) / 1024

    def log_text(self) -> str:
        """Return what it has logged so far."""
        return self.log.read_text(errors="replace")

    def connect(self) -> Connection:
        """Return a connection that is kept alive."""
        return Connection(self.port)

    def open_socket(self) -> socket.socket:
        """Open a bare TCP connection."""
        return socket.create_connection((LOOPBACK, self.port), timeout=20)

    def ask(self, method: str, path: str, content: bytes | None = None, *headers: str) -> Response:
        """Ask on a connection of its own; a 503 must say when to ask again."""
        response = ask(self.port, method, path, content, *headers)
        if response.status == 503:
            assert response.headers["Retry-After"] == "1"
        return response

    def put(self, username: str, born: str | date = "1990-05-17") -> Response:
        """Save a date of birth."""
        return self.ask("PUT", f"/hello/{username}", body(born))
