"""sweep.json: what a sweep was asked, which runs it chose, and what each run came to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from launcher.errors import RunDirError
from launcher.json_file import Count, decode_values, encode_json, find_json
from launcher.paths import is_file
from launcher.recipe.validation import brief
from launcher.runs.files import write_json

FILE = "sweep.json"

TrialState = Literal["finished", "dropped", "stopped", "failed", "waiting"]
"""The states of a run in a sweep: it took all steps; the stop rule ended it; it was asked to stop;
it failed; or it has not started."""

_ASKED = ("recipe", "axes", "overrides", "metric", "stop", "eta", "min_steps")
"""What must be equal for a sweep to continue in a folder."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A setting that varies over the runs of a sweep."""

    name: str
    values: tuple[Any, ...]
    """The values, as plain values of the setting's type."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A choice of the runs that go on, made once and never again."""

    tried: tuple[Count, ...]
    """Indices of the runs among which was chosen."""

    steps: tuple[Count, ...]
    """Steps that each of them had taken."""

    values: tuple[float | None, ...]
    """The metric of each; None if the run failed, or if the metric was not finite."""

    kept: tuple[Count, ...]
    """Indices of the runs that go on."""


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """What a run of the sweep came to."""

    index: Count
    settings: Mapping[str, Any]
    """The values that distinguish the run."""

    state: TrialState
    step: Count
    """Steps taken."""

    metrics: Mapping[str, float | None]
    """Metrics of the last evaluation."""

    error: str = ""
    """Why the run failed; empty if it has not."""


@dataclass(frozen=True, kw_only=True)
class SweepRecord:
    """The content of sweep.json."""

    recipe: str
    """Location of the recipe function; one that was typed in a notebook or at a prompt is in the
    folder of the sweep, as `./recipe.py:name`."""

    folder: str
    """Working folder of the command."""

    axes: tuple[Axis, ...]
    """The settings that vary; the runs are all combinations, the last setting changing fastest."""

    overrides: Mapping[str, Any]
    """The values that replace the recipe's own in every run."""

    nproc_per_node: Annotated[int, Meta(ge=1)]
    """Ranks of each run."""

    parallel: Annotated[int, Meta(ge=1)] | None
    """Runs at a time, as asked; None is as many as there are GPUs for."""

    metric: str
    """The metric and its direction, such as accuracy:max."""

    stop: Literal["halving"] | None
    """The stop rule."""

    eta: Annotated[int, Meta(ge=2)]
    """Of every so many runs, one is kept."""

    min_steps: Annotated[int, Meta(ge=1)] | None
    """Steps before the first choice; None leaves it to the rule."""

    choices: tuple[Choice, ...] = ()
    """The choices so far."""

    trials: tuple[TrialRecord, ...] = ()
    """What each run came to so far."""

    def save(self, folder: Path) -> None:
        """Write sweep.json.

        Raises:
            RunDirError: It cannot be written.
        """
        write_json(folder / FILE, asdict(self))

    def check_same(self, other: SweepRecord, folder: Path) -> None:
        """Refuse to continue the sweep in a folder with another request.

        Args:
            other: What is asked now.
            folder: The folder of this sweep, as an absolute path.

        Raises:
            RunDirError: The recipe, a setting or the rule differs.
        """
        before, now = (
            decode_values(
                encode_json(asdict(replace(each, recipe=location_in(folder, each.recipe)))).encode()
            )
            for each in (self, other)
        )
        for name in _ASKED:
            if before[name] == now[name]:
                continue
            texts = [
                _axes_text(each.axes) if name == "axes" else f"{name}={getattr(each, name)}"
                for each in (self, other)
            ]
            raise RunDirError(
                f"{folder} holds a sweep with {brief(texts[0])}, and {brief(texts[1])} is asked "
                f"now. Give another --out, or continue it with `launcher resume {folder}`."
            )


def location_in(folder: Path, recipe: str) -> str:
    """Return the location of the recipe of the sweep in `folder`, as other processes find it."""
    return str(folder / recipe) if recipe.startswith("./") else recipe


def _axes_text(axes: Sequence[Axis]) -> str:
    return " ".join(f"{axis.name}={','.join(map(str, axis.values))}" for axis in axes)


def is_sweep(folder: Path) -> bool:
    """Return whether a folder is that of a sweep."""
    return is_file(folder / FILE)


def read_sweep(folder: Path) -> SweepRecord:
    """Return the content of sweep.json.

    Raises:
        RunDirError: The folder is not that of a sweep, or the file is damaged.
    """
    record = find_json(folder / FILE, SweepRecord)
    if record is None:
        raise RunDirError(f"{folder} is not the folder of a sweep: it has no {FILE}.")
    return record
