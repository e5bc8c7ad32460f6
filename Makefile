# Two commands do everything on a fresh machine with Python >= 3.10:
#   make demo   environment, the main job on the embedded dataset, the table
#   make test   environment with the test extras, the whole test suite
#   make drill  everything that goes wrong for users, on purpose: one line a group of cases (docs/reliability.md)
# They install the tested versions, those in constraints.txt. Of versions (CONTRIBUTING.md):
#   make test-newest   tests the newest releases; make constraints does, then writes them into constraints.txt
#   make test-lowest   imports and contracts with the lowest versions that pyproject.toml allows
PYTHON ?= python3
VENV   ?= .venv
NEWEST := .venv-newest
LOWEST := .venv-lowest
BIN    := $(VENV)/bin
EXTRAS_DEMO := demo
EXTRAS_TEST := dev,demo,datasets,hf,mmseg,natten
DEMO_OUT ?= runs/demo
# What the dependencies are imported by, and their outputs checked with: enough to see that a version is too low.
TESTS_LOWEST := tests/contracts tests/test_architecture.py tests/test_packaging.py tests/test_public_names.py \
	tests/features tests/metrics tests/results tests/run tests/tasks tests/weights

.PHONY: demo test drill test-newest test-lowest constraints lint format clean help

help:
	@echo "make demo | test | drill | lint | format | clean | test-newest | test-lowest | constraints"

# $(call base,VENV,PINS): a virtual environment with what installs the rest. PINS are "-c FILE", or nothing.
define base
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "upbench needs Python 3.10 or newer (make PYTHON=python3.12 ...)")'
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip --disable-pip-version-check install --quiet $(2) --upgrade pip setuptools wheel build
endef

# $(call install,VENV,PINS,EXTRAS): upbench. Packages without a wheel are built apart from this environment: within
# it, mmcv would find torch and compile operators that nothing here needs. What they are built with is pinned, too.
define install
	$(1)/bin/python -m pip --disable-pip-version-check install --quiet $(2) $(if $(2),--build-constraint constraints.txt) \
		-e ".[$(3)]"
endef

# $(call natten,VENV,PINS): natten, the one that needs torch to be built. It sees no GPU meanwhile: if it did, it
# would need a CUDA toolkit. To test its CUDA kernels, install it yourself; what is installed is left alone.
define natten
	$(1)/bin/python -m pip --disable-pip-version-check install --quiet $(2) torch torchvision
	CUDA_VISIBLE_DEVICES= $(1)/bin/python -m pip --disable-pip-version-check install --quiet $(2) \
		--no-build-isolation natten
endef

# $(call check,VENV)
define check
	$(1)/bin/ruff check .
	$(1)/bin/ruff format --check .
	$(1)/bin/mypy
endef

$(VENV)/.base: constraints.txt
	$(call base,$(VENV),-c constraints.txt)
	touch $@

$(VENV)/.demo: $(VENV)/.base pyproject.toml
	$(call install,$(VENV),-c constraints.txt,$(EXTRAS_DEMO))
	touch $@

$(VENV)/.test: $(VENV)/.base pyproject.toml
	$(call natten,$(VENV),-c constraints.txt)
	$(call install,$(VENV),-c constraints.txt,$(EXTRAS_TEST))
	touch $@

demo: $(VENV)/.demo
	$(BIN)/upbench run --methods bilinear,raysup,anyup --tasks seg,depth --protocol quick --seeds 3 --out $(DEMO_OUT)

test: $(VENV)/.test
	$(BIN)/python -m pytest

drill: $(VENV)/.test
	$(BIN)/python -m pytest tests/drill --whole -q

lint: $(VENV)/.test
	$(call check,$(VENV))

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-newest:
	rm -rf $(NEWEST)
	$(call base,$(NEWEST))
	$(call natten,$(NEWEST))
	$(call install,$(NEWEST),,all)
	$(NEWEST)/bin/python -m pytest
	$(call check,$(NEWEST))

constraints: test-newest
	$(NEWEST)/bin/python tools/constraints.py all

test-lowest:
	rm -rf $(LOWEST)
	$(call base,$(LOWEST),-c constraints.txt)
	$(LOWEST)/bin/python tools/lowest.py all > $(LOWEST)/lowest.txt
	$(call natten,$(LOWEST),-c $(LOWEST)/lowest.txt)
	$(call install,$(LOWEST),-c $(LOWEST)/lowest.txt,all) setuptools
	$(LOWEST)/bin/python -m pytest $(TESTS_LOWEST)

clean:
	rm -rf $(VENV) $(NEWEST) $(LOWEST) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
