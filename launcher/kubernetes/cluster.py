"""Site profiles of Kubernetes clusters: what holds for every job, whatever it trains."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from launcher.errors import KubernetesError
from launcher.recipe.validation import NonNegativeInt, PositiveInt, brief
from launcher.schedulers.hardware import NodeHardware
from launcher.schedulers.site_profile import (
    Line,
    check_environment,
    find_profile,
    read_profile,
    read_time,
)

Name = Annotated[
    str,
    Meta(
        pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$",
        description="a name of lower-case letters, digits, dots and dashes",
    ),
]
"""The name of an object in Kubernetes."""

_UNITS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12} | {
    f"{letter}i": 1024.0 ** (power + 1) for power, letter in enumerate("KMGT")
}
"""The factors of Kubernetes' suffixes of quantities."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A site profile."""

    image: Line
    """Container image with Python, PyTorch, launcher and the project."""

    kind: Literal["job", "jobset", "trainjob"] = "job"
    """What is created: a Job, which every cluster has, or a JobSet or Kubeflow TrainJob, which need
    their controllers."""

    context: Line | None = None
    """Context of kubectl. Default: the current one."""

    namespace: Name | None = None
    """Namespace of the jobs. Default: that of the context."""

    program: tuple[Line, ...] = ("launcher",)
    """Command that starts launcher in the image."""

    folder: Line | None = None
    """Folder of the project in the image. Default: the working folder of the image."""

    runs: Line = "/runs"
    """Folder in the pods for run folders, on a volume that all nodes share."""

    volumes: tuple[Line, ...] = ()
    """Volumes as CLAIM:FOLDER or, for a folder of the host, /FOLDER:FOLDER; with :ro read-only."""

    shared_memory: Line | None = None
    """Size of /dev/shm, such as 16Gi. Default: the memory of the pod."""

    gpus_per_node: NonNegativeInt | None = None
    """GPUs of a node; jobs that ask for more are refused."""

    gpu_resource: Line = "nvidia.com/gpu"
    """Resource that stands for a GPU."""

    cpus_per_node: PositiveInt | None = None
    """Cores of a node that a pod may ask for."""

    memory_per_node: Line | None = None
    """Memory of a node that a pod may ask for, such as 480Gi; a job gets the share of the GPUs or
    cores that it uses."""

    resources: Mapping[str, Line] = field(default_factory=dict)
    """Further resources of each pod, such as rdma/hca: 1."""

    env: Mapping[str, Line] = field(default_factory=dict)
    """Environment variables of the ranks."""

    secrets: tuple[Name, ...] = ()
    """Secrets whose keys all become environment variables."""

    secret_env: Mapping[str, Line] = field(default_factory=dict)
    """Environment variables with a key of a secret each, as SECRET/KEY."""

    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    """When the image is pulled."""

    image_pull_secrets: tuple[Name, ...] = ()
    """Secrets for the image's registry."""

    service_account: Name | None = None
    """Service account of the pods."""

    run_as_user: NonNegativeInt | None = None
    """User id of the ranks."""

    run_as_group: NonNegativeInt | None = None
    """Group id of the ranks and of their volumes."""

    node_selector: Mapping[str, Line] = field(default_factory=dict)
    """Labels of the nodes that may run a job."""

    tolerations: tuple[Line, ...] = ()
    """Taints that pods tolerate, in the notation of `kubectl taint`: KEY[=VALUE][:EFFECT]."""

    priority_class: Name | None = None
    """Priority class of the pods."""

    labels: Mapping[str, Line] = field(default_factory=dict)
    """Labels of all objects, such as kueue.x-k8s.io/queue-name: training."""

    annotations: Mapping[str, Line] = field(default_factory=dict)
    """Annotations of the pods."""

    interface: Line | None = None
    """Network interface between nodes, for gloo and NCCL."""

    runtime: Name = "torch-distributed"
    """ClusterTrainingRuntime of a trainjob."""

    time: Line | None = None
    """Default time limit of a job, such as 12:00:00."""

    max_time: Line | None = None
    """Longest time limit that a job may ask for."""

    grace_seconds: PositiveInt = 120
    """Seconds that a pod has to save a checkpoint after it is told to stop."""

    join_seconds: PositiveInt = 3600
    """Seconds that a pod waits for the others, which may have to wait for free nodes."""

    max_restarts: NonNegativeInt = 0
    """How many times a run that failed is started again from its newest checkpoint. Preempted pods
    and stopped runs are started again in any case."""

    keep_seconds: NonNegativeInt | None = None
    """Seconds after which an ended job and its logs are removed. Default: never."""

    @property
    def hardware(self) -> NodeHardware:
        """The resources of a node."""
        memory = self.memory_per_node
        return NodeHardware(
            gpus=self.gpus_per_node,
            cpus=self.cpus_per_node,
            memory_bytes=None if memory is None else read_quantity(memory, "memory_per_node"),
        )


def find_cluster(name: str | None, env: Mapping[str, str]) -> Cluster:
    """Read a site profile.

    Args:
        name: A YAML file, or the name of one in kubernetes/ or ~/.config/launcher/kubernetes/; None
            is the value of LAUNCHER_KUBERNETES_CLUSTER.
        env: The environment.

    Raises:
        KubernetesError: There is no such profile, or something in it is wrong.
    """
    name = name or env.get("LAUNCHER_KUBERNETES_CLUSTER")
    if not name:
        raise KubernetesError(
            "--to kubernetes needs a site profile, at least for the image of the pods: give "
            "--cluster NAME or set LAUNCHER_KUBERNETES_CLUSTER. kubernetes/example.yaml shows one."
        )
    path = find_profile(name, "kubernetes", "launcher/kubernetes", env, KubernetesError)
    return read_cluster(path)


def read_cluster(path: Path) -> Cluster:
    """Read a site profile from a YAML file.

    Raises:
        KubernetesError: A key is unknown or missing, or a value does not fit.
    """
    cluster = read_profile(path, Cluster, KubernetesError)
    check_environment({**cluster.env, **cluster.secret_env}, path, KubernetesError)
    for name in ("time", "max_time"):
        if (text := getattr(cluster, name)) is not None:
            read_time(text, f"{path}: {name}", KubernetesError)
    for name in ("memory_per_node", "shared_memory"):
        if (text := getattr(cluster, name)) is not None:
            read_quantity(text, f"{path}: {name}")
    patterns = {
        "volumes": (cluster.volumes, r"[^:]+:/[^:]*(:ro)?", "CLAIM:/FOLDER, such as runs:/runs"),
        "secret_env": (
            tuple(cluster.secret_env.values()),
            r"[a-z0-9.-]+/[A-Za-z0-9._-]+",
            "SECRET/KEY, such as hub/token",
        ),
        "tolerations": (
            cluster.tolerations,
            r"[A-Za-z0-9._/-]+(=[A-Za-z0-9._-]*)?(:(NoSchedule|PreferNoSchedule|NoExecute))?",
            "KEY=VALUE:EFFECT, such as nvidia.com/gpu:NoSchedule",
        ),
        "runs": ((cluster.runs,), r"/.*", "an absolute path, such as /runs"),
    }
    for name, (texts, pattern, form) in patterns.items():
        for text in texts:
            if not re.fullmatch(pattern, text):
                raise KubernetesError(
                    f"{path}: {name}: expected {form}; found {brief(repr(text))}."
                )
    _check_kind(cluster, path)
    return cluster


def _check_kind(cluster: Cluster, path: Path) -> None:
    """Refuse keys that a TrainJob has no place for.

    Raises:
        KubernetesError: There is one.
    """
    names = ("secrets", "image_pull_policy", "priority_class", "annotations", "keep_seconds")
    given = [name for name in names if getattr(cluster, name)]
    if cluster.kind == "trainjob" and (given or cluster.max_restarts):
        name = (given or ["max_restarts"])[0]
        raise KubernetesError(
            f"{path}: {name}: a trainjob takes this from its runtime, {cluster.runtime}. Set it "
            "there, or use kind: job."
        )


def read_quantity(text: str, what: str) -> int:
    """Return the bytes of a quantity in Kubernetes' notation, such as 480Gi.

    Args:
        text: The quantity.
        what: What it is for, in the error.

    Raises:
        KubernetesError: The text is not a quantity.
    """
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)([kKMGT]?i?)", text)
    if match is None or match[2] not in _UNITS:
        raise KubernetesError(f"{what}: expected a size such as 480Gi; found {brief(repr(text))}.")
    return int(float(match[1]) * _UNITS[match[2]])
