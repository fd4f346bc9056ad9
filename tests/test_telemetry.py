"""Metrics, logs, request ids, dashboard and alerts, against real gunicorns, a real Postgres and a real Prometheus."""

import contextlib
import http.client
import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from server import logs, telemetry
from tools import embedded_postgres as embedded

ROOT = Path(__file__).parents[1]
MONITORING = ROOT / "monitoring"
PORT, SHARED_PORT, PROMETHEUS_PORT = 18110, 18120, 18130
HELLO = "/hello/<username>"
GREETING = {"dateOfBirth": "1990-05-17"}
TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


def wait_until(condition: Callable[[], Any], seconds: float = 10) -> Any:
    """Return a condition's first true value; fail after some seconds."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return value


class Service:
    """A gunicorn with three workers, its output in files, and a client that counts what it is answered."""

    def __init__(
        self, folder: Path, port: int, reader: str = "exec cat", application: str = "hello:application", **settings: str
    ) -> None:
        self.port, self.metrics_port = port, port + 1
        self.output, self.errors = folder / "stdout", folder / "stderr"
        self.answers: Counter[tuple[str, str, str]] = Counter()
        environment = {"PORT": str(port), "METRICS_PORT": str(self.metrics_port), "WEB_CONCURRENCY": "3"}
        command = [sys.executable, "-m", "gunicorn", application]
        with self.output.open("wb") as output, self.errors.open("wb") as errors:
            pipe = subprocess.Popen(["sh", "-c", reader], stdin=subprocess.PIPE, stdout=output)
            with pipe.stdin:
                self.process = subprocess.Popen(
                    command, cwd=ROOT, env=os.environ | environment | settings, stdout=pipe.stdin, stderr=errors
                )
        self.reader = pipe
        wait_until(self.is_up)

    def is_up(self) -> bool:
        with contextlib.suppress(OSError):
            return self.call("GET", "/livez", route="/livez").status == 200
        return False

    @property
    def workers(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in children.read_text().split()]

    def call(
        self, method: str, path: str, content: Any = None, route: str = HELLO, port: int = 0, **headers: str
    ) -> http.client.HTTPResponse:
        """Send a request on a connection of its own and count the answer; its content is in `.content`."""
        connection = http.client.HTTPConnection("127.0.0.1", port or self.port, timeout=10)
        sent = json.dumps(content) if isinstance(content, dict) else content
        with contextlib.closing(connection):
            connection.request(method, path, sent, {name.replace("_", "-"): text for name, text in headers.items()})
            response = connection.getresponse()
            response.content = response.read()
        self.answers[method, route, str(response.status)] += 1
        return response

    def metrics(self) -> dict[str, dict[tuple[str, ...], float]]:
        """Return each sample's value by its name and the values of its labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as response:
            families = text_string_to_metric_families(response.read().decode())
        samples: dict[str, dict[tuple[str, ...], float]] = {}
        for sample in (sample for family in families for sample in family.samples):
            samples.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
        return samples

    def requests(self) -> dict[tuple[str, ...], float]:
        """Return what /metrics says was answered, by method, route and status."""
        return {key: value for key, value in self.metrics()["http_requests_total"].items() if value}

    def lines(self, message: str = "request") -> list[dict[str, Any]]:
        """Return the log lines so far with a message; every line must be a JSON object."""
        time.sleep(2 * logs.WRITE_SECONDS)
        return [line for line in map(json.loads, self.output.read_text().splitlines()) if message in line["message"]]

    def stop(self) -> None:
        self.process.send_signal(signal.SIGQUIT)  # gunicorn's quick shutdown
        self.process.wait()
        self.reader.wait()


@contextlib.contextmanager
def serving(folder: Path, port: int = PORT, **settings: str) -> Iterator[Service]:
    service = Service(folder, port, **settings)
    try:
        yield service
    finally:
        service.stop()


@pytest.fixture(scope="module")
def schema(postgres: embedded.Postgres) -> None:
    subprocess.run([sys.executable, ROOT / "hello.py", "init-db"], check=True, env=os.environ)


@pytest.fixture
def service(schema: None, tmp_path: Path) -> Iterator[Service]:
    with serving(tmp_path) as service:
        yield service


@pytest.fixture(scope="module")
def shared(schema: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service for the tests that leave it as they found it."""
    with serving(tmp_path_factory.mktemp("shared"), SHARED_PORT) as service:
        yield service


def work(service: Service) -> None:
    """Send some requests of every kind, from several clients at once."""

    def client() -> None:
        for _ in range(20):
            service.call("PUT", "/hello/Zoe", GREETING)
            service.call("GET", "/hello/Zoe")
            service.call("HEAD", "/hello/Zoe")
            service.call("GET", "/hello/Nobody")
            service.call("GET", "/hello/4")
            service.call("PUT", "/hello/Zoe", "{}")
            service.call("DELETE", "/hello/Zoe")
            service.call("GET", "/nowhere", route="unmatched")
            service.call("GET", "/readyz", route="/readyz")

    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# --- Metrics ----------------------------------------------------------------------------------------


def test_metrics_after_a_worker_was_killed_add_up_to_what_the_client_counted(service: Service) -> None:
    work(service)
    assert service.requests() == service.answers
    killed = service.workers[0]
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: killed not in service.workers and len(service.workers) == 3)
    assert service.requests() == service.answers
    work(service)
    assert service.requests() == service.answers
    metrics = service.metrics()
    durations = metrics["http_request_duration_seconds_count"]
    assert {key: value for key, value in durations.items() if value} == service.answers
    assert sum(value > 0 for value in service.answers.values()) == 10


def test_metrics_while_workers_are_killed_under_load_lose_no_answer(service: Service) -> None:
    failures = Counter()
    done = threading.Event()

    def client() -> None:
        while not done.is_set():
            try:
                service.call("GET", "/hello/Nobody")
            except (OSError, http.client.HTTPException):
                failures["GET"] += 1

    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        time.sleep(0.2)
        os.kill(service.workers[0], signal.SIGKILL)
    done.set()
    for thread in threads:
        thread.join()
    answered = service.answers["GET", HELLO, "404"]
    assert answered > 100
    # A worker may die between counting and answering.
    assert answered <= service.requests()["GET", HELLO, "404"] <= answered + failures["GET"]


def test_metrics_after_deaths_count_the_living_workers_and_keep_no_files_of_the_dead(service: Service) -> None:
    wait_until(lambda: service.metrics()["hello_workers"] == {(): 3})
    [folder] = Path("/dev/shm").glob(f"hello-metrics-{service.process.pid}")
    files = sorted(folder.iterdir())
    for _ in range(2):
        killed = service.workers[0]
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda killed=killed: killed not in service.workers and len(service.workers) == 3)
        wait_until(lambda: service.metrics()["hello_workers"] == {(): 3})
    assert service.metrics()["hello_worker_starts_total"] == {(): 5}
    assert sorted(folder.iterdir()) == files
    service.process.send_signal(signal.SIGTTOU)  # one worker less, for good
    wait_until(lambda: service.metrics()["hello_workers"] == {(): 2})
    service.stop()
    assert not folder.exists()


def test_metrics_while_a_statement_waits_show_the_pool_and_the_request_in_progress(shared: Service) -> None:
    lock = "BEGIN; LOCK TABLE users IN ACCESS EXCLUSIVE MODE; SELECT pg_sleep(2.5); COMMIT"
    blocker = subprocess.Popen([embedded.binaries() / "psql", "-qc", lock], stdout=subprocess.DEVNULL)
    clients = [threading.Thread(target=shared.call, args=("GET", "/hello/Zoe")) for _ in range(12)]
    time.sleep(0.2)
    for client in clients:
        client.start()
    pools = "database_pool_in_use", "database_pool_waiting"
    wait_until(lambda: all(shared.metrics()[name]["find",] > 0 for name in pools), 2)
    assert shared.metrics()["http_requests_in_progress"][()] > 0
    for client in clients:
        client.join()
    blocker.wait()
    wait_until(lambda: shared.metrics()["http_requests_in_progress"] == {(): 0})
    assert shared.metrics()["database_pool_size"] == {("find",): 3, ("save",): 3}
    assert shared.metrics()["database_pool_in_use"] == {("find",): 0, ("save",): 0}
    assert shared.metrics()["database_pool_waiting"] == {("find",): 0, ("save",): 0}


def test_metrics_without_a_database_count_its_errors_by_class(tmp_path: Path, postgres: embedded.Postgres) -> None:
    with serving(tmp_path, PGHOST="/nowhere") as service:
        assert service.call("GET", "/hello/Zoe").status == 503
        assert service.metrics()["database_errors_total"]["OperationalError",] >= 1
        assert service.metrics()["database_query_duration_seconds_count"]["find",] >= 1
        [line] = service.lines("database")
        assert line["level"] == "warning"
        assert line["message"].startswith('database: find failed: connection to server on socket "/nowhere/')


def test_metrics_of_each_statement_count_its_requests(service: Service) -> None:
    for _ in range(3):
        service.call("PUT", "/hello/Zoe", GREETING)
    service.call("GET", "/hello/Zoe")
    assert service.metrics()["database_batch_size_sum"] == {("find",): 1, ("save",): 3}
    assert service.metrics()["database_query_duration_seconds_count"] == {("find",): 1, ("save",): 3}


def test_metrics_of_odd_methods_and_paths_share_one_name(service: Service) -> None:
    for method in ("PROPFIND", "COPY", "LOCK", "SEARCH", "PURGE"):
        service.call(method, f"/odd/{method}?odd={method}")
    assert service.requests()["other", "unmatched", "404"] == 5
    assert not any(word in name.lower() for key in service.requests() for name in key for word in ("odd", "propfind"))


def test_metrics_count_what_was_no_request(service: Service) -> None:
    for request in (b"sesame\r\n\r\n", b"GET /sesame HTTP/1.1\r\n\r\n", b"GET /" + b"a" * 9000):
        with socket.create_connection(("127.0.0.1", service.port), timeout=10) as client:
            client.sendall(request)
            assert client.recv(1000).startswith(b"HTTP/1.1 4")
    assert {
        status: count for (status,), count in service.metrics()["http_requests_refused_total"].items() if count
    } == {
        "400": 2,
        "414": 1,
    }


def test_metrics_tell_what_runs(shared: Service) -> None:
    version = ".".join(map(str, sys.version_info[:3]))
    assert shared.metrics()["hello_build_info"] in ({("1.0.0", version): 1}, {(version, "1.0.0"): 1})


@pytest.mark.parametrize(
    ("method", "path", "port", "status"),
    [
        ("GET", "/metrics", SHARED_PORT + 1, 200),
        ("HEAD", "/metrics", SHARED_PORT + 1, 200),
        ("POST", "/metrics", SHARED_PORT + 1, 405),
        ("GET", "/hello/Zoe", SHARED_PORT + 1, 404),
        ("GET", "/readyz", SHARED_PORT + 1, 404),
        ("GET", "/metrics", SHARED_PORT, 404),
    ],
)
def test_metrics_are_on_a_port_of_their_own(shared: Service, method: str, path: str, port: int, status: int) -> None:
    response = shared.call(method, path, port=port, Host=f"127.0.0.1:{SHARED_PORT + 1}")
    assert response.status == status
    assert int(response.headers["Content-Length"]) == len(response.content) or method == "HEAD"


def test_metrics_port_listens_on_this_machine_only(shared: Service) -> None:
    [line] = shared.lines("Listening")
    assert f"http://127.0.0.1:{shared.metrics_port}" in line["message"]


def test_metrics_port_0_serves_without_metrics(schema: None, tmp_path: Path) -> None:
    with serving(tmp_path, METRICS_PORT="0") as service:
        assert service.call("GET", "/metrics", route="unmatched").status == 404
        with pytest.raises(urllib.error.URLError):
            service.metrics()


def test_telemetry_off_leaves_the_application_alone(schema: None, tmp_path: Path) -> None:
    with serving(tmp_path, TELEMETRY="off") as service:
        assert "X-Request-Id" not in service.call("GET", "/hello/Zoe").headers
        assert service.lines() == []
        with pytest.raises(urllib.error.URLError):
            service.metrics()


# --- Logs -------------------------------------------------------------------------------------------


def test_a_request_is_logged_with_all_that_may_be_told(service: Service) -> None:
    sent = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "X_Request_Id": "order-66"}
    response = service.call("GET", "/hello/Nobody?secret=1", **sent)
    [line] = service.lines()
    assert TIME.fullmatch(line.pop("time"))
    assert 0 < line.pop("duration_seconds") < 5
    assert line == {
        "level": "info",
        "message": "request",
        "method": "GET",
        "route": HELLO,
        "status": 404,
        "bytes": len(response.content),
        "request_id": "order-66",
        "trace_id": TRACE_ID,
    }


def test_probes_and_metrics_are_not_logged(service: Service) -> None:
    for path in ("/livez", "/readyz"):
        service.call("GET", path)
    service.metrics()
    assert service.lines() == []


def test_lines_of_gunicorn_have_the_same_shape(service: Service) -> None:
    os.kill(service.workers[0], signal.SIGKILL)
    [line] = wait_until(lambda: service.lines("SIGKILL"))
    assert TIME.fullmatch(line.pop("time"))
    assert line.pop("message").startswith("Worker (pid:")
    assert line == {"level": "error"}
    assert service.errors.read_bytes() == b""


def test_lines_of_the_last_moment_are_written_when_it_stops(service: Service) -> None:
    service.call("GET", "/hello/Nobody")
    service.stop()
    assert len(service.lines()) == 1


def test_lines_of_several_workers_do_not_mix_in_a_full_pipe(schema: None, tmp_path: Path) -> None:
    with serving(tmp_path, reader="sleep 3; exec cat") as service:
        work(service)
        wait_until(service.output.read_bytes)
    assert len(service.output.read_bytes()) > 65536  # what a pipe holds
    probes = sum(number for (_, route, _), number in service.answers.items() if route in telemetry.PROBES)
    assert len(service.lines()) == service.answers.total() - probes
    assert len({line["request_id"] for line in service.lines()}) == len(service.lines())


def test_warning_level_leaves_out_requests(schema: None, tmp_path: Path) -> None:
    with serving(tmp_path, LOG_LEVEL="warning") as service:
        service.call("GET", "/hello/Nobody")
        assert service.lines("") == []


def test_text_format_is_for_reading(schema: None, tmp_path: Path) -> None:
    with serving(tmp_path, LOG_FORMAT="text") as service:
        service.call("GET", "/hello/Nobody", X_Request_Id="order-66")
        line = wait_until(lambda: [line for line in service.output.read_text().splitlines() if "GET" in line])[0]
        assert re.fullmatch(rf"{TIME.pattern} info     GET {HELLO} 404 [\d.]+ ms, \d+ bytes, order-66", line)


def test_a_reader_that_went_away_does_not_stop_the_service(schema: None, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "gunicorn", "hello:application"]
    environment = os.environ | {"PORT": str(PORT), "METRICS_PORT": str(PORT + 1), "WEB_CONCURRENCY": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=writing, stderr=subprocess.DEVNULL)
    os.close(writing)
    try:
        assert embedded.wait_for_port(process, PORT)
        os.close(reading)
        for number in range(2 * 100):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}/hello/Nobody", timeout=5)
            assert refused.value.code == 404
            time.sleep(2 * logs.WRITE_SECONDS if number == 0 else 0)
    finally:
        process.terminate()
        process.wait()


def test_no_line_and_no_metric_holds_personal_data(service: Service) -> None:
    secrets = ["Quetzalcoatl", "Wilhelmine", "1987-06-05", "1987-13-45", "hunter2", "Xanthippe", "Świętosława"]
    path = f"/hello/{secrets[0]}"
    service.call("PUT", path, {"dateOfBirth": secrets[2]})
    service.call("PUT", path, {"dateOfBirth": secrets[3]})
    service.call("PUT", path, f"{secrets[1]} {secrets[2]}")
    service.call("GET", f"{path}?password={secrets[4]}")
    service.call("GET", f"/{secrets[5]}/{secrets[0]}")
    service.call("GET", f"{path}1")
    service.call(secrets[5].upper(), path)
    service.call("GET", f"/hello/{urllib.parse.quote(secrets[6])}", User_Agent=secrets[1], Referer=secrets[2])
    service.call("GET", path, X_Request_Id=f"{secrets[1]} {secrets[2]}", traceparent=secrets[4])
    for request in (  # which the parser refuses
        f"GET {path} HTTP/9.9\r\n\r\n",
        f"GET {path} {secrets[1]}\r\n\r\n",
        f"GET {path} HTTP/1.1\r\nHost: a\r\n{secrets[1]} {secrets[4]}: x\r\n\r\n",
        f"PUT {path} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{secrets[1]}\r\n",
        f"GET {path}{'a' * 9000} HTTP/1.1\r\nHost: a\r\n\r\n",
    ):
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", PORT, timeout=10)) as connection:
            connection.connect()
            connection.sock.sendall(request.encode())
            assert connection.sock.recv(100).startswith(b"HTTP/1.1 4")
    assert len(service.lines()) >= 8
    written = service.output.read_text() + service.errors.read_text()
    written += service.call("GET", "/metrics", port=service.metrics_port).content.decode()
    for secret in (*secrets, "Quetz", urllib.parse.quote(secrets[6]), "tosława"):
        assert secret.lower() not in written.lower()


def test_an_exception_is_logged_by_its_class_and_place_only() -> None:
    try:
        int("Quetzalcoatl")
    except ValueError:
        record = logging.LogRecord("hello", logging.ERROR, "", 0, "no %s", ("luck",), sys.exc_info())
    line = json.loads(logs.Formatter().format(record))
    assert line["message"] == "no luck"
    assert re.fullmatch(r"ValueError at test_telemetry\.py:\d+ in test_\w+", line["exception"])
    assert "Quetzalcoatl" not in str(line)


def test_an_exception_that_nothing_caught_is_logged_without_its_text(schema: None, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("""if True:
        import hello
        def application(environ, start_response):
            if environ["PATH_INFO"] == "/hello/Quetzalcoatl":
                raise RuntimeError(environ["PATH_INFO"])
            return hello.application(environ, start_response)
    """)
    with serving(tmp_path, application="broken:application", PYTHONPATH=str(tmp_path)) as service:
        with pytest.raises(http.client.HTTPException):
            service.call("GET", "/hello/Quetzalcoatl")
        [line] = service.lines("uncaught")
        assert re.fullmatch(r"RuntimeError at broken\.py:5 in application", line["exception"])
    assert "Quetzalcoatl" not in service.output.read_text() + service.errors.read_text()


# --- Identity of a request --------------------------------------------------------------------------


@pytest.mark.parametrize("sent", ["a", "order-66", "A.b_c-9", "x" * 128])
def test_a_sane_request_id_is_returned(shared: Service, sent: str) -> None:
    assert shared.call("GET", "/hello/Nobody", X_Request_Id=sent).headers["X-Request-Id"] == sent


@pytest.mark.parametrize("sent", ["", " ", "x" * 129, "a b", 'a"b', "a,b", "é", "a\\n", "<script>", "{}", "a/b"])
def test_another_request_id_is_replaced(shared: Service, sent: str) -> None:
    headers = shared.call("GET", "/hello/Nobody", X_Request_Id=sent.encode("latin-1")).headers
    assert re.fullmatch("[0-9a-f]{32}", headers["X-Request-Id"])


def test_request_ids_are_made_for_every_answer_and_differ(shared: Service) -> None:
    paths = ["/hello/Nobody", "/hello/4", "/nowhere", "/livez", "/readyz", "/hello/Nobody"]
    assert len({shared.call("GET", path).headers["X-Request-Id"] for path in paths}) == len(paths)


@pytest.mark.parametrize(
    "sent",
    [
        f"00-{TRACE_ID}-{PARENT_ID}-00",
        f"00-{TRACE_ID}-{PARENT_ID}-ff",
        f"01-{TRACE_ID}-{PARENT_ID}-01",
        f"01-{TRACE_ID}-{PARENT_ID}-01-more",
    ],
)
def test_a_valid_traceparent_gives_its_trace_id(sent: str) -> None:
    assert telemetry.trace_id_of({"HTTP_TRACEPARENT": sent}) == TRACE_ID


@pytest.mark.parametrize(
    "sent",
    [
        "",
        TRACE_ID,
        f"00-{'0' * 32}-{PARENT_ID}-01",
        f"00-{TRACE_ID}-{'0' * 16}-01",
        f"ff-{TRACE_ID}-{PARENT_ID}-01",
        f"00-{TRACE_ID}-{PARENT_ID}-01-more",
        f"00-{TRACE_ID}-{PARENT_ID}-01-",
        f"01-{TRACE_ID}-{PARENT_ID}-01more",
        f"00-{TRACE_ID.upper()}-{PARENT_ID}-01",
        f"00-{TRACE_ID[1:]}-{PARENT_ID}-01",
        f"00-{TRACE_ID}-{PARENT_ID}-1",
        f"0-{TRACE_ID}-{PARENT_ID}-01",
        f"00-{TRACE_ID}-{PARENT_ID}",
        f"00-{TRACE_ID}-{PARENT_ID}-01,00-{TRACE_ID}-{PARENT_ID}-01",
        f"00_{TRACE_ID}_{PARENT_ID}_01",
    ],
)
def test_another_traceparent_gives_no_trace_id(sent: str) -> None:
    assert telemetry.trace_id_of({"HTTP_TRACEPARENT": sent}) == ""


# --- Dashboard and alerts ---------------------------------------------------------------------------

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("promtool") and shutil.which("prometheus")),
    reason="promtool and prometheus are not installed: on Debian, apt-get install prometheus",
)
RULES = [rule for group in yaml.safe_load((MONITORING / "rules.yml").read_text())["groups"] for rule in group["rules"]]
ALERTS = [rule for rule in RULES if "alert" in rule]
DASHBOARD = json.loads((MONITORING / "dashboard.json").read_text())


def promtool(*arguments: Any, **options: Any) -> str:
    done = subprocess.run(["promtool", *arguments], check=False, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@needs_prometheus
def test_promtool_accepts_the_rules() -> None:
    assert "SUCCESS" in promtool("check", "rules", MONITORING / "rules.yml")


@needs_prometheus
def test_alerts_fire_when_they_should_and_not_otherwise() -> None:
    assert "SUCCESS" in promtool("test", "rules", MONITORING / "rules_test.yml")


@needs_prometheus
def test_promtool_accepts_the_scrape_settings() -> None:
    assert "SUCCESS" in promtool("check", "config", MONITORING / "prometheus.yml")


@needs_prometheus
def test_promtool_finds_nothing_wrong_with_the_metrics(shared: Service) -> None:
    shared.call("GET", "/hello/Nobody")
    assert (
        promtool("check", "metrics", input=shared.call("GET", "/metrics", port=shared.metrics_port).content.decode())
        == ""
    )


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_every_alert_is_explained_in_the_runbook_and_tested(alert: dict[str, Any]) -> None:
    assert {"summary", "description"} < {*alert["annotations"]}
    assert alert["annotations"]["runbook_url"] == f"monitoring/runbook.md#{alert['alert'].lower()}"
    assert f"\n## {alert['alert']}\n" in (MONITORING / "runbook.md").read_text()
    tests = yaml.safe_load((MONITORING / "rules_test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"] if case["alertname"] == alert["alert"]]
    assert {bool(case.get("exp_alerts")) for case in cases} == {True, False}


def query(expression: str) -> list[float]:
    """Return the values that the running Prometheus has for an expression now."""
    url = f"http://127.0.0.1:{PROMETHEUS_PORT}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=10) as response:
        return [float(sample["value"][1]) for sample in json.load(response)["data"]["result"]]
    return []


@pytest.fixture(scope="module")
def prometheus(shared: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Prometheus with our settings that scrapes a loaded service, each second instead of each quarter minute."""
    folder = tmp_path_factory.mktemp("prometheus")
    settings = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    settings["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    [job] = settings["scrape_configs"]
    del job["dns_sd_configs"]
    job["static_configs"] = [{"targets": [f"127.0.0.1:{shared.metrics_port}"]}]
    (folder / "prometheus.yml").write_text(yaml.dump(settings))
    shutil.copy(MONITORING / "rules.yml", folder)
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    command += [f"--web.listen-address=127.0.0.1:{PROMETHEUS_PORT}", "--log.level=error"]
    with subprocess.Popen(command) as process:
        try:
            wait_until(lambda: query("up") == [1], 20)
            before = time.monotonic()
            while time.monotonic() - before < 4:
                work(shared)
            wait_until(lambda: query('job:http_requests:error_ratio_rate6h{job="hello"}'))
            yield
        finally:
            process.terminate()


def expressions() -> Iterator[Any]:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            expression = target["expr"].replace("$__rate_interval", "1m").replace("$instance", ".*")
            yield pytest.param(expression, id=f"{panel['title']} {target['refId']}")
    for alert in ALERTS:  # without the threshold
        expression = re.sub(r" (==|>) [\d.]+(?= |$)", "", re.sub(r"absent\((.*)\)", r"\1", alert["expr"]))
        yield pytest.param(expression, id=alert["alert"])


@needs_prometheus
@pytest.mark.parametrize("expression", [*expressions()])
def test_every_expression_has_data_in_a_real_prometheus(prometheus: None, expression: str) -> None:
    assert "$" not in expression
    assert any(math.isfinite(value) for value in wait_until(lambda: query(expression), 5))


@needs_prometheus
def test_no_alert_fires_while_all_is_well(prometheus: None) -> None:
    assert query('ALERTS{alertstate="firing"}') == []
