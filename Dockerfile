# The service with its dependencies, and nothing that installs or tests them. See docker-compose.yml for how to run it.
FROM python:3.14-slim AS base

FROM base AS dependencies
# Without pip inside: nothing is installed once the image is made.
RUN python -m venv --without-pip /venv
# Before the source, so that only a change of this file installs again.
COPY requirements/service.txt .
# Wheels with known hashes only: no compiler, and no code of a package runs here. Their own tests do not belong here.
RUN python -m pip --python /venv/bin/python install --no-cache-dir --require-hashes --only-binary :all: -r service.txt \
    && find /venv -type d '(' -name tests -o -name testing ')' -prune -exec rm -r {} +

FROM base
COPY --from=dependencies /venv /venv
# Other containers must reach both ports; what is published decides who else can.
ENV PATH=/venv/bin:$PATH \
    HOST=0.0.0.0 METRICS_HOST=0.0.0.0
WORKDIR /app
# Readable for the user below, whatever the umask of the clone.
COPY --chmod=444 server/*.py server/
COPY --chmod=444 hello.py gunicorn.conf.py schema.sql openapi.yaml ./
# A number, because Kubernetes cannot tell of a name whether it is root. It owns nothing in the image.
USER 10001:10001
EXPOSE 8080 8081
# Not /readyz: who acts on this restarts the container, and that does not mend a database.
# In seconds: `docker compose up --wait` learns of a start after one interval; a check costs 40 ms of CPU.
HEALTHCHECK --interval=5s --timeout=3s --start-period=15s CMD ["python", "-IS", "-c", "\
from http.client import HTTPConnection; from os import environ; \
livez = HTTPConnection('127.0.0.1', int(environ.get('PORT') or 8080), timeout=2); \
livez.request('GET', '/livez'); raise SystemExit(livez.getresponse().status != 200)"]
# Exec form: gunicorn is process 1 and gets SIGTERM itself.
CMD ["gunicorn", "hello:application"]
# Last, because they change with every commit.
ARG VERSION=1.0.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title=hello \
    org.opencontainers.image.description="Keeps dates of birth and says how long it is until the birthday" \
    org.opencontainers.image.licenses=MIT \
    org.opencontainers.image.base.name=docker.io/library/python:3.14-slim \
    org.opencontainers.image.version=$VERSION \
    org.opencontainers.image.revision=$REVISION
