"""SyncBatchNorm as GPUs compute it, on CPU ranks."""

from __future__ import annotations

from support import ROOT, Commands


def test_the_path_of_gpus_is_batch_norm_over_all_ranks(run: Commands) -> None:
    """Outputs, gradients and running statistics of three ranks equal those of the whole batch.

    Some ranks have no samples, and the kernels refuse them. The running statistics are moving
    averages, cumulative averages, or absent.
    """
    done = run("python", ROOT / "tests/batch_norm_kernels.py")
    assert done.exit_code == 0, done.stderr
