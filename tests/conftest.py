"""Fixtures that run commands in a folder, and that detect what tests leave behind."""

from __future__ import annotations

import compileall
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ROOT, Commands, fail_on_leftovers

if "LAUNCHER_GPU_TESTS" not in os.environ:
    # Tests that are not marked `gpu` are the same on every machine. torch is imported after this.
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}

# Tests run beside each other, so that a thread which spins keeps another from its core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that rewrites the golden files."""
    parser.addoption("--update-golden", action="store_true", help="Rewrite tests/golden.")


def pytest_configure(config: pytest.Config) -> None:
    """Compile the package once, before many tests start new interpreters.

    Where PYTHONDONTWRITEBYTECODE is set, each of them would compile it again.
    """
    if not hasattr(config, "workerinput"):
        for name in ("launcher", "recipes"):
            compileall.compile_dir(ROOT / name, quiet=2)


_LONGEST = (
    "docs",
    "readme",
    "benchmarks",
    "slurm",
    "searches",
    "kill_resume",
    "recipes",
    "features",
    "matrix",
)
"""Test files that take minutes; they run first, so that the workers finish at similar times."""


def pytest_xdist_auto_num_workers() -> int:
    """Return one worker more than there are cores, because many tests wait for processes."""
    return min(len(os.sched_getaffinity(0)) + 1, 8)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move the tests of long files to the front."""
    order = {f"test_{name}": number for number, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Commands]:
    """Run commands in an empty folder; fail if they leave a process behind."""
    mark = f"{os.getpid()}-{tmp_path}"
    yield Commands(tmp_path, mark)
    fail_on_leftovers(mark)


@pytest.fixture(scope="module")
def module_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """Run commands in a folder that the tests of a module share; fail on leftover processes."""
    folder = tmp_path_factory.mktemp("module")
    mark = f"{os.getpid()}-{folder}"
    yield Commands(folder, mark)
    fail_on_leftovers(mark)


@pytest.fixture
def free_port() -> int:
    """Return a port on loopback that no process listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    """Fail a test that changes the environment or the working folder of the test process."""
    before, folder = _environment(), Path.cwd()
    yield
    assert _environment() == before, "the test changed the environment"
    assert Path.cwd() == folder, "the test changed the working folder"


def _environment() -> dict[str, str]:
    """Return the environment without what pytest and the imports of torch and sklearn set."""
    of_torch = ("PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR")
    ignored = (*of_torch, "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK")
    return {name: value for name, value in os.environ.items() if name not in ignored}
