# Two commands do everything on a fresh machine with Python >= 3.10:
#   make demo   environment, the main job on the embedded dataset, the table
#   make test   environment with the test extras, the whole test suite
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
EXTRAS_DEMO := demo
EXTRAS_TEST := dev,demo,mmseg,natten
DEMO_OUT ?= runs/demo

.PHONY: demo test lint format clean help

help:
	@echo "make demo | test | lint | format | clean"

$(VENV)/.base:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "upbench needs Python 3.10 or newer (make PYTHON=python3.12 ...)")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade "setuptools>=77" wheel build
	touch $@

# Build isolation is off so that packages without a wheel (natten needs torch to build) use this environment's
# torch instead of downloading a second copy of it.
$(VENV)/.demo: $(VENV)/.base pyproject.toml
	$(PIP) install --quiet --no-build-isolation -e ".[$(EXTRAS_DEMO)]"
	touch $@

$(VENV)/.test: $(VENV)/.base pyproject.toml
	$(PIP) install --quiet torch torchvision
	$(PIP) install --quiet --no-build-isolation -e ".[$(EXTRAS_TEST)]"
	touch $@

demo: $(VENV)/.demo
	$(BIN)/upbench run --methods bilinear,raysup,anyup --tasks seg,depth --preset quick --seeds 3 --out $(DEMO_OUT)

test: $(VENV)/.test
	$(BIN)/python -m pytest

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
