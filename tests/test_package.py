"""The wheel: what is in it, and that it works from another folder."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, ROOT],
        check=True,
        capture_output=True,
    )
    (built,) = folder.glob("gpu_launcher-*.whl")
    return built


def test_the_wheel_holds_the_two_packages(wheel: Path) -> None:
    """Launcher and recipes are in it, and no tests, and it has the console command."""
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"launcher", "recipes"}
    for name in ("launcher/engine/loop.py", "launcher/py.typed", "recipes/digits.py"):
        assert name in names
    entry_points = next(name for name in names if name.endswith("entry_points.txt"))
    assert b"launcher = launcher.cli:main" in zipfile.ZipFile(wheel).read(entry_points)


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into a folder of its own."""
    made = tmp_path_factory.mktemp("site")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", made, wheel],
        check=True,
        capture_output=True,
    )
    return made


@pytest.mark.parametrize("name", ["own_loop.py", "with_accelerate.py"])
def test_a_recipes_parts_work_in_another_loop(site: Path, tmp_path: Path, name: str) -> None:
    """The loops in the README, in a project that has the wheel: they learn."""
    text = (ROOT / "README.md").read_text()
    (loop,) = re.findall(rf"```python\n# {name}\n(.*?)```", text, re.DOTALL)
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
    found = re.search(r"loss (\d+\.\d+)", done.stdout)
    assert found is not None
    assert float(found[1]) < 2.25


def test_the_wheel_works_elsewhere(site: Path, tmp_path: Path) -> None:
    """Another project imports a recipe and the package from it, plans, and lists recipes."""
    script = (
        "import sys\n"
        "from dataclasses import replace\n"
        "import launcher, recipes\n"
        "from launcher import Recipe, make_plan, one_cycle, read_machine\n"
        "from recipes.digits import digits, build_model\n"
        "assert 'torch' not in sys.modules\n"
        "recipe = replace(digits(), schedule=one_cycle(div_factor=25))\n"
        "plan = make_plan(recipe, read_machine(), nproc_per_node=3)\n"
        "print(plan.samples_per_rank, launcher.__file__, recipes.__file__)\n"
        "from launcher.cli import main\n"
        "main(['recipes'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"(43, 43, 42) {site}/launcher/__init__.py {site}/recipes" in done.stdout
    assert re.search(r"^digits +Handwritten digits", done.stdout, re.MULTILINE)
