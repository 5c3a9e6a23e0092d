# make demo · make test · make check · make faults · make slurm-test · make bench · make gpu
# make ham10000 SOURCE=ham10000.zip
# Every target but `gpu` works in .venv, which it makes itself from requirements.lock: a machine with Python, pip and g++ is enough.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup preflight lock demo ham10000 test faults slurm-test check bench gpu clean

# Python that makes .venv (3.11 to 3.13), and the one that `make gpu` uses as it is.
BOOTSTRAP ?= python3
PYTHON ?= python3
# key=value for the demo's trainings, for example train.epochs=3.
OVERRIDES ?=
# Processes that train side by side.
RANKS ?= 2
# Processes among which `make test` deals its files; many tests start 2 to 4 ranks themselves.
WORKERS ?= 2
# DATA: a folder of real image archives that tests may use. SOURCE: the HAM10000 archive, a zip or a folder.
DATA ?=
SOURCE ?= ham10000.zip

VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin
STAMP := .venv/.installed
# DeepSpeed's compiled CPU op belongs to this environment: two that share a cache rebuild it for each other.
export TORCH_EXTENSIONS_DIR ?= $(VENV)/torch_extensions
lock demo ham10000 test faults slurm-test check bench data/phantom/manifest.json data/ham10000/manifest.json: export PATH := $(BIN):$(PATH)
export OMP_NUM_THREADS ?= 1
PRETRAIN := torchrun --standalone --nproc-per-node $(RANKS) -m tracekin.cli pretrain

help:
	@sed -n '1,3s/^# //p' Makefile

setup: $(STAMP)

preflight:
	@$(BOOTSTRAP) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || \
	  { echo "Missing: Python 3.11 to 3.13 as $(BOOTSTRAP); install one, or name it: make BOOTSTRAP=python3.12"; exit 2; }
	@$(BOOTSTRAP) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "Missing: Python's venv module (Debian, Ubuntu: apt-get install python3-venv)"; exit 2; }
	@command -v c++ >/dev/null || \
	  { echo "Missing: a C++ compiler, which DeepSpeed needs on CPU (Debian, Ubuntu: apt-get install g++)"; exit 2; }

$(STAMP): requirements.lock pyproject.toml | preflight
	@test -x $(BIN)/python || $(BOOTSTRAP) -m venv $(VENV)
	@sed -n '/^uv==/,/^ *# via/p' requirements.lock > .venv/uv.txt
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r .venv/uv.txt
	@echo "Installing requirements.lock into .venv (torch's CUDA build is large; it runs on CPU too) ..."
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes --requirements requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

lock: $(STAMP)
	uv pip compile --quiet pyproject.toml --group dev --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --custom-compile-command "make lock" --output-file requirements.lock

data/phantom/manifest.json: | $(STAMP)
	python -m shards.pack --recipe phantom --out data/phantom

demo: $(STAMP) data/phantom/manifest.json
	$(PRETRAIN) configs/demo.yaml name=demo/none mining.policy=none $(OVERRIDES)
	$(PRETRAIN) configs/demo.yaml name=demo/tracin_cosine mining.policy=tracin_cosine $(OVERRIDES)
	tracekin evaluate runs/demo/none runs/demo/tracin_cosine
	tracekin report runs/demo/none runs/demo/tracin_cosine --out runs/demo

data/ham10000/manifest.json: | $(STAMP)
	python -m shards.pack $(SOURCE) --recipe ham10000 --out data/ham10000

ham10000: $(STAMP) data/ham10000/manifest.json
	$(PRETRAIN) configs/pretrain/ham10000/byol.yaml name=ham10000/none mining.policy=none
	$(PRETRAIN) configs/pretrain/ham10000/byol.yaml name=ham10000/tracin_cosine mining.policy=tracin_cosine
	tracekin evaluate runs/ham10000/none runs/ham10000/tracin_cosine
	tracekin report runs/ham10000/none runs/ham10000/tracin_cosine --out runs/ham10000

test: $(STAMP)
	python -m pytest --ignore=tests/slurm --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder \
	  $(if $(DATA),--data=$(DATA))

faults: $(STAMP)
	python -m pytest tests/faults --faults --quiet

slurm-test: $(STAMP)
	python -m pytest tests/slurm --verbose --durations=0

check: $(STAMP)
	ruff check .
	ruff format --check .
	mypy

bench: $(STAMP)
	python -m benchmarks.influence_exactness
	OMP_PROC_BIND=true python -m benchmarks.influence_vs_peers
	python -m benchmarks.mining_overhead
	python -m benchmarks.mining_scale
	python -m benchmarks.phantom_fairness
	python -m benchmarks.augment_throughput
	python -m benchmarks.objectives
	python -m benchmarks.shuffle_quality
	python -m benchmarks.checkpoint_cost
	$(if $(DATA),python -m benchmarks.pack_throughput $(DATA)/ham10000.zip)
	$(if $(wildcard data/ham10000),python -m benchmarks.stream_throughput data/ham10000)
	$(if $(shell command -v slurmctld),python -m benchmarks.launch_times)

gpu: export PYTHONPATH := src:$(PYTHONPATH)
gpu:
	@$(PYTHON) -c 'import importlib.util as u, sys; \
	  lacking = [n for n in "torch torchvision deepspeed webdataset wandb omegaconf pytest".split() if not u.find_spec(n)]; \
	  sys.exit(2 * bool(lacking and not print("Missing:", *lacking, "in $(PYTHON), which is used as it is (make gpu PYTHON=...).", \
	  "Nothing was run, measured or claimed.")))'
	$(PYTHON) -m benchmarks.gpu

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis
