"""Final weights in the layout that `from_pretrained` of Hugging Face's libraries loads.

A model's folder has config.json and the weights, in one file or in several with an index. The
folder of a model with adapters of peft has the adapter alone.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from launcher.engine.state.compiled import plain_name
from launcher.errors import LauncherError, RecipeError, RunDirError
from launcher.json_file import encode_json, finite
from launcher.paths import is_dir, is_file
from launcher.quantities import size
from launcher.recipe.recipe import Recipe
from launcher.recipe.resolve import user_code_error
from launcher.runs.files import unwritable_error
from launcher.runs.rundir import RunDir
from launcher.tensor_file import (
    TensorFile,
    copy_tensors,
    read_tensor_file,
)

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"

_METADATA = {"format": "pt", "producer": "launcher export"}
"""What the files of weights say about themselves: transformers needs the first."""

_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
"""torch's names of floating-point types, by those of safetensors."""

_SHOWN_NAMES = 5


@dataclass(frozen=True, kw_only=True)
class Export:
    """A folder that was written."""

    kind: str
    """The class that loads it, such as LlamaForCausalLM or PeftModel."""

    num_weights: int
    """Number of weights and other values in it."""

    num_bytes: int
    """Number of bytes of these."""

    num_files: int
    """Number of files that hold them."""


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """The content of a folder."""

    kind: str
    texts: Mapping[str, str]
    """Content of the files that are text, by name."""

    files: Mapping[str, Mapping[str, str]]
    """For each file of weights the tensors in it: names in the run, and names in the file."""


def build_without_values(recipe: Recipe) -> nn.Module:
    """Return the recipe's model on the meta device, or on the CPU if it cannot be built there.

    Raises:
        RecipeError: The recipe's model function fails, or returns something else.
    """
    try:
        with torch.device("meta"):
            model = recipe.model()
    except LauncherError:
        raise
    except Exception:  # noqa: BLE001  # transformers refuses to load weights there, for example
        try:
            model = recipe.model()
        except LauncherError:
            raise
        except Exception as error:
            raise user_code_error("build the model of", recipe.name, error) from error
    if not isinstance(model, nn.Module):
        raise RecipeError(
            f"The recipe's model function returned {type(model).__name__}; expected a "
            "torch.nn.Module."
        )
    return model


def export_weights(
    run_dir: RunDir, model: nn.Module, folder: Path, *, max_shard_bytes: int
) -> Export:
    """Write the final weights of a run to a folder, completely or not at all.

    Args:
        run_dir: The run, which has final weights.
        model: The recipe's model, with or without values.
        folder: The folder to write. It may exist if it is empty, or if this function wrote it.
        max_shard_bytes: Largest size of the tensors in a file.

    Raises:
        RecipeError: The model does not say what transformers needs to know, or has other weights
            than the run.
        RunDirError: A file cannot be read or written, or the folder is somebody else's.
    """
    check_export(run_dir, folder)
    source = read_tensor_file(run_dir.model)
    names = _check_weights(model, source, run_dir)
    if hasattr(model, "peft_config"):
        layout = _adapter_layout(model, source)
    else:
        layout = _model_layout(model, source, names, max_shard_bytes)
    written = [source.tensors[name] for names in layout.files.values() for name in names]
    num_bytes = sum(tensor.num_bytes for tensor in written)
    try:
        with _new_folder(folder) as temporary:
            _check_space(temporary, num_bytes)
            for file, names_in_file in layout.files.items():
                copy_tensors(source, temporary / file, names_in_file, _METADATA)
            for file, text in layout.texts.items():
                (temporary / file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise unwritable_error(folder, error) from None
    return Export(
        kind=layout.kind,
        num_weights=sum(torch.Size(tensor.shape).numel() for tensor in written),
        num_bytes=num_bytes,
        num_files=len(layout.files),
    )


def check_export(run_dir: RunDir, folder: Path) -> None:
    """Refuse a run without final weights, and a folder that is not for `export_weights` to replace.

    Raises:
        RunDirError: The run has no final weights; or the folder exists, is not empty, and was
            written by somebody else.
    """
    if not is_file(run_dir.model):
        raise RunDirError(
            f"{run_dir.shown} has no {run_dir.model.name}: a run writes its final weights after "
            f"its last step. `launcher resume {run_dir.shown}` takes the steps that are missing; "
            "with steps=N it ends after N steps."
        )
    if not os.path.lexists(folder):
        return
    problem = ""
    if not is_dir(folder) or folder.is_symlink():
        problem = "is not a folder"
    elif foreign := _foreign_file(folder):
        problem = f"has {foreign}, which this command did not write"
    if problem:
        raise RunDirError(f"--hf {folder}: it exists and {problem}. Give a folder that is new.")


def _foreign_file(folder: Path) -> str:
    """Return the name of a file in a folder that `export_weights` did not write, or nothing."""
    names = sorted(path.name for path in folder.iterdir())
    texts = {CONFIG, INDEX, ADAPTER_CONFIG}
    weights = [name for name in names if name not in texts]
    for name in weights:
        try:
            if read_tensor_file(folder / name).metadata != _METADATA:
                return name
        except RunDirError:
            return name
    return "" if weights or not names else names[0]


def _check_weights(model: nn.Module, source: TensorFile, run_dir: RunDir) -> list[str]:
    """Return the names of a run's weights in the order of the model.

    Raises:
        RecipeError: The model has other weights than the run.
    """
    tensors: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            tensors.setdefault(id(tensor), ([], tensor))[0].append(plain_name(name))
    ordered, problems = [], []
    for shared, tensor in tensors.values():
        found = [name for name in shared if name in source.tensors]
        ordered += found
        if not found:
            problems.append(f"no {shared[0]}")
        elif (shape := source.tensors[found[0]].shape) != tuple(tensor.shape):
            problems.append(f"{found[0]} of shape {shape} instead of {tuple(tensor.shape)}")
    known = {name for shared, _ in tensors.values() for name in shared}
    problems += [f"{name}, which the model lacks" for name in source.tensors if name not in known]
    if problems:
        more = len(problems) - _SHOWN_NAMES
        listed = "; ".join(problems[:_SHOWN_NAMES]) + (f"; and {more:,} more" if more > 0 else "")
        raise RecipeError(
            f"{run_dir.model} has other weights than the model that the recipe builds now: "
            f"{listed}. Export with the code and the settings of the run, which its run.yaml names."
        )
    return ordered


def _model_layout(
    model: nn.Module, source: TensorFile, names: list[str], max_shard_bytes: int
) -> _Layout:
    config = _read_config(model)
    floats = Counter(
        {
            _DTYPES[tensor.dtype]: tensor.num_bytes
            for tensor in source.tensors.values()
            if tensor.dtype in _DTYPES
        }
    )
    if floats:
        config.pop("torch_dtype", None)
        config["dtype"] = floats.most_common(1)[0][0]
    shards: list[list[str]] = [[]]
    filled = 0
    for name in names:
        num_bytes = source.tensors[name].num_bytes
        if shards[-1] and filled + num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += num_bytes
    texts = {CONFIG: _json(config)}
    if len(shards) == 1:
        files = {WEIGHTS: shards[0]}
    else:
        stem, count = WEIGHTS.removesuffix(".safetensors"), len(shards)
        files = {
            f"{stem}-{number:05}-of-{count:05}.safetensors": shard
            for number, shard in enumerate(shards, start=1)
        }
        total = sum(tensor.num_bytes for tensor in source.tensors.values())
        places = {name: file for file, shard in files.items() for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        texts[INDEX] = _json(index)
    return _Layout(
        kind=str((config.get("architectures") or [config["model_type"]])[0]),
        texts=texts,
        files={file: {name: name for name in shard} for file, shard in files.items()},
    )


def _read_config(model: nn.Module) -> dict[str, Any]:
    """Return the content of config.json for a model.

    Raises:
        RecipeError: The model has no `config` from which it can be written.
    """
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        config = config.to_dict()
        config["architectures"] = config.get("architectures") or [type(model).__name__]
    problem = ""
    if config is None:
        problem = "has no attribute `config`"
    elif not isinstance(config, Mapping):
        problem = f"has a `config` of type {type(config).__name__}"
    elif not isinstance(config.get("model_type"), str):
        problem = "has a `config` without a text as model_type"
    else:
        try:
            return dict(json.loads(_json(_tagged(dict(config)))))
        except (TypeError, ValueError) as error:
            problem = f"has a `config` that cannot be written as JSON: {error}"
    raise RecipeError(
        f"The recipe's model, a {type(model).__name__}, {problem}, and from_pretrained needs a "
        "config.json. In the recipe, set an attribute `config` of the model: a configuration of "
        'transformers, or a dict such as {"architectures": ["LlamaForCausalLM"], "model_type": '
        '"llama", "hidden_size": 128, ...}, as launcher.recipes.pretrain_lm does. The weights '
        "must have the names that this class of transformers gives them."
    )


def _adapter_layout(model: nn.Module, source: TensorFile) -> _Layout:
    """Return the folder of the adapter of a model of peft, which names the model under it.

    Raises:
        RecipeError: The model has several adapters.
    """
    from peft import get_peft_model_state_dict

    adapters: Any = model.peft_config
    if len(adapters) != 1:
        raise RecipeError(
            f"The recipe's model has {len(adapters)} adapters of peft: {', '.join(adapters)}. "
            "A folder holds one; let the recipe build a model with one adapter."
        )
    ((name, config),) = adapters.items()
    tensors: dict[str, Any] = {
        name: torch.empty(tensor.shape, device="meta") for name, tensor in source.tensors.items()
    }
    names = {id(tensor): name for name, tensor in tensors.items()}
    chosen = get_peft_model_state_dict(
        model, tensors, adapter_name=name, save_embedding_layers=False
    )
    values = config.to_dict() | {"inference_mode": True}
    if lost := [key for key, value in values.items() if _tagged(value) != finite(value)]:
        raise RecipeError(
            f"The configuration of the adapter has NaN or an infinity in {', '.join(lost)}, which "
            "JSON lacks, so that peft could not read it back. Give it a number."
        )
    base = getattr(getattr(model, "base_model", None), "model", model)
    values["base_model_name_or_path"] = values.get("base_model_name_or_path") or getattr(
        base, "name_or_path", None
    )
    return _Layout(
        kind="PeftModel",
        texts={ADAPTER_CONFIG: _json(_plain(values))},
        files={ADAPTER: {names[id(tensor)]: target for target, tensor in chosen.items()}},
    )


def _plain(value: Any) -> Any:
    """Return a value with sets as lists, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return sorted(value) if isinstance(value, set) else value


def _tagged(value: Any) -> Any:
    """Return a value in which NaN and infinities, which JSON lacks, are as transformers 5 has them.

    They become {"__float__": "NaN"}, {"__float__": "Infinity"} and {"__float__": "-Infinity"}, of
    which from_pretrained makes numbers again.
    """
    if isinstance(value, Mapping):
        return {key: _tagged(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_tagged(inner) for inner in value]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    name = "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return {"__float__": name}


def _json(values: Mapping[str, Any]) -> str:
    return encode_json(values, indent=2) + "\n"


def _check_space(folder: Path, num_bytes: int) -> None:
    """Refuse to write more bytes than the disk has free.

    Raises:
        RunDirError: It has fewer.
    """
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise RunDirError(
            f"The weights need {size(num_bytes)}, and the disk of {folder.parent} has "
            f"{size(free)} free. Free some space, or give a folder on another disk as --hf."
        )


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Make a folder that gets its name, in place of an earlier one, if the context succeeds.

    Raises:
        OSError: It cannot be made or renamed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    earlier = folder.with_name(f".{folder.name}.{os.getpid()}.earlier.tmp")
    temporary.mkdir()
    try:
        yield temporary
        if folder.exists():
            folder.rename(earlier)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(earlier, ignore_errors=True)
