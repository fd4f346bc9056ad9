"""Bring a virtual environment up to date with requirements/NAME.txt: `python environment.py FOLDER NAME [exactly]`.

An environment is recreated if its Python is missing or too old, if an installation was interrupted, or, with `exactly`,
if its Python has another version than the one that runs this.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

REQUIREMENTS = Path(__file__).parents[1] / "requirements"
# What pip downloads and what it takes on the disk, in MB, as measured on Linux with Python 3.11.
SIZES = {"run": (35, 140), "dev": (120, 490), "bench": (90, 400), "docs": (40, 150)}
INCLUDES = {"dev": ["run"], "bench": ["run"]}


class Environment:
    """A virtual environment; `installed-NAME.txt` in it is the requirements file that was installed last."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        self.python = folder / "bin" / "python"
        self.requirements = REQUIREMENTS / f"{name}.txt"
        self.incomplete = folder / "incomplete"

    def stamp(self, name: str) -> Path:
        return self.folder / f"installed-{name}.txt"

    def is_current(self) -> bool:
        stamp = self.stamp(self.name)
        return stamp.exists() and stamp.read_bytes() == self.requirements.read_bytes()

    def fault(self, exactly: bool) -> str:
        """Return why the environment must be recreated; empty if it can be used."""
        if self.incomplete.exists():
            return "its installation was not finished"
        if not (self.folder / "pyvenv.cfg").exists():
            if self.folder.exists() and any(self.folder.iterdir()):
                fail(f"{self.folder} is not a virtual environment: name another folder, as in `make run VENV=~/venv`.")
            return ""
        code = "import pip, sys; print(*sys.version_info[:2], sep='.')"
        try:
            answer = subprocess.run([self.python, "-c", code], check=False, capture_output=True, text=True)
        except OSError:
            return "its Python is missing"
        version = answer.stdout.strip()
        if answer.returncode != 0:
            return "its Python does not work"
        if tuple(map(int, version.split("."))) < (3, 11) or (exactly and version != own_version()):
            return f"it has Python {version}"
        return ""

    def empty(self) -> None:
        """Remove what is in the folder; the folder stays, because it may be a mount point."""
        self.incomplete.touch()  # the next start continues if this one is interrupted
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path != self.incomplete:
                path.unlink()

    def create(self) -> None:
        """Create the environment, with nothing installed in it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.incomplete.touch()
        made = subprocess.run(
            [sys.executable, "-m", "venv", self.folder], check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        if made.returncode != 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            fail("This Python has no venv module: install it (on Debian: apt-get install python3-venv).")

    def install(self, lock: int) -> None:
        """Install the requirements; pip inherits the lock and holds it even if this process is killed."""
        download, disk = SIZES[self.name]
        print(
            f"Installing requirements/{self.name}.txt into {self.folder}: "
            f"the first time downloads about {download} MB and needs {disk} MB of disk ...",
            flush=True,
        )
        self.incomplete.touch()
        pip: list[str | Path] = [
            self.python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--require-hashes",
        ]
        if subprocess.run([*pip, "-r", self.requirements], check=False, pass_fds=[lock]).returncode != 0:
            fail(f"pip could not install requirements/{self.name}.txt: its message is above.")
        for name in (self.name, *INCLUDES.get(self.name, [])):
            shutil.copyfile(REQUIREMENTS / f"{name}.txt", self.stamp(name))
        self.incomplete.unlink()


def own_version() -> str:
    return f"{sys.version_info[0]}.{sys.version_info[1]}"


def fail(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(1)


def acquire_lock(folder: Path) -> int:
    """Lock the folder that the environment is in, so that two `make` at once do not install into it together."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("Waiting for another `make` that installs here ...", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


@contextlib.contextmanager
def one_line_if_not_writable() -> Iterator[None]:
    """Exit with one line at an OSError that says that a file cannot be written."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        fail(f"{error.filename} cannot be written: name other folders, as in `make run VENV=~/venv DATA=~/data`.")


def stop(number: int, frame: FrameType | None) -> None:
    """Exit at a signal, with the status that a shell gives it."""
    raise SystemExit(128 + number)


def main(folder: Path, name: str, exactly: bool) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    environment = Environment(folder, name)
    if environment.is_current() and not environment.fault(exactly):
        return
    lock = acquire_lock(folder.parent)
    fault = environment.fault(exactly)
    if fault:
        print(f"Recreating {folder}: {fault}.", flush=True)
        environment.empty()
    if not (folder / "pyvenv.cfg").exists():
        environment.create()
    if not environment.is_current():
        environment.install(lock)


if __name__ == "__main__":
    with one_line_if_not_writable():
        main(Path(sys.argv[1]).absolute(), sys.argv[2], "exactly" in sys.argv[3:])
