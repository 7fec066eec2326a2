"""Compare the planned memory of a rank with what it uses, under each strategy.

    python benchmarks/memory_plan.py
    python benchmarks/memory_plan.py --layers 9 --width 1536      1 GB of weights

Each configuration trains the recipe gpt for some steps on CPU ranks. Measured is the peak of the
rank's resident memory in the steps after the first, beyond what it used before it built the model.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import click
from contest import BIN, Cell, Numbers, benchmark, print_table

NO_LIMIT = "1TiB"
MIB = 1 << 20


@benchmark
@click.option("--ranks", type=Numbers(int, 1), default="2,4", show_default=True)
@click.option("--layers", type=click.IntRange(min=1), default=6, show_default=True)
@click.option("--width", type=click.IntRange(min=64), default=768, show_default=True)
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--strategies", type=click.IntRange(min=1), default=5, show_default=True)
def main(ranks: list[int], layers: int, width: int, batch: int, strategies: int) -> None:
    """Print the planned and the measured memory of a rank under each strategy."""
    folder = Path(tempfile.mkdtemp(prefix="memory_plan-"))
    (folder / "text").mkdir()
    for name in "ab":
        (folder / "text" / f"{name}.txt").write_text("A line of text.\n" * 2_000)
    settings = [f"layers={layers}", f"width={width}", f"heads={width // 64}"]
    settings += [f"batch_size={batch}", f"data={folder / 'text'}"]
    try:
        rows: list[list[Cell]] = []
        num_weights = 0
        for num_ranks in ranks:
            result = find(settings, num_ranks, strategies, folder / f"on{num_ranks}")
            num_weights = result["num_values"]
            for trial in result["trials"]:
                planned, measured = (
                    trial["candidate"]["planned_training_bytes"],
                    trial["peak_bytes"],
                )
                rows.append(
                    [
                        trial["candidate"]["strategy"],
                        str(num_ranks),
                        (planned / MIB, ".0f"),
                        (measured / MIB, ".0f"),
                        (measured / planned, ".2f"),
                    ]
                )
        megabytes = 4 * num_weights / 1e6
        print_table(
            ("strategy", "ranks", "planned MiB", "measured MiB", "ratio"),
            rows,
            title=f"{num_weights:,} weights, {megabytes:,.0f} MB",
        )
    finally:
        shutil.rmtree(folder)


def find(settings: list[str], ranks: int, strategies: int, out: Path) -> dict[str, Any]:
    """Return what `launcher find strategy` plans and measures, without offloading.

    Raises:
        click.ClickException: The command failed.
    """
    command = [str(BIN / "launcher"), "find", "strategy", "gpt", "-n", str(ranks), "device=cpu"]
    command += [*settings, "--memory", NO_LIMIT, "--trials", str(strategies)]
    done = subprocess.run(
        [*command, "--json", "--out", str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise click.ClickException(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


if __name__ == "__main__":
    main()
