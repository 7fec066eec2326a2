"""Large worlds: 1,024 ranks in one process, and plans for 10,000."""

from __future__ import annotations

import json

from support import Commands


def test_a_plan_for_ten_thousand_ranks(run: Commands) -> None:
    """The samples per node and per rank in the plan of 1,250 nodes add up to the batch."""
    done = run(
        *("launcher", "plan", "digits", "--nodes", "1250", "-n", "8", "device=cuda", "--json"),
        *("batch_size=100003", "train_samples=1000000000"),
    )
    assert done.exit_code == 0, done.stderr
    plan = json.loads(done.stdout)
    assert len(plan["samples_per_node"]) == 1250
    assert sum(plan["samples_per_node"]) == sum(plan["samples_per_rank"]) == 100_003
    assert plan["world_size"] == len(plan["samples_per_rank"]) == 10_000
