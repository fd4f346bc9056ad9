#!/bin/sh
# Create a cluster in Docker, load the image and restrict the namespace hello: `make kind`.
set -eu
# Not `hello`: that may be somebody else's.
name=hello-birthday-greetings
kind get clusters 2>/dev/null | grep -qx "$name" || kind create cluster --name "$name" --wait 3m
kind load docker-image "hello:$HELLO_VERSION" --name "$name"
kubectl --context "kind-$name" create namespace hello --dry-run=client --output yaml | kubectl --context "kind-$name" apply -f -
kubectl --context "kind-$name" label namespace hello --overwrite pod-security.kubernetes.io/enforce=restricted
