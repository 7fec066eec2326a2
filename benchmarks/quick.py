"""All benchmarks in a short form, one after the other: `make bench`.

    python benchmarks/quick.py

Each prints its tables, and leaves them in a folder as JSON. What takes hours in full length takes
seconds here, so the figures say that a benchmark works, not what it comes to: each of the others
says at its top how it is run.
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
    "launch": "--ranks 2 --turns 1 --only torchrun,launcher",
    "opens": "--ranks 1,2",
    "ranks": "--ranks 2 --turns 1 --steps 24 --width 256",
    "loop_overhead": "--ranks 1 --turns 1 --epochs 20 --only launcher,ignite",
    "noise_cost": "--ranks 1 --turns 1 --epochs 20",
    "same_steps": "--worlds 1,2 --epochs 1 --strategies ddp --only launcher,torch",
    "teardown": "--runs 2 --ranks 2",
    "kill_resume": "--trials 2",
    "loader": "--workers 0,4 --turns 1 --seconds 0.5 --stores far",
    "super_convergence": "--epochs 1 --seeds 1 --budgets 100 --constant-lrs 0.01 --peak-lrs 0.1 "
    "--find-steps 20",
    "batch_64_to_512": "--batches 64,256 --target 0.6 --seeds 1 --samples 12000 --lrs 0.03 "
    "--noise-steps 60",
    "tuned": "--epochs 1 --tuned-epochs 1 --seeds 1 --find-steps 40",
}
"""The arguments of each benchmark's short form."""


@click.command()
@click.option("--only", type=Names(SHORT), default=",".join(SHORT), help="Of these.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=HERE / "results",
    help="The folder for the tables. Default: benchmarks/results.",
)
def main(only: list[str], out: Path) -> None:
    """Run the short forms, and fail if one of them does."""
    failed = []
    began = time.monotonic()
    for name in only:
        print(f"\n## python benchmarks/{name}.py {SHORT[name]}", flush=True)
        command = [str(HERE / f"{name}.py"), *SHORT[name].split(), "--json", f"{out}/{name}.json"]
        started = time.monotonic()
        if subprocess.run([sys.executable, *command], check=False).returncode:
            failed.append(name)
        print(f"\n{time.monotonic() - started:.0f} s", flush=True)
    minutes = (time.monotonic() - began) / 60
    print(f"\n{len(only) - len(failed)} of {len(only)} in {minutes:.1f} minutes; tables in {out}")
    if failed:
        raise click.ClickException(f"failed, see above: {', '.join(failed)}")


if __name__ == "__main__":
    main()
