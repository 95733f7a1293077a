# The virtual environment is `.venv` in this folder. `make test` and `make geneval` make it first where it is missing.

PYTHON ?= python3
# Passed on to the command of the target: make test ARGS="-k name"
ARGS ?=
# Processes that run the tests; 0 runs them in one process, as a debugger needs.
WORKERS ?= auto
# HF_HUB_OFFLINE=0 lets the commands download models.
HF_HUB_OFFLINE ?= 1
# `accelerate launch` would give a process one thread where it is not told a number.
NUM_THREADS ?= $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)

export HF_HUB_OFFLINE

.DEFAULT_GOAL := help
.PHONY: help install geneval test style format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' Makefile

install: .venv/.installed ## make the virtual environment .venv

# PyTorch goes first and alone, so that nothing but the constraint chooses its version.
.venv/.installed: pyproject.toml constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -c constraints.txt torch
	.venv/bin/python -m pip install -c constraints.txt -e ".[dev,geneval]"
	touch $@

geneval: .venv/.installed ## train on the GenEval reward, on one GPU or the CPU
	.venv/bin/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		--num_cpu_threads_per_process $(NUM_THREADS) examples/train_geneval.py $(ARGS)

# Each worker is one process: more than one thread in it would only compete with the other workers.
test: .venv/.installed ## run the tests
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} .venv/bin/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

style: .venv/.installed ## check lint and formatting
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

format: .venv/.installed ## repair lint and formatting
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean: ## remove build products and caches, not .venv
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -name .venv -prune -o -name .git -prune -o -name __pycache__ -type d -exec rm -rf {} +
