"""A recipe: what is trained, and the numbers that say how, as one frozen value.

A recipe is a function that returns a `Recipe`. It imports torch inside the functions it names, so
that looking at a recipe, planning it and listing it stay instant.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_type_hints

from msgspec import Meta

from launcher.errors import RecipeError
from launcher.recipe.affects import Affects, effects_of, without_effect
from launcher.recipe.optimizer import OptimizerSpec, sgd
from launcher.recipe.schedules import Schedule, one_cycle
from launcher.recipe.validation import (
    Fraction,
    MismatchError,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    convert,
    show,
)

Minutes = Annotated[str, Meta(pattern=r"^\d+(\.\d+)?min$", description="minutes such as 10min")]
"""A time, so that it cannot be taken for steps."""

TrackerName = Literal[
    "aim",
    "clearml",
    "comet_ml",
    "dvclive",
    "mlflow",
    "swanlab",
    "tensorboard",
    "trackio",
    "wandb",
]
"""Those that Accelerate has an interface to."""

StrategyName = Literal["ddp", "fsdp", "zero1", "zero2", "zero3"]
"""Each is described in `launcher.planning.strategy.STRATEGIES`."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a recipe trains on: map-style data sets, indexed from 0 to len - 1.

    Randomness in `__getitem__` (augmentation) is drawn from `random`, `numpy.random` or `torch` as
    usual: the engine seeds all three by (seed, epoch, sample) before each call, so that neither
    ranks nor workers change it.

    DataLoader workers are forked from a process that holds the data sets, and share the position of
    every file that is open in it: open files in `__getitem__`, when a process first needs them.
    """

    train: Any
    """The training samples."""

    evaluation: Any = None
    """The held-out samples, each visited exactly once by an evaluation; None evaluates nothing."""

    collate: Callable[[list[Any]], Any] | None = None
    """Makes a batch of a list of samples; None is `torch.utils.data.default_collate`."""


def first_of_batch(model: Any, batch: Any) -> Any:
    """Call the model with the first element of the batch: the inputs of (inputs, targets)."""
    return model(batch[0])


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is trained, and how. Derive a variant with `dataclasses.replace`.

    `loss` and each of `metrics` are called with (outputs, batch) and return (sum, count): a sum
    over the items of the batch and how many they are. The engine divides by the count over the
    whole global batch, whatever the split, so never return a mean.
    """

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$"), Affects.NOTHING]
    """What the run, and so its folder, is called: letters, digits, dots, dashes, underscores."""

    model: Callable[[], Any]
    """Returns a new torch.nn.Module."""

    data: Callable[[], Data]
    """Returns the data sets."""

    loss: Callable[[Any, Any], tuple[Any, Any]]
    """(outputs, batch) -> (sum, count)."""

    metrics: Mapping[str, Callable[[Any, Any], tuple[Any, Any]]] = field(default_factory=dict)
    """Further (outputs, batch) -> (sum, count) functions by name, for evaluation."""

    forward: Callable[[Any, Any], Any] = first_of_batch
    """(model, batch) -> outputs."""

    count: Callable[[Any], int] | None = None
    """(batch) -> the items that the loss counts in it, such as tokens; None counts samples."""

    optimizer: Annotated[OptimizerSpec | Callable[[Any, float], Any], Affects.UPDATES] = field(
        default_factory=sgd
    )
    """sgd(...), adamw(...), or a function (model, lr) -> torch optimizer."""

    schedule: Annotated[Schedule, Affects.UPDATES] = field(default_factory=one_cycle)
    """How the learning rate, and for some the momentum, moves over the run."""

    batch_size: Annotated[PositiveInt | None, Affects.SAMPLES] = None
    """Samples per optimizer step, over all GPUs and accumulation steps."""

    batch_size_per_gpu: Annotated[PositiveInt | None, Affects.SAMPLES] = None
    """Instead of batch_size: samples per optimizer step and GPU; the batch grows with the GPUs."""

    batch_milestones: Annotated[tuple[Fraction, ...], Affects.SAMPLES] = ()
    """Fractions of the run at each of which the batch grows, and lr with it by lr_rule."""

    batch_gamma: Annotated[PositiveFloat, Affects.SAMPLES] = 2.0
    """What the batch is multiplied by at each of batch_milestones."""

    micro_batch_size: Annotated[PositiveInt | None, Affects.EXECUTION] = None
    """The most samples that go through the model at once on a GPU; None is its whole share."""

    lr: Annotated[PositiveFloat, Affects.UPDATES]
    """Peak learning rate at a batch of lr_batch_size."""

    lr_batch_size: Annotated[PositiveInt | None, Affects.UPDATES] = None
    """The batch size that lr was found for."""

    lr_rule: Annotated[Literal["linear", "sqrt", "none"], Affects.UPDATES] = "linear"
    """How the learning rate follows the batch size: times the ratio, times its root, or not."""

    epochs: Annotated[PositiveInt | None, Affects.UPDATES] = None
    """Passes over the training samples."""

    steps: Annotated[PositiveInt | None, Affects.UPDATES] = None
    """Instead of epochs: optimizer steps."""

    train_samples: Annotated[PositiveInt | None, Affects.SAMPLES] = None
    """Training samples, so that planning need not load them; checked when the run starts."""

    evaluate_every: Annotated[PositiveInt | None, Affects.NOTHING] = None
    """Optimizer steps between evaluations, besides the last; None evaluates after each epoch."""

    seed: Annotated[NonNegativeInt, Affects.SAMPLES] = 0
    """Where all randomness of the run comes from."""

    strategy: Annotated[StrategyName, Affects.EXECUTION] = "ddp"
    """What is sharded over ranks: nothing (ddp), all (fsdp, zero3) or a part (zero1, zero2)."""

    offload: Annotated[Literal["cpu"] | None, Affects.EXECUTION] = None
    """Keep what the strategy shards in host memory, cpu; None keeps it on the GPU."""

    precision: Annotated[Literal["fp32", "bf16", "fp16", "fp64"], Affects.UPDATES] = "fp32"
    """bf16, fp16: forward and loss under autocast, weights in fp32; fp64: weights and batches."""

    max_grad_norm: Annotated[PositiveFloat | None, Affects.UPDATES] = None
    """The gradient of the global batch is scaled down to this norm where it is longer."""

    sync_batchnorm: Annotated[bool, Affects.UPDATES] = False
    """BatchNorm takes its statistics over the micro-batches of all ranks, not of each."""

    rank_buffers: Annotated[Literal["refuse", "average", "broadcast"], Affects.UPDATES] = "refuse"
    """What becomes of buffers, other than BatchNorm's, that forward changes in another way on each
    rank: the run is refused, or after each step every rank gets their average, or rank 0's."""

    compile: Annotated[bool, Affects.EXECUTION] = False
    """Compile the model's blocks, or all of it where none repeat, with torch.compile."""

    activation_checkpointing: Annotated[bool, Affects.EXECUTION] = False
    """Compute the activations inside blocks again in backward instead of keeping them."""

    blocks: Annotated[str | None, Affects.EXECUTION] = None
    """Class names, comma-separated, of the layers that repeat; None finds them."""

    channels_last: Annotated[bool, Affects.EXECUTION] = False
    """Images (N, C, H, W) lie in memory as (N, H, W, C), which fast convolutions want."""

    tf32: Annotated[bool, Affects.UPDATES] = False
    """On CUDA: fp32 products with 10 bits of mantissa, several times as fast."""

    cudnn_benchmark: Annotated[bool, Affects.EXECUTION] = False
    """On CUDA: cuDNN tries its algorithms once for each shape and keeps the fastest."""

    device: Annotated[Literal["cuda", "cpu"] | None, Affects.EXECUTION] = None
    """What the ranks compute on; None takes the GPUs where there are any."""

    in_memory: Annotated[bool, Affects.NODE] = False
    """Whether the samples are in memory already, so that DataLoader workers would only cost."""

    num_workers: Annotated[NonNegativeInt | None, Affects.NODE] = None
    """DataLoader workers per rank; None is four, capped by the usable cores."""

    worker_start: Annotated[Literal["fork", "spawn"], Affects.NODE] = "fork"
    """fork: workers are copies of the rank; spawn: each imports the recipe and calls data()."""

    prefetch_factor: Annotated[PositiveInt | None, Affects.NODE] = None
    """Batches that each worker holds ready; None is 2."""

    pin_memory: Annotated[bool | None, Affects.NODE] = None
    """Whether batches go through page-locked memory; None does so on CUDA."""

    checkpoint_every: Annotated[PositiveInt | Minutes, Affects.NOTHING] = "10min"
    """Optimizer steps between checkpoints, such as 500, or minutes, such as 10min."""

    keep_checkpoints: Annotated[PositiveInt, Affects.NOTHING] = 2
    """Checkpoints that are kept, the newest ones."""

    max_bad_steps: Annotated[PositiveInt, Affects.NOTHING] = 3
    """Steps in a row with a loss or gradient that is not finite, left out, that end the run."""

    hang_timeout: Annotated[PositiveFloat | None, Affects.NOTHING] = 600.0
    """Seconds without progress after which a run is ended as hanging; none waits for ever."""

    noise_scale: Annotated[bool, Affects.NOTHING] = False
    """Estimate the gradient noise scale along the way, from one step in twenty."""

    trackers: Annotated[tuple[TrackerName, ...], Affects.NOTHING] = ()
    """Where rank 0 sends what it measures as well, such as tensorboard,wandb (see README)."""

    record_samples: Annotated[bool, Affects.NOTHING] = False
    """Write the sample ids of every step to samples/rank<N>.jsonl in the run folder."""

    def __post_init__(self) -> None:
        for name, hint in setting_types().items():
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, convert(value, hint))
            except MismatchError as error:
                raise RecipeError(f"Recipe({name}=...): {error}.") from None
        for name in ("model", "data", "loss", "forward"):
            if not callable(getattr(self, name)):
                raise RecipeError(
                    f"Recipe({name}=...): expected a function, found {show(getattr(self, name))}. "
                    f"Give the function itself, not what it returns."
                )
        if not isinstance(self.schedule, Schedule):
            raise RecipeError(
                f"Recipe(schedule=...): expected a schedule such as one_cycle(), "
                f"found {show(self.schedule)}."
            )
        if not callable(self.optimizer) and not isinstance(self.optimizer, OptimizerSpec):
            raise RecipeError(
                "Recipe(optimizer=...): expected sgd(...), adamw(...) or a function (model, lr) -> "
                f"optimizer, found {show(self.optimizer)}."
            )
        for pair in EXCLUSIVE:
            _check_one_of(self, *pair)

    def settings(self) -> dict[str, Any]:
        """Return the fields that are plain values, by name; specs as their text."""
        texts = {"schedule": str(self.schedule)}
        if isinstance(self.optimizer, OptimizerSpec):
            texts["optimizer"] = str(self.optimizer)
        values = {name: getattr(self, name) for name in setting_types()}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
        } | texts


EXCLUSIVE = (("batch_size", "batch_size_per_gpu"), ("epochs", "steps"))
"""Pairs of fields of which a recipe has exactly one; overriding one takes the other's place."""

_CALLS = ("optimizer", "schedule")
"""Settings that are written as calls, such as `sgd(momentum=0.9)`, and not as plain values."""


@functools.cache
def setting_types() -> Mapping[str, Any]:
    """Return the type of each setting that is a plain value, by name, in declared order."""
    hints = get_type_hints(Recipe, include_extras=True)
    return MappingProxyType(
        {name: without_effect(hints[name]) for name in effects_of(Recipe) if name not in _CALLS}
    )


def settings_affecting(*parts: Affects) -> tuple[str, ...]:
    """Return the names of the settings that affect one of `parts`, in declared order."""
    return tuple(name for name, affected in effects_of(Recipe).items() if affected in parts)


def field_sentences() -> dict[str, str]:
    """Return the sentence under each field of Recipe, by name, read from this file."""
    import ast
    import inspect

    sentences = {}
    body = ast.parse(inspect.getsource(Recipe)).body[0]
    assert isinstance(body, ast.ClassDef)
    for declared, below in zip(body.body, body.body[1:], strict=False):
        if isinstance(declared, ast.AnnAssign) and isinstance(declared.target, ast.Name):
            assert isinstance(below, ast.Expr)
            assert isinstance(below.value, ast.Constant)
            sentences[declared.target.id] = str(below.value.value)
    return sentences


def _check_one_of(recipe: Recipe, first: str, second: str) -> None:
    given = [name for name in (first, second) if getattr(recipe, name) is not None]
    if len(given) != 1:
        found = " and ".join(f"{name}={getattr(recipe, name)}" for name in given) or "neither"
        raise RecipeError(f"A recipe has {first} or {second}, exactly one; found {found}.")
