"""FastAPI with asyncpg's pool, whose statements are prepared."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from bench.peers.shared import BAD_DATE, BAD_USERNAME, NOT_FOUND, greeting, is_username, parse_date
from bench.peers.shared import FIND as FIND_IN_C
from bench.peers.shared import SAVE as SAVE_IN_C

FIND = FIND_IN_C.replace("%s", "$1")
SAVE = SAVE_IN_C.replace("%s", "$1", 1).replace("%s", "$2", 1)
CONNECTIONS = int(os.environ["CONNECTIONS"])


@asynccontextmanager
async def lifespan(application: FastAPI) -> AsyncIterator[None]:
    async with asyncpg.create_pool(min_size=CONNECTIONS, max_size=CONNECTIONS) as application.state.pool:
        yield


application = FastAPI(lifespan=lifespan)


class Person(BaseModel):
    date_of_birth: str = Field(alias="dateOfBirth")


@application.get("/hello/{username}")
async def get_hello(username: str) -> Response:
    if not is_username(username):
        return JSONResponse(BAD_USERNAME, 400)
    born = await application.state.pool.fetchval(FIND, username)
    return JSONResponse(greeting(username, born)) if born else JSONResponse(NOT_FOUND, 404)


@application.put("/hello/{username}")
async def put_hello(username: str, person: Person) -> Response:
    if not is_username(username):
        return JSONResponse(BAD_USERNAME, 400)
    born = parse_date(person.date_of_birth)
    if born is None:
        return JSONResponse(BAD_DATE, 400)
    await application.state.pool.execute(SAVE, username, born)
    return Response(status_code=204)
