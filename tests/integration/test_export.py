"""`launcher export` writes configuration files for a plan, and weights for Hugging Face."""

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
SETTINGS = ("micro_batch_size=20", "lr=0.05", "max_grad_norm=0.5", "schedule=cosine(0.1)")


@pytest.fixture(scope="module")
def one_process(module_run: Commands) -> Path:
    """Return the run folder of the same training on one process."""
    done = module_run("launcher", "run", f"{RECIPE}:worlds", "-n", "1", *SETTINGS, "--out", "one")
    assert done.exit_code == 0, done.stderr
    return module_run.folder / "one"


@pytest.mark.parametrize(
    ("strategy", "files", "layout"),
    [
        ("ddp", ("--accelerate", "ddp.yaml"), "DDP over gloo"),
        ("fsdp", ("--accelerate", "fsdp.yaml"), "FSDP over gloo"),
        ("zero3", ("--accelerate", "zero3.yaml"), "DeepSpeed ZeRO-3 over gloo"),
        ("zero2", ("--accelerate", "a.yaml", "--deepspeed", "a.json"), "DeepSpeed ZeRO-2 over"),
        ("zero1", ("--deepspeed", "zero1.json"), "DeepSpeed ZeRO-1 over gloo"),
    ],
)
def test_the_printed_command_trains_the_plan(
    module_run: Commands, one_process: Path, strategy: str, files: tuple[str, ...], layout: str
) -> None:
    """The printed command takes the same steps under Accelerate as one process."""
    exported = module_run(
        *("launcher", "export", f"{RECIPE}:worlds", f"strategy={strategy}", "-n", "2"),
        *(*SETTINGS, *files),
    )
    assert exported.exit_code == 0, exported.stderr
    *written, launch = exported.stdout.splitlines()
    assert sorted(written) == sorted(f"wrote {file}" for file in files[1::2])
    command = shlex.split(launch.removeprefix("launch: "))
    # Settings that the files contain need not be repeated on the command line.
    in_files = ("strategy=", "max_grad_norm=") if strategy.startswith("zero") else ("strategy=",)
    command = [argument for argument in command if not argument.startswith(in_files)]
    port = ["--main_process_port", "0"]  # another test may use the printed port
    done = module_run(*command[:2], *port, *command[2:], "--out", strategy)
    assert done.exit_code == 0, done.stderr
    assert f" on 2 = 1 node x 2 CPU ranks, {layout}" in done.stdout
    assert "Not used" not in done.stdout
    trace = read_trace(RunDir(module_run.folder / strategy))
    difference = compare(read_trace(RunDir(one_process)), trace, 1e-5)
    assert difference.agrees, difference


def test_the_deepspeed_command_trains_the_plan(
    module_run: Commands, one_process: Path, free_port: int
) -> None:
    """DeepSpeed's own launcher runs a recipe file unchanged, to the weights of one process."""
    done = module_run(
        *("deepspeed", "--num_accelerators", "2", "--master_port", str(free_port)),
        *(RECIPE, "strategy=zero2", *SETTINGS, "--out", "deepspeed"),
        env={"DS_ACCELERATOR": "cpu"},
    )
    assert done.exit_code == 0, done.stderr
    assert "DeepSpeed ZeRO-2 over gloo" in done.stdout
    weights = load_file(module_run.folder / "deepspeed/model.safetensors")
    for name, weight in load_file(one_process / "model.safetensors").items():
        assert torch.allclose(weights[name], weight, rtol=1e-5, atol=1e-7)


def test_files_are_complete(run: Commands) -> None:
    """The files set every planned value and contain no "auto" for the user's defaults to fill."""
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
    ("arguments", "fragment"),
    [
        ([], "--accelerate FILE.yaml"),
        (["--deepspeed", "d.json"], "strategy=ddp"),
        (["--accelerate", "no/a.yaml"], "no/a.yaml: No such file or directory"),
        (["--accelerate", "."], "Is a directory"),
        (["strategy=fsdp", "-n", "1", "--accelerate", "a.yaml"], "1 rank"),
    ],
)
def test_an_impossible_export_is_refused(
    run: Commands, arguments: list[str], fragment: str
) -> None:
    """An impossible export gives exit code 2 and writes no file."""
    done = run("launcher", "export", "digits", *arguments)
    assert done.exit_code == 2
    assert fragment in done.stderr
    assert list(run.folder.iterdir()) == []


def test_weights_that_cannot_be_exported_are_refused(
    module_run: Commands, one_process: Path
) -> None:
    """A model without `config`, a run without weights, and a foreign folder are exit code 2."""
    taken = module_run.folder / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    unfinished = module_run.folder / "unfinished"
    unfinished.mkdir()
    (unfinished / "run.yaml").write_bytes((one_process / "run.yaml").read_bytes())
    for arguments, fragment in (
        (("one", "--hf", "new"), "attribute `config`"),
        (("one", "--hf", "taken"), "notes.txt"),
        (("unfinished", "--hf", "new"), "launcher resume unfinished"),
        (("nowhere", "--hf", "new"), "nowhere is not a run folder"),
        (("one", "--hf", "new", "--force"), "--max-shard-size"),
    ):
        done = module_run("launcher", "export", *arguments)
        assert done.exit_code == 2, done.stderr
        assert fragment in done.stderr
        assert not (module_run.folder / "new").exists()
    assert (taken / "notes.txt").read_text() == "mine"
