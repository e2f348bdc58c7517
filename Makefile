# Everything runs in .venv, which is made on first use. PYTHON=/path/to/python uses an environment of yours as it is.
VENV := .venv
ARGS ?=

ifeq ($(origin PYTHON),undefined)
PYTHON := $(VENV)/bin/python
READY = $(VENV)/.ready-$(1)
endif

# What each environment holds. Each contains the ones before it, so that no target undoes another's work.
EXTRAS_run := train
EXTRAS_test := train,test
EXTRAS_dev := train,test,dev
EXTRAS_docs := docs
CONTAINS_test := run
CONTAINS_dev := run test

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-gpu check style bench docs clean

help:
	@echo "make demo       a small model that sleeps, on a CPU"
	@echo "make test       the tests (ARGS='-k padding' goes to pytest)"
	@echo "make test-slow  the tests that take minutes"
	@echo "make test-gpu   the tests that need a CUDA device"
	@echo "make check      formatting, lint, types and the house rules; changes nothing"
	@echo "make style      format and fix what can be fixed"
	@echo "make bench      speed and memory, into docs/results (ARGS='train wake' for some pages; minutes)"
	@echo "make docs       the documentation as web pages, in site/"
	@echo "make clean      remove what was built, .venv too"
	@echo "They run in .venv, made on first use; PYTHON=python uses the environment that is active instead."

demo: $(call READY,run)
	@$(PYTHON) examples/demo.py $(ARGS)

# Tiny models are fastest on one thread each; two workers fill two cores. Each begins with a half of the files, so that
# what the tests of a file share is made once.
test: $(call READY,test)
	@OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist worksteal $(ARGS)

test-slow: $(call READY,test)
	@OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 -m slow $(ARGS)

test-gpu: $(call READY,test)
	@$(PYTHON) -m pytest -m gpu $(ARGS)

check: $(call READY,dev)
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m ruff check --quiet .
	@$(PYTHON) -m mypy
	@OMP_NUM_THREADS=1 $(PYTHON) -m pytest tests/test_package.py

style: $(call READY,dev)
	@$(PYTHON) -m ruff check --fix --quiet .
	@$(PYTHON) -m ruff format .

# ARGS='train memory' makes some of the pages only.
bench: $(call READY,run)
	@for page in $(or $(ARGS),wake train memory operations compiled sessions pauses); do \
		OMP_NUM_THREADS=1 $(PYTHON) -m benchmarks.$$page || exit 1; \
	done

# Notebooks are run, unless they are as in the build before (.cache); bars and warnings are not for readers.
docs: $(call READY,docs)
	@NO_MKDOCS_2_WARNING=1 TQDM_DISABLE=1 PYTHONWARNINGS=ignore OMP_NUM_THREADS=1 \
		$(PYTHON) -m mkdocs build --quiet --strict
	@echo "built site/index.html"

clean:
	@rm -rf $(VENV) build dist site .cache *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

$(VENV)/.created:
	@echo "making $(VENV)"
	@python3 -m venv --clear $(VENV)
	@touch $@

$(VENV)/.ready-%: pyproject.toml constraints.txt | $(VENV)/.created
	@echo "installing sleepify[$(EXTRAS_$*)] into $(VENV) (once; a minute or more)"
	@$(PYTHON) -m pip install -qq --disable-pip-version-check --constraint constraints.txt --editable '.[$(EXTRAS_$*)]'
	@touch $@ $(addprefix $(VENV)/.ready-,$(CONTAINS_$*))
