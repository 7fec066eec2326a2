"""The table of schedulers, records of submissions, and tasks for SkyPilot."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import get_args

import pytest
import yaml
from damaged_run import write_finished_run
from fuzz.harness import invoke

from launcher.cli.submit import command
from launcher.errors import SchedulerError
from launcher.recipe.resolve import resolve
from launcher.schedulers.request import SubmitRequest
from launcher.schedulers.scheduler import SCHEDULER_NAMES, find_scheduler
from launcher.schedulers.submission import SchedulerName, read_submission


def test_every_scheduler_is_found_by_its_name() -> None:
    """The command line, submission.json and the table have the same schedulers."""
    (option,) = (each for each in command.params if each.name == "scheduler_name")
    assert option.to_info_dict()["type"]["choices"] == SCHEDULER_NAMES
    assert get_args(SchedulerName) == SCHEDULER_NAMES
    kinds = [type(find_scheduler(name)).__name__ for name in SCHEDULER_NAMES]
    assert kinds == ["SlurmScheduler", "KubernetesScheduler", "SkyPilotScheduler"]


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
