"""Train, resume, plan and evaluate from Python: what the commands of these names do, as functions.

Each function does what the command does, returns a typed value and raises a `LauncherError` where
the command would print an error. None of them ends the process or leaves it in another working
folder, with other signal handlers or with another environment.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from launcher.console.notebook_screen import NotebookScreen
    from launcher.engine.saving.hugging_face import Export
    from launcher.launch.predict_run import Predictions
    from launcher.launch.signal_handler import SignalHandler
    from launcher.planning.plan import Plan
    from launcher.recipe.overrides import Override
    from launcher.recipe.recipe import Recipe
    from launcher.recipe.resolve import Reference
    from launcher.runs.evaluation_result import EvaluationResult
    from launcher.runs.job import OutputMode
    from launcher.runs.run_result import RunResult
    from launcher.runs.rundir import RunDir
    from launcher.sweeps.search_objective import PrunableTrial
    from launcher.sweeps.sweep_result import SweepResult


def run(
    recipe: str | Path | Callable[..., Recipe],
    *,
    nproc_per_node: int | None = None,
    out: str | Path | None = None,
    mirror: str | None = None,
    config: str | Path | None = None,
    output: OutputMode | Literal["auto"] = "auto",
    max_restarts: int = 0,
    **overrides: Any,
) -> RunResult:
    """Train a recipe on this machine, as `launcher run` does.

    The ranks are processes of their own. They are forked if this process has started no threads
    and has not initialised CUDA; otherwise each starts as a new interpreter, which takes seconds.

    Args:
        recipe: The name of a recipe ("digits"), its file ("mine.py", "mine.py:variant"), or the
            recipe function, which must be at the top level of a file.
        nproc_per_node: Ranks; None is one for each GPU, or 2 CPU ranks if there is no GPU.
        out: The run folder to make; None makes `runs/<recipe>-<time>`. A URL makes that as well and
            is its `mirror`.
        mirror: URL in an object store at which the run is kept as well, such as
            "s3://bucket/runs/mine".
        config: A YAML file of values for the recipe; `overrides` take precedence.
        output: What is shown: "progress" prints progress for people, "json" events for programs,
            and "quiet" nothing. "auto" shows progress and a plot of the loss in a notebook, prints
            progress at a prompt in a terminal, and nothing elsewhere.
        max_restarts: How many times a failed run restarts from its newest checkpoint.
        overrides: Settings and parameters of the recipe, such as `epochs=5, lr=0.2`.

    Returns:
        What the run came to. It has not finished if a signal stopped it. Its `exit_code` is 1 if it
        has finished and the mirror lacks its end.

    Raises:
        RunFailedError: A rank failed; the error holds the post-mortem and the failure's record.
        UsageError: The recipe, an override, the plan or the run folder is wrong, or the ranks could
            not import the recipe function.
        KeyboardInterrupt: Ctrl-C was pressed before the first step, or twice.
    """
    from launcher.launch.prepare import RunRequest, prepare_run
    from launcher.launch.remote_run import place_run
    from launcher.launch.session import start
    from launcher.launch.signal_handler import library_signals
    from launcher.launch.typed_recipe import importable
    from launcher.recipe.resolve import check_not_importing
    from launcher.recipe.validation import NonNegativeInt, PositiveInt
    from launcher.report.write import write_report

    check_not_importing()
    with (
        library_signals() as signals,
        importable(_reference(recipe), for_ranks=True) as reference,
        _display(output, signals) as display,
    ):
        folder, url = place_run(
            _folder_or_url("out", out, Path | None),
            _argument("mirror", mirror, str | None),
            None,
            continues=False,
        )
        request = RunRequest(
            reference=reference,
            overrides=_overrides(config, overrides),
            nproc_per_node=_argument("nproc_per_node", nproc_per_node, PositiveInt | None),
            out=folder,
            mirror=url,
            max_restarts=_argument("max_restarts", max_restarts, NonNegativeInt),
            output_mode=display.output_mode,
            write_report=write_report,
            watch=display.watch,
        )
        return display.end(start(prepare_run(request), signals))


def resume(
    run_dir: str | Path,
    *,
    step: int | None = None,
    nproc_per_node: int | None = None,
    output: OutputMode | Literal["auto"] = "auto",
    max_restarts: int = 0,
    out: str | Path | None = None,
    mirror: str | None = None,
    accept: Sequence[str] = (),
    fall_back: bool = False,
    allow_code_change: bool = False,
    **overrides: Any,
) -> RunResult:
    """Resume a run from a checkpoint, to the sample, as `launcher resume` does.

    Args:
        run_dir: The run folder, or its URL in an object store, from where it is downloaded.
        step: The step of the checkpoint; None is the newest.
        nproc_per_node: Ranks; None is as many on each node as before.
        output: What is shown: "progress" prints progress for people, "json" events for programs,
            and "quiet" nothing. "auto" shows progress and a plot of the loss in a notebook, prints
            progress at a prompt in a terminal, and nothing elsewhere.
        max_restarts: How many times a failed run restarts from its newest checkpoint.
        out: With a URL: the folder to download the run to; None takes one below runs/.
        mirror: URL at which the run is kept as well; None keeps its mirror, if it has one.
        accept: What may differ from the checkpoint: "data", "missing-state".
        fall_back: Whether an older checkpoint is taken if this one is damaged.
        allow_code_change: Whether the project's present code is taken if it differs from that of
            the run so far.
        overrides: Settings and parameters of the recipe that change.

    Returns:
        What the run came to; at once if it had finished.

    Raises:
        RunFailedError: A rank failed; the error holds the post-mortem and the failure's record.
        UsageError: The folder, the checkpoint or an override is wrong.
        KeyboardInterrupt: Ctrl-C was pressed before the first step, or twice.
    """
    from launcher.errors import LauncherError, StoreError
    from launcher.launch.prepare import ResumeRequest, prepare_resume
    from launcher.launch.remote_run import fetch_run, removed_if
    from launcher.launch.session import start
    from launcher.launch.signal_handler import library_signals
    from launcher.recipe.frozen_code import restored_imports
    from launcher.recipe.resolve import check_not_importing
    from launcher.recipe.validation import NonNegativeInt, PositiveInt
    from launcher.report.write import write_report

    check_not_importing()
    with restored_imports(), library_signals() as signals, _display(output, signals) as display:
        checkpoint = None if step is None else str(_argument("step", step, NonNegativeInt))
        run = _folder_or_url("run_dir", run_dir, Path)
        target = _argument("out", out, Path | None)
        folder = fetch_run(run, target, None, checkpoint=checkpoint, fall_back=fall_back)
        request = ResumeRequest(
            run_dir=folder,
            checkpoint=checkpoint,
            mirror=_argument("mirror", mirror, str | None),
            overrides=_overrides(None, overrides),
            nproc_per_node=_argument("nproc_per_node", nproc_per_node, PositiveInt | None),
            accept=_argument("accept", accept, tuple[str, ...]),
            fall_back=fall_back,
            allow_code_change=_argument("allow_code_change", allow_code_change, bool),
            max_restarts=_argument("max_restarts", max_restarts, NonNegativeInt),
            output_mode=display.output_mode,
            write_report=write_report,
            watch=display.watch,
        )
        with removed_if(LauncherError, run, folder):
            prepared = prepare_resume(request)
        with removed_if(StoreError, run, folder):  # another process has just taken the URL
            return display.end(start(prepared, signals))


def evaluate(
    run: str | Path,
    *,
    checkpoint: int | str | None = None,
    nproc_per_node: int | None = None,
    **overrides: Any,
) -> EvaluationResult:
    """Evaluate the weights of a run over its evaluation data, as `launcher evaluate` does.

    On as many ranks as trained, the metrics are those that the run itself recorded, to the bit.

    Args:
        run: The run folder, which is only read.
        checkpoint: "last" for the newest checkpoint, "best" for the best, or a step; None takes the
            final weights or, while the run has none, the newest checkpoint.
        nproc_per_node: Ranks; None is as many on each node as the run had.
        overrides: Settings and parameters of the recipe that change, such as the data.

    Raises:
        RunFailedError: A rank failed; the error holds the failure's record.
        UsageError: The folder, the checkpoint or an override is wrong.
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    from launcher.launch.evaluate_run import WeightsRequest, evaluate_run
    from launcher.launch.signal_handler import library_signals
    from launcher.recipe.frozen_code import restored_imports
    from launcher.recipe.resolve import check_not_importing

    check_not_importing()
    with restored_imports(), library_signals(saves=False) as signals:
        fields = _weights_fields(run, checkpoint, nproc_per_node, overrides)
        return evaluate_run(WeightsRequest(**fields), signals)


def predict(
    run: str | Path,
    input: str | Path,  # noqa: A002  # as the command calls it
    *,
    out: str | Path,
    checkpoint: int | str | None = None,
    nproc_per_node: int | None = None,
    force: bool = False,
    **overrides: Any,
) -> Predictions:
    """Write what the model of a run predicts for each sample, as `launcher predict` does.

    Args:
        run: The run folder, which is only read.
        input: A file that the recipe's `predict_data` reads, or the name of a data set of the
            recipe: "train", "evaluation", or that of one of several evaluation sets.
        out: The file to write, `.jsonl` or `.parquet`: completely, or not at all.
        checkpoint: As for `evaluate`.
        nproc_per_node: Ranks; None is as many on each node as the run had.
        force: Whether `out` may replace a file.
        overrides: Settings and parameters of the recipe that change.

    Raises:
        RunFailedError: A rank failed; the error holds the failure's record.
        UsageError: The folder, the checkpoint, the input or an override is wrong, or `out` exists.
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    from launcher.launch.predict_run import PredictRequest, predict_run
    from launcher.launch.signal_handler import library_signals
    from launcher.recipe.frozen_code import restored_imports
    from launcher.recipe.resolve import check_not_importing

    check_not_importing()
    with restored_imports(), library_signals(saves=False) as signals:
        request = PredictRequest(
            **_weights_fields(run, checkpoint, nproc_per_node, overrides),
            input=str(_argument("input", input, Path)),
            out=_argument("out", out, Path),
            force=_argument("force", force, bool),
        )
        return predict_run(request, signals)


def _weights_fields(
    run: str | Path,
    checkpoint: int | str | None,
    nproc_per_node: int | None,
    overrides: dict[str, Any],
) -> dict[str, Any]:
    """Return the fields of a request to compute with the weights of a run."""
    from launcher.forking import suspect_all_threads
    from launcher.recipe.validation import NonNegativeInt, PositiveInt

    suspect_all_threads()  # those of the calling program, which a fork would not survive either
    name = _argument("checkpoint", checkpoint, NonNegativeInt | str | None)
    return {
        "run_dir": _argument("run", run, Path),
        "checkpoint": None if name is None else str(name),
        "overrides": _overrides(None, overrides),
        "nproc_per_node": _argument("nproc_per_node", nproc_per_node, PositiveInt | None),
    }


def plan(
    recipe: str | Path | Callable[..., Recipe],
    *,
    nproc_per_node: int | None = None,
    nodes: int = 1,
    config: str | Path | None = None,
    **overrides: Any,
) -> Plan:
    """Return every derived number of a run, as `launcher plan` prints it; nothing is trained.

    Args:
        recipe: As for `run`.
        nproc_per_node: Ranks on each node; None is one for each GPU of this machine, or 2.
        nodes: Nodes; they may have more GPUs than this machine.
        config: A YAML file of values for the recipe; `overrides` take precedence.
        overrides: Settings and parameters of the recipe.

    Raises:
        UsageError: The recipe or an override is wrong, or the numbers do not fit together.
    """
    from launcher.environment.machine import read_machine
    from launcher.launch.typed_recipe import importable
    from launcher.recipe.validation import PositiveInt
    from launcher.runs.plan_recipe import plan_recipe

    with importable(_reference(recipe)) as reference:
        _, derived = plan_recipe(
            reference,
            _overrides(config, overrides),
            read_machine(),
            nodes=_argument("nodes", nodes, PositiveInt),
            nproc_per_node=_argument("nproc_per_node", nproc_per_node, PositiveInt | None),
            elsewhere=True,
        )
    return derived


def sweep(
    recipe: str | Path | Callable[..., Recipe],
    grid: Mapping[str, Sequence[Any]],
    *,
    nproc_per_node: int = 1,
    parallel: int | None = None,
    metric: str = "loss:min",
    stop: Literal["halving"] | None = None,
    eta: int = 3,
    min_steps: int | None = None,
    out: str | Path | None = None,
    config: str | Path | None = None,
    **overrides: Any,
) -> SweepResult:
    """Train a recipe with every combination of some settings, as `launcher sweep` does.

    A run that fails does not end the others and raises nothing: its result has the state `failed`
    and the error.

    Args:
        recipe: As for `run`.
        grid: The values of each setting or parameter that varies, such as `{"lr": [0.1, 0.2]}`.
        nproc_per_node: Ranks of each run.
        parallel: Runs at a time; None is as many as there are GPUs for, or one on the CPU.
        metric: The metric that compares the runs, and whether its `min` or `max` is best.
        stop: "halving" ends runs early by successive halving; None trains each to its end.
        eta: With `stop`: of every `eta` runs, the best goes on, for `eta` times as many steps.
        min_steps: With `stop`: steps before the first choice; None takes what leaves one run.
        out: The folder to make, or of the same sweep, which continues: runs that have finished are
            skipped. None makes `runs/sweep-<recipe>-<time>`.
        config: A YAML file of values for the recipe; `overrides` and `grid` take precedence.
        overrides: Settings and parameters of the recipe in every run.

    Returns:
        The result of each run in the order of the grid, the best one as `best`, and the folder.

    Raises:
        UsageError: A setting is unknown, a list of values is empty or holds one twice, or the
            folder is wrong; nothing was trained.
        KeyboardInterrupt: Ctrl-C was pressed before the first run.
    """
    from launcher.environment.machine import read_machine
    from launcher.launch.only_launcher import check_only_launcher
    from launcher.launch.typed_recipe import importable
    from launcher.recipe.metric_goal import read_goal
    from launcher.recipe.resolve import check_not_importing
    from launcher.recipe.validation import PositiveInt
    from launcher.sweeps.sweep_request import (
        Eta,
        SweepRequest,
        prepare_sweep,
        read_grid,
        rule_of,
    )
    from launcher.sweeps.sweeper import Quiet, run_sweep

    check_not_importing()
    check_only_launcher()
    with importable(_reference(recipe), for_ranks=True) as reference:
        request = SweepRequest(
            reference=reference,
            axes={name: [*map(_plain, values)] for name, values in read_grid(grid).items()},
            source="Python",
            overrides=_overrides(config, overrides),
            nproc_per_node=_argument("nproc_per_node", nproc_per_node, PositiveInt),
            parallel=_argument("parallel", parallel, PositiveInt | None),
            goal=read_goal(_argument("metric", metric, str), where="metric="),
            rule=rule_of(
                _argument("stop", stop, Literal["halving"] | None),
                _argument("eta", eta, Eta),
                _argument("min_steps", min_steps, PositiveInt | None),
            ),
        )
        prepared = prepare_sweep(request, read_machine())
        return run_sweep(prepared, Quiet(), out=_argument("out", out, Path | None), announces=False)


def objective(
    recipe: str | Path | Callable[..., Recipe],
    *,
    metric: str = "loss",
    trial: PrunableTrial | None = None,
    nproc_per_node: int | None = None,
    out: str | Path | None = None,
    config: str | Path | None = None,
    **overrides: Any,
) -> float:
    """Train a recipe and return a metric of its final evaluation, for a search such as Optuna's.

    Args:
        recipe: As for `run`.
        metric: Name of the metric.
        trial: An Optuna trial that may end the run early: it receives the metric of each
            evaluation, and a pruned run raises `optuna.TrialPruned`. None trains to the end.
        nproc_per_node: Ranks; None is one for each GPU, or 2 CPU ranks if there is no GPU.
        out: The run folder to make; None makes `runs/<recipe>-<time>`.
        config: A YAML file of values for the recipe; `overrides` take precedence.
        overrides: Settings and parameters of the recipe, such as those that the search suggests.

    Raises:
        RunFailedError: A rank failed.
        TrainingError: A signal stopped the run.
        UsageError: The recipe, an override, the folder or the metric is wrong.
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    from launcher.launch.typed_recipe import importable
    from launcher.recipe.resolve import check_not_importing
    from launcher.recipe.validation import PositiveInt
    from launcher.sweeps.search_objective import run_prunable, value_of

    check_not_importing()
    if trial is None:
        result = run(recipe, nproc_per_node=nproc_per_node, out=out, config=config, **overrides)
    else:
        with importable(_reference(recipe), for_ranks=True) as reference:
            result = run_prunable(
                reference,
                _overrides(config, overrides),
                trial,
                metric,
                nproc_per_node=_argument("nproc_per_node", nproc_per_node, PositiveInt | None),
                out=_argument("out", out, Path | None),
            )
    return value_of(result, metric)


def _reference(recipe: str | Path | Callable[..., Recipe]) -> Reference:
    from launcher.errors import UsageError
    from launcher.forking import suspect_all_threads
    from launcher.printable import kind_of
    from launcher.recipe.resolve import reference_of, resolve

    suspect_all_threads()  # those of the calling program, which a fork would not survive either
    if callable(recipe):
        return reference_of(recipe)
    if not isinstance(recipe, (str, Path)):
        raise UsageError(
            f"recipe: expected a name, a path or a recipe function, found {kind_of(recipe)}. Pass "
            "the function that returns launcher.Recipe(...), without calling it, and give its "
            "arguments as name=value."
        )
    return resolve(str(recipe))


@dataclass(kw_only=True)
class _Display:
    """How a run is shown while a function of this module waits for it."""

    output_mode: OutputMode
    """What the ranks print."""

    screen: NotebookScreen | None = None
    """The output of a notebook's cell; None where this process is no notebook."""

    @property
    def watch(self) -> Callable[[RunDir], object] | None:
        """What the launcher calls while the ranks run."""
        return None if self.screen is None else self.screen.update

    def end(self, result: RunResult) -> RunResult:
        """Show the end of a run, and return its result."""
        if self.screen is not None:
            self.screen.end(result.run_dir)
        return result


@contextlib.contextmanager
def _display(output: OutputMode | Literal["auto"], signals: SignalHandler) -> Iterator[_Display]:
    """Yield how a run is shown, and show the error that ends it.

    Raises:
        UsageError: `output` is no such mode.
    """
    from launcher.environment.notebook import at_prompt, in_notebook
    from launcher.runs.job import OutputMode

    mode = _argument("output", output, OutputMode | Literal["auto"])
    if mode != "auto":
        yield _Display(output_mode=mode)
        return
    if not in_notebook():
        yield _Display(output_mode="progress" if at_prompt() else "quiet")
        return
    from launcher.console.notebook_screen import NotebookScreen

    screen = NotebookScreen(lambda: signals.stopped_by is not None)
    try:
        yield _Display(output_mode="quiet", screen=screen)
    except BaseException as error:
        screen.fail(error)
        raise


def _overrides(config: str | Path | None, values: dict[str, Any]) -> tuple[Override, ...]:
    from launcher.recipe.overrides import Override, read_yaml

    file = _argument("config", config, Path | None)
    from_file = read_yaml(file) if file is not None else ()
    from_python = (
        Override(name=name, value=_plain(value), source="Python") for name, value in values.items()
    )
    return (*from_file, *from_python)


def _folder_or_url(name: str, value: Any, hint: Any) -> Any:
    """Return a URL as it is, and everything else as an instance of its type.

    Raises:
        UsageError: It does not fit.
    """
    from launcher.object_stores.locations import is_url

    return value if is_url(value) else _argument(name, value, hint)


def _argument(name: str, value: Any, hint: Any) -> Any:
    """Return an argument as an instance of its type.

    Raises:
        UsageError: It does not fit.
    """
    from launcher.errors import UsageError
    from launcher.recipe.validation import MismatchError, convert

    try:
        return convert(_plain(value), hint)
    except MismatchError as error:
        raise UsageError(f"{name}=...: {error}.") from None


def _plain(value: Any) -> Any:
    """Return a value as run.yaml and the ranks take it.

    A number of NumPy, or of torch, is the Python number that has its value; a member of an
    enumeration is its value or name.
    """
    from launcher.recipe.typed_values import UnfitError, plain

    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "shape", None) == ():
        return item()
    try:
        return plain(value) if isinstance(value, enum.Enum) else value
    except UnfitError:
        return value


def write_hugging_face(
    run: Path, folder: Path, overrides: Sequence[Override] = (), *, max_shard_bytes: int
) -> Export:
    """Write the final weights of a run for `from_pretrained`, as `launcher export --hf` does.

    Args:
        run: The run folder.
        folder: The folder to write, which may replace an earlier export.
        overrides: Settings with which the recipe is built again.
        max_shard_bytes: Size of the largest file of weights in bytes, unless one weight is larger.

    Raises:
        UsageError: The run or the recipe lacks what is needed, or the folder is in the way.
    """
    from launcher.engine.saving.hugging_face import (
        build_without_values,
        check_export,
        export_weights,
    )
    from launcher.recipe.frozen_code import restored_imports
    from launcher.runs.rebuilding import rebuilt_recipe
    from launcher.runs.rundir import open_run_dir

    run_dir, target = open_run_dir(run), folder.absolute()
    check_export(run_dir, target)
    with restored_imports(), rebuilt_recipe(run_dir, tuple(overrides)) as recipe:
        model = build_without_values(recipe)
        return export_weights(run_dir, model, target, max_shard_bytes=max_shard_bytes)
