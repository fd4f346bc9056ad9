"""Falcon with psycopg2's pool."""

from typing import Any

import falcon

from bench.peers.pool import cursor
from bench.peers.shared import BAD_DATE, BAD_USERNAME, FIND, NOT_FOUND, SAVE, greeting, is_username, parse_date


class Hello:
    def on_get(self, request: Any, response: Any, username: str) -> None:
        if not is_username(username):
            response.status, response.media = 400, BAD_USERNAME
            return
        with cursor() as database:
            database.execute(FIND, (username,))
            row = database.fetchone()
        if row:
            response.media = greeting(username, row[0])
        else:
            response.status, response.media = 404, NOT_FOUND

    def on_put(self, request: Any, response: Any, username: str) -> None:
        if not is_username(username):
            response.status, response.media = 400, BAD_USERNAME
            return
        document = request.get_media(default_when_empty=None)  # Falcon itself answers 400 where it is no JSON
        born = parse_date(document.get("dateOfBirth") if isinstance(document, dict) else None)
        if born is None:
            response.status, response.media = 400, BAD_DATE
            return
        with cursor() as database:
            database.execute(SAVE, (username, born))
        response.status = 204


application = falcon.App()
application.add_route("/hello/{username}", Hello())
