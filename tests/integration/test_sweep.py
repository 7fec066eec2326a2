"""Sweeps on this machine: exact under a stop rule, interrupted and resumed, with failures."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, Commands, read_lines, read_weights

GRIDDED = f"{ROOT / 'tests/recipes/gridded.py'}:gridded"
LRS = "lr=0.001,0.01,0.1,0.2"


def record_of(folder: Path) -> dict[str, Any]:
    """Return the content of sweep.json."""
    record: dict[str, Any] = json.loads((folder / "sweep.json").read_text())
    return record


def states_of(folder: Path) -> list[tuple[str, int]]:
    """Return the state and the steps of each run, in the order of the grid."""
    return [(trial["state"], trial["step"]) for trial in record_of(folder)["trials"]]


def learned(run_dir: Path) -> list[tuple[Any, ...]]:
    """Return what a run recorded of each step and evaluation, without times."""
    rows = read_lines(run_dir / "metrics.jsonl")
    steps = [(row["step"], row["loss"], row["lr"]) for row in rows if "loss" in row]
    return [*steps, *evaluations_of(run_dir)]


def evaluations_of(run_dir: Path) -> list[tuple[int, dict[str, float]]]:
    """Return the evaluations of a run, each with its step."""
    rows = read_lines(run_dir / "metrics.jsonl")
    return [(row["step"], row["evaluation"]) for row in rows if "evaluation" in row]


def test_halving_keeps_the_best_and_its_steps_are_those_of_a_whole_run(run: Commands) -> None:
    """A run that was paused at each choice equals an uninterrupted one to the bit.

    The choices are by the newest evaluation of a set with a schedule of its own.
    """
    swept = run(
        "launcher", "sweep", GRIDDED, LRS, "--stop", "halving", "--eta", "2", "--min-steps", "3",
        "--metric", "dev/error:min", "apart=true", "--out", "swept",
    )  # fmt: skip
    assert swept.exit_code == 0, swept.stderr
    folder = run.folder / "swept"
    record = record_of(folder)
    first, second = record["choices"]
    assert (first["steps"], second["steps"]) == ([4] * 4, [6] * 2)
    for choice in (first, second):
        ranked = sorted(zip(choice["values"], choice["tried"], strict=True))
        assert sorted(index for _, index in ranked[: len(ranked) // 2]) == choice["kept"]
    for index, value in zip(first["tried"], first["values"], strict=True):
        assert value == dict(evaluations_of(folder / str(index)))[3]["dev/error"]
    (best,) = second["kept"]
    assert states_of(folder)[best] == ("finished", 18)
    assert [state for state, _ in states_of(folder)].count("dropped") == 3
    lr = record["trials"][best]["settings"]["lr"]
    whole = run("launcher", "run", GRIDDED, "-n", "1", f"lr={lr}", "apart=true", "--out", "whole")
    assert whole.exit_code == 0, whole.stderr
    assert learned(folder / str(best)) == learned(run.folder / "whole")
    paused, continued = read_weights(folder / str(best)), read_weights(run.folder / "whole")
    assert all(paused[name].equal(continued[name]) for name in continued)
    rows = [line.split() for line in swept.stdout.splitlines()]
    assert [str(best), f"{lr:g}", "finished", "18"] in [row[:4] for row in rows]
    assert "parallel" not in swept.stderr
    listed = run("launcher", "runs", "swept", f"lr={lr}", "--json")
    assert [row["step"] for row in json.loads(listed.stdout)] == [18]
    again = run("launcher", "resume", "swept", "--json")
    events = [json.loads(line) for line in again.stdout.splitlines()]
    assert [event["event"] for event in events] == ["swept", "result"]
    assert (again.exit_code, events[0]["done"], events[1]["best"]) == (0, 4, best)


def test_a_failing_run_does_not_end_the_others(run: Commands) -> None:
    """Runs beside a failing one finish; the exit code, the table and sweep.json tell of it."""
    done = run(
        "launcher", "sweep", GRIDDED, "fails=true,false", "lr=0.1,0.2", "steps=6", "--parallel",
        "2", "--metric", "error:min", "--out", "swept",
    )  # fmt: skip
    assert done.exit_code == 1, done.stderr
    folder = run.folder / "swept"
    assert [state for state, _ in states_of(folder)] == ["failed", "failed", "finished", "finished"]
    assert "it fails" in record_of(folder)["trials"][0]["error"]
    assert "ValueError: it fails" in (folder / "logs/0.log").read_text()
    failed = [line for line in done.stdout.splitlines() if " failed " in line]
    assert sum("ValueError" in line for line in failed) >= 2
    reported = run("launcher", "report", "swept")
    assert (reported.exit_code, reported.stdout) == (0, "page: swept/report.html\n")
    again = run("launcher", "resume", "swept", "--json")
    started = [json.loads(line) for line in again.stdout.splitlines()]
    assert [event["run"] for event in started if event["event"] == "started"] == [0, 1]
    assert again.exit_code == 1
    refused = run("launcher", "resume", "swept", "lr=0.3")
    assert (refused.exit_code, "sweep" in refused.stderr) == (2, True)


def test_an_interrupted_sweep_continues(run: Commands) -> None:
    """Ctrl-C stops every run with a checkpoint, and the sweep then takes the steps that remain."""
    arguments = ["lr=0.1,0.2,0.3", "milliseconds=40", "--parallel", "2", "--json"]
    with run.start("launcher", "sweep", GRIDDED, *arguments, "--out", "swept") as process:
        folder = run.folder / "swept"
        while not all((folder / name / "metrics.jsonl").exists() for name in "01"):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert "SIGINT" in errors
    states = states_of(folder)
    assert [state for state, _ in states] == ["stopped", "stopped", "waiting"]
    assert all(0 < step < 18 for _, step in states[:2])
    assert json.loads(output.splitlines()[-1])["exit_code"] == 75
    resumed = run("launcher", "sweep", GRIDDED, *arguments, "--out", "swept")
    assert resumed.exit_code == 0, resumed.stderr
    assert states_of(folder) == [("finished", 18)] * 3
    for name in "01":
        steps = [row[0] for row in learned(folder / name)]
        assert steps == [*range(1, 19), *range(2, 19, 2)]


def test_a_program_sweeps_and_searches(run: Commands) -> None:
    """A program gets typed results of a sweep, and Optuna prunes a run by its evaluations."""
    pytest.importorskip("optuna", reason="the extra `optuna` is not installed")
    program = run.folder / "program.py"
    program.write_text(f"""
import json, optuna, launcher
result = launcher.sweep({GRIDDED!r}, {{"lr": [0.01, 0.1], "seed": (1,)}}, steps=4, out="swept",
                        metric="error:min")
optuna.logging.set_verbosity(optuna.logging.ERROR)
study = optuna.create_study(
    pruner=optuna.pruners.ThresholdPruner(upper=1.0, n_warmup_steps=15),
    sampler=optuna.samplers.GridSampler({{"lr": [0.0001, 0.1]}}, seed=0),
)
def objective(trial):
    lr = trial.suggest_float("lr", 1e-5, 1.0)
    return launcher.objective({GRIDDED!r}, metric="error", trial=trial, nproc_per_node=1, lr=lr,
                              milliseconds=20, steps=30, out=f"lr{{lr}}")
study.optimize(objective, n_trials=2)
value = launcher.objective({GRIDDED!r}, metric="error", nproc_per_node=1, lr=0.1, steps=4,
                           seed=1, out="once")
try:
    launcher.objective({GRIDDED!r}, metric="eror", nproc_per_node=1, steps=2, out="wrong")
except launcher.UsageError as error:
    wrong = "error" in str(error)
print(json.dumps({{
    "settings": [dict(trial.settings) for trial in result], "best": result.best.index,
    "values": [trial.value for trial in result], "finished": result.finished,
    "steps": [trial.history.last_step for trial in result], "once": value, "wrong": wrong,
    "pruned": {{str(t.params["lr"]): t.state.name for t in study.trials}},
    "reported": min(len(t.intermediate_values) for t in study.trials),
}}))
""")
    done = run("python", program)
    assert done.exit_code == 0, done.stderr
    values = json.loads(done.stdout)
    assert values["settings"] == [{"lr": 0.01, "seed": 1}, {"lr": 0.1, "seed": 1}]
    assert (values["finished"], values["steps"], values["wrong"]) == (True, [4, 4], True)
    assert values["values"][values["best"]] == min(values["values"])
    assert values["once"] == values["values"][1]
    assert values["pruned"] == {"0.0001": "PRUNED", "0.1": "COMPLETE"}
    assert values["reported"] >= 1
    pruned = read_lines(run.folder / "lr0.0001/events.jsonl")[-1]
    assert pruned["event"] == "stopped"
    assert pruned["step"] < 30


def test_a_sweep_of_a_typed_recipe_continues(run: Commands) -> None:
    """The folder of a sweep keeps the recipe of a prompt, for the same call and other commands."""
    program = run.folder / "program.py"
    program.write_text(f"""
import launcher
typed = {{"__name__": "__main__"}}
source = open({GRIDDED.partition(":")[0]!r}).read().partition("if __name__")[0]
exec(compile(source, "<stdin>", "exec", dont_inherit=True), typed)
if __name__ == "__main__":
    for _ in range(2):
        result = launcher.sweep(typed["gridded"], {{"lr": [0.1]}}, steps=2, out="swept")
        print(result.trials[0].state)
""")
    done = run("python", program)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.split() == ["finished", "finished"]
    assert record_of(run.folder / "swept")["recipe"] == "./recipe.py:gridded"
    (run.folder / "swept").rename(run.folder / "moved")
    again = run("launcher", "resume", "moved", "--json")
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout.splitlines()[0])["done"] == 1
    assert record_of(run.folder / "moved")["recipe"] == "./recipe.py:gridded"
