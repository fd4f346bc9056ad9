"""k8s/: the schemas of Kubernetes and of custom objects, and what must agree between objects and with the service."""

import functools
import json
import os
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
from tests.support.manifests import (
    API_POD,
    DATABASE_POD,
    EVERYTHING,
    PLAIN,
    ROOT,
    Object,
    containers,
    data,
    database_settings,
    environment,
    get,
    main_container,
    of_kind,
    port_numbers,
    quantity,
    title,
    values,
)
from tests.support.postgres import Database
from tests.support.service import Service, body

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

kubernetes_validate.utils.schema_contents = functools.cache(kubernetes_validate.utils.schema_contents)
API_ENVIRONMENT = environment(main_container(API_POD))
LONGEST_REQUEST = hello.QUEUE_TIMEOUT + hello.DATABASE_TIMEOUT


def is_custom(item: Object) -> bool:
    """Return whether an object needs a custom resource definition."""
    group = item["apiVersion"].rpartition("/")[0]
    return "." in group and not group.endswith(".k8s.io")


# --- Schemas ----------------------------------------------------------------------------------------


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


def definitions() -> dict[tuple[str, str], Any]:
    """Return the schema of each custom kind by apiVersion and kind; support/crds/README.md says where they are from."""
    found = {}
    for path in (ROOT / "tests" / "support" / "crds").glob("*.json"):
        definition = json.loads(path.read_text())
        schema = strict(definition["schema"])
        schema["properties"]["metadata"] = {"type": "object"}
        found[f"{definition['group']}/{definition['version']}", definition["kind"]] = schema
    return found


DEFINITIONS = definitions()


def validate_custom(item: Object) -> None:
    """Raise an error if a custom object does not fit its definition."""
    jsonschema.Draft202012Validator(DEFINITIONS[item["apiVersion"], item["kind"]]).validate(item)


CUSTOM = [item for item in EVERYTHING if is_custom(item) and item["kind"] != "ObjectStore"]


@pytest.mark.parametrize("item", CUSTOM, ids=title)
def test_custom_object_fits_its_definition(item: Object) -> None:
    validate_custom(item)


def test_misspelled_custom_field_is_found() -> None:
    cluster = get("Cluster/hello-ha")
    broken = cluster | {"spec": cluster["spec"] | {"instance": 3}}
    with pytest.raises(jsonschema.ValidationError, match="'instance' was unexpected"):
        validate_custom(broken)


def test_object_store_is_configured_as_the_built_in_one() -> None:
    """Check against the barmanObjectStore of a Cluster, which has the same format: ObjectStore has no schema here."""
    cluster = DEFINITIONS["postgresql.cnpg.io/v1", "Cluster"]["properties"]["spec"]["properties"]
    schema = cluster["backup"]["properties"]["barmanObjectStore"]
    jsonschema.Draft202012Validator(schema).validate(get("ObjectStore/hello-ha")["spec"]["configuration"])


def test_plain_folder_needs_no_custom_resource_definition() -> None:
    assert [title(item) for item in PLAIN if is_custom(item)] == []


def test_second_apply_finds_nothing_to_change() -> None:
    """Check that defaults of the API server are written out where `kubectl apply` would see a difference.

    It compares lists without a merge key and `strategy` (patch strategy retainKeys) whole, and finds no `stringData`.
    A PodDisruptionBudget is always `configured`: the patch strategy of its selector is `replace`.
    """
    assert [title(item) for item in PLAIN if "stringData" in item] == []
    rules = [rule for item in of_kind("NetworkPolicy") for rule in values(item["spec"], "ports")]
    assert [port for ports in rules for port in ports if "protocol" not in port] == []
    assert get("Deployment/hello-api")["spec"]["strategy"]["type"] == "RollingUpdate"
    (claim,) = get("StatefulSet/hello-database")["spec"]["volumeClaimTemplates"]
    assert (claim["apiVersion"], claim["kind"]) == ("v1", "PersistentVolumeClaim")
    assert (claim["spec"]["volumeMode"], claim["status"]) == ("Filesystem", {"phase": "Pending"})


# --- References between objects ---------------------------------------------------------------------

PODS = {"api": API_POD, "database": DATABASE_POD}


def selected_pods(labels: dict[str, str]) -> list[Object]:
    """Return the pod templates with some labels."""
    return [pod for pod in PODS.values() if labels.items() <= pod["metadata"]["labels"].items()]


@pytest.mark.parametrize("item", EVERYTHING, ids=title)
def test_object_has_the_recommended_labels(item: Object) -> None:
    for metadata in [item["metadata"], *(template["metadata"] for template in values(item, "template"))]:
        labels = metadata["labels"]
        assert labels.keys() >= LABELS
        postgres = labels["app.kubernetes.io/component"] == "database"
        assert labels["app.kubernetes.io/version"] == ("18" if postgres else hello.__version__)


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
    for item in of_kind(kind):
        spec = item["spec"]
        selector = spec.get("podSelector") or spec["selector"]
        names = {name for name in values(spec, "targetPort", "port") if isinstance(name, str)}
        for pod in selected_pods(selector.get("matchLabels", selector)):
            assert names <= port_numbers(pod).keys(), title(item)


@pytest.mark.parametrize("pod", PODS.values(), ids=PODS)
def test_configuration_of_a_pod_exists_or_is_optional(pod: Object) -> None:
    references = {f"Secret/{ref['name']}": ref for ref in values(pod, "secretRef", "secretKeyRef")}
    references |= {f"ConfigMap/{ref['name']}": ref for ref in values(pod, "configMapRef", "configMap")}
    for name, reference in references.items():
        assert (name in MADE_ELSEWHERE) == reference.get("optional", False)
        assert name in MADE_ELSEWHERE or get(name)


@pytest.mark.parametrize(
    ("item", "key", "kind"),
    [
        ("StatefulSet/hello-database", "serviceName", "Service"),
        ("HorizontalPodAutoscaler/hello-api", "name", "Deployment"),
        ("Ingress/hello-api", "name", "Service"),
        ("ConfigMap/hello-api", "PGHOST", "Service"),
    ],
)
def test_referenced_object_exists(item: str, key: str, kind: str) -> None:
    spec = get(item).get("spec") or get(item)["data"]
    section = spec.get("scaleTargetRef") or next(values(spec, "service"), spec)
    assert get(f"{kind}/{section[key]}")


def test_password_of_the_secret_reaches_both_pods() -> None:
    for pod, name in ((API_POD, "PGPASSWORD"), (DATABASE_POD, "POSTGRES_PASSWORD")):
        for container in containers(pod):
            assert environment(container)[name] == "for-development-only"
            reference = {"name": "hello-database-password", "key": "password", "optional": True}
            assert container["env"] == [{"name": name, "valueFrom": {"secretKeyRef": reference}}]


def test_init_container_has_the_settings_of_the_api() -> None:
    init, api = containers(API_POD)
    for part in ("image", "envFrom", "env", "securityContext", "resources", "volumeMounts"):
        assert init[part] == api[part]


def test_restored_cluster_is_like_the_one_it_replaces() -> None:
    specs = []
    for name in ("hello-ha", "hello-restored"):
        spec = json.loads(json.dumps(get(f"Cluster/{name}")["spec"]).replace(f'"{name}"', '"NAME"'))
        specs.append(
            {key: value for key, value in spec.items() if key not in {"bootstrap", "plugins", "externalClusters"}}
        )
    assert specs[0] == specs[1]


def test_cluster_sets_what_the_database_sets() -> None:
    sizes = {"shared_buffers", "maintenance_work_mem", "max_wal_size"}
    expected = {name: value for name, value in database_settings().items() if name not in sizes}
    parameters = get("Cluster/hello-ha")["spec"]["postgresql"]["parameters"]
    assert {name: value for name, value in parameters.items() if name not in sizes} == expected


def test_images_have_the_version_of_the_service() -> None:
    assert {container["image"] for container in containers(API_POD)} == {f"hello:{hello.__version__}"}


# --- Settings and numbers that must agree -----------------------------------------------------------


def number(name: str) -> float:
    """Return a setting of the API's pods: the manifest's or its default."""
    default = hello.SETTINGS[name].default if name in hello.SETTINGS else settings.SETTINGS[name].default
    return float(API_ENVIRONMENT.get(name) or default)


def test_settings_are_those_of_the_service() -> None:
    known = LIBPQ | hello.SETTINGS.keys() | settings.SETTINGS.keys()
    assert data("ConfigMap", "hello-api").keys() <= known
    assert get("ConfigMap/hello-api-override")["data"].keys() <= known


def test_settings_are_accepted() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import hello, server.settings"],
        cwd=ROOT,
        env=os.environ | API_ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_probes_do_not_depend_on_the_database() -> None:
    probes = [probe for name, probe in main_container(API_POD).items() if name.endswith("Probe")]
    assert [probe["httpGet"]["path"] for probe in probes] == ["/livez"] * 3


def test_pod_stops_within_its_grace_period() -> None:
    delay = main_container(API_POD)["lifecycle"]["preStop"]["sleep"]["seconds"]
    needed = delay + number("GRACEFUL_TIMEOUT") + STOP_MARGIN
    assert needed <= API_POD["spec"]["terminationGracePeriodSeconds"]
    assert number("GRACEFUL_TIMEOUT") >= LONGEST_REQUEST


def test_init_container_gives_up_before_the_rollout() -> None:
    assert number("INIT_TIMEOUT") < get("Deployment/hello-api")["spec"].get("progressDeadlineSeconds", 600)


def test_workers_have_a_cpu_each() -> None:
    assert number("WEB_CONCURRENCY") <= quantity(main_container(API_POD)["resources"]["limits"]["cpu"])


def test_connections_of_a_rollout_fit_the_database() -> None:
    spec = get("Deployment/hello-api")["spec"]
    assert "replicas" not in spec, "each apply would undo what the autoscaler did"
    surge = spec["strategy"]["rollingUpdate"]["maxSurge"]
    most = get("HorizontalPodAutoscaler/hello-api")["spec"]["maxReplicas"]
    slots = hello.find_date_of_birth.slots + hello.save_date_of_birth.slots
    # Old pods may still be there when all new ones are; a new pod also runs init-db.
    needed = (2 * most + surge) * number("WEB_CONCURRENCY") * slots + surge
    for limit in values(EVERYTHING, "max_connections"):
        assert needed <= int(limit) - RESERVED_CONNECTIONS
    assert needed <= int(database_settings()["max_connections"]) - RESERVED_CONNECTIONS


@pytest.mark.parametrize("name", ["StatefulSet/hello-database", "Cluster/hello-ha"])
def test_memory_of_postgres_fits_its_limit(name: str) -> None:
    if name.startswith("Cluster"):
        spec = get(name)["spec"]
        parameters, resources = {"maintenance_work_mem": "64MB"} | spec["postgresql"]["parameters"], spec["resources"]
    else:
        parameters, resources = database_settings(), main_container(DATABASE_POD)["resources"]
    most = quantity(parameters["shared_buffers"]) + int(parameters["max_connections"]) * BACKEND_MIB * 2**20
    most += AUTOVACUUM_WORKERS * quantity(parameters["maintenance_work_mem"])
    assert most <= quantity(resources["limits"]["memory"])


def test_connection_takes_no_more_memory_than_counted(
    postgres: Database, database: dict[str, str], tmp_path: Path
) -> None:
    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("only Linux says what memory a process has for itself")
    with Service(tmp_path, database, WEB_CONCURRENCY="1") as service, ThreadPoolExecutor(50) as pool:
        names = [a + b for a in "abcdefghij" for b in "abcdefghij"] * 3
        saved = pool.map(lambda name: service.ask("PUT", f"/hello/{name}", body("1990-05-17")).status, names)
        assert set(saved) == {204}
        assert set(pool.map(lambda name: service.ask("GET", f"/hello/{name}").status, names)) == {200}
        rows = postgres.query("SELECT pid FROM pg_stat_activity WHERE application_name = %s", service.name)
        pages = [Path(f"/proc/{pid}/smaps_rollup").read_text() for (pid,) in rows]
    own = [int(page.split("Private_Dirty:")[1].split()[0]) / 1024 for page in pages]
    assert len(own) == hello.find_date_of_birth.slots + hello.save_date_of_birth.slots
    assert 0.5 < max(own) < BACKEND_MIB


def test_wal_leaves_half_of_the_volume() -> None:
    (claim,) = get("StatefulSet/hello-database")["spec"]["volumeClaimTemplates"]
    volume = quantity(claim["spec"]["resources"]["requests"]["storage"])
    # max_wal_size is soft: late checkpoints exceed it by half.
    assert quantity(database_settings()["max_wal_size"]) * 1.5 < volume / 2


@pytest.mark.parametrize("pod", PODS.values(), ids=PODS)
def test_pod_meets_the_restricted_standard(pod: Object) -> None:
    assert pod["spec"]["automountServiceAccountToken"] is False
    assert {"hostNetwork", "hostPID", "hostIPC"} & pod["spec"].keys() == set()
    assert pod["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    for container in containers(pod):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
