"""Draw docs/aws.png, the picture of docs/aws.md: `make diagrams`. It needs Graphviz.

Everything has a fixed place, in units of 100 pixels from the lower left corner: so a line crosses no text.
"""

import hashlib
import shutil
import struct
import sys
import tempfile
import zlib
from itertools import pairwise
from pathlib import Path

if not shutil.which("dot"):
    sys.exit("Graphviz is not installed: install it (on Debian: apt-get install graphviz fonts-liberation)")

from diagrams import Diagram, Edge, Node
from diagrams.aws.compute import ECR
from diagrams.aws.database import RDSPostgresqlInstance
from diagrams.aws.general import Users
from diagrams.aws.management import Cloudwatch
from diagrams.aws.network import ALB, Route53
from diagrams.aws.security import WAF, SecretsManager
from diagrams.aws.storage import S3, Backup
from diagrams.k8s.compute import Pod
from diagrams.onprem.monitoring import Grafana, Prometheus

FOLDER = Path(__file__).parent
FONT = {"fontname": "Liberation Sans", "fontsize": "22", "fontcolor": "#1f2328"}
GRAPH = {
    "layout": "neato",
    "splines": "false",
    "bgcolor": "white",
    "pad": "0.1",
    "dpi": "100",
    "outputorder": "nodesfirst",
}


def main() -> None:
    """Draw the picture, and put the digest of this file into it, by which a test knows a stale one."""
    with tempfile.TemporaryDirectory() as folder:
        draw_aws(f"{folder}/aws")
        picture = (Path(folder) / "aws.png").read_bytes()
    text = b"tEXtSource\0" + hashlib.sha256(Path(__file__).read_bytes()).hexdigest().encode()
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    end = picture.rindex(b"IEND") - 4
    (FOLDER / "aws.png").write_bytes(picture[:end] + chunk + picture[end:])


def box(label: str, left: float, bottom: float, right: float, top: float, **attributes: str) -> None:
    """Draw a rectangle with a label at its top, inside."""
    style = {"shape": "box", "style": "filled,rounded", "fillcolor": "#f6f8fa", "color": "#8c959f"}
    place = {
        "pos": f"{(left + right) / 2},{(bottom + top) / 2}!",
        "width": str(right - left),
        "height": str(top - bottom),
    }
    Node("", **style | place | attributes)
    text(label, (left + right) / 2, top - 0.1 - 0.17 * (label.count("\n") + 1))


def icon(kind: type[Node], label: str, x: float, y: float) -> None:
    """Draw an icon with its label below."""
    size = {"width": "0.9", "height": "0.9", "fixedsize": "true", "imagescale": "true", "fontsize": "1"}
    kind("", pos=f"{x},{y}!", **size)
    text(label, x, y - 0.5 - 0.17 * (label.count("\n") + 1))


def text(label: str, x: float, y: float) -> None:
    """Write a text around a point."""
    Node(label, shape="plaintext", pos=f"{x},{y}!", width="0", height="0", margin="0", labelloc="c", **FONT)


def arrow(*points: tuple[float, float], **attributes: str) -> None:
    """Draw a line through points, with an arrow at its end."""
    corners = [Node("", shape="point", style="invis", width="0.01", height="0.01", pos=f"{x},{y}!") for x, y in points]
    for start, end in pairwise(corners):
        head = "normal" if end is corners[-1] else "none"
        start >> Edge(**{"arrowhead": head, "color": "#57606a", "penwidth": "2"} | attributes) >> end


def draw_aws(filename: str) -> None:
    """Draw hello on AWS: what docs/aws.md describes."""
    with Diagram("", graph_attr=GRAPH, show=False, outformat="png", filename=filename):
        draw_boxes()
        draw_icons()
        draw_arrows()


def draw_boxes() -> None:
    """Draw the region and its parts."""
    box("", 0.1, 0, 17.3, 9.6, style="invis")
    box("one AWS region", 2.2, 0, 15.3, 9.6, fillcolor="#ffffff")
    box("public subnets", 2.5, 3, 4.9, 8.9)
    box("EKS, private subnets\n3 to 10 pods", 5.7, 3, 8.9, 8.9)
    box("RDS for PostgreSQL\nMulti-AZ", 9.8, 3, 12.8, 8.9)
    box("for all zones", 2.5, 0.2, 12.8, 2.3)


def draw_icons() -> None:
    """Draw what runs, from left to right, then what serves all zones."""
    icon(Users, "clients", 1, 7.4)
    icon(Route53, "Route 53", 1, 4.9)
    icon(WAF, "firewall (WAF)", 3.7, 7.4)
    icon(ALB, "load balancer\nends TLS", 3.7, 4.9)
    for name, y in (("zone a", 7.2), ("zone b", 5.55), ("zone c", 3.9)):
        draw_zone(name, 5.9, 8.7, y)
        icon(Pod, "API pods", 7.8, y + 0.2)
    for name, label, y in (("zone a", "primary", 7.2), ("zone b", "standby", 4.6)):
        draw_zone(name, 10, 12.6, y)
        icon(RDSPostgresqlInstance, label, 11.8, y + 0.2)
    icon(S3, "log archive\n35 days", 14.2, 7.4)
    icon(Backup, "AWS Backup\nevery day", 14.2, 4.9)
    icon(S3, "copy in\nanother\nregion", 16.4, 4.9)
    shared = ((Prometheus, "Prometheus"), (Grafana, "Grafana"), (SecretsManager, "Secrets"), (ECR, "ECR"))
    for number, (kind, label) in enumerate((*shared, (Cloudwatch, "CloudWatch"))):
        icon(kind, label, 3.6 + 2 * number, 1.15)


def draw_zone(name: str, left: float, right: float, y: float) -> None:
    """Draw a zone, with room for an icon at its right."""
    box("", left, y - 0.72, right, y + 0.72, fillcolor="#ffffff", style="filled,rounded,dashed")
    text(name, left + 0.6, y)


def draw_arrows() -> None:
    """Draw the ways of requests, rows and backups; the lines of other things are dashed."""
    dashed = {"style": "dashed"}
    arrow((1.6, 7.4), (3.1, 7.4))
    arrow((3.7, 6.45), (3.7, 5.5))
    arrow((1, 6.45), (1, 5.5), **dashed)
    arrow((1.6, 4.9), (3.1, 4.9), **dashed)
    for y in (7.2, 5.55, 3.9):
        arrow((4.3, 4.9), (5.9, y))
    arrow((8.9, 7.2), (10, 7.2))
    arrow((10.6, 6.48), (10.6, 5.32))
    text("synchronous", 11.6, 5.9)
    arrow((12.6, 7.4), (13.6, 7.4))
    arrow((12.6, 6.8), (13.1, 6.8), (13.1, 4.9), (13.6, 4.9))
    arrow((14.8, 4.9), (15.8, 4.9))
    arrow((7.3, 3), (7.3, 2.3), **dashed)


if __name__ == "__main__":
    main()
