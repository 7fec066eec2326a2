"""A batch script, as text: a pure function of what is asked for.

Every word that comes from outside is quoted, for the shell or for sbatch, which reads its `#SBATCH`
lines itself. The lines of a profile's `setup` alone are shell, as they stand.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from launcher.errors import EXIT_RESUMABLE, SlurmError
from launcher.slurm.site import Site, time_text


@dataclass(frozen=True, kw_only=True)
class BatchScript:
    """What is asked of Slurm, and what it is to run."""

    name: str
    folder: str
    """Where it runs."""

    log: str
    """The file that it prints to; `%a` in it is the index in an array."""

    nodes: tuple[int, int]
    """At least and at most."""

    gpus_per_node: int
    cpus_per_node: int
    memory_per_node: int | None
    """In MiB; None leaves it to Slurm."""

    seconds: int | None
    """The time limit; None is the partition's."""

    commands: Sequence[Sequence[str]]
    """What each task runs; of an array, in each of its jobs."""

    is_array: bool = False

    site: Site


def render(batch: BatchScript) -> str:
    """Return the script.

    Raises:
        SlurmError: There is a line break in what has to stand in one line.
    """
    site = batch.site
    lines = ["#!/bin/bash", *(f"#SBATCH {_for_sbatch(each)}" for each in options(batch)), ""]
    lines.append(f"cd -- {shlex.quote(batch.folder)} || exit")
    if site.modules:
        lines.append(f"module load {shlex.join(site.modules)} || exit")
    lines += site.setup
    lines += [f"export {name}={shlex.quote(value)}" for name, value in _variables(site).items()]
    lines += ["", *_commands(batch), "", *_steps(batch), ""]
    return "\n".join(lines)


def options(batch: BatchScript) -> Iterator[str]:
    """Yield the options of sbatch."""
    site = batch.site
    low, high = batch.nodes
    yield f"--job-name={batch.name}"
    for name in ("partition", "account", "qos"):
        if (value := getattr(site, name)) is not None:
            yield f"--{name}={value}"
    yield f"--nodes={low}" if low == high else f"--nodes={low}-{high}"
    if low == high:
        yield "--ntasks-per-node=1"  # of a range it would take the fewest (Slurm 22.05)
    yield f"--cpus-per-task={batch.cpus_per_node}"
    if batch.gpus_per_node:
        kind = f"{site.gpu_type}:" if site.gpu_type else ""
        yield f"--gpus-per-node={kind}{batch.gpus_per_node}"
    if batch.memory_per_node is not None:
        yield f"--mem={batch.memory_per_node}M"
    if batch.seconds is not None:
        yield f"--time={time_text(batch.seconds)}"
    if batch.is_array:
        yield f"--array=0-{len(batch.commands) - 1}"
    yield f"--signal=USR1@{site.warning_seconds}"
    yield "--requeue"
    yield "--open-mode=append"
    yield f"--output={batch.log}"
    yield from site.sbatch


def _variables(site: Site) -> dict[str, str]:
    variables = dict(site.env)
    if site.interface is not None:
        variables |= {"GLOO_SOCKET_IFNAME": site.interface, "NCCL_SOCKET_IFNAME": site.interface}
    if site.scratch is not None:
        variables["TMPDIR"] = site.scratch
    return variables


def _commands(batch: BatchScript) -> Iterator[str]:
    if not batch.is_array:
        yield f"command=({shlex.join(batch.commands[0])})"
        return
    yield 'case "$SLURM_ARRAY_TASK_ID" in'
    for index, command in enumerate(batch.commands):
        yield f"{index}) command=({shlex.join(command)}) ;;"
    yield "esac"


def _steps(batch: BatchScript) -> Iterator[str]:
    site = batch.site
    step = ["srun", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    step.append(f"--cpus-per-task={batch.cpus_per_node}")
    if site.container is not None:
        step.append(f"--container-image={site.container}")
    if site.container_mounts:
        step.append(f"--container-mounts={','.join(site.container_mounts)}")
    yield f'{shlex.join(step)} "${{command[@]}}"'
    yield "code=$?"
    yield f"# {EXIT_RESUMABLE}: the run has saved a checkpoint and stopped; it goes on from there."
    yield (
        f'if [ "$code" -eq {EXIT_RESUMABLE} ] && '
        f'[ "${{SLURM_RESTART_COUNT:-0}}" -lt {site.max_requeues} ]; then'
    )
    yield '    scontrol requeue "$SLURM_JOB_ID"'
    yield "fi"
    yield 'exit "$code"'


def _for_sbatch(option: str) -> str:
    """Return an option as sbatch reads it in a script: in quotes, where it needs them.

    Raises:
        SlurmError: It has a line break, which cannot be written there.
    """
    if any(ord(each) < 32 or ord(each) == 127 for each in option):
        raise SlurmError(
            f"{option!r} has a line break or another control character in it, and cannot be "
            "written into a batch script. Submit from, and into, a folder of another name."
        )
    if all(each.isalnum() or each in "-_=./:,@%+" for each in option):
        return option
    return '"' + option.replace("\\", "\\\\").replace('"', '\\"') + '"'
