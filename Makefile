# Everything a person or CI does with this repository. `make help` lists it.

BASE_PYTHON ?= python3
TORCH       ?= torch==2.13.0
# e.g. https://download.pytorch.org/whl/cpu, for the CPU build where the default index serves the CUDA one
TORCH_INDEX ?=
# A folder in COCO format for `make quickstart`; empty: a synthetic set is drawn
DATA        ?=
# key=value ... for the training of `make quickstart`
ARGS        ?=

ifdef PYTHON
# Somebody's own environment: used as it is, nothing is installed, not even this repository.
INSTALLED :=
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PYTHON    := $(CURDIR)/.venv/bin/python
INSTALLED := .venv/.installed
export PATH := $(CURDIR)/.venv/bin:$(PATH)
endif
LIBRARY := ops/_C.abi3.so
# -qq: errors only
PIP_INSTALL := '$(PYTHON)' -m pip --disable-pip-version-check -qq install

.DEFAULT_GOAL := build
.PHONY: help env build quickstart convergence test sanitize check format bench gpu-report clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(INSTALLED)  ## the environment .venv; TORCH=torch==X.Y.Z and TORCH_INDEX=URL choose the build of torch

# Started afresh when the last attempt did not finish; brought up to date when only setup.py changed.
.venv/.installed: setup.py
	@$(BASE_PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: Tenfold needs Python 3.11 or later; found %s. Choose one: make BASE_PYTHON=python3.12" % sys.version.split()[0])'
	@$(BASE_PYTHON) -m venv $(if $(wildcard $@),,--clear) .venv || { echo "error: python3 cannot make an environment; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@echo "installing $(TORCH) in .venv (its CUDA build is a large download)"
	@$(PIP_INSTALL) setuptools wheel
	@$(PIP_INSTALL) '$(TORCH)' $(if $(TORCH_INDEX),--index-url '$(TORCH_INDEX)')
	@echo "installing tenfold and what it needs in .venv"
	@DS_BUILD_OPS=0 $(PIP_INSTALL) --no-build-isolation --editable '.[dev]'
	@touch $@

build: env $(LIBRARY)  ## the kernels of ops; needs g++ (CXX=... chooses another compiler)

$(LIBRARY): setup.py $(wildcard ops/csrc/*.* ops/csrc/*/*) | $(INSTALLED)
	@echo "building $@"
	@'$(PYTHON)' setup.py -q build_ext --inplace

quickstart: export TENFOLD_CUDA_ARCHS ?= native
quickstart: build  ## from nothing to a trained detector, its AP and its pictures; DATA=FOLDER: your own images, ARGS=key=value
	@PYTHON='$(PYTHON)' DATA='$(DATA)' ARGS='$(ARGS)' launch/quickstart.sh

# One process for each core (tests/conftest.py); a file of tests stays in one of them, and the longest ones begin.
test: build  ## the test suite; what needs a GPU, SLURM or real data skips and says so
	@'$(PYTHON)' -m pytest -n auto --dist loadfile --no-loadscope-reorder

sanitize: env  ## run the CPU kernels once under AddressSanitizer and UBSan
	@'$(PYTHON)' setup.py -q sanitize

check: env  ## linter, formatting, types
	@'$(PYTHON)' -m ruff check .
	@'$(PYTHON)' -m ruff format --check .
	@'$(PYTHON)' -m mypy

format: env  ## format the code and mend what the linter can
	@'$(PYTHON)' -m ruff check --fix-only .
	@'$(PYTHON)' -m ruff format .

bench: build  ## the figures in docs/results/ (real data is read through TENFOLD_DATA)
	@'$(PYTHON)' -m benchmarks.flops
	@'$(PYTHON)' -m benchmarks.op
	@'$(PYTHON)' -m benchmarks.precision
	@'$(PYTHON)' -m benchmarks.train_step
	@'$(PYTHON)' -m benchmarks.real_data
	@'$(PYTHON)' -m benchmarks.engine
	@'$(PYTHON)' -m benchmarks.evaluation
	@'$(PYTHON)' -m benchmarks.kills
	@'$(PYTHON)' -m benchmarks.scale
	@'$(PYTHON)' -m benchmarks.slurm

# SIZE=gpu: on a GPU; PARTS="reported ..." and MINUTES: what to train, and for how long; RECORD=1: in docs/results/
SIZE    ?= cpu
MINUTES ?= 90
RECORD  ?=
convergence: build  ## ten times fewer epochs, shown: trains Deformable DETR and DETR, draws their curves; goes on where it was
	@'$(PYTHON)' -m benchmarks.convergence --size $(SIZE) --minutes $(MINUTES) $(if $(PARTS),--parts $(PARTS)) $(if $(RECORD),--record)

# PARTS="op ..."; empty: all of them
PARTS ?=
gpu-report: $(INSTALLED)  ## what needs a GPU, in parts of at most 8 minutes: PARTS="op train sides memory stages tests sanitizer convergence"; PUBLISHED=a checkout of the published code; offline with PYTHON=python3
	@'$(PYTHON)' -m benchmarks.gpu_report $(if $(PARTS),--parts $(PARTS)) $(if $(PUBLISHED),--published $(PUBLISHED))

clean:  ## remove the environment, what was built, caches; runs/ and data/ stay
	rm -rf .venv build dist $(LIBRARY) *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
