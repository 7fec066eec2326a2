"""`log`: numbers of a recipe's own, which its loss and forward report while they train."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from launcher.errors import RecipeError
from launcher.recipe.validation import show

RECORDED = frozenset(
    (
        *("step", "epoch", "samples", "items", "time", "loss", "lr", "momentum", "grad_norm"),
        *("samples_per_second", "step_seconds", "data_wait_seconds", "communication_seconds"),
        *("noise_scale", "checkpoint_seconds", "checkpoint_stall_seconds", "checkpoint_failed"),
        *("checkpoint_write_seconds", "checkpoint_bytes"),
    )
)
"""Names under which a run records numbers itself."""

_MAX_NAME = 100

Receiver = Callable[[str, Any, Any], None]
"""Takes the arguments of `log`."""


def _ignore(name: str, total: Any, count: Any) -> None:
    """Do nothing: no micro-batch is being trained on."""


_receiver: Receiver = _ignore
"""A function at any time: torch.compile may keep a branch that depends on it."""


def log(name: str, sum: Any, count: Any) -> None:  # noqa: A002  # as a loss returns them
    """Record a number in this training step, from inside the loss or forward of a recipe.

    The numbers of all micro-batches and ranks are added, and the mean, sum / count, is recorded as
    `train/NAME` in the step's row of metrics.jsonl, in reports, trackers and the progress of the
    run. As with a loss, `sum` must not be a mean.

    Tensors stay on their device, and nothing waits for their values. Evaluations, micro-batches
    without samples, and activations that are computed again in the backward pass count nothing. In
    code that torch.compile compiles, a call breaks the graph.

    Args:
        name: The name, such as `accuracy`; a step in which it is not logged has no value.
        sum: Sum over some items: a number, or a tensor with one.
        count: Number of these items, likewise.

    Raises:
        RecipeError: The name cannot be used, or a value is not a single number.
    """
    _receiver(name, sum, count)


# torch.compile calls such a function as it is, and compiles what is before and after the call.
log._torchdynamo_disable = True  # type: ignore[attr-defined]  # noqa: SLF001


def set_receiver(receiver: Receiver | None) -> None:
    """Let calls of `log` go to a function; None ignores them."""
    global _receiver  # noqa: PLW0603
    _receiver = _ignore if receiver is None else receiver


def is_received() -> bool:
    """Return whether calls of `log` count at this moment."""
    return _receiver is not _ignore


@contextlib.contextmanager
def without_log(place: str) -> Iterator[None]:
    """Refuse calls of `log` in this context.

    Args:
        place: Where they would be, for the error message.
    """

    def refuse(name: str, *_: Any) -> None:
        raise RecipeError(
            f"launcher.log({name!r}, ...) was called in {place}. Call it in the loss or in "
            "forward, whose numbers belong to a step."
        )

    set_receiver(refuse)
    try:
        yield
    finally:
        set_receiver(None)


def check_logged_name(place: str, name: Any) -> None:
    """Refuse a name that cannot stand beside those of a run.

    Raises:
        RecipeError: It is not text on one line, or the run records a number of that name itself.
    """
    is_text = isinstance(name, str) and name.isprintable() and name == name.strip()
    if not (is_text and 0 < len(name) <= _MAX_NAME):
        raise RecipeError(
            f"{place}: expected a name of at most {_MAX_NAME} characters on one line, found "
            f"{show(name)}."
        )
    if name in RECORDED:
        raise RecipeError(
            f"{place}: the run itself records a number called {name!r}. Choose another name."
        )
