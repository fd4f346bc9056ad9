#!/bin/sh
# Fail if the image has a severe vulnerability that has a fix: `make scan`.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
docker save --output "$folder/image.tar" "hello:$HELLO_VERSION"
docker run --rm --volume "$folder:/scan:ro" "$GRYPE" docker-archive:/scan/image.tar --only-fixed --fail-on high
