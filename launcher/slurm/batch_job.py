"""From a recipe, a grid of settings and a site profile to one batch job."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from launcher.environment.nodes import count_text
from launcher.environment.program import own_program, program_of
from launcher.errors import SlurmError
from launcher.planning.plan import Plan
from launcher.runs.rundir import RunDir, planned_path
from launcher.schedulers.hardware import cpus_of, plan_runs
from launcher.schedulers.job_code import JobCode, copied_code, uncopied_code
from launcher.schedulers.prepared import Prepared
from launcher.schedulers.request import Queueing, Restarting, SubmitRequest
from launcher.slurm.partitions import Partition, find_partition
from launcher.slurm.resources import mebibytes_of, seconds_of
from launcher.slurm.script import BatchScript, render
from launcher.slurm.site import Site

SCRIPT = "job.sbatch"
"""The name of the script in the run folder."""


@dataclass(frozen=True, kw_only=True)
class PreparedJob(Prepared):
    """A batch job that is planned but not submitted."""

    batch: BatchScript


def prepare(request: SubmitRequest, site: Site, out: Path | None) -> PreparedJob:
    """Plan each run and describe the job that trains them.

    Args:
        request: What to submit.
        site: The site profile.
        out: The folder to make; None is one below runs/.

    Raises:
        SlurmError: The site does not have the requested resources.
        UsageError: The recipe, a setting or a number is wrong.
    """
    nodes = request.nodes[0] + request.restarting.spares
    site = complete(_with_options(site, request.queueing), nodes, request.gpus_per_node)
    plans = plan_runs(request, site.hardware)
    widest = max(plans, key=lambda plan: plan.workers_per_rank)
    cpus = cpus_of(widest, site.hardware)
    folder = planned_path(out, widest.recipe).absolute()
    if "\\" in str(folder):
        raise SlurmError(
            f"The run folder {folder} contains a backslash, which Slurm treats as an escape in "
            "file names. Give an --out without one."
        )
    if request.grid:
        paths = [folder / str(index) for index in range(len(plans))]
        log = "slurm-%a.log"
    else:
        paths, log = [folder], "slurm.log"
    code = _code(request, site, folder)
    low, high = request.nodes
    batch = BatchScript(
        name=widest.recipe,
        folder=str(Path.cwd()),
        log=f"{str(folder).replace('%', '%%')}/logs/{log}",
        nodes=(low + request.restarting.spares, high + request.restarting.spares),
        gpus_per_node=widest.nproc_per_node if widest.device == "cuda" else 0,
        cpus_per_node=cpus,
        memory_per_node=mebibytes_of(widest, site, cpus),
        seconds=seconds_of(request.time, site),
        commands=[
            _command(request, site, plan, path, arguments, code)
            for plan, path, arguments in zip(plans, paths, request.runs, strict=True)
        ],
        is_array=bool(request.grid),
        array_cap=request.queueing.array_cap,
        dependency=request.queueing.dependency,
        run_folders=tuple(map(str, paths)),
        restarts=request.restarting.max_restarts > 0,
        site=site,
    )
    return PreparedJob(
        scheduler="slurm",
        batch=batch,
        code=code,
        folder=folder,
        files={SCRIPT: render(batch)},
        plans=plans,
        folders=tuple(RunDir(path) for path in paths),
        logs=tuple(f"{folder}/logs/{log.replace('%a', path.name)}" for path in paths),
        grid=request.grid,
    )


def _with_options(site: Site, queueing: Queueing) -> Site:
    """Return a site profile with the options of the command in place of its own."""
    names = ("reservation", "mail_type", "mail_user")
    given = {name: value for name in names if (value := getattr(queueing, name)) is not None}
    return replace(site, **given)


def complete(site: Site, nodes: int, gpus: int | None = None) -> Site:
    """Return a site profile whose gaps are filled with what Slurm knows of the partition.

    Nodes of a partition may differ. What is filled in is what as many nodes have as the job needs.

    Args:
        site: The profile.
        nodes: The smallest number of nodes of the job.
        gpus: GPUs that the job asks for on each of them; None takes as many as there are.

    Raises:
        SlurmError: The partition has fewer nodes, or fewer with so many GPUs.
    """
    try:
        limits = find_partition(site.partition)
    except SlurmError:  # --dry-run works without Slurm; sbatch checks the numbers later
        limits = None
    if limits is None:
        return site
    where = f"the partition {site.partition}" if site.partition else "the default partition"
    if nodes > limits.nodes:
        raise SlurmError(
            f"--nodes {nodes} exceeds the {limits.nodes} nodes of {where}. Ask for fewer, or name "
            "another partition in the site profile."
        )
    found = _gpus_of_a_node(site, limits, nodes, gpus, where)
    used = found if gpus is None else min(gpus, found)
    return replace(
        site,
        cpus_per_node=site.cpus_per_node or limits.most_cpus(nodes, used),
        gpus_per_node=found if site.gpus_per_node is None else site.gpus_per_node,
        max_time=site.max_time or limits.max_time,
    )


def _gpus_of_a_node(
    site: Site, limits: Partition, nodes: int, asked: int | None, where: str
) -> int:
    """Return the largest number of GPUs that as many nodes have as a job needs.

    Raises:
        SlurmError: Some nodes have as many as are asked for, but not enough of them.
    """
    found = limits.most_gpus(nodes)
    some = limits.nodes_with(asked or 0)
    if asked is None or asked <= found or not some or site.gpus_per_node is not None:
        return found
    raise SlurmError(
        f"--nodes {nodes} --gpus-per-node {asked}: all nodes of a run have the same number of "
        f"GPUs, and {where} has {limits.gpus_in_words}. Ask for fewer nodes or fewer GPUs, or name "
        "another partition in the site profile."
    )


def _code(request: SubmitRequest, site: Site, folder: Path) -> JobCode:
    if not request.freezes:
        return uncopied_code(request.reference, request.config, "--no-freeze")
    copied = copied_code(
        request.reference, request.config, folder, request.code_limit or site.code_limit
    )
    return uncopied_code(request.reference, request.config) if request.is_dry else copied


def _command(
    request: SubmitRequest,
    site: Site,
    plan: Plan,
    path: Path,
    arguments: tuple[str, ...],
    code: JobCode,
) -> list[str]:
    """Return the command that each node runs."""
    program = own_program() if site.python is None else program_of(site.python)
    command = [*program, "run", *code.words]
    command += ["-n", str(plan.nproc_per_node)]
    if request.nodes[0] == request.nodes[1] or request.restarting.max_restarts:
        command += ["--nodes", count_text(request.nodes)]
    command += _restarting_options(request.restarting)
    command += ["--out", str(path), *request.mirror_words, "--continue"]
    if (health := request.health or site.health) != "off":
        command += ["--health", health]
    if code.config is not None:
        command += ["--config", str(code.config)]
    other_arguments = (word for word in arguments if not word.startswith("device="))
    return [*command, f"device={plan.device}", *other_arguments]


def _restarting_options(restarting: Restarting) -> list[str]:
    """Return the options of the command that say how the run restarts within its job."""
    values = {
        "--spares": restarting.spares,
        "--max-restarts": restarting.max_restarts,
        "--node-timeout": restarting.node_timeout,
    }
    return [word for name, value in values.items() if value for word in (name, str(value))]
