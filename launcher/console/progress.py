"""Live progress of a run: a bar on a terminal, plain lines elsewhere, JSON lines for programs."""

from __future__ import annotations

import itertools
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO, cast

from launcher.quantities import duration

_SECONDS_BETWEEN_LINES = 5.0
_SPARKS = "▁▂▃▄▅▆▇█"
_SPARKLINE = 12
_MOST_KEPT = 1000


class Progress(ABC):
    """Shows how far a run is.

    Args:
        total_steps: Optimizer steps of the run.
    """

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps
        self._started = time.perf_counter()
        self._first_step: int | None = None

    @abstractmethod
    def stepped(self, step: int, loss: float, lr: float, samples_per_second: float) -> None:
        """Show that `step` steps are done."""

    @abstractmethod
    def evaluated(self, step: int, values: dict[str, float]) -> None:
        """Show an evaluation after `step` steps."""

    @abstractmethod
    def tell(self, text: str) -> None:
        """Show a line."""

    @abstractmethod
    def close(self) -> None:
        """Leave the terminal as it was."""

    @abstractmethod
    def ended(self, text: str, values: Mapping[str, Any]) -> None:
        """Show what the run came to, after it was closed.

        Args:
            text: For people.
            values: For programs.
        """

    def _seconds_left(self, step: int) -> float | None:
        now = time.perf_counter()
        if self._first_step is None:
            self._first_step, self._started = step, now
        done = step - self._first_step
        if done <= 0:
            return None
        return (now - self._started) / done * (self._total_steps - step)


class TerminalProgress(Progress):
    """For people: a bar if there is a terminal, otherwise lines.

    Args:
        total_steps: Optimizer steps of the run.
        terminal: Where people look.
        log: Where lines are kept in any case.
        show_through: Called with the stream through which other output has to go while there is
            a bar, and with None when there is none any more.
    """

    def __init__(
        self,
        total_steps: int,
        terminal: TextIO,
        log: TextIO,
        show_through: Callable[[TextIO | None], None],
    ) -> None:
        super().__init__(total_steps)
        self._line_due = 0.0
        self._losses: list[float] = []
        self._bar = _Bar(total_steps, terminal, show_through) if terminal.isatty() else None
        self._line_files = [log] if self._bar else [log, terminal]

    def stepped(self, step: int, loss: float, lr: float, samples_per_second: float) -> None:
        left = duration(self._seconds_left(step))
        now = time.perf_counter()
        rest = f"lr {lr:.3g}  {samples_per_second:,.0f} samples/s"
        if self._bar is not None:
            self._losses.append(loss)
            if len(self._losses) > _MOST_KEPT:
                self._losses = self._losses[::2]
            sparks = sparkline(self._losses, _SPARKLINE)
            self._bar.update(step, f"loss {loss:.4f} {sparks}  {rest}  {left} left")
        if now >= self._line_due or step == self._total_steps:
            self._line_due = now + _SECONDS_BETWEEN_LINES
            self._line(step_line(step, self._total_steps, loss, lr, samples_per_second, left))

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        if step == self._total_steps:
            return  # it is left to the end
        self.tell(f"step {step:,}/{self._total_steps:,}  held-out: {metrics_text(values)}")

    def tell(self, text: str) -> None:
        if self._bar is not None:
            self._bar.print(text)
        self._line(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def ended(self, text: str, values: Mapping[str, Any]) -> None:
        print(text, flush=True)

    def _line(self, text: str) -> None:
        for file in self._line_files:
            print(text, file=file, flush=True)


class JSONProgress(Progress):
    """For programs: a line of JSON for each thing that happens.

    Args:
        total_steps: Optimizer steps of the run.
        stream: Where to.
    """

    def __init__(self, total_steps: int, stream: TextIO) -> None:
        super().__init__(total_steps)
        self._stream = stream

    def stepped(self, step: int, loss: float, lr: float, samples_per_second: float) -> None:
        left = self._seconds_left(step)
        self._write(
            event="stepped",
            step=step,
            total_steps=self._total_steps,
            loss=loss,
            lr=lr,
            samples_per_second=samples_per_second,
            seconds_left=left,
        )

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        self._write(event="evaluated", step=step, evaluation=values)

    def tell(self, text: str) -> None:
        self._write(event="told", text=text)

    def close(self) -> None:
        """Nothing is open."""

    def ended(self, text: str, values: Mapping[str, Any]) -> None:
        self._write(**values)

    def _write(self, **values: Any) -> None:
        print(json_line(values), file=self._stream, flush=True)


def json_line(values: Mapping[str, Any]) -> str:
    """Return values as one line of JSON, null where a number is not finite."""
    return json.dumps({name: _finite(value) for name, value in values.items()})


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def step_line(
    step: int, total_steps: int, loss: float, lr: float, samples_per_second: float, left: str
) -> str:
    """Return how far a run is, in a line."""
    return (
        f"step {step:,}/{total_steps:,}  loss {loss:.4f}  lr {lr:.3g}  "
        f"{samples_per_second:,.0f} samples/s  {left} left"
    )


def sparkline(values: Sequence[float], width: int) -> str:
    """Return values as a row of at most `width` bars, each the mean of a stretch of them."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return ""
    width = min(width, len(known))
    edges = [round(index * len(known) / width) for index in range(width + 1)]
    means = [sum(known[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_SPARKS[round((mean - low) * scale)] for mean in means)


class _Bar:
    """A rich progress bar; rich is imported only where there is a terminal."""

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
            refresh_per_second=4,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._show_through = show_through
        self._task = self._progress.add_task("", total=total_steps, status="starting")
        self._progress.start()
        show_through(cast("TextIO", FileProxy(self._progress.console, terminal)))

    def update(self, step: int, status: str) -> None:
        self._progress.update(self._task, completed=step, status=status)

    def print(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        self._show_through(None)
        self._progress.stop()


def metrics_text(values: dict[str, Any]) -> str:
    """Return metric values in one line: `accuracy 0.9806  loss 0.0712`."""
    ordered = sorted(values, key=lambda name: (name == "loss", name))
    return "  ".join(f"{name} {values[name]:.4f}" for name in ordered)
