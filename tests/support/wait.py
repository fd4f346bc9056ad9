"""Wait for conditions, and for calls in other threads."""

import concurrent.futures
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def wait_until(condition: Callable[[], T], seconds: float = 10) -> T:
    """Return a condition's first true value; fail after some seconds."""
    start = time.monotonic()
    while not (value := condition()):
        waited = time.monotonic() - start
        assert waited < seconds, f"not within {seconds} s; the last value was {value!r}"
        time.sleep(min(0.01 + waited / 50, 0.03))  # a condition may cost a query or a look at every process
    return value


def in_thread(call: Callable[..., T], *arguments: Any) -> concurrent.futures.Future[T]:
    """Call in a thread that does not keep the process alive; return the call's future."""
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(call(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
