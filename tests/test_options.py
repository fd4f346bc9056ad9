"""gunicorn's options, upgrades and socket activation: each works, or is refused at the start in one line."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from gunicorn.app.wsgiapp import WSGIApplication
from gunicorn.config import Config, make_settings

from server import options, settings
from tests.support.network import LOOPBACK, RESET_ON_CLOSE, ask, free_port, read_all, responses
from tests.support.service import Service
from tests.support.wait import wait_until

ROOT = Path(__file__).parents[1]
LIVEZ = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"
LAST_LIVEZ = b"GET /livez HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"

# --- What works ---------------------------------------------------------------------------------------


def test_bind_takes_a_unix_socket_and_the_port_of_the_metrics(database: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "hello.sock"
    service = Service(tmp_path, database, WEB_CONCURRENCY="1", METRICS_PORT=str(free_port()))
    metrics_port = int(service.environment["METRICS_PORT"])
    binds = [f"unix:{path}", f"{LOOPBACK}:{service.port}", f"{LOOPBACK}:{metrics_port}"]
    service.command[-1:-1] = [f"--bind={bind}" for bind in binds]

    def unix_socket() -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(20)
        client.connect(str(path))
        return client

    def exchange(*requests: bytes) -> list[int]:
        with unix_socket() as client:
            client.sendall(b"".join(requests))
            return [response.status for response in responses(read_all(client))]

    with service:
        assert ask(metrics_port, "GET", "/metrics").status == 200
        assert exchange(b"SESAME / HTTP/1.1\r\nHost: a\r\n\r\n") == [501]
        for _ in range(20):
            with unix_socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
                client.sendall(LIVEZ * 3)
        assert exchange(LIVEZ, LIVEZ, LAST_LIVEZ) == [200, 200, 200]
        assert '"level": "error"' not in service.log_text()
        service.process.terminate()
        assert service.process.wait(20) == 0
        assert not path.exists()


def test_each_worker_has_a_socket_of_its_own_with_reuse_port(database: dict[str, str], tmp_path: Path) -> None:
    with Service(tmp_path, database, arguments=["--reuse-port"]) as service:
        listening = [psutil.Process(pid).net_connections("tcp4") for pid in service.workers()]
        assert all(any(c.status == "LISTEN" and c.laddr.port == service.port for c in found) for found in listening)
        assert statuses(service.port) == {200}
        service.process.terminate()
        assert service.process.wait(20) == 0


def test_reload_replaces_the_workers_when_a_file_changes(database: dict[str, str], tmp_path: Path) -> None:
    watched = tmp_path / "watched"
    watched.touch()
    arguments = ["--reload", "--reload-engine=poll", f"--reload-extra-file={watched}"]
    with Service(tmp_path, database, arguments=arguments, WEB_CONCURRENCY="1") as service:
        before = service.workers()
        time.sleep(1.1)  # the reloader compares times of files once a second
        watched.write_text("changed")
        wait_until(lambda: len(now := service.workers()) == 1 and now != before, 30)
        assert service.ask("GET", "/livez").status == 200


# --- Starts and stops ---------------------------------------------------------------------------------


SLOW_FORK = """
def post_fork(server, worker):
    __import__("time").sleep(1)
"""


def test_stop_that_comes_before_a_worker_handles_signals_is_not_lost(database: dict[str, str], tmp_path: Path) -> None:
    slow = tmp_path / "gunicorn.conf.py"
    slow.write_text((ROOT / "gunicorn.conf.py").read_text() + SLOW_FORK)
    service = Service(tmp_path, database, arguments=["--config", str(slow)], GRACEFUL_TIMEOUT="60")
    with subprocess.Popen(service.command, cwd=ROOT, env=service.environment, stdout=subprocess.DEVNULL) as process:
        wait_until(psutil.Process(process.pid).children, 30)
        process.terminate()
        assert process.wait(30) == 0


def test_start_without_standard_output_ends_with_one_line(database: dict[str, str], tmp_path: Path) -> None:
    service = Service(tmp_path, database, prefix=["sh", "-c", 'exec "$@" >&-', "sh"])
    done = subprocess.run(
        service.command, cwd=ROOT, env=service.environment, capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == 1
    assert done.stderr == "Standard output is closed, and the log is written to it: open it, as with >/dev/null.\n"


# --- Upgrades -----------------------------------------------------------------------------------------


def statuses(port: int) -> set[int]:
    """Return the statuses of GETs on connections of their own."""
    return {ask(port, "GET", "/livez").status for _ in range(30)}


def new_master(service: Service) -> psutil.Process | None:
    """Return the master that SIGUSR2 made, once it has its worker."""
    children = psutil.Process(service.process.pid).children()
    return next((child for child in children if child.is_running() and child.children()), None)


def test_upgrade_by_sigusr2_is_reachable_when_the_old_master_has_gone(database: dict[str, str], tmp_path: Path) -> None:
    with Service(tmp_path, database, WEB_CONCURRENCY="1") as service:
        service.process.send_signal(signal.SIGUSR2)
        upgraded = wait_until(lambda: new_master(service), 30)
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


# What systemd does: the socket is descriptor 3 of the process that LISTEN_PID names.
ACTIVATE = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.close(int(sys.argv[1]))
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
os.execv(sys.argv[2], sys.argv[2:])
"""


def test_socket_of_systemd_serves_a_second_start_and_clients_that_came_before_each(
    database: dict[str, str], tmp_path: Path
) -> None:
    with socket.create_server((LOOPBACK, 0)) as listener:
        activate = [sys.executable, "-c", ACTIVATE, str(listener.fileno())]
        for _ in range(2):
            service = Service(tmp_path, database, prefix=activate, WEB_CONCURRENCY="1")
            service.descriptors = [listener.fileno()]
            service.port = listener.getsockname()[1]
            with socket.create_connection(listener.getsockname(), timeout=30) as early:
                early.sendall(LAST_LIVEZ)
                with service:
                    assert [response.status for response in responses(read_all(early))] == [200]
                    assert statuses(service.port) == {200}
                    service.process.terminate()
                    assert service.process.wait(20) == 0


# --- What is refused ----------------------------------------------------------------------------------

# Options that do what gunicorn's documentation says, and those of features that the service does not use
SUPPORTED = {
    *("bind", "backlog", "workers", "worker_connections", "timeout", "reuse_port", "chdir"),
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


def configuration(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Config:
    """Return gunicorn's configuration from the command line and gunicorn.conf.py."""
    monkeypatch.setattr(sys, "argv", ["gunicorn", *arguments, "hello:application"])
    return WSGIApplication().cfg


@pytest.mark.parametrize(
    ("advice", "name"), [(advice, name) for advice, names in options.REFUSED.items() for name in names]
)
def test_option_that_would_have_no_effect_is_refused(monkeypatch: pytest.MonkeyPatch, advice: str, name: str) -> None:
    config = configuration(monkeypatch)
    config.settings[name].value = "another"
    with pytest.raises(SystemExit, match=rf"^gunicorn's option [\w-]+ is not supported: {re.escape(advice)}\Z"):
        options.check_options(config)


def refusal_of_addresses(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """Return why the service would not listen."""
    with pytest.raises(SystemExit) as stopped:
        options.check_addresses(configuration(monkeypatch, *arguments).address)
    return str(stopped.value)


@pytest.mark.parametrize("name", ["HOST", "METRICS_HOST"])
@pytest.mark.parametrize("value", ["no-such-host..", "a" * 300, "1.2.3.4.5", "::g", "192.0.2.1"])
def test_host_that_is_not_of_this_machine_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    for port in ("PORT", "METRICS_PORT"):
        monkeypatch.setattr(settings, port, free_port())
    monkeypatch.setattr(settings, name, value)
    reason = refusal_of_addresses(monkeypatch)
    assert reason.startswith(f"cannot listen on {value} port ")
    assert reason.endswith(f"set another {name} or {name.replace('HOST', 'PORT')}")


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port on which another program listens."""
    with socket.create_server((LOOPBACK, 0)) as other:
        yield other.getsockname()[1]


def test_port_of_bind_that_is_in_use_is_refused(monkeypatch: pytest.MonkeyPatch, taken_port: int) -> None:
    assert refusal_of_addresses(monkeypatch, f"--bind={LOOPBACK}:{taken_port}").endswith("set another --bind")


@pytest.mark.parametrize(
    ("argument", "host", "reason"),
    [
        ("--threads=4", LOOPBACK, "gunicorn's option --threads is not supported: set WEB_CONCURRENCY\n"),
        ("--backlog=9", "a" * 300, "cannot listen on {host} port {port} (Name or service not known): {advice}\n"),
        ("--backlog=9", LOOPBACK, "cannot listen on {host} port {port} (Address already in use): {advice}\n"),
    ],
    ids=["option", "host", "port"],
)
def test_what_is_refused_stops_the_start_with_one_line(taken_port: int, argument: str, host: str, reason: str) -> None:
    command = [str(Path(sys.executable).with_name("gunicorn")), argument, "hello:application"]
    environment = os.environ | {"HOST": host, "PORT": str(taken_port), "METRICS_PORT": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True, timeout=20)
    assert done.returncode == 1
    assert done.stderr == reason.format(host=host, port=taken_port, advice="set another HOST or PORT")
    assert "Traceback" not in done.stdout
