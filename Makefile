# Settings, each to be set on the command line or in the environment: `make run PORT=9000`
# The Python that makes the virtual environment: the first on the PATH that is new enough
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# Where the virtual environment is
VENV ?= .venv
# Where the embedded Postgres of `make run` keeps its data
DATA ?= .postgres
# What `make test` gives to pytest: `make test ARGS='-k birthday'`
ARGS ?=

.DEFAULT_GOAL := help
export PYTHONDONTWRITEBYTECODE = 1

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: run
run: $(VENV)/run ## Serve on PORT (8080), with an embedded Postgres unless PGHOST is set
	@$(VENV)/bin/python embedded.py $(DATA) $(VENV)/bin/gunicorn hello:application

.PHONY: test
test: $(VENV)/dev ## Run every test, against real Postgres servers of its own
	@$(VENV)/bin/python -m pytest $(ARGS)

.PHONY: lint
lint: $(VENV)/dev ## Check style and format
	@$(VENV)/bin/ruff check
	@$(VENV)/bin/ruff format --check

.PHONY: format
format: $(VENV)/dev ## Put the code into the format that `make lint` checks
	@$(VENV)/bin/ruff check --fix
	@$(VENV)/bin/ruff format

.PHONY: lock
lock: $(VENV)/dev ## Pin the newest dependencies, with hashes, in requirements*.txt
	@for name in requirements requirements-run requirements-dev; do $(VENV)/bin/uv pip compile --quiet --upgrade \
		--universal --python-version 3.11 --generate-hashes --no-header $$name.in -o $$name.txt >/dev/null; done

# The kubectl that the k8s targets use: `make k8s-apply KUBECTL='kubectl --namespace hello'`
KUBECTL ?= kubectl

.PHONY: k8s-apply
k8s-apply: ## Apply k8s/ to the current cluster and namespace, and wait until it is ready
	@$(KUBECTL) apply -f k8s/
	@$(KUBECTL) rollout status statefulset/hello-database --timeout=10m
	@$(KUBECTL) rollout status deployment/hello-api --timeout=10m

.PHONY: k8s-secret
k8s-secret: ## Make a random database password that wins over the development one, or change it
	@KUBECTL='$(KUBECTL)' k8s/secret.sh

.PHONY: k8s-status
k8s-status: ## Show what k8s/ made, and how busy it is
	@$(KUBECTL) get deployments,statefulsets,pods,services,ingresses,horizontalpodautoscalers,poddisruptionbudgets,persistentvolumeclaims \
		-l app.kubernetes.io/part-of=hello -o wide
	@$(KUBECTL) top pods -l app.kubernetes.io/part-of=hello || echo 'kubectl top and the autoscaler need metrics-server.'

.PHONY: k8s-delete
k8s-delete: ## Delete what k8s/ made; the database's volume and the random password stay
	@$(KUBECTL) delete -f k8s/ --ignore-not-found

.PHONY: k8s-monitoring
k8s-monitoring: ## Make the objects of k8s/monitoring/ from the rules and the dashboard of monitoring/
	@$(if $(PYTHON),$(PYTHON),python3) k8s/monitoring/generate.py

$(VENV)/bin/python:
	@$(if $(PYTHON),,echo 'hello needs Python 3.11 or newer on the PATH: install it, or name one with PYTHON=/path/to/python3' >&2; exit 1)
	@$(PYTHON) -m venv $(VENV) >/dev/null || { rm -rf $(VENV); \
		echo 'Python has no venv module here: install it (on Debian: apt-get install python3-venv)' >&2; exit 1; }

$(VENV)/run $(VENV)/dev: $(VENV)/%: requirements-%.txt requirements.txt | $(VENV)/bin/python
	@echo 'Installing what $< pins ...'
	@$(VENV)/bin/pip install --quiet --disable-pip-version-check --require-hashes -r $<
	@touch $@ $(VENV)/run # which `dev` includes
