# One command for each job. Set-up is done by whatever needs it and by nothing else: each step has a stamp
# that depends on the files it is made from, so a second run is instant and a change rebuilds what it must.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PY := .venv/bin/python
STAMPS := .venv/.stamps
SETUP := setup/common.py
CORE_SOURCES := Cargo.toml Cargo.lock $(shell find crates -not -path '*/examples/*' \( -name '*.rs' -o -name '*.toml' -o -name '*.pyi' \))
GUEST_SOURCES := $(shell find guest/micro -name '*.[chS]' -o -name '*.ld' -o -name Makefile)
GUEST := src/vmd/guest/micro.elf
READY := $(STAMPS)/venv $(STAMPS)/core $(GUEST) .venv/bin/jailer
FUZZ_SECONDS := 600
INTERLEAVINGS := 1000000
CODE := src tests setup fuzz $(if $(wildcard benches/*.py),benches)

.PHONY: help develop demo test check lint fmt rust soak soak-short chaos chaos-short bench bench-fault bench-restore mutants interleave fuzz sanitize clean

help: ## list these commands
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' Makefile | while IFS=$$'\t' read -r name words; do printf '  make %-14s %s\n' "$$name" "$$words"; done

develop: $(READY) ## do all set-up; then ./.venv/bin/vmd is the command

demo: develop ## freeze a VM, record its start, thaw it in three ways, and compare
	@.venv/bin/vmd demo

test: develop ## run the whole test suite
	@$(PY) -m pytest

check: lint rust soak-short chaos-short test ## all that must hold before a change lands (what CI runs)

lint: develop ## format, lints and types of the Python code
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy $(CODE)

rust: develop ## format, lints and tests of the Rust code
	@$(PY) -m setup.rustcheck

fmt: develop ## put all code into its format
	@.venv/bin/ruff check --fix-only --quiet .
	@.venv/bin/ruff format .
	@$(PY) -m setup.rustcheck --format

soak: develop ## 1,000 sandboxes created and killed; nothing may be left
	@$(PY) -m benches.soak --cycles 1000

# The tests come after it: the last line of `check` is theirs.
soak-short: develop
	@$(if $(wildcard benches/soak.py),$(PY) -m benches.soak --cycles 100,echo "soak: not there yet")

CHAOS_SECONDS ?= 600
CHAOS_SEED ?=
CHAOS := $(PY) -m benches.chaos $(if $(CHAOS_SEED),--seed $(CHAOS_SEED))

chaos: develop ## pagers and standbys killed at random under eight guests at work (CHAOS_SECONDS, CHAOS_SEED)
	@$(CHAOS) --seconds $(CHAOS_SECONDS)

chaos-short: develop
	@$(CHAOS) --seconds 60 --report

bench: bench-fault bench-restore ## all measurements

bench-fault: develop ## a demand fault and bulk installs against plain C
	@$(PY) -m benches.fault

bench-restore: develop ## restores under replay against File and the floor
	@$(PY) -m benches.restore

mutants: develop ## sabotage the core in many ways; the suite must notice each
	@$(PY) -m tests.mutants

fuzz: develop $(STAMPS)/fuzz ## fuzz what reads the words of others, FUZZ_SECONDS (600) each
	@$(PY) -m fuzz --seconds $(FUZZ_SECONDS)

sanitize: develop ## the contract suite over a core with AddressSanitizer, then ThreadSanitizer
	@$(PY) -m fuzz.sanitize

interleave: develop ## page servers that die in INTERLEAVINGS (10^6) ways; one again: SEED=n
	@$(PY) -m setup.interleave $(if $(SEED),--seed $(SEED) --count 10000,--count $(INTERLEAVINGS))

clean: ## remove what was built, but for the environment
	rm -rf build target .pytest_cache .mypy_cache .ruff_cache .hypothesis $(GUEST) $(STAMPS)/core
	$(MAKE) -C guest/micro clean

$(STAMPS)/venv: pyproject.toml setup/constraints.txt setup/venv.py $(SETUP)
	@python="$$(setup/python)"; "$$python" -m setup.venv

$(STAMPS)/core: $(CORE_SOURCES) setup/core.py setup/rust.py $(SETUP) | $(STAMPS)/venv
	@$(PY) -m setup.core

$(STAMPS)/fuzz: pyproject.toml setup/constraints.txt setup/fuzz.py $(SETUP) | $(STAMPS)/venv
	@$(PY) -m setup.fuzz

$(GUEST): $(GUEST_SOURCES) setup/guest.py $(SETUP) | $(STAMPS)/venv
	@$(PY) -m setup.guest

# It installs Firecracker and then its jailer.
.venv/bin/jailer: setup/firecracker.py $(SETUP) | $(STAMPS)/venv
	@$(PY) -m setup.firecracker
