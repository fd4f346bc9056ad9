"""What the Markdown files say, compared with what is there: commands and their output, settings, links, costs."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import kubernetes_validate
import psycopg2
import pytest
import yaml

import hello
from server import outage, settings
from tests.support.network import free_port
from tests.support.postgres import Database
from tests.support.wait import wait_until
from tools import environment
from tools.embedded_postgres import binaries

ROOT = Path(__file__).parents[1]
PATTERNS = ("*.md", ".github/*.md", "[a-z]*/*.md", "[a-z]*/*/*.md", "[a-z]*/*/*/*.md")
PAGES = sorted(path for pattern in PATTERNS for path in ROOT.glob(pattern))

# Commands that are not run here: how each begins, and why.
NOT_RUN = {
    "make run": "the fixture `service` runs its command, tests/test_make_run.py runs it",
    "PGHOST=db.example": "there is no such server",
    "make test": "this test is part of it",
    "make coverage": "it runs the tests",
    "make mutations": "it takes long",
    "make lint": ".ci/run runs it",
    "make format": "it changes files",
    "make clean": "it removes files: tests/test_environment.py runs it in a copy",
    "make lock": "asks PyPI for new versions",
    "make audit": "asks PyPI for vulnerabilities",
    "make diagrams": "needs Graphviz",
    "make bench": "it takes minutes, and wrk",
    "make compose-": "needs an engine: tests/test_compose.py",
    "docker ": "needs an engine, images or a registry",
    "export COMPOSE_FILE": "tests/test_compose.py and tests/test_proxy.py use the file",
    "make build": "needs an engine: tests/test_compose.py",
    "make scan": "needs an engine and a registry: .github/workflows runs it",
    "make kind": "needs an engine and a registry: .github/workflows runs it",
    "make k8s-": "needs a cluster: make k8s-smoke in .github/workflows",
    "kubectl ": "needs a cluster; the copy of the data has a test here",
    "sed -i.bak": "changes a manifest: `test_images_are_renamed_as_the_page_says`",
    "ls k8s/": "needs a cluster: `test_files_for_a_managed_database_are_those_of_the_api`",
    "tr -d": "needs a cluster",
    "python hello.py": "tests/test_commands.py runs it",
    "python -m server": "it serves until it is stopped; `make run` runs it",
    "grep '\"level": "filters a log; `test_log_line_has_the_fields_that_the_page_shows` knows its form",
    "git grep": "needs git",
    "apt-get install": "needs root and a network",
    "SELECT create_distributed_table": "needs Citus",
}
# Inline code that begins with one of these is a command.
PROGRAMS = "PGHOST=[^`]* make|apt-get|curl|docker|git|grep|kubectl|make|python3?"

# What is different each time.
MASKS = {
    r"\b[0-9a-f]{32}\b": "ID",
    r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT": "DATE",
    r"in \d+ day": "in N day",
    r'"\d+\.\d+\.\d+"': "VERSION",
    r"(?m)(?<= )\d+\.0$": "COUNT",
}


class Command(NamedTuple):
    """A command of a page, and the output that the page shows after it."""

    page: Path
    text: str
    output: str


def blocks(page: Path, languages: str) -> list[tuple[str, str]]:
    """Return the language and the text of the fenced blocks in some languages."""
    found = re.findall(rf"^( *)```({languages})\n(.*?)^ *```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [(language, re.sub(f"(?m)^{indent}", "", text)) for indent, language, text in found]


def commands() -> Iterator[Command]:
    """Return every command in the fenced blocks: lines after `$` in `console` blocks, each line of `sh` blocks."""
    for page in PAGES:
        for language, block in blocks(page, "console|sh"):
            prompt = r"^\$ " if language == "console" else r"^(?! )"
            for part in re.split(prompt, re.sub(r"\\\n +", "", block), flags=re.MULTILINE):
                text, _, output = part.partition("\n") if language == "console" else (part.strip(), "", "")
                if text:
                    yield Command(page, text, output)


def inline_commands() -> Iterator[Command]:
    """Return the commands between backquotes in the text of the pages."""
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for command in re.findall(rf"`((?:{PROGRAMS})\s[^`]+)`", text):
            yield Command(page, " ".join(command.replace("<instance>", "127.0.0.1").split()), "...")


def statements() -> Iterator[Command]:
    """Return the SQL of the pages: the `sql` blocks, and what begins with a keyword between backquotes."""
    for page in PAGES:
        for text in re.findall(r"`((?:SELECT|DELETE) [^`]+)`", page.read_text()):
            yield Command(page, text, "")
        for _, text in blocks(page, "sql"):
            yield Command(page, text, "")


ALL_COMMANDS = sorted({*commands(), *inline_commands()})


def reason_not_to_run(command: Command) -> str | None:
    return next((reason for start, reason in NOT_RUN.items() if command.text.startswith(start)), None)


def mask(text: str) -> str:
    for pattern, replacement in MASKS.items():
        text = re.sub(pattern, replacement, text)
    return re.sub(r"(?m) +$", "", text).strip()


def assert_output(command: Command, output: str) -> None:
    """Compare an output with the page's, where a line `...` stands for any lines."""
    shown = ["(?:.*\n)*" if line == "..." else re.escape(line + "\n") for line in mask(command.output).splitlines()]
    assert re.fullmatch("".join(shown), f"{mask(output)}\n".lstrip()), f"{command.page.name}: {command.text}\n{output}"


class Documented:
    """A service started as `make run` starts it, with its output in `lines` and its ports for those of the pages."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self.metrics_port = folder, str(free_port()), str(free_port())
        self.environment = os.environ | {"PORT": self.port, "METRICS_PORT": self.metrics_port}
        gunicorn = [f"{sys.prefix}/bin/gunicorn", "hello:application"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tools.serve", folder / "data", *gunicorn],
            cwd=ROOT, env=self.environment, text=True, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.lines: list[str] = []
        threading.Thread(target=self.read, daemon=True).start()
        wait_until(lambda: any("/hello/Zoe" in line and "PUT" not in line for line in self.lines), 60)

    def read(self) -> None:
        assert self.process.stdout
        self.lines.extend(self.with_shown_ports(line) for line in self.process.stdout)

    def with_own_ports(self, text: str) -> str:
        ports = {"8080": self.port, "8081": self.metrics_port, "9000": str(free_port()), "9001": str(free_port())}
        return re.sub("|".join(ports), lambda found: ports[found[0]], text)

    def with_shown_ports(self, text: str) -> str:
        ports = {self.port: "8080", self.metrics_port: "8081"}
        return re.sub("|".join(ports), lambda found: ports[found[0]], text)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)


@pytest.fixture(scope="module", autouse=True)
def without_database_of_other_files() -> Iterator[None]:
    """Hide the Postgres that tests of other files in this process may have started."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("PG"):
                patch.delenv(name)
        yield


@pytest.fixture(scope="module")
def service() -> Iterator[Documented]:
    """Start the service with a Postgres of its own, whose user must be allowed to reach its folder."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        documented = Documented(Path(folder))
        yield documented
        documented.stop()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a folder in which a command finds the files of the repository and may write its own."""
    for path in ROOT.glob("[a-z]*"):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    return tmp_path


def test_make_run_prints_what_the_readme_shows(service: Documented) -> None:
    shown = next(command for command in commands() if command.text == "make run")
    printed = [line for line in service.lines if not line.startswith(("{", "20"))]
    assert_output(shown, "".join(printed))


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(c.page == page for c in ALL_COMMANDS)],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_commands_of_a_page_print_what_it_shows(page: Path, service: Documented, checkout: Path) -> None:
    for command in (*commands(), *inline_commands()):
        if command.page != page or reason_not_to_run(command):
            continue
        text = service.with_own_ports(command.text).replace("/tmp/rows", f"{service.folder}/rows")
        done = subprocess.run(
            ["bash", "-c", text], check=False, capture_output=True, text=True, cwd=checkout, env=service.environment
        )
        assert done.returncode == 0, f"{command.text}\n{done.stderr}"
        assert_output(command, service.with_shown_ports(done.stdout))


@pytest.mark.parametrize("start", NOT_RUN)
def test_command_that_is_not_run_is_on_a_page(start: str) -> None:
    assert any(command.text.startswith(start) for command in (*ALL_COMMANDS, *statements()))


@pytest.fixture(scope="module")
def server() -> Iterator[Database]:
    """Start a Postgres with the table, without the role of the service."""
    database = Database()
    database.start()
    database.apply_schema()
    yield database
    database.stop()


@pytest.mark.parametrize(
    "statement", [s for s in statements() if not reason_not_to_run(s)], ids=lambda s: f"{s.page.name}-{s.text[:24]}"
)
def test_statement_of_a_page_runs(statement: Command, server: Database) -> None:
    later = (time.time() + 60,) if "%s" in statement.text else None
    with contextlib.closing(server.connect()) as connection, connection.cursor() as cursor:
        connection.autocommit = False
        cursor.execute(statement.text, later)


def test_guard_of_the_page_is_that_of_the_code() -> None:
    ((_, guard),) = blocks(ROOT / "docs/architecture.md", "sql")
    assert guard.strip() in hello.SAVE_DATES_OF_BIRTH


def test_data_is_copied_to_the_cluster_as_the_page_says(server: Database, tmp_path: Path) -> None:
    """`kubectl exec` runs the page's command beside one of two servers, as in the containers of two pods."""
    server.query("INSERT INTO users VALUES ('Zoe', '1990-05-17')")
    server.query("CREATE DATABASE hello TEMPLATE postgres")
    (command,) = (c.text for c in commands() if "pg_dump" in c.text)
    target = Database()
    target.start()
    try:
        target.query("CREATE ROLE hello LOGIN")
        target.query("CREATE DATABASE hello OWNER hello")
        hosts = {"hello-database-0": server, "hello-ha-1": target}
        cases = "".join(f"*{pod}*) export PGHOST={at.sockets_folder};; " for pod, at in hosts.items())
        program = tmp_path / "kubectl"
        program.write_text(
            f'#!/bin/sh\ncase "$*" in {cases}esac\nwhile [ $1 != -- ]; do shift; done\nshift\nexec "$@"\n'
        )
        program.chmod(0o755)
        path = f"{tmp_path}:{binaries()}:{os.environ['PATH']}"
        subprocess.run(
            ["bash", "-eo", "pipefail", "-c", command], check=True, env=os.environ | server.environment | {"PATH": path}
        )
        with psycopg2.connect(host=target.sockets_folder, port=target.port, user="hello", dbname="hello") as copied:
            cursor = copied.cursor()
            cursor.execute("SELECT username, date_of_birth FROM users")
            assert cursor.fetchall() == [("Zoe", date(1990, 5, 17))]
        copied.close()
    finally:
        target.stop()


def run_from_page(start: str, old: str, new: str) -> list[str]:
    """Run the page's command that begins so, with a part replaced; return the lines of its output."""
    (command,) = (c.text.replace(old, new) for c in commands() if c.text.startswith(start))
    done = subprocess.run(["bash", "-c", command], check=True, capture_output=True, text=True, cwd=ROOT)
    return done.stdout.splitlines()


def test_images_are_renamed_as_the_page_says() -> None:
    before = (ROOT / "k8s/api-deployment.yaml").read_text().splitlines()
    after = run_from_page("sed -i.bak", "sed -i.bak", "sed")
    renamed = [(old, new) for old, new in zip(before, after, strict=True) if "image: " in old]
    assert renamed
    assert all(new == old.replace("hello:", "registry.example.com/hello:") for old, new in renamed)


def test_secret_of_the_page_has_no_line_break(tmp_path: Path) -> None:
    (command,) = (c.text for c in commands() if c.text.startswith("tr -d"))
    (tmp_path / "password.txt").write_text("sesame\r\n")
    (tmp_path / "kubectl").write_text("#!/bin/sh\nexec cat\n")
    (tmp_path / "kubectl").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PATH": path},
    )
    assert done.stdout == "sesame"


def test_files_for_a_managed_database_are_those_of_the_api() -> None:
    applied = run_from_page("ls k8s/", "kubectl apply -f", "echo")
    left_out = {path.name for path in (ROOT / "k8s").glob("*.yaml")} - {Path(name).name for name in applied}
    assert left_out == {f"database-{kind}.yaml" for kind in ("config", "service", "statefulset")} | {"api-service.yaml"}


def test_manifest_of_a_page_fits_the_schema() -> None:
    manifest, _ = (yaml.safe_load(text) for _, text in blocks(ROOT / "docs/kubernetes.md", "yaml"))
    kubernetes_validate.validate(manifest, "1.30", strict=True)


def test_warnings_of_the_runbook_are_those_of_an_outage(caplog: pytest.LogCaptureFixture) -> None:
    lines = outage.Outage()
    lines.failure("find", TimeoutError("no answer within 3.0 s"), 10)
    lines.unavailable = 45
    lines.success(22.3)
    ((_, shown),) = blocks(ROOT / "monitoring/runbook.md", "text")
    assert shown.splitlines() == caplog.messages


def test_query_of_the_runbook_is_valid(tmp_path: Path) -> None:
    if not shutil.which("promtool"):
        pytest.skip("promtool is not installed: on Debian, apt-get install prometheus")
    (query,) = re.findall(r"`(sum by[^`]+)`", (ROOT / "monitoring/runbook.md").read_text())
    rules = {"groups": [{"name": "runbook", "rules": [{"record": "runbook", "expr": query}]}]}
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))
    subprocess.run(["promtool", "check", "rules", tmp_path / "rules.yml"], check=True, capture_output=True)
    assert re.findall(r"\w+_total", query)[0] in {row[0] for row in rows(ROOT / "docs/observability.md", "Metrics")}


def test_log_line_has_the_fields_that_the_page_shows(service: Documented) -> None:
    page = (ROOT / "docs" / "observability.md").read_text()
    shown = json.loads(page.partition("```json\n")[2].partition("\n```")[0])
    subprocess.run(["curl", "-s", f"http://127.0.0.1:{service.port}/hello/Zoe"], check=True, capture_output=True)
    wait_until(lambda: any('"message": "request"' in line for line in service.lines))
    line = next(line for line in service.lines if '"message": "request"' in line)
    assert list(json.loads(line)) == list(shown)


def test_metrics_are_those_of_the_page(service: Documented) -> None:
    url = f"http://127.0.0.1:{service.metrics_port}/metrics"
    text = subprocess.run(["curl", "-s", url], check=True, capture_output=True, text=True).stdout
    served = set(re.findall(r"^# TYPE (\w+)", text, re.MULTILINE))
    named = {name for row in rows(ROOT / "docs/observability.md", "Metrics") for name in row[0].split(", ")}
    assert named == served


def declared_settings() -> dict[str, list[str]]:
    """Return the default, the unit of time and the least value of each setting of the code."""
    declared: dict[str, Any] = {**hello.SETTINGS, **settings.SETTINGS}
    return {
        name: [
            default := f"{s.default}".removesuffix(".0"),
            {"s": "s", "seconds": "s", "bytes": "bytes"}.get(s.unit, ""),
            f"{s.minimum:g}" if re.fullmatch(r"[\d.]*\d", default) and default.count(".") < 2 else "",
        ]
        for name, s in declared.items()
        if not name.startswith("PG")
    }


def rows(page: Path, heading: str) -> Iterator[list[str]]:
    """Return the cells of the table under a heading, without backquotes."""
    section = page.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    for line in re.findall(r"^\| `.*$", section, re.MULTILINE):
        yield [cell.strip().replace("`", "") for cell in line.strip("|").split("|")]


def test_settings_of_the_code_are_those_of_configuration_md() -> None:
    table = {name: row for name, *row, _ in rows(ROOT / "docs/configuration.md", "Settings")}
    assert table == declared_settings()


def test_settings_that_hello_and_the_server_have_are_the_same() -> None:
    for name in hello.SETTINGS.keys() & settings.SETTINGS.keys():
        assert str(hello.SETTINGS[name].default) == str(settings.SETTINGS[name].default)


def test_settings_of_the_code_are_those_of_env_example() -> None:
    lines = (ROOT / ".env.example").read_text().splitlines()
    pairs = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    example = {name: value for name, value in pairs.items() if not name.startswith("PG")}
    assert example == {name: default for name, (default, *_) in declared_settings().items()}


def test_settings_of_the_readme_have_the_defaults_of_the_code() -> None:
    table = {row[0]: row[1] for row in rows(ROOT / "README.md", "Configure it") if not row[0].startswith("PG")}
    assert table.items() <= {name: default for name, (default, *_) in declared_settings().items()}.items()


def test_readme_says_what_the_first_start_downloads() -> None:
    readme = (ROOT / "README.md").read_text()
    downloaded, unpacked = environment.SIZES["run"]
    assert f"downloads about {downloaded} MB" in readme
    assert f"unpacks {unpacked} MB" in readme
    assert f"downloads {environment.SIZES['dev'][0]} MB" in readme


def test_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 120 and "://" not in line] == []


@pytest.mark.parametrize("document", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_make_targets_of_a_document_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    code = "\n".join(re.findall(r"```.*?```|`[^`]+`", document.read_text(), re.DOTALL))
    assert set(re.findall(r"\bmake ([a-z0-9]+(?:-[a-z0-9]+)*)", code)) <= targets


def links() -> Iterator[tuple[Path, str]]:
    for document in PAGES:
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


def test_versions_of_the_pages_are_that_of_the_code() -> None:
    named = {version for page in PAGES for version in re.findall(r"hello:(\d+\.\d+\.\d+)", page.read_text())}
    assert named == {hello.__version__}


def test_picture_of_aws_is_drawn_from_its_source() -> None:
    digest = hashlib.sha256((ROOT / "docs" / "draw.py").read_bytes()).hexdigest()
    assert digest.encode() in (ROOT / "docs" / "aws.png").read_bytes(), "run `make diagrams`"


def test_costs_on_aws_are_those_of_the_program() -> None:
    printed = subprocess.run([sys.executable, "docs/cost.py"], check=True, capture_output=True, text=True, cwd=ROOT)
    assert printed.stdout in (ROOT / "docs" / "aws.md").read_text()


WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
STEPS = [step for job in WORKFLOW["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("command", sorted({step["run"] for step in STEPS if "run" in step}))
def test_command_of_ci_is_a_make_target_or_another_tool(command: str) -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    words = command.removeprefix("${{ matrix.sudo }} ").split()
    assert (words[0] == "make" and words[1] in targets) or words[:2] in (["sudo", "apt-get"], ["go", "run"])


def test_ci_tests_every_python_that_the_makefile_looks_for() -> None:
    named = set(re.findall(r"python(3\.\d+)", (ROOT / "tools/environment.sh").read_text()))
    assert set(WORKFLOW["jobs"]["test"]["strategy"]["matrix"]["python"]) == named
