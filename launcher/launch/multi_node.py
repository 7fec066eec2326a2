"""A run on several machines: its launchers meet, agree on a run folder, and part."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.environment.nodes import Nodes
from launcher.errors import EndedError, LauncherError, PeerError, RunDirError, UsageError
from launcher.planning.plan import Plan
from launcher.runs.rundir import RunDir

if TYPE_CHECKING:
    from launcher.engine.ranks.rendezvous import Rendezvous as Rendezvous  # noqa: PLC0414  # exported


@contextlib.contextmanager
def joined(nodes: Nodes | None, plan: Plan) -> Iterator[Rendezvous | None]:
    """Meet the launchers on the other machines of a run; have them know of an error.

    One speaks of it: the one that has it, or for all that Slurm has started the first.
    """
    rendezvous = None
    try:
        rendezvous = _meet(nodes, plan)
        yield rendezvous
    except PeerError as error:
        if rendezvous is not None:
            error.exit_code = rendezvous.leave(error.exit_code)
        if nodes is not None and nodes.index:
            raise EndedError(error.exit_code) from None
        raise
    except LauncherError as error:
        if rendezvous is not None:
            rendezvous.report(error.exit_code)
            rendezvous.leave(error.exit_code)
        raise


def check_restarts(nodes: Nodes | None, restarts: int) -> None:
    """Refuse to start ranks again where those of other machines would have to as well.

    Raises:
        UsageError: That is asked for.
    """
    if nodes is not None and restarts:
        raise UsageError(
            f"--max-restarts {restarts} starts the ranks of one machine again, and this run is on "
            f"{nodes.count}. Start it again with --continue; `launcher submit` has Slurm do that."
        )


def make_run_dir_once(rendezvous: Rendezvous | None, make: Callable[[], RunDir]) -> RunDir:
    """Make a run folder, on the first machine, or take the one that was made there.

    Raises:
        RunDirError: It cannot be made, or is not seen here.
    """
    if rendezvous is None:
        return make()
    run_dir = RunDir(Path(rendezvous.share(lambda: str(make().path))))
    if not run_dir.run_yaml.is_file():
        raise RunDirError(
            f"The run folder {run_dir.path} of {rendezvous.names[0]} is not on this machine, "
            f"{rendezvous.names[rendezvous.index]}. Give an --out on a file system that all of "
            "them have."
        )
    return run_dir


def _meet(nodes: Nodes | None, plan: Plan) -> Rendezvous | None:
    """Meet the launchers on the other machines of a run; None for one machine.

    Raises:
        WorldError: They do not come, or are about to run something else.
    """
    if nodes is None:
        return None
    from launcher.engine.ranks.rendezvous import Rendezvous

    said = {"recipe": plan.recipe, "device": plan.device, "ranks": plan.nproc_per_node}
    return Rendezvous(nodes, said, lambda text: print(text, file=sys.stderr, flush=True))
