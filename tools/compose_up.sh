#!/bin/sh
# Bring the composed system up and print how to use it; if that fails, print why init-db failed: `make compose-up`.
set -eu
if ! docker compose up --detach --wait --quiet-pull; then
  if [ "$(docker compose ps --all --format '{{.ExitCode}}' init-db)" != 0 ]; then
    docker logs --tail 1 "$(docker compose ps --all --quiet init-db)" >&2
  fi
  echo "hello is not up: \`docker compose logs\` shows why; remove the cause, then \`make compose-up\` again." >&2
  exit 1
fi
port=$(docker compose port api 8080 | sed 's/.*://')
cat <<END

hello serves on port $port. Try it:

  curl -i -X PUT http://127.0.0.1:$port/hello/Zoe -d '{"dateOfBirth": "1990-05-17"}'
  curl http://127.0.0.1:$port/hello/Zoe

Its log: docker compose logs --follow api. Stop it: make compose-down.
END
if docker compose config | grep -q 'POSTGRES_PASSWORD: for-development-only$'; then
  echo 'WARNING: the database has the development password, which everybody can read in .env.example.' >&2
  echo 'Before you store real data, set one of your own: docs/containers.md, "Passwords".' >&2
fi
