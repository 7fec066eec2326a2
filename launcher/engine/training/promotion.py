"""Take the newest quick checkpoint into the run folder, before ranks resume from it.

The nodes tell each other what they have. A checkpoint is complete if its files are on the nodes
that start now, whichever ranks had written them. The ranks of a node copy its files into the run
folder and verify their digests; where a file is damaged, the copy of another node is taken. Rank 0
then commits the checkpoint as it commits every other one.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from launcher.engine.backends.base import Backend
from launcher.errors import LauncherError
from launcher.runs.checkpoints import begin_checkpoint, commit_checkpoint, list_checkpoints
from launcher.runs.events import record_event
from launcher.runs.job import ResumeFrom
from launcher.runs.manifest import Manifest
from launcher.runs.quick_checkpoints import (
    HeldStep,
    copy_verified,
    folder_of_run,
    held_steps,
    part_name,
    read_attempt,
)
from launcher.runs.rundir import RunDir
from launcher.runs.shard_files import error_text

_Key = tuple[int, str]
"""A quick checkpoint: its step, and the SHA-256 of its checkpoint.json."""


def promote_newest(
    start: ResumeFrom,
    base: str | None,
    backend: Backend,
    run_dir: RunDir,
    tell: Callable[[str], None],
) -> ResumeFrom:
    """Promote the newest quick checkpoint, if it is newer than those of the run (collective).

    Args:
        start: Where the run resumes.
        base: The setting `quick_checkpoints`; None promotes nothing.
        backend: The ranks that start.
        run_dir: The run folder.
        tell: A function that shows a line to the user.

    Returns:
        `start`, which names the promoted checkpoint if it named one.
    """
    if not start.promotes or base is None:
        return start
    checkpoints = list_checkpoints(run_dir) if backend.rank == 0 else []
    newest = checkpoints[0] if checkpoints else None
    attempt, newest = backend.broadcast((read_attempt(run_dir), newest))
    if attempt is None or newest is None:
        return start
    began = time.perf_counter()
    held = held_steps(folder_of_run(base, run_dir) / attempt, newest.step)
    nodes = backend.gather({key: list(each.folders) for key, each in held.items()})
    nodes = nodes[:: backend.plan.nproc_per_node]
    problems = []
    for key in sorted({key for node in nodes for key in node}, reverse=True):
        problem = _Promotion(backend, run_dir, key, held.get(key), nodes).run()
        if problem is None:
            seconds = time.perf_counter() - began
            if backend.rank == 0:
                record_event(run_dir, "promoted", step=key[0], seconds=seconds)
            tell(
                f"launcher: {part_name(key[0])}, a quick checkpoint on the nodes, was copied to "
                f"the run folder and verified in {seconds:.1f} s"
            )
            return start if start.step is None else replace(start, step=key[0])
        problems.append(f"{part_name(key[0])}: {problem}")
    if problems:
        tell(
            f"launcher: no quick checkpoint after {newest.name} is complete on these nodes "
            f"({problems[0]}); using {newest.name}"
        )
    return start


class _Promotion:
    """The promotion of one quick checkpoint, as one of the ranks takes part in it.

    Args:
        backend: The ranks.
        run_dir: The run folder.
        key: The checkpoint.
        held: What this rank's node has of it; None if it has nothing.
        nodes: The names of the files that each node has, by checkpoint.
    """

    def __init__(
        self,
        backend: Backend,
        run_dir: RunDir,
        key: _Key,
        held: HeldStep | None,
        nodes: Sequence[Mapping[_Key, Sequence[str]]],
    ) -> None:
        self._backend, self._run_dir, self._step, self._held = backend, run_dir, key[0], held
        self._nodes = [set(node.get(key, ())) for node in nodes]
        self._source = next(number for number, node in enumerate(nodes) if key in node)
        """The node that tells the others the manifest."""

    def run(self) -> str | None:
        """Promote it; return why that is not possible, or None (collective)."""
        manifest = self._find_manifest()
        lost = [name for name in manifest.files if not self._holders(name)]
        if lost:
            more = f" and {len(lost) - 1:,} more" if lost[1:] else ""
            return f"no node that is left has {lost[0]}{more}"
        folder: Path | None = None
        reason = None
        if self._backend.rank == 0:
            try:
                folder = begin_checkpoint(self._run_dir, self._step)
            except OSError as error:
                reason = f"{self._run_dir.checkpoints}: {error_text(error)}"
        folder, reason = self._backend.broadcast((folder, reason))
        if folder is None:
            return str(reason)
        reason = self._copy_all(folder, manifest)
        if self._backend.rank == 0:
            if reason is None:
                reason = _commit(folder, manifest)
            if reason is not None:
                shutil.rmtree(folder, ignore_errors=True)
        reason = self._backend.broadcast(reason)
        return None if reason is None else str(reason)

    def _find_manifest(self) -> Manifest:
        """Return the manifest, which one of the nodes tells the others (collective)."""
        is_source = self._backend.rank == self._source * self._backend.plan.nproc_per_node
        manifest = self._held.manifest if is_source and self._held is not None else None
        return next(each for each in self._backend.gather(manifest) if each is not None)

    def _holders(self, name: str) -> list[int]:
        return [number for number, files in enumerate(self._nodes) if name in files]

    def _copy_all(self, folder: Path, manifest: Manifest) -> str | None:
        """Copy all files; return the reason for the first that no node has undamaged (collective).

        The files are divided among the nodes that have them, and among the ranks of each node.
        """
        names, turn = sorted(manifest.files), 0
        while names:
            ranks = {name: self._rank_for(name, number, turn) for number, name in enumerate(names)}
            own = [name for name, rank in ranks.items() if rank == self._backend.rank]
            failures: dict[str, str] = {}
            for name in own:
                if reason := self._copy(name, folder, manifest):
                    failures[name] = reason
            gathered: dict[str, str] = {}
            for each in self._backend.gather(failures):
                gathered |= each
            turn, names = turn + 1, sorted(gathered)
            for name in names:
                if turn >= len(self._holders(name)):
                    return gathered[name]
        return None

    def _rank_for(self, name: str, number: int, turn: int) -> int:
        """Return the rank that copies a file in a turn, in which another node than before does."""
        holders, per_node = self._holders(name), self._backend.plan.nproc_per_node
        first = sum(map(ord, name))  # the same in every turn
        return holders[(first + turn) % len(holders)] * per_node + number % per_node

    def _copy(self, name: str, folder: Path, manifest: Manifest) -> str | None:
        source = None if self._held is None else self._held.folders.get(name)
        if source is None:
            return f"{name}: it is gone"
        return copy_verified(source / name, folder, manifest.files[name])


def _commit(folder: Path, manifest: Manifest) -> str | None:
    """Commit the checkpoint; return why that is not possible."""
    try:
        commit_checkpoint(folder, manifest)
    except (OSError, LauncherError, ValueError) as error:
        return error_text(error)
    return None
