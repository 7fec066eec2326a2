from launcher import Data, Recipe, main, sgd, torch_schedule


def mine() -> Recipe:
    """Handwritten digits as vectors, one hidden layer."""
    return Recipe(
        name="mine",
        model=build_model,
        data=build_data,
        loss=cross_entropy,
        metrics={"accuracy": accuracy},
        optimizer=sgd(momentum=0.9),
        schedule=torch_schedule("OneCycleLR", three_phase=True),
        batch_size=256,
        lr=0.2,
        lr_batch_size=256,
        epochs=10,
    )


def build_model():
    from torch import nn

    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def build_data():
    import torch
    from sklearn.datasets import load_digits
    from torch.utils.data import TensorDataset

    digits = load_digits()
    images, labels = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
    return Data(
        train=TensorDataset(images[261:], labels[261:]),
        evaluation=TensorDataset(images[:261], labels[:261]),
    )


def cross_entropy(logits, batch):
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits, batch[1], reduction="sum"), len(batch[1])


def accuracy(logits, batch):
    return (logits.argmax(1) == batch[1]).sum(), len(batch[1])


if __name__ == "__main__":
    main(mine)
