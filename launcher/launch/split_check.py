"""Refuses tensor parallelism that the model rules out, before any rank starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from launcher.launch.examination import examined
from launcher.launch.prepare import PreparedRun
from launcher.launch.signal_handler import SignalHandler
from launcher.runs.rebuilding import working_folder


def check_layer_split(prepared: PreparedRun, signals: SignalHandler) -> None:
    """Refuse a run with `tensor_parallel` whose model cannot be split so.

    A short process builds the model without memory for its values. It imports what the ranks need
    next, so a run that is not refused starts about a second later.

    Args:
        prepared: The run.
        signals: Handler of the signals that stop the process.

    Raises:
        RunFailedError: The model cannot be split, with the number of ranks and the size of the
            model that it does not divide.
    """
    if prepared.plan.tensor_parallel == 1:
        return
    from launcher.engine.worker import agent_layer_split

    # What the process imports depends on the strategy, and this one needs no backend.
    process_plan = replace(
        prepared.plan, nproc_per_node=1, strategy="ddp", backend="local", device="cpu"
    )
    with (
        working_folder(prepared.folder or Path.cwd()),
        examined(
            prepared.reference,
            prepared.overrides,
            prepared.description,
            process_plan,
            agent_layer_split,
            signals,
        ),
    ):
        pass
