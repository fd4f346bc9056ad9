#!/bin/sh
# Apply k8s/, save a date of birth, and ask for it all through a rolling update: not one answer may be missing or
# wrong. KUBECTL says which cluster and namespace; its nodes must be reachable from here, as those of kind are.
set -eu
cd "$(dirname "$0")/.."
kubectl=${KUBECTL:-kubectl}
folder=$(mktemp -d)
trap 'kill "$asker" 2>/dev/null || true; rm -rf "$folder"' EXIT
asker=

make --no-print-directory k8s-apply KUBECTL="$kubectl"

node=$($kubectl get nodes --output 'jsonpath={.items[0].status.addresses[?(@.type=="InternalIP")].address}')
port=$($kubectl get service hello-api --output 'jsonpath={.spec.ports[?(@.name=="http")].nodePort}')
url=http://$node:$port/hello/Zoe
curl --silent --show-error --fail --max-time 10 --request PUT --data '{"dateOfBirth": "1990-05-17"}' "$url"

ask() {
  while [ ! -e "$folder/stop" ]; do
    curl --silent --show-error --fail --max-time 10 "$url" >>"$folder/answers" 2>>"$folder/failures" || true
    echo >>"$folder/answers"
  done
}
ask &
asker=$!

old=$($kubectl get pods --selector app.kubernetes.io/component=api,app.kubernetes.io/instance=hello --output name)
$kubectl rollout restart deployment/hello-api
$kubectl rollout status deployment/hello-api --timeout=10m
$kubectl wait --for delete --timeout=2m $old
touch "$folder/stop"
wait "$asker"

asked=$(wc -l <"$folder/answers")
right=$(grep -c '^{"message": "Hello, Zoe! .*"}$' "$folder/answers" || true)
echo "$asked requests during the rolling update, $right of them answered."
cat "$folder/failures" >&2
[ "$asked" -gt 20 ] && [ "$asked" -eq "$right" ]
