# Every target sets itself up: `make predict` a light environment without torch, the others the full one.
# Both live in .venv inside the clone; a target that needs more adds to it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
BASE   := $(VENV)/.base
DEV    := $(VENV)/.dev
DATA   ?= cifar10
PHOTOS ?= photos
MODEL  ?= L1.onnx

# The environments are installed without compiling: what is imported is compiled once, and kept. Where a shell forbids
# keeping it, every process would compile torch anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help predict test lint types unit docs parity accuracy bench bulk clean

help:            ## Show the targets
	@grep -hE '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed 's/: .*## /\t/' | expand -t 12

predict: $(BASE) ## Classify the photos in examples/ with the network in the package (no torch)
	@$(BIN)/efficientformer predict examples

test: lint types unit docs ## Everything CI runs: lint, types, tests, docs

lint: $(DEV)     ## Check style
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(DEV)    ## Check types
	@$(BIN)/mypy

# A worker that dies is a failed test; with another in its place pytest-xdist may wait for ever.
unit: $(DEV)     ## Run the tests
	@$(BIN)/pytest -n auto --maxprocesses 8 --dist loadfile --max-worker-restart 0 --durations 10

docs: $(DEV)     ## Build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

parity: ## Compare with mmpretrain and transformers live, in an environment of their own, and rewrite the golden file
	@test -x .venv-parity/bin/python || $(PYTHON) -m venv .venv-parity
	@.venv-parity/bin/pip install -q --disable-pip-version-check $$(grep -E '^torch(vision)?==' requirements/parity.txt)
	@.venv-parity/bin/pip install -q --disable-pip-version-check --no-deps -r requirements/parity.txt
	@PYTHONPATH=src .venv-parity/bin/python tests/parity/make_golden.py

accuracy: $(DEV) ## Measure the network in the package on CIFAR-10's test images: make accuracy DATA=cifar10
	@$(BIN)/efficientformer test efficientformer_cifar10 --data $(DATA)

bench: $(DEV)    ## Measure against timm, mmpretrain (after make parity) and plain exports: make bench PHOTOS=photos
	@$(BIN)/python benchmarks/cold_start.py
	@$(BIN)/python benchmarks/engines.py
	@$(BIN)/python benchmarks/one_picture.py $$(find $(PHOTOS) -type f | sort | head -1)
	@$(BIN)/python benchmarks/folder.py $(PHOTOS)
	@$(BIN)/python benchmarks/fast_decode.py --data $(PHOTOS)

bulk: $(DEV)     ## Measure memory over the number of pictures, and two Ray workers: make bulk PHOTOS=photos MODEL=L1.onnx
	@$(BIN)/python benchmarks/bulk_memory.py $(PHOTOS)
	@$(BIN)/python benchmarks/ray_scaling.py --data $(PHOTOS) --model $(MODEL)

$(BIN)/python:
	@$(PYTHON) -m venv $(VENV)

$(BASE): requirements/base.txt pyproject.toml | $(BIN)/python
	@echo "Setting up .venv (light: no torch) ..." >&2
	@$(BIN)/python -m pip install -q --no-compile --disable-pip-version-check --no-deps -r requirements/base.txt
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-compile --no-deps -e .
	@touch $@

$(DEV): requirements/dev.txt $(BASE)
	@echo "Adding torch and the development tools to .venv ..." >&2
	@$(BIN)/python -m pip install -q --no-compile --disable-pip-version-check -r requirements/dev.txt
	@touch $@

clean:           ## Remove the environments and what was built
	rm -rf $(VENV) .venv-parity site dist build .pytest_cache .mypy_cache .ruff_cache
