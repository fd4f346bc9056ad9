"""The containers of k8s/, run by Compose with the limits, settings, mounts and probes of the manifests."""

import contextlib
import json
import os
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support import manifests
from tests.support.make import run
from tests.support.manifests import API_POD, DATABASE_POD, Object, main_container, quantity
from tests.support.network import Response, ask, free_port
from tests.support.service import body
from tests.support.wait import in_thread, wait_until

PROJECT = f"hello-k8s-test{os.getpid()}"
IMAGE = f"hello:{PROJECT}"
PODS = {"hello-database": DATABASE_POD, "hello-api": API_POD}
STATS = ["docker", "stats", "--no-stream", "--format={{.Name}} {{.MemUsage}}"]
WITH_WRONG_PASSWORD = ["run", "--rm", "--no-deps", "--env=PGPASSWORD=wrong", "--env=INIT_TIMEOUT=3", "init-db"]
NEEDED = "timeout 20 docker compose ls && docker image inspect postgres:18"


def service(pod: Object, container: Object, folder: Path, **more: object) -> Object:
    """Return a container of a pod as a service of Compose; the ConfigMaps that it mounts are written to a folder."""
    context = pod["spec"]["securityContext"] | container["securityContext"]
    assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"]
    limits = container["resources"]["limits"]
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    dns = pod["spec"].get("dnsConfig", {}).get("options", [])
    tmpfs, mounts = [], []
    for mount in container["volumeMounts"]:
        volume, path = volumes.get(mount["name"], {}), mount["mountPath"]
        if "emptyDir" in volume:
            tmpfs.append(f"{path}:size={int(quantity(volume['emptyDir']['sizeLimit']))},mode=777")
        elif "configMap" in volume:
            source = folder / volume["configMap"]["name"]
            source.mkdir(exist_ok=True)
            for name, text in manifests.data("ConfigMap", source.name).items():
                (source / name).write_text(text)
            mounts.append(f"{source}:{path}:ro")
        else:  # the volume claim
            mounts.append(f"data:{path}")
    return {
        "image": IMAGE if pod is API_POD else container["image"],
        "entrypoint": container.get("command"),
        "command": container.get("args"),
        "environment": manifests.environment(container),
        "dns_opt": [f"{option['name']}:{option['value']}" for option in dns],
        "user": f"{context['runAsUser']}:{context['runAsGroup']}",
        "group_add": [str(context.get("fsGroup", context["runAsGroup"]))],
        "read_only": True,
        "security_opt": ["no-new-privileges"],
        "cap_drop": context["capabilities"]["drop"],
        "mem_limit": int(quantity(limits["memory"])),
        "cpus": min(quantity(limits.get("cpu", "1000")), os.cpu_count() or 1),
        "tmpfs": tmpfs,
        "volumes": mounts,
    } | more


def set_volume_group() -> None:
    """Do to the volume what the kubelet does before each start of a pod with an fsGroup."""
    context = DATABASE_POD["spec"]["securityContext"]
    assert context["fsGroupChangePolicy"] == "OnRootMismatch"
    script = f"""
        [ -e /v/18 ] || {{ chown 0:0 /v; chmod 755 /v; }}
        [ "$(stat -c %g:%A /v)" != {context["fsGroup"]}:drwxrwsr-x ] || exit 0
        chgrp -R {context["fsGroup"]} /v
        chmod -R g+rwX /v
        find /v -type d -exec chmod g+s {{}} +
    """
    run("docker", "run", "--rm", "--user=0", f"--volume={PROJECT}:/v", "--entrypoint=sh", "postgres:18", "-ec", script)


class Pods:
    """The pods of the database and the API, as services of Compose; the files that they need are in a folder."""

    usages: Future[str]  # of memory
    refused: Future[str]  # the output of init-db with a wrong password

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.file = folder / "compose.json"
        database = main_container(DATABASE_POD)
        environment = manifests.environment(database) | {"POSTGRES_INITDB_ARGS": "--no-sync"}  # need not be durable
        more: Object = {"depends_on": {"init-db": {"condition": "service_completed_successfully"}}}
        more |= {"ports": [f"127.0.0.1:{self.port}:8080"], "healthcheck": {"disable": True}}  # as in a cluster
        [init_db] = API_POD["spec"]["initContainers"]
        services = {
            "hello-database": service(DATABASE_POD, database, folder, environment=environment),
            "init-db": service(API_POD, init_db, folder),
            "hello-api": service(API_POD, main_container(API_POD), folder, **more),
        }
        document = {"services": services, "volumes": {"data": {"external": True, "name": PROJECT}}}
        self.file.write_text(json.dumps(document).replace("$", "$$"))

    def compose(self, *arguments: str, status: int = 0) -> str:
        return run("docker", "compose", f"--file={self.file}", f"--project-name={PROJECT}", *arguments, status=status)

    def start(self, *arguments: str) -> None:
        """Start pods, and wait until the API reaches the database."""
        set_volume_group()
        self.compose("up", "--detach", *arguments)
        wait_until(self.is_ready, 120)

    def is_ready(self) -> bool:
        with contextlib.suppress(OSError):
            return self.ask("GET", "/readyz").status == 200
        return False

    def stop(self, name: str) -> str:
        """Stop a container as the kubelet does after preStop; return its exit status."""
        delay = main_container(PODS[name]).get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        seconds = PODS[name]["spec"]["terminationGracePeriodSeconds"] - delay
        run("docker", "stop", f"--time={seconds}", f"{PROJECT}-{name}-1")
        return run("docker", "inspect", "--format={{.State.ExitCode}}", f"{PROJECT}-{name}-1").strip()

    def execute(self, *command: str) -> str:
        return run("docker", "exec", f"{PROJECT}-hello-database-1", *command).strip()

    def psql(self, query: str, *options: str) -> str:
        """Run a query as the superuser in the database's container."""
        command = ["psql", "-tAq", "--username=postgres", "--dbname=hello", *options, f"--command={query}"]
        return self.execute(*command)

    def ask(self, method: str, path: str, content: bytes | None = None) -> Response:
        return ask(self.port, method, path, content)


@pytest.fixture(scope="module")
def pods(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pods]:
    """Build the image of this tree and start the pods of the database and the API."""
    if subprocess.run(["sh", "-c", NEEDED], capture_output=True, check=False).returncode != 0:
        pytest.skip("not run: no Docker engine with Compose and the image postgres:18")
    run("make", "build", f"HELLO_VERSION={PROJECT}")
    pods = Pods(tmp_path_factory.mktemp("volumes"))
    run("docker", "volume", "create", PROJECT)
    try:
        pods.start()
        with ThreadPoolExecutor() as meanwhile:  # Each takes 3 s, most of it waiting.
            pods.usages = meanwhile.submit(run, *STATS, *(f"{PROJECT}-{name}-1" for name in PODS))
            pods.refused = meanwhile.submit(pods.compose, *WITH_WRONG_PASSWORD, status=1)
            yield pods
    finally:
        pods.compose("down", "--timeout=0")
        run("docker", "volume", "rm", PROJECT)
        run("docker", "image", "rm", "--force", IMAGE)


def test_probes_succeed(pods: Pods) -> None:
    database, api = main_container(DATABASE_POD), main_container(API_POD)
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        pods.execute(*database[kind]["exec"]["command"])
        probe = api[kind]["httpGet"]
        assert manifests.port_numbers(API_POD)[probe["port"]] == 8080
        assert pods.ask("GET", probe["path"]).status == 200


def test_database_has_its_settings(pods: Pods) -> None:
    # Over TCP: a Unix socket has no keepalives.
    names = ", ".join(f"current_setting('{name}')" for name in manifests.database_settings())
    found = pods.psql(f"SELECT {names}", "--host=127.0.0.1")
    assert found.split("|") == list(manifests.database_settings().values())


def test_failed_statement_leaves_no_name_in_a_log(pods: Pods) -> None:
    in_thread(pods.psql, "BEGIN; LOCK TABLE users; SELECT pg_sleep(60)")
    sleeping = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
    wait_until(lambda: pods.psql(sleeping), 30)
    assert pods.ask("PUT", "/hello/Unmentionable", body("1987-06-05")).status == 503
    pods.psql(f"SELECT pg_terminate_backend(pid) FROM ({sleeping}) AS sleeping")
    logs = pods.compose("logs")
    assert "canceling statement due to" in logs
    assert "Unmentionable" not in logs and "1987-06-05" not in logs


def test_memory_fits_the_request(pods: Pods) -> None:
    usages = pods.usages.result()
    for name, pod in PODS.items():
        [usage] = re.findall(rf"^{PROJECT}-{name}-1 ([\w.]+)B /", usages, re.MULTILINE)
        requested = quantity(main_container(pod)["resources"]["requests"]["memory"])
        assert 10 * 2**20 < quantity(usage) < requested, name


def test_wrong_password_never_gets_past_the_init_container(pods: Pods) -> None:
    assert "password authentication failed" in pods.refused.result()


def test_pod_stays_ready_without_its_database_and_answers_503(pods: Pods) -> None:
    assert pods.ask("PUT", "/hello/Ada", body("1815-12-10")).status == 204
    assert pods.stop("hello-database") == "0"
    assert pods.ask("GET", main_container(API_POD)["readinessProbe"]["httpGet"]["path"]).status == 200
    assert pods.ask("GET", "/hello/Ada").status == 503
    assert pods.ask("GET", "/readyz").status == 503
    run("docker", "rm", f"{PROJECT}-hello-database-1")
    pods.start("--no-deps", "hello-database")
    assert pods.psql("SELECT date_of_birth FROM users WHERE username = 'Ada'") == "1815-12-10"
    wait_until(lambda: pods.ask("GET", "/hello/Ada").status == 200, 30)


def test_api_stops_gracefully(pods: Pods) -> None:
    assert pods.stop("hello-api") == "0"
