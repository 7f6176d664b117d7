# Two commands do everything: `make demo` and `make test`. Both make the same environment in .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test consumers lint dist clean

demo: $(VENV)/.installed
	$(BIN)/lowbit demo -o demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest

# What the written files are checked against, as far as PyPI has it; `make test` then runs the tests marked consumer too.
consumers: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt "lowbit[consumers]"  # of the lowbit that is installed: nothing is built again

lint: $(VENV)/.installed
	$(BIN)/ruff check lowbit tests benchmarks
	$(BIN)/mypy

dist: $(VENV)/.installed
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) demo dist build

# torch first and by its pin: an unpinned torch can pull gigabytes of CUDA packages (see README, "torch for CPU only").
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "lowbit needs Python 3.11 or newer; name one: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,train]"
	touch $@
