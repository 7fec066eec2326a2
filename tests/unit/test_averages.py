"""Averaged weights in one process: rules, bits of the weights, skipped steps and resumes."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import read_lines
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn
from torch.utils.data import TensorDataset

from launcher import (
    Data,
    OverrideError,
    Recipe,
    RecipeError,
    UsageError,
    constant,
    ema,
    make_plan,
    read_machine,
    schedule_free,
    sgd,
    tail,
)
from launcher.engine.backends.local import LocalBackend
from launcher.engine.model.averages import Averages
from launcher.engine.model.batch_norm import BatchNorms
from launcher.engine.ranks.output import Output
from launcher.engine.run import train_rank
from launcher.recipe.overrides import build, read_arguments
from launcher.recipe.resolve import reference_of
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.job import ResumeFrom
from launcher.runs.rundir import RunDir
from launcher.signals import StopRequest

INPUTS = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
TARGETS = INPUTS.sum(1, keepdim=True)


def squared_error(outputs: Tensor, batch: list[Tensor]) -> tuple[Tensor, int]:
    """Return the sum of squared errors."""
    return functional.mse_loss(outputs, batch[1], reduction="sum"), len(batch[1])


def build_normed() -> nn.Module:
    """Return a regression with a BatchNorm."""
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))


def make_data() -> Data:
    """Return 40 training and 10 evaluation samples."""
    return Data(
        train=TensorDataset(INPUTS[:40], TARGETS[:40]),
        evaluation=TensorDataset(INPUTS[40:], TARGETS[40:]),
    )


def make_spoilt() -> Data:
    """Return the same with one training sample that is not a number."""
    inputs = INPUTS[:40].clone()
    inputs[17] = math.nan
    return replace(make_data(), train=TensorDataset(inputs, TARGETS[:40]))


def averaged(**changes: Any) -> Recipe:
    """Return a small regression, of 12 steps, whose weights are averaged."""
    fields: dict[str, Any] = {
        "name": "averaged",
        "model": build_normed,
        "data": make_data,
        "loss": squared_error,
        "averaging": ema(0.9),
        "schedule": constant(),
        "batch_size": 10,
        "lr": 0.02,
        "lr_batch_size": 10,
        "epochs": 3,
        "train_samples": 40,
        "in_memory": True,
        "device": "cpu",
    }
    return Recipe(**fields | changes)


def averages_of(recipe: Recipe, model: nn.Module) -> Averages:
    """Return the averages of a model in this process."""
    plan = make_plan(recipe, read_machine(), nproc_per_node=1)
    assert recipe.averaging is not None
    norms = BatchNorms(model)
    return Averages(recipe.averaging, plan, LocalBackend(recipe, plan), model, norms)


def perturb(model: nn.Module, step: int) -> None:
    """Change all weights of a model."""
    torch.manual_seed(step)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight))


EXPONENTIAL: Any = get_ema_multi_avg_fn
UNIFORM: Any = get_swa_multi_avg_fn


@pytest.mark.parametrize(
    ("rule", "reference", "first", "every"),
    [
        (ema(0.7, warmup=0), EXPONENTIAL(0.7), 1, 1),
        (ema(0.7, warmup=0, start=0.5, every=2), EXPONENTIAL(0.7), 7, 2),
        (tail(), UNIFORM(), 10, 1),
        (tail(0.25, every=3), UNIFORM(), 4, 3),
    ],
)
def test_an_average_is_that_of_torch(rule: Any, reference: Any, first: int, every: int) -> None:
    """Averages equal those of torch.optim.swa_utils, updated after the same steps."""
    model = build_normed()
    averages = averages_of(averaged(averaging=rule), model)
    expected = AveragedModel(model, multi_avg_fn=reference)
    for step in range(1, 13):
        perturb(model, step)
        averages.update(step)
        if step >= first and (step - first) % every == 0:
            expected.update_parameters(model)
    assert averages.count == int(expected.n_averaged)
    with averages.evaluated():
        for weight, average in zip(model.parameters(), expected.module.parameters(), strict=True):
            torch.testing.assert_close(weight, average, rtol=1e-5, atol=1e-6)


def test_a_young_average_decays_faster() -> None:
    """The decay is n / (n + 9) after n weights until it is that of the rule, as in TensorFlow."""
    rule = ema(0.999)
    assert rule.share(0) == 1.0
    assert [rule.share(n) for n in (1, 2, 90)] == pytest.approx([0.9, 9 / 11, 9 / 99])
    assert rule.share(10**6) == pytest.approx(0.001)
    assert ema(0.999, warmup=0).share(1) == pytest.approx(0.001)


def test_the_last_step_is_averaged() -> None:
    """However late an average starts, it holds the weights of the last step."""
    assert tail(0.99).first_step(10) == 10
    assert tail(0.75).first_step(100) == 76
    assert ema().first_step(1) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_evaluation_leaves_the_bits_of_the_weights(dtype: torch.dtype) -> None:
    """Weights, statistics and averages have the same bits after averages were evaluated."""
    model = nn.Sequential(nn.Linear(4, 8, dtype=dtype), nn.BatchNorm1d(8))
    averages = averages_of(averaged(averaging=tail(0.0)), model)
    for step in range(1, 4):
        perturb(model, step)
        averages.update(step)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen = []
    for _ in range(2):
        with averages.evaluated():
            seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        assert all(torch.equal(now, before[name]) for name, now in model.state_dict().items())
    assert not torch.equal(seen[0]["0.weight"], before["0.weight"])
    assert seen[0]["0.weight"].dtype == dtype
    assert all(torch.equal(seen[0][name], seen[1][name]) for name in before)


def test_small_changes_of_weights_in_bf16_are_averaged() -> None:
    """The average of weights in bf16 is in fp32: in bf16 it would drop each small share."""
    model = nn.Linear(1, 1, bias=False).bfloat16()
    averages = averages_of(averaged(averaging=ema(0.999, warmup=0), epochs=300), model)
    for step, value in enumerate([1.0] + [2.0] * 1000, start=1):
        nn.init.constant_(model.weight, value)
        averages.update(step)
    with averages.evaluated():
        assert model.weight.item() == pytest.approx(2 - 0.999**1000, rel=0.01)


def test_statistics_are_averaged_unless_they_are_not_finite() -> None:
    """Running statistics are averaged with the same shares; NaN of a skipped step is left out."""
    model = nn.BatchNorm1d(2)
    assert model.running_mean is not None
    averages = averages_of(averaged(averaging=ema(0.5, warmup=0)), model)
    for step, values in enumerate(([4.0, 4.0], [math.nan, 8.0], [2.0, 2.0]), start=1):
        model.running_mean.copy_(torch.tensor(values))
        averages.update(step)
    with averages.evaluated():
        assert model.running_mean.tolist() == [3.0, 4.0]
    assert model.running_mean.tolist() == [2.0, 2.0]


def train(
    folder: Path, recipe: Recipe, *, start: int | None = None
) -> tuple[dict[str, Tensor], str]:
    """Train in this process, or resume; return the exported weights and what was printed."""
    folder.mkdir(exist_ok=True)
    run_dir = RunDir(folder)
    plan = make_plan(recipe, read_machine(), nproc_per_node=1)
    output = Output(terminal=io.StringIO(), errors=io.StringIO(), log=io.StringIO())
    train_rank(
        recipe, plan, LocalBackend(recipe, plan), run_dir, output,
        stop=StopRequest(), start=None if start is None else ResumeFrom(step=start),
    )  # fmt: skip
    return load_file(run_dir.model), "\n".join(list_names(run_dir))


def list_names(run_dir: RunDir) -> list[str]:
    """Return the names of the tensors in the newest checkpoint."""
    from launcher.engine.saving.checkpoint_tensors import StoredState

    checkpoint = list_checkpoints(run_dir)[0]
    return list(StoredState(checkpoint, checkpoint.read_manifest()).names())


def test_a_skipped_step_leaves_the_average_finite(tmp_path: Path) -> None:
    """A batch that is not finite changes neither weights nor averages to something not finite."""
    weights, _ = train(tmp_path / "run", averaged(data=make_spoilt, optimizer=sgd()))
    assert all(weight.isfinite().all() for weight in weights.values())
    rows = read_lines(RunDir(tmp_path / "run").metrics)
    assert sum(not math.isfinite(float(row["loss"] or "nan")) for row in rows if "loss" in row) == 3
    losses = [row["evaluation"]["loss"] for row in rows if "evaluation" in row]
    assert len(losses) == 3
    assert all(map(math.isfinite, losses))


def test_statistics_after_a_skipped_step_do_not_depend_on_evaluations(tmp_path: Path) -> None:
    """Running statistics are put back in the step that spoils them, not when its loss is read."""
    often, never = (
        train(
            tmp_path / str(every),
            averaged(data=make_spoilt, optimizer=sgd(), averaging=None, evaluate_every=every),
        )[0]
        for every in (1, 1000)
    )
    assert any("running_mean" in name for name in often)
    for name, value in often.items():
        assert value.isfinite().all()
        assert torch.equal(value, never[name]), name


@pytest.mark.parametrize(
    ("before", "after", "line"),
    [
        (None, ema(0.9), "it holds no averaged weights; ema(decay=0.9) begins anew"),
        (tail(0.1), ema(0.9), "it holds averages by tail(start=0.1); ema(decay=0.9) begins anew"),
        (ema(0.9), None, "its averages by ema(decay=0.9) are dropped, because averaging is none"),
        (ema(0.9), ema(0.9, start=0.9), "ema(decay=0.9, start=0.9) begins later in this run"),
        (None, tail(), ""),
        (None, None, ""),
        (ema(0.9), ema(0.8), ""),
    ],
)
def test_a_resume_says_what_becomes_of_the_average(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], before: Any, after: Any, line: str
) -> None:
    """A changed rule, or a checkpoint without averages, begins a new average with one line."""
    folder = tmp_path / "run"
    first = averaged(averaging=before, checkpoint_every=6, keep_checkpoints=9)
    _, names = train(folder, first)
    assert ("average/0.weight" in names) == (before is not None)
    capsys.readouterr()
    _, names = train(folder, replace(first, averaging=after), start=6)
    expected = f"launcher: step-00000006: {line}.\n" if line else ""
    assert capsys.readouterr().out.startswith(f"{expected}resumed from step-00000006\n")
    assert ("average/0.weight" in names) == (after is not None)


def test_a_resumed_average_has_the_same_bits(tmp_path: Path) -> None:
    """A run that is resumed in the middle exports the same average."""
    recipe = averaged(checkpoint_every=5, keep_checkpoints=9)
    weights, _ = train(tmp_path / "run", recipe)
    resumed, _ = train(tmp_path / "run", recipe, start=5)
    assert all(torch.equal(resumed[name], weight) for name, weight in weights.items())


def test_two_averages_are_refused() -> None:
    """An optimizer that averages the weights itself is refused, named or the recipe's own."""
    with pytest.raises(RecipeError, match="exclude each other"):
        averaged(optimizer=schedule_free())
    with pytest.raises(RecipeError, match=r"found 0\.9"):
        averaged(averaging=0.9)


def test_an_own_optimizer_that_averages_is_refused(tmp_path: Path) -> None:
    """A recipe's own optimizer with eval() and train() is refused before the first step."""

    class Own(torch.optim.SGD):
        def eval(self) -> None: ...

    own = averaged(optimizer=lambda model, lr: Own(model.parameters(), lr=lr))
    with pytest.raises(RecipeError, match="Own"):
        train(tmp_path / "run", own)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ema(0.99)", ema(0.99)),
        ("tail", tail()),
        ("none", None),
        ("tail(0.5, every=2)", tail(0.5, every=2)),
    ],
)
def test_it_is_written_as_a_call(text: str, expected: Any) -> None:
    """The command line, run.yaml and the plan hold the same text, which reads back."""
    built = build(reference_of(averaged_recipe), read_arguments([f"averaging={text}"]))
    assert built.recipe.averaging == expected
    written = built.recipe.settings()["averaging"] or "none"
    again = build(reference_of(averaged_recipe), read_arguments([f"averaging={written}"]))
    assert again.recipe.averaging == expected
    assert built.overrides["averaging"] == (None if expected is None else str(expected))


def averaged_recipe() -> Recipe:
    """Return the regression."""
    return averaged()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("ema(1.0)", "less than 1, found 1.0"),
        ("emma()", "Did you mean ema"),
        ("tail(decay=0.9)", "takes no 'decay'"),
        ("tail(every=0)", "at least 1"),
    ],
)
def test_bad_rules_are_refused(text: str, found: str) -> None:
    """What a rule does not take is refused, with the name of what is wrong."""
    with pytest.raises(OverrideError, match=found):
        build(reference_of(averaged_recipe), read_arguments([f"averaging={text}"]))
    with pytest.raises(UsageError):
        ema(-0.1)
