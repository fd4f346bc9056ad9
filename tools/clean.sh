#!/bin/sh
# Remove what make made; with WITH_DATA=yes also the data of `make run` and Compose: `make clean`.
# A folder was made by make if `.made-by-make` is in it, an image if it has the label of the Dockerfile.
set -eu

# Remove a folder if make made it. It is renamed first, so that an interruption leaves nothing that looks usable.
remove() {
  removed=$(dirname "$1")/.made-by-make-removed
  if [ -e "$1/.made-by-make" ]; then
    mv "$1" "$removed"
  elif [ -e "$1" ]; then
    echo "Kept: $1, because make did not make it."
  fi
  rm -rf "$removed"
}

if [ -e "$DATA/lock" ]; then
  exec 9>>"$DATA/lock"
  flock --nonblock 9 || {
    echo "A \`make run\` uses $DATA: stop it first. Nothing was removed." >&2
    exit 1
  }
fi
remove "$VENV/bench"
remove "$VENV"
if [ "$WITH_DATA" = yes ]; then
  remove "$DATA/data"
  rm -rf "$DATA"/.made-by-make-*
  # `make run` writes nothing into its lock.
  if [ -e "$DATA/lock" ] && [ ! -s "$DATA/lock" ]; then rm "$DATA/lock"; fi
  rmdir "$DATA" 2>/dev/null || true
else
  echo "Kept: the data in $DATA and in the volume ${COMPOSE_PROJECT_NAME}_data. \`make clean WITH_DATA=yes\` removes it."
fi
if docker info >/dev/null 2>&1; then
  tools/compose_down.sh "--volumes=$([ "$WITH_DATA" = yes ] && echo true || echo false)"
  image=$(docker image ls --quiet --filter reference="hello:$HELLO_VERSION" \
    --filter label=org.opencontainers.image.description='A birthday greeting service')
  if [ -n "$image" ]; then docker image rm "hello:$HELLO_VERSION" >/dev/null; fi
fi
