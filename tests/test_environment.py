"""The virtual environments that make creates, and `make clean`."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pip
import pytest

from tools import environment
from tools.processes import Processes, start_time

ROOT = Path(__file__).parents[1]

# --- Cleaning ---------------------------------------------------------------------------------------


def clean(checkout: Path, with_data: str) -> subprocess.CompletedProcess[str]:
    """Run `make clean` in a checkout, without a Docker engine."""
    program(checkout / "bin" / "docker", "exit 1")
    return make(checkout, "clean", f"WITH_DATA={with_data}", PATH=f"{checkout / 'bin'}:{os.environ['PATH']}")


@pytest.fixture
def used(checkout: Path) -> tuple[Path, Path]:
    """The folders .venv and .postgres of a checkout, as `make run` leaves them."""
    venv, folder = checkout / ".venv", checkout / ".postgres"
    venv.mkdir()
    (venv / "pyvenv.cfg").touch()
    (folder / "data").mkdir(parents=True)
    return venv, folder


@pytest.mark.parametrize("with_data", ["no", "yes"])
def test_clean_refuses_while_make_run_runs(checkout: Path, used: tuple[Path, Path], with_data: str) -> None:
    venv, folder = used
    processes = Processes(folder / "lock", stop_seconds=10)
    done = clean(checkout, with_data)
    processes.stop()
    assert done.returncode != 0
    assert done.stderr.splitlines()[0].startswith(f"Another `make run` (process {os.getpid()}) uses .postgres: ")
    assert venv.exists()
    assert (folder / "data").exists()


def test_clean_ends_what_a_killed_make_run_left(checkout: Path, used: tuple[Path, Path]) -> None:
    venv, folder = used
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as left:
        (folder / "lock").write_text(f"{left.pid} {start_time(left.pid)} {int(signal.SIGTERM)}\n")
        done = clean(checkout, "yes")
        assert left.wait(10) == -signal.SIGTERM
    assert done.returncode == 0, done.stderr
    assert not venv.exists()
    assert not folder.exists()


# --- The virtual environment ------------------------------------------------------------------------


@pytest.fixture
def checkout() -> Iterator[Path]:
    """A copy of what makes the virtual environment, with nothing to install, in a folder that every user may enter."""
    folder = Path(tempfile.mkdtemp(prefix="hello-checkout-"))
    folder.chmod(0o755)
    for name in ("Makefile", "tools", "requirements"):
        subprocess.run(["cp", "-R", ROOT / name, folder / name], check=True)
    for name in ("run", "bench"):
        (folder / "requirements" / f"{name}.txt").write_text("")
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


def make(folder: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    own = ("MAKE", "VENV", "PYTHON", "DATA", "WITH_DATA")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(own)} | settings
    command = [shutil.which("make") or "make", "--no-print-directory", *arguments]
    if os.geteuid() == 0 and folder.stat().st_mode & 0o222 == 0:  # root could write to it
        command = ["setpriv", "--reuid=nobody", "--clear-groups", *command]
    return subprocess.run(command, cwd=folder, env=clean, check=False, text=True, capture_output=True, timeout=120)


def make_environment(folder: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return make(folder, "run-environment", *arguments, **settings)


def program(path: Path, script: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture(scope="module")
def copied_venv(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PYTHONPATH with a module `venv` that copies a virtual environment: pip takes seconds to install itself."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "made"], check=True)
    [packages] = (folder / "made" / "lib").glob("python*/site-packages")
    shutil.copytree(Path(pip.__file__).parent, packages / "pip")
    copy = f"shutil.copytree({str(folder / 'made')!r}, sys.argv[1], symlinks=True, dirs_exist_ok=True)"
    (folder / "venv.py").write_text(f"import shutil, sys\n{copy}\n")
    return str(folder)


PRETEND = f"""exec {sys.executable} -c 'import sys; sys.version_info = (3, 9, 18); exec(sys.argv.pop(1))' "$2" """


def test_environment_is_created_once_and_recreated_after_an_interruption(checkout: Path) -> None:
    install = [sys.executable, "tools/environment.py", ".venv", "run"]
    for moment in (0.1, 0.5, 1.5):
        process = subprocess.Popen(install, cwd=checkout, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(moment)  # the moment, not a wait
        process.send_signal(signal.SIGTERM)
        process.wait(20)
    done = make_environment(checkout)
    assert done.returncode == 0
    assert "downloads about 35 MB and needs 140 MB of disk ..." in done.stdout.splitlines()[-1]
    subprocess.run([checkout / ".venv" / "bin" / "python", "-m", "pip", "--version"], check=True, capture_output=True)
    assert make_environment(checkout).stdout == ""


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        ("true", ""),
        ("rm .venv/bin/python; ln -s /missing/python3 .venv/bin/python", "its Python is missing"),
        ("rm .venv/bin/python; ln -s /bin/false .venv/bin/python", "its Python does not work"),
        ("mv old .venv/bin/python", "it has Python 3.9"),
        ("rm -r .venv/lib", "its Python does not work"),
        ("touch .venv/incomplete; rm .venv/pyvenv.cfg", "its installation was not finished"),
    ],
)
def test_environment_that_cannot_be_used_has_a_reason(tmp_path: Path, spoil: str, reason: str) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / ".venv"], check=True)
    [packages] = (tmp_path / ".venv" / "lib").glob("python*/site-packages")
    (packages / "pip.py").touch()
    program(tmp_path / "old", PRETEND)
    subprocess.run(["sh", "-ec", spoil], cwd=tmp_path, check=True)
    assert environment.Environment(tmp_path / ".venv", "run").fault(exactly=False) == reason


def test_environment_of_another_version_than_the_python_asked_for_has_a_reason(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / ".venv"], check=True)
    newer = "print('3.99')"
    program(tmp_path / ".venv" / "bin" / "python3.99", f'exec {sys.executable} -c "{newer}"')
    (tmp_path / ".venv" / "bin" / "python").unlink()
    (tmp_path / ".venv" / "bin" / "python").symlink_to("python3.99")
    assert environment.Environment(tmp_path / ".venv", "run").fault(exactly=True) == "it has Python 3.99"
    assert environment.Environment(tmp_path / ".venv", "run").fault(exactly=False) == ""


def test_environment_whose_removal_was_interrupted_is_recreated(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / ".venv"], check=True)
    emptied = environment.Environment(tmp_path / ".venv", "run")
    emptied.empty()
    assert list((tmp_path / ".venv").iterdir()) == [emptied.incomplete]
    assert emptied.fault(exactly=False) == "its installation was not finished"


def test_empty_folder_becomes_a_virtual_environment(checkout: Path, copied_venv: str) -> None:
    (checkout / ".venv").mkdir()
    done = make_environment(checkout, PYTHONPATH=copied_venv)
    assert (done.returncode, done.stderr) == (0, "")
    assert (checkout / ".venv" / "pyvenv.cfg").exists()


def test_environment_can_be_created_after_that_of_the_benchmarks(checkout: Path, copied_venv: str) -> None:
    assert make(checkout, "bench-environment", PYTHONPATH=copied_venv).returncode == 0
    assert (checkout / ".venv" / "bench" / "pyvenv.cfg").exists()
    assert make_environment(checkout, PYTHONPATH=copied_venv).returncode == 0


def test_folder_that_is_no_virtual_environment_is_left_alone(checkout: Path) -> None:
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "letter.txt").write_text("Dear Zoe")
    assert (
        make_environment(checkout)
        .stderr.splitlines()[0]
        .endswith(".venv is not a virtual environment: name another folder, as in `make run VENV=~/venv`.")
    )
    assert (checkout / ".venv" / "letter.txt").exists()


def test_python_that_cannot_be_used_says_so_in_one_line(checkout: Path, tmp_path: Path) -> None:
    old = program(tmp_path / "python3.9", PRETEND)
    (tmp_path / "venv.py").write_text("raise ImportError")
    without_venv = program(tmp_path / "python3", f'PYTHONPATH={tmp_path} exec {sys.executable} "$@"')
    answers = {
        "missing": "PYTHON=missing is no program: name one with PYTHON=/path/to/python3.",
        old: f"PYTHON={old} cannot be used: hello needs Python 3.11 or newer.",
        without_venv: "This Python has no venv module: install it (on Debian: apt-get install python3-venv).",
    }
    for python, answer in answers.items():
        assert make_environment(checkout, f"PYTHON={python}").stderr.splitlines()[0] == answer


def test_machine_without_python_says_so_in_one_line(checkout: Path, tmp_path: Path) -> None:
    assert make_environment(checkout, PATH=str(tmp_path)).stderr.splitlines()[0] == (
        "hello needs Python 3.11 or newer on the PATH: install it, or name one with PYTHON=/path/to/python3."
    )


def test_read_only_checkout_says_so_in_one_line(checkout: Path) -> None:
    checkout.chmod(0o555)
    assert make_environment(checkout).stderr.splitlines()[0] == (
        f"{checkout}/.venv cannot be written: name other folders, as in `make run VENV=~/venv DATA=~/data`."
    )


def test_sizes_are_known_for_every_environment() -> None:
    names = {path.stem for path in environment.REQUIREMENTS.glob("*.txt")} - {"service"}
    assert set(environment.SIZES) == names
