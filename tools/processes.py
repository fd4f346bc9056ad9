"""A file that lists the processes of `make run`: the next `make run` ends those that a killed one left."""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STOPPING = "stopping"


def start_time(process: int) -> str | None:
    """Return when a process started; None where it has ended. With its id this names one process."""
    if Path("/proc/self/stat").exists():
        try:
            state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return None if state in "ZX" else f"{boot}/{fields[18]}"
    command = ["ps", "-o", "stat=", "-o", "lstart=", "-p", str(process)]
    state, _, start = subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip().partition(" ")
    return None if not state or state.startswith("Z") else "_".join(start.split())


class Processes:
    """A list of processes in a file that stays locked.

    A line has a process id, its start time and the signal that stops it; or the path of a folder that is to be removed.

    Args:
        file: the list; its folder is created if it is not there.
        stop_seconds: the time that a process has to stop, before it gets SIGQUIT and then SIGKILL.
    """

    def __init__(self, file: Path, stop_seconds: float) -> None:
        self.path = file
        self.stop_seconds = stop_seconds
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.file = file.open("a+")
        self.lock()
        self.stop()
        self.record(os.getpid(), signal.SIGTERM)

    def lock(self) -> None:
        """Lock the list; wait for another `make run` if it is stopping, and exit if it is not."""
        waits = False
        while True:
            with contextlib.suppress(BlockingIOError):
                return fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lines = self.lines()
            if STOPPING not in lines:
                process = lines[0].split()[0] if lines else "unknown"
                sys.exit(
                    f"Another `make run` (process {process}) uses {self.path.parent}: "
                    "stop it first, or name another folder, as in `make run DATA=.postgres2 PORT=9000`."
                )
            if not waits:
                waits = True
                print("Waiting for the last `make run` to stop ...", flush=True)
            time.sleep(0.05)

    def lines(self) -> list[str]:
        self.file.seek(0)
        return self.file.read().splitlines()

    def record(self, process: int, stop_signal: int) -> None:
        os.write(self.file.fileno(), f"{process} {start_time(process)} {int(stop_signal)}\n".encode())

    def temporary_folder(self) -> str:
        """Create a folder that is removed with the list."""
        folder = tempfile.mkdtemp(prefix="hello-")
        os.write(self.file.fileno(), f"{folder}\n".encode())
        return folder

    def start(self, command: list[str | Path], stop_signal: int, **options: Any) -> subprocess.Popen[bytes]:
        """Start a process that is in the list before it runs its program."""
        return subprocess.Popen(
            command,
            preexec_fn=lambda: self.record(os.getpid(), stop_signal),  # noqa: PLW1509 - this process has one thread
            **options,
        )

    def stop(self) -> None:
        """Stop the listed processes and remove the listed folders, the last first, within a bounded time."""
        lines = self.lines()
        os.write(self.file.fileno(), f"{STOPPING}\n".encode())
        for line in reversed(lines):
            if line.startswith("/"):
                shutil.rmtree(line, ignore_errors=True)
            elif line != STOPPING:
                process, start, number = line.split()
                if int(process) != os.getpid():
                    self.stop_process(int(process), start, int(number))
        self.file.truncate(0)

    def stop_process(self, process: int, start: str, stop_signal: int) -> None:
        """Stop a process with its signal, then with SIGQUIT, then with SIGKILL to its process group."""
        for number in (stop_signal, signal.SIGQUIT, signal.SIGKILL):
            deadline = time.monotonic() + self.stop_seconds
            if start_time(process) != start:
                return
            with contextlib.suppress(ProcessLookupError):
                if number == signal.SIGKILL:
                    os.killpg(process, number)
                else:
                    os.kill(process, number)
            while start_time(process) == start and time.monotonic() < deadline:
                time.sleep(0.02)


if __name__ == "__main__":
    Processes(Path(sys.argv[1]), stop_seconds=20).stop()
