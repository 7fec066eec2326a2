"""Start many runs on a warm server, edit their code between them, and kill some of them.

    python benchmarks/warm_starts.py
    python benchmarks/warm_starts.py --starts 0 --proofs 5 --other ../other/.venv/bin/launcher

Claim: no warm start loses a run, trains code that has been edited since, or leaves a process.
Before each start a module of the recipe is edited, and the run reports which version it trained.
Every fourth run is killed, or a process around it: in turn the server, the run, its client, and the
process that watches the run. A killed server must not harm the run. Every other kill must end all
processes of the run.

With --proofs, `launcher prove digits` runs in turn as a new process and from a warm server, and
with --other also as the new process of another version. The CPU time is that of all processes, the
server's included.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median

import click
from contest import BIN, Cell, benchmark, print_table

RECIPE = """
import time
from dataclasses import replace
from launcher.recipes.digits import digits
from version import VERSION

def versioned(pause: float = 0.0):
    def slow_loss(logits, batch):
        time.sleep(pause)
        return digits().loss(logits, batch)
    with open("trained.txt", "a") as file:
        print(VERSION, file=file)
    return replace(digits(), name="versioned", loss=slow_loss, steps=20, epochs=None)
"""

VICTIMS = ("server", "run", "client", "watcher")
_SECONDS = 60.0


@benchmark
@click.option("--starts", type=click.IntRange(min=0), default=200, show_default=True)
@click.option("--kills", type=click.IntRange(min=0), default=50, show_default=True)
@click.option("--ranks", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--proofs", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--other", type=click.Path(exists=True, path_type=Path), help="Another launcher.")
def main(starts: int, kills: int, ranks: int, proofs: int, other: Path | None) -> None:
    """Print what became of the runs, and the seconds from a start to its end."""
    if starts:
        _start_many(starts, kills, ranks)
    if proofs:
        _prove_in_turn(proofs, other)


def _start_many(starts: int, kills: int, ranks: int) -> None:
    """Start runs of which some are killed, and print what became of them."""
    outcomes: dict[str, Counter[str]] = {name: Counter() for name in ("none", *VICTIMS)}
    seconds: list[float] = []
    with tempfile.TemporaryDirectory(prefix="warm-") as name:
        folder = Path(name)
        (folder / "versioned.py").write_text(RECIPE)
        env = os.environ | {"XDG_RUNTIME_DIR": name, "WARM_BENCHMARK": name, "OMP_NUM_THREADS": "1"}
        try:
            for number in range(starts):
                every = max(starts // kills, 1) if kills else starts + 1
                is_killed = number % every == every - 1 and number // every < kills
                victim = VICTIMS[number // every % len(VICTIMS)] if is_killed else "none"
                outcome, duration = _start(folder, env, number, victim, ranks)
                outcomes[victim][outcome] += 1
                if victim == "none":
                    seconds.append(duration)
        finally:
            subprocess.run([str(BIN / "launcher"), "warm", "stop"], env=env, check=True)
        left = _wait_for_none(name)
    rows: list[list[Cell]] = [
        [victim, *(str(counts[key]) for key in ("finished", "ended", "wrong"))]
        for victim, counts in outcomes.items()
    ]
    print_table(("killed", "finished", "ended at once", "wrong"), rows, title="Runs")
    summary: list[Cell] = [(median(seconds), ".2f"), (max(seconds), ".2f"), str(len(left))]
    print_table(("median s to exit", "longest", "processes left"), [summary], title="Starts")
    if left or any(counts["wrong"] for counts in outcomes.values()):
        raise click.ClickException("A run was lost, trained old code, or left a process behind.")


def _prove_in_turn(proofs: int, other: Path | None) -> None:
    """Print the median seconds and CPU seconds of a proof by each version and way to start."""
    programs = {"new process": (BIN / "launcher", "0"), "warm server": (BIN / "launcher", "1")}
    if other is not None:
        programs = {"the other version": (other.absolute(), "0"), **programs}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    with tempfile.TemporaryDirectory(prefix="warm-") as folder:
        env = os.environ | {"XDG_RUNTIME_DIR": folder, "WARM_BENCHMARK": folder}
        try:
            for turn in range(proofs + 1):  # the first one starts the server and warms caches
                for name, (program, warm) in programs.items():
                    before, started = _cpu_seconds(folder), time.monotonic()
                    subprocess.run(
                        [str(program), "prove", "digits"],
                        cwd=folder,
                        env=env | {"LAUNCHER_WARM": warm},
                        stdout=subprocess.DEVNULL,
                        check=True,
                    )
                    seconds = time.monotonic() - started
                    if turn:
                        taken[name].append((seconds, _cpu_seconds(folder) - before))
        finally:
            subprocess.run([str(BIN / "launcher"), "warm", "stop"], env=env, check=True)
    medians = {name: [median(each) for each in zip(*taken[name], strict=True)] for name in taken}
    first = next(iter(medians.values()))
    rows: list[list[Cell]] = [
        [name, *((value, ".2f") for value in values)]
        + [(value / reference, ".2f") for value, reference in zip(values, first, strict=True)]
        for name, values in medians.items()
    ]
    print_table(("started as", "s", "CPU s", "ratio", "CPU ratio"), rows, title="Proofs")


def _cpu_seconds(mark: str) -> float:
    """Return the CPU seconds of what this process has waited for, and of the living processes.

    A process that has ended counts once its parent has collected it, which is waited for.
    """
    servers = _processes(mark)
    while any(parent in servers for parent in _parents()):
        time.sleep(0.01)
    times = os.times()
    total = times.children_user + times.children_system
    for pid in servers:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return total


def _parents() -> set[int]:
    """Return the parents of all processes, of those that have ended and not been collected too."""
    parents = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents.add(int(stat.read_text().rpartition(")")[2].split()[1]))
    return parents


def _start(
    folder: Path, env: dict[str, str], number: int, victim: str, ranks: int
) -> tuple[str, float]:
    """Start a run of a new version, and kill its victim; return the outcome and its seconds."""
    (folder / "version.py").write_text(f"VERSION = {number}\n")
    (folder / "trained.txt").unlink(missing_ok=True)
    out = folder / f"run{number}"
    pause = 0.0 if victim == "none" else 0.05
    command = [str(BIN / "launcher"), "run", "versioned.py", "-n", str(ranks), "device=cpu"]
    started = time.monotonic()
    client = subprocess.Popen(
        [*command, f"pause={pause}", "--warm", "--quiet", "--out", str(out)],
        cwd=folder,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    if victim != "none":
        metrics = out / "metrics.jsonl"
        _wait(lambda: metrics.exists() and metrics.stat().st_size > 0)
        _kill(victim, client, str(folder))
    code = client.wait()
    duration = time.monotonic() - started
    versions = set((folder / "trained.txt").read_text().split())
    is_finished = code == 0 and (out / "result.json").exists()
    if victim not in {"server", "none"}:
        is_ended = _wait_for_none(str(folder), but_servers=True) == [] and code != 0
        outcome = "ended" if is_ended else "wrong"
    else:
        outcome = "finished" if is_finished else "wrong"
    return (outcome if versions == {str(number)} else "wrong"), duration


def _kill(victim: str, client: subprocess.Popen[bytes], mark: str) -> None:
    """Kill the server, the command that it has forked, its client, or the process between."""
    if victim == "client":
        client.kill()
        return
    parents = _processes(mark)
    ranks = {pid: parent for pid, parent in parents.items() if parent in parents}
    servers = [pid for pid in parents if pid not in ranks and pid != client.pid]
    server = servers[0]
    watcher = next(pid for pid, parent in ranks.items() if parent == server)
    run = next(pid for pid, parent in ranks.items() if parent == watcher)
    with contextlib.suppress(ProcessLookupError):
        os.kill({"server": server, "watcher": watcher, "run": run}[victim], signal.SIGKILL)


def _processes(mark: str, *, but_servers: bool = False) -> dict[int, int]:
    """Return the living processes of this benchmark, each with its parent."""
    found: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            if f"WARM_BENCHMARK={mark}".encode() not in (folder / "environ").read_bytes():
                continue
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if state not in "ZX":
                found[int(folder.name)] = int(parent)
    if but_servers:  # a server has the parent that adopted it, and its children have a server
        return {pid: parent for pid, parent in found.items() if parent in found}
    return found


def _wait_for_none(mark: str, *, but_servers: bool = False) -> list[int]:
    """Return the processes that are still running after a while."""
    deadline = time.monotonic() + 10
    while (left := _processes(mark, but_servers=but_servers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return list(left)


def _wait(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + _SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise click.ClickException("A run took no step within a minute.")
        time.sleep(0.01)


if __name__ == "__main__":
    main()
