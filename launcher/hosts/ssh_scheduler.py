"""ssh as a scheduler of `launcher submit`: `launcher run --hosts` in the background.

The process that starts the launchers on the hosts stays on this machine. It has its output in the
run folder, and it ends with the run.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from launcher.environment.nodes import NodesRequest, nodes_of_hosts
from launcher.environment.program import own_program
from launcher.errors import SchedulerError
from launcher.hosts.host_profile import Hosts, find_hosts
from launcher.paths import exists
from launcher.planning.plan import Plan
from launcher.runs.rundir import RunDir, planned_path
from launcher.runs.status import RunState, read_run_state
from launcher.schedulers.follow import copy_log_file
from launcher.schedulers.hardware import plan_runs
from launcher.schedulers.prepared import Prepared, submit_prepared
from launcher.schedulers.request import SubmitRequest
from launcher.schedulers.scheduler import Scheduler
from launcher.schedulers.submission import SubmittedRun

_FILE = "run.sh"
"""The file with the command in the run folder."""


class SshScheduler:
    """Starts `launcher run --hosts` as a process of its own."""

    def prepare(self, request: SubmitRequest, cluster: str | None, out: Path | None) -> Prepared:
        """Plan a run on the first hosts of a profile.

        Raises:
            SchedulerError: The profile has fewer hosts, or ssh cannot do what is asked.
        """
        hosts = find_hosts(cluster, os.environ)
        nodes = request.nodes[1]
        if request.grid or request.nodes[0] != nodes or request.time:
            raise SchedulerError(
                "--to ssh starts one run on a fixed number of hosts without a time limit: leave "
                "out --array, a range of --nodes and --time. The setting max_time limits a run."
            )
        if nodes > len(hosts.hosts):
            raise SchedulerError(
                f"--nodes {nodes} exceeds the {len(hosts.hosts)} hosts of the profile. Ask for "
                "fewer, or add hosts."
            )
        names = hosts.hosts[:nodes]
        nodes_of_hosts(
            names, NodesRequest(rendezvous=hosts.rendezvous)
        )  # refuses hosts that cannot meet
        plans = plan_runs(request, hosts.hardware)
        folder = planned_path(out, plans[0].recipe).absolute()
        command = _command(request, hosts, names, plans[0], folder)
        return Prepared(
            scheduler="ssh",
            folder=folder,
            files={_FILE: f"cd -- {shlex.quote(str(Path.cwd()))} &&\nexec {shlex.join(command)}\n"},
            plans=plans,
            folders=(RunDir(folder),),
            logs=(str(folder / "logs/ssh.log"),),
            where={"host": platform.node()},
        )

    def check(self, prepared: Prepared) -> str:
        return "launcher: the hosts were not asked"

    def submit(self, prepared: Prepared) -> tuple[str, RunDir]:
        return submit_prepared(prepared, _start)

    def states(self, runs: Sequence[SubmittedRun]) -> list[RunState]:
        return [_state(run) for run in runs]

    def copy_log(
        self, run: SubmittedRun, write: Callable[[bytes], object], *, follows: bool
    ) -> None:
        copy_log_file(Path(run.submission.log), run.run_dir, write, follows=follows)

    def cancel(self, runs: Sequence[SubmittedRun]) -> None:
        for run in runs:
            host = run.submission.where.get("host", "")
            if host != platform.node():
                raise SchedulerError(
                    f"{run.run_dir.shown} was started on {host}, and only there it can be "
                    f"cancelled: run the command on {host}."
                )
            if _is_running(run):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(run.submission.job), signal.SIGTERM)


SCHEDULER: Scheduler = SshScheduler()


def _command(
    request: SubmitRequest, hosts: Hosts, names: Sequence[str], plan: Plan, folder: Path
) -> list[str]:
    command = [*own_program(), "run", request.reference.location]
    command += ["-n", str(plan.nproc_per_node), "--hosts", ",".join(names)]
    for option, value in (("--ssh", hosts.ssh), ("--rendezvous", hosts.rendezvous)):
        command += [option, value] if value else []
    command += [word for name in hosts.forward for word in ("--forward", name)]
    command += ["--out", str(folder), *request.mirror_words, "--continue"]
    if request.config is not None:
        command += ["--config", str(request.config.resolve())]
    arguments = (word for word in request.arguments if not word.startswith("device="))
    return [*command, f"device={plan.device}", *arguments]


def _start(folder: Path) -> str:
    """Start the command in a run folder; return the id of its process."""
    with (folder / "logs/ssh.log").open("ab") as log:
        process = subprocess.Popen(
            ["sh", str(folder / _FILE)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    process.returncode = 0  # the process outlives this one, which does not wait for it
    return str(process.pid)


def _state(run: SubmittedRun) -> RunState:
    """Return the state of a run, which its folder tells unless it never began."""
    state = read_run_state(run.run_dir)
    if exists(run.run_dir.run_yaml) or _is_running(run) is not False:
        return state
    return RunState(name="failed", words=f"ended before it began, see {run.submission.log}")


def _is_running(run: SubmittedRun) -> bool | None:
    """Return whether the process of a run is running; None if it is on another machine."""
    if run.submission.where.get("host") != platform.node():
        return None
    script = os.fsencode(run.run_dir.path / _FILE), os.fsencode(run.run_dir.path)
    try:
        words = Path(f"/proc/{int(run.submission.job)}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return False
    return any(name in words for name in script)  # another process may have got the id
