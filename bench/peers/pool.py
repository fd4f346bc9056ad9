"""A psycopg2 connection for each thread of the process, from psycopg2's own pool."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from psycopg2.pool import ThreadedConnectionPool

THREADS = int(os.environ["THREADS"])  # as many as gunicorn has: the pool is never exhausted
pool = ThreadedConnectionPool(THREADS, THREADS, "")


@contextmanager
def cursor() -> Iterator[Any]:
    connection = pool.getconn()
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            yield cursor
    finally:
        pool.putconn(connection)
