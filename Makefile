# make run          set up, and train the default recipe on all GPUs, or on 2 CPU ranks without GPUs
# make test         set up, and run the linter, the type checker and all tests
# make test-unit    set up, and run the tests that start no process
# make test-gpu     set up, and run the tests that need a GPU; all others hide the GPUs from torch
# make fuzz         set up, and give random input to all commands for about an hour
# make test-lowest  set up the oldest versions that pyproject.toml allows in build/lowest, and run
#                   there the unit tests, and a training under each strategy, which are compared
# make test-deps    install the Debian packages that some tests need (as root)
# make docs         set up, and build the documentation into build/docs
# make bench        set up, and run all benchmarks in a short form
# make format       format the code

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready

# Debian packages that some tests need: a data set, Slurm with accounting for a cluster of virtual
# nodes, ssh servers and networks for hosts in namespaces, Prometheus, strace to count opened files,
# and a browser to look at pages. Debian's kubectl (kubernetes-client) is too old for the tests.
PACKAGES := dataset-fashion-mnist slurmctld slurmd slurm-client munge \
	slurmdbd mariadb-server-core mariadb-client-core \
	dropbear-bin iproute2 openssh-client strace chromium chromium-driver \
	prometheus prometheus-node-exporter

.PHONY: run test test-unit test-gpu fuzz test-lowest test-deps lint docs bench format packages clean

run: $(READY)
	$(VENV)/bin/launcher run recipes/digits.py

test: packages lint
	$(VENV)/bin/pytest

test-unit: $(READY)
	$(VENV)/bin/pytest tests/unit

test-gpu: $(READY)
	LAUNCHER_GPU_TESTS=1 $(VENV)/bin/pytest -n0 -m gpu tests/gpu

fuzz: $(READY)
	LAUNCHER_FUZZ_PROFILE=fuzz $(VENV)/bin/pytest tests/fuzz

lint: $(READY)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

docs: $(READY)
	$(VENV)/bin/python docs/generate.py --check
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet

LOWEST := build/lowest

test-lowest: $(LOWEST)/.ready
	$(LOWEST)/bin/pytest tests/unit
	cd $(LOWEST) && bin/launcher prove digits --worlds 1,2 \
		--strategies ddp,fsdp,zero1,zero2,zero3 --steps 24

bench: packages $(READY)
	$(VENV)/bin/python benchmarks/quick.py

format: $(READY)
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

# The versions that the tests run with. torch is pinned exactly, so that pip takes one wheel.
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

test-deps:
	apt-get -qq update
	apt-get -qq install --no-install-recommends $(PACKAGES) > /dev/null

# Root, as in a container, gets the packages. Other users see the command that installs them.
packages:
	@if ! dpkg -s $(PACKAGES) > /dev/null 2>&1; then \
		if [ "$$(id -u)" = 0 ]; then \
			$(MAKE) --no-print-directory test-deps \
				|| echo "apt-get cannot install $(PACKAGES): tests that need them are skipped"; \
		else \
			for package in $(PACKAGES); do \
				dpkg -s $$package > /dev/null 2>&1 || missing="$$missing $$package"; \
			done; \
			echo "Tests that need$$missing are skipped. To run them: sudo make test-deps"; \
		fi; \
	fi

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
