"""Sequences of a fixed number of tokens, packed from documents whose boundaries are kept.

Padding every document to one length wastes what the shorter ones do not fill. Packing puts several
documents into one sequence: best fit, in windows of documents in a seeded order (Johnson, "Fast
algorithms for bin packing", 1974; for language models Krell et al., arXiv:2107.02027). Which
documents share a sequence follows from the lengths and the seed alone.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from launcher.engine.data.order import compact, whole_numbers
from launcher.engine.data.permutation import Permutation
from launcher.engine.data.sample_files import file_of
from launcher.errors import RecipeError, SampleError
from launcher.printable import kind_of

IGNORED = -100
"""Target without a next token: the last of a document, and padding."""

WINDOW = 4096
"""Documents that are packed together by default."""

_DTYPE = np.int64


class Packed:
    """A map-style data set of sequences of `tokens` tokens, packed from documents.

    A sample is a mapping of arrays of shape (tokens,):

    - `input_ids`: the tokens of its documents, then padding.
    - `targets`: the next token of the same document; -100 at the last token of each document and at
      padding, which cross-entropy ignores.
    - `position_ids`: the position in the document, from 0 in each; padding is a document as well.
    - `document_ids`: 1, 2, ... for the documents, and 0 for padding. Tokens attend to earlier
      tokens of the same number: see `attention_mask` and `cumulative_lengths`.

    Args:
        documents: The data set of documents: arrays, lists or tensors of token ids, or mappings
            with `input_ids`.
        lengths: The number of tokens of each document. None takes the attribute `lengths` of
            `documents`, or else reads every document once.
        tokens: Tokens of a sample.
        seed: Determines which documents are packed together.
        window: Documents that are packed together; more leave less padding.
        padding: The token of padding.
        long: What happens to a document of more than `tokens` tokens: it is refused, split into
            several documents, or cut after `tokens`.
        read: Function from a sample of `documents` to its token ids; None for those above.

    Raises:
        RecipeError: Lengths do not fit the documents, or a document is too long or all are empty.
    """

    def __init__(
        self,
        documents: Any,
        lengths: Any = None,
        *,
        tokens: int = 2048,
        seed: int = 0,
        window: int = WINDOW,
        padding: int = 0,
        long: Literal["refuse", "split", "cut"] = "refuse",
        read: Callable[[Any], Any] | None = None,
    ) -> None:
        for name, value in {"tokens": tokens, "window": window}.items():
            if not isinstance(value, int) or value < 1:
                raise RecipeError(f"Packed({name}={value}): expected a whole number of at least 1.")
        if long not in ("refuse", "split", "cut"):
            raise RecipeError(f"Packed(long={long!r}): expected refuse, split or cut.")
        self._documents, self._read = documents, read
        self.tokens, self._padding = tokens, padding
        self._lengths = self._find_lengths(lengths)
        owners, starts = _pieces(self._lengths.astype(np.int64), tokens, long)
        sizes = np.minimum(self._lengths[owners] - starts, tokens)
        order = Permutation(len(owners), seed, 0)(np.arange(len(owners)))
        members, counts = np.empty_like(order), []
        for first in range(0, len(order), window):
            part = order[first : first + window]
            packs = best_fit(sizes[part], tokens)
            chosen = np.fromiter(itertools.chain.from_iterable(packs), _DTYPE, len(part))
            members[first : first + window] = part[chosen]
            counts.append(np.fromiter(map(len, packs), _DTYPE, len(packs)))
        self._owners, self._starts = compact(owners[members]), compact(starts[members])
        self._ends = np.cumsum(np.concatenate(counts))
        self._used = int(sizes.sum())

    @property
    def tokens_per_sample(self) -> int:
        """Return the number of tokens of a sample, padding included."""
        return self.tokens

    @property
    def waste(self) -> float:
        """Return the fraction of all tokens that is padding."""
        return 1 - self._used / (len(self) * self.tokens)

    @property
    def waste_unpacked(self) -> float:
        """Return the fraction that would be padding with one document, or piece, per sample."""
        return 1 - self._used / (len(self._owners) * self.tokens)

    def __len__(self) -> int:
        return len(self._ends)

    def __str__(self) -> str:
        return (
            f"{len(self._owners):,} documents in {len(self):,} samples of {self.tokens:,} tokens: "
            f"{self.waste:.1%} padding, instead of {self.waste_unpacked:.1%} with one per sample"
        )

    def __getitem__(self, index: int) -> dict[str, NDArray[np.int64]]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        sample = {
            "input_ids": np.full(self.tokens, self._padding, _DTYPE),
            "targets": np.full(self.tokens, IGNORED, _DTYPE),
            "position_ids": np.zeros(self.tokens, _DTYPE),
            "document_ids": np.zeros(self.tokens, _DTYPE),
        }
        first, place = int(self._ends[index - 1]) if index else 0, 0
        for number, member in enumerate(range(first, int(self._ends[index])), 1):
            ids = self._ids_of(int(self._owners[member]), int(self._starts[member]))
            stop = place + len(ids)
            sample["input_ids"][place:stop] = ids
            sample["targets"][place : stop - 1] = ids[1:]
            sample["position_ids"][place:stop] = np.arange(len(ids))
            sample["document_ids"][place:stop] = number
            place = stop
        sample["position_ids"][place:] = np.arange(self.tokens - place)
        return sample

    def file_of(self, index: int) -> str | None:
        """Return the files that hold the documents of a sample, if the data set tells them."""
        members = range(int(self._ends[index - 1]) if index else 0, int(self._ends[index]))
        files = (file_of(self._documents, int(self._owners[member])) for member in members)
        return ", ".join(dict.fromkeys(name for name in files if name is not None)) or None

    def fingerprint(self) -> str:
        """Return a text that changes with the packing and the index of the documents."""
        inner = getattr(self._documents, "fingerprint", None)
        index = str(inner()) if callable(inner) else ""
        parts = (self._owners, self._starts, self._ends, self._lengths)
        digest = hashlib.sha256(b"".join(part.tobytes() for part in parts) + index.encode())
        return f"packed, {self.tokens:,} tokens a sample, {digest.hexdigest()[:16]}"

    def _ids_of(self, document: int, start: int) -> NDArray[np.int64]:
        """Return the tokens of a document, or of its piece from `start` on.

        Raises:
            SampleError: The document has another number of tokens than its length says.
        """
        ids = _ids(self._documents[document], self._read)
        if len(ids) != self._lengths[document]:
            raise SampleError(
                f"Packed: document {document:,} has {len(ids):,} tokens, and its length was "
                f"{self._lengths[document]:,}. Give the lengths of the documents as they are read."
            )
        return ids[start : start + self.tokens]

    def _find_lengths(self, lengths: Any) -> NDArray[np.integer[Any]]:
        if lengths is None:
            lengths = getattr(self._documents, "lengths", None)
        if lengths is None:
            documents = (self._documents[index] for index in range(len(self._documents)))
            lengths = [len(_ids(document, self._read)) for document in documents]
        return compact(whole_numbers(lengths, "Packed(lengths=...)", len(self._documents)))


def _ids(document: Any, read: Callable[[Any], Any] | None) -> NDArray[np.int64]:
    """Return the token ids of a document.

    Raises:
        RecipeError: It is no row of whole numbers.
    """
    if read is not None:
        document = read(document)
    elif isinstance(document, Mapping):
        document = document["input_ids"]
    ids = np.asarray(document)
    if ids.ndim != 1 or (ids.dtype.kind not in "iu" and len(ids)):
        raise RecipeError(
            f"Packed: a document is {kind_of(document)}, expected a row of token ids or a mapping "
            "with input_ids. Give Packed(read=...) a function that returns the ids."
        )
    return ids.astype(_DTYPE)


def _pieces(
    lengths: NDArray[np.int64], tokens: int, long: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the document and the first token of each piece that is packed.

    Raises:
        RecipeError: A document is too long, or none has tokens.
    """
    if not lengths.any():
        raise RecipeError(f"Packed: all {len(lengths):,} documents are empty.")
    longest = int(lengths.argmax())
    if long == "refuse" and lengths[longest] > tokens:
        raise RecipeError(
            f"Packed: document {longest:,} has {lengths[longest]:,} tokens, more than the "
            f"{tokens:,} of a sample. Use long='split' to make several documents of it, "
            "long='cut' to drop its end, or more tokens."
        )
    counts = -(-lengths // tokens) if long == "split" else (lengths > 0).astype(_DTYPE)
    owners = np.repeat(np.arange(len(lengths)), counts)
    firsts = np.repeat(np.cumsum(counts) - counts, counts)
    return owners, (np.arange(len(owners)) - firsts) * tokens


def best_fit(sizes: Sequence[int] | NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Pack items into as few bins as best fit finds, the longest items first.

    Args:
        sizes: Size of each item, from 1 to `capacity`.
        capacity: Size of a bin.

    Returns:
        The items of each bin, by their indices.
    """
    bins: list[list[int]] = []
    bins_by_space: dict[int, list[int]] = {}
    spaces = 0  # bit s is set if some bin has space s left
    for item in np.argsort(-np.asarray(sizes), kind="stable").tolist():
        size = int(sizes[item])
        fitting = spaces >> size
        if fitting:
            space = size + (fitting & -fitting).bit_length() - 1
            owners = bins_by_space[space]
            chosen = owners.pop()
            if not owners:
                spaces ^= 1 << space
        else:
            space, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(item)
        if left := space - size:
            bins_by_space.setdefault(left, []).append(chosen)
            spaces |= 1 << left
    return bins


def attention_mask(document_ids: Any) -> Any:
    """Return which tokens attend to which, for scaled_dot_product_attention.

    Args:
        document_ids: Numbers of documents, a tensor of shape (N, T).

    Returns:
        A tensor of truth values of shape (N, 1, T, T): True where the second token is not later
        and belongs to the same document.
    """
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    return same.tril()


def cumulative_lengths(position_ids: Any) -> Any:
    """Return where documents begin in the tokens of a batch, as attention of variable length needs.

    Args:
        position_ids: Positions that are 0 at the start of each document, a tensor of shape (N, T).

    Returns:
        A tensor of int32: the place of each start among the N x T tokens in a row, and N x T
        (`cu_seqlens` of FlashAttention).
    """
    import torch

    starts = (position_ids.flatten() == 0).nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([position_ids.numel()])]).to(torch.int32)
