import lightning as L
import torch
from mine import build_data, build_model
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

RANKS = 2


class Digits(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = build_model()

    def training_step(self, batch, _):
        return cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch, _):
        accuracy = (self.model(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("accuracy", accuracy, prog_bar=True, sync_dist=True, batch_size=len(batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)
        steps = self.trainer.estimated_stepping_batches
        scheduler = OneCycleLR(optimizer, max_lr=0.2, total_steps=steps, three_phase=True)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


if __name__ == "__main__":
    L.seed_everything(0)
    data = build_data()
    trainer = L.Trainer(max_epochs=10, devices=RANKS, strategy="ddp", accelerator="auto")
    trainer.fit(
        Digits(),
        DataLoader(data.train, batch_size=256 // RANKS, shuffle=True),
        DataLoader(data.evaluation, batch_size=261),
    )
