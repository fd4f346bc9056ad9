"""tools/k8s_*.sh with a stand-in for kubectl and a real Postgres."""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import psycopg2
import pytest

from tests.support.manifests import ROOT, Object, data
from tests.support.postgres import Database
from tools.embedded_postgres import binaries

DEVELOPMENT_PASSWORD = "for-development-only"
NAME = "hello-database-password"


class Cluster:
    """A cluster with some objects of hello, as the stand-in for kubectl sees it.

    Args:
        state: the folder of its objects.
        database: the Postgres in its pod.
    """

    def __init__(self, state: Path, database: Database) -> None:
        self.state = state
        self.database = database

    def add(self, kind: str, name: str, **item: Any) -> None:
        """Add an object."""
        (self.state / f"{kind}-{name}.json").write_text(json.dumps(item))

    def add_database_and_api(self) -> None:
        """Add what `kubectl apply -f k8s/` makes."""
        self.add("pod", "hello-database-0")
        self.add("persistentvolumeclaim", "data-hello-database-0")
        self.add("deployment", "hello-api", spec={"replicas": 2})

    def add_secret(self, **extra: Any) -> None:
        """Add a Secret as a person may have made it, with the password `old`."""
        keys = {"username": "aGVsbG8=", "password": "b2xk"}
        self.add("secret", NAME, type="kubernetes.io/basic-auth", metadata={"name": NAME}, data=keys, **extra)

    def run(self, script: str) -> subprocess.CompletedProcess[str]:
        """Run a script of tools/."""
        extra = {
            "KUBECTL": f"{sys.executable} {ROOT / 'tests' / 'support' / 'kubectl.py'}",
            "STATE": str(self.state),
            "PROGRAMS": str(binaries()),
        }
        environment = os.environ | self.database.environment | extra
        return subprocess.run(
            ["sh", ROOT / "tools" / script], env=environment, capture_output=True, text=True, check=False
        )

    @property
    def secret(self) -> Object:
        """The Secret; nothing if there is none."""
        path = self.state / f"secret-{NAME}.json"
        return json.loads(path.read_text()) if path.exists() else {}

    @property
    def password(self) -> str:
        """The password in the Secret."""
        return base64.b64decode(self.secret["data"]["password"]).decode()

    @property
    def calls(self) -> str:
        return (self.state / "arguments").read_text()

    def accepts(self, password: str) -> bool:
        """Return whether the role of the API can log in with a password."""
        try:
            folder, port = self.database.sockets_folder, self.database.port
            psycopg2.connect(host=folder, port=port, user="hello", password=password).close()
        except psycopg2.OperationalError as error:
            assert "password authentication failed" in str(error)
            return False
        return True


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """Start a Postgres that asks the role hello for its password, and run role.sql."""
    server = Database(tmp_path_factory.mktemp("postgres") / "data")
    server.start()
    (server.folder / "pg_hba.conf").write_text("local all postgres trust\nlocal all hello scram-sha-256\n")
    server.restart()
    server.query(f"ALTER ROLE postgres PASSWORD '{DEVELOPMENT_PASSWORD}'")  # as the image does
    script = data("ConfigMap", "hello-database")["role.sql"]
    environment = os.environ | server.environment | {"POSTGRES_PASSWORD": DEVELOPMENT_PASSWORD}
    command = [str(binaries() / "psql"), "--quiet", "--no-psqlrc", "--set=ON_ERROR_STOP=1"]
    subprocess.run(command, input=script, env=environment, text=True, check=True)
    yield server
    server.stop()


@pytest.fixture
def cluster(server: Database, tmp_path: Path) -> Cluster:
    """Return an empty cluster whose Postgres has the development password."""
    server.query(f"ALTER ROLE hello PASSWORD '{DEVELOPMENT_PASSWORD}'")
    return Cluster(tmp_path, server)


# --- k8s_secret.sh ----------------------------------------------------------------------------------


def test_secret_before_the_first_apply_is_made(cluster: Cluster) -> None:
    assert cluster.run("k8s_secret.sh").returncode == 0
    assert cluster.secret["type"] == "Opaque"
    kubernetes_validate.validate(cluster.secret, kubernetes_validate.latest_version(), strict=True)
    assert "exec" not in cluster.calls and "rollout" not in cluster.calls


def test_secret_beside_a_running_database_changes_the_password_and_shows_it_nowhere(cluster: Cluster) -> None:
    cluster.add_database_and_api()
    passwords = [DEVELOPMENT_PASSWORD]
    for _ in range(2):
        done = cluster.run("k8s_secret.sh")
        assert done.returncode == 0, done.stderr
        passwords.append(cluster.password)
        assert [cluster.accepts(password) for password in passwords[-2:]] == [False, True]
        assert "annotations" not in cluster.secret["metadata"]
        seen = cluster.calls + done.stdout + done.stderr + (cluster.database.folder / "server.log").read_text()
        assert cluster.password not in seen
        assert cluster.secret["data"]["password"] not in seen
    assert "rollout restart deployment/hello-api" in cluster.calls


def test_secret_that_exists_is_replaced_and_keeps_its_type(cluster: Cluster) -> None:
    cluster.add_database_and_api()
    cluster.add_secret()
    done = cluster.run("k8s_secret.sh")
    assert done.returncode == 0, done.stderr
    assert cluster.accepts(cluster.password)
    assert cluster.secret["type"] == "kubernetes.io/basic-auth"
    assert cluster.secret["data"].keys() == {"username", "password"}


def test_secret_that_the_server_refuses_leaves_the_role_alone(cluster: Cluster) -> None:
    cluster.add_database_and_api()
    cluster.add_secret(immutable=True)
    done = cluster.run("k8s_secret.sh")
    assert done.returncode != 0
    assert "immutable" in done.stderr
    assert cluster.password == "old"
    assert cluster.accepts(DEVELOPMENT_PASSWORD)


@pytest.mark.parametrize(
    ("kind", "name"), [("persistentvolumeclaim", "data-hello-database-0"), ("deployment", "hello-api")]
)
def test_secret_whose_database_does_not_run_here_is_left_alone(cluster: Cluster, kind: str, name: str) -> None:
    cluster.add_secret()
    cluster.add(kind, name)
    done = cluster.run("k8s_secret.sh")
    assert done.returncode == 1
    assert "make k8s-apply" in done.stderr
    assert cluster.password == "old"


def test_secret_without_a_cluster_changes_nothing(cluster: Cluster) -> None:
    cluster.add_database_and_api()
    (cluster.state / "unreachable").touch()
    assert cluster.run("k8s_secret.sh").returncode != 0
    assert not cluster.secret
    assert cluster.accepts(DEVELOPMENT_PASSWORD)


def test_secret_of_a_database_that_refuses_is_not_made(cluster: Cluster) -> None:
    cluster.add_database_and_api()
    cluster.database.query("ALTER ROLE hello RENAME TO another")
    try:
        assert cluster.run("k8s_secret.sh").returncode != 0
    finally:
        cluster.database.query("ALTER ROLE another RENAME TO hello")
    assert not cluster.secret


def test_role_of_the_api_owns_its_database_and_nothing_else(server: Database) -> None:
    rights = "rolsuper OR rolcreaterole OR rolcreatedb OR rolreplication"
    owner = "SELECT datdba::regrole::text FROM pg_database WHERE datname = 'hello'"
    password = "SELECT rolpassword FROM pg_authid WHERE rolname = 'postgres'"
    query = f"SELECT {rights}, ({owner}), ({password}) FROM pg_roles WHERE rolname = 'hello'"
    assert server.query(query) == [(False, "hello", None)]


# --- k8s_apply.sh -----------------------------------------------------------------------------------


def test_apply_waits_for_the_second_pod(cluster: Cluster) -> None:
    cluster.add("deployment", "hello-api", spec={"replicas": 1})
    (cluster.state / "most").write_text("2")
    done = cluster.run("k8s_apply.sh")
    assert done.returncode == 0, done.stderr
    assert "apply --filename=k8s/" in cluster.calls
    before, _, after = cluster.calls.partition("rollout status deployment/hello-api")
    assert "rollout status statefulset/hello-database" in before
    assert "rollout status deployment/hello-api" in after.rpartition("get deployment")[2]


def test_apply_of_an_api_scaled_to_zero_does_not_wait(cluster: Cluster) -> None:
    cluster.add("deployment", "hello-api", spec={"replicas": 0})
    done = cluster.run("k8s_apply.sh")
    assert done.returncode == 0
    assert "--replicas=2" in done.stdout
