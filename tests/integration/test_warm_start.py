"""`launcher run --warm`: runs that are forked from a server are as those of new processes."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from support import BIN, MARK, Commands, Finished, has_rows, processes_of

from launcher.runs.rundir import RunDir
from launcher.warm.surroundings import ImportedFiles, differing_limit, limits

RECIPE = """
import json, os, random, resource, signal, sys, warnings
from dataclasses import replace
from launcher.recipes.digits import digits
from beside import VALUE

def mine(pause: float = 0.0, fails: bool = False):
    if "SHOWN" not in os.environ:  # in the command, and not in its ranks
        os.environ["SHOWN"] = "1"
        os.umask(mask := os.umask(0o77))
        facts = {
            "value": VALUE, "cwd": os.getcwd(), "umask": mask, "path": sys.path[1:],
            "argv": [each for each in sys.argv[1:] if each != "--warm"],
            "environment": sorted(set(os.environ) -
                {"LAUNCHER_TERMINAL", "SHOWN", "TORCHINDUCTOR_CACHE_DIR"}),  # torch sets the last
            "limits": resource.getrlimit(resource.RLIMIT_NOFILE),
            "signals": [str(signal.getsignal(n)).partition(" at ")[0] for n in (1, 2, 13, 15)],
            "encoding": [sys.stdout.encoding, sys.stdout.errors, sys.stdout.line_buffering],
            "filters": len(warnings.filters) > 0,
            "files": sorted(n for n in map(int, os.listdir("/proc/self/fd")) if n > 90),
        }
        print("facts", json.dumps(facts), flush=True)
        print("random", random.random(), flush=True)
        if fails:
            raise ValueError("as asked")
    import time
    def slow_loss(logits, batch):
        time.sleep(pause)
        return digits().loss(logits, batch)
    return replace(digits(), name="mine", loss=slow_loss)
"""

ARGUMENTS = ("launcher", "run", "mine.py", "device=cpu", "-n")


@dataclass(frozen=True)
class Warm:
    """A folder with a recipe, and a folder of sockets of its own."""

    run: Commands
    env: dict[str, str]

    def __call__(self, *arguments: str, **env: str) -> Finished:
        return self.run(*ARGUMENTS, *arguments, env=self.env | env, cold=True)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return self.run.start(*ARGUMENTS, *arguments, env=self.env, cold=True)

    def servers(self) -> list[int]:
        """Return the process ids of the servers, without those of their handlers."""
        status = self.run("launcher", "warm", "status", env=self.env, cold=True).stdout
        return [int(line.split()[0]) for line in status.splitlines() if line[:1].isdigit()]

    def runs(self) -> list[int]:
        """Return the process ids of everything of this test that is no server."""
        lines = processes_of(self.run.mark)
        return [int(line.split()[0]) for line in lines if "--warm-server" not in line]


@pytest.fixture(scope="module")
def warm(module_run: Commands) -> Iterator[Warm]:
    """Write a recipe, and end the servers afterwards."""
    folder = module_run.folder
    (folder / "mine.py").write_text(RECIPE)
    (folder / "beside.py").write_text("VALUE = 1\n")
    (folder / "early").mkdir()
    (folder / "early/sitecustomize.py").write_text("")
    env = {"XDG_RUNTIME_DIR": str(folder), "PYTHONPATH": str(folder / "early")}
    env |= {"PYTHONDONTWRITEBYTECODE": "1", "LAUNCHER_WARM_MINUTES": "2"}
    env |= {"PYTEST_CURRENT_TEST": ""}  # servers with other variables are others
    yield Warm(module_run, env)
    stopped = module_run("launcher", "warm", "stop", env=env, cold=True)
    assert stopped.exit_code == 0, stopped.stderr


def facts(finished: Finished) -> str:
    assert finished.exit_code in (0, 2), finished.stdout + finished.stderr
    return next(line for line in finished.stdout.splitlines() if line.startswith("facts"))


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_warm_run_finds_what_a_new_process_finds_and_new_code(warm: Warm) -> None:
    """Its surroundings equal those of a cold run, and an edited module is imported anew."""
    cold = warm("1", "fails=1")
    first = warm("1", "fails=1", "--warm")
    assert cold.exit_code == first.exit_code == 2
    assert cold.stderr == first.stderr
    assert facts(first) == facts(cold)
    (server,) = warm.servers()
    (warm.run.folder / "beside.py").write_text("VALUE = 2\n")
    second = warm("1", "steps=1", LAUNCHER_WARM="1")
    assert second.exit_code == 0
    assert '"value": 2' in facts(second)
    assert warm.servers() == [server]
    values = [line for f in (first, second) for line in f.stdout.splitlines() if "random" in line]
    assert len(set(values)) == len(values) == 2


def test_other_limits_start_a_new_process(warm: Warm) -> None:
    """A command with a limit that the server lacks runs as a new process, which has it."""
    assert warm("1", "fails=1", "--warm").exit_code == 2  # the server has the present limits
    shell = f"ulimit -n 200; exec {BIN}/launcher run mine.py device=cpu fails=1 -n 1 --warm"
    done = warm.run("bash", "-c", shell, env=warm.env)
    assert '"limits": [200, 200]' in facts(done)
    assert done.stderr.count("open files") == 1


def test_a_run_outlives_its_server_and_a_dead_socket_is_replaced(warm: Warm) -> None:
    """A killed server leaves its run alone; the next start replaces the server and says so."""
    process = warm.start("2", "epochs=3", "pause=0.01", "--warm", "--out", "survivor")
    run_dir = RunDir(warm.run.folder / "survivor")
    until(partial(has_rows, run_dir, 1))
    (server,) = warm.servers()
    os.kill(server, signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, run_dir.result.exists(), stderr) == (0, True, "")
    done = warm("1", "fails=1", "--warm")
    assert (done.exit_code, done.stderr.count("another replaces it")) == (2, 1)
    assert server not in warm.servers()


def test_a_run_stops_with_a_checkpoint_when_its_client_is_killed_or_stopped(warm: Warm) -> None:
    """A killed client acts like a closed terminal, SIGTERM as in a cold run: exit code 75."""
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 75)):
        process = warm.start("2", "pause=0.05", "--warm", "--out", f"stopped-{number}")
        run_dir = RunDir(warm.run.folder / f"stopped-{number}")
        until(partial(has_rows, run_dir, 1))
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode == code
        until(lambda: not warm.runs())
        assert [each.name for each in run_dir.checkpoints.iterdir()]


def test_changed_files_of_the_server_replace_it(warm: Warm) -> None:
    """After a change of an imported file, another server takes its place, which is said once."""
    assert warm("1", "fails=1", "--warm").exit_code == 2
    before = warm.servers()
    (warm.run.folder / "early/sitecustomize.py").write_text("CHANGED = 1\n")
    done = warm("1", "fails=1", "--warm")
    assert (done.exit_code, done.stderr.count("another replaces it")) == (2, 1)
    assert len(before) == len(warm.servers()) == 1
    assert before != warm.servers()


def test_a_folder_that_others_may_read_is_not_used(warm: Warm) -> None:
    """Sockets in a folder of another user, or one that is open to others, are not used."""
    other = warm.run.folder / "other"
    (other / "launcher-warm").mkdir(parents=True)
    (other / "launcher-warm").chmod(0o755)
    done = warm("1", "fails=1", "--warm", XDG_RUNTIME_DIR=str(other))
    assert "facts" in done.stdout
    assert done.stderr.count("is open to other users") == 1
    inside = warm("1", "fails=1", "--warm", SLURM_JOB_ID="1")
    assert "facts" in inside.stdout
    assert inside.stderr.count("no warm server") == 1


def test_saving_the_recipe_runs_it_again(warm: Warm) -> None:
    """`launcher watch --follow-edits` starts another run after a module beside it was saved."""
    command = ("launcher", "watch", "--follow-edits", "mine.py", "steps=1", "-n", "1")
    process = warm.run.start(*command, "device=cpu", env=warm.env, cold=True)
    assert process.stdout is not None
    until(lambda: "run folder" in process.stdout.readline())  # type: ignore[union-attr]
    (warm.run.folder / "beside.py").write_text("VALUE = 345\n")
    until(lambda: '"value": 345' in process.stdout.readline())  # type: ignore[union-attr]
    until(lambda: "run folder" in process.stdout.readline())  # type: ignore[union-attr]
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    refused = warm.run("launcher", "watch", "runs/x", "lr=1", env=warm.env, cold=True)
    assert refused.exit_code == 2


def test_changes_of_files_and_limits_are_named(tmp_path: Path) -> None:
    """An imported file that was written again, and a limit that differs, are named."""
    file = tmp_path / "imported_by_a_test.py"
    file.write_text("")
    sys.modules["imported_by_a_test"] = type(sys)("imported_by_a_test")
    sys.modules["imported_by_a_test"].__file__ = str(file)
    try:
        files = ImportedFiles()
        files.add_imported()
    finally:
        del sys.modules["imported_by_a_test"]
    assert files.changed() == ""
    file.write_text("changed = 1")
    assert files.changed() == str(file)
    own = limits()
    assert differing_limit(own, own) == ""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    assert "ulimit -v" in differing_limit(own, own | {"RLIMIT_AS": [1, hard]})
    assert MARK not in os.environ
