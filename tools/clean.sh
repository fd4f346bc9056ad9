#!/bin/sh
# Remove what make made; with WITH_DATA=yes also the data of `make run` and Compose: `make clean`.
set -eu
# The list of the processes of `make run` is empty if it ended normally.
if [ -s "$DATA/lock" ]; then
  for python in "$VENV/bin/python" ${PYTHON:+"$PYTHON"} python3 python3.14 python3.13 python3.12 python3.11 python none; do
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
  done
  if [ "$python" = none ]; then
    echo "$DATA may be in use, and there is no Python 3.11 or newer to check it: nothing was removed." >&2
    exit 1
  fi
  # Exits if `make run` is running; ends the processes that a killed one left.
  "$python" -m tools.processes "$DATA/lock"
fi
if docker info >/dev/null 2>&1; then
  docker compose down --remove-orphans "--volumes=$([ "$WITH_DATA" = yes ] && echo true || echo false)"
  docker image rm --force "hello:$VERSION" >/dev/null 2>&1 || true
fi
rm -rf __pycache__ */__pycache__ */*/__pycache__ .hypothesis .mypy_cache .pytest_cache .ruff_cache .coverage .coverage.*
# Not a folder that make did not create
if [ -e "$VENV/pyvenv.cfg" ]; then rm -rf "$VENV"; fi
if [ "$WITH_DATA" != yes ]; then
  echo "Kept: $DATA and the volume hello_data. \`make clean WITH_DATA=yes\` removes them."
elif [ -e "$DATA/data" ]; then
  rm -rf "$DATA"
fi
