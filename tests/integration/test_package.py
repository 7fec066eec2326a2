"""Wheel and source distribution: their contents, and their use from another project."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import BytesParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from support import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel and return its path."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, ROOT],
        check=True,
        capture_output=True,
    )
    (built,) = folder.glob("gpu_launcher-*.whl")
    return built


def test_the_wheel_holds_one_package(wheel: Path) -> None:
    """The wheel has every module of launcher, the recipes and the console command, no more."""
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"launcher"}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "launcher").rglob("*.py")}
    assert modules | {"launcher/py.typed"} <= set(names)
    shipped = {path.name for path in (ROOT / "recipes").glob("*.py")}
    folder = "launcher/recipes/"
    assert shipped == {name[len(folder) :] for name in names if re.match(rf"{folder}.*\.py", name)}
    entry_points = next(name for name in names if name.endswith("entry_points.txt"))
    assert b"launcher = launcher.__main__:start" in zipfile.ZipFile(wheel).read(entry_points)


def test_the_oldest_allowed_versions_are_tested(wheel: Path) -> None:
    """constraints-lowest.txt pins the floor of each requirement of the package and of `.[dev]`."""
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    requirements = BytesParser().parsebytes(archive.read(name)).get_all("Requires-Dist", [])
    extras = ("", "dev", "docs", "finetune", "metrics", "plots", "recipes")
    required = [
        item
        for item in map(Requirement, requirements)
        if any(item.marker is None or item.marker.evaluate({"extra": extra}) for extra in extras)
        and item.name != "gpu-launcher"
    ]
    assert {clause.operator for item in required for clause in item.specifier} == {">="}
    floors = {(canonicalize_name(item.name), floor(item, ">=")) for item in required}
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert floors == {(canonicalize_name(pin.name), floor(pin, "==")) for pin in pins}


def floor(requirement: Requirement, operator: str) -> Version:
    """Return the version of a requirement that has one clause, with this operator."""
    (clause,) = requirement.specifier
    assert clause.operator == operator
    return Version(clause.version)


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into a folder and return the folder."""
    folder = tmp_path_factory.mktemp("site")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, wheel],
        check=True,
        capture_output=True,
    )
    return folder


@pytest.mark.parametrize("name", ["own_loop.py", "with_accelerate.py"])
def test_a_recipes_parts_work_in_another_loop(site: Path, tmp_path: Path, name: str) -> None:
    """The loops in docs/recipes.md learn in a project that has the wheel."""
    text = (ROOT / "docs/recipes.md").read_text()
    (loop,) = re.findall(rf'```python title="{name}"\n(.*?)```', text, re.DOTALL)
    assert len(loop.splitlines()) <= 34
    (tmp_path / name).write_text(loop)
    done = subprocess.run(
        [sys.executable, name],
        cwd=tmp_path,
        env={"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    loss = re.search(r"loss (\d+\.\d+)", done.stdout)
    assert loss is not None
    assert float(loss[1]) < 2.25


def test_the_source_distribution_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    """The source distribution has no links and builds a wheel with the same files."""
    subprocess.run(
        [sys.executable, "-m", "build", "--outdir", tmp_path, ROOT], check=True, capture_output=True
    )
    (built,) = tmp_path.glob("*.whl")
    (source,) = tmp_path.glob("*.tar.gz")
    assert zipfile.ZipFile(built).namelist() == zipfile.ZipFile(wheel).namelist()
    with tarfile.open(source) as archive:
        assert not [member.name for member in archive if member.islnk() or member.issym()]


def run_python(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a project that has the wheel."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_wheel_works_elsewhere(site: Path, tmp_path: Path) -> None:
    """Another project imports the package and a recipe from the wheel, plans, and lists recipes."""
    script = (
        "import sys\n"
        "from dataclasses import replace\n"
        "import launcher, launcher.recipes.gpt\n"
        "from launcher import Recipe, make_plan, one_cycle, read_machine\n"
        "from launcher.recipes.digits import digits, build_model\n"
        "assert 'torch' not in sys.modules\n"
        "recipe = replace(digits(), schedule=one_cycle(div_factor=25))\n"
        "plan = make_plan(recipe, read_machine(), nproc_per_node=3)\n"
        "print(plan.samples_per_rank, launcher.__file__, launcher.recipes.gpt.__file__)\n"
        "from launcher.cli import main\n"
        "main(['recipes'])\n"
    )
    done = run_python(site, tmp_path, "-c", script)
    assert done.returncode == 0, done.stderr
    paths = f"{site}/launcher/__init__.py {site}/launcher/recipes/gpt.py"
    assert f"(43, 43, 42) {paths}" in done.stdout
    assert re.search(r"^digits +Handwritten digits", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("files", [["mine.py"], ["mine.py", "__init__.py"]])
def test_a_project_has_recipes_of_its_own(site: Path, tmp_path: Path, files: list[str]) -> None:
    """A project may have a folder or a package `recipes`, beside the recipes of the wheel."""
    for name in files:
        (tmp_path / "recipes").mkdir(exist_ok=True)
        (tmp_path / "recipes" / name).write_text("from launcher.recipes.digits import digits\n")
    (tmp_path / "other.py").write_text(
        "from launcher import Recipe\n"
        "from recipes.mine import digits\n"
        "def other() -> Recipe:\n"
        "    return digits()\n"
    )
    for arguments in (
        ("-m", "launcher", "plan", "other"),
        ("-m", "launcher", "plan", "recipes.mine:digits"),
        ("-m", "recipes.mine"),
    ):
        done = run_python(site, tmp_path, *arguments)
        assert done.returncode == 0, done.stderr


def test_a_run_of_an_earlier_installation_finds_its_recipe(site: Path, tmp_path: Path) -> None:
    """A recipe that run.yaml names by the former package `recipes` is found in launcher.recipes."""
    former = f"{site}/recipes/digits.py:digits"
    done = run_python(site, tmp_path, "-m", "launcher", "plan", former)
    assert done.returncode == 0, done.stderr
    assert f"{site}/launcher/recipes/digits.py:digits" in done.stdout


PROJECT = """
from pathlib import Path

import launcher
from launcher import Data, Failure, History, Plan, Recipe, RunResult
from launcher.recipes.digits import build_data, build_model, digits


def mine(*, width: int = 64) -> Recipe:
    return Recipe(
        name="mine",
        model=build_model,
        data=build_data,
        loss=lambda outputs, batch: (outputs.sum(), len(batch)),
        schedule=launcher.warmup(launcher.cosine(), fraction=0.1),
        optimizer=launcher.adamw(weight_decay=0.1),
        batch_size=width,
        lr=0.1,
        lr_batch_size=64,
        steps=10,
    )


@launcher.schedule
def plateau(step: int, total_steps: int, *, at: float = 0.5) -> launcher.ScheduleValue:
    return launcher.ScheduleValue(1.0 if step < at * total_steps else 0.1)


def train(folder: Path) -> float:
    plan: Plan = launcher.plan(mine, nproc_per_node=2, nodes=2, width=8)
    try:
        result: RunResult = launcher.run(mine, nproc_per_node=2, out=folder, lr=0.1)
    except launcher.RunFailedError as error:
        failure: Failure = error.failure
        raise SystemExit(f"rank {failure.rank + 1}: {failure.message.upper()}") from error
    result = launcher.resume(result.run_dir.path, nproc_per_node=plan.world_size)
    history: History = result.history
    return history.plan.lr + result.metrics["loss"] + history.steps["loss"][-1]


data: Data = build_data()
recipe: Recipe = digits()
wrong: int = digits()
launcher.main(mine)
"""


def test_the_public_names_have_types(wheel: Path, tmp_path: Path) -> None:
    """A project that uses the wheel passes mypy --strict, apart from its one mistake."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "env"], cwd=tmp_path, check=True)
    (packages,) = (tmp_path / "env/lib").glob("python*/site-packages")
    zipfile.ZipFile(wheel).extractall(packages)
    (tmp_path / "mine.py").write_text(PROJECT)
    command = ("-m", "mypy", "--strict", "--python-executable", "env/bin/python", "mine.py")
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert 'expression has type "Recipe"' in done.stdout, done.stdout
    assert "Found 1 error" in done.stdout, done.stdout
