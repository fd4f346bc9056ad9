"""What the Markdown files say, compared with what is there: links, settings, and what they mark as checked.

A fenced block is checked if `checked` follows its language: ```console checked, ```sql checked.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import tomllib
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import kubernetes_validate
import psycopg2
import pytest
import yaml

import hello
from server import settings, telemetry
from tests.support.network import free_port
from tests.support.postgres import Database
from tests.support.wait import wait_until
from tools.embedded_postgres import binaries

ROOT = Path(__file__).parents[1]
PATTERNS = ("*.md", ".github/*.md", "[a-z]*/*.md", "[a-z]*/*/*.md", "[a-z]*/*/*/*.md")
PAGES = sorted(path for pattern in PATTERNS for path in ROOT.glob(pattern))
OBSERVABILITY = ROOT / "docs/observability.md"
RUNBOOK = ROOT / "monitoring/runbook.md"

# What is different each time.
MASKS = {
    r"\b[0-9a-f]{32}\b": "ID",
    r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT": "DATE",
    r"in \d+ day": "in N day",
    r'"\d+\.\d+\.\d+"': "VERSION",
    r"(?m)(?<= )\d+\.0$": "COUNT",
    r"(?m) +$": "",
}


class Block(NamedTuple):
    """A fenced block of a page; `info` is its language, and `checked` if the page says so."""

    page: Path
    info: str
    text: str

    @property
    def name(self) -> str:
        """What the report of the tests calls it."""
        return f"{self.page.relative_to(ROOT)}-{self.text[:30]}"


def blocks(page: Path, info: str) -> list[Block]:
    """Return the blocks of a page whose first line has this after the fence."""
    found = re.findall(rf"^( *)```{info}\n(.*?)^ *```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [Block(page, info, re.sub(f"(?m)^{indent}", "", text)) for indent, text in found]


def checked(language: str) -> list[Block]:
    """Return the checked blocks of all pages in a language."""
    return [block for page in PAGES for block in blocks(page, f"{language} checked")]


class Command(NamedTuple):
    """A command of a block, and the output that the block shows after it."""

    text: str
    output: str


def commands(block: Block) -> Iterator[Command]:
    """Yield the commands of a block: each line of `sh`, the lines after `$` of `console`; others may continue them."""
    text = re.sub(r"\\\n +", "", block.text)
    if block.info == "sh":
        yield from (Command(line, "") for line in re.split(r"\n(?! )", text))
        return
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        yield Command(command, output)


def mask(text: str) -> str:
    """Replace what is different each time."""
    for pattern, replacement in MASKS.items():
        text = re.sub(pattern, replacement, text)
    return text.strip()


def assert_output(command: Command, output: str) -> None:
    """Compare an output with the page's, where a line `...` stands for any lines."""
    shown = ["(?:.*\n)*" if line == "..." else re.escape(line + "\n") for line in mask(command.output).splitlines()]
    assert re.fullmatch("".join(shown), f"{mask(output)}\n".lstrip()), f"{command.text}\n{output}"


class Documented:
    """A service started as `make run` starts it, with its output in `lines` and its ports for those of the pages."""

    def __init__(self, folder: Path) -> None:
        self.ports = {"8080": str(free_port()), "8081": str(free_port())}
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        self.environment |= {"PORT": self.ports["8080"], "METRICS_PORT": self.ports["8081"]}
        gunicorn = [f"{sys.prefix}/bin/gunicorn", "hello:application"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tools.serve", folder / "data", *gunicorn],
            cwd=ROOT,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
        )
        self.lines: list[str] = []
        threading.Thread(target=self.read, daemon=True).start()
        wait_until(lambda: any("/hello/Zoe" in line and "PUT" not in line for line in self.lines), 60)

    def read(self) -> None:
        """Collect what it prints."""
        assert self.process.stdout
        self.lines.extend(self.process.stdout)

    def run(self, command: Command, folder: Path) -> str:
        """Run a command in a folder with its own ports; return its output with those of the pages."""
        if command.text == "make run":
            printed = [line for line in self.lines if not line.startswith(("{", "20"))]
            return self.with_shown_ports("".join(printed))
        text = re.sub("|".join(self.ports), lambda found: self.ports[found[0]], command.text)
        done = subprocess.run(
            ["bash", "-c", text], check=False, capture_output=True, text=True, cwd=folder, env=self.environment
        )
        assert done.returncode == 0, f"{command.text}\n{done.stderr}"
        return self.with_shown_ports(done.stdout)

    def with_shown_ports(self, text: str) -> str:
        """Replace the ports of the service by those of the pages."""
        for shown, port in self.ports.items():
            text = text.replace(port, shown)
        return text

    def stop(self) -> None:
        """Stop it."""
        self.process.terminate()
        self.process.wait(30)


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
    return tmp_path


@pytest.fixture(scope="module")
def server() -> Iterator[Database]:
    """Start a Postgres with the table, without the role of the service."""
    database = Database()
    database.start()
    database.apply_schema()
    yield database
    database.stop()


# --- What the pages mark as checked -----------------------------------------------------------------


@pytest.mark.parametrize("block", checked("console"), ids=lambda block: block.name)
def test_commands_of_a_block_print_what_it_shows(block: Block, service: Documented, checkout: Path) -> None:
    for command in commands(block):
        assert_output(command, service.run(command, checkout))


@pytest.mark.parametrize("block", checked("sql"), ids=lambda block: block.name)
def test_statements_of_a_block_run(block: Block, server: Database) -> None:
    with contextlib.closing(server.connect()) as connection, connection.cursor() as cursor:
        connection.autocommit = False
        cursor.execute(block.text)


def test_block_of_each_language_is_checked() -> None:
    assert checked("console")
    assert checked("sql")


# --- Single statements of pages ---------------------------------------------------------------------


def command_with(page: str, part: str) -> str:
    """Return the command of a page that has a part."""
    found = [command.text for block in blocks(ROOT / page, "sh") for command in commands(block) if part in command.text]
    (text,) = found
    return text


def test_data_is_copied_to_the_cluster_as_the_page_says(server: Database, tmp_path: Path) -> None:
    """`kubectl exec` runs the page's command beside one of two servers, as in the containers of two pods."""
    server.query("INSERT INTO users VALUES ('Zoe', '1990-05-17')")
    server.query("CREATE DATABASE hello TEMPLATE postgres")
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
            ["bash", "-eo", "pipefail", "-c", command_with("k8s/ha/README.md", "pg_dump")],
            check=True,
            env=os.environ | server.environment | {"PATH": path},
        )
        with psycopg2.connect(host=target.sockets_folder, port=target.port, user="hello", dbname="hello") as copied:
            cursor = copied.cursor()
            cursor.execute("SELECT username, date_of_birth FROM users")
            assert cursor.fetchall() == [("Zoe", date(1990, 5, 17))]
        copied.close()
    finally:
        target.stop()


def run_from_kubernetes_md(part: str, old: str, new: str) -> list[str]:
    """Run the page's command that has a part, with `old` replaced by `new`; return the lines of its output."""
    command = command_with("docs/kubernetes.md", part).replace(old, new)
    done = subprocess.run(["bash", "-c", command], check=True, capture_output=True, text=True, cwd=ROOT)
    return done.stdout.splitlines()


def test_images_are_renamed_as_the_page_says() -> None:
    before = (ROOT / "k8s/api-deployment.yaml").read_text().splitlines()
    after = run_from_kubernetes_md("s|image", "sed -i.bak", "sed")
    renamed = [(old, new) for old, new in zip(before, after, strict=True) if "image: " in old]
    assert renamed
    assert all(new == old.replace("hello:", "registry.example.com/hello:") for old, new in renamed)


def test_files_for_a_managed_database_are_those_of_the_api() -> None:
    applied = run_from_kubernetes_md("ls k8s/", "kubectl apply -f", "echo")
    left_out = {path.name for path in (ROOT / "k8s").glob("*.yaml")} - {Path(name).name for name in applied}
    assert left_out == {f"database-{kind}.yaml" for kind in ("config", "service", "statefulset")} | {"api-service.yaml"}


def test_manifest_of_a_page_fits_the_schema() -> None:
    manifest = yaml.safe_load(blocks(ROOT / "docs/kubernetes.md", "yaml")[0].text)
    kubernetes_validate.validate(manifest, "1.30", strict=True)


def test_warnings_of_the_runbook_are_those_of_an_outage(caplog: pytest.LogCaptureFixture) -> None:
    outage = telemetry.Outage()
    outage.failure("find", TimeoutError("Postgres does not answer in time"), 10)
    outage.unavailable = 45
    outage.success(22.3)
    (shown,) = blocks(RUNBOOK, "text")
    assert shown.text.splitlines() == caplog.messages


def test_log_line_has_the_fields_that_the_page_shows(service: Documented, checkout: Path) -> None:
    (shown,) = blocks(OBSERVABILITY, "json")
    service.run(Command("curl -s http://127.0.0.1:8080/hello/Zoe", ""), checkout)
    wait_until(lambda: any('"message": "request"' in line for line in service.lines))
    line = next(line for line in service.lines if '"message": "request"' in line)
    assert list(json.loads(line)) == list(json.loads(shown.text))


# --- Tables -----------------------------------------------------------------------------------------


def rows(page: Path, heading: str) -> Iterator[list[str]]:
    """Return the cells of the table under a heading, without backquotes."""
    section = page.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    for line in re.findall(r"^\| `.*$", section, re.MULTILINE):
        yield [cell.strip().replace("`", "") for cell in line.strip("|").split("|")]


def test_metrics_are_those_of_the_page(service: Documented, checkout: Path) -> None:
    text = service.run(Command("curl -s http://127.0.0.1:8081/metrics", ""), checkout)
    served = set(re.findall(r"^# TYPE (\w+)", text, re.MULTILINE))
    named = {name for row in rows(OBSERVABILITY, "Metrics") for name in row[0].split(", ")}
    assert named == served


def declared_settings() -> dict[str, list[str]]:
    """Return the default, the unit and the least value of each setting of the code."""
    declared = {}
    all_settings: list[Any] = [*hello.SETTINGS.values(), *settings.SETTINGS.values()]
    for setting in all_settings:
        default = str(setting.default).removesuffix(".0")
        unit = {"seconds": "s", "bytes": "bytes"}.get(setting.unit, "")
        declared[setting.name] = [default, unit, "" if setting.minimum is None else f"{setting.minimum:g}"]
    return declared


def test_settings_of_the_code_are_those_of_configuration_md() -> None:
    table = {name: row for name, *row, _ in rows(ROOT / "docs/configuration.md", "Settings")}
    assert table == declared_settings()


def test_settings_of_the_code_are_those_of_env_example() -> None:
    lines = (ROOT / ".env.example").read_text().splitlines()
    pairs = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    example = {name: value for name, value in pairs.items() if not name.startswith("PG")}
    assert example == {name: default for name, (default, *_) in declared_settings().items()}


def test_settings_of_the_readme_have_the_defaults_of_the_code() -> None:
    table = {row[0]: row[1] for row in rows(ROOT / "README.md", "Configure it") if not row[0].startswith("PG")}
    assert table.items() <= {name: default for name, (default, *_) in declared_settings().items()}.items()


def test_mutations_of_the_page_exist() -> None:
    entries = tomllib.loads((ROOT / "tests/mutations.toml").read_text())["mutation"]
    section = (ROOT / "docs/architecture.md").read_text().partition("| mutation |")[2].partition("\n## ")[0]
    named = set(re.findall(r"`([a-z0-9]+_\w+)`(?=,| \|$)", section, re.MULTILINE))
    assert named
    assert named <= {entry["name"] for entry in entries}


# --- Names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_make_targets_of_a_page_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    code = "\n".join(re.findall(r"```.*?```|`[^`]+`", page.read_text(), re.DOTALL))
    assert set(re.findall(r"\bmake ([a-z0-9]+(?:-[a-z0-9]+)*)", code)) <= targets


def links() -> Iterator[tuple[Path, str]]:
    """Yield each link to a file or a heading, with its page."""
    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if not re.match(r"[a-z]+:", link):
                yield page, link


def heading_id(heading: str) -> str:
    """Return the fragment that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize(("page", "link"), list(links()), ids=lambda value: str(value).removeprefix(f"{ROOT}/"))
def test_link_of_a_page_leads_somewhere(page: Path, link: str) -> None:
    name, _, fragment = link.partition("#")
    target = (page.parent / name) if name else page
    assert target.exists()
    if fragment:
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
        assert fragment in {heading_id(heading) for heading in headings}


def test_versions_of_the_pages_are_that_of_the_code() -> None:
    named = {version for page in PAGES for version in re.findall(r"hello:(\d+\.\d+\.\d+)", page.read_text())}
    assert named == {hello.__version__}
