"""Digits that wait after each checkpoint until a test lets them go on."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from launcher import CallbackContext, Recipe, main
from launcher.recipes.digits import digits


class Gate:
    """Waits in a step while there is a checkpoint for whose name there is no file in a folder."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def after_step(self, context: CallbackContext) -> None:
        """Wait for the file of each checkpoint, or for a file `all`."""
        for checkpoint in sorted((context.run_dir / "checkpoints").glob("step-*")):
            names = checkpoint.name, "all"
            while not any((self._folder / name).exists() for name in names):
                time.sleep(0.01)


def gated(*, gates: str = "") -> Recipe:
    """Digits with a gate after each checkpoint, if the folder `gates` is given."""
    return replace(
        digits(),
        name="gated",
        callbacks=(Gate(gates),) if gates else (),
        checkpoint_every=10,
        steps=30,
        epochs=None,
        device="cpu",
    )


if __name__ == "__main__":
    main(gated)
