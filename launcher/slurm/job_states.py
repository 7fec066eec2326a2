"""The states of jobs: one call of squeue and at most one of sacct, however many jobs there are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from launcher.errors import SlurmError
from launcher.recipe.text_values import digits
from launcher.slurm.queue import run_command

WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "SUSPENDED", "STOPPED")
GOING = ("RUNNING", "COMPLETING", "CONFIGURING", "SIGNALING", "STAGE_OUT", "RESIZING")

_SECONDS_FOR_STATES = 30.0
"""Longest wait for the states of jobs, which the run folders tell as well."""

_JOBS_AT_ONCE = 10_000
"""Job ids in one command, whose arguments have a limit of 128 KiB each."""

_REASONS = {
    "Resources": "for free nodes",
    "Priority": "behind jobs of higher priority",
    "Dependency": "for another job to end",
    "DependencyNeverSatisfied": "forever: the job that it depends on has ended in another way",
    "Reservation": "for its reservation",
    "JobArrayTaskLimit": "for other runs of its array, as --array-cap asks",
    "BeginTime": "to restart in a moment",
    "JobHeldUser": "held; `scontrol release` releases it",
    "JobHeldAdmin": "held by an administrator",
    "ReqNodeNotAvail": "for a node that is not available",
    "PartitionTimeLimit": "forever: its time limit exceeds that of the partition",
    "PartitionNodeLimit": "forever: it asks for more nodes than the partition allows",
    "NonZeroExitCode": "held, because it failed",
    "launch failed requeued held": "held, because it could not start",
}

_COLUMNS = {
    "ArrayJobID": 16,
    "ArrayTaskID": 16,
    "State": 20,
    "RestartCnt": 12,
    "exit_code": 12,
    "Reason": 100,
    "NodeList": 250,
}
"""What squeue prints of a job, with the width of each column; longer texts are cut off."""

_ACCOUNTED = ("JobID", "State", "Reason", "NodeList", "ExitCode")
"""What sacct prints of a job. It has no number of restarts, but a line for each of them."""


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


def job_state(job: str) -> JobState | None:
    """Return the state of a job; None if Slurm does not know it.

    Raises:
        SlurmError: Slurm does not answer.
    """
    return job_states([job]).get(job)


def job_states(jobs: Iterable[str]) -> dict[str, JobState]:
    """Return the states of jobs by their ids, without those that Slurm does not know.

    squeue knows the jobs that have not ended or have ended a few minutes ago. Only if one is
    missing there is the accounting asked, where there is one.

    Args:
        jobs: Job ids such as 1234, or 1234_5 for a run of an array.

    Raises:
        SlurmError: Slurm does not answer.
    """
    wanted = {job for job in jobs if digits(_base(job)) is not None}
    states = {job: state for job, state in _queued(_bases(wanted)) if job in wanted}
    missing = wanted - states.keys()
    accounted = {job: state for job, state in _accounted(_bases(missing)) if job in missing}
    return states | accounted


def _base(job: str) -> str:
    """Return the id of a job, or that of the array of a run."""
    return job.partition("_")[0]


def _bases(jobs: Iterable[str]) -> list[str]:
    return sorted({_base(job) for job in jobs}, key=int)


def _queued(jobs: Sequence[str]) -> Iterator[tuple[str, JobState]]:
    """Yield the id and the state of each job that is in the queue, the runs of arrays one by one.

    Raises:
        SlurmError: Slurm does not answer.
    """
    columns = ",".join(f"{name}:{width}" for name, width in _COLUMNS.items())
    command = ("squeue", "--noheader", "--array", "--all", "--states=all", f"--Format={columns}")
    for start in range(0, len(jobs), _JOBS_AT_ONCE):
        ids = ",".join(jobs[start : start + _JOBS_AT_ONCE])
        try:
            text = run_command(*command, f"--jobs={ids}", seconds=_SECONDS_FOR_STATES)
        except SlurmError as error:
            if "Invalid job id" not in str(error):  # which it says only where one id is asked for
                raise
            continue
        yield from map(_queued_job, text.splitlines())


def _queued_job(line: str) -> tuple[str, JobState]:
    values, start = {}, 0
    for name, width in _COLUMNS.items():
        values[name] = line[start : start + width].strip()
        start += width
    task = values["ArrayTaskID"]
    job = values["ArrayJobID"] + (f"_{task}" if digits(task) is not None else "")
    nodes = values["NodeList"]
    return job, JobState(
        state=values["State"],
        reason="" if values["Reason"] == "None" else values["Reason"],
        nodes=f"{nodes[:-3]}..." if len(nodes) == _COLUMNS["NodeList"] else nodes,
        restarts=digits(values["RestartCnt"]) or 0,
        exit_code=_exit_code(values["exit_code"]),
    )


def _exit_code(text: str) -> str:
    """Return CODE:SIGNAL for the status of a process, as which squeue prints it."""
    status = digits(text)
    return text if status is None else f"{status >> 8}:{status & 0x7F}"


def _accounted(jobs: Sequence[str]) -> Iterator[tuple[str, JobState]]:
    """Yield the id and the state of each job from the accounting; nothing without accounting."""
    command = ("sacct", "--allocations", "--noheader", "--parsable2", "--duplicates")
    lines: list[str] = []
    for start in range(0, len(jobs), _JOBS_AT_ONCE):
        ids = ",".join(jobs[start : start + _JOBS_AT_ONCE])
        try:
            text = run_command(*command, f"--jobs={ids}", f"--format={','.join(_ACCOUNTED)}")
        except SlurmError:
            return
        lines += text.splitlines()
    starts: dict[str, int] = {}
    for line in lines:  # those of one job in the order of its starts
        if line.count("|") != len(_ACCOUNTED) - 1:
            continue
        job, state, reason, nodes, exit_code = line.split("|")
        starts[job] = starts.get(job, 0) + 1
        yield (
            job,
            JobState(
                state=state.partition(" ")[0],
                reason="" if reason == "None" else reason,
                nodes="" if nodes == "None assigned" else nodes,
                restarts=starts[job] - 1,
                exit_code=exit_code,
            ),
        )
