"""The objects of a job in Kubernetes as plain values, and as YAML; pure functions of a request.

An Indexed Job needs nothing but Kubernetes itself. Its pods find the first one by the name that a
headless Service gives it. A JobSet makes the same Job and its Service. A TrainJob takes the rest
from a runtime of Kubeflow's Trainer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launcher.environment.nodes import DEFAULT_PORT
from launcher.errors import EXIT_RESUMABLE, EXIT_USAGE
from launcher.kubernetes.pod import (
    CONTAINER,
    INSTANCE,
    PodJob,
    environment,
    escaped,
    mounts,
    placement,
    pod_template,
    resources,
)

Manifest = dict[str, Any]


def manifests(job: PodJob) -> list[Manifest]:
    """Return the objects of a job; the first is the job itself, and the others belong to it."""
    if job.cluster.kind == "jobset":
        return [_jobset(job)]
    if job.cluster.kind == "trainjob":
        return [_trainjob(job)]
    index = {"apiVersion": "batch/v1", "kind": "Job", "metadata": _metadata(job)}
    return [{**index, "spec": _job_spec(job)}, *([_service(job)] if job.nodes > 1 else [])]


def render_manifests(objects: Sequence[Manifest]) -> str:
    """Return objects as YAML."""
    import yaml

    documents = (yaml.safe_dump(each, sort_keys=False, width=10_000) for each in objects)
    return "".join(f"---\n{text}" for text in documents)


def labelled(manifest: Manifest, name: str, value: str) -> Manifest:
    """Return an object with one more label."""
    metadata = manifest["metadata"]
    return {**manifest, "metadata": {**metadata, "labels": {**metadata["labels"], name: value}}}


def owned_by(manifest: Manifest, owner: Manifest) -> Manifest:
    """Return an object that Kubernetes removes together with its owner.

    Args:
        manifest: The object.
        owner: The owner as Kubernetes returns it.
    """
    reference = {
        "apiVersion": owner["apiVersion"],
        "kind": owner["kind"],
        "name": owner["metadata"]["name"],
        "uid": owner["metadata"]["uid"],
    }
    metadata = {**manifest["metadata"], "ownerReferences": [reference]}
    return {**manifest, "metadata": metadata}


def _metadata(job: PodJob) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": job.name}
    if job.cluster.namespace:
        metadata["namespace"] = job.cluster.namespace
    return {**metadata, "labels": job.labels}


def _job_spec(job: PodJob) -> dict[str, Any]:
    """Return the specification of an Indexed Job.

    A pod that stopped with a checkpoint, or that was preempted, evicted or lost with its node, is
    replaced, and the new one continues. A mistake of the user ends the job at once.
    """
    cluster = job.cluster
    spec: dict[str, Any] = {
        "completionMode": "Indexed",
        "completions": job.nodes,
        "parallelism": job.nodes,
        "backoffLimit": cluster.max_restarts * job.nodes,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "Ignore",
                    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                },
                {"action": "Ignore", "onExitCodes": _codes(EXIT_RESUMABLE)},
                {"action": "FailJob", "onExitCodes": _codes(EXIT_USAGE)},
            ]
        },
    }
    if job.seconds is not None:
        spec["activeDeadlineSeconds"] = job.seconds
    if cluster.keep_seconds is not None and cluster.kind == "job":
        spec["ttlSecondsAfterFinished"] = cluster.keep_seconds
    return {**spec, "template": pod_template(job)}


def _codes(code: int) -> dict[str, Any]:
    return {"containerName": CONTAINER, "operator": "In", "values": [code]}


def _service(job: PodJob) -> Manifest:
    """Return the Service that gives each pod a name, also before the pod is ready."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(job),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {INSTANCE: job.name},
            "ports": [{"name": "rendezvous", "port": DEFAULT_PORT}],
        },
    }


def _jobset(job: PodJob) -> Manifest:
    spec: dict[str, Any] = {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "failurePolicy": {"maxRestarts": 0},
        "replicatedJobs": [
            {
                "name": "nodes",
                "replicas": 1,
                "template": {"metadata": {"labels": job.labels}, "spec": _job_spec(job)},
            }
        ],
    }
    if job.cluster.keep_seconds is not None:
        spec["ttlSecondsAfterFinished"] = job.cluster.keep_seconds
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": _metadata(job),
        "spec": spec,
    }


def _trainjob(job: PodJob) -> Manifest:
    container = {"name": "node", "volumeMounts": mounts(job.cluster)}
    patch = {
        "name": "node",
        "template": {
            "spec": {
                "template": {
                    "metadata": {"labels": job.labels},
                    "spec": {**placement(job), "containers": [container]},
                }
            }
        },
    }
    spec: dict[str, Any] = {
        "runtimeRef": {"name": job.cluster.runtime},
        "trainer": {
            "image": job.cluster.image,
            "command": escaped(_in_folder(job)),
            "numNodes": job.nodes,
            "env": environment(job),
            "resourcesPerNode": resources(job),
        },
        "runtimePatches": [
            {
                "manager": "gpu-launcher",
                "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [patch]}}},
            }
        ],
    }
    if job.seconds is not None:
        spec["activeDeadlineSeconds"] = job.seconds
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": _metadata(job),
        "spec": spec,
    }


def _in_folder(job: PodJob) -> list[str]:
    """Return the command of a TrainJob, which has no key for the working folder."""
    if job.cluster.folder is None:
        return job.full_command
    enter = ["sh", "-c", 'cd -- "$0" && exec "$@"', job.cluster.folder]
    return [*enter, *job.full_command]
