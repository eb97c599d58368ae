# `make demo` and `make test` need Python 3.11 or newer with pip, nothing else.

PYTHON ?= python3
VENV := .venv
EXTRAS := dev
HARNESS := .venv-harness
LEROBOT := .venv-lerobot
TORCHVISION := .venv-torchvision
BIN := $(VENV)/bin
CHROMIUM ?= $(shell command -v chromium || command -v google-chrome)
export CHROMIUM
INPUTS := pyproject.toml constraints.txt
# Once more where one fails: a browser waits by the clock.
BROWSER_TESTS = $(BIN)/python -m pytest -m browser --reruns 1 tests/browser
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test check test-all test-browser test-harness test-lerobot test-torchvision format clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(VENV)/.installed ## Fetch the target's weights (once) and ask about a picture
	$(BIN)/mm-c2c fetch
	$(BIN)/python demos/quickstart.py

test: $(VENV)/.installed-dev ## Run the tests: CPU, offline, a few minutes on two cores; a Chromium is used if there is one
	$(BIN)/python -m pytest --numprocesses auto
	$(if $(CHROMIUM),$(BROWSER_TESTS))

check: $(VENV)/.installed-dev ## Formatting, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses auto

test-all: $(VENV)/.installed-dev ## Also the slow tests and those that download
	$(BIN)/python -m pytest -m "not gpu and not browser"

test-browser: $(VENV)/.installed-dev ## The page in a browser: needs a Chromium (apt-get install chromium)
	$(BROWSER_TESTS)

# lmms-eval brings torchvision, whose builds load beside one build of torch only; nothing here needs it.
test-harness: ## The tests with lm-eval, lmms-eval and datasets, in an environment of their own
	@$(MAKE) --no-print-directory VENV=$(HARNESS) EXTRAS=dev,lm-eval,lmms-eval,sets $(HARNESS)/.installed-dev
	@$(HARNESS)/bin/python -c "import torchvision" 2>/dev/null || $(HARNESS)/bin/python -m pip uninstall --quiet --yes torchvision
	@$(HARNESS)/bin/python -W ignore -c "import datasets, lm_eval, lmms_eval"
	$(HARNESS)/bin/python -m pytest tests/test_harness.py tests/test_sets.py

# LeRobot asks for older releases of torch and transformers; its classes work with this transformers.
test-lerobot: ## The tests with LeRobot, in an environment of their own: Python 3.12, several GB
	$(PYTHON) -m venv $(LEROBOT)
	$(LEROBOT)/bin/python -m pip install --disable-pip-version-check --quiet "lerobot[smolvla,dataset]==0.6.1"
	$(LEROBOT)/bin/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --no-deps transformers tokenizers
	$(LEROBOT)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps --editable .
	$(LEROBOT)/bin/python -m pip install --disable-pip-version-check --quiet accelerate gguf psutil pytest
	$(LEROBOT)/bin/python -m pytest tests/test_sources_smolvla.py tests/test_robot_recording.py

# torchvision loads beside the one build of torch that it was made for.
test-torchvision: ## The tests with torchvision and DeepSpeed, in an environment of their own: several GB
	$(PYTHON) -m venv $(TORCHVISION)
	$(TORCHVISION)/bin/python -m pip install --disable-pip-version-check --quiet torch==2.14.1 torchvision==0.29.1
	$(TORCHVISION)/bin/python -m pip install --disable-pip-version-check --quiet deepspeed==0.19.8 pytest --editable .
	$(TORCHVISION)/bin/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --no-deps transformers tokenizers
	$(TORCHVISION)/bin/python -m pytest tests/test_sources_video.py tests/test_sources_families.py
	$(TORCHVISION)/bin/python -m pytest tests/test_train.py -k sharded

format: $(VENV)/.installed-dev ## Format, and fix what lint can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## Remove the virtual environments and tool caches; downloaded weights stay
	rm -rf $(VENV) $(HARNESS) $(LEROBOT) $(TORCHVISION) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find mm_c2c demos tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps make installing a no-op until one of INPUTS changes.
$(VENV)/.installed: $(INPUTS) | $(BIN)/python
	@echo "Installing mm-c2c into $(VENV) (torch is large: minutes the first time)"
	@$(INSTALL) --editable .
	@touch $@

$(VENV)/.installed-dev: $(INPUTS) | $(BIN)/python
	@echo "Installing mm-c2c and its tools into $(VENV) (torch is large: minutes the first time)"
	@$(INSTALL) --editable ".[$(EXTRAS)]"
	@touch $(VENV)/.installed $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("mm-c2c needs Python 3.11 or newer, this is " + sys.version.split()[0] + ". Say which: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
