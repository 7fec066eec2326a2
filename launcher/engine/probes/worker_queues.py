"""Refuses batches that DataLoader workers could not keep ready, because /dev/shm is too small."""

from __future__ import annotations

from launcher.engine.backends.nested_tensors import tensors_in
from launcher.engine.data.micro_batch import MicroBatch
from launcher.errors import RecipeError
from launcher.planning.plan import Plan
from launcher.quantities import size


def num_bytes(micro_batch: MicroBatch) -> int:
    """Return the bytes of the tensors of a micro-batch, which workers pass through /dev/shm."""
    tensors = tensors_in(micro_batch.batch)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def check_worker_queues(micro_batch: MicroBatch, plan: Plan, shm_bytes: int) -> None:
    """Refuse queues of batches that do not fit into /dev/shm.

    The queues of all ranks of a node fill it soon after the start, and a worker that finds no space
    is killed by SIGBUS.

    Args:
        micro_batch: A micro-batch of training samples, from which the size of others is estimated.
        plan: The plan of the run.
        shm_bytes: Size of /dev/shm; 0 if it is not known.

    Raises:
        RecipeError: They do not fit.
    """
    workers, num_samples = plan.workers_per_rank, len(micro_batch.request.indices)
    if not (workers and shm_bytes and num_samples):
        return
    per_batch = num_bytes(micro_batch) / num_samples * plan.micro_batch_size
    batches = workers * (plan.prefetch_factor or 1)
    needed = batches * per_batch * plan.nproc_per_node
    if needed <= shm_bytes:
        return
    ranks = f", on {plan.nproc_per_node} ranks" if plan.nproc_per_node > 1 else ""
    raise RecipeError(
        f"DataLoader workers would keep {size(needed)} of batches ready: {workers} workers with "
        f"{plan.prefetch_factor} batches each, of {size(per_batch)}{ranks}. The shared memory of "
        f"this machine (/dev/shm) has {size(shm_bytes)}, and a worker that finds it full is "
        "killed. Enlarge it, as with `docker run --shm-size=8g` or --ipc=host, or lower "
        "num_workers, prefetch_factor or micro_batch_size; num_workers=0 needs none of it."
    )
