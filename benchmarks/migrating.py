"""Train before and after a migration, and compare every loss: the files of docs/migrating/.

    python benchmarks/migrating.py --ranks 2

Claim: the recipes of docs/migrating.md take the steps of the scripts that they replace. Each script
runs as it is, with launcher's order of samples (see same_order.py); the recipe is trained by
`launcher run` on as many processes. Both start from the weights that seed 0 gives.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
from contest import BIN, HERE, Names, benchmark, installed, print_table

from launcher.runs.history import History
from launcher.runs.rundir import RunDir

MIGRATING = HERE.parent / "docs/migrating"


@dataclass(frozen=True)
class Migration:
    """A script, and the recipe that replaces it."""

    framework: str
    """Key of the framework in `contest.CONTESTANTS`."""

    before: str
    after: str = "mine.py"
    starts_ranks: bool = False
    """Whether the script starts its own processes, always two; otherwise torchrun starts them."""


MIGRATIONS = {
    "plain": Migration("torch", "plain.py"),
    "accelerate": Migration("accelerate", "with_accelerate.py"),
    "lightning": Migration("lightning", "with_lightning.py", starts_ranks=True),
    "trainer": Migration("hf", "with_trainer.py", "like_trainer.py"),
}


@benchmark
@click.option("--ranks", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--only", type=Names(MIGRATIONS), default=",".join(MIGRATIONS), show_default=True)
def main(ranks: int, only: list[str]) -> None:
    """Print how much the losses of each script and of its recipe differ."""
    folder = Path(tempfile.mkdtemp(prefix="migrating-"))
    try:
        rows = differences(only, ranks, folder)
        head = "before", "after", "processes", "steps", "largest difference of a loss"
        print_table(head, rows, title="relative differences of the training losses")
    finally:
        shutil.rmtree(folder)


def differences(names: list[str], ranks: int, folder: Path) -> Iterator[list[str]]:
    """Yield a row of cells for each migration whose framework is installed."""
    for name in names:
        migration = MIGRATIONS[name]
        if not installed([migration.framework]):
            continue
        num_ranks = 2 if migration.starts_ranks else ranks
        before = losses_before(migration, num_ranks, folder / name)
        after = losses_after(migration, num_ranks, folder / f"{name}-after")
        if len(before) != len(after):
            raise click.ClickException(
                f"{migration.before} took {len(before)} steps, {migration.after} {len(after)}."
            )
        largest = max(abs(a - b) / abs(b) for a, b in zip(after, before, strict=True))
        yield [migration.before, migration.after, str(num_ranks), str(len(after)), f"{largest:.1e}"]


def losses_before(migration: Migration, ranks: int, folder: Path) -> list[float]:
    """Return the loss of each step of a script, a mean over its processes."""
    folder.mkdir()
    command = [str(HERE / "same_order.py"), str(MIGRATING / migration.before), "losses"]
    start = ["python"] if migration.starts_ranks else torchrun(ranks)
    run([*start, *command], folder)
    files = sorted(folder.glob("losses.*"))
    per_rank = [json.loads(file.read_text()) for file in files]
    if len(per_rank) != ranks:
        raise click.ClickException(f"{migration.before} ran on {len(per_rank)} processes.")
    return [statistics.fmean(values) for values in zip(*per_rank, strict=True)]


def losses_after(migration: Migration, ranks: int, folder: Path) -> list[float]:
    """Return the loss of each step of a recipe."""
    recipe = str(MIGRATING / migration.after)
    run(["launcher", "run", recipe, "-n", str(ranks), "--out", str(folder), "-q"], folder.parent)
    return list(History(RunDir(folder)).steps["loss"])


def torchrun(ranks: int) -> list[str]:
    """Return the command that starts a script on several processes."""
    return ["torchrun", "--standalone", "--nproc-per-node", str(ranks)]


def run(command: list[str], folder: Path) -> None:
    """Run a command without GPUs.

    Raises:
        click.ClickException: It failed; the message ends with its last 40 lines.
    """
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [str(BIN / command[0]), *command[1:]],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stdout.splitlines()[-40:]
        raise click.ClickException("\n".join([*lines, f"{command} failed, see above."]))


if __name__ == "__main__":
    main()
