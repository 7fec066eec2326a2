"""The catalogue of settings: what the command line, the help and the documentation say of each.

Types, defaults and sentences are those of the fields of `Recipe`; only the topics are stated here.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from types import MappingProxyType
from typing import Any

from launcher.errors import OverrideError
from launcher.printable import printable_line
from launcher.recipe.affects import Affects, effects_of
from launcher.recipe.averaging import AVERAGES
from launcher.recipe.field_docs import sentences_of
from launcher.recipe.foreign_names import hint_for_unknown
from launcher.recipe.optimizer import OPTIMIZERS
from launcher.recipe.recipe import Recipe, setting_types
from launcher.recipe.schedules import SCHEDULES
from launcher.recipe.validation import describe

TOPICS = {
    "Batch and learning rate": (
        "batch_size batch_size_per_gpu batch_tokens tokens_per_sample batch_milestones batch_gamma "
        "micro_batch_size "
        "lr lr_batch_size lr_rule schedule optimizer max_grad_norm averaging"
    ),
    "Length of the run": "epochs steps max_time train_samples evaluate_every stop_after seed",
    "Order of the samples": "shuffle shuffle_window",
    "Initial weights": "weights strict_weights",
    "Memory and speed": (
        "strategy shard reshard_after_forward accumulate_unsharded prefetch_blocks reduce_dtype "
        "tensor_parallel offload precision param_dtype fp8 compile activation_checkpointing blocks "
        "channels_last tf32 cudnn_benchmark deterministic device numa"
    ),
    "State that depends on the split": "virtual_ranks exact sync_batchnorm rank_buffers",
    "Reading data": (
        "in_memory data_on_device num_workers worker_threads worker_start prefetch_factor "
        "pin_memory"
    ),
    "Checkpoints and failures": (
        "checkpoint_every keep_checkpoints quick_checkpoints quick_checkpoint_every keep_best "
        "best_checkpoints bad_samples max_bad_samples max_bad_steps hang_timeout"
    ),
    "What is recorded": "train_metrics noise_scale trackers record_samples",
}
"""Settings by topic; one that is not named here comes under `OTHER`."""

OTHER = "Other"

EFFECTS = {
    Affects.SAMPLES: (
        "samples",
        "Which samples each step takes. A resumed run must keep the value.",
    ),
    Affects.UPDATES: (
        "updates",
        "What a step does to the weights. A resumed run may change the value, and reports it.",
    ),
    Affects.EXECUTION: (
        "execution",
        "Where and how steps are computed. Their results differ by rounding alone.",
    ),
    Affects.NODE: (
        "loading",
        "How the ranks of one node read samples and use its cores. The steps stay the same.",
    ),
    Affects.NOTHING: (
        "nothing",
        "Nothing about the training: what is measured and saved, and when a run gives up.",
    ),
}
"""The word and the sentence for each part of a run that a setting can affect."""

CALLS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {"schedule": SCHEDULES, "optimizer": OPTIMIZERS, "averaging": AVERAGES}
)
"""The functions that make the value of a setting that is written as a call, by setting."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A setting of recipes, described for readers."""

    name: str
    topic: str
    """One of `TOPICS`, or `OTHER`."""

    type_words: str
    """The type in words, such as `a whole number of at least 1, or none`."""

    default: str | None
    """The default as it is written on the command line; None if each recipe must give a value."""

    affects: Affects
    sentence: str
    """What the setting means."""


@functools.cache
def settings() -> Mapping[str, Setting]:
    """Return every setting that can be given as NAME=VALUE, by name, ordered by topic."""
    types, sentences, effects = setting_types(), sentences_of(Recipe), effects_of(Recipe)
    by_name = {item.name: item for item in fields(Recipe)}
    known = [name for name in by_name if name in effects and name != "name"]
    described = {}
    for topic, names in _grouped(known):
        for name in names:
            described[name] = Setting(
                name=name,
                topic=topic,
                type_words=describe(types[name]) if name in types else _call_words(name),
                default=_default_of(by_name[name]),
                affects=effects[name],
                sentence=" ".join(sentences.get(name, "").split()),
            )
    return MappingProxyType(described)


def find_setting(name: str) -> Setting:
    """Return the setting that is called `name`.

    Raises:
        OverrideError: There is none.
    """
    known = settings()
    if name not in known:
        raise OverrideError(
            f"{printable_line(name)}: there is no such setting.{hint_for_unknown(name, known)} "
            "`launcher settings` lists the settings."
        )
    return known[name]


def _grouped(known: list[str]) -> list[tuple[str, list[str]]]:
    """Return each topic with those of its names that exist, and at last the names of no topic."""
    topics = [
        (topic, [name for name in names.split() if name in known])
        for topic, names in TOPICS.items()
    ]
    named = {name for _, names in topics for name in names}
    rest = [name for name in known if name not in named]
    return [*topics, (OTHER, rest)] if rest else topics


def _call_words(name: str) -> str:
    calls = [f"{function}()" for function in CALLS[name]]
    return f"a call: {' or '.join(calls)}" if len(calls) < 4 else f"a call such as {calls[0]}"


def _default_of(item: Field[Any]) -> str | None:
    if item.default is not MISSING:
        return written(item.default)
    return None if item.default_factory is MISSING else written(item.default_factory())


def written(value: Any) -> str:
    """Return a value as it is written behind NAME= on the command line."""
    if value is None or value in ((), []):
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return ",".join(map(written, value))
    if isinstance(value, Mapping):
        return ",".join(f"{key}:{written(item)}" for key, item in value.items())
    return str(value)


def call_signatures(name: str) -> dict[str, str]:
    """Return the calls that make a value of a setting such as `schedule`, with their sentences.

    Args:
        name: A setting in `CALLS`.

    Returns:
        The first sentence of each function's docstring by its call, such as `constant()`.
    """
    calls = {}
    for function_name, factory in CALLS[name].items():
        parameters = [
            "..."
            if item.kind is item.VAR_KEYWORD
            else item.name
            if item.default is item.empty
            else f"{item.name}={_argument(item.default)}"
            for item in inspect.signature(factory).parameters.values()
        ]
        sentence = (inspect.getdoc(factory) or "").partition("\n")[0]
        calls[f"{function_name}({', '.join(parameters)})"] = sentence
    return calls


def _argument(value: Any) -> str:
    """Return a value as it is written between the parentheses of a call."""
    return written(value) if value is None or isinstance(value, bool) else repr(value)
