"""Count the exit codes of finished runs.

    python benchmarks/teardown.py --runs 200

Claim: every finished run exits with 0. The benchmark runs short trainings on more gloo ranks than
cores, in turns with `launcher run` and torchrun, under DDP and FSDP. A process that tears down its
C++ threads in the wrong order aborts now and then after all its work is done, and the job is
reported as failed although it succeeded.
"""

from __future__ import annotations

import collections
import subprocess
import tempfile
from pathlib import Path

import click
from contest import BIN, HERE, benchmark, print_table

DIGITS = HERE.parent / "recipes/digits.py"
STARTED_BY = {
    "launcher run": ("launcher", "run", "-n", "{ranks}", str(DIGITS)),
    "torchrun": ("torchrun", "--standalone", "--nproc-per-node", "{ranks}", str(DIGITS)),
}
STRATEGIES = ("ddp", "fsdp")


@benchmark
@click.option("--runs", type=click.IntRange(min=1), default=200, show_default=True)
@click.option("--ranks", type=click.IntRange(min=2), default=4, show_default=True)
def main(runs: int, ranks: int) -> None:
    """Train RUNS times, and fail unless every run exits with 0."""
    kinds = [(by, strategy) for strategy in STRATEGIES for by in STARTED_BY]
    codes: dict[tuple[str, str], collections.Counter[int]] = collections.defaultdict(
        collections.Counter
    )
    with tempfile.TemporaryDirectory(prefix="teardown-") as folder:
        for index in range(runs):
            kind = kinds[index % len(kinds)]
            code = train(*kind, ranks, Path(folder) / str(index))
            codes[kind][code] += 1
    rows = [
        (by, strategy, str(counts.total()), str(counts.total() - counts[0]), codes_text(counts))
        for (by, strategy), counts in codes.items()
    ]
    head = ("started by", "strategy", "runs", "did not exit with 0", "exit codes")
    print_table(head, rows)
    if any(counts.total() != counts[0] for counts in codes.values()):
        raise click.ClickException("A run finished its work and did not exit with 0, see above.")


def train(started_by: str, strategy: str, ranks: int, out: Path) -> int:
    """Train for one epoch and return the exit code; print the output if it is not 0.

    Raises:
        click.ClickException: The run exited with 0 and wrote no result.
    """
    program, *arguments = (word.format(ranks=ranks) for word in STARTED_BY[started_by])
    settings = (f"strategy={strategy}", "device=cpu", "epochs=1", "--out", str(out))
    process = subprocess.run(
        [str(BIN / program), *arguments, *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if process.returncode != 0:
        print(process.stdout, flush=True)
    elif not (out / "result.json").is_file():
        raise click.ClickException(f"A run exited with 0 without a result.json:\n{process.stdout}")
    return process.returncode


def codes_text(codes: collections.Counter[int]) -> str:
    """Return each exit code with its number of runs, such as `0 x 50, 134 x 1`."""
    return ", ".join(f"{code} x {count}" for code, count in sorted(codes.items()))


if __name__ == "__main__":
    main()
