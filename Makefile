# Everything runs in .venv, which the first target that needs it creates.

PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2

.PHONY: help setup demo test lint types format check docs bench bench-speed clean

help:
	@echo "make demo    export FastViT-T8 in training form and fuse it: build/fastvit_t8*.onnx"
	@echo "make test    run all tests, examples included, in JOBS=2 processes"
	@echo "make lint    ruff, ruff format --check, pyright"
	@echo "make check   lint, then test"
	@echo "make docs    write the pages of the passes anew and build the site: build/site"
	@echo "make format  let ruff put the code in order"
	@echo "make bench   run the benchmarks and put their tables into docs/benchmarks.md (ten to thirty minutes)"
	@echo "make bench-speed  what fusing a file costs, beside other tools; TOOLS=python that has them"
	@echo "make clean   remove .venv and build"

setup: .venv/.ready

.venv/.ready: requirements-dev.txt requirements-timm.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("the pinned packages need Python 3.11 or newer; set PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	@echo "installing the pinned packages into .venv; PyTorch is among them, so this takes minutes"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-timm.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@$(BIN)/python -m compileall -q reparamc passes fastvit_zoo
	@touch $@

demo: setup
	@mkdir -p build
	$(BIN)/python -m fastvit_zoo export fastvit_t8 -o build/fastvit_t8.onnx
	$(BIN)/reparamc fuse build/fastvit_t8.onnx -o build/fastvit_t8.fused.onnx

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

lint: setup types
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: setup
	$(BIN)/pyright --pythonpath $(BIN)/python

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

check: lint test

docs: setup
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/operators.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: setup
	$(BIN)/python benchmarks/all.py

TOOLS ?= $(BIN)/python

bench-speed: setup
	$(BIN)/python benchmarks/speed.py --tools $(TOOLS)

clean:
	rm -rf .venv build
