"""Measure the memory that each rank needs to build and to train a sharded model.

    python benchmarks/sharded_start.py

Claim: a rank needs memory for its own shard, not for the whole model. The benchmark trains three
steps of a model of 1 GiB on CPU ranks, and prints the high-water mark of a rank's resident memory,
less what it used before the model function was called: when the model has been built, and after two
steps, which includes gradients and gathered blocks. The C library is told to give freed memory back
(MALLOC_MMAP_THRESHOLD_), which it would otherwise keep. Beside it are figures of a model function
that cannot be recorded, so that each rank builds the whole model in its turn.

It then limits the memory that a rank may allocate (RLIMIT_DATA) to less than the model. The sharded
start takes two steps within it, and the build of the whole model fails.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
from contest import BIN, HERE, Cell, Names, Numbers, benchmark, print_table

COPIES = {"fsdp": 1, "zero3": 3}
"""What each strategy allocates before the first step, in shards: DeepSpeed adds an fp32 copy of the
weights and room for gradients."""

HEAD = ("strategy", "ranks", "the model is", "built, of the model", "after two steps, of the model")
LIMITED = ("strategy", "ranks", "the model is", "limit, of the model", "outcome")


@benchmark
@click.option("--ranks", type=Numbers(int, 2), default="2,4", show_default=True)
@click.option("--mib", type=click.IntRange(min=64), default=1024, show_default=True)
@click.option("--strategies", type=Names(tuple(COPIES)), default=",".join(COPIES))
@click.option("--limit", default=0.8, show_default=True, help="Limit as a share of the model.")
@click.option("--short", is_flag=True, help="A model of 512 MiB on 4 ranks under fsdp.")
def main(ranks: list[int], mib: int, strategies: list[str], limit: float, short: bool) -> None:
    """Print tables, and fail if a rank needs much more than its shard, or the limit is no limit."""
    if short:
        ranks, mib, strategies = [4], 512, ["fsdp"]
    failures: list[str] = []

    def rows() -> Iterator[Sequence[Cell]]:
        for strategy, number in itertools.product(strategies, ranks):
            for recorded in (True, False):
                built, peak = measure(strategy, number, mib, recorded=recorded)
                kind = "recorded" if recorded else "built in turns"
                yield strategy, str(number), kind, (built, ".0%"), (peak, ".0%")
                if recorded and built > COPIES[strategy] / number + 0.15:
                    failures.append(f"{strategy} on {number} ranks needs {built:.0%} of the model")

    print_table(HEAD, rows(), title=f"Memory of a rank beyond the imports; a model of {mib} MiB")
    most = max(ranks)
    outcomes: list[Sequence[Cell]] = []
    for recorded in (True, False):
        code = train("fsdp", most, mib, Path(), recorded=recorded, limit_mib=int(mib * limit))
        if (code == 0) != recorded:
            failures.append(f"exit code {code} under the limit")
        kind = "recorded" if recorded else "built in turns"
        outcomes.append(("fsdp", str(most), kind, (limit, ".0%"), f"exit code {code}"))
    print_table(LIMITED, outcomes, title="Under a limit of the memory that a rank may allocate")
    if failures:
        raise click.ClickException(f"{'; '.join(failures)}.")


def measure(strategy: str, ranks: int, mib: int, *, recorded: bool) -> tuple[float, float]:
    """Train, and return the largest needs of a rank as shares of the model.

    Returns:
        The high-water marks when the model has been built, and after two steps.

    Raises:
        click.ClickException: The training failed.
    """
    with tempfile.TemporaryDirectory(prefix="sharded-start-") as folder:
        if code := train(strategy, ranks, mib, Path(folder), recorded=recorded):
            raise click.ClickException(f"The training ended with exit code {code}.")
        notes = [json.loads(path.read_text()) for path in Path(folder).glob("rank*.json")]
    if len(notes) != ranks:
        raise click.ClickException(f"{len(notes)} of {ranks} ranks wrote their memory.")
    built, peak = (max(note[key] for note in notes) for key in ("built", "peak"))
    return built / (mib * 2**20), peak / (mib * 2**20)


def train(
    strategy: str,
    ranks: int,
    mib: int,
    out: Path,
    *,
    recorded: bool,
    limit_mib: int | None = None,
) -> int:
    """Train in a folder that is deleted, and return the exit code."""
    settings = [f"strategy={strategy}", f"mib={mib}", f"recorded={str(recorded).lower()}"]
    settings += [f"out={out}"] if out != Path() else []
    settings += [] if limit_mib is None else [f"limit_mib={limit_mib}"]
    with tempfile.TemporaryDirectory(prefix="sharded-start-") as folder:
        command = [str(BIN / "launcher"), "run", str(HERE / "large.py"), "-n", str(ranks)]
        process = subprocess.run(
            [*command, *settings, "checkpoint_every=1000", "--out", f"{folder}/run"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)},
        )
    if process.returncode != 0 and limit_mib is None:
        print(process.stdout, flush=True)
    return process.returncode


if __name__ == "__main__":
    main()
