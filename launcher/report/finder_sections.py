"""What finders have left in their folders, as sections of a page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher.analysis.gradient_noise import Measurement, RunningNoise
from launcher.analysis.lr_curve import FoundLR, LossCurve, suggest
from launcher.console.plots import Curve, Plot
from launcher.errors import RunDirError
from launcher.planning.plan import Plan
from launcher.report.page import Section
from launcher.runs.history import History
from launcher.runs.run_record import read_run
from launcher.runs.rundir import RunDir
from launcher.tuning.summaries import lr_plot, lr_rules


def tuned_folder(history: History) -> Path | None:
    """Return the folder of the `launcher tune` that a run took its settings from, if it is there.

    Its --config was called tuned.yaml then, and a folder of that run holds it.
    """
    base = Path(history.record.folder)
    for source in history.plan.sources.values():
        name, _, _ = source.rpartition(", line ")
        if name.endswith("tuned.yaml") and (base / name).is_file():
            return (base / name).parent
    return None


def is_measured(folder: Path) -> bool:
    """Return whether a folder holds what a finder measured, rather than a run."""
    return next(_parts(folder), None) is not None


def measured_sections(folder: Path) -> list[Section]:
    """Return what finders measured in a folder, or `launcher tune` in those below it.

    Raises:
        RunDirError: It is damaged.
    """
    sections = []
    for kind, runs in _parts(folder):
        try:
            sections.append(kind(runs))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunDirError(f"{runs[0].shown} is damaged: {error}") from None
    return sections


def _parts(folder: Path) -> Iterator[tuple[Any, list[RunDir]]]:
    kinds = (
        (_range_test, "curve.json", ("", "lr")),
        (_noise, "noise.json", ("", "noise")),
        (_sizes, "size.json", ("size-*", "batch/size-*")),
        (_readings, "reading.json", ("*", "loader/*")),
    )
    for kind, name, places in kinds:
        for place in places:
            found = [folder] if not place else sorted(folder.glob(place))
            runs = [RunDir(each.resolve()) for each in found if (each / name).is_file()]
            if runs:
                yield kind, runs
                break


def _range_test(runs: list[RunDir]) -> Section:
    plan, values = _read(runs[0], "curve.json")
    curve = LossCurve(lrs=tuple(values["lrs"]), losses=tuple(values["losses"]))
    found = FoundLR(curve=curve, suggestions=suggest(curve))
    title = f"Learning rate, at a batch of {plan.batch_size:,}"
    return Section(title=title, text=lr_rules(found, plan), figures=[lr_plot(found, plan)])


def _noise(runs: list[RunDir]) -> Section:
    plan, values = _read(runs[0], "noise.json")
    running = RunningNoise(memory=max(len(values["measurements"]) / 10, 10))
    points = []
    for each in values["measurements"]:
        scale = running.add(Measurement(**each))
        if scale is not None:
            points.append((each["step"], scale))
    curve = Curve(name="B_simple", xs=[s for s, _ in points], ys=[scale for _, scale in points])
    plot = Plot(
        title=f"{plan.recipe}: gradient noise scale",
        x_label="step",
        y_label="items",
        curves=[curve],
        log_y=True,
    )
    return Section(title="Gradient noise scale", figures=[plot])


def _sizes(runs: list[RunDir]) -> Section:
    points = []
    for run_dir in runs:
        plan, values = _read(run_dir, "size.json")
        points.append((plan.micro_batch_size, values["samples_per_second"]))
    title = f"{plan.recipe}: speed over the micro-batch"
    return _rates("Micro-batch", title, "micro-batch", points, log_x=True)


def _readings(runs: list[RunDir]) -> Section:
    best: dict[int, float] = {}
    for run_dir in runs:
        plan, values = _read(run_dir, "reading.json")
        rate = values["samples_per_second"]
        best[plan.workers_per_rank] = max(best.get(plan.workers_per_rank, 0.0), rate)
    title = f"{plan.recipe}: speed over the workers of a rank"
    return _rates("DataLoader workers", title, "workers", list(best.items()), log_x=False)


def _rates(
    name: str, title: str, label: str, points: list[tuple[int, float]], *, log_x: bool
) -> Section:
    points.sort()
    rates = Curve(name="samples/s", xs=[x for x, _ in points], ys=[rate for _, rate in points])
    plot = Plot(title=title, x_label=label, y_label="samples/s", curves=[rates], log_x=log_x)
    return Section(title=name, figures=[plot])


def _read(run_dir: RunDir, name: str) -> tuple[Plan, dict[str, Any]]:
    values: dict[str, Any] = json.loads((run_dir.path / name).read_text(encoding="utf-8"))
    return read_run(run_dir).read_plan(), values
