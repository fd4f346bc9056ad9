"""Draw the pictures of docs/: `make diagrams`. Each is one SVG file that needs nothing beside it.

architecture.dot is in Graphviz' own language; the picture of AWS is below, with the icons of PyPI's `diagrams`.
"""

import base64
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

if not shutil.which("dot"):
    sys.exit("Graphviz is not installed: install it (on Debian: apt-get install graphviz fonts-liberation)")

from diagrams import Cluster, Diagram, Edge
from diagrams.aws.compute import ECR
from diagrams.aws.database import RDSPostgresqlInstance
from diagrams.aws.general import Users
from diagrams.aws.management import Cloudwatch
from diagrams.aws.network import ALB, Route53
from diagrams.aws.security import WAF, CertificateManager, SecretsManager
from diagrams.aws.storage import S3, Backup
from diagrams.k8s.clusterconfig import HPA
from diagrams.k8s.compute import Pod
from diagrams.onprem.monitoring import Grafana, Prometheus

FOLDER = Path(__file__).parent
FONT = {"fontname": "Arial", "fontsize": "18", "fontcolor": "#1f2328"}
# A white card of its own, so that it is as legible on GitHub's dark page as on its light one.
GRAPH = {**FONT, "bgcolor": "white", "pad": "0.4", "nodesep": "0.35", "ranksep": "0.8", "splines": "spline"}
BOX = {**FONT, "fontsize": "19", "bgcolor": "#f6f8fa", "pencolor": "#8c959f"}
ZONE = {**BOX, "bgcolor": "#ffffff", "style": "dashed,rounded"}


def main() -> None:
    """Make each picture anew."""
    write("architecture", svg_of(FOLDER / "architecture.dot"), FOLDER / "architecture.dot")
    with tempfile.TemporaryDirectory() as folder:
        draw_aws(f"{folder}/aws")
        write("aws", (Path(folder) / "aws.svg").read_text(), Path(__file__))


def svg_of(file: Path) -> str:
    """Return what Graphviz draws of a file."""
    return subprocess.run(["dot", "-Tsvg", file], check=True, capture_output=True, text=True).stdout


def write(name: str, svg: str, source: Path) -> None:
    """Save a picture with its icons inside, and with the digest of its source, by which a test knows a stale one."""
    for icon in set(re.findall(r'xlink:href="(/[^"]+\.png)"', svg)):
        data = base64.b64encode(Path(icon).read_bytes()).decode()
        svg = svg.replace(f'"{icon}"', f'"data:image/png;base64,{data}"')
    svg = re.sub(r"<(title|!--).*?[0-9a-f]{32}.*?>\n", "", svg)  # names that are others each time
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    (FOLDER / f"{name}.svg").write_text(f"{svg.rstrip()}\n<!-- {source.name} sha256:{digest} -->\n")


def line(label: str = "", **attributes: str | bool) -> Edge:
    """Return an edge; `diagrams` gives each a font of its own."""
    return Edge(label=label, **FONT | {"fontsize": "16"}, **attributes)


def draw_aws(filename: str) -> None:
    """Draw hello on AWS: what docs/aws.md describes."""
    options = {"show": False, "outformat": "svg", "direction": "LR", "filename": filename}
    with Diagram("", graph_attr=GRAPH, node_attr={**FONT, "imagepos": "tc"}, **options):
        users = Users("clients")
        dns = Route53("Route 53")
        with Cluster("one AWS region", graph_attr=BOX):
            with Cluster("public subnets, three zones", graph_attr=ZONE):
                certificate = CertificateManager("certificate")
                waf = WAF("WAF\nrate limits")
                balancer = ALB("load balancer\nends TLS")
            with Cluster("EKS, private subnets, three zones", graph_attr=BOX):
                scaler = HPA("3 to 10 pods,\nKarpenter: nodes")
                pods = []
                for zone in "bac":  # Graphviz puts the second one first
                    with Cluster(f"zone {zone}", graph_attr=ZONE):
                        pods.append(Pod("API pods"))
                prometheus = Prometheus("Prometheus")
                grafana = Grafana("Grafana")
            with Cluster("services of the region", graph_attr=BOX):
                secrets = SecretsManager("Secrets Manager\npassword")
                registry = ECR("ECR\nimage by digest")
                watch = Cloudwatch("CloudWatch\nlogs, alarms")
            with Cluster("RDS for PostgreSQL 18, Multi-AZ, private subnets", graph_attr=BOX):
                with Cluster("zone a ", graph_attr=ZONE):
                    primary = RDSPostgresqlInstance("primary")
                with Cluster("zone b ", graph_attr=ZONE):
                    standby = RDSPostgresqlInstance("standby")
            wal = S3("any second, to\n5 minutes ago")
            backup = Backup("AWS Backup\nevery day")
        copy = S3("copy in\nanother region")

        users >> line("name", style="dashed") >> dns
        users >> line("HTTPS") >> waf >> balancer
        dns >> line(style="dashed") >> balancer
        certificate >> line(style="dashed") >> balancer
        for pod in pods:
            balancer >> line("8080" if pod is pods[1] else "") >> pod
            pod >> line("TLS" if pod is pods[0] else "") >> primary
        balancer >> line(style="invis") >> scaler >> line(style="dashed", constraint="false") >> pods[0]
        for source in (registry, secrets):
            source >> line(style="dashed") >> pods[2]
        watch - line("logs", style="dashed", reverse=True) - pods[2]
        pods[2] >> line("8081", style="dashed") >> prometheus >> line(style="dashed") >> grafana
        primary >> line("synchronous") >> standby
        standby >> wal
        standby >> backup >> copy


if __name__ == "__main__":
    main()
