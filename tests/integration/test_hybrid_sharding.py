"""FSDP in groups of ranks that each hold a copy of the model, and FSDP's further settings."""

from __future__ import annotations

from pathlib import Path

import pytest
from matrix import HYBRID, HYBRID_SOURCES, HYBRID_WORLDS, SHARDED_SOURCE, Case, Source, hybrid
from support import Commands, train_suite

from launcher.engine.probes.parity import compare, read_trace
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.rundir import RunDir

RESUMED = [
    (ranks, case, source)
    for index, ranks in enumerate(HYBRID_WORLDS)
    for case, source in hybrid(ranks, HYBRID_WORLDS[:index])
    if source is not None
]
TOLERANCES = {"bf16": 1e-2}
"""The largest relative difference, by reduce_dtype; it is 1e-5 in fp32."""


@pytest.fixture(scope="module")
def trained(module_run: Commands) -> Path:
    """Train every case, on one number of ranks after the other."""
    return train_suite(module_run, "hybrid", HYBRID_WORLDS)


@pytest.mark.parametrize("case", HYBRID, ids=[case.key for case in HYBRID])
def test_groups_take_the_steps_of_one_process(trained: Path, case: Case) -> None:
    """Losses, gradient norms and weights are those of one process, whatever FSDP's settings are."""
    options = dict(case.options)
    kept = tuple(
        (name, options[name])
        for name in ("max_grad_norm", "sync_batchnorm", "epochs")
        if name in options
    )
    alone = Case(case.recipe, optimizer=case.optimizer, options=kept)
    expected = read_trace(RunDir(trained / "on1" / alone.key))
    actual = read_trace(RunDir(trained / "on4" / case.key))
    assert len(actual.loss) == len(expected.loss) > 0
    tolerance = TOLERANCES.get(str(options.get("reduce_dtype")), 1e-5)
    difference = compare(expected, actual, tolerance)
    assert difference.agrees, difference


@pytest.mark.parametrize(
    ("ranks", "case", "source"),
    RESUMED,
    ids=[f"{ranks}-{case.key}-{source.title}" for ranks, case, source in RESUMED],
)
def test_checkpoints_of_groups_are_those_of_any_ranks(
    trained: Path, ranks: int, case: Case, source: Source
) -> None:
    """A run continues from 2 x 2 ranks on others, and from others on 2 x 2 ranks."""
    uninterrupted = read_trace(RunDir(trained / source.folder))
    resumed = read_trace(RunDir(trained / f"on{ranks}" / f"{case.key}-{source.title}"))
    assert len(resumed.loss) == case.steps
    difference = compare(uninterrupted, resumed, 1e-5)
    assert difference.agrees, difference


def test_each_shard_is_saved_once(trained: Path) -> None:
    """A checkpoint of two copies is as large as one of a single copy, and both copies write it."""
    sizes = {}
    for source in (SHARDED_SOURCE, HYBRID_SOURCES[-1]):
        ranks = source.ranks
        newest = list_checkpoints(RunDir(trained / source.folder))[0]
        files = [*newest.path.glob("*.safetensors")]
        writers = {path.name.split("-")[1] for path in files}
        assert len(writers) == ranks
        sizes[ranks] = sum(path.stat().st_size for path in files)
    assert sizes[4] == pytest.approx(sizes[2], rel=0.1)
