"""The state of a job from what Kubernetes says about it and its pods."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from launcher.errors import EXIT_RESUMABLE
from launcher.kubernetes.pod import INSTANCE
from launcher.printable import shortened
from launcher.runs.rundir import RunDir
from launcher.runs.status import RunState, last_step, progress_text

Item = Mapping[str, Any]

_MESSAGE_WIDTH = 200
"""Characters of Kubernetes' messages that are shown."""

_INDEX = "batch.kubernetes.io/job-completion-index"


def name_of(item: Item) -> str:
    """Return the name of the run that an object belongs to."""
    return str(item["metadata"].get("labels", {}).get(INSTANCE, ""))


def state_of(
    job: Item | None, pods: Sequence[Item], nodes: int, run_dir: RunDir, problem: str
) -> RunState:
    """Return the state of a run.

    Args:
        job: The job; None if there is none of that name.
        pods: Its pods.
        nodes: The number of pods that run at the same time.
        run_dir: The run folder, which may have more to tell if the pods write into it.
        problem: The last warning about the job; empty if there is none.
    """
    if job is None:
        return RunState(name="unknown", words="has no job: it was cancelled or removed")
    conditions = {
        condition["type"]: condition
        for condition in job.get("status", {}).get("conditions", [])
        if condition.get("status") == "True"
    }
    if conditions.keys() & {"Complete", "Completed"}:
        return RunState(name="finished", words="finished, see `launcher logs`")
    if "Failed" in conditions:
        return RunState(name="failed", words=_failed_words(conditions["Failed"], pods))
    if job["metadata"].get("deletionTimestamp"):
        return RunState(name="running", words="is being cancelled")
    if "Suspended" in conditions:
        return RunState(name="waiting", words="is suspended by a queue or a user")
    return _active_state(pods, nodes, run_dir, problem)


def _active_state(pods: Sequence[Item], nodes: int, run_dir: RunDir, problem: str) -> RunState:
    """Return the state of a run whose job has not ended."""
    restarts = _restarts_text(pods)
    running = [pod for pod in pods if pod["status"].get("phase") == "Running"]
    if len(running) >= nodes:
        hosts = sorted({pod["spec"].get("nodeName", "?") for pod in running})
        words = f"running on {', '.join(hosts)}"
        if last_step(run_dir.metrics) is not None:
            words += f": {progress_text(run_dir)}"
        return RunState(name="running", words=words + restarts)
    reason = next(filter(None, map(_waiting_reason, pods)), "") or problem
    reason = f": {shortened(reason, _MESSAGE_WIDTH)}" if reason else ""
    words = f"waiting, {len(running)} of {nodes} pods are running{reason}{restarts}"
    return RunState(name="waiting", words=words)


def _failed_words(condition: Item, pods: Sequence[Item]) -> str:
    if condition.get("reason") == "DeadlineExceeded":
        return "reached its time limit"
    for pod in pods:
        for status in pod["status"].get("containerStatuses", []):
            ended = status.get("state", {}).get("terminated")
            if ended is None or ended.get("exitCode") in (0, EXIT_RESUMABLE):
                continue
            if ended.get("reason") == "OOMKilled":
                return f"ran out of memory on pod {_index(pod)}: ask for more, or use fewer workers"
            code = ended.get("exitCode")
            return f"failed with exit code {code} on pod {_index(pod)}, see `launcher logs`"
    reason, message = condition.get("reason", ""), condition.get("message", "")
    return shortened(f"failed: {reason}: {message}", _MESSAGE_WIDTH)


def _index(pod: Item) -> str:
    metadata = pod["metadata"]
    labels = {**metadata.get("annotations", {}), **metadata.get("labels", {})}
    return str(labels.get(_INDEX, metadata["name"]))


def _restarts_text(pods: Sequence[Item]) -> str:
    """Return how often pods were replaced, as text."""
    failed = Counter(_index(pod) for pod in pods if pod["status"].get("phase") == "Failed")
    if not failed:
        return ""
    count = max(failed.values())
    return f" (started again {count} time{'s' if count > 1 else ''})"


def _waiting_reason(pod: Item) -> str:
    """Return why a pod does not run; empty if it does, or is about to."""
    status = pod["status"]
    if status.get("phase") != "Pending":
        return ""
    for container in status.get("containerStatuses", []):
        waiting = container.get("state", {}).get("waiting", {})
        if waiting.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
            return f"{waiting['reason']}: {waiting.get('message', '')}".rstrip(": ")
    for condition in status.get("conditions", []):
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return str(condition.get("message") or condition.get("reason", ""))
    return ""
