"""The settings of the server: every one of them read, bounded, and rejected in one line."""

import os
import runpy
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server import settings
from server.settings import SETTINGS, Setting
from tests.support.network import free_port

ROOT = Path(__file__).parents[1]
ADDRESSES = {"HOST", "METRICS_HOST"}  # which tests/test_options.py tests
CHECKED = [setting for setting in SETTINGS.values() if setting.name not in ADDRESSES]


def read_settings() -> dict[str, Any]:
    """Run server/settings.py in the environment of now, and return its names."""
    return runpy.run_path(str(ROOT / "server/settings.py"))


def wrong_values(setting: Setting) -> Iterator[str]:
    """Return values that a setting cannot have."""
    if setting.minimum is None or setting.maximum is None:
        yield from ("no-such-word..", "\x7f")
        return
    yield from ("x", "0x10", "nan", "inf", "-1", "1e400", "9" * 5000)
    yield str(setting.minimum - 1)
    yield str(setting.maximum + 1)
    if isinstance(setting.default, int):
        yield str(setting.minimum + 0.5)


def right_values(setting: Setting) -> Iterator[str]:
    """Return values at the edges of what a setting can have, and none at all, which means the default."""
    yield from ("", str(setting.default))
    if setting.minimum is None or setting.maximum is None:
        yield from setting.choices or ("localhost", "0.0.0.0")
    else:
        yield from (str(setting.minimum), f"{setting.maximum:.0f}")


@pytest.mark.parametrize("setting", CHECKED, ids=lambda setting: setting.name)
def test_a_wrong_value_is_one_line_that_names_the_setting(monkeypatch: pytest.MonkeyPatch, setting: Setting) -> None:
    for value in wrong_values(setting):
        monkeypatch.setenv(setting.name, value)
        with pytest.raises(SystemExit) as stopped:
            read_settings()
        message = str(stopped.value)
        assert message.startswith(f"{setting.name}={value!r} must be ")
        assert message.endswith(f"; the default is {setting.default}")
        assert "\n" not in message


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=lambda setting: setting.name)
def test_a_right_value_is_read(monkeypatch: pytest.MonkeyPatch, setting: Setting) -> None:
    for text in right_values(setting):
        monkeypatch.setenv(setting.name, text)
        value = read_settings()[setting.name]
        assert type(value) is type(setting.default)
        assert value == type(value)(text or setting.default)


def test_two_equal_ports_are_right_only_without_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "9000")
    monkeypatch.setenv("METRICS_PORT", "9000")
    with pytest.raises(SystemExit, match=r"^PORT and METRICS_PORT are both 9000: choose another for one of them\Z"):
        read_settings()
    monkeypatch.setenv("TELEMETRY", "off")
    assert read_settings()["PORT"] == 9000


def start(**environment: str) -> subprocess.CompletedProcess[str]:
    """Start a service that should end at once."""
    command = [sys.executable, "-m", "gunicorn", "hello:application"]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=False, capture_output=True, text=True)


def test_a_wrong_value_stops_gunicorn_with_one_line_and_no_traceback() -> None:
    done = start(LOG_FORMAT="no..such")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "LOG_FORMAT='no..such' must be one of auto, json, text; the default is auto\n"


def test_a_wrong_value_of_the_application_stops_gunicorn_with_one_line() -> None:
    done = start(TZ="no..such", PORT=str(free_port()), METRICS_PORT="0", WEB_CONCURRENCY="2")
    assert done.returncode == 3
    assert done.stderr.startswith("TZ='no..such' ")
    assert done.stderr.count("\n") == 1


def test_a_wrong_value_of_the_application_stops_all_workers_at_once() -> None:
    began = time.monotonic()
    done = start(TZ="no..such", PORT=str(free_port()), METRICS_PORT="0", WEB_CONCURRENCY="12", GRACEFUL_TIMEOUT="60")
    assert done.returncode == 3
    assert time.monotonic() - began < 20  # the last one would wait for 22 s


@pytest.mark.parametrize(
    ("name", "value", "addresses"),
    [
        ("HOST", "::1", ["[::1]:8080", "127.0.0.1:8081"]),
        ("METRICS_PORT", 0, ["127.0.0.1:8080"]),
        ("TELEMETRY", "off", ["127.0.0.1:8080"]),
    ],
)
def test_the_addresses_of_the_service(
    monkeypatch: pytest.MonkeyPatch, name: str, value: Any, addresses: list[str]
) -> None:
    monkeypatch.setattr(settings, name, value)
    assert runpy.run_path(str(ROOT / "gunicorn.conf.py"))["bind"] == addresses
