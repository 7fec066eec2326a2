"""`launcher evaluate` and `launcher.evaluate`: the weights of a run, evaluated again."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
from support import ROOT, Commands, read_lines

from launcher.runs.rundir import RunDir

RECIPE = f"{ROOT / 'tests/recipes/held_out.py'}:held_out"


@pytest.fixture(scope="module")
def trained(module_run: Commands) -> RunDir:
    """Return a run of 10 steps on two ranks, with evaluations and checkpoints after 4, 8 and 10."""
    done = module_run("launcher", "run", RECIPE, "-n", "2", "--out", "trained", "--quiet")
    assert done.exit_code == 0, done.stderr
    return RunDir(module_run.folder / "trained")


def recorded(run_dir: RunDir) -> dict[int, dict[str, float]]:
    """Return the evaluations that a run recorded, by step."""
    rows = read_lines(run_dir.metrics)
    return {row["step"]: row["evaluation"] for row in rows if "evaluation" in row}


def evaluate(run: Commands, *arguments: str) -> dict[str, Any]:
    """Return what `launcher evaluate --json` prints."""
    done = run("launcher", "evaluate", *arguments, "--json")
    assert done.exit_code == 0, done.stderr
    values: dict[str, Any] = json.loads(done.stdout)
    return values


def test_the_metrics_are_those_that_the_run_recorded(module_run: Commands, trained: RunDir) -> None:
    """Final weights and those of a checkpoint give the bits of metrics.jsonl, and write nothing."""
    before = {path: path.stat().st_mtime_ns for path in trained.path.rglob("*")}
    final = evaluate(module_run, "trained")
    assert final == {
        "run_dir": str(trained.path),
        "weights": "model.safetensors",
        "step": 10,
        "ranks": 2,
        "evaluation": recorded(trained)[10],
    }
    earlier = evaluate(module_run, "trained", "--checkpoint", "4")
    assert (earlier["weights"], earlier["step"]) == ("step-00000004", 4)
    assert earlier["evaluation"] == recorded(trained)[4]
    assert {path: path.stat().st_mtime_ns for path in trained.path.rglob("*")} == before


def test_other_ranks_and_data_are_possible(module_run: Commands, trained: RunDir) -> None:
    """Another number of ranks and another strategy change nothing but rounding; data may change."""
    other = evaluate(module_run, "trained", "-n", "3", "strategy=fsdp", "--checkpoint", "last")
    assert other["ranks"] == 3
    assert other["evaluation"] == pytest.approx(recorded(trained)[10], rel=1e-5)
    done = module_run("launcher", "evaluate", "trained", "-n", "1", "--data", "samples=10")
    assert done.exit_code == 0, done.stderr
    head, loss, accuracy = done.stdout.splitlines()
    assert head == "trained: model.safetensors after step 10, 1 rank"
    assert loss.split()[0] == "loss"
    assert float(accuracy.split()[1]) * 10 % 1 == 0  # the mean over ten samples


def test_a_run_without_its_end_is_evaluated_at_its_newest_checkpoint(
    module_run: Commands, trained: RunDir
) -> None:
    """While a run has not finished, its newest checkpoint is taken; from Python in one call."""
    copy = module_run.folder / "unfinished"
    shutil.copytree(trained.path, copy)
    (copy / "result.json").unlink()
    shutil.rmtree(copy / "checkpoints/step-00000010")
    (module_run.folder / "evaluating.py").write_text(
        "import launcher\n"
        "if __name__ == '__main__':\n"
        "    found = launcher.evaluate('unfinished', nproc_per_node=2)\n"
        "    print(found.weights, found.step, found.ranks, sorted(found.metrics))\n"
        "    print(found.metrics['loss'])\n"
    )
    done = module_run("python", module_run.folder / "evaluating.py")
    assert done.exit_code == 0, done.stderr
    head, loss = done.stdout.splitlines()
    assert head == "step-00000008 8 2 ['accuracy', 'loss']"
    assert float(loss) == recorded(trained)[8]["loss"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("nothing",), "nothing"),
        (("empty",), "run.yaml"),
        (("bare",), "model.safetensors"),
        (("trained", "--checkpoint", "best"), "step-00000008"),
        (("trained", "--checkpoint", "5"), "step-00000008"),
        (("damaged", "--checkpoint", "4"), "step-00000004"),
        (("trained", "--data", "sample=10"), "samples"),
        (("trained", "strategy=fsdp", "-n", "1"), "strategy=ddp"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_evaluated_is_refused(
    module_run: Commands, trained: RunDir, arguments: tuple[str, ...], named: str
) -> None:
    """A run, weights or data that are not there end with exit code 2 and the name of what is."""
    folder = module_run.folder
    (folder / "empty").mkdir(exist_ok=True)
    (folder / "bare").mkdir(exist_ok=True)
    shutil.copy(trained.run_yaml, folder / "bare")
    if "damaged" in arguments:
        shutil.copytree(trained.path, folder / "damaged")
        shard = next((folder / "damaged/checkpoints/step-00000004").glob("*.safetensors"))
        shard.write_bytes(shard.read_bytes()[:-1])
    done = module_run("launcher", "evaluate", *arguments)
    assert done.exit_code == 2
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout
