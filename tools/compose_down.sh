#!/bin/sh
# Remove the containers of Compose; what other Compose files created stays: `make compose-down`.
# Whatever COMPOSE_FILE and .env say, these files and COMPOSE_PROJECT_NAME name what is ours.
set -eu
exec docker compose --file docker-compose.yml --file compose/scale.yml --file compose/secrets.yml --profile '*' down "$@"
