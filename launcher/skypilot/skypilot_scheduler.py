"""SkyPilot as a scheduler of `launcher submit`: a task file, which `sky` launches.

SkyPilot runs the same commands on each node, and gives each its rank and the addresses of all.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.environment.nodes import DEFAULT_PORT
from launcher.errors import SchedulerError
from launcher.planning.plan import Plan
from launcher.recipe.validation import NonNegativeInt, PositiveInt
from launcher.runs.rundir import RunDir, planned_path
from launcher.runs.status import RunState, read_run_state
from launcher.schedulers.hardware import NodeHardware, plan_runs
from launcher.schedulers.prepared import Prepared
from launcher.schedulers.project_paths import location_in_project, path_in_project
from launcher.schedulers.request import SubmitRequest
from launcher.schedulers.scheduler import Scheduler
from launcher.schedulers.site_profile import Line, find_profile, read_profile
from launcher.schedulers.submission import SubmittedRun

_FILE = "task.yaml"
"""The name of the task file."""

_OUTSIDE = "which SkyPilot copies to the nodes"
"""Why a file outside the working folder cannot be used."""


@dataclass(frozen=True, kw_only=True)
class Cloud:
    """A profile of SkyPilot's resources."""

    accelerator: Line | None = None
    """Name of the GPUs, such as H100; needed for runs on GPUs."""

    infra: Line | None = None
    """Where nodes are, such as aws/us-east-1. Default: the cheapest place."""

    image_id: Line | None = None
    """Image of the nodes, such as docker:registry/image:tag."""

    use_spot: bool = False
    """Whether nodes may be preempted. `sky jobs launch` starts a preempted run again."""

    gpus_per_node: NonNegativeInt | None = None
    """GPUs of a node; jobs that ask for more are refused."""

    cpus_per_node: PositiveInt | None = None
    """Cores of a node."""

    runs: Line = "~/runs"
    """Folder for run folders on the nodes. With several nodes, or on spot nodes, a bucket of
    file_mounts."""

    setup: tuple[Line, ...] = ("pip install gpu-launcher",)
    """Shell commands that install the project on each node."""

    env: dict[str, Line] = field(default_factory=dict)
    """Environment variables of the ranks."""

    secrets: tuple[Line, ...] = ()
    """Names of environment variables that `sky` takes from its own environment."""

    file_mounts: dict[str, Line] = field(default_factory=dict)
    """Buckets by the folders at which the nodes see them, such as /runs: s3://my-runs."""


def task(request: SubmitRequest, cloud: Cloud, plan: Plan, name: str) -> dict[str, Any]:
    """Return the task of a run as plain values.

    Raises:
        SchedulerError: The profile does not name the GPUs.
        UsageError: A file that the command names is outside the working folder.
    """
    resources: dict[str, Any] = {"cpus": f"{plan.nproc_per_node * (1 + plan.workers_per_rank)}+"}
    if plan.device == "cuda":
        if cloud.accelerator is None:
            raise SchedulerError(
                "A run on GPUs needs accelerator: in the profile of --cluster, such as H100. Name "
                "it, or use --gpus-per-node 0."
            )
        resources["accelerators"] = f"{cloud.accelerator}:{plan.nproc_per_node}"
    for key in ("infra", "image_id", "use_spot"):
        if value := getattr(cloud, key):
            resources[key] = value
    values: dict[str, Any] = {
        "name": name,
        "workdir": ".",
        "num_nodes": request.nodes[1],
        "resources": resources,
        "envs": dict(cloud.env),
        "secrets": dict.fromkeys(cloud.secrets),
        "file_mounts": {
            folder: {"source": source, "mode": "MOUNT"}
            for folder, source in cloud.file_mounts.items()
        },
        "setup": "\n".join(cloud.setup),
        "run": _run_lines(request, cloud, plan, name),
    }
    return {key: value for key, value in values.items() if value not in ({}, "")}


def _run_lines(request: SubmitRequest, cloud: Cloud, plan: Plan, name: str) -> str:
    """Return the shell commands of each node."""
    folder = cloud.runs.rstrip("/")
    out = f'"$HOME"{shlex.quote(folder[1:])}' if folder.startswith("~/") else shlex.quote(folder)
    command = ["launcher", "run", location_in_project(request.reference.location, _OUTSIDE)]
    command += ["-n", str(plan.nproc_per_node), *request.mirror_words, "--continue"]
    if request.health is not None:
        command += ["--health", request.health]
    if request.config is not None:
        command += ["--config", path_in_project(request.config.resolve(), _OUTSIDE)]
    arguments = (word for word in request.arguments if not word.startswith("device="))
    command += [f"device={plan.device}", *arguments]
    line = f"{shlex.join(command)} --out {out}/{name}"
    if request.nodes[1] == 1:
        return line
    first = 'first=$(echo "$SKYPILOT_NODE_IPS" | head -n1)'
    meet = f'--nodes {request.nodes[1]} --rendezvous "$first:{DEFAULT_PORT}"'
    return f"{first}\n{line} {meet} --join-timeout 3600"


class SkyPilotScheduler:
    """Writes task files, and leaves it to `sky` to launch them."""

    def prepare(self, request: SubmitRequest, cluster: str | None, out: Path | None) -> Prepared:
        if request.grid or request.nodes[0] != request.nodes[1] or request.time:
            raise SchedulerError(
                "A task of SkyPilot has one run, a fixed number of nodes and no time limit: leave "
                "out --array, a range of --nodes and --time."
            )
        cloud = Cloud()
        if cluster is not None:
            path = find_profile(
                cluster, "skypilot", "launcher/skypilot", os.environ, SchedulerError
            )
            cloud = read_profile(path, Cloud, SchedulerError)
        hardware = NodeHardware(
            gpus=cloud.gpus_per_node, cpus=cloud.cpus_per_node, memory_bytes=None
        )
        plans = plan_runs(request, hardware)
        folder = planned_path(out, plans[0].recipe).absolute()
        return Prepared(
            scheduler="skypilot",
            folder=folder,
            files={_FILE: _render(task(request, cloud, plans[0], folder.name))},
            plans=plans,
            folders=(RunDir(folder),),
            logs=("",),
        )

    def check(self, prepared: Prepared) -> str:
        return "launcher: save this as task.yaml and launch it with `sky jobs launch task.yaml`"

    def submit(self, prepared: Prepared) -> tuple[str, RunDir]:
        raise SchedulerError(
            "launcher writes the task, and `sky` launches it: add --dry-run, save the output as "
            "task.yaml, and run `sky jobs launch task.yaml`."
        )

    def states(self, runs: Sequence[SubmittedRun]) -> list[RunState]:
        return [read_run_state(run.run_dir) for run in runs]

    def copy_log(
        self, run: SubmittedRun, write: Callable[[bytes], object], *, follows: bool
    ) -> None:
        raise SchedulerError("`sky jobs logs` shows the output of a job in SkyPilot.")

    def cancel(self, runs: Sequence[SubmittedRun]) -> None:
        raise SchedulerError("`sky jobs cancel` cancels a job in SkyPilot.")


def _render(values: dict[str, Any]) -> str:
    """Return a task as YAML, with shell commands as they are, line by line."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Writes text of several lines as a block."""

    def represent(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
        style = "|" if "\n" in text else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    Dumper.add_representer(str, represent)
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, width=10_000)


SCHEDULER: Scheduler = SkyPilotScheduler()
