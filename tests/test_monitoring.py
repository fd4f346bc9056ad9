"""The alerts, their runbook and the dashboard, against a real Prometheus that scrapes a real service."""

import json
import math
import re
import shutil
import subprocess
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg2.errors
import pytest
import yaml

import hello
from tests.support.monitored import MonitoredService
from tests.support.network import LOOPBACK, free_port
from tests.support.wait import wait_until

MONITORING = Path(__file__).parents[1] / "monitoring"
RULES = [rule for group in yaml.safe_load((MONITORING / "rules.yml").read_text())["groups"] for rule in group["rules"]]
ALERTS = [rule for rule in RULES if "alert" in rule]
PANELS = [panel for panel in json.loads((MONITORING / "dashboard.json").read_text())["panels"] if "targets" in panel]

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("promtool") and shutil.which("prometheus")),
    reason="promtool and prometheus are not installed: on Debian, apt-get install prometheus",
)


class Prometheus:
    """A Prometheus with our settings that scrapes a service each second instead of every 15."""

    def __init__(self, folder: Path, service: MonitoredService) -> None:
        self.port = free_port()
        settings = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
        settings["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        [job] = settings["scrape_configs"]
        del job["dns_sd_configs"]
        job["static_configs"] = [{"targets": [f"{LOOPBACK}:{service.metrics_port}"]}]
        (folder / "prometheus.yml").write_text(yaml.dump(settings))
        shutil.copy(MONITORING / "rules.yml", folder)
        command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        command += [f"--web.listen-address={LOOPBACK}:{self.port}", "--log.level=error"]
        self.process = subprocess.Popen(command)

    def query(self, expression: str) -> list[float]:
        """Return the values of an expression now."""
        url = f"http://{LOOPBACK}:{self.port}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
        try:
            with urllib.request.urlopen(url, timeout=10) as response:
                return [float(sample["value"][1]) for sample in json.load(response)["data"]["result"]]
        except OSError:  # it is starting
            return []

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait()


@pytest.fixture(scope="module")
def service(database: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[MonitoredService]:
    with MonitoredService(tmp_path_factory.mktemp("service"), database, WEB_CONCURRENCY="1") as service:
        yield service


@pytest.fixture(scope="module")
def prometheus(service: MonitoredService, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that has seen requests of every kind."""
    server = Prometheus(tmp_path_factory.mktemp("prometheus"), service)
    done = threading.Event()

    def work() -> None:
        while not done.wait(0.1):
            service.work(clients=1, rounds=1)

    client = threading.Thread(target=work)
    client.start()
    try:
        wait_until(lambda: server.query("up") == [1], 30)
        wait_until(lambda: server.query('job:http_requests:error_ratio_rate6h{job="hello"}'), 30)
        yield server
    finally:
        done.set()
        client.join()
        server.stop()


def promtool(*arguments: Any, **options: Any) -> str:
    done = subprocess.run(["promtool", *arguments], check=False, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def expressions() -> Iterator[Any]:
    """Return each expression of the dashboard and of the alerts, these without their thresholds."""
    for panel in PANELS:
        for target in panel["targets"]:
            expression = target["expr"].replace("$__rate_interval", "1m").replace("$instance", ".*")
            yield pytest.param(expression, id=f"{panel['title']} {target['refId']}")
    for alert in ALERTS:
        expression = re.sub(r" (==|>) [\d.]+(?= |$)", "", re.sub(r"absent\((.*)\)", r"\1", alert["expr"]))
        yield pytest.param(expression, id=alert["alert"])


@needs_prometheus
@pytest.mark.parametrize(
    ("command", "what", "file"),
    [("check", "rules", "rules.yml"), ("check", "config", "prometheus.yml"), ("test", "rules", "rules_test.yml")],
)
def test_promtool_accepts_the_files_and_alerts_fire_just_when_they_should(command: str, what: str, file: str) -> None:
    assert "SUCCESS" in promtool(command, what, MONITORING / file)


@needs_prometheus
def test_promtool_finds_nothing_wrong_with_the_metrics(service: MonitoredService) -> None:
    service.ask("GET", "/hello/Nobody")
    assert promtool("check", "metrics", input=service.ask_for_metrics().content.decode()) == ""


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_every_alert_is_explained_in_the_runbook_and_tested(alert: dict[str, Any]) -> None:
    assert {"summary", "description"} < {*alert["annotations"]}
    assert alert["annotations"]["runbook_url"] == f"monitoring/runbook.md#{alert['alert'].lower()}"
    assert f"\n## {alert['alert']}\n" in (MONITORING / "runbook.md").read_text()
    tests = yaml.safe_load((MONITORING / "rules_test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"] if case["alertname"] == alert["alert"]]
    assert {bool(case.get("exp_alerts")) for case in cases} == {True, False}


@pytest.mark.parametrize("reason", re.findall(r"^  - `(.+?)`", (MONITORING / "runbook.md").read_text(), re.MULTILINE))
def test_every_reason_of_the_runbook_can_be_logged(reason: str) -> None:
    of_libpq = "connection to server ... failed"
    assert reason == of_libpq or hasattr(psycopg2.errors, reason) or reason in Path(hello.__file__).read_text()


@needs_prometheus
@pytest.mark.parametrize("expression", [*expressions()])
def test_every_expression_has_data_in_a_real_prometheus(prometheus: Prometheus, expression: str) -> None:
    assert "$" not in expression
    values = wait_until(lambda: prometheus.query(expression), 30)
    assert any(math.isfinite(value) for value in values)


@needs_prometheus
def test_no_alert_fires_while_all_is_well(prometheus: Prometheus) -> None:
    assert prometheus.query('ALERTS{alertstate="firing"}') == []
