"""What the benchmarks share: the contestants, how each is started, and tables."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from launcher.environment.machine import read_machine
from launcher.runs.provenance import versions
from launcher.runs.rundir import RunDir, write_json

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent

Cell = str | tuple[float, str]
"""Of a table: a text, or a number and how to print it."""


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
    cores: Collection[int] | None = None,
) -> RunDir:
    """Train `recipe` with a contestant, into `folder`.

    Args:
        name: The contestant's.
        recipe: As the command line names it.
        folder: Where to write; made.
        ranks: Processes, on CPU.
        settings: name=value.
        options: Of frameworks.py, for those that are not launcher.
        cores: That the processes may use; None is all.
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
    cores = cores or os.sched_getaffinity(0)
    threads = max(len(cores) // ranks, 1)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [str(BIN / command[0]), *command[1:]],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        preexec_fn=functools.partial(os.sched_setaffinity, 0, cores),
    )
    if done.returncode:
        lines = done.stdout.splitlines()[-40:]
        raise click.ClickException("\n".join([*lines, f"{name} on {ranks} failed, see above."]))
    return RunDir(folder)


def benchmark(function: Callable[..., None]) -> click.Command:
    """Make a benchmark of a function: a command that keeps its tables in a file as well."""

    @click.pass_context
    @functools.wraps(function)
    def run(context: click.Context, /, *args: Any, as_json: Path | None, **kwargs: Any) -> None:
        context.obj = Tables(as_json)
        function(*args, **kwargs)

    option = click.option(
        "--json",
        "as_json",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Write the tables to this file as well, with what they were measured on.",
    )
    return click.command()(option(run))


class Tables:
    """The tables of a benchmark, written to a file after each, so that none is lost.

    Args:
        file: Where; its folder is made. None keeps none.

    Raises:
        click.ClickException: It cannot be.
    """

    def __init__(self, file: Path | None) -> None:
        if file is not None:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise click.ClickException(f"--json {file}: {error.strerror}.") from None
        self._file = file
        self._tables: list[dict[str, Any]] = []

    def add(self, title: str, head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Keep a table."""
        values = [[cell if isinstance(cell, str) else cell[0] for cell in row] for row in rows]
        self._tables.append({"title": title, "head": list(head), "rows": values})
        if self._file is None:
            return
        said = {
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "machine": asdict(read_machine()),
            "versions": versions(),
            "tables": self._tables,
        }
        write_json(self._file, said)


def print_table(head: Sequence[str], rows: Iterable[Sequence[Cell]], *, title: str = "") -> None:
    """Print a table in Markdown, and keep it where the benchmark was asked to.

    Args:
        head: Of its columns.
        rows: Cells: a text, or a number and how to print it.
        title: What was measured.
    """
    seen = []
    if title:
        print(f"\n{title}\n")
    print(f"| {' | '.join(head)} |")
    print("|---" * len(head) + "|")
    for row in rows:
        shown = (cell if isinstance(cell, str) else format(*cell) for cell in row)
        print(f"| {' | '.join(shown)} |", flush=True)
        seen.append(row)
    tables = click.get_current_context().find_object(Tables)
    assert tables is not None
    tables.add(title, head, seen)
