# Settings, each to be set on the command line or in the environment: `make run PORT=9000`
# The Python that makes the virtual environment: the first on the PATH that is new enough
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# Where the virtual environment is
VENV ?= .venv
# Where the embedded Postgres of `make run` keeps its data
DATA ?= .postgres
# What `make test` gives to pytest, `make sabotage` and `make bench` to theirs: `make test ARGS='-k birthday'`,
# `make bench ARGS='--rounds 2 --only hello,fastapi'`
ARGS ?=

.DEFAULT_GOAL := help
export PYTHONDONTWRITEBYTECODE = 1

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: run
run: $(VENV)/run ## Serve on PORT (8080), with an embedded Postgres unless PGHOST is set
	@$(VENV)/bin/python -m tools.embedded_postgres $(DATA) $(VENV)/bin/gunicorn hello:application

.PHONY: test
test: $(VENV)/dev ## Run every test, against real Postgres servers of its own
	@$(VENV)/bin/python -m pytest $(ARGS)

.PHONY: sabotage
sabotage: $(VENV)/dev ## Break what protects the service, one thing at a time, and see that its test fails
	@$(VENV)/bin/python -m tools.mutations $(ARGS)

.PHONY: lint
lint: $(VENV)/dev ## Check style and format
	@$(VENV)/bin/ruff check
	@$(VENV)/bin/ruff format --check

.PHONY: format
format: $(VENV)/dev ## Put the code into the format that `make lint` checks
	@$(VENV)/bin/ruff check --fix
	@$(VENV)/bin/ruff format

.PHONY: lock
lock: $(VENV)/dev ## Pin the newest dependencies, with hashes, in requirements/
	@for name in service run dev bench docs; do $(VENV)/bin/uv pip compile --quiet --upgrade \
		--universal --python-version 3.11 --generate-hashes --no-header requirements/$$name.in -o requirements/$$name.txt >/dev/null; done

.PHONY: audit
audit: $(VENV)/dev ## Look the pinned dependencies up among the known vulnerabilities, where pypi.org can be reached
	@if $(VENV)/bin/python -c 'import urllib.request as u; u.urlopen("https://pypi.org/pypi/pip/json", timeout=5)' 2>/dev/null; \
	then $(VENV)/bin/uv tool run --quiet pip-audit@2.10.1 --disable-pip --require-hashes -r requirements/dev.txt; \
	else echo 'pypi.org cannot be reached: nothing was checked'; fi

# The image's version, which is its tag
VERSION ?= 1.0.0
COMPOSE = VERSION=$(VERSION) docker compose

.PHONY: engine
engine:
	@docker info >/dev/null 2>&1 && docker compose version >/dev/null 2>&1 || { \
		echo 'This needs a running Docker engine with Compose 2.24 or newer.' >&2; exit 1; }

.PHONY: build
build: engine ## Make the image hello:1.0.0
	@DOCKER_BUILDKIT=1 docker build --tag hello:$(VERSION) --build-arg VERSION=$(VERSION) \
		--build-arg REVISION=$$(git rev-parse HEAD 2>/dev/null || echo unknown) .

.PHONY: compose-up
compose-up: build ## Serve on PORT (8080) from containers, with a Postgres whose data is kept
	@$(COMPOSE) up --detach --wait --quiet-pull
	@url=http://127.0.0.1:$$($(COMPOSE) port api 8080 | sed 's/.*://')/hello/Zoe; \
	printf '\nhello serves on port %s. Try it:\n\n' $$(echo $$url | sed 's/.*:\([0-9]*\).*/\1/'); \
	echo "  curl -i -X PUT $$url -d '{\"dateOfBirth\": \"1990-05-17\"}'"; \
	printf '  curl %s\n\n' $$url; \
	echo 'See it work: docker compose logs --follow api. Stop it: make compose-down.'
	@if $(COMPOSE) config | grep -q 'POSTGRES_PASSWORD: for-development-only$$'; then \
		echo 'WARNING: the database has the development password, which everybody can read in .env.example.' >&2; \
		echo 'Before you keep anything here that matters, give it one of your own: README.md, "Passwords".' >&2; fi

.PHONY: compose-down
compose-down: engine ## Stop and remove the containers; the data stays
	@$(COMPOSE) down --remove-orphans

.PHONY: compose-restart
compose-restart: compose-down compose-up ## The two after each other: with your changes of code and settings

.PHONY: clean
clean: ## Remove what make made, but no data; with WITH_DATA=yes that of `make run` and Compose, too
	@if [ '$(WITH_DATA)' = yes ] && [ -e $(DATA)/data/postmaster.pid ]; then \
		echo '`make run` uses $(DATA): stop it first.' >&2; exit 1; fi
	@if docker info >/dev/null 2>&1; then $(COMPOSE) down --remove-orphans $(if $(filter yes,$(WITH_DATA)),--volumes); \
		docker image rm --force hello:$(VERSION) >/dev/null 2>&1; fi
	@rm -rf $(patsubst %/pyvenv.cfg,%,$(wildcard $(VENV)/pyvenv.cfg)) __pycache__ .hypothesis .pytest_cache .ruff_cache
	@if [ '$(WITH_DATA)' = yes ]; then rm -rf $(patsubst %/data,%,$(wildcard $(DATA)/data)); \
		else echo 'Kept: $(DATA) and the volume hello_data. `make clean WITH_DATA=yes` removes them.'; fi

.PHONY: bench
bench: $(VENV)/bench/ready ## Measure the service beside its limits and what people would pick instead
	@$(VENV)/bench/bin/python bench/run.py $(ARGS)

.PHONY: bench-growth
bench-growth: $(VENV)/bench/ready ## Measure the service with 10 thousand, 1 million and 10 million users
	@$(VENV)/bench/bin/python bench/run.py --growth $(ARGS)

.PHONY: bench-profile
bench-profile: $(VENV)/bench/ready ## Say where a worker's time goes, and what a request costs
	@$(VENV)/bench/bin/python bench/worker_profile.py

# A virtual environment of its own: the peers and their dependencies are no business of the tests.
$(VENV)/bench/ready: requirements/bench.txt | $(VENV)/bin/python
	@command -v wrk >/dev/null || { apt-get update -qq && apt-get install -y -qq wrk; } >/dev/null 2>&1 || \
		{ echo 'make bench needs wrk: install it (Debian: apt-get install wrk; macOS: brew install wrk)' >&2; exit 1; }
	@echo 'Installing what $< pins ...'
	@$(VENV)/bin/python -m venv $(VENV)/bench
	@$(VENV)/bench/bin/pip install --quiet --disable-pip-version-check --require-hashes -r $<
	@touch $@

# The kubectl that the k8s targets use: `make k8s-apply KUBECTL='kubectl --namespace hello'`
KUBECTL ?= kubectl

.PHONY: k8s-apply
k8s-apply: ## Apply k8s/ to the current cluster and namespace, and wait until it is ready
	@$(KUBECTL) apply -f k8s/
	@$(KUBECTL) rollout status statefulset/hello-database --timeout=10m
	@$(KUBECTL) rollout status deployment/hello-api --timeout=10m

.PHONY: k8s-secret
k8s-secret: ## Make a random database password that wins over the development one, or change it
	@KUBECTL='$(KUBECTL)' tools/k8s_secret.sh

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
	@$(if $(PYTHON),$(PYTHON),python3) tools/k8s_monitoring.py

.PHONY: kind
kind: build ## Make a cluster in Docker with kind, its namespace hello restricted, and the image in it
	@kind get clusters 2>/dev/null | grep -qx hello || kind create cluster --name hello --wait 3m
	@kind load docker-image hello:$(VERSION) --name hello
	@kubectl --context kind-hello create namespace hello --dry-run=client --output yaml | kubectl --context kind-hello apply -f -
	@kubectl --context kind-hello label namespace hello --overwrite pod-security.kubernetes.io/enforce=restricted

.PHONY: k8s-smoke
k8s-smoke: ## Apply k8s/, and see that a rolling update loses no request
	@KUBECTL='$(KUBECTL)' tools/k8s_smoke.sh

# What `make scan` looks for known vulnerabilities with
GRYPE ?= anchore/grype:v0.117.0@sha256:ddf9e9f204049f3a4a0955ef70873cabab6a31432125ad4f20a490b54950a253

.PHONY: scan
scan: build ## Fail where the image has a severe vulnerability that is fixed somewhere
	@folder=$$(mktemp -d) && trap 'rm -rf $$folder' EXIT && docker save --output $$folder/image.tar hello:$(VERSION) && \
		docker run --rm --volume $$folder:/scan:ro $(GRYPE) docker-archive:/scan/image.tar --only-fixed --fail-on high

.PHONY: build-attested
build-attested: engine ## Make hello-1.0.0.tar: the image with its provenance and bill of materials, for a registry
	@docker buildx inspect hello >/dev/null 2>&1 || docker buildx create --name hello --driver docker-container >/dev/null
	@docker buildx build --builder hello --provenance mode=max --sbom true --tag hello:$(VERSION) \
		--build-arg VERSION=$(VERSION) --build-arg REVISION=$$(git rev-parse HEAD 2>/dev/null || echo unknown) \
		--output type=oci,dest=hello-$(VERSION).tar .

.PHONY: diagrams
diagrams: $(VENV)/docs/installed ## Draw the pictures of docs/ (needs Graphviz)
	@$(VENV)/docs/bin/python docs/draw.py

# An environment of its own: it has tools in it that nothing else needs
$(VENV)/docs/installed: requirements/docs.txt | $(VENV)/bin/python
	@echo 'Installing what $< pins ...'
	@$(VENV)/bin/python -m venv $(VENV)/docs
	@$(VENV)/docs/bin/pip install --quiet --disable-pip-version-check --require-hashes -r $<
	@touch $@

$(VENV)/bin/python:
	@$(if $(PYTHON),,echo 'hello needs Python 3.11 or newer on the PATH: install it, or name one with PYTHON=/path/to/python3' >&2; exit 1)
	@$(PYTHON) -m venv $(VENV) >/dev/null || { rm -rf $(VENV); \
		echo 'Python has no venv module here: install it (on Debian: apt-get install python3-venv)' >&2; exit 1; }

$(VENV)/run $(VENV)/dev: $(VENV)/%: requirements/%.txt requirements/service.txt | $(VENV)/bin/python
	@echo 'Installing what $< pins ...'
	@$(VENV)/bin/pip install --quiet --disable-pip-version-check --require-hashes -r $<
	@touch $@ $(VENV)/run # which `dev` includes
