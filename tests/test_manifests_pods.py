"""The containers of k8s/, run by a container engine with the limits, settings, mounts and probes of the manifests."""

import copy
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.manifests import (
    API_POD,
    DATABASE_POD,
    ROOT,
    Object,
    containers,
    data,
    database_settings,
    environment,
    main_container,
    port_numbers,
    quantity,
)
from tests.support.network import ask
from tests.support.wait import wait_until

START_SECONDS = 60


def docker(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run a command of docker."""
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False, timeout=timeout)


class Pod:
    """A pod as containers.

    Args:
        name: of its container; the part before the last hyphen is the name of its network.
        template: of the pod.
        folder: where its ConfigMaps are written.
        volume: of its volume claim.
    """

    def __init__(self, name: str, template: Object, folder: Path, volume: str = "") -> None:
        self.name = name
        self.network = name.rpartition("-")[0]
        self.template = template
        self.spec: Object = template["spec"]
        self.folder = folder
        self.volume = volume

    def privileges(self, container: Object) -> list[str]:
        """Return the options of `docker run` for what a container may do."""
        context = self.spec["securityContext"] | container["securityContext"]
        assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"]
        options = ["--read-only", "--security-opt", "no-new-privileges"]
        options += ["--user", f"{context['runAsUser']}:{context['runAsGroup']}"]
        options += ["--cap-drop", ",".join(context["capabilities"]["drop"])]
        if "fsGroup" in context:
            options += ["--group-add", str(context["fsGroup"])]
        limits = container["resources"]["limits"]
        options += ["--memory", str(int(quantity(limits["memory"])))]
        if "cpu" in limits:
            options += ["--cpus", str(min(quantity(limits["cpu"]), os.cpu_count() or 1))]
        return options

    def arguments(self, container: Object) -> list[str]:
        """Return the options of `docker run` for what a container may do and sees."""
        options = [*self.privileges(container), "--network", self.network]
        for option in self.spec.get("dnsConfig", {}).get("options", []):
            options += ["--dns-opt", f"{option['name']}:{option['value']}"]
        for key, value in environment(container).items():
            options += ["--env", f"{key}={value}"]
        volumes = {volume["name"]: volume for volume in self.spec["volumes"]}
        group = self.spec["securityContext"].get("fsGroup", 0)
        for mount in container["volumeMounts"]:
            options += self.mount(volumes.get(mount["name"], {}), mount["mountPath"], group)
        return options

    def mount(self, volume: Object, path: str, group: int) -> list[str]:
        """Return the options of `docker run` for a volume; one that is not in the pod's list is the claim."""
        if "emptyDir" in volume:
            size = int(quantity(volume["emptyDir"]["sizeLimit"]))
            return ["--tmpfs", f"{path}:size={size},mode={'2777' if group else '777'},gid={group}"]
        if "configMap" not in volume:
            return ["--volume", f"{self.volume}:{path}"]
        source = self.folder / volume["configMap"]["name"]
        source.mkdir(exist_ok=True)
        for name, text in data("ConfigMap", source.name).items():
            (source / name).write_text(text)
            (source / name).chmod(0o644)
        return ["--volume", f"{source}:{path}:ro"]

    def set_volume_group(self) -> None:
        """Do to the volume what the kubelet does before each start of a pod with an fsGroup."""
        group = self.spec["securityContext"]["fsGroup"]
        assert self.spec["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"
        script = f"""
            [ -e /v/18 ] || {{ chown 0:0 /v; chmod 755 /v; }}
            [ "$(stat -c %g:%A /v)" = {group}:drwxrwsr-x ] && exit
            find /v -exec chgrp {group} {{}} + -exec chmod g+rw {{}} + && find /v -type d -exec chmod g+xs {{}} +
        """
        image = main_container(self.template)["image"]
        command = ["--volume", f"{self.volume}:/v", "--entrypoint", "sh", image, "-c", script]
        assert docker("run", "--rm", "--user", "0", *command).returncode == 0

    def run(self, container: Object, *options: str) -> None:
        """Run a container."""
        words = [*container.get("command", []), *container.get("args", [])]
        entrypoint = ["--entrypoint", words.pop(0)] if "command" in container else []
        done = docker("run", *self.arguments(container), *options, *entrypoint, container["image"], *words)
        assert done.returncode == 0, done.stderr

    def start(self, alias: str, *options: str) -> None:
        """Start the pod and wait until it is ready."""
        if self.volume:
            self.set_volume_group()
        for container in self.spec.get("initContainers", []):
            self.run(container, "--rm", "--name", f"{self.name}-init")
        container = main_container(self.template)
        self.run(container, "--detach", "--name", self.name, "--network-alias", alias, *options)
        for kind in ("startupProbe", "readinessProbe"):
            wait_until(lambda kind=kind: self.succeeds(kind), START_SECONDS)  # type: ignore[misc]

    def succeeds(self, kind: str) -> bool:
        """Return whether a probe succeeds."""
        probe = main_container(self.template)[kind]
        if "exec" in probe:
            return docker("exec", self.name, *probe["exec"]["command"]).returncode == 0
        return self.ask(port_numbers(self.template)[probe["httpGet"]["port"]], probe["httpGet"]["path"])[0] == 200

    def ask(self, port: int, path: str, content: bytes | None = None) -> tuple[int, str]:
        """Return status and content of a response; status 0 if there is none."""
        published = int(docker("port", self.name, str(port)).stdout.split()[0].rpartition(":")[2])
        try:
            response = ask(published, "PUT" if content else "GET", path, content)
        except OSError:
            return 0, ""
        return response.status, response.content.decode()

    def stop(self) -> int:
        """Stop the container as the kubelet does after preStop; return its exit status."""
        delay = main_container(self.template).get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        docker("stop", "--time", str(self.spec["terminationGracePeriodSeconds"] - delay), self.name)
        return int(docker("inspect", "--format", "{{.State.ExitCode}}", self.name).stdout)

    def psql(self, query: str, *options: str) -> str:
        """Run a query as the superuser in the database's container."""
        command = ["psql", "-tAq", "--username=postgres", "--dbname=hello", *options, f"--command={query}"]
        return docker("exec", self.name, *command).stdout.strip()

    def logs(self) -> str:
        done = docker("logs", self.name)
        return done.stdout + done.stderr


def date_of_birth(name: str) -> str:
    return f"SELECT date_of_birth FROM users WHERE username = '{name}'"


def skip_without_engine() -> None:
    """Skip the test if no container engine answers, or if it does not have the database's image."""
    try:
        if docker("info", timeout=10).returncode != 0:
            pytest.skip("no container engine answers `docker info`")
    except (FileNotFoundError, subprocess.TimeoutExpired):
        pytest.skip("there is no container engine")
    if docker("image", "inspect", main_container(DATABASE_POD)["image"]).returncode != 0:
        pytest.skip("the image of the database is missing: `docker pull postgres:18`")


@pytest.fixture(scope="module")
def pods(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Pod, Pod]]:
    """Build the image of this tree and start the pods of the database and the API."""
    skip_without_engine()
    prefix = f"hello-k8s-test{os.getpid()}"
    image = f"hello:{prefix}"
    subprocess.run(["make", "build", f"HELLO_VERSION={prefix}"], cwd=ROOT, check=True, capture_output=True)
    template = copy.deepcopy(API_POD)
    for container in containers(template):
        container["image"] = image
    folder = tmp_path_factory.mktemp("volumes")
    docker("network", "create", prefix)
    docker("volume", "create", f"{prefix}-data")
    database = Pod(f"{prefix}-database", DATABASE_POD, folder, f"{prefix}-data")
    api = Pod(f"{prefix}-api", template, folder)
    try:
        database.start("hello-database")
        api.start("hello-api", "--publish", "127.0.0.1::8080")
        yield database, api
    finally:
        docker("rm", "--force", "--volumes", database.name, api.name, f"{api.name}-init")
        docker("volume", "rm", f"{prefix}-data")
        docker("network", "rm", prefix)
        docker("image", "rm", "--force", image)


def test_put_is_saved_and_get_greets(pods: tuple[Pod, Pod]) -> None:
    database, api = pods
    assert api.ask(8080, "/hello/Zoe", b'{"dateOfBirth": "1990-05-17"}') == (204, "")
    assert database.psql(date_of_birth("Zoe")) == "1990-05-17"
    status, content = api.ask(8080, "/hello/Zoe")
    assert (status, content[:24]) == (200, '{"message": "Hello, Zoe!')


@pytest.mark.parametrize("kind", ["startupProbe", "readinessProbe", "livenessProbe"])
def test_probe_succeeds(pods: tuple[Pod, Pod], kind: str) -> None:
    assert all(pod.succeeds(kind) for pod in pods)


@pytest.mark.parametrize("index", [0, 1], ids=["database", "api"])
def test_memory_fits_the_request(pods: tuple[Pod, Pod], index: int) -> None:
    pod = pods[index]
    usage = docker("stats", "--no-stream", "--format", "{{.MemUsage}}", pod.name).stdout.split("/")[0].strip("B \n")
    requested = quantity(main_container(pod.template)["resources"]["requests"]["memory"])
    assert 10 * 2**20 < quantity(usage) < requested


def test_database_has_its_settings(pods: tuple[Pod, Pod]) -> None:
    database, _ = pods
    # Over TCP: a Unix socket has no keepalives.
    found = {name: database.psql(f"SHOW {name}", "--host=127.0.0.1") for name in database_settings()}
    assert found == database_settings()


@pytest.mark.parametrize(("user", "password"), [("hello", "wrong"), ("postgres", "for-development-only")])
def test_database_refuses_a_connection_without_the_password(pods: tuple[Pod, Pod], user: str, password: str) -> None:
    command = ["run", "--rm", "--network", pods[0].network, "--entrypoint", "psql", "postgres:18"]
    done = docker(*command, f"host=hello-database user={user} password={password} dbname=hello", "--command=SELECT 1")
    assert done.returncode != 0
    assert "password authentication failed" in done.stderr


def test_failed_statement_leaves_no_name_in_a_log(pods: tuple[Pod, Pod]) -> None:
    database, api = pods
    lock = "BEGIN; LOCK TABLE users; SELECT pg_sleep(60)"
    docker("exec", "--detach", database.name, "psql", "--username=postgres", "--dbname=hello", f"--command={lock}")
    sleeping = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
    wait_until(lambda: database.psql(sleeping))
    assert api.ask(8080, "/hello/Unmentionable", b'{"dateOfBirth": "1987-06-05"}')[0] == 503
    database.psql(f"SELECT pg_terminate_backend(pid) FROM ({sleeping}) AS sleeping")
    for pod in pods:
        assert "Unmentionable" not in pod.logs()
        assert "1987-06-05" not in pod.logs()
    assert "canceling statement due to" in database.logs()


def test_pod_stays_ready_without_its_database_and_answers_503(pods: tuple[Pod, Pod]) -> None:
    database, api = pods
    assert api.ask(8080, "/hello/Ada", b'{"dateOfBirth": "1815-12-10"}')[0] == 204
    assert database.stop() == 0
    assert api.succeeds("readinessProbe")
    assert api.ask(8080, "/hello/Ada")[0] == 503
    assert api.ask(8080, "/readyz")[0] == 503
    docker("rm", "--volumes", database.name)
    database.start("hello-database")
    assert database.psql(date_of_birth("Ada")) == "1815-12-10"
    wait_until(lambda: api.ask(8080, "/hello/Ada")[0] == 200, START_SECONDS)


def test_api_stops_gracefully(pods: tuple[Pod, Pod]) -> None:
    _, api = pods
    assert api.stop() == 0
    docker("start", api.name)
    wait_until(lambda: api.succeeds("readinessProbe"), START_SECONDS)


def test_wrong_password_never_gets_past_the_init_container(pods: tuple[Pod, Pod]) -> None:
    _, api = pods
    init = copy.deepcopy(api.spec["initContainers"][0])
    options: list[Any] = [*api.arguments(init), "--rm", "--env", "PGPASSWORD=wrong", "--env", "INIT_TIMEOUT=2"]
    words = init["command"]
    done = docker("run", *options, "--entrypoint", words[0], init["image"], *words[1:])
    assert done.returncode != 0
    assert "password authentication failed" in done.stderr
