# `make train` and `make test` are the whole interface: each builds .venv when it is missing or
# older than the files that define it, and reinstalls nothing otherwise.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

VLLM := .venv-vllm
TRANSFORMERS4 := .venv-transformers4

PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
# The files of locks/ alone, each compared with its hash. They name what is needed, all of it.
LOCKED := $(PIP_INSTALL) --require-hashes --no-deps
# The package itself, built by the setuptools of the lock.
ITSELF := $(PIP_INSTALL) --no-deps --no-build-isolation --editable .

# $(call install_torch,PYTHON): the build for CPUs if an index has it, else the registry's.
define install_torch
$(1) $(LOCKED) --requirement locks/torch-cpu.txt || { \
	echo "PyTorch's build for CPUs was not installed (above); installing locks/torch.txt" >&2; \
	$(1) $(LOCKED) --requirement locks/torch.txt; }
endef

.PHONY: train test test-vllm test-transformers4 lint resolve kernels-report lock clean help

help:
	@echo "make train           install, then run PAINT on the bundled tiny model (ARGS='--train.num_steps 10')"
	@echo "make test            install, then run the tests (ARGS='-k masking')"
	@echo "make test-vllm       install vLLM for CPUs beside it, then run the tests with the real engine"
	@echo "make test-transformers4  install transformers 4.57 beside it, then read exports with it"
	@echo "make lint            ruff, pyright, import-linter"
	@echo "make resolve         ask the registry whether both installations resolve (no download but metadata)"
	@echo "make kernels-report  compile every Triton kernel for five GPUs, without one"
	@echo "make lock            write locks/ and constraints-gpu.txt, after a change of versions"
	@echo "make clean           remove the virtual environment"

train: $(VENV)/.installed
	$(BIN)/python -m paint_engine.train $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(ARGS)

# Without pytest's own capture of logs, which would turn on the debug logs of torch.compile.
test-vllm: $(VLLM)/.installed
	$(VLLM)/bin/python -m pytest -p no:logging tests/vllm $(ARGS)

test-transformers4: $(VENV)/.installed-dev $(TRANSFORMERS4)/.installed
	$(BIN)/python -m pytest tests/transformers4 $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

resolve: $(VENV)/.installed-dev
	$(BIN)/python .ci/resolve.py

kernels-report: $(VENV)/.installed-dev
	$(BIN)/python -m bench.kernels_report $(ARGS)

lock: $(VENV)/.installed-dev
	$(BIN)/python .ci/lock.py

$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python $(PIP_INSTALL) --constraint constraints.txt --editable '.[engine]'
	touch $@

$(VENV)/.installed-dev: pyproject.toml locks/torch-cpu.txt locks/torch.txt locks/dev.txt | $(BIN)/python
	$(call install_torch,$(BIN)/python)
	$(BIN)/python $(LOCKED) --requirement locks/dev.txt
	$(BIN)/python $(ITSELF)
	touch $(VENV)/.installed $@

# Its own environment: vLLM pins other versions than constraints.txt.
$(VLLM)/.installed: pyproject.toml locks/torch-cpu.txt locks/torch.txt locks/vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(call install_torch,$(VLLM)/bin/python)
	$(VLLM)/bin/python $(LOCKED) --requirement locks/vllm.txt
	$(VLLM)/bin/python $(ITSELF)
	touch $@

# With what release 4 of transformers needs. PyTorch is read from .venv, after its own packages.
$(TRANSFORMERS4)/.installed: locks/transformers4.txt | $(VENV)/.installed-dev
	$(PYTHON) -m venv $(TRANSFORMERS4)
	$(TRANSFORMERS4)/bin/python $(LOCKED) --requirement locks/transformers4.txt
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		"$$($(TRANSFORMERS4)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/engine.pth"
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) $(TRANSFORMERS4)
