"""One recipe file under python, torchrun and accelerate launch, without further settings."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support import ROOT, Commands, read_lines

from launcher.runs.run_record import read_run
from launcher.runs.rundir import RunDir

RECIPE = str(ROOT / "tests/recipes/worlds.py")
QUICKSTART = (ROOT / "docs/quickstart.md").read_text()
MODULE = "accelerate launch -m launcher.recipes.digits epochs=2"
DEEPSPEED = "deepspeed --num_accelerators 2 recipes/digits.py epochs=2"
"""Command of the quickstart that test_export.py runs, with a strategy of DeepSpeed."""

WAYS = {
    "python recipes/digits.py epochs=2": 1,
    "torchrun --nproc-per-node 2 recipes/digits.py epochs=2": 2,
    "accelerate launch --multi_gpu --num_processes 2 recipes/digits.py epochs=2": 2,
    "torchrun recipes/digits.py": 1,
    "accelerate launch recipes/digits.py": 1,
}
"""Numbers of ranks by commands, which are those of the quickstart and two for single ranks."""


def test_the_commands_of_the_quickstart_are_run() -> None:
    """The block of the quickstart with other launchers has the commands that are run here."""
    (block,) = re.findall(r"```sh\n(python recipes/digits\.py.*?)```", QUICKSTART, re.DOTALL)
    assert set(block.splitlines()) == {way for way in WAYS if "epochs" in way} | {MODULE, DEEPSPEED}


def words(way: str, port: int) -> list[str]:
    """Return a command with another recipe, on a port that other tests do not use."""
    command = way.replace(" epochs=2", "").replace("recipes/digits.py", RECIPE).split()
    if command[0] == "accelerate":
        command[-1:] = ["--main_process_port", str(port), RECIPE]
    elif command[0] == "torchrun":
        command[-1:] = ["--master-port", str(port), RECIPE]
    return command


@pytest.fixture(scope="module")
def alone(module_run: Commands) -> Path:
    """Return the folder of a run on one process."""
    done = module_run("launcher", "run", RECIPE, "-n", "1", "lr=0.05", "--out", "alone")
    assert done.exit_code == 0, done.stderr
    return module_run.folder / "alone"


@pytest.mark.parametrize(("way", "ranks"), WAYS.items())
def test_every_launcher_trains_the_same(
    module_run: Commands, alone: Path, free_port: int, way: str, ranks: int
) -> None:
    """Every launcher prints its ranks once, applies overrides, and gives the same weights."""
    out = way.partition(" recipes")[0]
    is_cold = way.startswith("python")
    done = module_run(*words(way, free_port), "lr=0.05", "--out", out, cold=is_cold)
    assert done.exit_code == 0, done.stderr
    assert f" on {ranks} = 1 node x {ranks} CPU rank" in done.stdout
    assert done.stdout.count("run folder: ") == 1, "only one rank prints"
    folder = module_run.folder / out
    steps, reference = (
        [row for row in read_lines(path / "metrics.jsonl") if "loss" in row]
        for path in (folder, alone)
    )
    assert [row["lr"] for row in steps] == [row["lr"] for row in reference]
    weights = load_file(folder / "model.safetensors")
    for name, weight in load_file(alone / "model.safetensors").items():
        assert torch.allclose(weights[name], weight, rtol=1e-5, atol=1e-7)
    record = yaml.safe_load((folder / "run.yaml").read_text())
    assert record["plan"]["world_size"] == ranks
    assert record["overrides"] == {"lr": 0.05}
    assert json.loads((folder / "result.json").read_text())["samples"] == 750
    assert len(list((folder / "logs").iterdir())) == ranks


def test_a_module_is_launched(run: Commands) -> None:
    """`accelerate launch -m` starts a recipe by the name of its module, from any folder."""
    done = run(*MODULE.split(), "--out", "out")
    assert done.exit_code == 0, done.stderr
    assert "recipes/digits.py:digits" in done.stdout


def test_one_process_instead_of_two_is_refused(run: Commands) -> None:
    """A run is refused if `accelerate launch --cpu` starts one process instead of two."""
    done = run("accelerate", "launch", "--cpu", "--num_processes", "2", RECIPE)
    assert done.exit_code != 0
    assert "asked for several processes and started one" in done.stderr
    assert not (run.folder / "runs").exists()


def test_ranks_with_other_overrides_are_refused(run: Commands, free_port: int) -> None:
    """Two ranks that were started with different learning rates do not train."""
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    ranks = [
        run.start(
            *("python", RECIPE, f"lr=0.{1 + rank}"),
            env=world | {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(free_port)},
        )
        for rank in range(2)
    ]
    errors = "".join(rank.communicate(timeout=120)[1] for rank in ranks)
    assert max(rank.returncode for rank in ranks) > 0
    assert "Rank 1 was started with lr=0.2, and rank 0 with lr=0.1" in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lr=fast"], "lr=fast (command line): expected a number"),
        (["--config", "none.yaml"], "Cannot read none.yaml"),
        (["batch_size=9999"], "there are 250 training samples"),
    ],
)
def test_two_ranks_report_a_mistake_once(run: Commands, arguments: list[str], message: str) -> None:
    """A mistake that every rank detects is printed by one rank, without launcher's traceback."""
    done = run("torchrun", "--standalone", "--nproc-per-node", "2", RECIPE, *arguments)
    assert done.exit_code != 0
    assert done.stderr.count(message) == 1
    assert "launcher/engine" not in done.stderr


def test_an_existing_folder_is_refused_by_all_ranks(run: Commands) -> None:
    """All ranks end if rank 0 finds that the run folder exists."""
    (run.folder / "out").mkdir()
    done = run("torchrun", "--standalone", "--nproc-per-node", "2", RECIPE, "--out", "out")
    assert done.exit_code != 0
    assert done.stderr.count("exists already") == 1
    assert list((run.folder / "out").iterdir()) == []


def test_a_launcher_in_each_process_of_torchrun_is_refused(run: Commands) -> None:
    """Torchrun with `launcher run` as its program is refused once, and nothing is made."""
    command = ("torchrun", "--standalone", "--nproc-per-node", "2", "--no-python", "launcher")
    done = run(*command, "run", RECIPE)
    assert done.exit_code != 0
    assert done.stderr.count("torchrun has started this command 2 times") == 1
    assert not (run.folder / "runs").exists()


def test_variables_that_are_left_from_elsewhere(run: Commands) -> None:
    """A run trains in a locale without UTF-8, with another network and torch's debug level."""
    env = {
        "GLOO_SOCKET_IFNAME": "nosuch0",
        "TORCH_DISTRIBUTED_DEBUG": "DETAIL",
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
    }
    done = run("launcher", "run", RECIPE, "-n", "2", "epochs=1", "--out", "rün", env=env)
    assert done.exit_code == 0, done.stderr
    assert done.stderr.count("TORCH_DISTRIBUTED_DEBUG=INFO") == 1
    assert read_run(RunDir(run.folder / "rün")).command[-1] == "rün"


NOTEBOOK = """
import sys
from dataclasses import replace
from types import ModuleType

import launcher
from launcher import main
from launcher.errors import EndedError
from launcher.recipes.digits import digits

sys.modules["IPython"] = ModuleType("IPython")
sys.modules["IPython"].get_ipython = lambda: print
del __file__
sys.argv = ["ipykernel_launcher.py", "-f", "kernel-123.json"]
streams = sys.stdout, sys.stderr


def cell() -> launcher.Recipe:
    return replace(digits(), device="cpu", steps=2, epochs=None)


def broken() -> launcher.Recipe:
    return replace(cell(), loss=lambda outputs, batch: 1 / 0)


def wrong() -> launcher.Recipe:
    return replace(cell(), lr=-1)


print("returned", main(cell), (sys.stdout, sys.stderr) == streams)
for recipe, error in ((broken, EndedError), (wrong, launcher.RecipeError)):
    try:
        main(recipe)
    except error:
        print("raised", error.__name__, (sys.stdout, sys.stderr) == streams)
"""


def test_a_cell_of_a_notebook_trains(run: Commands) -> None:
    """In a notebook, `main` trains without the kernel's arguments, and never ends the process."""
    (run.folder / "notebook.py").write_text(NOTEBOOK)
    done = run("python", "notebook.py")
    assert done.exit_code == 0, done.stderr
    for line in ("returned None True", "raised EndedError True", "raised RecipeError True"):
        assert line in done.stdout.splitlines()
    assert "2 steps, 256 samples" in done.stdout
    assert "launcher.run(" in done.stdout
    assert "ZeroDivisionError" in done.stderr
    assert len(list((run.folder / "runs").iterdir())) == 2
