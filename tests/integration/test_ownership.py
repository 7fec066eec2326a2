"""A run folder has one owner at a time, however a run starts, resumes or ends."""

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
from support import ROOT, Commands, Finished, read_lines, wait_until

from launcher.errors import RunDirError
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.locks import locks_are_shared
from launcher.runs.ownership import check_unowned, own_run_dir
from launcher.runs.rundir import RunDir

STEADY = str(ROOT / "benchmarks/steady.py")
TORCHRUN = ("torchrun", "--standalone", "--nproc-per-node", "2")

needs_strace = pytest.mark.skipif(
    shutil.which("strace") is None, reason="needs strace, to take locks away from a file system"
)


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file below a folder by its path; empty bytes for a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
    }


def is_suspended(group: int) -> bool:
    """Return whether every thread of a process group is stopped, or has ended."""
    states = []
    for stat in Path("/proc").glob("[0-9]*/task/[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            state, _, own_group, *_ = stat.read_text().rpartition(")")[2].split()
            states += [state] if int(own_group) == group else []
    return set(states) <= set("TZX")


@dataclass(frozen=True)
class Live:
    """A run in progress."""

    process: subprocess.Popen[str]
    run_dir: RunDir

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Suspend the processes of the run, and check that its folder does not change."""
        os.killpg(self.process.pid, signal.SIGSTOP)
        try:
            wait_until(lambda: is_suspended(self.process.pid))  # a system call may still be ending
            before = files_of(self.run_dir.path)
            yield
            assert files_of(self.run_dir.path) == before
        finally:
            os.killpg(self.process.pid, signal.SIGCONT)

    def stop(self) -> str:
        """Stop the run with a checkpoint; return its standard output."""
        self.process.terminate()
        stdout, stderr = self.process.communicate(timeout=60)
        assert self.process.returncode == 75, stderr
        return stdout


def start(run: Commands, *command: str, out: str = "live") -> Live:
    """Start a run that takes minutes; return it when it has saved a checkpoint."""
    run_dir = RunDir(run.folder / out)
    process = run.start(*command, "device=cpu", "epochs=1000", "--out", out)
    wait_until(lambda: list_checkpoints(run_dir), process)
    return Live(process, run_dir)


def is_refused(done: Finished, pid: int) -> bool:
    """Return whether a command was refused once because process `pid` owns the folder."""
    assert "Traceback" not in done.stderr
    owner = f"{os.uname().nodename} (pid {pid}) has owned it since "
    return done.exit_code == 2 and done.stderr.count(owner) == 1


@pytest.fixture(scope="module")
def live(module_run: Commands) -> Iterator[Live]:
    """Start a run of two ranks that continues until the last test of this module."""
    live = start(module_run, "launcher", "run", STEADY, "-n", "2")
    yield live
    live.stop()
    steps = [row["step"] for row in read_lines(live.run_dir.metrics) if "loss" in row]
    assert steps == list(range(1, len(steps) + 1)), "no other process has written steps"
    assert not live.run_dir.failure.exists()
    assert live.run_dir.owner.read_bytes() == b"", "the folder has no owner any more"


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
    """The refusal names the owner, exits with 2, and leaves every byte of the folder as it was."""
    with live.suspended():
        done = module_run(*command)
    if command[1] == "submit":
        assert done.exit_code == 2
        assert "exists already" in done.stderr
    else:
        assert is_refused(done, live.process.pid), done.stderr


def test_ranks_of_torchrun_are_refused(module_run: Commands, live: Live) -> None:
    """Ranks under torchrun are refused, the refusal is shown once, and no rank keeps waiting."""
    with live.suspended():
        done = module_run(*TORCHRUN, STEADY, "device=cpu", "--resume", "live")
    assert done.exit_code != 0
    assert done.stderr.count(f"(pid {live.process.pid}) has owned it since") == 1


def test_readers_are_not_refused(module_run: Commands, live: Live) -> None:
    """Commands that read a run neither wait for its owner nor write into its folder."""
    with live.suspended():
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
    """A copy of the folder of a run in progress can be resumed."""
    with live.suspended():
        shutil.copytree(live.run_dir.path, module_run.folder / "copy")
    step = list_checkpoints(RunDir(module_run.folder / "copy"))[0].step
    done = module_run("launcher", "resume", "copy", f"steps={step + 1}")
    assert done.exit_code == 0, done.stderr


def test_a_recipe_by_itself_owns_its_folder(run: Commands) -> None:
    """Rank 0 of `python recipe.py` owns the folder until it is killed, even if workers remain."""
    alone = start(run, "python", STEADY)
    with alone.suspended():
        assert is_refused(run("launcher", "resume", "live"), alone.process.pid)
    alone.process.kill()
    alone.process.communicate()
    step = list_checkpoints(alone.run_dir)[0].step
    done = run("launcher", "resume", "live", "--auto", f"steps={step + 1}")
    assert done.exit_code == 0, done.stderr


def test_a_killed_run_can_be_resumed_at_once(run: Commands) -> None:
    """SIGKILL of the launcher alone frees the folder within seconds, ranks and workers included."""
    killed = start(run, "launcher", "run", STEADY, "-n", "2", "num_workers=2")
    killed.process.kill()
    assert json.loads(killed.run_dir.owner.read_text())["pid"] == killed.process.pid
    step = list_checkpoints(killed.run_dir)[0].step
    done = run("launcher", "resume", "live", "--auto", f"steps={step + 4}")
    assert done.exit_code == 0, done.stderr
    killed.process.communicate()


@pytest.mark.parametrize("submitted", [False, True])
def test_one_of_two_at_once_is_the_owner(run: Commands, submitted: bool) -> None:
    """If two launchers start in the same folder together, one trains and one is refused."""
    if submitted:
        (run.folder / "out/logs").mkdir(parents=True)
        (run.folder / "out/submission.json").write_text("{}")
    command = ("launcher", "run", STEADY, "-n", "1", "device=cpu", "epochs=1000")
    both = [run.start(*command, "--out", "out", "--continue") for _ in range(2)]
    while all(process.poll() is None for process in both):
        time.sleep(0.05)
    both.sort(key=lambda process: process.poll() is None)
    refused, owner = both
    stderr = refused.communicate()[1]
    assert refused.returncode == 2, stderr
    assert "has owned it since" in stderr or "exists already" in stderr
    run_dir = RunDir(run.folder / "out")
    wait_until(lambda: list_checkpoints(run_dir), owner)
    Live(owner, run_dir).stop()
    assert [row["event"] for row in read_lines(run_dir.events)].count("began") == 1


FAMILY = """
import os, signal, sys
from pathlib import Path
from launcher.runs.ownership import own_run_dir
from launcher.runs.rundir import RunDir

reader, writer = os.pipe()
with own_run_dir(RunDir(Path(sys.argv[1])), with_ranks=sys.argv[2] == "ranks"):
    if os.fork() == 0:              # a rank
        worker = os.fork()
        if worker == 0:             # a DataLoader worker
            signal.pause()
        os.write(writer, f"{os.getpid()} {worker}\\n".encode())
        signal.pause()
    print(os.read(reader, 100).decode(), end="", flush=True)
    signal.pause()
"""
"""An owner with a rank that has a worker; the owner prints the process ids of both."""

TAKE = """
import sys
from pathlib import Path
from launcher.runs import ownership
from launcher.errors import RunDirError
from launcher.runs.rundir import RunDir

ownership._SECONDS_TO_END = 0.3
try:
    with ownership.own_run_dir(RunDir(Path(sys.argv[1]))):
        print("taken")
except RunDirError as error:
    print(error)
"""
"""Own a folder for a moment, or print why not, after a short wait for ranks that end."""


@pytest.mark.parametrize("holder", ["ranks", "nobody"])
def test_ranks_hold_the_folder_and_their_workers_do_not(run: Commands, holder: str) -> None:
    """After the owner's death its ranks keep the folder owned until they end; workers do not."""
    (run.folder / "out").mkdir()
    owner = run.start("python", "-c", FAMILY, "out", holder)
    assert owner.stdout is not None
    rank, worker = map(int, owner.stdout.readline().split())
    take = ("python", "-c", TAKE, "out")
    assert f"(pid {owner.pid}) has owned it" in run(*take).stdout
    owner.kill()
    owner.wait()
    if holder == "ranks":
        assert "ranks that it started have not" in run(*take).stdout
    os.kill(rank, signal.SIGKILL)
    assert run(*take).stdout == "taken\n"
    os.kill(worker, signal.SIGKILL)
    owner.communicate()


@needs_strace
class TestWithoutLocks:
    """On a file system without locks the content of owner.lock decides."""

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
        """Change values in owner.lock; return its new content."""
        owner = json.loads(out.owner.read_text())
        out.owner.write_text(json.dumps(owner | values))
        return out.owner.read_bytes()

    @pytest.mark.usefixtures("out")
    def test_a_process_that_has_ended_owns_nothing(self, run: Commands) -> None:
        """The record of a killed owner refuses no other process."""
        assert run(*self.WITHOUT).stdout == "taken\n"

    def test_a_reused_process_id_owns_nothing(self, run: Commands, out: RunDir) -> None:
        """A process with the owner's id and another start time is not the owner."""
        self.rewrite(out, pid=os.getpid())
        assert run(*self.WITHOUT).stdout == "taken\n"

    @pytest.mark.parametrize("text", ["", "{", "[1]", '{"pid": "x"}', "\udcff"])
    def test_a_damaged_record_owns_nothing(self, run: Commands, out: RunDir, text: str) -> None:
        """A damaged record refuses no other process."""
        out.owner.write_bytes(text.encode(errors="surrogateescape"))
        assert run(*self.WITHOUT).stdout == "taken\n"

    def test_another_machine_is_known_by_its_heartbeats(self, run: Commands, out: RunDir) -> None:
        """A remote owner counts as alive while it starts, and while its ranks write heartbeats."""
        content = self.rewrite(out, host="far", place="far")
        assert "far (pid " in run(*self.WITHOUT).stdout
        assert out.owner.read_bytes() == content
        content = self.rewrite(out, since=time.time() - 1000)
        out.health(0).parent.mkdir()
        heartbeat = {
            "rank": 0,
            "node": "far",
            "pid": 1,
            "step": 1,
            "phase": "computing",
            "since": 0,
        }
        out.health(0).write_text(json.dumps(heartbeat | {"time": time.time()}))
        assert "far (pid " in run(*self.WITHOUT).stdout
        assert out.owner.read_bytes() == content
        out.health(0).write_text(json.dumps(heartbeat | {"time": time.time() - 100}))
        assert run(*self.WITHOUT).stdout == "taken\n"

    def test_a_requeued_job_owns_the_folder_at_once(self, run: Commands, out: RunDir) -> None:
        """A requeued Slurm job replaces its earlier attempt, and no other job does."""
        self.rewrite(out, host="far", place="far", job="12", restarts=1)
        for env in ({"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "1"}, {"SLURM_JOB_ID": "13"}):
            assert "job 12 on far" in run(*self.WITHOUT, env=env).stdout
        requeued = {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "2"}
        assert run(*self.WITHOUT, env=requeued).stdout == "taken\n"


def test_locks_on_a_local_disk_are_shared(tmp_path: Path) -> None:
    """Every process sees locks on a local disk; those on /proc are not trusted."""
    assert locks_are_shared(tmp_path.resolve())
    assert not locks_are_shared(Path("/proc"))


def test_an_owner_that_is_about_to_write_its_name_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal names an owner that held the lock before owner.lock described it."""
    run_dir = RunDir(tmp_path.resolve())
    with own_run_dir(run_dir):
        description = run_dir.owner.read_text()
        run_dir.owner.write_text("")
        monkeypatch.setattr(time, "sleep", lambda _: run_dir.owner.write_text(description))
        with pytest.raises(RunDirError, match=rf"\(pid {os.getpid()}\) has owned it since"):
            check_unowned(run_dir.path)


def test_a_program_owns_nothing_after_main(run: Commands) -> None:
    """After `main` has returned the run folder has no owner, although the process continues."""
    (run.folder / "program.py").write_text(
        "from pathlib import Path\n"
        "from launcher import main\n"
        "from launcher.runs.ownership import own_run_dir\n"
        "from launcher.recipes.digits import digits\n"
        "from launcher.runs.rundir import RunDir\n"
        "main(digits)\n"
        'with own_run_dir(RunDir(Path("out").resolve())):\n'
        '    print("free")\n'
    )
    done = run("python", "program.py", "steps=2", "--out", "out")
    assert done.exit_code == 0, done.stderr
    assert "free" in done.stdout
