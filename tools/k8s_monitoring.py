"""Wrap the rules and the dashboard of ../monitoring into objects of Kubernetes: `make k8s-monitoring`."""

from pathlib import Path
from textwrap import indent

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "monitoring"
TARGET = ROOT / "k8s" / "monitoring"
LABELS = """\
    app.kubernetes.io/name: hello
    app.kubernetes.io/instance: hello
    app.kubernetes.io/version: "1.0.0"
    app.kubernetes.io/component: api
    app.kubernetes.io/part-of: hello
    app.kubernetes.io/managed-by: kubectl
"""
RULE = f"""\
# Made from monitoring/rules.yml by `make k8s-monitoring`: change that one.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: hello-api
  labels:
{LABELS}spec:
"""
DASHBOARD = f"""\
# Made from monitoring/dashboard.json by `make k8s-monitoring`: change that one.
# The sidecar of Grafana's Helm chart loads every ConfigMap that has the label grafana_dashboard.
apiVersion: v1
kind: ConfigMap
metadata:
  name: hello-dashboard
  labels:
{LABELS}    grafana_dashboard: "1"
data:
  hello.json: |
"""


def generate() -> dict[str, str]:
    """Return the text of each file by its name."""
    return {
        "prometheus-rule.yaml": RULE + indent((SOURCE / "rules.yml").read_text(), "  "),
        "dashboard.yaml": DASHBOARD + indent((SOURCE / "dashboard.json").read_text(), "    "),
    }


if __name__ == "__main__":
    for name, text in generate().items():
        (TARGET / name).write_text(text)
