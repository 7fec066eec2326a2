"""Live progress of a run: a bar on a terminal, plain lines elsewhere, JSON lines for programs.

The text of a step, of metrics and of a sparkline is here too; `launcher watch` and
`launcher runs` show the same.
"""

from __future__ import annotations

import itertools
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TextIO, cast

from launcher.json_file import encode_json
from launcher.printable import printable
from launcher.quantities import duration, measured
from launcher.runs.history import evaluation_set_names, split_metric
from launcher.runs.step_row import LOGGED

NOTHING: Mapping[str, float] = MappingProxyType({})
"""What is shown beside the loss where a recipe logs nothing."""

_MAX_LOGGED = 4
"""Logged numbers that are shown in a line; files and reports have all of them."""

_SECONDS_BETWEEN_LINES = 5.0
_SECONDS_BETWEEN_REFRESHES = 0.25
_SPARKS = "▁▂▃▄▅▆▇█"
_SPARKLINE_WIDTH = 12
_MAX_LOSSES = 1000
"""Losses kept for the sparkline; beyond that every second one is dropped."""


class Progress(ABC):
    """A display of the progress of one run.

    Args:
        total_steps: Number of optimizer steps of the run.
    """

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps
        self._started = time.perf_counter()
        self._first_step: int | None = None

    @abstractmethod
    def show_step(
        self,
        step: int,
        loss: float,
        lr: float,
        samples_per_second: float,
        logged: Mapping[str, float] = NOTHING,
    ) -> None:
        """Show that `step` optimizer steps are complete, with the values of the last of them.

        Args:
            step: Number of completed steps.
            loss: Training loss of the last step.
            lr: Learning rate of the last step.
            samples_per_second: Throughput of all ranks together.
            logged: The latest numbers that the recipe has logged, by name.
        """

    @abstractmethod
    def show_evaluation(self, step: int, values: dict[str, float]) -> None:
        """Show the metrics of an evaluation after `step` steps, by name."""

    @abstractmethod
    def show_line(self, text: str) -> None:
        """Show one line of text."""

    def set_steps(self, total_steps: int, text: str, values: Mapping[str, Any]) -> None:
        """Show that the run will have another number of steps than was planned at first.

        Args:
            total_steps: The number of steps.
            text: The reason for people, one line.
            values: The same for programs, JSON-compatible.
        """
        del values
        self._total_steps = total_steps
        self.show_line(text)

    @abstractmethod
    def close(self) -> None:
        """Stop the live display and restore the terminal."""

    @abstractmethod
    def show_result(self, text: str, values: Mapping[str, Any]) -> None:
        """Show the result of the run. Call it after `close`.

        Args:
            text: The result for people, one or more lines.
            values: The result for programs, JSON-compatible.
        """

    def _seconds_left(self, step: int) -> float | None:
        now = time.perf_counter()
        if self._first_step is None:
            self._first_step, self._started = step, now
        num_done = step - self._first_step
        if num_done <= 0:
            return None
        return (now - self._started) / num_done * (self._total_steps - step)


class TerminalProgress(Progress):
    """Progress for people: a bar if `terminal` is a terminal, otherwise one line every 5 seconds.

    Args:
        total_steps: Number of optimizer steps of the run.
        terminal: The stream that shows the progress.
        log: A file that receives the lines in either case.
        show_through: Called with the stream that other output must use while the bar is shown,
            and with None once the bar is closed.
        has_bar: Whether a terminal shows a bar.
    """

    def __init__(
        self,
        total_steps: int,
        terminal: TextIO,
        log: TextIO,
        show_through: Callable[[TextIO | None], None],
        *,
        has_bar: bool = True,
    ) -> None:
        super().__init__(total_steps)
        self._line_due = 0.0
        self._losses: list[float] = []
        shows_bar = has_bar and terminal.isatty()
        self._bar = _Bar(total_steps, terminal, show_through) if shows_bar else None
        self._line_files = [log] if self._bar else [log, terminal]

    def show_step(
        self,
        step: int,
        loss: float,
        lr: float,
        samples_per_second: float,
        logged: Mapping[str, float] = NOTHING,
    ) -> None:
        time_left = duration(self._seconds_left(step))
        now = time.perf_counter()
        if self._bar is not None:
            self._losses.append(loss)
            if len(self._losses) > _MAX_LOSSES:
                self._losses = self._losses[::2]
            sparks = sparkline(self._losses, _SPARKLINE_WIDTH)
            rates = f"lr {lr:.3g}  {samples_per_second:,.0f} samples/s"
            losses = f"loss {measured(loss)} {sparks}{logged_text(logged)}"
            self._bar.update(step, f"{losses}  {rates}  {time_left} left")
        if now >= self._line_due or step == self._total_steps:
            self._line_due = now + _SECONDS_BETWEEN_LINES
            self._write_line(
                step_line(step, self._total_steps, loss, lr, samples_per_second, time_left, logged)
            )

    def set_steps(self, total_steps: int, text: str, values: Mapping[str, Any]) -> None:
        super().set_steps(total_steps, text, values)
        if self._bar is not None:
            self._bar.set_total(total_steps)

    def show_evaluation(self, step: int, values: dict[str, float]) -> None:
        if step == self._total_steps:
            return  # `show_result` shows the last evaluation
        self.show_line(f"step {step:,}/{self._total_steps:,}  held-out: {metrics_text(values)}")

    def show_line(self, text: str) -> None:
        text = printable(text)
        if self._bar is not None:
            self._bar.print(text)
        self._write_line(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def show_result(self, text: str, values: Mapping[str, Any]) -> None:
        print(printable(text), flush=True)

    def _write_line(self, text: str) -> None:
        for file in self._line_files:
            print(text, file=file, flush=True)


class JSONProgress(Progress):
    """Progress for programs: one line of JSON for each event.

    Args:
        total_steps: Number of optimizer steps of the run.
        stream: The stream that receives the lines.
    """

    def __init__(self, total_steps: int, stream: TextIO) -> None:
        super().__init__(total_steps)
        self._stream = stream

    def show_step(
        self,
        step: int,
        loss: float,
        lr: float,
        samples_per_second: float,
        logged: Mapping[str, float] = NOTHING,
    ) -> None:
        self._write(
            event="stepped",
            step=step,
            total_steps=self._total_steps,
            loss=loss,
            lr=lr,
            samples_per_second=samples_per_second,
            seconds_left=self._seconds_left(step),
            **{f"{LOGGED}{name}": value for name, value in logged.items()},
        )

    def set_steps(self, total_steps: int, text: str, values: Mapping[str, Any]) -> None:
        del text
        self._total_steps = total_steps
        self._write(event="timed", **values)

    def show_evaluation(self, step: int, values: dict[str, float]) -> None:
        self._write(event="evaluated", step=step, evaluation=values)

    def show_line(self, text: str) -> None:
        self._write(event="message", text=text)

    def close(self) -> None:
        """Do nothing: JSON lines leave no live display."""

    def show_result(self, text: str, values: Mapping[str, Any]) -> None:
        self._write(**values)

    def _write(self, **values: Any) -> None:
        print(json_line(values), file=self._stream, flush=True)


def json_line(values: Mapping[str, Any]) -> str:
    """Return values as one line of JSON. Infinities and NaN become null."""
    return encode_json(values)


def logged_text(logged: Mapping[str, float]) -> str:
    """Return the first logged numbers as text after two blanks: `  accuracy 0.9806`."""
    shown = itertools.islice(logged.items(), _MAX_LOGGED)
    return "".join(f"  {name} {measured(value)}" for name, value in shown)


def step_line(
    step: int,
    total_steps: int,
    loss: float,
    lr: float,
    samples_per_second: float,
    time_left: str,
    logged: Mapping[str, float] = NOTHING,
) -> str:
    """Return the progress of a run as one line.

    Args:
        step: Number of completed steps.
        total_steps: Number of planned steps.
        loss: Training loss of the last step.
        lr: Learning rate of the last step.
        samples_per_second: Throughput of all ranks together.
        time_left: Remaining time as text.
        logged: The latest numbers that the recipe has logged, by name.
    """
    return (
        f"step {step:,}/{total_steps:,}  loss {measured(loss)}{logged_text(logged)}  lr {lr:.3g}  "
        f"{samples_per_second:,.0f} samples/s  {time_left} left"
    )


def sparkline(values: Sequence[float], width: int) -> str:
    """Return values as a row of at most `width` block characters.

    Each character shows the mean of an equal share of the values, the lowest mean as the lowest
    block and the highest as the highest. Values that are not finite are skipped.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    width = min(width, len(finite))
    edges = [round(index * len(finite) / width) for index in range(width + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_SPARKS[round((mean - low) * scale)] for mean in means)


class _Bar:
    """A progress bar drawn by rich, which is imported only where a terminal shows the bar."""

    def __init__(
        self,
        total_steps: int,
        terminal: TextIO,
        show_through: Callable[[TextIO | None], None],
    ) -> None:
        from rich.console import Console
        from rich.file_proxy import FileProxy
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[status]}"),
            console=Console(file=terminal),
            auto_refresh=False,  # a thread would draw over a debugger
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._show_through = show_through
        self._task = self._progress.add_task("", total=total_steps, status="starting")
        self._refresh_due = 0.0
        self._progress.start()
        self._progress.refresh()
        show_through(cast("TextIO", FileProxy(self._progress.console, terminal)))

    def update(self, step: int, status: str) -> None:
        self._progress.update(self._task, completed=step, status=status)
        if time.perf_counter() >= self._refresh_due:
            self._refresh_due = time.perf_counter() + _SECONDS_BETWEEN_REFRESHES
            self._progress.refresh()

    def set_total(self, total_steps: int) -> None:
        self._progress.update(self._task, total=total_steps)

    def print(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        self._show_through(None)
        self._progress.refresh()
        self._progress.stop()


def metrics_text(values: Mapping[str, Any]) -> str:
    """Return metrics as one line: `accuracy 0.9806  loss 0.0712`.

    The metrics of several evaluation sets follow each other set by set, the loss last in each.
    """
    return "  ".join(f"{name} {measured(values[name])}" for name in ordered_metrics(values))


def ordered_metrics(values: Mapping[str, Any]) -> list[str]:
    """Return the names of metrics set by set, in each by name with the loss last."""
    sets = {name: index for index, name in enumerate(evaluation_set_names(values))}

    def key(name: str) -> tuple[int, bool, str]:
        set_name, metric = split_metric(name, sets)
        return sets.get(set_name, -1), metric == "loss", metric

    return sorted(values, key=key)
