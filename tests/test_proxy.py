"""HAProxy as compose/scale.yml sets it, in front of two real services: what their clients get, whatever breaks.

It runs on this machine, without containers: where it listens and where the services are is put in, and checks that are
quicker.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest
import yaml

import hello
from tests.support.load import Load
from tests.support.network import LOOPBACK, free_port
from tests.support.postgres import Database
from tests.support.service import Service
from tests.support.wait import wait_until

ROOT = Path(__file__).parents[1]
SCALE = ROOT / "compose/scale.yml"


class Loader(yaml.SafeLoader):
    """One that passes over Compose's own tags."""


Loader.add_constructor("!reset", lambda loader, node: None)
CONFIG = yaml.load(SCALE.read_text(), Loader)["configs"]["haproxy"]["content"]

HAPROXY = shutil.which("haproxy", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin") or ""
if not HAPROXY:
    pytest.skip("HAProxy is not installed", allow_module_level=True)

# --- Fixtures ---------------------------------------------------------------------------------------


class Proxy(Service):
    """HAProxy in front of services, which it checks each `interval`; it is asked as they are."""

    def __init__(self, folder: Path, services: list[Service], interval: str = "100ms") -> None:
        self.port = free_port()
        self.config = folder / f"haproxy-{self.port}.cfg"
        servers = [f"server s{service.port} 127.0.0.1:{service.port} check inter {interval}" for service in services]
        text, found = re.subn(
            r"( *)server-template .*", lambda match: "".join(match[1] + s + "\n" for s in servers), CONFIG
        )
        assert found == 1
        self.config.write_text(text.replace("bind :8080", f"bind 127.0.0.1:{self.port}"))

    def __enter__(self) -> Self:
        self.process = subprocess.Popen([HAPROXY, "-db", "-f", self.config])
        wait_until(self.is_listening)
        return self

    def is_listening(self) -> bool:
        """Return whether it accepts connections."""
        assert self.process.poll() is None, "HAProxy ended"
        with contextlib.suppress(OSError), socket.create_connection((LOOPBACK, self.port)):
            return True
        return False

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.wait()


@pytest.fixture(scope="module")
def database() -> Iterator[Database]:
    server = Database()
    server.start()
    server.prepare()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def services(database: Database, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Service]]:
    folder = tmp_path_factory.mktemp("services")
    environment = database.service_environment | {"WEB_CONCURRENCY": "1"}
    with Service(folder, environment) as first, Service(folder, environment) as second:
        yield [first, second]


@pytest.fixture(scope="module")
def proxy(services: list[Service], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    with Proxy(tmp_path_factory.mktemp("haproxy"), services) as proxy:
        yield proxy


# --- Tests ------------------------------------------------------------------------------------------


def test_configuration_has_no_warning(proxy: Proxy) -> None:
    done = subprocess.run([HAPROXY, "-c", "-f", proxy.config], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr


def test_database_away_is_the_services_503_for_as_long_as_it_lasts(proxy: Proxy, database: Database) -> None:
    database.kill()
    try:
        wait_until(lambda: proxy.ask("GET", "/hello/Zoe").status == 503)
        messages, end = set(), time.monotonic() + 1  # HAProxy gives up who fails three checks
        while time.monotonic() < end:
            messages.add(proxy.ask("GET", "/hello/Zoe").message)
    finally:
        database.start()
    assert messages == {hello.Unavailable().message}
    wait_until(lambda: proxy.put("Zoe").status == 204)


def test_service_stopped_under_load_is_not_noticed(
    proxy: Proxy, services: list[Service], database: Database, tmp_path: Path
) -> None:
    with (
        Service(tmp_path, database.service_environment, WEB_CONCURRENCY="1") as third,
        Proxy(tmp_path, [*services, third], interval="10s") as wider,  # no check tells it of the stop
        Load(wider, database) as load,
    ):
        wait_until(lambda: all(database.connections(service.name) for service in [*services, third]))
        third.process.send_signal(signal.SIGTERM)
        third.process.wait()
        load.wait_for_answers(200)
    assert set(load.statuses) == {200, 204}
    assert load.slowest < 2.5  # `timeout connect` is 1 s; with all retries to the same service it takes 3 s


def test_no_service_left_is_503_with_a_message_and_retry_after(tmp_path: Path, database: Database) -> None:
    stopped = Service(tmp_path, database.service_environment)
    with Proxy(tmp_path, [stopped]) as proxy:
        answer = proxy.ask("GET", "/hello/Zoe")
    assert answer.status == 503
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["Retry-After"] == "1"
    assert answer.message == "No answer from the service: try again in a second."
