"""BatchNorm's running statistics of each virtual rank that a rank computes.

With `Recipe.virtual_ranks`, the statistics belong to a virtual rank and not to the rank that
computes it. A rank therefore holds one copy of them for each of its virtual ranks, and the modules
use that of the virtual rank whose micro-batch they see.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from launcher.engine.state.module_state import saved_slots, virtual_name
from launcher.engine.state.training_state import StateSource


class VirtualBuffers:
    """The running statistics of all norms of a model, a copy for each virtual rank of this rank.

    Args:
        model: The recipe's own module, on its device.
        virtual_ranks: The virtual ranks of this rank.
        count: The number of virtual ranks of all ranks.
    """

    def __init__(self, model: nn.Module, virtual_ranks: Sequence[int], count: int) -> None:
        self.count = count
        self._slots = {
            name: slot
            for name, slot in saved_slots(model).items()
            if isinstance(slot.module, _NormBase) and slot.buffer is not None
        }
        self._copies: dict[int, dict[str, Tensor]] = {}
        for virtual_rank in virtual_ranks:
            self._copies[virtual_rank] = {
                name: slot.buffer.clone()
                for name, slot in self._slots.items()
                if slot.buffer is not None
            }
        self.select(virtual_ranks[0])

    @property
    def names(self) -> set[str]:
        """Return the names of the buffers that have a copy for each virtual rank."""
        return set(self._slots)

    def select(self, virtual_rank: int) -> None:
        """Let the modules use the copies of a virtual rank."""
        for name, buffer in self._copies[virtual_rank].items():
            self._slots[name].put(buffer)

    def floating_copies(self) -> list[Tensor]:
        """Return all copies of means and variances on this rank."""
        return [
            buffer
            for copies in self._copies.values()
            for buffer in copies.values()
            if buffer.is_floating_point()
        ]

    @torch.no_grad()
    def average(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Replace means and variances by their mean over all virtual ranks (collective).

        The mean is computed from the values of all virtual ranks in one order, so its bits do not
        depend on the number of ranks. Until the next `select`, the modules use it, and the largest
        number of batches of any virtual rank.

        Args:
            sum_over_ranks: Returns a tensor summed over ranks.
        """
        for name, buffer in self._merged(self._copies, sum_over_ranks).items():
            self._slots[name].put(buffer)
            if buffer.is_floating_point():
                for copies in self._copies.values():
                    copies[name].copy_(buffer)

    def _merged(
        self, copies: Mapping[int, Mapping[str, Tensor]], sum_over_ranks: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """Return the mean of each buffer over all virtual ranks (collective).

        A count is the largest one of any virtual rank.

        Args:
            copies: The buffers of each virtual rank of this rank.
            sum_over_ranks: Returns a tensor summed over ranks.
        """
        merged = {name: buffer.clone() for name, buffer in next(iter(copies.values())).items()}
        if not merged:
            return {}
        sizes = [buffer.numel() for buffer in merged.values()]
        device = next(iter(merged.values())).device
        table = torch.zeros(self.count, sum(sizes), dtype=torch.float64, device=device)
        for virtual_rank, buffers in copies.items():
            table[virtual_rank] = torch.cat([buffers[name].double().flatten() for name in merged])
        columns = sum_over_ranks(table).split(sizes, dim=1)
        for buffer, values in zip(merged.values(), columns, strict=True):
            is_count = not buffer.is_floating_point()
            buffer.copy_((values.amax(0) if is_count else values.mean(0)).view(buffer.shape))
        return merged

    @contextlib.contextmanager
    def replaced(
        self, values: Iterable[Tensor], sum_over_ranks: Callable[[Tensor], Tensor]
    ) -> Iterator[None]:
        """Let the modules use the mean over virtual ranks of other statistics here (collective).

        Args:
            values: A tensor for each of `floating_copies`.
            sum_over_ranks: Returns a tensor summed over ranks.
        """
        remaining = iter(values)
        copies = {
            virtual_rank: {
                name: next(remaining)
                for name, buffer in buffers.items()
                if buffer.is_floating_point()
            }
            for virtual_rank, buffers in self._copies.items()
        }
        merged = self._merged(copies, sum_over_ranks)
        own = {name: self._slots[name].buffer for name in merged}
        for name, buffer in merged.items():
            self._slots[name].put(buffer)
        yield
        for name, before in own.items():
            self._slots[name].put(before)

    def floating_names(self) -> list[tuple[int, str]]:
        """Return the virtual rank and the name of each of `floating_copies`."""
        return [
            (virtual_rank, name)
            for virtual_rank, copies in self._copies.items()
            for name, buffer in copies.items()
            if buffer.is_floating_point()
        ]

    def to_save(self) -> Iterator[tuple[str, Tensor]]:
        """Yield host copies of the statistics of this rank's virtual ranks, by name."""
        for virtual_rank, copies in self._copies.items():
            for name, buffer in copies.items():
                yield virtual_name(name, virtual_rank), buffer.detach().cpu().clone()

    @torch.no_grad()
    def read(self, source: StateSource) -> None:
        """Fill the copies from a checkpoint, whatever number of ranks wrote it.

        A checkpoint of a run without virtual ranks has filled the modules; its statistics are taken
        for every virtual rank.
        """
        saved = set(source.names())
        targets: dict[str, Tensor] = {}
        for virtual_rank, copies in self._copies.items():
            for name, buffer in copies.items():
                full_name = virtual_name(name, virtual_rank)
                if full_name in saved:
                    size = source.size(full_name) or ()
                    targets[full_name] = torch.empty(size, dtype=source.dtype(full_name))
                else:
                    current = self._slots[name].buffer
                    assert current is not None
                    buffer.copy_(current)
        if targets:
            source.read(targets)
        for virtual_rank, copies in self._copies.items():
            for name, buffer in copies.items():
                if (full_name := virtual_name(name, virtual_rank)) in targets:
                    buffer.copy_(targets[full_name])
        self.select(next(iter(self._copies)))
