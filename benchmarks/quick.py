"""Run all benchmarks in a short form, one after the other: `make bench`.

    python benchmarks/quick.py

Each benchmark prints its tables and writes them to a folder as JSON. The short forms take seconds
where the full ones take up to hours, so that their figures show only that a benchmark works. The
docstring of each benchmark has the command for the full form.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import click
from contest import HERE, Names

SHORT = {
    "commands": "--turns 1",
    "launch": "--ranks 1 --turns 1 --only torchrun,launcher,warm",
    "warm_starts": "--starts 8 --kills 4",
    "opens": "--ranks 1,2",
    "ranks": "--ranks 2 --turns 1 --steps 24 --width 256",
    "loop_overhead": "--ranks 1 --turns 1 --epochs 20 --only launcher,ignite",
    "noise_cost": "--ranks 1 --turns 1 --epochs 20",
    "same_steps": "--worlds 1,2 --epochs 1 --strategies ddp --only launcher,torch",
    "migrating": "--ranks 1 --only plain",
    "around_the_loop": "--worlds 2 --strategies fsdp",
    "same_bits": "--worlds 1,2 --strategies ddp --workloads sgd --only torch",
    "exact_cost": "--ranks 1 --turns 1 --epochs 8 --nets 1",
    "sharded_start": "--short",
    "memory_plan": "--ranks 2 --layers 2 --width 512 --strategies ddp",
    "teardown": "--runs 2 --ranks 2",
    "kill_resume": "--trials 2",
    "recovery": "--turns 1 --losses rank --contestants launcher",
    "checkpoint_cost": "--sizes 30 --saves 2 --every 4",
    "data": "--samples 1000 --turns 1 --formats tokens,lmdb,sqlite,images",
    "data_matrix": "--rows mixed_windows,packed,stream --worlds 1,3 --workers 2",
    "packing": "--documents 2000 --trained-tokens 64 --steps 6 --turns 1",
    "loader": "--workers 0,4 --turns 1 --seconds 0.5 --stores far",
    "loader_cpu": "--turns 1 --steps 20",
    "data_memory": "--samples 100000",
    "super_convergence": "--samples 6400 --seeds 1 --budgets 50 --constant-lrs 0.01 --peak-lrs 0.1 "
    "--muon-lrs 0.04 --found-lrs 0.04,0.2 --turns 1",
    "speedrun": "--epochs 1 --lrs 0.01 --seeds 1 --turns 1",
    "gpt_muon": "--steps 10 --lengths 0.5 --adamw-lrs 0.004 --muon-lrs 0.02 --seeds 1 --worlds 1,2",
    "batch_64_to_512": "--batches 64,256 --target 0.6 --seeds 1 --samples 8000 --lrs 0.03 "
    "--noise-steps 40 --evaluations 8",
    "batch_forecast": "--only mlp-sgd --batches 256,1024 --seeds 1",
    "micro_batch": "--workloads digits --ranks 1 --seconds 2",
    "lr_finder": "--only mlp-digits-adamw-64 --seeds 1 --searches 1 --steps 80",
    "gpu": "--only profile,doctor",
    "tuned": "--epochs 1 --tuned-epochs 1 --seeds 1 --find-steps 40",
}
"""The arguments of each benchmark's short form."""


@click.command()
@click.option(
    "--only", type=Names(SHORT), default=",".join(SHORT), help="Benchmarks to run; default: all."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=HERE / "results",
    help="Folder for the tables; default: benchmarks/results.",
)
def main(only: list[str], out: Path) -> None:
    """Run the short forms, and exit with 1 if one of them fails."""
    failed = []
    first_started = time.monotonic()
    for name in only:
        print(f"\n## python benchmarks/{name}.py {SHORT[name]}", flush=True)
        command = [str(HERE / f"{name}.py"), *SHORT[name].split(), "--json", f"{out}/{name}.json"]
        started = time.monotonic()
        if subprocess.run([sys.executable, *command], check=False).returncode:
            failed.append(name)
        print(f"\n{time.monotonic() - started:.0f} s", flush=True)
    minutes = (time.monotonic() - first_started) / 60
    print(f"\n{len(only) - len(failed)} of {len(only)} in {minutes:.1f} minutes; tables in {out}")
    if failed:
        raise click.ClickException(f"failed, see above: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
