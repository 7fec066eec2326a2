"""The final weights of a run, in one safetensors file."""

from __future__ import annotations

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from launcher.engine.backends.base import state_dict_names
from launcher.engine.state.compiled import plain_name
from launcher.errors import RecipeError, TrainingError
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.rundir import RunDir


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


def save_weights(weights: dict[str, Tensor], run_dir: RunDir) -> None:
    """Write the weights as safetensors, atomically.

    Tensors that share memory are written as separate copies.

    Args:
        weights: Names and full tensors.
        run_dir: The run folder.

    Raises:
        TrainingError: The file cannot be written. Resuming the run tries to write it again.
    """
    temporary = run_dir.model.with_suffix(".tmp")
    try:
        temporary.unlink(missing_ok=True)  # a link would be followed
        safetensors.torch.save_file(_unshare(weights), str(temporary), metadata={"format": "pt"})
        temporary.replace(run_dir.model)
    except (OSError, RuntimeError, ValueError, KeyError, safetensors.SafetensorError) as error:
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
        temporary.unlink(missing_ok=True)


def _unshare(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights with tensors that share memory copied."""
    separate: dict[str, Tensor] = {}
    used_addresses: set[int] = set()
    for name, tensor in weights.items():
        dense = tensor.detach().contiguous()
        address = dense.untyped_storage().data_ptr()
        separate[name] = dense.clone() if address in used_addresses else dense
        used_addresses.add(address)
    return separate
