"""Command line: its output, the mistakes that it refuses, and the packages that it imports."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from support import ROOT, Commands, read_lines

from launcher.cli import _COMMANDS, group
from launcher.recipe.catalogue import settings

DIGITS = str(ROOT / "recipes/digits.py")
HEAVY = ("torch", "numpy", "accelerate", "deepspeed", "plotly", "rich", "sklearn")


def test_the_help_names_the_commands(run: Commands) -> None:
    """`launcher --help` lists the commands, and their help has examples and names the settings."""
    done = run("launcher", "--help")
    assert done.exit_code == 0
    for command in ("plan", "run", "recipes"):
        assert f"\n  {command} " in done.stdout
    for command in ("plan", "run"):
        text = run("launcher", command, "--help").stdout
        assert f"launcher {command} digits" in text
        assert "launcher settings" in text
        assert "lr_batch_size" not in text
        listed = run("launcher", command, "--help-settings").stdout
        assert listed == run("launcher", "settings").stdout
        assert settings()["lr_batch_size"].sentence in listed


def test_a_plan_shows_its_arithmetic(run: Commands) -> None:
    """`launcher plan` prints each derived number with its arithmetic and the source of settings."""
    done = run(
        "launcher", "plan", "digits", "--nodes", "2", "-n", "4", "device=cuda",
        "micro_batch_size=16", "batch_size=1024",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    for text in (
        "1024 = 2 nodes x 4 GPUs x 16 samples x 8 accumulation steps",
        "0.8 = 0.1 x 1024 / 128, linear",
        "starts at 0.08, peaks at step",
        "40 = 20 epochs x 2 steps; 2 = ceil(1,437 samples / 1,024)",
        "command line: device=cuda, micro_batch_size=16, batch_size=1024",
        "Planned for 4 GPUs per node; this machine has",
        "BatchNorm",
        "pinned (copies to the GPU overlap with computation)",
    ):
        assert text in done.stdout


def test_a_plan_as_json(run: Commands) -> None:
    """`launcher plan --json` prints one JSON value and nothing else."""
    done = run("launcher", "plan", DIGITS, "-n", "3", "--json", "epochs=2")
    plan = json.loads(done.stdout)
    assert plan["samples_per_rank"] == [43, 43, 42]
    assert plan["total_steps"] == 24
    assert plan["sources"]["epochs"] == "command line"
    assert done.stderr == ""


def test_options_and_values_in_any_order(run: Commands) -> None:
    """Options may precede, separate or follow the settings."""
    first = run("launcher", "plan", "--json", "-n", "2", "digits", "lr=0.2", "seed=1").stdout
    second = run("launcher", "plan", "digits", "lr=0.2", "-n", "2", "seed=1", "--json").stdout
    assert first == second


def test_recipes_are_listed(run: Commands) -> None:
    """`launcher recipes` lists the recipes of the folder first, then those of the package."""
    done = run("launcher", "recipes")
    assert re.search(r"^digits +Handwritten digits", done.stdout, re.MULTILINE)
    (run.folder / "recipes").mkdir()
    (run.folder / "recipes/mine.py").write_text(
        'from launcher import Recipe\n\ndef mine() -> Recipe:\n    """Mine."""\n\n'
        'def wide() -> Recipe:\n    """Wider."""\n'
    )
    lines = run("launcher", "recipes").stdout.splitlines()
    assert [line.split() for line in lines[:2]] == [["mine", "Mine."], ["mine:wide", "Wider."]]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("digitz", "There is no recipe 'digitz'"),
        ("digitz", "Did you mean digits?"),
        ("recipes/none.py", "There is no file 'recipes/none.py'"),
        ("no such thing!", "'no such thing!'"),
        (f"{DIGITS}:wide", "has no function 'wide'"),
        ("broken.py", "Cannot import"),
        ("broken.py", "ZeroDivisionError: division by zero"),
        ("broken.py", "line 2)"),
        ("needs.py", "Install 'not_installed_anywhere' into this environment."),
        ("syntax.py", "SyntaxError"),
        ("empty.py", "empty.py:FUNCTION"),
        ("several.py", "several.py:one"),
        ("other.py", "returned int, not a Recipe"),
        ("exits.py", "Cannot import"),
        ("nodata.py", "Cannot read the data of nodata: FileNotFoundError: no folder here (/"),
    ],
)
def test_a_recipe_that_cannot_be_loaded_is_refused(
    run: Commands, recipe: str, message: str
) -> None:
    """A recipe that cannot be loaded gives exit code 2 and a message without a traceback."""
    files = {
        "broken.py": "import launcher\ny = 1 / 0\n",
        "needs.py": "import launcher, not_installed_anywhere\n",
        "syntax.py": "def f(:\n",
        "empty.py": "import launcher\n",
        "several.py": "def one() -> 'Recipe': ...\ndef two() -> 'Recipe': ...\n",
        "other.py": "def other():\n    return 3\n",
        "nodata.py": (
            "from launcher import Recipe\n"
            "def data(): raise FileNotFoundError('no folder here')\n"
            "def nodata() -> Recipe:\n"
            "    return Recipe(name='nodata', model=print, data=data, loss=print, batch_size=8,\n"
            "                  lr=1, lr_batch_size=8, epochs=3)\n"
        ),
        "exits.py": "import launcher, sys\nsys.exit(3)\n",
    }  # fmt: skip
    for name, text in files.items():
        (run.folder / name).write_text(text)
    done = run("launcher", "plan", recipe)
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.startswith("launcher: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-n", "0"], "0 is not in the range x>=1"),
        (["-n", "two"], "'two' is not a valid integer"),
        (["batchsize=3"], "Did you mean batch_size"),
        (["batch_size=1"], "shared by 2 ranks"),
        (["batch_size=5000"], "there are 1,437 training samples"),
        (["device=cuda", "-n", "99"], "has no GPU|99 GPUs per node were asked for"),
        (["--config", "bad.yaml"], "bad.yaml, line 2: not YAML"),
        (["--out", "there"], "there exists already"),
        (["--out", "/proc/no/run"], "the run folder /proc/no/run: "),
        (["--out", "bad.yaml/run"], "bad.yaml exists already|Not a directory"),
        (["--outt", "x"], "Did you mean --out?"),
    ],
)
def test_bad_arguments_of_run(run: Commands, arguments: list[str], message: str) -> None:
    """`launcher run` refuses bad arguments with exit code 2 and writes nothing."""
    (run.folder / "there").mkdir()
    (run.folder / "bad.yaml").write_text("lr: [1\nseed: 2\n")
    done = run("launcher", "run", "digits", *arguments)
    assert done.exit_code == 2
    assert any(alternative in done.stderr for alternative in message.split("|")), done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in run.folder.iterdir()) == ["bad.yaml", "there"]


def test_a_run_writes_its_folder(run: Commands) -> None:
    """A run folder has run.yaml, metrics, result, logs and weights, for its owner alone."""
    (run.folder / "mine.yaml").write_text("lr: 2e-1\n")
    done = run("launcher", "run", "digits", "epochs=2", "--config", "mine.yaml", "-n", "1")
    assert done.exit_code == 0, done.stderr
    (folder,) = (run.folder / "runs").iterdir()
    assert f"run folder: runs/{folder.name}" in done.stdout
    assert done.stdout.count("held-out: accuracy") == 2, "after the first epoch, and at the end"
    assert folder.stat().st_mode & 0o777 == 0o700
    record = yaml.safe_load((folder / "run.yaml").read_text())
    assert record["recipe"] == f"{DIGITS}:digits"
    assert record["overrides"] == {"lr": 0.2, "epochs": 2}
    assert record["plan"]["lr"] == 0.2
    assert {"python", "torch", "accelerate"} <= record["versions"].keys()
    assert record["git"] is None or {"commit", "branch", "changed_files"} == record["git"].keys()
    rows = read_lines(folder / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 25))
    assert steps[-1]["samples"] == 2 * 1437
    for key in ("lr", "grad_norm", "samples_per_second", "data_wait_seconds"):
        assert all(row[key] >= 0 for row in steps)
    result = json.loads((folder / "result.json").read_text())
    assert result["evaluation"] == [row for row in rows if "evaluation" in row][-1]["evaluation"]
    assert result["steps"] == 24
    assert "step 24/24" in (folder / "logs/rank0.log").read_text()
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["recipes"],
        ["plan", "digits"],
        ["plan", "digits", "--json"],
        ["run", "--help"],
        ["run", "gpt", "--help"],
        ["settings"],
        ["status"],
    ],
)
def test_planning_imports_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    """Commands that train nothing import no torch, numpy, accelerate, deepspeed or rich."""
    assert imported(["-m", "launcher", *arguments], tmp_path).isdisjoint(HEAVY)


@pytest.mark.parametrize(
    "statement",
    [
        "from launcher import Recipe, make_plan, one_cycle",
        "from launcher.recipes.digits import digits, build_model; digits()",
    ],
)
def test_importing_imports_nothing_heavy(statement: str, tmp_path: Path) -> None:
    """Importing the package or a recipe imports no torch, numpy, accelerate, deepspeed or rich."""
    assert imported(["-c", statement], tmp_path).isdisjoint(HEAVY)


def imported(arguments: list[str], folder: Path) -> set[str]:
    """Return the top-level packages that a Python process imports."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        check=True,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert len(lines) > 50
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


def test_data_that_start_threads_are_counted(run: Commands) -> None:
    """A run whose data starts threads while it is counted does not hang its ranks."""
    (run.folder / "parallel.py").write_text(
        "from dataclasses import replace\n"
        "from launcher import Data, Recipe\n"
        "from launcher.recipes.digits import digits\n\n"
        "def parallel() -> Recipe:\n"
        "    return replace(digits(), name='parallel', data=data, train_samples=None, epochs=1)\n\n"
        "def data():\n"
        "    import torch\n"
        "    torch.set_num_threads(2)\n"
        "    assert torch.rand(3_000_000).mul(2).exp().sum() > 0\n"
        "    return digits().data()\n"
    )
    done = run("launcher", "run", "parallel.py", "-n", "1", "device=cpu", "--out", "out")
    assert done.exit_code == 0, done.stderr
    assert "1,437 training samples" in " ".join(done.stdout.split())


@pytest.mark.parametrize("name", [*_COMMANDS, "find lr", "find batch", "find strategy"])
def test_help_has_examples(name: str) -> None:
    """The help of each command has an example, in lines of at most 100 columns."""
    done = CliRunner().invoke(group, [*name.split(), "--help"], prog_name="launcher")
    assert done.exit_code == 0
    assert f"\n  launcher {name}" in done.output.partition("Options:")[0]
    assert max(map(len, done.output.splitlines())) <= 100
