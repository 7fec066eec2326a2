"""Recipe with the settings of common tutorials, as the starting point of tuned.py."""

from __future__ import annotations

from dataclasses import replace

from launcher import Recipe, constant, main, sgd
from launcher.recipes.fashion_mnist import fashion_mnist


def untuned() -> Recipe:
    """Fashion-MNIST with SGD, momentum and a constant learning rate, as in a tutorial."""
    return replace(
        fashion_mnist(label_smoothing=0.0),
        name="untuned",
        optimizer=sgd(momentum=0.9),
        schedule=constant(),
        lr=0.01,
        batch_size=64,
        epochs=16,
        in_memory=False,
    )


if __name__ == "__main__":
    main(untuned)
