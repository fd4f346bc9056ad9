"""The manifests of k8s/ as objects."""

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tools.k8s_monitoring import objects as monitoring_objects

ROOT = Path(__file__).parents[2]

Object = dict[str, Any]


def parse(text: str) -> list[Object]:
    """Return the objects of a YAML file; libyaml reads it ten times as fast as PyYAML itself."""
    return list(yaml.load_all(text, yaml.CSafeLoader))


def title(item: Object) -> str:
    """Return kind and name, such as Service/hello-api."""
    return f"{item['kind']}/{item['metadata']['name']}"


# Those of `kubectl apply -f k8s/`
PLAIN = [item for path in sorted((ROOT / "k8s").glob("*.yaml")) for item in parse(path.read_text())]
EVERYTHING = [item for path in sorted((ROOT / "k8s").rglob("*.yaml")) for item in parse(path.read_text())]
EVERYTHING += parse(monitoring_objects())


def get(name: str) -> Object:
    """Return an object by its title."""
    return next(item for item in EVERYTHING if title(item) == name)


def values(item: Any, *keys: str) -> Iterator[Any]:
    """Yield each value of some keys, at any depth."""
    if isinstance(item, dict):
        for key, value in item.items():
            if key in keys:
                yield value
            yield from values(value, *keys)
    elif isinstance(item, list):
        for value in item:
            yield from values(value, *keys)


API_POD: Object = get("Deployment/hello-api")["spec"]["template"]
DATABASE_POD: Object = get("StatefulSet/hello-database")["spec"]["template"]


def containers(pod: Object) -> list[Object]:
    """Return the containers of a pod template, the init containers first."""
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def main_container(pod: Object) -> Object:
    """Return the only container of a pod template that is not an init container."""
    (container,) = pod["spec"]["containers"]
    return container


def port_numbers(pod: Object) -> dict[str, int]:
    """Return the number of each named port of a pod template."""
    return {port["name"]: port["containerPort"] for port in main_container(pod)["ports"]}


def quantity(text: str) -> float:
    """Return bytes or CPUs of a Kubernetes quantity or a Postgres size."""
    match = re.fullmatch(r"([0-9.]+)(m|[KMG]i|[kMG]B|)", str(text))
    assert match, text
    return float(match[1]) * {"": 1, "m": 0.001, "K": 2**10, "k": 2**10, "M": 2**20, "G": 2**30}[match[2][:1]]


def data(kind: str, name: str) -> dict[str, str]:
    """Return what a ConfigMap or Secret of the plain folder holds; nothing if it is made elsewhere."""
    found: dict[str, str] = {}
    for item in PLAIN:
        if title(item) == f"{kind}/{name}":
            found = item["data"]
    if kind == "Secret":
        return {key: base64.b64decode(value).decode() for key, value in found.items()}
    return dict(found)


def environment(container: Object) -> dict[str, str]:
    """Return a container's environment as the kubelet makes it: of several sources, the last one wins."""
    result: dict[str, str] = {}
    for source in container["envFrom"]:
        is_secret = "secretRef" in source
        reference = source["secretRef" if is_secret else "configMapRef"]
        found = data("Secret" if is_secret else "ConfigMap", reference["name"])
        result |= {source.get("prefix", "") + key: value for key, value in found.items()}
    for item in container["env"]:
        reference = item["valueFrom"]["secretKeyRef"]
        found = data("Secret", reference["name"])
        if reference["key"] in found:
            result[item["name"]] = found[reference["key"]]
    return result


def database_settings() -> dict[str, str]:
    """Return what the database's arguments set."""
    arguments = main_container(DATABASE_POD)["args"]
    return dict(pair.split("=", 1) for flag, pair in zip(arguments[::2], arguments[1::2], strict=True) if flag == "-c")
