"""The run folder: the names of its files, and how they are written.

run.yaml            recipe, overrides, plan, versions, git state; see launcher.runs.run_record
metrics.jsonl       one line per optimizer step, and one per evaluation
events.jsonl        when the run began, stopped, failed and finished; see launcher.runs.events
result.json         the final evaluation and totals; written last
model.safetensors   the final weights
report.html         the page that `launcher report` writes
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
import errno
import io
import itertools
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from launcher.errors import RunDirError
from launcher.json_file import decode_line, encode_json, lines_of
from launcher.paths import exists, is_dir, is_file
from launcher.printable import as_bytes, as_unicode
from launcher.regular_file import open_regular

_MAX_STEM = 200
"""Bytes of a name that are part of the name of its temporary file, of at most 255 bytes."""

_REMEDIES = {
    errno.ENOSPC: "Free some space, and repeat the command.",
    errno.EDQUOT: "Free some space, and repeat the command.",
    errno.EROFS: "Give the path of a file that you can write to.",
    errno.EACCES: "Give the path of a file that you can write to.",
    errno.ENAMETOOLONG: "Give a shorter name.",
}
"""What to do about a file that cannot be written, by the reason."""


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
    def report(self) -> Path:
        return self.path / "report.html"

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

    def collectives(self, rank: int) -> Path:
        """Return the file of the collective calls of `rank`, which exists after a hang."""
        return self.path / "health" / f"collectives{rank}.json"

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
            if out is None and is_dir(path.parent):
                continue
            existing = path if os.path.lexists(path) else path.parent
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
    return out or next(path for path in _default_paths(name) if not exists(path))


def _resume_hint(path: Path) -> str:
    if not is_file(path / "run.yaml"):
        return ""
    try:
        saved = any(entry.name.startswith("step-") for entry in RunDir(path).checkpoints.iterdir())
    except OSError:
        saved = False
    return f"; `launcher resume {path}` resumes it" if saved else "; its run saved no checkpoint"


def _default_paths(name: str) -> list[Path]:
    path = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return [path, *(path.with_name(f"{path.name}-{number}") for number in range(2, 1000))]


def write_atomic(path: Path, content: str | bytes, *, remedy: str = "") -> None:
    """Write a file so that it holds all of its content or is unchanged, even after a power failure.

    Whatever else than a folder has the name is replaced, be it a symbolic link or a FIFO, so that
    nothing is written outside the folder of `path`.

    Args:
        path: The file.
        content: Its content; `as_bytes` encodes text.
        remedy: A sentence for the end of the error that says what to do.

    Raises:
        RunDirError: The disk is full, or the folder is missing or cannot be written.
    """
    temporary = path.with_name(f".{_stem(path)}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # of a killed process with the same id
        with temporary.open("xb") as file:
            file.write(as_bytes(content) if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise write_failure(path, error, remedy) from None
    finally:
        with contextlib.suppress(OSError):  # the error above says more
            temporary.unlink(missing_ok=True)


def _stem(path: Path) -> str:
    """Return the beginning of a name, to which something can be added."""
    return os.fsdecode(os.fsencode(path.name)[:_MAX_STEM])


def write_failure(path: Path, error: OSError, remedy: str = "") -> RunDirError:
    """Return the error for a file that cannot be written, with the reason and what to do."""
    remedy = remedy or _REMEDIES.get(error.errno or 0, "")
    text = f"Cannot write {path}: {error.strerror or error}."
    return RunDirError(f"{text} {remedy}" if remedy else text)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write `values` as indented JSON, completely or not at all; NaN and infinity become null.

    Raises:
        RunDirError: The file cannot be written.
    """
    write_atomic(path, encode_json(values, indent=2) + "\n")


def write_yaml(path: Path, values: Mapping[str, Any]) -> None:
    """Write `values` as YAML in their order, completely or not at all; see `as_unicode` for text.

    Raises:
        RunDirError: The file cannot be written.
    """
    import yaml

    class Dumper(yaml.SafeDumper):
        """Writes text that can be read again."""

    Dumper.add_representer(
        str, lambda dumper, text: yaml.SafeDumper.represent_str(dumper, as_unicode(text))
    )
    write_atomic(path, yaml.dump(dict(values), Dumper=Dumper, sort_keys=False, width=100))


def open_run_dir(path: Path) -> RunDir:
    """Return the run folder at `path`.

    Raises:
        RunDirError: `path` does not exist, or has no run.yaml.
    """
    if not is_file(path / "run.yaml"):
        reason = "is a file" if exists(path) else "does not exist"
        if is_dir(path):
            has_other = os.path.lexists(path / "run.yaml")
            reason = f"has {'a run.yaml that is no file' if has_other else 'no run.yaml'}"
        raise RunDirError(
            f"{path} is not a run folder: it {reason}. Give the folder that `launcher run` printed."
        )
    return RunDir(path.resolve())


def check_subfolders(run_dir: RunDir) -> None:
    """Refuse a run folder in which the name of a folder stands for a link or a file.

    Through such a link a run would write outside its folder.

    Raises:
        RunDirError: It is one.
    """
    files = run_dir.log(0), run_dir.health(0), run_dir.samples(0), run_dir.trace(0)
    for path in (run_dir.checkpoints, *(file.parent for file in files)):
        if path.is_symlink():
            raise RunDirError(
                f"{path} is a symbolic link, and a run writes only inside its own folder. Move "
                f"what it leads to in its place, or remove the link."
            )
        if os.path.lexists(path) and not is_dir(path):
            raise RunDirError(f"{path} is not a folder. Move it away, and repeat the command.")


def find_run_dirs(below: Path, depth: int = 3) -> Iterator[RunDir]:
    """Yield the run folders below a folder in the order of their names, or the folder itself.

    Args:
        below: The folder to search; it alone is yielded if it is a run folder.
        depth: Levels to descend. runs/<array>/<index> is three deep; run folders inside a run
            folder are never yielded.
    """
    if any(os.path.lexists(below / name) for name in ("run.yaml", "submission.json")):
        path = os.path.abspath(below)  # noqa: PTH100  # a link to a run is shown by its own name
        yield RunDir(Path(path))
        return
    if depth == 0:
        return
    with contextlib.suppress(OSError), os.scandir(below) as entries:
        names = [entry.name for entry in entries if entry.is_dir() and entry.name[0] != "."]
        for name in sorted(names):
            yield from find_run_dirs(below / name, depth - 1)


class _StepLine(msgspec.Struct, frozen=True):
    """The step that a line of metrics.jsonl or samples/ is about."""

    step: int


def truncate_after(run_dir: RunDir, step: int) -> None:
    """Remove the lines about steps after `step` from metrics.jsonl and samples/.

    A run that resumes from a checkpoint takes these steps again. Damaged lines are removed as well.
    What is not a regular file is set aside, because the run cannot append to it.

    Raises:
        RunDirError: A file cannot be read or written.
    """
    decoder = msgspec.json.Decoder(_StepLine)
    for path in (run_dir.metrics, *run_dir.samples(0).parent.glob("rank*.jsonl")):
        if not os.path.lexists(path):
            continue
        if path.is_symlink() or not path.is_file():
            set_file_aside(path)
            continue
        try:
            with io.BufferedReader(open_regular(path)) as file:
                num_bytes = os.fstat(file.fileno()).st_size
                lines = [
                    line
                    for line in lines_of(file)
                    if (row := decode_line(line, decoder)) is not None and row.step <= step
                ]
        except OSError as error:
            raise RunDirError(f"Cannot read {path}: {error.strerror or error}.") from None
        if sum(map(len, lines)) < num_bytes:
            write_atomic(path, b"".join(lines))


def remove_file(path: Path) -> None:
    """Remove a file of a run folder if it exists; set aside a folder that has its name.

    Raises:
        RunDirError: It cannot be removed.
    """
    try:
        path.unlink(missing_ok=True)
    except IsADirectoryError:
        set_file_aside(path)
    except OSError as error:
        raise RunDirError(f"Cannot remove {path}: {error.strerror or error}.") from None


def set_file_aside(path: Path) -> None:
    """Append `.set-aside` to a name in a run folder that launcher needs for a file of its own.

    Raises:
        RunDirError: It cannot be renamed.
    """
    for number in itertools.count(1):
        target = path.with_name(f"{path.name}.set-aside" + (f"-{number}" if number > 1 else ""))
        if not os.path.lexists(target):
            break
    try:
        path.rename(target)
    except OSError as error:
        raise RunDirError(f"Cannot rename {path}: {error.strerror or error}.") from None


def count_lines(path: Path) -> int:
    """Return the number of lines in a file, or 0 if it cannot be read."""
    try:
        with io.BufferedReader(open_regular(path)) as file:
            return sum(1 for _ in file)
    except OSError:
        return 0


def write_error(run_dir: RunDir) -> str | None:
    """Return why the run folder cannot be written, such as a full disk, or None if it can."""
    probe = run_dir.path / f".probe.{os.getpid()}.tmp"
    try:
        probe.unlink(missing_ok=True)
        with probe.open("xb") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    return None
