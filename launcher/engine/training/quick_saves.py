"""Quick checkpoints while a run trains: where they go, when one is due, and when one is complete.

`launcher.engine.training.promotion` takes them into the run folder when ranks start again.
"""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.engine.backends.base import Backend
from launcher.engine.saving.shard_writer import ShardWriter
from launcher.environment.network import own_address
from launcher.errors import LauncherError, RunDirError
from launcher.json_file import MAX_BYTES, decode_json
from launcher.recipe.recipe import Recipe
from launcher.regular_file import read_regular
from launcher.runs.manifest import FileDigest, Manifest
from launcher.runs.part_exchange import target
from launcher.runs.quick_checkpoints import (
    commit_part,
    folder_of_run,
    forget_attempt,
    make_private,
    part_name,
    remove_parts,
    remove_run,
    write_attempt,
)
from launcher.runs.rundir import RunDir
from launcher.runs.shard_files import error_text


class QuickSaves:
    """The quick checkpoints of one attempt of a run, as one of its ranks takes part in them.

    Args:
        backend: This rank among the others.
        base: The setting `quick_checkpoints`.
        folder: The folder of this rank's parts.
        every: Steps from one to the next.
    """

    def __init__(self, backend: Backend, base: Path, folder: Path, every: int) -> None:
        self._backend, self._base, self._folder, self._every = backend, base, folder, every
        self._token = ""
        self._neighbour: tuple[str, int] | None = None
        """Address of the process that receives this rank's parts."""

        self._removal: threading.Thread | None = None
        """Removes what has become useless."""

        self.is_late = False
        """Whether one was due while another checkpoint was being written; equal on every rank."""

    def is_due(self, step: int) -> bool:
        """Return whether one is due after `step` steps; equal on every rank."""
        return step % self._every == 0

    def part(self, step: int) -> Path:
        """Return the folder in which this rank's part is written."""
        return self._folder / f".{part_name(step)}"

    @property
    def _num_neighbours(self) -> int:
        """Ranks from this one to the one that receives its parts; 0 if none does."""
        plan = self._backend.plan
        return plan.nproc_per_node if plan.nodes > 1 else 0

    def connect(self, writer: ShardWriter) -> str | None:
        """Let each rank know the process that receives its parts (collective).

        Nothing is exchanged while the processes remain the same.

        Args:
            writer: Has the process of this rank, which receives the parts of another one.

        Returns:
            Why some process cannot receive any; None if all do.
        """
        if not self._num_neighbours:
            return None
        is_known = writer.is_listening and self._neighbour is not None
        if not self._backend.any_rank(not is_known):
            return None
        self._neighbour = None
        self._token = self._backend.broadcast(secrets.token_hex(32))
        places = self._backend.gather(self._listen(writer))
        if reason := next((place for place in places if isinstance(place, str)), None):
            return reason
        rank = (self._backend.rank + self._num_neighbours) % self._backend.world_size
        self._neighbour = places[rank]
        return None

    def _listen(self, writer: ShardWriter) -> tuple[str, int] | str:
        """Return the address at which this rank's process receives parts, or why it cannot."""
        host = own_address(os.environ.get("MASTER_ADDR", ""))
        if host is None:
            return f"{platform.node()} has no address at which other nodes could reach it"
        try:
            return host, writer.listen(host, self._token, self._folder)
        except OSError as error:
            return f"{platform.node()}: {error_text(error)}"

    def target(self, step: int) -> dict[str, Any] | None:
        """Return where this rank's part is also sent; None with one node."""
        return None if self._neighbour is None else target(*self._neighbour, self._token, step)

    def commit(self, manifest: Manifest, reason: str | None) -> str | None:
        """Complete a checkpoint that all ranks have written, or remove it (collective).

        Args:
            manifest: Its manifest, of which that of rank 0 counts.
            reason: Why some rank has not written its part; None if all have. Equal on every rank.

        Returns:
            Why it is not complete; None if it is.
        """
        folder = self.part(manifest.step)
        if reason is None:
            reason = self._first(self._commit(folder, manifest))
        if reason is None:
            self.remove_before(manifest.step)
            return None
        self._neighbour = None  # the addresses are exchanged anew before the next one
        for path in (folder, self._folder / part_name(manifest.step)):
            shutil.rmtree(path, ignore_errors=True)
        return reason

    def _commit(self, folder: Path, manifest: Manifest) -> str | None:
        """Write the manifest beside this rank's part; return why it cannot be (collective)."""
        sums = folder / f"rank{self._backend.rank}.json"
        files: Mapping[str, FileDigest] | str
        try:
            files = decode_json(read_regular(sums, MAX_BYTES), dict[str, FileDigest])
            sums.unlink()
        except (OSError, ValueError) as error:
            files = error_text(error)
        gathered = self._backend.gather(files)
        if reason := next((each for each in gathered if isinstance(each, str)), None):
            return reason
        everything = {name: digest for each in gathered for name, digest in each.items()}
        manifest = self._backend.broadcast(manifest)
        try:
            commit_part(folder, replace(manifest, files=everything))
        except (OSError, LauncherError, ValueError) as error:
            return error_text(error)
        return None

    def _first(self, reason: str | None) -> str | None:
        """Return the first reason of any rank, with the number of the rank (collective)."""
        reasons = enumerate(self._backend.gather(reason))
        return next((f"rank {rank}: {each}" for rank, each in reasons if each), None)

    def remove_before(self, step: int) -> None:
        """Remove this rank's parts of steps before `step`, which have become useless.

        A thread does so, because the kernel takes a second to free some gigabytes of /dev/shm.
        """
        self._wait_for_removal()
        arguments = (self._folder, step)
        self._removal = threading.Thread(target=remove_parts, args=arguments, daemon=True)
        self._removal.start()

    def _wait_for_removal(self) -> None:
        if self._removal is not None:
            self._removal.join()

    def close(self) -> None:
        """Remove the folders of the attempt and of the run on this node, if they are empty."""
        self._wait_for_removal()
        for folder in (self._folder, *self._folder.parents):
            if folder == self._base:
                return
            try:
                folder.rmdir()
            except OSError:
                return


def open_quick_saves(
    recipe: Recipe, backend: Backend, run_dir: RunDir, *, is_refused: bool
) -> tuple[QuickSaves | None, list[str]]:
    """Prepare the folders for the quick checkpoints of a new attempt (collective).

    Those of earlier attempts are removed, and no longer belong to the run.

    Args:
        recipe: The recipe.
        backend: The ranks.
        run_dir: The run folder.
        is_refused: Whether a folder that cannot be used is an error.

    Returns:
        The quick checkpoints, or None if there are none; and a warning if they were asked for.

    Raises:
        RunDirError: The folder cannot be used on some node.
    """
    if backend.rank == 0:
        forget_attempt(run_dir)
    base, every = recipe.quick_checkpoints, recipe.quick_checkpoint_every
    if base is None or every is None:
        return None, []
    of_run = folder_of_run(base, run_dir)
    if backend.rank % backend.plan.nproc_per_node == 0:
        remove_run(of_run)
    attempt, *_ = backend.gather(secrets.token_hex(8))  # once all nodes have removed theirs
    folder = of_run / attempt / f"rank{backend.rank}"
    problem = None
    try:
        make_private(base, folder)
    except OSError as error:
        problem = f"{platform.node()}: {error_text(error)}"
    problem = next(filter(None, backend.gather(problem)), None)
    if problem is None and backend.rank == 0:
        try:
            write_attempt(run_dir, attempt)
        except RunDirError as error:
            problem = str(error).rstrip(".")
    problem = backend.broadcast(problem)
    if problem is None:
        return QuickSaves(backend, Path(base), folder, every), []
    text = f"quick_checkpoints={base} cannot be used ({problem})."
    if is_refused:
        raise RunDirError(
            f"{text} Give a folder that each node has to itself, and that you can write to, with "
            "room for two checkpoints. No step was taken."
        )
    return None, [f"{text} The run continues without quick checkpoints."]
