"""Train the GPT of `gpt` on two sources of text: a mixture that changes, and a stream.

`curriculum` mixes prose and code. Their proportions change over the run from four fifths prose to
four fifths code, and each source is evaluated by itself. The prose are the texts of Python's
`help()`, and the code is Python's standard library; `prose=` and `code=` name other folders.

`streamed` reads JSON lines from their start, as from a queue, and packs the bytes of their texts
into samples. A resumed run continues where the stream was. Without `lines=` the lines are the
documents of `curriculum`, in turns.

Verified on 1 and 2 CPU ranks. `curriculum` takes two and a half minutes on 2 cores.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import Data, Mixture, Recipe, RecipeError, Source, Stream, main
from launcher.recipes.gpt import BLOCK, gpt, pack, read_documents

if TYPE_CHECKING:
    from torch import Tensor


def curriculum(
    *, prose: Path | None = None, code: Path | None = None, layers: int = 4, width: int = 128
) -> Recipe:
    """A small GPT on prose and code, whose proportions change over the run.

    Args:
        prose: Folder of text files; none reads the texts of Python's help().
        code: Folder of text files; none reads Python's standard library.
        layers: Number of transformer blocks.
        width: Features of each position.
    """
    return replace(
        gpt(layers=layers, width=width),
        name="curriculum",
        data=lambda: mixed(read_prose(prose), read_documents(code)),
    )


def streamed(*, lines: Path | None = None, layers: int = 4, width: int = 128) -> Recipe:
    """A small GPT on a stream of JSON lines, each with a text.

    Args:
        lines: File of JSON objects with a field `text`, one in each line; none makes them.
        layers: Number of transformer blocks.
        width: Features of each position.
    """
    return replace(
        gpt(layers=layers, width=width),
        name="streamed",
        data=lambda: Data(
            train=Stream(lambda: Blocks(lines), transform=to_sample),
            evaluation=pack(read_documents(None)[::40]),
        ),
        in_memory=False,
    )


def mixed(prose: list[bytes], code: list[bytes]) -> Data:
    """Return a mixture of two sources, of which every 40th document is held out."""
    sources = {"prose": prose, "code": code}
    weights = {"prose": [(0.0, 0.8), (1.0, 0.2)], "code": [(0.0, 0.2), (1.0, 0.8)]}
    return Data(
        train=Mixture(
            {
                name: Source(pack(without_held_out(documents)), weight=weights[name])
                for name, documents in sources.items()
            }
        ),
        evaluation={name: pack(documents[::40]) for name, documents in sources.items()},
    )


def without_held_out(documents: list[bytes]) -> list[bytes]:
    """Return the documents to train on: all but every 40th."""
    return [text for number, text in enumerate(documents) if number % 40]


def read_prose(folder: Path | None) -> list[bytes]:
    """Return the text files below a folder, or the texts of Python's help() for None.

    Raises:
        RecipeError: The folder has too few texts.
    """
    if folder is not None:
        return read_documents(folder)
    from pydoc_data.topics import topics

    return [topics[name].encode() for name in sorted(topics)]


class Blocks:
    """The bytes of JSON lines in blocks of BLOCK + 1, and the place in the file.

    Blocks overlap by one byte, which is the last target of one and the first token of the next.

    Args:
        path: File of JSON objects with a field `text`; None makes lines of Python's own texts.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._line, self._rest = 0, b""

    def state_dict(self) -> dict[str, Any]:
        """Return the number of lines that were read, and the bytes that are left of them."""
        return {"line": self._line, "rest": self._rest.decode("latin-1")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after these lines."""
        self._line, self._rest = state["line"], state["rest"].encode("latin-1")

    def __iter__(self) -> Iterator[bytes]:
        for number, line in enumerate(self._lines()):
            if number < self._line:
                continue
            self._line += 1
            self._rest += self._text(number, line) + b"\0"
            while len(self._rest) > BLOCK:
                block, self._rest = self._rest[: BLOCK + 1], self._rest[BLOCK:]
                yield block

    def _lines(self) -> Iterator[str]:
        if self._path is None:
            documents = (
                without_held_out(each) for each in (read_prose(None), read_documents(None))
            )
            for turn in zip_longest(*documents):
                for text in filter(None, turn):
                    yield json.dumps({"text": text.decode(errors="replace")})
        else:
            try:
                with self._path.open(encoding="utf-8") as file:
                    yield from file
            except (OSError, UnicodeError) as error:
                raise RecipeError(
                    f"Cannot read {self._path}: {error}. Give lines= a file of JSON objects in "
                    "UTF-8, one in each line."
                ) from None

    def _text(self, number: int, line: str) -> bytes:
        """Return the text of a line.

        Raises:
            RecipeError: The line has none.
        """
        try:
            return str(json.loads(line)["text"]).encode()
        except (ValueError, TypeError, KeyError):
            raise RecipeError(
                f'Line {number + 1:,} of {self._path} is not like {{"text": "..."}}: {line[:80]!r}.'
            ) from None


def to_sample(block: bytes) -> tuple[Tensor, Tensor]:
    """Return (tokens, targets) of BLOCK bytes each."""
    import torch

    values = torch.tensor(list(block))
    return values[:-1], values[1:]


if __name__ == "__main__":
    main(curriculum)
