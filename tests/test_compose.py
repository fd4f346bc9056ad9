"""The image and the composed system on a Docker engine, as `make build` and `make compose-up` make them.

They are made from a copy of this folder, with a project name, an image tag and ports of their own.
"""

import functools
import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest

from tests.support import make
from tests.support.network import ask, free_port
from tests.support.service import body
from tests.support.wait import in_thread, wait_until

ROOT = Path(__file__).parents[1]
PROJECT = f"hello-test-{os.getpid()}"
VERSION = f"test-{os.getpid()}"
IMAGE = f"hello:{VERSION}"
SECRET = "decoy-4711"
FILES = {"hello.py", "gunicorn.conf.py", "schema.sql", "openapi.yaml"}
FILES |= {f"server/{path.name}" for path in (ROOT / "server").glob("*.py")}

run = functools.partial(make.run, HELLO_VERSION=VERSION)


def inspect(kind: str, name: str) -> dict[str, Any]:
    return json.loads(run("docker", kind, "inspect", name))[0]


# --- Fixtures ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy this folder, with secrets in it that must not get anywhere, as readable as a umask of 077 leaves it."""
    if subprocess.run(["sh", "-c", "timeout 20 docker compose ls"], capture_output=True, check=False).returncode != 0:
        pytest.skip("not run: no Docker engine with Compose answers")
    folder = tmp_path_factory.mktemp("clone") / "hello"
    unwanted = shutil.ignore_patterns(".venv", ".postgres", ".git", ".env", "secrets", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, folder, ignore=unwanted)
    for name in ("id_rsa", "password.txt", "hello.key", ".git/config", ".config/token"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(SECRET)
    for path in folder.rglob("*"):
        path.chmod(path.stat().st_mode & 0o700)
    return folder


@pytest.fixture(scope="module")
def image(clone: Path) -> Iterator[dict[str, Any]]:
    """Build the image."""
    run("make", "build", folder=clone, VERSION="of-another-tool", COMPOSE_PROJECT_NAME="of-another-tool")
    yield inspect("image", IMAGE)
    run("docker", "image", "rm", "--force", IMAGE)


@pytest.fixture(scope="module")
def container(image: dict[str, Any]) -> Iterator[str]:
    """Run the image alone, hardened, without a database."""
    name = f"{PROJECT}-alone"
    hardened = ["--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges"]
    options = ["--detach", f"--name={name}", "--publish=127.0.0.1::8080", "--health-interval=3s", *hardened]
    run("docker", "run", *options, IMAGE)
    yield name
    run("docker", "rm", "--force", name)


class System:
    """What `make compose-up` brings up from a folder."""

    def __init__(self, folder: Path, project: str) -> None:
        self.folder = folder
        self.project = project
        self.port = free_port()
        self.output = ""
        self.failure = ""  # the output of a `make compose-up` that failed before
        self.containers = ""  # their ids before a `make compose-restart`

    def make(self, *arguments: str, status: int = 0, **settings: str) -> str:
        command = ["make", *arguments, f"COMPOSE_PROJECT_NAME={self.project}"]
        return run(*command, folder=self.folder, status=status, PORT=str(self.port), **settings)

    def compose(self, *arguments: str, status: int = 0) -> str:
        return run("docker", "compose", f"--project-name={self.project}", *arguments, folder=self.folder, status=status)

    def execute(self, service: str, *command: str, status: int = 0) -> str:
        return run("docker", "exec", f"{self.project}-{service}-1", *command, status=status).strip()

    def sql(self, query: str) -> str:
        """Ask the database itself, as its superuser."""
        return self.execute("database", "psql", "--username=postgres", "--dbname=hello", "-XAt", f"--command={query}")

    def fail_and_start(self) -> "System":
        """Bring it up where init-db cannot work, and once more where it can."""
        files = "docker-compose.yml:docker-compose.override.yml:broken.yml"
        self.failure = self.make("compose-up", COMPOSE_FILE=files, status=2)
        self.output = self.make("compose-up")
        return self

    def start_and_restart(self) -> "System":
        """Bring it up, save a user, and take it down and up."""
        self.output = self.make("compose-up")
        assert ask(self.port, "PUT", "/hello/Zoe", body("1990-05-17")).status == 204
        self.containers = self.compose("ps", "--quiet")
        self.make("compose-restart")
        return self


# A test need not wait as long for the first check as a machine that serves, nor for the disk.
QUICK = """services:
  api: {healthcheck: {interval: 1s}}
  database: {healthcheck: {interval: 1s}, environment: {POSTGRES_INITDB_ARGS: --no-sync}}
"""
BROKEN = "services: {init-db: {environment: {PGDATABASE: nowhere, INIT_TIMEOUT: 0.5}}}"


@pytest.fixture(scope="module", autouse=True)  # They come up while the tests of the image run.
def systems(clone: Path, image: dict[str, Any]) -> Iterator[list[Future[System]]]:
    """Bring up two systems side by side: one without a .env, one with its password in files, as README.md says."""
    (clone / "docker-compose.override.yml").write_text(QUICK)
    (clone / "broken.yml").write_text(BROKEN)
    folder = clone.with_name("secrets")
    shutil.copytree(clone, folder)
    (folder / "secrets").mkdir(mode=0o700)
    for name, text in {"password": SECRET, "service": f"[hello]\npassword={SECRET}\n"}.items():
        (folder / "secrets" / name).write_text(text)
        (folder / "secrets" / name).chmod(0o444)
    files = "docker-compose.yml:compose/secrets.yml:docker-compose.override.yml"
    (folder / ".env").write_text(f"COMPOSE_FILE={files}\nTZ=Asia/Kathmandu\n")
    plain, with_secrets = System(clone, PROJECT), System(folder, f"{PROJECT}-secrets")
    with ThreadPoolExecutor() as side_by_side:
        started = [side_by_side.submit(plain.fail_and_start), side_by_side.submit(with_secrets.start_and_restart)]
        yield started
        wait(started)
        list(side_by_side.map(lambda s: s.compose("down", "--volumes", "--timeout", "0"), (plain, with_secrets)))


@pytest.fixture(scope="module")
def system(systems: list[Future[System]]) -> System:
    return systems[0].result()


@pytest.fixture(scope="module")
def system_with_secrets(systems: list[Future[System]]) -> System:
    return systems[1].result()


# --- The image, and one hardened container of it ----------------------------------------------------


def test_image_holds_time_zones_of_its_own(container: str) -> None:
    options = ["--env=TZ=Asia/Kathmandu", "--env=PYTHONTZPATH="]
    found = run("docker", "exec", *options, container, "python", "-c", "import hello; print(hello.TZ)")
    assert found.strip() == "Asia/Kathmandu"


def test_image_adds_less_than_60_mb_to_its_base(image: dict[str, Any], clone: Path) -> None:
    base = f"{IMAGE}-base"
    run("docker", "build", "--target=base", f"--tag={base}", str(clone))
    added = image["Size"] - inspect("image", base)["Size"]
    run("docker", "image", "rm", "--force", base)
    assert 0 < added < 60_000_000


def test_image_holds_the_service_and_no_test_cache_or_secret(image: dict[str, Any]) -> None:
    # The base's own files are not ours to judge: so /app and /venv, and the places where a build leaves things.
    script = f"find /app /venv /root /tmp /var/tmp /home -type f; echo --; grep -rl {SECRET} /app /venv /root; true"
    output = run("docker", "run", "--rm", "--user=0", "--network=none", IMAGE, "sh", "-c", script)
    found, texts = (part.split() for part in output.split("\n--\n"))
    assert {path.removeprefix("/app/") for path in found if path.startswith("/app/")} == FILES
    assert "/venv/bin/gunicorn" in found
    unwanted = re.compile(r"test_|_test\.py|/tests?/|/\.cache/|/\.env|site-packages/pip/|^/tmp/|^/var/tmp/|\.whl$")
    assert [path for path in found if unwanted.search(path)] == []
    assert texts == []


def test_build_context_holds_only_what_the_image_needs(clone: Path, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY . /\n")
    options = ["--file", str(tmp_path / "Dockerfile"), "--output", f"type=local,dest={tmp_path / 'context'}"]
    run("docker", "build", *options, str(clone), DOCKER_BUILDKIT="1")
    context = tmp_path / "context"
    sent = {str(path.relative_to(context)) for path in context.rglob("*") if path.is_file()}
    assert sent == FILES | {"requirements/service.txt"}


def test_image_says_what_it_is(image: dict[str, Any]) -> None:
    labels = image["Config"]["Labels"]
    assert labels["org.opencontainers.image.version"] == VERSION
    assert labels["org.opencontainers.image.licenses"] == "MIT"
    assert image["Config"]["User"] == "10001:10001"
    assert set(image["Config"]["ExposedPorts"]) == {"8080/tcp", "8081/tcp"}


def test_hardened_container_becomes_healthy_and_answers(container: str) -> None:
    wait_until(lambda: inspect("container", container)["State"]["Health"]["Status"] == "healthy", 30)
    port = int(inspect("container", container)["NetworkSettings"]["Ports"]["8080/tcp"][0]["HostPort"])
    assert ask(port, "GET", "/livez").status == 200
    assert ask(port, "GET", "/readyz").status == 503
    assert ask(port, "GET", "/metrics").status == 404


def test_hardened_container_runs_as_nobody_in_particular(container: str) -> None:
    status = run("docker", "exec", container, "sh", "-c", "cat /proc/[0-9]*/status")
    assert set(re.findall(r"^Uid:\t(.*)", status, re.MULTILINE)) == {"10001\t10001\t10001\t10001"}
    assert set(re.findall(r"^CapEff:\t(.*)", status, re.MULTILINE)) == {"0000000000000000"}
    assert set(re.findall(r"^NoNewPrivs:\t(.*)", status, re.MULTILINE)) == {"1"}
    assert run("docker", "diff", container) == ""


def test_metrics_are_served_to_other_containers(container: str) -> None:
    address = inspect("container", container)["NetworkSettings"]["IPAddress"]
    fetch = f"import urllib.request as u; print(u.urlopen('http://{address}:8081/metrics', timeout=5).read().decode())"
    assert "hello_build_info" in run("docker", "run", "--rm", IMAGE, "python", "-c", fetch)


def test_health_check_fails_where_nothing_answers(image: dict[str, Any], container: str) -> None:
    check = image["Config"]["Healthcheck"]["Test"]
    assert check[0] == "CMD"
    run("docker", "exec", container, *check[1:])
    run("docker", "exec", "--env=PORT=8099", container, *check[1:], status=1)


# --- What is not ours -------------------------------------------------------------------------------


@pytest.fixture
def other(tmp_path: Path) -> Iterator[System]:
    """A project of somebody else, with a container and a volume."""
    (tmp_path / "compose.yml").write_text(
        f"services: {{photos: {{image: {IMAGE}, command: [sleep, infinity], volumes: ['photos:/photos'], "
        "network_mode: none}}\nvolumes: {photos: {}}\n"
    )
    other = System(tmp_path, f"{PROJECT}-other")
    other.compose("up", "--detach")
    yield other
    other.compose("down", "--volumes", "--timeout", "0")


def test_clean_leaves_what_other_compose_files_created(image: dict[str, Any], clone: Path, other: System) -> None:
    System(clone, other.project).make("clean", "WITH_DATA=yes", HELLO_VERSION="none")
    assert inspect("container", f"{other.project}-photos-1")["State"]["Running"]
    assert inspect("volume", f"{other.project}_photos")


@pytest.mark.parametrize(("tagged", "is_left"), [(IMAGE, False), ("postgres:18", True)], ids=["built", "other"])
def test_clean_removes_an_image_only_if_make_built_it(clone: Path, tagged: str, is_left: bool) -> None:
    tag = f"{VERSION}-clean"
    run("docker", "tag", tagged, f"hello:{tag}")
    System(clone, f"{PROJECT}-clean").make("clean", HELLO_VERSION=tag)
    found = run("docker", "image", "ls", "--quiet", f"hello:{tag}")
    run("docker", "image", "rm", "--force", f"hello:{tag}")
    assert bool(found) == is_left


def test_data_of_version_1_move_as_the_page_says(image: dict[str, Any], clone: Path) -> None:
    old, new = System(clone, f"{PROJECT}-old"), System(clone, f"{PROJECT}-new")
    page = (ROOT / "docs/containers.md").read_text().partition("## Upgrade from version 1\n")[2]
    commands = page.partition("```sh\n")[2].partition("```")[0]
    for shown, used in {"hello-birthday-greetings_": f"{new.project}_", " hello_": f" {old.project}_"}.items():
        commands = commands.replace(shown, used)
    commands = commands.replace("--project-name hello ", f"--project-name {old.project} ")

    def in_volumes(script: str, **folders: System) -> str:
        volumes = [f"--volume={system.project}_data:/{name}" for name, system in folders.items()]
        return run("docker", "run", "--rm", "--network=none", *volumes, "postgres:18", "sh", "-ec", script)

    try:
        old.compose("create", "database")
        script = "cd old; mkdir -p 18/docker; echo old > 18/docker/kept; chmod 700 18/docker; chown -R postgres 18"
        in_volumes(script, old=old)
        run("bash", "-ec", commands, folder=clone, COMPOSE_PROJECT_NAME=new.project)
        assert old.compose("ps", "--all", "--quiet") == ""
        everything = "find . -printf '%p %u:%g %m\\n' | sort; cat 18/docker/kept"
        script = f"cd /old; {everything}; cd /new; echo --; {everything}; echo new > 18/docker/kept"
        copied, _, copy = in_volumes(script, old=old, new=new).partition("--\n")
        assert copied == copy
        run("bash", "-ec", commands, folder=clone, status=1, COMPOSE_PROJECT_NAME=new.project)
        assert in_volumes("cat new/18/docker/kept", new=new) == "new\n"
    finally:
        for system in (old, new):
            system.compose("down", "--volumes", "--timeout", "0")


# --- The composed system ----------------------------------------------------------------------------


def test_compose_up_says_how_to_use_it_and_warns_of_the_password(system: System) -> None:
    assert f"curl http://127.0.0.1:{system.port}/hello/Zoe" in system.output
    assert "WARNING: the database has the development password" in system.output


def test_compose_up_prints_why_init_db_failed_and_serves_once_the_cause_is_gone(system: System) -> None:
    expected = r"^init-db: .*nowhere.*\nhello is not up: .* then `make compose-up` again\.$"
    assert re.search(expected, system.failure, re.MULTILINE)
    assert ask(system.port, "GET", "/readyz").status == 200


def test_development_password_is_that_of_env_example(system: System) -> None:
    [password] = re.findall(r"^PGPASSWORD=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE)
    services = json.loads(system.compose("config", "--format", "json"))["services"]
    assert services["database"]["environment"]["POSTGRES_PASSWORD"] == password
    assert services["api"]["environment"]["PGPASSWORD"] == password


def test_services_are_hardened_bounded_and_restarted_and_only_the_api_is_published(system: System) -> None:
    assert len(system.compose("ps", "--quiet").split()) == 2
    for service in ("api", "database"):
        container = inspect("container", f"{system.project}-{service}-1")
        published = [port for port, addresses in container["NetworkSettings"]["Ports"].items() if addresses]
        assert published == (["8080/tcp"] if service == "api" else [])
        host = container["HostConfig"]
        assert host["CapDrop"] == ["ALL"]
        assert host["SecurityOpt"] == ["no-new-privileges"]
        assert host["Memory"] > 0
        assert host["PidsLimit"] > 0
        assert host["RestartPolicy"]["Name"] == "unless-stopped"
        assert host["ReadonlyRootfs"] == (service == "api")


def test_service_is_no_superuser_of_the_database(system: System) -> None:
    assert system.sql("SELECT rolname, rolsuper FROM pg_roles WHERE rolcanlogin ORDER BY 1") == "hello|f\npostgres|t"
    assert ask(system.port, "GET", "/readyz").status == 200
    assert system.sql("SELECT usename FROM pg_stat_activity WHERE application_name = 'hello' LIMIT 1") == "hello"
    login = "import psycopg2; psycopg2.connect(user='postgres')"
    assert "password authentication failed" in system.execute("api", "python", "-c", login, status=1)


def test_stop_answers_the_request_that_has_begun(system: System) -> None:  # the last of `system`: it has no API then
    api, content = f"{system.project}-api-1", body("1990-05-17")
    with socket.create_connection(("127.0.0.1", system.port), timeout=30) as client:
        client.sendall(b"PUT /hello/Begun HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(content))
        stop = in_thread(run, "docker", "stop", "--time", "30", api)
        wait_until(lambda: "Handling signal: term" in run("docker", "logs", api), 30)
        client.sendall(content)
        assert client.recv(65536).startswith(b"HTTP/1.1 204 ")
    stop.result(60)
    assert inspect("container", api)["State"]["ExitCode"] == 0
    assert system.sql("SELECT date_of_birth FROM users WHERE username = 'Begun'") == "1990-05-17"


def test_password_in_a_file_is_used_and_in_no_environment(system_with_secrets: System) -> None:
    for name in system_with_secrets.compose("ps", "--all", "--quiet").split():
        environment = inspect("container", name)["Config"]["Env"]
        passwords = [setting for setting in environment if setting.startswith(("PGPASSWORD=", "POSTGRES_PASSWORD="))]
        assert set(passwords) <= {"PGPASSWORD=", "POSTGRES_PASSWORD="}
        assert SECRET not in str(environment)
    assert "development password" not in system_with_secrets.output


def test_env_wins_over_env_example(system_with_secrets: System) -> None:
    assert system_with_secrets.execute("api", "printenv", "TZ") == "Asia/Kathmandu"


def test_data_survives_down_and_up(system_with_secrets: System) -> None:
    containers = set(system_with_secrets.compose("ps", "--quiet").split())
    assert containers.isdisjoint(system_with_secrets.containers.split())
    assert ask(system_with_secrets.port, "GET", "/hello/Zoe").status == 200
    assert system_with_secrets.sql("SELECT date_of_birth FROM users") == "1990-05-17"
