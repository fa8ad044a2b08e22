# Every target makes .venv if it is missing and installs what constraints-dev.txt pins. Nothing else to type.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_ARGS ?=
SOURCES := $(shell find csrc -type f)
TEST_ARGS ?=

.PHONY: install demo test lint wheel bench codegen clean

install: $(VENV)/.installed

# torch comes first and alone: a build that asks for it finds it there, pinned.
$(VENV)/.installed: constraints-dev.txt pyproject.toml setup.py $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints-dev.txt torch setuptools wheel
	$(BIN)/python -m pip install --quiet --constraint constraints-dev.txt --no-build-isolation --editable ".[dev]"
	$(BIN)/python -m frs_kernels
	touch $@

demo: install
	$(BIN)/python -m examples.digits $(DEMO_ARGS)

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(TEST_ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(SOURCES)
	$(BIN)/mypy

# The folders that setuptools assembles a wheel in keep what has since been deleted from the sources.
wheel: install
	rm -rf build/lib* build/bdist*
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

bench: install
	$(BIN)/python benchmarks/bench_loss.py

codegen: install
	$(BIN)/python tools/resources.py --write
	$(BIN)/python tools/codegen.py --write

clean:
	rm -rf $(VENV) build dist frs_kernels/lib *.egg-info
