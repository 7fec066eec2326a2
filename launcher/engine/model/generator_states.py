"""The states of torch's generators while a model is recorded and replayed.

While a model is recorded, no numbers are drawn, so a generator does not advance. A model function
may still save its state and set it again, as `torch.random.fork_rng` does, or seed it. After each
recorded draw the generator therefore gets a state of its own, a token, which stands for the state
that it will have after this draw when the operations are replayed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

_WORDS = 3, 4
"""The places, in a state of 8-byte words, of the first two numbers of the Mersenne twister.

The words before them hold the initial seed, which a token keeps.
"""

_MARK = 0x6C61756E


@dataclass(frozen=True, kw_only=True)
class StateChange:
    """A recorded change of a generator's state that is no draw."""

    generator: torch.Generator

    state: Tensor | None
    """The new state; None takes that after a draw."""

    draw: int = -1
    """The number of the draw after which the generator had the state."""


@dataclass(kw_only=True)
class _Known:
    generator: torch.Generator
    initial: Tensor
    last: bytes
    """The state after the last recorded draw or change."""


@dataclass
class GeneratorTokens:
    """Recognises what a model function does to generators between its draws."""

    _known: dict[int, _Known] = field(default_factory=dict)
    _draws: dict[bytes, int] = field(default_factory=dict)
    """The number of the draw that each token stands for."""

    _num_draws: int = 0

    saved_after: set[int] = field(default_factory=set)
    """The draws after which a replay must keep the state."""

    def __post_init__(self) -> None:
        self._watch(torch.default_generator)

    def before_draw(self, generator: torch.Generator | None) -> tuple[StateChange | None, int]:
        """Return how the state has changed since the last draw, if it has, and this draw's number.

        Args:
            generator: The generator; None is torch's default generator.
        """
        used = torch.default_generator if generator is None else generator
        is_new = id(used) not in self._known
        known = self._watch(used)
        change = StateChange(generator=used, state=known.initial) if is_new else self._change(known)
        number = self._num_draws
        self._num_draws += 1
        words = known.initial.clone().view(torch.int64)
        words[_WORDS[0]], words[_WORDS[1]] = number, _MARK
        token = words.view(torch.uint8)
        used.set_state(token)
        known.last = _bytes(used.get_state())
        self._draws[known.last] = number
        return change, number

    def finish(self) -> list[StateChange]:
        """Set all generators to their first states, and return their changes since the last draw.

        The default generator's first state is that before the recording.
        """
        changes = [self._change(known) for known in self._known.values()]
        for known in self._known.values():
            known.generator.set_state(known.initial)
        return [change for change in changes if change is not None]

    def _watch(self, generator: torch.Generator) -> _Known:
        if id(generator) not in self._known:
            state = generator.get_state()
            self._known[id(generator)] = _Known(
                generator=generator, initial=state, last=_bytes(state)
            )
        return self._known[id(generator)]

    def _change(self, known: _Known) -> StateChange | None:
        state = known.generator.get_state()
        key = _bytes(state)
        if key == known.last:
            return None
        known.last = key
        if key in self._draws:
            draw = self._draws[key]
            self.saved_after.add(draw)
            return StateChange(generator=known.generator, state=None, draw=draw)
        return StateChange(generator=known.generator, state=state)


class ReplayedStates:
    """The states that the generators have after some of the replayed draws.

    Args:
        saved_after: The draws after which a state is kept.
    """

    def __init__(self, saved_after: set[int]) -> None:
        self._saved_after = saved_after
        self._states: dict[int, Tensor] = {}

    def after_draw(self, number: int, generator: torch.Generator | None) -> None:
        """Keep the state after a draw, if a later change needs it."""
        if number in self._saved_after:
            used = torch.default_generator if generator is None else generator
            self._states[number] = used.get_state()

    def apply(self, change: StateChange) -> None:
        """Repeat a change."""
        state = self._states[change.draw] if change.state is None else change.state
        change.generator.set_state(state)


def _bytes(state: Tensor) -> bytes:
    return state.numpy().tobytes()
