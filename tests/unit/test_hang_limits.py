"""Limits of hangs by phase: how they are given, which one holds, and what a report names."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from examples import LAPTOP

from launcher import Recipe, make_plan
from launcher.console.explain import explain
from launcher.engine.backends.default_group import group_timeout
from launcher.engine.ranks import watchdog
from launcher.errors import OverrideError, RecipeError
from launcher.recipe.hang_limits import HangLimits, hang_limits
from launcher.recipe.overrides import build, read_arguments, read_yaml
from launcher.recipe.resolve import resolve
from launcher.runs.failure_record import read_failure
from launcher.runs.heartbeat import PHASES
from launcher.runs.rundir import RunDir, create_run_dir
from launcher.signals import StopRequest


def recipe_with(text: str) -> Recipe:
    """Return a recipe whose hang_timeout was given on the command line."""
    return build(resolve("digits"), read_arguments((f"hang_timeout={text}",))).recipe


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("20", HangLimits(step=20.0)),
        ("step:120,save:900", HangLimits(step=120.0, save=900.0)),
        ("{start: 60, evaluation: none}", HangLimits(start=60.0, evaluation=None)),
        ("none", HangLimits(start=None, step=None, evaluation=None, save=None)),
    ],
)
def test_limits_on_the_command_line(text: str, limits: HangLimits) -> None:
    """A number limits a step, pairs limit phases, and none removes all limits."""
    assert hang_limits(recipe_with(text).hang_timeout) == limits


def test_limits_in_a_file(tmp_path: Path) -> None:
    """A mapping in a YAML file limits phases; a run's settings hold what was given."""
    config = tmp_path / "mine.yaml"
    config.write_text("hang_timeout:\n  step: 120\n  save: none\n")
    recipe = build(resolve("digits"), read_yaml(config)).recipe
    assert recipe.settings()["hang_timeout"] == {"step": 120.0, "save": None}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("stpe:4", "Did you mean step?"),
        ("saving:4", "Did you mean save?"),
        ("train:4", "'train' among start, step, evaluation, save"),
        ("step:-1", "greater than 0"),
        ("step:0,save:3", "greater than 0"),
        ("step:2,step:3", "a key is given twice"),
        ("fast", "a number"),
    ],
)
def test_bad_limits_are_refused(text: str, named: str) -> None:
    """Unknown phases are refused with the nearest name, and other values by what is expected."""
    with pytest.raises(OverrideError) as caught:
        recipe_with(text)
    assert named in str(caught.value)
    assert str(caught.value).count("hang_timeout=") == 1


def test_a_bad_phase_in_python_is_refused() -> None:
    """A recipe that names an unknown phase is refused with the nearest name."""
    with pytest.raises(RecipeError, match=r"'steps'\. Did you mean step"):
        recipe_with_limits({"steps": 3})


def recipe_with_limits(limits: Mapping[str, Any]) -> Recipe:
    """Return a recipe whose hang_timeout was given in Python."""
    return replace(recipe_with("none"), hang_timeout=limits)  # type: ignore[arg-type]


def test_a_plan_shows_the_limits() -> None:
    """A plan prints the limit of each phase, given or by default."""
    built = build(resolve("digits"), read_arguments(("hang_timeout=save:900",)))
    plan = make_plan(built.recipe, LAPTOP, sources=built.sources)
    text = explain(plan)
    assert "start 1,800 s, step 180 s, evaluation 600 s, save 900 s" in text
    assert "command line: hang_timeout=save:900" in text


@pytest.mark.parametrize(
    ("text", "timeout"),
    [
        ("60", timedelta(minutes=35)),
        ("save:60,start:60,evaluation:60,step:60", timedelta(minutes=30)),
        ("save:7200", timedelta(minutes=125)),
        ("step:none", timedelta(days=365)),
        ("step:1e9", timedelta(days=365)),
    ],
)
def test_collective_calls_outlast_the_longest_limit(text: str, timeout: timedelta) -> None:
    """The timeout of collective calls is at least five minutes above the longest limit."""
    assert group_timeout(recipe_with(text)) == timeout


@pytest.mark.parametrize(
    ("reports", "phase"),
    [
        ([], "start"),
        ([(7, "reading data")], "start"),
        ([(7, "computing"), (7, "evaluating")], "evaluation"),
        ([(7, "evaluating"), (7, "computing")], "start"),
        ([(7, "computing"), (8, "reading data")], "step"),
        ([(7, "computing"), (8, "saving")], "save"),
        ([(7, "computing"), (8, "finishing")], "save"),
    ],
)
def test_the_limit_that_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reports: list[tuple[int, str]], phase: str
) -> None:
    """The first step of a process, resumed at step 7, has the limit of the start."""
    monkeypatch.setattr(watchdog, "_SECONDS_TO_REPORT", 0.1)
    limits = dict.fromkeys(("start", "step", "evaluation", "save"), None) | {phase: 0.2}
    child = start_rank(tmp_path, 0, 1, limits, reports)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0
    failure = read_failure(create_or_open(tmp_path))
    assert failure is not None
    assert f"(hang_timeout={phase}:0.2)" in failure.message


def test_the_rank_with_the_longer_limit_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that hangs while it saves is named although another rank, in a step, gives up first.

    Both write where they are: the rank that saves has no limit of its own.
    """
    monkeypatch.setattr(watchdog, "_SECONDS_TO_END", 0.5)
    limits = {"step": 1.5, "save": None}
    waiting = start_rank(tmp_path, 0, 2, limits, [(0, "computing"), (1, "computing")])
    saving = start_rank(tmp_path, 1, 2, limits, [(0, "computing"), (1, "saving")])
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in (waiting, saving)]
    failure = read_failure(create_or_open(tmp_path))
    assert failure is not None
    assert "(hang_timeout=step:1.5)" in failure.message
    assert "saving after 1 step, at " in failure.message
    assert failure.rank == 1
    assert codes[0] == 1
    assert codes[1] in (1, -signal.SIGKILL)


def create_or_open(folder: Path) -> RunDir:
    """Return the run folder of a test, which the first call makes."""
    path = folder / "run"
    return RunDir(path) if path.exists() else create_run_dir(path, "digits")


def start_rank(
    folder: Path,
    rank: int,
    world_size: int,
    limits: Mapping[str, float | None],
    reports: list[tuple[int, str]],
) -> int:
    """Fork a rank that reports phases and then hangs; return its process id."""
    run_dir = create_or_open(folder)
    child = os.fork()
    if child:
        return child
    try:
        with (folder / f"log{rank}").open("w") as log:
            watching = watchdog.Watchdog(
                run_dir,
                rank,
                world_size,
                limits=hang_limits(limits),  # type: ignore[arg-type]
                stop=StopRequest(),
                log=log,
                errors=log,
            )
            for step, phase in reports:
                assert phase in PHASES
                watching.report_phase(step, phase)
            time.sleep(60)
    finally:
        os._exit(99)
