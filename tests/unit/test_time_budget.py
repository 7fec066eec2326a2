"""A run with `max_time` in this process: what it measures, plans, records and refuses."""

from __future__ import annotations

import io
import json
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import read_lines
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from launcher import Data, PlanError, Recipe, adamw, cosine, make_plan, read_machine
from launcher.engine.backends.local import LocalBackend
from launcher.engine.ranks.output import Output
from launcher.engine.run import TrainResult, train_rank
from launcher.errors import RunDirError
from launcher.planning.plan import Plan
from launcher.planning.timed_steps import TimedSteps
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.events import Timed, read_events
from launcher.runs.history import History
from launcher.runs.job import ResumeFrom
from launcher.runs.run_record import RunRecord, write_run
from launcher.runs.rundir import RunDir
from launcher.signals import StopRequest

INPUTS = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
TARGETS = INPUTS.sum(1, keepdim=True)


def squared_error(outputs: Tensor, batch: list[Tensor]) -> tuple[Tensor, int]:
    """Return the sum of squared errors."""
    return functional.mse_loss(outputs, batch[1], reduction="sum"), len(batch[1])


def paced(*, pause: float = 0.005, evaluation: float = 0.0, **changes: Any) -> Recipe:
    """Return a regression whose micro-batches take at least `pause` or `evaluation` seconds."""

    def forward(model: Any, batch: Any) -> Any:
        time.sleep(pause if model.training else evaluation)
        return model(batch[0])

    fields: dict[str, Any] = {
        "name": "paced",
        "model": lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1)),
        "data": lambda: Data(
            train=TensorDataset(INPUTS[:40], TARGETS[:40]),
            evaluation=TensorDataset(INPUTS[40:], TARGETS[40:]),
        ),
        "loss": squared_error,
        "forward": forward,
        "optimizer": adamw(),
        "schedule": cosine(),
        "batch_size": 16,
        "lr": 0.05,
        "lr_batch_size": 16,
        "steps": 5_000,
        "max_time": "2s",
        "checkpoint_every": 30,
        "keep_checkpoints": 100,
        "evaluate_every": 1000,
        "train_samples": 40,
        "in_memory": True,
        "device": "cpu",
    }
    return Recipe(**fields | changes)


def train(
    folder: Path,
    recipe: Recipe,
    *,
    start: ResumeFrom | None = None,
    started: float | None = None,
    last_step: int | None = None,
    trial: bool = True,
    stop: StopRequest | None = None,
) -> TrainResult | None:
    """Train in this process, as `launcher run` or `launcher resume` does on one rank."""
    plan = make_plan(recipe, read_machine(), nproc_per_node=1)
    run_dir = RunDir(folder)
    if not folder.exists():
        folder.mkdir()
        write_run(run_dir, RunRecord(recipe="paced.py:paced", plan=plan.to_dict()))
    terminal, nowhere = io.StringIO(), io.StringIO()
    result = train_rank(
        recipe,
        plan,
        LocalBackend(recipe, plan),
        run_dir,
        Output(terminal=terminal, errors=nowhere, log=nowhere, output_mode="json"),
        stop=stop or StopRequest(),
        start=start,
        started=started,
        last_step=last_step,
        trial=trial,
    )
    (folder / "output.jsonl").write_text(terminal.getvalue())
    return result


def finish(folder: Path, recipe: Recipe, **arguments: Any) -> TrainResult:
    """Train in this process to the end of the run."""
    result = train(folder, recipe, **arguments)
    assert result is not None
    return result


def timed_steps(folder: Path) -> TimedSteps:
    """Return the steps of a run with `max_time` as run.yaml holds them."""
    steps = History(RunDir(folder)).plan.timed_steps
    assert steps is not None
    return steps


def rates(folder: Path) -> list[float]:
    """Return the learning rate of each step that a run recorded."""
    rows = [row for row in read_lines(folder / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["lr"] for row in rows]


def assert_same_weights(one: Path, other: Path) -> None:
    """Compare the final weights of two runs, which must be equal to the bit."""
    weights, others = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run with `max_time` and many checkpoints; imports are done before it."""
    folder = tmp_path_factory.mktemp("timed")
    train(folder / "imports", paced(max_time=None, steps=2))
    for seconds in (2, 6, 18):  # a machine that stalls gets more time
        run = folder / f"run{seconds}"
        train(run, paced(max_time=f"{seconds}s"))
        steps = timed_steps(run)
        if steps.steps >= steps.first_step + 60:
            break
    return run


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    """Return a copy of the finished run, which a test may change."""
    return shutil.copytree(original, tmp_path / "copy")


def test_a_run_finishes_its_schedule_in_the_time(original: Path) -> None:
    """The steps fit in the time, the schedule spans them, and all records show their number."""
    folder, steps = original, timed_steps(original)
    result = json.loads((folder / "result.json").read_text())
    seconds = float(steps.max_time.removesuffix("s"))
    assert 1 < steps.first_step < steps.steps < 200 * seconds
    assert (steps.limit, result["steps"], result["max_seconds"]) == (5_000, steps.steps, seconds)
    spans = [5_000] * steps.first_step + [steps.steps] * (steps.steps - steps.first_step)
    expected = [0.05 * cosine().at(step, span).factor for step, span in enumerate(spans)]
    assert rates(folder) == pytest.approx(expected, rel=1e-12)

    [event] = [event for event in read_events(RunDir(folder)) if isinstance(event, Timed)]
    assert (event.step, event.steps) == (steps.first_step, steps.steps)
    assert event.seconds_per_step >= 0.005
    rows = [row for row in read_lines(folder / "metrics.jsonl") if "total_steps" in row]
    assert rows == [{"step": steps.first_step, "total_steps": float(steps.steps)}]
    history = History(RunDir(folder))
    [line] = [row for row in read_lines(folder / "output.jsonl") if row["event"] == "timed"]
    assert (line["step"], line["steps"], line["limit"]) == (steps.first_step, steps.steps, 5_000)
    used, given = history.time_used() or (0, 0)
    assert (history.total_steps, given) == (steps.steps, seconds)
    assert 0.5 < used <= result["total_seconds"] + 0.1


def test_a_view_of_the_run_follows(copy: Path) -> None:
    """Whoever reads a run while it measures sees the number of steps once it is known."""
    run_dir = RunDir(copy)
    events, record = run_dir.events.read_bytes(), History(run_dir).record
    limit = make_plan(paced(), read_machine(), nproc_per_node=1)
    write_run(run_dir, replace(record, plan=limit.to_dict()))
    run_dir.events.unlink()
    history = History(run_dir)
    assert history.total_steps == 5_000
    write_run(run_dir, record)
    run_dir.events.write_bytes(events)
    history.refresh()
    assert history.total_steps == timed_steps(copy).steps


def test_a_run_that_is_stopped_while_it_measures_measures_again(
    original: Path, tmp_path: Path
) -> None:
    """A stop in the first steps saves a checkpoint; the resumed run measures from its start on."""
    del original  # the imports are done
    stop, calls = StopRequest(), 0

    def forward(model: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            stop.number = signal.SIGTERM
        return model(batch[0])

    folder = tmp_path / "run"
    assert train(folder, replace(paced(), forward=forward), trial=False, stop=stop) is None
    step = list_checkpoints(RunDir(folder))[0].step
    assert not any(isinstance(event, Timed) for event in read_events(RunDir(folder)))
    assert train(folder, paced(max_time="1.5s"), start=ResumeFrom()) is not None
    assert step < timed_steps(folder).first_step < timed_steps(folder).steps


def test_it_can_be_repeated_to_the_bit(original: Path, tmp_path: Path) -> None:
    """The first steps of the limit, resumed with the number of steps, give the same weights."""
    steps, again = timed_steps(original), tmp_path / "again"
    plain = paced(pause=0, max_time=None)
    train(again, plain, last_step=steps.first_step)
    train(again, replace(plain, steps=steps.steps), start=ResumeFrom())
    assert rates(again) == rates(original)
    assert_same_weights(again, original)


@pytest.mark.parametrize("before", [True, False], ids=["saved-before", "saved-after"])
def test_a_resumed_run_keeps_the_steps(original: Path, copy: Path, *, before: bool) -> None:
    """A run that resumes from a checkpoint before or after the measurement measures no more."""
    steps = timed_steps(original)
    saved = [checkpoint.step for checkpoint in list_checkpoints(RunDir(copy))]
    step = 1 if before else max(step for step in saved if step < steps.steps)
    assert (step < steps.first_step) == before
    record = History(RunDir(copy)).record
    limit = make_plan(paced(max_time=steps.max_time), read_machine(), nproc_per_node=1)
    write_run(RunDir(copy), replace(record, plan=limit.to_dict()))
    again = paced(pause=0, max_time=steps.max_time)
    result = finish(copy, again, start=ResumeFrom(step=step))
    assert (result.steps, result.max_seconds) == (steps.steps, None)
    assert timed_steps(copy) == steps
    assert rates(copy) == rates(original)
    assert_same_weights(copy, original)
    assert sum(isinstance(event, Timed) for event in read_events(RunDir(copy))) == 1


@pytest.mark.parametrize(("limit", "max_time"), [(6_000, "2s"), (5_000, "1.5s")])
def test_other_settings_are_measured_again(
    original: Path, copy: Path, limit: int, max_time: str
) -> None:
    """A resumed run with another limit or another time measures, from its own start on."""
    result = finish(copy, paced(steps=limit, max_time=max_time), start=ResumeFrom())
    again = timed_steps(copy)
    assert again.steps == result.steps > again.first_step > timed_steps(original).steps
    assert (again.limit, again.max_time) == (limit, max_time)


def test_a_resumed_run_may_drop_the_time(original: Path, copy: Path) -> None:
    """With max_time=none a resumed run takes the steps that it is given."""
    more = timed_steps(original).steps + 7
    result = finish(copy, paced(max_time=None, steps=more), start=ResumeFrom())
    assert (result.steps, result.max_seconds) == (more, None)


@pytest.mark.parametrize("limit", [8, 60], ids=["before-the-measurement", "after-it"])
def test_a_limit_within_the_time_is_the_number_of_steps(
    original: Path, tmp_path: Path, limit: int
) -> None:
    """A run whose limit fits takes all of its steps, by the schedule over the limit."""
    del original  # the imports are done
    result = finish(tmp_path / "run", paced(steps=limit, pause=0.002, max_time="5s"))
    assert result.steps == limit
    expected = [0.05 * cosine().at(step, limit).factor for step in range(limit)]
    assert rates(tmp_path / "run") == pytest.approx(expected, rel=1e-12)


def test_a_time_that_is_over_before_the_first_step_is_refused(tmp_path: Path) -> None:
    """The start counts; where it takes all of the time, no step is taken."""
    with pytest.raises(PlanError, match=r"max_time=30min is over .* took 33 min 20 s"):
        train(tmp_path / "run", paced(max_time="30min"), started=time.monotonic() - 2000)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_time_too_short_for_an_evaluation_ends_the_run(original: Path) -> None:
    """The run says how late it ends, takes the fewest steps that it can, evaluates, and saves."""
    folder = original.with_name("short")
    result = finish(folder, paced(evaluation=0.9, evaluate_every=5, max_time="1.5s"), trial=False)
    steps = timed_steps(folder)
    assert result.steps == steps.steps <= steps.first_step + 5
    assert result.total_seconds > 1.5
    evaluated = [row["step"] for row in read_lines(folder / "metrics.jsonl") if "evaluation" in row]
    assert evaluated[-1] == result.steps
    assert list_checkpoints(RunDir(folder))[0].step == result.steps


def test_damaged_steps_are_refused() -> None:
    """Steps that contradict each other are refused, also in the plan of run.yaml."""
    with pytest.raises(ValueError, match="first_step <= steps"):
        TimedSteps(max_time="1s", limit=5, first_step=9, steps=7)
    plan = make_plan(paced(), read_machine(), nproc_per_node=1)
    values = {"max_time": "1s", "limit": 5, "first_step": 9, "steps": 7}
    with pytest.raises(RunDirError, match="damaged"):
        Plan.from_dict(plan.to_dict() | {"timed_steps": values})
