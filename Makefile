# Settings of make, for its command line: `make run DATA=folder`. They are not taken from the environment, where another
# tool's may have the same name. PORT and the other settings of the service are.
# The Python that creates the virtual environment. If it is empty, make takes the first one on the PATH that is 3.11 to 3.14.
PYTHON =
# The folder of the virtual environment
VENV = .venv
# The folder of the data of `make run`
DATA = .postgres
# Arguments of `make test`, `make mutations` and `make bench`: `make test ARGS='-k birthday'`
ARGS =
# Number of test files that run at the same time
JOBS = 5
# With `yes`, `make clean` also removes the data of `make run` and Compose.
WITH_DATA = no
# The kubectl of the k8s targets: `make k8s-apply KUBECTL='kubectl --namespace hello'`
KUBECTL = kubectl
# The image of the scanner of `make scan`
GRYPE = anchore/grype:v0.117.0@sha256:ddf9e9f204049f3a4a0955ef70873cabab6a31432125ad4f20a490b54950a253
# The project of the containers: nobody else's, whatever the environment says
COMPOSE_PROJECT_NAME := $(shell sed -n 's/^name: //p' docker-compose.yml)
# The image's tag, also for `docker compose`
HELLO_VERSION ?= 2.0.0

# Not every shell replaces the ~ in `make run DATA=~/data`.
override VENV := $(VENV:~/%=$(HOME)/%)
override DATA := $(DATA:~/%=$(HOME)/%)

.DEFAULT_GOAL := help
export PYTHON VENV DATA WITH_DATA KUBECTL GRYPE COMPOSE_PROJECT_NAME HELLO_VERSION
# It would hide the modules of this folder.
unexport PYTHONSAFEPATH
# Caches are in the environment, so that they go with it.
export RUFF_CACHE_DIR = $(VENV)/cache/ruff
export MYPY_CACHE_DIR = $(VENV)/cache/mypy
export COVERAGE_FILE = $(VENV)/cache/coverage
export HYPOTHESIS_STORAGE_DIRECTORY = $(VENV)/cache/hypothesis

PYTEST = pytest -rfEs -n "$(JOBS)" --dist loadfile

.PHONY: help run test coverage mutations lint format lock audit
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: run-environment ## Serve on PORT (8080), with an embedded Postgres unless PGHOST is set
	@exec "$(VENV)/bin/python" -m tools.serve "$(DATA)" "$(VENV)/bin/gunicorn" hello:application

test: dev-environment ## Run the tests, against Postgres servers of their own
	@"$(VENV)/bin/python" -m $(PYTEST) $(ARGS)

coverage: dev-environment ## Run the tests and print which lines and branches they did not reach
	@"$(VENV)/bin/coverage" erase; "$(VENV)/bin/coverage" run -m $(PYTEST) $(ARGS); status=$$?; \
		"$(VENV)/bin/coverage" combine --quiet && "$(VENV)/bin/coverage" report; exit $$status

mutations: dev-environment ## Break each protection in a copy and check that its test fails
	@"$(VENV)/bin/python" -m tools.mutations $(ARGS)

lint: dev-environment ## Check style, format, types, shell scripts, this file, and that tests/mutations.toml fits the code
	@"$(VENV)/bin/ruff" check --quiet
	@"$(VENV)/bin/ruff" format --quiet --check
	@"$(VENV)/bin/mypy" --no-error-summary
	@"$(VENV)/bin/python" -m tools.mutations --check
	@"$(VENV)/bin/shellcheck" .ci/run tools/*.sh
	@! sed 's/"[^"]*"//g' Makefile | grep -nE '^	.*[$$][(](VENV|DATA|HELLO_VERSION)[)]' || \
		{ echo 'Makefile: a variable in these lines must be in double quotes.' >&2; exit 1; }

format: dev-environment ## Format the code as `make lint` checks it
	@"$(VENV)/bin/ruff" check --quiet --fix
	@"$(VENV)/bin/ruff" format --quiet

lock: dev-environment ## Pin the newest dependencies of pyproject.toml, with hashes, in requirements/
	@tools/lock.sh

audit: dev-environment ## Check the pinned dependencies for known vulnerabilities (needs pypi.org)
	@tools/audit.sh

.PHONY: run-environment dev-environment bench-environment
run-environment dev-environment: %-environment:
	@tools/environment.sh $*

# Inside the environment of `make run`, so that this one must exist first
bench-environment: run-environment
	@VENV="$(VENV)/bench" tools/environment.sh bench

.PHONY: engine build build-attested scan compose-up compose-down compose-restart clean
engine:
	@docker compose version >/dev/null 2>&1 && docker info >/dev/null 2>&1 || { \
		echo 'This needs a running Docker engine with Compose 2.24 or newer.' >&2; exit 1; }

build: engine ## Build the image hello:HELLO_VERSION
	@DOCKER_BUILDKIT=1 docker build --tag "hello:$(HELLO_VERSION)" --build-arg VERSION="$(HELLO_VERSION)" \
		--build-arg REVISION="$$(git rev-parse --verify -q HEAD 2>/dev/null || echo unknown)" .

build-attested: engine ## Build hello-HELLO_VERSION.tar: the image with its provenance and bill of materials, for a registry
	@tools/build_attested.sh

scan: build ## Fail if the image has a severe vulnerability that has a fix
	@tools/scan.sh

compose-up: build ## Serve on PORT (8080) from containers, with a Postgres that keeps its data
	@tools/compose_up.sh

compose-down: engine ## Stop and remove the containers; the data stays
	@tools/compose_down.sh

compose-restart: compose-down compose-up ## Stop and start the containers, after a change of code or settings

clean: ## Remove what make made, but no data; WITH_DATA=yes removes the data of `make run` and Compose too
	@tools/clean.sh

.PHONY: wrk bench
wrk:
	@tools/wrk.sh

bench: wrk bench-environment ## Measure the service beside its alternatives and its limits, with few and many users
	@"$(VENV)/bench/bin/python" -m bench.run $(ARGS)

.PHONY: k8s-apply k8s-secret k8s-status k8s-delete k8s-monitoring k8s-smoke kind
k8s-apply: ## Apply k8s/ to the current cluster and namespace, and wait until the database and two pods of the API are ready
	@tools/k8s_apply.sh

k8s-secret: ## Set a new random password for the database, in a Secret
	@tools/k8s_secret.sh

k8s-status: ## Show the objects of k8s/ and their load
	@$(KUBECTL) get deployments,statefulsets,pods,services,ingresses,horizontalpodautoscalers,poddisruptionbudgets,persistentvolumeclaims \
		-l app.kubernetes.io/part-of=hello -o wide
	@$(KUBECTL) top pods -l app.kubernetes.io/part-of=hello || echo 'kubectl top and the autoscaler need metrics-server.'

k8s-delete: ## Delete the objects of k8s/; the database's volume and password stay
	@$(KUBECTL) delete -f k8s/ --ignore-not-found

k8s-monitoring: ## Apply k8s/monitoring/ and the rules and the dashboard of monitoring/ (for the Prometheus Operator)
	@"$(or $(PYTHON),python3)" tools/k8s_monitoring.py | $(KUBECTL) apply -f k8s/monitoring/ -f -

k8s-smoke: ## Apply k8s/ and check that a rolling update loses no request
	@tools/k8s_smoke.sh

kind: build ## Create a cluster in Docker with kind, with the image and a restricted namespace hello
	@tools/kind.sh
