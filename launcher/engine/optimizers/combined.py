"""Optimizers of different weights, seen as one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import torch
from torch.optim import Optimizer


class CombinedOptimizer(Optimizer):
    """Optimizers that each update some of the weights, as one optimizer of them all.

    Its parameter groups are theirs, one optimizer after the other, and they keep their state in
    that of the whole.

    Args:
        parts: New optimizers of different weights.
    """

    def __init__(self, *parts: Optimizer) -> None:
        groups = list(chain.from_iterable(part.param_groups for part in parts))
        super().__init__(groups, {})
        self.param_groups, self.parts = groups, parts
        for part in parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take a step for the weights that the groups hold now (collective).

        DeepSpeed takes a step for one group after the other: it leaves out the other groups, or
        takes the weights out of them.

        Args:
            closure: Not supported; None.
        """
        assert closure is None
        now = {id(group) for group in self.param_groups if group["params"]}
        for part in self.parts:
            groups = part.param_groups
            part.param_groups = [group for group in groups if id(group) in now]
            try:
                if part.param_groups:
                    part.step()
            finally:
                part.param_groups = groups
