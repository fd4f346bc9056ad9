"""The Postgres server that all contestants share, its databases, and the statements of pgbench."""

import contextlib
import functools
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tools.embedded_postgres import Postgres, binaries

ROOT = Path(__file__).parents[1]
USERS = 1_000_000
# Everything else is Postgres' default, fsync and synchronous_commit included.
SETTINGS = {"shared_buffers": "1GB", "max_wal_size": "8GB", "max_connections": "250"}

LETTERS = str.maketrans("0123456789", "abcdefghij")  # usernames have no digits
USERNAME = "'User' || translate(to_char({}, 'FM0000000'), '0123456789', 'abcdefghij')"
# The factor is a prime, so that users arrive in no order, and the index is as full as it is in use.
INSERT_USERS = (
    f"INSERT INTO users SELECT {USERNAME.format('number::bigint * 7368787 % {users}')},"
    " '1930-01-01'::date + number % 32000 FROM generate_series(1, {users}) AS number"
)
PROBE = "Userprobe"
CALLS = {
    "GET": f"hello.find_date_of_birth('{PROBE}')",
    "PUT": f"hello.save_date_of_birth('{PROBE}', date(1990, 5, 17))",
}


@contextlib.contextmanager
def postgres() -> Iterator[None]:
    """Run Postgres with its data on a disk, and point libpq's environment at it."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="hello-bench-") as folder:
        Path(folder).chmod(0o755)  # as root, Postgres runs as another user
        server = Postgres(Path(folder) / "data", **SETTINGS)
        try:
            server.start()
            os.environ.update(server.environment)
            yield
        finally:
            server.stop()


def psql(statement: str, database: str = "postgres") -> str:
    """Run one statement; return its rows as text, columns separated by `|`."""
    command: list[str | Path] = [binaries() / "psql", "-qAtX", "-v", "ON_ERROR_STOP=1", "-d", database, "-c", statement]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def database_name(users: int) -> str:
    """Return the name of the database with so many users."""
    return f"users_{users}"


def create_database(users: int) -> None:
    """Create a database with this many users, vacuumed and written to disk."""
    began = time.monotonic()
    name = database_name(users)
    psql(f"CREATE DATABASE {name}")
    environment = os.environ | {"PGDATABASE": name}
    subprocess.run([sys.executable, str(ROOT / "hello.py"), "init-db"], check=True, env=environment)
    psql(INSERT_USERS.format(users=users), name)
    psql("VACUUM ANALYZE users", name)
    psql("CHECKPOINT", name)
    print(f"loaded {users:,} users in {time.monotonic() - began:.1f} s", flush=True)


@functools.cache
def hello_messages(method: str) -> str:
    """Return the messages that hello sends for one row, as a pgbench script with {} for the username.

    Postgres itself logs them, so that they cannot differ from hello's.
    """
    log = Path(psql("SHOW data_directory")) / "server.log"
    start = log.stat().st_size
    environment = os.environ | {"PGDATABASE": database_name(USERS), "PGOPTIONS": "-c log_statement=all"}
    program = f"import hello; from datetime import date; {CALLS[method]}"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, env=environment)
    text = log.read_bytes()[start:].decode()
    messages = re.findall(r"LOG:  statement: (.*?)(?=\n\d{4}-|\n\Z)", text, re.DOTALL)
    first = next(number for number, message in enumerate(messages) if PROBE in message)
    return "".join(map(pgbench_line, messages[first:]))


def pgbench_line(message: str) -> str:
    """Return a message of one or more statements as a line of a pgbench script."""
    without_comments = re.sub("--.*", "", message)
    statements = " ".join(without_comments.split()).rstrip("; ")
    # pgbench sends statements that end with `\;` in one message.
    return statements.replace("{", "{{").replace("}", "}}").replace(PROBE, "{}").replace(";", " \\;") + ";\n"
