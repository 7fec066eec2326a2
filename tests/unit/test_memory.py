"""Memory of a rank by strategy, against numbers computed by hand from the ZeRO paper's formulas."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from launcher import Data, Recipe, adamw, make_plan, sgd
from launcher.analysis.strategy_choice import (
    StrategyCandidate,
    StrategyTrial,
    cheapest_first,
    fastest,
    sent_bytes,
)
from launcher.environment.machine import Machine
from launcher.errors import PlanError
from launcher.planning.memory import fitting, rank_memory
from launcher.planning.memory_facts import (
    ActivationMemory,
    FSDPMemory,
    MemoryFacts,
    MemoryLayout,
    ModelMemory,
    ParameterMemory,
    layout_of,
)
from launcher.planning.virtual_ranks import VirtualRanks
from launcher.tuning.memory_plan import plan_memory

MACHINE = Machine(
    hostname="node",
    num_gpus=4,
    usable_cores=8,
    cores_limited_by="cores",
    memory_bytes=1 << 40,
    shm_bytes=1 << 30,
)


def parameter(rows: int, columns: int, block: int | None = None) -> ParameterMemory:
    """Return a trained fp32 matrix with AdamW's state."""
    values = rows * columns
    return ParameterMemory(
        rows=rows,
        values=values,
        num_bytes=4 * values,
        gradient_bytes=4 * values,
        block=block,
        state_bytes=8 * values,
        fixed_state_bytes=4,
    )


ROOT_VALUES, BLOCK_VALUES = 1_000, 16_000_000
MODEL = ModelMemory(
    parameters=(parameter(10, 100), *(parameter(4000, 4000, block) for block in range(8))),
    sample_bytes=100,
    activations=ActivationMemory(fixed_bytes=1_000, bytes_per_sample=500, cast_bytes=7_000),
    checkpointed=ActivationMemory(fixed_bytes=1_000, bytes_per_sample=100),
)
VALUES = ROOT_VALUES + 8 * BLOCK_VALUES
STEPS = 4 * len(MODEL.parameters)


def layout(strategy: str, **values: object) -> MemoryLayout:
    """Return a layout of GPUs."""
    plain = MemoryLayout(strategy=strategy, ranks=4, device="cuda", data_ranks=4)
    return dataclasses.replace(plain, **values)  # type: ignore[arg-type]


def test_ddp_has_sixteen_bytes_for_each_weight() -> None:
    """Weights and gradients in fp32 and AdamW's two averages are 16 bytes for each weight."""
    memory = rank_memory(MODEL, layout("ddp", ranks=1, micro_batch_size=6))
    assert memory.device.bytes_by_kind == {
        "weights": 4 * VALUES,
        "gradients": 4 * VALUES,
        "optimizer state": 8 * VALUES + STEPS,
        "weights cast by autocast": 7_000,
        "activations": 4_000,
    }
    assert memory.device.peak == 16 * VALUES + STEPS + 7_000 + 4_000
    assert memory.device.certain_peak == 16 * VALUES + STEPS
    assert memory.host.bytes_by_kind["checkpoint snapshot"] == 12 * VALUES // 4
    assert memory.host.bytes_by_kind["batches"] == 600


@pytest.mark.parametrize(
    ("strategy", "own", "saved"),
    [
        ("ddp", 4 * VALUES, VALUES),
        ("fsdp", 4 * (3 * 100 + 8 * BLOCK_VALUES // 4), 4 * (3 * 100 + 8 * BLOCK_VALUES // 4)),
        ("zero1", VALUES, VALUES),
        ("zero3", VALUES, VALUES),
    ],
)
def test_averages_are_sharded_like_what_is_updated(strategy: str, own: int, saved: int) -> None:
    """An average takes 4 bytes for each weight that a rank updates, and is saved with the rest."""
    ranks = 1 if strategy == "ddp" else 4
    without = rank_memory(MODEL, layout(strategy, ranks=ranks))
    averaged = rank_memory(MODEL, layout(strategy, ranks=ranks, averages=True))
    assert averaged.device.bytes_by_kind["averaged weights"] == own
    assert averaged.device.peak == without.device.peak + own
    before = without.host.bytes_by_kind["checkpoint snapshot"]
    assert averaged.host.bytes_by_kind["checkpoint snapshot"] == before + saved
    if strategy != "ddp":
        offloaded = rank_memory(MODEL, layout(strategy, averages=True, offload=True))
        assert offloaded.host.bytes_by_kind["averaged weights"] == own


def test_one_rank_frees_activations_while_it_makes_gradients() -> None:
    """Without a group the larger of activations and gradients counts, with accumulation both."""
    alone = layout("ddp", ranks=1, is_local=True, micro_batch_size=10**6)
    activations = 500 * 10**6 + 1_000 + 7_000
    first = rank_memory(MODEL, alone).device.peak
    assert first == 12 * VALUES + STEPS + max(4 * VALUES, activations)
    accumulating = rank_memory(MODEL, dataclasses.replace(alone, accumulates=True))
    assert accumulating.device.peak == 16 * VALUES + STEPS + activations


@pytest.mark.parametrize(("precision", "width"), [("fp32", 4), ("bf16", 2)])
def test_fsdp_holds_shards_and_two_blocks(precision: str, width: int) -> None:
    """A rank holds a quarter, two gathered blocks, and a block of gradients twice."""
    memory = rank_memory(MODEL, layout("fsdp", precision=precision)).device
    shard = 3 * 100 + 8 * BLOCK_VALUES // 4  # 10 rows in 4 shards are 3 rows
    assert memory.bytes_by_kind["weights"] == 4 * shard
    assert memory.bytes_by_kind["gradients"] == 4 * shard
    assert memory.bytes_by_kind["optimizer state"] == 8 * shard + STEPS
    gathered = width * (4 * 300 + 2 * BLOCK_VALUES)
    assert memory.bytes_by_kind["gathered weights"] == gathered
    sent = width * (ROOT_VALUES + BLOCK_VALUES) + 4 * BLOCK_VALUES
    assert memory.bytes_by_kind["buffers of communication"] == sent
    assert memory.peak == 16 * shard + STEPS + gathered + sent
    assert "weights cast by autocast" not in memory.bytes_by_kind


def test_fsdp_shards_over_the_ranks_of_the_layout() -> None:
    """The number of ranks that share a weight need not be the number of all ranks."""
    memory = rank_memory(MODEL, layout("fsdp", ranks=2, data_ranks=8)).device
    assert memory.bytes_by_kind["weights"] == 4 * (500 + 8 * BLOCK_VALUES // 2)


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_has_a_part_of_the_weights_twice(stage: int) -> None:
    """Beside whole weights a rank has its part in fp32, its state, and DeepSpeed's buckets."""
    memory = rank_memory(MODEL, layout(f"zero{stage}")).device
    assert memory.bytes_by_kind["weights"] == 4 * VALUES
    assert memory.bytes_by_kind["fp32 copies"] == VALUES
    assert memory.bytes_by_kind["optimizer state"] == 2 * VALUES + STEPS
    assert memory.bytes_by_kind["gradients"] == 2 * VALUES
    assert memory.bytes_by_kind["buffers of communication"] == 2 * 4 * VALUES + 4 * VALUES
    large = ModelMemory(parameters=tuple(parameter(10_000, 10_000, b) for b in range(100)))
    buckets = rank_memory(large, layout(f"zero{stage}")).device.bytes_by_kind
    assert buckets["buffers of communication"] == 3 * 4 * 500_000_000
    whole = rank_memory(MODEL, layout(f"zero{stage}", accumulates=True)).device
    assert whole.bytes_by_kind["gradients"] == (4 * VALUES if stage == 1 else 2 * VALUES)


def test_zero3_gathers_a_model_that_is_smaller_than_its_reuse_distance() -> None:
    """DeepSpeed keeps a small model gathered from forward to backward, a large one in part."""
    memory = rank_memory(MODEL, layout("zero3")).device
    assert memory.bytes_by_kind["weights"] == VALUES
    assert memory.bytes_by_kind["gathered weights"] == 4 * VALUES
    large = ModelMemory(parameters=tuple(parameter(10_000, 10_000, b) for b in range(100)))
    gathered = rank_memory(large, layout("zero3")).device.bytes_by_kind["gathered weights"]
    assert gathered == 4 * (500_000_000 + 50_000_000 + 100_000_000)


@pytest.mark.parametrize("strategy", ["fsdp", "zero1", "zero2", "zero3"])
def test_offloading_moves_state_to_the_host(strategy: str) -> None:
    """With offload=cpu the optimizer's state is on the host, and the GPU needs less."""
    on_gpu = rank_memory(MODEL, layout(strategy))
    offloaded = rank_memory(MODEL, layout(strategy, offload=True))
    assert "optimizer state" not in offloaded.device.bytes_by_kind
    assert (
        offloaded.host.bytes_by_kind["optimizer state"]
        == (on_gpu.device.bytes_by_kind["optimizer state"])
    )
    assert offloaded.device.peak < on_gpu.device.peak
    assert offloaded.host.peak > on_gpu.host.peak


def test_cpu_ranks_have_all_on_the_host() -> None:
    """CPU ranks need no memory of a GPU; a checkpoint's copies exist when gradients do not."""
    memory = rank_memory(MODEL, layout("ddp", ranks=1, device="cpu"))
    assert memory.device.peak == 0
    assert memory.place is memory.host
    assert memory.host.training_peak == 16 * VALUES + STEPS + 1_500 + 7_000 + 100
    assert memory.host.peak == 16 * VALUES + STEPS + 12 * VALUES // 4 + 100


def test_exact_sums_are_counted() -> None:
    """Eight virtual ranks on two ranks hold sums of the tree beside the gradients."""
    distribution = VirtualRanks(count=8, world_size=2)
    held = layout("ddp", ranks=1, distribution=distribution, data_ranks=2)
    copies = distribution.most_copies()
    assert copies > 1
    by_kind = rank_memory(MODEL, held).device.bytes_by_kind
    assert by_kind["sums of the tree"] == (copies - 1) * 4 * VALUES
    assert by_kind["buffers of communication"] == 2 * 4 * VALUES


def recipe(**settings: object) -> Recipe:
    """Return a recipe that is planned only."""
    values: dict[str, object] = {"optimizer": sgd(), "batch_size": 64, "lr": 0.1, "steps": 1}
    return Recipe(
        name="r",
        model=lambda: None,
        data=lambda: Data(train=()),
        loss=lambda *_: (0, 0),
        lr_rule="none",
        **(values | settings),  # type: ignore[arg-type]
    )


def facts(**refused: str) -> MemoryFacts:
    """Return the facts of MODEL on GPUs of 3 GB."""
    return MemoryFacts(model=MODEL, refused=refused, device_bytes=3_000_000_000)


def test_the_layout_follows_from_a_plan() -> None:
    """Ranks, micro-batch, accumulation and prefetched batches are those of the plan."""
    settings = recipe(
        strategy="zero2", micro_batch_size=4, precision="bf16", num_workers=2, prefetch_factor=3
    )
    found = layout_of(make_plan(settings, MACHINE, nodes=2))
    assert (found.ranks, found.data_ranks, found.nproc_per_node) == (8, 8, 4)
    assert (found.micro_batch_size, found.accumulates, found.prefetched_batches) == (4, True, 7)
    alone = layout_of(make_plan(recipe(), MACHINE, nproc_per_node=1))
    assert (alone.is_local, alone.accumulates, alone.ranks) == (True, False, 1)


def test_a_plan_that_cannot_fit_is_refused() -> None:
    """With 2 GB of tensors on a 1 GB GPU the error names the numbers and what fits."""
    settings = recipe(optimizer=adamw())
    plan = make_plan(settings, MACHINE)
    memory = plan_memory(facts(zero1="no"), settings, plan, is_here=True)
    assert [other.layout.title for other in memory.alternatives] == [
        "ddp",
        "fsdp",
        "fsdp offload=cpu",
        "zero2",
        "zero2 offload=cpu",
        "zero3",
        "zero3 offload=cpu",
    ]
    memory.check()
    small = dataclasses.replace(memory, device_bytes=1_000_000_000)
    with pytest.raises(PlanError) as caught:
        small.check()
    for word in ("strategy=ddp", "1.91 GiB", "954 MiB", "strategy=fsdp (", "fsdp offload=cpu"):
        assert word in str(caught.value)
    assert "zero2 (" not in str(caught.value)
    with pytest.raises(PlanError, match="host memory"):
        dataclasses.replace(memory, host_bytes=1_000_000).check()


def test_offloading_is_no_alternative_on_cpu_ranks() -> None:
    """On CPU ranks all is on the host, so strategies are compared without offloading."""
    settings = recipe(device="cpu")
    plan = make_plan(settings, MACHINE, nproc_per_node=2)
    memory = plan_memory(facts(), settings, plan, is_here=True)
    assert not any(other.layout.offload for other in memory.alternatives)
    assert memory.device_bytes is None


def test_what_fits_is_listed() -> None:
    """A layout fits if the GPU has room for a rank and the host for all ranks of a node."""
    memories = [rank_memory(MODEL, layout(name, nproc_per_node=4)) for name in ("ddp", "fsdp")]
    limit = memories[1].device.peak
    assert fitting(memories, device_bytes=limit, host_bytes=None) == memories[1:]
    host = 4 * max(memory.host.peak for memory in memories)
    assert fitting(memories, device_bytes=None, host_bytes=host) == memories
    assert fitting(memories, device_bytes=None, host_bytes=host - 4) == memories[:1]


@pytest.mark.parametrize(
    ("strategy", "precision", "moved"),
    [
        ("ddp", "fp32", 8),
        ("zero1", "fp32", 8),
        ("zero2", "fp32", 3 * 4 + 4),
        ("fsdp", "fp32", 3 * 12),
        ("fsdp", "bf16", 3 * 8),
        ("zero3", "bf16", 3 * 12),
    ],
)
def test_a_rank_sends_what_the_zero_paper_says(strategy: str, precision: str, moved: int) -> None:
    """With three micro-steps on 4 ranks, 3/4 of so many bytes for each weight are sent."""
    held = layout(strategy, precision=precision, ranks=1 if strategy == "ddp" else 4)
    assert sent_bytes(MODEL, held, 3) == moved * VALUES * 3 // 4


def candidate(name: str, **values: object) -> StrategyCandidate:
    """Return a candidate that fits."""
    plain = StrategyCandidate(
        strategy=name,
        offload=False,
        activation_checkpointing=False,
        micro_batch_size=1,
        accumulation_steps=1,
        planned_bytes=1,
        planned_training_bytes=1,
        planned_host_bytes=1,
        sent_bytes=10,
        fits=True,
    )
    return dataclasses.replace(plain, **values)  # type: ignore[arg-type]


def test_the_cheapest_comes_first() -> None:
    """Offloading is dearer than checkpointing, which is dearer than sending more."""
    ordered = [
        candidate("ddp"),
        candidate("zero2", sent_bytes=20),
        candidate("ddp", activation_checkpointing=True),
        candidate("zero2", offload=True),
        candidate("zero2", offload=True, activation_checkpointing=True),
    ]
    unfit = candidate("ddp", fits=False)
    assert cheapest_first([unfit, *reversed(ordered)]) == ordered


def test_the_fastest_trial_that_fits_is_chosen() -> None:
    """Trials beyond the limit, and those that ran out of memory, are not chosen."""
    slow, fast, large = (
        StrategyTrial(candidate=candidate(name), fits=fits, peak_bytes=1, samples_per_second=rate)
        for name, fits, rate in (("ddp", True, 1.0), ("fsdp", True, 2.0), ("zero2", False, 3.0))
    )
    failed = StrategyTrial(candidate=candidate("zero3"), fits=False)
    assert fastest([slow, large, failed, fast]) == fast
    assert fastest([large, failed]) is None


def test_the_file_of_sizes_is_read_back(tmp_path: Path) -> None:
    """What the process writes to the run folder is what the planner reads."""
    from launcher.engine.probes.model_memory import read_memory, write_memory
    from launcher.runs.rundir import RunDir

    reading = MemoryFacts(model=MODEL, refused={"zero3": "no"}, device_bytes=None)
    write_memory(reading, RunDir(tmp_path))
    assert read_memory(RunDir(tmp_path)) == reading


def test_settings_of_fsdp_are_counted() -> None:
    """Blocks that stay gathered, whole gradients, more blocks ahead and bf16 sums are counted."""
    plain = rank_memory(MODEL, layout("fsdp", accumulates=True)).device.bytes_by_kind

    def changed(**settings: object) -> dict[str, int]:
        held = layout("fsdp", accumulates=True, fsdp=FSDPMemory(**settings))  # type: ignore[arg-type]
        found = rank_memory(MODEL, held).device.bytes_by_kind
        return {
            kind: found.get(kind, 0) - plain.get(kind, 0)
            for kind in found
            if found.get(kind, 0) != plain.get(kind, 0)
        }

    block = 4 * BLOCK_VALUES
    assert changed(reshard_after_forward=False) == {"gathered weights": 7 * block}
    assert changed(prefetch_blocks=3) == {"gathered weights": 2 * block}
    assert changed(accumulate_unsharded=True) == {"gradients": 4 * VALUES}
    assert changed(reduce_bytes=2) == {"buffers of communication": -block // 2}
    assert changed(copies=2) == {"gradients": plain["gradients"]}


def test_a_tensor_parallel_rank_holds_its_part() -> None:
    """A weight that two ranks split counts as half, before it is sharded over the data ranks."""
    split = dataclasses.replace(parameter(4000, 4000), rows=2000, parts=2)
    memory = rank_memory(ModelMemory(parameters=(split,)), layout("fsdp"))
    assert memory.device.bytes_by_kind["weights"] == 4 * BLOCK_VALUES // 2 // 4
    assert memory.device.bytes_by_kind["optimizer state"] == 8 * BLOCK_VALUES // 2 // 4 + 4


def test_gradients_of_bf16_weights_are_in_fp32() -> None:
    """Weights in bf16 take two bytes and their gradients four."""
    half = dataclasses.replace(parameter(4000, 4000), num_bytes=2 * BLOCK_VALUES)
    memory = rank_memory(ModelMemory(parameters=(half,)), layout("ddp", ranks=1))
    assert memory.device.bytes_by_kind["weights"] == 2 * BLOCK_VALUES
    assert memory.device.bytes_by_kind["gradients"] == 4 * BLOCK_VALUES


def test_autocast_copies_no_weights_that_fsdp_gathers() -> None:
    """FSDP gathers weights in half precision, and ZeRO 3 casts one weight at a time."""
    casts = dataclasses.replace(
        MODEL, activations=ActivationMemory(fixed_bytes=0, bytes_per_sample=1, cast_bytes=10**9)
    )
    expected = {"ddp": 10**9, "zero2": 10**9, "zero3": 2 * BLOCK_VALUES, "fsdp": None}
    for strategy, num_bytes in expected.items():
        by_kind = rank_memory(casts, layout(strategy, precision="bf16")).device.bytes_by_kind
        assert by_kind.get("weights cast by autocast") == num_bytes


def test_copies_of_the_model_are_compared_with_one() -> None:
    """On two nodes, fsdp over the ranks of a node and over all ranks are alternatives."""
    settings = recipe(strategy="fsdp")
    plan = make_plan(settings, MACHINE, nodes=2)
    memory = plan_memory(facts(), settings, plan, is_here=False)
    weights = {
        other.layout.title: other.device.bytes_by_kind.get("weights", 0)
        for other in memory.alternatives
    }
    assert weights["fsdp shard=node"] == 4 * (3 * 100 + 8 * BLOCK_VALUES // 4)
    assert weights["fsdp shard=all"] == 4 * (2 * 100 + 8 * BLOCK_VALUES // 8)
    assert weights["fsdp shard=all offload=cpu"] == 0
    assert memory.host_bytes is None
