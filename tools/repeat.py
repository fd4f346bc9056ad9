"""Run the tests again and again until a run fails: `python -m tools.repeat RUNS [--busy] [--args ARGS]`."""

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> int:
    """Print how each run ended and how long it took; return 1 at the first that failed, with its output."""
    parser = argparse.ArgumentParser(prog="python -m tools.repeat")
    parser.add_argument("runs", type=int, help="the number of runs")
    parser.add_argument("--busy", action="store_true", help="keep two cores busy meanwhile")
    parser.add_argument("--args", default="", help="arguments for the tests, as in `make test ARGS=...`")
    options = parser.parse_args()
    loops = [subprocess.Popen([sys.executable, "-c", "while 1: pass"]) for _ in range(2 if options.busy else 0)]
    try:
        for run in range(1, options.runs + 1):
            start = time.monotonic()
            command = ["make", "test", f"ARGS={options.args}"]
            done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
            verdict = "green" if done.returncode == 0 else "red"
            seconds = time.monotonic() - start
            counts = (done.stdout.splitlines() or [""])[-1]  # pytest's, of tests that passed, failed and were skipped
            print(f"run {run} of {options.runs}: {verdict} after {seconds:.0f} s: {counts}", flush=True)
            if done.returncode != 0:
                print(done.stdout, done.stderr, sep="\n")
                return 1
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
