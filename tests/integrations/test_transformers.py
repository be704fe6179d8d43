"""The callback for a Hugging Face Trainer: the phases of a schedule, and a checkpoint folder that goes on."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import schemas  # noqa: F401 (torchvision, which transformers imports, asks for its ops on a torch that has none)
import torch
from plain_loop import SCHEDULE, assert_same, data
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.schedules import Schedule

SAMPLES = Path(__file__).parents[2] / "samples"
pytestmark = pytest.mark.filterwarnings("ignore")


class Classifier(nn.Module):
    """What a Trainer expects: keyword inputs, and the loss first."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        scores = self.layers(x)
        return {"loss": nn.functional.cross_entropy(scores, labels), "logits": scores}


def hugging_face(folder: Path, net: nn.Module, schedule: Schedule = SCHEDULE, **more: Any) -> tuple[Any, Any]:
    from transformers import Trainer, TrainingArguments

    from dynrank_fx.integrations.transformers import PhasesCallback

    callback = PhasesCallback(schedule)
    choices = {"num_train_epochs": 5, "per_device_train_batch_size": 8, "save_strategy": "epoch"} | more
    arguments = TrainingArguments(
        output_dir=str(folder),
        learning_rate=1e-2,
        weight_decay=0.1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        logging_strategy="no",
        **choices,
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


@pytest.mark.parametrize("steps", [8, 10])
def test_a_trainer_goes_on_in_the_midst_of_an_epoch(steps, tmp_path):
    """An epoch is 6 steps, and the last one is begun only: the switch to LOW comes after 12, and lands before."""
    from dynrank_fx.integrations.transformers import resume_from_

    given = {"num_train_epochs": 2.2, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": steps}
    schedule = dr.schedules.FullBetween(1, 2)
    whole, expected = hugging_face(tmp_path, classifier(), schedule, **given)
    whole.train()
    assert [record.phase for record in expected.history] == ["LOW", "FULL", "LOW"]
    net = classifier()
    resume_from_(net, tmp_path / f"checkpoint-{steps}")
    trainer, callback = hugging_face(tmp_path, net, schedule, **given)
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{steps}"))
    assert [record.epoch for record in callback.history] == [0, 1, 2]
    assert callback.history[2].switch_error == pytest.approx(expected.history[2].switch_error)
    assert_same(trainer.model, whole.model)


def test_a_checkpoint_of_another_folder_is_found_where_the_callback_is_told(tmp_path):
    from dynrank_fx.integrations.transformers import resume_from_

    hugging_face(tmp_path / "first", classifier())[0].train()
    folder = tmp_path / "first" / "checkpoint-6"
    net = classifier()
    resume_from_(net, folder)
    trainer, callback = hugging_face(tmp_path / "second", net)
    with pytest.raises(dr.TransitionError, match=r"phases\.pt is missing: give the callback the checkpoint"):
        trainer.train(resume_from_checkpoint=str(folder))
    net = classifier()
    resume_from_(net, folder)
    trainer, callback = hugging_face(tmp_path / "second", net)
    callback.resume_from = folder
    trainer.train(resume_from_checkpoint=str(folder))
    assert [record.phase for record in callback.history] == ["LOW", "FULL", "FULL", "LOW", "LOW"]


def test_nothing_is_written_before_training_has_begun(tmp_path):
    from transformers import TrainerState

    _, callback = hugging_face(tmp_path, classifier())
    (tmp_path / "checkpoint-0").mkdir()
    callback.on_save(SimpleNamespace(output_dir=str(tmp_path)), TrainerState(), None)
    assert list((tmp_path / "checkpoint-0").iterdir()) == []


def test_a_trainer_is_told_what_is_missing(tmp_path):
    from dynrank_fx.integrations.transformers import resume_from_

    trainer, _ = hugging_face(tmp_path, Classifier())
    with pytest.raises(dr.TransitionError, match="the model holds no net with sites"):
        trainer.train()
    with pytest.raises(dr.TransitionError, match=r"has no phases\.pt"):
        resume_from_(classifier(), tmp_path)


def test_the_sample_runs(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SAMPLES))
    monkeypatch.setattr(sys, "argv", ["with_transformers.py", "2", "128"])
    runpy.run_path(str(SAMPLES / "with_transformers.py"), run_name="__main__")
    assert "parameters after truncation" in capsys.readouterr().out
