"""Contestants of the benchmarks, the command that starts each, and the tables that are printed."""

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
from launcher.runs.files import write_json
from launcher.runs.provenance import versions
from launcher.runs.rundir import RunDir

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent

Cell = str | tuple[float, str]
"""A cell of a table: a text, or a number with its format specification."""


@dataclass(frozen=True)
class Contestant:
    """A framework, or a plain loop, that trains a recipe."""

    title: str
    """Name in the tables."""

    module: str
    """Module whose presence shows that the contestant is installed."""

    package: str
    """Name of the package to install."""


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
    """Comma-separated names out of a fixed set."""

    name = "list"

    def __init__(self, choices: Iterable[str]) -> None:
        self._choices = list(choices)

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[str]:
        names = [name.strip() for name in str(value).split(",")]
        for name in names:
            if name not in self._choices:
                self.fail(f"{name!r} is not one of {', '.join(self._choices)}.", param, ctx)
        return names


Number = TypeVar("Number", int, float)


class Numbers(click.ParamType[list[Number]]):
    """Comma-separated numbers of one type, each at least `minimum`."""

    name = "list"

    def __init__(self, kind: type[Number], minimum: float) -> None:
        self._kind: type[Number] = kind
        self._minimum = minimum

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[Number]:
        try:
            numbers = [self._kind(text) for text in str(value).split(",")]
        except ValueError:
            numbers = []
        if not numbers or min(numbers) < self._minimum:
            expected = f"numbers ({self._kind.__name__}) of at least {self._minimum:g}"
            self.fail(f"expected {expected}, separated by commas; found {value!r}.", param, ctx)
        return numbers


def installed(names: Sequence[str]) -> list[str]:
    """Return the installed contestants, and print why each of the others is skipped."""
    available = []
    for name in names:
        contestant = CONTESTANTS[name]
        if importlib.util.find_spec(contestant.module) is not None:
            available.append(name)
        else:
            print(
                f"skipped: {contestant.title}, because {contestant.package} is not installed; "
                "pip install '.[benchmarks]'"
            )
    return available


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
    """Train a recipe with a contestant and return the run folder.

    Args:
        name: Key of the contestant in CONTESTANTS.
        recipe: Recipe as the command line names it.
        folder: Run folder, created by the run.
        ranks: Number of CPU processes.
        settings: Overrides of the recipe as `name=value`.
        options: Options of frameworks.py, ignored by launcher.
        cores: CPU cores that the processes may use; None allows all of them.

    Raises:
        click.ClickException: The training failed; the message ends with its last 40 lines.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if name == "launcher":
        command = ["launcher", "run", recipe, "-n", str(ranks), "device=cpu"]
        command += [*settings, "--out", str(folder)]
    else:
        command = ["torchrun", "--standalone", "--nproc-per-node", str(ranks)]
        command += [str(HERE / "frameworks.py"), name, recipe, *options]
        command += [*settings, "--out", str(folder)]
    # The number of threads that launcher plans for a rank. torchrun sets 1 when it starts several
    # ranks and leaves all cores to a single one.
    cores = cores or os.sched_getaffinity(0)
    threads = max(len(cores) // ranks, 1)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run(
        [str(BIN / command[0]), *command[1:]],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        preexec_fn=functools.partial(os.sched_setaffinity, 0, cores),
    )
    if process.returncode:
        lines = process.stdout.splitlines()[-40:]
        raise click.ClickException("\n".join([*lines, f"{name} on {ranks} failed, see above."]))
    return RunDir(folder)


def benchmark(function: Callable[..., None]) -> click.Command:
    """Turn a function into a command with the option --json, which writes its tables to a file."""

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
        help="Also write the tables to this file, with the machine and the package versions.",
    )
    return click.command()(option(run))


class Tables:
    """Collects the tables of a benchmark and rewrites their file after each one.

    Args:
        file: JSON file to write; its folder is created. None writes no file.

    Raises:
        click.ClickException: The folder of the file cannot be created.
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
        """Add a table, and write the file with all tables so far."""
        values = [[cell if isinstance(cell, str) else cell[0] for cell in row] for row in rows]
        self._tables.append({"title": title, "head": list(head), "rows": values})
        if self._file is None:
            return
        report = {
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "machine": asdict(read_machine()),
            "versions": versions(),
            "tables": self._tables,
        }
        write_json(self._file, report)


def print_table(head: Sequence[str], rows: Iterable[Sequence[Cell]], *, title: str = "") -> None:
    """Print a table in Markdown, row by row, and add it to the file named by --json.

    Args:
        head: Titles of the columns.
        rows: Cells of each row; a generator may measure each row when it is asked for it.
        title: Line above the table that says what was measured.
    """
    printed_rows = []
    if title:
        print(f"\n{title}\n")
    print(f"| {' | '.join(head)} |")
    print("|---" * len(head) + "|")
    for row in rows:
        texts = (cell if isinstance(cell, str) else format(*cell) for cell in row)
        print(f"| {' | '.join(texts)} |", flush=True)
        printed_rows.append(row)
    tables = click.get_current_context().find_object(Tables)
    assert tables is not None
    tables.add(title, head, printed_rows)
