"""A real Postgres that tests may lock, stop and kill."""

import atexit
import contextlib
import functools
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import psycopg2

from tests.support.wait import wait_until
from tools.embedded_postgres import Postgres

ROOT = Path(__file__).parents[2]
PASSWORD = "Sesame-password"  # of the service's role
RIGHTS = ("SELECT", "INSERT", "UPDATE")  # of the service on its table; docs/security.md has them too
COUNT_CONNECTIONS = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s"


def temporary_folder() -> Path:
    """Make a folder for a server's data; pytest would keep its own for three runs, and each server has 40 MB."""
    return Path(tempfile.mkdtemp(prefix="hello-test-"))


@functools.cache
def template() -> Path:
    """Return a data folder as initdb makes it; each server of this process starts from a copy."""
    folder = temporary_folder()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    Postgres(folder / "data").create()
    return folder / "data"


class Database(Postgres):
    """A Postgres of the tests' own; the service connects as a role with few rights.

    Args:
        folder: where its data is; by default a temporary folder, which `stop` removes.
        settings: of postgresql.conf, such as `max_connections="20"`.
    """

    def __init__(self, folder: Path | None = None, **settings: str) -> None:
        self.temporary: Path | None = None
        if folder is None:
            self.temporary = temporary_folder()
            folder = self.temporary / "data"
        # In its folder, and not in /dev/shm, where a server that was killed leaves them; fsync matters to a power cut
        super().__init__(folder, **{"dynamic_shared_memory_type": "mmap", "fsync": "off"} | settings)

    def stop(self) -> None:
        """Stop the server and remove its socket and its temporary folder."""
        super().stop()
        if self.temporary:
            shutil.rmtree(self.temporary, ignore_errors=True)

    def start(self) -> None:
        """Start the server, the first time on a copy of the template, and wait until it accepts connections."""
        if not self.folder.exists():
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(["cp", "-Rp", template(), self.folder], check=True)
        super().start()

    @property
    def sockets_folder(self) -> str:
        return self.environment["PGHOST"]

    @property
    def port(self) -> int:
        return int(self.environment["PGPORT"])

    @property
    def service_environment(self) -> dict[str, str]:
        """The libpq settings of the service."""
        return self.environment | {"PGUSER": "hello", "PGPASSWORD": PASSWORD}

    def hosts(self, *where: tuple[str, int | str]) -> dict[str, str]:
        """Return the libpq settings of the service with other hosts and ports, tried in this order."""
        names, ports = zip(*where, strict=True)
        return self.service_environment | {"PGHOST": ",".join(names), "PGPORT": ",".join(map(str, ports))}

    def apply_schema(self) -> None:
        """Create the table, as its owner."""
        self.query((ROOT / "schema.sql").read_text())

    def prepare(self) -> None:
        """Create the table and the role of the service."""
        self.apply_schema()
        self.query(f"CREATE ROLE hello LOGIN; GRANT {', '.join(RIGHTS)} ON users TO hello")

    def connect(self, user: str = "postgres", database: str = "postgres") -> Any:
        """Open a connection of the test's own, in autocommit mode."""
        connection = psycopg2.connect(
            host=self.sockets_folder, port=self.port, user=user, dbname=database, application_name="test"
        )
        connection.autocommit = True
        return connection

    def query(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        """Run a statement on a connection of its own; return its rows."""
        with contextlib.closing(self.connect()) as connection, connection.cursor() as cursor:
            cursor.execute(statement, values or None)
            return cursor.fetchall() if cursor.description else []

    def rows(self) -> dict[str, date]:
        """Return the date of birth of each user."""
        return dict(self.query("SELECT username, date_of_birth FROM users"))

    def connections(self, name: str) -> int:
        """Count the connections with an application name."""
        return int(self.query(COUNT_CONNECTIONS, name)[0][0])

    @contextlib.contextmanager
    def connection_counts(self, name: str) -> Iterator[list[int]]:
        """Count the connections with an application name again and again; the list holds every count."""
        counts: list[int] = []
        done = threading.Event()

        def count() -> None:
            """Count on one connection until it is lost, and then on the next: each is a process."""
            while not done.wait(0.02):
                with contextlib.suppress(psycopg2.Error), contextlib.closing(self.connect()) as connection:
                    cursor = connection.cursor()
                    while not done.wait(0.02):
                        cursor.execute(COUNT_CONNECTIONS, [name])
                        counts.append(cursor.fetchone()[0])

        thread = threading.Thread(target=count)
        thread.start()
        try:
            yield counts
        finally:
            done.set()
            thread.join()

    @contextlib.contextmanager
    def set(self, **settings: str) -> Iterator[None]:
        """Change settings of the running server for a while; new sessions have them at once."""

        def reload() -> None:
            loaded = self.query("SELECT pg_conf_load_time()")
            self.query("SELECT pg_reload_conf()")
            wait_until(lambda: self.query("SELECT pg_conf_load_time()") != loaded)

        for name, value in settings.items():
            self.query(f"ALTER SYSTEM SET {name} = '{value}'")
        reload()
        try:
            yield
        finally:
            for name in settings:
                self.query(f"ALTER SYSTEM RESET {name}")
            reload()

    @contextlib.contextmanager
    def locked(self, statement: str) -> Iterator[None]:
        """Hold a lock in a transaction of its own."""
        with contextlib.closing(self.connect()) as connection, connection.cursor() as cursor:
            cursor.execute("BEGIN; " + statement)
            yield

    def wait_for_lock_wait(self, count: int = 1) -> None:
        """Wait until so many sessions wait for a lock."""
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        wait_until(lambda: self.query(waiting)[0][0] >= count)

    def disconnect_service(self) -> None:
        """End every connection of the service's role."""
        self.query("SELECT pg_terminate_backend(pid, 1000) FROM pg_stat_activity WHERE usename = 'hello'")

    def processes(self) -> list[psutil.Process]:
        """Return the server's processes, the postmaster first."""
        postmaster = psutil.Process(int((self.folder / "postmaster.pid").read_text().split()[0]))
        return [postmaster, *postmaster.children(recursive=True)]

    def kill(self) -> None:
        """Send SIGKILL to every process of the server at once."""
        processes = self.processes()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, 10)

    def restart(self) -> None:
        """Stop the server, which ends its connections, and start it again."""
        processes = self.processes()
        self.call("pg_ctl", "-D", self.folder, "-m", "fast", "-w", "stop")
        psutil.wait_procs(processes, 10)
        self.start()

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Send SIGSTOP to every process of the server: the kernel accepts connections, nobody answers."""
        processes = self.processes()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        try:
            yield
        finally:
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()
