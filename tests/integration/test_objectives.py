"""Recipes with several objectives on 1 to 3 ranks, under DDP and FSDP."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matrix import EVALUATED_OBJECTIVES, OBJECTIVES_WORLDS, objectives
from support import ROOT, Commands, read_lines, train_suite

from launcher.checks.prove import TOLERANCES
from launcher.engine.probes.parity import checkpoint_digest, compare, read_trace
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.rundir import RunDir

CASES = [
    (ranks, case.name, f"{case.key}{suffix}")
    for ranks in OBJECTIVES_WORLDS
    for case in objectives(ranks)
    for suffix in ("", "-resumed")[: 1 + case.is_resumed]
]
TURNS = str(ROOT / "tests/recipes/turns.py")


@pytest.fixture(scope="module")
def trained(module_run: Commands) -> Path:
    """Train every case, and resume some from a checkpoint of two ranks."""
    return train_suite(module_run, "objectives", OBJECTIVES_WORLDS)


def turns_of(run_dir: RunDir) -> dict[tuple[int, str], float | None]:
    """Return the values of each objective by step and name."""
    return {
        (row["step"], name): value
        for row in read_lines(run_dir.metrics)
        for name, value in row.items()
        if name.startswith("train/")
    }


def evaluations_of(run_dir: RunDir) -> dict[tuple[int, str], float]:
    """Return the values of each evaluation by step and name."""
    return {
        (row["step"], name): value
        for row in read_lines(run_dir.metrics)
        for name, value in row.get("evaluation", {}).items()
    }


@pytest.mark.parametrize(
    ("ranks", "name", "folder"), CASES, ids=[f"{ranks}-{folder}" for ranks, _, folder in CASES]
)
def test_objectives_do_not_depend_on_the_ranks(
    trained: Path, ranks: int, name: str, folder: str
) -> None:
    """Losses, norms and weights of all objectives are those of one process, also when resumed."""
    alone = RunDir(trained / "on1" / f"{name.removesuffix('-micro')}-ddp")
    run_dir = RunDir(trained / f"on{ranks}" / folder)
    precision = name.rpartition("-")[2]
    tolerance = TOLERANCES.get(precision, 1e-5)
    reference, trace = read_trace(alone), read_trace(run_dir)
    difference = compare(reference, trace, tolerance)
    # AdamW divides gradients by their size, and so amplifies how bf16 rounds small ones.
    assert difference.agrees or (name == "gan-bf16" and difference.first_step is None), difference
    expected, found = turns_of(alone), turns_of(run_dir)
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=tolerance)
    assert evaluations_of(run_dir) == pytest.approx(evaluations_of(alone), rel=max(tolerance, 1e-6))
    if name == "turns-exact":
        ends = [checkpoint_digest(list_checkpoints(each)[0]) for each in (alone, run_dir)]
        assert ends[0] == ends[1]
        assert (reference.loss, reference.grad_norm) == (trace.loss, trace.grad_norm)


@pytest.mark.parametrize("name", EVALUATED_OBJECTIVES)
def test_weights_of_objectives_are_evaluated_and_predict(trained: Path, name: str) -> None:
    """The run's last metrics come again to the bit, and rows are those of one process."""
    files = []
    for folder in (trained / f"on1/{name}-ddp", trained / f"on3/{name}-fsdp"):
        evaluated = json.loads((folder / "evaluated.json").read_text())["model.safetensors"]
        recorded = evaluations_of(RunDir(folder))
        last = max(step for step, _ in recorded)
        assert evaluated == {
            metric: value for (step, metric), value in recorded.items() if step == last
        }
        files.append(read_lines(folder / "predictions.jsonl"))
    assert len(files[0]) == len(files[1]) > 10
    if name == "turns-exact":
        assert files[0] == files[1]


def test_objectives_take_their_turns(trained: Path) -> None:
    """An objective with every=2 takes its turn in the first step, the third, and so on."""
    turns = turns_of(RunDir(trained / "on2/turns-exact-ddp"))
    steps = [step for step, name in turns if name == "train/brightness/loss"]
    assert steps == [1, 3, 5, 7, 9]


@pytest.mark.parametrize(
    ("command", "settings", "message"),
    [
        ("run", ["shares=false"], "The objectives classes and brightness both train encoder."),
        ("run", ["strategy=zero1"], "a DeepSpeed engine has one optimizer"),
        ("find lr", ["--steps", "20"], "the objectives classes and brightness and imitation"),
    ],
)
def test_what_objectives_do_not_allow_is_refused(
    run: Commands, command: str, settings: list[str], message: str
) -> None:
    """A mistake in the objectives ends with exit code 2 and one message, on two ranks as well."""
    done = run("launcher", *command.split(), TURNS, "-n", "2", "device=cpu", *settings)
    assert done.exit_code == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
