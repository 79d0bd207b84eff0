# Everything starts from a machine with Python (3.11 or newer) and make.
#
#   make demo       the whole thing on a real Synapse, in about a minute
#   make test       lint, types, layers and tests
#   make help       the rest

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
ARGS   ?=

.DEFAULT_GOAL := help
MINUTES ?= 10
# Most tests wait for something: four at a time take a third as long. Those of one file share what they start.
PYTEST = $(BIN)/python -m pytest -n 4 --dist loadfile
.PHONY: help install demo test test-all check lint types layers format unit bench bench-parts bench-scaling bench-departures soak soak-daemon soak-instances docs screenshots lock clean

help: ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

# One stamp for each set of locked packages: what is installed is what was tested.
define install_set
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; this is " + sys.version.split()[0] + ". Name another one with: make PYTHON=python3.12 …")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the locked packages of requirements/$(1).txt into $(VENV) (a minute or so) …"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/$(1).txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@
endef

$(VENV)/.run: requirements/run.txt pyproject.toml
	$(call install_set,run)
$(VENV)/.demo: requirements/demo.txt pyproject.toml
	$(call install_set,demo)
$(VENV)/.test: requirements/test.txt pyproject.toml
	$(call install_set,test)
	@touch $(VENV)/.demo $(VENV)/.run
$(VENV)/.bench: requirements/bench.txt pyproject.toml
	$(call install_set,bench)
	@touch $(VENV)/.test $(VENV)/.demo $(VENV)/.run

install: $(VENV)/.run ## install the daemon into .venv

demo: $(VENV)/.demo ## the daemon, a real Synapse and a stand-in SFU, live in the terminal (ARGS=--no-synapse: without Synapse)
	@$(BIN)/sfu-delegate demo $(ARGS)

test: lint layers ## lint, types, layers and the tests (what takes long as a sample)
	@$(MAKE) --no-print-directory --jobs=2 types unit    # types are checked beside the tests, which wait now and then

test-all: check ## the same with everything that takes long
	$(PYTEST) --run-slow $(ARGS)

check: lint types layers ## lint, types and layers only

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

layers: $(VENV)/.test
	$(BIN)/lint-imports

unit: $(VENV)/.test ## the tests only (ARGS="-k webhook" chooses)
	$(PYTEST) $(ARGS)

bench: $(VENV)/.bench ## the whole daemon against its goals and the limits of this machine: an hour (ARGS="--only noise join", --quick, --compare FILE)
	$(BIN)/python -m benchmarks $(ARGS)

bench-parts: $(VENV)/.test ## the engine alone (µs per input by batch size and number of rows), and urgency under a rate limit
	$(BIN)/python -m benchmarks.engine
	$(BIN)/python -m benchmarks.rate_limit

bench-scaling: $(VENV)/.test ## several instances on one PostgreSQL, and a million delegations: twenty minutes (ARGS="--only instances", --quick, --fill docs/scaling.md)
	$(BIN)/python -m benchmarks.scaling $(ARGS)

bench-departures: $(VENV)/.test ## 500 people leave at once, on a real Synapse, with the application service: five minutes (ARGS="--alone --without": ten more)
	$(BIN)/python -m benchmarks.departures $(ARGS)

soak: $(VENV)/.test ## the simulation, with new seeds for MINUTES=10; prints a failing seed, and its history as small as it gets
	$(BIN)/python -m tests.simulation.soak --minutes $(MINUTES) $(ARGS)

soak-daemon: $(VENV)/.test ## the real daemon with thousands of people, faults and kills for MINUTES=10
	$(BIN)/python -m tests.soak --minutes $(MINUTES) $(ARGS)

soak-instances: $(VENV)/.test ## the same with three instances on a PostgreSQL, which fails as well
	$(BIN)/python -m tests.soak --instances 3 --minutes $(MINUTES) $(ARGS)

docs: $(VENV)/.test ## write what is generated (example configuration, references, diagram), and build the site in build/docs/html
	$(BIN)/sfu-delegate example-config > config/sfu-delegate.yaml
	$(BIN)/python docs/generate.py
	$(BIN)/python -m sfu_delegate.delegation.diagram
	$(BIN)/python docs/build.py

screenshots: $(VENV)/.test ## take the pictures in docs/images anew (needs Debian's chromium)
	SCREENSHOTS=1 $(BIN)/python -m pytest -n 0 tests/integration/test_page_browser.py -k screenshots $(ARGS)

format: $(VENV)/.test ## format and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

UV = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header $(if $(UPGRADE),--upgrade)
lock: ## write requirements/*.txt anew (UPGRADE=1: with the newest versions)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(UV) --extra test pyproject.toml requirements/build.in -o requirements/test.txt
	$(UV) --constraint requirements/test.txt --extra bench pyproject.toml requirements/build.in -o requirements/bench.txt
	$(UV) --constraint requirements/test.txt --extra demo pyproject.toml requirements/build.in -o requirements/demo.txt
	$(UV) --constraint requirements/test.txt pyproject.toml requirements/build.in -o requirements/run.txt

clean: ## remove the virtual environment and what tools left
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
