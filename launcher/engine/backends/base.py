"""The interface between the training loop and the backends."""

from __future__ import annotations

import contextlib
import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import Store
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from launcher.engine.backends.call_order import CallOrder
from launcher.engine.backends.compute_timer import ComputeTimer
from launcher.engine.backends.placement import Placement
from launcher.engine.backends.recipe_forward import call_forward
from launcher.engine.backends.transfers import upload_scalar
from launcher.engine.optimizers.joint import optimizers_in
from launcher.engine.optimizers.taking_steps import take_step
from launcher.engine.ranks.cpu_binding import bind_to_gpu, pci_address_of
from launcher.engine.state.compiled import plain_name
from launcher.engine.state.fragments import Box, Fragment
from launcher.engine.state.host_copies import HostCopies, HostMemory
from launcher.engine.state.initial_values import InitialValues, parts_of, whole_box
from launcher.engine.state.loss_scaler import LossScaler
from launcher.engine.state.meta_tensors import allocate
from launcher.engine.state.module_state import (
    buffers_to_save,
    check_extra_state,
    gather_extra_state,
    read_buffers,
    read_extra_state,
)
from launcher.engine.state.optimizer_kinds import check_strategy_of
from launcher.engine.state.parameter_kinds import (
    gradient_values,
    keep_gradients_in_float32,
    sparse_parameters,
    sparse_zeros,
    zero_gradient,
)
from launcher.engine.state.training_state import (
    Snapshot,
    StateSource,
    check_optimizer,
    live_tensors,
    parameters,
    plain_values,
    read_into,
)
from launcher.engine.state.virtual_buffers import VirtualBuffers
from launcher.environment.numa import CpuBinding
from launcher.environment.world import World
from launcher.planning.configs import AUTOCAST
from launcher.planning.plan import Plan
from launcher.planning.strategy import STRATEGIES
from launcher.planning.virtual_ranks import Part
from launcher.printable import add_note
from launcher.recipe.recipe import Recipe

T = TypeVar("T")

_SECOND_BACKWARD = (
    "The training loop calls backward() on the loss that the recipe returns. Leave backward() out "
    "of the recipe's loss, forward and callbacks."
)
"""What is added to torch's error about a graph that is gone."""


class WeightKind(NamedTuple):
    """What is known of a tensor before it is gathered."""

    dtype: torch.dtype
    """Type of its elements."""

    size: torch.Size
    """Its size over all ranks."""


class Backend(ABC):
    """A way to train a model on one or more ranks, as the training loop sees it.

    All ranks must make the calls that are marked as collective, in the same order.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def data_rank(self) -> int:
        """The place of this rank among those that share a batch.

        The ranks of a tensor-parallel group have the same one, and read the same samples.
        """
        return self.rank // self.plan.tensor_parallel

    @property
    def data_ranks(self) -> int:
        """The number of ranks, or of tensor-parallel groups of ranks, that share a batch."""
        return max(self.world_size // self.plan.tensor_parallel, 1)

    @property
    def leads_group(self) -> bool:
        """Whether this rank is the first of its tensor-parallel group, and counts its samples."""
        return self.rank % self.plan.tensor_parallel == 0

    def __init__(self, recipe: Recipe, plan: Plan, device: torch.device) -> None:
        self.recipe = recipe
        self.plan = plan
        self.device = device
        # The norm of offloaded gradients is on the host, and DeepSpeed reads the norm in each step.
        is_on_host = recipe.offload is not None or STRATEGIES[plan.strategy].uses_deepspeed
        self.scaler = (
            LossScaler(plan.data_ranks, torch.device("cpu") if is_on_host else device)
            if plan.precision == "fp16"
            else None
        )
        """The loss scaler for fp16; None in other precisions."""
        self._others: list[Backend] = []
        """The backends of the further objectives of the recipe."""
        self.of_objectives: frozenset[str] = frozenset()
        """Names of the parameters that the recipe's objectives train, of which only those of the
        objective whose turn it is require a gradient; empty if the recipe has one loss."""
        self.host_memory = HostMemory(is_pinned=device.type == "cuda")
        """The memory of the copies from which checkpoints are written."""
        self.call_order: CallOrder | None = None
        """The check that all ranks gather weights in the same order; None if weights are not
        gathered, or if the model is compiled."""
        self.virtual_buffers: VirtualBuffers | None = None
        """BatchNorm's statistics of the virtual ranks of this rank; None without virtual ranks."""
        self.compute_timer: ComputeTimer | None = None
        """Times this rank's passes on its GPU; None on CPUs, and where they wait for other ranks in
        between."""
        self.cpu_binding: CpuBinding | None = None
        """The CPUs that this rank keeps to; None on CPUs, and with numa=off."""
        self._trained: list[nn.Parameter] | None = None
        self._sparse: frozenset[nn.Parameter] = frozenset()
        """The parameters with sparse gradients."""

        self._dtype = (
            getattr(torch, AUTOCAST[plan.precision]) if plan.precision in AUTOCAST else None
        )
        self._placement = Placement(
            device, channels_last=recipe.channels_last, double=plan.precision == "fp64"
        )

    def bind_to_numa_node(self, world: World, store: Store | None = None) -> None:
        """Bind this process to the CPUs near its GPU, as the recipe asks (collective on the node).

        Args:
            world: This rank.
            store: The store at which the ranks have met; None if this rank is alone.
        """
        if self.device.type == "cuda":
            self.cpu_binding = bind_to_gpu(
                pci_address_of(self.device),
                world,
                store,
                workers_per_rank=self.plan.workers_per_rank,
                wanted=self.recipe.numa == "auto",
            )

    def to_device(self, batch: Any) -> Any:
        """Return `batch` with its tensors on this rank's device; copies overlap computation."""
        return self._placement.copy(batch)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the autocast context for forward and loss at the plan's precision."""
        if self._dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self._dtype)

    def communication(self) -> tuple[float, int] | None:
        """Return the communication time that did not overlap with computation on this rank.

        Returns:
            The total (seconds, number of timed optimizer steps), or None if the backend does not
            measure it.
        """
        return None

    def compute_times(self) -> tuple[float, int] | None:
        """Return the time of this rank's own passes on its GPU since the last call, without a wait.

        Returns:
            The total (seconds, number of optimizer steps), or None if it is not measured.
        """
        return None if self.compute_timer is None else self.compute_timer.take()

    @abstractmethod
    def prepare(
        self,
        model: nn.Module,
        blocks: list[nn.Module],
        make_optimizer: Callable[[nn.Module], Optimizer],
        initial: InitialValues | None = None,
    ) -> tuple[nn.Module, Optimizer]:
        """Place `model`; return the module that `forward` takes and the optimizer of its weights.

        Args:
            model: The recipe's model, on the CPU with its values, or on the meta device.
            blocks: Modules of the model that may be sharded separately.
            make_optimizer: Returns a new optimizer for a model.
            initial: The values of a model on the meta device.
        """

    def for_objective(
        self, recipe: Recipe, model: nn.Module, make_optimizer: Callable[[nn.Module], Optimizer]
    ) -> tuple[Backend, nn.Module, Optimizer]:
        """Return a backend for the turns of a further objective of the prepared model (collective).

        It shares the ranks, the model and the weights with this backend, and has its own gradients
        and loss scale. Only the parameters of the objective may require a gradient.

        Args:
            recipe: The recipe with the loss of this objective alone.
            model: The module that `prepare` returned.
            make_optimizer: Returns a new optimizer for a model.

        Returns:
            The backend, the module that its `forward` takes, and the optimizer.
        """
        other = copy.copy(self)
        other.recipe = recipe
        wrapped = other.prepare_objective(model)
        self._others.append(other)
        optimizer = make_optimizer(self.unwrap(model))
        check_strategy_of(optimizer, self.plan.strategy)
        return other, wrapped, optimizer

    def prepare_objective(self, model: nn.Module) -> nn.Module:
        """Prepare the turns of the objective whose parameters require a gradient (collective).

        Args:
            model: The module that `prepare` returned.

        Returns:
            The module that `forward` takes in these turns.
        """
        self._trained, self._others = None, []
        if self.scaler is not None:
            self.scaler = LossScaler(self.divisor, self.scaler.scale.device)
        module = self.unwrap(model)
        if self.recipe.param_dtype == "bf16":
            keep_gradients_in_float32(module)
        self._sparse = frozenset(sparse_parameters(module).values())
        return model

    def require_gradients(
        self, model: nn.Module, trained: Iterable[nn.Parameter], others: Iterable[nn.Parameter]
    ) -> None:
        """Let `trained` require a gradient from the next forward on, and `others` not.

        Args:
            model: The module that `prepare` returned.
            trained: The parameters of the objective whose turn begins.
            others: The parameters of the other objectives.
        """
        del model
        for parameter in others:
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)

    @property
    def scalers(self) -> list[LossScaler]:
        """The loss scalers of all objectives for fp16, in the order of their turns."""
        return [each.scaler for each in (self, *self._others) if each.scaler is not None]

    def place(self, model: nn.Module, initial: InitialValues | None = None) -> nn.Module:
        """Return `model` on this rank's device, in the recipe's memory format.

        Args:
            model: The model, on the CPU with its values, or on the meta device.
            initial: The values of a model on the meta device.
        """
        if initial is not None:
            allocate(model, self.device)
            initial.fill(parts_of(model))
        if self.recipe.channels_last:
            # Two steps, because a single call would apply the format to the CPU tensors first.
            return model.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model.to(self.device)

    def forward(self, function: Callable[[Any, Any], Any], model: nn.Module, batch: Any) -> Any:
        """Return the outputs of the recipe's `forward` for a batch.

        Args:
            function: The recipe's `forward`, which receives the recipe's own module, so that its
                attributes, methods and submodules work under every strategy as on one rank.
            model: The module that `prepare` returned.
            batch: The batch, on this rank's device.
        """
        return call_forward(function, model, batch)

    @property
    def divisor(self) -> int:
        """The number that the sum of gradients over data ranks is divided by: their number.

        The training loop multiplies losses by it.
        """
        return self.data_ranks

    @abstractmethod
    def micro_step(
        self, *, last: bool, part: Part | None = None
    ) -> contextlib.AbstractContextManager[Any]:
        """Return the context of one micro-step.

        Args:
            last: Whether it is the last one of the step, which averages gradients over ranks.
            part: The part of the batch that it computes; None without virtual ranks.
        """

    def read(self, values: Tensor) -> Any:
        """Return the values of a tensor as numbers, in lists by its dimensions.

        On a GPU the host waits here for all work that it has queued. The loop reads nothing from a
        device in any other place.
        """
        return values.tolist()

    @abstractmethod
    def sum(self, values: Tensor) -> Tensor:
        """Return `values` summed over ranks (collective)."""

    def sum_samples(self, values: Tensor) -> Tensor:
        """Return what ranks measured on their samples, summed so that each sample counts once.

        The call is collective, and every rank gets the same result.
        """
        return self.sum(values if self.leads_group else torch.zeros_like(values))

    @abstractmethod
    def broadcast(self, value: Any) -> Any:
        """Return rank 0's `value`, which may be any picklable object (collective)."""

    @abstractmethod
    def gather(self, value: Any) -> list[Any]:
        """Return the `value` of every rank, in rank order, on every rank (collective)."""

    def local_rank_zero_first(self, what: str, action: Callable[[], T]) -> T:
        """Call `action` on the first rank of each node, then on its other ranks (collective).

        The other ranks wait without a timeout, because the first may prepare data for a long time.

        Args:
            what: A description of `action` that waiting ranks report, such as "read the data".
            action: The function to call.

        Returns:
            What `action` returned on this rank.

        Raises:
            LostRankError: `action` failed on the first rank.
        """
        return action()

    def in_turns(self, what: str, action: Callable[[], T]) -> T:
        """Call `action` on one rank of each node after the other (collective).

        Args:
            what: A description of `action` that waiting ranks report, such as "built the model".
            action: The function to call.

        Returns:
            What `action` returned on this rank.

        Raises:
            LostRankError: `action` failed on an earlier rank.
        """
        return action()

    def own_boxes(self, size: torch.Size) -> list[Box]:
        """Return the boxes of a parameter that this rank will keep.

        Args:
            size: The shape of the full parameter.
        """
        return [whole_box(size)]

    def wait_for_all(self, what: str) -> None:
        """Wait until all ranks have done `what`, without a timeout (collective)."""
        del what  # one rank alone waits for nobody

    @abstractmethod
    def close(self) -> None:
        """Leave the process group."""

    def weights(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Yield the names and the unsharded tensors of the recipe's module (collective).

        Tensors are gathered one at a time, and every rank must take them all. They are complete on
        rank 0. A weight with several names is yielded once, under the first one.
        """
        module = self.unwrap(model)
        tensors = module.state_dict()
        for name in state_dict_names(module):
            yield plain_name(name), tensors[name]

    def weight_kinds(self, model: nn.Module) -> dict[str, WeightKind]:
        """Return the type and the unsharded size of each tensor that `weights` yields, by name."""
        module = self.unwrap(model)
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        return {
            plain_name(name): WeightKind(tensors[name].dtype, self.full_size(tensors[name]))
            for name in state_dict_names(module)
        }

    def full_size(self, tensor: Tensor) -> torch.Size:
        """Return the size of a parameter or buffer over all ranks."""
        return tensor.shape

    def check_state(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Check, after the first step, that `snapshot` saves all state of model and optimizer.

        Raises:
            TrainingError: The optimizer or a module has state that a checkpoint cannot hold.
        """
        module = self.unwrap(model)
        for each in optimizers_in(optimizer):
            check_optimizer(self.saved_tensors(module), each)
        check_extra_state(module)

    def saved_tensors(self, module: nn.Module) -> Iterable[Tensor]:
        """Return the tensors whose optimizer state a snapshot contains."""
        return parameters(module).values()

    def snapshot(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        further: Iterable[tuple[str, Tensor | Fragment]] = (),
    ) -> Snapshot:
        """Return this rank's part of a checkpoint, copied to the host (collective).

        The snapshot omits state that `check_state` refuses.

        Args:
            model: The module that `prepare` returned.
            optimizer: Its optimizer.
            further: Names and tensors to save besides; full ones in the same order on every rank.
        """
        module = self.unwrap(model)
        tensors = chain(live_tensors(module, optimizer), further)
        return self.copy_state(module, tensors, plain_values(module, optimizer))

    def copy_state(
        self,
        module: nn.Module,
        tensors: Iterable[tuple[str, Tensor | Fragment]],
        values: dict[str, Any],
    ) -> Snapshot:
        """Return this rank's part of a checkpoint, copied to the host (collective).

        Args:
            module: The recipe's own module, whose buffers and extra state are saved.
            tensors: Names and tensors of the weights and of the optimizer's state.
            values: State of the optimizer that is not tensors.
        """
        copies = HostCopies(tensors, self.rank, self.world_size, self.host_memory)
        return Snapshot(
            tensors={**copies.tensors, **self.buffers_to_save(module)},
            values=values,
            extra=gather_extra_state(module, self.gather),
            memory=copies.memory,
            release=copies.release,
        )

    def buffers_to_save(self, module: nn.Module) -> dict[str, Tensor]:
        """Return host copies of the buffers that this rank saves (collective)."""
        virtual = self.virtual_buffers
        if virtual is None:
            return buffers_to_save(module, self.rank, self.gather)
        shared = buffers_to_save(module, self.rank, self.gather, without=virtual.names)
        return shared | dict(virtual.to_save())

    def restore(self, model: nn.Module, optimizer: Optimizer, source: StateSource) -> None:
        """Fill model and optimizer from `source`, which any number of ranks may have written.

        Raises:
            CheckpointError: The source belongs to another model.
        """
        module = self.unwrap(model)
        read_into(module, optimizer, source)
        self.restore_module(module, source)

    def restore_module(self, module: nn.Module, source: StateSource) -> None:
        """Fill buffers and extra state from `source`.

        Raises:
            CheckpointError: The source belongs to another model.
        """
        # All ranks of a tensor-parallel group read what its first one has.
        rank = self.data_rank * self.plan.tensor_parallel
        read_buffers(module, source, rank, self.world_size, self.device)
        if self.virtual_buffers is not None:
            self.virtual_buffers.read(source)
        read_extra_state(module, source, rank, self.world_size)

    def unwrap(self, model: nn.Module) -> nn.Module:
        """Return the recipe's own module, with the parameters that the optimizer updates.

        Args:
            model: The module that `prepare` returned.
        """
        return model

    def backward(self, loss: Tensor, weight: float | Tensor) -> None:
        """Accumulate the gradient of `loss` times `weight`, which is averaged over ranks."""
        weight = self.scaled(weight)
        if self.compute_timer is not None:
            self.compute_timer.end_with(loss)
        # Starting the chain rule at the weight saves a multiplication in forward and in backward.
        try:
            loss.backward(poison_nonfinite(loss, weight))
        except RuntimeError as error:
            if "a second time" in str(error):
                add_note(error, _SECOND_BACKWARD)
            raise
        if self.call_order is not None:
            self.call_order.end_pass()

    def scaled(self, weight: float | Tensor) -> float | Tensor:
        """Return the weight of a loss times the loss scale, in fp16."""
        return weight if self.scaler is None else weight * self.scaler.factor

    def apply(self, optimizer: Optimizer, max_grad_norm: float | None) -> Tensor:
        """Clip the gradients, step and clear them; return the gradient norm before clipping.

        The norm is that of the global gradient, so it is the same on every rank. The step is
        skipped if the norm is not finite.
        """
        parameters = self._with_gradients(optimizer)
        grads = self._gradients_of(parameters)
        norm = self.norm(grads)
        if self.scaler is not None:
            norm = self.scaler.unscale(local_values(grads), norm)
            self.scaler.update(norm.isfinite())
        if max_grad_norm is not None:
            # Like torch.nn.utils.clip_grads_with_norm_, without sorting by device and dtype.
            factor = torch.clamp(max_grad_norm / (norm + 1e-6), max=1.0)
            torch._foreach_mul_(local_values(grads), factor)
        on_cpu = norm.device.type == "cpu"  # reading the norm does not wait for a device
        take_step(optimizer, self.recipe, math.isfinite(norm.item()) if on_cpu else norm.isfinite())
        for parameter in parameters:
            parameter.grad = None
        return norm

    def _with_gradients(self, optimizer: Optimizer) -> list[nn.Parameter]:
        """Return the parameters to update: all trained ones, whether this step used them or not.

        A parameter that no sample of the batch used gets a gradient of zeros. Sharded optimizers
        keep their parameters in one flat tensor and cannot skip it, and every strategy must take
        the same step. One that a callback has frozen has no gradient, and stays as it is.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if self._trained is None:
            self._trained = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter in self._trained:
            if parameter.grad is None and parameter.requires_grad:
                is_sparse = parameter in self._sparse
                zeros = sparse_zeros if is_sparse else zero_gradient
                parameter.grad = zeros(parameter)
        return [parameter for parameter in parameters if parameter.grad is not None]

    def _gradients_of(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        """Return the gradients, whose values can be changed in place; of sparse ones the values."""
        grads: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
        if any(grad.is_sparse for grad in grads):
            return [gradient_values(parameter) for parameter in parameters]
        return grads

    def norm(self, grads: list[Tensor]) -> Tensor:
        """Return the 2-norm of the global gradient, as a scalar tensor on the device."""
        if not grads:
            return torch.zeros((), device=self.device)
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))  # noqa: SLF001

    @contextlib.contextmanager
    def evaluated_weights(self, model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
        """Replace the weights by those that the optimizer evaluates, in this context (collective).

        Schedule-free optimizers train at other weights than those that they evaluate.
        """
        begin, end = getattr(optimizer, "eval", None), getattr(optimizer, "train", None)
        if begin is None or end is None:
            yield
            return
        self.unwrap(model)  # weights that FSDP still holds gathered would keep their values
        begin()
        try:
            yield
        finally:
            self.unwrap(model)
            end()

    def updated_weights(self, model: nn.Module) -> list[Tensor]:
        """Return the tensors of the trained weights that the optimizer updates on this rank.

        Under ZeRO these are its partitions in fp32; elsewhere they are the parameters themselves.
        """
        return list(self._updated(model).values())

    def name_updated(
        self, model: nn.Module, values: Sequence[Tensor]
    ) -> Iterator[tuple[str, Tensor | Fragment]]:
        """Yield the names of the trained weights, and this rank's part of a value of each.

        Args:
            model: The module that `prepare` returned.
            values: A tensor for each of `updated_weights`, of its shape.

        Yields:
            A name and a view of the values: full, or a shard as `snapshot` saves it.
        """
        yield from zip(self._updated(model), values, strict=True)

    def _updated(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the trained parameters by name, also between the turns of objectives."""
        return {
            name: parameter
            for name, parameter in parameters(self.unwrap(model)).items()
            if parameter.requires_grad or name in self.of_objectives
        }

    def use_updated(self, model: nn.Module) -> None:
        """Let forward compute with what was written to `updated_weights` (collective)."""
        self.unwrap(model)  # weights that FSDP still holds gathered would keep their values

    def adopt_weights(self) -> None:  # noqa: B027  # most backends train the model's own weights
        """Train on from the values that the weights of the model have, if they were written to."""

    def any_rank(self, flag: bool) -> bool:
        """Return whether `flag` is true on any rank (collective)."""
        return bool(self.read(self.sum(upload_scalar(float(flag), self.device))))


def local_values(tensors: list[Tensor]) -> list[Tensor]:
    """Return the parts of tensors that are on this rank, which can be changed in place.

    torch refuses operations on lists of DTensors that are spread over different ranks.
    """
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def poison_nonfinite(loss: Tensor, weight: float | Tensor) -> Tensor:
    """Return `weight` as a tensor, or NaN if the loss is not finite.

    NaN makes the gradients non-finite whatever the model computes, so every rank detects it in the
    norm of the global gradient without extra communication.
    """
    if loss.device.type == "cpu":  # reading the loss does not wait for a device
        return torch.full_like(loss, float(weight) if math.isfinite(loss.item()) else math.nan)
    return (loss.detach() * 0.0 + weight).to(loss.dtype)


def state_dict_names(model: nn.Module) -> list[str]:
    """Return the names of parameters and persistent buffers, each shared tensor under one name."""
    saved = model.state_dict().keys()
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    return [name for name in names if name in saved]
