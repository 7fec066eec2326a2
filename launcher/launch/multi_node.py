"""A run on several nodes: their launchers connect, agree on a run folder, and leave together."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.environment.nodes import Nodes
from launcher.errors import (
    EXIT_FAILED,
    CutOffError,
    EndedError,
    HealthError,
    LauncherError,
    PeerError,
    RunDirError,
)
from launcher.launch.signal_handler import SignalHandler
from launcher.planning.plan import Plan
from launcher.runs.rundir import RunDir

if TYPE_CHECKING:
    from launcher.engine.ranks.rendezvous import NodeGroup as NodeGroup  # noqa: PLC0414  # exported


@contextlib.contextmanager
def joined(nodes: Nodes | None, plan: Plan, signals: SignalHandler) -> Iterator[NodeGroup | None]:
    """Connect to the launchers on the other nodes of a run, and tell them about an error.

    Only one node prints an error: the one on which it occurred or, if Slurm started the launchers,
    the first. A node that the others took for lost prints that as well. A signal that asks to stop
    ends this process while it waits for the others.

    Yields:
        The connection; None if the run has one node.
    """
    rendezvous: NodeGroup | None = None
    try:
        if nodes is not None:
            with signals.waiting_for_nodes():
                rendezvous = _connect(nodes, plan)
        yield rendezvous
    except PeerError as error:
        if rendezvous is not None:
            error.exit_code = rendezvous.leave(error.exit_code)
        is_own = isinstance(error, CutOffError)
        if nodes is not None and nodes.index and nodes.names and not is_own:
            raise EndedError(error.exit_code) from None
        raise
    except Exception as error:
        if rendezvous is not None:
            exit_code = error.exit_code if isinstance(error, LauncherError) else EXIT_FAILED
            rendezvous.report(exit_code)
            exit_code = rendezvous.leave(exit_code)
            if isinstance(error, HealthError):
                error.exit_code = exit_code
        raise


def make_run_dir_once(rendezvous: NodeGroup | None, make: Callable[[], RunDir]) -> RunDir:
    """Make the run folder on the first node; return it on every node.

    Raises:
        RunDirError: The folder cannot be made, or another node does not see it.
    """
    if rendezvous is None:
        return make()
    run_dir = RunDir(Path(rendezvous.share(lambda: str(make().path))))
    if not run_dir.run_yaml.is_file():
        raise RunDirError(
            f"{rendezvous.names[rendezvous.index]} does not see the run folder {run_dir.path}, "
            f"which {rendezvous.names[0]} made. Give an --out on a file system that all nodes "
            "share."
        )
    return run_dir


def _connect(nodes: Nodes, plan: Plan) -> NodeGroup:
    """Connect to the launchers on the other nodes.

    Raises:
        WorldError: Some launchers do not connect in time, or would run something else.
    """
    from launcher.engine.ranks.rendezvous import Rendezvous

    return Rendezvous(nodes, agreement_of(plan), report)


def agreement_of(plan: Plan) -> dict[str, Any]:
    """Return the values of a plan that all nodes need, by the names that messages use."""
    return {"recipe": plan.recipe, "device": plan.device, "ranks": plan.nproc_per_node}


def report(text: str) -> None:
    """Print a message about the other nodes."""
    print(text, file=sys.stderr, flush=True)
