"""k8s/: the schemas of Kubernetes and of custom objects, and what must agree between objects and with the service."""

import functools
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest

import hello
from server import settings
from tests.support import manifests as k8s
from tests.support.manifests import API_POD, DATABASE_POD, EVERYTHING, ROOT, Object, get, quantity, title, values
from tests.support.postgres import Database
from tests.support.service import Service

OLDEST, NEWEST = "1.30", kubernetes_validate.latest_version()
LABELS = {f"app.kubernetes.io/{name}" for name in ("name", "instance", "version", "component", "part-of", "managed-by")}
SELECTOR_LABELS = {f"app.kubernetes.io/{name}" for name in ("name", "instance", "component")}
LIBPQ = {"PGHOST", "PGUSER", "PGDATABASE", "PGPASSWORD", "PGSSLMODE", "PGTARGETSESSIONATTRS"}
# By tools/k8s_secret.sh or by users.
MADE_ELSEWHERE = {"ConfigMap/hello-api-override", "ConfigMap/hello-database-ca", "Secret/hello-database-password"}
RESERVED_CONNECTIONS = 3  # superuser_reserved_connections
BACKEND_MIB = 2.5  # memory of a connection; a test measures it
AUTOVACUUM_WORKERS = 3
STOP_MARGIN = 2  # seconds for gunicorn's master to end after its workers
MASTER_MIB = 32
WORKER_MIB = 112  # with unfinished requests of all its clients; resilience/test_memory.py measures it

kubernetes_validate.utils.schema_contents = functools.cache(kubernetes_validate.utils.schema_contents)
PODS = {"api": API_POD, "database": DATABASE_POD}
API_ENVIRONMENT = k8s.environment(k8s.main_container(API_POD))
LONGEST_REQUEST = hello.QUEUE_TIMEOUT + hello.DATABASE_TIMEOUT
POOL_CONNECTIONS = sum(pool.size for pool in hello.POOLS)


# --- Schemas ----------------------------------------------------------------------------------------


def is_custom(item: Object) -> bool:
    """Return whether an object needs a custom resource definition."""
    group = item["apiVersion"].rpartition("/")[0]
    return "." in group and not group.endswith(".k8s.io")


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("item", [item for item in EVERYTHING if not is_custom(item)], ids=title)
def test_object_fits_its_schema(item: Object, version: str) -> None:
    kubernetes_validate.validate(item, version, strict=True)


def strict(schema: Any) -> Any:
    """Return an openAPIV3Schema as a JSON schema that refuses unknown properties."""
    if isinstance(schema, list):
        return [strict(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    result = {key: strict(value) for key, value in schema.items() if key != "format"}
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        result.setdefault("additionalProperties", False)
    return result


def validator(item: Object) -> jsonschema.Draft202012Validator:
    """Return the validator of a custom object's kind; support/crds/README.md says where its schema is from."""
    group, _, version = item["apiVersion"].partition("/")
    path = ROOT / "tests" / "support" / "crds" / f"{group}_{item['kind'].lower()}s.json"
    found = json.loads(path.read_text())
    assert found["version"] == version
    schema = strict(found["schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("item", [item for item in EVERYTHING if is_custom(item)], ids=title)
def test_custom_object_fits_its_definition(item: Object) -> None:
    validator(item).validate(item)


def test_plain_folder_needs_no_custom_resource_definition() -> None:
    assert [title(item) for item in k8s.PLAIN if is_custom(item)] == []


def test_misspelled_custom_field_is_found() -> None:
    cluster = get("Cluster/hello-ha")
    broken = cluster | {"spec": cluster["spec"] | {"instance": 3}}
    with pytest.raises(jsonschema.ValidationError, match="'instance' was unexpected"):
        validator(cluster).validate(broken)


@pytest.mark.parametrize("pod", PODS.values(), ids=PODS)
def test_pod_meets_the_restricted_standard_and_shows_the_last_lines_of_a_failed_container(pod: Object) -> None:
    assert {"hostNetwork", "hostPID", "hostIPC"} & pod["spec"].keys() == set()
    assert pod["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    for container in k8s.containers(pod):
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"


# --- References between objects ---------------------------------------------------------------------


@pytest.mark.parametrize("item", EVERYTHING, ids=title)
def test_object_has_the_recommended_labels(item: Object) -> None:
    for metadata in [item["metadata"], *(template["metadata"] for template in values(item, "template"))]:
        labels = metadata["labels"]
        assert labels.keys() >= LABELS
        postgres = labels["app.kubernetes.io/component"] == "database"
        assert labels["app.kubernetes.io/version"] == ("18" if postgres else hello.__version__)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("k8s/api-deployment.yaml", r"image: hello:(.+)"),
        ("Makefile", r"HELLO_VERSION \?= (.+)"),
        ("docker-compose.yml", r"image: hello:\$\{HELLO_VERSION:-(.+)\}"),
        ("Dockerfile", r"ARG VERSION=(.+)"),
    ],
)
def test_image_has_the_version_of_the_service(name: str, pattern: str) -> None:
    assert set(re.findall(pattern, (ROOT / name).read_text())) == {hello.__version__}


def selected_pods(labels: dict[str, str]) -> list[Object]:
    """Return the pod templates with some labels."""
    return [pod for pod in PODS.values() if labels.items() <= pod["metadata"]["labels"].items()]


@pytest.mark.parametrize("item", EVERYTHING, ids=title)
def test_selector_selects_a_pod_by_labels_that_never_change(item: Object) -> None:
    for selector in values(item.get("spec", {}), "selector", "podSelector", "labelSelector"):
        labels = selector.get("matchLabels", selector)
        if cluster := labels.get("cnpg.io/cluster"):
            assert get(f"Cluster/{cluster}")
        else:
            assert labels and labels.keys() <= SELECTOR_LABELS
            assert selected_pods(labels)


@pytest.mark.parametrize("kind", ["Service", "NetworkPolicy", "PodMonitor"])
def test_named_port_is_a_port_of_the_selected_pods(kind: str) -> None:
    for item in (item for item in EVERYTHING if item["kind"] == kind):
        spec = item["spec"]
        selector = spec.get("podSelector") or spec["selector"]
        names = {name for name in values(spec, "targetPort", "port") if isinstance(name, str)}
        for pod in selected_pods(selector.get("matchLabels", selector)):
            assert names <= k8s.port_numbers(pod).keys(), title(item)


@pytest.mark.parametrize("pod", PODS.values(), ids=PODS)
def test_configuration_of_a_pod_exists_or_is_optional(pod: Object) -> None:
    references = {f"Secret/{ref['name']}": ref for ref in values(pod, "secretRef", "secretKeyRef")}
    references |= {f"ConfigMap/{ref['name']}": ref for ref in values(pod, "configMapRef", "configMap")}
    for name, reference in references.items():
        assert (name in MADE_ELSEWHERE) == reference.get("optional", False)
        assert name in MADE_ELSEWHERE or get(name)


def test_referenced_object_exists() -> None:
    assert get(f"Service/{get('StatefulSet/hello-database')['spec']['serviceName']}")
    assert get(f"Service/{API_ENVIRONMENT['PGHOST']}")
    assert get(f"Deployment/{get('HorizontalPodAutoscaler/hello-api')['spec']['scaleTargetRef']['name']}")
    for service in values(get("Ingress/hello-api"), "service"):
        assert get(f"Service/{service['name']}")


@pytest.mark.parametrize(
    ("pod", "variables"),
    [
        (API_POD, {"PGUSER": "username", "PGPASSWORD": "password"}),
        (DATABASE_POD, {"POSTGRES_PASSWORD": "password"}),
    ],
    ids=PODS,
)
def test_secret_wins_over_the_development_password(pod: Object, variables: dict[str, str]) -> None:
    for container in k8s.containers(pod):
        references = {item["name"]: item["valueFrom"]["secretKeyRef"] for item in container["env"]}
        assert {name: reference["key"] for name, reference in references.items()} == variables
        assert {reference["name"] for reference in references.values()} == {"hello-database-password"}
        assert "for-development-only" in k8s.environment(container).values()


# --- Settings and numbers that must agree -----------------------------------------------------------


def number(name: str) -> float:
    """Return a setting of the API's pods: the manifest's or its default."""
    default = hello.SETTINGS[name].default if name in hello.SETTINGS else settings.SETTINGS[name].default
    return float(API_ENVIRONMENT.get(name) or default)


def test_settings_are_those_of_the_service_and_accepted() -> None:
    known = LIBPQ | hello.SETTINGS.keys() | settings.SETTINGS.keys()
    assert k8s.data("ConfigMap", "hello-api").keys() <= known
    command = [sys.executable, "-c", "import hello, server.settings"]
    variables = os.environ | API_ENVIRONMENT
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_cluster_sets_what_the_database_sets() -> None:
    sizes = {"shared_buffers", "maintenance_work_mem", "max_wal_size"}
    expected = {name: value for name, value in k8s.database_settings().items() if name not in sizes}
    parameters = get("Cluster/hello-ha")["spec"]["postgresql"]["parameters"]
    assert {name: value for name, value in parameters.items() if name not in sizes} == expected


def test_pod_stops_within_its_grace_period() -> None:
    delay = k8s.main_container(API_POD)["lifecycle"]["preStop"]["sleep"]["seconds"]
    needed = delay + number("GRACEFUL_TIMEOUT") + STOP_MARGIN
    assert needed <= API_POD["spec"]["terminationGracePeriodSeconds"]
    assert number("GRACEFUL_TIMEOUT") >= LONGEST_REQUEST


def test_init_container_gives_up_before_the_rollout() -> None:
    assert number("INIT_TIMEOUT") < get("Deployment/hello-api")["spec"].get("progressDeadlineSeconds", 600)


def test_limits_of_the_api_fit_its_workers() -> None:
    limits = k8s.main_container(API_POD)["resources"]["limits"]
    workers = number("WEB_CONCURRENCY")
    assert workers <= quantity(limits["cpu"])
    assert (MASTER_MIB + WORKER_MIB * workers) * 2**20 <= quantity(limits["memory"])
    assert number("WORKER_CONNECTIONS") <= 1000, "WORKER_MIB was measured with 1,000 clients"


def test_connections_of_a_rollout_fit_the_database() -> None:
    spec = get("Deployment/hello-api")["spec"]
    assert "replicas" not in spec, "each apply would undo what the autoscaler did"
    surge = spec["strategy"]["rollingUpdate"]["maxSurge"]
    most = get("HorizontalPodAutoscaler/hello-api")["spec"]["maxReplicas"]
    # Old pods may still be there when all new ones are; a new pod also runs init-db.
    needed = (2 * most + surge) * number("WEB_CONCURRENCY") * POOL_CONNECTIONS + surge
    for limit in [k8s.database_settings()["max_connections"], *values(get("Cluster/hello-ha"), "max_connections")]:
        assert needed <= int(limit) - RESERVED_CONNECTIONS


@pytest.mark.parametrize("name", ["StatefulSet/hello-database", "Cluster/hello-ha"])
def test_memory_of_postgres_fits_its_limit(name: str) -> None:
    if name.startswith("Cluster"):
        spec = get(name)["spec"]
        parameters, resources = {"maintenance_work_mem": "64MB"} | spec["postgresql"]["parameters"], spec["resources"]
    else:
        parameters, resources = k8s.database_settings(), k8s.main_container(DATABASE_POD)["resources"]
    most = quantity(parameters["shared_buffers"]) + int(parameters["max_connections"]) * BACKEND_MIB * 2**20
    most += AUTOVACUUM_WORKERS * quantity(parameters["maintenance_work_mem"])
    assert most <= quantity(resources["limits"]["memory"])


def test_connection_takes_no_more_memory_than_counted(
    postgres: Database, database: dict[str, str], tmp_path: Path
) -> None:
    with Service(tmp_path, database, WEB_CONCURRENCY="1") as service, ThreadPoolExecutor(20) as pool:
        names = [a + b for a in "abcdefghij" for b in "abcdefghij"]
        assert set(pool.map(lambda name: service.put(name).status, names)) == {204}
        assert set(pool.map(lambda name: service.ask("GET", f"/hello/{name}").status, names)) == {200}
        rows = postgres.query("SELECT pid FROM pg_stat_activity WHERE application_name = %s", service.name)
        pages = [Path(f"/proc/{pid}/smaps_rollup").read_text() for (pid,) in rows]
    own = [int(page.split("Private_Dirty:")[1].split()[0]) / 1024 for page in pages]
    assert len(own) == POOL_CONNECTIONS
    assert 0.5 < max(own) < BACKEND_MIB


def test_wal_leaves_half_of_the_volume() -> None:
    (claim,) = get("StatefulSet/hello-database")["spec"]["volumeClaimTemplates"]
    volume = quantity(claim["spec"]["resources"]["requests"]["storage"])
    # max_wal_size is soft: late checkpoints exceed it by half.
    assert quantity(k8s.database_settings()["max_wal_size"]) * 1.5 < volume / 2
