"""Compare the planned memory of a rank with what it uses, under each strategy.

    python benchmarks/memory_plan.py
    python benchmarks/memory_plan.py --strategies fsdp,zero3 --tensor-parallel 2 \
        --layers 9 --width 1536 --batch 4 --block 32              1 GB of weights

Each configuration trains the recipe pretrain_lm for some steps on CPU ranks. Measured is the peak
of the resident memory of the rank that uses most, beyond what it used before it built the model:
in the steps after the first, and while the model is built and takes its first step. With
--tensor-parallel, FSDP with that many ranks per group follows.
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
from contest import BIN, Cell, Names, Numbers, benchmark, print_table

MIB = 1 << 20

STRATEGIES = ("ddp", "zero1", "zero2", "fsdp", "zero3")


@benchmark
@click.option("--ranks", type=Numbers(int, 1), default="2,4", show_default=True)
@click.option("--layers", type=click.IntRange(min=1), default=6, show_default=True)
@click.option("--width", type=click.IntRange(min=64), default=768, show_default=True)
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--block", type=click.IntRange(min=1), default=128, show_default=True)
@click.option(
    "--strategies", type=Names(STRATEGIES), default=",".join(STRATEGIES), show_default=True
)
@click.option("--memory", default="1TiB", show_default=True, help="Limit of find strategy.")
@click.option("--tensor-parallel", type=click.IntRange(min=1), default=1, show_default=True)
def main(
    ranks: list[int],
    layers: int,
    width: int,
    batch: int,
    block: int,
    strategies: list[str],
    memory: str,
    tensor_parallel: int,
) -> None:
    """Print the planned and the measured memory of a rank under each strategy."""
    folder = Path(tempfile.mkdtemp(prefix="memory_plan-"))
    tokens = folder / "tokens.bin"
    tokens.write_bytes(bytes(128) * 1024)
    heads, hidden = width // 64, width * 8 // 3 // 64 * 64
    settings = [f"layers={layers}", f"width={width}", f"heads={heads}", f"key_heads={heads}"]
    settings += [f"hidden={hidden}", f"batch_size={batch}", f"block={block}"]
    settings.append(f"tokens={tokens}")
    split = [*settings, "strategy=fsdp", f"tensor_parallel={tensor_parallel}"]
    searches = [(number, strategies, settings) for number in ranks]
    if tensor_parallel > 1:
        searches += [(number, ["fsdp"], split) for number in ranks]
    try:
        rows: list[list[Cell]] = []
        num_weights = 0
        for number, (num_ranks, names, chosen) in enumerate(searches):
            result = find(chosen, num_ranks, names, memory, folder / f"search{number}")
            num_weights = result["num_values"]
            for trial in result["trials"]:
                name = trial["candidate"]["strategy"]
                name += f" tensor_parallel={tensor_parallel}" if chosen is split else ""
                rows.append([name, str(num_ranks), *figures(trial)])
        megabytes = 4 * num_weights / 1e6
        print_table(
            ("strategy", "ranks", "planned MiB", "measured MiB", "ratio", "start MiB", "ratio"),
            rows,
            title=f"{num_weights:,} weights, {megabytes:,.0f} MB",
        )
    finally:
        shutil.rmtree(folder)


def figures(trial: dict[str, Any]) -> list[Cell]:
    """Return the cells of a trial: the planned and the measured memory."""
    planned = trial["candidate"]["planned_training_bytes"]
    cells: list[Cell] = [(planned / MIB, ".0f")]
    for measured in (trial["peak_bytes"], trial["start_peak_bytes"]):
        cells += [(measured / MIB, ".0f"), (measured / planned, ".2f")]
    return cells


def find(
    settings: list[str], ranks: int, strategies: list[str], memory: str, out: Path
) -> dict[str, Any]:
    """Return what `launcher find strategy` plans and measures, without offloading.

    Raises:
        click.ClickException: The command failed.
    """
    command = [
        str(BIN / "launcher"),
        "find",
        "strategy",
        "pretrain_lm",
        "-n",
        str(ranks),
        "device=cpu",
    ]
    command += [*settings, "--memory", memory, "--strategies", ",".join(strategies)]
    command += ["--trials", str(len(strategies))]
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
