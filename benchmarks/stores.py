"""Recipes that read digits from slow stores: a remote server, and JPEGs that are slow to decode.

The recipe `far` reads from the server that this file runs as a command; `packed` decodes JPEGs.
"""

from __future__ import annotations

import asyncio
import io
import socket
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from launcher import Data, Recipe, constant, sgd
from launcher.recipes.digits import read_digits

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

BATCH_SIZE = 16
SIDE = 8
_LABEL_BYTES = 1
_PACKED_SIDE = 1024


def far(*, port: int) -> Recipe:
    """Digits from the object store on loopback that `serve` runs, with a delay per sample."""
    return _recipe("far", lambda: Data(train=Remote(port)))


def packed() -> Recipe:
    """Digits as JPEGs of 1,024 x 1,024 pixels, each of which takes milliseconds to decode."""
    return _recipe("packed", lambda: Data(train=Packed()))


def _recipe(name: str, data: Any) -> Recipe:
    return Recipe(
        name=name,
        model=build_model,
        data=data,
        loss=cross_entropy,
        optimizer=sgd(),
        schedule=constant(),
        batch_size=BATCH_SIZE,
        lr=0.001,
        lr_rule="none",
        epochs=1_000,
        train_samples=1797,
    )


def build_model() -> nn.Module:
    """Return a net that maps vectors (N, 64) to logits (N, 10)."""
    from torch import nn

    return nn.Sequential(nn.Linear(SIDE * SIDE, 128), nn.ReLU(), nn.Linear(128, 10))


def cross_entropy(logits: Tensor, batch: Sequence[Tensor]) -> tuple[Tensor, int]:
    """Return the sum of the cross-entropies and the number of samples."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits, batch[1], reduction="sum"), len(batch[1])


def read_bytes() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the images (1797, 8, 8) as bytes, and the labels (1797,)."""
    images, labels = read_digits()
    return (images[:, 0] * 255).byte().numpy(), labels.numpy()


class Remote:
    """Dataset that fetches each digit over a connection; every thread opens its own."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._connections = threading.local()

    def __len__(self) -> int:
        return 1797

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        import torch

        # Opened in the worker: a connection does not survive a fork.
        stream = getattr(self._connections, "stream", None)
        if stream is None:
            connection = socket.create_connection(("127.0.0.1", self._port))
            stream = self._connections.stream = connection.makefile("rwb")
        stream.write(f"GET {index}\n".encode())
        stream.flush()
        answer = stream.read(SIDE * SIDE + _LABEL_BYTES)
        pixels = torch.frombuffer(bytearray(answer[:-_LABEL_BYTES]), dtype=torch.uint8)
        return pixels.float() / 255, answer[-1]


class Packed:
    """Dataset of digits, each enlarged and stored as a JPEG."""

    def __init__(self) -> None:
        from PIL import Image

        images, self._labels = read_bytes()
        self._files = []
        for image in images:
            file = io.BytesIO()
            Image.fromarray(image).resize((_PACKED_SIDE, _PACKED_SIDE)).save(file, "JPEG")
            self._files.append(file.getvalue())

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        import numpy as np
        import torch
        from PIL import Image

        with Image.open(io.BytesIO(self._files[index])) as image:
            small = image.resize((SIDE, SIDE), Image.Resampling.BOX)
        pixels = torch.from_numpy(np.asarray(small).copy()).flatten()
        return pixels.float() / 255, int(self._labels[index])


@click.command()
@click.option("--delay", type=click.FloatRange(min=0), default=0.01, help="Seconds per answer.")
def serve(delay: float) -> None:
    """Print a free port on loopback, and serve digits on it until stdin is closed."""
    asyncio.run(_serve(delay))


async def _serve(delay: float) -> None:
    images, labels = read_bytes()
    objects = [
        image.tobytes() + bytes([label]) for image, label in zip(images, labels, strict=True)
    ]

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            await asyncio.sleep(delay)
            writer.write(objects[int(line.split()[1])])
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    serve()
