"""The table of schedulers, records of submissions, and tasks for SkyPilot."""

from __future__ import annotations

import json
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import yaml
from damaged_run import write_finished_run
from fuzz.harness import invoke
from support import ROOT, Commands, has_rows, wait_until

from launcher.cli.submit import command
from launcher.errors import SchedulerError
from launcher.recipe.resolve import resolve
from launcher.runs.rundir import RunDir
from launcher.schedulers.request import SubmitRequest
from launcher.schedulers.scheduler import SCHEDULER_NAMES, find_scheduler
from launcher.schedulers.submission import SchedulerName, read_submission

WORLDS_PY = ROOT / "tests/recipes/worlds.py:worlds"


def test_every_scheduler_is_found_by_its_name() -> None:
    """The command line, submission.json and the table have the same schedulers."""
    (option,) = (each for each in command.params if each.name == "scheduler_name")
    assert option.to_info_dict()["type"]["choices"] == SCHEDULER_NAMES
    assert get_args(SchedulerName) == SCHEDULER_NAMES
    kinds = [type(find_scheduler(name)).__name__ for name in SCHEDULER_NAMES]
    assert kinds == ["SlurmScheduler", "KubernetesScheduler", "SshScheduler", "SkyPilotScheduler"]


def test_a_submission_without_a_scheduler_is_slurms(tmp_path: Path) -> None:
    """submission.json of earlier versions names no scheduler, and an unknown one is refused."""
    run_dir = write_finished_run(tmp_path / "run")
    values = json.loads(run_dir.submission.read_text())
    del values["scheduler"], values["where"]
    run_dir.submission.write_text(json.dumps(values))
    assert read_submission(run_dir).scheduler == "slurm"
    run_dir.submission.write_text(json.dumps(values | {"scheduler": "lsf"}))
    ended = invoke(["status", "run"], tmp_path)
    assert ended.exit_code == 2
    assert "submission.json" in ended.stderr


REQUEST = SubmitRequest(
    reference=resolve("digits"),
    arguments=("lr=0.2",),
    grid=(),
    config=None,
    nodes=(2, 2),
    gpus_per_node=8,
    nproc_per_node=None,
    time=None,
)


def test_a_task_of_skypilot_runs_launcher_on_each_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nodes meet at the first address, words pass through the shell, and secrets are names."""
    monkeypatch.chdir(tmp_path)
    profile = {"accelerator": "H100", "runs": "~/my runs", "secrets": ["HF_TOKEN"]}
    Path("cloud.yaml").write_text(json.dumps(profile))
    prepared = find_scheduler("skypilot").prepare(REQUEST, "cloud.yaml", Path("out"))
    task = yaml.safe_load(prepared.text)
    assert task["num_nodes"] == 2
    assert task["resources"]["accelerators"] == "H100:8"
    assert task["secrets"] == {"HF_TOKEN": None}
    line = f"launcher() {{ printf '%s\\0' \"$@\"; }}\n{task['run']}"
    env = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "HOME": "/home/me"}
    shell = ["bash", "-euc", line]
    words = subprocess.run(shell, text=True, capture_output=True, env=env, check=True).stdout.split(
        "\0"
    )[:-1]
    assert words == [
        *("run", "launcher.recipes.digits:digits", "-n", "8", "--continue", "device=cuda"),
        *("lr=0.2", "--out", "/home/me/my runs/out", "--nodes", "2"),
        *("--rendezvous", "10.0.0.1:29400", "--join-timeout", "3600"),
    ]


def test_skypilot_launches_its_tasks_itself(tmp_path: Path) -> None:
    """Without --dry-run, the error says how to launch a task, and no folder is made."""
    ended = invoke(["submit", "digits", "--to", "skypilot", "-n", "1", "--out", "out"], tmp_path)
    assert ended.exit_code == 2
    assert "sky jobs launch task.yaml" in ended.stderr
    assert not (tmp_path / "out").exists()
    with pytest.raises(SchedulerError, match="accelerator"):
        find_scheduler("skypilot").prepare(REQUEST, None, tmp_path / "out")


def test_hosts_are_those_of_the_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--nodes takes the first hosts, and what ssh cannot do is refused."""
    monkeypatch.chdir(tmp_path)
    Path("lab.yaml").write_text("hosts: [node1, node2, node3]\nforward: [HF_TOKEN]\n")
    scheduler = find_scheduler("ssh")
    prepared = scheduler.prepare(REQUEST, "lab.yaml", Path("out"))
    command = shlex.split(prepared.text.partition("exec ")[2])
    assert command[command.index("--hosts") + 1] == "node1,node2"
    assert command[command.index("--forward") + 1] == "HF_TOKEN"
    assert command[command.index("--out") + 1] == str(tmp_path / "out")
    for changes, message in (
        ({"nodes": (4, 4)}, "--nodes 4 exceeds the 3 hosts"),
        ({"nodes": (1, 2)}, "a fixed number of hosts"),
        ({"time": "90"}, "without a time limit"),
    ):
        with pytest.raises(SchedulerError, match=message):
            scheduler.prepare(replace(REQUEST, **changes), "lab.yaml", Path("out"))
    with pytest.raises(SchedulerError, match="hosts: "):
        scheduler.prepare(REQUEST, None, Path("out"))


def test_a_run_in_the_background_is_followed_and_cancelled(run: Commands) -> None:
    """`submit --to ssh` returns at once; status, logs and cancel find the run by its folder."""
    ssh = run.folder / "local-ssh"
    ssh.write_text('#!/bin/sh\nshift\nexec sh -c "$*"\n')
    ssh.chmod(0o755)
    profile = {"hosts": ["localhost"], "ssh": str(ssh)}
    (run.folder / "lab.yaml").write_text(json.dumps(profile))
    settings = ("epochs=400", "-n", "1", "device=cpu", "--cluster", "lab.yaml", "--out", "out")
    done = run("launcher", "submit", str(WORLDS_PY), "--to", "ssh", *settings)
    assert done.exit_code == 0, done.stderr
    run_dir = RunDir(run.folder / "out")
    wait_until(lambda: has_rows(run_dir, 2))
    done = run("launcher", "status", "out", "--json")
    assert json.loads(done.stdout)["state"] == "running"
    assert "1 CPU rank" in run("launcher", "logs", "out").stdout
    assert run("launcher", "cancel", "out").exit_code == 0
    done = run("launcher", "logs", "out", "-f")
    assert "checkpoint saved" in done.stdout
    done = run("launcher", "status", "out", "--json")
    assert json.loads(done.stdout)["state"] == "stopped"


def test_a_run_that_never_began_says_so(run: Commands) -> None:
    """The status of a run whose hosts cannot be reached names the log."""
    (run.folder / "lab.yaml").write_text("hosts: [nowhere]\nssh: /bin/false\n")
    settings = ("-n", "1", "device=cpu", "--to", "ssh", "--cluster", "lab.yaml", "--out", "out")
    assert run("launcher", "submit", "digits", *settings).exit_code == 0
    ended = f"ended before it began, see {run.folder}/out/logs/ssh.log"
    wait_until(lambda: ended in run("launcher", "status", "out").stdout)
    done = run("launcher", "status", "out", "--json")
    assert json.loads(done.stdout)["state"] == "failed"
