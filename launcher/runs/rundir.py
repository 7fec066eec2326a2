"""The run folder: the names in it, and how they are written.

run.yaml            the recipe, its overrides, the plan, versions, git state
metrics.jsonl       one line per optimizer step, and one per evaluation
events.jsonl        what happened, with the time: begun, stopped, failed, finished
result.json         the final evaluation and totals; written last
model.safetensors   the final weights
checkpoints/        what a run is resumed from, a folder each
curve.json          learning rates and losses, where `launcher find lr` measured them
reading.json        what it takes to read, where `launcher find loader` measured it
size.json           speed and memory, where `launcher find batch` measured them
profile.json        where the time of steps went, where `launcher profile` looked, and traces/
noise.json          norms of gradients, where `launcher find noise` measured them
trackers.json       what trackers call the run, so that it goes on there
failure.json        the first failure, if the run failed
owner.lock          who writes into this folder now; see launcher.runs.ownership
submission.json     the job that `launcher submit` asked Slurm for, and job.sbatch its script
examination.json    what ranks found out about themselves, for `launcher doctor`
inspection.json     what of the recipe depends on the split, where `launcher prove` looked for it
logs/rank<N>.log    what each rank printed
health/             where each rank is, written about once a second
samples/            sample ids per step and rank, with record_samples=true
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
        """Return the trace of `rank`, for Perfetto and chrome://tracing."""
        return self.path / "traces" / f"rank{rank}.json.gz"

    @property
    def noise(self) -> Path:
        return self.path / "noise.json"

    @property
    def diagnostics(self) -> Path:
        return self.path / "examination.json"

    def health(self, rank: int) -> Path:
        """Return what `rank` last said of itself."""
        return self.path / "health" / f"rank{rank}.json"

    def log(self, rank: int) -> Path:
        """Return what `rank` printed."""
        return self.path / "logs" / f"rank{rank}.log"

    def samples(self, rank: int) -> Path:
        """Return the sample ids of `rank`, a line per step."""
        return self.path / "samples" / f"rank{rank}.jsonl"

    @property
    def shown(self) -> str:
        """The path, relative to this folder where it lies below it."""
        try:
            return str(self.path.relative_to(Path.cwd()))
        except ValueError:
            return str(self.path)


def create_run_dir(out: Path | None, name: str) -> RunDir:
    """Make a new run folder, readable by this user alone.

    Args:
        out: The folder to make; None makes runs/<name>-<time> below this folder.
        name: The recipe's name, for that default.

    Raises:
        RunDirError: `out` exists already, or cannot be made.
    """
    for path in [out] if out is not None else _default_paths(name):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(mode=0o700)
            (path / "logs").mkdir()
        except FileExistsError:
            if out is None and path.parent.is_dir():
                continue
            what = path if path.exists() else path.parent
            raise RunDirError(
                f"The run folder {what} exists already, and a run never writes into another's. "
                f"Give another --out, or move it away{_or_resume(path)}."
            ) from None
        except OSError as error:
            raise RunDirError(
                f"Cannot make the run folder {path}: {error.strerror}. "
                "Give an --out below a folder that you can write to."
            ) from None
        return RunDir(path.resolve())
    raise RunDirError(f"There are too many run folders for {name} at once. Give an --out.")


def planned_path(out: Path | None, name: str) -> Path:
    """Return the folder that `create_run_dir` would make now."""
    return out or next(path for path in _default_paths(name) if not path.exists())


def _or_resume(path: Path) -> str:
    if not (path / "run.yaml").is_file():
        return ""
    return f"; `launcher resume {path}` goes on with it"


def _default_paths(name: str) -> list[Path]:
    path = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return [path, *(path.with_name(f"{path.name}-{number}") for number in range(2, 1000))]


def write_atomic(path: Path, text: str) -> None:
    """Write `text` so that `path` holds all of it or is untouched, also after a power failure.

    What is no file, such as /dev/stdout, is written to as it is.

    Raises:
        RunDirError: The disk is full, or the folder has gone or cannot be written.
    """
    target = path.resolve()
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
            return
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(target)
    except OSError as error:
        raise RunDirError(f"Cannot write {path}: {error.strerror}.") from None
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write `values` as readable JSON, whole or not at all."""
    write_atomic(path, json.dumps(values, indent=2) + "\n")


def write_yaml(path: Path, values: Mapping[str, Any]) -> None:
    """Write `values` as readable YAML, whole or not at all."""
    import yaml

    write_atomic(path, yaml.safe_dump(dict(values), sort_keys=False, width=100))


def open_run_dir(path: Path) -> RunDir:
    """Return the run folder at `path`.

    Raises:
        RunDirError: There is none.
    """
    if not (path / "run.yaml").is_file():
        what = "has no run.yaml" if path.is_dir() else "does not exist"
        raise RunDirError(
            f"{path} is no run folder: it {what}. Give the folder that `launcher run` printed."
        )
    return RunDir(path.resolve())


def folders_of_runs(below: Path, depth: int = 3) -> Iterator[RunDir]:
    """Yield the run folders below a folder, or itself, in the order of their names.

    runs/<array>/<index> is three deep: what lies deeper, or in a run, is somebody else's.
    """
    if (below / "run.yaml").is_file() or (below / "submission.json").is_file():
        yield RunDir(below.resolve())
        return
    if depth == 0:
        return
    with contextlib.suppress(OSError), os.scandir(below) as entries:
        inner = [each.name for each in entries if each.is_dir() and not each.name.startswith(".")]
        for name in sorted(inner):
            yield from folders_of_runs(below / name, depth - 1)


def keep_until(run_dir: RunDir, step: int) -> None:
    """Take back what a run wrote of steps after `step`, which it will take again.

    Raises:
        RunDirError: A file cannot be written.
    """
    for path in (run_dir.metrics, *run_dir.samples(0).parent.glob("rank*.jsonl")):
        kept = []
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        except FileNotFoundError:
            continue
        for line in lines:
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue  # cut off when the run ended
        if len(kept) < len(lines):
            write_atomic(path, "".join(kept))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a JSON-lines file, less those that are damaged.

    A file that is not there has none.
    """
    rows = []
    with contextlib.suppress(OSError), path.open("rb") as file:
        for line in file:
            try:
                row = msgspec.json.decode(line)
            except msgspec.DecodeError:
                continue  # cut off when the run ended, or still being written
            if isinstance(row, dict):
                rows.append(row)
    return rows


def line_count(path: Path) -> int:
    """Return how many lines a file has, 0 where it cannot be read."""
    try:
        with path.open("rb") as file:
            return sum(1 for _ in file)
    except OSError:
        return 0


def why_not_writable(run_dir: RunDir) -> str | None:
    """Return why nothing can be written to the run folder, such as a full disk; None if it can."""
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
