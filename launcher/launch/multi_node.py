"""A run on several nodes: their launchers connect, agree on a run folder, and leave together."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.environment.nodes import Nodes
from launcher.errors import (
    EXIT_FAILED,
    EndedError,
    HealthError,
    LauncherError,
    PeerError,
    RunDirError,
    UsageError,
)
from launcher.planning.plan import Plan
from launcher.runs.rundir import RunDir

if TYPE_CHECKING:
    from launcher.engine.ranks.rendezvous import Rendezvous as Rendezvous  # noqa: PLC0414  # exported


@contextlib.contextmanager
def joined(nodes: Nodes | None, plan: Plan) -> Iterator[Rendezvous | None]:
    """Connect to the launchers on the other nodes of a run, and tell them about an error.

    Only one node prints an error: the one on which it occurred or, if Slurm started the launchers,
    the first.

    Yields:
        The connection; None if the run has one node.
    """
    rendezvous = None
    try:
        rendezvous = _connect(nodes, plan)
        yield rendezvous
    except PeerError as error:
        if rendezvous is not None:
            error.exit_code = rendezvous.leave(error.exit_code)
        if nodes is not None and nodes.index and nodes.names:
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


def check_restarts(nodes: Nodes | None, restarts: int) -> None:
    """Refuse restarts of a run on several nodes, all of which would have to restart together.

    Raises:
        UsageError: Restarts are asked for, and the run has several nodes.
    """
    if nodes is not None and restarts:
        raise UsageError(
            f"--max-restarts {restarts} restarts the ranks of one node, and this run has "
            f"{nodes.count} nodes. Start it again with --continue, or use `launcher submit`, which "
            "lets Slurm restart it."
        )


def make_run_dir_once(rendezvous: Rendezvous | None, make: Callable[[], RunDir]) -> RunDir:
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


def _connect(nodes: Nodes | None, plan: Plan) -> Rendezvous | None:
    """Connect to the launchers on the other nodes; return None if the run has one node.

    Raises:
        WorldError: Some launchers do not connect in time, or would run something else.
    """
    if nodes is None:
        return None
    from launcher.engine.ranks.rendezvous import Rendezvous

    agreement = {"recipe": plan.recipe, "device": plan.device, "ranks": plan.nproc_per_node}
    return Rendezvous(nodes, agreement, lambda text: print(text, file=sys.stderr, flush=True))
