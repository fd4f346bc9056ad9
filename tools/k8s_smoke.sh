#!/bin/sh
# Apply k8s/, save a date of birth and read it during a rolling update: every answer must be right. `make k8s-smoke`.
# The nodes must be reachable from here, as those of kind are.
set -eu
cd "$(dirname "$0")/.."
kubectl=${KUBECTL:-kubectl}
folder=$(mktemp -d)
reader=
trap '[ -z "$reader" ] || kill "$reader" 2>/dev/null || true; rm -rf "$folder"' EXIT

KUBECTL="$kubectl" tools/k8s_apply.sh

node=$($kubectl get nodes --output 'jsonpath={.items[0].status.addresses[?(@.type=="InternalIP")].address}')
port=$($kubectl get service hello-api --output 'jsonpath={.spec.ports[?(@.name=="http")].nodePort}')
url=http://$node:$port/hello/Zoe
curl --silent --show-error --fail --max-time 10 --request PUT --data '{"dateOfBirth": "1990-05-17"}' "$url"

read_repeatedly() {
  while [ ! -e "$folder/stop" ]; do
    curl --silent --show-error --fail --max-time 10 "$url" >>"$folder/answers" 2>>"$folder/failures" || true
    echo >>"$folder/answers"
  done
}
read_repeatedly &
reader=$!

old=$($kubectl get pods --selector app.kubernetes.io/component=api,app.kubernetes.io/instance=hello --output name)
$kubectl rollout restart deployment/hello-api
$kubectl rollout status deployment/hello-api --timeout=10m
# shellcheck disable=SC2086 # one argument for each pod
$kubectl wait --for delete --timeout=2m $old
touch "$folder/stop"
wait "$reader"
reader=

requests=$(wc -l <"$folder/answers")
right=$(grep -c '^{"message": "Hello, Zoe! .*"}$' "$folder/answers" || true)
echo "$requests requests during the rolling update, $right right answers."
cat "$folder/failures" >&2
[ "$requests" -gt 20 ] && [ "$requests" -eq "$right" ]
