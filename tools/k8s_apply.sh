#!/bin/sh
# Apply k8s/ and wait until the database and two pods of the API are ready: `make k8s-apply`.
set -eu
cd "$(dirname "$0")/.."
kubectl=${KUBECTL:-kubectl}

$kubectl apply --filename=k8s/
$kubectl rollout status statefulset/hello-database --timeout=10m
$kubectl rollout status deployment/hello-api --timeout=10m

replicas=$($kubectl get deployment hello-api --output='jsonpath={.spec.replicas}')
if [ "$replicas" = 0 ]; then
  echo 'hello-api is scaled to 0: kubectl scale deployment/hello-api --replicas=2'
  exit
fi
# The first apply makes one pod. The autoscaler adds a second one within a minute.
attempts=120
while [ "$replicas" -lt 2 ]; do
  attempts=$((attempts - 1))
  if [ "$attempts" = 0 ]; then
    echo 'The autoscaler has not added a second pod: kubectl describe horizontalpodautoscaler hello-api' >&2
    exit 1
  fi
  sleep 1
  replicas=$($kubectl get deployment hello-api --output='jsonpath={.spec.replicas}')
done
$kubectl rollout status deployment/hello-api --timeout=10m
