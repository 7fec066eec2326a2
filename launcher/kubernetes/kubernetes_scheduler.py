"""Kubernetes as a scheduler of `launcher submit`."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
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
from launcher.kubernetes.manifests import (
    Manifest,
    labelled,
    manifests,
    owned_by,
    render_manifests,
)
from launcher.kubernetes.pod import ARRAY, INSTANCE, MANAGED_BY, PodJob
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

_SUBMISSION = "gpu-launcher/submission"
"""The label of the objects that one submission has created, by which they are removed again."""

_LONGEST_NAME = 45
"""Characters of the longest name: host names of pods add to it, and have at most 63."""

_SECONDS_BETWEEN_QUERIES = 2.0


@dataclass(frozen=True, kw_only=True)
class PreparedPods(Prepared):
    """A job of pods that is planned but not submitted."""

    jobs: tuple[PodJob, ...]
    """The job of each run."""

    name: str
    """The name of the job, or that of the array."""

    def job_of(self, job: str, index: int) -> str:
        return self.jobs[index].name


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
        cluster = prepared.jobs[0].cluster
        try:
            kubectl = _kubectl_of(cluster)
        except KubernetesError as error:
            return f"launcher: the cluster did not check this: {error}"
        return _check_on_server(kubectl, _objects_of(prepared.jobs)).rstrip()

    def submit(self, prepared: Prepared) -> tuple[str, RunDir]:
        assert isinstance(prepared, PreparedPods)
        kubectl = _kubectl_of(prepared.jobs[0].cluster)
        where = {**prepared.where, "context": kubectl.context or ""}

        def send(_: Path) -> str:
            _create(kubectl, prepared.jobs)
            return prepared.name

        return submit_prepared(replace(prepared, where=where), send)

    def states(self, runs: Sequence[SubmittedRun]) -> list[RunState]:
        """Return the state of each run, with one query for all runs of a namespace."""
        answers: dict[_Place, _Answer] = {}
        return [_state(run, answers, single=len(runs) == 1) for run in runs]

    def copy_log(
        self, run: SubmittedRun, write: Callable[[bytes], object], *, follows: bool
    ) -> None:
        _copy_pod_logs(run, write, follows=follows)

    def cancel(self, runs: Sequence[SubmittedRun]) -> None:
        targets: dict[_Place, list[str]] = {}
        for run in runs:
            targets.setdefault(_place_of(run), []).append(run.submission.job)
        for place, names in targets.items():
            words = (place.resource, *names, "--wait=false", "--ignore-not-found")
            place.kubectl("delete", *words)


SCHEDULER: Scheduler = KubernetesScheduler()


def prepare_pods(request: SubmitRequest, cluster: Cluster, out: Path | None) -> PreparedPods:
    """Plan the runs of a request and describe the pods that train them: a job for each run.

    Raises:
        KubernetesError: The cluster does not have the requested resources, or cannot do what is
            asked.
        UsageError: The recipe, a setting or a number is wrong.
    """
    low, nodes = request.nodes
    if low != nodes:
        raise KubernetesError(
            f"--nodes {low}:{nodes}: a Job has a fixed number of pods, and Kubernetes replaces one "
            "that is lost instead of going on without it. Give one number."
        )
    plans = plan_runs(request, cluster.hardware)
    folder = planned_path(out, plans[0].recipe).absolute()
    name = job_name(folder, len(request.grid))
    jobs = tuple(
        _job_of(request, cluster, plan, name, index if request.grid else None)
        for index, plan in enumerate(plans)
    )
    paths = [folder / str(index) for index in range(len(plans))] if request.grid else [folder]
    return PreparedPods(
        scheduler="kubernetes",
        jobs=jobs,
        name=name,
        folder=folder,
        files={_FILE: render_manifests(_objects_of(jobs))},
        plans=plans,
        folders=tuple(map(RunDir, paths)),
        logs=("",) * len(plans),
        grid=request.grid,
        where={
            "kind": cluster.kind,
            "namespace": cluster.namespace or "",
            "nodes": str(nodes),
        },
    )


def _job_of(
    request: SubmitRequest, cluster: Cluster, plan: Plan, name: str, index: int | None
) -> PodJob:
    """Return the job of one run.

    Args:
        request: The request.
        cluster: The site profile.
        plan: The plan of the run.
        name: The name of the job, or that of the array.
        index: The place of the run in its array; None for a single run.

    Raises:
        UsageError: The cluster does not have the resources, or a file is outside the project.
    """
    cpus = cpus_of(plan, cluster.hardware)
    folder = f"{cluster.runs}/{name}" + ("" if index is None else f"/{index}")
    return PodJob(
        name=name if index is None else f"{name}-{index}",
        nodes=request.nodes[1],
        gpus_per_node=plan.nproc_per_node if plan.device == "cuda" else 0,
        cpus_per_node=cpus,
        memory_per_node=memory_of(plan, cluster.hardware, cpus),
        seconds=_seconds_of(request.time, cluster),
        command=_command(request, cluster, plan, folder, request.runs[index or 0]),
        cluster=cluster,
        array="" if index is None else name,
    )


def job_name(folder: Path, runs: int = 0) -> str:
    """Return the name of the job of a run folder, which is a DNS label.

    Args:
        folder: The run folder, or that of an array.
        runs: The number of runs of the array, whose jobs add an index to the name.

    Raises:
        KubernetesError: The name of the folder cannot be made one.
    """
    name = re.sub(r"[^a-z0-9]+", "-", folder.name.lower()).strip("-")
    longest = _LONGEST_NAME - (len(f"-{runs - 1}") if runs else 0)
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name) or len(name) > longest:
        raise KubernetesError(
            f"The job is named after the run folder, and {folder.name!r} gives {name!r}. A name in "
            f"Kubernetes begins with a letter and has at most {longest} letters, digits and "
            "dashes here. Give another --out."
        )
    return name


def _objects_of(jobs: Sequence[PodJob]) -> list[Manifest]:
    """Return the objects of all jobs."""
    return [manifest for job in jobs for manifest in manifests(job)]


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


def _command(
    request: SubmitRequest, cluster: Cluster, plan: Plan, folder: str, settings: Sequence[str]
) -> list[str]:
    """Return the command that each pod of a run runs.

    Args:
        request: The request.
        cluster: The site profile.
        plan: The plan of the run.
        folder: The run folder in the pods.
        settings: The name=value arguments of the run.

    Raises:
        UsageError: A file that the command names is outside the project.
    """
    command = [*cluster.program, "run", location_in_project(request.reference.location, _OUTSIDE)]
    command += ["-n", str(plan.nproc_per_node), "--out", folder]
    command += [*request.mirror_words, "--continue"]
    if request.health is not None:
        command += ["--health", request.health]
    if request.config is not None:
        command += ["--config", path_in_project(request.config.resolve(), _OUTSIDE)]
    arguments = (word for word in settings if not word.startswith("device="))
    return [*command, f"device={plan.device}", *arguments]


def _kubectl_of(cluster: Cluster) -> Kubectl:
    """Return kubectl for a cluster, with the context that is current now.

    Raises:
        KubernetesError: kubectl is missing or has no context.
    """
    context = cluster.context or current_context(os.environ)
    return Kubectl(context=context, namespace=cluster.namespace)


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where the job of a run is."""

    context: str | None
    namespace: str | None
    resource: str
    """What kubectl calls the job."""

    @property
    def kubectl(self) -> Kubectl:
        return Kubectl(context=self.context, namespace=self.namespace)


def _place_of(run: SubmittedRun) -> _Place:
    where = run.submission.where
    return _Place(
        context=where.get("context"),
        namespace=where.get("namespace"),
        resource=_RESOURCES.get(where.get("kind", ""), _RESOURCES["job"]),
    )


def _nodes_of(where: Mapping[str, str]) -> int:
    return digits(where.get("nodes", "")) or 1


def _check_on_server(kubectl: Kubectl, objects: Sequence[Manifest]) -> str:
    return kubectl("create", "-f", "-", "--dry-run=server", objects=objects)


def _create(kubectl: Kubectl, jobs: Sequence[PodJob]) -> None:
    """Create the objects of all jobs, or none of them.

    Raises:
        KubernetesError: The cluster rejects one of them.
    """
    objects = _objects_of(jobs)
    try:
        _check_on_server(kubectl, objects)
    except KubernetesError as error:
        if "already exists" not in str(error):
            raise
        named = f"{objects[0]['kind'].lower()} {jobs[0].name}"
        if jobs[0].array:
            named = f"{objects[0]['kind'].lower()} -l {ARRAY}={jobs[0].array}"
        raise KubernetesError(
            f"{error} Another submission has that name: give another --out, or remove it with "
            f"`kubectl delete {named}`."
        ) from None
    mark = secrets.token_hex(8)
    heads = [labelled(manifests(job)[0], _SUBMISSION, mark) for job in jobs]
    try:
        owners = kubectl.create(heads)
        others = [
            owned_by(manifest, owner)
            for job, owner in zip(jobs, owners, strict=True)
            for manifest in manifests(job)[1:]
        ]
        if others:
            kubectl.create(others)
    except KubernetesError:
        resource = _RESOURCES[jobs[0].cluster.kind]
        with contextlib.suppress(KubernetesError):
            kubectl("delete", resource, "-l", f"{_SUBMISSION}={mark}", "--wait=false")
        raise


@dataclass(kw_only=True)
class _Answer:
    """What a namespace holds, or why kubectl does not say it."""

    items: Sequence[Item] = ()
    problem: str = ""
    warnings: Sequence[Item] | None = None
    """The warnings about its objects; None if they have not been asked for."""


def _state(run: SubmittedRun, answers: dict[_Place, _Answer], *, single: bool) -> RunState:
    """Return the state of a run; once kubectl has not answered, that of its folder."""
    if (ended := read_outcome(run.run_dir)) is not None:
        return ended  # the pods write into this folder
    place, name = _place_of(run), run.submission.job
    if place not in answers:
        label = f"{INSTANCE}={name}" if single else f"{MANAGED_BY}=gpu-launcher"
        answers[place] = _ask(place, label)
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
    nodes = _nodes_of(run.submission.where)
    warning = _last_warning(place, answer, name) if job is not None and not pods else ""
    return state_of(job, pods, nodes, run.run_dir, warning)


def _ask(place: _Place, label: str) -> _Answer:
    try:
        return _Answer(items=place.kubectl.get(f"{place.resource},pods", "-l", label))
    except KubernetesError as error:
        return _Answer(problem=str(error))


def _last_warning(place: _Place, answer: _Answer, name: str) -> str:
    """Return the last warning about a job, such as an exceeded quota."""
    if answer.warnings is None:
        try:
            answer.warnings = place.kubectl.get("events", "--field-selector=type=Warning")
        except KubernetesError:
            answer.warnings = ()
    own = [event for event in answer.warnings if event["involvedObject"].get("name") == name]
    return str(own[-1].get("message", "")) if own else ""


def _copy_pod_logs(run: SubmittedRun, write: Callable[[bytes], object], *, follows: bool) -> None:
    kubectl, name = _place_of(run).kubectl, run.submission.job
    nodes = _nodes_of(run.submission.where)
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
