"""Compare batches of documents that are padded, sorted by length, and packed.

    python benchmarks/packing.py

Claims: packing, and batches of similar length, leave less than 1 % padding, and a training takes
more tokens per second by about what they save.

The first table has the padding of an epoch. The documents are the Python files of the standard
library, as bytes, cut into pieces of at most `tokens`, and lengths drawn from a log-normal
distribution, as those of instructions and answers are. The time of packing is that of one process.

The second table has the tokens per second, padding left out, of trainings of a small transformer on
drawn documents. They alternate, and the figures are medians of their steps. Packed samples are
attended with a mask that keeps documents apart.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from contest import Cell, benchmark, print_table, train
from numpy.typing import NDArray

from launcher import Data, Packed, Recipe, adamw, attention_mask, constant
from launcher.engine.data.order import GlobalOrder, LengthOrder, Order
from launcher.recipes.gpt import read_documents

if TYPE_CHECKING:
    from torch import Tensor, nn

BATCH = 32
WINDOW = 16_384
VOCABULARY = 256
IGNORED = -100
TRAINING_BATCH = 8
WARM_UP = 4
"""Number of steps that are not measured."""

WAYS = {
    "padded": "to the longest possible",
    "longest": "to the longest of a batch",
    "length": "shuffle=length",
    "packed": "packed",
}
"""How the samples of a batch are given one length, with its title."""


class Lengths:
    """Documents of which only the lengths are known."""

    def __init__(self, lengths: NDArray[np.int64]) -> None:
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Any:
        return np.full(self.lengths[index], index % VOCABULARY, np.int64)


def drawn_lengths(number: int, tokens: int) -> NDArray[np.int64]:
    """Return lengths from a log-normal distribution, of at most `tokens`."""
    shift = np.log(tokens / 2048)
    drawn = np.random.default_rng(0).lognormal(5.5 + shift, 1.0, number)
    return drawn.clip(2, tokens).astype(np.int64)


def padding(lengths: NDArray[np.int64], order: Order) -> float:
    """Return the padding of an epoch's batches, each padded to its longest sample."""
    whole = len(lengths) // BATCH * BATCH
    batches = lengths[order.elements_at(0, np.arange(whole))].reshape(-1, BATCH)
    return 1 - float(batches.sum() / (batches.max(axis=1).sum() * BATCH))


@benchmark
@click.option("--tokens", type=click.IntRange(min=16), default=2048, show_default=True)
@click.option("--documents", type=click.IntRange(min=64), default=100_000, show_default=True)
@click.option("--trained-tokens", type=click.IntRange(min=16), default=512, show_default=True)
@click.option("--steps", type=click.IntRange(min=2), default=24, show_default=True)
@click.option("--turns", type=click.IntRange(min=1), default=3, show_default=True)
def main(tokens: int, documents: int, trained_tokens: int, steps: int, turns: int) -> None:
    """Print the padding of each way to form batches, and the speed of trainings."""
    library = np.array([len(text) for text in read_documents(None)])
    pieces = np.concatenate([_cut(length, tokens) for length in library.tolist()])
    sets = {
        "standard library": pieces,
        "log-normal, median 245": drawn_lengths(documents, tokens),
    }
    head = (
        "documents",
        "number",
        f"padded to {tokens:,}",
        "to the longest of 32",
        "shuffle=length",
        "packed",
        "seconds to pack",
    )
    rows = (_padding_of(name, lengths, tokens) for name, lengths in sets.items())
    print_table(head, rows, title="padding, of all tokens")
    speed_head = ("samples", "tokens/s", "to padded", "tokens of a step", "padding")
    title = f"training on 1 CPU rank, samples of at most {trained_tokens} tokens, batches of 8"
    folder = Path(tempfile.mkdtemp(prefix="packing-"))
    try:
        print_table(speed_head, _speeds(folder, trained_tokens, steps, turns), title=title)
    finally:
        shutil.rmtree(folder)


def _padding_of(name: str, lengths: NDArray[np.int64], tokens: int) -> list[Cell]:
    started = time.perf_counter()
    packed = Packed(Lengths(lengths), tokens=tokens)
    seconds = time.perf_counter() - started
    return [
        name,
        (len(lengths), ",.0f"),
        (packed.waste_unpacked, ".1%"),
        (padding(lengths, GlobalOrder(len(lengths), 0)), ".1%"),
        (padding(lengths, LengthOrder(lengths, WINDOW, BATCH, 0)), ".1%"),
        (packed.waste, ".2%"),
        (seconds, ".2f"),
    ]


def _speeds(folder: Path, tokens: int, steps: int, turns: int) -> Iterator[list[Cell]]:
    """Train in each way, and yield the rows of the second table."""
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    used: dict[str, list[int]] = {way: [] for way in WAYS}
    full: dict[str, list[int]] = {way: [] for way in WAYS}
    for turn in range(turns):
        for way in WAYS if turn % 2 else reversed(WAYS):
            counts = folder / f"{way}-{turn}.jsonl"
            settings = [f"way={way}", f"tokens={tokens}", f"steps={steps}", f"counts={counts}"]
            run_dir = train(
                "launcher",
                f"{__file__}:documents",
                folder / f"{way}-{turn}",
                ranks=1,
                settings=settings,
                options=[],
            )
            metrics = [json.loads(line) for line in run_dir.metrics.read_text().splitlines()]
            seconds = {row["step"]: row["step_seconds"] for row in metrics if "loss" in row}
            lines = [json.loads(line) for line in counts.read_text().splitlines()][-steps:]
            for step, (real, all_tokens) in enumerate(lines, 1):
                if step > WARM_UP or steps <= WARM_UP:
                    used[way].append(real)
                    full[way].append(all_tokens)
            measured = [seconds[step] for step in seconds if step > WARM_UP or steps <= WARM_UP]
            rates[way].append(sum(used[way][-len(measured) :]) / sum(measured))
    base = median(rates["padded"])
    for way, title in WAYS.items():
        waste = 1 - sum(used[way]) / sum(full[way])
        rate, tokens_of_a_step = median(rates[way]), sum(used[way]) / len(used[way])
        yield [
            title,
            (rate, ",.0f"),
            (rate / base, ".2f"),
            (tokens_of_a_step, ",.0f"),
            (waste, ".1%"),
        ]


def documents(*, way: str = "packed", tokens: int = 512, counts: Path | None = None) -> Recipe:
    """A small transformer on drawn documents, in one of the ways to give samples one length.

    Args:
        way: One of `WAYS`.
        tokens: Number of tokens of the longest sample.
        counts: A file that receives the number of tokens of each batch, without and with padding.
    """
    return Recipe(
        name="documents",
        model=lambda: build_model(tokens),
        data=lambda: build_data(way, tokens),
        forward=lambda model, batch: model(batch),
        loss=lambda logits, batch: cross_entropy(logits, batch, counts),
        count=lambda batch: int((batch["targets"] != IGNORED).sum()),
        optimizer=adamw(),
        schedule=constant(),
        batch_size=TRAINING_BATCH,
        lr=0.001,
        lr_rule="none",
        steps=24,
        shuffle="length" if way == "length" else "global",
        shuffle_window=1024,
        num_workers=0,
        device="cpu",
    )


def build_data(way: str, tokens: int) -> Data:
    """Return 4,000 documents as samples."""
    known = Lengths(drawn_lengths(4_000, tokens))
    if way == "packed":
        return Data(train=Packed(known, tokens=tokens))
    width = tokens if way == "padded" else None
    return Data(
        train=known,
        collate=lambda samples: pad(samples, width),
        lengths=known.lengths if way == "length" else None,
    )


def pad(samples: list[NDArray[np.int64]], width: int | None) -> dict[str, Tensor]:
    """Return documents padded to `width`, or to the longest of them."""
    import torch

    width = width or max(map(len, samples))
    ids = torch.zeros(len(samples), width, dtype=torch.int64)
    targets = torch.full((len(samples), width), IGNORED)
    for row, sample in enumerate(samples):
        ids[row, : len(sample)] = torch.from_numpy(sample)
        targets[row, : len(sample) - 1] = ids[row, 1 : len(sample)]
    positions = torch.arange(width).expand(len(samples), width).contiguous()
    return {"input_ids": ids, "targets": targets, "position_ids": positions}


def build_model(tokens: int, width: int = 128, layers: int = 2, heads: int = 4) -> nn.Module:
    """Return a transformer that maps a batch to logits (N, T, VOCABULARY)."""
    from torch import nn
    from torch.nn import functional

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
            self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.hidden = nn.Sequential(
                nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
            )

        def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
            size, length, _ = x.shape
            qkv = self.qkv(self.norms[0](x)).view(size, length, 3, heads, width // heads)
            query, key, value = qkv.permute(2, 0, 3, 1, 4)
            context = functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=mask is None
            )
            x = x + self.project(context.transpose(1, 2).reshape(size, length, width))
            output: Tensor = x + self.hidden(self.norms[1](x))
            return output

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(VOCABULARY, width)
            self.positions = nn.Embedding(tokens, width)
            self.layers = nn.ModuleList(Layer() for _ in range(layers))
            self.head = nn.Linear(width, VOCABULARY)

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            ids = batch.get("document_ids")
            # A causal mask suffices for padded samples: padding comes last.
            mask = None if ids is None else attention_mask(ids)
            x = self.tokens(batch["input_ids"]) + self.positions(batch["position_ids"])
            for layer in self.layers:
                x = layer(x, mask)
            logits: Tensor = self.head(x)
            return logits

    return Net()


def cross_entropy(
    logits: Tensor, batch: dict[str, Tensor], counts: Path | None = None
) -> tuple[Tensor, int]:
    """Return the sum of the cross-entropies and the number of targets, and note the tokens."""
    from torch.nn.functional import cross_entropy

    targets = batch["targets"]
    number = int((targets != IGNORED).sum())
    if counts is not None:
        with counts.open("a") as file:
            file.write(json.dumps([number, targets.numel()]) + "\n")
    loss = cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return loss, number


def _cut(length: int, tokens: int) -> NDArray[np.int64]:
    whole, rest = divmod(length, tokens)
    return np.array([tokens] * whole + [rest] * (rest > 0), np.int64)


if __name__ == "__main__":
    main()
