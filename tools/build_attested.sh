#!/bin/sh
# Build hello-HELLO_VERSION.tar, the image with its provenance and bill of materials: `make build-attested`.
set -eu
# Not `hello`: that may be somebody else's.
builder=hello-birthday-greetings
docker buildx inspect "$builder" >/dev/null 2>&1 ||
  docker buildx create --name "$builder" --driver docker-container >/dev/null
docker buildx build --builder "$builder" --provenance mode=max --sbom true --tag "hello:$HELLO_VERSION" \
  --build-arg VERSION="$HELLO_VERSION" \
  --build-arg REVISION="$(git rev-parse --verify -q HEAD 2>/dev/null || echo unknown)" \
  --output "type=oci,dest=hello-$HELLO_VERSION.tar" .
