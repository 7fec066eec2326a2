"""Functions of a recipe that one rank of a node calls while the others wait for it."""

from __future__ import annotations

import pytest
from support import Commands

RECIPE = """
from dataclasses import replace

from launcher import Recipe
from launcher.recipes.digits import build_data, build_model, digits


def ported(*, how: str) -> Recipe:
    return replace(digits(), name="ported", model=model if how == "ddp" else build_model,
                   data=data if how == "barrier" else build_data)


def model():
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(build_model())


def data():
    import torch.distributed as dist

    if dist.is_initialized():  # as on every rank, but not where the samples are counted
        dist.barrier()
    return build_data()
"""


@pytest.mark.parametrize(
    ("how", "fragment"),
    [("ddp", "DistributedDataParallel(...)"), ("barrier", "torch.distributed.barrier()")],
)
def test_a_call_among_ranks_is_refused(run: Commands, how: str, fragment: str) -> None:
    """A model or data function that waits for other ranks is one error and no deadlock."""
    (run.folder / "ported.py").write_text(RECIPE)
    done = run("launcher", "run", "ported.py", "-n", "2", f"how={how}", "--out", "out")
    assert done.exit_code == 2, done.stderr
    assert fragment in done.stderr
    assert "Traceback" not in done.stderr
