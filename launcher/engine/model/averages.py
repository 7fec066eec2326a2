"""The average of the weights over the steps of a run, kept beside them and sharded like them.

Each rank averages the weights that it updates: its shard under FSDP, its partition in fp32 under
ZeRO. An average is taken element by element, so it has equal bits wherever the weights have. It is
kept in fp32 for weights in fewer bits. The running statistics of norms are averaged with the same
shares, because those of the last step would belong to other weights. Everything else in the model,
frozen weights and other buffers, is that of the last step.

A step that is skipped because its gradient is not finite leaves the weights as they are, and they
enter the average once more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from launcher.engine.backends.base import Backend, local_values
from launcher.engine.model.batch_norm import BatchNorms
from launcher.engine.state.fragments import Fragment
from launcher.engine.state.module_state import saved_slots
from launcher.engine.state.training_state import StateSource
from launcher.planning.plan import Plan
from launcher.recipe.averaging import Averaging
from launcher.runs.manifest import AveragingState

_PREFIX = "average/"


class Averages:
    """The averages of this rank's part of a model.

    Args:
        averaging: Which steps are averaged, and with which shares.
        plan: The plan of the run.
        backend: This rank among the others.
        model: The module that `Backend.prepare` returned.
        batch_norms: The norms of the model.
    """

    def __init__(
        self,
        averaging: Averaging,
        plan: Plan,
        backend: Backend,
        model: nn.Module,
        batch_norms: BatchNorms,
    ) -> None:
        self._averaging, self._every = averaging, averaging.every
        self._first_step = averaging.first_step(plan.total_steps)
        self._backend, self._model, self._norms = backend, model, batch_norms
        self._weights = backend.updated_weights(model)
        self._values = [torch.zeros_like(w, dtype=_dtype_for(w)) for w in self._weights]
        self._has_same_dtypes = all(w.dtype == _dtype_for(w) for w in self._weights)
        self._are_sharded = any(isinstance(weight, DTensor) for weight in self._weights)
        statistics = batch_norms.running_statistics()
        self._sizes = [buffer.numel() for buffer in statistics]
        self._statistics = torch.cat(statistics) if statistics else None
        self.count = 0
        """Number of steps whose weights the average holds. While it is 0, evaluations are of the
        weights themselves."""

    def adopt(self, plan: Plan) -> None:
        """Average from now on over the steps of a plan that replaces the first one."""
        self._first_step = self._averaging.first_step(plan.total_steps)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Let the weights after `step` steps enter the average, if the rule includes them."""
        if step < self._first_step or (step - self._first_step) % self._every:
            return
        share = self._averaging.share(self.count)
        weights, values = self._weights, self._values
        if self._are_sharded:
            weights, values = local_values(weights), local_values(values)
        if not self.count:
            torch._foreach_copy_(values, weights)
        elif self._has_same_dtypes:
            torch._foreach_lerp_(values, weights, share)
        else:
            for value, weight in zip(values, weights, strict=True):
                value.lerp_(weight.to(value.dtype), share)
        self._update_statistics(share)
        self.count += 1

    def _update_statistics(self, share: float) -> None:
        """Average the running statistics, of which a skipped step may have made some NaN."""
        if self._statistics is None:
            return
        now = torch.cat(self._norms.running_statistics())
        now = torch.where(now.isfinite(), now, self._statistics)
        self._statistics.lerp_(now, share)

    @contextlib.contextmanager
    def evaluated(self) -> Iterator[None]:
        """Put the averages in place of the weights and statistics, in this context (collective).

        The weights have the same bits afterwards. After an exception they are not put back: other
        ranks would not take part in it.
        """
        if not self.count:
            yield
            return
        kept = self._exchange()
        self._backend.use_updated(self._model)
        with self._norms.replaced(self._statistics_by_buffer(), self._backend):
            yield
        self._exchange(kept)
        self._backend.use_updated(self._model)

    @torch.no_grad()
    def _exchange(self, kept: dict[int, Tensor] | None = None) -> dict[int, Tensor]:
        """Exchange weights and averages, or put back the weights that an earlier call returned.

        Weights in fewer bits than their averages are returned, because they cannot hold these.
        """
        back, kept = kept is not None, {} if kept is None else kept
        pairs = zip(local_values(self._weights), local_values(self._values), strict=True)
        for index, (weight, value) in enumerate(pairs):
            if back and index in kept:
                weight.copy_(kept.pop(index))
                continue
            own = weight.clone()
            weight.copy_(value)
            if weight.dtype == value.dtype:
                value.copy_(own)
            else:
                kept[index] = own
        return kept

    def _statistics_by_buffer(self) -> list[Tensor]:
        return [] if self._statistics is None else list(self._statistics.split(self._sizes))

    def state(self) -> AveragingState:
        """Return what a checkpoint says of the average."""
        return {"averaging": str(self._averaging), "count": self.count}

    def tensors_to_save(self) -> Iterator[tuple[str, Tensor | Fragment]]:
        """Yield this rank's part of the averages for a checkpoint; nothing while there is none."""
        if not self.count:
            return
        for name, value in self._backend.name_updated(self._model, self._values):
            yield f"{_PREFIX}{name}", value
        for name, label, value in self._named_statistics():
            # As a fragment, because each rank saves its own.
            yield f"{_PREFIX}{name}@{label}", Fragment(values=value, start=0, size=value.shape)

    def _named_statistics(self) -> Iterator[tuple[str, str, Tensor]]:
        """Yield the name of each averaged statistic, the rank or virtual rank, and the average."""
        virtual = self._backend.virtual_buffers
        if virtual is not None:
            names = [(name, f"v{number}") for number, name in virtual.floating_names()]
        else:
            by_id = {
                id(slot.buffer): name
                for name, slot in saved_slots(self._backend.unwrap(self._model)).items()
            }
            rank = str(self._backend.rank)
            names = [(by_id[id(buffer)], rank) for buffer in self._norms.running_statistics()]
        for (name, label), value in zip(names, self._statistics_by_buffer(), strict=True):
            yield name, label, value

    @torch.no_grad()
    def restore(self, source: StateSource) -> str | None:
        """Read the averages from a checkpoint, which any number of ranks may have written.

        Returns:
            Why the average begins anew, for the user; None if it goes on.
        """
        self.count, saved = 0, source.values.get("averaging")
        if source.steps < self._first_step:
            has_begun = saved is not None and saved["count"]
            return f"{self._averaging} begins later in this run" if has_begun else None
        anew = f"{self._averaging} begins anew"
        if saved is None or not saved["count"]:
            return f"it holds no averaged weights; {anew}"
        if saved["averaging"].partition("(")[0] != self._averaging.name:
            return f"it holds averages by {saved['averaging']}; {anew}"
        if not self._read(source):
            return f"it lacks averages of some weights; {anew}"
        self.count = saved["count"]
        return None

    def _read(self, source: StateSource) -> bool:
        """Fill the averages; return whether the source has all of them."""
        known = set(source.names())
        for plain, part in self._backend.name_updated(self._model, self._values):
            name = f"{_PREFIX}{plain}"
            if name not in known:
                return False
            if isinstance(part, Tensor):
                source.read({name: part})
                continue
            full = torch.empty(part.size, dtype=source.dtype(name))
            source.read({name: full})
            part.values.copy_(full.flatten()[part.start : part.start + part.values.numel()])
        return self._read_statistics(source, known)

    def _read_statistics(self, source: StateSource, known: set[str]) -> bool:
        """Fill the averages of statistics: those of this rank, or the mean over those of all."""
        by_name: dict[str, list[str]] = {}
        for full_name in known:
            name, at, _ = full_name.partition("@")
            if at and name.startswith(_PREFIX):
                by_name.setdefault(name, []).append(full_name)
        same_ranks = source.world_size == self._backend.world_size
        for name, label, value in self._named_statistics():
            saved, own = sorted(by_name.get(f"{_PREFIX}{name}", [])), f"{_PREFIX}{name}@{label}"
            if not saved:
                return False
            if own in saved and (same_ranks or label.startswith("v")):
                saved = [own]
            tensors = {each: torch.empty(value.shape, dtype=source.dtype(each)) for each in saved}
            source.read({**tensors})
            value.copy_(torch.stack([tensor.double() for tensor in tensors.values()]).mean(0))
        return True


def _dtype_for(weight: Tensor) -> torch.dtype:
    """Return the dtype in which the average of a weight is kept."""
    return torch.float32 if weight.dtype in (torch.bfloat16, torch.float16) else weight.dtype
