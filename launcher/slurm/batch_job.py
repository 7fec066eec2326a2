"""From a recipe, a grid of settings and a site profile to one batch job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from launcher.environment.program import own_program, program_of
from launcher.errors import SlurmError, UsageError
from launcher.planning.plan import Plan
from launcher.planning.planner import CPU_RANKS
from launcher.recipe.grid import combinations_of, count_combinations, read_axes
from launcher.recipe.overrides import read_arguments, read_yaml
from launcher.recipe.resolve import Reference
from launcher.runs.plan_recipe import plan_recipe
from launcher.runs.rundir import RunDir, planned_path
from launcher.slurm.job_code import JobCode, copied_code, uncopied_code
from launcher.slurm.queue import partition
from launcher.slurm.resources import cpus_of, machine_of, memory_of, seconds_of
from launcher.slurm.script import BatchScript
from launcher.slurm.site import Site
from launcher.slurm.submission import Submission

_MAX_RUNS = 10_000
"""Runs of the largest array; Slurm itself has a limit of 1,001 unless a site raises it."""


@dataclass(frozen=True, kw_only=True)
class SubmitRequest:
    """A request to submit a run, or an array of runs."""

    reference: Reference
    arguments: tuple[str, ...]
    """name=value arguments of every run."""

    grid: tuple[tuple[str, ...], ...]
    """name=value arguments of each run of an array; empty for a single run."""

    config: Path | None
    nodes: tuple[int, int]
    gpus_per_node: int | None
    nproc_per_node: int | None
    time: str | None
    freezes: bool = True
    """Whether the job imports a copy of the recipe's project, made when it is submitted."""

    code_limit: int | None = None
    """Megabytes that the copy may have; None is the limit of the site."""

    health: Literal["off", "quick", "full"] | None = None
    """How each node is examined; None is what the site says."""

    is_dry: bool = False
    """Whether the job is only shown. Its script then imports the project itself, so that it can be
    submitted by hand."""

    @property
    def runs(self) -> tuple[tuple[str, ...], ...]:
        """The arguments of each run."""
        return tuple((*self.arguments, *settings) for settings in self.grid or ((),))


@dataclass(frozen=True, kw_only=True)
class PreparedJob:
    """A batch job that is planned but not submitted."""

    batch: BatchScript
    folder: Path
    """The run folder, or the folder of all runs of the array."""

    plans: tuple[Plan, ...]
    folders: tuple[RunDir, ...]
    """The folder of each run."""

    logs: tuple[str, ...]
    """The file with the job's output for each run."""

    code: JobCode
    """What is copied into `folder` before the job is submitted."""

    def save(self, job: str, grid: Sequence[tuple[str, ...]]) -> None:
        """Write the job id into the folder of each run."""
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
    """Plan each run and describe the job that trains them.

    Args:
        request: What to submit.
        site: The site profile.
        out: The folder to make; None is one below runs/.

    Raises:
        SlurmError: The site does not have the requested resources.
        UsageError: The recipe, a setting or a number is wrong.
    """
    site = complete(site, request.nodes[0])
    plans = tuple(_plan(request, site, arguments) for arguments in request.runs)
    widest = max(plans, key=lambda plan: plan.workers_per_rank)
    if len({(plan.device, plan.nproc_per_node) for plan in plans}) > 1:
        raise UsageError(
            "The runs of an array must have the same number of ranks on the same device."
        )
    cpus = cpus_of(widest, site)
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
    return PreparedJob(
        code=code,
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
                _command(request, site, plan, path, arguments, code)
                for plan, path, arguments in zip(plans, paths, request.runs, strict=True)
            ],
            is_array=bool(request.grid),
            run_folders=tuple(map(str, paths)),
            site=site,
        ),
        folder=folder,
        plans=plans,
        folders=tuple(RunDir(path) for path in paths),
        logs=tuple(f"{folder}/logs/{log.replace('%a', path.name)}" for path in paths),
    )


def complete(site: Site, nodes: int) -> Site:
    """Return a site profile whose gaps are filled with what Slurm knows of the partition.

    Raises:
        SlurmError: The partition has fewer nodes.
    """
    try:
        limits = partition(site.partition)
    except SlurmError:  # --dry-run works without Slurm; sbatch checks the numbers later
        limits = None
    if limits is None:
        return site
    if nodes > limits.nodes:
        where = f"the partition {site.partition}" if site.partition else "the default partition"
        raise SlurmError(
            f"--nodes {nodes} exceeds the {limits.nodes} nodes of {where}. Ask for fewer, or name "
            "another partition in the site profile."
        )
    return replace(
        site,
        cpus_per_node=site.cpus_per_node or limits.cpus,
        gpus_per_node=limits.gpus if site.gpus_per_node is None else site.gpus_per_node,
        max_time=site.max_time or limits.max_time,
    )


def _plan(request: SubmitRequest, site: Site, arguments: tuple[str, ...]) -> Plan:
    gpus = (site.gpus_per_node or 0) if request.gpus_per_node is None else request.gpus_per_node
    if request.gpus_per_node and request.nproc_per_node not in (None, gpus):
        raise UsageError(
            f"-n {request.nproc_per_node} contradicts --gpus-per-node {gpus}: each GPU has one "
            "rank. Give one of them."
        )
    overrides = (*(read_yaml(request.config) if request.config else ()), *read_arguments(arguments))
    ranks = request.nproc_per_node or gpus or CPU_RANKS
    machine = machine_of(site, min(ranks, gpus) if gpus else 0, ranks)
    _, plan = plan_recipe(
        request.reference,
        overrides,
        machine,
        nodes=request.nodes[1],
        nproc_per_node=request.nproc_per_node,
    )
    return plan


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
    if request.nodes[0] == request.nodes[1]:
        command += ["--nodes", str(request.nodes[0])]
    command += ["--out", str(path), "--continue"]
    if (health := request.health or site.health) != "off":
        command += ["--health", health]
    if code.config is not None:
        command += ["--config", str(code.config)]
    other_arguments = (word for word in arguments if not word.startswith("device="))
    return [*command, f"device={plan.device}", *other_arguments]


def combinations(arguments: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Return all combinations of axes such as lr=0.1,0.2 and seed=1,2, as name=value.

    A comma within brackets belongs to a value.

    Raises:
        UsageError: An axis does not have that form, or there are too many combinations.
    """
    axes = read_axes(arguments, option="--array")
    if (count := count_combinations(axes)) > _MAX_RUNS:
        raise UsageError(
            f"--array asks for {count:,} runs, one for each combination of values; an array has at "
            f"most {_MAX_RUNS:,}."
        )
    return tuple(
        tuple(f"{name}={value}" for name, value in pairs) for pairs in combinations_of(axes)
    )
