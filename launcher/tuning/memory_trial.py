"""A trial of settings that may exceed the memory."""

from __future__ import annotations

from collections.abc import Callable

from launcher.errors import EXIT_FAILED, TrainingError
from launcher.launch.signal_handler import SignalHandler
from launcher.runs.failure_record import RunFailedError
from launcher.runs.job import Job
from launcher.runs.rundir import RunDir
from launcher.tuning.measured_files import SizeReading, read_size
from launcher.tuning.probe_run import Probe, run_probe

_OUT_OF_MEMORY_DEATHS = (
    "was killed by SIGKILL",
    "was killed by SIGABRT",
    "can't start new thread",
)
"""What means out of memory in a trial with a limit: deaths by the kernel, or by C++ if an
allocation fails in a thread that catches no exception, and Python's error if the stack of a thread
does not fit."""


def try_in_memory(
    probe: Probe,
    run_dir: RunDir,
    function: Callable[[Job], int],
    signals: SignalHandler,
    *,
    title: str,
    memory_bytes: int | None,
) -> SizeReading | None:
    """Run a probe, and return what it measured; None if memory ran out.

    Args:
        probe: The probe to run.
        run_dir: Folder that receives run.yaml and the measurement.
        function: What each rank calls, from `launcher.engine.worker`.
        signals: The signal handler of this process.
        title: The settings that are tried, as they are written.
        memory_bytes: Memory limit of each rank; None leaves a margin free on a GPU and sets no
            limit on a CPU.

    Raises:
        RunFailedError: The user stopped the probe.
        TrainingError: The probe failed for another reason than memory.
    """
    try:
        run_probe(probe, run_dir, function, signals, memory_bytes=memory_bytes, quiet=True)
    except RunFailedError as error:
        if error.exit_code != EXIT_FAILED:
            raise
        if _is_out_of_memory(error):
            return None
        raise TrainingError(
            f"The trial with {title} failed, and not because memory ran out:\n\n{error}"
        ) from None
    return read_size(run_dir)


def _is_out_of_memory(error: RunFailedError) -> bool:
    return error.failure.out_of_memory or any(
        death in error.failure.message for death in _OUT_OF_MEMORY_DEATHS
    )
