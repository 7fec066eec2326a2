"""Slurm's own commands, and what they say of a job."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.errors import SlurmError

WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "SUSPENDED", "STOPPED")
GOING = ("RUNNING", "COMPLETING", "CONFIGURING", "SIGNALING", "STAGE_OUT", "RESIZING")

_REASONS = {
    "Resources": "for nodes to be free",
    "Priority": "behind jobs of higher priority",
    "Dependency": "for another job to end",
    "BeginTime": "to be started again in a moment",
    "JobHeldUser": "held; `scontrol release` lets it go on",
    "JobHeldAdmin": "held by an administrator",
    "ReqNodeNotAvail": "for a node that is not available",
    "PartitionTimeLimit": "for ever: its time is over the partition's limit",
    "PartitionNodeLimit": "for ever: its nodes are over the partition's limit",
    "NonZeroExitCode": "held, because it failed",
    "launch failed requeued held": "held, because it could not be started",
}


@dataclass(frozen=True, kw_only=True)
class JobState:
    """What Slurm says of a job."""

    state: str
    """Such as PENDING or RUNNING."""

    reason: str
    """Why it waits; empty where there is nothing to say."""

    nodes: str
    restarts: int
    """How often it was put back into the queue."""

    exit_code: str
    """As Slurm writes it: CODE:SIGNAL."""

    @property
    def waits(self) -> str:
        """Why it waits, in words."""
        return _REASONS.get(self.reason, self.reason) or "in the queue"


@dataclass(frozen=True, kw_only=True)
class Partition:
    """What the nodes of a partition have, at most."""

    nodes: int
    cpus: int
    gpus: int
    max_time: str | None


def partition(name: str | None) -> Partition | None:
    """Return what Slurm says of a partition; None is its default one. None where nobody says.

    Raises:
        SlurmError: Slurm does not answer.
    """
    rows = [line.split("|") for line in call("sinfo", "-h", "-o", "%P|%l|%c|%G|%D").splitlines()]
    found = [
        row
        for row in rows
        if (row[0].endswith("*") if name is None else row[0].rstrip("*") == name)
    ]
    if not found:
        return None
    times = {row[1] for row in found} - {"infinite", "n/a"}
    return Partition(
        nodes=sum(int(row[4]) for row in found),
        cpus=max(int(row[2].rstrip("+")) for row in found),
        gpus=max(_gpus(row[3]) for row in found),
        max_time=times.pop() if len(times) == 1 else None,
    )


def _gpus(gres: str) -> int:
    """Return the GPUs in what Slurm writes as gpu:a100:4(S:0-1),gpu:t4:2,shard:8."""
    counts = re.findall(r"(?:^|,)gpu:(?:[^:(,]+:)?(\d+)", gres)
    return sum(map(int, counts))


def call(*command: str) -> str:
    """Run one of Slurm's commands; return what it printed.

    Raises:
        SlurmError: It is not there, or refuses.
    """
    return _run(*command).stdout


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        done = subprocess.run(command, text=True, capture_output=True, check=False)
    except FileNotFoundError:
        raise SlurmError(
            f"{command[0]} is not installed here. Jobs are submitted where Slurm's commands are: "
            "on a login node of the cluster."
        ) from None
    if done.returncode:
        raise SlurmError(f"{command[0]} refuses: {in_words(done.stderr or done.stdout)}")
    return done


def in_words(text: str) -> str:
    """Return what Slurm says of an error, without the names of its programs."""
    if "Could not establish a configuration source" in text:
        return "it is installed here, and knows of no cluster: there is no slurm.conf."
    lines = [re.sub(r"^\w+: (?:error: |fatal: )?", "", line.strip()) for line in text.splitlines()]
    said = [
        re.sub(r"^(?:allocation failure|Batch job submission failed): ", "", each) for each in lines
    ]
    return "; ".join(dict.fromkeys(each.rstrip(".") for each in said if each)) + "."


def check(script: str) -> str:
    """Return what sbatch says of a script that it would take.

    Raises:
        SlurmError: It refuses.
    """
    done = _run("sbatch", "--test-only", script)
    return in_words(done.stderr or done.stdout)


def submit(script: str) -> str:
    """Hand a script to sbatch; return the job's id.

    Raises:
        SlurmError: It refuses.
    """
    return call("sbatch", "--parsable", script).strip().partition(";")[0]


def job_state(job: str) -> JobState | None:
    """Return what Slurm knows of a job; None where it has forgotten it.

    Raises:
        SlurmError: Slurm does not answer.
    """
    try:
        said = call("scontrol", "show", "job", "-o", job)
    except SlurmError as error:
        if "Invalid job id" not in str(error):
            raise
        return _accounted(job)
    state = _value(said, "JobState")
    reason = _value(said, "Reason")
    return JobState(
        state=state,
        reason="" if reason == "None" else reason,
        nodes="" if (nodes := _value(said, "NodeList")) == "(null)" else nodes,
        restarts=int(_value(said, "Restarts") or 0),
        exit_code=_value(said, "ExitCode"),
    )


def _accounted(job: str) -> JobState | None:
    """Return what the accounting says, where there is one."""
    fields = ("State", "Reason", "NodeList", "Restarts", "ExitCode")
    try:
        said = call("sacct", "-X", "-n", "-P", "-j", job, "-o", ",".join(fields))
    except SlurmError:
        return None
    lines = said.splitlines()
    if not lines:
        return None
    state, reason, nodes, restarts, exit_code = lines[-1].split("|")
    return JobState(
        state=state.partition(" ")[0],
        reason="" if reason == "None" else reason,
        nodes=nodes,
        restarts=int(restarts or 0),
        exit_code=exit_code,
    )


def cancel(jobs: Sequence[str]) -> None:
    """End jobs, or take them out of the queue.

    Raises:
        SlurmError: Slurm refuses.
    """
    call("scancel", *jobs)


def _value(said: str, name: str) -> str:
    found = re.search(rf"(?:^|\s){name}=(\S*)", said)
    return found[1] if found else ""
