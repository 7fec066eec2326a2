"""The optimizers of several objectives, seen as one by what saves, restores and evaluates them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

OF = "@"
"""Stands between the name of a state and that of the objective, as in `exp_avg@critic`."""


class JointOptimizer(Optimizer):
    """The optimizers of several objectives as one, which takes no steps itself.

    Its parameter groups are theirs, one optimizer after the other. The state of a parameter is that
    of the first optimizer that updates it; if further ones update it as well, their states are
    named after their objectives.

    Args:
        optimizers: The optimizer of each objective by its name, in the order of their turns.
    """

    def __init__(self, optimizers: Mapping[str, Optimizer]) -> None:
        # Without the constructor of torch, which would refuse parameters that are shared.
        self.optimizers = tuple(optimizers.values())
        self.defaults: dict[str, Any] = {}
        self.param_groups = [group for each in self.optimizers for group in each.param_groups]
        self.state: Any = _JointState(optimizers)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Refuse to take a step: each objective's optimizer takes its own."""
        raise NotImplementedError

    def eval(self) -> None:
        """Replace the weights of optimizers that evaluate others than they train."""
        for optimizer in self.optimizers:
            getattr(optimizer, "eval", lambda: None)()

    def train(self) -> None:
        """Put back the weights with which training goes on."""
        for optimizer in self.optimizers:
            getattr(optimizer, "train", lambda: None)()


class _JointState(MutableMapping[Tensor, dict[str, Any]]):
    """The state of each parameter in all optimizers that update it."""

    def __init__(self, optimizers: Mapping[str, Optimizer]) -> None:
        self._states: dict[Tensor, list[tuple[str, Optimizer]]] = {}
        for name, optimizer in optimizers.items():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    owners = self._states.setdefault(parameter, [])
                    owners.append((f"{OF}{name}" if owners else "", optimizer))

    def __getitem__(self, parameter: Tensor) -> dict[str, Any]:
        return {
            f"{key}{suffix}": value
            for suffix, optimizer in self._states[parameter]
            for key, value in optimizer.state.get(parameter, {}).items()
        }

    def __setitem__(self, parameter: Tensor, state: dict[str, Any]) -> None:
        for suffix, optimizer in self._states[parameter]:
            own = {
                key.removesuffix(suffix): value
                for key, value in state.items()
                if (key.endswith(suffix) if suffix else OF not in key)
            }
            if own:
                optimizer.state[parameter] = own

    def __delitem__(self, parameter: Tensor) -> None:
        for _, optimizer in self._states[parameter]:
            optimizer.state.pop(parameter, None)

    def clear(self) -> None:
        """Drop the states. A parameter stays, with an empty state, unlike in other mappings."""
        for parameter in self:
            del self[parameter]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._states)

    def __len__(self) -> int:
        return len(self._states)


def evaluates_others(optimizer: Optimizer) -> bool:
    """Return whether an optimizer, or one in it, evaluates other weights than it trains."""
    return any(hasattr(each, "eval") for each in optimizers_in(optimizer))


def optimizers_in(optimizer: Optimizer) -> tuple[Optimizer, ...]:
    """Return the optimizers of the objectives, or the optimizer itself if there is one."""
    return optimizer.optimizers if isinstance(optimizer, JointOptimizer) else (optimizer,)
