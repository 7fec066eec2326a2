"""Estimates of a run on more ranks: the model, its agreement with experiments, the table."""

from __future__ import annotations

import json
import math
import random
import shutil
from dataclasses import replace

import pytest
from support import ROOT, Commands

from launcher import make_plan
from launcher.analysis.scaling_model import (
    Computation,
    Link,
    Network,
    all_reduce,
    checkpoint_interval,
    goodput,
    ring,
    step_seconds,
    traffic,
    tree,
)
from launcher.environment.machine import Machine
from launcher.recipes.digits import digits
from launcher.slurm.site import Site, read_site
from launcher.tuning.estimate import EstimateInputs, estimate_inputs, estimate_scaling
from launcher.tuning.measurements import Measurements

FAST, SLOW = Link(seconds=5e-6, bytes_per_second=100e9), Link(seconds=2e-5, bytes_per_second=10e9)
NETWORK = Network(inside=FAST, between=SLOW)
MACHINE = Machine(
    hostname="node",
    num_gpus=8,
    usable_cores=64,
    cores_limited_by="cores of this machine",
    memory_bytes=1 << 40,
    shm_bytes=1 << 39,
)


def test_a_ring_sends_2_p_minus_2_messages() -> None:
    """A ring all-reduce over p ranks takes 2 (p - 1) messages of n / p bytes."""
    assert ring(8e9, 8, FAST) == pytest.approx(14 * (5e-6 + 1e9 / 100e9))
    assert ring(0, 8, FAST) == pytest.approx(14 * 5e-6)
    assert ring(1e9, 1, FAST) == 0 == tree(1e9, 1, FAST)


def test_trees_reduce_small_messages_over_many_nodes() -> None:
    """Trees, whose latency grows logarithmically, win for small messages and rings for large."""
    assert tree(0, 1024, SLOW) == pytest.approx(20 * 2e-5)
    assert all_reduce(1e4, 1024, 1, NETWORK) == pytest.approx(tree(1e4, 1024, SLOW))
    assert all_reduce(1e10, 4, 1, NETWORK) == pytest.approx(ring(1e10, 4, SLOW))


@pytest.mark.parametrize("nodes", [1, 2, 8, 1250])
@pytest.mark.parametrize("num_bytes", [1e3, 1e8, 1e11])
def test_the_fastest_all_reduce_is_chosen(nodes: int, num_bytes: float) -> None:
    """An all-reduce is at most as slow as one ring, and at least as slow as its bandwidth."""
    seconds = all_reduce(num_bytes, nodes, 8, NETWORK)
    one_ring = ring(num_bytes, 8 * nodes, SLOW if nodes > 1 else FAST)
    bandwidth_bound = 2 * num_bytes * (1 - 1 / nodes) / SLOW.bytes_per_second
    assert bandwidth_bound <= seconds <= one_ring * (1 + 1e-9)


def test_strategies_differ_in_their_traffic() -> None:
    """ZeRO 1 sends as much as DDP, ZeRO 3 and FSDP 1.5 times as much per micro-step."""

    def seconds(strategy: str, accumulation: int = 1, weight_size: float = 1.0) -> float:
        return traffic(
            1e9,
            4,
            8,
            NETWORK,
            strategy=strategy,
            accumulation=accumulation,
            weight_size=weight_size,
        ).seconds

    ddp = seconds("ddp")
    assert seconds("zero1") == pytest.approx(ddp) == pytest.approx(seconds("ddp", 8))
    assert seconds("zero3") == pytest.approx(1.5 * ddp) == pytest.approx(seconds("fsdp"))
    assert seconds("zero2", 8) == pytest.approx(4.5 * ddp)
    assert seconds("fsdp", 8) == pytest.approx(12 * ddp)
    assert seconds("fsdp", 1, 0.5) == pytest.approx(ddp, rel=1e-3)
    assert traffic(1e9, 1, 1, NETWORK, strategy="fsdp", accumulation=4).seconds == 0


def test_communication_overlaps_with_computation() -> None:
    """Under DDP the last bucket never overlaps, and the rest overlaps with the last backward."""
    num_bytes = 1e9
    ddp = traffic(num_bytes, 4, 8, NETWORK, strategy="ddp", accumulation=4)
    slow_compute = step_seconds(10.0, ddp, accumulation=4, num_bytes=num_bytes)
    assert slow_compute.best == pytest.approx(40 + ddp.seconds * (25 << 20) / num_bytes)
    assert slow_compute.worst == pytest.approx(40 + ddp.seconds)
    fast_compute = step_seconds(0.03, ddp, accumulation=4, num_bytes=num_bytes)
    assert fast_compute.best == pytest.approx(0.12 + ddp.seconds - 0.02)
    fsdp = traffic(num_bytes, 4, 8, NETWORK, strategy="fsdp", accumulation=4)
    sharded = step_seconds(10.0, fsdp, accumulation=4, num_bytes=num_bytes)
    assert sharded.best < 40 * 1.02 < sharded.worst


def test_computation_is_interpolated() -> None:
    """The time is linear between and below the measured sizes and proportional above them."""
    compute = Computation([(8, 0.2), (2, 0.08)])
    assert [compute.seconds(size) for size in (1, 2, 5, 8, 16)] == pytest.approx(
        [0.06, 0.08, 0.14, 0.2, 0.4]
    )
    single = Computation([(8, 0.2)])
    assert [single.seconds(size) for size in (1, 16)] == pytest.approx([0.025, 0.4])


def test_imagenet_in_one_hour() -> None:
    """The bounds enclose the 90 % efficiency of Goyal et al. from 8 to 256 GPUs.

    The experiment (arXiv:1706.02677) has 100 MB of gradients, 120 ms of backward for 32 images on
    a P100, 8 GPUs per node over NVLink, and 50 Gbit/s Ethernet between nodes.
    """
    network = Network(
        inside=Link(seconds=10e-6, bytes_per_second=40e9),
        between=Link(seconds=50e-6, bytes_per_second=50e9 / 8),
    )
    recipe = replace(
        digits(), batch_size=None, batch_size_per_gpu=32, train_samples=1_281_167, device="cuda"
    )
    estimate = estimate_scaling(
        lambda nodes, nproc: make_plan(recipe, MACHINE, nodes=nodes, nproc_per_node=nproc),
        32,
        8,
        Measurements(micro_steps=((32, 0.18),), num_trained=25_557_032, data_wait=0.0),
        EstimateInputs(
            network=network, mtbf_seconds=1e9, restart_seconds=60.0, price_per_hour=None
        ),
    )
    one_node, all_nodes = estimate.rows[3], estimate.rows[-1]
    assert (one_node.nodes, one_node.nproc_per_node, all_nodes.nodes) == (1, 8, 32)
    assert all_nodes.batch_size == 8192
    best, worst = (
        many / one for many, one in zip(all_nodes.efficiency, one_node.efficiency, strict=True)
    )
    assert 0.8 < worst < 0.9 < best < 0.97


def test_youngs_interval_maximises_goodput() -> None:
    """Young's interval has the highest goodput, which a simulation of failures confirms."""
    save, restart, mtbf = 30.0, 200.0, 20_000.0
    interval = checkpoint_interval(save, mtbf)
    expected = goodput(save, interval, restart, mtbf)
    for other in (interval / 2, interval * 2):
        assert goodput(save, other, restart, mtbf) < expected
    generator = random.Random(0)
    clock = lasting = 0.0
    while clock < 2e4 * mtbf:
        until_failure = generator.expovariate(1 / mtbf)
        num_checkpoints = math.floor(until_failure / (interval + save))
        lasting += num_checkpoints * interval
        clock += until_failure + restart
    assert lasting / clock == pytest.approx(expected, abs=0.01)
    assert goodput(1e4, 1e4, 1e4, 1e3) == 0


@pytest.fixture(scope="module")
def measured(module_run: Commands) -> Commands:
    """Measure digits with the commands whose folders --estimate reads."""
    device = ("-n", "1", "device=cpu")
    for command in (
        ("run", "digits", *device, "epochs=2", "checkpoint_every=10", "--out", "one"),
        ("find", "noise", "digits", *device, "epochs=4", "--steps", "48", "--out", "noise"),
        ("run", "digits", "-n", "2", "device=cpu", "steps=3", "--out", "two"),
        ("find", "batch", "digits", *device, "batch_size=64", "--fresh", "--out", "batch"),
    ):
        done = module_run("launcher", *command)
        assert done.exit_code == 0, done.stderr
    return module_run


def test_the_table_has_a_row_per_number_of_ranks(measured: Commands) -> None:
    """Each row has time, failures, noise and price, in the table and in JSON."""
    command = ("plan", "digits", "--nodes", "4", "-n", "2", "device=cpu", "batch_size=512")
    site = measured.folder / "site.yaml"
    site.write_text("price_per_hour: 3\nnetwork_gigabits: 1\nmtbf_hours: 1000\n")
    folders = ("--estimate", "one", "--estimate", "noise", "--cluster", str(site))
    done = measured("launcher", *command, *folders)
    assert done.exit_code == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if " x 2 " in line[:8]]
    assert [row[:2] for row in rows] == [["1", "x"], ["2", "x"], ["4", "x"]]
    assert "between nodes 0.125 GB/s" in done.stdout
    for column in ("efficiency", "samples", "goodput", "price"):
        assert column in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 130
    estimate = json.loads(measured("launcher", *command, *folders, "--json").stdout)["estimate"]
    assert [(row["nodes"], row["nproc_per_node"]) for row in estimate["rows"]] == [
        (1, 1),
        (1, 2),
        (2, 2),
        (4, 2),
    ]
    first, *_, last = estimate["rows"]
    assert first["efficiency"][0] == pytest.approx(1.0)
    assert all(row["batch_size"] == 512 for row in estimate["rows"])
    assert last["seconds"][0] < first["seconds"][0]
    assert last["efficiency"][1] <= last["efficiency"][0] <= 1
    assert last["price"] == pytest.approx([3 * hours for hours in last["device_hours"]])
    assert estimate["measured"]["num_trained"] == 151_306


def test_max_time_limits_the_steps() -> None:
    """With max_time the table has the steps that fit: 600 s / 0.2 s on one device."""
    recipe = replace(digits(), epochs=1000, max_time="10min", device="cuda")
    estimate = estimate_scaling(
        lambda nodes, nproc: make_plan(recipe, MACHINE, nodes=nodes, nproc_per_node=nproc),
        *(1, 1),
        Measurements(micro_steps=((128, 0.2),), num_trained=1_000, data_wait=0.0),
        EstimateInputs(
            network=NETWORK, mtbf_seconds=1e9, restart_seconds=60.0, price_per_hour=None
        ),
    )
    [row] = estimate.rows
    assert row.seconds == (600.0, 600.0)
    assert row.steps == (3_000, 3_000)


def test_the_trials_of_find_batch_are_read(measured: Commands) -> None:
    """A folder of `find batch` contributes the time of each micro-batch size."""
    done = measured("launcher", "plan", "digits", "device=cpu", "--estimate", "batch", "--json")
    assert done.exit_code == 0, done.stderr
    measurements = json.loads(done.stdout)["estimate"]["measured"]
    assert len(measurements["micro_steps"]) > 1
    assert measurements["save_seconds"] is None


def test_the_table_ends_at_the_batch_size(measured: Commands) -> None:
    """Numbers of ranks above the batch size have no row, and the plan's error is the reason."""
    options = ("batch_size=4", "device=cpu", "-n", "4", "--estimate", "one", "--json")
    done = measured("launcher", "plan", "digits", *options)
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["estimate"]["refusal"] is None
    recipe = replace(digits(), batch_size=4, device="cuda")
    estimate = estimate_scaling(
        lambda nodes, nproc: make_plan(recipe, MACHINE, nodes=nodes, nproc_per_node=nproc),
        4,
        2,
        Measurements(micro_steps=((4, 0.1),), num_trained=1000, data_wait=0.0),
        estimate_inputs(Site(), "cuda"),
    )
    assert [(row.nodes, row.nproc_per_node) for row in estimate.rows] == [(1, 1), (1, 2), (2, 2)]
    assert estimate.refusal is not None
    assert "4 x 2: " in estimate.refusal
    assert "4 ranks" in estimate.refusal


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (("--estimate", "nowhere"), ["nowhere"]),
        (("--estimate", "two"), ["two", "2 ranks", "-n 1"]),
        (("--estimate", "noise"), ["noise", "launcher run", "launcher find batch"]),
        (("--estimate", "one", "precision=bf16"), ["precision=fp32", "precision=bf16"]),
        (("--cluster", "lab"), ["--cluster", "--estimate"]),
    ],
)
def test_folders_without_usable_measurements_are_refused(
    measured: Commands, options: tuple[str, ...], fragments: list[str]
) -> None:
    """The error names what was given and what to give instead, and there is no table."""
    done = measured("launcher", "plan", "digits", "device=cpu", *options)
    assert done.exit_code == 2
    message = " ".join(done.stderr.split())
    for fragment in fragments:
        assert fragment in message
    assert done.stderr.startswith("launcher: ")
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_a_result_without_the_number_of_weights_is_refused(measured: Commands) -> None:
    """A result of an earlier version, which lacks num_trained, is refused."""
    old = measured.folder / "old"
    shutil.copytree(measured.folder / "one", old)
    result = json.loads((old / "result.json").read_text())
    del result["num_trained"]
    (old / "result.json").write_text(json.dumps(result))
    done = measured("launcher", "plan", "digits", "device=cpu", "--estimate", "old")
    assert done.exit_code == 2
    assert "num_trained" in done.stderr


def test_a_site_profile_sets_the_inputs() -> None:
    """The values of the example profile are the inputs of an estimate."""
    facts = estimate_inputs(read_site(ROOT / "slurm/example.yaml"), "cuda")
    assert facts.network.between == Link(seconds=15e-6, bytes_per_second=50e9)
    assert facts.network.inside == Link(seconds=8e-6, bytes_per_second=250e9)
    assert (facts.restart_seconds, facts.price_per_hour) == (300.0, 2.5)
