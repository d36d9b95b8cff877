# Two commands do everything on a fresh machine (Python 3.10+):
#   make train    sets up .venv and trains on real faces
#   make test     sets up .venv and runs lint, types, mutants and tests
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
BUILT  := $(VENV)/.built
ARGS   ?=
CXX_FILES := $(shell find csrc -type f -name '*.h' -o -type f -name '*.cpp')

.PHONY: train test extension lint format types timing mutants lock clean

train: $(BUILT)
	$(BIN)/protomem train $(ARGS)

test: lint types extension timing mutants
	$(BIN)/python -m pytest -n 2 -m "not timing" --cov --cov-report=term --cov-fail-under=90 $(ARGS)

timing: $(BUILT)
	$(BIN)/python -m pytest -q -m timing --no-header -rP tests/test_speed.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

types: $(READY)
	$(BIN)/mypy

mutants: $(BUILT)
	$(BIN)/python -m tests.mutants

# The compiled CPU part, into protomem_kernels/: built again when its sources change, and only what changed.
extension: $(BUILT)
$(BUILT): $(READY) setup.py CMakeLists.txt $(CXX_FILES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $(BUILT)

# The environment is rebuilt when the lock or the package's metadata changes.
$(READY): requirements-dev.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $(READY) $(BUILT)

# Newest versions that support every Python from 3.10 on. torch alone is pinned by hand; what a CUDA build of torch
# brings along (nvidia-*, triton) is its own business.
TORCH := torch==2.13.0
lock: $(READY)
	$(BIN)/python -m pip install --quiet uv
	echo '$(TORCH)' | $(BIN)/uv pip compile pyproject.toml - --extra dev --universal --python-version 3.10 --quiet \
	    --no-header --no-annotate | grep -vE '^(nvidia-|cuda-|triton)' >requirements-dev.lock.new
	mv requirements-dev.lock.new requirements-dev.lock

clean:
	rm -rf $(VENV) build dist *.egg-info protomem_kernels/_C.*
