"""What the documents say against what is there: settings, commands, links, pictures, sums; and CI's own commands."""

import hashlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tools.mutations import SABOTAGES, Sabotage

ROOT = Path(__file__).parents[1]
CODE = ["hello.py", "server/worker.py", "gunicorn.conf.py", "server/telemetry.py"]
DOCUMENTS = sorted(
    path
    for path in [*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("*/*/*.md")]
    if not path.relative_to(ROOT).parts[0].startswith(".")
)


def settings_of_the_code() -> dict[str, str]:
    """Return each setting that the code reads, with its default as it is written there."""
    found = {}
    for name in CODE:
        text = (ROOT / name).read_text()
        found |= dict(re.findall(r"""os\.environ\.get\(["']([A-Z_]+)["']\) or \(?["']?([\w.]*)""", text))
        found |= dict(re.findall(r'\b(?:setting|seconds)\("([A-Z_]+)", ([\w.]+)', text))
        found |= dict.fromkeys(set(re.findall(r'os\.environ\.get\("([A-Z_]+)"\) [!=]=', text)), "on")
    return {name: plain(default) for name, default in found.items() if not name.startswith("PG")}


def plain(default: str) -> str:
    """Return a default so that 1 and 1.0 are the same."""
    return default.removesuffix(".0") if default.count(".") == 1 else default


def settings_of_the_docstrings() -> set[str]:
    """Return the names in the lists of settings at the head of the modules."""
    heads = [(ROOT / name).read_text().split('"""')[1] for name in CODE]
    listed = [head.partition("Settings (environment variables)\n")[2] for head in heads]
    return {name for part in listed for name in re.findall(r"^    ([A-Z_]{2,}) ", part, re.MULTILINE)}


def settings_of_the_example() -> dict[str, str]:
    lines = (ROOT / ".env.example").read_text().splitlines()
    pairs = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    return {name: plain(value) for name, value in pairs.items() if not name.startswith("PG")}


def settings_of_the_readme() -> dict[str, str]:
    """Return the first two columns of the README's table of settings; a row may hold several of each."""
    table = (ROOT / "README.md").read_text().partition("\n## Settings\n")[2].partition("\n## ")[0]
    found = {}
    for row in re.findall(r"^\| (`.*)$", table, re.MULTILINE):
        names, defaults = (re.findall(r"`([^`]+)`", cell) for cell in row.split(" | ")[:2])
        found |= dict(zip(names, defaults * len(names) if len(defaults) == 1 else defaults, strict=False))
    return {name: plain(default) for name, default in found.items() if not name.startswith("PG")}


def test_settings_of_the_code_are_all_in_its_docstrings_and_the_reverse() -> None:
    assert set(settings_of_the_code()) == settings_of_the_docstrings()


def test_settings_of_the_code_are_all_in_env_example_and_the_reverse() -> None:
    code, example = settings_of_the_code(), settings_of_the_example()
    assert set(example) == set(code)
    # Both mean that the kind of the terminal decides.
    assert example | {"LOG_FORMAT": code["LOG_FORMAT"]} == code


def test_settings_of_the_code_are_all_in_the_readme_and_the_reverse() -> None:
    code, readme = settings_of_the_code(), settings_of_the_readme()
    assert set(readme) == set(code)
    assert readme == code | {"LOG_FORMAT": "text"}


def code_of(document: Path) -> str:
    """Return what a document shows as code: its blocks and what is between backquotes."""
    text = document.read_text()
    return "\n".join(re.findall(r"```.*?```|`[^`]+`", text, re.DOTALL))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_make_targets_of_a_document_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z0-9]+(?:-[a-z0-9]+)*)", code_of(document)))
    assert named <= targets


def links() -> Iterator[tuple[Path, str]]:
    for document in DOCUMENTS:
        for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
            if not re.match(r"[a-z]+:", link):
                yield document, link


def heading_id(heading: str) -> str:
    """Return the fragment that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize(("document", "link"), list(links()), ids=lambda value: str(value).removeprefix(f"{ROOT}/"))
def test_link_of_a_document_leads_somewhere(document: Path, link: str) -> None:
    name, _, fragment = link.partition("#")
    target = (document.parent / name) if name else document
    assert target.exists()
    if fragment:
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
        assert fragment in {heading_id(heading) for heading in headings}


@pytest.mark.parametrize(("picture", "source"), [("architecture.svg", "architecture.dot"), ("aws.svg", "draw.py")])
def test_picture_is_made_from_the_source_that_lies_beside_it(picture: str, source: str) -> None:
    digest = hashlib.sha256((ROOT / "docs" / source).read_bytes()).hexdigest()
    text = (ROOT / "docs" / picture).read_text()
    assert f"<!-- {source} sha256:{digest} -->" in text, "run `make diagrams`"
    assert 'href="/' not in text


def test_costs_on_aws_are_those_of_the_program() -> None:
    printed = subprocess.run([sys.executable, "docs/cost.py"], check=True, capture_output=True, text=True, cwd=ROOT)
    assert printed.stdout in (ROOT / "docs" / "aws.md").read_text()


WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
STEPS = [step for job in WORKFLOW["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("command", sorted({step["run"] for step in STEPS if "run" in step}))
def test_command_of_ci_is_a_make_target_or_installs_a_package(command: str) -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    words = command.split()
    assert (words[0] == "make" and words[1] in targets) or words[:2] == ["sudo", "apt-get"]


@pytest.mark.parametrize("action", sorted({step["uses"] for step in STEPS if "uses" in step}))
def test_action_of_ci_is_pinned_to_a_commit(action: str) -> None:
    assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action)


def test_ci_tests_every_python_that_the_makefile_looks_for() -> None:
    named = set(re.findall(r"python(3\.\d+)", (ROOT / "tools/environment.sh").read_text()))
    assert set(WORKFLOW["jobs"]["test"]["strategy"]["matrix"]["python"]) == named


def test_ci_may_read_and_nothing_else() -> None:
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert all("permissions" not in job and job["timeout-minutes"] <= 20 for job in WORKFLOW["jobs"].values())


@pytest.mark.parametrize("sabotage", SABOTAGES, ids=lambda sabotage: f"{sabotage.test}: {sabotage.new.strip()[:40]}")
def test_place_of_a_sabotage_is_still_there_and_one(sabotage: Sabotage) -> None:
    assert (ROOT / sabotage.file).read_text().count(sabotage.old) == 1
