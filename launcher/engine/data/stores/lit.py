"""Samples of LitData's format, read in any order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.engine.data.remote import DEFAULT_CACHE, RemoteCache
from launcher.engine.data.stores.indexed_shards import (
    Decode,
    IndexedShards,
    Shard,
    read_index,
    splitter,
    unreadable,
)
from launcher.engine.data.stores.value_formats import lit_decoder
from launcher.errors import RecipeError


class LitShards(IndexedShards):
    """A map-style data set of the samples that LitData's `optimize` has written.

    A sample has the structure that was written, such as a dict or a tuple, or is the result of
    `decode` for it. Images are images of Pillow.

    Args:
        folder: Path or URL of the folder with index.json.
        decode: A function of a sample; None returns the sample itself.
        allow_pickle: Whether pickled values are read, which runs their code.
        cache: The cache of remote files.

    Raises:
        RecipeError: A file is missing, damaged, compressed or encrypted, or a value cannot be read.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        decode: Callable[[Any], Any] | None = None,
        allow_pickle: bool = False,
        cache: RemoteCache = DEFAULT_CACHE,
    ) -> None:
        content, index = read_index(folder, cache)
        try:
            config = index["config"]
            _check(folder, config)
            shards = [
                Shard(chunk["filename"], int(chunk["chunk_bytes"]), int(chunk["chunk_size"]))
                for chunk in index["chunks"]
            ]
            read = _decoder(config["data_format"], config["data_spec"], allow_pickle=allow_pickle)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise unreadable(folder, error) from None
        super().__init__(folder, content, shards, [read] * len(shards), decode, cache)


def _check(folder: Path | str, config: dict[str, Any]) -> None:
    """Refuse files whose samples cannot be read one by one."""
    for name, advice in (
        ("compression", "Write them with optimize(compression=None)"),
        ("encryption", "Write them without encryption"),
    ):
        if config.get(name):
            raise RecipeError(
                f"The files of {folder} have {name}={config[name]!r}, so single samples cannot be "
                f"read. {advice}."
            )
    if (loader := config.get("item_loader") or "PyTreeLoader") != "PyTreeLoader":
        raise RecipeError(
            f"The files of {folder} are for LitData's {loader}, and LitShards reads those of "
            "PyTreeLoader. Read tokens with TokenFiles and Parquet files with ParquetRows."
        )


def _decoder(formats: list[str], spec: str, *, allow_pickle: bool) -> Decode:
    from torch.utils._pytree import tree_unflatten, treespec_loads

    decoders = [lit_decoder(name, allow_pickle=allow_pickle) for name in formats]
    structure, split = treespec_loads(spec), splitter([None] * len(formats))
    is_flat = structure.type is dict and structure.num_children == len(formats)
    names = structure.context if is_flat else None

    def read(content: bytes) -> Any:
        decoded = [decode(value) for decode, value in zip(decoders, split(content), strict=True)]
        if names is not None:  # the most frequent structure, much faster
            return dict(zip(names, decoded, strict=True))
        return tree_unflatten(decoded, structure)

    return read
