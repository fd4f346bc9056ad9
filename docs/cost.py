"""Estimate what hello costs a month on AWS: `python3 docs/cost.py` prints the table of docs/aws.md.

Prices are in US dollars without tax, of the region us-east-1, on demand. They are remembered public list prices of
2025, not looked up: check each at https://calculator.aws before you rely on a sum.
"""

HOURS = 730  # of a month
SECONDS = HOURS * 3600

SIZES = {
    "small": {"rate": 10, "users": 1e6, "nodes": 3, "node": 0.0416, "database": 0.129, "storage": 20},
    "medium": {"rate": 500, "users": 1e7, "nodes": 3, "node": 0.0893, "database": 0.337, "storage": 100},
    "large": {"rate": 5000, "users": 1e8, "nodes": 3, "node": 0.357, "database": 1.348, "storage": 400},
}
MACHINES = {  # of which `node` and `database` are the prices an hour
    "small": "t3.medium, db.t4g.medium",
    "medium": "c7i.large, db.m7g.large",
    "large": "c7i.2xlarge, db.m7g.2xlarge",
}
REQUESTS_A_CONNECTION = 10
BYTES_OUT = 500  # a response with its head
BYTES_LOGGED = 250  # a request's log line


def costs(rate: float, users: float, nodes: float, node: float, database: float, storage: float) -> dict[str, float]:
    """Return the dollars a month of each part, at a mean rate of requests a second."""
    millions = rate * SECONDS / 1e6
    capacity_units = max(rate / REQUESTS_A_CONNECTION / 25, rate * BYTES_OUT * 3600 / 1e9, 0.1)
    return {
        "EKS: the control plane": 0.10 * HOURS,
        "EKS: three nodes and their disks": nodes * (node * HOURS + 20 * 0.08),
        "NAT: one gateway a zone": 3 * 0.045 * HOURS,
        "load balancer": (0.0225 + 0.008 * capacity_units) * HOURS,
        "WAF: five rules, and each request": 5 + 5 + 0.60 * millions,
        "Route 53: zone, health check, look-ups": 0.5 + 0.5 + 0.40 * millions / 100,
        "RDS, Multi-AZ: two machines": database * HOURS,
        "RDS: storage, twice": storage * 0.23,
        "backups: a copy in another region": storage * (0.095 + 0.02),
        "CloudWatch: log lines": millions * BYTES_LOGGED / 1000 * 0.50,
        "responses, to the Internet": millions * BYTES_OUT / 1000 * 0.09,
        "ECR, Secrets Manager, ten alarms, Prometheus' disk": 0.1 + 0.4 + 1.0 + 50 * 0.08,
    }


def table() -> str:
    """Return the costs of the three sizes as a Markdown table."""
    columns = {name: costs(**size) for name, size in SIZES.items()}
    lines = ["| US dollars a month | " + " | ".join(SIZES) + " |", "| --- |" + " ---: |" * len(SIZES)]
    lines.append("| mean requests a second | " + " | ".join(f"{size['rate']:,}" for size in SIZES.values()) + " |")
    lines.append("| users | " + " | ".join(f"{size['users']:,.0f}" for size in SIZES.values()) + " |")
    lines.append("| machines | " + " | ".join(MACHINES.values()) + " |")
    for part in columns["small"]:
        lines.append(f"| {part} | " + " | ".join(f"{column[part]:,.0f}" for column in columns.values()) + " |")
    totals = [f"**{sum(column.values()):,.0f}**" for column in columns.values()]
    return "\n".join([*lines, "| **in all** | " + " | ".join(totals) + " |"])


if __name__ == "__main__":
    print(table())
