# make run     set up, and train the default recipe on all GPUs, or on 2 CPU ranks without
# make test    set up, and run lint, types and tests
# make test-lowest  install the oldest versions that pyproject.toml allows into build/lowest, and
#                   there run unit tests, a training with each strategy, and the tests that every
#                   strategy takes the same steps
# make bench   set up, and run all benchmarks in a short form
# make format  bring the code into shape

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready

# What tests need of Debian: a data set, Slurm for a cluster of virtual nodes, ssh servers and networks
# for machines in namespaces, strace to count what is opened, and a browser to look at pages.
PACKAGES := dataset-fashion-mnist slurmctld slurmd slurm-client munge \
	dropbear-bin iproute2 openssh-client strace chromium chromium-driver

.PHONY: run test test-lowest lint bench format packages clean

run: $(READY)
	$(VENV)/bin/launcher run recipes/digits.py

test: packages lint
	$(VENV)/bin/pytest

lint: $(READY)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

LOWEST := build/lowest
STRATEGIES := ddp fsdp zero1 zero2 zero3
UNIT_FILES := accelerate_settings checkpoints finders_batch finders_loader finders_lr finders_noise \
	fingerprint loading loop machine order overrides plan post_mortem rundir schedules stages \
	strategy world
UNIT := $(or $(wildcard tests/unit),$(UNIT_FILES:%=tests/test_%.py))
SAME_STEPS := tests/test_matrix.py tests/test_features.py

test-lowest: $(LOWEST)/.ready
	$(LOWEST)/bin/pytest $(UNIT)
	cd $(LOWEST) && for strategy in $(STRATEGIES); do \
		bin/launcher run digits -n 2 strategy=$$strategy epochs=2 || exit; done
	$(LOWEST)/bin/pytest $(SAME_STEPS)

bench: packages $(READY)
	$(VENV)/bin/python benchmarks/quick.py

format: $(READY)
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

# The versions that the tests are run with; torch exactly, so that one wheel serves all.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

$(LOWEST)/.ready: pyproject.toml constraints-lowest.txt
	rm -rf $(LOWEST)
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --constraint constraints-lowest.txt torch
	$(LOWEST)/bin/python -m pip install --quiet --constraint constraints-lowest.txt \
		--editable '.[dev]'
	touch $@

# Where they cannot be installed, the tests that need them are skipped and say so.
APT := $(if $(filter-out 0,$(shell id -u)),sudo -n )apt-get -qq
packages:
	@dpkg -s $(PACKAGES) > /dev/null 2>&1 \
		|| { $(APT) update && $(APT) install --no-install-recommends $(PACKAGES) > /dev/null; } \
		|| echo "apt-get cannot install $(PACKAGES): tests that need it are skipped"

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
