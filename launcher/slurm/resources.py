"""The time and the memory that a job asks Slurm for, from a plan and a site profile."""

from __future__ import annotations

from launcher.errors import SlurmError
from launcher.planning.plan import Plan
from launcher.schedulers.hardware import memory_of
from launcher.schedulers.site_profile import read_time
from launcher.slurm.site import Site


def mebibytes_of(plan: Plan, site: Site, cpus: int) -> int | None:
    """Return the MiB to ask for on each node; None leaves it to Slurm."""
    memory = memory_of(plan, site.hardware, cpus)
    return None if memory is None else memory // 2**20


def seconds_of(time: str | None, site: Site) -> int | None:
    """Return the time limit of a job in seconds; None leaves it to Slurm.

    Raises:
        SlurmError: The time is malformed, exceeds the limit of the site, or is too short to save.
    """
    limit = time or site.time
    if limit is None:
        return None
    source = "--time" if time else "time"
    seconds = read_time(limit, source, SlurmError)
    if site.max_time is not None and seconds > read_time(site.max_time, "max_time", SlurmError):
        raise SlurmError(
            f"{source} {limit} exceeds the longest time of the site, {site.max_time}. Ask for "
            "less: a job that reaches its time limit saves a checkpoint, is requeued and resumes."
        )
    if seconds <= site.warning_seconds:
        raise SlurmError(
            f"{source} {limit} leaves no time to train: a job is told to save "
            f"{site.warning_seconds} s before its end. Ask for more, or lower warning_seconds in "
            "the site profile."
        )
    return seconds
