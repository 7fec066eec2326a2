"""One owner of a run folder at a time, whichever way it is entered, and however the owner ends."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, Commands, Finished, read_lines

from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.locks import locks_are_shared
from launcher.runs.rundir import RunDir

STEADY = str(ROOT / "benchmarks/steady.py")
TORCHRUN = ("torchrun", "--standalone", "--nproc-per-node", "2")

needs_strace = pytest.mark.skipif(
    shutil.which("strace") is None, reason="needs strace, to take locks away from a file system"
)


def files_of(folder: Path) -> dict[str, bytes]:
    """Return every file of a folder with its bytes, and every folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
    }


@dataclass(frozen=True)
class Live:
    """A run that goes on."""

    process: subprocess.Popen[str]
    run_dir: RunDir

    @contextlib.contextmanager
    def held_still(self) -> Iterator[None]:
        """Stop the run's processes meanwhile, and see that nothing in its folder changes."""
        os.killpg(self.process.pid, signal.SIGSTOP)
        try:
            before = files_of(self.run_dir.path)
            yield
            assert files_of(self.run_dir.path) == before
        finally:
            os.killpg(self.process.pid, signal.SIGCONT)

    def end(self) -> str:
        """Have the run save and stop; return what it printed."""
        self.process.terminate()
        stdout, stderr = self.process.communicate(timeout=60)
        assert self.process.returncode == 75, stderr
        return stdout


def start(run: Commands, *command: str, out: str = "live") -> Live:
    """Start a run that takes minutes; return when it has saved a checkpoint."""
    run_dir = RunDir(run.folder / out)
    process = run.start(*command, "device=cpu", "epochs=1000", "--out", out)
    while not list_checkpoints(run_dir):
        assert process.poll() is None, process.communicate()
    return Live(process, run_dir)


def is_refused(done: Finished, pid: int) -> bool:
    """Return whether a command was refused because a process of this machine owns the folder."""
    assert "Traceback" not in done.stderr
    owner = f"{os.uname().nodename} (pid {pid}) has owned it since "
    return done.exit_code == 2 and done.stderr.count(owner) == 1


@pytest.fixture(scope="module")
def live(module_run: Commands) -> Iterator[Live]:
    """Start a run of two ranks, and let it go on."""
    started = start(module_run, "launcher", "run", STEADY, "-n", "2")
    yield started
    started.end()
    steps = [row["step"] for row in read_lines(started.run_dir.metrics) if "loss" in row]
    assert steps == list(range(1, len(steps) + 1)), "nobody else has written steps"
    assert not started.run_dir.failure.exists()
    assert started.run_dir.owner.read_bytes() == b"", "nobody owns it any more"


@pytest.mark.parametrize(
    "command",
    [
        ("launcher", "run", STEADY, "device=cpu", "--continue", "--out", "live"),
        ("launcher", "run", STEADY, "device=cpu", "--out", "live"),
        ("launcher", "resume", "live"),
        ("python", STEADY, "device=cpu", "--resume", "live"),
        ("launcher", "submit", STEADY, "device=cpu", "-n", "1", "--out", "live"),
    ],
    ids=lambda command: "-".join(
        word.strip("-") for word in command if word.isidentifier() or word.startswith("--")
    ),
)
def test_a_second_launcher_is_refused(
    module_run: Commands, live: Live, command: tuple[str, ...]
) -> None:
    """It names the owner, ends with 2, and leaves every byte of the folder as it was."""
    with live.held_still():
        done = module_run(*command)
    if command[1] == "submit":
        assert done.exit_code == 2
        assert "exists already" in done.stderr
    else:
        assert is_refused(done, live.process.pid), done.stderr


def test_ranks_of_torchrun_are_refused(module_run: Commands, live: Live) -> None:
    """Rank 0 is refused, one rank says so, and no rank waits for it."""
    with live.held_still():
        done = module_run(*TORCHRUN, STEADY, "device=cpu", "--resume", "live")
    assert done.exit_code != 0
    assert done.stderr.count(f"(pid {live.process.pid}) has owned it since") == 1


def test_readers_are_welcome(module_run: Commands, live: Live) -> None:
    """Commands that look at a run neither wait for its owner nor write into its folder."""
    with live.held_still():
        for command in (
            ("runs",),
            ("status",),
            ("logs", "live"),
            ("report", "live", "--out", "page.html"),
        ):
            done = module_run("launcher", *command)
            assert "has owned it" not in done.stderr
            assert done.exit_code == (2 if command[0] == "logs" else 0), done.stderr


def test_a_copy_has_no_owner(module_run: Commands, live: Live) -> None:
    """The copy of a run that goes on can be gone on with."""
    with live.held_still():
        shutil.copytree(live.run_dir.path, module_run.folder / "copy")
    step = list_checkpoints(RunDir(module_run.folder / "copy"))[0].step
    done = module_run("launcher", "resume", "copy", f"steps={step + 1}")
    assert done.exit_code == 0, done.stderr


def test_a_recipe_by_itself_owns_its_folder(run: Commands) -> None:
    """Rank 0 of `python recipe.py` is the owner, until it is killed, workers or not."""
    alone = start(run, "python", STEADY)
    with alone.held_still():
        assert is_refused(run("launcher", "resume", "live"), alone.process.pid)
    alone.process.kill()
    alone.process.communicate()
    step = list_checkpoints(alone.run_dir)[0].step
    done = run("launcher", "resume", "live", "--auto", f"steps={step + 1}")
    assert done.exit_code == 0, done.stderr


def test_a_killed_owner_is_followed_at_once(run: Commands) -> None:
    """SIGKILL of the launcher alone frees the folder: neither ranks nor workers hold it."""
    killed = start(run, "launcher", "run", STEADY, "-n", "2", "num_workers=2")
    killed.process.kill()
    assert json.loads(killed.run_dir.owner.read_text())["pid"] == killed.process.pid
    step = list_checkpoints(killed.run_dir)[0].step
    done = run("launcher", "resume", "live", "--auto", f"steps={step + 4}")
    assert done.exit_code == 0, done.stderr
    killed.process.communicate()


@pytest.mark.parametrize("submitted", [False, True])
def test_one_of_two_at_once_is_the_owner(run: Commands, submitted: bool) -> None:
    """Two launchers that begin the same folder together: one trains, one is refused."""
    if submitted:
        (run.folder / "out/logs").mkdir(parents=True)
        (run.folder / "out/submission.json").write_text("{}")
    command = ("launcher", "run", STEADY, "-n", "1", "device=cpu", "epochs=1000")
    both = [run.start(*command, "--out", "out", "--continue") for _ in range(2)]
    while all(process.poll() is None for process in both):
        time.sleep(0.05)
    both.sort(key=lambda process: process.poll() is None)
    refused, owner = both
    said = refused.communicate()[1]
    assert refused.returncode == 2, said
    assert "has owned it since" in said or "exists already" in said
    run_dir = RunDir(run.folder / "out")
    while not list_checkpoints(run_dir):
        assert owner.poll() is None, owner.communicate()
    Live(owner, run_dir).end()
    assert [row["event"] for row in read_lines(run_dir.events)].count("began") == 1


FAMILY = """
import os, signal, sys
from pathlib import Path
from launcher.runs.ownership import own
from launcher.runs.rundir import RunDir

told, tell = os.pipe()
with own(RunDir(Path(sys.argv[1])), with_ranks=sys.argv[2] == "ranks"):
    if os.fork() == 0:              # a rank
        worker = os.fork()
        if worker == 0:             # a DataLoader worker
            signal.pause()
        os.write(tell, f"{os.getpid()} {worker}\\n".encode())
        signal.pause()
    print(os.read(told, 100).decode(), end="", flush=True)
    signal.pause()
"""
"""An owner with a rank that has a worker, in which only the owner says when it is ready."""

TAKE = """
import sys
from pathlib import Path
from launcher.runs import ownership
from launcher.errors import RunDirError
from launcher.runs.rundir import RunDir

ownership._SECONDS_TO_END = 0.3
try:
    with ownership.own(RunDir(Path(sys.argv[1]))):
        print("taken")
except RunDirError as error:
    print(error)
"""
"""Take a folder for a moment, with less patience for ranks that are about to end."""


@pytest.mark.parametrize("who", ["ranks", "nobody"])
def test_ranks_hold_the_folder_and_their_workers_do_not(run: Commands, who: str) -> None:
    """After the owner's death its ranks hold the folder as long as they live; nobody else does."""
    (run.folder / "out").mkdir()
    owner = run.start("python", "-c", FAMILY, "out", who)
    assert owner.stdout is not None
    rank, worker = map(int, owner.stdout.readline().split())
    take = ("python", "-c", TAKE, "out")
    assert f"(pid {owner.pid}) has owned it" in run(*take).stdout
    owner.kill()
    owner.wait()
    if who == "ranks":
        assert "ranks that it started have not" in run(*take).stdout
    os.kill(rank, signal.SIGKILL)
    assert run(*take).stdout == "taken\n"
    os.kill(worker, signal.SIGKILL)
    owner.communicate()


@needs_strace
class TestWithoutLocks:
    """On a file system that has no locks, what is written in owner.lock decides."""

    STRACE = ("strace", "-f", "-o", "/dev/null", "-e", "trace=flock")
    WITHOUT = (*STRACE, "-e", "inject=flock:error=EOPNOTSUPP", sys.executable, "-c", TAKE, "out")

    @pytest.fixture
    def out(self, run: Commands) -> RunDir:
        """Return a folder whose owner was killed."""
        (run.folder / "out").mkdir()
        owner = run.start("python", "-c", FAMILY, "out", "nobody")
        assert owner.stdout is not None
        owner.stdout.readline()
        assert f"(pid {owner.pid}) has owned it" in run(*self.WITHOUT).stdout
        os.killpg(owner.pid, signal.SIGKILL)
        owner.communicate()
        return RunDir(run.folder / "out")

    def rewrite(self, out: RunDir, **values: Any) -> bytes:
        """Change what owner.lock says; return it."""
        said = json.loads(out.owner.read_text())
        out.owner.write_text(json.dumps(said | values))
        return out.owner.read_bytes()

    @pytest.mark.usefixtures("out")
    def test_a_process_that_has_ended_owns_nothing(self, run: Commands) -> None:
        """A record that a kill has left behind refuses nobody."""
        assert run(*self.WITHOUT).stdout == "taken\n"

    def test_a_process_of_the_same_number_is_another(self, run: Commands, out: RunDir) -> None:
        """A process is known by when it started."""
        self.rewrite(out, pid=os.getpid())
        assert run(*self.WITHOUT).stdout == "taken\n"

    @pytest.mark.parametrize("text", ["", "{", "[1]", '{"pid": "x"}', "\udcff"])
    def test_a_damaged_record_owns_nothing(self, run: Commands, out: RunDir, text: str) -> None:
        """What is no record refuses nobody."""
        out.owner.write_bytes(text.encode(errors="surrogateescape"))
        assert run(*self.WITHOUT).stdout == "taken\n"

    def test_another_machine_is_known_by_its_heartbeats(self, run: Commands, out: RunDir) -> None:
        """It counts as alive while it starts, and while its ranks write; then it does not."""
        said = self.rewrite(out, host="far", place="far")
        assert "far (pid " in run(*self.WITHOUT).stdout
        assert out.owner.read_bytes() == said
        said = self.rewrite(out, since=time.time() - 1000)
        out.health(0).parent.mkdir()
        beat = {"rank": 0, "node": "far", "pid": 1, "step": 1, "phase": "computing", "since": 0}
        out.health(0).write_text(json.dumps(beat | {"time": time.time()}))
        assert "far (pid " in run(*self.WITHOUT).stdout
        assert out.owner.read_bytes() == said
        out.health(0).write_text(json.dumps(beat | {"time": time.time() - 100}))
        assert run(*self.WITHOUT).stdout == "taken\n"

    def test_a_requeued_job_follows_itself_at_once(self, run: Commands, out: RunDir) -> None:
        """Slurm has ended the job before it starts it again."""
        self.rewrite(out, host="far", place="far", job="12", restarts=1)
        for env in ({"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "1"}, {"SLURM_JOB_ID": "13"}):
            assert "job 12 on far" in run(*self.WITHOUT, env=env).stdout
        again = {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "2"}
        assert run(*self.WITHOUT, env=again).stdout == "taken\n"


def test_locks_of_this_machine_reach_everybody(tmp_path: Path) -> None:
    """A local disk has locks that everybody sees; the kernel's own files are not known to."""
    assert locks_are_shared(tmp_path.resolve())
    assert not locks_are_shared(Path("/proc"))


def test_a_program_that_goes_on_owns_nothing(run: Commands) -> None:
    """When `main` has returned, the run folder is free, although its process lives."""
    (run.folder / "goes_on.py").write_text(
        "from pathlib import Path\n"
        "from launcher import main\n"
        "from launcher.runs.ownership import own\n"
        "from launcher.recipes.digits import digits\n"
        "from launcher.runs.rundir import RunDir\n"
        "main(digits)\n"
        'with own(RunDir(Path("out").resolve())):\n'
        '    print("free")\n'
    )
    done = run("python", "goes_on.py", "steps=2", "--out", "out")
    assert done.exit_code == 0, done.stderr
    assert "free" in done.stdout
