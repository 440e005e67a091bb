# `make` lists the targets. Nothing has to be activated. Kept to GNU make 3.81 and POSIX sh.
# Variables: PYTHON=python3.12 (setup), ARGS="-k name" (test, test-all).

PYTEST := OMP_NUM_THREADS=1 .venv/bin/python -m pytest
ARGS =

# Another project's modules must not reach .venv.
unexport PYTHONPATH PYTHONHOME

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all check bench bench-plan docs site clean

help: ## list these targets
	@echo "usage: make TARGET"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' Makefile

setup: ## make .venv with the pinned dependencies (again: under a second)
	@sh tools/setup.sh

demo: setup ## carry a small model through its whole life, on data that comes with Mule
	@.venv/bin/mule demo

test: setup ## run the tests, without the slow ones
	@$(PYTEST) -n 2 --dist worksteal -m "not slow" $(ARGS)

test-all: setup ## run every test, minutes more
	@$(PYTEST) -n 2 --dist worksteal -m "slow or not slow" $(ARGS)

check: setup ## check style, types and the rules of the house
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyrefly check
	$(PYTEST) tests/house

bench: setup ## measure the speed of this machine and of Mule on it
	@.venv/bin/mule bench all

bench-plan: setup ## predict runs, make them, and compare (20 minutes)
	@.venv/bin/python bench/plan.py run

docs: setup ## write the generated pages of docs/ again
	.venv/bin/python -m mule.commands.docs

site: setup ## build the pages of docs/ as a site, in site/
	@.venv/bin/zensical build --strict

clean: ## remove .venv and caches; never runs/, data/, demo/ or exports/
	rm -rf .venv .ruff_cache .pytest_cache .hypothesis .cache site *.egg-info
	find . \( -path ./runs -o -path ./data -o -path ./demo -o -path ./exports -o -path ./.git \) \
	  -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +
