"""`launcher export`: files that start the ranks of a plan, and the command that takes them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support import ROOT, Commands

from launcher.engine.probes.parity import compare, read_trace
from launcher.runs.rundir import RunDir

RECIPE = str(ROOT / "tests/recipes/worlds.py")
GIVEN = ("micro_batch_size=20", "lr=0.05", "max_grad_norm=0.5", "schedule=cosine(0.1)")


@pytest.fixture(scope="module")
def alone(module_run: Commands) -> Path:
    """Return the run folder of one process."""
    done = module_run("launcher", "run", f"{RECIPE}:worlds", "-n", "1", *GIVEN, "--out", "alone")
    assert done.exit_code == 0, done.stderr
    return module_run.folder / "alone"


@pytest.mark.parametrize(
    ("strategy", "files", "spreads"),
    [
        ("ddp", ("--accelerate", "ddp.yaml"), "DDP over gloo"),
        ("fsdp", ("--accelerate", "fsdp.yaml"), "FSDP over gloo"),
        ("zero3", ("--accelerate", "zero3.yaml"), "DeepSpeed ZeRO-3 over gloo"),
        ("zero2", ("--accelerate", "a.yaml", "--deepspeed", "a.json"), "DeepSpeed ZeRO-2 over"),
        ("zero1", ("--deepspeed", "zero1.json"), "DeepSpeed ZeRO-1 over gloo"),
    ],
)
def test_the_command_that_is_printed_trains_the_plan(
    module_run: Commands, alone: Path, strategy: str, files: tuple[str, ...], spreads: str
) -> None:
    """Accelerate, with the files and the command, takes the steps of one process."""
    exported = module_run(
        *("launcher", "export", f"{RECIPE}:worlds", f"strategy={strategy}", "-n", "2"),
        *(*GIVEN, *files),
    )
    assert exported.exit_code == 0, exported.stderr
    *wrote, last = exported.stdout.splitlines()
    assert sorted(wrote) == sorted(f"wrote {file}" for file in files[1::2])
    command = shlex.split(last.removeprefix("launch: "))
    # What the files say needs no repetition.
    said = ("strategy=", "max_grad_norm=") if strategy.startswith("zero") else ("strategy=",)
    command = [word for word in command if not word.startswith(said)]
    port = ["--main_process_port", "0"]  # the fixed one may be taken by another test
    done = module_run(*command[:2], *port, *command[2:], "--out", strategy)
    assert done.exit_code == 0, done.stderr
    assert f"ranks       2 = 1 node x 2 CPU ranks, {spreads}" in done.stdout
    found = read_trace(RunDir(module_run.folder / strategy))
    difference = compare(read_trace(RunDir(alone)), found, 1e-5)
    assert difference.agrees, difference


def test_the_deepspeed_command_trains_the_same(
    module_run: Commands, alone: Path, free_port: int
) -> None:
    """DeepSpeed's own launcher starts a recipe as it is."""
    done = module_run(
        *("deepspeed", "--num_accelerators", "2", "--master_port", str(free_port)),
        *(RECIPE, "strategy=zero2", *GIVEN, "--out", "deepspeed"),
        env={"DS_ACCELERATOR": "cpu"},
    )
    assert done.exit_code == 0, done.stderr
    assert "DeepSpeed ZeRO-2 over gloo" in done.stdout
    weights = load_file(module_run.folder / "deepspeed/model.safetensors")
    for name, weight in load_file(alone / "model.safetensors").items():
        assert torch.allclose(weights[name], weight, rtol=1e-5, atol=1e-7)


def test_files_say_all(run: Commands) -> None:
    """Nothing is left to a default of the user's: every value is there, and none is "auto"."""
    done = run(
        *("launcher", "export", "digits", "strategy=zero3", "offload=cpu", "precision=bf16"),
        *("-n", "4", "--nodes", "2", "device=cuda", "micro_batch_size=4"),
        *("--accelerate", "a.yaml", "--deepspeed", "d.json"),
    )
    assert done.exit_code == 0, done.stderr
    assert "--machine_rank RANK_OF_NODE --main_process_ip FIRST_NODE" in done.stdout
    text = (run.folder / "a.yaml").read_text()
    accelerate = yaml.safe_load(text)
    deepspeed = json.loads((run.folder / "d.json").read_text())
    assert text.startswith("# launcher export: digits, 2 nodes x 4 ranks, strategy=zero3\n")
    assert "auto" not in {*_leaves(accelerate), *_leaves(deepspeed)}
    assert (accelerate["num_machines"], accelerate["num_processes"]) == (2, 8)
    assert accelerate["use_cpu"] is False
    assert accelerate["deepspeed_config"]["deepspeed_config_file"] == str(run.folder / "d.json")
    assert deepspeed["train_micro_batch_size_per_gpu"] == 4
    assert deepspeed["gradient_accumulation_steps"] == 4
    assert deepspeed["gradient_clipping"] == 1.0
    zero = deepspeed["zero_optimization"]
    assert zero["stage"] == 3
    assert zero["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert deepspeed["torch_autocast"]["dtype"] == "bfloat16"


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from _leaves(inner)
    elif not isinstance(value, list):
        yield value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Say what to write: --accelerate FILE.yaml, --deepspeed FILE.json or both."),
        (["--deepspeed", "d.json"], "the plan is for strategy=ddp, which DeepSpeed has no part in"),
        (["--accelerate", "no/a.yaml"], "Cannot write no/a.yaml: No such file or directory."),
        (["--accelerate", "."], "Cannot write .: Is a directory."),
        (["strategy=fsdp", "-n", "1", "--accelerate", "a.yaml"], "there is 1 rank"),
    ],
)
def test_what_cannot_be_written_is_refused(
    run: Commands, arguments: list[str], message: str
) -> None:
    """One sentence, and no file."""
    done = run("launcher", "export", "digits", *arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert list(run.folder.iterdir()) == []
