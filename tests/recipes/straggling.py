"""A recipe in which one rank is slow."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Any

from launcher import Recipe, main
from launcher.recipes.digits import digits


class HostEvent:
    """A mark on the clock of the host, as a device that is never behind would set it."""

    def record(self, _stream: Any) -> None:
        self.at = time.perf_counter()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end_event: Any) -> float:
        return 1000 * float(end_event.at - self.at)


def straggling(*, pause: float = 0.02, rank: int = 1, timed: bool = False) -> Recipe:
    """Digits, with one rank that sleeps for `pause` seconds in every forward pass.

    With `timed`, ranks time their passes as on GPUs.
    """
    if timed and "RANK" in os.environ:
        from launcher.engine.backends import accelerate
        from launcher.engine.backends.compute_timer import ComputeTimer

        backend: Any = accelerate
        backend.compute_timer = lambda _: ComputeTimer(HostEvent, lambda: None)

    def forward(model: Any, batch: Any) -> Any:
        if int(os.environ.get("RANK", "0")) == rank:
            time.sleep(pause)
        return model(batch[0])

    return replace(digits(), name="straggling", forward=forward)


if __name__ == "__main__":
    main(straggling)
