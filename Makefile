# make demo · make test · make check · make bench · make gpu · make ham10000 SOURCE=ham10000.zip
# Every target but `gpu` works in .venv, which it makes itself from requirements.lock; it needs Python 3.11+ with pip.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup lock demo ham10000 test check bench gpu clean

BOOTSTRAP ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# DATA: a folder of real image archives that tests may use. SOURCE: the HAM10000 archive.
DATA ?=
SOURCE ?= ../shared/data/ham10000.zip

help:
	@sed -n '1,2s/^# //p' Makefile

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@$(BOOTSTRAP) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "tracekin needs Python 3.11 to 3.13; set BOOTSTRAP=python3.11, say."; exit 2; }
	@test -x $(BIN)/python || $(BOOTSTRAP) -m venv .venv
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes --requirements requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

lock:
	$(BIN)/uv pip compile --quiet pyproject.toml --group dev --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --custom-compile-command "make lock" --output-file requirements.lock
