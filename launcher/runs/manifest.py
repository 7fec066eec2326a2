"""checkpoint.json: the manifest of a checkpoint, which describes and vouches for its other files.

The manifest holds everything except the tensors, the size and SHA-256 of every other file, and the
SHA-256 of its own content. Reading it runs no code, never blocks on a FIFO and checks every type.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec
from msgspec import Meta

from launcher.errors import CheckpointError
from launcher.json_file import (
    Count,
    DamagedJSONError,
    decode_values,
    encode_json,
    exact_floats,
    restored_floats,
)
from launcher.printable import printable_line, shortened
from launcher.regular_file import open_regular, read_regular
from launcher.runs.files import write_atomic

FORMAT = 2
"""The version of checkpoint.json and of tensor names that this version of launcher writes."""

_FORMATS = (1, FORMAT)
"""The formats that this version reads. Format 1 has no digest of checkpoint.json itself."""

MANIFEST = "checkpoint.json"
"""Name of the file in the folder of a checkpoint."""

_DIGEST = "digest"
_BYTES_PER_READ = 1 << 20
_MAX_BYTES = 1 << 28
"""Largest checkpoint.json that is read; it holds a value of each parameter and each layer."""


class ScalerState(TypedDict):
    """The state of the loss scaler in fp16."""

    scale: float
    """The loss scale."""

    good_steps: int
    """Steps in a row without overflow."""


class CallbackState(TypedDict):
    """The state of one callback."""

    name: str
    """Name of its class."""

    state: dict[str, Any]
    """What its `state_dict` returned on rank 0."""


class CallbackValues(TypedDict):
    """What a checkpoint holds of the recipe's callbacks."""

    states: list[CallbackState]
    """Those that have a state, in their order."""

    evaluation: dict[str, float]
    """The latest evaluation that the callbacks were told of; empty if there was none."""

    evaluated_step: Count | None
    """Optimizer steps taken before that evaluation; None if there was none."""


class AveragingState(TypedDict):
    """What is known of the averaged weights in a checkpoint."""

    averaging: str
    """The rule by which they were averaged, such as `ema(decay=0.999)`."""

    count: Count
    """Steps whose weights the average holds; while it is 0, there are no averaged weights."""


class BestState(TypedDict):
    """The best evaluations of a run with `keep_best`, as `launcher.runs.best` reads them."""

    keep_best: str
    """The metric and the direction by which they are compared."""

    kept: list[tuple[Count, float]]
    """Step and value of the best evaluations, the best first."""

    step: Count
    """The step of the last evaluation that was taken into account."""

    num_without_improvement: Count
    """Evaluations since the best one."""


class _RequiredValues(TypedDict):
    """The state that checkpoints of every version hold."""

    optimizer: dict[str, Any]
    """Values in the optimizer's state other than tensors, by `optimizer/<parameter>/<key>`."""

    groups: list[dict[str, Any]]
    """The values that the optimizer itself has changed, one dictionary per parameter group."""

    scaler: ScalerState | None
    """State of the loss scaler; None unless the run trains in fp16."""


class StateValues(_RequiredValues, total=False):
    """The state in a checkpoint that is not made of tensors.

    Checkpoints of earlier versions may lack the keys that this class adds.
    """

    data: dict[str, Any] | None
    """Fingerprint of the data: lengths, classes and a few samples, as
    `launcher.engine.probes.data_identity` compares them."""

    stream: dict[str, Any] | None
    """Where the stream of training data stands, as `StreamState.to_json` returns it; None for other
    data."""

    averaging: AveragingState | None
    """The state of the averaged weights; None without averaging."""

    plateaus: list[dict[str, Any]]
    """State of each `plateau` of the schedule, as `Plateau.state` returns it."""

    scalers: list[ScalerState]
    """States of the loss scalers of further objectives, in the order of their turns."""

    extra: dict[str, Any]
    """Return values of `get_extra_state`, by `extra/<module>` or `extra/<module>@<rank>`."""

    callbacks: CallbackValues | None
    """State of the recipe's callbacks; None if it has none."""

    best: BestState | None
    """The best evaluations up to this step; None without `keep_best`."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of checkpoint.json: everything in a checkpoint except its tensors."""

    format: int
    """Version of this format, one of 1 and 2."""

    step: Count
    """Optimizer steps taken."""

    samples: Count
    """Training samples consumed."""

    world_size: Annotated[int, Meta(ge=1, le=2**31)]
    """Ranks that wrote the checkpoint."""

    agreement: Mapping[str, Any]
    """The values of the plan that determine the steps, as `Plan.agreement` returns them."""

    values: StateValues
    """The state that is not made of tensors."""

    versions: Mapping[str, str]
    """Versions of Python and of the packages that wrote the checkpoint."""

    files: Mapping[str, FileDigest] = field(default_factory=dict)
    """Size and digest of every other file, by name."""


@dataclass(frozen=True, kw_only=True)
class FileDigest:
    """Size and digest of a file, by which damage is detected."""

    num_bytes: Count
    """Size of the file."""

    sha256: str
    """SHA-256 of the content, in hexadecimal."""


def load_manifest(folder: Path) -> Manifest:
    """Return the content of checkpoint.json in the folder of a checkpoint.

    Raises:
        CheckpointError: checkpoint.json is missing or damaged, or has a format that this version
            does not read.
    """
    values = _read_values(folder / MANIFEST)
    digest = values.pop(_DIGEST, None)
    file_format = values.get("format")
    if file_format not in _FORMATS:
        versions = values.get("versions")
        writer = versions.get("gpu-launcher") if isinstance(versions, dict) else None
        raise CheckpointError(
            f"{MANIFEST}: version {_short(writer or 'unknown')} of launcher wrote it in format "
            f"{_short(repr(file_format))}, and this version reads formats "
            f"{' and '.join(map(str, _FORMATS))}"
        )
    if file_format != 1 and digest != _digest(values):
        raise CheckpointError(f"{MANIFEST}: the content does not match its own SHA-256")
    try:
        return msgspec.convert(restored_floats(values), Manifest)
    except (ValueError, OverflowError, msgspec.MsgspecError) as error:
        reason = printable_line(shortened(str(error), 200))
        raise CheckpointError(f"{MANIFEST}: {reason}") from None


def save_manifest(folder: Path, manifest: Manifest) -> None:
    """Write checkpoint.json with the digest of its content, and wait until it is on the disk.

    Raises:
        RunDirError: checkpoint.json cannot be written.
    """
    write_atomic(folder / MANIFEST, encode_manifest(manifest))


def encode_manifest(manifest: Manifest) -> str:
    """Return the content of checkpoint.json, with the digest of itself."""
    # The digest covers the values as they are read back.
    values = json.loads(json.dumps(exact_floats(asdict(manifest)), allow_nan=False))
    return encode_json(values | {_DIGEST: _digest(values)}, indent=2) + "\n"


def _read_values(path: Path) -> dict[str, Any]:
    """Return the content of checkpoint.json as plain values, without checking them.

    Raises:
        CheckpointError: The file cannot be read, or does not hold a JSON object.
    """
    try:
        return decode_values(read_regular(path, _MAX_BYTES))
    except OSError as error:
        raise CheckpointError(f"{MANIFEST}: {error.strerror or error}") from None
    except DamagedJSONError as error:
        raise CheckpointError(f"{MANIFEST}: {error}") from None


def sum_file(path: Path) -> FileDigest:
    """Return the size and the SHA-256 of a file.

    Raises:
        OSError: The file cannot be read, or is not a regular file.
    """
    digest, num_bytes = hashlib.sha256(), 0
    with open_regular(path) as file:
        while block := file.read(_BYTES_PER_READ):
            digest.update(block)
            num_bytes += len(block)
    return FileDigest(num_bytes=num_bytes, sha256=digest.hexdigest())


def _digest(values: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the content of checkpoint.json, whatever the order and whitespace."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _short(value: Any) -> str:
    return printable_line(shortened(str(value), 60))
