"""What no request of hello's can be faster than under the same server: a constant."""

from collections.abc import Iterable
from wsgiref.types import StartResponse, WSGIEnvironment

CONTENT = b'{"message": "Hello, Userabcdefg! Your birthday is in 174 day(s)"}'
HEADERS = [
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    ("Content-Type", "application/json"),
    ("Content-Length", str(len(CONTENT))),
]


def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    start_response("200 OK", HEADERS)
    return [CONTENT]
