#!/bin/sh
# Remove what make made; with WITH_DATA=yes also the data of `make run` and Compose: `make clean`.
set -eu
if [ "$WITH_DATA" = yes ] && [ -e "$DATA/lock" ] && [ -x "$VENV/bin/python" ]; then
  "$VENV/bin/python" -m tools.processes "$DATA/lock" # fails while `make run` uses it, ends what a killed one left
fi
if docker info >/dev/null 2>&1; then
  docker compose down --remove-orphans "--volumes=$([ "$WITH_DATA" = yes ] && echo true || echo false)"
  docker image rm --force "hello:$VERSION" >/dev/null 2>&1 || true
fi
rm -rf __pycache__ .hypothesis .mypy_cache .pytest_cache .ruff_cache .coverage .coverage.*
# Only folders that make made
if [ -e "$VENV/pyvenv.cfg" ]; then rm -rf "$VENV"; fi
if [ "$WITH_DATA" != yes ]; then
  echo "Kept: $DATA and the volume hello_data. \`make clean WITH_DATA=yes\` removes them."
elif [ -e "$DATA/data" ]; then
  rm -rf "$DATA"
fi
