FROM python:3.14-slim AS base

FROM base AS dependencies
RUN python -m venv --without-pip /venv
COPY requirements/service.txt .
# Only wheels, with their hashes: an installation from source would run code of the package.
RUN python -m pip --python /venv/bin/python install --no-cache-dir --require-hashes --only-binary :all: -r service.txt \
    && find /venv -type d '(' -name tests -o -name testing ')' -prune -exec rm -r {} +

FROM base
COPY --from=dependencies /venv /venv
ENV PATH=/venv/bin:$PATH \
    HOST=0.0.0.0 \
    METRICS_HOST=0.0.0.0
WORKDIR /app
# 444: the umask of the clone may leave files that only their owner can read.
COPY --chmod=444 server/*.py server/
COPY --chmod=444 hello.py gunicorn.conf.py schema.sql openapi.yaml ./
# A number: with runAsNonRoot, Kubernetes cannot verify a name.
USER 10001:10001
EXPOSE 8080 8081
# /livez and not /readyz: restarting the container cannot fix the database.
# Every 5 s, because `docker compose up --wait` waits for the first check.
HEALTHCHECK --interval=5s --timeout=3s --start-period=15s CMD ["python", "-IS", "-c", "\
from http.client import HTTPConnection; from os import environ; \
livez = HTTPConnection('127.0.0.1', int(environ.get('PORT') or 8080), timeout=2); \
livez.request('GET', '/livez'); raise SystemExit(livez.getresponse().status != 200)"]
CMD ["gunicorn", "hello:application"]
ARG VERSION=2.0.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title=hello \
    org.opencontainers.image.description="A birthday greeting service" \
    org.opencontainers.image.licenses=MIT \
    org.opencontainers.image.base.name=docker.io/library/python:3.14-slim \
    org.opencontainers.image.version=$VERSION \
    org.opencontainers.image.revision=$REVISION
