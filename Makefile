# SPDX-License-Identifier: LGPL-2.1-or-later

PYTHON ?= python3
BIN := .venv/bin

# What is built, and what the tests of all kernels run on: series, kernels, or all. The other tests
# boot kernels of 7.2.
KERNELS ?= 7.2 debian
export KERNELS

.PHONY: demo check packages kernels lint unit fuzz vm-test bench dist clean

demo: .venv/demo
	$(BIN)/khoscope demo

# Cheap things first; the kernels are built before the tests that boot them.
check: packages .venv/dev lint unit kernels vm-test

# Debian packages that are missing: installed as root, named otherwise.
packages:
	@missing=$$(dpkg-query -W -f '$${db:Status-Abbrev} $${Package}\n' $$(grep -v '^#' vm/packages.txt) \
		2>/dev/null | sed -n 's/^ii *//p' | sort >.packages; \
		grep -v '^#' vm/packages.txt | sort | comm -23 - .packages; rm -f .packages); \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" -eq 0 ]; then \
		apt-get update -q && \
		DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends $$missing; \
	else \
		echo "These Debian packages are missing. As root: apt-get install" $$missing >&2; exit 1; \
	fi

.venv/bin/python:
	$(PYTHON) -m venv .venv

# Installed as a user would have it.
.venv/demo: .venv/bin/python pyproject.toml $(shell find khoscope -type f -not -name '*.pyc')
	$(BIN)/pip install --quiet .
	@touch $@

# Installed in place, with the tools.
.venv/dev: .venv/bin/python pyproject.toml
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: .venv/dev
	$(BIN)/pytest -q -n auto --ignore tests/vm

# What unit throws at the readers, 20 times over.
fuzz: .venv/dev
	$(BIN)/pytest -q --ignore tests/vm -m fuzz --hypothesis-profile long

kernels: .venv/dev
	$(BIN)/python -m vm build

vm-test: kernels
	$(BIN)/pytest -q -n auto --maxprocesses 8 --dist loadgroup --no-loadscope-reorder \
		tests/vm

bench: .venv/dev kernels
	$(BIN)/python benchmarks/bench_tree.py
	$(BIN)/python -m benchmarks.bench_verify
	$(BIN)/python -m benchmarks.bench_clients
	$(BIN)/python -m benchmarks.bench_lines
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.trace_overhead
	$(BIN)/python -m benchmarks.restored_as_pages
	$(BIN)/python -m benchmarks.scratch_pages
	$(BIN)/python -m benchmarks.kcore_pieces
	$(BIN)/python -m benchmarks.holders

# A source archive, and a wheel that is built from it.
dist: .venv/dev
	$(BIN)/python -m build --outdir dist .

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
