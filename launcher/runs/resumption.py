"""Whether a plan can resume a run from a checkpoint, and what it changes about the run."""

from __future__ import annotations

import json
from collections.abc import Collection

from launcher.errors import CheckpointError
from launcher.planning.plan import Plan
from launcher.runs.checkpoints import Manifest

_SAME = ("recipe", "batch_size", "stages", "seed", "train_samples")
"""What a resumed run has in common with the one that was, so that its samples go on."""

_FREE = (
    "strategy",
    "micro_batch_size",
    "offload",
    "activation_checkpointing",
    "device",
    "checkpoint_every",
    "keep_checkpoints",
    "hang_timeout",
    "noise_scale",
    "record_samples",
)
"""Settings that change no step."""


def check_resumable(
    manifest: Manifest, plan: Plan, name: str, accept: Collection[str] = ()
) -> None:
    """Refuse to go on with a plan that takes other samples than the run that was.

    Args:
        manifest: What the checkpoint says of itself.
        plan: How the run would go on.
        name: The checkpoint's, for the message.
        accept: What may differ: with `data` the number of training samples may.

    Raises:
        CheckpointError: It names what differs.
    """
    was, now = manifest.agreement, json.loads(json.dumps(plan.agreement()))
    for key in _SAME:
        if key == "train_samples" and (
            "data" in accept
            or (None in (was.get(key), now.get(key)) and manifest.values.get("data") is not None)
        ):
            continue  # where only one of them is known, the data itself is compared
        if was.get(key) != now.get(key):
            hint = ""
            if key == "batch_size" and now.get("batch_size_per_gpu") is not None:
                hint = " (batch_size_per_gpu lets it follow the ranks)"
            if key == "train_samples":
                hint = " (`--accept data` goes on with other data on purpose)"
            raise CheckpointError(
                f"{name} was written with {key} {was.get(key)}, and the plan has {now.get(key)}"
                f"{hint}: the samples of its steps would be others. Resume it with {key} "
                f"{was.get(key)}, or start a new run."
            )


def changes(manifest: Manifest, plan: Plan) -> list[str]:
    """Return the settings that are others than those of the run that was, in words."""
    was, now = manifest.agreement, json.loads(json.dumps(plan.agreement()))
    return [
        f"{key} {was[key]} -> {now[key]}"
        for key in sorted(was.keys() & now.keys())
        if was[key] != now[key] and key in plan.settings and key not in _FREE
    ]
