"""The callback for Lightning: the phases of a plain loop, state carried, and a checkpoint that goes on."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import schemas  # noqa: F401 (torchvision, which Lightning imports, asks for its ops on a torch that has none)
import torch
from plain_loop import SCHEDULE, a_net, assert_same, data, reference
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dynrank_fx as dr

SAMPLES = Path(__file__).parents[2] / "samples"
pytestmark = pytest.mark.filterwarnings("ignore")


def lightning_module() -> Any:
    from pytorch_lightning import LightningModule

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = a_net()

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-2, weight_decay=0.1)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)]

    return Module()


def lightning(epochs: int, folder: Path, **more: Any) -> tuple[Any, Any]:
    from pytorch_lightning import Trainer

    from dynrank_fx.integrations.lightning import PhasesCallback

    callback = PhasesCallback(SCHEDULE)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(max_epochs=epochs, callbacks=[callback], default_root_dir=folder, **quiet, **more), callback


def test_it_trains_as_a_plain_loop_does(tmp_path):
    trainer, callback = lightning(5, tmp_path, enable_checkpointing=False)
    module = lightning_module()
    trainer.fit(module, DataLoader(data(), 8))
    assert [record.phase for record in callback.history] == ["LOW", "FULL", "FULL", "LOW", "LOW"]
    assert_same(module.net, reference(5))


def test_it_lands_by_optimizer_steps_where_batches_are_accumulated(tmp_path):
    trainer, callback = lightning(5, tmp_path, enable_checkpointing=False, accumulate_grad_batches=2)
    trainer.fit(lightning_module(), DataLoader(data(), 8))
    assert max(callback.history[3].switch_error.values()) < 1e-5


@pytest.mark.parametrize("stop", [2, 4])
def test_it_goes_on_from_a_checkpoint_in_any_phase(stop, tmp_path):
    from pytorch_lightning import Callback

    from dynrank_fx.integrations.lightning import resume_from_

    trainer, _ = lightning(5, tmp_path, enable_checkpointing=False)
    module = lightning_module()

    class Stop(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.should_stop = trainer.current_epoch + 1 == stop

    trainer.callbacks.append(Stop())
    trainer.fit(module, DataLoader(data(), 8))
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    again = lightning_module()
    resume_from_(again.net, tmp_path / "c.ckpt")
    trainer, callback = lightning(5, tmp_path, enable_checkpointing=False)
    trainer.fit(again, DataLoader(data(), 8), ckpt_path=tmp_path / "c.ckpt", weights_only=False)
    assert [record.epoch for record in callback.history] == [0, 1, 2, 3, 4]
    assert_same(again.net, reference(5))


def test_it_is_told_what_is_missing(tmp_path):
    from dynrank_fx.integrations.lightning import resume_from_

    module = lightning_module()
    module.net = nn.Linear(16, 8)
    trainer, _ = lightning(2, tmp_path, enable_checkpointing=False)
    with pytest.raises(dr.TransitionError, match="the model holds no net with sites"):
        trainer.fit(module, DataLoader(data(), 8))
    endless, _ = lightning(-1, tmp_path, enable_checkpointing=False)
    with pytest.raises(dr.ScheduleError, match="needs an end: give the Trainer max_steps or max_epochs"):
        endless.fit(lightning_module(), DataLoader(data(), 8))
    torch.save({"callbacks": {}}, tmp_path / "other.ckpt")
    with pytest.raises(dr.TransitionError, match="has no state of a PhasesCallback"):
        resume_from_(a_net(), tmp_path / "other.ckpt")


def test_one_optimizer_over_the_net_is_needed(tmp_path):
    module = lightning_module()
    module.automatic_optimization = False
    module.configure_optimizers = lambda: [torch.optim.SGD([p], lr=0.1) for p in list(module.net.parameters())[:2]]
    trainer, _ = lightning(2, tmp_path, enable_checkpointing=False)
    with pytest.raises(dr.TransitionError, match="one optimizer over the net, and this module has 2"):
        trainer.fit(module, DataLoader(data(), 8))


def test_a_scheduler_of_every_step_is_followed_and_the_compute_that_is_spent_is_logged(tmp_path):
    module = lightning_module()

    def configured() -> Any:
        optimizer = torch.optim.AdamW(module.net.parameters(), lr=1e-2, weight_decay=0.1)
        decay = torch.optim.lr_scheduler.StepLR(optimizer, 6, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}

    module.configure_optimizers = configured
    trainer, callback = lightning(5, tmp_path, enable_checkpointing=False)
    trainer.fit(module, DataLoader(data(), 8))
    assert float(trainer.callback_metrics["dynrank/spent"]) == pytest.approx(callback.history[-1].spent)
    assert [record.lr for record in callback.history] == pytest.approx([1e-2, 1e-2, 5e-3, 5e-3, 2.5e-3])
    assert_same(module.net, reference(5))


def test_a_phase_begins_without_the_gradients_of_the_last_one(tmp_path):
    from pytorch_lightning import Callback

    seen: list[bool] = []

    class Look(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append(any(p.grad is not None for p in pl_module.parameters()))

    trainer, _ = lightning(3, tmp_path, enable_checkpointing=False)
    trainer.callbacks.append(Look())
    trainer.fit(lightning_module(), DataLoader(data(), 8))
    assert seen == [False] * 3


def test_a_checkpoint_without_phases_is_none_to_go_on_from():
    from dynrank_fx.integrations.lightning import PhasesCallback

    callback = PhasesCallback(SCHEDULE)
    assert callback.state_dict() == {}, "nothing has begun"
    callback.load_state_dict({})
    assert callback._restored is None


def test_the_sample_runs(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SAMPLES))
    monkeypatch.setattr(sys, "argv", ["with_lightning.py", "2"])
    runpy.run_path(str(SAMPLES / "with_lightning.py"), run_name="__main__")
    assert "held-out accuracy of the truncated model" in capsys.readouterr().out
