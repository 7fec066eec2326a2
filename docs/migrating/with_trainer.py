import os

import torch
from mine import build_data, build_model
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

RANKS = int(os.environ.get("WORLD_SIZE", "1"))


class Digits(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = build_model()

    def forward(self, images, labels):
        logits = self.model(images)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def collate(samples):
    images, labels = zip(*samples)
    return {"images": torch.stack(images), "labels": torch.stack(labels)}


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


if __name__ == "__main__":
    torch.manual_seed(0)
    data = build_data()
    trainer = Trainer(
        model=Digits(),
        args=TrainingArguments(
            output_dir="runs/trainer",
            per_device_train_batch_size=256 // RANKS,
            num_train_epochs=10,
            learning_rate=0.2,
            optim="sgd",
            optim_args="momentum=0.9",
            lr_scheduler_type="linear",
            warmup_steps=5,
            eval_strategy="epoch",
            report_to="none",
            remove_unused_columns=False,
        ),
        data_collator=collate,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        compute_metrics=accuracy,
    )
    trainer.train()
