"""A recipe that fails in a given way."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from worlds import Noisy, cross_entropy, worlds

from launcher import Data, Recipe, main

if TYPE_CHECKING:
    from torch import Tensor

How = Literal[
    "raise", "kill", "exit", "sample", "worker-killed", "empty", "count", "mean", "nan", "nan-once",
    "data", "hang", "sleep", "sleeping-worker", "stopped", "raise-once", "leave", "extra",
    "mute", "quit", "orphan", "worker-quit", "kill-beside-c",
    "hang-start", "hang-evaluation", "hang-save"
]  # fmt: skip


def failing(*, how: How, rank: int = 0) -> Recipe:
    """Digits that fail in the way `how`, on `rank` if the failure concerns a single rank."""
    recipe = replace(worlds(), name="failing", num_workers=1)
    if how in ("sleep", "sleeping-worker", "stopped", "extra"):
        recipe = replace(recipe, hang_timeout={"start": 8.0, "step": 2.0})
    if how.startswith("hang-"):
        return _hang_in(how.removeprefix("hang-"), rank, recipe)
    if how in _ENDS or how == "nan-once":
        return replace(recipe, loss=lambda *args: _fail_at_second_call(how, rank, *args))
    if how == "nan":
        return replace(recipe, loss=_not_a_number)
    if how == "mean":
        return replace(recipe, loss=_mean)
    if how == "count":
        return replace(recipe, loss=lambda *args: (_sum(*args), 1))
    return replace(recipe, data=lambda: _data(how))


def _hang_in(phase: str, rank: int, recipe: Recipe) -> Recipe:
    """Return a recipe that hangs in a phase on one rank, after the trial of the first samples."""

    def build_model() -> Any:
        from torch import nn

        class Saved(nn.Module):
            def get_extra_state(self) -> None:
                if phase == "save" and calls:
                    _sleep_on(rank)

            def set_extra_state(self, _: None) -> None:
                pass

            def forward(self, inputs: Tensor) -> Tensor:
                return inputs

        if phase == "start":
            _sleep_on(rank)
        return nn.Sequential(recipe.model(), Saved())

    def loss(logits: Tensor, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        global calls  # noqa: PLW0603
        calls += logits.requires_grad
        if phase == "evaluation" and calls and not logits.requires_grad:
            _sleep_on(rank)
        return cross_entropy(logits, batch)

    return replace(recipe, model=build_model, loss=loss)


def _sleep_on(rank: int) -> None:
    if int(os.environ.get("RANK", "0")) == rank:
        time.sleep(1000)


calls = 0


def _fail_at_second_call(
    how: str, rank: int, logits: Tensor, batch: tuple[Tensor, Tensor]
) -> tuple[Tensor, int]:
    global calls  # noqa: PLW0603
    calls += logits.requires_grad  # count neither the trial before the first step nor evaluations
    if how == "kill-beside-c" and calls == 2 and int(os.environ.get("RANK", "0")) != rank:
        _wait_in_c()
    if calls == (5 if how == "raise-once" else 2) and int(os.environ.get("RANK", "0")) == rank:
        if how == "nan-once":
            total, count = cross_entropy(logits, batch)
            return total * float("nan"), count
        _ENDS[how]()
    return cross_entropy(logits, batch)


def _raise() -> None:
    raise ValueError("the loss of rank one")


class _Mute(BaseException):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def _raise_mute() -> None:
    raise _Mute


def _orphan() -> None:
    """Fail while a process that this rank has forked runs on for a while."""
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    _raise()


def _wait_in_c() -> None:
    """Wait for ever in a call that no signal interrupts, as in one of NCCL whose peer has died."""
    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    for _ in range(2):
        library.pthread_mutex_lock(mutex)


def _raise_once() -> None:
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        _raise()


def _hang() -> None:
    print("hanging", flush=True)
    while True:
        signal.pause()


def _extra() -> None:
    import torch.distributed

    torch.distributed.barrier()


_ENDS: dict[str, Callable[[], object]] = {
    "raise": _raise,
    "raise-once": _raise_once,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "kill-beside-c": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exit": lambda: os._exit(7),
    "leave": lambda: os._exit(0),
    "mute": _raise_mute,
    "quit": lambda: sys.exit(0),
    "orphan": _orphan,
    "extra": _extra,
    "hang": _hang,
    "sleep": lambda: time.sleep(1000),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}
"""The failures in the second call of the loss (the fifth for raise-once)."""


def _sum(logits: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(logits, batch)[0]


def _mean(logits: Tensor, batch: tuple[Tensor, Tensor]) -> Any:
    return _sum(logits, batch) / len(batch[1])


def _not_a_number(logits: Tensor, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    return _sum(logits, batch) * float("nan"), len(batch[1])


class _Broken(Noisy):
    how = ""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == 77:
            if self.how == "worker-killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "worker-quit":
                sys.exit(0)
            if self.how == "sleeping-worker":
                time.sleep(1000)
            raise OSError("truncated file")
        return super().__getitem__(index)


def _data(how: str) -> Data:
    if how == "data":
        raise FileNotFoundError("no folder /data/images")
    if how == "empty":
        return Data(train=[])
    broken = _Broken(0, 250, 0.0)
    broken.how = how
    return Data(train=broken)


if __name__ == "__main__":
    main(failing)
