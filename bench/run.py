"""Measure hello beside its alternatives and its limits, and with few and many users: `make bench`.

Everything runs on this machine in one run. docs/performance.md explains the method.
"""

import argparse
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from bench.contestants import CONTESTANTS, Contestant, build_go_peer, growth_contestants, hello_of, running
from bench.database import create_database, postgres
from bench.load import METHODS, Load, Samples
from bench.report import README_BLOCK, Results, comparison, readme_block, report

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    names = [contestant.name for contestant in CONTESTANTS]
    parser = argparse.ArgumentParser(prog="make bench ARGS=...", description=__doc__.partition(":")[0])
    parser.add_argument("--rounds", type=int, default=9, help="default 9")
    parser.add_argument("--seconds", type=int, default=2, help="of each load in a round (default 2)")
    parser.add_argument("--only", default="", help=f"compare only these, and write no file: {','.join(names)}")
    parser.add_argument("--against", type=Path, help="compare with the hello of this checkout, and write no file")
    arguments = parser.parse_args()
    arguments.only = arguments.only.split(",") if arguments.only else []
    if unknown := set(arguments.only) - set(names):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    return arguments


def choose(arguments: argparse.Namespace) -> list[Contestant]:
    """Return the contestants of the comparison; Go only where it can be built, with a line that says why not."""
    chosen = [contestant for contestant in CONTESTANTS if not arguments.only or contestant.name in arguments.only]
    if any(contestant.name == "go" for contestant in chosen) and (problem := build_go_peer()):
        print(f"The Go peer is left out: {problem}", flush=True)
        chosen = [contestant for contestant in chosen if contestant.name != "go"]
    return [*chosen, hello_of(arguments.against)] if arguments.against else chosen


def measure(compared: Sequence[Contestant], others: Sequence[Contestant], rounds: int, seconds: int) -> Results:
    """Load each contestant with each method once a round; each round begins with another load."""
    contestants = [*compared, *others]
    for users in sorted({contestant.users for contestant in contestants}):
        create_database(users)
    loads = [(contestant, method) for method in METHODS for contestant in contestants]
    samples = {(contestant.name, method): Samples() for contestant, method in loads}
    with running(contestants):
        for number in range(rounds):
            first = number * len(loads) // rounds
            for contestant, method in loads[first:] + loads[:first]:
                sample = contestant.run(Load(method, seconds, contestant.users))
                samples[contestant.name, method].append(sample)
            progress = [f"{name} {method} {s[-1].rate:,.0f}" for (name, method), s in samples.items()]
            print(f"round {number + 1} of {rounds}: {', '.join(progress)}", flush=True)
        return Results(compared, samples, {contestant.name: contestant.memory() for contestant in compared})


def run(arguments: argparse.Namespace) -> list[str]:
    """Measure what the arguments ask for, write the files, and return the report."""
    compared = choose(arguments)
    is_part = bool(arguments.only or arguments.against)
    results = measure(compared, [] if is_part else growth_contestants(), arguments.rounds, arguments.seconds)
    if is_part:
        return comparison(results)
    lines = report(results)
    write_files(results, lines)
    return lines


def write_files(results: Results, lines: list[str]) -> None:
    """Write results.md, results.png and the README's part about the speed."""
    from bench.plot import plot  # slow to import

    (HERE / "results.md").write_text("\n".join(lines) + "\n")
    plot(results, HERE / "results.png")
    block = readme_block(results)
    README.write_text(README_BLOCK.sub(lambda _: block, README.read_text()))


def stop(number: int, frame: object) -> None:
    """Leave all `with` blocks, which stop what they started; ignore further signals meanwhile."""
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise SystemExit(128 + number)


def main() -> None:
    """Run the benchmark and print its report."""
    arguments = parse_arguments()
    for number in SIGNALS:
        signal.signal(number, stop)
    began = time.monotonic()
    with postgres():
        lines = run(arguments)
    print("\n".join(["", *lines, "", f"took {time.monotonic() - began:.0f} s"]), flush=True)


if __name__ == "__main__":
    main()
