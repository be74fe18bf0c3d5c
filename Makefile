# Every target does its own set-up: a Python of 3.11 or later and the package index are all it needs.
# The first time makes .venv and installs into it; later times go straight to the work.

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV   := .venv
RUN    := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
ARGS   ?=

.DEFAULT_GOAL := help
.PHONY: help train test slow bench gpu

help:  ## Say what there is
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

train: $(STAMP)  ## Train: python train.py $(ARGS); no CUDA device: the embedded demo, a few minutes
	$(RUN) -u train.py $(ARGS)

test: $(STAMP)  ## Lint, format check and the CPU test suite, about 7 minutes on 2 cores
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pytest -n 2 --dist worksteal $(ARGS)

slow: $(STAMP)  ## The long proofs: kill points, seeds, studies
	$(RUN) -m pytest -m slow $(ARGS)

bench: $(STAMP)  ## Benchmarks of kernels and of the whole, one after the other
	$(RUN) -m benchmarks

gpu: $(STAMP)  ## GPU tests and benchmarks on one CUDA device, under 9 minutes
	$(RUN) -m benchmarks.gpu $(ARGS)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python of 3.11 or later found; install one or name it: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) has no venv and pip (Debian, Ubuntu: apt install python3-venv python3-pip)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -c constraints.txt -e '.[dev]'
	@touch $@
