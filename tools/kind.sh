#!/bin/sh
# Create the cluster `hello` in Docker, load the image and restrict the namespace hello: `make kind`.
set -eu
kind get clusters 2>/dev/null | grep -qx hello || kind create cluster --name hello --wait 3m
kind load docker-image "hello:$VERSION" --name hello
kubectl --context kind-hello create namespace hello --dry-run=client --output yaml | kubectl --context kind-hello apply -f -
kubectl --context kind-hello label namespace hello --overwrite pod-security.kubernetes.io/enforce=restricted
