"""Linear layers whose frozen weights are kept in 4 bits, as QLoRA keeps the weights that it adapts.

Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs" (arXiv:2305.14314). Each weight is
one of 16 values (NF4) times the scale of its block of 64 within a row: 4.5 bits with a scale in
float32. Codes and scales are bytes of one tensor with the rows of the weight. Strategies shard it
like any weight, no setting of precision changes it, and it needs no further package or GPU.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

BLOCK = 64
"""Elements that share a scale."""

_SCALE_BYTES = 4

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The values of the codes: quantiles of a normal distribution, from the article."""


class FourBitLinear(nn.Module):
    """A linear layer with a frozen weight in 4 bits, and a frozen bias as it was.

    Gradients flow to its inputs. The weight is computed again in backward instead of being kept.

    Args:
        layer: The layer whose weight and bias are taken.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.packed = nn.Parameter(packed(layer.weight.detach()), requires_grad=False)
        self.bias: nn.Parameter | None = None
        if layer.bias is not None:
            self.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the outputs, of shape (..., out_features), in the dtype of the inputs.

        Under autocast, matrix products are in its dtype.
        """
        device = inputs.device.type
        if torch.is_autocast_enabled(device):
            inputs = inputs.to(torch.get_autocast_dtype(device))
        outputs: Tensor = _Product.apply(inputs, self.packed, self.in_features)
        return outputs if self.bias is None else outputs + self.bias.to(outputs.dtype)

    def extra_repr(self) -> str:
        """Return the sizes, as nn.Linear shows them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bits=4"


class _Product(torch.autograd.Function):
    """The product with a weight that is unpacked for it, in forward and again in backward."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, packed: Tensor, columns: int) -> Tensor:
        """Return inputs of shape (..., columns) times the transposed weight."""
        ctx.save_for_backward(packed)
        ctx.columns = columns
        with torch.autocast(inputs.device.type, enabled=False):
            return functional.linear(inputs, unpacked(packed, columns, inputs.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of the inputs."""
        (packed,) = ctx.saved_tensors
        (gradient,) = gradients
        with torch.autocast(gradient.device.type, enabled=False):
            return gradient @ unpacked(packed, ctx.columns, gradient.dtype), None, None


def four_bits(layer: nn.Linear) -> FourBitLinear:
    """Return a linear layer with the same weight, frozen, in 4 bits."""
    return FourBitLinear(layer)


def packed(weight: Tensor) -> Tensor:
    """Return a weight of shape (rows, columns) as bytes of shape (rows, bytes of a row).

    The bytes of a row are the scales of its blocks in float32, and two codes in each byte.
    """
    missing = -weight.shape[1] % BLOCK
    blocks = functional.pad(weight.float(), (0, missing)).unflatten(1, (-1, BLOCK))
    scales = blocks.abs().amax(-1)
    scaled = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
    values = _values(weight.device)
    codes = torch.bucketize(scaled, (values[1:] + values[:-1]) / 2).to(torch.uint8).flatten(1)
    pairs = codes[:, 0::2] | codes[:, 1::2] << 4
    return torch.cat([scales.contiguous().view(torch.uint8), pairs], dim=1)


def unpacked(packed: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Return the weight of shape (rows, columns) that `packed` has made bytes of."""
    num_blocks = -(-columns // BLOCK)
    scales = packed[:, : num_blocks * _SCALE_BYTES].contiguous().view(torch.float32)
    pairs = packed[:, num_blocks * _SCALE_BYTES :]
    codes = torch.stack([pairs & 0xF, pairs >> 4], dim=-1).view(packed.shape[0], num_blocks, BLOCK)
    weight = _values(packed.device)[codes.int()] * scales.unsqueeze(-1)
    return weight.flatten(1)[:, :columns].to(dtype)


@functools.cache
def _values(device: torch.device) -> Tensor:
    """Return the values of the codes on a device, to which they are copied once."""
    return torch.tensor(NF4, device=device)
