"""`Recipe`: what is trained and with which settings, as one frozen value.

A recipe is a function that returns a `Recipe`. It imports torch only inside the functions that it
names, so that listing, inspecting and planning recipes stay instant.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_type_hints

from msgspec import Meta

from launcher.errors import RecipeError
from launcher.printable import printable_line
from launcher.recipe.affects import Affects, effects_of, without_effect
from launcher.recipe.averaging import Averaging
from launcher.recipe.callback_checks import check_callbacks
from launcher.recipe.data_checks import check_no_loader
from launcher.recipe.evaluation_sets import Evaluation, evaluation_sets_of
from launcher.recipe.field_docs import with_field_docs
from launcher.recipe.foreign_names import hint_for_value
from launcher.recipe.function_checks import (
    ARGUMENTS,
    OPTIONAL,
    check_averaging,
    check_function,
    check_metrics,
    check_optimizer,
    check_parallel_plan,
    check_train_metrics,
)
from launcher.recipe.hang_limits import HangTimeout
from launcher.recipe.keep_best import check_keep_best
from launcher.recipe.max_time import MaxTime
from launcher.recipe.objective import (
    INHERITED,
    Objective,
    check_objectives,
    measured_objective,
    no_loss,
)
from launcher.recipe.optimizer import OptimizerSpec, sgd
from launcher.recipe.prediction_metric import PredictionMetric
from launcher.recipe.quick_settings import check_quick_checkpoints
from launcher.recipe.schedules import Schedule, one_cycle
from launcher.recipe.unplanned_schedules import check_schedule
from launcher.recipe.validation import (
    Fraction,
    MismatchError,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    convert,
)

Minutes = Annotated[
    str,
    Meta(pattern=r"^[0-9]{1,9}(\.[0-9]{1,9})?min\Z", description="minutes such as 10min"),
]
"""A time in minutes; the unit distinguishes it from a number of steps."""

KeepBest = Annotated[
    str,
    Meta(
        pattern=r"^.+:(max|min)\Z",
        description="the name of a metric and max or min, such as accuracy:max",
    ),
]
"""A metric of evaluations, and whether larger or smaller values are better."""

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
"""The experiment trackers that Accelerate has an interface to."""

StrategyName = Literal["ddp", "fsdp", "zero1", "zero2", "zero3"]
"""The names of strategies; `launcher.planning.strategy.STRATEGIES` describes them."""


@with_field_docs
@dataclass(frozen=True, kw_only=True)
class Data:
    """The data sets of a recipe: map-style, indexed from 0 to len - 1.

    `__getitem__` may draw random numbers (augmentation) from `random`, `numpy.random` and `torch`:
    the engine seeds all three by (seed, epoch, sample) before each call, so that the numbers depend
    neither on the rank nor on the worker.

    With worker_start=fork, DataLoader workers are forked from a process that holds the data sets,
    and share the position of every file that is open in it. `__getitem__` should therefore open
    files when a process first needs them.
    """

    train: Any
    """The training set."""

    evaluation: Any = None
    """The validation set; an evaluation visits each sample once. Several sets have names, as in
    {"dev": ..., "test": ...}; `launcher.Evaluation` gives one a schedule of its own. None skips
    evaluations."""

    collate: Callable[[list[Any]], Any] | None = None
    """Function from a list of samples to a batch; None is `torch.utils.data.default_collate`."""

    lengths: Any = None
    """The length of each training sample, a sequence or array of whole numbers; shuffle=length
    forms batches of similar ones."""

    def __post_init__(self) -> None:
        check_no_loader("train", self.train)
        for name, each in self.evaluation_sets().items():
            check_no_loader(f"evaluation[{name!r}]" if name else "evaluation", each.data)

    def evaluation_sets(self) -> dict[str, Evaluation]:
        """Return the evaluation sets by name, in their order; a single set has an empty name.

        Raises:
            RecipeError: A name cannot be that of a set.
        """
        return evaluation_sets_of(self.evaluation)


def first_of_batch(model: Any, batch: Any) -> Any:
    """Return the outputs of the model for the first element of a batch (inputs, targets).

    Raises:
        RecipeError: The batch is a mapping, a single tensor, or an object without elements.
    """
    if isinstance(batch, (list, tuple)):
        return model(batch[0])
    if isinstance(batch, Mapping):
        keys = [printable_line(repr(key)[:50]) for key in list(batch)[:4]]
        found = f"{type(batch).__name__} with the keys {', '.join(keys)}"
        example = f"model(batch[{keys[0] if keys else '...'}])"
    elif hasattr(batch, "shape"):  # the first element of a tensor would be its first sample
        found, example = f"single {type(batch).__name__}", "model(batch)"
    elif not hasattr(batch, "__getitem__"):
        found, example = f"{type(batch).__name__} object", "model(batch.inputs)"
    else:
        return model(batch[0])
    raise RecipeError(
        f"A batch is a {found}, but the recipe has no forward, so the model would be called with "
        "batch[0]. Say which part of a batch the model takes, as in "
        f"Recipe(forward=lambda model, batch: {example})."
    )


@with_field_docs
@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is trained, and how. `dataclasses.replace` derives a variant.

    `loss` and each of `metrics` are called with (outputs, batch) and return (sum, count): the sum
    over the items of the batch, and the number of items. The engine divides by the count over the
    whole global batch, however it is split, so these functions must not return means.

    Each setting states in its annotation which part of a run it affects (`Affects`).
    """

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}\Z"), Affects.NOTHING]
    """Name of the run and of its folder: letters, digits, dots, dashes and underscores."""

    model: Callable[[], Any]
    """Function that returns a new torch.nn.Module."""

    data: Callable[[], Data]
    """Function that returns the data sets."""

    loss: Callable[[Any, Any], tuple[Any, Any]] = no_loss
    """Function (outputs, batch) -> (sum, count). With objectives it is the loss that evaluations
    report; without one they report that of the first objective."""

    objectives: tuple[Objective, ...] = ()
    """Several losses, each with its own parameters and optimizer, in the order of their turns in a
    step. They inherit what they do not give: forward, optimizer, schedule, lr, max_grad_norm."""

    metrics: Mapping[str, Callable[[Any, Any], tuple[Any, Any]] | PredictionMetric] = field(
        default_factory=dict
    )
    """Further functions (outputs, batch) -> (sum, count), by name, for evaluations, and metrics
    that need all predictions, such as AUROC, as `launcher.all_predictions`."""

    forward: Callable[[Any, Any], Any] = first_of_batch
    """Function (model, batch) -> outputs."""

    predict: Callable[[Any, Any], Mapping[str, Any]] | None = None
    """Function (model, batch) -> columns by name: what `launcher predict` writes. A column is a
    tensor, an array or a list with a value for each sample. None writes the outputs of forward."""

    predict_data: Callable[[Path], Any] | None = None
    """Function (path) -> data set, or (data set, collate), of a file that `launcher predict` reads.
    With None, it takes the names of data sets alone."""

    count: Callable[[Any], int] | None = None
    """Function (batch) -> number of items, such as tokens, in the loss; None counts samples."""

    callbacks: tuple[Any, ...] = ()
    """Objects with any of the methods on_run_start, before_step, after_step, on_evaluation,
    on_checkpoint and on_run_end, each called with a `CallbackContext` on every rank."""

    optimizer: Annotated[OptimizerSpec | Callable[[Any, float], Any], Affects.UPDATES] = field(
        default_factory=sgd
    )
    """sgd(...), adamw(...), or a function (model, lr) -> torch optimizer."""

    schedule: Annotated[Schedule, Affects.UPDATES] = field(default_factory=one_cycle)
    """How the learning rate, and with some schedules the momentum, changes over the run."""

    averaging: Annotated[Averaging | None, Affects.UPDATES] = None
    """ema(...) or tail(...): evaluate, and export, an average of the weights over the steps instead
    of those of the last step; none averages nothing. The steps stay the same."""

    batch_size: Annotated[PositiveInt | None, Affects.SAMPLES] = None
    """Samples per optimizer step, over all GPUs and accumulation steps."""

    batch_size_per_gpu: Annotated[PositiveInt | None, Affects.SAMPLES] = None
    """Samples per optimizer step and GPU, instead of batch_size; the batch grows with the GPUs."""

    batch_tokens: Annotated[PositiveInt | None, Affects.SAMPLES] = None
    """Tokens per optimizer step, padding included, instead of batch_size: a multiple of
    tokens_per_sample."""

    tokens_per_sample: Annotated[PositiveInt | None, Affects.SAMPLES] = None
    """Tokens of a training sample, padding included, which batch_tokens needs; checked against the
    data when the run starts."""

    batch_milestones: Annotated[tuple[Fraction, ...], Affects.SAMPLES] = ()
    """Fractions of the run at which the batch size grows, and by lr_rule the learning rate."""

    batch_gamma: Annotated[PositiveFloat, Affects.SAMPLES] = 2.0
    """Factor by which the batch size grows at each of batch_milestones."""

    micro_batch_size: Annotated[PositiveInt | None, Affects.EXECUTION] = None
    """Maximum samples that pass through the model at once on a GPU; None is its whole share."""

    lr: Annotated[PositiveFloat, Affects.UPDATES]
    """Peak learning rate at a batch size of lr_batch_size."""

    lr_batch_size: Annotated[PositiveInt | None, Affects.UPDATES] = None
    """Batch size for which lr was tuned."""

    lr_rule: Annotated[Literal["linear", "sqrt", "none"], Affects.UPDATES] = "linear"
    """How the learning rate scales with the batch size: linearly, by its square root, or not."""

    epochs: Annotated[PositiveInt | None, Affects.UPDATES] = None
    """Passes over the training set."""

    steps: Annotated[PositiveInt | None, Affects.UPDATES] = None
    """Optimizer steps, instead of epochs."""

    max_time: Annotated[MaxTime | None, Affects.UPDATES] = None
    """Time in which the run finishes its schedule, such as 30min, 2h or 90s, from the start of the
    command. The number of steps follows from the speed of the first ones; epochs or steps is its
    upper limit. None takes all of them."""

    train_samples: Annotated[PositiveInt | None, Affects.SAMPLES] = None
    """Size of the training set, so that planning need not load it; checked when the run starts."""

    shuffle: Annotated[Literal["global", "window", "length"], Affects.SAMPLES] = "global"
    """Order of the training samples: any sample next (global); chunks of the storage in a random
    order, and samples shuffled inside windows (window); batches of similar length (length)."""

    shuffle_window: Annotated[PositiveInt, Affects.SAMPLES] = 16_384
    """With shuffle=window or length: samples of a window, which are shuffled or sorted together."""

    evaluate_every: Annotated[PositiveInt | None, Affects.NOTHING] = None
    """Optimizer steps between evaluations, besides the last step; None evaluates every epoch."""

    seed: Annotated[NonNegativeInt, Affects.SAMPLES] = 0
    """Seed of all randomness in the run."""

    strategy: Annotated[StrategyName, Affects.EXECUTION] = "ddp"
    """What is sharded over ranks: nothing (ddp), all (fsdp, zero3) or a part (zero1, zero2)."""

    shard: Annotated[Literal["node", "all"] | PositiveInt, Affects.EXECUTION] = "node"
    """With fsdp: the ranks that share each weight, while other ranks hold copies: those of a node
    (node), all of them (all), or this many neighbours. On nodes of one rank, node means all."""

    reshard_after_forward: Annotated[bool, Affects.EXECUTION] = True
    """With fsdp: free the gathered weights of a block after its forward, and gather them again for
    its backward; false keeps them."""

    accumulate_unsharded: Annotated[bool, Affects.EXECUTION] = False
    """With fsdp: keep whole gradients over the micro-steps of a step, and reduce them once."""

    prefetch_blocks: Annotated[NonNegativeInt, Affects.EXECUTION] = 0
    """With fsdp: blocks whose weights are gathered ahead of the block that is computed; 0 leaves it
    to FSDP, which gathers one ahead where the host runs ahead of the GPU."""

    reduce_dtype: Annotated[Literal["fp32", "bf16"], Affects.UPDATES] = "fp32"
    """With fsdp: the precision in which ranks send and add gradients; fp32 is that of the weights,
    which precision=fp64 makes fp64."""

    tensor_parallel: Annotated[PositiveInt, Affects.EXECUTION] = 1
    """With strategy=fsdp: neighbouring ranks of a node that each compute a part of every layer, on
    the same samples. It divides the ranks of a node, the attention heads and the layers' widths."""

    tensor_parallel_plan: Mapping[str, str] | None = None
    """How tensor_parallel splits the model: names of modules, with * for the numbers of layers, to
    styles such as colwise and rowwise; None takes the plan of a transformers model."""

    weights: Annotated[str | None, Affects.UPDATES] = None
    """Initial weights in place of those that the model function draws: a safetensors file, or a
    folder in Hugging Face's format; every rank reads its own part."""

    strict_weights: Annotated[bool, Affects.UPDATES] = True
    """Whether the files of weights must hold all weights of the model, and nothing else. With false
    the model's own values stay in place of missing ones."""

    offload: Annotated[Literal["cpu"] | None, Affects.EXECUTION] = None
    """Keep what the strategy shards in host memory (cpu); None keeps it on the GPU."""

    precision: Annotated[Literal["fp32", "bf16", "fp16", "fp64"], Affects.UPDATES] = "fp32"
    """bf16, fp16: forward and loss under autocast; fp64: weights and batches in fp64."""

    param_dtype: Annotated[Literal["fp32", "bf16"], Affects.UPDATES] = "fp32"
    """bf16: weights are kept in bf16 alone, and the optimizer rounds them stochastically."""

    fp8: Annotated[bool, Affects.UPDATES] = False
    """On GPUs from Ada and Hopper on: compute the products of linear layers in fp8, by torchao."""

    max_grad_norm: Annotated[PositiveFloat | None, Affects.UPDATES] = None
    """Maximum norm of the global gradient; a longer one is scaled down. None does not clip."""

    virtual_ranks: Annotated[PositiveInt | None, Affects.SAMPLES] = None
    """Number of parts, each with its own dropout masks and BatchNorm statistics, of every batch, so
    that these do not depend on the number of ranks; None is one part per rank."""

    exact: Annotated[bool, Affects.UPDATES] = False
    """With virtual_ranks: sum gradients in one fixed order, with deterministic kernels, so that
    weights are equal to the bit on any number of ranks."""

    sync_batchnorm: Annotated[bool, Affects.UPDATES] = False
    """Compute BatchNorm's statistics over the micro-batches of all ranks together."""

    rank_buffers: Annotated[Literal["refuse", "average", "broadcast"], Affects.UPDATES] = "refuse"
    """What to do with buffers, other than BatchNorm's, that forward changes differently on each
    rank: refuse the run, average them after each step, or broadcast those of rank 0."""

    compile: Annotated[bool, Affects.EXECUTION] = False
    """Compile the model's blocks, or the whole model if none repeat, with torch.compile."""

    activation_checkpointing: Annotated[bool, Affects.EXECUTION] = False
    """Recompute the activations inside blocks in backward instead of storing them."""

    blocks: Annotated[str | None, Affects.EXECUTION] = None
    """Class names, comma-separated, of the layers that repeat; None detects them."""

    channels_last: Annotated[bool, Affects.EXECUTION] = False
    """Store images (N, C, H, W) as (N, H, W, C), the layout that fast convolutions use."""

    tf32: Annotated[bool, Affects.UPDATES] = False
    """On CUDA: compute fp32 matrix products with 10 bits of mantissa, several times faster."""

    cudnn_benchmark: Annotated[bool, Affects.EXECUTION] = False
    """On CUDA: let cuDNN time its algorithms once for each shape and keep the fastest."""

    deterministic: Annotated[bool, Affects.UPDATES] = False
    """Use kernels that repeat their results to the bit, which may be slower; refuse operations
    that have none."""

    device: Annotated[Literal["cuda", "cpu"] | None, Affects.EXECUTION] = None
    """Device that the ranks compute on; None uses GPUs if there are any."""

    numa: Annotated[Literal["auto", "off"], Affects.NODE] = "auto"
    """auto: on a machine with several NUMA nodes, each rank keeps to the CPUs near its GPU."""

    in_memory: Annotated[bool, Affects.NODE] = False
    """Whether the samples are already in memory, so that DataLoader workers would only add cost."""

    data_on_device: Annotated[bool, Affects.NODE] = False
    """Copy the data sets to the device of each rank once, and make batches there by index; for a
    TensorDataset without collate that fits into the memory of the device."""

    num_workers: Annotated[NonNegativeInt | None, Affects.NODE] = None
    """DataLoader workers per rank; None is four, limited by the usable cores."""

    worker_threads: Annotated[PositiveInt, Affects.NODE] = 1
    """Threads of each worker, or of the rank without workers, that read the samples of a
    micro-batch together; only for samples that draw no random numbers."""

    worker_start: Annotated[Literal["fork", "spawn", "forkserver"], Affects.NODE] = "fork"
    """fork: workers are copies of the rank; spawn: each imports the recipe and calls data();
    forkserver: the same, with torch imported once for all workers."""

    prefetch_factor: Annotated[PositiveInt | None, Affects.NODE] = None
    """Batches that each worker keeps ready; None is 2."""

    pin_memory: Annotated[bool | None, Affects.NODE] = None
    """Whether batches pass through page-locked memory; None uses it on CUDA."""

    checkpoint_every: Annotated[PositiveInt | Minutes, Affects.NOTHING] = "10min"
    """Interval between checkpoints: optimizer steps, such as 500, or minutes, such as 10min."""

    keep_checkpoints: Annotated[PositiveInt, Affects.NOTHING] = 2
    """Number of checkpoints to keep, the newest ones."""

    quick_checkpoints: Annotated[str | None, Affects.NOTHING] = None
    """Folder that each node has to itself, such as /dev/shm/quick or one on a local disk: the run
    saves further checkpoints there, from which it goes on after a failure. None saves none."""

    quick_checkpoint_every: Annotated[PositiveInt | None, Affects.NOTHING] = None
    """Optimizer steps from one quick checkpoint to the next; needs quick_checkpoints."""

    keep_best: Annotated[KeepBest | None, Affects.NOTHING] = None
    """Metric of evaluations by which the best checkpoint is kept too, and max or min, such as
    dev/accuracy:max or loss:min. The run then ends with the best weights as model.safetensors."""

    best_checkpoints: Annotated[PositiveInt, Affects.NOTHING] = 1
    """With keep_best: number of best checkpoints to keep, besides the newest ones."""

    stop_after: Annotated[PositiveInt | None, Affects.NOTHING] = None
    """With keep_best: evaluations in a row without a better value after which the run ends; None
    takes all steps."""

    bad_samples: Annotated[Literal["stop", "skip"], Affects.UPDATES] = "stop"
    """stop: a sample that cannot be read ends the run; skip: it is left out of its batch, whose
    loss is divided by what was there, and listed in bad_samples.jsonl."""

    max_bad_samples: Annotated[PositiveInt | Fraction, Affects.NOTHING] = 0.01
    """With bad_samples=skip: training samples that may be left out before the run ends, as a number
    or as a share of all samples that its steps take."""

    max_bad_steps: Annotated[PositiveInt, Affects.NOTHING] = 3
    """Consecutive steps, skipped because loss or gradient is not finite, that end the run."""

    hang_timeout: Annotated[HangTimeout, Affects.NOTHING] = 180.0
    """Seconds without progress after which a run is ended as hung: the limit of a step, or limits
    by phase as in step:120,save:900 (without them start:1800, evaluation:600, save:1800); the first
    step belongs to the start. none waits forever."""

    noise_scale: Annotated[bool, Affects.NOTHING] = False
    """Estimate the gradient noise scale while training, from one step in twenty."""

    train_metrics: Annotated[tuple[str, ...], Affects.NOTHING] = ()
    """Names of metrics that are also computed on the outputs of each training step, such as
    accuracy."""

    trackers: Annotated[tuple[TrackerName, ...], Affects.NOTHING] = ()
    """Experiment trackers that rank 0 also reports to, such as tensorboard,wandb."""

    record_samples: Annotated[bool, Affects.NOTHING] = False
    """Write the sample ids of every step to samples/rank<N>.jsonl in the run folder."""

    def __post_init__(self) -> None:
        for name, hint in setting_types().items():
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, convert(value, hint))
            except MismatchError as error:
                raise RecipeError(
                    f"Recipe({name}=...): {error}.{hint_for_value(name, value)}"
                ) from None
        if hasattr(self.model, "state_dict") and not isinstance(self.model, type):
            raise RecipeError(
                f"Recipe(model=...): expected a function that returns the model, found the model "
                f"itself, a {type(self.model).__name__}. Write model=lambda: ..., so that each "
                "rank builds its own."
            )
        object.__setattr__(self, "objectives", check_objectives(self.objectives))
        self._find_loss()
        for name, arguments in ARGUMENTS.items():
            if getattr(self, name) is not None or name not in OPTIONAL:
                check_function(f"Recipe({name}=...)", getattr(self, name), arguments)
        check_metrics(self.metrics)
        check_train_metrics(self.train_metrics, self.metrics)
        self._check_objectives()
        object.__setattr__(self, "callbacks", check_callbacks(self.callbacks))
        check_keep_best(
            self.keep_best,
            self.metrics,
            best_checkpoints=self.best_checkpoints,
            stop_after=self.stop_after,
        )
        check_quick_checkpoints(self.quick_checkpoints, self.quick_checkpoint_every)
        check_parallel_plan(self.tensor_parallel_plan)
        check_schedule(self.schedule, self.metrics)
        check_optimizer(self.optimizer)
        check_averaging(self.averaging, self.optimizer)
        for names in EXCLUSIVE:
            _check_exactly_one(self, names)

    def _find_loss(self) -> None:
        """Let evaluations report the loss of the first objective if the recipe gives no other.

        Raises:
            RecipeError: There is no loss, or it is not clear with which forward it is evaluated.
        """
        given: object = self.loss
        if given is not no_loss and not (given is None and self.objectives):
            return
        if not self.objectives:
            raise RecipeError(
                "Recipe(loss=...): there is no loss. Give a function (outputs, batch) -> (sum, "
                "count), or objectives=(Objective(...), ...) if the recipe has several."
            )
        first, *others = self.objectives
        object.__setattr__(self, "loss", first.loss)
        if first.forward is None:
            return
        has_forward = self.forward is not first_of_batch
        inherits = next((other.name for other in others if other.forward is None), None)
        if has_forward or inherits is not None:
            missing = "loss" if has_forward else "forward"
            raise RecipeError(
                f"Recipe(objectives=...): the objective {first.name} has a forward of its own, and "
                + (
                    "the recipe has another one, so that it is not clear which loss evaluations "
                    "report."
                    if has_forward
                    else f"{inherits} has none, nor has the recipe."
                )
                + f" Give Recipe({missing}=...) as well."
            )
        object.__setattr__(self, "forward", first.forward)

    def _check_objectives(self) -> None:
        """Refuse schedules and training metrics that do not fit the objectives.

        Raises:
            RecipeError: A schedule follows an unknown metric, or no objective computes the outputs
                that the training metrics need.
        """
        for objective in self.objectives:
            if objective.schedule is not None:
                check_schedule(objective.schedule, self.metrics)
        if (
            self.objectives
            and self.train_metrics
            and measured_objective(self.objectives, self.forward) is None
        ):
            names = " and ".join(objective.name for objective in self.objectives)
            raise RecipeError(
                f"Recipe(train_metrics=...): {', '.join(self.train_metrics)} would be computed on "
                "the outputs of the recipe's forward in each step, and none of the objectives "
                f"{names} has these outputs and a turn in every step. Remove train_metrics, or "
                "call launcher.log in the loss of an objective."
            )

    def by_objective(self) -> tuple[Recipe, ...]:
        """Return a recipe with one loss for each objective, or the recipe itself if it has one."""
        return tuple(
            replace(
                self,
                objectives=(),
                loss=objective.loss,
                **{
                    name: value
                    for name in INHERITED
                    if (value := getattr(objective, name)) is not None
                },
            )
            for objective in self.objectives
        ) or (self,)

    def settings(self) -> dict[str, Any]:
        """Return the settings as plain values, by name; a schedule or optimizer as its text.

        An optimizer that is a function of the recipe is omitted, and so are objectives if there are
        none.
        """
        averaging = None if self.averaging is None else str(self.averaging)
        calls: dict[str, Any] = {"schedule": str(self.schedule), "averaging": averaging}
        if self.objectives:
            calls["objectives"] = [str(objective) for objective in self.objectives]
        if isinstance(self.optimizer, OptimizerSpec):
            calls["optimizer"] = str(self.optimizer)
        values = {name: getattr(self, name) for name in setting_types()}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
        } | calls


EXCLUSIVE = (("batch_size", "batch_size_per_gpu", "batch_tokens"), ("epochs", "steps"))
"""Settings of which a recipe has exactly one; overriding one clears the others."""

_CALLS = ("optimizer", "schedule", "averaging")
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


def _check_exactly_one(recipe: Recipe, names: tuple[str, ...]) -> None:
    values = {name: getattr(recipe, name) for name in names}
    present = [f"{name}={value}" for name, value in values.items() if value is not None]
    if len(present) != 1:
        found = " and ".join(present) or ("neither" if len(names) == 2 else "none")
        needed = f"{', '.join(names[:-1])} and {names[-1]}"
        raise RecipeError(f"A recipe needs exactly one of {needed}; found {found}.")
