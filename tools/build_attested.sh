#!/bin/sh
# Build hello-VERSION.tar, the image with its provenance and bill of materials: `make build-attested`.
set -eu
docker buildx inspect hello >/dev/null 2>&1 || docker buildx create --name hello --driver docker-container >/dev/null
docker buildx build --builder hello --provenance mode=max --sbom true --tag "hello:$VERSION" \
  --build-arg VERSION="$VERSION" --build-arg REVISION="$(git rev-parse --verify -q HEAD 2>/dev/null || echo unknown)" \
  --output "type=oci,dest=hello-$VERSION.tar" .
