"""k8s/: what Kubernetes' schemas say, what they cannot see, and the containers run as the manifests have them.

A check is a function from objects to the problems it finds. It is called with the manifests, where it must find
nothing, and with copies broken in one place each (BROKEN), where it must find something.
"""

import base64
import copy
import datetime
import functools
import itertools
import json
import os
import re
import runpy
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

import hello
from tools import embedded_postgres as embedded

ROOT = Path(__file__).parents[1]
K8S = ROOT / "k8s"
CRDS = ROOT.parent / "shared" / "crds"
OLDEST, NEWEST = "1.30", kubernetes_validate.latest_version()
RECOMMENDED = {"name", "instance", "version", "component", "part-of", "managed-by"}
STABLE = {"name", "instance", "component"}
PASSWORDS = ["hello-database-development", "hello-database-password"]  # the later one wins
# By you or ha/, by you, by secret.sh.
MADE_ELSEWHERE = {"ConfigMap/hello-api-override", "ConfigMap/hello-database-ca", "Secret/hello-database-password"}
RESERVED_CONNECTIONS = 3  # Postgres' superuser_reserved_connections
BACKEND_MIB = 2.5  # a connection that has run both statements: 1.7 MiB of its own, and its page tables
PATIENCE = 60  # seconds in which a container must start here
STOP_MARGIN = 2  # seconds for gunicorn's master to end after its workers

Object = dict[str, Any]

kubernetes_validate.utils.schema_contents = functools.cache(kubernetes_validate.utils.schema_contents)


# --- Reading manifests ------------------------------------------------------------------------------


def load(pattern: str) -> list[Object]:
    """Return the objects of the files of k8s/ that match a pattern."""
    return [item for path in sorted(K8S.glob(pattern)) for item in yaml.safe_load_all(path.read_text())]


PLAIN, EVERYTHING = load("*.yaml"), load("**/*.yaml")


def title(item: Object) -> str:
    return f"{item['kind']}/{item['metadata']['name']}"


def get(objects: list[Object], name: str) -> Object:
    """Return an object by its kind and name, such as Service/hello-api."""
    return next(item for item in objects if title(item) == name)


def of_kind(objects: list[Object], *kinds: str) -> Iterator[Object]:
    return (item for item in objects if item["kind"] in kinds)


def pods(objects: list[Object]) -> Iterator[tuple[str, dict[str, str], Object]]:
    """Yield owner, labels and spec of every pod template."""
    for item in of_kind(objects, "Deployment", "StatefulSet"):
        yield title(item), item["spec"]["template"]["metadata"]["labels"], item["spec"]["template"]["spec"]


def containers(spec: Object) -> list[Object]:
    return spec.get("initContainers", []) + spec["containers"]


def selected(objects: list[Object], labels: dict[str, str]) -> list[Object]:
    """Return the specs of the pods that have all these labels."""
    return [spec for _, own, spec in pods(objects) if labels.items() <= own.items()]


def port_names(spec: Object) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for item in spec["containers"] for port in item.get("ports", [])}


def quantity(text: str) -> float:
    """Return bytes or CPUs of a Kubernetes quantity or a Postgres size."""
    number, unit = re.fullmatch(r"([0-9.]+)(m|[KMG]i|[kMG]B|)", str(text)).groups()
    return float(number) * {"": 1, "m": 0.001, "K": 2**10, "k": 2**10, "M": 2**20, "G": 2**30}[unit[:1]]


def environment(objects: list[Object], container: Object) -> dict[str, str]:
    """Return a container's environment as the kubelet makes it: of several sources, the later one wins."""
    values = {}
    for source in container["envFrom"]:
        kind = "ConfigMap" if "configMapRef" in source else "Secret"
        reference = source.get("configMapRef") or source["secretRef"]
        for item in objects:
            if title(item) == f"{kind}/{reference['name']}":
                data = item.get("data", {}) | item.get("stringData", {})
                values |= {source.get("prefix", "") + key: value for key, value in data.items()}
    return values


def api(objects: list[Object]) -> Object:
    return get(objects, "Deployment/hello-api")["spec"]["template"]["spec"]


def database(objects: list[Object]) -> Object:
    return get(objects, "StatefulSet/hello-database")["spec"]["template"]["spec"]


def database_settings(objects: list[Object]) -> dict[str, str]:
    """Return what the database's arguments set."""
    arguments = database(objects)["containers"][0]["args"]
    return dict(pair.split("=") for flag, pair in zip(arguments[::2], arguments[1::2], strict=True) if flag == "-c")


def gunicorn_settings(objects: list[Object], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return what gunicorn.conf.py makes of the API's environment."""
    with monkeypatch.context() as patch:
        for name, value in environment(objects, api(objects)["containers"][0]).items():
            patch.setenv(name, value)
        return runpy.run_path(str(ROOT / "gunicorn.conf.py"))


# --- Checks -----------------------------------------------------------------------------------------

Check = Callable[[list[Object]], Iterator[str]]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


def is_custom(item: Object) -> bool:
    group = item["apiVersion"].rpartition("/")[0]
    return "." in group and not group.endswith(".k8s.io")


@check
def schema(objects: list[Object]) -> Iterator[str]:
    for item in objects:
        for version in (OLDEST, NEWEST):
            if not is_custom(item):
                try:
                    kubernetes_validate.validate(item, version, strict=True)
                except kubernetes_validate.ValidationError as error:
                    yield f"{title(item)} in {version}: {error.message}"


@check
def labels(objects: list[Object]) -> Iterator[str]:
    versions = {"database": "18"}
    for item in objects:
        templates = [item["spec"]["template"]["metadata"]] if item["kind"] in ("Deployment", "StatefulSet") else []
        for metadata in [item["metadata"], *templates]:
            own = {key.removeprefix("app.kubernetes.io/"): value for key, value in metadata["labels"].items()}
            if not own.keys() >= RECOMMENDED:
                yield f"{title(item)} lacks {RECOMMENDED - own.keys()}"
            elif own["version"] != versions.get(own["component"], hello.__version__):
                yield f"{title(item)} has version {own['version']}"


@check
def selectors(objects: list[Object]) -> Iterator[str]:
    def found(value: Any) -> Iterator[dict[str, str]]:
        if isinstance(value, dict):
            for key, inner in value.items():
                if key == "selector" and "matchLabels" not in inner:
                    yield inner
                elif key in ("selector", "podSelector", "labelSelector"):
                    yield inner["matchLabels"]
                else:
                    yield from found(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from found(inner)

    clusters = {item["metadata"]["name"] for item in of_kind(objects, "Cluster")}
    for item in objects:
        for labels in found(item.get("spec", {})):
            if cluster := labels.get("cnpg.io/cluster"):
                if cluster not in clusters or len(labels) > 1:
                    yield f"{title(item)} selects no cluster: {labels}"
            elif not {key.removeprefix("app.kubernetes.io/") for key in labels} <= STABLE or not labels:
                yield f"{title(item)} selects by what changes: {labels}"
            elif not selected(objects, labels):
                yield f"{title(item)} selects no pod: {labels}"
    for item in of_kind(objects, "Deployment", "StatefulSet"):
        wanted = item["spec"]["selector"]["matchLabels"]
        if not wanted.items() <= item["spec"]["template"]["metadata"]["labels"].items():
            yield f"{title(item)} does not select its own pods"


@check
def ports(objects: list[Object]) -> Iterator[str]:
    for item in of_kind(objects, "Service"):
        for port in item["spec"]["ports"]:
            for spec in selected(objects, item["spec"]["selector"]):
                if port["targetPort"] not in port_names(spec):
                    yield f"{title(item)}: {port['targetPort']} is no named port"
    for item in of_kind(objects, "PodMonitor"):
        for endpoint in item["spec"]["podMetricsEndpoints"]:
            for spec in selected(objects, item["spec"]["selector"]["matchLabels"]):
                if endpoint["port"] not in port_names(spec):
                    yield f"{title(item)}: {endpoint['port']} is no named port"
    for item in of_kind(objects, "NetworkPolicy"):
        own = selected(objects, item["spec"]["podSelector"]["matchLabels"])
        for rule in item["spec"].get("ingress", []):
            for port in rule["ports"]:
                if own and not any(port["port"] in port_names(spec) for spec in own):
                    yield f"{title(item)}: {port['port']} is no named port"
    for item in of_kind(objects, "Ingress"):
        for rule in item["spec"]["rules"]:
            for path in rule["http"]["paths"]:
                service = get(objects, f"Service/{path['backend']['service']['name']}")
                if path["backend"]["service"]["port"]["name"] not in [p["name"] for p in service["spec"]["ports"]]:
                    yield f"{title(item)}: no such port"
    for owner, _, spec in pods(objects):
        for item in containers(spec):
            for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
                port = item.get(kind, {}).get("httpGet", {}).get("port")
                if port is not None and port not in port_names(spec):
                    yield f"{owner}: {kind} asks {port}, no named port"


@check
def references(objects: list[Object]) -> Iterator[str]:
    there = {title(item) for item in objects}
    for owner, _, spec in pods(objects):
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        for claim in get(objects, owner)["spec"].get("volumeClaimTemplates", []):
            volumes[claim["metadata"]["name"]] = claim
        for volume in volumes.values():
            if reference := volume.get("configMap"):
                name = f"ConfigMap/{reference['name']}"
                if reference.get("optional", False) != (name in MADE_ELSEWHERE) or name not in there | MADE_ELSEWHERE:
                    yield f"{owner}: {name} is neither here nor made elsewhere"
        for item in containers(spec):
            for mount in item["volumeMounts"]:
                if mount["name"] not in volumes:
                    yield f"{owner}: no volume {mount['name']}"
            for source in item["envFrom"]:
                kind = "ConfigMap" if "configMapRef" in source else "Secret"
                reference = source.get("configMapRef") or source["secretRef"]
                name = f"{kind}/{reference['name']}"
                if reference.get("optional", False) != (name in MADE_ELSEWHERE) or name not in there | MADE_ELSEWHERE:
                    yield f"{owner}: {name} is neither here nor made elsewhere"
    for item in of_kind(objects, "StatefulSet"):
        if f"Service/{item['spec']['serviceName']}" not in there:
            yield f"{title(item)}: no Service"
    for item in of_kind(objects, "Ingress"):
        for path in item["spec"]["rules"][0]["http"]["paths"]:
            if f"Service/{path['backend']['service']['name']}" not in there:
                yield f"{title(item)}: no Service"
    for item in of_kind(objects, "HorizontalPodAutoscaler"):
        target = item["spec"]["scaleTargetRef"]
        if f"{target['kind']}/{target['name']}" not in there:
            yield f"{title(item)}: no target"
    if f"Service/{get(objects, 'ConfigMap/hello-api')['data'].get('PGHOST')}" not in there:
        yield "PGHOST is no Service"


@check
def settings(objects: list[Object]) -> Iterator[str]:
    sources = "".join((ROOT / name).read_text() for name in ("hello.py", "server/worker.py", "gunicorn.conf.py"))
    libpq = {"PGHOST", "PGUSER", "PGDATABASE", "PGPASSWORD", "PGSSLMODE", "PGTARGETSESSIONATTRS"}
    for item in of_kind(objects, "ConfigMap"):
        if item["metadata"]["name"].startswith("hello-api"):
            for name in item["data"]:
                if name not in libpq and f'"{name}"' not in sources:
                    yield f"{title(item)}: nobody reads {name}"
    if not {"PGHOST", "PGUSER", "PGDATABASE"} <= get(objects, "ConfigMap/hello-api")["data"].keys():
        yield "the API does not know where its database is"


@check
def probes(objects: list[Object]) -> Iterator[str]:
    (container,) = api(objects)["containers"]
    startup, readiness, liveness = (container[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness"))
    for probe in (startup, readiness, liveness):
        if probe["httpGet"]["path"] not in hello.ROUTES:
            yield f"{probe['httpGet']['path']} is no route"
    if liveness["httpGet"]["path"] != "/livez" or startup["httpGet"]["path"] != "/livez":
        yield "to restart a pod does not mend the database"
    if readiness["httpGet"]["path"] != "/readyz":
        yield "ready without a database"
    longest = hello.QUEUE_TIMEOUT + hello.DATABASE_TIMEOUT
    if readiness["timeoutSeconds"] <= longest:
        yield f"/readyz may take {longest} s"
    for path in get(objects, "Ingress/hello-api")["spec"]["rules"][0]["http"]["paths"]:
        if not any(route.startswith(path["path"] + "/") for route in hello.ROUTES):
            yield f"{path['path']} leads to no route"
    (database_container,) = database(objects)["containers"]
    for kind in ("startup", "readiness", "liveness"):
        if "--host=127.0.0.1" not in database_container[f"{kind}Probe"]["exec"]["command"]:
            yield f"{kind} takes the server of initdb for the database"


@check
def liveness_comes_last(objects: list[Object]) -> Iterator[str]:
    """Let gunicorn replace a worker before the kubelet kills the pod."""
    probe = api(objects)["containers"][0]["livenessProbe"]
    hang = runpy.run_path(str(ROOT / "gunicorn.conf.py"))["timeout"]
    if probe.get("periodSeconds", 10) * probe["failureThreshold"] <= hang + probe["timeoutSeconds"]:
        yield f"gunicorn takes {hang} s to notice"


@check
def stopping(objects: list[Object]) -> Iterator[str]:
    pod = api(objects)
    with pytest.MonkeyPatch.context() as monkeypatch:
        graceful = gunicorn_settings(objects, monkeypatch)["graceful_timeout"]
    wait = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    if wait < 1 or wait + graceful + STOP_MARGIN > pod["terminationGracePeriodSeconds"]:
        yield f"{wait} s + {graceful} s + {STOP_MARGIN} s do not fit"
    if graceful < hello.QUEUE_TIMEOUT + hello.DATABASE_TIMEOUT:
        yield "a stopping worker would cut off a request"
    if database(objects)["terminationGracePeriodSeconds"] < 60:
        yield "no time for a checkpoint"


@check
def rollout(objects: list[Object]) -> Iterator[str]:
    deployment = get(objects, "Deployment/hello-api")["spec"]
    scaler = get(objects, "HorizontalPodAutoscaler/hello-api")["spec"]
    if "replicas" in deployment:
        yield "each apply would undo what the autoscaler did"
    if scaler["minReplicas"] < 2:
        yield "one pod cannot fail"
    if deployment["strategy"]["rollingUpdate"]["maxUnavailable"] != 0:
        yield "a rollout takes pods away"
    wait = int(environment(objects, api(objects)["initContainers"][0])["INIT_TIMEOUT"])
    if wait >= deployment.get("progressDeadlineSeconds", 600):
        yield "the rollout is given up before the database"
    if "version" in str(get(objects, "StatefulSet/hello-database")["spec"]["volumeClaimTemplates"]):
        yield "a volume claim template can never change"


@check
def connections(objects: list[Object]) -> Iterator[str]:
    deployment = get(objects, "Deployment/hello-api")["spec"]
    surge = deployment["strategy"]["rollingUpdate"]["maxSurge"]
    largest = get(objects, "HorizontalPodAutoscaler/hello-api")["spec"]["maxReplicas"]
    settings = environment(objects, api(objects)["containers"][0])
    pod = int(settings["WEB_CONCURRENCY"]) * 2 * int(settings.get("DATABASE_CONNECTIONS", hello.DATABASE_CONNECTIONS))
    # A rollout does not wait for the old pods to end, so take them all as still there; new ones also run init-db.
    needed = (2 * largest + surge) * pod + surge
    limits = {"StatefulSet/hello-database": database_settings(objects)["max_connections"]}
    limits |= {title(i): i["spec"]["postgresql"]["parameters"]["max_connections"] for i in of_kind(objects, "Cluster")}
    for name, limit in limits.items():
        if needed > int(limit) - RESERVED_CONNECTIONS:
            yield f"{name}: {needed} connections"


@check
def memory(objects: list[Object]) -> Iterator[str]:
    values = database_settings(objects)
    resources = {"StatefulSet/hello-database": (values, database(objects)["containers"][0]["resources"])}
    for item in of_kind(objects, "Cluster"):
        resources[title(item)] = (
            ({"maintenance_work_mem": "64MB"} | item["spec"]["postgresql"]["parameters"]),
            item["spec"]["resources"],
        )
    for name, (parameters, sizes) in resources.items():
        most = quantity(parameters["shared_buffers"]) + int(parameters["max_connections"]) * BACKEND_MIB * 2**20
        most += 3 * quantity(parameters["maintenance_work_mem"])  # autovacuum_max_workers
        if most > quantity(sizes["limits"]["memory"]):
            yield f"{name}: {most / 2**20:.0f} MiB do not fit the limit"
        if quantity(parameters["shared_buffers"]) > quantity(sizes["requests"]["memory"]) / 4:
            yield f"{name}: more than a quarter for shared_buffers"


@check
def disk(objects: list[Object]) -> Iterator[str]:
    (claim,) = get(objects, "StatefulSet/hello-database")["spec"]["volumeClaimTemplates"]
    # max_wal_size is soft: half as much again while checkpoints are late. At least half is for the data.
    if (
        quantity(database_settings(objects)["max_wal_size"]) * 1.5
        > quantity(claim["spec"]["resources"]["requests"]["storage"]) / 2
    ):
        yield "the log of changes fills the volume"


@check
def durability(objects: list[Object]) -> Iterator[str]:
    risky = {"fsync", "synchronous_commit", "full_page_writes", "data_checksums"}
    parameters = [database_settings(objects)]
    parameters += [item["spec"]["postgresql"]["parameters"] for item in of_kind(objects, "Cluster")]
    for values in parameters:
        if risky & values.keys():
            yield f"{risky & values.keys()}"
        if values.get("log_min_error_statement") != "panic" or values.get("log_error_verbosity") != "terse":
            yield "names and dates of birth in the log"
    mounts = {mount["mountPath"]: mount["name"] for mount in database(objects)["containers"][0]["volumeMounts"]}
    claims = get(objects, "StatefulSet/hello-database")["spec"].get("volumeClaimTemplates", [])
    if mounts.get("/var/lib/postgresql") not in [claim["metadata"]["name"] for claim in claims]:
        yield "the data of version 18 is not on the volume"
    if database(objects)["securityContext"].get("fsGroupChangePolicy") != "OnRootMismatch":
        yield "the data folder becomes group-writable"
    for item in of_kind(objects, "Cluster"):
        synchronous = item["spec"]["postgresql"]["synchronous"]
        if (synchronous["method"], synchronous["number"], synchronous["dataDurability"]) != ("any", 1, "required"):
            yield f"{title(item)}: an acknowledged write may be lost"
        if synchronous["failoverQuorum"] is not True or item["spec"]["instances"] != 3:
            yield f"{title(item)}: a failover may lose an acknowledged write"


@check
def resources(objects: list[Object]) -> Iterator[str]:
    for owner, _, spec in pods(objects):
        for item in containers(spec):
            sizes = item["resources"]
            if not sizes["requests"].keys() >= {"cpu", "memory"} or "memory" not in sizes["limits"]:
                yield f"{owner}: {item['name']} has no requests or limits"
    container = api(objects)["containers"][0]
    workers = int(environment(objects, container)["WEB_CONCURRENCY"])
    if workers > quantity(container["resources"]["limits"]["cpu"]):
        yield f"{workers} workers on fewer CPUs"
    (metric,) = get(objects, "HorizontalPodAutoscaler/hello-api")["spec"]["metrics"]
    if metric["resource"]["target"] != {"type": "Utilization", "averageUtilization": 50}:
        yield "the autoscaler does not aim at half of the CPU"


@check
def images(objects: list[Object]) -> Iterator[str]:
    used = [item["image"] for _, _, spec in pods(objects) for item in containers(spec)]
    used += [item["spec"]["imageName"].rpartition("/")[2] for item in of_kind(objects, "Cluster")]
    for path in [*ROOT.glob("compose*.y*ml"), *ROOT.glob("docker-compose*.y*ml")]:
        used += [re.sub(r"\$\{\w+:-([^}]*)}", r"\1", text) for text in re.findall(r"image: *(\S+)", path.read_text())]
    expected = {"hello": hello.__version__, "postgres": "18", "postgresql": "18-minimal-trixie"}
    for image in used:
        name, _, tag = image.partition(":")
        if name in expected and tag != expected[name] or tag in ("", "latest"):
            yield f"{image} is not {expected.get(name)}"
    for text in re.findall(r"(?m)^VERSION *[?:]?= *(\S+)", (ROOT / "Makefile").read_text()):
        if text != hello.__version__:
            yield f"the Makefile builds {text}"


@check
def restricted(objects: list[Object]) -> Iterator[str]:
    """Check Pod Security Standards, levels baseline and restricted, and a root file system nobody can write to."""
    volumes = {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "persistentVolumeClaim",
        "projected",
        "secret",
    }
    for owner, _, spec in pods(objects):
        context = spec.get("securityContext", {})
        if any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")):
            yield f"{owner}: a namespace of the host"
        if spec.get("automountServiceAccountToken") is not False:
            yield f"{owner}: a token of a service account"
        for volume in spec["volumes"]:
            if not volume.keys() - {"name"} <= volumes:
                yield f"{owner}: volume {volume['name']}"
        for unsafe in ("sysctls", "seLinuxOptions", "windowsOptions", "appArmorProfile"):
            if unsafe in context:
                yield f"{owner}: {unsafe}"
        for item in containers(spec):
            own = item.get("securityContext", {})
            effective = context | own
            if effective.get("runAsNonRoot") is not True or effective.get("runAsUser", 1) == 0:
                yield f"{owner}: {item['name']} may run as root"
            if effective.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
                yield f"{owner}: {item['name']} without seccomp"
            if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
                yield f"{owner}: {item['name']} may gain privileges"
            capabilities = own.get("capabilities", {})
            if "ALL" not in capabilities.get("drop", []) or set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
                yield f"{owner}: {item['name']} has capabilities"
            if {"seLinuxOptions", "windowsOptions", "procMount", "appArmorProfile"} & own.keys():
                yield f"{owner}: {item['name']} changes its confinement"
            if any(port.get("hostPort") for port in item.get("ports", [])):
                yield f"{owner}: {item['name']} has a port of the host"
            if '"host":' in json.dumps([item.get(kind) for kind in item if kind.endswith("Probe")]):
                yield f"{owner}: {item['name']} probes a host"
            if own.get("readOnlyRootFilesystem") is not True:
                yield f"{owner}: {item['name']} may write to its root"


@check
def any_namespace_any_order(objects: list[Object]) -> Iterator[str]:
    kinds = {"ConfigMap", "Secret", "Service", "Deployment", "StatefulSet", "Ingress", "NetworkPolicy"}
    kinds |= {"HorizontalPodAutoscaler", "PodDisruptionBudget"}
    for item in objects:
        if "namespace" in item["metadata"]:
            yield f"{title(item)} has a namespace"
        if item["kind"] not in kinds and not is_custom(item):
            yield f"{title(item)} is not of a namespace"
    names = [(title(item), item["apiVersion"]) for item in objects]
    if len(names) != len(set(names)):
        yield "an object is there twice"


@check
def passwords(objects: list[Object]) -> Iterator[str]:
    if "development" not in get(objects, f"Secret/{PASSWORDS[0]}")["stringData"]["PASSWORD"]:
        yield "a development password must say so"
    random = {"kind": "Secret", "metadata": {"name": PASSWORDS[1]}, "stringData": {"PASSWORD": "random"}}
    for owner, name, spec in [
        ("API", "PGPASSWORD", api(objects)),
        ("database", "POSTGRES_PASSWORD", database(objects)),
    ]:
        for item in containers(spec):
            if "development" not in environment(objects, item).get(name, ""):
                yield f"{owner}: no password"
            if environment([random, *objects], item).get(name) != "random":
                yield f"{owner}: the random password does not win"


# --- The manifests pass, broken copies do not -------------------------------------------------------

GONE = object()
DEPLOYMENT, STATEFUL_SET, CLUSTER = "Deployment/hello-api", "StatefulSet/hello-database", "Cluster/hello-ha"
SCALER, POD, BOX = "HorizontalPodAutoscaler/hello-api", "spec.template.spec", "spec.template.spec.containers.0"
SETTINGS = "ConfigMap/hello-api"
BROKEN: list[tuple[str, str, str, Any]] = [
    ("schema", DEPLOYMENT, f"{POD}.restartPolicie", "Always"),
    ("schema", SETTINGS, "data.WEB_CONCURRENCY", 2),
    ("schema", DEPLOYMENT, f"{BOX}.lifecycle.preStop", {"wait": 5}),
    ("labels", "Service/hello-api", "metadata.labels", {}),
    ("labels", DEPLOYMENT, "spec.template.metadata.labels", {"app.kubernetes.io/name": "hello"}),
    ("labels", STATEFUL_SET, "spec.template.metadata.labels.app\\.kubernetes\\.io/version", "1.0.0"),
    ("labels", DEPLOYMENT, "metadata.labels.app\\.kubernetes\\.io/version", "0.9"),
    ("selectors", "Service/hello-api", "spec.selector.app\\.kubernetes\\.io/component", "web"),
    ("selectors", "PodDisruptionBudget/hello-api", "spec.selector.matchLabels", {"app.kubernetes.io/version": "1.0.0"}),
    ("selectors", DEPLOYMENT, "spec.selector.matchLabels.app\\.kubernetes\\.io/component", "database"),
    ("selectors", "NetworkPolicy/hello-database", "spec.ingress.0.from.0.podSelector.matchLabels", {"app": "hello"}),
    ("selectors", "PodMonitor/hello-ha", "spec.selector.matchLabels", {"cnpg.io/cluster": "hello"}),
    ("ports", "Service/hello-api", "spec.ports.0.targetPort", "web"),
    ("ports", "Service/hello-database", "spec.ports.0.targetPort", 5432),
    ("ports", "NetworkPolicy/hello-api", "spec.ingress.0.ports.0.port", "web"),
    ("ports", "Ingress/hello-api", "spec.rules.0.http.paths.0.backend.service.port.name", "web"),
    ("ports", DEPLOYMENT, f"{BOX}.readinessProbe.httpGet.port", "web"),
    ("ports", "PodMonitor/hello-api", "spec.podMetricsEndpoints.0.port", "http-metrics"),
    ("references", DEPLOYMENT, f"{BOX}.envFrom.0.configMapRef.name", "hello"),
    ("references", DEPLOYMENT, f"{BOX}.envFrom.2.secretRef.optional", True),
    ("references", DEPLOYMENT, f"{BOX}.volumeMounts.0.name", "temporary"),
    ("references", STATEFUL_SET, f"{POD}.volumes.0.configMap.name", "hello"),
    ("references", DEPLOYMENT, f"{POD}.volumes.1.configMap.optional", GONE),
    ("references", STATEFUL_SET, "spec.serviceName", "hello-db"),
    ("references", "Ingress/hello-api", "spec.rules.0.http.paths.0.backend.service.name", "hello"),
    ("references", SCALER, "spec.scaleTargetRef.name", "hello"),
    ("references", SETTINGS, "data.PGHOST", "hello-db"),
    ("settings", SETTINGS, "data.WORKERS", "2"),
    ("settings", SETTINGS, "data.PGHOST", GONE),
    ("probes", DEPLOYMENT, f"{BOX}.livenessProbe.httpGet.path", "/healthz"),
    ("probes", DEPLOYMENT, f"{BOX}.livenessProbe.httpGet.path", "/readyz"),
    ("probes", DEPLOYMENT, f"{BOX}.readinessProbe.httpGet.path", "/livez"),
    ("probes", DEPLOYMENT, f"{BOX}.readinessProbe.timeoutSeconds", 4),
    ("probes", "Ingress/hello-api", "spec.rules.0.http.paths.0.path", "/api"),
    ("probes", STATEFUL_SET, f"{BOX}.startupProbe.exec.command", ["pg_isready"]),
    ("liveness_comes_last", DEPLOYMENT, f"{BOX}.livenessProbe.failureThreshold", 3),
    ("stopping", DEPLOYMENT, f"{POD}.terminationGracePeriodSeconds", 14),
    ("stopping", DEPLOYMENT, f"{BOX}.lifecycle.preStop.sleep.seconds", 12),
    ("stopping", SETTINGS, "data.GRACEFUL_TIMEOUT", "30"),
    ("stopping", SETTINGS, "data.GRACEFUL_TIMEOUT", "4"),
    ("stopping", STATEFUL_SET, f"{POD}.terminationGracePeriodSeconds", 5),
    ("rollout", DEPLOYMENT, "spec.replicas", 2),
    ("rollout", SCALER, "spec.minReplicas", 1),
    ("rollout", DEPLOYMENT, "spec.strategy.rollingUpdate.maxUnavailable", 1),
    ("rollout", SETTINGS, "data.INIT_TIMEOUT", "900"),
    ("rollout", STATEFUL_SET, "spec.volumeClaimTemplates.0.metadata.labels.app\\.kubernetes\\.io/version", "18"),
    ("connections", SCALER, "spec.maxReplicas", 12),
    ("connections", SETTINGS, "data.WEB_CONCURRENCY", "4"),
    ("connections", SETTINGS, "data.DATABASE_CONNECTIONS", "2"),
    ("connections", DEPLOYMENT, "spec.strategy.rollingUpdate.maxSurge", 4),
    ("connections", STATEFUL_SET, f"{BOX}.args.1", "max_connections=80"),
    ("connections", CLUSTER, "spec.postgresql.parameters.max_connections", "80"),
    ("memory", STATEFUL_SET, f"{BOX}.args.3", "shared_buffers=256MB"),
    ("memory", STATEFUL_SET, f"{BOX}.args.1", "max_connections=200"),
    ("memory", STATEFUL_SET, f"{BOX}.resources.limits.memory", "384Mi"),
    ("memory", STATEFUL_SET, f"{BOX}.resources.requests.memory", "256Mi"),
    ("memory", CLUSTER, "spec.resources.limits.memory", "512Mi"),
    ("disk", STATEFUL_SET, f"{BOX}.args.7", "max_wal_size=1GB"),
    ("disk", STATEFUL_SET, "spec.volumeClaimTemplates.0.spec.resources.requests.storage", "512Mi"),
    ("durability", STATEFUL_SET, f"{BOX}.args.3", "fsync=off"),
    ("durability", STATEFUL_SET, f"{BOX}.args.15", "log_min_error_statement=error"),
    ("durability", STATEFUL_SET, f"{BOX}.volumeMounts.0.mountPath", "/var/lib/postgresql/data"),
    ("durability", STATEFUL_SET, "spec.volumeClaimTemplates", []),
    ("durability", STATEFUL_SET, f"{POD}.securityContext.fsGroupChangePolicy", GONE),
    ("durability", CLUSTER, "spec.postgresql.synchronous.dataDurability", "preferred"),
    ("durability", CLUSTER, "spec.postgresql.synchronous.failoverQuorum", False),
    ("durability", CLUSTER, "spec.postgresql.parameters.log_error_verbosity", GONE),
    ("resources", DEPLOYMENT, f"{BOX}.resources.limits", {"cpu": "2"}),
    ("resources", DEPLOYMENT, f"{BOX}.resources.requests", {"memory": "128Mi"}),
    ("resources", DEPLOYMENT, f"{BOX}.resources.limits.cpu", "500m"),
    ("resources", SETTINGS, "data.WEB_CONCURRENCY", "3"),
    ("resources", SCALER, "spec.metrics.0.resource.target.averageUtilization", 80),
    ("images", DEPLOYMENT, f"{BOX}.image", "hello:latest"),
    ("images", DEPLOYMENT, f"{POD}.initContainers.0.image", "hello:1.0.1"),
    ("images", DEPLOYMENT, f"{BOX}.image", "hello"),
    ("images", STATEFUL_SET, f"{BOX}.image", "postgres:17"),
    ("images", CLUSTER, "spec.imageName", "ghcr.io/cloudnative-pg/postgresql:17-minimal-trixie"),
    ("restricted", DEPLOYMENT, f"{POD}.hostNetwork", True),
    ("restricted", DEPLOYMENT, f"{POD}.automountServiceAccountToken", GONE),
    ("restricted", DEPLOYMENT, f"{POD}.volumes.0", {"name": "tmp", "hostPath": {"path": "/tmp"}}),
    ("restricted", DEPLOYMENT, f"{POD}.securityContext.runAsNonRoot", GONE),
    ("restricted", DEPLOYMENT, f"{POD}.securityContext.runAsUser", 0),
    ("restricted", DEPLOYMENT, f"{POD}.securityContext.seccompProfile", GONE),
    ("restricted", DEPLOYMENT, f"{POD}.securityContext.sysctls", [{"name": "net.core.somaxconn", "value": "9"}]),
    ("restricted", STATEFUL_SET, f"{BOX}.securityContext.allowPrivilegeEscalation", GONE),
    ("restricted", STATEFUL_SET, f"{BOX}.securityContext.privileged", True),
    ("restricted", STATEFUL_SET, f"{BOX}.securityContext.capabilities.drop", ["NET_RAW"]),
    ("restricted", STATEFUL_SET, f"{BOX}.securityContext.capabilities.add", ["CHOWN"]),
    ("restricted", STATEFUL_SET, f"{BOX}.securityContext.procMount", "Unmasked"),
    ("restricted", STATEFUL_SET, f"{BOX}.securityContext.readOnlyRootFilesystem", False),
    ("restricted", DEPLOYMENT, f"{POD}.initContainers.0.securityContext", {}),
    ("restricted", DEPLOYMENT, f"{BOX}.ports.0.hostPort", 8080),
    ("restricted", DEPLOYMENT, f"{BOX}.livenessProbe.httpGet.host", "example.com"),
    ("any_namespace_any_order", DEPLOYMENT, "metadata.namespace", "default"),
    ("any_namespace_any_order", "Ingress/hello-api", "kind", "IngressClass"),
    ("any_namespace_any_order", "Service/hello-api-ingress", "metadata.name", "hello-api"),
    ("passwords", "Secret/hello-database-development", "stringData.PASSWORD", "secret"),
    ("passwords", DEPLOYMENT, f"{BOX}.envFrom.3.prefix", GONE),
    ("passwords", STATEFUL_SET, f"{BOX}.envFrom.0.prefix", GONE),
    ("passwords", STATEFUL_SET, f"{BOX}.envFrom.1", GONE),
    (
        "passwords",
        DEPLOYMENT,
        f"{BOX}.envFrom",
        [
            {"configMapRef": {"name": "hello-api"}},
            *({"prefix": "PG", "secretRef": {"name": n}} for n in PASSWORDS[::-1]),
        ],
    ),
]


def break_(objects: list[Object], name: str, path: str, value: Any) -> list[Object]:
    """Return a copy of the objects in which one value is another, or gone."""
    objects = copy.deepcopy(objects)
    place: Any = get(objects, name)
    *way, last = [part.replace("\0", ".") for part in path.replace("\\.", "\0").split(".")]
    for part in way:
        place = place[int(part)] if isinstance(place, list) else place[part]
    key = int(last) if isinstance(place, list) else last
    if value is GONE:
        del place[key]
    else:
        place[key] = value
    return objects


@pytest.mark.parametrize("name", CHECKS)
def test_manifests_pass(name: str) -> None:
    assert list(CHECKS[name](EVERYTHING)) == []


@pytest.mark.parametrize(("name", "item", "path", "value"), BROKEN)
def test_broken_copy_is_found(name: str, item: str, path: str, value: Any) -> None:
    assert list(CHECKS[name](break_(EVERYTHING, item, path, value)))


def test_each_check_was_seen_failing() -> None:
    assert {name for name, *_ in BROKEN} == CHECKS.keys()


def test_plain_apply_needs_no_custom_resource_definition() -> None:
    assert [title(item) for item in PLAIN if is_custom(item)] == []


def test_init_container_runs_as_the_api_does() -> None:
    pod = api(PLAIN)
    init, main = pod["initContainers"][0], pod["containers"][0]
    assert init["command"] == ["python", "hello.py", "init-db"]
    for part in ("image", "envFrom", "securityContext", "resources", "volumeMounts"):
        assert init[part] == main[part]


def test_restored_cluster_is_like_the_one_it_replaces() -> None:
    there, restored = (
        copy.deepcopy(get(EVERYTHING, f"Cluster/{name}")["spec"]) for name in ("hello-ha", "hello-restored")
    )
    for spec in (there, restored):
        del spec["bootstrap"], spec["plugins"], spec["topologySpreadConstraints"][0]["labelSelector"]
    del restored["externalClusters"]
    assert restored == there


def test_monitoring_objects_are_those_of_the_source() -> None:
    generated = runpy.run_path(str(ROOT / "tools" / "k8s_monitoring.py"))["generate"]()
    assert {name: (K8S / "monitoring" / name).read_text() for name in generated} == generated


def test_generated_monitoring_objects_hold_the_rules_and_the_dashboard() -> None:
    rule, dashboard = get(EVERYTHING, "PrometheusRule/hello-api"), get(EVERYTHING, "ConfigMap/hello-dashboard")
    assert rule["spec"] == yaml.safe_load((ROOT / "monitoring" / "rules.yml").read_text())
    assert json.loads(dashboard["data"]["hello.json"]) == json.loads(
        (ROOT / "monitoring" / "dashboard.json").read_text()
    )


def test_connection_takes_no_more_memory_than_counted_with(postgres: embedded.Postgres) -> None:
    schema, line, deadline = hello.Line(), hello.Line(), time.monotonic() + 10
    schema.execute(lambda cursor, _: cursor.execute((ROOT / "schema.sql").read_text()), [], deadline)
    names = ["".join(letters) for letters in itertools.product("abcdefghij", repeat=2)]
    for _ in range(10):
        line.execute(hello.save, [(name, datetime.date(1990, 5, 17)) for name in names], deadline)
        line.execute(hello.find, names, deadline)
    usage = Path(f"/proc/{line.connection.info.backend_pid}/smaps_rollup")
    text = usage.read_text() if usage.exists() else pytest.skip("only Linux says what a process has for itself")
    schema.execute(
        lambda cursor, _: cursor.execute("DELETE FROM users WHERE username = ANY(%s)", (names,)), [], deadline
    )
    schema.connection.close()
    line.connection.close()
    (kib,) = re.findall(r"Private_Dirty: +(\d+) kB", text)
    assert 0.5 < int(kib) / 1024 < BACKEND_MIB


# --- Custom resources -------------------------------------------------------------------------------


def strict(schema: Any) -> Any:
    """Return an openAPIV3Schema as a JSON schema that takes no unknown property."""
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


@pytest.fixture(scope="module")
def definitions() -> dict[tuple[str, str], Any]:
    """Return the JSON schema of each custom kind by apiVersion and kind."""
    if not CRDS.is_dir():
        pytest.skip(f"the custom resource definitions are not in {CRDS}")
    schemas = {}
    for path in CRDS.glob("*.yaml"):
        spec = yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]
        for version in spec["versions"]:
            schema = version["schema"]["openAPIV3Schema"]
            schemas[f"{spec['group']}/{version['name']}", spec["names"]["kind"]] = strict(schema) | {
                "properties": strict(schema["properties"]) | {"metadata": {"type": "object"}}
            }
    return schemas


def problems(definitions: dict[tuple[str, str], Any], item: Object) -> list[str]:
    schema = definitions[item["apiVersion"], item["kind"]]
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(item)]


# The plugin for backups has a definition of its own, which is not at hand: see the test after the next.
CUSTOM = [item for item in EVERYTHING if is_custom(item) and item["kind"] != "ObjectStore"]


@pytest.mark.parametrize("item", CUSTOM, ids=title)
def test_custom_resource_fits_its_definition(definitions: dict, item: Object) -> None:
    assert problems(definitions, item) == []


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        (CLUSTER, "spec.instance", 3),
        (CLUSTER, "spec.postgresql.synchronous.method", "some"),
        (CLUSTER, "spec.postgresql.parameters.max_connections", 100),
        ("ScheduledBackup/hello-ha", "spec.schedule", GONE),
        ("PodMonitor/hello-api", "spec.podMetricsEndpoints.0.ports", "metrics"),
        ("PrometheusRule/hello-api", "spec.groups.0.rules.0.expr", GONE),
    ],
)
def test_broken_custom_resource_is_found(definitions: dict, name: str, path: str, value: Any) -> None:
    assert problems(definitions, get(break_(EVERYTHING, name, path, value), name))


def test_object_store_is_configured_as_the_operators_own_was(definitions: dict) -> None:
    """Check against barmanObjectStore, whose format the plugin took over."""
    cluster = definitions["postgresql.cnpg.io/v1", "Cluster"]["properties"]["spec"]["properties"]
    schema = cluster["backup"]["properties"]["barmanObjectStore"]
    store = get(EVERYTHING, "ObjectStore/hello-ha")
    jsonschema.validate(store["spec"]["configuration"], schema)
    plugin = get(EVERYTHING, CLUSTER)["spec"]["plugins"][0]
    assert plugin["parameters"]["barmanObjectName"] == store["metadata"]["name"]
    assert get(EVERYTHING, "ScheduledBackup/hello-ha")["spec"]["pluginConfiguration"]["name"] == plugin["name"]


def test_api_override_points_to_the_cluster() -> None:
    assert get(EVERYTHING, "ConfigMap/hello-api-override")["data"]["PGHOST"] == "hello-ha-rw"


# --- Network policies -------------------------------------------------------------------------------

API, DATABASE, STRANGER = ("app", "api"), ("app", "database"), ("app", "stranger")
PROMETHEUS, INTERNET = ("monitoring", "prometheus"), ("", "")


def allows(objects: list[Object], source: tuple[str, str], target: tuple[str, str], port: int, protocol: str) -> bool:
    """Tell whether a connection may be made between two (namespace, component), as the API reference has it."""

    def labels(component: str) -> dict[str, str]:
        own = {"app.kubernetes.io/name": "hello", "app.kubernetes.io/instance": "hello"}
        return own | {"app.kubernetes.io/component": component} if component in ("api", "database") else {}

    def is_peer(peer: Object, other: tuple[str, str]) -> bool:
        namespace = peer.get("namespaceSelector", {}).get("matchLabels", {"kubernetes.io/metadata.name": "app"})
        pod = peer.get("podSelector", {}).get("matchLabels", {})
        return namespace == {"kubernetes.io/metadata.name": other[0]} and pod.items() <= labels(other[1]).items()

    def is_port(item: Object) -> bool:
        number = item["port"]
        if isinstance(number, str):
            number = next((port_names(spec).get(number) for spec in selected(objects, labels(target[1]))), None)
        return number == port and item.get("protocol", "TCP") == protocol

    for direction, own, other, key in (("Egress", source, target, "to"), ("Ingress", target, source, "from")):
        policies = [
            item["spec"]
            for item in of_kind(objects, "NetworkPolicy")
            if own[0] == "app" and item["spec"]["podSelector"]["matchLabels"].items() <= labels(own[1]).items()
            if direction in item["spec"]["policyTypes"]
        ]
        rules = [rule for policy in policies for rule in policy.get(direction.lower(), [])]
        if policies and not any(
            any(is_port(item) for item in rule["ports"])
            and (key not in rule or any(is_peer(p, other) for p in rule[key]))
            for rule in rules
        ):
            return False
    return True


@pytest.mark.parametrize(
    ("source", "target", "port", "protocol", "outcome"),
    [
        (INTERNET, API, 8080, "TCP", True),
        (STRANGER, API, 8080, "TCP", True),
        (PROMETHEUS, API, 8081, "TCP", True),
        (STRANGER, API, 8081, "TCP", False),
        (INTERNET, API, 8081, "TCP", False),
        (INTERNET, API, 22, "TCP", False),
        (API, DATABASE, 5432, "TCP", True),
        (API, DATABASE, 22, "TCP", False),
        (STRANGER, DATABASE, 5432, "TCP", False),
        (PROMETHEUS, DATABASE, 5432, "TCP", False),
        (INTERNET, DATABASE, 5432, "TCP", False),
        (API, INTERNET, 53, "UDP", True),
        (API, INTERNET, 53, "TCP", True),
        (API, INTERNET, 443, "TCP", False),
        (API, STRANGER, 5432, "TCP", False),
        (DATABASE, INTERNET, 53, "UDP", False),
        (DATABASE, INTERNET, 443, "TCP", False),
        (DATABASE, API, 8080, "TCP", False),
        (STRANGER, INTERNET, 443, "TCP", True),
    ],
)
def test_network_allows_only_what_is_needed(source: Any, target: Any, port: int, protocol: str, outcome: bool) -> None:
    assert allows(PLAIN, source, target, port, protocol) is outcome


# --- make k8s-secret --------------------------------------------------------------------------------

KUBECTL = """#!/bin/sh
# Stands in for kubectl: keeps its arguments, answers `get` from files, runs psql of `exec` where the database is.
echo "$*" >>"$STATE/arguments"
case $1 in
  get) [ ! -e "$STATE/unreachable" ] || exit 1; [ ! -e "$STATE/$2" ] || echo "$2/$3" ;;
  exec) while [ "$1" != -- ]; do shift; done; shift; PATH="$PROGRAMS:$PATH" exec "$@" --dbname=postgres ;;
  apply) cat >"$STATE/secret.yaml" ;;
esac
"""


@pytest.fixture(scope="module")
def database_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[embedded.Postgres]:
    """Start a Postgres that asks hello for a password, with what the manifests run in an empty volume."""
    folder = tmp_path_factory.mktemp("postgres")
    rules = folder / "pg_hba.conf"
    rules.write_text("local all postgres trust\nlocal all hello scram-sha-256\n")
    rules.chmod(0o644)
    server = embedded.Postgres(folder / "data", hba_file=str(rules))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def cluster(database_server: embedded.Postgres, tmp_path: Path) -> Iterator[dict[str, str]]:
    """Return an environment for secret.sh: a kubectl, and a database as it is after a first start."""
    role = tmp_path / "role.sql"
    role.write_text(get(PLAIN, "ConfigMap/hello-database")["data"]["role.sql"])
    psql(database_server, "--command=DROP DATABASE IF EXISTS hello", "--command=DROP ROLE IF EXISTS hello")
    psql(database_server, "--set=ON_ERROR_STOP=1", f"--file={role}", POSTGRES_PASSWORD="for-development-only")
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(KUBECTL)
    kubectl.chmod(0o755)
    extra = {"KUBECTL": str(kubectl), "STATE": str(tmp_path), "PROGRAMS": str(embedded.binaries())}
    return os.environ | database_server.environment | extra


def run_secret(cluster: dict[str, str], *there: str) -> subprocess.CompletedProcess[str]:
    """Run secret.sh where the cluster has these kinds of hello's objects."""
    for kind in there:
        Path(cluster["STATE"], kind).touch()
    return subprocess.run(
        ["sh", ROOT / "tools" / "k8s_secret.sh"], env=cluster, capture_output=True, text=True, check=False
    )


def secret_of(cluster: dict[str, str]) -> Object:
    return yaml.safe_load(Path(cluster["STATE"], "secret.yaml").read_text())


def psql(server: embedded.Postgres, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [embedded.binaries() / "psql", "--quiet", "--no-psqlrc", "--tuples-only", "--no-align", *arguments]
    environment = os.environ | server.environment | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def can_connect(server: embedded.Postgres, password: str) -> bool:
    done = psql(server, "--command=SELECT 1", PGUSER="hello", PGDATABASE="hello", PGPASSWORD=password)
    assert done.returncode == 0 or "password authentication failed" in done.stderr
    return done.returncode == 0


def test_secret_beside_a_running_database_changes_its_password(cluster: dict, database_server: Any) -> None:
    assert can_connect(database_server, "for-development-only")
    done = run_secret(cluster, "pod", "persistentvolumeclaim", "deployment")
    assert done.returncode == 0, done.stderr
    data = {key: base64.b64decode(value).decode() for key, value in secret_of(cluster)["data"].items()}
    assert can_connect(database_server, data["PASSWORD"])
    assert not can_connect(database_server, "for-development-only")
    assert data == {"PASSWORD": data["PASSWORD"], "username": "hello", "password": data["PASSWORD"]}
    arguments = Path(cluster["STATE"], "arguments").read_text()
    assert "rollout restart deployment/hello-api" in arguments
    assert data["PASSWORD"] not in arguments + done.stdout + done.stderr
    assert secret_of(cluster)["data"]["PASSWORD"] not in arguments + done.stdout + done.stderr
    assert data["PASSWORD"] not in (database_server.folder / "server.log").read_text()


def test_secret_before_the_first_apply_is_only_made(cluster: dict) -> None:
    assert run_secret(cluster).returncode == 0
    assert title(secret_of(cluster)) == f"Secret/{PASSWORDS[1]}"
    assert "rollout" not in Path(cluster["STATE"], "arguments").read_text()


def test_secret_made_twice_is_another_one(cluster: dict) -> None:
    run_secret(cluster)
    first = secret_of(cluster)
    run_secret(cluster)
    assert secret_of(cluster) != first


def test_secret_beside_a_volume_without_a_database_is_refused(cluster: dict) -> None:
    done = run_secret(cluster, "persistentvolumeclaim")
    assert done.returncode == 1
    assert "make k8s-apply" in done.stderr
    assert not Path(cluster["STATE"], "secret.yaml").exists()


def test_secret_without_a_cluster_changes_nothing(cluster: dict, database_server: Any) -> None:
    done = run_secret(cluster, "pod", "unreachable")
    assert done.returncode != 0
    assert not Path(cluster["STATE"], "secret.yaml").exists()
    assert can_connect(database_server, "for-development-only")


def test_secret_of_a_database_that_refuses_is_not_made(cluster: dict, database_server: Any) -> None:
    psql(database_server, "--command=DROP DATABASE hello", "--command=DROP ROLE hello")
    assert run_secret(cluster, "pod").returncode != 0
    assert not Path(cluster["STATE"], "secret.yaml").exists()


def test_secret_fits_its_schema_and_labels(cluster: dict) -> None:
    run_secret(cluster)
    assert list(schema([secret_of(cluster)])) + list(labels([secret_of(cluster)])) == []


@pytest.mark.parametrize(
    ("query", "answer"),
    [
        (
            "SELECT rolsuper OR rolcreaterole OR rolcreatedb OR rolreplication FROM pg_roles WHERE rolname = 'hello'",
            "f",
        ),
        ("SELECT datdba::regrole FROM pg_database WHERE datname = 'hello'", "hello"),
        ("SELECT rolpassword IS NULL FROM pg_authid WHERE rolname = 'postgres'", "t"),
    ],
)
def test_role_of_the_api_owns_its_database_and_nothing_else(
    cluster: dict, database_server: Any, query: str, answer: str
) -> None:
    assert psql(database_server, f"--command={query}").stdout.strip() == answer


# --- The containers, run by a real engine as the manifests have them --------------------------------


def docker(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False, **options)


def own_fs_group(pod: Object, volume: str, image: str) -> None:
    """Do to a volume what the kubelet does before each start of a pod that has an fsGroup."""
    context = pod["securityContext"]
    group, policy = context["fsGroup"], context.get("fsGroupChangePolicy", "Always")
    script = f"""
        [ {policy} = OnRootMismatch ] && [ "$(stat -c %g:%A /v)" = {group}:drwxrwsr-x ] && exit
        find /v -exec chgrp {group} {{}} + -exec chmod g+rw {{}} + && find /v -type d -exec chmod g+xs {{}} +
    """
    # A new disk belongs to root, who alone may write to it.
    fresh = "[ -e /v/18 ] || { chown 0:0 /v; chmod 755 /v; }; "
    command = ["--volume", f"{volume}:/v", "--entrypoint", "sh", image, "-c", fresh + script]
    assert docker("run", "--rm", "--user", "0", *command).returncode == 0


class Pod:
    """One pod of the manifests as containers: its users, limits, confinement, environment, mounts and probes."""

    def __init__(self, name: str, pod: Object, objects: list[Object], folder: Path, claims: dict[str, str]) -> None:
        self.name, self.pod, self.objects, self.folder, self.claims = name, pod, objects, folder, claims

    def arguments(self, container: Object) -> list[str]:
        """Translate what a container may do and sees into arguments of `docker run`."""
        context = self.pod["securityContext"] | container["securityContext"]
        limits = container["resources"]["limits"]
        result = [
            "--user",
            f"{context['runAsUser']}:{context['runAsGroup']}",
            "--network",
            self.name.rpartition("-")[0],
        ]
        result += ["--memory", str(int(quantity(limits["memory"])))]
        result += ["--cap-drop", ",".join(context["capabilities"]["drop"])]
        if "cpu" in limits:
            result += ["--cpus", str(min(quantity(limits["cpu"]), os.cpu_count() or 1))]
        if "fsGroup" in context:
            result += ["--group-add", str(context["fsGroup"])]
        if context["readOnlyRootFilesystem"]:
            result += ["--read-only"]
        if not context["allowPrivilegeEscalation"]:
            result += ["--security-opt", "no-new-privileges"]
        for option in self.pod.get("dnsConfig", {}).get("options", []):
            result += ["--dns-opt", f"{option['name']}:{option['value']}"]
        for key, value in environment(self.objects, container).items():
            result += ["--env", f"{key}={value}"]
        volumes = {volume["name"]: volume for volume in self.pod["volumes"]}
        for mount in container["volumeMounts"]:
            volume, path = volumes.get(mount["name"], {}), mount["mountPath"]
            if "emptyDir" in volume:
                group = context.get("fsGroup", 0)
                size = int(quantity(volume["emptyDir"]["sizeLimit"]))
                result += ["--tmpfs", f"{path}:size={size},mode={'2777' if group else '777'},gid={group}"]
            elif "configMap" in volume:
                source = self.folder / volume["configMap"]["name"]
                source.mkdir(exist_ok=True)
                for item in self.objects:
                    if title(item) == f"ConfigMap/{source.name}":
                        for name, text in item["data"].items():
                            (source / name).write_text(text)
                            (source / name).chmod(0o644)
                result += ["--volume", f"{source}:{path}:ro"]
            else:
                result += ["--volume", f"{self.claims[mount['name']]}:{path}"]
        return result

    def run(self, container: Object, *options: str) -> subprocess.CompletedProcess[str]:
        """Run a container."""
        arguments = [*self.arguments(container), *options]
        if command := container.get("command"):
            arguments += ["--entrypoint", command[0]]
        words = container.get("command", [])[1:] + container.get("args", [])
        return docker("run", *arguments, container["image"], *words, timeout=PATIENCE)

    def start(self, alias: str, *options: str) -> None:
        """Do what the kubelet does to start a pod, up to its readiness."""
        for volume in self.claims.values():
            own_fs_group(self.pod, volume, self.pod["containers"][0]["image"])
        for container in self.pod.get("initContainers", []):
            done = self.run(container, "--rm", "--name", f"{self.name}-init")
            assert done.returncode == 0, done.stderr
        (container,) = self.pod["containers"]
        done = self.run(container, "--detach", "--name", self.name, "--network-alias", alias, *options)
        assert done.returncode == 0, done.stderr
        for probe in (container["startupProbe"], container["readinessProbe"]):
            self.wait(probe)

    def wait(self, probe: Object) -> None:
        """Ask a probe until it succeeds; fail where the kubelet would give up, or nobody here would wait any longer."""
        patience = probe.get("periodSeconds", 10) * probe.get("failureThreshold", 3)
        deadline = time.monotonic() + min(patience, PATIENCE)
        while not self.succeeds(probe):
            running = docker("inspect", "--format", "{{.State.Running}}", self.name).stdout.strip()
            assert running == "true" and time.monotonic() < deadline, docker("logs", self.name).stderr
            time.sleep(0.2)

    def succeeds(self, probe: Object) -> bool:
        seconds = probe.get("timeoutSeconds", 1)
        if "exec" in probe:
            return docker("exec", self.name, *probe["exec"]["command"], timeout=seconds).returncode == 0
        port = port_names(self.pod)[probe["httpGet"]["port"]]
        return self.ask(port, probe["httpGet"]["path"], seconds)[0] == 200

    def ask(self, port: int, path: str, seconds: float = 10, body: bytes | None = None) -> tuple[int, str]:
        """Return status and content of a request, 0 where there is no answer."""
        address = docker("port", self.name, str(port)).stdout.split()[0]
        request = urllib.request.Request(f"http://{address}{path}", body, method="PUT" if body else "GET")
        try:
            with urllib.request.urlopen(request, timeout=seconds) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def stop(self) -> float:
        """Stop the container as the kubelet does after preStop; return how many seconds of the grace it left."""
        wait = self.pod["containers"][0].get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        grace = self.pod["terminationGracePeriodSeconds"] - wait
        start = time.monotonic()
        docker("stop", "--time", str(grace), self.name)
        return grace - (time.monotonic() - start)

    def exit_code(self) -> int:
        return int(docker("inspect", "--format", "{{.State.ExitCode}}", self.name).stdout)

    def psql(self, query: str, *options: str) -> subprocess.CompletedProcess[str]:
        return docker("exec", self.name, "psql", "-tAq", "--username=postgres", *options, f"--command={query}")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Pod, Pod]]:
    """Start the database's and the API's pod; yield both."""
    try:
        if docker("info", timeout=10).returncode != 0:
            pytest.skip("no container engine answers `docker info`")
    except (FileNotFoundError, subprocess.TimeoutExpired):
        pytest.skip("there is no container engine here")
    if docker("image", "inspect", database(PLAIN)["containers"][0]["image"]).returncode != 0:
        pytest.skip("the database's image is not here: `docker pull postgres:18`")
    prefix = f"hello-k8s-test{os.getpid()}"
    # The image of this tree, and not whichever has the manifests' tag here.
    image = f"hello:{prefix}"
    subprocess.run(["make", "build", f"VERSION={prefix}"], cwd=ROOT, check=True, capture_output=True)
    pod = copy.deepcopy(api(PLAIN))
    for container in [*pod["initContainers"], *pod["containers"]]:
        container["image"] = image
    folder = tmp_path_factory.mktemp("volumes")
    docker("network", "create", prefix)
    docker("volume", "create", f"{prefix}-data")
    store = Pod(f"{prefix}-database", database(PLAIN), PLAIN, folder, {"data": f"{prefix}-data"})
    service = Pod(f"{prefix}-api", pod, PLAIN, folder, {})
    try:
        store.start("hello-database")
        service.start("hello-api", "--publish", "127.0.0.1::8080", "--publish", "127.0.0.1::8081")
        yield store, service
    finally:
        docker("rm", "--force", "--volumes", store.name, service.name, f"{service.name}-init")
        docker("volume", "rm", f"{prefix}-data")
        docker("network", "rm", prefix)
        docker("image", "rm", "--force", image)


def birthday(name: str) -> str:
    return f"SELECT date_of_birth FROM users WHERE username = '{name}'"


def test_containers_as_confined_by_the_manifests_serve(running: tuple[Pod, Pod]) -> None:
    store, service = running
    assert service.ask(8080, "/hello/Zoe", body=b'{"dateOfBirth": "1990-05-17"}') == (204, "")
    assert store.psql(birthday("Zoe"), "--dbname=hello").stdout.strip() == "1990-05-17"
    status, content = service.ask(8080, "/hello/Zoe")
    assert (status, content[:24]) == (200, '{"message": "Hello, Zoe!')


@pytest.mark.parametrize("kind", ["startupProbe", "readinessProbe", "livenessProbe"])
def test_probe_succeeds(running: tuple[Pod, Pod], kind: str) -> None:
    for pod in running:
        assert pod.succeeds(pod.pod["containers"][0][kind])


def test_metrics_are_on_their_port_only(running: tuple[Pod, Pod]) -> None:
    _, service = running
    assert "http_requests_total" in service.ask(8081, "/metrics")[1]
    assert service.ask(8080, "/metrics")[0] == 404


@pytest.mark.parametrize("place", [0, 1], ids=["database", "api"])
def test_container_may_write_only_where_it_must(running: tuple[Pod, Pod], place: int) -> None:
    pod = running[place]
    assert re.search(r"(?m)^\S+ / \S+ ro,", docker("exec", pod.name, "cat", "/proc/mounts").stdout)
    assert docker("exec", pod.name, "sh", "-c", "touch /tmp/file").returncode == 0
    status = docker("exec", pod.name, "cat", "/proc/1/status").stdout
    assert re.search(r"CapEff:\t0+\n", status) and re.search(r"NoNewPrivs:\t1\n", status)
    assert re.search(r"Seccomp:\t2\n", status)


@pytest.mark.parametrize("place", [0, 1], ids=["database", "api"])
def test_container_fits_what_it_asks_for(running: tuple[Pod, Pod], place: int) -> None:
    pod = running[place]
    used = docker("stats", "--no-stream", "--format", "{{.MemUsage}}", pod.name).stdout.split("/")[0].strip("B \n")
    assert 10 * 2**20 < quantity(used) < quantity(pod.pod["containers"][0]["resources"]["requests"]["memory"])


def test_database_has_the_settings_of_the_manifest(running: tuple[Pod, Pod]) -> None:
    store, _ = running
    for name, value in database_settings(PLAIN).items():
        # Over TCP: a socket has no keepalives.
        assert store.psql(f"SHOW {name}", "--host=127.0.0.1").stdout.strip() == value


def test_database_lets_nobody_in_from_elsewhere_without_the_password(running: tuple[Pod, Pod]) -> None:
    _, service = running
    command = ["run", "--rm", "--network", service.name.rpartition("-")[0], "--entrypoint", "psql", "postgres:18"]
    for user, password in (("hello", "wrong"), ("postgres", "for-development-only")):
        done = docker(
            *command, f"host=hello-database user={user} password={password} dbname=hello", "--command=SELECT 1"
        )
        assert done.returncode != 0
        assert "password authentication failed" in done.stderr


def test_failed_statement_leaves_no_name_in_a_log(running: tuple[Pod, Pod]) -> None:
    store, service = running
    lock = ["exec", "--detach", store.name, "psql", "--username=postgres", "--dbname=hello"]
    docker(*lock, "--command=BEGIN; LOCK TABLE users; SELECT pg_sleep(60)")
    time.sleep(0.5)
    assert service.ask(8080, "/hello/Unmentionable", body=b'{"dateOfBirth": "1987-06-05"}')[0] == 503
    store.psql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(60)'")
    for pod in running:
        done = docker("logs", pod.name)
        assert "Unmentionable" not in done.stdout + done.stderr
        assert "1987-06-05" not in done.stdout + done.stderr
    done = docker("logs", store.name)
    assert "canceling statement due to statement timeout" in done.stdout + done.stderr


def test_database_keeps_its_data_through_a_new_pod(running: tuple[Pod, Pod]) -> None:
    store, service = running
    assert service.ask(8080, "/hello/Ada", body=b'{"dateOfBirth": "1815-12-10"}')[0] == 204
    assert store.stop() > 0
    assert store.exit_code() == 0
    assert service.succeeds(service.pod["containers"][0]["livenessProbe"])
    assert not service.succeeds(service.pod["containers"][0]["readinessProbe"])
    docker("rm", "--volumes", store.name)
    store.start("hello-database")
    assert store.psql(birthday("Ada"), "--dbname=hello").stdout.strip() == "1815-12-10"
    service.wait(service.pod["containers"][0]["readinessProbe"])
    assert service.ask(8080, "/hello/Ada")[0] == 200


def test_api_stops_within_its_grace(running: tuple[Pod, Pod]) -> None:
    _, service = running
    assert service.stop() > STOP_MARGIN
    assert service.exit_code() == 0
    docker("start", service.name)
    service.wait(service.pod["containers"][0]["readinessProbe"])
