"""Train from each kind of data on several numbers of ranks and workers, and compare the samples.

    python benchmarks/data_matrix.py

Claim: for each stored format, order, stream, packing and mixture, each step has the same samples on
any number of ranks and DataLoader workers, also after a run was stopped in the middle of an epoch
and resumed on another number of ranks. Each row is trained on each number of ranks and workers for
16 steps of 10 samples, and stopped after 7 steps and resumed on the next number of ranks. The
samples of a step are those that `record_samples` records, and the losses show that their contents
are the same.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import sqlite3
import struct
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
import numpy as np
from contest import Cell, Names, Numbers, benchmark, print_table

from launcher import (
    Data,
    ImageFolder,
    LitShards,
    LMDBSamples,
    Mixture,
    MosaicShards,
    Packed,
    ParquetRows,
    Recipe,
    RunDir,
    Shards,
    Source,
    SQLiteRows,
    Stream,
    TokenFiles,
    constant,
    make_plan,
    read_machine,
    sgd,
    weighted,
)
from launcher.environment.world import World, find_world
from launcher.runs.job import ResumeFrom
from launcher.runs.rundir import create_run_dir
from launcher.signals import StopRequest

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import TensorDataset

SAMPLES, BATCH_SIZE, STEPS = 64, 10, 16
STOPPED_AFTER = 7
"""The step after which runs are stopped, in the second epoch."""

Value = Callable[[Any], float]
"""Returns the number of a sample."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One kind of data."""

    title: str
    """What it is."""

    write: Callable[[Path], None] = lambda _: None
    """Writes its files into an empty folder."""

    read: Callable[[Path], Any]
    """Returns the data set of that folder."""

    value: Value
    """Returns the number of a sample."""

    shuffle: Literal["global", "window", "length"] = "global"
    """The order of samples, which a stream leaves as it is."""

    needs: str = ""
    """A module without which the row is left out."""

    lengths: Sequence[int] | None = None
    """The lengths of the samples."""

    on_device: bool = False
    """Whether the samples are tensors that lie on the device, which needs no workers."""

    @property
    def is_missing(self) -> bool:
        """Whether a library is not installed."""
        return bool(self.needs) and importlib.util.find_spec(self.needs) is None


def write_parquet(folder: Path) -> None:
    """Write two files in row groups of 8."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for file, start in enumerate(range(0, SAMPLES, 40)):
        numbers = list(range(start, min(start + 40, SAMPLES)))
        pq.write_table(pa.table({"n": numbers}), folder / f"{file}.parquet", row_group_size=8)


def write_arrow(folder: Path) -> None:
    """Write a folder as `datasets` does, in two files."""
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_dict({"n": list(range(SAMPLES))})
    rows.save_to_disk(folder / "rows", num_shards=2)


def read_arrow(folder: Path) -> Any:
    """Return the data set of `datasets` itself."""
    import datasets

    return datasets.load_from_disk(str(folder / "rows")).with_format("torch")


def write_tokens(folder: Path) -> None:
    """Write blocks of 4 equal tokens."""
    tokens = np.repeat(np.arange(1, SAMPLES + 1, dtype="<u2"), 4)
    (folder / "a.bin").write_bytes(np.append(tokens, tokens[-1:]).tobytes())


def write_documents(folder: Path) -> None:
    """Write documents of 1 to 5 tokens with an index, as Megatron-LM does."""
    lengths = np.array([1 + index % 5 for index in range(SAMPLES)], "<i4")
    tokens = np.repeat(np.arange(SAMPLES, dtype="<u2"), lengths)
    starts = (np.cumsum(lengths) - lengths).astype("<i8") * 2
    (folder / "a.bin").write_bytes(tokens.tobytes())
    (folder / "a.idx").write_bytes(
        b"MMIDIDX\0\0"
        + struct.pack("<QBQQ", 1, 8, SAMPLES, SAMPLES + 1)
        + lengths.tobytes()
        + starts.tobytes()
        + np.arange(SAMPLES + 1, dtype="<i8").tobytes()
    )


def write_tars(folder: Path) -> None:
    """Write two tars."""
    for file, start in enumerate(range(0, SAMPLES, 40)):
        with tarfile.open(folder / f"{file}.tar", "w") as archive:
            for index in range(start, min(start + 40, SAMPLES)):
                content = str(index).encode()
                member = tarfile.TarInfo(f"{index:04}.n")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def write_indexed(path: Path, numbers: Sequence[int], head: bytes = b"") -> int:
    """Write numbers as a file of MDS or LitData, and return its size."""
    size = len(head) + 8
    offsets = 4 + 4 * (len(numbers) + 1) + size * np.arange(len(numbers) + 1)
    content = b"".join(head + struct.pack("<q", number) for number in numbers)
    path.write_bytes(struct.pack("<I", len(numbers)) + offsets.astype("<u4").tobytes() + content)
    return path.stat().st_size


def write_mds(folder: Path) -> None:
    """Write two files as MosaicML Streaming does."""
    shards = []
    for file, start in enumerate(range(0, SAMPLES, 40)):
        numbers, name = range(start, min(start + 40, SAMPLES)), f"shard.{file:05}.mds"
        size = write_indexed(folder / name, numbers)
        shards.append(
            {
                "column_names": ["n"],
                "column_encodings": ["int"],
                "column_sizes": [8],
                "compression": None,
                "format": "mds",
                "raw_data": {"basename": name, "bytes": size},
                "samples": len(numbers),
                "version": 2,
            }
        )
    (folder / "index.json").write_text(json.dumps({"shards": shards}))


def write_lit(folder: Path) -> None:
    """Write two files as LitData does."""
    from torch.utils._pytree import tree_flatten, treespec_dumps

    chunks = []
    for file, start in enumerate(range(0, SAMPLES, 40)):
        numbers, name = range(start, min(start + 40, SAMPLES)), f"chunk-0-{file}.bin"
        size = write_indexed(folder / name, numbers, struct.pack("<I", 8))
        chunks.append({"chunk_bytes": size, "chunk_size": len(numbers), "filename": name})
    config = {"data_format": ["int"], "data_spec": treespec_dumps(tree_flatten({"n": 0})[1])}
    (folder / "index.json").write_text(json.dumps({"chunks": chunks, "config": config}))


def write_lmdb(folder: Path) -> None:
    """Write an LMDB environment."""
    import lmdb

    with lmdb.open(str(folder), map_size=1 << 24) as written, written.begin(write=True) as change:
        for index in range(SAMPLES):
            change.put(b"%04d" % index, str(index).encode())


def write_sqlite(folder: Path) -> None:
    """Write a table whose rowids have gaps."""
    with sqlite3.connect(folder / "a.db") as database:
        database.execute("CREATE TABLE samples (n INTEGER)")
        rows = ((3 * index, index) for index in range(SAMPLES))
        database.executemany("INSERT INTO samples (rowid, n) VALUES (?, ?)", rows)
    database.close()


def write_images(folder: Path) -> None:
    """Write images of one colour in four classes."""
    from PIL import Image

    for index in range(SAMPLES):
        path = folder / f"class{index // 16}" / f"{index:04}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (2, 2), (index, 0, 0)).save(path)


def numbers(_: Path | None = None) -> list[int]:
    """Return the numbers of the samples as a data set in memory."""
    return list(range(SAMPLES))


def tensors(_: Path) -> TensorDataset:
    """Return the numbers as the batches of the other rows have them."""
    import torch
    from torch.utils.data import TensorDataset

    return TensorDataset(torch.arange(float(SAMPLES)).unsqueeze(1) / 100)


def mixture(folder: Path) -> Mixture:
    """Return a mixture of rows and numbers, whose proportions change over the run."""
    rows = SQLiteRows(folder / "a.db", "samples", decode=lambda row: row["n"])
    few = Source(list(range(100, 120)), weight=[(0, 1), (1, 3)])
    return Mixture({"rows": Source(rows, weight=[(0, 3), (1, 1)]), "few": few})


def packed(_: Path) -> Packed:
    """Return documents of 1 to 12 tokens packed into samples of 16."""
    documents = [np.full(1 + index * 5 % 12, index) for index in range(4 * SAMPLES)]
    return Packed(documents, tokens=16)


def stream(_: Path) -> Stream:
    """Return a stream whose samples are transformed in the rank or worker that takes them."""
    return Stream(lambda: iter(range(10_000)), transform=lambda number: number % 97)


ROWS = {
    "parquet": Row(
        title="Parquet",
        write=write_parquet,
        read=lambda folder: ParquetRows(sorted(folder.glob("*.parquet")), memory_bytes=1),
        value=lambda row: row["n"],
        needs="pyarrow",
    ),
    "window": Row(
        title="Parquet",
        write=write_parquet,
        read=lambda folder: ParquetRows(sorted(folder.glob("*.parquet")), memory_bytes=1),
        value=lambda row: row["n"],
        shuffle="window",
        needs="pyarrow",
    ),
    "arrow": Row(
        title="Arrow, datasets",
        write=write_arrow,
        read=read_arrow,
        value=lambda row: float(row["n"]),
        needs="datasets",
    ),
    "tokens": Row(
        title="tokens, in blocks",
        write=write_tokens,
        read=lambda folder: TokenFiles(folder / "a.bin", block=4, token_type="uint16"),
        value=lambda pair: float(pair[0].mean()),
    ),
    "documents": Row(
        title="tokens, documents",
        write=write_documents,
        read=lambda folder: TokenFiles(folder / "a.bin"),
        value=lambda tokens: float(tokens.mean()),
    ),
    "tar": Row(
        title="WebDataset tars",
        write=write_tars,
        read=lambda folder: Shards(sorted(folder.glob("*.tar"))),
        value=lambda sample: float(sample["n"]),
    ),
    "mds": Row(title="MDS", write=write_mds, read=MosaicShards, value=lambda sample: sample["n"]),
    "lit": Row(title="LitData", write=write_lit, read=LitShards, value=lambda sample: sample["n"]),
    "lmdb": Row(
        title="LMDB",
        write=write_lmdb,
        read=lambda folder: LMDBSamples(folder, decode=lambda _, value: int(value)),
        value=float,
        needs="lmdb",
    ),
    "sqlite": Row(
        title="SQLite",
        write=write_sqlite,
        read=lambda folder: SQLiteRows(folder / "a.db", "samples"),
        value=lambda row: row["n"],
    ),
    "images": Row(
        title="images in folders",
        write=write_images,
        read=ImageFolder,
        value=lambda pair: pair[0].getpixel((0, 0))[0] + 100 * pair[1],
        needs="PIL",
    ),
    "length": Row(
        title="in memory",
        read=numbers,
        value=float,
        shuffle="length",
        lengths=[1 + index * 7 % 13 for index in range(SAMPLES)],
    ),
    "device": Row(
        title="tensors on the device", read=tensors, value=lambda sample: sample[0], on_device=True
    ),
    "weighted": Row(
        title="weighted",
        read=lambda _: weighted(numbers(), np.arange(1, SAMPLES + 1)),
        value=float,
    ),
    "mixture": Row(title="mixture", write=write_sqlite, read=mixture, value=float),
    "mixed_windows": Row(
        title="mixture", write=write_sqlite, read=mixture, value=float, shuffle="window"
    ),
    "packed": Row(
        title="packed documents",
        read=packed,
        value=lambda sample: float(sample["input_ids"].mean()),
    ),
    "stream": Row(title="stream", read=stream, value=float),
}
"""All rows, by name."""


def recipe(row: Row, folder: Path, workers: int) -> Recipe:
    """Return the training of a row from its folder."""
    return Recipe(
        name="row",
        model=build_model,
        data=lambda: Data(
            train=row.read(folder),
            collate=None if row.on_device else lambda samples: joined(samples, row.value),
            lengths=row.lengths,
        ),
        forward=lambda model, batch: model(batch[0] if row.on_device else batch),
        loss=lambda outputs, _: (outputs.square().sum(), len(outputs)),
        optimizer=sgd(),
        schedule=constant(),
        batch_size=BATCH_SIZE,
        lr=0.001,
        lr_rule="none",
        steps=STEPS,
        shuffle=row.shuffle,
        shuffle_window=24,
        data_on_device=row.on_device,
        num_workers=0 if row.on_device else workers,
        record_samples=True,
        checkpoint_every=STEPS,
        device="cpu",
    )


def build_model() -> nn.Module:
    """Return a line through the origin."""
    from torch import nn

    return nn.Linear(1, 1)


def joined(samples: list[Any], value: Value) -> Tensor:
    """Return the numbers of samples, of shape (N, 1)."""
    import torch

    return torch.tensor([[value(sample) / 100] for sample in samples], dtype=torch.float32)


@benchmark
@click.option("--rows", type=Names(ROWS), default=",".join(ROWS), show_default=True)
@click.option("--worlds", type=Numbers(int, 1), default="1,2,3", show_default=True)
@click.option("--workers", type=Numbers(int, 0), default="0,2", show_default=True)
def main(rows: list[str], worlds: list[int], workers: list[int]) -> None:
    """Print whether the runs of each row had the same samples in each step."""
    folder = Path(tempfile.mkdtemp(prefix="data-matrix-"))
    head = ("data", "shuffle", "runs", "samples of a step", "after a resume", "losses differ by")
    try:
        print_table(head, matrix(folder, rows, worlds, workers), title=f"{STEPS} steps in each run")
    finally:
        shutil.rmtree(folder)


def matrix(
    folder: Path, names: Sequence[str], worlds: Sequence[int], workers: Sequence[int]
) -> Iterator[list[Cell]]:
    """Train the rows, and yield the cells of each."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    present = [name for name in names if not ROWS[name].is_missing]
    for name in present:
        (folder / name / "data").mkdir(parents=True)
        ROWS[name].write(folder / name / "data")
    train_rows(folder, present, worlds, workers)
    for name in names:
        row = ROWS[name]
        title = [row.title, "" if name == "stream" else row.shuffle]
        if row.is_missing:
            yield [*title, "0", f"{row.needs} is not installed", "", ""]
        else:
            yield [*title, *_compared(folder / name, worlds, workers)]


def _compared(folder: Path, worlds: Sequence[int], workers: Sequence[int]) -> list[Cell]:
    """Return the number of runs of a row, and how their samples and losses compare."""
    whole = [folder / f"{ranks}x{count}" for ranks in worlds for count in workers]
    resumed = [folder / f"{ranks}x{count}-resumed" for ranks in worlds for count in workers]
    samples, losses = read_run(whole[0])
    assert len(samples) == STEPS
    cells: list[Cell] = [str(len(whole) + len(resumed))]
    largest = 0.0
    for runs in (whole, resumed):
        differing = []
        for run in runs:
            found, found_losses = read_run(run)
            steps = sorted(set(samples) if runs is whole else range(STOPPED_AFTER + 1, STEPS + 1))
            differing += [step for step in steps if found.get(step) != samples[step]]
            for step in steps:
                largest = max(largest, abs(found_losses[step] / losses[step] - 1))
        cells.append(f"differ from step {min(differing)}" if differing else "=")
    return [*cells, (largest, ".0e")]


def read_run(folder: Path) -> tuple[dict[int, list[int]], dict[int, float]]:
    """Return the samples, sorted, and the loss of each step of a run."""
    samples: dict[int, list[int]] = {}
    for file in sorted((folder / "samples").glob("rank*.jsonl")):
        for row in map(json.loads, file.read_text().splitlines()):
            taken = [index for batch in row["micro_batches"] for index in batch]
            samples[row["step"]] = sorted(samples.get(row["step"], []) + taken)
    rows = map(json.loads, RunDir(folder).metrics.read_text().splitlines())
    return samples, {row["step"]: row["loss"] for row in rows if "loss" in row}


def train_rows(
    folder: Path, names: Sequence[str], worlds: Sequence[int], workers: Sequence[int]
) -> None:
    """Train each row on each number of ranks, whose processes share one process group.

    First each run is taken to its end, and one of its kind is stopped in its middle. Then those
    that were stopped are resumed on the next number of ranks.
    """
    from torch.multiprocessing.spawn import start_processes

    for resumes in (False, True):
        for position, ranks in enumerate(worlds):
            source = worlds[position - 1] if resumes else None
            arguments = folder, names, ranks, workers, source
            start_processes(train_rank_of_rows, arguments, ranks, start_method="fork")  # type: ignore[no-untyped-call]


def train_rank_of_rows(
    rank: int,
    folder: Path,
    names: Sequence[str],
    ranks: int,
    workers: Sequence[int],
    source: int | None,
) -> None:
    """Train all rows as one rank.

    Args:
        rank: The rank.
        folder: The folder of the rows.
        names: The names of the rows.
        ranks: The number of ranks.
        workers: The numbers of workers.
        source: The number of ranks of the runs that are resumed; None starts new runs.
    """
    sys.stdout = sys.stderr = io.StringIO()  # an exception reaches the parent in another way
    os.environ["OMP_NUM_THREADS"] = "1"
    for name, value in (("RANK", rank), ("WORLD_SIZE", ranks)):
        os.environ |= {name: str(value), f"LOCAL_{name}": str(value)}
    kind = "new" if source is None else "resumed"
    train = Trainer(replace(find_world(), store=folder / f"store-{ranks}-{kind}"))
    for name in names:
        for count in workers:
            trained = recipe(ROWS[name], folder / name / "data", count)
            place = folder / name / f"{ranks}x{count}"
            if source is None:
                train(trained, place)
                train(trained, Path(f"{place}-stopped"), pause_after=STOPPED_AFTER)
            else:
                stopped = folder / name / f"{source}x{count}-stopped"
                train(trained, Path(f"{place}-resumed"), source=stopped)
    os._exit(0)  # without waiting for the process group


class Trainer:
    """Trains recipes one after the other in one process group.

    Args:
        world: This rank among the others.
    """

    def __init__(self, world: World) -> None:
        from launcher.engine.ranks.output import Output

        self._world = world
        self._output = Output(terminal=io.StringIO(), errors=io.StringIO(), log=io.StringIO())
        self._backends: list[Any] = []  # they keep the process group alive

    def __call__(
        self,
        trained: Recipe,
        folder: Path,
        *,
        source: Path | None = None,
        pause_after: int | None = None,
    ) -> None:
        """Train a recipe into a folder, resumed from a copy of `source` if that is given."""
        import torch

        from launcher.engine.process_group import join
        from launcher.engine.run import train_rank

        plan = make_plan(trained, read_machine(), nproc_per_node=self._world.world_size)

        def make_run_dir() -> RunDir:
            if source is None:
                return create_run_dir(folder, "row")
            shutil.copytree(source, folder, ignore=shutil.ignore_patterns("samples"))
            return RunDir(folder)

        backend, run_dir = join(trained, plan, self._world, make_run_dir)
        if torch.distributed.is_initialized():
            self._world = replace(self._world, store=None)  # later runs use the same group
        start = None if source is None else ResumeFrom(step=STOPPED_AFTER)
        options: dict[str, Any] = {"start": start, "pause_after": pause_after}
        train_rank(trained, plan, backend, run_dir, self._output, stop=StopRequest(), **options)
        self._backends.append(backend)


if __name__ == "__main__":
    main()
