"""The run folder: the names of its files, and how they are written.

run.yaml            recipe, overrides, plan, versions, git state; see launcher.runs.run_record
metrics.jsonl       one line per optimizer step, and one per evaluation
events.jsonl        when the run began, stopped, failed and finished; see launcher.runs.events
result.json         the final evaluation and totals; written last
model.safetensors   the final weights
checkpoints/        one folder per checkpoint; see launcher.runs.checkpoints
curve.json          learning rates and losses that `launcher find lr` measured
reading.json        loader throughput that `launcher find loader` measured
size.json           throughput and memory that `launcher find batch` measured
profile.json        where the time of steps went, by `launcher profile`; with traces/
noise.json          gradient norms that `launcher find noise` measured
trackers.json       ids of the run in experiment trackers, so that it resumes there
failure.json        the first failure, if the run failed; see launcher.runs.failure_record
owner.lock          the process that owns this folder; see launcher.runs.ownership
submission.json     the Slurm job that `launcher submit` submitted; with its script, job.sbatch
examination.json    what the ranks report about their node, for `launcher doctor`
inspection.json     which parts of the recipe depend on the split, for `launcher prove`
logs/rank<N>.log    everything that each rank printed
health/             the heartbeat of each rank; see launcher.runs.heartbeat
samples/            sample indices per step and rank, with record_samples=true
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from launcher.errors import RunDirError


@dataclass(frozen=True)
class RunDir:
    """The files of one run, below `path`."""

    path: Path

    @property
    def run_yaml(self) -> Path:
        return self.path / "run.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def model(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def failure(self) -> Path:
        return self.path / "failure.json"

    @property
    def owner(self) -> Path:
        return self.path / "owner.lock"

    @property
    def trackers(self) -> Path:
        return self.path / "trackers.json"

    @property
    def submission(self) -> Path:
        return self.path / "submission.json"

    @property
    def inspection(self) -> Path:
        return self.path / "inspection.json"

    @property
    def curve(self) -> Path:
        return self.path / "curve.json"

    @property
    def reading(self) -> Path:
        return self.path / "reading.json"

    @property
    def size(self) -> Path:
        return self.path / "size.json"

    @property
    def profile(self) -> Path:
        return self.path / "profile.json"

    def trace(self, rank: int) -> Path:
        """Return the file of the trace of `rank`, for Perfetto and chrome://tracing."""
        return self.path / "traces" / f"rank{rank}.json.gz"

    @property
    def noise(self) -> Path:
        return self.path / "noise.json"

    @property
    def diagnostics(self) -> Path:
        return self.path / "examination.json"

    def health(self, rank: int) -> Path:
        """Return the file of the heartbeat of `rank`."""
        return self.path / "health" / f"rank{rank}.json"

    def log(self, rank: int) -> Path:
        """Return the file that holds what `rank` printed."""
        return self.path / "logs" / f"rank{rank}.log"

    def samples(self, rank: int) -> Path:
        """Return the file of the sample indices of `rank`, one line per step."""
        return self.path / "samples" / f"rank{rank}.jsonl"

    @property
    def shown(self) -> str:
        """The path, relative to the working directory if it lies below it."""
        try:
            return str(self.path.relative_to(Path.cwd()))
        except ValueError:
            return str(self.path)


def create_run_dir(out: Path | None, name: str) -> RunDir:
    """Create a run folder that only this user can read.

    Args:
        out: The folder to create; None creates runs/<name>-<time> in the working directory.
        name: Name of the recipe, used for that default.

    Raises:
        RunDirError: `out` exists already, or cannot be created.
    """
    for path in [out] if out is not None else _default_paths(name):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(mode=0o700)
            (path / "logs").mkdir()
        except FileExistsError:
            if out is None and path.parent.is_dir():
                continue
            existing = path if path.exists() else path.parent
            raise RunDirError(
                f"The run folder {existing} exists already, and a run never writes into the folder "
                f"of another one. Give another --out, or move it away{_resume_hint(path)}."
            ) from None
        except OSError as error:
            raise RunDirError(
                f"Cannot create the run folder {path}: {error.strerror}. "
                "Give an --out inside a folder that you can write to."
            ) from None
        return RunDir(path.resolve())
    raise RunDirError(f"Every default run folder for {name} exists already. Give an --out.")


def planned_path(out: Path | None, name: str) -> Path:
    """Return the folder that `create_run_dir` would create now, without creating it."""
    return out or next(path for path in _default_paths(name) if not path.exists())


def _resume_hint(path: Path) -> str:
    if not (path / "run.yaml").is_file():
        return ""
    return f"; `launcher resume {path}` resumes it"


def _default_paths(name: str) -> list[Path]:
    path = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return [path, *(path.with_name(f"{path.name}-{number}") for number in range(2, 1000))]


def write_atomic(path: Path, text: str) -> None:
    """Write `text` so that `path` holds all of it or is unchanged, even after a power failure.

    A path that exists and is not a regular file, such as /dev/stdout, is written to directly.

    Raises:
        RunDirError: The disk is full, or the folder is missing or cannot be written.
    """
    target = path.resolve()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
            return
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        raise RunDirError(f"Cannot write {path}: {error.strerror}.") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write `values` as indented JSON, completely or not at all.

    Raises:
        RunDirError: The file cannot be written.
    """
    write_atomic(path, json.dumps(values, indent=2) + "\n")


def write_yaml(path: Path, values: Mapping[str, Any]) -> None:
    """Write `values` as YAML in their order, completely or not at all.

    Raises:
        RunDirError: The file cannot be written.
    """
    import yaml

    write_atomic(path, yaml.safe_dump(dict(values), sort_keys=False, width=100))


def open_run_dir(path: Path) -> RunDir:
    """Return the run folder at `path`.

    Raises:
        RunDirError: `path` does not exist, or has no run.yaml.
    """
    if not (path / "run.yaml").is_file():
        reason = "has no run.yaml" if path.is_dir() else "does not exist"
        raise RunDirError(
            f"{path} is not a run folder: it {reason}. Give the folder that `launcher run` printed."
        )
    return RunDir(path.resolve())


def find_run_dirs(below: Path, depth: int = 3) -> Iterator[RunDir]:
    """Yield the run folders below a folder in the order of their names, or the folder itself.

    Args:
        below: The folder to search; it alone is yielded if it is a run folder.
        depth: Levels to descend. runs/<array>/<index> is three deep; run folders inside a run
            folder are never yielded.
    """
    if (below / "run.yaml").is_file() or (below / "submission.json").is_file():
        yield RunDir(below.resolve())
        return
    if depth == 0:
        return
    with contextlib.suppress(OSError), os.scandir(below) as entries:
        names = [entry.name for entry in entries if entry.is_dir() and entry.name[0] != "."]
        for name in sorted(names):
            yield from find_run_dirs(below / name, depth - 1)


def truncate_after(run_dir: RunDir, step: int) -> None:
    """Remove the lines about steps after `step` from metrics.jsonl and samples/.

    A run that resumes from a checkpoint takes these steps again. Damaged lines are removed as well.

    Raises:
        RunDirError: A file cannot be written.
    """
    for path in (run_dir.metrics, *run_dir.samples(0).parent.glob("rank*.jsonl")):
        earlier_lines = []
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        except FileNotFoundError:
            continue
        for line in lines:
            try:
                if json.loads(line)["step"] <= step:
                    earlier_lines.append(line)
            except (ValueError, KeyError, TypeError):
                continue  # the run was killed while it wrote this line
        if len(earlier_lines) < len(lines):
            write_atomic(path, "".join(earlier_lines))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the objects in a JSON-lines file; skip damaged lines.

    A file that cannot be read yields an empty list.
    """
    rows = []
    with contextlib.suppress(OSError), path.open("rb") as file:
        for line in file:
            try:
                row = msgspec.json.decode(line)
            except msgspec.DecodeError:
                continue  # the run was killed while it wrote this line, or is writing it
            if isinstance(row, dict):
                rows.append(row)
    return rows


def count_lines(path: Path) -> int:
    """Return the number of lines in a file, or 0 if it cannot be read."""
    try:
        with path.open("rb") as file:
            return sum(1 for _ in file)
    except OSError:
        return 0


def write_error(run_dir: RunDir) -> str | None:
    """Return why the run folder cannot be written, such as a full disk, or None if it can."""
    probe = run_dir.path / f".probe.{os.getpid()}.tmp"
    try:
        with probe.open("wb") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    return None
