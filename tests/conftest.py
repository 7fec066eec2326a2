"""Fixtures: a folder to run commands in, and a watch for what tests leave behind."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import Commands, fail_on_leftovers


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let golden files be written anew, when they are meant to change."""
    parser.addoption("--update-golden", action="store_true", help="Write tests/golden anew.")


_LONGEST = (
    "readme",
    "benchmarks",
    "slurm",
    "searches",
    "kill_resume",
    "recipes",
    "features",
    "matrix",
)
"""Files that take minutes: they come first, so that no worker has one of them left at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have long files first."""
    order = {f"test_{name}": number for number, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Commands]:
    """Run commands in an empty folder; fail where they leave a process behind."""
    mark = f"{os.getpid()}-{tmp_path}"
    yield Commands(tmp_path, mark)
    fail_on_leftovers(mark)


@pytest.fixture(scope="module")
def module_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """Run commands in a folder that the tests of a module share."""
    folder = tmp_path_factory.mktemp("module")
    mark = f"{os.getpid()}-{folder}"
    yield Commands(folder, mark)
    fail_on_leftovers(mark)


@pytest.fixture
def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    """Fail a test that changes the environment or the folder of the test process."""
    before, folder = _environment(), Path.cwd()
    yield
    assert _environment() == before, "the test changed the environment"
    assert Path.cwd() == folder, "the test changed the working folder"


def _environment() -> dict[str, str]:
    """Return the environment less what pytest and the import of torch itself put there."""
    theirs = ("PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR")
    return {name: value for name, value in os.environ.items() if name not in theirs}
