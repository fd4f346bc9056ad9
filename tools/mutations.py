"""Break each protection in a copy of the tree and check that its test fails: `make mutations`.

Each patch in tests/mutations/ begins with a line `Test: ` and the id of the test that must notice it. The unchanged
copy must pass these tests first. A test notices a patch if it fails in its call phase; an error in a fixture does not
count. `make mutations ARGS='WORD ...'` takes only the patches with one of the words in their name.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
PATCHES = ROOT / "tests/mutations"
SECONDS = 600  # the most that a test run may take


class Mutation(NamedTuple):
    """A patch, and the id of the test that must fail with it."""

    patch: Path
    test: str


def read_mutations(words: list[str]) -> list[Mutation]:
    """Return the mutations with one of these words in their name, or all if there are no words."""
    found = []
    for patch in sorted(PATCHES.glob("*.patch")):
        label, _, test = patch.read_text().split("\n")[0].partition(": ")
        if label != "Test" or not test:
            sys.exit(f"{patch} must begin with a line `Test: ` and the id of a test")
        if not words or any(word in patch.stem for word in words):
            found.append(Mutation(patch, test))
    if not found:
        sys.exit(f"No patch in {PATCHES} has one of these words in its name: {' '.join(words)}")
    return found


def run_tests(tree: Path, *tests: str) -> tuple[Counter[str], str]:
    """Run tests in a tree; count their outcomes (passed, skipped, error, failure); return the first failure's text."""
    results = tree / "results.xml"
    results.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", f"--junit-xml={results}", *tests]
    try:
        done = subprocess.run(command, check=False, cwd=tree, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return Counter(), f"no result after {SECONDS} s"
    if not results.exists():
        return Counter(), done.stdout + done.stderr
    outcomes: Counter[str] = Counter()
    text = ""
    for case in ElementTree.parse(results).iter("testcase"):
        kinds = [child for child in case if child.tag in {"failure", "error", "skipped"}]
        outcomes.update([child.tag for child in kinds] or ["passed"])
        text = text or next((child.get("message") or "" for child in kinds if child.tag != "skipped"), "")
    return outcomes, text


def apply(tree: Path, patch: Path, *options: str) -> bool:
    """Apply a patch in a tree; return whether it fits, and print why it does not."""
    done = subprocess.run(["git", "apply", *options, str(patch)], check=False, cwd=tree, capture_output=True, text=True)
    if done.returncode != 0:
        print(f"{patch.name} does not fit: {' '.join(done.stderr.split())}")
    return done.returncode == 0


def check(tree: Path, mutation: Mutation) -> str:
    """Apply a mutation and run its test; print and return whether it was noticed."""
    start = time.monotonic()
    apply(tree, mutation.patch)
    outcomes, text = run_tests(tree, mutation.test)
    apply(tree, mutation.patch, "--reverse")
    is_noticed = outcomes["failure"] > 0
    verdict = "noticed" if is_noticed else "skipped" if set(outcomes) == {"skipped"} else "UNNOTICED"
    reason = " ".join(text.split())[:120] if is_noticed else dict(outcomes)
    print(f"{verdict:9} {time.monotonic() - start:3.0f} s  {mutation.patch.stem}\n{'':17}{reason}", flush=True)
    return verdict


def main(words: list[str]) -> int:
    """Check that the patches apply and that their tests pass, then each mutation; return 1 if one is unnoticed."""
    mutations = read_mutations(words)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "hello"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv*", ".postgres", "__pycache__"))
        if [mutation for mutation in mutations if not apply(tree, mutation.patch, "--check")]:
            return 1
        outcomes, text = run_tests(tree, *sorted({mutation.test for mutation in mutations}))
        print(f"baseline: {dict(outcomes)}", flush=True)
        if outcomes["failure"] or outcomes["error"] or not outcomes:
            print(f"The tests must pass without a mutation.\n{text}")
            return 1
        verdicts = Counter(check(tree, mutation) for mutation in mutations)
    print(", ".join(f"{count} {verdict}" for verdict, count in verdicts.items()))
    return 1 if verdicts["UNNOTICED"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
