"""The final weights as a file of safetensors."""

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
    """Refuse, before anything is trained, a model whose weights no file of safetensors can hold.

    Raises:
        RecipeError: A weight or a buffer is sparse, quantised, or of a type without a name there.
    """
    tensors = model.state_dict()
    refused: dict[torch.dtype, str] = {}
    for name in state_dict_names(model):
        tensor = tensors[name]
        why = None
        if tensor.layout != torch.strided:
            why = f"is {str(tensor.layout).removeprefix('torch.')}"
        else:
            if tensor.dtype not in refused:
                refused[tensor.dtype] = _refusal(tensor.dtype)
            if refused[tensor.dtype]:
                why = f"is of type {str(tensor.dtype).removeprefix('torch.')}"
        if why is not None:
            raise RecipeError(
                f"The model's {plain_name(name)} {why}, which safetensors, the format of "
                "checkpoints and of the final weights, cannot hold. Keep it as dense numbers of a "
                "common type; a buffer that need not be saved takes persistent=False."
            )


def _refusal(dtype: torch.dtype) -> str:
    """Return why safetensors cannot hold a type, or an empty text."""
    try:
        safetensors.torch.save({"value": torch.empty(1, dtype=dtype)})
    except Exception as error:  # noqa: BLE001  # which it raises differs from type to type
        return str(error) or type(error).__name__
    return ""


def save_weights(weights: dict[str, Tensor], run_dir: RunDir) -> None:
    """Write the weights as safetensors, whole or not at all.

    Tensors that share memory are written one by one, as copies.

    Raises:
        TrainingError: They cannot be written. The run can be resumed, which tries it again.
    """
    beside = run_dir.model.with_suffix(".tmp")
    try:
        safetensors.torch.save_file(_separate(weights), str(beside), metadata={"format": "pt"})
        beside.replace(run_dir.model)
    except (OSError, RuntimeError, ValueError, KeyError, safetensors.SafetensorError) as error:
        again = "No checkpoint could be saved either."
        if list_checkpoints(run_dir):
            again = f"`launcher resume {run_dir.shown}` writes them from the last checkpoint."
        raise TrainingError(
            f"All steps are taken, and the weights cannot be written to {run_dir.model}: {error}. "
            f"{again}"
        ) from None
    finally:
        beside.unlink(missing_ok=True)


def _separate(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights with no memory shared between them."""
    separate: dict[str, Tensor] = {}
    used: set[int] = set()
    for name, tensor in weights.items():
        dense = tensor.detach().contiguous()
        place = dense.untyped_storage().data_ptr()
        separate[name] = dense.clone() if place in used else dense
        used.add(place)
    return separate
