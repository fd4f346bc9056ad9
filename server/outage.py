"""Log lines about outages of the database."""

import psycopg2

from server.logs import LOG


def reason(error: Exception) -> str:
    """Describe an error without quoting a row: libpq's text if the connection failed, else class and SQLSTATE."""
    text = str(error).strip().partition("\n")[0]
    code = getattr(error, "pgcode", None)
    if code:
        return f"{type(error).__name__}, SQLSTATE {code}"
    return text if text and isinstance(error, (psycopg2.OperationalError, OSError)) else type(error).__name__


class Outage:
    """Log two warnings for each outage of the database: at its begin, and at its end with its duration.

    The methods take the time in monotonic seconds.
    """

    def __init__(self) -> None:
        self.began: float | None = None
        self.failed = 0.0  # time of the last failure
        self.recovered: float | None = None  # time of the first success after it
        self.unavailable = 0  # responses with 503 since the outage began

    def failure(self, operation: str, error: Exception, now: float) -> None:
        """Begin an outage, or go on with it."""
        self.failed, self.recovered = now, None
        if self.began is None:
            self.began, self.unavailable = now, 0
            LOG.warning("database: %s failed: %s", operation, reason(error))

    def success(self, now: float) -> None:
        """End the outage if no statement failed for a second: until then, others may still fail."""
        if self.began is None:
            return
        self.recovered = self.recovered or now
        if now - self.failed >= 1:
            seconds = self.recovered - self.began
            LOG.warning("database: back after %.1f s, %d requests got 503", seconds, self.unavailable)
            self.began = None
