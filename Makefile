# `make train` and `make test` are the whole interface: each builds .venv when it is missing or
# older than the files that define it, and reinstalls nothing otherwise.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

VLLM := .venv-vllm
VLLM_PIP := $(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check

TRANSFORMERS4 := .venv-transformers4

.PHONY: train test test-vllm test-transformers4 lint kernels-report clean help

help:
	@echo "make train           install, then run PAINT on the bundled tiny model (ARGS='--train.num_steps 10')"
	@echo "make test            install, then run the tests (ARGS='-k masking')"
	@echo "make test-vllm       install vLLM for CPUs beside it, then run the tests with the real engine"
	@echo "make test-transformers4  install transformers 4.57 beside it, then read exports with it"
	@echo "make lint            ruff, pyright, import-linter"
	@echo "make kernels-report  compile every Triton kernel for four GPUs, without one"
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

kernels-report: $(VENV)/.installed-dev
	$(BIN)/python -m bench.kernels_report $(ARGS)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable '.[engine]'
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable '.[dev]'
	touch $(VENV)/.installed $@

# Its own environment: vLLM pins other versions than constraints.txt.
$(VLLM)/.installed: pyproject.toml constraints.txt requirements-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM_PIP) --constraint constraints.txt torch
	$(VLLM_PIP) --no-deps --requirement requirements-vllm.txt
	$(VLLM_PIP) --no-deps --editable .
	touch $@

# With what release 4 of transformers needs. PyTorch is read from .venv, after its own packages.
$(TRANSFORMERS4)/.installed: requirements-transformers4.txt | $(VENV)/.installed-dev
	$(PYTHON) -m venv $(TRANSFORMERS4)
	$(TRANSFORMERS4)/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements-transformers4.txt
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		"$$($(TRANSFORMERS4)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/engine.pth"
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) $(TRANSFORMERS4)
