"""The final weights of a run, in one safetensors file."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from launcher.engine.backends.base import WeightKind, state_dict_names
from launcher.engine.state.compiled import plain_name
from launcher.errors import RecipeError, TrainingError
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.rundir import RunDir
from launcher.tensor_file import encode_header


def check_savable(model: nn.Module) -> None:
    """Check, before training starts, that safetensors can hold the model's weights and buffers.

    Raises:
        RecipeError: A weight or buffer is sparse, quantised, or of a dtype that safetensors does
            not support.
    """
    tensors = model.state_dict()
    dtype_errors: dict[torch.dtype, str] = {}
    for name in state_dict_names(model):
        tensor = tensors[name]
        problem = None
        if tensor.layout != torch.strided:
            problem = f"is {str(tensor.layout).removeprefix('torch.')}"
        else:
            if tensor.dtype not in dtype_errors:
                dtype_errors[tensor.dtype] = _dtype_error(tensor.dtype)
            if dtype_errors[tensor.dtype]:
                problem = f"has dtype {str(tensor.dtype).removeprefix('torch.')}"
        if problem is not None:
            raise RecipeError(
                f"The model's {plain_name(name)} {problem}, which safetensors, the format of "
                "checkpoints and final weights, does not support. Store it as a dense tensor of a "
                "common dtype, or register a buffer that need not be saved with persistent=False."
            )


def _dtype_error(dtype: torch.dtype) -> str:
    """Return why safetensors cannot hold a dtype, or an empty string if it can."""
    try:
        safetensors.torch.save({"value": torch.empty(1, dtype=dtype)})
    except Exception as error:  # noqa: BLE001  # the exception's type depends on the dtype
        return str(error) or type(error).__name__
    return ""


def save_weights(
    weights: Iterable[tuple[str, Tensor]], kinds: Mapping[str, WeightKind], run_dir: RunDir
) -> None:
    """Write the weights as safetensors, atomically, one tensor after the other.

    Tensors that share memory are written as separate copies.

    Args:
        weights: Names and full tensors. All of them are taken even if they cannot be written,
            because other ranks take part in gathering each of them.
        kinds: Their types and sizes.
        run_dir: The run folder.

    Raises:
        TrainingError: The file cannot be written. Resuming the run tries to write it again.
    """
    temporary = run_dir.model.with_suffix(".tmp")
    try:
        _write(temporary, weights, kinds)
        temporary.replace(run_dir.model)
    except OSError as error:
        for _ in weights:
            pass
        remedy = "There is no checkpoint to write them from."
        if list_checkpoints(run_dir):
            remedy = (
                f"To write them from the last checkpoint, use `launcher resume {run_dir.shown}`."
            )
        raise TrainingError(
            f"The run took all its steps, but the final weights cannot be written to "
            f"{run_dir.model}: {error}. {remedy}"
        ) from None
    finally:
        with contextlib.suppress(OSError):  # the error above says more
            temporary.unlink(missing_ok=True)


def _write(
    path: Path, weights: Iterable[tuple[str, Tensor]], kinds: Mapping[str, WeightKind]
) -> None:
    """Write a safetensors file, whose tensors may come in any order.

    Raises:
        OSError: It cannot be written.
    """
    # Large elements come first, so that each tensor is aligned to the size of its elements.
    ordered = sorted(kinds.items(), key=lambda item: -item[1].dtype.itemsize)
    sizes = {name: kind.size.numel() * kind.dtype.itemsize for name, kind in ordered}
    header = encode_header(
        [(name, _stored_name(kind.dtype), kind.size, sizes[name]) for name, kind in ordered],
        {"format": "pt"},
    )
    *offsets, _ = itertools.accumulate(sizes.values(), initial=len(header))
    starts = dict(zip(sizes, offsets, strict=True))
    path.unlink(missing_ok=True)  # a link would be followed
    with path.open("xb") as file:
        file.write(header)
        for name, tensor in weights:
            start = starts.pop(name)
            content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            if len(content) != sizes[name]:
                raise RuntimeError(f"{name} has {len(content):,} bytes, not {sizes[name]:,}.")
            file.seek(start)
            file.write(content.data)
        if starts:
            raise RuntimeError(f"{next(iter(starts))} was not gathered.")
        file.flush()
        os.fsync(file.fileno())


def _stored_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype in safetensors files, as safetensors itself writes it."""
    file = safetensors.torch.save({"value": torch.empty(1, dtype=dtype)})
    header = json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])
    return str(header["value"]["dtype"])
