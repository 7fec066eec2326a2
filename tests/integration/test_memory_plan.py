"""`launcher plan --memory` and `launcher find strategy`, with real processes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support import Commands

from launcher.report.finder_sections import measured_sections

PLAN = ("launcher", "plan", "gpt", "data=text", "steps=1", "batch_size=64", "--memory")
STRATEGY = ("launcher", "find", "strategy", "gpt", "data=text", "steps=1")


@pytest.fixture
def text(run: Commands) -> None:
    """Make a folder of little text, which is read faster than the default."""
    (run.folder / "text").mkdir()
    for name in "ab":
        (run.folder / "text" / f"{name}.txt").write_text("A line of text.\n" * 200)


@pytest.mark.usefixtures("text")
def test_a_model_of_six_billion_weights_is_planned_without_a_gpu(run: Commands) -> None:
    """All strategies are compared, and per rank 16 bytes per weight and 1/16 of it are planned."""
    ranks = ("-n", "8", "--nodes", "2", "device=cuda")
    model = ("layers=8", "width=8192", "heads=64")
    done = run(*PLAN, *model, *ranks, "strategy=fsdp", "shard=all", "precision=bf16", "--json")
    assert done.exit_code == 0, done.stderr
    memory: dict[str, Any] = json.loads(done.stdout)["memory"]
    weights = sum(item["values"] for item in memory["model"]["parameters"])
    assert weights == 6_448_562_176
    assert memory["planned"]["device"]["bytes_by_kind"]["weights"] == weights * 4 // 16
    titles = [
        (other["layout"]["strategy"], other["layout"]["offload"])
        for other in memory["alternatives"]
    ]
    sharded = [(name, on) for name in ("fsdp", "zero1", "zero2", "zero3") for on in (False, True)]
    assert titles == [("ddp", False), *sharded]
    ddp = memory["alternatives"][0]["device"]
    assert ddp["certain_peak"] == pytest.approx(16 * weights, rel=1e-6)
    assert ddp["bytes_by_kind"]["weights cast by autocast"] == pytest.approx(2 * weights, rel=0.01)
    assert ddp["bytes_by_kind"]["activations"] > 0


@pytest.mark.usefixtures("text")
def test_a_plan_that_exceeds_the_host_is_refused(run: Commands) -> None:
    """CPU ranks that need more than the machine has are refused with the numbers, after a table."""
    done = run(*PLAN, "layers=8", "width=65536", "heads=256", "-n", "2", "device=cpu")
    assert done.exit_code == 2
    assert "\n* ddp " in done.stdout
    for word in ("strategy=ddp on 2 ranks needs", "host memory", "No strategy fits"):
        assert word in done.stderr


@pytest.mark.usefixtures("text")
def test_the_cheapest_strategy_is_tried_and_printed(run: Commands) -> None:
    """A trial measures about what was planned, and pages show it."""
    trials = ("--trials", "1", "--json")
    done = run(*STRATEGY, "-n", "2", "width=512", "batch_size=8", "--memory", "4GiB", *trials)
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["limit_bytes"] == int(4 * 2**30 * 0.9)
    (trial,) = result["trials"]
    assert trial["candidate"] == result["chosen"] == result["candidates"][0]
    assert trial["candidate"]["strategy"] == "ddp"
    for measured in (trial["peak_bytes"], trial["start_peak_bytes"]):
        planned = trial["candidate"]["planned_training_bytes"]
        assert measured == pytest.approx(planned, rel=0.35)
    assert result["settings"] == {}
    (folder,) = (run.folder / "runs").iterdir()
    (section,) = measured_sections(folder)
    assert section.table is not None
    assert [row[0] for row in section.table.rows] == ["ddp micro_batch_size=4"]


@pytest.mark.usefixtures("text")
def test_a_limit_decides_the_strategy(run: Commands) -> None:
    """GPUs that are too small for ddp get a sharded strategy, without a trial on this machine."""
    model = ("layers=4", "width=4096", "heads=32")
    command = (*STRATEGY, *model, "batch_size=16", "-n", "8", "device=cuda")
    done = run(*command, "--memory", "6GiB")
    assert done.exit_code == 0, done.stderr
    assert "nothing is measured" in done.stderr
    assert "\nstrategy: fsdp  # launcher find strategy: " in done.stdout
    assert not (run.folder / "runs").exists()
    assert run(*command, "--memory", "512MiB").exit_code == 1
    done = run(*command, "--memory", "24GiB", "--strategies", "zero2,zero3", "--json")
    names = {each["strategy"] for each in json.loads(done.stdout)["candidates"]}
    assert names == {"zero2", "zero3"}
    assert "ddp, fsdp, zero1, zero2, zero3" in run(*command, "--strategies", "zero4").stderr
