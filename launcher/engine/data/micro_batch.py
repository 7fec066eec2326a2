"""What a reader returns for a request: the batch, and what it tells beside it."""

from __future__ import annotations

from typing import Any, NamedTuple

from launcher.engine.data.bad_samples import BadSample
from launcher.engine.data.sampler import MicroBatchRequest
from launcher.engine.data.streams import StreamNote


class MicroBatch(NamedTuple):
    """A micro-batch that was read for a request."""

    batch: Any
    """The collated samples."""

    request: MicroBatchRequest
    """The request."""

    items: int
    """The number of items that the loss counts: samples, or the result of the recipe's `count`."""

    samples: dict[str, Any] | None = None
    """In a trial, the descriptions of the samples by their indices; otherwise None."""

    stream: StreamNote | None = None
    """If the training data is a stream, what its reader tells beside a training micro-batch."""

    bad: tuple[BadSample, ...] = ()
    """Samples of the request that could not be read, with bad_samples=skip."""

    @property
    def has_weight(self) -> bool:
        """Whether the micro-batch has a weight in its step."""
        return self.request.has_weight
