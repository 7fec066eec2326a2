"""The examination of a node before ranks start on it: `--health quick` or `full`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

from launcher.findings import Finding, failure
from launcher.launch.health import HealthCheck
from launcher.launch.signal_handler import SignalHandler
from launcher.planning.plan import Plan


def health_check(level: Literal["off", "quick", "full"]) -> HealthCheck | None:
    """Return the examination of a level; None for `off`.

    `quick` checks the node as `launcher doctor` does, without ranks, in a fraction of a second.
    `full` also starts ranks on the node that test arithmetic, memory and the links between its
    GPUs, but not before a restart on the same node.
    """
    return None if level == "off" else functools.partial(_examine, is_full=level == "full")


def _examine(
    plan: Plan,
    out: Path,
    signals: SignalHandler,
    keep_alive: Callable[[], object],
    *,
    is_restart: bool,
    is_full: bool,
) -> Sequence[Finding]:
    # Imported here, because most runs are started without an examination.
    from launcher.checks.doctor import diagnose, plan_diagnostics
    from launcher.checks.group_checks import check_group
    from launcher.checks.node_checks import check_node
    from launcher.environment.machine import read_machine
    from launcher.runs.failure_record import RunFailedError

    failures = _failures(check_node(plan, out))
    if failures or is_restart or not is_full:
        return failures
    of_node = plan_diagnostics(
        read_machine(), device=plan.device, nproc_per_node=plan.nproc_per_node
    )
    try:
        reports = diagnose(of_node, signals, watch=lambda _: keep_alive())
    except RunFailedError as error:
        text = str(error).partition("\n")[0]
        return [failure("ranks", text, "`launcher doctor` on this node shows more")]
    return _failures(check_group(reports, of_node))


def _failures(findings: Iterable[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.level == "failure"]
