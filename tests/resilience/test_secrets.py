"""What the service may do in the database, how it verifies its server, and what logs and process lists show."""

import contextlib
import re
import ssl
import time
from pathlib import Path

import psutil
import psycopg2
import pytest
import trustme

import hello
from tests.support.load import Load
from tests.support.network import exchange, tls_proxy
from tests.support.postgres import PASSWORD, RIGHTS, Database
from tests.support.service import SHORT_TIMEOUTS, Service


@pytest.fixture
def environment_of_the_service(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in database.service_environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("environment_of_the_service")
@pytest.mark.parametrize("is_ours", [True, False], ids=["our CA", "another CA"])
def test_certificate_of_postgres_is_verified(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_ours: bool
) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    (authority if is_ours else trustme.CA()).cert_pem.write_to_path(tmp_path / "root.crt")
    monkeypatch.setenv("PGSSLMODE", "verify-full")
    monkeypatch.setenv("PGSSLROOTCERT", str(tmp_path / "root.crt"))
    monkeypatch.setenv("PGHOST", "localhost")
    with tls_proxy(f"{database.sockets_folder}/.s.PGSQL.{database.port}", context) as port:
        monkeypatch.setenv("PGPORT", str(port))
        refused = contextlib.nullcontext() if is_ours else pytest.raises(psycopg2.OperationalError, match="certificate")
        with refused:
            hello.connect(time.monotonic() + 5).close()


@pytest.mark.parametrize(
    "statement",
    [
        "TRUNCATE users",
        "DROP TABLE users",
        "ALTER TABLE users ADD x int",
        "CREATE TABLE x ()",
        "COPY users TO PROGRAM 'cat'",
        "SELECT pg_read_file('PG_VERSION')",
        "CREATE ROLE x",
    ],
)
def test_role_of_the_service_may_not(database: Database, statement: str) -> None:
    denied = pytest.raises(psycopg2.errors.InsufficientPrivilege)
    with contextlib.closing(database.connect("hello")) as connection, connection.cursor() as cursor, denied:
        cursor.execute(statement)


def test_page_gives_the_role_the_rights_that_the_tests_give_it() -> None:
    page = Path("docs/security.md").read_text()
    assert f"GRANT {', '.join(RIGHTS)} ON users TO hello;" in page


def test_role_of_the_service_has_no_other_right_on_its_table(database: Database) -> None:
    rows = database.query(
        "SELECT privilege_type FROM information_schema.table_privileges"
        " WHERE table_name = 'users' AND grantee IN ('hello', 'PUBLIC')"
    )
    assert sorted(right for (right,) in rows) == sorted(RIGHTS)


@pytest.mark.usefixtures("environment_of_the_service")
def test_role_of_the_service_may_do_what_every_operation_does() -> None:
    deadline = time.monotonic() + 10
    with contextlib.closing(hello.TrialConnection(deadline)) as connection:
        hello.try_statements(connection, deadline)


def test_process_list_shows_no_password_and_no_name(database: Database, service: Service) -> None:
    assert service.environment["PGPASSWORD"] == PASSWORD
    with Load(service, database, 4) as load:
        load.wait_for_answers(50)
        processes = [*map(psutil.Process, [service.process.pid, *service.workers()]), *database.processes()]
        lines = "\n".join(" ".join(process.cmdline()) for process in processes)
    assert "hello:application" in lines
    assert not re.findall(f"{PASSWORD}|Quux", lines)


def test_log_has_no_name_no_date_and_no_text_of_the_driver(database: Database, tmp_path: Path) -> None:
    with Service(tmp_path, database.service_environment, WEB_CONCURRENCY="1", **SHORT_TIMEOUTS) as service:
        assert service.put("Quuxlast", "1234-05-17").status == 204
        with database.locked("LOCK TABLE users"):
            assert service.put("Quuxlast", "1234-05-17").status == 503
        database.disconnect_service()
        exchange(service.port, b"PUT /hello/Quuxlast HTTP/1.1\r\nHost: a\r\nContent-Length: Sesame\r\n\r\n1234-05-17")
        exchange(service.port, b"GET /hello/Quux%00last?dateOfBirth=1234-05-17 HTTP/1.1\r\nHost: Sesame\r\n\r\n")
        assert service.put("Quuxlast", "Sesame").status == 400
        assert service.put("Quuxlast", "1234-05-17").status == 204
    text = service.log_text()  # whole: the service has ended
    assert '"status": 503' in text
    assert '"status": 400' in text
    # The year alone could be part of a process id.
    assert not re.findall("Quux|Sesame|1234-|1234, 5|Traceback|psycopg2|FATAL|INSERT|cancel", text)
