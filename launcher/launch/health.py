"""Refuse to start ranks, for the first time or again, on a node that is not healthy."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from launcher.errors import (
    EXIT_FAILED,
    EXIT_RESUMABLE,
    HealthError,
    PeerError,
    RunDirError,
)
from launcher.findings import Finding
from launcher.launch.signal_handler import SignalHandler
from launcher.planning.plan import Plan
from launcher.regular_file import open_to_append
from launcher.runs.failure_record import Failure, record_failure
from launcher.runs.rundir import RunDir

if TYPE_CHECKING:
    from launcher.engine.ranks.rendezvous import NodeGroup


_POLL_SECONDS = 0.1


class HealthCheck(Protocol):
    """Examines this node, and returns what would make a run fail on it."""

    def __call__(
        self,
        plan: Plan,
        out: Path,
        signals: SignalHandler,
        keep_alive: Callable[[], object],
        *,
        is_restart: bool,
    ) -> Sequence[Finding]:
        """Examine this node.

        Args:
            plan: The plan of the run.
            out: The run folder.
            signals: Handles signals while ranks examine themselves.
            keep_alive: Called many times a second meanwhile.
            is_restart: Whether the launcher of this node has started ranks before.
        """


def refuse_unhealthy(
    check: HealthCheck | None,
    plan: Plan,
    run_dir: RunDir,
    signals: SignalHandler,
    rendezvous: NodeGroup | None,
    *,
    is_restart: bool = False,
) -> None:
    """Examine this node, and end the run if it is not healthy.

    In a job of Slurm the exit code says that the run can be resumed: the job is queued again
    without the nodes in the file `unhealthy_nodes` of the run folder.

    Raises:
        HealthError: A run would fail on this node.
        PeerError: Another node has failed meanwhile.
    """
    if check is None:
        return

    def keep_alive() -> None:
        if rendezvous is not None:
            rendezvous.check_peers()

    findings = check(plan, run_dir.path, signals, keep_alive, is_restart=is_restart)
    if not findings:
        if rendezvous is not None:
            _wait_for_others(rendezvous)
        return
    in_job = "SLURM_JOB_ID" in os.environ
    node = os.environ.get("SLURMD_NODENAME") or platform.node()
    exit_code = EXIT_RESUMABLE if in_job else EXIT_FAILED
    text = f"{node} is not fit for the run. {' '.join(map(_sentence, findings))}"
    index = 0 if rendezvous is None else rendezvous.index
    failure = Failure(
        rank=index * plan.nproc_per_node,
        node=node,
        pid=os.getpid(),
        time=time.time(),
        error=HealthError.__name__,
        message=text,
        exit_code=exit_code,
    )
    with contextlib.suppress(OSError, RunDirError):  # a disk that fails may be what was found
        record_failure(run_dir, failure)
        with open_to_append(run_dir.unhealthy_nodes) as file:
            file.write(f"{node}\n".encode())
    raise HealthError(text, exit_code)


def _wait_for_others(rendezvous: NodeGroup) -> None:
    """Wait until every node has examined itself.

    A node that started its ranks earlier would wait for those of another node, and notice late that
    the other has left.

    Raises:
        PeerError: Another node has failed or disappeared.
    """
    rendezvous.check_peers()  # the first node may have left while this one was examined
    keys = [f"healthy{index}" for index in range(rendezvous.count)]
    try:
        rendezvous.store.set(keys[rendezvous.index], "")
        while not rendezvous.store.check(keys):
            time.sleep(_POLL_SECONDS)
            rendezvous.check_peers()
    except RuntimeError as error:  # the store, and with it the first node, is gone
        raise PeerError("the first node", None) from error


def _sentence(finding: Finding) -> str:
    return f"{finding.check}: {finding.found} -> {finding.remedy}."
