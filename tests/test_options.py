"""gunicorn's options, upgrades and socket activation: each works, or is refused at the start in one line."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from gunicorn.config import make_settings

from server import options
from tests.support.network import LOOPBACK, RESET_ON_CLOSE, Response, ask, free_port, read_all, responses
from tests.support.service import Service
from tests.support.wait import wait_until

ROOT = Path(__file__).parents[1]
LIVEZ = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"
LAST_LIVEZ = b"GET /livez HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"

# --- What works ---------------------------------------------------------------------------------------


class UnixService(Service):
    """A service that listens on a Unix socket, and on its port too, for the methods of Service."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.path = folder / "hello.sock"
        super().__init__(folder, environment, WEB_CONCURRENCY="1")
        binds = [f"--bind=unix:{self.path}", f"--bind={LOOPBACK}:{self.port}"]
        self.command[-1:-1] = binds

    def exchange(self, *requests: bytes) -> list[Response]:
        """Send requests through the Unix socket; return the responses."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(20)
            client.connect(str(self.path))
            client.sendall(b"".join(requests))
            return responses(read_all(client))


@pytest.fixture
def unix_service(database: dict[str, str], tmp_path: Path) -> Iterator[UnixService]:
    with UnixService(tmp_path, database) as service:
        yield service


def test_unix_socket_answers_requests_one_after_the_other(unix_service: UnixService) -> None:
    found = unix_service.exchange(LIVEZ, LIVEZ, LAST_LIVEZ)
    assert [response.status for response in found] == [200, 200, 200]


def test_unix_socket_answers_protocol_errors(unix_service: UnixService) -> None:
    (response,) = unix_service.exchange(b"SESAME / HTTP/1.1\r\nHost: a\r\n\r\n")
    assert response.status == 501


def test_clients_that_reset_a_unix_socket_leave_nothing_in_the_log(unix_service: UnixService) -> None:
    for _ in range(20):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(unix_service.path))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            client.sendall(LIVEZ * 3)
    assert [response.status for response in unix_service.exchange(LAST_LIVEZ)] == [200]
    assert '"level": "error"' not in unix_service.log_text()


def test_unix_socket_is_removed_at_a_stop(unix_service: UnixService) -> None:
    unix_service.process.terminate()
    assert unix_service.process.wait(20) == 0
    assert not unix_service.path.exists()


def test_each_worker_has_a_socket_of_its_own_with_reuse_port(database: dict[str, str], tmp_path: Path) -> None:
    with Service(tmp_path, database, arguments=["--reuse-port"]) as service:
        listening = [psutil.Process(pid).net_connections("tcp4") for pid in service.workers()]
        assert all(any(c.status == "LISTEN" and c.laddr.port == service.port for c in found) for found in listening)
        assert {service.ask("GET", "/livez").status for _ in range(50)} == {200}
        service.process.terminate()
        assert service.process.wait(20) == 0


def test_reload_replaces_the_workers_when_a_file_changes(database: dict[str, str], tmp_path: Path) -> None:
    watched = tmp_path / "watched"
    watched.touch()
    arguments = ["--reload", "--reload-engine=poll", f"--reload-extra-file={watched}"]
    with Service(tmp_path, database, arguments=arguments) as service:
        before = set(service.workers())
        time.sleep(1.1)  # the reloader compares times of files once a second
        watched.write_text("changed")
        wait_until(lambda: len(workers := set(service.workers())) == 2 and not workers & before, 30)
        assert service.ask("GET", "/livez").status == 200


# --- Upgrades -----------------------------------------------------------------------------------------


def new_master(service: Service) -> int | None:
    """Return the process id of the master that SIGUSR2 made, once it has its workers and the old one has its own."""
    for child in psutil.Process(service.process.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if len(child.children()) == 2:
                return child.pid
    return None


def statuses(port: int, count: int = 30) -> set[int]:
    """Return the statuses of GETs on connections of their own."""
    return {ask(port, "GET", "/livez").status for _ in range(count)}


def test_upgrade_by_sigusr2_is_reachable_when_the_old_master_has_gone(database: dict[str, str], tmp_path: Path) -> None:
    with Service(tmp_path, database) as service:
        service.process.send_signal(signal.SIGUSR2)
        upgraded = psutil.Process(wait_until(lambda: new_master(service), 30))
        try:
            assert statuses(service.port) == {200}
            service.process.terminate()
            assert service.process.wait(20) == 0
            assert statuses(service.port) == {200}
            upgraded.terminate()
            upgraded.wait(20)
        finally:
            for process in [upgraded, *(upgraded.children() if upgraded.is_running() else [])]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


def test_hang_up_keeps_the_socket_and_later_starts_reach_it(database: dict[str, str], tmp_path: Path) -> None:
    with Service(tmp_path, database) as service:
        for _ in range(2):
            before = set(service.workers())
            service.process.send_signal(signal.SIGHUP)
            wait_until(lambda old=before: len(now := set(service.workers())) == 2 and not now & old, 30)  # type: ignore[misc]
            assert statuses(service.port) == {200}


# What systemd does: the socket is descriptor 3 of the process that LISTEN_PID names.
ACTIVATE = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.close(int(sys.argv[1]))
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
os.execv(sys.argv[2], sys.argv[2:])
"""


class ActivatedService(Service):
    """A service on a socket that listens already, as systemd starts one."""

    def __init__(self, folder: Path, environment: dict[str, str], listener: socket.socket) -> None:
        descriptor = listener.fileno()
        prefix = [sys.executable, "-c", ACTIVATE, str(descriptor)]
        super().__init__(folder, environment, prefix=prefix)
        self.descriptors = [descriptor]
        self.port = listener.getsockname()[1]


def test_socket_of_systemd_serves_a_second_start(database: dict[str, str], tmp_path: Path) -> None:
    with socket.create_server((LOOPBACK, 0)) as listener:
        for _ in range(2):
            with ActivatedService(tmp_path, database, listener) as service:
                assert statuses(service.port) == {200}
                service.process.terminate()
                assert service.process.wait(20) == 0


def test_client_that_came_before_the_start_on_a_socket_of_systemd_is_answered(
    database: dict[str, str], tmp_path: Path
) -> None:
    with socket.create_server((LOOPBACK, 0)) as listener, socket.socket() as early:
        early.settimeout(30)
        early.connect(listener.getsockname())
        early.sendall(LAST_LIVEZ)
        with ActivatedService(tmp_path, database, listener):
            assert [response.status for response in responses(read_all(early))] == [200]


# --- What is refused ----------------------------------------------------------------------------------

# Options that do what gunicorn's documentation says, and those of features that the service does not use
SUPPORTED = {
    *("bind", "backlog", "workers", "worker_connections", "timeout", "graceful_timeout", "reuse_port", "chdir"),
    *("reload", "reload_engine", "reload_extra_files", "spew", "check_config", "print_config", "config", "wsgi_app"),
    *("enable_stdio_inheritance", "pidfile", "worker_tmp_dir", "user", "group", "umask", "initgroups"),
    *("pythonpath", "proc_name", "default_proc_name", "logconfig_dict", "control_socket_disable"),
    *("on_starting", "on_reload", "when_ready", "pre_fork", "post_fork", "post_worker_init", "worker_int"),
    *("worker_abort", "pre_exec", "child_exit", "worker_exit", "nworkers_changed", "on_exit"),
}
UNUSED = {
    *("sendfile", "tmp_upload_dir", "paste", "raw_paste_global_conf", "control_socket_mode", "cert_reqs", "ciphers"),
    *("ssl_version", "suppress_ragged_eofs", "do_handshake_on_connect", "disable_redirect_access_to_syslog"),
    *("syslog_addr", "syslog_prefix", "syslog_facility"),
}
UNUSED_FEATURES = ("asgi_", "websocket_", "http2_", "dirty_", "on_dirty_")


def test_every_option_of_gunicorn_is_supported_refused_or_unused() -> None:
    refused = {name for names in options.REFUSED.values() for name in names}
    assert not refused & SUPPORTED
    others = make_settings().keys() - refused - SUPPORTED - UNUSED
    assert [name for name in others if not name.startswith(UNUSED_FEATURES)] == []
    assert refused <= make_settings().keys()


def start(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Start a service that should end at once."""
    ports = {"PORT": str(free_port()), "METRICS_PORT": "0"}
    command = [str(Path(sys.executable).with_name("gunicorn")), *arguments, "hello:application"]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | ports | environment, check=False, capture_output=True, text=True, timeout=20
    )


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("--certfile=hello.pem --keyfile=hello.key", "--certfile is not supported: let a proxy"),
        ("--preload", "--preload is not supported: workers cannot share connections"),
        ("--worker-class=gevent", "--worker-class is not supported: only server.worker.Worker"),
        ("--threads=4", "--threads is not supported: set WEB_CONCURRENCY"),
        ("--keep-alive=5", "--keep-alive is not supported: set KEEPALIVE_TIMEOUT"),
        ("--access-logfile=-", "--access-logfile is not supported: the log goes to standard output"),
        ("--log-level=error", "--log-level is not supported: the log goes to standard output"),
        ("--max-requests=9", "--max-requests is not supported: workers need not be replaced"),
        ("--limit-request-line=99", "--limit-request-line is not supported: server/parser.py"),
        ("--env=HEAD_TIMEOUT=1", "--env is not supported: set the variable"),
        ("--statsd-host=localhost:8125", "--statsd-host is not supported: /metrics"),
    ],
)
def test_option_that_would_have_no_effect_stops_the_start_with_one_line(arguments: str, reason: str) -> None:
    done = start(*arguments.split())
    assert done.returncode == 1
    assert done.stderr.startswith(f"gunicorn's option {reason}")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stdout


@pytest.mark.parametrize("name", ["HOST", "METRICS_HOST"])
@pytest.mark.parametrize("value", ["no-such-host..", "a" * 300, "1.2.3.4.5", "::g", "192.0.2.1"])
def test_host_that_is_not_of_this_machine_stops_the_start_with_one_line(name: str, value: str) -> None:
    done = start(**{name: value, "METRICS_PORT": str(free_port())})
    assert done.returncode == 1
    assert done.stderr.startswith(f"cannot listen on {value} port ")
    assert done.stderr.endswith(f"set another {name} or {name.replace('HOST', 'PORT')}\n")
    assert done.stderr.count("\n") == 1


def test_port_in_use_stops_the_start_with_one_line() -> None:
    with socket.create_server((LOOPBACK, 0)) as other:
        port = str(other.getsockname()[1])
        done = start(PORT=port)
        assert done.returncode == 1
        reason = f"cannot listen on 127.0.0.1 port {port} (Address already in use): set another HOST or PORT\n"
        assert done.stderr == reason
        done = start(f"--bind=127.0.0.1:{port}")
        assert done.stderr.endswith("set another --bind\n")


def test_metrics_are_served_where_bind_says(database: dict[str, str], tmp_path: Path) -> None:
    service = Service(tmp_path, database, METRICS_PORT=str(free_port()))
    binds = [f"--bind={LOOPBACK}:{service.port}", f"--bind={LOOPBACK}:{service.environment['METRICS_PORT']}"]
    service.command[-1:-1] = binds
    with service:
        assert ask(int(service.environment["METRICS_PORT"]), "GET", "/metrics").status == 200
