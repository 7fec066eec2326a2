"""Gradients under ZeRO-3 of weights that backward does not reach in every pass.

DeepSpeed writes the gradient of a weight into a buffer when backward reaches the weight. In the
first pass of a step it overwrites the buffer, and in later ones it adds to it. A weight that the
first pass does not reach, such as one of an expert without samples, would keep the gradient of an
earlier step there. With the optimizer offloaded, DeepSpeed also hands on no gradient of a weight
that the last pass does not reach.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


class PartitionedGradients:
    """This rank's partitions of gradients: zeros for weights that no pass of a step reaches.

    Args:
        zero: DeepSpeed's optimizer of stage 3.
        rank: This rank.
    """

    def __init__(self, zero: Any, rank: int) -> None:
        self._zero = zero
        buffers: dict[int, Tensor] = zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition  # noqa: SLF001
        self._buffers = {
            parameter.ds_id: buffers[parameter.ds_id]
            for group in zero.fp16_groups
            for parameter in group
            if parameter.partition_numel() * rank < parameter.ds_numel
        }
        self._is_first = True

    def end_pass(self, *, last: bool) -> None:
        """Complete the gradients after a backward pass.

        Args:
            last: Whether the pass is the last one of its step.
        """
        reached = self._zero._offload_boundary_param_ids  # noqa: SLF001
        if self._is_first:
            for key, buffer in self._buffers.items():
                if key not in reached:
                    buffer.zero_()
        self._is_first = last
        if last and self._zero.offload_optimizer:
            self._hand_on()

    def _hand_on(self) -> None:
        """Give an offloaded optimizer the gradients of weights that the last pass has not reached.

        DeepSpeed has done so for all others, and notes the norms of what it has handed on.
        """
        zero = self._zero
        zero._offload_boundary_param_ids = {  # noqa: SLF001
            parameter.ds_id
            for group in zero.fp16_groups
            for parameter in group
            if parameter.ds_id in self._buffers
            and zero.get_param_id(parameter) not in zero.norm_for_param_grads
        }
        zero._finalize_offload_gradient_accumulation()  # noqa: SLF001
