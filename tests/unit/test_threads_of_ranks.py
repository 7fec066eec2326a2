"""Threads beside the training loop: their device, and drivers that do not answer."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.engine.ranks import watchdog
from launcher.engine.ranks.usage import LastMeasurement, usage_of
from launcher.engine.state.compiled import limit_compile_workers
from launcher.recipe.hang_limits import hang_limits
from launcher.runs.rundir import create_run_dir
from launcher.signals import StopRequest


def test_a_driver_that_does_not_answer_blocks_nobody() -> None:
    """Asking for a measurement returns the last one at once, also if the driver never returns."""
    answers = iter([{"memory_bytes": 5}])
    measured, hanging, released = threading.Event(), threading.Event(), threading.Event()

    def measure() -> dict[str, Any]:
        values = next(answers, None)
        if values is None:
            hanging.set()
            released.wait()
            raise RuntimeError
        measured.set()
        return values

    usage = LastMeasurement(measure)
    assert usage() == {}
    assert measured.wait(10)
    usage()
    assert hanging.wait(10)
    assert usage() == {"memory_bytes": 5}
    released.set()


def test_the_usage_of_a_cpu_is_measured_at_once() -> None:
    """On a CPU the memory of this process is returned by the first call."""
    assert usage_of(torch.device("cpu"))()["memory_bytes"] > 1 << 20


@pytest.mark.parametrize(("cores", "workers"), [(1, 1), (8, 8), (128, 32)])
def test_compilers_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, workers: int
) -> None:
    """torch.compile starts at most one process for each core of a rank; a variable overrides it."""
    from torch._inductor import config

    with config.patch(compile_threads=5):
        monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "5")
        limit_compile_workers(cores)
        assert config.compile_threads == 5
        monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS")
        limit_compile_workers(cores)
        assert config.compile_threads == workers


def test_a_hanging_driver_does_not_keep_a_hanging_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank ends although the record of its collectives blocks in C with Python's lock held."""
    run_dir = create_run_dir(tmp_path / "run", "digits")
    libc = ctypes.PyDLL(None)  # its functions run with Python's lock held
    monkeypatch.setattr(watchdog, "record_collectives", lambda _: libc.sleep(60))
    monkeypatch.setattr(watchdog, "_SECONDS_TO_RECORD", 0.5)
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        with (tmp_path / "log").open("w") as log:
            watching = watchdog.Watchdog(
                run_dir,
                0,
                1,
                limits=hang_limits({"start": 0.1}),
                stop=StopRequest(),
                log=log,
                errors=log,
            )
            watching.report_phase(0, "computing")
            time.sleep(60)
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert time.monotonic() - started < 20
    assert "_end_run" in (tmp_path / "log").read_text()
