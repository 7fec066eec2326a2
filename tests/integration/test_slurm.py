"""Jobs on a real Slurm cluster of three virtual nodes: submitted, requeued, killed, cancelled."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from local import Cluster, make_cluster
from local_configuration import ClusterError
from support import ROOT, Commands, fail_on_leftovers, read_lines

from launcher.engine.probes.parity import Trace, compare, read_trace
from launcher.environment.slurm_step import read_hosts
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.heartbeat import read_heartbeat
from launcher.runs.run_record import read_run
from launcher.runs.rundir import RunDir
from launcher.schedulers.run_states import status_of
from launcher.schedulers.submission import read_submission
from launcher.slurm.job_states import JobState, job_state

WORLDS_PY = str(ROOT / "tests/recipes/worlds.py")
PACED = f"{WORLDS_PY}:paced"
FAILING = str(ROOT / "tests/recipes/failing.py")
STEADY = str(ROOT / "benchmarks/steady.py")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Start a cluster, and set the environment with which Slurm's commands find it."""
    try:
        local_cluster = make_cluster(3, cpus=16)
    except ClusterError as error:
        pytest.skip(error.message)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in local_cluster.env.items():
            patch.setenv(name, value)
        yield local_cluster
        local_cluster.bring_down()


@pytest.fixture
def slurm(cluster: Cluster, tmp_path: Path) -> Iterator[Commands]:
    """Run commands on the cluster; cancel the remaining jobs, and fail on leftover processes."""
    mark = f"{os.getpid()}-{tmp_path}"
    yield Commands(tmp_path, mark)
    subprocess.run(["scancel", "--me"], check=True)
    wait_for(lambda: not subprocess.check_output(["squeue", "-h"]), "the queue to be empty")
    cluster.start(cluster.nodes)
    fail_on_leftovers(mark)


EDITED = f"""
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, {str(ROOT / "tests/recipes")!r})
from launcher import Recipe
from worlds import paced

def edited(pause: float = 0.0) -> Recipe:
    recipe = paced(pause=pause)

    def model():
        from frozen_model import VERSION
        print(f"imported {{VERSION}} {{Path('text').read_text()}}")
        return recipe.model()

    return replace(recipe, name="edited", model=model)
"""


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 90) -> None:
    """Wait until a condition is true, and fail after `seconds`.

    The longer it takes, the more rarely it is looked at, because Slurm's commands take CPU time.
    """
    started = time.monotonic()
    while not condition():
        waited = time.monotonic() - started
        assert waited < seconds, f"waited {seconds:g} s for {what}"
        time.sleep(min(0.1 + waited / 10, 1.0))


def submit(slurm: Commands, *arguments: str, out: str = "out") -> RunDir:
    """Submit a run and return its folder."""
    done = slurm("launcher", "submit", *arguments, "device=cpu", "--out", out)
    assert done.exit_code == 0, done.stderr
    assert re.match(r"job \d+", done.stdout)
    assert done.stdout.endswith(f"run folder: {out}\n")
    return RunDir(slurm.folder / out)


def state_of(run_dir: RunDir) -> JobState:
    """Return the state of a run's job in Slurm."""
    state = job_state(read_submission(run_dir).job)
    assert state is not None
    return state


def finish(run_dir: RunDir, seconds: float = 120) -> None:
    """Wait until the job of a run has ended, and fail unless the run has finished."""
    ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    wait_for(lambda: state_of(run_dir).state in ended, "the job to end", seconds)
    log = Path(read_submission(run_dir).log).read_text()
    assert state_of(run_dir).state == "COMPLETED", log
    assert status_of(run_dir).state == "finished", log


def steps_of(run_dir: RunDir) -> int:
    """Return the number of rows in metrics.jsonl."""
    return len(read_lines(run_dir.metrics)) if run_dir.metrics.exists() else 0


_references: dict[tuple[str, ...], Trace] = {}
"""The steps of uninterrupted runs on one process, by recipe and settings."""


def check_same(run: Commands, run_dir: RunDir, recipe: str, *settings: str) -> None:
    """Fail unless a run took the steps of an uninterrupted run on one process."""
    key = (recipe, *settings)
    if key not in _references:
        done = run("launcher", "run", recipe, *settings, "-n", "1", "--out", "alone")
        assert done.exit_code == 0, done.stderr
        _references[key] = read_trace(RunDir(run.folder / "alone"))
    difference = compare(_references[key], read_trace(run_dir), tolerance=1e-5)
    assert difference.agrees, difference


LONG = ("steps=200", "precision=fp64", "checkpoint_every=20", "record_samples=true")
"""Settings of a run that is compared with another, in a precision with small rounding."""

PAUSE = "pause=0.03"
"""A setting with which a run is long enough to be stopped."""

WARNED_AT_ONCE = """
import os
import signal
import subprocess
import time

node = os.environ.get("SLURM_NODEID")
if "SLURM_STEP_ID" in os.environ and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
    if node == NODE:
        while not os.path.exists(f"begun.{1 - int(node)}"):
            time.sleep(0.05)
        job = f"{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"
        subprocess.run(["scancel", "-s", "USR1", job], check=True)
        time.sleep(60)
    else:
        install = signal.signal

        def begin(number, handler):
            result = install(number, handler)
            if number == signal.SIGUSR1:
                open(f"begun.{node}", "w").close()
            return result

        signal.signal = begin
"""
"""A sitecustomize module that warns the job when one launcher handles signals and NODE's starts."""

SETTINGS = ("epochs=2", "record_samples=true", "num_workers=1")


def test_two_nodes_take_the_steps_of_one_process(slurm: Commands) -> None:
    """A job on two nodes takes the steps of one process, and `logs` and `status` show it."""
    run_dir = submit(slurm, WORLDS_PY, *SETTINGS, "--nodes", "2", "-n", "2")
    finish(run_dir)
    log = slurm("launcher", "logs", "out")
    assert "4 = 2 nodes x 2 CPU ranks" in log.stdout
    assert log.stdout.count("run folder: ") == 1
    assert slurm("launcher", "logs", "out", "--rank", "3").exit_code == 0
    job = read_submission(run_dir).job
    for what in ("out", job):
        assert "finished after" in slurm("launcher", "status", what).stdout
    assert slurm("launcher", "logs", job, "-f").stdout == log.stdout
    check_same(slurm, run_dir, WORLDS_PY, *SETTINGS)


def test_an_array_trains_each_combination(slurm: Commands) -> None:
    """An array trains each combination in its own folder, and `status` sorts them by result."""
    done = slurm(
        *(
            "launcher",
            "submit",
            WORLDS_PY,
            "-n",
            "1",
            "device=cpu",
            "num_workers=0",
            "--out",
            "grid",
        ),
        *("--array", "lr=0.0001,0.1", "seed=1,2"),
    )
    assert done.exit_code == 0, done.stderr
    assert "an array of 4" in done.stdout
    runs = [RunDir(slurm.folder / "grid" / str(index)) for index in range(4)]
    for run_dir in runs:
        finish(run_dir)
    lines = slurm("launcher", "status", "grid").stdout.splitlines()
    assert [line.split()[2] for line in lines[:2]] == ["lr=0.1"] * 2, lines
    assert [line.split()[2] for line in lines[2:]] == ["lr=0.0001"] * 2, lines
    rows = json.loads(slurm("launcher", "status", "grid", "--json").stdout)
    assert {tuple(row["settings"]) for row in rows} == {
        (f"lr={lr}", f"seed={seed}") for lr in ("0.0001", "0.1") for seed in (1, 2)
    }


def test_a_warning_saves_and_the_job_goes_on(slurm: Commands) -> None:
    """A job that is warned before its time limit saves, is requeued, and resumes exactly.

    `launcher watch` follows both attempts to the end, and the report shows both.
    """
    run_dir = submit(slurm, PACED, *LONG, PAUSE, "--nodes", "2", "-n", "1")
    watching = slurm.start("launcher", "watch", "out")
    wait_for(lambda: steps_of(run_dir) > 5, "some steps")
    running = slurm("launcher", "status", "out").stdout
    assert re.search(r"running on node\[1-2\]: step \d+ of 200, loss \d", running), running
    subprocess.run(["scancel", "-s", "USR1", read_submission(run_dir).job], check=True)
    wait_for(lambda: state_of(run_dir).restarts == 1, "the job to be queued again")
    stopped_at = list_checkpoints(run_dir)[0].step
    assert stopped_at < 200
    finish(run_dir)
    assert "(requeued 1 time)" in slurm("launcher", "status", "out").stdout
    log = slurm("launcher", "logs", "out").stdout
    assert f"resumed from step-{stopped_at:08}" in log
    watched, error = watching.communicate(timeout=60)
    assert watching.returncode == 0, error
    assert "finished after 200 steps" in watched.splitlines()[-1]
    assert slurm("launcher", "report", "out").exit_code == 0
    page = (run_dir.path / "report.html").read_text()
    job = read_submission(run_dir).job
    for text in (f"1, job {job}", f"2, job {job}", f"stopped after step {stopped_at:,}"):
        assert text in page
    [row] = json.loads(slurm("launcher", "runs", "--json").stdout)
    assert (row["state"], row["step"]) == ("finished", 200)
    check_same(slurm, run_dir, PACED, *LONG)


def test_slurm_warns_a_job_before_its_time_limit(slurm: Commands) -> None:
    """With a limit of a minute, Slurm's own warning has the run saved, queued again and resumed."""
    (slurm.folder / "short.yaml").write_text("warning_seconds: 30\n")
    limited = ("--time", "1", "--cluster", "short.yaml")
    run_dir = submit(slurm, PACED, *LONG, "pause=0.2", *limited, "-n", "1")
    finish(run_dir, 300)
    assert state_of(run_dir).restarts >= 1
    assert "stopped after step" in slurm("launcher", "logs", "out").stdout
    check_same(slurm, run_dir, PACED, *LONG)


@pytest.mark.parametrize("node", ["0", "1"])
def test_a_warning_ends_launchers_that_start(slurm: Commands, node: str) -> None:
    """A warning that comes before all launchers can handle it has the job queued again.

    One of them is sent the signal while it starts, and the other when it waits for that one.
    """
    (slurm.folder / "sitecustomize.py").write_text(f"NODE = {node!r}\n{WARNED_AT_ONCE}")
    (slurm.folder / "starts.yaml").write_text(f"env: {{PYTHONPATH: {slurm.folder}}}\n")
    on_two = ("--cluster", "starts.yaml", "--nodes", "2", "-n", "1")
    run_dir = submit(slurm, WORLDS_PY, *SETTINGS, *on_two)
    finish(run_dir)
    assert state_of(run_dir).restarts == 1
    check_same(slurm, run_dir, WORLDS_PY, *SETTINGS)


def test_jobs_run_the_code_that_was_submitted(slurm: Commands) -> None:
    """Edits after the submission change neither a job that is queued again nor an array.

    The runs of the array share one copy, and the settings are those of the time as well.
    """
    folder = slurm.folder / "project"
    folder.mkdir()
    (folder / "edited.py").write_text(EDITED)
    (folder / "frozen_model.py").write_text("VERSION = 'old'\n")
    (folder / "text").write_text("data")
    (folder / "settings.yaml").write_text("steps: 150\n")
    subprocess.run(["git", "init", "-q", folder], check=True)
    project = Commands(folder, slurm.mark)
    settings = ("-n", "1", "num_workers=0", PAUSE, "--config", "settings.yaml")
    run_dir = submit(project, "edited.py", *settings, "--nodes", "2")
    grid = ("--array", "seed=1,2")
    done = project("launcher", "submit", "edited.py", *settings, "device=cpu", "--out", "a", *grid)
    assert done.exit_code == 0, done.stderr
    (folder / "frozen_model.py").write_text("VERSION = 'new'\n")
    (folder / "settings.yaml").write_text("steps: 1\n")
    wait_for(lambda: steps_of(run_dir) > 5, "some steps")
    subprocess.run(["scancel", "-s", "USR1", read_submission(run_dir).job], check=True)
    wait_for(lambda: state_of(run_dir).restarts == 1, "the job to be queued again")
    runs = [run_dir, *(RunDir(folder / "a" / index) for index in "01")]
    for each in runs:
        finish(each)
        log = each.log(0).read_text()
        assert log.count("imported old data") == (2 if each is run_dir else 1)
        assert "imported new" not in log
        assert steps_of(each) > 100
    names = {path.name for path in (folder / "a").iterdir()}
    assert names == {"0", "1", "code", "code.json", "config.yaml", "job.sbatch", "logs"}
    assert read_run(runs[1]).recipe == f"{folder}/a/code/edited.py:edited"
    done = project("launcher", "resume", "a/1", "steps=160")
    assert done.exit_code == 0, done.stderr
    assert "imported new" not in runs[2].log(0).read_text()


def test_a_preempted_job_resumes(slurm: Commands) -> None:
    """A preempted job saves, is requeued, and reaches the weights of an uninterrupted run."""
    run_dir = submit(slurm, PACED, *LONG, PAUSE, "--nodes", "2", "-n", "1")
    wait_for(lambda: steps_of(run_dir) > 5, "some steps")
    done = slurm("srun", "--partition=urgent", "--nodes=3", "--exclusive", "sleep", "1")
    assert done.exit_code == 0, done.stderr
    finish(run_dir)
    assert state_of(run_dir).restarts == 1
    assert "resumed from step-" in slurm("launcher", "logs", "out").stdout
    check_same(slurm, run_dir, PACED, *LONG)


def test_a_script_that_is_submitted_twice_trains_once(slurm: Commands) -> None:
    """A second job of one run folder fails, names the first job, and trains nothing."""
    run_dir = submit(slurm, PACED, "steps=400", PAUSE, "--nodes", "2", "-n", "1")
    wait_for(lambda: steps_of(run_dir) > 5, "some steps")
    first = read_submission(run_dir).job
    done = slurm("sbatch", "--parsable", run_dir.path / "job.sbatch")
    assert done.exit_code == 0, done.stderr

    def second_state() -> str:
        state = job_state(done.stdout.strip())
        assert state is not None
        return state.state

    active = ("PENDING", "RUNNING", "COMPLETING")
    wait_for(lambda: second_state() not in active, "the second job to end")
    assert second_state() == "FAILED"
    finish(run_dir)
    log = slurm("launcher", "logs", "out").stdout
    assert len(re.findall(rf"job {first} on node\d \(pid \d+\) has owned it since", log)) == 1
    assert log.count("run folder: ") == 1
    events = [row["event"] for row in read_lines(run_dir.events)]
    assert [event for event in events if event not in ("counted", "saved")] == ["began", "finished"]
    assert not run_dir.failure.exists()


def test_a_node_is_lost(slurm: Commands, cluster: Cluster) -> None:
    """A job that loses a node is requeued by Slurm and resumes on the remaining nodes."""
    run_dir = submit(slurm, PACED, *LONG, PAUSE, "--nodes", "2:3", "-n", "1")
    wait_for(lambda: steps_of(run_dir) > 5, "some steps")
    cluster.kill(["node3"])
    wait_for(lambda: state_of(run_dir).restarts == 1, "the job to be queued again")
    finish(run_dir)
    assert "2 = 2 nodes x 1 CPU rank" in slurm("launcher", "logs", "out").stdout
    check_same(slurm, run_dir, PACED, *LONG)


RESTARTING = ("--nodes", "2", "--spares", "1", "--max-restarts", "2", "--node-timeout", "4")


def test_a_lost_node_is_replaced_within_the_job(slurm: Commands, cluster: Cluster) -> None:
    """A job with a spare node goes on without a lost one, and is not queued again."""
    run_dir = submit(slurm, PACED, *LONG, PAUSE, *RESTARTING, "-n", "1")
    wait_for(lambda: steps_of(run_dir) > 25, "some steps")
    cluster.kill(["node2"])
    finish(run_dir)
    assert state_of(run_dir).restarts == 0
    events = [row["event"] for row in read_lines(run_dir.events)]
    assert [each for each in events if each not in ("counted", "saved")] == [
        *("began", "failed", "began", "recovered", "finished"),
    ]
    check_same(slurm, run_dir, PACED, *LONG)


def test_a_job_avoids_a_node_that_has_failed_twice(slurm: Commands) -> None:
    """A node whose ranks fail twice is left out within the job, and when the job is queued again.

    A job that has restarted within itself is still queued again when it is warned.
    """
    restarting = ("--nodes", "1:2", "--max-restarts", "2")
    run_dir = submit(slurm, PACED, *LONG, PAUSE, *restarting, "-n", "1")
    wait_for(lambda: steps_of(run_dir) > 25, "some steps")
    job = read_submission(run_dir).job

    def recoveries() -> list[int]:
        rows = read_lines(run_dir.events)
        return [row["nodes"] for row in rows if row["event"] == "recovered"]

    def kill_second_rank() -> str:
        heartbeat = read_heartbeat(run_dir, 1)
        assert heartbeat is not None
        in_step = ("srun", "--overlap", "--jobid", job, "-w", heartbeat.node, "-n1", "-N1")
        subprocess.run([*in_step, "kill", "-9", str(heartbeat.pid)], check=True)
        return heartbeat.node

    node = kill_second_rank()
    wait_for(lambda: recoveries() == [2], "the restart on both nodes")
    assert kill_second_rank() == node
    wait_for(lambda: recoveries() == [2, 1], "the restart on one node")
    assert run_dir.unhealthy_nodes.read_text() == f"{node}\n"
    subprocess.run(["scancel", "-s", "USR1", job], check=True)
    wait_for(lambda: state_of(run_dir).restarts == 1, "the job to be queued again")
    finish(run_dir)
    shown = subprocess.check_output(["scontrol", "show", "job", "-o", job], text=True)
    assert f" ExcNodeList={node} " in shown
    assert node not in read_hosts(state_of(run_dir).nodes)
    check_same(slurm, run_dir, PACED, *LONG)


def test_a_job_avoids_a_node_that_is_not_fit(slurm: Commands, cluster: Cluster) -> None:
    """A job whose node fails --health is queued again without that node, and finishes."""
    if not cluster.isolated:
        pytest.skip("needs nodes with namespaces of their own")
    enter = ("nsenter", "-t", str(cluster.daemons["node1"].pid), "-m")
    script = ROOT / "tests/no_shared_memory.sh"
    try:
        subprocess.run([*enter, "bash", script, slurm.folder / "dev"], check=True)
        run_dir = submit(slurm, WORLDS_PY, *SETTINGS, "--nodes", "2", "-n", "1")
        finish(run_dir)
    finally:
        cluster.kill(["node1"])
    job = read_submission(run_dir).job
    shown = subprocess.check_output(["scontrol", "show", "job", "-o", job], text=True)
    assert re.search(r" ExcNodeList=node1 ", shown), shown
    assert (state_of(run_dir).restarts, state_of(run_dir).nodes) == (1, "node[2-3]")
    assert run_dir.unhealthy_nodes.read_text() == "node1\n"
    log = slurm("launcher", "logs", "out").stdout
    assert log.count("node1 is not fit for the run. /dev/shm: ") == 1
    check_same(slurm, run_dir, WORLDS_PY, *SETTINGS)


def test_a_rank_that_raises_ends_the_job(slurm: Commands) -> None:
    """A rank that raises fails the job on all nodes, and `status` and the log show its error."""
    run_dir = submit(slurm, FAILING, "how=raise", "rank=1", "--nodes", "2", "-n", "1")
    wait_for(lambda: state_of(run_dir).state == "FAILED", "the job to fail", seconds=40)
    status = slurm("launcher", "status", "out").stdout
    assert re.search(r"failed on rank 1 \(node\d\): ValueError: the loss of rank one", status)
    assert "_fail_at_second_call" in status
    log = slurm("launcher", "logs", "out").stdout
    assert log.count("ValueError: the loss of rank one") == 1


def test_a_missing_node_is_named(slurm: Commands) -> None:
    """A run fails after --join-timeout, names the missing node, and writes nothing."""
    launch = f"launcher run {WORLDS_PY} -n 1 device=cpu --out out --join-timeout 3"
    done = slurm(
        *("srun", "-N2", "--ntasks-per-node=1", "bash", "-c"),
        f"test $SLURM_NODEID = 1 || exec {launch}",
    )
    assert done.exit_code == 2, done.stderr
    assert "3 s for node2" in done.stderr
    assert not (slurm.folder / "out").exists()


def test_a_run_is_cancelled(slurm: Commands) -> None:
    """A cancelled job saves a checkpoint, is not requeued, and has the state `cancelled`."""
    run_dir = submit(slurm, STEADY, "steps=5000", "--nodes", "2", "-n", "1")
    wait_for(lambda: steps_of(run_dir) > 5, "some steps")
    assert "is cancelled" in slurm("launcher", "cancel", "out").stdout
    wait_for(lambda: state_of(run_dir).state == "CANCELLED", "the job to end")
    wait_for(lambda: bool(list_checkpoints(run_dir)), "a checkpoint", seconds=10)
    status = slurm("launcher", "status").stdout
    assert re.search(r"out +\d+ +cancelled", status), status


def test_jobs_do_not_interfere(slurm: Commands) -> None:
    """Two jobs that share their nodes each take their own steps."""
    runs = [
        submit(slurm, WORLDS_PY, *SETTINGS, f"lr={lr}", "--nodes", "2", "-n", "1", out=f"out{lr}")
        for lr in ("0.1", "0.2")
    ]
    for run_dir in runs:
        finish(run_dir)
    traces = [read_trace(run_dir) for run_dir in runs]
    assert traces[0].samples == traces[1].samples
    assert traces[0].lr != traces[1].lr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--nodes", "9"), "--nodes 9 .* 3 nodes"),
        (("--array",), "--array .*lr=0.1,0.2"),
        (("--cluster", "site.yaml"), "sbatch .*invalid partition.* nowhere"),
        (("--time", "soon"), "--time: .* 90 .*'soon'"),
        (("--time", "1"), "--time 1 .* 120 s"),
        (("num_workers=200",), "2 ranks .* 200 workers .* 402 cores.* 16"),
        (("--time", "3-0"), "--time 3-0 .* 2-00:00:00"),
        (("--gpus-per-node", "4"), "--gpus-per-node 4 .* 0 GPUs"),
        (("-n", "2", "--gpus-per-node", "4"), "-n 2 .* --gpus-per-node 4"),
    ],
)
def test_an_impossible_job_is_refused(
    slurm: Commands, arguments: tuple[str, ...], message: str
) -> None:
    """A job that cannot run gives exit code 2 and a message, and writes nothing."""
    (slurm.folder / "site.yaml").write_text("partition: nowhere\n")
    done = slurm("launcher", "submit", WORLDS_PY, *arguments, "--out", "out")
    assert done.exit_code == 2, done.stdout
    assert re.search(message, done.stderr), done.stderr
    assert not (slurm.folder / "out").exists()


def test_a_dry_run_writes_nothing(slurm: Commands) -> None:
    """--dry-run prints the script and Slurm's answer, writes nothing, and imports no torch."""
    done = slurm(
        *("python", "-X", "importtime", "-m", "launcher"),
        *("submit", WORLDS_PY, "-n", "1", "device=cpu", "--dry-run"),
    )
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith("#!/bin/bash\n#SBATCH --job-name=worlds\n")
    assert re.search(r"Job \d+ to start", done.stderr)
    assert not re.search(r"\| +(torch|numpy|accelerate)$", done.stderr, re.MULTILINE)
    assert not list(slurm.folder.iterdir())


def test_odd_folders_are_only_odd(slurm: Commands) -> None:
    """A job runs in a folder whose name has shell syntax, and ignores a launcher.py in it."""
    name = """a'; touch pwned; ' b"=0" $(touch pwned),c %j d"""
    (slurm.folder / name).mkdir()
    (slurm.folder / name / "launcher.py").write_text("raise SystemExit(0)\n")
    odd = Commands(slurm.folder / name, slurm.mark)
    run_dir = submit(odd, WORLDS_PY, "steps=2", "-n", "1", out="o u t")
    finish(run_dir)
    assert Path(read_submission(run_dir).log).is_file()
    assert not list(slurm.folder.rglob("pwned"))


def test_the_script_is_submitted_by_hand(slurm: Commands) -> None:
    """The script slurm/train.sbatch trains a recipe on two nodes without `launcher submit`."""
    done = slurm(
        *("sbatch", "--parsable", "--nodes=2", ROOT / "slurm/train.sbatch", WORLDS_PY),
        *("-n", "1", *SETTINGS, "device=cpu"),
    )
    assert done.exit_code == 0, done.stderr
    job = done.stdout.strip()

    def state() -> str:
        current = job_state(job)
        assert current is not None
        return current.state

    wait_for(lambda: state() in ("COMPLETED", "FAILED"), "the job to end")
    log = (slurm.folder / f"slurm-{job}.out").read_text()
    assert state() == "COMPLETED", log
    check_same(slurm, RunDir(slurm.folder / "runs" / job), WORLDS_PY, *SETTINGS)


def test_srun_starts_ranks_itself(slurm: Commands) -> None:
    """Plain srun starts the ranks of a recipe's file, and `launcher run` refuses to be a rank."""
    done = slurm(
        *("srun", "-N2", "--ntasks-per-node=2", sys.executable, WORLDS_PY, *SETTINGS),
        *("device=cpu", "--out", "out"),
    )
    assert done.exit_code == 0, done.stderr
    assert "4 = 2 nodes x 2 CPU ranks" in done.stdout
    check_same(slurm, RunDir(slurm.folder / "out"), WORLDS_PY, *SETTINGS)
    done = slurm("srun", "-n2", "-N1", "launcher", "run", WORLDS_PY, "device=cpu")
    assert done.exit_code != 0
    assert "srun --ntasks-per-node=1 launcher run" in done.stderr


@pytest.mark.usefixtures("cluster")
def test_a_dry_run_loads_nothing_heavy(run: Commands) -> None:
    """`launcher submit --dry-run` imports no torch, numpy, accelerate, deepspeed or rich."""
    command = ("-X", "importtime", "-m", "launcher", "submit", "digits", "--dry-run")
    done = run(sys.executable, *command)
    assert done.exit_code == 0, done.stderr
    assert "#SBATCH" in done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    modules = {line.rpartition("|")[2].strip() for line in lines}
    assert "launcher.slurm.script" in modules
    assert modules.isdisjoint({"torch", "numpy", "accelerate", "deepspeed", "rich"})
