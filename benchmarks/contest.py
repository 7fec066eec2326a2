"""What the benchmarks share: the contestants, how each is started, and tables."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import click

from launcher.rundir import RunDir

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Contestant:
    """A way to train a recipe."""

    title: str
    module: str
    package: str


CONTESTANTS = {
    "torch": Contestant("plain PyTorch loop", "torch", "torch"),
    "launcher": Contestant("launcher", "launcher", "gpu-launcher"),
    "ignite": Contestant("ignite", "ignite", "pytorch-ignite"),
    "fabric": Contestant("Lightning Fabric", "lightning", "lightning"),
    "accelerate": Contestant("Accelerate", "accelerate", "accelerate"),
    "lightning": Contestant("Lightning Trainer", "lightning", "lightning"),
    "hf": Contestant("Hugging Face Trainer", "transformers", "transformers"),
}


class Names(click.ParamType[list[str]]):
    """Comma-separated values out of those given."""

    name = "list"

    def __init__(self, known: Iterable[str]) -> None:
        self._known = list(known)

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[str]:
        names = [name.strip() for name in str(value).split(",")]
        for name in names:
            if name not in self._known:
                self.fail(f"{name!r} is not one of {', '.join(self._known)}.", param, ctx)
        return names


Number = TypeVar("Number", int, float)


class Numbers(click.ParamType[list[Number]]):
    """Comma-separated numbers of a kind, none of them below `least`."""

    name = "list"

    def __init__(self, kind: type[Number], least: float) -> None:
        self._kind: type[Number] = kind
        self._least = least

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[Number]:
        try:
            numbers = [self._kind(text) for text in str(value).split(",")]
        except ValueError:
            numbers = []
        if not numbers or min(numbers) < self._least:
            wanted = f"numbers ({self._kind.__name__}) of at least {self._least:g}"
            self.fail(f"expected {wanted}, separated by commas; found {value!r}.", param, ctx)
        return numbers


def installed(names: Sequence[str]) -> list[str]:
    """Return the contestants that can run here; say of the others why not."""
    found = []
    for name in names:
        contestant = CONTESTANTS[name]
        if importlib.util.find_spec(contestant.module) is not None:
            found.append(name)
        else:
            print(
                f"skipped: {contestant.title}, because {contestant.package} is not installed; "
                "pip install '.[benchmarks]'"
            )
    return found


def train(
    name: str,
    recipe: str,
    folder: Path,
    *,
    ranks: int,
    settings: Sequence[str],
    options: Sequence[str],
) -> RunDir:
    """Train `recipe` with a contestant, into `folder`.

    Args:
        name: The contestant's.
        recipe: As the command line names it.
        folder: Where to write; made.
        ranks: Processes, on CPU.
        settings: name=value.
        options: Of frameworks.py, for those that are not launcher.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if name == "launcher":
        command = ["launcher", "run", recipe, "-n", str(ranks), "device=cpu"]
        command += [*settings, "--out", str(folder)]
    else:
        command = ["torchrun", "--standalone", "--nproc-per-node", str(ranks)]
        command += [str(HERE / "frameworks.py"), name, recipe, *options]
        command += [*settings, "--out", str(folder)]
    # As many threads as launcher plans for a rank; torchrun would take 1, and alone all cores.
    threads = max(len(os.sched_getaffinity(0)) // ranks, 1)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [str(BIN / command[0]), *command[1:]],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stdout.splitlines()[-40:]
        raise click.ClickException("\n".join([*lines, f"{name} on {ranks} failed, see above."]))
    return RunDir(folder)


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table in Markdown."""
    print(f"| {' | '.join(head)} |")
    print("|---" * len(head) + "|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
