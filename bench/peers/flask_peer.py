"""Flask with a connection a request, as its tutorial does."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import psycopg2
from flask import Flask, request

from bench.peers.shared import BAD_DATE, BAD_USERNAME, FIND, NOT_FOUND, SAVE, greeting, is_username, parse_date

application = Flask(__name__)


@contextmanager
def new_connection() -> Iterator[Any]:
    with closing(psycopg2.connect("")) as connection, connection, connection.cursor() as cursor:
        yield cursor


@application.get("/hello/<username>")
def get_hello(username: str) -> Any:
    if not is_username(username):
        return BAD_USERNAME, 400
    with new_connection() as cursor:
        cursor.execute(FIND, (username,))
        row = cursor.fetchone()
    return greeting(username, row[0]) if row else (NOT_FOUND, 404)


@application.put("/hello/<username>")
def put_hello(username: str) -> Any:
    if not is_username(username):
        return BAD_USERNAME, 400
    document = request.get_json(force=True, silent=True)
    born = parse_date(document.get("dateOfBirth") if isinstance(document, dict) else None)
    if born is None:
        return BAD_DATE, 400
    with new_connection() as cursor:
        cursor.execute(SAVE, (username, born))
    return "", 204
