"""A classifier that is judged on two evaluation sets, by metrics that need all predictions."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from launcher import (
    CallbackContext,
    Data,
    Evaluation,
    Recipe,
    all_predictions,
    constant,
    ema,
    log,
    main,
    sgd,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

CLASSES = 4


def judged() -> Recipe:
    """A classifier of 8 numbers with 23 samples in dev and 7 in test; an epoch has 4 batches."""
    return Recipe(
        name="judged",
        model=build_model,
        tensor_parallel_plan={"0": "colwise", "2": "rowwise"},
        data=build_data,
        loss=loss,
        metrics={
            "accuracy": accuracy,
            "auroc": all_predictions(build_auroc),
            "several": all_predictions(build_several),
            "highest": all_predictions(build_highest, highest),
            "pearson": all_predictions(build_pearson, first_class),
            "listed": all_predictions(build_listed, first_class),
            "plain": all_predictions(Plain, first_class_by_name),
        },
        optimizer=sgd(momentum=0.9),
        schedule=constant(),
        batch_size=12,
        lr=0.3,
        lr_batch_size=12,
        epochs=2,
        evaluate_every=3,
        train_samples=48,
        num_workers=0,
    )


def whole() -> Recipe:
    """The classifier with everything around the loop.

    It logs numbers, averages its weights, keeps the best of them, and has a callback. Of 24 steps
    it takes 18, because the AUROC is best after step 9.
    """
    recipe = judged()
    return replace(
        recipe,
        loss=logging_loss,
        metrics={**recipe.metrics, "sklearn": all_predictions(SklearnAuroc)},
        predict=predict,
        callbacks=(Witness(),),
        train_metrics=("accuracy",),
        averaging=ema(0.5),
        keep_best="dev/auroc:max",
        stop_after=3,
        epochs=6,
        micro_batch_size=4,
    )


def build_model() -> nn.Module:
    """Return a network with one hidden layer."""
    from torch import nn

    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, CLASSES))


def build_data() -> Data:
    """Return samples of a linear classifier, with some wrong labels."""
    import torch
    from torch.utils.data import TensorDataset

    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(78, 8, generator=generator)
    targets = (inputs @ torch.randn(8, CLASSES, generator=generator)).argmax(1)
    targets[::5] = torch.randint(0, CLASSES, (len(targets[::5]),), generator=generator)
    targets[71:75] = torch.arange(CLASSES)  # each class is in each set
    sets = [TensorDataset(inputs[a:b], targets[a:b]) for a, b in ((0, 48), (48, 71), (71, 78))]
    return Data(
        train=sets[0], evaluation={"dev": sets[1], "test": Evaluation(sets[2], every="end")}
    )


class Witness:
    """Remembers every evaluation, and writes them down at the end, on every rank."""

    def __init__(self) -> None:
        self._seen: list[tuple[int, dict[str, float]]] = []

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen."""
        return {"seen": self._seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with what was seen before."""
        self._seen = [*state["seen"]]

    def on_evaluation(self, context: CallbackContext) -> None:
        """Remember the step and the metrics."""
        self._seen.append((context.step, dict(context.evaluation)))

    def on_run_end(self, context: CallbackContext) -> None:
        """Write down what was seen."""
        path = context.run_dir / f"witness{context.rank}.json"
        path.write_text(json.dumps(self._seen))


def loss(logits: Tensor, batch: Any) -> tuple[Tensor, int]:
    """Return the summed cross-entropy and the number of samples."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits, batch[1], reduction="sum"), len(batch[1])


def logging_loss(logits: Tensor, batch: Any) -> tuple[Tensor, int]:
    """Return the same, and log it again, and the loss of each class that a micro-batch has."""
    from torch.nn.functional import cross_entropy

    losses = cross_entropy(logits, batch[1], reduction="none")
    log("again", losses.sum(), len(losses))
    for label in set(batch[1].tolist()):
        chosen = losses[batch[1] == label]
        log(f"class/{label}", chosen.sum(), len(chosen))
    return loss(logits, batch)


def predict(model: Any, batch: Any) -> dict[str, Any]:
    """Return the probability of each class, and the right class."""
    return {"probabilities": model(batch[0]).softmax(1), "label": batch[1]}


def accuracy(logits: Tensor, batch: Any) -> tuple[Tensor, int]:
    """Return the number of correct predictions and the number of samples."""
    return (logits.argmax(1) == batch[1]).sum(), len(batch[1])


def build_auroc() -> Any:
    """Return a metric with lists of all predictions and targets."""
    from torchmetrics.classification import MulticlassAUROC

    return MulticlassAUROC(CLASSES)


class SklearnAuroc:
    """The same by scikit-learn: a metric without torchmetrics."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all samples."""
        self._probabilities: list[Any] = []
        self._labels: list[int] = []

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Take samples."""
        self._probabilities += logits.double().softmax(1).tolist()
        self._labels += labels.tolist()

    def compute(self) -> float:
        """Return the mean over classes of each against the others."""
        from sklearn.metrics import roc_auc_score

        return float(roc_auc_score(self._labels, self._probabilities, multi_class="ovr"))


def build_several() -> Any:
    """Return a collection: the same states for two metrics, and sums of numbers for one."""
    from torchmetrics import MetricCollection
    from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

    top = {f"top{k}": MulticlassAccuracy(CLASSES, top_k=k, average="micro") for k in (1, 3)}
    return MetricCollection({"f1": MulticlassF1Score(CLASSES), **top})


def build_highest() -> Any:
    """Return a metric whose state is a maximum."""
    from torchmetrics.aggregation import MaxMetric

    return MaxMetric()


def highest(logits: Tensor, _: Any) -> tuple[Tensor]:
    """Return the logits, of which the metric takes the highest."""
    return (logits,)


def build_pearson() -> Any:
    """Return a metric whose states have no reduction, so that its updates are gathered."""
    from torchmetrics.regression import PearsonCorrCoef

    return PearsonCorrCoef()


def first_class(logits: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    """Return the logits of the first class, and whether it is the right one."""
    return logits[:, 0].float(), (batch[1] == 0).float()


def first_class_by_name(logits: Tensor, batch: Any) -> dict[str, Tensor]:
    """Return the same by name."""
    predictions, targets = first_class(logits, batch)
    return {"targets": targets, "predictions": predictions}


def build_listed() -> Any:
    """Return a metric of torchmetrics that depends on the order of the samples."""
    import torch
    from torchmetrics import Metric
    from torchmetrics.utilities import dim_zero_cat

    class Listed(Metric):  # type: ignore[misc]
        predictions: list[Tensor]

        def __init__(self) -> None:
            super().__init__()
            self.add_state("predictions", [], dist_reduce_fx="cat")

        def update(self, predictions: Tensor, targets: Tensor) -> None:
            self.predictions.append(predictions + targets)

        def compute(self) -> Tensor:
            values: Tensor = dim_zero_cat(self.predictions)
            return (values * torch.arange(1.0, len(values) + 1)).sum()

    return Listed()


class Plain:
    """A metric without torchmetrics that depends on the order of the samples."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all samples."""
        self.total, self.count = 0.0, 0

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Take samples."""
        for value in (predictions + targets).tolist():
            self.count += 1
            self.total += value * self.count

    def compute(self) -> dict[str, Any]:
        """Return the sum of the values times their positions, the count, and a text."""
        return {"total": self.total, "count": self.count, "left_out": "text"}


if __name__ == "__main__":
    main(whole)
