"""Every command and every file of the README is run, in its order, in a copy of the project."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from local import ClusterError, make_cluster
from support import ROOT, Commands

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TEXTS = [
    ROOT / name for name in ("README.md", "CONTRIBUTING.md", "recipes/README.md", "slurm/README.md")
]


def blocks() -> list[tuple[str, str]]:
    """Return (language, text) of each block of the README."""
    return BLOCK.findall((ROOT / "README.md").read_text())


def commands() -> list[str]:
    """Return the README's commands in order."""
    return [line for language, text in blocks() if language == "sh" for line in text.splitlines()]


@pytest.fixture(scope="module")
def cluster() -> Iterator[bool]:
    """Start a cluster for the commands that want one, where Slurm is installed."""
    try:
        made = make_cluster(2, cpus=16)
    except ClusterError:
        yield False
        return
    with pytest.MonkeyPatch.context() as patch:
        for name, value in made.env.items():
            patch.setenv(name, value)
        yield True
        made.bring_down()


@pytest.fixture(scope="module")
def copy(module_run: Commands) -> Commands:
    """Return a copy of the project that has the files which the README shows."""
    for name in ("recipes", "Makefile", "pyproject.toml", "constraints.txt"):
        source, target = ROOT / name, module_run.folder / name
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, target)
    for language, text in blocks():
        named = re.match(r"# (\w+\.(py|yaml))\n", text)
        if named is not None:
            assert language in ("python", "yaml")
            (module_run.folder / named[1]).write_text(text)
    return module_run


@pytest.mark.parametrize("command", commands())
def test_commands_run(copy: Commands, cluster: bool, command: str) -> None:
    """Each command ends with exit code 0; training ones leave a run folder."""
    if not cluster and re.match("launcher (submit|status|logs|cancel)", command):
        pytest.skip("needs Debian's packages slurmctld, slurmd, slurm-client and munge")
    if command.startswith("make "):
        # The environment is the one that runs this test.
        command += f" VENV={sys.prefix} -o {sys.prefix}/.ready"
    done = copy("bash", "-c", command, env={"XDG_CACHE_HOME": str(copy.folder / "cache")})
    assert done.exit_code == 0, done.stdout + done.stderr
    trains = r"(launcher|make) run\b|^launcher resume|recipes/digits.py epochs|-m launcher.recipes"
    if re.search(trains, command):
        found = re.search(r"run folder: (\S+)", done.stdout)
        assert found is not None
        assert (copy.folder / found[1] / "result.json").is_file()


def test_the_plan_shown_is_the_plan_printed(copy: Commands) -> None:
    """The lines of a plan in the README are what its command prints."""
    shown = next(text for language, text in blocks() if not language and "  ranks  " in text)
    command = next(line for line in commands() if "--nodes" in line)
    printed = copy("bash", "-c", command).stdout
    for line in shown.splitlines():
        assert line in printed.splitlines()


def test_the_default_recipe_learns(copy: Commands) -> None:
    """Digits reaches the promised accuracy on data that it has not seen."""
    done = copy("launcher", "run", "digits", "-n", "2", "seed=1")
    accuracy = float(re.findall(r"held-out: accuracy (\S+)", done.stdout)[-1])
    assert accuracy >= 0.97


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.name)
def test_links_lead_somewhere(text: Path) -> None:
    """Relative links of the documents name files that exist."""
    for link in re.findall(r"\]\(([^)#]+)\)", text.read_text()):
        if "://" not in link:
            assert (text.parent / link).exists(), link


def test_make_test_is_what_it_says() -> None:
    """`make test` runs lint, formatting, types and tests, in this order."""
    shown = subprocess.run(
        ["make", "-n", "test", f"VENV={sys.prefix}", "-o", f"{sys.prefix}/.ready"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    order = [shown.index(word) for word in ("ruff check", "ruff format --check", "mypy", "pytest")]
    assert order == sorted(order)
