"""The virtual environments that make creates, `make clean`, and a person's own files beside both."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.make import environment, link_venv, make
from tests.support.network import free_port
from tests.support.wait import wait_until

ROOT = Path(__file__).parents[1]
MARK = ".made-by-make"


def program(path: Path, script: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def checkout() -> Iterator[Path]:
    """A copy of what `make run` needs, with nothing to install, in a folder that every user may enter."""
    folder = Path(tempfile.mkdtemp(prefix="hello-checkout-"))
    folder.chmod(0o755)
    names = "Makefile tools requirements docker-compose.yml server hello.py schema.sql gunicorn.conf.py openapi.yaml"
    subprocess.run(["cp", "-R", *names.split(), folder], cwd=ROOT, check=True)
    for path in (folder / "requirements").iterdir():
        path.write_text("")
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


# --- Cleaning ---------------------------------------------------------------------------------------


def clean(folder: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run `make clean` without a Docker engine."""
    program(folder / "without-engine" / "docker", "exit 1")
    return make(folder, "clean", *arguments, PATH=f"{folder / 'without-engine'}:{os.environ['PATH']}", **settings)


@pytest.fixture
def made(checkout: Path) -> tuple[Path, Path]:
    """The folders .venv and .postgres of a checkout, as `make run` leaves them."""
    venv, folder = checkout / ".venv", checkout / ".postgres"
    for made in (venv, folder / "data"):
        made.mkdir(parents=True)
        (made / MARK).touch()
    (folder / "lock").touch()
    return venv, folder


def test_clean_removes_the_environment_and_data_only_if_asked(checkout: Path, made: tuple[Path, Path]) -> None:
    venv, folder = made
    assert clean(checkout).returncode == 0
    assert not venv.exists()
    assert (folder / "data").exists()
    assert clean(checkout, WITH_DATA="yes").returncode == 0
    assert (folder / "data").exists()
    assert clean(checkout, "WITH_DATA=yes").returncode == 0
    assert not folder.exists()


def test_clean_refuses_while_make_run_runs(checkout: Path, made: tuple[Path, Path]) -> None:
    venv, folder = made
    with (folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for with_data in ("no", "yes"):
            done = clean(checkout, f"WITH_DATA={with_data}")
            assert done.returncode != 0
            assert done.stderr.splitlines()[0] == "A `make run` uses .postgres: stop it first. Nothing was removed."
            assert venv.exists()
            assert (folder / "data").exists()


def test_clean_continues_where_one_was_interrupted(checkout: Path, made: tuple[Path, Path]) -> None:
    _, folder = made
    (folder / "data").rename(folder / f"{MARK}-removed")
    (folder / f"{MARK}-data-1").mkdir()
    assert clean(checkout, "WITH_DATA=yes").returncode == 0
    assert not folder.exists()


# Folders that people have: a DATA with a cluster of their own, a VENV of their own, and files beside what make makes
OWN = ["stuff/letter.txt", "stuff/lock", "stuff/data.new-photos/photo", "ml/data/model", "own/bin/letter.txt"]
OWN += ["own/pyvenv.cfg", "letter.txt", ".env", "secrets/password", "notes/__pycache__/notes.pyc", ".coverage.mine"]
OWN += [".ruff_cache/letter.txt", ".hypothesis/letter.txt"]


@pytest.fixture
def own(checkout: Path) -> dict[str, str]:
    """A person's own files in a checkout, by their name."""
    for name in OWN:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(f"Dear Zoe, this is {name}.")
    return read(checkout)


def read(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in OWN if (folder / name).exists()}


@pytest.mark.parametrize("folders", [["DATA=stuff"], ["DATA=ml"], ["VENV=own"], ["DATA=.", "VENV=."]], ids=str)
def test_clean_leaves_what_make_did_not_make(checkout: Path, own: dict[str, str], folders: list[str]) -> None:
    clean(checkout, *folders, "WITH_DATA=yes")
    assert read(checkout) == own
    clean(checkout, "WITH_DATA=yes", **dict(folder.split("=") for folder in folders))
    assert read(checkout) == own


def test_targets_in_a_persons_folders_leave_their_files(checkout: Path, own: dict[str, str]) -> None:
    venv = link_venv(checkout / "linked")
    (venv / "installed-run.txt").write_text("")
    settings = environment(PORT=str(free_port()), METRICS_PORT="0")
    with subprocess.Popen(["make", "run", "DATA=stuff", "VENV=linked"], cwd=checkout, env=settings) as run:
        wait_until((checkout / "stuff" / "data" / "postmaster.pid").exists, 30)
        run.terminate()
    for target in ("format", "coverage"):
        make(checkout, target, "VENV=linked", "ARGS=--version")
    done = clean(checkout, "DATA=stuff", "VENV=linked", "WITH_DATA=yes")
    assert done.returncode == 0, done.stderr
    assert "Kept: linked, because make did not make it." in done.stdout
    assert not (checkout / "stuff" / "data").exists()
    assert read(checkout) == own


# --- The virtual environment ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PYTHONPATH whose `venv` copies an environment with a `pip` that does nothing: the real ones take seconds.

    With a path as HANG in the environment, this `venv` creates a file there and never ends.
    """
    folder = tmp_path_factory.mktemp("quick")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "made"], check=True)
    [packages] = (folder / "made" / "lib").glob("python*/site-packages")
    (packages / "pip.py").touch()
    (folder / "venv.py").write_text(f"""
import os, shutil, sys, time
if __name__ == "__main__":
    [folder] = sys.argv[1:]
    shutil.copytree({str(folder / "made")!r}, folder, symlinks=True, dirs_exist_ok=True)
    if hang := os.environ.get("HANG"):
        open(hang, "w").close()
        time.sleep(60)
""")
    return folder


@pytest.fixture
def venv(checkout: Path, quick: Path) -> Path:
    """The folder of an environment as make leaves it, with a file of an earlier installation in it."""
    folder = checkout / ".venv"
    shutil.copytree(quick / "made", folder, symlinks=True)
    for name in (MARK, "installed-run.txt", "earlier"):
        (folder / name).touch()
    return folder


def make_environment(folder: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return make(folder, "run-environment", *arguments, **settings)


def test_environment_is_made_once_in_the_folder_that_was_named(checkout: Path, quick: Path, venv: Path) -> None:
    (venv / "earlier").unlink()
    home = checkout / "home"
    (home / "my venv").mkdir(parents=True)
    settings = {"PYTHONPATH": str(quick), "HOME": str(home)}
    done = make_environment(checkout, "VENV=~/my venv", **settings)
    assert (done.returncode, done.stderr) == (0, "")
    assert make_environment(checkout, "VENV=~/my venv", **settings).stdout == ""
    assert [path.name for path in home.iterdir()] == ["my venv"]
    assert sorted(os.listdir(home / "my venv")) == sorted(os.listdir(venv))


PRETEND = f"""exec {sys.executable} -c 'import sys; sys.version_info = (3, 9, 18); exec(sys.argv.pop(1))' "$2" """
SPOILED = {
    "its Python is missing": "rm .venv/bin/python; ln -s /missing/python3 .venv/bin/python",
    "its Python is too old": "rm .venv/bin/python; mv old .venv/bin/python",
    "its packages are missing": "rm -r .venv/lib",
    "it is none": "rm -r .venv/*",
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_environment_that_cannot_be_used_is_made_again_unless_it_is_somebody_elses(
    checkout: Path, quick: Path, venv: Path, spoil: str
) -> None:
    program(checkout / "old", PRETEND)
    subprocess.run(["sh", "-ec", f"{spoil}; mv .venv/{MARK} .venv/letter.txt"], cwd=checkout, check=True)
    before = sorted(venv.rglob("*"))
    assert "and make did not make it: name another, as in `make run VENV=" in make_environment(checkout).stderr
    assert sorted(venv.rglob("*")) == before
    (venv / "letter.txt").rename(venv / MARK)
    done = make_environment(checkout, PYTHONPATH=str(quick))
    assert (done.returncode, done.stderr) == (0, "")
    assert not (venv / "earlier").exists()
    assert make_environment(checkout).stdout == ""


def test_environment_of_somebody_else_is_used(checkout: Path, venv: Path) -> None:
    (venv / MARK).unlink()
    (venv / "installed-run.txt").unlink()
    assert make_environment(checkout).returncode == 0
    assert (venv / "earlier").exists()
    assert not (venv / MARK).exists()


def test_environment_is_made_again_for_another_version_only_if_asked(checkout: Path, quick: Path, venv: Path) -> None:
    program(venv / "bin" / "python", "echo 3.99")
    assert make_environment(checkout).stdout == ""
    assert make_environment(checkout, f"PYTHON={sys.executable}", PYTHONPATH=str(quick)).returncode == 0
    assert not (venv / "earlier").exists()


def test_new_requirements_are_installed(checkout: Path, venv: Path) -> None:
    changed = checkout / "requirements" / "service.txt"
    changed.write_text("# new\n")
    os.utime(changed, (0, 0))  # as an archive or `cp -p` leaves it
    assert "Installing requirements/run.txt into .venv" in make_environment(checkout).stdout
    assert make_environment(checkout).stdout == ""
    assert (venv / "earlier").exists()


def test_environment_is_made_again_after_an_interruption(checkout: Path, quick: Path) -> None:
    hangs = checkout / "hangs"
    settings = environment(PYTHONPATH=str(quick), HANG=str(hangs))
    with subprocess.Popen(["make", "run-environment"], cwd=checkout, env=settings, start_new_session=True) as run:
        wait_until(hangs.exists)
        os.killpg(run.pid, signal.SIGKILL)
    assert "Creating the virtual environment" in make_environment(checkout, PYTHONPATH=str(quick)).stdout
    assert make_environment(checkout).stdout == ""


def test_two_installations_take_turns(checkout: Path, venv: Path) -> None:
    (venv / "installed-run.txt").write_text("old")
    lock = os.open(venv, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with subprocess.Popen(
        ["make", "run-environment"], cwd=checkout, env=environment(), stdout=subprocess.PIPE, text=True
    ) as second:
        assert second.stdout.readline() == "Waiting for another `make` that installs into .venv ...\n"
        (venv / "installed-run.txt").write_text("")  # the other one has installed it
        os.close(lock)
        assert second.stdout.read() == ""


def test_environment_of_the_benchmarks_is_inside_that_of_make_run(checkout: Path, quick: Path) -> None:
    assert make(checkout, "bench-environment", PYTHONPATH=str(quick)).returncode == 0
    assert (checkout / ".venv" / "pyvenv.cfg").exists()
    assert (checkout / ".venv" / "bench" / "pyvenv.cfg").exists()
    assert make_environment(checkout).stdout == ""


def test_python_that_cannot_be_used_says_so_in_one_line(checkout: Path, tmp_path: Path) -> None:
    old = program(tmp_path / "python3.9", PRETEND)
    new = program(tmp_path / "python3.15", PRETEND.replace("3, 9, 18", "3, 15, 0"))
    (tmp_path / "venv.py").write_text("raise ImportError")
    without_venv = program(tmp_path / "python3", f'PYTHONPATH={tmp_path} exec {sys.executable} "$@"')
    answers = {
        "missing": "hello needs Python 3.11 to 3.14, and none of these is: missing. ",
        old: f"hello needs Python 3.11 to 3.14, and none of these is: {old}. ",
        new: f"hello needs Python 3.11 to 3.14, and none of these is: {new}. ",
        without_venv: "This Python has no venv module: install it (on Debian: apt-get install python3-venv).",
    }
    for python, answer in answers.items():
        assert make_environment(checkout, f"PYTHON={python}").stderr.splitlines()[0].startswith(answer)


def test_machine_without_python_says_so_in_one_line(checkout: Path, tmp_path: Path) -> None:
    for name in ("sh", "mkdir", "ls", "flock", "sed"):
        (tmp_path / name).symlink_to(shutil.which(name) or name)
    first = make_environment(checkout, PATH=str(tmp_path)).stderr.splitlines()[0]
    assert first.startswith("hello needs Python 3.11 to 3.14, and none of these is: python3 python3.14 ")
    assert first.endswith(" Name one: `make run PYTHON=/path/to/python3`.")


def test_read_only_checkout_says_so_in_one_line(checkout: Path) -> None:
    checkout.chmod(0o555)
    first = make_environment(checkout).stderr.splitlines()[0]
    assert first.startswith(".venv cannot be made: name other folders, as in `make run VENV=")
