"""The service with metrics and log lines, and a client that counts what it was answered."""

import contextlib
import json
import os
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from prometheus_client.parser import text_string_to_metric_families

import hello
from tests.support.network import Connection, Response, exchange, free_port
from tests.support.service import Service, body
from tests.support.wait import in_thread, wait_until

Samples = dict[str, dict[tuple[str, ...], float]]


def route_of(path: str) -> str:
    """Return the route that metrics and log lines name for a path."""
    path = path.partition("?")[0]
    return hello.USER_ROUTE if path.startswith("/hello/") else path if path in hello.ROUTES else "unmatched"


class MonitoredService(Service):
    """A gunicorn with a port for its metrics.

    Its log must hold JSON objects and nothing else.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str], **settings: Any) -> None:
        self.metrics_port = free_port()
        self.answered: Counter[tuple[str, str, str]] = Counter()  # by method, route and status
        self.lock = threading.Lock()  # `+=` of two threads could lose one
        super().__init__(folder, environment, **{"METRICS_PORT": str(self.metrics_port)} | settings)

    def ask(self, method: str, path: str, content: bytes | None = None, *headers: str) -> Response:
        """Ask on a connection of its own, and count the answer."""
        response = super().ask(method, path, content, *headers)
        with self.lock:
            self.answered[method, route_of(path), str(response.status)] += 1
        return response

    def ask_for_metrics(self, method: str = "GET", path: str = "/metrics") -> Response:
        """Ask on the port of the metrics."""
        return Connection(self.metrics_port).ask(method, path, None, "Connection: close")

    def metrics(self) -> Samples:
        """Return what /metrics says now: the value of each sample by its name and the values of its labels."""
        samples: Samples = {}
        for family in text_string_to_metric_families(self.ask_for_metrics().content.decode()):
            for sample in family.samples:
                samples.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
        return samples

    def requests(self) -> dict[tuple[str, ...], float]:
        """Return what /metrics says was answered, by method, route and status."""
        return {key: value for key, value in self.metrics()["http_requests_total"].items() if value}

    def dropped_lines(self) -> float:
        """Return how many log lines /metrics says were lost."""
        return self.metrics()["log_lines_dropped_total"][()]

    def lines(self, message: str = "request") -> list[dict[str, Any]]:
        """Return the complete log lines so far whose message contains a text."""
        complete, _, _ = self.log_text().rpartition("\n")
        return [line for line in map(json.loads, complete.splitlines()) if message in line["message"]]

    def wait_for_lines(self, count: int, message: str = "request") -> list[dict[str, Any]]:
        """Return the log lines with a message once there are so many."""
        wait_until(lambda: len(self.lines(message)) >= count)
        return self.lines(message)

    def logged_answers(self) -> int:
        """Return how many of the answers have a log line."""
        return sum(count for (_, route, _), count in self.answered.items() if route not in {"/livez", "/readyz"})

    def work(self, clients: int = 4, rounds: int = 10) -> None:
        """Send requests of every kind from several clients at once."""

        def send() -> None:
            for _ in range(rounds):
                self.ask("PUT", "/hello/Zoe", body("1990-05-17"))
                self.ask("GET", "/hello/Zoe")
                self.ask("HEAD", "/hello/Zoe")
                self.ask("GET", "/hello/Nobody")
                self.ask("GET", "/hello/4")
                self.ask("PUT", "/hello/Zoe", b"{}")
                self.ask("POST", "/hello/Zoe")
                self.ask("GET", "/nowhere")
                self.ask("GET", "/readyz")

        for client in [in_thread(send) for _ in range(clients)]:
            client.result(60)


class PipedService(MonitoredService):
    """A service with one worker whose log goes into a pipe that nobody reads until `read_log` is called."""

    def __enter__(self) -> Self:
        self.environment["WEB_CONCURRENCY"] = "1"
        self.received = b""
        os.mkfifo(self.log)
        self.pipe = os.open(self.log, os.O_RDONLY | os.O_NONBLOCK)
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.close_pipe()

    def close_pipe(self) -> None:
        """Close the reading end, unless that was done."""
        pipe, self.pipe = self.pipe, -1
        if pipe != -1:
            os.close(pipe)

    def read_log(self) -> None:
        """Read what is in the pipe."""
        with contextlib.suppress(OSError):  # nothing more is there, or the pipe was closed
            while data := os.read(self.pipe, 65536):
                self.received += data

    def log_text(self) -> str:
        """Return what was read so far, and is in the pipe now."""
        self.read_log()
        return self.received.decode()

    def send_requests(self, count: int) -> None:
        """Send requests, a hundred at a time on one connection."""
        request = b"GET /nowhere HTTP/1.1\r\nHost: a\r\n\r\n"
        for _ in range(count // 100):
            assert exchange(self.port, request * 100).count(b"HTTP/1.1 404 ") == 100
        self.answered["GET", "unmatched", "404"] += count
