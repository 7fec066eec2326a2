"""From a recipe, a grid of settings and a site to one batch job."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.environment.program import own_program, program_of
from launcher.errors import SlurmError, UsageError
from launcher.planning.plan import Plan
from launcher.planning.planner import CPU_RANKS
from launcher.recipe.overrides import read_arguments, read_yaml
from launcher.recipe.resolve import Reference
from launcher.runs.job import plan_recipe
from launcher.runs.rundir import RunDir, planned_path
from launcher.slurm.queue import partition
from launcher.slurm.resources import cpus_of, machine_of, memory_of, seconds_of
from launcher.slurm.script import BatchScript
from launcher.slurm.site import Site
from launcher.slurm.submission import Submission


@dataclass(frozen=True, kw_only=True)
class SubmitRequest:
    """What a user asks for."""

    reference: Reference
    arguments: tuple[str, ...]
    """name=value, for every run."""

    grid: tuple[tuple[str, ...], ...]
    """name=value of each run of an array; empty for one run."""

    config: Path | None
    nodes: tuple[int, int]
    gpus_per_node: int | None
    nproc_per_node: int | None
    time: str | None

    @property
    def runs(self) -> tuple[tuple[str, ...], ...]:
        """The arguments of each run."""
        return tuple((*self.arguments, *each) for each in self.grid or ((),))


@dataclass(frozen=True, kw_only=True)
class PreparedJob:
    """What is to be submitted."""

    batch: BatchScript
    folder: Path
    """Of the run, or of all runs of the array."""

    plans: tuple[Plan, ...]
    folders: tuple[RunDir, ...]
    """Of each run."""

    logs: tuple[str, ...]

    def save(self, job: str, grid: Sequence[tuple[str, ...]]) -> None:
        """Remember in each run's folder the job that Slurm has given this id."""
        for index, (run_dir, plan) in enumerate(zip(self.folders, self.plans, strict=True)):
            (run_dir.path / "logs").mkdir(parents=True, exist_ok=True)
            Submission(
                job=f"{job}_{index}" if grid else job,
                log=self.logs[index],
                batch_size=plan.batch_size,
                total_steps=plan.total_steps,
                settings=grid[index] if grid else (),
            ).save(run_dir)


def prepare(request: SubmitRequest, site: Site, out: Path | None) -> PreparedJob:
    """Plan each run, and put together the job that trains them in `out`, or a folder in runs/.

    Raises:
        SlurmError: The site does not have what is asked for.
        UsageError: The numbers do not go together.
    """
    site = complete(site, request.nodes[0])
    plans = tuple(_plan(request, site, arguments) for arguments in request.runs)
    widest = max(plans, key=lambda plan: plan.workers_per_rank)
    if len({(plan.device, plan.nproc_per_node) for plan in plans}) > 1:
        raise UsageError("The runs of an array have the same number of ranks, on the same devices.")
    cpus = cpus_of(widest, site)
    folder = planned_path(out, widest.recipe).absolute()
    if "\\" in str(folder):
        raise SlurmError(
            f"The run folder {folder} has a backslash in it, with which Slurm's names of files "
            "mean something else. Give an --out without."
        )
    if request.grid:
        paths = [folder / str(index) for index in range(len(plans))]
        log = "slurm-%a.log"
    else:
        paths, log = [folder], "slurm.log"
    return PreparedJob(
        batch=BatchScript(
            name=widest.recipe,
            folder=str(Path.cwd()),
            log=f"{str(folder).replace('%', '%%')}/logs/{log}",
            nodes=request.nodes,
            gpus_per_node=widest.nproc_per_node if widest.device == "cuda" else 0,
            cpus_per_node=cpus,
            memory_per_node=memory_of(widest, site, cpus),
            seconds=seconds_of(request.time, site),
            commands=[
                _command(request, site, plan, path, arguments)
                for plan, path, arguments in zip(plans, paths, request.runs, strict=True)
            ],
            is_array=bool(request.grid),
            site=site,
        ),
        folder=folder,
        plans=plans,
        folders=tuple(RunDir(path) for path in paths),
        logs=tuple(f"{folder}/logs/{log.replace('%a', path.name)}" for path in paths),
    )


def complete(site: Site, nodes: int) -> Site:
    """Return a site with what Slurm knows and the profile does not say.

    Raises:
        SlurmError: So many nodes are more than there are.
    """
    try:
        found = partition(site.partition)
    except SlurmError:  # not here, as when somebody looks at a script: sbatch has the last word
        found = None
    if found is None:
        return site
    if nodes > found.nodes:
        where = f"the partition {site.partition}" if site.partition else "the default partition"
        raise SlurmError(f"{nodes} nodes were asked for, and {where} has {found.nodes}.")
    return replace(
        site,
        cpus_per_node=site.cpus_per_node or found.cpus,
        gpus_per_node=found.gpus if site.gpus_per_node is None else site.gpus_per_node,
        max_time=site.max_time or found.max_time,
    )


def _plan(request: SubmitRequest, site: Site, arguments: tuple[str, ...]) -> Plan:
    gpus = (site.gpus_per_node or 0) if request.gpus_per_node is None else request.gpus_per_node
    if request.gpus_per_node and request.nproc_per_node not in (None, gpus):
        raise UsageError(
            f"-n {request.nproc_per_node} and --gpus-per-node {gpus}: each GPU has one rank. "
            "Give one of them."
        )
    given = (*(read_yaml(request.config) if request.config else ()), *read_arguments(arguments))
    ranks = request.nproc_per_node or gpus or CPU_RANKS
    machine = machine_of(site, min(ranks, gpus) if gpus else 0, ranks)
    _, plan = plan_recipe(
        request.reference,
        given,
        machine,
        nodes=request.nodes[1],
        nproc_per_node=request.nproc_per_node,
    )
    return plan


def _command(
    request: SubmitRequest, site: Site, plan: Plan, path: Path, arguments: tuple[str, ...]
) -> list[str]:
    """Return what each node runs."""
    program = own_program() if site.python is None else program_of(site.python)
    command = [*program, "run", request.reference.location]
    command += ["-n", str(plan.nproc_per_node)]
    if request.nodes[0] == request.nodes[1]:
        command += ["--nodes", str(request.nodes[0])]
    command += ["--out", str(path), "--continue"]
    if request.config is not None:
        command += ["--config", str(request.config.resolve())]
    others = (each for each in arguments if not each.startswith("device="))
    return [*command, f"device={plan.device}", *others]


def combinations(axes: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Return all combinations of lr=0.1,0.2 and seed=1,2 as name=value.

    Commas within brackets belong to a value.

    Raises:
        UsageError: An axis is not of that form.
    """
    each = []
    for axis in axes:
        name, equals, values = axis.partition("=")
        if not (name and equals and values):
            raise UsageError(f"--array {axis}: expected name=value,value, such as lr=0.1,0.2.")
        each.append([f"{name}={value}" for value in _split(values)])
    return tuple(itertools.product(*each))


def _split(values: str) -> list[str]:
    found, depth = [""], 0
    for letter in values:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    return found
