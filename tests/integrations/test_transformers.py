"""The callback for a Hugging Face Trainer: the phases of a schedule, and a checkpoint folder that goes on."""

from __future__ import annotations

import itertools
import runpy
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import schemas  # noqa: F401 (torchvision, which transformers imports, asks for its ops on a torch that has none)
import torch
from launched import launched
from plain_loop import SCHEDULE, InTurn, assert_near, assert_same, data
from several import as_launched, in_processes
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.processes import whole as whole_of
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

    callback = PhasesCallback(schedule, every=more.pop("every", None))
    choices = {"num_train_epochs": 5, "per_device_train_batch_size": 8, "save_strategy": "epoch"} | more
    rows = choices.pop("rows", None) or [{"x": x, "labels": y} for x, y in data()]
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
    held_out = rows[:8] if "eval_strategy" in choices else None
    return Trainer(net, arguments, train_dataset=rows, eval_dataset=held_out, callbacks=[callback]), callback


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


def test_a_trainer_trains_again_and_for_more_epochs(tmp_path):
    """With the callback, and the optimizer, of the first time; for more epochs as if there had been so many at once."""
    given = {"lr_scheduler_type": "constant"}
    trainer, callback = hugging_face(tmp_path / "a", classifier(), **given)
    trainer.train()
    first, phases = trainer.model.state_dict(), callback.phases
    trainer.args.num_train_epochs = 8
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-15"))
    assert [record.epoch for record in callback.history] == list(range(8))
    assert callback.phases.step == 24
    assert phases.step == 15, "the first one's hooks are gone"
    whole, _ = hugging_face(tmp_path / "b", classifier(), num_train_epochs=8, **given)
    whole.train()
    assert_same(trainer.model, whole.model)

    trainer.args.num_train_epochs = 3
    trainer.train()
    assert [record.phase for record in callback.history] == ["LOW", "FULL", "FULL"], "a training of its own"
    assert callback.history[-1].spent < 3
    assert callback.phases.step == 9
    assert first.keys() != trainer.model.state_dict().keys()


def test_weights_of_other_phases_ask_for_an_optimizer_of_theirs(tmp_path):
    trainer, callback = hugging_face(tmp_path, classifier())
    trainer.train()
    folder = str(tmp_path / "checkpoint-6")  # of FULL
    with pytest.raises(dr.TransitionError, match=r"set trainer\.optimizer = None before it trains again"):
        trainer.train(resume_from_checkpoint=folder)
    with pytest.raises(dr.TransitionError, match=r"set trainer\.optimizer = None before it trains again"):
        trainer.train()
    trainer.optimizer = None
    trainer.train(resume_from_checkpoint=folder)
    assert [record.phase for record in callback.history] == ["LOW", "FULL", "FULL", "LOW", "LOW"]


class Guide(nn.Module):
    """A model that takes any keyword, and hands them on: it cannot be captured, its parts can."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Body(), nn.Linear(32, 8)

    def forward(self, x: Tensor, labels: Tensor, **more: Any) -> dict[str, Tensor]:
        scores = self.head(self.body(x, **more))
        return {"loss": nn.functional.cross_entropy(scores, labels), "logits": scores}


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32))

    def forward(self, x: Tensor, **more: Any) -> Tensor:
        return self.layers(x)


def test_parts_do_without_the_count_of_labels_that_the_model_hands_on(tmp_path):
    torch.manual_seed(0)
    example = {"x": torch.randn(4, 16), "labels": torch.randint(8, (4,))}
    net = dr.transform(Guide(), example, how=dr.Capture.MODULES)
    trainer, callback = hugging_face(tmp_path, net, save_strategy="no")
    assert trainer.model_accepts_loss_kwargs
    trainer.train()
    assert [record.phase for record in callback.history] == ["LOW", "FULL", "FULL", "LOW", "LOW"]


def test_a_checkpoint_of_another_folder_is_found_where_the_callback_is_told(tmp_path):
    from dynrank_fx.integrations.transformers import resume_from_

    hugging_face(tmp_path / "first", classifier())[0].train()
    folder = tmp_path / "first" / "checkpoint-6"
    net = classifier()
    resume_from_(net, folder)
    trainer, callback = hugging_face(tmp_path / "second", net)
    with pytest.raises(dr.TransitionError, match=r"phases\.safetensors is missing: give the callback the checkpoint"):
        trainer.train(resume_from_checkpoint=str(folder))
    net = classifier()
    resume_from_(net, folder)
    trainer, callback = hugging_face(tmp_path / "second", net)
    callback.resume_from = folder
    trainer.train(resume_from_checkpoint=str(folder))
    assert [record.phase for record in callback.history] == ["LOW", "FULL", "FULL", "LOW", "LOW"]


# The file of the phases


def in_low(folder: Path, steps: int = 2) -> Path:
    """A checkpoint folder of a Trainer that trained so many steps."""
    schedule = dr.schedules.always(dr.Phase.LOW)
    hugging_face(folder, classifier(), schedule, max_steps=steps, save_strategy="steps", save_steps=steps)[0].train()
    return folder / f"checkpoint-{steps}"


def refusal(folder: Path) -> str:
    from dynrank_fx.integrations.transformers import resume_from_

    net = classifier()
    with pytest.raises(dr.DynrankError) as caught:
        resume_from_(net, folder)
    assert set(dr.phases_of(net).values()) == {dr.Phase.FULL}, "nothing was changed"
    return str(caught.value)


def test_a_damaged_or_foreign_file_of_phases_is_a_sentence(tmp_path):
    from dynrank_fx import store

    folder = in_low(tmp_path)
    file = folder / "phases.safetensors"
    data = file.read_bytes()
    for place in range(0, len(data), 101):
        file.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        assert "is damaged" in refusal(folder) or "was not written by dynrank-fx" in refusal(folder)
    for content in (b"", bytes(len(data)), data[: len(data) // 2]):
        file.write_bytes(content)
        assert f"{file} is damaged or not a safetensors file" in refusal(folder)
    store.write(file, {"x": torch.ones(2)}, {"plan": "of a net"})
    assert refusal(folder) == f"{file} holds no phases: put back the file that was in the checkpoint"
    store.write(file, {}, {"phases": {"dict": [["history", [3]]]}, "step": 2})
    assert refusal(folder).startswith("the state holds no history of phases")


def test_the_file_of_phases_of_another_checkpoint_is_told(tmp_path):
    from dynrank_fx.integrations.transformers import resume_from_

    (in_low(tmp_path / "b", 3) / "phases.safetensors").rename(in_low(tmp_path / "a") / "phases.safetensors")
    net = classifier()
    resume_from_(net, tmp_path / "a" / "checkpoint-2")
    trainer, _ = hugging_face(tmp_path / "a", net, dr.schedules.always(dr.Phase.LOW), max_steps=4)
    with pytest.raises(dr.StoreError, match=r"\.safetensors is of step 3, and the Trainer's checkpoint of step 2"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))


def test_the_file_of_an_earlier_version_goes_on_and_a_damaged_one_is_told(tmp_path):
    from dynrank_fx.integrations.transformers import resume_from_

    folder = in_low(tmp_path)
    torch.save({"history": [], "step": 0, "rewarm": None, "landing": None}, folder / "phases.pt")
    resume_from_(classifier(), folder)  # the new one counts
    callback = hugging_face(tmp_path, classifier(), dr.schedules.always(dr.Phase.LOW), max_steps=4)[1]
    state = callback._saved(SimpleNamespace(output_dir=str(tmp_path)), SimpleNamespace(global_step=2))
    (folder / "phases.safetensors").unlink()
    torch.save({"history": state["history"]}, folder / "phases.pt")
    net = classifier()
    resume_from_(net, folder)
    assert set(dr.phases_of(net).values()) == {dr.Phase.LOW}
    data = bytearray((folder / "phases.pt").read_bytes())
    data[data.index(b"history") + 2] ^= 1
    (folder / "phases.pt").write_bytes(data)
    assert "phases.pt is damaged (in " in refusal(folder)
    torch.save({"history": [Path()]}, folder / "phases.pt")
    assert "only running code would read" in refusal(folder)


def test_a_kill_while_the_file_of_phases_is_written_leaves_none_or_a_whole_one(tmp_path, monkeypatch):
    from dynrank_fx import files

    trainer, callback = hugging_face(tmp_path, classifier(), max_steps=2, save_strategy="no")
    trainer.train()
    (tmp_path / "checkpoint-2").mkdir()

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        callback.on_save(trainer.args, trainer.state, None)
    monkeypatch.undo()
    assert not (tmp_path / "checkpoint-2" / "phases.safetensors").exists()
    callback.on_save(trainer.args, trainer.state, None)
    assert [path.name for path in (tmp_path / "checkpoint-2").iterdir()] == ["phases.safetensors"]


def test_a_checkpoint_of_a_training_that_has_diverged_is_told(tmp_path):
    """``running_var`` is infinite, which no loss shows in training."""
    torch.manual_seed(0)
    model = Classifier()
    model.layers.insert(1, nn.BatchNorm1d(32))
    net = dr.transform(model, {"x": torch.randn(4, 16), "labels": torch.randint(8, (4,))})
    trainer, callback = hugging_face(tmp_path, net, max_steps=2, save_strategy="no")
    trainer.train()
    next(b for name, b in net.named_buffers() if name.endswith("running_var")).fill_(float("inf"))
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.warns(dr.DynrankWarning, match=r"running_var is not finite, as in a training that has diverged"):
        callback.on_save(trainer.args, trainer.state, None)


class Stream(torch.utils.data.IterableDataset[dict[str, Tensor]]):
    """The data, over and over."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            yield from ({"x": x, "labels": y} for x, y in data())


def in_steps(net: nn.Module, steps: int, every: int, accumulated: int = 1) -> nn.Module:
    """The training of a Trainer with a linear decay, in a plain loop."""
    groups = [[p for p in net.parameters() if p.ndim > 1], [p for p in net.parameters() if p.ndim == 1]]
    decays = [{"params": group, "weight_decay": decay} for group, decay in zip(groups, (0.1, 0.0), strict=True)]
    optimizer = torch.optim.AdamW(decays, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
    choices: Any = {"landing": True, "decay": dr.Decay.PRODUCT}
    dr.Phases(net, optimizer, SCHEDULE, lr_scheduler=scheduler, steps=steps, every=every, **choices)
    batches = itertools.cycle(torch.utils.data.DataLoader(data(), 8))
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(accumulated):
            x, labels = next(batches)
            (net(x=x, labels=labels)["loss"] / accumulated).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    return net


@pytest.mark.parametrize(
    ("stop", "accumulated"),
    [(3, 1), (8, 2), *(pytest.param(*each, marks=pytest.mark.fuzz) for each in ((3, 2), (8, 1), (14, 1), (14, 2)))],
)
def test_a_stream_is_trained_on_in_steps_and_gone_on_with_between_two_of_them(stop, accumulated, tmp_path):
    """20 steps in 5 ticks, of which the schedule has the second and third FULL; 8 is where one begins."""
    from dynrank_fx.integrations.transformers import resume_from_

    given = {"max_steps": 20, "gradient_accumulation_steps": accumulated, "save_strategy": "steps", "save_steps": stop}
    whole, expected = hugging_face(tmp_path, classifier(), every=4, rows=Stream(), **given)
    whole.train()
    assert [(record.phase, record.step) for record in expected.history] == [
        ("LOW", 0),
        ("FULL", 4),
        ("FULL", 8),
        ("LOW", 12),
        ("LOW", 16),
    ]
    assert max(expected.history[3].switch_error.values()) < 1e-5, "it landed before"
    assert_same(whole.model, in_steps(classifier(), 20, 4, accumulated))

    net, folder = classifier(), tmp_path / f"checkpoint-{stop}"
    resume_from_(net, folder)
    trainer, callback = hugging_face(tmp_path, net, every=4, rows=Stream(), **given)
    trainer.train(resume_from_checkpoint=str(folder))
    assert len(callback.history) == 5
    assert all(map(torch.equal, trainer.model.state_dict().values(), whole.model.state_dict().values()))


def test_one_epoch_is_divided_into_ticks(tmp_path):
    trainer, callback = hugging_face(
        tmp_path, classifier(), dr.schedules.auto(0.75, tail=0), num_train_epochs=1, per_device_train_batch_size=1
    )
    trainer.train()
    assert [record.step for record in callback.history] == list(range(0, 24, 2))
    assert callback.history[0].phase == "FULL"
    assert callback.history[-1].phase == "LOW"


@pytest.mark.parametrize("stop", [2, 7, *(pytest.param(stop, marks=pytest.mark.fuzz) for stop in (3, 5, 6))])
def test_few_epochs_are_divided_and_gone_on_with(stop, tmp_path):
    """Three epochs of three steps, each of them a tick."""
    from dynrank_fx.integrations.transformers import resume_from_

    given: Any = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 1}
    whole, expected = hugging_face(tmp_path, classifier(), InTurn(), **given)
    whole.train()
    assert [record.step for record in expected.history] == list(range(9))
    assert [record.phase for record in expected.history] == (["LOW", "LOW", "FULL", "FULL"] * 3)[:9]

    net, folder = classifier(), tmp_path / f"checkpoint-{stop}"
    resume_from_(net, folder)
    trainer, callback = hugging_face(tmp_path, net, InTurn(), **given)
    trainer.train(resume_from_checkpoint=str(folder))
    assert [record.phases for record in callback.history] == [record.phases for record in expected.history]
    assert all(map(torch.equal, trainer.model.state_dict().values(), whole.model.state_dict().values()))


def test_of_epochs_that_are_no_whole_number_every_tick_comes(tmp_path):
    trainer, callback = hugging_face(tmp_path, classifier(), InTurn(), num_train_epochs=2.4, save_strategy="no")
    trainer.train()
    assert trainer.state.max_steps == 8
    assert [record.step for record in callback.history] == list(range(8))


def test_a_resumed_training_whose_net_is_in_other_phases_is_refused(tmp_path):
    given = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    hugging_face(tmp_path, classifier(), dr.schedules.always(dr.Phase.LOW), **given)[0].train()
    net = classifier()
    trainer, callback = hugging_face(tmp_path, net, dr.schedules.always(dr.Phase.LOW), **given)
    trainer.state.global_step, trainer.state.max_steps = 3, 6
    with pytest.raises(dr.StoreError, match="the net is in other phases than the state is of"):
        callback.on_train_begin(trainer.args, trainer.state, None, **made_parts(trainer))


def made_parts(trainer: Any) -> dict[str, Any]:
    trainer.create_optimizer_and_scheduler(6)
    return {"model": trainer.model, "optimizer": trainer.optimizer, "lr_scheduler": trainer.lr_scheduler}


# Flags


class Tied(nn.Module):
    """Two layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor, labels: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        hidden = torch.tanh(self.middle(torch.tanh(self.first(x))))
        hidden = hidden if mask is None else hidden * mask
        scores = self.last(hidden)
        return {"loss": nn.functional.cross_entropy(scores, labels), "logits": scores}


def tied() -> nn.Module:
    torch.manual_seed(0)
    return dr.transform(Tied(), {"x": torch.randn(4, 16), "labels": torch.randint(8, (4,))})


@pytest.mark.parametrize("stop", [9, pytest.param(3, marks=pytest.mark.fuzz)])
def test_a_tied_model_is_saved_and_gone_on_with(stop, tmp_path):
    from dynrank_fx.integrations.transformers import resume_from_

    whole, _ = hugging_face(tmp_path, tied())
    whole.train()
    whole.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "model.safetensors").is_file()
    net = tied()
    resume_from_(net, tmp_path / f"checkpoint-{stop}")
    trainer, _ = hugging_face(tmp_path, net)
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert all(map(torch.equal, trainer.model.state_dict().values(), whole.model.state_dict().values()))
    sites = [part for name, part in net.named_modules(remove_duplicate=False) if name in ("first", "last")]
    assert sites[0].left is sites[1].left


def language_model() -> nn.Module:
    import transformers as hf

    torch.manual_seed(0)
    config = hf.GPT2Config(
        vocab_size=40, n_positions=16, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2
    )
    ids = torch.randint(40, (2, 8))
    example = {"input_ids": ids, "labels": ids}
    return dr.transform(hf.GPT2LMHeadModel(config), example, form=dr.Form.LAYERS, rank=dr.Fixed(4))


def test_checkpoints_in_low_are_gone_on_with_and_a_model_saved_in_low_is_told(tmp_path):
    """Of a model with ``save_pretrained``, by which the Trainer saves both."""
    from dynrank_fx.integrations.transformers import resume_from_

    torch.manual_seed(1)
    given = {"rows": [{"input_ids": row, "labels": row} for row in torch.randint(40, (24, 8))], "num_train_epochs": 5}
    with warnings.catch_warnings():
        warnings.simplefilter("error", dr.DynrankWarning)
        whole, _ = hugging_face(tmp_path, language_model(), **given)
        whole.train()
        net = language_model()
        resume_from_(net, tmp_path / "checkpoint-3")
        trainer, callback = hugging_face(tmp_path, net, **given)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [record.phase for record in callback.history] == ["LOW", "FULL", "FULL", "LOW", "LOW"]
    assert all(map(torch.equal, trainer.model.state_dict().values(), whole.model.state_dict().values()))
    with pytest.warns(dr.DynrankWarning, match="save_pretrained writes factors in the place of"):
        whole.save_model(str(tmp_path / "saved"))
    dr.enter_(whole.model, dr.Phase.FULL)
    with warnings.catch_warnings():
        warnings.simplefilter("error", dr.DynrankWarning)
        whole.save_model(str(tmp_path / "saved"))


class Hub:
    """In the place of Hugging Face's: keeps what is uploaded, and what was said until then."""

    def __init__(self, folder: Path, said: list[warnings.WarningMessage]) -> None:
        self.folder, self.said = folder, said
        self.uploads: list[tuple[Path, bool]] = []

    def create_repo(self, name: str, **_: object) -> Any:
        return SimpleNamespace(repo_id=name)

    def upload_folder(self, *, folder_path: str, **_: object) -> Any:
        told = any("save_pretrained writes factors" in str(each.message) for each in self.said)
        self.said.clear()
        copied = shutil.copytree(
            folder_path,
            self.folder / str(len(self.uploads)),
            ignore=lambda _, names: [name for name in names if name.startswith(("checkpoint-", "pushed"))],
        )
        self.uploads.append((copied, told))
        return SimpleNamespace(done=lambda: True, is_done=lambda: True)


def test_what_is_pushed_is_loaded_by_from_pretrained_or_it_is_told(tmp_path, monkeypatch):
    """While it trains, and after it."""
    import transformers as hf
    from transformers.utils import hub

    rows = [{"input_ids": row, "labels": row} for row in torch.randint(40, (24, 8))]
    net = language_model()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", dr.DynrankWarning)
        fake = Hub(tmp_path / "pushed", said)
        for module in (hf.trainer, hub):
            monkeypatch.setattr(module, "hf_api", lambda: fake)
        monkeypatch.setattr(hf.Trainer, "create_model_card", lambda *_, **__: None)
        more = {"push_to_hub": True, "hub_model_id": "me/mine", "hub_always_push": True}
        trainer, callback = hugging_face(tmp_path, net, rows=rows, **more)
        trainer.train()
        trainer.push_to_hub()
        dr.enter_(net, dr.Phase.FULL)
        trainer.push_to_hub()
    in_full = [record.phase == "FULL" for record in callback.history] + [False, True]
    assert [told for _, told in fake.uploads] == [not full for full in in_full]
    for folder, told in fake.uploads:
        _, info = hf.GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
        assert bool(info["missing_keys"]) is told


@pytest.mark.parametrize("make", [language_model, tied], ids=["layers", "graph"])
def test_the_best_model_at_the_end_is_that_of_its_phases(make, tmp_path):
    """The worst, since that is an early one, of other phases than the last."""
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(40, (24, 8))] if make is language_model else None
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer, callback = hugging_face(tmp_path, make(), rows=rows, eval_strategy="epoch", **best)
    trainer.train()
    epoch = next(index for index in range(5) if trainer.state.best_model_checkpoint.endswith(f"-{3 * (index + 1)}"))
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric
    assert dr.phases_of(trainer.model) == callback.history[epoch].phases


def test_a_callback_that_comes_after_the_trainer_prepares_the_model_as_well(tmp_path):
    trainer, callback = hugging_face(tmp_path, tied(), save_strategy="no")
    late = type(trainer)(tied(), trainer.args, train_dataset=trainer.train_dataset)
    late.add_callback(callback)
    late.train()
    late.save_model(str(tmp_path / "saved"))  # which refuses tied weights that nobody told of
    assert (tmp_path / "saved" / "model.safetensors").is_file()


def test_columns_that_the_model_takes_and_its_graph_does_not_are_not_dropped_without_a_word(tmp_path):
    rows = [{"x": x, "labels": y, "mask": torch.ones(16), "unknown": 3} for x, y in data()]
    trainer, _ = hugging_face(tmp_path, tied(), rows=rows)
    with pytest.raises(dr.TransitionError, match="the data have mask, which the model takes and its graph does not"):
        trainer.train()
    torch.manual_seed(0)
    example = {"x": torch.randn(4, 16), "labels": torch.randint(8, (4,)), "mask": torch.ones(4, 16)}
    trainer, callback = hugging_face(tmp_path, dr.transform(Tied(), example), rows=rows)
    trainer.train()
    assert len(callback.history) == 5


def test_activation_checkpoints_are_refused_in_words(tmp_path):
    trainer, _ = hugging_face(tmp_path, classifier(), gradient_checkpointing=True)
    with pytest.raises(dr.TransitionError, match=r"transform with form=Form\.LAYERS, which keeps the methods; or call"):
        trainer.train()


class Handing(nn.Module):
    """Its own code, which looks at values, hands all keywords on to its parts, and uses the Trainer's count itself."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = Classifier().layers

        def forward(self, x: Tensor, **more: Any) -> Tensor:
            return self.layers(x) if x.shape[1] == 16 else x  # which torch.export takes, and gives no **more

    def __init__(self) -> None:
        super().__init__()
        self.part, self.counts = self.Part(), list[int]()

    def forward(self, x: Tensor, labels: Tensor, **more: Any) -> dict[str, Tensor]:
        scores = self.part(x, **more)
        if float(scores.detach().sum()) == 0.5:
            return {}
        if "num_items_in_batch" in more:
            self.counts.append(int(more["num_items_in_batch"]))
        return {"loss": nn.functional.cross_entropy(scores, labels), "logits": scores}


def test_parts_of_a_model_are_not_given_the_trainers_count_of_labels(tmp_path):
    torch.manual_seed(0)
    example = {"x": torch.randn(4, 16), "labels": torch.randint(8, (4,))}
    net = dr.transform(Handing(), example, rank=dr.Fixed(2), how=dr.Capture.MODULES)
    assert isinstance(net, Handing)
    assert [type(part).__name__ for part in net.modules() if hasattr(part, "graphs")] == ["Part"]
    trainer, callback = hugging_face(tmp_path, net, num_train_epochs=2, save_strategy="no")
    trainer.train()
    assert set(net.counts) == {8}
    assert [record.phase for record in callback.phases.history]
    with pytest.raises(TypeError, match="the graph of Part has no argument `wrong`"):
        net(**example, wrong=1)


def test_bfloat16_goes_through_the_phases(tmp_path):
    trainer, callback = hugging_face(tmp_path, classifier(), bf16=True)
    trainer.train()
    assert [record.phase for record in callback.history] == ["LOW", "FULL", "FULL", "LOW", "LOW"]


@pytest.mark.fuzz
def test_a_compiled_training_is_that_of_eager(tmp_path):
    given = {"save_strategy": "no", "torch_compile": True, "torch_compile_backend": "aot_eager"}
    trainer, callback = hugging_face(tmp_path, classifier(), **given)
    trainer.train()
    assert [record.phase for record in callback.history] == ["LOW", "FULL", "FULL", "LOW", "LOW"]
    eager, _ = hugging_face(tmp_path, classifier(), save_strategy="no")
    eager.train()
    assert_same(trainer.model, eager.model)


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
    with pytest.raises(dr.TransitionError, match=r"has no phases\.safetensors"):
        resume_from_(classifier(), tmp_path)


def test_the_sample_runs(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SAMPLES))
    monkeypatch.setattr(sys, "argv", ["with_transformers.py", "1", "128"])
    runpy.run_path(str(SAMPLES / "with_transformers.py"), run_name="__main__")
    assert "parameters after truncation" in capsys.readouterr().out


# Several processes


def run_of(folder: Path, processes: int, **more: Any) -> tuple[Any, Any]:
    """Five epochs of batches of eight, whatever the number of processes."""
    given = {
        "per_device_train_batch_size": 8 // processes,
        "ddp_backend": "gloo" if processes > 1 else None,
        "train_sampling_strategy": "sequential",
    }
    return hugging_face(folder, more.pop("net", None) or classifier(), **(given | more))


def shard_without_devices() -> None:
    """Accelerate calls ``fully_shard`` where there are devices alone; here they are taken to be there."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    def found(self: Any, *_: Any) -> tuple[str, Any]:
        return "gloo", DistributedType.MULTI_GPU

    def cpu(self: Any) -> None:
        self.device = torch.device("cpu")

    PartialState._prepare_backend, PartialState.set_device = found, cpu


def one_of_two(rank: int, folder: Path, much: bool) -> dict[str, Any]:
    """What is done by each of two processes: the results are compared where they come together. much: or only to train
    and to go on.
    """
    from dynrank_fx.integrations.transformers import resume_from_

    as_launched(rank)
    found: dict[str, Any] = {}

    def keep(name: str, trainer: Any, callback: Any) -> None:
        state = {name: whole_of(value).clone() for name, value in trainer.model.state_dict().items()}
        found[name] = (state, [record.phase for record in callback.history])

    trainer, callback = run_of(folder / "whole", 2)
    trainer.train()
    keep("whole", trainer, callback)
    net = classifier()
    resume_from_(net, folder / "whole" / "checkpoint-6")
    trainer, callback = run_of(folder / "whole", 2, net=net, save_strategy="no")
    trainer.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-6"))
    keep("gone on with", trainer, callback)
    if not much:
        return found
    trainer.train()
    keep("again", trainer, callback)

    accumulating = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer, callback = run_of(folder / "accumulated", 2, save_strategy="no", **accumulating)
    trainer.train()
    keep("accumulated", trainer, callback)

    given = {"max_steps": 10, "save_strategy": "no", "every": 2, "rows": Stream()}
    trainer, callback = run_of(folder / "stream", 2, **given)
    trainer.train()
    keep("stream", trainer, callback)

    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer, callback = run_of(folder / "best", 2, eval_strategy="epoch", **best)  # the worst: an early one
    trainer.train()
    keep("best", trainer, callback)
    found["losses"] = (trainer.state.best_metric, trainer.evaluate()["eval_loss"])

    shard_without_devices()
    sharding = {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "NO_WRAP"}}
    trainer, callback = run_of(folder / "sharded", 2, **sharding)
    trainer.train()
    keep("sharded", trainer, callback)
    net = classifier()
    resume_from_(net, folder / "sharded" / "checkpoint-6")
    trainer, callback = run_of(folder / "sharded", 2, net=net, **(sharding | {"save_strategy": "no"}))
    trainer.train(resume_from_checkpoint=str(folder / "sharded" / "checkpoint-6"))
    keep("sharded and gone on with", trainer, callback)
    return found


@pytest.mark.parametrize("much", [False, pytest.param(True, marks=pytest.mark.fuzz)])
def test_two_processes_train_as_one_does(much, tmp_path):
    from dynrank_fx.integrations.transformers import resume_from_

    first, second = in_processes(one_of_two, tmp_path, much, seconds=300)
    for name in first.keys() - {"losses"}:
        assert first[name][1] == second[name][1]
        for key, value in first[name][0].items():
            assert torch.equal(value, second[name][0][key]), f"{name}: {key} is another in the second process"
    whole, callback = run_of(tmp_path / "one", 1)
    whole.train()
    phases = [record.phase for record in callback.history]
    for name in first.keys() - {"again", "stream", "best", "losses"}:
        assert first[name][1] == phases
        assert_near(first[name][0], whole.model.state_dict())
    if not much:
        return
    assert first["again"][1] == phases
    stream, callback = run_of(tmp_path / "stream", 1, max_steps=10, every=2, save_strategy="no", rows=Stream())
    stream.train()
    assert first["stream"][1] == [record.phase for record in callback.history]
    assert_near(first["stream"][0], stream.model.state_dict())
    assert first["losses"] == second["losses"]
    assert first["losses"][0] == pytest.approx(first["losses"][1])

    folder = tmp_path / "whole" / "checkpoint-9"  # of two processes, and gone on with in one
    net = classifier()
    resume_from_(net, folder)
    trainer, _ = run_of(tmp_path / "whole", 1, net=net, save_strategy="no")
    trainer.train(resume_from_checkpoint=str(folder))
    assert_near(trainer.model.state_dict(), whole.model.state_dict())


@pytest.mark.fuzz
@pytest.mark.parametrize("starter", ["torchrun", "accelerate"])
def test_the_sample_runs_in_two_processes(starter):
    said = launched(starter, "with_transformers", "2", "128")
    assert said.count("parameters after truncation") == 1, "the first process says it"


@pytest.mark.parametrize(
    ("engine", "fsdp2", "sentence"),
    [
        ("DEEPSPEED", False, "phases do not go with DeepSpeed, which .* train by DDP, which accelerate launch"),
        ("FSDP", False, r"the first version of FSDP, which .* ask for fsdp_version: 2"),
        ("MEGATRON_LM", False, "phases do not go with Megatron-LM"),
    ],
)
def test_other_engines_are_refused_before_training(engine, fsdp2, sentence, tmp_path, monkeypatch):
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    trainer, callback = hugging_face(tmp_path, classifier())
    monkeypatch.setattr(AcceleratorState, "is_fsdp2", fsdp2)
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType[engine])
    with pytest.raises(dr.TransitionError, match=sentence):
        callback.on_train_begin(trainer.args, trainer.state, None, **made_parts(trainer))


def test_several_devices_in_one_process_are_refused(tmp_path):
    trainer, callback = hugging_face(tmp_path, classifier())
    trainer.args._n_gpu = 2
    with pytest.raises(dr.TransitionError, match=r"on 2 devices by DataParallel.*start a process for each device"):
        callback.on_train_begin(trainer.args, trainer.state, None, **made_parts(trainer))
