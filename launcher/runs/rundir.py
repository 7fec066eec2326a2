"""The run folder: the names of its files, and where run folders are.

run.yaml            recipe, overrides, plan, versions, git state; see launcher.runs.run_record
metrics.jsonl       one line per optimizer step, and one per evaluation
events.jsonl        when the run began, saved, stopped, failed and finished; see
                    launcher.runs.events
result.json         the final evaluation and totals; written last
model.safetensors   the final weights
recipe.py           the recipe, if it was defined in a notebook or at a prompt; with recipe.pickle
code/               the project as it was planned, for jobs and runs on several nodes; with
                    code.json and code.diff; see launcher.runs.freezing
report.html         the page that `launcher report` writes
checkpoints/        one folder per checkpoint; see launcher.runs.checkpoints
curve.json          learning rates and losses that `launcher find lr` measured
search.json         what it found
trials.json         the outcomes of its short trainings
reading.json        loader throughput that `launcher find loader` measured
size.json           throughput and memory that `launcher find batch` measured
profile.json        where the time of steps went, by `launcher profile`; with traces/
evaluation.json     what `launcher evaluate` measured
noise.json          gradient norms that `launcher find noise` measured
trackers.json       ids of the run in experiment trackers, so that it resumes there
failure.json        the first failure, if the run failed; see launcher.runs.failure_record
owner.lock          the process that owns this folder; see launcher.runs.ownership
mirror.json         the URL at which the run is kept as well; see launcher.runs.mirror_record
submission.json     the job that `launcher submit` submitted; with its job.sbatch or job.yaml
unhealthy_nodes     names of nodes that failed `--health`, or twice in one run; the job is queued
                    again without them
round               how often the ranks of several nodes that restart have started, while they run
quick.json          which quick checkpoints on the nodes belong to the run; see
                    launcher.runs.quick_checkpoints
exit_code           how a Slurm job whose nodes restart together has ended, for its batch script
examination.json    what the ranks report about their node, for `launcher doctor`
inspection.json     which parts of the recipe depend on the split, for `launcher prove`
memory.json         sizes of the tensors of the model, for `launcher find strategy`
logs/rank<N>.log    everything that each rank printed
health/             the heartbeat of each rank; see launcher.runs.heartbeat. After a hang also its
                    collective calls; see launcher.runs.collectives
bad_samples.jsonl   samples that could not be read and were left out, with bad_samples=skip
samples/            sample indices per step and rank, with record_samples=true
"""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from launcher.errors import RunDirError
from launcher.json_file import decode_line, lines_of
from launcher.paths import exists, is_dir, is_file, leads_to_dir
from launcher.regular_file import open_regular
from launcher.runs.files import set_file_aside, write_atomic


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
    def unhealthy_nodes(self) -> Path:
        """The file with the names of nodes that a job is not started on again, one a line."""
        return self.path / "unhealthy_nodes"

    @property
    def round(self) -> Path:
        """The file with the number of starts of the ranks, while those of several nodes restart.

        A launcher that was cut off from the others sees in it that they have gone on.
        """
        return self.path / "round"

    @property
    def quick(self) -> Path:
        """The file that says which of the quick checkpoints on the nodes belong to the run."""
        return self.path / "quick.json"

    @property
    def exit_code(self) -> Path:
        """The file with the exit code of a run whose nodes restart together in a Slurm job."""
        return self.path / "exit_code"

    @property
    def mirror(self) -> Path:
        return self.path / "mirror.json"

    @property
    def submission(self) -> Path:
        return self.path / "submission.json"

    @property
    def inspection(self) -> Path:
        return self.path / "inspection.json"

    @property
    def memory(self) -> Path:
        return self.path / "memory.json"

    @property
    def curve(self) -> Path:
        return self.path / "curve.json"

    @property
    def lr_search(self) -> Path:
        return self.path / "search.json"

    @property
    def trials(self) -> Path:
        return self.path / "trials.json"

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
    def evaluation(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def diagnostics(self) -> Path:
        return self.path / "examination.json"

    def health(self, rank: int) -> Path:
        """Return the file of the heartbeat of `rank`."""
        return self.path / "health" / f"rank{rank}.json"

    def collectives(self, rank: int) -> Path:
        """Return the file of the collective calls of `rank`, which exists after a hang."""
        return self.path / "health" / f"collectives{rank}.json"

    @property
    def hang(self) -> Path:
        """The file that a rank writes when it reaches a limit of `hang_timeout`."""
        return self.path / "health" / "hang"

    @property
    def debugger(self) -> Path:
        """The file that ranks touch every second while a process of their node is debugged."""
        return self.path / "health" / "debugger"

    def log(self, rank: int) -> Path:
        """Return the file that holds what `rank` printed."""
        return self.path / "logs" / f"rank{rank}.log"

    @property
    def bad_samples(self) -> Path:
        """The file of the samples that were left out, one line each."""
        return self.path / "bad_samples.jsonl"

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


def open_run_dir(path: Path) -> RunDir:
    """Return the run folder at `path`.

    Raises:
        RunDirError: `path` does not exist, or has no run.yaml.
    """
    if not is_file(path / "run.yaml"):
        reason, holds = "is a file" if exists(path) else "does not exist", ""
        if is_dir(path):
            if (first := next(find_run_dirs(path), None)) is not None:
                holds = f" There are runs in it, such as {first.shown}: give one of them."
            has_other = os.path.lexists(path / "run.yaml")
            reason = (
                f"has {'a run.yaml that is not a regular file' if has_other else 'no run.yaml'}"
            )
        raise RunDirError(
            f"{path} is not a run folder: it {reason}."
            + (holds or " Give the folder that `launcher run` printed.")
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
        names = [each.name for each in entries if each.name[0] != "." and leads_to_dir(each)]
        for name in sorted(names):
            if os.path.lexists(below / f"{name}.json"):  # the copy of code that an array shares
                continue
            yield from find_run_dirs(below / name, depth - 1)


class _StepLine(msgspec.Struct, frozen=True):
    """The step that a line of metrics.jsonl or samples/ is about."""

    step: int


def truncate_after(run_dir: RunDir, step: int) -> None:
    """Remove the lines about steps after `step` from metrics.jsonl, bad_samples.jsonl and samples/.

    A run that resumes from a checkpoint takes these steps again. Damaged lines are removed as well.
    What is not a regular file is set aside, because the run cannot append to it.

    Raises:
        RunDirError: A file cannot be read or written.
    """
    decoder = msgspec.json.Decoder(_StepLine)
    files = run_dir.metrics, run_dir.bad_samples
    for path in (*files, *run_dir.samples(0).parent.glob("rank*.jsonl")):
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
