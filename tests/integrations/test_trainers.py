"""The hooks into other trainers: the same phases as in our own loop, state carried, and a resume that goes on."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import schemas  # noqa: F401 (torchvision, which both trainers import, asks for its ops on a torch that has none)
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dynrank_fx as dr

SAMPLES = Path(__file__).parents[2] / "samples"
SCHEDULE = dr.schedules.FullBetween(1, 3)
pytestmark = pytest.mark.filterwarnings("ignore")


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(24, 16, generator=generator), torch.randint(8, (24,), generator=generator))


def a_net() -> nn.Module:
    torch.manual_seed(0)
    return dr.transform(nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8)), (torch.randn(4, 16),))


def reference(epochs: int) -> nn.Module:
    """The same training in a plain loop."""
    net = a_net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    loader = DataLoader(data(), 8)
    phases = dr.Phases(
        net, optimizer, SCHEDULE, epochs, scheduler, steps=len(loader), decay=dr.Decay.PRODUCT, landing=True
    )
    for epoch in range(epochs):
        phases.begin(epoch)
        for x, y in loader:
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        scheduler.step()
    assert [record.phase for record in phases.history] == ["LOW", "FULL", "FULL", "LOW", "LOW"][:epochs]
    return net


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for (name, mine), theirs in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


# Lightning


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


def test_lightning_trains_as_a_plain_loop_does(tmp_path):
    trainer, callback = lightning(5, tmp_path, enable_checkpointing=False)
    module = lightning_module()
    trainer.fit(module, DataLoader(data(), 8))
    assert [record.phase for record in callback.history] == ["LOW", "FULL", "FULL", "LOW", "LOW"]
    assert_same(module.net, reference(5))


def test_lightning_lands_by_optimizer_steps_where_batches_are_accumulated(tmp_path):
    trainer, callback = lightning(5, tmp_path, enable_checkpointing=False, accumulate_grad_batches=2)
    trainer.fit(lightning_module(), DataLoader(data(), 8))
    assert max(callback.history[3].switch_error.values()) < 1e-5


@pytest.mark.parametrize("stop", [2, 4])
def test_lightning_goes_on_from_a_checkpoint_in_any_phase(stop, tmp_path):
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


def test_lightning_is_told_what_is_missing(tmp_path):
    from dynrank_fx.integrations.lightning import resume_from_

    module = lightning_module()
    module.net = nn.Linear(16, 8)
    trainer, _ = lightning(2, tmp_path, enable_checkpointing=False)
    with pytest.raises(dr.TransitionError, match="the model holds no net with sites"):
        trainer.fit(module, DataLoader(data(), 8))
    endless, _ = lightning(-1, tmp_path, enable_checkpointing=False, max_steps=3)
    with pytest.raises(dr.TransitionError, match="needs an end: give the Trainer max_epochs"):
        endless.fit(lightning_module(), DataLoader(data(), 8))
    torch.save({"callbacks": {}}, tmp_path / "other.ckpt")
    with pytest.raises(dr.TransitionError, match="has no state of a PhasesCallback"):
        resume_from_(a_net(), tmp_path / "other.ckpt")


# Hugging Face


class Classifier(nn.Module):
    """What a Trainer expects: keyword inputs, and the loss first."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        scores = self.layers(x)
        return {"loss": nn.functional.cross_entropy(scores, labels), "logits": scores}


def hugging_face(folder: Path, net: nn.Module, **more: Any) -> tuple[Any, Any]:
    from transformers import Trainer, TrainingArguments

    from dynrank_fx.integrations.transformers import PhasesCallback

    callback = PhasesCallback(SCHEDULE)
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=5,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        weight_decay=0.1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="epoch",
        logging_strategy="no",
        **more,
    )
    rows = [{"x": x, "labels": y} for x, y in data()]
    return Trainer(net, arguments, train_dataset=rows, callbacks=[callback]), callback


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return dr.transform(Classifier(), {"x": torch.randn(4, 16), "labels": torch.randint(8, (4,))})


class Holder(nn.Module):
    """A model with the net inside."""

    def __init__(self) -> None:
        super().__init__()
        self.net = classifier()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return self.net(x=x, labels=labels)


@pytest.mark.parametrize("make", [lambda: classifier(), Holder], ids=["the net", "a model that holds it"])
def test_a_trainer_goes_through_the_phases_with_one_optimizer(make, tmp_path):
    trainer, callback = hugging_face(tmp_path, make())
    trainer.train()
    assert [record.phase for record in callback.history] == ["LOW", "FULL", "FULL", "LOW", "LOW"]
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trainer.model.parameters()}
    cut = callback.history[3].switch_error
    assert max(cut.values()) < 1e-5, "it landed before"


@pytest.mark.parametrize("stop", [2, 4])
def test_a_trainer_goes_on_from_a_checkpoint_in_any_phase(stop, tmp_path):
    from dynrank_fx.integrations.transformers import resume_from_

    whole, _ = hugging_face(tmp_path, classifier())
    whole.train()
    folder = tmp_path / f"checkpoint-{3 * stop}"
    net = classifier()
    resume_from_(net, folder)
    trainer, callback = hugging_face(tmp_path, net)
    trainer.train(resume_from_checkpoint=str(folder))
    assert [record.epoch for record in callback.history] == [0, 1, 2, 3, 4]
    assert_same(trainer.model, whole.model)


def test_a_trainer_is_told_what_is_missing(tmp_path):
    from dynrank_fx.integrations.transformers import resume_from_

    trainer, _ = hugging_face(tmp_path, Classifier())
    with pytest.raises(dr.TransitionError, match="the model holds no net with sites"):
        trainer.train()
    with pytest.raises(dr.TransitionError, match=r"has no phases\.pt"):
        resume_from_(classifier(), tmp_path)


# TensorBoard


def test_tensorboard_shows_what_the_records_say(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from dynrank_fx.integrations.tensorboard import TensorBoard
    from dynrank_fx.training import Run, Settings, Task, fit

    net = a_net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    loss = lambda output, batch: nn.functional.cross_entropy(output, batch[1])  # noqa: E731
    task = Task(DataLoader(data(), 8), loss, lambda batch: ((batch[0],), {}))
    run = Run(net, optimizer, SCHEDULE)
    fit(run, task, Settings(4, compile=False), watcher=TensorBoard(tmp_path))
    events = EventAccumulator(str(tmp_path)).Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert [step for step, _ in found] == [1, 2, 3, 4]
    torch.testing.assert_close([value for _, value in found], [r.loss for r in run.history], rtol=1e-5, atol=0)
    assert [event.value for event in events.Scalars("share of sites in FULL")] == [0, 1, 1, 0]
    ranks = [event.value for event in events.Scalars("effective_rank/0.weight")]
    torch.testing.assert_close(ranks, [r.effective_rank["0.weight"] for r in run.history], rtol=1e-5, atol=0)


# Samples


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("with_lightning.py", ["2"], "held-out accuracy of the truncated model"),
        ("with_transformers.py", ["2", "128"], "parameters after truncation"),
    ],
)
def test_the_samples_run(name, arguments, words, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SAMPLES))
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(SAMPLES / name), run_name="__main__")
    assert words in capsys.readouterr().out
