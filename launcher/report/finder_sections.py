"""Sections of a page that show what `launcher find` and `launcher tune` measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from launcher.analysis.gradient_noise import RunningNoise
from launcher.console.plots import Curve, Plot
from launcher.errors import RunDirError
from launcher.paths import is_dir, is_file
from launcher.planning.plan import Plan
from launcher.quantities import size
from launcher.report.page import Section, Table
from launcher.runs.history import History
from launcher.runs.run_record import read_run
from launcher.runs.rundir import RunDir
from launcher.tuning.measured_files import (
    read_loading,
    read_lr_search,
    read_noise,
    read_size,
)
from launcher.tuning.summaries import lr_plot, lr_suggestions_text

_SectionMaker = Callable[[list[RunDir]], Section]


def tuned_folder(history: History) -> Path | None:
    """Return the folder of the `launcher tune` that a run took its settings from.

    A run took its settings from there if it was started with the --config tuned.yaml that
    `launcher tune` wrote.

    Returns:
        The folder; None if no setting comes from a tuned.yaml or the file no longer exists.
    """
    started_in = Path(history.record.folder)
    for source in history.plan.sources.values():
        config, _, _ = source.rpartition(", line ")
        if config.endswith("tuned.yaml") and is_file(started_in / config):
            return (started_in / config).parent
    return None


def is_finder_folder(folder: Path) -> bool:
    """Return whether a folder holds the measurements of a finder and not a run."""
    return next(_measurements(folder), None) is not None


def measured_sections(folder: Path) -> list[Section]:
    """Return a section for each kind of measurement in a folder.

    Args:
        folder: Folder of `launcher find` or of `launcher tune`.

    Raises:
        RunDirError: A measurement cannot be read.
    """
    sections = []
    for make_section, run_dirs in _measurements(folder):
        try:
            sections.append(make_section(run_dirs))
        except (ValueError, ArithmeticError) as error:
            raise RunDirError(
                f"The measurements in {run_dirs[0].shown} are damaged: {error}"
            ) from None
    return sections


def _measurements(folder: Path) -> Iterator[tuple[_SectionMaker, list[RunDir]]]:
    """Yield each kind of measurement in a folder: its function below, and its run folders.

    `launcher find` leaves the file of a measurement in the folder itself or one level below it,
    `launcher tune` in the folders `lr`, `noise`, `batch` and `loader`.
    """
    kinds: tuple[tuple[_SectionMaker, str, tuple[str, ...]], ...] = (
        (_lr_section, "search.json", ("", "lr")),
        (_noise_section, "noise.json", ("", "noise")),
        (_batch_section, "size.json", ("size-*", "batch/size-*")),
        (_loader_section, "reading.json", ("*", "loader/*")),
        (_strategy_section, "size.json", ("strategy-*",)),
    )
    if not is_dir(folder):
        return
    for make_section, file_name, patterns in kinds:
        for pattern in patterns:
            paths = sorted(folder.glob(pattern)) if pattern else [folder]
            run_dirs = [RunDir(path.resolve()) for path in paths if is_file(path / file_name)]
            if run_dirs:
                yield make_section, run_dirs
                break


def _lr_section(run_dirs: list[RunDir]) -> Section:
    measured = searched = run_dirs[0]
    tuned = RunDir(measured.path.parent / "trainings")  # what `launcher tune` trained later
    if measured.path.name == "lr" and is_file(tuned.lr_search):
        measured, searched = RunDir(tuned.path / "trainings"), tuned
    plan, result = _plan_of(measured), read_lr_search(searched)
    title = f"Learning rate, at a batch of {plan.batch_size:,}"
    return Section(
        title=title, text=lr_suggestions_text(result, plan), figures=[lr_plot(result, plan)]
    )


def _noise_section(run_dirs: list[RunDir]) -> Section:
    plan, measurements = _plan_of(run_dirs[0]), read_noise(run_dirs[0]).measurements
    running = RunningNoise(memory=max(len(measurements) / 10, 10))
    points = []
    for measurement in measurements:
        scale = running.add(measurement)
        if scale is not None:
            points.append((measurement.step, scale))
    curve = Curve(
        name="B_simple", xs=[step for step, _ in points], ys=[scale for _, scale in points]
    )
    plot = Plot(
        title=f"{plan.recipe}: gradient noise scale",
        x_label="step",
        y_label="items",
        curves=[curve],
        log_y=True,
    )
    return Section(title="Gradient noise scale", figures=[plot])


def _batch_section(run_dirs: list[RunDir]) -> Section:
    points = []
    for run_dir in run_dirs:
        plan, reading = _plan_of(run_dir), read_size(run_dir)
        points.append((plan.micro_batch_size, reading.samples_per_second))
    title = f"{plan.recipe}: throughput over the micro-batch"
    return _throughput_section("Micro-batch", title, "micro-batch", points, log_x=True)


def _strategy_section(run_dirs: list[RunDir]) -> Section:
    rows = []
    for run_dir in run_dirs:
        plan, reading = _plan_of(run_dir), read_size(run_dir)
        flags = [
            plan.strategy,
            *plan.performance_flags,
            f"micro_batch_size={plan.micro_batch_size}",
        ]
        peak = "" if reading.peak_bytes is None else size(reading.peak_bytes)
        rows.append((" ".join(flags), peak, f"{reading.samples_per_second:,.0f}"))
    table = Table(head=("strategy", "memory per rank", "samples/s"), rows=rows)
    return Section(title="Strategy", table=table)


def _loader_section(run_dirs: list[RunDir]) -> Section:
    fastest: dict[int, float] = {}
    for run_dir in run_dirs:
        plan, throughput = _plan_of(run_dir), read_loading(run_dir).samples_per_second
        workers = plan.workers_per_rank
        fastest[workers] = max(fastest.get(workers, 0.0), throughput)
    title = f"{plan.recipe}: throughput over the workers per rank"
    points = list(fastest.items())
    return _throughput_section("DataLoader workers", title, "workers", points, log_x=False)


def _throughput_section(
    name: str, title: str, x_label: str, points: list[tuple[int, float]], *, log_x: bool
) -> Section:
    points.sort()
    curve = Curve(name="samples/s", xs=[x for x, _ in points], ys=[y for _, y in points])
    plot = Plot(title=title, x_label=x_label, y_label="samples/s", curves=[curve], log_x=log_x)
    return Section(title=name, figures=[plot])


def _plan_of(run_dir: RunDir) -> Plan:
    """Return the plan of a measurement."""
    return read_run(run_dir).read_plan()
