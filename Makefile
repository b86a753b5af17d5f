# Every target works on a fresh clone: it installs what it needs in .venv/ (see .ci/venv). `make run` needs nothing.
SHELL := bash
.SHELLFLAGS := -Eeuo pipefail -c
.ONESHELL:
MAKEFLAGS += --no-builtin-rules
.DEFAULT_GOAL := help

PYTHON ?= python3
COVERAGE_MIN ?= 95
ROOMS_MIN ?= 100
ARGS ?=
IMAGE_ARGS = --build-arg VERSION=$(shell cat VERSION) --build-arg REVISION=$(shell git rev-parse HEAD 2>/dev/null)
# As in docs/DEPLOYMENT.md. The folder of the models is mounted only if it is there.
DOCKER_RUN = docker run --rm --name llama -p 127.0.0.1:8000:8000 -v llama:/data \
  $(and $(wildcard models),-v $(CURDIR)/models:/models:ro -e MODELS_DIR=/models) $(and $(wildcard .env),--env-file .env) \
  --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges $(ARGS)
# Rooms and plain modules that must have 100 % branch coverage.
FULLY_COVERED := auth.py keyfile.py metrics.py core/* config/* http1/* policy/* accounting/*
SHELL_FILES = $(shell find scripts tests deploy bench tools -name '*.sh' 2>/dev/null) .ci/run .ci/venv
export PYTHON

# $(call venv,NAME): the Python of the environment that requirements/NAME.txt describes.
venv = $$(.ci/venv $(1))
comma := ,
empty :=
files = $(subst $(empty) $(empty),$(comma),$(1:%=scripts/%))

.PHONY: help run test coverage lint lint-format lint-rules lint-types lint-files format build docker-run-cpu docker-run-gpu generate screenshots docs docs-test check e2e e2e-clients bench soak fuzz deploy-test image-test dist clean

help: ## Show this list
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

run: ## Start everything here: a first key, the address, a curl command (without MODEL_PATH a mock answers)
	@scripts/start.sh --quickstart

test: ## Run the test suite (ARGS="-k name" passes options to pytest)
	@python=$(call venv,test)
	$(if $(ARGS),exec "$$python" -m pytest $(ARGS))
	# In two halves at the same time, since each one waits for a part of its time. Job control lets Ctrl-C end both.
	first="tests/behaviour tests/accounting tests/policy"
	log=$$(mktemp) status=0
	set -m; "$$python" -m pytest $${first//tests/--ignore=tests} &>"$$log" </dev/null & other=$$!; set +m
	trap 'kill -INT "$$other" 2>/dev/null || true; rm -f "$$log"' EXIT
	trap 'exit 130' INT TERM
	"$$python" -m pytest -p no:cacheprovider $$first || status=$$?
	wait "$$other" || status=$$?
	cat "$$log"
	exit "$$status"

coverage: ## Run the test suite with branch coverage, and check its limits
	@python=$(call venv,test); rm -f .coverage .coverage.*
	"$$python" -m pytest --cov --cov-report=term --cov-fail-under=$(COVERAGE_MIN)
	"$$python" -m coverage report --include='$(call files,$(FULLY_COVERED))' --fail-under=$(ROOMS_MIN)

lint: lint-format lint-rules lint-types lint-files ## Check format, rules, types, shell, workflows, YAML, spelling

lint-format:
	@python=$(call venv,lint); "$$(dirname "$$python")/ruff" format --check .

lint-rules:
	@python=$(call venv,lint); "$$(dirname "$$python")/ruff" check .

lint-types:
	@python=$(call venv,lint); "$$python" -m mypy

# GitHub's own schemas for workflows and forms are built in, so nothing is fetched.
lint-files:
	@python=$(call venv,lint); bin=$$(dirname "$$python"); export PATH=$$bin:$$PATH
	shellcheck $(SHELL_FILES)
	hadolint Dockerfile
	actionlint
	zizmor --offline --quiet --persona=auditor .github
	yamllint --strict .
	codespell
	schema() { check-jsonschema --quiet --builtin-schema "vendor.$$1" "$${@:2}"; }
	schema github-workflows .github/workflows/*.yml
	check-jsonschema --quiet --builtin-schema custom.github-workflows-require-timeout .github/workflows/*.yml
	schema github-issue-config .github/ISSUE_TEMPLATE/config.yml
	schema github-issue-forms .github/ISSUE_TEMPLATE/bug.yml .github/ISSUE_TEMPLATE/feature.yml
	schema dependabot .github/dependabot.yml
	schema compose-spec docker-compose.yml
	if [[ -e .readthedocs.yaml ]]; then schema readthedocs .readthedocs.yaml; fi

format: ## Format the Python files as `make lint` requires
	@python=$(call venv,lint); bin=$$(dirname "$$python")
	"$$bin/ruff" check --fix-only --quiet .; "$$bin/ruff" format .

generate: ## Write the generated tables of docs/ again
	@$(PYTHON) docs/generate.py $(ARGS)

screenshots: ## Make the pictures of the board again, in a headless Chromium (ARGS=--benchmark: and the report's)
	@python=$(call venv,test); "$$python" docs/screenshots.py $(ARGS)

docs: ## Build the documentation site in docs/_build/html, and check its links
	@python=$(call venv,docs); rm -rf docs/_build
	"$$python" -m sphinx -b html -W --keep-going -q -j auto docs docs/_build/html
	"$$python" docs/check_links.py docs/_build/html

docs-test: docs ## Search the built site in a headless Chromium
	@python=$(call venv,docs); "$$python" -m pytest tests/site $(ARGS)

check: lint test ## Lint, then test

e2e: ## Test real clients with a real llama-server (built once per machine, about ten minutes)
	@python=$(call venv,e2e); LLAMA_BIN=$$(PYTHON="$$python" tests/e2e/get_llama_server.sh)
	LLAMA_BIN="$$LLAMA_BIN" "$$python" -m pytest tests/e2e --ignore=tests/e2e/clients $(ARGS)

e2e-clients: ## Many clients and agents in many failures, and a table of what each did (about 1 GB from npm, once a machine)
	@python=$(call venv,clients); LLAMA_BIN=$$(PYTHON="$$python" tests/e2e/get_llama_server.sh)
	LLAMA_BIN="$$LLAMA_BIN" "$$python" -m pytest tests/e2e/clients $(ARGS)

bench: ## Measure what the gateway adds to its backend
	@$(PYTHON) bench/run.py $(ARGS)

soak: ## Load, cancel and break the gateway for five minutes; report what was lost or leaked (ARGS="--seconds 600 faults")
	@$(PYTHON) tests/soak.py $(ARGS)

fuzz: ## Feed seeded random bytes to the parsers, for longer than `make test` does
	@python=$(call venv,test); "$$python" tests/fuzz.py $(ARGS)

deploy-test: ## Check deploy/: HAProxy with three workers, Kubernetes, Prometheus and Grafana files
	@python=$(call venv,deploy); tests/e2e/get_prometheus.sh >/dev/null
	"$$python" -m pytest tests/test_deploy.py tests/deploy $(ARGS)

image-test: ## Build the image without Docker, run it, chat through it, stop it
	@deploy/image-test.sh

build: ## Build both images with Docker: llama-gguf-inference (NVIDIA) and llama-gguf-inference:cpu
	@docker build $(IMAGE_ARGS) --tag llama-gguf-inference .
	docker build $(IMAGE_ARGS) --build-arg VARIANT=server --tag llama-gguf-inference:cpu .

docker-run-cpu: ## Run the CPU image on 127.0.0.1:8000 with the settings of .env, and ./models
	@$(DOCKER_RUN) llama-gguf-inference:cpu

docker-run-gpu: ## Run the NVIDIA image in the same way
	@$(DOCKER_RUN) --gpus all llama-gguf-inference

dist: ## Build the artefacts of a release from the last commit in dist/: .tar.gz, .pyz, sums, bill of materials
	@$(PYTHON) tools/dist.py $(ARGS)

clean: ## Remove what the targets above created
	rm -rf .venv dist docs/_build .coverage .coverage.* htmlcov .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
