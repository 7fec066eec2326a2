"""Runs with virtual ranks: what they promise on any number of ranks, and what they refuse."""

from __future__ import annotations

import json

import pytest
from support import ROOT, Commands

from launcher.checks.prove import TOLERANCES
from launcher.engine.probes.parity import compare, read_trace
from launcher.runs.rundir import RunDir

NORMS = f"{ROOT / 'benchmarks/parts.py'}:norms"
PARTED = str(ROOT / "tests/recipes/parted.py")
WRITING = f"{ROOT / 'tests/recipes/writing.py'}:writing"


def test_prove_prints_the_digest_of_equal_weights(run: Commands) -> None:
    """A recipe with exact=true is proved to the bit: one SHA-256 in all configurations."""
    done = run(
        *("launcher", "prove", NORMS, "--worlds", "1,2,3", "--strategies", "ddp,fsdp"),
        *("--steps", "6", "epochs=2", "--json"),
    )
    assert done.exit_code == 0, done.stdout + done.stderr
    output = json.loads(done.stdout)
    assert output["agree"]
    assert [(row["strategy"], row["ranks"]) for row in output["rows"]] == [
        ("ddp", 1),
        ("ddp", 2),
        ("fsdp", 2),
        ("ddp", 3),
        ("fsdp", 3),
    ]
    (digest,) = {row["weights_sha256"] for row in output["rows"]}
    assert len(digest) == 64
    for row in output["rows"][1:]:
        assert (row["loss"], row["grad_norm"], row["weights"], row["tolerance"]) == (0, 0, 0, 0)


def test_prove_shows_digests(run: Commands) -> None:
    """The table of an exact recipe has a digest in each row, and its verdict the whole digest."""
    done = run(
        *("launcher", "prove", f"{PARTED}:parted", "--worlds", "1,2,4", "--strategies", "ddp,fsdp"),
        *(
            "--steps",
            "10",
        ),
    )
    assert done.exit_code == 0, done.stdout + done.stderr
    *_, verdict = done.stdout.splitlines()
    digest = verdict.removesuffix(".").split()[-1]
    assert len(digest) == 64
    rows = [line for line in done.stdout.splitlines() if line.startswith(("ddp", "fsdp"))]
    assert len(rows) == 5
    assert all(row.endswith(digest[:12]) for row in rows)


@pytest.mark.parametrize(
    "setting",
    [
        "precision=fp32",
        "precision=fp64",
        "channels_last=true",
    ],
)
def test_exact_steps_are_those_of_other_sums(run: Commands, setting: str) -> None:
    """Exact sums on two ranks agree with DDP's own, on one rank, to rounding."""
    traces = []
    for ranks, exact in (("1", "false"), ("2", "true")):
        done = run(
            *("launcher", "run", NORMS, "-n", ranks, "-q", "--out", exact),
            *("epochs=1", "lr=0.01", setting, f"exact={exact}"),
        )
        assert done.exit_code == 0, done.stderr
        traces.append(read_trace(RunDir(run.folder / exact)))
    tolerance = TOLERANCES["fp64" if setting.endswith("fp64") else "fp32"]
    difference = compare(traces[0], traces[1], tolerance)
    assert difference.agrees, difference


def test_zero_shares_virtual_ranks(run: Commands) -> None:
    """Under ZeRO, BatchNorm and dropout of virtual ranks agree with one process to rounding."""
    done = run(
        *("launcher", "prove", NORMS, "--worlds", "1,2", "--strategies", "ddp,zero2,zero3"),
        *("--steps", "6", "epochs=2", "exact=false", "--json"),
    )
    assert done.exit_code == 0, done.stdout + done.stderr
    output = json.loads(done.stdout)
    assert output["agree"]
    assert len(output["rows"]) == 6
    for row in output["rows"][1:]:
        assert row["unequal"] == {}
        assert row["weights"] <= row["tolerance"] == 1e-5


def test_a_resumed_run_keeps_its_virtual_ranks(run: Commands) -> None:
    """Another number of virtual ranks is another training, and is refused on resuming."""
    done = run(
        *("launcher", "run", f"{PARTED}:parted", "-n", "2", "-q", "--out", "out"),
        *("epochs=1", "checkpoint_every=2"),
    )
    assert done.exit_code == 0, done.stderr
    refused = run("launcher", "resume", "out", "-n", "2", "epochs=2", "virtual_ranks=2")
    assert refused.exit_code == 2
    assert "virtual_ranks" in refused.stderr
    assert "Traceback" not in refused.stderr
    resumed = run("launcher", "resume", "out", "-n", "4", "-q", "epochs=2", "strategy=fsdp")
    assert resumed.exit_code == 0, resumed.stderr


@pytest.mark.parametrize("ranks", ["1", "2"])
@pytest.mark.parametrize(("model", "named"), [("mean", "mean"), ("codebook", "codes")])
def test_writes_to_other_buffers_are_refused(
    run: Commands, ranks: str, model: str, named: str
) -> None:
    """A buffer that forward writes to belongs to no virtual rank, and is refused by its name."""
    done = run(
        *("launcher", "run", WRITING, "-n", ranks, "-q", "--out", "out", f"model={model}"),
        "virtual_ranks=2",
    )
    assert done.exit_code == 2, done.stdout + done.stderr
    assert f"the buffer {named}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (run.folder / "out/checkpoints").exists()


@pytest.mark.parametrize(
    ("recipe", "ranks", "settings", "named"),
    [
        ("fused", "2", ["strategy=fsdp"], "foreach=True"),
        ("sparse", "1", [], "words.weight"),
        ("sparse", "2", [], "words.weight"),
    ],
)
def test_what_has_no_exact_sum_is_refused(
    run: Commands, recipe: str, ranks: str, settings: list[str], named: str
) -> None:
    """Fused kernels on shards, and sparse gradients, are refused before the first step."""
    done = run(
        *("launcher", "run", f"{PARTED}:{recipe}", "-n", ranks, "-q", "--out", "out"), *settings
    )
    assert done.exit_code == 2, done.stdout + done.stderr
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert not (run.folder / "out/checkpoints").exists()
