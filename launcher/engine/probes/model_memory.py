"""The sizes of a recipe's model, optimizer and activations, without memory for their values.

The model function, the optimizer and one forward and backward pass run on fake tensors, which have
shapes, dtypes and a device but no values (torch's FakeTensorMode), so that a model of any size is
measured in this process, on a CPU, in seconds.
"""

from __future__ import annotations

import contextlib
import weakref
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from launcher.engine.backends.nested_tensors import map_tensors, tensors_in
from launcher.engine.backends.parallel_plan import find_styles, split_sides
from launcher.engine.data.prefetching import raise_if_error
from launcher.engine.data.randomness import seed_all
from launcher.engine.data.reader import Reader
from launcher.engine.data.recipe_data import call_data, sample_count, with_first_samples
from launcher.engine.data.sampler import MicroBatchRequest
from launcher.engine.model.blocks import checkpoint_activations, find_blocks
from launcher.engine.optimizers.taking_steps import take_step
from launcher.engine.state.hyperparameters import make_optimizer
from launcher.engine.state.optimizer_kinds import check_strategy_of
from launcher.engine.state.parameter_kinds import (
    check_parameters,
    keep_gradients_in_float32,
    keep_in_bfloat16,
    zero_gradient,
)
from launcher.engine.training.initial_model import build_model
from launcher.engine.training.loss_calls import training_loss
from launcher.engine.training.objectives import only_trained, trained_names
from launcher.errors import LauncherError, RecipeError
from launcher.json_file import exact_floats, read_json
from launcher.planning.configs import AUTOCAST
from launcher.planning.memory_facts import (
    ActivationMemory,
    MemoryFacts,
    ModelMemory,
    ParameterMemory,
)
from launcher.planning.plan import Plan
from launcher.planning.strategy import STRATEGIES
from launcher.printable import error_line
from launcher.recipe.recipe import Recipe
from launcher.runs.files import write_json
from launcher.runs.job import RecipeSource
from launcher.runs.rundir import RunDir

_SIZES = (2, 4)
"""Samples of the micro-batches whose activations are measured; others are on the line through
them."""

_SMALL = 2
"""Size of each dimension of parameters with which an optimizer takes a step that reads values."""


def measure_memory(recipe: Recipe, plan: Plan, source: RecipeSource | None = None) -> MemoryFacts:
    """Return the sizes of the recipe's model, and the memory of this machine's GPUs.

    Args:
        recipe: The recipe.
        plan: The plan of a run of the recipe.
        source: What the recipe is built from; spawned DataLoader workers need it.

    Raises:
        RecipeError: The recipe's model function or its optimizer is at fault.
    """
    notes: list[str] = []
    batches = _read_batches(recipe, source, notes)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = _build(recipe, mode, batches, notes)
    refused = _refused_by_parameters(plan, model)
    states: dict[Tensor, tuple[int, int]] = {}
    for alone, names in zip(recipe.by_objective(), trained_names(recipe, model), strict=True):
        with only_trained(model, names):
            refused_by_one, states_of_one = _of_optimizer(alone, plan, model, mode, notes)
        refused |= refused_by_one
        for parameter, sizes in states_of_one.items():
            shaped, fixed = states.get(parameter, (0, 0))
            states[parameter] = (shaped + sizes[0], fixed + sizes[1])
    return MemoryFacts(
        model=_model_memory(recipe, model, states, mode, batches, notes),
        refused=refused,
        device_bytes=_device_bytes() if recipe.device != "cpu" else None,
    )


def _device_bytes() -> int | None:
    """Return the memory of the smallest GPU of this machine; None without one."""
    if not torch.cuda.is_available():
        return None
    return min(
        int(torch.cuda.get_device_properties(index).total_memory)
        for index in range(torch.cuda.device_count())
    )


def _model_memory(
    recipe: Recipe,
    model: nn.Module,
    states: dict[Tensor, tuple[int, int]],
    mode: FakeTensorMode,
    batches: dict[int, Any],
    notes: list[str],
) -> ModelMemory:
    """Return the sizes of a model.

    Raises:
        RecipeError: The model has no blocks of the given classes, or cannot be split as the recipe
            says.
    """
    split_sizes = _split_sizes(recipe, model)
    blocks = find_blocks(model, recipe.blocks)
    of_block = {
        parameter: index for index, block in enumerate(blocks) for parameter in block.parameters()
    }
    parameters = []
    for parameter in model.parameters():
        state_bytes, fixed_state_bytes = states.get(parameter, (0, 0))
        rows, parts = parameter.shape[0] if parameter.ndim else 1, 1
        if parameter in split_sizes:
            rows, parts = split_sizes[parameter], recipe.tensor_parallel
        gradient_dtype = parameter.grad_dtype or parameter.dtype
        sizes = ParameterMemory(
            rows=rows,
            values=parameter.numel(),
            parts=parts,
            num_bytes=num_bytes(parameter),
            gradient_bytes=parameter.numel() * gradient_dtype.itemsize
            if parameter.requires_grad
            else 0,
            block=of_block.get(parameter),
            state_bytes=state_bytes,
            fixed_state_bytes=fixed_state_bytes,
        )
        parameters.append(sizes)
    activations = _activations(recipe, model, mode, batches, notes)
    checkpointed = None
    if blocks and activations is not None:
        checkpoint_activations(blocks)
        checkpointed = _activations(recipe, model, mode, batches, notes)
    return ModelMemory(
        parameters=tuple(parameters),
        buffer_bytes=sum(map(num_bytes, model.buffers())),
        sample_bytes=_bytes_of_a_sample(batches),
        activations=activations,
        checkpointed=checkpointed,
        notes=tuple(notes),
    )


def _split_sizes(recipe: Recipe, model: nn.Module) -> dict[Tensor, int]:
    """Return the rows that a tensor-parallel rank holds of each parameter that is split.

    Raises:
        RecipeError: The model cannot be split as the recipe says.
    """
    size = recipe.tensor_parallel
    if size == 1:
        return {}
    sizes: dict[Tensor, int] = {}
    for name, style in find_styles(model, recipe.tensor_parallel_plan, size).items():
        module = model.get_submodule(name)
        for side, _ in split_sides(module, style):
            weight, bias = module.weight, getattr(module, "bias", None)
            assert isinstance(weight, Tensor)
            if side in ("outputs", "rows"):
                sizes[weight] = weight.shape[0] // size
                if isinstance(bias, Tensor):
                    sizes[bias] = bias.shape[0] // size
            else:
                sizes[weight] = weight.shape[0]
    return sizes


def num_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor, or of the tensors that it is made of, as quantized ones are."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(num_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def _read_batches(recipe: Recipe, source: RecipeSource | None, notes: list[str]) -> dict[int, Any]:
    """Return batches of the first training samples by their size; none if they cannot be read."""
    seed_all(recipe.seed)
    try:
        data = with_first_samples(recipe, call_data(recipe), max(_SIZES))
        reader, num_samples = Reader(recipe, data, source), sample_count(data.train, "train")
        return {
            size: raise_if_error(
                reader[MicroBatchRequest("train", 0, list(range(size)), has_weight=True)]
            ).batch
            for size in _SIZES
            if size <= num_samples
        }
    except Exception as error:  # noqa: BLE001  # whatever the recipe's own code raises
        reason = str(error) if isinstance(error, LauncherError) else error_line(error)
        notes.append(f"Activations are unknown, because no sample could be read: {reason}")
        return {}


def _bytes_of_a_sample(batches: dict[int, Any]) -> int:
    for size, batch in batches.items():
        return sum(num_bytes(tensor) for tensor in tensors_in(batch)) // size
    return 0


def _build(
    recipe: Recipe, mode: FakeTensorMode, batches: dict[int, Any], notes: list[str]
) -> nn.Module:
    """Return the recipe's model with fake parameters.

    Raises:
        RecipeError: The recipe's model function is at fault.
    """

    def first_batch() -> Any:
        return next(iter(batches.values()))

    try:
        with mode:
            model = build_model(recipe, first_batch)
    except Exception as error:  # noqa: BLE001  # whatever the recipe's own code raises
        model = build_model(recipe, first_batch)
        notes.append(
            "The model was built in memory, because its function needs the values of tensors "
            f"({error_line(error)})."
        )
    _make_fake(model, mode)
    with mode:
        if recipe.precision == "fp64":
            model = model.double()
        if recipe.param_dtype == "bf16":
            keep_in_bfloat16(model)
            keep_gradients_in_float32(model)
    return model


def _make_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace the parameters and buffers of a model that have values by fake ones."""
    fakes: dict[Tensor, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):  # noqa: SLF001
            for name, tensor in tensors.items():
                if tensor is None or getattr(tensor, "fake_mode", None) is mode:
                    continue
                if tensor not in fakes:
                    fakes[tensor] = mode.from_tensor(tensor)
                tensors[name] = fakes[tensor]


def _refused_by_parameters(plan: Plan, model: nn.Module) -> dict[str, str]:
    """Return the errors by the names of the strategies that cannot train the model's parameters."""
    refused: dict[str, str] = {}
    for strategy in STRATEGIES:
        try:
            check_parameters(model, replace(plan, strategy=strategy))
        except RecipeError as error:
            refused[strategy] = str(error)
    return refused


def _of_optimizer(
    recipe: Recipe, plan: Plan, model: nn.Module, mode: FakeTensorMode, notes: list[str]
) -> tuple[dict[str, str], dict[Tensor, tuple[int, int]]]:
    """Create the recipe's optimizer, and take a step with fake gradients.

    An optimizer that reads values takes the step with small parameters that have some.

    Returns:
        The errors by the names of the strategies that it cannot train under; and for each
        parameter the bytes of its state of the parameter's shape, and of its other state.

    Raises:
        RecipeError: The recipe's optimizer function is at fault.
    """
    try:
        with mode:
            optimizer = make_optimizer(recipe, model, plan.lr)
            states = _states_after_a_step(optimizer, recipe)
    except LauncherError:
        raise
    except Exception:  # noqa: BLE001  # whatever the optimizer's own code raises
        try:
            optimizer, states = _step_with_values(recipe, plan, model)
        except Exception as error:  # noqa: BLE001
            notes.append(
                "The optimizer's state is taken to be that of AdamW, two values for each weight, "
                f"because a step on small weights failed ({error_line(error)})."
            )
            return {}, {p: (2 * num_bytes(p), 0) for p in model.parameters() if p.requires_grad}
    refused: dict[str, str] = {}
    for strategy in STRATEGIES:
        try:
            check_strategy_of(optimizer, strategy)
        except RecipeError as error:
            refused[strategy] = str(error)
    return refused, states


def _states_after_a_step(optimizer: Optimizer, recipe: Recipe) -> dict[Tensor, tuple[int, int]]:
    """Return, for each parameter, the bytes of state of its shape and of other state."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.grad = zero_gradient(parameter)
    take_step(optimizer, recipe, finite=True)
    states = {}
    for parameter in parameters:
        tensors = list(tensors_in(dict(optimizer.state[parameter])))
        like = [tensor for tensor in tensors if tensor.shape == parameter.shape]
        shaped = sum(map(num_bytes, like)) if parameter.ndim else 0
        states[parameter] = (shaped, sum(map(num_bytes, tensors)) - shaped)
        parameter.grad = None
    return states


def _step_with_values(
    recipe: Recipe, plan: Plan, model: nn.Module
) -> tuple[Optimizer, dict[Tensor, tuple[int, int]]]:
    """Take a step with small parameters; return the states of those that the model has.

    State that is not of a parameter's shape is taken to be as small as it is here.
    """
    places = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()  # noqa: SLF001
        if parameter is not None
    ]
    small = {
        parameter: nn.Parameter(
            torch.zeros([min(size, _SMALL) for size in parameter.shape], dtype=parameter.dtype),
            requires_grad=parameter.requires_grad,
        )
        for _, _, parameter in places
    }
    try:
        for module, name, parameter in places:
            module._parameters[name] = small[parameter]  # noqa: SLF001
        optimizer = make_optimizer(recipe, model, plan.lr)
        states = _states_after_a_step(optimizer, recipe)
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter  # noqa: SLF001
    scaled: dict[Tensor, tuple[int, int]] = {}
    for parameter, with_values in small.items():
        shaped, fixed = states.get(with_values, (0, 0))
        scaled[parameter] = (shaped * parameter.numel() // max(with_values.numel(), 1), fixed)
    return optimizer, scaled


def _activations(
    recipe: Recipe,
    model: nn.Module,
    mode: FakeTensorMode,
    batches: dict[int, Any],
    notes: list[str],
) -> ActivationMemory | None:
    """Return the activations of forward and backward; None, with a note, if a pass fails."""
    readings: list[tuple[int, int, int]] = []
    for size, batch in batches.items():
        try:
            activations, casts = _largest_pass(recipe, model, mode, batch)
        except Exception as error:  # noqa: BLE001  # whatever the recipe's own code raises
            notes.append(
                "Activations are unknown, because forward and backward need the values of tensors "
                f"({error_line(error)})."
            )
            return None
        readings.append((size, activations, casts))
    if not readings:
        return None
    first, last = readings[0], readings[-1]
    slope = first[1] / first[0]
    if last[0] > first[0]:
        slope = (last[1] - first[1]) / (last[0] - first[0])
    return ActivationMemory(
        fixed_bytes=max(last[1] - slope * last[0], 0.0), bytes_per_sample=slope, cast_bytes=last[2]
    )


def _largest_pass(
    recipe: Recipe, model: nn.Module, mode: FakeTensorMode, batch: Any
) -> tuple[int, int]:
    """Return the most bytes of activations and of casts in the turn of any objective."""
    passes = []
    for alone, names in zip(recipe.by_objective(), trained_names(recipe, model), strict=True):
        with only_trained(model, names):
            passes.append(_measure_pass(alone, model, mode, batch))
    activations, casts = zip(*passes, strict=True)
    return max(activations), max(casts)


def _measure_pass(
    recipe: Recipe, model: nn.Module, mode: FakeTensorMode, batch: Any
) -> tuple[int, int]:
    """Run forward and backward on fake tensors.

    Returns:
        The most bytes at any time besides weights, gradients and weights cast by autocast, and the
        most bytes of the latter.
    """
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    meter = _AllocationMeter(model)
    hooks = [p.register_post_accumulate_grad_hook(meter.take_gradient) for p in trained]
    dtype = getattr(torch, AUTOCAST[recipe.precision]) if recipe.precision in AUTOCAST else None
    autocast = torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext()
    try:
        with mode, meter:
            batch = map_tensors(lambda tensor: _as_fake(tensor, recipe, mode), batch)
            with autocast:
                outputs = recipe.forward(model, batch)
                total, _ = training_loss(recipe.loss, outputs, batch)
            del outputs
            total.backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.grad = None
    return meter.peaks()


def _as_fake(tensor: Tensor, recipe: Recipe, mode: FakeTensorMode) -> Tensor:
    """Return a tensor of a batch without values, in the dtype in which it reaches the model."""
    is_double = recipe.precision == "fp64" and tensor.is_floating_point()
    return torch.empty_like(
        mode.from_tensor(tensor), dtype=torch.float64 if is_double else tensor.dtype
    )


class _AllocationMeter(TorchDispatchMode):
    """Records when the storages of tensors are allocated and freed.

    Args:
        model: The model, whose parameters and buffers are not counted.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._weights = {id(parameter) for parameter in model.parameters()}
        self._of_model = {
            tensor.untyped_storage()._cdata  # noqa: SLF001
            for tensor in (*model.parameters(), *model.buffers())
        }
        self._known: dict[int, weakref.ref[Any]] = {}
        self._events: list[tuple[int, int]] = []
        """The index of a storage, and its bytes, which are negative where it is freed."""
        self._indices: dict[int, int] = {}
        self._gradients: set[int] = set()
        self._casts: set[int] = set()
        self._count = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call an operation, and record the storages of what it returns."""
        result = func(*args, **(kwargs or {}))
        is_cast = func is torch.ops.aten._to_copy.default and self._is_weight(args[0])  # noqa: SLF001
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self._record(value, is_cast=is_cast)
        return result

    def take_gradient(self, parameter: Tensor) -> None:
        """Count what has become the gradient of a parameter as a gradient, since its allocation."""
        if parameter.grad is not None:
            key = parameter.grad.untyped_storage()._cdata  # noqa: SLF001
            if key in self._indices:
                self._gradients.add(self._indices[key])
            parameter.grad = None

    def peaks(self) -> tuple[int, int]:
        """Return the most bytes at any time of activations, and of weights that were cast."""
        held = most = held_casts = most_casts = 0
        for index, size in self._events:
            if index in self._casts:
                held_casts += size
                most_casts = max(most_casts, held_casts)
            elif index not in self._gradients:
                held += size
                most = max(most, held)
        return most, most_casts

    def _is_weight(self, tensor: Any) -> bool:
        return id(tensor) in self._weights

    def _record(self, tensor: Tensor, *, is_cast: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata  # noqa: SLF001
        if key in self._known or key in self._of_model:
            return
        index = self._count
        self._count += 1
        size = storage.nbytes()
        self._indices[key] = index
        self._events.append((index, size))
        if is_cast:
            self._casts.add(index)

        def on_free(_: Any) -> None:
            self._events.append((index, -size))
            del self._known[key], self._indices[key]

        self._known[key] = weakref.ref(storage, on_free)


def write_memory(reading: MemoryFacts, run_dir: RunDir) -> None:
    """Write what was measured to the run folder."""
    write_json(run_dir.memory, exact_floats(asdict(reading)))


def read_memory(run_dir: RunDir) -> MemoryFacts:
    """Return what was measured in the run folder.

    Raises:
        RunDirError: The folder holds nothing of the kind, or it is damaged.
    """
    return read_json(run_dir.memory, MemoryFacts, exact=True)
