"""Phases in a Lightning trainer: the digits network of `digits.py`, trained by one callback.

In two processes: ``python samples/with_lightning.py 16 2``, which Lightning starts.
"""

from __future__ import annotations

import logging
import sys
import warnings

import digits
import torch
from pytorch_lightning import LightningModule, Trainer, seed_everything

import dynrank_fx as dr
from dynrank_fx.integrations.lightning import PhasesCallback


class Digits(LightningModule):
    """The net is made in ``__init__``; everything else is as in any LightningModule."""

    def __init__(self) -> None:
        super().__init__()
        self.net = dr.transform(digits.model(), digits.example_inputs(), leave=tuple(dr.Role))

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        return digits.loss(self.net(batch[0]), batch)

    def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
        self.log("accuracy", digits.metric(self.net(batch[0]), batch))

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = digits.optimizer(self.net.parameters())
        return {"optimizer": optimizer, "lr_scheduler": digits.lr_scheduler(optimizer)}


def main(epochs: int = digits.epochs, devices: int = 1) -> None:
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    seed_everything(0)
    callback = PhasesCallback(dr.schedules.auto(0.75))
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=[callback],
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    module = Digits()
    trainer.fit(module, digits.train_data(), digits.eval_data())
    if not trainer.is_global_zero:
        return
    for record in callback.history:
        spent = f"compute so far {record.spent:.2f} dense {record.unit}s"
        print(f"{record.unit} {record.epoch + 1:>2}  {record.phase:<12} {spent}")
    small = dr.truncate(module.net)
    correct = [digits.metric(small(batch[0]), batch) for batch in digits.eval_data()]
    print(f"held-out accuracy of the truncated model: {torch.stack(correct).mean():.2%}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
