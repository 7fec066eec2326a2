"""Finding this process among the others."""

from __future__ import annotations

import pytest

from launcher.errors import WorldError
from launcher.world import World, check_accelerate_settings, find_world

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


def test_torchrun() -> None:
    """Torchrun's variables give rank, node and size."""
    world = find_world(TORCHRUN)
    assert world == World(rank=5, world_size=8, local_rank=1, local_world_size=4)
    assert world.nodes == 2


def test_alone() -> None:
    """Without variables the process is alone."""
    assert find_world({}) == World()


def test_what_accelerate_launch_was_told() -> None:
    """Another precision is warned of; another engine is refused."""
    assert check_accelerate_settings("fp32", {"ACCELERATE_MIXED_PRECISION": "no"}) == ""
    assert check_accelerate_settings("bf16", {"ACCELERATE_MIXED_PRECISION": "bf16"}) == ""
    warning = check_accelerate_settings("fp32", {"ACCELERATE_MIXED_PRECISION": "bf16"})
    assert "mixed_precision=bf16, and the recipe says precision=fp32" in warning
    assert check_accelerate_settings("fp32", {"ACCELERATE_DYNAMO_BACKEND": "NO"}) == ""
    with pytest.raises(WorldError, match="to compile the model with inductor"):
        check_accelerate_settings("fp32", {"ACCELERATE_DYNAMO_BACKEND": "inductor"})
    with pytest.raises(WorldError, match="configured for DeepSpeed"):
        check_accelerate_settings("fp32", {"ACCELERATE_USE_DEEPSPEED": "true"})


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK or LOCAL_RANK is not"),
        (TORCHRUN | {"RANK": "8"}, "contradict each other"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "contradict each other"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "3"}, "contradict each other"),
        (TORCHRUN | {"RANK": "x"}, "RANK='x'"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"}, "started one"),
    ],
)
def test_contradictions_are_refused(env: dict[str, str], message: str) -> None:
    """Variables that cannot be true together end in an error that names them."""
    with pytest.raises(WorldError) as caught:
        find_world(env)
    assert message in str(caught.value)
