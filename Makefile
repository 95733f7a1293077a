# The virtual environment is `.venv` in this folder. The other targets make it first where it is missing.
# `make test-lowest` and `make test-latest` have environments of their own, `.venv-lowest` and `.venv-latest`.

PYTHON ?= python3
# Passed on to the command of the target: make test ARGS="-k name"
ARGS ?=
# Processes that run the tests; 0 runs them in one process, as a debugger needs.
WORKERS ?= auto
# `make test-lowest` and `make test-latest` take this PyTorch too: its builds depend on the machine, and are large.
# TORCH=torch takes the newest, TORCH=torch==2.7.* the lowest.
TORCH ?= $(shell grep '^torch==' constraints.txt)
# Of the machine with a GPU that `make gpu-wheels` is for: its Python, what it has beside PyTorch, and what it takes.
GPU_PYTHON ?= 3.12
GPU_HAS ?= numpy scipy pandas pyarrow matplotlib pillow
GPU_WHEELS_MIB ?= 60
# HF_HUB_OFFLINE=0 lets the commands download models.
HF_HUB_OFFLINE ?= 1
# `accelerate launch` would give a process one thread where it is not told a number.
NUM_THREADS ?= $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
# The world of shapes trains in bfloat16 on CPUs that have instructions for it, in half the time. BF16= trains in float32.
BF16 ?= $(shell grep -qw avx512_bf16 /proc/cpuinfo 2>/dev/null && echo --bf16 True --attn_implementation eager)

export HF_HUB_OFFLINE

.DEFAULT_GOAL := help
.PHONY: help install geneval test test-lowest test-latest coverage types style format docs build gpu-wheels clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

install: .venv/.installed ## make the virtual environment .venv

# What training needs. PyTorch goes first and alone, so that nothing but the constraint chooses its version.
.venv/.geneval: pyproject.toml constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -c constraints.txt torch
	.venv/bin/python -m pip install -c constraints.txt -e ".[geneval]"
	touch $@

# What tests and documentation need besides
.venv/.installed: .venv/.geneval
	.venv/bin/python -m pip install -c constraints.txt -e ".[dev,geneval]"
	touch $@

geneval: .venv/.geneval ## train on the GenEval reward, on one GPU or the CPU
	.venv/bin/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		--num_cpu_threads_per_process $(NUM_THREADS) examples/train_geneval.py \
		$(if $(findstring --config,$(ARGS))$(findstring --model_name_or_path,$(ARGS)),,$(BF16)) $(ARGS)

# Each worker is one process: more than one thread in it would only compete with the other workers.
run_tests = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(1)/bin/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test: .venv/.installed ## run the tests
	$(call run_tests,.venv)

test-lowest: ## run the tests with the lowest versions that pyproject.toml allows
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install packaging "$(TORCH)"
	.venv-lowest/bin/python scripts/lowest_versions.py > .venv-lowest/constraints.txt
	.venv-lowest/bin/python -m pip install -c .venv-lowest/constraints.txt "$(TORCH)" -e ".[test]"
	$(call run_tests,.venv-lowest)

test-latest: ## run the tests with the newest versions that pyproject.toml allows
	test -x .venv-latest/bin/python || $(PYTHON) -m venv .venv-latest
	.venv-latest/bin/python -m pip install "$(TORCH)"
	.venv-latest/bin/python -m pip install --upgrade --upgrade-strategy eager "$(TORCH)" -e ".[test]"
	$(call run_tests,.venv-latest)

coverage: .venv/.installed ## run the tests, and print which share of the lines they run
	$(call run_tests,.venv) --cov --cov-report=term

types: .venv/.installed ## check the types of the package and of a script that uses it
	.venv/bin/mypy

style: .venv/.installed ## check lint, formatting and the arrows between the folders
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports --no-cache --no-logo

format: .venv/.installed ## repair lint and formatting
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

# A broken link or anchor is an error. `make docs ARGS="-d folder"` writes elsewhere.
docs: .venv/.installed ## build the documentation site in site/
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict $(ARGS)

build: .venv/.installed ## build the wheel and the source archive in dist/, and check their page
	.venv/bin/python -m build
	.venv/bin/python -m twine check --strict dist/*

gpu-wheels: .venv/.installed ## download what benchmarks/gpu_kit needs on a machine without network
	.venv/bin/python benchmarks/gpu_kit/wheels.py --python $(GPU_PYTHON) --has $(GPU_HAS) --max_mib $(GPU_WHEELS_MIB)

clean: ## remove build products and caches, not the environments
	rm -rf build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name '.venv*' -prune -o -name .git -prune -o -name __pycache__ -type d -exec rm -rf {} +
