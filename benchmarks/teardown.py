"""How finished runs end: with exit code 0, every one of them.

    python benchmarks/teardown.py --runs 200

Short trainings on gloo ranks that outnumber the cores, in turns with `launcher run` and torchrun,
under DDP and FSDP. A process of C++ threads that is taken apart in the wrong order aborts now and
then, after all its work is done, and a job that succeeded is reported as failed.
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
        for number in range(runs):
            kind = kinds[number % len(kinds)]
            code = train(*kind, ranks, Path(folder) / str(number))
            codes[kind][code] += 1
    rows = [
        (started_by, strategy, str(found.total()), str(found.total() - found[0]), seen(found))
        for (started_by, strategy), found in codes.items()
    ]
    head = ("started by", "strategy", "runs", "did not exit with 0", "exit codes")
    print_table(head, rows)
    if any(found.total() != found[0] for found in codes.values()):
        raise click.ClickException("A run that had finished did not say so.")


def train(started_by: str, strategy: str, ranks: int, out: Path) -> int:
    """Train a little; return the exit code, and show what a run said that did not end well."""
    program, *arguments = (word.format(ranks=ranks) for word in STARTED_BY[started_by])
    settings = (f"strategy={strategy}", "device=cpu", "epochs=1", "--out", str(out))
    done = subprocess.run(
        [str(BIN / program), *arguments, *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        print(done.stdout, flush=True)
    elif not (out / "result.json").is_file():
        raise click.ClickException(f"A run exited with 0 and left no result:\n{done.stdout}")
    return done.returncode


def seen(codes: collections.Counter[int]) -> str:
    """Return the exit codes with how often each came."""
    return ", ".join(f"{code} x {count}" for code, count in sorted(codes.items()))


if __name__ == "__main__":
    main()
