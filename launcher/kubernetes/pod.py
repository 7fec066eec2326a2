"""The pod of one node of a run, as plain values; pure functions of their request.

All pods of a run have the same specification. Kubernetes gives each an index, which is in the
environment variable JOB_COMPLETION_INDEX, and a host name that ends with the index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launcher.environment.nodes import DEFAULT_PORT
from launcher.kubernetes.cluster import Cluster

CONTAINER = "launcher"
"""The name of the container of a pod."""

INSTANCE = "app.kubernetes.io/instance"
"""The label with the name of a run, which all of its objects have."""

MANAGED_BY = "app.kubernetes.io/managed-by"

ARRAY = "app.kubernetes.io/part-of"
"""The label with the name of the array that a run belongs to."""


@dataclass(frozen=True, kw_only=True)
class PodJob:
    """The request of a job: one pod on each node."""

    name: str
    """The name of the job, a DNS label."""

    nodes: int
    gpus_per_node: int
    cpus_per_node: int
    memory_per_node: int | None
    """Memory in bytes; None leaves it to the cluster."""

    seconds: int | None
    """The time limit in seconds; None is none."""

    command: Sequence[str]
    """The command of each pod, without the options by which the nodes meet."""

    cluster: Cluster

    array: str = ""
    """The name of the array that the job belongs to; empty for a single run."""

    @property
    def labels(self) -> dict[str, str]:
        """The labels of all objects."""
        own = {
            "app.kubernetes.io/name": "launcher",
            INSTANCE: self.name,
            MANAGED_BY: "gpu-launcher",
            **({ARRAY: self.array} if self.array else {}),
        }
        return {**self.cluster.labels, **own}

    @property
    def first_host(self) -> str:
        """The host name of the first pod, at which all launchers meet."""
        stem = {"job": self.name, "jobset": f"{self.name}-nodes-0"}
        return f"{stem.get(self.cluster.kind, f'{self.name}-node-0')}-0.{self.name}"

    @property
    def full_command(self) -> list[str]:
        """The command of each pod."""
        if self.nodes == 1:
            return list(self.command)
        return [
            *self.command,
            *("--nodes", str(self.nodes), "--rendezvous", f"{self.first_host}:{DEFAULT_PORT}"),
            *("--join-timeout", str(self.cluster.join_seconds)),
        ]


def pod_template(job: PodJob) -> dict[str, Any]:
    """Return the template of the pods of a job."""
    cluster = job.cluster
    spec: dict[str, Any] = {"restartPolicy": "Never"}
    if job.nodes > 1 and cluster.kind == "job":
        spec["subdomain"] = job.name
    spec |= placement(job)
    if cluster.priority_class:
        spec["priorityClassName"] = cluster.priority_class
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": cluster.image,
        "command": escaped(job.full_command),
        "env": environment(job),
        "resources": resources(job),
        "volumeMounts": mounts(cluster),
    }
    if cluster.image_pull_policy:
        container["imagePullPolicy"] = cluster.image_pull_policy
    if cluster.folder:
        container["workingDir"] = cluster.folder
    if cluster.secrets:
        container["envFrom"] = [{"secretRef": {"name": name}} for name in cluster.secrets]
    spec["containers"] = [container]
    metadata: dict[str, Any] = {"labels": job.labels}
    if cluster.annotations:
        metadata["annotations"] = dict(cluster.annotations)
    return {"metadata": metadata, "spec": spec}


def placement(job: PodJob) -> dict[str, Any]:
    """Return what the specification of a pod says besides its container."""
    cluster = job.cluster
    spec: dict[str, Any] = {"terminationGracePeriodSeconds": cluster.grace_seconds}
    if cluster.service_account:
        spec["serviceAccountName"] = cluster.service_account
    if cluster.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in cluster.image_pull_secrets]
    security = {
        "runAsUser": cluster.run_as_user,
        "runAsGroup": cluster.run_as_group,
        "fsGroup": cluster.run_as_group,
    }
    if given := {name: value for name, value in security.items() if value is not None}:
        spec["securityContext"] = given
    if cluster.node_selector:
        spec["nodeSelector"] = dict(cluster.node_selector)
    if cluster.tolerations:
        spec["tolerations"] = [_toleration(text) for text in cluster.tolerations]
    spec["volumes"] = _volumes(cluster)
    return spec


def environment(job: PodJob) -> list[dict[str, Any]]:
    """Return the environment variables of a container; secrets appear by their names alone."""
    cluster = job.cluster
    values = {"PYTHONUNBUFFERED": "1", **cluster.env}
    if cluster.interface is not None:
        values |= {
            "GLOO_SOCKET_IFNAME": cluster.interface,
            "NCCL_SOCKET_IFNAME": cluster.interface,
        }
    variables: list[dict[str, Any]] = [
        {"name": name, "value": value.replace("$(", "$$(")} for name, value in values.items()
    ]
    for name, reference in cluster.secret_env.items():
        secret, _, key = reference.partition("/")
        source = {"secretKeyRef": {"name": secret, "key": key}}
        variables.append({"name": name, "valueFrom": source})
    return variables


def resources(job: PodJob) -> dict[str, Any]:
    """Return the resources of a container.

    Memory and devices are limited to what is asked for. Cores are not: a limit would pause ranks
    while cores are idle.
    """
    exact: dict[str, str] = dict(job.cluster.resources)
    if job.memory_per_node is not None:
        exact["memory"] = f"{job.memory_per_node // 2**20}Mi"
    if job.gpus_per_node:
        exact[job.cluster.gpu_resource] = str(job.gpus_per_node)
    requests = {"cpu": str(job.cpus_per_node), **exact}
    return {"requests": requests, "limits": exact} if exact else {"requests": requests}


def mounts(cluster: Cluster) -> list[dict[str, Any]]:
    """Return where a container has the volumes."""
    mounted: list[dict[str, Any]] = [{"name": "shared-memory", "mountPath": "/dev/shm"}]  # noqa: S108
    for index, text in enumerate(cluster.volumes):
        _, folder, *options = text.split(":")
        mount: dict[str, Any] = {"name": f"volume-{index}", "mountPath": folder}
        mounted.append(mount | ({"readOnly": True} if options else {}))
    return mounted


def escaped(words: Sequence[str]) -> list[str]:
    """Return words in which Kubernetes replaces no $(NAME)."""
    return [word.replace("$(", "$$(") for word in words]


def _volumes(cluster: Cluster) -> list[dict[str, Any]]:
    memory = {"medium": "Memory"}
    if cluster.shared_memory is not None:
        memory["sizeLimit"] = cluster.shared_memory
    volumes: list[dict[str, Any]] = [{"name": "shared-memory", "emptyDir": memory}]
    for index, text in enumerate(cluster.volumes):
        source, _, *options = text.split(":")
        if source.startswith("/"):
            volume: dict[str, Any] = {"hostPath": {"path": source}}
        else:
            claim = {"claimName": source, **({"readOnly": True} if options else {})}
            volume = {"persistentVolumeClaim": claim}
        volumes.append({"name": f"volume-{index}", **volume})
    return volumes


def _toleration(text: str) -> dict[str, str]:
    taint, _, effect = text.partition(":")
    key, equals, value = taint.partition("=")
    toleration = {"key": key, "operator": "Equal" if equals else "Exists"}
    if equals:
        toleration["value"] = value
    return toleration | ({"effect": effect} if effect else {})
