"""Print the alert rules and the dashboard of monitoring/ as Kubernetes objects: `make k8s-monitoring` applies them."""

from pathlib import Path
from textwrap import indent

MONITORING = Path(__file__).parents[1] / "monitoring"
# The sidecar of Grafana's Helm chart loads ConfigMaps with the label grafana_dashboard.
OBJECTS = """\
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: hello-api
  labels:
{labels}
spec:
{rules}
---
apiVersion: v1
kind: ConfigMap
metadata:
  name: hello-dashboard
  labels:
{labels}
    grafana_dashboard: "1"
data:
  hello.json: |
{dashboard}
"""
LABELS = """\
app.kubernetes.io/name: hello
app.kubernetes.io/instance: hello
app.kubernetes.io/version: "2.0.0"
app.kubernetes.io/component: api
app.kubernetes.io/part-of: hello
app.kubernetes.io/managed-by: kubectl"""


def objects() -> str:
    """Return the PrometheusRule and the ConfigMap with the dashboard as YAML."""
    return OBJECTS.format(
        labels=indent(LABELS, "    "),
        rules=indent((MONITORING / "rules.yml").read_text(), "  "),
        dashboard=indent((MONITORING / "dashboard.json").read_text(), "    "),
    )


if __name__ == "__main__":
    print(objects(), end="")
