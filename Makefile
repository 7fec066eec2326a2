# make run     set up, and train the default recipe on all GPUs, or on 2 CPU ranks without
# make test    set up, and run lint, types and tests
# make docs    set up, and build the documentation into build/docs
# make bench   set up, and run all benchmarks in a short form
# make format  bring the code into shape

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready

# What tests need of Debian: a data set, Slurm for a cluster of virtual nodes, ssh servers and networks
# for machines in namespaces, strace to count what is opened, and a browser to look at pages.
PACKAGES := dataset-fashion-mnist slurmctld slurmd slurm-client munge \
	dropbear-bin iproute2 openssh-client strace chromium chromium-driver

.PHONY: run test lint docs bench format packages clean

run: $(READY)
	$(VENV)/bin/launcher run recipes/digits.py

test: packages lint
	$(VENV)/bin/pytest

lint: $(READY)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

docs: $(READY)
	$(VENV)/bin/python docs/generate.py --check
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet

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

# Where they cannot be installed, the tests that need them are skipped and say so.
APT := $(if $(filter-out 0,$(shell id -u)),sudo -n )apt-get -qq
packages:
	@dpkg -s $(PACKAGES) > /dev/null 2>&1 \
		|| { $(APT) update && $(APT) install --no-install-recommends $(PACKAGES) > /dev/null; } \
		|| echo "apt-get cannot install $(PACKAGES): tests that need it are skipped"

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
