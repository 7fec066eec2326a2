"""Ctrl-C while a command is being imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import launcher

INTERRUPTS = """
import os
import signal
import sys


class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["INTERRUPTED_AT"]:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)


sys.meta_path.insert(0, Finder())
"""
"""A sitecustomize module that interrupts the import of a module."""


@pytest.mark.parametrize("module", ["launcher.cli", "click", "launcher.cli.recipes"])
@pytest.mark.parametrize("main", [Path(launcher.__file__).parent / "__main__.py", "-mlauncher"])
def test_an_import_is_interrupted(tmp_path: Path, main: str | Path, module: str) -> None:
    """Whatever is being imported, the command ends with one line and the usual exit code."""
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTS)
    done = subprocess.run(
        [sys.executable, str(main), "recipes"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "INTERRUPTED_AT": module},
        check=False,
    )
    assert done.returncode == 130
    assert done.stderr.split() == ["launcher:", "stopped", "by", "Ctrl-C"]
    assert done.stdout == ""
