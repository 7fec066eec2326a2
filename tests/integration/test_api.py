"""Runs that a Python program starts: `launcher.run`, `launcher.resume` and `launcher.plan`."""

from __future__ import annotations

import functools
import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import ROOT, Commands

import launcher
from launcher.recipes.digits import digits

FAILING = f"{ROOT / 'tests/recipes/failing.py'}:failing"
SLOW = f"{ROOT / 'tests/recipes/slow.py'}:slow"

STATE = """
import json, os, signal, sys, threading
import launcher

numbers = (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)

def state():
    environment = {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"}
    return [signal.getsignal(number) for number in numbers], os.getcwd(), environment

before = state()
"""
"""Defines what a run must leave as it was; importing torch itself sets TORCHINDUCTOR_CACHE_DIR."""


def script(run: Commands, text: str) -> Path:
    """Write a program into the test's folder."""
    path = run.folder / "program.py"
    path.write_text(STATE + text)
    return path


def test_a_program_trains_and_resumes(run: Commands) -> None:
    """A program gets typed results, and its handlers, folder and environment are as they were."""
    program = script(
        run,
        """
result = launcher.run("digits", nproc_per_node=2, out="out", epochs=1, checkpoint_every=4)
os.makedirs("elsewhere"); os.chdir("elsewhere"); before = state()
resumed = launcher.resume("../out", nproc_per_node=1, epochs=2)
again = launcher.resume("../out")
assert state() == before
history = resumed.history
print(json.dumps({
    "steps": [result.step, resumed.step, again.step],
    "finished": [result.finished, resumed.finished, again.finished],
    "metrics": [result.metrics, resumed.metrics, again.metrics],
    "history": list(history.steps["step"]),
    "folder": str(resumed.run_dir.path),
}))
""",
    )
    done = run("python", program)
    assert done.exit_code == 0, done.stderr
    values = json.loads(done.stdout)
    assert values["steps"] == [12, 24, 24]
    assert values["finished"] == [True, True, True]
    assert values["history"] == list(range(1, 25))
    assert values["metrics"][1] == values["metrics"][2] != values["metrics"][0]
    assert values["metrics"][1].keys() == {"loss", "accuracy"}
    assert values["folder"] == str(run.folder / "out")


def test_a_failure_is_one_exception(run: Commands) -> None:
    """A failed rank raises RunFailedError with the post-mortem as text and as a record."""
    program = script(
        run,
        f"""
try:
    launcher.run({FAILING!r}, nproc_per_node=2, out="out", how="raise", rank=1)
except launcher.RunFailedError as error:
    assert state() == before
    print(json.dumps({{"text": str(error), "code": error.exit_code, "rank": error.failure.rank,
                      "error": error.failure.error}}))
""",
    )
    done = run("python", program)
    assert done.exit_code == 0, done.stderr
    values = json.loads(done.stdout)
    assert (values["code"], values["rank"], values["error"]) == (1, 1, "ValueError")
    assert "the loss of rank one" in values["text"]
    assert "the loss of rank one" not in done.stderr, "the program decides what is printed"


def test_a_thread_of_a_program_trains(run: Commands) -> None:
    """A run starts from a thread, and from a process whose threads forbid forking."""
    program = script(
        run,
        """
results = []
worker = threading.Thread(
    target=lambda: results.append(launcher.run("digits", nproc_per_node=2, out="out", steps=3))
)
worker.start()
worker.join()
assert state() == before
print(results[0].step, results[0].finished)
""",
    )
    done = run("python", program)
    assert (done.exit_code, done.stdout) == (0, "3 True\n"), done.stderr


def test_a_recipe_function_is_trained(run: Commands) -> None:
    """A program passes a recipe function of its own file, with keyword arguments for it."""
    program = script(
        run,
        """
from dataclasses import replace
from launcher.recipes.digits import digits

def mine(*, rate: float = 0.1) -> launcher.Recipe:
    return replace(digits(), name="mine", lr=rate)

if __name__ == "__main__":
    result = launcher.run(mine, nproc_per_node=1, out="out", rate=0.05, steps=2)
    print(result.history.plan.settings["lr"], result.step)
""",
    )
    done = run("python", program)
    assert (done.exit_code, done.stdout) == (0, "0.05 2\n"), done.stderr


def test_a_program_without_a_main_guard_is_refused(run: Commands) -> None:
    """A program that would start a run in each of its own ranks fails with one exception."""
    program = script(
        run,
        """
from launcher.recipes.digits import digits

def mine() -> launcher.Recipe:
    return digits()

try:
    launcher.run(mine, nproc_per_node=1, out="out", steps=2)
except launcher.RunFailedError as error:
    print(error.exit_code, "__main__" in str(error))
""",
    )
    done = run("python", program)
    assert (done.exit_code, done.stdout) == (0, "2 True\n"), done.stderr


def test_children_and_alarms_of_a_program_are_its_own(run: Commands) -> None:
    """A signal that stops a run does not reach other children, and an alarm does not stop it."""
    program = script(
        run,
        f"""
import multiprocessing, time
fork = multiprocessing.get_context("fork")
child = fork.Process(target=time.sleep, args=(60,), daemon=True)
child.start()
alarms = []
signal.signal(signal.SIGALRM, lambda *_: alarms.append(1))
signal.setitimer(signal.ITIMER_REAL, 0.5)
before = state()
result = launcher.run({SLOW!r}, nproc_per_node=1, out="out", output="json", milliseconds=1)
assert state() == before
print(json.dumps([len(alarms), result.finished, result.stopped_by.name, child.is_alive()]))
""",
    )
    with run.start("python", program) as process:
        assert process.stdout is not None
        while json.loads(process.stdout.readline())["event"] != "stepped":
            pass
        process.send_signal(signal.SIGTERM)
        rest, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert json.loads(rest.splitlines()[-1]) == [1, False, "SIGTERM", True]


def test_an_interruption_that_a_program_handles_is_no_result(run: Commands) -> None:
    """Ctrl-C before the first step raises KeyboardInterrupt after a handler that returns."""
    program = script(
        run,
        f"""
signal.signal(signal.SIGINT, lambda *_: print("handled"))
try:
    launcher.run({SLOW!r}, nproc_per_node=1, out="out", output="json", milliseconds=1000)
except KeyboardInterrupt:
    print("interrupted")
""",
    )
    with run.start("python", program) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["event"] == "planned"
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=120)
    assert (process.returncode, rest) == (0, "handled\ninterrupted\n"), errors


def test_an_interrupted_run_raises_as_ever(run: Commands) -> None:
    """Ctrl-C before the first step ends the ranks and raises KeyboardInterrupt in the program."""
    program = script(
        run,
        f"""
try:
    launcher.run({SLOW!r}, nproc_per_node=1, out="out", output="json", milliseconds=1000)
except KeyboardInterrupt:
    print("interrupted", state() == before)
""",
    )
    with run.start("python", program) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["event"] == "planned"
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=120)
    assert (process.returncode, rest) == (0, "interrupted True\n"), errors


def test_a_stopped_run_says_so(run: Commands) -> None:
    """A run that a signal stops after a step returns unfinished, and can be resumed."""
    program = script(
        run,
        f"""
result = launcher.run({SLOW!r}, nproc_per_node=1, out="out", output="json", milliseconds=1)
print(json.dumps([result.finished, result.stopped_by.name, result.step]))
""",
    )
    with run.start("python", program) as process:
        assert process.stdout is not None
        while json.loads(process.stdout.readline())["event"] != "stepped":
            pass
        process.send_signal(signal.SIGTERM)
        rest, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    finished, stopped_by, step = json.loads(rest.splitlines()[-1])
    assert (finished, stopped_by) == (False, "SIGTERM")
    assert 0 < step < 128


def test_a_plan_is_a_value() -> None:
    """`launcher.plan` returns what `launcher plan --json` prints."""
    plan = launcher.plan("digits", nproc_per_node=4, nodes=2, device="cuda", batch_size=1024)
    assert (plan.world_size, plan.lr, plan.total_steps) == (8, 0.8, 40)
    with pytest.raises(launcher.OverrideError, match="epoch"):
        launcher.plan("digits", epoch=3)


def test_numbers_of_numpy_are_numbers() -> None:
    """A search over an array of NumPy passes its elements as settings."""
    plan = launcher.plan("digits", nproc_per_node=1, lr=np.float64(0.2), batch_size=np.int64(64))
    assert (plan.lr, plan.batch_size) == (0.1, 64)


def test_only_functions_that_ranks_can_import_are_trained(run: Commands) -> None:
    """Functions inside functions, methods, and objects that are called are refused before a run."""

    def nested() -> launcher.Recipe:
        return digits()

    for recipe in (nested, lambda: replace(digits(), lr=1.0), functools.partial(digits)):
        with pytest.raises(launcher.RecipeError):
            launcher.run(recipe, nproc_per_node=1, steps=1, out=run.folder / "out")
    assert not (run.folder / "out").exists()


@pytest.mark.parametrize(
    ("function", "argument", "keywords"),
    [
        (launcher.plan, "digits", {"nproc_per_node": "2"}),
        (launcher.plan, "digits", {"nodes": 0}),
        (launcher.plan, "digits", {"config": 1}),
        (launcher.plan, digits(), {}),
        (launcher.run, None, {}),
        (launcher.run, "digits", {"nproc_per_node": True}),
        (launcher.run, "digits", {"out": "a\0b"}),
        (launcher.run, "digits", {"output": "loud"}),
        (launcher.run, "digits", {"max_restarts": 1.5}),
        (launcher.resume, None, {}),
        (launcher.resume, "nowhere", {"step": "last"}),
        (launcher.resume, "nowhere", {"accept": "data"}),
    ],
)
def test_an_argument_of_another_type_is_a_mistake_of_the_user(
    function: Callable[..., object],
    argument: Any,
    keywords: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An argument that does not fit its type is refused before a process starts."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(launcher.UsageError, match="expected"):
        function(argument, **keywords)
    assert list(tmp_path.iterdir()) == []
