# `make demo` and `make test` need Python >= 3.10, pip and make. TORCH may name another build, for example
# `make demo TORCH="torch --index-url https://download.pytorch.org/whl/cu128"`, or be empty to keep what is installed.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/fine-grained

LOCK := requirements/lock.txt
# Releases of transformers for `make compat`; empty: all that pyproject.toml admits and were chosen to stand for the rest.
TRANSFORMERS ?=

.PHONY: demo test test-lmms compat update update-lmms bench lint clean

demo: $(VENV)/.demo
	$(BIN)/python -m evaluations.run --suite fine-grained --out $(OUT)
	@echo "The report: $(abspath $(OUT))/report.html"

test: $(VENV)/.demo
	$(BIN)/python -m ruff check .
	$(BIN)/python -m pytest

# Takes a quarter of an hour on a quiet core; BENCH="--visual-tokens 729 --rounds 3" for a part of it.
bench: $(VENV)/.demo
	$(BIN)/python -m evaluations.bench --out runs/bench.json $(BENCH)

lint: $(VENV)/.demo
	$(BIN)/python -m ruff check .

# The tests that tell, on several releases of transformers, each in an environment of its own; a table at the end.
compat:
	$(PYTHON) tests/compat.py --torch "$(TORCH)" $(TRANSFORMERS)

# The lock anew, from the bounds in pyproject.toml, and the tests with it. It holds Python 3.10 to 3.13 and all systems;
# torch is left to TORCH, and what torch itself needs beside CUDA stands in torch-needs.in.
update: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.10 --extra test --extra train --no-annotate \
		--custom-compile-command "make update" pyproject.toml requirements/torch-needs.in -o $(LOCK)
	$(MAKE) test

$(VENV)/.demo: pyproject.toml $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit("VISOR needs Python 3.10 or newer, and this is %d.%d: make PYTHON=python3.12 ..." % sys.version_info[:2] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH),$(BIN)/python -m pip install --quiet --constraint $(LOCK) $(TORCH))
	$(BIN)/python -m pip install --quiet --requirement $(LOCK)
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	@touch $@

# lmms-eval the light way, in an environment of its own, and the tests that need it.
test-lmms: .venv-lmms/.ready
	.venv-lmms/bin/python -m pytest tests/evaluations/lmms

# Their locks anew: the light way, and all that lmms-eval declares. torchvision goes with torch and is left out, too.
update-lmms: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.10 --extra test --extra train --no-annotate \
		--custom-compile-command "make update-lmms" pyproject.toml requirements/torch-needs.in \
		requirements/lmms-light.in -o requirements/lmms-light.txt
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.10 --extra test --extra train --extra lmms \
		--no-annotate --no-emit-package torchvision --custom-compile-command "make update-lmms" pyproject.toml \
		requirements/torch-needs.in -o requirements/lmms.txt

.venv-lmms/.ready: pyproject.toml requirements/lmms-light.txt
	$(PYTHON) -m venv .venv-lmms
	$(if $(TORCH),.venv-lmms/bin/python -m pip install --quiet $(TORCH))
	.venv-lmms/bin/python -m pip install --quiet --requirement requirements/lmms-light.txt
	.venv-lmms/bin/python -m pip install --quiet --no-deps lmms-eval==0.7.3 --editable .
	@touch $@

clean:
	rm -rf $(VENV) .venv-compat .venv-lmms build *.egg-info
