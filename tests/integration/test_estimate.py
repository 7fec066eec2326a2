"""What a run would take on more ranks: the formulas, what they are checked with, the table."""

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
from launcher.tuning.estimate import EstimateInputs, estimate_scaling, facts_of
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


def test_a_ring_sends_everything_twice() -> None:
    """2 (p - 1) messages of n / p bytes: nearly 2 n / beta, and 2 (p - 1) alpha at the least."""
    assert ring(8e9, 8, FAST) == pytest.approx(14 * (5e-6 + 1e9 / 100e9))
    assert ring(0, 8, FAST) == pytest.approx(14 * 5e-6)
    assert ring(1e9, 1, FAST) == 0 == tree(1e9, 1, FAST)


def test_many_ranks_are_reached_by_trees() -> None:
    """Their latency grows with the logarithm, so that small messages on many nodes take them."""
    assert tree(0, 1024, SLOW) == pytest.approx(20 * 2e-5)
    assert all_reduce(1e4, 1024, 1, NETWORK) == pytest.approx(tree(1e4, 1024, SLOW))
    assert all_reduce(1e10, 4, 1, NETWORK) == pytest.approx(ring(1e10, 4, SLOW))


@pytest.mark.parametrize("nodes", [1, 2, 8, 1250])
@pytest.mark.parametrize("num_bytes", [1e3, 1e8, 1e11])
def test_the_fastest_way_is_taken(nodes: int, num_bytes: float) -> None:
    """Node by node is never slower than one ring through all ranks, and never free of charge."""
    found = all_reduce(num_bytes, nodes, 8, NETWORK)
    slowest = ring(num_bytes, 8 * nodes, SLOW if nodes > 1 else FAST)
    least = 2 * num_bytes * (1 - 1 / nodes) / SLOW.bytes_per_second
    assert least <= found <= slowest * (1 + 1e-9)


def test_strategies_send_what_they_shard() -> None:
    """ZeRO 1 sends as much as DDP, ZeRO 3 half as much again, and each as often as it reduces."""

    def sent(strategy: str, accumulation: int = 1, weight_size: float = 1.0) -> float:
        options = {"strategy": strategy, "accumulation": accumulation, "weight_size": weight_size}
        return traffic(1e9, 4, 8, NETWORK, **options).seconds  # type: ignore[arg-type]

    once = sent("ddp")
    assert sent("zero1") == pytest.approx(once) == pytest.approx(sent("ddp", 8))
    assert sent("zero3") == pytest.approx(1.5 * once) == pytest.approx(sent("fsdp"))
    assert sent("zero2", 8) == pytest.approx(4.5 * once)
    assert sent("fsdp", 8) == pytest.approx(12 * once)
    assert sent("fsdp", 1, 0.5) == pytest.approx(once, rel=1e-3)
    assert traffic(1e9, 1, 1, NETWORK, strategy="fsdp", accumulation=4).seconds == 0


def test_communication_hides_behind_what_it_can() -> None:
    """DDP's behind the last backward but for the last bucket; with more of it the rest shows."""
    num_bytes = 1e9
    sent = traffic(num_bytes, 4, 8, NETWORK, strategy="ddp", accumulation=4)
    slow = step_seconds(10.0, sent, accumulation=4, num_bytes=num_bytes)
    assert slow.best == pytest.approx(40 + sent.seconds * (25 << 20) / num_bytes)
    assert slow.worst == pytest.approx(40 + sent.seconds)
    quick = step_seconds(0.03, sent, accumulation=4, num_bytes=num_bytes)
    assert quick.best == pytest.approx(0.12 + sent.seconds - 0.02)
    sharded = traffic(num_bytes, 4, 8, NETWORK, strategy="fsdp", accumulation=4)
    hidden = step_seconds(10.0, sharded, accumulation=4, num_bytes=num_bytes)
    assert hidden.best < 40 * 1.02 < hidden.worst


def test_small_steps_keep_what_a_step_costs() -> None:
    """Between sizes and below them along lines, above them at the largest one's rate."""
    compute = Computation([(8, 0.2), (2, 0.08)])
    assert [compute.seconds(size) for size in (1, 2, 5, 8, 16)] == pytest.approx(
        [0.06, 0.08, 0.14, 0.2, 0.4]
    )
    alone = Computation([(8, 0.2)])
    assert [alone.seconds(size) for size in (1, 16)] == pytest.approx([0.025, 0.4])


def test_imagenet_in_one_hour() -> None:
    """The span has the 90 % that Goyal et al. saw from 8 to 256 GPUs (arXiv:1706.02677).

    Theirs: 100 MB of gradients, 120 ms of backward for 32 images on a P100, 8 to a node over
    NVLink, 50 Gbit/s Ethernet between nodes.
    """
    network = Network(
        inside=Link(seconds=10e-6, bytes_per_second=40e9),
        between=Link(seconds=50e-6, bytes_per_second=50e9 / 8),
    )
    recipe = replace(
        digits(), batch_size=None, batch_size_per_gpu=32, train_samples=1_281_167, device="cuda"
    )
    found = estimate_scaling(
        lambda nodes, nproc: make_plan(recipe, MACHINE, nodes=nodes, nproc_per_node=nproc),
        32,
        8,
        Measurements(micro_steps=((32, 0.18),), num_trained=25_557_032, data_wait=0.0),
        EstimateInputs(
            network=network, mtbf_seconds=1e9, restart_seconds=60.0, price_per_hour=None
        ),
    )
    one_node, all_nodes = found.rows[3], found.rows[-1]
    assert (one_node.nodes, one_node.nproc_per_node, all_nodes.nodes) == (1, 8, 32)
    assert all_nodes.batch_size == 8192
    hidden, bare = (
        after / before
        for after, before in zip(all_nodes.efficiency, one_node.efficiency, strict=True)
    )
    assert 0.8 < bare < 0.9 < hidden < 0.97


def test_young_saves_as_often_as_pays() -> None:
    """The interval is the best one, and what lasts is what a simulation of failures keeps."""
    save, restart, mtbf = 30.0, 200.0, 20_000.0
    every = checkpoint_interval(save, mtbf)
    kept = goodput(save, every, restart, mtbf)
    for other in (every / 2, every * 2):
        assert goodput(save, other, restart, mtbf) < kept
    drawn = random.Random(0)
    clock = lasting = 0.0
    while clock < 2e4 * mtbf:
        until_failure = drawn.expovariate(1 / mtbf)
        saved = math.floor(until_failure / (every + save))
        lasting += saved * every
        clock += until_failure + restart
    assert lasting / clock == pytest.approx(kept, abs=0.01)
    assert goodput(1e4, 1e4, 1e4, 1e3) == 0


@pytest.fixture(scope="module")
def measured(module_run: Commands) -> Commands:
    """Return commands in a folder with what was measured of digits."""
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


def test_a_table_from_what_was_measured(measured: Commands) -> None:
    """Each number of ranks has its row, with time, failures, noise and price; JSON has the same."""
    command = ("plan", "digits", "--nodes", "4", "-n", "2", "device=cpu", "batch_size=512")
    site = measured.folder / "site.yaml"
    site.write_text("price_per_hour: 3\nnetwork_gigabits: 1\nmtbf_hours: 1000\n")
    folders = ("--estimate", "one", "--estimate", "noise", "--cluster", str(site))
    done = measured("launcher", *command, *folders)
    assert done.exit_code == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if " x 2 " in line[:8]]
    assert [row[:2] for row in rows] == [["1", "x"], ["2", "x"], ["4", "x"]]
    assert "between nodes 0.125 GB/s" in done.stdout
    for word in ("noise scale", "goodput", "price", "Left out"):
        assert word in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 130
    said = json.loads(measured("launcher", *command, *folders, "--json").stdout)["estimate"]
    assert [(row["nodes"], row["nproc_per_node"]) for row in said["rows"]] == [
        (1, 1),
        (1, 2),
        (2, 2),
        (4, 2),
    ]
    first, *_, last = said["rows"]
    assert first["efficiency"][0] == pytest.approx(1.0)
    assert all(row["batch_size"] == 512 for row in said["rows"])
    assert last["seconds"][0] < first["seconds"][0]
    assert last["efficiency"][1] <= last["efficiency"][0] <= 1
    assert last["price"] == pytest.approx([3 * hours for hours in last["device_hours"]])
    assert said["measured"]["num_trained"] == 151_306


def test_sizes_that_were_tried_make_a_curve(measured: Commands) -> None:
    """A folder of `find batch` has the time of each size."""
    done = measured("launcher", "plan", "digits", "device=cpu", "--estimate", "batch", "--json")
    assert done.exit_code == 0, done.stderr
    said = json.loads(done.stdout)["estimate"]["measured"]
    assert len(said["micro_steps"]) > 1
    assert said["save_seconds"] is None


def test_the_table_ends_where_the_batch_does(measured: Commands) -> None:
    """More ranks than samples in a batch are no row, and the reason is the plan's."""
    options = ("batch_size=4", "device=cpu", "-n", "4", "--estimate", "one")
    done = measured("launcher", "plan", "digits", *options)
    assert done.exit_code == 0, done.stderr
    assert "no more" not in done.stdout
    recipe = replace(digits(), batch_size=4, device="cuda")
    found = estimate_scaling(
        lambda nodes, nproc: make_plan(recipe, MACHINE, nodes=nodes, nproc_per_node=nproc),
        4,
        2,
        Measurements(micro_steps=((4, 0.1),), num_trained=1000, data_wait=0.0),
        facts_of(Site(), "cuda"),
    )
    assert [(row.nodes, row.nproc_per_node) for row in found.rows] == [(1, 1), (1, 2), (2, 2)]
    assert found.refusal is not None
    assert "at most 4 ranks" in found.refusal


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--estimate", "nowhere"), "does not exist"),
        (("--estimate", "two"), "measured on 2 ranks"),
        (("--estimate", "noise"), "no step was timed there"),
        (("--estimate", "one", "precision=bf16"), "measured with precision=fp32"),
        (("--cluster", "lab"), "--cluster is what --estimate reckons with"),
    ],
)
def test_what_says_nothing_is_refused(
    measured: Commands, options: tuple[str, ...], said: str
) -> None:
    """One error, with what to give instead, and no table."""
    done = measured("launcher", "plan", "digits", "device=cpu", *options)
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.split())
    assert done.stderr.startswith("launcher: ")
    assert "Traceback" not in done.stderr


def test_what_an_earlier_version_measured_is_refused(measured: Commands) -> None:
    """It has no number of weights, and says so."""
    old = measured.folder / "old"
    shutil.copytree(measured.folder / "one", old)
    result = json.loads((old / "result.json").read_text())
    del result["num_trained"]
    (old / "result.json").write_text(json.dumps(result))
    done = measured("launcher", "plan", "digits", "device=cpu", "--estimate", "old")
    assert done.exit_code == 2
    assert "an earlier version of launcher measured it. Measure again" in done.stderr


def test_a_site_says_what_its_links_are() -> None:
    """The example's figures are those that are reckoned with."""
    facts = facts_of(read_site(ROOT / "slurm/example.yaml"), "cuda")
    assert facts.network.between == Link(seconds=15e-6, bytes_per_second=50e9)
    assert facts.network.inside == Link(seconds=8e-6, bytes_per_second=250e9)
    assert (facts.restart_seconds, facts.price_per_hour) == (300.0, 2.5)
