"""Whether a plan can resume a run from a checkpoint, and what it changes about the run."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from launcher.errors import CheckpointError
from launcher.planning.plan import Plan
from launcher.recipe.affects import Affects
from launcher.recipe.recipe import Recipe, settings_affecting
from launcher.runs.manifest import Manifest

_ORDER = ("shuffle", "shuffle_window")
"""Settings that determine the order of the samples; older checkpoints have their defaults."""

_ORDER_DEFAULTS = {item.name: item.default for item in fields(Recipe) if item.name in _ORDER}


def check_resumable(
    manifest: Manifest, plan: Plan, name: str, accept: Collection[str] = ()
) -> None:
    """Refuse a plan whose steps would take other samples than those of the run so far.

    Where the number of training samples is known to only one of the two, and the checkpoint holds
    a fingerprint of the data, the ranks compare the data instead.

    Args:
        manifest: The manifest of the checkpoint.
        plan: The plan that would resume the run.
        name: Name of the checkpoint, for the message.
        accept: What the user lets differ: with `data` the number of training samples may.

    Raises:
        CheckpointError: The recipe, batch size, stages, seed or number of training samples differ;
            the message names the first that does, with both values.
    """
    before, now = manifest.agreement, json.loads(json.dumps(plan.agreement()))
    before = _ORDER_DEFAULTS | dict(before)
    for key in (*_required_equal(), *_orders(before, now)):
        if key == "batch_size" and None in (before.get(key), now.get(key)):
            continue  # the stages, which follow from it, are compared instead
        if key == "train_samples" and (
            "data" in accept
            or (None in (before.get(key), now.get(key)) and manifest.values.get("data") is not None)
        ):
            continue
        if before.get(key) != now.get(key):
            hint = ""
            if key == "batch_size" and now.get("batch_size_per_gpu") is not None:
                hint = " (batch_size_per_gpu makes it follow the number of ranks)"
            if key == "train_samples":
                hint = " (`--accept data` resumes with other data on purpose)"
            raise CheckpointError(
                f"{name} was written with {key} {before.get(key)}, and the plan has {now.get(key)}"
                f"{hint}: the steps would take other samples. Resume with {key} "
                f"{before.get(key)}, or start a new run."
            )


def setting_changes(manifest: Manifest, plan: Plan) -> list[str]:
    """Return the settings that the plan changes, each as `name old -> new`, sorted by name.

    Settings that change no step are not reported.
    """
    before, now = manifest.agreement, json.loads(json.dumps(plan.agreement()))
    return [
        f"{key} {before[key]} -> {now[key]}"
        for key in sorted((*settings_affecting(Affects.SAMPLES, Affects.UPDATES), "objectives"))
        if key in before and key in now and before[key] != now[key]
    ]


def _orders(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the settings of the order that matter: without windows, their size does not."""
    return ("shuffle",) if before["shuffle"] == now["shuffle"] == "global" else _ORDER


def _required_equal() -> tuple[str, ...]:
    """Return the values that a resumed run must keep, because they determine its samples.

    Settings that are no number of a plan, such as milestones, are compared by the stages that
    follow from them.
    """
    numbers = {item.name for item in fields(Plan)}
    settings = settings_affecting(Affects.SAMPLES)
    return ("recipe", *(name for name in settings if name in numbers), "stages")
