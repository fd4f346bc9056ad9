"""A stand-in for kubectl: objects in the folder STATE, and psql of the tests' Postgres for `exec`.

Secrets behave as in the API server: `create` needs a new name, `replace` a Secret of the same type that is mutable.
With a file STATE/unreachable every call fails. Each `get` of a Deployment adds a replica, as the autoscaler does, up to
the number in STATE/most.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

STATE = Path(os.environ["STATE"])


def get(kind: str, name: str, *options: str) -> None:
    """Print an object's name, or one value of it."""
    path = STATE / f"{kind}-{name}.json"
    if not path.exists():
        sys.exit(0 if "--ignore-not-found" in options else f"{kind} {name} not found")
    if "--output=name" in options:
        print(f"{kind}/{name}")
        return
    item = json.loads(path.read_text())
    value = item
    [keys] = [option.removeprefix("--output=jsonpath={.") for option in options if "jsonpath" in option]
    for key in keys.rstrip("}").split("."):
        value = value[key]
    print(value, end="")
    if kind == "deployment" and (STATE / "most").exists():
        item["spec"]["replicas"] = min(item["spec"]["replicas"] + 1, int((STATE / "most").read_text()))
        path.write_text(json.dumps(item))


def write(verb: str, *options: str) -> None:
    """Create or replace the Secret that stands on standard input."""
    import yaml  # here, because it takes longer than all the rest

    item = yaml.safe_load(sys.stdin)
    path = STATE / f"secret-{item['metadata']['name']}.json"
    if path.exists() == (verb == "create"):
        sys.exit("AlreadyExists" if verb == "create" else "NotFound")
    old = json.loads(path.read_text()) if path.exists() else {"type": item["type"]}
    if old["type"] != item["type"] or old.get("immutable"):
        sys.exit("field is immutable")
    if "--dry-run=server" not in options:
        path.write_text(json.dumps(item))


def main(verb: str, *arguments: str) -> None:
    """Do what kubectl would do, as far as the scripts need it."""
    with (STATE / "arguments").open("a") as log:
        print(verb, *arguments, file=log)
    if (STATE / "unreachable").exists():
        sys.exit("the connection to the server was refused")
    if verb == "get":
        get(*arguments)
    elif verb in {"create", "replace"}:
        write(verb, *arguments)
    elif verb == "exec":
        command = [f"{os.environ['PROGRAMS']}/psql", *arguments[arguments.index("--") + 2 :], "--dbname=postgres"]
        sys.exit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main(*sys.argv[1:])
