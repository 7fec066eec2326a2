"""The text of a batch script, a pure function of its request.

Every word from outside is quoted: for the shell, or for sbatch, which parses `#SBATCH` lines
itself. Only the `setup` lines of a site profile are shell code and stay as they are.
"""

from __future__ import annotations

import shlex
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from launcher.errors import EXIT_RESUMABLE, SlurmError
from launcher.signals import EXIT_BY_SIGNAL
from launcher.slurm.site import Site, time_text

_WARNING = signal.SIGUSR1
"""The signal that Slurm sends before the time limit of a job."""

_KILLED_BY_WARNING = EXIT_BY_SIGNAL + _WARNING
"""The exit code of srun if the warning ends a launcher, which happens only while it starts."""

_SLURM_VARIABLES = (
    *("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", "SLURM_NODEID", "SLURM_PROCID"),
    *("SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE", "CUDA_VISIBLE_DEVICES"),
)
"""The variables of a job step that launcher and CUDA read."""


@dataclass(frozen=True, kw_only=True)
class BatchScript:
    """The request of a batch job and the commands that it runs."""

    name: str
    folder: str
    """The working folder of the job."""

    log: str
    """The file for the job's output; Slurm replaces `%a` by the index in an array."""

    nodes: tuple[int, int]
    """The smallest and the largest number of nodes."""

    gpus_per_node: int
    cpus_per_node: int
    memory_per_node: int | None
    """Memory in MiB; None leaves it to Slurm."""

    seconds: int | None
    """The time limit in seconds; None is that of the partition."""

    commands: Sequence[Sequence[str]]
    """The command of each task; an array has one command for each of its jobs."""

    is_array: bool = False

    array_cap: int | None = None
    """The largest number of jobs of the array that run at the same time; None is no limit."""

    dependency: str | None = None
    """The jobs that have to end first, as sbatch takes them; None waits for none."""

    run_folders: Sequence[str] = ()
    """The run folder of each command; a file in it may name nodes that the job has to avoid."""

    restarts: bool = False
    """Whether the launchers go on without nodes and tasks that are lost."""

    site: Site


def render(batch: BatchScript) -> str:
    """Return the text of the script.

    Raises:
        SlurmError: A word that must stand on one line has a line break.
    """
    site = batch.site
    lines = ["#!/bin/bash", *(f"#SBATCH {_quoted(option)}" for option in options(batch)), ""]
    lines.append(f"cd -- {shlex.quote(batch.folder)} || exit")
    if site.modules:
        lines.append(f"module load {shlex.join(site.modules)} || exit")
    lines += site.setup
    lines += [f"export {name}={shlex.quote(value)}" for name, value in _variables(site).items()]
    lines += ["", *_commands(batch), "", *_steps(batch), ""]
    return "\n".join(lines)


def options(batch: BatchScript) -> Iterator[str]:
    """Yield the options of sbatch, unquoted."""
    site = batch.site
    low, high = batch.nodes
    yield f"--job-name={batch.name}"
    for name in ("partition", "account", "qos", "reservation", "mail_type", "mail_user"):
        if (value := getattr(site, name)) is not None:
            yield f"--{name.replace('_', '-')}={value}"
    if batch.dependency is not None:
        yield f"--dependency={batch.dependency}"
    yield f"--nodes={low}" if low == high else f"--nodes={low}-{high}"
    if low == high:
        yield "--ntasks-per-node=1"  # with it, Slurm 22.05 takes the fewest nodes of a range
    yield f"--cpus-per-task={batch.cpus_per_node}"
    if batch.gpus_per_node:
        kind = f"{site.gpu_type}:" if site.gpu_type else ""
        yield f"--gpus-per-node={kind}{batch.gpus_per_node}"
    if batch.memory_per_node is not None:
        yield f"--mem={batch.memory_per_node}M"
    if batch.seconds is not None:
        yield f"--time={time_text(batch.seconds)}"
    if batch.is_array:
        cap = "" if batch.array_cap is None else f"%{batch.array_cap}"
        yield f"--array=0-{len(batch.commands) - 1}{cap}"
    yield f"--signal={_WARNING.name.removeprefix('SIG')}@{site.warning_seconds}"
    yield "--requeue"
    if batch.restarts:
        yield "--no-kill"
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
        for folder in batch.run_folders:
            yield f"run={shlex.quote(folder)}"
        return
    yield 'case "$SLURM_ARRAY_TASK_ID" in'
    for index, command in enumerate(batch.commands):
        run = f" run={shlex.quote(batch.run_folders[index])}" if batch.run_folders else ""
        yield f"{index}) command=({shlex.join(command)}){run} ;;"
    yield "esac"


def _steps(batch: BatchScript) -> Iterator[str]:
    site = batch.site
    step = ["srun", "--ntasks-per-node=1"]
    step += ["--kill-on-bad-exit=0", "--no-kill"] if batch.restarts else ["--kill-on-bad-exit=1"]
    step.append(f"--cpus-per-task={batch.cpus_per_node}")
    if batch.restarts:
        yield 'rm -f -- "$run/exit_code"'
    yield f'{shlex.join(step)} {_container(batch)}"${{command[@]}}"'
    yield "code=$?"
    if batch.restarts:  # srun's is the worst of all tasks, those on lost nodes included
        yield '[ -s "$run/exit_code" ] && code=$(cat -- "$run/exit_code")'
    yield f"# {EXIT_RESUMABLE}: the run saved a checkpoint and stopped; it resumes from there."
    yield f"# {_KILLED_BY_WARNING}: the warning before the time limit came before the run began."
    yield (
        f'if [[ "$code" -eq {EXIT_RESUMABLE} || "$code" -eq {_KILLED_BY_WARNING} ]] && '
        f'[ "${{SLURM_RESTART_COUNT:-0}}" -lt {site.max_requeues} ]; then'
    )
    job = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if batch.is_array else "$SLURM_JOB_ID"
    if batch.run_folders:
        yield "    trap '' TERM  # with which Slurm ends this script when the job is queued again"
    yield f'    scontrol requeue "{job}"'
    if batch.run_folders:
        yield '    if [ -s "$run/unhealthy_nodes" ]; then  # those that are not fit'
        yield '        nodes=$(sort -u -- "$run/unhealthy_nodes" | paste -sd, -)'
        yield f'        others=$(squeue -h -j "{job}" -o %x)'
        yield f'        scontrol update "JobId={job}" "ExcNodeList=$nodes${{others:+,$others}}"'
        yield "    fi"
    yield "fi"
    yield 'exit "$code"'


def _container(batch: BatchScript) -> str:
    """Return the options and words before a command that start it in the container of the site.

    With Docker, the variables of the job and of the site have to be named, and the files that the
    ranks write belong to the user.
    """
    site, mounts = batch.site, batch.site.container_mounts
    if site.container is None:
        return ""
    if site.container_runtime == "apptainer":
        words = ["apptainer", "exec", f"--pwd={batch.folder}"]
        words += ["--nv"] if batch.gpus_per_node else []
        return shlex.join([*words, *(f"--bind={mount}" for mount in mounts), site.container]) + " "
    if site.container_runtime == "docker":
        words = ["docker", "run", "--rm", "--network=host", "--ipc=host"]
        words += [f"--workdir={batch.folder}", f"--volume={batch.folder}:{batch.folder}"]
        words += [f"--volume={mount}" for mount in mounts]
        words += [f"--env={name}" for name in (*_SLURM_VARIABLES, *_variables(site))]
        words += ["--gpus=all"] if batch.gpus_per_node else []
        user = '--user="$(id -u):$(id -g)"'
        return f"{shlex.join(words)} {user} {shlex.quote(site.container)} "
    words = [f"--container-image={site.container}"]
    words += [f"--container-mounts={','.join(mounts)}"] if mounts else []
    return shlex.join(words) + " "


def _quoted(option: str) -> str:
    """Return an option as sbatch parses it in a script, in quotes if it needs them.

    Raises:
        SlurmError: It has a control character, which cannot be quoted.
    """
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in option):
        raise SlurmError(
            f"{option!r} has a line break or another control character, which a batch script "
            "cannot hold. Use a working folder and an --out without such characters."
        )
    if all(letter.isalnum() or letter in "-_=./:,@%+" for letter in option):
        return option
    return '"' + option.replace("\\", "\\\\").replace('"', '\\"') + '"'
