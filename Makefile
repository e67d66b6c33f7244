# Everything runs in .venv, which `make setup` makes and the other targets bring up to date when needed.
PYTHON ?= python3
# What is passed on: make up ARGS="--decode-ranks 2", make test ARGS="-k router".
ARGS ?=
# Processes of `make test`: one runs the tests of whole clusters, the others the rest. 0: all in one.
WORKERS ?= 0
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help setup up demo test test-faults test-compose test-namespaces chaos chaos-sim soak bench bench-failover bench-migration bench-planner check format

help:
	@echo "make up            start a cluster on http://127.0.0.1:8000; Ctrl-C stops it"
	@echo "make demo          kill a rank under sixteen streams and compare every token"
	@echo "make test          what must pass: all tests without a GPU, Docker or a target of their own"
	@echo "make test-faults   every fault against real processes, as a table of what clients saw (6 minutes)"
	@echo "make test-compose  the containers, for real (needs a Docker engine)"
	@echo "make test-namespaces  several hosts on this machine, links cut for real (needs root, ip and nft)"
	@echo "make chaos         faults at random under load, from a seed; ARGS=\"--seed 1 --seconds 600\""
	@echo "make chaos-sim     ten thousand simulated stories and all mutants; goes on where it was interrupted"
	@echo "make bench         tokens per second and latencies, against one process without services"
	@echo "make bench-failover  kill, stop, scale under load; what the clients saw; ARGS=\"--sections ranks,services,scaling\""
	@echo "make soak          ten minutes of full load on busy cores: nobody may be removed; ARGS=\"--seconds 600\""
	@echo "make bench-migration  gaps between tokens while experts move, against windows in which none do"
	@echo "make bench-planner   expert placement: balance, moves, coverage, time against the greedy scheme"
	@echo "make check         ruff, ruff format, mypy --strict"
	@echo "make format        rewrite what ruff can mend"

setup: $(STAMP)

# What is compiled at installation; `python -m kernels.cpu.build` alone does it too.
C_SOURCES := $(wildcard kernels/cpu/*.[ch]) kernels/cpu/artifacts.py kernels/cpu/build.py setup.py

$(STAMP): pyproject.toml constraints.txt $(C_SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Regrow needs Python 3.11 or later; name one with make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv"
	@$(BIN)/python -m pip install -q -c constraints.txt -e '.[test,dev]'
	@touch $@

# A lone command without shell syntax is run by make itself: nothing stands between the terminal's Ctrl-C and Regrow.
up: $(STAMP)
	@$(BIN)/regrow up $(ARGS)

demo: $(STAMP)
	@$(BIN)/regrow demo $(ARGS)

test: $(STAMP)
	@$(BIN)/python -m pytest -n $(WORKERS) -p tests.parallel_workers $(ARGS)

test-namespaces: $(STAMP)
	@REGROW_FAULTS_COMMAND="make $@" REGROW_FAULTS_TABLE=benchmarks/results/namespaces_cpu_$$(date -u +%F).md \
	    $(BIN)/python -m pytest -m "root" tests/cluster/test_namespaces.py $(ARGS)

test-faults: $(STAMP)
	@REGROW_FAULTS_COMMAND="make $@" REGROW_FAULTS_TABLE=benchmarks/results/faults_cpu_$$(date -u +%F).md \
	    $(BIN)/python -m pytest -m faults --timeout 600 $(ARGS)

test-compose: $(STAMP)
	@$(BIN)/python -m pytest -m compose --timeout 1800 $(ARGS)

chaos: $(STAMP)
	@$(BIN)/python -m tests.chaos.run $(ARGS)

chaos-sim: $(STAMP)
	@$(BIN)/python -m tests.simulation.campaign $(ARGS)

bench: $(STAMP)
	@$(BIN)/python -m benchmarks.serving $(ARGS)

bench-failover: $(STAMP)
	@$(BIN)/python -m benchmarks.failover $(ARGS)

soak: $(STAMP)
	@$(BIN)/python -m benchmarks.false_removal $(ARGS)

bench-migration: $(STAMP)
	@$(BIN)/python -m benchmarks.migration $(ARGS)

bench-planner: $(STAMP)
	@$(BIN)/python -m benchmarks.planner $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
