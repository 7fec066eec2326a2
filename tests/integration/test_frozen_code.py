"""Runs of a project that is edited: what they import, and what a resumption says about it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml
from support import Commands

RECIPE = """
from dataclasses import replace
from pathlib import Path

from launcher import Recipe
from launcher.recipes.digits import build_model, digits

def model():
    from frozen_model import VERSION
    beside = Path(__file__).parent / "data/text"
    print(f"imported {VERSION}, {Path('data/text').read_text()}, {beside.read_text()}")
    return build_model()

def edited() -> Recipe:
    return replace(digits(), name="edited", model=model, device="cpu", num_workers=0)
"""

SETTINGS = ("-n", "1", "steps=3")


@pytest.fixture
def project(run: Commands) -> Path:
    """Make the working folder a repository with a recipe, its model and ignored data."""
    (run.folder / "edited.py").write_text(RECIPE)
    (run.folder / "frozen_model.py").write_text("VERSION = 'old'\n")
    (run.folder / ".gitignore").write_text("data/\n")
    (run.folder / "data").mkdir()
    (run.folder / "data/text").write_text("text")
    subprocess.run(["git", "init", "-q", run.folder], check=True)
    return run.folder


def edit(project: Path, version: str) -> None:
    """Write another model into the project."""
    (project / "frozen_model.py").write_text(f"VERSION = '{version}'\n")


def test_changed_code_is_resumed_on_purpose(run: Commands, project: Path) -> None:
    """`launcher resume` names a changed file, which only a function imports, and asks first."""
    done = run("launcher", "run", "edited.py", *SETTINGS, "--out", "out")
    assert done.exit_code == 0, done.stderr
    assert "imported old, text, text" in (project / "out/logs/rank0.log").read_text()
    code = yaml.safe_load((project / "out/run.yaml").read_text())["code"]
    assert (code["project"], code["copy"]) == (str(project), None)
    assert list(code["files"]) == ["edited.py", "frozen_model.py"]
    edit(project, "new")
    done = run("launcher", "resume", "out", "steps=5")
    assert done.exit_code == 2, done.stdout
    assert "frozen_model.py (1 of the recipe's 2 files)" in done.stderr
    assert "--allow-code-change" in done.stderr
    done = run("launcher", "resume", "out", "steps=5", "--allow-code-change")
    assert done.exit_code == 0, done.stderr
    assert "frozen_model.py (1 of the recipe's 2 files)" in done.stdout
    assert "imported new, text, text" in (project / "out/logs/rank0.log").read_text()
    done = run("launcher", "resume", "out", "steps=7")
    assert done.exit_code == 0, done.stderr


def test_several_launchers_import_one_copy(run: Commands, project: Path, free_port: int) -> None:
    """A run of two launchers copies its project, and keeps the copy when it is resumed."""
    nodes = ("--nodes", "2", "--rendezvous", f"localhost:{free_port}")
    start = ("launcher", "run", "edited.py", *SETTINGS, *nodes, "--out", "out")
    launchers = [run.start(*start), run.start(*start)]
    for launcher in launchers:
        _, error = launcher.communicate(timeout=120)
        assert launcher.returncode == 0, error
    assert json.loads((project / "out/code.json").read_text())["project"] == str(project)
    edit(project, "new")
    done = run("launcher", "resume", "out", "steps=5", "-n", "2")
    assert done.exit_code == 0, done.stderr
    assert "frozen_model.py (1 of the recipe's 2 files)" in done.stdout
    for rank in range(2):
        log = (project / f"out/logs/rank{rank}.log").read_text()
        assert log.count("imported old, text, text") == 2
        assert "imported new" not in log
    record = yaml.safe_load((project / "out/run.yaml").read_text())
    assert record["recipe"] == "./code/edited.py:edited"
    assert run("launcher", "evaluate", "out").exit_code == 0


@pytest.mark.parametrize("options", [("--nodes", "2"), ("--hosts", "a,b")])
def test_a_large_project_is_refused_before_anything(
    run: Commands, project: Path, options: tuple[str, ...]
) -> None:
    """A project over --code-limit gives exit code 2 before launchers meet or a folder is made."""
    with (project / "weights.bin").open("wb") as file:
        file.truncate(2 * 10**6)
    if options[0] == "--nodes":
        options = (*options, "--rendezvous", "localhost")
    start = ("launcher", "run", "edited.py", *SETTINGS, "--out", "out", *options)
    done = run(*start, "--code-limit", "1")
    assert done.exit_code == 2, done.stdout
    assert "weights.bin (2.0 MB)" in done.stderr
    assert "--no-freeze" in done.stderr
    assert not (project / "out").exists()
