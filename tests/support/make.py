"""Runs of make, with none of the settings of whoever runs the tests."""

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Settings of make, of the service, of Postgres and of Compose
OWN = ("MAKE", "MFLAGS", "PYTHON", "VENV", "DATA", "WITH_DATA", "HELLO_", "COMPOSE_", "PG", "HOST", "PORT", "METRICS_")


def environment(**settings: str) -> dict[str, str]:
    """Return the environment of a run of make."""
    return {name: value for name, value in os.environ.items() if not name.startswith(OWN)} | settings


def make(folder: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run make in a folder; in one that nobody may write to, as a user who cannot."""
    command = [shutil.which("make") or "make", "--no-print-directory", *arguments]
    if os.geteuid() == 0 and folder.stat().st_mode & 0o222 == 0:
        command = ["setpriv", "--reuid=nobody", "--clear-groups", *command]
    return subprocess.run(
        command, cwd=folder, env=environment(**settings), check=False, text=True, capture_output=True, timeout=120
    )


def run(*command: str, folder: Path = ROOT, status: int = 0, **settings: str) -> str:
    """Return what a command writes; fail with it where its exit status is another."""
    variables, pipe = environment(**settings), subprocess.PIPE
    done = subprocess.run(
        command, cwd=folder, env=variables, check=False, text=True, stdout=pipe, stderr=subprocess.STDOUT
    )
    assert done.returncode == status, f"{' '.join(command)}: {done.stdout}"
    return done.stdout


def link_venv(folder: Path) -> Path:
    """Create a virtual environment that is up to date and that make did not make: links to that of the tests."""
    folder.mkdir()
    for name in ("bin", "lib", "pyvenv.cfg"):
        (folder / name).symlink_to(Path(sys.prefix) / name)
    installed = "".join(path.read_text() for path in sorted((ROOT / "requirements").glob("*.txt")))
    for name in ("run", "dev"):
        (folder / f"installed-{name}.txt").write_text(installed)
    return folder


@functools.cache
def linked_venv() -> Path:
    """Return a virtual environment for all tests of this process."""
    folder = Path(tempfile.mkdtemp(prefix="hello-test-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return link_venv(folder / "my venv")
