"""Initial weights from safetensors files, of which each rank reads its own part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from launcher.engine.state.compiled import plain_name
from launcher.engine.state.fragments import Box
from launcher.engine.state.initial_values import (
    InitialValues,
    OwnPart,
    first_boxes,
    value_checksum,
)
from launcher.errors import RecipeError
from launcher.planning.weight_headers import StoredWeight, read_weight_headers

_SHOWN_NAMES = 5
"""How many names of each kind an error lists."""


class StoredWeights:
    """The weights that a recipe's `weights` names, for a model.

    Args:
        text: The setting: a safetensors file, or a folder in Hugging Face's format.
        model: The recipe's model, with or without values.
        strict: Whether the files must hold each weight and saved buffer of the model, and nothing
            else. Otherwise the model's own values stay in place of missing ones.

    Raises:
        RecipeError: The files cannot be read, hold a tensor of another shape, or, with `strict`,
            other tensors than the model.
    """

    def __init__(self, text: str, model: nn.Module, *, strict: bool) -> None:
        self._text = text
        stored = read_weight_headers(text)
        self.weights: dict[str, tuple[str, StoredWeight]] = {}
        """The stored name and place of each tensor of the model, under all its names."""
        self.parameters = {plain_name(n) for n, _ in model.named_parameters(remove_duplicate=False)}
        self.checksums: dict[str, int] = {}
        missing, misshapen, used = [], [], set()
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        for names, tensor in _saved_tensors(model):
            candidates = [*names, *(name.removeprefix(prefix) for name in names)]
            found = [name for name in candidates if name in stored]
            used |= set(found)
            if not found:
                missing.append(names[0])
            elif (shape := stored[found[0]].shape) != tuple(tensor.shape):
                misshapen.append(f"{names[0]} {shape} instead of {tuple(tensor.shape)}")
            else:
                self.weights |= dict.fromkeys(names, (found[0], stored[found[0]]))
        problems = []
        if misshapen:
            problems.append(f"other shapes than the model: {_listed(misshapen)}")
        if strict and missing:
            problems.append(f"no {_listed(missing)}, which the model has")
        if strict and (extra := sorted(stored.keys() - used)):
            problems.append(f"{_listed(extra)}, which the model does not have")
        if problems:
            remedy = (
                "Give the weights of this model, or build the model that they belong to."
                if misshapen
                else "Give the weights of this model; strict_weights=false keeps the model's own "
                "values for what is missing, and ignores the rest."
            )
            raise RecipeError(f"weights={text}: the files have {'; and '.join(problems)}. {remedy}")

    @torch.no_grad()
    def read(self, parts: Mapping[str, OwnPart]) -> dict[str, OwnPart]:
        """Fill the parts that the files hold, and return the others."""
        files: dict[Path, list[str]] = {}
        for name in parts:
            if name in self.weights:
                files.setdefault(self.weights[name][1].file, []).append(name)
        for path, names in sorted(files.items()):
            with safe_open(path, framework="pt") as file:
                for name in names:
                    stored_name, _ = self.weights[name]
                    for box, memory in parts[name].pieces:
                        memory.copy_(_read_box(file, stored_name, box))
                    if name in self.parameters:
                        boxes = first_boxes(parts[name].size)
                        first = [_read_box(file, stored_name, box).flatten() for box in boxes]
                        self.checksums[name] = value_checksum(torch.cat(first)) if first else 0
        return {name: part for name, part in parts.items() if name not in self.weights}


class WeightsBefore:
    """Initial values from files, and from elsewhere for what they do not hold.

    Args:
        stored: The weights in files.
        others: The values of the other parameters and buffers.
    """

    def __init__(self, stored: StoredWeights, others: InitialValues) -> None:
        self._stored, self._others = stored, others

    @property
    def checksums(self) -> dict[str, int]:
        """Return the checksums of the filled parameters, by name."""
        return {**self._others.checksums, **self._stored.checksums}

    def fill(self, parts: Mapping[str, OwnPart]) -> None:
        """Fill this rank's parts of all parameters and buffers."""
        self._others.fill(self._stored.read(parts))


def _read_box(file: safe_open, name: str, box: Box) -> Tensor:
    if not box.sizes:
        return file.get_tensor(name)
    return file.get_slice(name)[box.slices]


def _saved_tensors(model: nn.Module) -> Iterable[tuple[list[str], Tensor]]:
    """Yield the parameters and saved buffers of a model, each with all its names."""
    saved = {plain_name(name) for name in model.state_dict()}
    tensors: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        if plain_name(name) in saved:
            tensors.setdefault(id(tensor), ([], tensor))[0].append(plain_name(name))
    return tensors.values()


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN_NAMES
    return ", ".join(names[:_SHOWN_NAMES]) + (f" and {more:,} more" if more > 0 else "")
