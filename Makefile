# Every target works on a fresh clone: what it needs it sets up in .venv/ (see .ci/venv). `make run` needs no set-up at all.
SHELL := bash
.SHELLFLAGS := -Eeuo pipefail -c
.ONESHELL:
MAKEFLAGS += --no-builtin-rules
.DEFAULT_GOAL := help

PYTHON ?= python3
COVERAGE_MIN ?= 95
LAYERS_MIN ?= 100
ARGS ?=
# Modules that nothing else can vouch for are covered to the last branch.
LAYERS_0_AND_1 := errors keyfile metrics logs meter accept http1 routes auth admission usage cors
SHELL_FILES = $(shell find scripts tests deploy bench -name '*.sh' 2>/dev/null) .ci/run .ci/venv
export PYTHON

# $(call venv,NAME): the Python of the environment that requirements/NAME.txt describes.
venv = $$(.ci/venv $(1))
comma := ,
empty :=
files = $(subst $(empty) $(empty),$(comma),$(wildcard $(1:%=scripts/%.py)))

.PHONY: help run test coverage lint format check e2e bench soak fuzz deploy-test image-test clean

help: ## Show this list
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

run: ## Start it here: a first key, the address and a curl that works (a mock unless a model is named: MODEL_PATH …)
	@scripts/start.sh --quickstart

test: ## Run the test suite (ARGS="-k name" hands options to pytest)
	@python=$(call venv,test); "$$python" -m pytest $(ARGS)

coverage: ## Run the test suite with branch coverage, and hold it to its gates
	@python=$(call venv,test); rm -f .coverage .coverage.*
	"$$python" -m pytest --cov --cov-report=term --cov-fail-under=$(COVERAGE_MIN)
	"$$python" -m coverage report --include=$(call files,$(LAYERS_0_AND_1)) --fail-under=$(LAYERS_MIN)

lint: ## Check format, lint, types and shell scripts
	@python=$(call venv,lint); bin=$$(dirname "$$python")
	"$$bin/ruff" format --check .
	"$$bin/ruff" check .
	"$$python" -m mypy
	"$$bin/shellcheck" $(SHELL_FILES)

format: ## Rewrite the Python files as `make lint` wants them
	@python=$(call venv,lint); bin=$$(dirname "$$python")
	"$$bin/ruff" check --fix-only --quiet .; "$$bin/ruff" format .

check: lint test ## Lint, then test

e2e: ## Real clients through the gateway to a real llama-server (built once a machine, about ten minutes)
	@python=$(call venv,e2e); LLAMA_BIN=$$(PYTHON="$$python" tests/e2e/get_llama_server.sh)
	LLAMA_BIN="$$LLAMA_BIN" "$$python" -m pytest tests/e2e $(ARGS)

bench: ## Measure what the gateway adds to its backend
	@$(PYTHON) bench/run.py $(ARGS)

soak: ## Load, cancel and break it for five minutes; count what was lost and what leaked
	@$(PYTHON) tests/soak.py $(ARGS)

fuzz: ## Throw seeded random bytes at the parsers for longer than `make test` does
	@python=$(call venv,test); "$$python" tests/fuzz.py $(ARGS)

deploy-test: ## Check deploy/: HAProxy with three workers, Kubernetes, Prometheus and Grafana files
	@python=$(call venv,deploy); tests/e2e/get_prometheus.sh >/dev/null
	"$$python" -m pytest tests/test_deploy.py tests/deploy $(ARGS)

image-test: ## Build the image without Docker, run it, chat through it, stop it
	@deploy/image-test.sh

clean: ## Remove what the targets above made
	rm -rf .venv .coverage .coverage.* htmlcov .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
