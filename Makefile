# `make demo` and `make test` need Python >= 3.10, pip and make. TORCH may name another build, for example
# `make demo TORCH="torch --index-url https://download.pytorch.org/whl/cu128"`, or be empty to keep what is installed.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/fine-grained

.PHONY: demo test bench lint clean

demo: $(VENV)/.demo
	$(BIN)/python -m evaluations.run --suite fine-grained --out $(OUT)
	@echo "The report: $(abspath $(OUT))/report.html"

test: $(VENV)/.test
	$(BIN)/python -m ruff check .
	$(BIN)/python -m pytest

# Takes a quarter of an hour on a quiet core; BENCH="--visual-tokens 729 --rounds 3" for a part of it.
bench: $(VENV)/.demo
	$(BIN)/python -m evaluations.bench --out runs/bench.json $(BENCH)

lint: $(VENV)/.test
	$(BIN)/python -m ruff check .

$(VENV)/.demo: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --editable ".[test,train]"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
