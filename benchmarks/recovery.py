"""Measure the time from a loss to the next step, and compare weights after many losses.

    python benchmarks/recovery.py --turns 3
    python benchmarks/recovery.py --kills 20
    python benchmarks/recovery.py --quick 5

Claim: a run on two nodes with a spare goes on within seconds when a rank, a launcher or a node is
lost, to the weights of a run that lost nothing. Each node is a launcher, or an agent of torchrun,
on this machine, with one rank. The second one loses its rank, its launcher alone, or all of its
processes to SIGKILL. The time ends with the first step that the ranks take after they have met.
torchrun trains the same net and data in a plain loop (elastic_loop.py) and goes on with one node
(--nnodes 1:2). It is told not to share its store with the ranks, because those of a restart would
read in it where the lost ones were. A machine that disappears without closing its connections is
noticed later, by launcher after --node-timeout.

With --kills, a node is killed at random again and again in one run, the first one included, and
another launcher takes its place. Samples, losses and weights must then equal, to the bit, those of
a run on two nodes that nothing disturbs. This needs root, for a host name of each launcher.

With --quick, the second node is lost with its disk between two checkpoints in the run folder. The
table tells the steps that were taken and are taken again, with and without quick checkpoints that
each node keeps and sends to the other one. This needs root, for a disk of each node.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import click
import psutil
from contest import BIN, HERE, Cell, benchmark, print_table
from kill_resume import check_equal, pid_of

from launcher.engine.probes.parity import read_trace
from launcher.runs.rundir import RunDir

RECIPE = HERE / "steady.py"
LOSSES = ("rank", "launcher", "node")
STEPS_PER_KILL, SECONDS_PER_STEP = 30, 0.2
"""A run that is killed often takes so long that new launchers have time to start."""

STEPS_PER_SAVE = 200
"""Steps between checkpoints in the run folder of a run that loses a node with its disk."""

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}

SECONDS_TO_NOTICE = 10.0
"""Ranks that still take steps after so long are not restarted."""

SECONDS_TO_RECOVER = 120.0
"""After so long a run counts as not recovered."""


@benchmark
@click.option("--turns", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--kills", type=click.IntRange(min=1), help="Kill nodes so often in one run instead.")
@click.option("--quick", type=click.IntRange(min=1), help="Lose a node with its disk instead.")
@click.option("--losses", default=",".join(LOSSES), show_default=True)
@click.option("--contestants", default="launcher,torchrun", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(
    turns: int, kills: int | None, quick: int | None, losses: str, contestants: str, seed: int
) -> None:
    """Lose ranks, launchers and nodes of runs, and measure how long they take to go on."""
    folder = Path(tempfile.mkdtemp(prefix="recovery-"))
    try:
        if kills is not None:
            kill_often(folder, kills, random.Random(seed))
            return
        if quick is not None:
            print_table(
                (*("quick checkpoints", "steps lost", "s to the next step", "promoted in, s"),),
                [_quick_row(folder, every, turns) for every in (None, quick)],
                title=f"a node is lost {STEPS_PER_SAVE // 2} steps after a checkpoint in the run "
                f"folder, median of {turns}",
            )
            return
        names = contestants.split(",")
        print_table(
            ("lost", *(f"{name}, s" for name in names)),
            (
                [loss, *(_cell(folder / f"{name}-{loss}", name, loss, turns) for name in names)]
                for loss in losses.split(",")
            ),
            title=f"seconds from a loss to the next step, median of {turns}",
        )
    finally:
        shutil.rmtree(folder)


def _cell(folder: Path, name: str, loss: str, turns: int) -> Cell:
    times = [recovery_seconds(folder / str(turn), name, loss) for turn in range(turns)]
    if 0.0 in times:
        return "its rank trains on"
    found = [seconds for seconds in times if seconds is not None]
    if len(found) < turns:
        return f"{turns - len(found)} of {turns} had not gone on after {SECONDS_TO_RECOVER:.0f} s"
    return statistics.median(found), ".1f"


def _quick_row(folder: Path, every: int | None, turns: int) -> list[Cell]:
    """Return the row of runs with or without quick checkpoints."""
    if os.geteuid() != 0:
        raise click.ClickException("--quick needs root, for a disk of each node.")
    found = [lost_steps(folder / f"quick{every}-{turn}", every) for turn in range(turns)]
    lost, seconds, promoted = (statistics.median(column) for column in zip(*found, strict=True))
    name = "none" if every is None else f"every {every} steps"
    return [name, (lost, ".0f"), (seconds, ".1f"), (promoted, ".2f") if every else "-"]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass
class Fleet:
    """The launchers of one run, all on this machine."""

    out: Path
    name: str
    """launcher or torchrun."""

    steps: int = 100_000
    pause: float = 0.03
    """Seconds of each step; the results do not depend on it."""

    save_every: int = 4
    """Steps between checkpoints in the run folder."""

    quick: int | None = None
    """Steps between quick checkpoints; None saves none."""

    disk: Path | None = None
    """Where each launcher has a disk of its own; None is the machine's."""

    options: tuple[str, ...] = ("--nodes", "2", "--spares", "1", "--max-restarts", "99")
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    port: int = field(default_factory=_free_port)

    @property
    def run_dir(self) -> RunDir:
        """The run folder."""
        return RunDir(self.out)

    def start(self, host_name: str | None = None) -> subprocess.Popen[bytes]:
        """Start one more launcher; `host_name` is the name of its machine, if it has its own."""
        settings = [f"steps={self.steps}", "device=cpu", "num_workers=0"]
        settings += [f"checkpoint_every={self.save_every}", f"seconds_per_step={self.pause}"]
        if self.quick is not None:
            settings.append(f"quick_checkpoints={self.disk}/quick")
            settings.append(f"quick_checkpoint_every={self.quick}")
        if self.name == "launcher":
            command = [str(BIN / "launcher"), "run", str(RECIPE), "-n", "1", *settings]
            command += ["--out", str(self.out), "--rendezvous", f"localhost:{self.port}"]
            command += self.options
        else:
            command = [str(BIN / "torchrun"), "--nnodes", "1:2", "--nproc-per-node", "1"]
            command += ["--max-restarts", "99", "--rdzv-backend", "c10d", "--rdzv-id", "recovery"]
            command += ["--rdzv-endpoint", f"localhost:{self.port}", str(HERE / "elastic_loop.py")]
            command += [str(self.out), str(self.pause)]
        if host_name is not None:
            shell = f'hostname {host_name}; exec "$@"'
            command = ["unshare", "--uts", "sh", "-c", shell, "sh", *command]
        if self.disk is not None:
            shell = 'mount -t tmpfs none "$0" && exec "$@"'
            command = ["unshare", "-m", "sh", "-c", shell, str(self.disk), *command]
        with (self.out.parent / f"{self.out.name}.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=os.environ | ENVIRONMENT,
            )
        self.processes.append(process)
        return process

    def start_in_order(self, count: int, host_name: Callable[[int], str | None]) -> None:
        """Start launchers, the first of which holds the meeting."""
        first = self.start(host_name(0))
        _wait(lambda: _has_connection(first.pid, psutil.CONN_LISTEN))
        for index in range(1, count):
            self.start(host_name(index))

    def pid_of(self, rank: int) -> int:
        """Return the process id of a rank."""
        if self.name == "launcher":
            return pid_of(self.run_dir, rank)
        return int((self.out / f"pid{rank}").read_text())

    def agent_of(self, rank: int) -> psutil.Process:
        """Return the process of the launcher that has started a rank."""
        pids = {process.pid for process in self.processes}
        process = psutil.Process(self.pid_of(rank))
        return next(parent for parent in process.parents() if parent.pid in pids)

    def lose(self, loss: str, rank: int) -> None:
        """Kill a rank, its launcher alone, or all processes of its node."""
        agent = self.agent_of(rank)
        everything = [agent, *agent.children(recursive=True)]
        victims = {"rank": [psutil.Process(self.pid_of(rank))], "launcher": [agent]}
        for victim in victims.get(loss, everything):
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()

    def rows(self, kind: str) -> list[dict[str, float]]:
        """Return the events of a kind, or the rows of steps."""
        file = self.run_dir.metrics if kind == "step" else self.run_dir.events
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return [row for row in rows if row.get("event", "step") == kind and "time" in row]

    def step(self) -> int:
        """Return the number of the newest step."""
        rows = self.rows("step")
        return int(rows[-1]["step"]) if rows else 0

    def has_recovered(self, times: int, step: int) -> bool:
        """Return whether the run has gone on after so many losses, and has taken a step."""
        return self.step() >= step and len(self.rows("recovered")) >= times

    def end(self) -> None:
        """Kill all processes of the run."""
        for process in self.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
            process.kill()
            process.wait()
        for process in psutil.process_iter(["cmdline"]):  # ranks that torchrun leaves behind
            if str(self.out) in " ".join(process.info["cmdline"] or ()):
                process.kill()


@contextlib.contextmanager
def fleet(out: Path, name: str, **values: object) -> Iterator[Fleet]:
    """Yield a run without launchers, and kill what is left of it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    run = Fleet(out, name, **values)  # type: ignore[arg-type]
    try:
        yield run
    finally:
        run.end()


def recovery_seconds(out: Path, name: str, loss: str) -> float | None:
    """Lose something of the second node; return the time to the next step after a restart.

    It is None if there is none, and 0 if the ranks train on although their launcher is gone.
    """
    with fleet(out, name) as run:
        run.start_in_order(3 if name == "launcher" else 2, lambda _: None)
        _wait(lambda: run.step() >= 20)
        time.sleep(2)  # the spare has time to start
        lost = time.time()
        run.lose(loss, rank=1)

        def first_step() -> float | None:
            began = next((row["time"] for row in run.rows("began") if row["time"] > lost), None)
            steps = [row["time"] for row in run.rows("step")[-1:] if row["time"] > lost]
            if began is None:
                return lost if steps and steps[-1] > lost + SECONDS_TO_NOTICE else None
            return next((row["time"] for row in run.rows("step") if row["time"] > began), None)

        end = _wait(first_step, SECONDS_TO_RECOVER)
        return end - lost if isinstance(end, float) else None


def lost_steps(out: Path, every: int | None) -> tuple[int, float, float]:
    """Lose the second node with its disk, between two checkpoints in the run folder.

    Returns:
        The steps that are taken again, the seconds to the next step, and those of them that it took
        to copy a quick checkpoint to the run folder.
    """
    disk = out.parent / f"{out.name}-disk"
    disk.mkdir(parents=True)
    with fleet(out, "launcher", save_every=STEPS_PER_SAVE, quick=every, disk=disk) as run:
        run.start_in_order(3, lambda _: None)
        _wait(lambda: run.step() >= STEPS_PER_SAVE + STEPS_PER_SAVE // 2)
        lost, step = time.time(), run.step()
        run.lose("node", rank=1)

        def began() -> dict[str, float] | None:
            return next((row for row in run.rows("began") if row["time"] > lost), None)

        def first_step() -> float | None:
            start = began()
            after = lost if start is None else start["time"]
            rows = run.rows("step") if start is not None else []
            return next((row["time"] for row in rows if row["time"] > after), None)

        end, start = _wait(first_step, SECONDS_TO_RECOVER), began()
        if not isinstance(end, float) or start is None:
            raise click.ClickException(f"It had not gone on after {SECONDS_TO_RECOVER:.0f} s.")
        promoted = next((row["seconds"] for row in run.rows("promoted")), 0.0)
        return step - int(start["step"]), end - lost, promoted


def kill_often(folder: Path, kills: int, rng: random.Random) -> None:
    """Kill nodes of one run, and compare it with one that nothing disturbs.

    Raises:
        click.ClickException: It ends early, or differs.
    """
    if os.geteuid() != 0:
        raise click.ClickException("--kills needs root, for a host name of each launcher.")
    steps = STEPS_PER_KILL * kills + 20
    with fleet(
        folder / "whole", "launcher", steps=steps, pause=0, options=("--nodes", "2")
    ) as whole:
        whole.start_in_order(2, lambda index: f"whole{index}")
        if any(process.wait() for process in whole.processes):
            raise click.ClickException("The undisturbed run failed.")
    reference = read_trace(whole.run_dir)
    with fleet(folder / "killed", "launcher", steps=steps, pause=SECONDS_PER_STEP) as run:
        run.start_in_order(3, lambda index: f"node{index}")
        victims = []
        for number in range(kills):
            _wait(functools.partial(run.has_recovered, number, run.step() + 1 + rng.randrange(3)))
            if run.run_dir.result.exists() or run.processes[-1].poll() is not None:
                raise click.ClickException(f"The run ended after {number} of {kills} kills.")
            victims.append(rng.randrange(2))
            run.lose("node", victims[-1])
            newest = run.start(f"node{3 + number}")
            _wait(functools.partial(_has_connection, newest.pid, psutil.CONN_ESTABLISHED))
        codes = [process.wait() for process in run.processes]
        if sorted(codes)[-3:] != [0, 0, 0]:
            log = (folder / "killed.log").read_text()[-2000:]
            raise click.ClickException(f"{log}\nexit codes {codes}")
        check_equal(reference, read_trace(run.run_dir), run.out)
        times = [row["seconds"] for row in run.rows("recovered")]
    head = ("nodes killed", "first ones", "median s to the next step", "longest", "weights")
    row: list[Cell] = [str(kills), str(victims.count(0)), (statistics.median(times), ".1f")]
    row += [(max(times), ".1f"), "equal to the bit"]
    print_table(head, [row], title="one run whose nodes are killed")


def _wait(condition: Callable[[], object], seconds: float = 300.0) -> object:
    """Wait until a condition is true; return its value, or None after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    return None


def _has_connection(pid: int, state: str) -> bool:
    try:
        return any(each.status == state for each in psutil.Process(pid).net_connections("tcp"))
    except psutil.NoSuchProcess:
        return False


if __name__ == "__main__":
    main()
