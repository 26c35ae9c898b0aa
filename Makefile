# Each command does its own set-up, in .venv: nothing has to be installed or activated before.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready
# Overrides for `make train`, as in `make train ARGS="strategy=mirrored num_replicas=4"`; none at all is the tour.
# Options for `make bench`, as in `make bench ARGS="--models mlp"`; none at all is what the goals need.
# Options for `make soak`, as in `make soak ARGS="--minutes 5"`; none at all is an hour.
ARGS ?=

.PHONY: train test check bench soak clean

train: $(READY)
	@$(BIN)/python -m trainer $(ARGS)

test: check
	$(BIN)/python -m pytest -n 3 --dist loadfile

bench: $(READY)
	$(BIN)/python scripts/bench.py $(ARGS)

soak: $(READY)
	$(BIN)/python scripts/soak.py $(ARGS)

check: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info[:2] == (3, 11) else "Python 3.11 is needed: make PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis replica_trainer.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
