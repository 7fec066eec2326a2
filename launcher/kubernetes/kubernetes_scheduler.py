"""Kubernetes as a scheduler of `launcher submit`."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from launcher.errors import KubernetesError
from launcher.kubernetes.cluster import Cluster, find_cluster
from launcher.kubernetes.job_pods import Item, name_of, state_of
from launcher.kubernetes.kubectl import Kubectl, current_context
from launcher.kubernetes.manifests import Manifest, manifests, owned_by, render_manifests
from launcher.kubernetes.pod import INSTANCE, MANAGED_BY, PodJob
from launcher.planning.plan import Plan
from launcher.recipe.text_values import digits
from launcher.runs.rundir import RunDir, planned_path
from launcher.runs.status import ACTIVE_STATES, RunState, read_outcome, read_run_state
from launcher.schedulers.hardware import cpus_of, memory_of, plan_runs
from launcher.schedulers.prepared import Prepared, submit_prepared
from launcher.schedulers.project_paths import location_in_project, path_in_project
from launcher.schedulers.request import SubmitRequest
from launcher.schedulers.scheduler import Scheduler
from launcher.schedulers.site_profile import read_time
from launcher.schedulers.submission import SubmittedRun

_FILE = "job.yaml"
"""The name of the file with the manifests in the run folder."""

_OUTSIDE = "so it is not in the image of the pods, which has the project"
"""Why a file outside the working folder cannot be used."""

_RESOURCES = {
    "job": "jobs.batch",
    "jobset": "jobsets.jobset.x-k8s.io",
    "trainjob": "trainjobs.trainer.kubeflow.org",
}
"""What kubectl calls the objects of each kind."""

_LONGEST_NAME = 45
"""Characters of the longest name: host names of pods add to it, and have at most 63."""

_SECONDS_BETWEEN_QUERIES = 2.0


@dataclass(frozen=True, kw_only=True)
class PreparedPods(Prepared):
    """A job of pods that is planned but not submitted."""

    job: PodJob


class KubernetesScheduler:
    """Submits jobs with kubectl."""

    def prepare(self, request: SubmitRequest, cluster: str | None, out: Path | None) -> Prepared:
        return prepare_pods(request, find_cluster(cluster, os.environ), out)

    def check(self, prepared: Prepared) -> str:
        """Let the cluster check the manifests of a job; return what kubectl printed.

        Raises:
            KubernetesError: The cluster rejects them.
        """
        assert isinstance(prepared, PreparedPods)
        if shutil.which("kubectl") is None:
            return "launcher: the cluster did not check this, because kubectl is not installed here"
        cluster = prepared.job.cluster
        try:
            kubectl = _kubectl_of(cluster)
        except KubernetesError as error:
            return f"launcher: the cluster did not check this: {error}"
        return _check_on_server(kubectl, manifests(prepared.job)).rstrip()

    def submit(self, prepared: Prepared) -> tuple[str, RunDir]:
        assert isinstance(prepared, PreparedPods)
        kubectl = _kubectl_of(prepared.job.cluster)
        where = {**prepared.where, "context": kubectl.context or ""}
        objects = manifests(prepared.job)
        return submit_prepared(replace(prepared, where=where), lambda _: _create(kubectl, objects))

    def states(self, runs: Sequence[SubmittedRun]) -> list[RunState]:
        """Return the state of each run, with one query for all runs of a namespace."""
        answers: dict[tuple[str, ...], _Answer] = {}
        return [_state(run, answers, single=len(runs) == 1) for run in runs]

    def copy_log(
        self, run: SubmittedRun, write: Callable[[bytes], object], *, follows: bool
    ) -> None:
        _copy_pod_logs(run, write, follows=follows)

    def cancel(self, runs: Sequence[SubmittedRun]) -> None:
        for run in runs:
            where = run.submission.where
            target = f"{_resource_of(where)}/{run.submission.job}"
            _kubectl_at(where)("delete", target, "--wait=false", "--ignore-not-found")


SCHEDULER: Scheduler = KubernetesScheduler()


def prepare_pods(request: SubmitRequest, cluster: Cluster, out: Path | None) -> PreparedPods:
    """Plan a run and describe the pods that train it.

    Raises:
        KubernetesError: The cluster does not have the requested resources, or cannot do what is
            asked.
        UsageError: The recipe, a setting or a number is wrong.
    """
    if request.grid:
        raise KubernetesError(
            "--array is for Slurm. In Kubernetes, submit each run by itself: every run is a job."
        )
    low, nodes = request.nodes
    if low != nodes:
        raise KubernetesError(
            f"--nodes {low}:{nodes}: a job in Kubernetes has a fixed number of pods. Give one "
            "number."
        )
    (plan,) = plan_runs(request, cluster.hardware)
    cpus = cpus_of(plan, cluster.hardware)
    folder = planned_path(out, plan.recipe).absolute()
    name = job_name(folder)
    job = PodJob(
        name=name,
        nodes=nodes,
        gpus_per_node=plan.nproc_per_node if plan.device == "cuda" else 0,
        cpus_per_node=cpus,
        memory_per_node=memory_of(plan, cluster.hardware, cpus),
        seconds=_seconds_of(request.time, cluster),
        command=_command(request, cluster, plan, name),
        cluster=cluster,
    )
    return PreparedPods(
        scheduler="kubernetes",
        job=job,
        folder=folder,
        files={_FILE: render_manifests(manifests(job))},
        plans=(plan,),
        folders=(RunDir(folder),),
        logs=("",),
        where={
            "kind": cluster.kind,
            "namespace": cluster.namespace or "",
            "nodes": str(nodes),
        },
    )


def job_name(folder: Path) -> str:
    """Return the name of the job of a run folder, which is a DNS label.

    Raises:
        KubernetesError: The name of the folder cannot be made one.
    """
    name = re.sub(r"[^a-z0-9]+", "-", folder.name.lower()).strip("-")
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name) or len(name) > _LONGEST_NAME:
        raise KubernetesError(
            f"The job is named after the run folder, and {folder.name!r} gives {name!r}. A name in "
            f"Kubernetes begins with a letter and has at most {_LONGEST_NAME} letters, digits and "
            "dashes here. Give another --out."
        )
    return name


def _seconds_of(asked: str | None, cluster: Cluster) -> int | None:
    """Return the time limit of a job in seconds; None is none.

    Raises:
        KubernetesError: The time is malformed, exceeds the limit of the site, or is too short.
    """
    limit = asked or cluster.time
    if limit is None:
        return None
    source = "--time" if asked else "time"
    seconds = read_time(limit, source, KubernetesError)
    longest = cluster.max_time
    if longest is not None and seconds > read_time(longest, "max_time", KubernetesError):
        raise KubernetesError(
            f"{source} {limit} exceeds the longest time of the site, {longest}. Ask for less: a "
            "job that reaches its time limit saves a checkpoint, and the run can be resumed."
        )
    if seconds == 0:
        raise KubernetesError(f"{source} {limit} leaves no time to train. Ask for more.")
    return seconds


def _command(request: SubmitRequest, cluster: Cluster, plan: Plan, name: str) -> list[str]:
    """Return the command that each pod runs.

    Raises:
        UsageError: A file that the command names is outside the project.
    """
    command = [*cluster.program, "run", location_in_project(request.reference.location, _OUTSIDE)]
    command += ["-n", str(plan.nproc_per_node), "--out", f"{cluster.runs}/{name}"]
    command += [*request.mirror_words, "--continue"]
    if request.health is not None:
        command += ["--health", request.health]
    if request.config is not None:
        command += ["--config", path_in_project(request.config.resolve(), _OUTSIDE)]
    arguments = (word for word in request.arguments if not word.startswith("device="))
    return [*command, f"device={plan.device}", *arguments]


def _kubectl_of(cluster: Cluster) -> Kubectl:
    """Return kubectl for a cluster, with the context that is current now.

    Raises:
        KubernetesError: kubectl is missing or has no context.
    """
    context = cluster.context or current_context(os.environ)
    return Kubectl(context=context, namespace=cluster.namespace)


def _kubectl_at(where: Mapping[str, str]) -> Kubectl:
    return Kubectl(context=where.get("context"), namespace=where.get("namespace"))


def _resource_of(where: Mapping[str, str]) -> str:
    return _RESOURCES.get(where.get("kind", ""), _RESOURCES["job"])


def _nodes_of(where: Mapping[str, str]) -> int:
    return digits(where.get("nodes", "")) or 1


def _check_on_server(kubectl: Kubectl, objects: Sequence[Manifest]) -> str:
    return kubectl("create", "-f", "-", "--dry-run=server", objects=objects)


def _create(kubectl: Kubectl, objects: Sequence[Manifest]) -> str:
    """Create the objects of a job, or none of them; return the job's name.

    Raises:
        KubernetesError: The cluster rejects one of them.
    """
    job, *others = objects
    try:
        _check_on_server(kubectl, objects)
    except KubernetesError as error:
        if "already exists" not in str(error):
            raise
        named = f"{job['kind'].lower()} {job['metadata']['name']}"
        raise KubernetesError(
            f"{error} Another submission has that name: give another --out, or remove it with "
            f"`kubectl delete {named}`."
        ) from None
    created = json.loads(kubectl("create", "-f", "-", "-o", "json", objects=[job]))
    name: str = created["metadata"]["name"]
    try:
        if others:
            kubectl("create", "-f", "-", objects=[owned_by(each, created) for each in others])
    except KubernetesError:
        with contextlib.suppress(KubernetesError):
            kubectl("delete", "-f", "-", "--wait=false", objects=[job])
        raise
    return name


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """What a namespace holds, or why kubectl does not say it."""

    items: Sequence[Item] = ()
    problem: str = ""


def _state(run: SubmittedRun, answers: dict[tuple[str, ...], _Answer], *, single: bool) -> RunState:
    """Return the state of a run; once kubectl has not answered, that of its folder."""
    if (ended := read_outcome(run.run_dir)) is not None:
        return ended  # the pods write into this folder
    where, name = run.submission.where, run.submission.job
    resource = _resource_of(where)
    place = (where.get("context", ""), where.get("namespace", ""), resource)
    if place not in answers:
        label = f"{INSTANCE}={name}" if single else f"{MANAGED_BY}=gpu-launcher"
        answers[place] = _ask(_kubectl_at(where), resource, label)
    answer = answers[place]
    if answer.problem:
        state = read_run_state(run.run_dir)
        return RunState(name=state.name, words=f"{state.words} (by its folder: {answer.problem})")
    items = [item for item in answer.items if name_of(item) == name]
    pods = sorted(
        (item for item in items if item["kind"] == "Pod"),
        key=lambda pod: str(pod["metadata"].get("creationTimestamp", "")),
    )
    job = next((item for item in items if item["kind"] != "Pod"), None)
    nodes = _nodes_of(where)
    warning = _last_warning(_kubectl_at(where), name) if job is not None and not pods else ""
    return state_of(job, pods, nodes, run.run_dir, warning)


def _ask(kubectl: Kubectl, resource: str, label: str) -> _Answer:
    try:
        return _Answer(items=kubectl.get(f"{resource},pods", "-l", label))
    except KubernetesError as error:
        return _Answer(problem=str(error))


def _last_warning(kubectl: Kubectl, name: str) -> str:
    """Return the last warning about a job, such as an exceeded quota."""
    selector = f"involvedObject.name={name},type=Warning"
    try:
        events = kubectl.get("events", f"--field-selector={selector}")
    except KubernetesError:
        return ""
    return str(events[-1].get("message", "")) if events else ""


def _copy_pod_logs(run: SubmittedRun, write: Callable[[bytes], object], *, follows: bool) -> None:
    where, name = run.submission.where, run.submission.job
    kubectl = _kubectl_at(where)
    nodes = _nodes_of(where)
    command = ["logs", "-l", f"{INSTANCE}={name}", "--tail=-1", "--ignore-errors"]
    if nodes > 1:
        command.append("--prefix")
    if not follows:
        if not kubectl.stream(*command, write=write):
            state = _state(run, {}, single=True)
            raise KubernetesError(f"{name} has printed nothing yet: {state.words}")
        return
    command += ["--follow", f"--max-log-requests={2 * nodes + 10}"]
    since = ""
    while (state := _state(run, {}, single=True)).name in ACTIVE_STATES or not since:
        if state.name == "waiting":
            time.sleep(_SECONDS_BETWEEN_QUERIES)
            continue
        now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        kubectl.stream(*command, *([f"--since-time={since}"] if since else []), write=write)
        since = now
        time.sleep(_SECONDS_BETWEEN_QUERIES if state.name in ACTIVE_STATES else 0)
