"""Data sets whose tensors lie on the device of a rank, which makes its batches there by index."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from launcher.engine.backends.transfers import upload_tensor
from launcher.errors import RecipeError
from launcher.printable import kind_of
from launcher.quantities import size
from launcher.recipe.evaluation_sets import split_of
from launcher.recipe.recipe import Data


def is_indexed(dataset: Any, collate: Callable[[list[Any]], Any] | None) -> bool:
    """Return whether indexing the tensors of a data set gives the batches of the data set."""
    return type(dataset) is TensorDataset and collate is None


class DeviceData:
    """Copies of a recipe's tensors on a device, and batches of them.

    Evaluation sets that are not tensors in memory stay where they are.

    Args:
        data: The data of a recipe.
        device: The device of the rank. On a CPU nothing is copied.

    Raises:
        RecipeError: The training set is no TensorDataset, has a collate function, holds a sparse
            tensor, or does not fit into the free memory of the device.
    """

    def __init__(self, data: Data, device: torch.device) -> None:
        sets = {"train": (data.train, data.collate)} | {
            split_of(name): (each.data, each.collate or data.collate)
            for name, each in data.evaluation_sets().items()
        }
        _check_train(*sets["train"])
        found: dict[str, tuple[Tensor, ...]] = {
            split: dataset.tensors
            for split, (dataset, collate) in sets.items()
            if is_indexed(dataset, collate)
        }
        distinct = {id(tensor): tensor for tensors in found.values() for tensor in tensors}
        _check_dense(distinct.values())
        _check_memory(distinct.values(), device)
        copies = {key: tensor.to(device) for key, tensor in distinct.items()}
        self._device = device
        self._tensors = {
            split: [copies[id(tensor)] for tensor in tensors] for split, tensors in found.items()
        }

    def batch(self, split: str, indices: Tensor) -> list[Tensor] | None:
        """Return the batch of some samples on the device; None if the set is not there.

        The host does not wait for the device.

        Args:
            split: The data set.
            indices: The samples, int64 of shape (N,), in memory of the host.
        """
        tensors = self._tensors.get(split)
        if tensors is None:
            return None
        places = upload_tensor(indices, self._device)
        return [tensor[places] for tensor in tensors]


def _check_train(dataset: Any, collate: Callable[[list[Any]], Any] | None) -> None:
    """Refuse a training set whose batches are not made by indexing tensors.

    Raises:
        RecipeError: It is no TensorDataset, or has a collate function.
    """
    if is_indexed(dataset, collate):
        return
    is_tensors = type(dataset) is TensorDataset
    found = "a TensorDataset with a collate function" if is_tensors else kind_of(dataset)
    raise RecipeError(
        "data_on_device=true makes each batch by indexing tensors on the device, which takes "
        f"Data(train=torch.utils.data.TensorDataset(...)) without collate; found {found}. Return "
        "the training samples as tensors and let forward do what remains, or set "
        "data_on_device=false."
    )


def _check_dense(tensors: Iterable[Tensor]) -> None:
    """Refuse sparse tensors, whose rows cannot be taken by a tensor of indices.

    Raises:
        RecipeError: There is one.
    """
    for tensor in tensors:
        if tensor.layout is not torch.strided:
            layout = str(tensor.layout).removeprefix("torch.")
            raise RecipeError(
                "data_on_device=true makes each batch by indexing dense tensors, and a "
                f"TensorDataset of the recipe holds one of layout {layout} and shape "
                f"{tuple(tensor.shape)}. Keep it dense, with to_dense(), or set "
                "data_on_device=false."
            )


def _check_memory(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Refuse tensors that the free memory of a device cannot hold.

    Raises:
        RecipeError: They are larger.
    """
    if device.type == "cpu":
        return
    needed = sum(t.numel() * t.element_size() for t in tensors if t.device != device)
    free, _ = torch.get_device_module(device).mem_get_info(device)
    if needed > free:
        raise RecipeError(
            f"data_on_device=true copies the data sets to each device. They take {size(needed)}, "
            f"and {device} has {size(free)} free, which the model needs a part of. Set "
            "data_on_device=false, so that batches are copied one by one, or keep smaller values, "
            "such as uint8 pixels that forward converts."
        )
