"""What Slurm's queue and accounting say, on a cluster whose nodes have different numbers of GPUs.

The GPUs are device files that do nothing. Jobs end in the `setup` lines of their site profile,
before anything is imported.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from local import Cluster, make_cluster
from local_accounting import missing_packages
from local_configuration import ClusterError
from support import ROOT, Commands, fail_on_leftovers

from launcher.runs.rundir import RunDir
from launcher.schedulers.run_states import status_of
from launcher.schedulers.submission import read_submission
from launcher.slurm.job_states import JobState, job_state, job_states

WORLDS_PY = str(ROOT / "tests/recipes/worlds.py")
GPUS = (2, 1, 0)

needs_accounting = pytest.mark.skipif(
    bool(missing_packages()),
    reason=f"needs Debian's packages {' and '.join(missing_packages())}",
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Start a cluster, with accounting where it is installed, and let Slurm's commands find it."""
    try:
        made = make_cluster(3, cpus=(8, 4, 8), gpus=GPUS, accounting=not missing_packages())
    except ClusterError as error:
        pytest.skip(error.message)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in made.env.items():
            patch.setenv(name, value)
        yield made
        made.bring_down()


@pytest.fixture
def slurm(cluster: Cluster, tmp_path: Path) -> Iterator[Commands]:
    """Run commands on the cluster; cancel the remaining jobs, and fail on leftover processes."""
    mark = f"{os.getpid()}-{tmp_path}"
    yield Commands(tmp_path, mark)
    subprocess.run(["scancel", "--me"], check=True)
    wait_for(lambda: not subprocess.check_output(["squeue", "-h"]))
    cluster.start(cluster.nodes)
    fail_on_leftovers(mark)


def submit(
    slurm: Commands, out: str, *arguments: str, setup: str = "exit 3", sbatch: Sequence[str] = ()
) -> RunDir:
    """Submit a run whose job runs lines of shell first; return its folder."""
    profile = {"setup": [setup], "sbatch": list(sbatch)}
    (slurm.folder / f"{out}.yaml").write_text(json.dumps(profile))
    done = slurm(
        *("launcher", "submit", WORLDS_PY, "-n", "1", "device=cpu", "num_workers=0"),
        *("--cluster", f"{out}.yaml", "--out", out, *arguments),
    )
    assert done.exit_code == 0, done.stderr
    return RunDir(slurm.folder / out)


def state_of(run_dir: RunDir) -> JobState:
    """Return the state of a run's job in Slurm."""
    state = job_state(read_submission(run_dir).job)
    assert state is not None
    return state


def jobs_in_queue() -> set[str]:
    """Return the ids of all jobs that squeue shows, ended ones included."""
    text = subprocess.check_output(["squeue", "-h", "-t", "all", "-o", "%F"], text=True)
    return set(text.split())


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Wait until a condition is true, and fail after `seconds`; it may ask Slurm each time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:g} s"
        time.sleep(0.25)


def counted_commands(folder: Path) -> tuple[dict[str, str], Path]:
    """Return an environment in which Slurm's commands note their names in a file, and the file."""
    calls, programs = folder / "calls", folder / "counted"
    programs.mkdir()
    for name in ("squeue", "sacct", "scontrol", "sinfo", "sbatch", "scancel", "sacctmgr"):
        program = programs / name
        found = shutil.which(name)
        program.write_text(f'#!/bin/sh\necho {name} >> "{calls}"\nexec {found} "$@"\n')
        program.chmod(0o755)
    calls.touch()
    return {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}, calls


def test_the_status_of_a_large_array_takes_two_calls(slurm: Commands) -> None:
    """The states of 1,000 runs take one call of squeue, and one of sacct if a job is not there.

    The job that is not there is one of an earlier cluster, whose numbers Slurm has begun again.
    """
    axes = ("lr=0.1,0.2", f"seed={','.join(map(str, range(500)))}")
    grid = submit(slurm, "grid", "--array", *axes, sbatch=["--hold"])
    env, calls = counted_commands(slurm.folder)
    done = slurm("launcher", "status", "grid", "--json", env=env)
    assert done.exit_code == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) == 1000
    assert {row["state"] for row in rows} == {"waiting"}
    assert all("held" in row["words"] for row in rows)
    assert calls.read_text().split() == ["squeue"]
    other = submit(slurm, "other", sbatch=["--hold"])
    submission = json.loads(other.submission.read_text())
    other.submission.write_text(json.dumps(submission | {"job": "999999"}))
    calls.write_text("")
    done = slurm("launcher", "status", "--json", env=env)
    rows = json.loads(done.stdout)
    states = {row["run"]: row["state"] for row in rows}
    assert (len(rows), states.pop(str(other.path))) == (1001, "unknown")
    assert set(states.values()) == {"waiting"}
    assert calls.read_text().split() == ["squeue", "sacct"]
    assert read_submission(RunDir(grid.path / "999")).settings == ("lr=0.2", "seed=499")


@needs_accounting
def test_the_accounting_knows_ended_jobs(slurm: Commands) -> None:
    """The accounting tells of a job what the queue told before it forgot it, restarts included."""
    requeue = '[ "$SLURM_RESTART_COUNT" ] || { scontrol requeue "$SLURM_JOB_ID"; sleep 60; }'
    failed = submit(slurm, "failed")
    again = submit(slurm, "again", setup=f"{requeue}; exit 4")
    killed = submit(slurm, "killed", setup="kill -9 $$")
    array = submit(slurm, "array", "--array", "seed=1,2", setup='exit "$SLURM_ARRAY_TASK_ID"')
    held = submit(slurm, "held", sbatch=["--hold"])
    subprocess.run(["scancel", read_submission(held).job], check=True)
    runs = [failed, again, killed, held, *(RunDir(array.path / index) for index in "01")]
    jobs = {read_submission(run).job: run for run in runs}
    ended = ("COMPLETED", "FAILED", "CANCELLED")

    def have_ended() -> bool:
        states = job_states(jobs)
        return states.keys() == jobs.keys() and all(each.state in ended for each in states.values())

    wait_for(have_ended)
    before = job_states(jobs)
    words = {job: status_of(run).words for job, run in jobs.items()}
    bases = {job.partition("_")[0] for job in jobs}
    assert bases <= jobs_in_queue()
    wait_for(lambda: not bases & jobs_in_queue())
    after = job_states(jobs)
    for job, state in before.items():
        found = after[job]
        facts = (state.state, state.exit_code, state.restarts, state.nodes)
        assert (found.state, found.exit_code, found.restarts, found.nodes) == facts
        assert status_of(jobs[job]).words == words[job]
    by_run = {run.path.name: after[job] for job, run in jobs.items()}
    assert (by_run["failed"].state, by_run["failed"].exit_code) == ("FAILED", "3:0")
    assert (by_run["again"].exit_code, by_run["again"].restarts) == ("4:0", 1)
    assert by_run["killed"].exit_code == "0:9"
    assert by_run["held"].state == "CANCELLED"
    assert (by_run["0"].state, by_run["1"].exit_code) == ("COMPLETED", "1:0")


@pytest.fixture
def reservation(cluster: Cluster) -> Iterator[str]:
    """Reserve the last node, and return the name of the reservation."""
    named = "reservationname=course"
    options = ("starttime=now", "duration=10", "users=root", f"nodes={cluster.nodes[-1]}")
    subprocess.run(["scontrol", "create", "reservation", named, *options], check=True)
    yield "course"
    subprocess.run(["scancel", "--me"], check=True)
    wait_for(lambda: not subprocess.check_output(["squeue", "-h"]))
    subprocess.run(["scontrol", "delete", named], check=True)


def test_a_job_asks_the_queue_for_what_is_given(slurm: Commands, reservation: str) -> None:
    """Slurm shows the cap, the dependency, the reservation and the mail of a submitted array."""
    first = read_submission(submit(slurm, "first", sbatch=["--hold"])).job
    array = submit(
        slurm,
        "array",
        *("--array", "seed=1,2,3", "--array-cap", "2", "--dependency", f"afterok:{first}"),
        *("--reservation", reservation, "--mail-type", "END,FAIL"),
        *("--mail-user", "me@example.com"),
    )
    run_dir = RunDir(array.path / "0")
    job = read_submission(run_dir).job.partition("_")[0]
    shown = subprocess.check_output(["scontrol", "show", "job", "-o", job], text=True)
    values = dict(pair.split("=", 1) for pair in shown.split() if "=" in pair)
    assert values["ArrayTaskId"] == "0-2%2"
    assert values["ArrayTaskThrottle"] == "2"
    assert values["Dependency"].startswith(f"afterok:{first}")
    assert values["Reservation"] == reservation
    assert values["MailType"] == "END,FAIL"
    assert values["MailUser"] == "me@example.com"
    wait_for(lambda: status_of(run_dir).words == "waiting for another job to end")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dependency", "soon"), "dependency"),
        (("--reservation", "nobodys"), "reservation"),
        (("--mail-type", "NEVER"), "mail-type"),
        (
            ("--nodes", "2", "--gpus-per-node", "2"),
            "--gpus-per-node 2: .* 1 node with 2 GPUs, 1 node with 1 GPU, 1 node with 0 GPUs",
        ),
    ],
)
def test_what_the_queue_does_not_have_is_refused(
    slurm: Commands, arguments: tuple[str, ...], message: str
) -> None:
    """A dependency, reservation, mail or node that does not exist is one error and no folder."""
    done = slurm("launcher", "submit", WORLDS_PY, *arguments, "--out", "out")
    assert done.exit_code == 2, done.stdout
    assert done.stderr.count("\n") == 1
    assert re.search(message, done.stderr), done.stderr
    assert not (slurm.folder / "out").exists()


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 2), (2, 1), (3, 0)])
def test_a_job_takes_the_gpus_that_its_nodes_share(slurm: Commands, nodes: int, gpus: int) -> None:
    """Without --gpus-per-node, a job asks for as many GPUs as that many nodes have each."""
    done = slurm("launcher", "submit", WORLDS_PY, "--nodes", str(nodes), "--dry-run")
    assert done.exit_code == 0, done.stderr
    found = re.search(r"^#SBATCH --gpus-per-node=(\d+)$", done.stdout, re.MULTILINE)
    assert (0 if found is None else int(found[1])) == gpus
    assert f"device={'cuda' if gpus else 'cpu'}" in done.stdout


@pytest.mark.parametrize("asked", [1, 2])
def test_a_plan_has_the_gpus_that_a_job_sees(slurm: Commands, cluster: Cluster, asked: int) -> None:
    """On a node with two GPUs, a job plans with those that Slurm shows it."""
    if not cluster.isolated:
        pytest.skip("needs nodes with namespaces of their own")
    inside = 'echo "$CUDA_VISIBLE_DEVICES $SLURM_GPUS_ON_NODE"; exec launcher plan "$0" --json'
    done = slurm(
        *("srun", "--nodelist=node1", f"--gpus-per-node={asked}", "bash", "-c", inside, WORLDS_PY)
    )
    assert done.exit_code == 0, done.stderr
    seen, _, plan = done.stdout.partition("\n")
    assert seen == ("0 1" if asked == 1 else "0,1 2")
    assert (json.loads(plan)["device"], json.loads(plan)["nproc_per_node"]) == ("cuda", asked)


@pytest.mark.parametrize("restarting", [(), ("--max-restarts", "1")])
def test_nodes_with_different_gpus_are_refused(
    slurm: Commands, cluster: Cluster, restarting: tuple[str, ...]
) -> None:
    """An allocation of two GPUs on one node and one on another is refused with both numbers."""
    if not cluster.isolated:
        pytest.skip("needs nodes with namespaces of their own")
    done = slurm(
        *("srun", "--nodelist=node1,node2", "--gpus=3", "--ntasks-per-node=1", "launcher", "run"),
        *(WORLDS_PY, "--out", "out", *restarting),
    )
    assert done.exit_code == 2, done.stderr
    assert done.stderr.count("the same ranks: node1 has 2, node2 has 1. ") == 1
    assert "-n RANKS" in done.stderr
    assert not (slurm.folder / "out").exists()
