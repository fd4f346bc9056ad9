#!/bin/sh
# Make a random database password and give it to the database, the Secret and the API, in this order: `make k8s-secret`.
# Where a step fails, run it again: changing the role needs no password. None is ever an argument of a process.
set -eu
kubectl=${KUBECTL:-kubectl}
password=$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')

exists() { $kubectl get "$@" --ignore-not-found --output=name; }
pod=$(exists pod hello-database-0)
volume=$(exists persistentvolumeclaim data-hello-database-0)
deployment=$(exists deployment hello-api)

# Postgres takes the password from the environment only when its volume is empty.
if [ -n "$pod" ]; then
  echo "ALTER ROLE hello PASSWORD '$password'" | $kubectl exec --stdin hello-database-0 --container=database -- \
    psql --quiet --no-psqlrc --username=postgres --set=ON_ERROR_STOP=1
elif [ -n "$volume" ]; then
  echo 'The volume data-hello-database-0 has a password, and no database runs to change it: first `make k8s-apply`.' >&2
  exit 1
fi

# Applied by the server: kubectl itself would keep a copy of the password in an annotation. Encoded, because the server
# applies `stringData` once and not again.
encoded=$(printf %s "$password" | base64)
# PASSWORD is for the pods of this folder; username, password and the label are for CloudNativePG (ha/).
$kubectl apply --server-side --force-conflicts --filename=- <<END
apiVersion: v1
kind: Secret
type: kubernetes.io/basic-auth
metadata:
  name: hello-database-password
  labels:
    app.kubernetes.io/name: hello
    app.kubernetes.io/instance: hello
    app.kubernetes.io/version: "18"
    app.kubernetes.io/component: database
    app.kubernetes.io/part-of: hello
    app.kubernetes.io/managed-by: kubectl
    cnpg.io/reload: "true"
data:
  PASSWORD: $encoded
  username: $(printf hello | base64)
  password: $encoded
END

# Pods that run keep their connections; they could open no new one with the old password.
if [ -n "$deployment" ]; then
  $kubectl rollout restart deployment/hello-api
  $kubectl rollout status deployment/hello-api --timeout=10m
fi
