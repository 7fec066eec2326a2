"""A recipe that calls `breakpoint()`, or whose shapes do not fit, in its second step."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from worlds import cross_entropy, worlds

from launcher import Data, Recipe, main

if TYPE_CHECKING:
    from torch import Tensor

How = Literal["breakpoint", "sample", "shape", "nothing"]

calls = 0


class Debugged:
    """Samples of another data set, of which one stops in the debugger."""

    def __init__(self, samples: Any) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Any:
        if index == 200:
            breakpoint()  # noqa: T100
        return self._samples[index]


def debugged(*, how: How, ranks: str = "0") -> Recipe:
    """Digits that stop in the debugger in the second step of some ranks."""

    def loss(logits: Tensor, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        global calls  # noqa: PLW0603
        calls += logits.requires_grad  # count neither the trial nor evaluations
        if calls == 2:
            if how == "breakpoint" and os.environ.get("RANK", "0") in ranks:
                breakpoint()  # noqa: T100
            if how == "shape":
                cut = logits[:, :3]
                return (cut @ logits).sum(), len(batch[1])
        return cross_entropy(logits, batch)

    def data() -> Data:
        data = worlds().data()
        return replace(data, train=Debugged(data.train)) if how == "sample" else data

    return replace(
        worlds(),
        name="debugged",
        loss=loss,
        data=data,
        num_workers=1,
        hang_timeout={"start": 30.0, "step": 1.5},
        steps=4,
        epochs=None,
    )


if __name__ == "__main__":
    main(debugged)
