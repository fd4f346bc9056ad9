#!/bin/sh
# Pin the newest dependencies of pyproject.toml, with hashes, in requirements/: `make lock`.
set -eu
compile() {
  "$VENV/bin/uv" pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-header \
    "$@" >/dev/null
}
compile pyproject.toml --output-file requirements/service.txt
for group in run dev bench; do
  compile pyproject.toml --group $group --constraint requirements/service.txt --output-file requirements/$group.txt
done
compile --group docs --output-file requirements/docs.txt
