"""The training loop on a device that is not the CPU, on a machine without a GPU."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, Commands

VARIANTS = ("adamw", "sgd", "fp64", "objects", "workers", "on_device")
STEPS = 15
MICRO_BATCHES = 33
"""Two in each of 15 steps, and the three of an evaluation's 20 samples after each epoch."""

STRATEGIES = ("ddp", "fsdp")


@pytest.fixture(scope="module")
def measured(module_run: Commands) -> dict[str, Any]:
    """Train every variant on the device and on the CPU, in one process."""
    return measure(module_run, "simulated_training.py", "measured.json")


@pytest.fixture(scope="module")
def ranks(module_run: Commands) -> dict[str, Any]:
    """Train on two ranks with a device each, and on two CPU ranks."""
    return measure(module_run, "simulated_ranks.py", "ranks.json", *STRATEGIES)


def measure(run: Commands, program: str, result: str, *arguments: str) -> dict[str, Any]:
    """Return what a program has written into its folder."""
    folder = run.folder / Path(program).stem
    folder.mkdir()
    finished = run("python", ROOT / "tests" / program, folder, *arguments)
    assert finished.exit_code == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    values: dict[str, Any] = json.loads((folder / result).read_text())
    return values


def test_the_device_shows_what_a_gpu_would(measured: dict[str, Any]) -> None:
    """Asynchronous copies are late until somebody waits, and tensors of two devices do not mix."""
    assert measured["device"]
    assert all(measured["device"].values()), measured["device"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("place", ["device", "resumed", "moved"])
def test_a_device_trains_as_the_cpu_does(
    measured: dict[str, Any], variant: str, place: str
) -> None:
    """A run on the device, resumed there or on the CPU, equals one on the CPU to the bit."""
    expected, actual = measured[variant]["cpu"], measured[variant][place]
    assert len(actual["losses"]) == STEPS
    assert len(actual["evaluations"]) == 3
    assert actual == expected


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ranks_with_a_device_train_as_cpu_ranks_do(ranks: dict[str, Any], strategy: str) -> None:
    """Two ranks with a device each equal two CPU ranks to the bit, a resumption included."""
    expected, actual = ranks[strategy]["cpu"], ranks[strategy]["device"]
    assert len(actual["losses"]) == STEPS
    assert actual == expected


@pytest.mark.parametrize("variant", ["adamw", "sgd", "fp64", "workers"])
def test_batches_are_copied_from_pinned_memory(measured: dict[str, Any], variant: str) -> None:
    """The copies of batches do not wait, and their use on the compute stream is recorded."""
    log = measured[variant]["log"]
    copies = Counter(map(tuple, log["copies"]))
    assert log["recorded"] >= 2 * MICRO_BATCHES
    assert copies["to device", False] >= 2 * MICRO_BATCHES
    assert copies["to device", True] == (4 if variant == "sgd" else 9)  # those of the model


def test_data_on_the_device_is_copied_once(measured: dict[str, Any]) -> None:
    """Only the indices of a micro-batch are copied, without a wait, and losses stay the same."""
    log = measured["on_device"]["log"]
    copies = Counter(map(tuple, log["copies"]))
    of_batches = Counter(map(tuple, measured["adamw"]["log"]["copies"]))
    assert of_batches["to device", False] - copies["to device", False] >= MICRO_BATCHES
    assert copies["to device", True] - of_batches["to device", True] == 4  # two of each data set
    assert measured["on_device"]["cpu"] == measured["adamw"]["cpu"]


def test_data_that_a_device_cannot_hold_is_refused(measured: dict[str, Any]) -> None:
    """The refusal is one error of the recipe with the bytes that are needed and those free."""
    kind, text = measured["refusal"]
    assert kind == "RecipeError"
    assert "4 GiB" in text
    assert "3 GiB" in text


def test_checkpoints_are_copied_asynchronously(measured: dict[str, Any]) -> None:
    """A save queues its copies of weights and optimizer state, and waits for them once."""
    log = measured["adamw"]["log"]
    num_saves = 8
    tensors_of_a_save = 6 * 4  # weights, two averages and a step count
    copies = Counter(map(tuple, log["copies"]))
    assert copies["to host", False] == num_saves * tensors_of_a_save
    assert len(log["synchronized"]) == num_saves + 1  # the last at the end of the run


@pytest.mark.parametrize("variant", ["adamw", "sgd", "fp64", "workers", "on_device"])
def test_steps_do_not_wait(measured: dict[str, Any], variant: str) -> None:
    """Between two reads only the first step, checkpoints and the ends of epochs wait."""
    waits = measured[variant]["log"]["waits"]
    files = Counter(Path(wait.split(":", 1)[0]).name for wait in waits)
    allowed = {
        "initial_values.py": 9,  # the model is filled once
        "trial.py": 3,
        "forward_writes.py": 3,
        "taking_steps.py": 1,
        "device_data.py": 4,  # two tensors of each data set
        "module_state.py": 24,  # BatchNorm's buffers in a checkpoint
    }
    assert all(files[name] <= allowed.get(name, 0) for name in files), waits


def test_memory_is_that_of_the_device(measured: dict[str, Any]) -> None:
    """Heartbeats and metrics have the memory of the device."""
    assert measured["peak_bytes"] == 1 << 30
    assert measured["usage"] == {"memory_bytes": 1 << 30, "memory_total_bytes": 4 << 30}
