"""Digits whose held-out samples a parameter chooses, with columns to predict."""

from __future__ import annotations

from dataclasses import replace

from worlds import Noisy, worlds

from launcher import Data, Recipe, main


def held_out(*, samples: int = 70) -> Recipe:
    """Digits without augmentation, of which the last `samples` of 320 are held out."""
    return replace(
        worlds(),
        name="held_out",
        data=lambda: Data(train=Noisy(0, 250, 0.0), evaluation=Noisy(320 - samples, 320, 0.0)),
        record_samples=False,
        epochs=2,
        evaluate_every=4,
        checkpoint_every=4,
        keep_checkpoints=9,
    )


if __name__ == "__main__":
    main(held_out)
