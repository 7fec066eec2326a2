"""Slurm's commands sinfo, sbatch, scontrol, sacct and scancel, and the state of a job."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.errors import SlurmError

_TIMEOUT_SECONDS = 120.0
"""Longest wait for a command of Slurm, which tries for a while to reach a controller."""

_SECONDS_FOR_STATE = 30.0
"""Longest wait for the state of a job, which the run folder tells as well."""

WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "SUSPENDED", "STOPPED")
GOING = ("RUNNING", "COMPLETING", "CONFIGURING", "SIGNALING", "STAGE_OUT", "RESIZING")

_REASONS = {
    "Resources": "for free nodes",
    "Priority": "behind jobs of higher priority",
    "Dependency": "for another job to end",
    "BeginTime": "to restart in a moment",
    "JobHeldUser": "held; `scontrol release` releases it",
    "JobHeldAdmin": "held by an administrator",
    "ReqNodeNotAvail": "for a node that is not available",
    "PartitionTimeLimit": "forever: its time limit exceeds that of the partition",
    "PartitionNodeLimit": "forever: it asks for more nodes than the partition allows",
    "NonZeroExitCode": "held, because it failed",
    "launch failed requeued held": "held, because it could not start",
}


@dataclass(frozen=True, kw_only=True)
class JobState:
    """The state of a job in Slurm."""

    state: str
    """Slurm's name of the state, such as PENDING or RUNNING."""

    reason: str
    """Slurm's reason why the job waits; empty if it gives none."""

    nodes: str
    restarts: int
    """How often the job was requeued."""

    exit_code: str
    """Exit code in Slurm's notation, CODE:SIGNAL."""

    @property
    def waits(self) -> str:
        """Why the job waits, for its user; completes "waiting ..."."""
        return _REASONS.get(self.reason, self.reason) or "in the queue"


@dataclass(frozen=True, kw_only=True)
class Partition:
    """The largest resources of the nodes of a partition."""

    nodes: int
    cpus: int
    gpus: int
    max_time: str | None


def partition(name: str | None) -> Partition | None:
    """Return the resources of a partition; None if Slurm has no such partition.

    Args:
        name: Its name; None is the default partition.

    Raises:
        SlurmError: Slurm does not answer.
    """
    rows = [
        line.split("|") for line in run_command("sinfo", "-h", "-o", "%P|%l|%c|%G|%D").splitlines()
    ]
    matching = [
        row
        for row in rows
        if (row[0].endswith("*") if name is None else row[0].rstrip("*") == name)
    ]
    if not matching:
        return None
    times = {row[1] for row in matching} - {"infinite", "n/a"}
    return Partition(
        nodes=sum(int(row[4]) for row in matching),
        cpus=max(int(row[2].rstrip("+")) for row in matching),
        gpus=max(_gpus(row[3]) for row in matching),
        max_time=times.pop() if len(times) == 1 else None,
    )


def _gpus(gres: str) -> int:
    """Return the number of GPUs in a GRES text such as gpu:a100:4(S:0-1),gpu:t4:2,shard:8."""
    counts = re.findall(r"(?:^|,)gpu:(?:[^:(,]+:)?(\d+)", gres)
    return sum(map(int, counts))


def run_command(*command: str, seconds: float = _TIMEOUT_SECONDS) -> str:
    """Run a command of Slurm and return its standard output.

    Args:
        *command: The command.
        seconds: Longest time that it may take.

    Raises:
        SlurmError: The command is not installed, or fails.
    """
    return _run(*command, seconds=seconds).stdout


def _run(*command: str, seconds: float = _TIMEOUT_SECONDS) -> subprocess.CompletedProcess[str]:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            capture_output=True,
            check=False,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        raise SlurmError(
            f"{command[0]} did not answer within {seconds:g} s. See whether `sinfo` "
            "answers, and try again later."
        ) from None
    except FileNotFoundError:
        raise SlurmError(
            f"{command[0]} is not installed here. Submit jobs from a login node of the cluster, "
            "which has Slurm's commands."
        ) from None
    if done.returncode:
        raise SlurmError(f"{command[0]} failed: {error_text(done.stderr or done.stdout)}")
    return done


def error_text(text: str) -> str:
    """Return an error message of Slurm as one sentence, without names of programs."""
    if "Could not establish a configuration source" in text:
        return "Slurm is installed here but is not configured: there is no slurm.conf."
    lines = [re.sub(r"^\w+: (?:error: |fatal: )?", "", line.strip()) for line in text.splitlines()]
    messages = [
        re.sub(r"^(?:allocation failure|Batch job submission failed): ", "", line) for line in lines
    ]
    return "; ".join(dict.fromkeys(text.rstrip(".") for text in messages if text)) + "."


def check_with_sbatch(script: str) -> str:
    """Let sbatch check a script without submitting it; return what it prints.

    Raises:
        SlurmError: sbatch rejects the script.
    """
    done = _run("sbatch", "--test-only", script)
    return error_text(done.stderr or done.stdout)


def submit(script: str) -> str:
    """Submit a script with sbatch; return the job id.

    Raises:
        SlurmError: sbatch rejects the script.
    """
    return run_command("sbatch", "--parsable", script).strip().partition(";")[0]


def job_state(job: str) -> JobState | None:
    """Return the state of a job; None if Slurm no longer knows it.

    Raises:
        SlurmError: Slurm does not answer.
    """
    try:
        text = run_command("scontrol", "show", "job", "-o", job, seconds=_SECONDS_FOR_STATE)
    except SlurmError as error:
        if "Invalid job id" not in str(error):
            raise
        return _accounted(job)
    state = _value(text, "JobState")
    reason = _value(text, "Reason")
    return JobState(
        state=state,
        reason="" if reason == "None" else reason,
        nodes="" if (nodes := _value(text, "NodeList")) == "(null)" else nodes,
        restarts=_number(_value(text, "Restarts")),
        exit_code=_value(text, "ExitCode"),
    )


def _accounted(job: str) -> JobState | None:
    """Return the state of a job from the accounting; None without accounting."""
    fields = ("State", "Reason", "NodeList", "Restarts", "ExitCode")
    try:
        text = run_command("sacct", "-X", "-n", "-P", "-j", job, "-o", ",".join(fields))
    except SlurmError:
        return None
    lines = text.splitlines()
    if not lines:
        return None
    if lines[-1].count("|") != len(fields) - 1:
        return None
    state, reason, nodes, restarts, exit_code = lines[-1].split("|")
    return JobState(
        state=state.partition(" ")[0],
        reason="" if reason == "None" else reason,
        nodes=nodes,
        restarts=_number(restarts),
        exit_code=exit_code,
    )


def cancel(jobs: Sequence[str]) -> None:
    """Cancel jobs, whether they wait or run.

    Raises:
        SlurmError: scancel fails.
    """
    run_command("scancel", *jobs)


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() else 0


def _value(text: str, name: str) -> str:
    """Return the value of NAME=VALUE in an output of scontrol."""
    match = re.search(rf"(?:^|\s){name}=(\S*)", text)
    return match[1] if match else ""
