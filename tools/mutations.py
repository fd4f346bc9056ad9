"""Break each protection in a copy of the tree and check that its test fails: `make mutations`.

tests/mutations.toml has the protections: in a file, replace a text that occurs once, and a test must fail. An error in
a fixture does not count. Without a change the tests must pass. `make mutations ARGS='WORD ...'` takes those with one of
the words in their name. `python -m tools.mutations --check` changes nothing: it checks that every text occurs once and
every test exists.
"""

import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "tests/mutations.toml"
LEFT_OUT = shutil.ignore_patterns(".git", ".venv*", ".postgres", "__pycache__")
SECONDS = 600  # the most that a test run may take


class Mutation(NamedTuple):
    """A text of a file, what stands there instead, and the id of the test that must notice it."""

    name: str
    file: str
    text: str
    replacement: str
    test: str

    def problem(self) -> str:
        """Return what is wrong with it in one line, nothing if it can be applied."""
        count = (ROOT / self.file).read_text().count(self.text)
        if count != 1:
            return f"{self.name}: the text occurs {count} times in {self.file}"
        file, _, test = self.test.partition("::")
        if f"def {test.partition('[')[0]}(" not in (ROOT / file).read_text():
            return f"{self.name}: there is no {self.test}"
        return ""


def read_mutations(words: list[str]) -> list[Mutation]:
    """Return the mutations with one of these words in their name, or all if there are no words."""
    entries = tomllib.loads(TABLE.read_text())["mutation"]
    mutations = [Mutation(**entry) for entry in entries]
    return [mutation for mutation in mutations if not words or any(word in mutation.name for word in words)]


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


def verdict_of(outcomes: Counter[str]) -> str:
    """Return whether a mutation was noticed."""
    if outcomes["failure"]:
        return "noticed"
    return "skipped" if set(outcomes) == {"skipped"} else "UNNOTICED"


def try_mutation(tree: Path, mutation: Mutation) -> str:
    """Apply a mutation and run its test; print and return whether it was noticed."""
    start = time.monotonic()
    path = tree / mutation.file
    code = path.read_text()
    path.write_text(code.replace(mutation.text, mutation.replacement))
    outcomes, text = run_tests(tree, mutation.test)
    path.write_text(code)
    verdict = verdict_of(outcomes)
    reason = " ".join(text.split())[:120] or dict(outcomes)
    print(f"{verdict:9} {time.monotonic() - start:3.0f} s  {mutation.name}\n{'':17}{reason}", flush=True)
    return verdict


def run(mutations: list[Mutation]) -> int:
    """Check that the tests pass in a copy, and fail with their mutations; return 1 if one does not."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "hello"
        shutil.copytree(ROOT, tree, ignore=LEFT_OUT)
        outcomes, text = run_tests(tree, *sorted({mutation.test for mutation in mutations}))
        print(f"without a mutation: {dict(outcomes)}", flush=True)
        if outcomes["failure"] or outcomes["error"] or not outcomes:
            print(f"The tests must pass without a mutation.\n{text}")
            return 1
        verdicts = Counter(try_mutation(tree, mutation) for mutation in mutations)
    print(", ".join(f"{count} {verdict}" for verdict, count in verdicts.items()))
    return 1 if verdicts["UNNOTICED"] else 0


def main(arguments: list[str]) -> int:
    """Check the table; without `--check`, also run the mutations with one of the words in their name."""
    problems = [problem for mutation in read_mutations([]) if (problem := mutation.problem())]
    if problems:
        print("\n".join([f"{TABLE.relative_to(ROOT)} does not fit the code:", *problems]))
        return 1
    if arguments == ["--check"]:
        return 0
    mutations = read_mutations(arguments)
    if not mutations:
        print(f"No mutation has one of these words in its name: {' '.join(arguments)}")
        return 1
    return run(mutations)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
