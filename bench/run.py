"""Measure hello beside its limits and its alternatives: `make bench`, `make bench-growth`.

Everything runs on this machine in one run. docs/performance.md explains the method.
"""

import argparse
import resource
import signal
import time
from pathlib import Path

from bench.contestants import CONTESTANTS
from bench.database import USERS, create_database, postgres
from bench.measure import compare, measure, measure_growth
from bench.report import README_BLOCK, comparison, growth_report, readme_table, report

HERE = Path(__file__).parent
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
OPEN_FILES = 4096  # wrk opens 1,000 connections


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    names = [contestant.name for contestant in CONTESTANTS]
    parser = argparse.ArgumentParser(prog="make bench ARGS=...", description="Measure hello beside its alternatives.")
    parser.add_argument("--only", default="", help=f"compare only these, and write no files: {','.join(names)}")
    parser.add_argument("--against", type=Path, help="with --only: compare also with the hello of this checkout")
    parser.add_argument(
        "--growth", action="store_true", help="measure with 10 thousand, 1 million and 10 million users"
    )
    parser.add_argument("--rounds", type=int, help="default 5, with --growth 8")
    parser.add_argument("--seconds", type=int, default=2, help="of each load in a round (default 2)")
    arguments = parser.parse_args()
    arguments.only = arguments.only.split(",") if arguments.only else []
    if unknown := set(arguments.only) - set(names):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    arguments.rounds = arguments.rounds or (8 if arguments.growth else 5)
    return arguments


def stop(number: int, frame: object) -> None:
    """Leave all `with` blocks, which stop what they started; ignore further signals meanwhile."""
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise SystemExit(128 + number)


def run(arguments: argparse.Namespace) -> list[str]:
    """Measure what the arguments ask for, write the files, and return the report."""
    if arguments.growth:
        lines = growth_report(measure_growth(arguments.rounds, arguments.seconds))
        (HERE / "growth.md").write_text("\n".join(lines) + "\n")
        return lines
    create_database("million", USERS)
    if arguments.only:
        return comparison(compare(arguments.only, arguments.rounds, arguments.seconds, arguments.against))
    measured = measure(arguments.rounds, arguments.seconds)
    lines = report(measured)
    (HERE / "results.md").write_text("\n".join(lines) + "\n")
    update_readme(HERE.parent / "README.md", lines)
    from bench.plot import plot  # slow to import

    plot(measured, HERE / "results.png")
    return lines


def update_readme(readme: Path, lines: list[str]) -> None:
    """Replace the README's table of rates and latencies by that of a report."""
    readme.write_text(README_BLOCK.sub(readme_table(lines), readme.read_text()))


def main() -> None:
    """Run the benchmark and print its report."""
    arguments = parse_arguments()
    for number in SIGNALS:
        signal.signal(number, stop)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    began = time.monotonic()
    with postgres():
        lines = run(arguments)
    print("\n".join(["", *lines, "", f"took {time.monotonic() - began:.0f} s"]), flush=True)


if __name__ == "__main__":
    main()
