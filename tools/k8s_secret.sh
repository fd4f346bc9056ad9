#!/bin/sh
# Give the database a random password, or a new one: `make k8s-secret`. Run it again after a failure.
# The password is never an argument of a process, and never in an annotation.
set -eu
kubectl=${KUBECTL:-kubectl}
password=$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')

exists() { $kubectl get "$@" --ignore-not-found --output=name; }
secret=$(exists secret hello-database-password)
pod=$(exists pod hello-database-0)
volume=$(exists persistentvolumeclaim data-hello-database-0)
deployment=$(exists deployment hello-api)

# The image sets the password only in an empty volume. Another database has its own password.
if [ -z "$pod" ] && [ -n "$volume$deployment" ]; then
  echo 'No pod hello-database-0 runs, so the password cannot be changed in its database. Nothing was changed.' >&2
  echo 'With the database of k8s/, first run make k8s-apply. Of another one, docs/kubernetes.md says how.' >&2
  exit 1
fi

# The type of a Secret cannot be changed, so an existing one keeps its type.
verb=create
type=Opaque
if [ -n "$secret" ]; then
  verb=replace
  type=$($kubectl get secret hello-database-password --output='jsonpath={.type}')
fi

write_secret() {
  $kubectl "$verb" --filename=- "$@" <<END
apiVersion: v1
kind: Secret
metadata:
  name: hello-database-password
  labels:
    app.kubernetes.io/name: hello
    app.kubernetes.io/instance: hello
    app.kubernetes.io/version: "18"
    app.kubernetes.io/component: database
    app.kubernetes.io/part-of: hello
    app.kubernetes.io/managed-by: kubectl
type: $type
data:
  username: $(printf hello | base64)
  password: $(printf %s "$password" | base64)
END
}

# The server refuses here what it would refuse after ALTER ROLE.
write_secret --dry-run=server >/dev/null
if [ -n "$pod" ]; then
  # Over the socket of the pod, which needs no password.
  echo "ALTER ROLE hello PASSWORD '$password'" | $kubectl exec --stdin hello-database-0 --container=database -- \
    psql --quiet --no-psqlrc --username=postgres --set=ON_ERROR_STOP=1
fi
write_secret

# The pods read the Secret when they start. Their open connections stay.
if [ -n "$deployment" ]; then
  $kubectl rollout restart deployment/hello-api
  $kubectl rollout status deployment/hello-api --timeout=10m
fi
