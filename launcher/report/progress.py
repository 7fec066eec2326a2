"""Live progress of a run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TextIO, cast

from launcher.report.quantities import duration

_SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Shows how far a run is.

    Args:
        total_steps: Optimizer steps of the run.
        terminal: Where people look. A bar if it is a terminal, otherwise lines.
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
        self._total_steps = total_steps
        self._started = time.perf_counter()
        self._first_step: int | None = None
        self._line_due = 0.0
        self._bar = _Bar(total_steps, terminal, show_through) if terminal.isatty() else None
        self._line_files = [log] if self._bar else [log, terminal]

    def stepped(self, step: int, loss: float, lr: float, samples_per_second: float) -> None:
        """Show that `step` steps are done."""
        now = time.perf_counter()
        if self._first_step is None:
            self._first_step, self._started = step, now
        left = duration(self._seconds_left(step, now))
        status = f"loss {loss:.4f}  lr {lr:.3g}  {samples_per_second:,.0f} samples/s"
        if self._bar is not None:
            self._bar.update(step, f"{status}  {left} left")
        if now >= self._line_due or step == self._total_steps:
            self._line_due = now + _SECONDS_BETWEEN_LINES
            self._line(f"step {step:,}/{self._total_steps:,}  {status}  {left} left")

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        """Show an evaluation after `step` steps; the last one is left to the summary."""
        if step == self._total_steps:
            return
        self.tell(f"step {step:,}/{self._total_steps:,}  held-out: {metrics_text(values)}")

    def tell(self, text: str) -> None:
        """Show a line."""
        if self._bar is not None:
            self._bar.print(text)
        self._line(text)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.close()

    def _seconds_left(self, step: int, now: float) -> float | None:
        done = step - (self._first_step or 0)
        if done <= 0:
            return None
        return (now - self._started) / done * (self._total_steps - step)

    def _line(self, text: str) -> None:
        for file in self._line_files:
            print(text, file=file, flush=True)


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
