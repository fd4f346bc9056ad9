"""The settings of the server: every one of them read, bounded, and rejected in one line."""

import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from server import settings
from server.settings import SETTINGS, Setting
from tests.support.network import free_port

ROOT = Path(__file__).parents[1]
CHECK = [sys.executable, "-m", "gunicorn", "--check-config", "hello:application"]
ADDRESSES = {"HOST", "METRICS_HOST"}  # which tests/test_options.py tests


def check(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Check gunicorn's configuration in an environment."""
    command = command or (*CHECK,)
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=False, capture_output=True, text=True)


def wrong_values(setting: Setting) -> Iterator[str]:
    """Return values that a setting cannot have."""
    if isinstance(setting.default, str):
        yield from ("no-such-word..", "\x7f")
        return
    assert setting.minimum is not None
    assert setting.maximum is not None
    yield from ("x", "0x10", "nan", "inf", "-1", "1e400", "9" * 5000)
    yield str(setting.minimum - 1)
    yield str(setting.maximum + 1)
    if isinstance(setting.default, int):
        yield str(setting.minimum + 0.5)


CHECKED = [setting for setting in SETTINGS.values() if setting.name not in ADDRESSES]
WRONG = [(setting.name, value) for setting in CHECKED for value in wrong_values(setting)]


def right_values(setting: Setting) -> Iterator[str]:
    """Return values at the edges of what a setting can have, and none at all, which means the default."""
    yield from ("", str(setting.default))
    yield from setting.choices or ("localhost", "0.0.0.0") if isinstance(setting.default, str) else ()
    if setting.maximum is not None:
        yield from (str(setting.minimum), f"{setting.maximum:.0f}")


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda text: text[:20])
def test_a_wrong_value_is_one_line_that_names_the_setting(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stopped:
        read_again(SETTINGS[name])
    message = str(stopped.value)
    assert message.startswith(f"{name}={value!r} must be ")
    assert message.endswith(f"; the default is {SETTINGS[name].default}")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "value"), [(setting.name, value) for setting in SETTINGS.values() for value in right_values(setting)]
)
def test_a_right_value_is_read(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    default = SETTINGS[name].default
    assert read_again(SETTINGS[name]) == type(default)(value or default)


def read_again(setting: Setting) -> int | float | str:
    """Read a setting as settings.py does, from the environment of now."""
    if isinstance(setting.default, str):
        return settings.word(setting.name, setting.default, setting.meaning, setting.choices)
    assert setting.minimum is not None
    assert setting.maximum is not None
    return settings.number(
        setting.name, setting.default, setting.unit, setting.minimum, setting.meaning, setting.maximum
    )


def test_a_wrong_number_of_workers_is_one_line_and_no_traceback() -> None:
    done = check(sys.executable, "-c", "import server.settings", WEB_CONCURRENCY="no..such")
    assert done.returncode == 1
    assert done.stderr.startswith("WEB_CONCURRENCY='no..such' must be ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.parametrize(
    "name", sorted({*SETTINGS} - ADDRESSES - {"WEB_CONCURRENCY"})
)  # gunicorn itself reads that first
def test_a_wrong_value_stops_gunicorn_with_one_line_and_no_traceback(name: str) -> None:
    done = check(**{name: "no..such"})
    assert done.returncode == 1
    assert done.stderr.startswith(f"{name}='no..such' must be ")
    assert done.stderr.count("\n") == 1


def test_two_equal_ports_stop_the_start_with_one_line() -> None:
    done = check(PORT="9000", METRICS_PORT="9000")
    assert done.returncode == 1
    assert done.stderr == "PORT and METRICS_PORT are both 9000: choose another for one of them\n"
    assert check(PORT="9000", METRICS_PORT="9000", TELEMETRY="off").returncode == 0


@pytest.mark.parametrize("name", ["TZ", "QUEUE_TIMEOUT"])
def test_a_wrong_value_of_the_application_stops_gunicorn_with_one_line(name: str) -> None:
    own = {name: "no..such", "PORT": str(free_port()), "METRICS_PORT": "0", "WEB_CONCURRENCY": "3"}
    done = check(sys.executable, "-m", "gunicorn", "hello:application", **own)
    assert done.returncode == 3
    assert done.stderr.startswith(f"{name}='no..such' ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("metrics_port", "addresses"), [(8081, ["[::1]:8080", "127.0.0.1:8081"]), (0, ["[::1]:8080"])])
def test_the_addresses_of_the_service(monkeypatch: pytest.MonkeyPatch, metrics_port: int, addresses: list[str]) -> None:
    monkeypatch.setattr(settings, "HOST", "::1")
    monkeypatch.setattr(settings, "METRICS_PORT", metrics_port)
    assert runpy.run_path(str(ROOT / "gunicorn.conf.py"))["bind"] == addresses


def test_the_attribute_of_each_setting_has_its_name_and_type() -> None:
    for setting in SETTINGS.values():
        assert type(getattr(settings, setting.name)) is type(setting.default)
        assert setting.meaning and setting.unit
