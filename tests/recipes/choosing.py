"""A recipe that chooses a device when it is imported, as many training scripts do."""

from __future__ import annotations

import torch
from starting import starting

from launcher import Recipe, main

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def choosing() -> Recipe:
    """A linear model on data in memory."""
    return starting()


if __name__ == "__main__":
    main(choosing)
