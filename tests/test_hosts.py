"""To which of the hosts in PGHOST hello.py connects."""

import socket
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg2
import pytest

import hello
from tests.support.network import LOOPBACK, free_port, silent_port
from tests.support.postgres import Database
from tests.support.replication import Pair, replicated
from tests.support.wait import in_thread


@pytest.fixture(autouse=True)
def no_host_has_failed(table: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each test begin with the first host."""
    monkeypatch.setattr(hello, "failed_at", {})


@pytest.fixture
def slow_names(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the lookup of a name that ends in .slow take three seconds; without .slow it may be a host."""
    look_up = socket.getaddrinfo

    def slow(host: str, *arguments: Any, **options: Any) -> Any:
        if host.endswith(".slow"):
            time.sleep(3)
        return look_up(host.removesuffix(".slow"), *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    hello.lookups.clear()
    yield
    hello.lookups.clear()


def set_hosts(monkeypatch: pytest.MonkeyPatch, hosts: str, *ports: int) -> None:
    monkeypatch.setenv("PGHOST", hosts)
    monkeypatch.setenv("PGPORT", ",".join(map(str, ports)))


def connect_once() -> hello.Connection:
    return hello.connect(time.monotonic() + hello.CONNECT_TIMEOUT)


@pytest.mark.parametrize(
    "hosts", ["localhost", "127.0.0.1,localhost", "no-such-host.invalid,localhost", "::1,127.0.0.1", "db..x,127.0.0.1"]
)
def test_host_that_can_be_reached_is_used(table: Database, monkeypatch: pytest.MonkeyPatch, hosts: str) -> None:
    set_hosts(monkeypatch, hosts, table.port)
    with closing(connect_once()) as connection:
        assert connection.psycopg.info.host in hosts.split(",")


@pytest.mark.parametrize("hosts", ["no-such-host.invalid", "db..example", "\udcff", "x" * 64 + ".example"])
def test_host_without_an_address_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch, hosts: str) -> None:
    monkeypatch.setenv("PGHOST", hosts)
    with pytest.raises(psycopg2.OperationalError, match="has no address"):
        connect_once()


@pytest.mark.usefixtures("slow_names")
def test_host_that_no_name_server_answers_for_leaves_time_for_the_next(
    table: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_hosts(monkeypatch, "one.slow,two.slow,127.0.0.1", table.port)
    for _ in range(5):
        start = time.monotonic()
        with closing(connect_once()) as connection:
            assert connection.psycopg.info.host == LOOPBACK
        assert time.monotonic() - start < hello.CONNECT_TIMEOUT


@pytest.mark.usefixtures("slow_names")
def test_only_host_that_no_name_server_answers_for_takes_no_longer_than_connect_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PGHOST", "one.slow")
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        connect_once()
    assert time.monotonic() - start < 2 * hello.CONNECT_TIMEOUT


@pytest.mark.usefixtures("slow_names")
def test_name_that_is_found_after_an_attempt_is_used_by_the_next(
    table: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_hosts(monkeypatch, "localhost.slow", table.port)
    with pytest.raises(TimeoutError):
        connect_once()
    assert hello.lookups["localhost.slow"].done.wait(10)
    with closing(connect_once()) as connection:
        assert connection.psycopg.info.host == "localhost.slow"


def test_network_interface_of_an_address_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    set_hosts(monkeypatch, "fe80::1%lo", 5432)
    [address] = hello.find_addresses(time.monotonic() + hello.CONNECT_TIMEOUT)
    assert (address.host, address.hostaddr) == ("fe80::1%lo", "")  # libpq reads the address itself


@pytest.mark.usefixtures("slow_names")
def test_name_is_looked_up_once_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hello, "CONNECT_TIMEOUT", 0.2)
    monkeypatch.setenv("PGHOST", "one.slow")
    for _ in range(3):
        with pytest.raises(TimeoutError):
            connect_once()
    assert list(hello.lookups) == ["one.slow"]
    assert not hello.lookups["one.slow"].done.is_set()


def test_host_that_refuses_is_passed_over_at_once(table: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    set_hosts(monkeypatch, "127.0.0.1,127.0.0.1", free_port(), table.port)
    with closing(connect_once()) as connection:
        assert connection.psycopg.info.port == table.port


def test_host_that_does_not_answer_is_passed_over_by_the_next_attempt(
    table: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hello, "CONNECT_TIMEOUT", 1)
    with silent_port() as port:
        set_hosts(monkeypatch, "127.0.0.1,127.0.0.1", port, table.port)
        attempts = [in_thread(connect_once) for _ in range(2)]  # both begin with the first host
        for attempt in attempts:
            with pytest.raises(TimeoutError, match="does not answer in time"):
                attempt.result(10)
        with closing(connect_once()) as connection:
            assert connection.psycopg.info.port == table.port


@pytest.mark.usefixtures("slow_names")
def test_name_in_pghost_beside_a_service_file_does_not_block_the_process(
    table: Database, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "services").write_text("[hello]\nuser=postgres\n")
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
    monkeypatch.setenv("PGSERVICE", "hello")
    monkeypatch.delenv("PGUSER")
    set_hosts(monkeypatch, "one.slow,127.0.0.1", table.port)
    start = time.monotonic()
    with closing(connect_once()) as connection:
        assert (connection.psycopg.info.host, connection.psycopg.info.user) == (LOOPBACK, "postgres")
    assert time.monotonic() - start < hello.CONNECT_TIMEOUT


def test_next_attempt_begins_after_the_host_that_did_not_answer(
    table: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hello, "CONNECT_TIMEOUT", 1)
    with silent_port() as port:  # libpq goes on to it because the first host refuses
        set_hosts(monkeypatch, "127.0.0.2,127.0.0.1,localhost", free_port(), port, table.port)
        with pytest.raises(TimeoutError):
            connect_once()
        with closing(connect_once()) as connection:
            assert connection.psycopg.info.host == "localhost"


def test_attempt_that_is_not_answered_blames_its_host_and_not_the_one_of_the_connection_before(
    table: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hello, "CONNECT_TIMEOUT", 0.5)
    pool = hello.Pool("read", 1)
    with silent_port() as port:
        set_hosts(monkeypatch, "127.0.0.1,localhost,127.0.0.2", port, table.port, free_port())
        with pool.slot(0) as slot:
            monkeypatch.setenv("PGHOST", "127.0.0.1")
            monkeypatch.setenv("PGPORT", str(table.port))
            slot.ready(time.monotonic() + 5).close()  # a connection to another host than the silent one
            set_hosts(monkeypatch, "127.0.0.1,localhost,127.0.0.1", port, table.port, table.port)
            with pytest.raises(TimeoutError):
                slot.ready(time.monotonic() + 0.5)
            assert slot.ready(time.monotonic() + 5).psycopg.info.host == "localhost"
            slot.connection.close()


def test_name_that_is_found_later_does_not_change_which_host_is_tried_last(
    table: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    look_up = socket.getaddrinfo
    is_known = False

    def found_later(host: str, *arguments: Any, **options: Any) -> Any:
        if host == "later.example":
            if not is_known:
                raise socket.gaierror
            return look_up("127.0.0.2", *arguments, **options)
        return look_up(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", found_later)
    monkeypatch.setattr(hello, "CONNECT_TIMEOUT", 0.5)
    with silent_port() as port:
        set_hosts(monkeypatch, "later.example,127.0.0.1,localhost", free_port(), port, table.port)
        with pytest.raises(TimeoutError):
            connect_once()
        is_known = True
        with closing(connect_once()) as connection:
            assert connection.psycopg.info.host == "localhost"


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with replicated() as servers:
        yield servers


@pytest.mark.parametrize("attributes", ["", "any"])
def test_read_only_host_that_stands_first_is_passed_over_unless_any_host_will_do(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, attributes: str
) -> None:
    if attributes:
        monkeypatch.setenv("PGTARGETSESSIONATTRS", attributes)
    set_hosts(monkeypatch, "127.0.0.1,127.0.0.1", pair.standby.port, pair.primary.port)
    with closing(connect_once()) as connection:
        assert connection.psycopg.info.port == (pair.standby.port if attributes else pair.primary.port)


def test_host_that_does_not_answer_takes_no_longer_than_database_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hello, "CONNECT_TIMEOUT", 10)
    monkeypatch.setattr(hello, "DATABASE_TIMEOUT", 0.5)
    with silent_port() as port:
        set_hosts(monkeypatch, "127.0.0.1", port)
        start = time.monotonic()
        with pytest.raises(hello.Unavailable):
            hello.Batcher(hello.find, hello.Pool("silent", 1))("Zoe")
    assert time.monotonic() - start < 5


def test_next_attempt_begins_after_the_host_of_a_lost_connection(
    table: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_hosts(monkeypatch, "127.0.0.2,127.0.0.1,localhost", free_port(), table.port, table.port)
    connect_once().close_and_try_last()
    with closing(connect_once()) as connection:
        assert connection.psycopg.info.host == "localhost"
