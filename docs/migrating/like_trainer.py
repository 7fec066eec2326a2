from dataclasses import replace

from mine import mine

from launcher import Recipe, linear, main, warmup


def like_trainer() -> Recipe:
    """The recipe with what the Trainer does unless told otherwise, and with its schedule."""
    return replace(
        mine(),
        name="like_trainer",
        schedule=warmup(linear(), steps=5, start_factor=0.0),
        max_grad_norm=1.0,
    )


if __name__ == "__main__":
    main(like_trainer)
