"""The callback for Lightning: the phases of a plain loop, state carried, and a checkpoint that goes on."""

from __future__ import annotations

import itertools
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import schemas  # noqa: F401 (torchvision, which Lightning imports, asks for its ops on a torch that has none)
import torch
from launched import launched
from plain_loop import SCHEDULE, InTurn, a_net, assert_near, assert_same, data, reference
from several import as_launched, in_processes
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader, DistributedSampler

import dynrank_fx as dr
from dynrank_fx.processes import whole as whole_of

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

    callback = PhasesCallback(more.pop("schedule", SCHEDULE), every=more.pop("every", None))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(max_epochs=epochs, callbacks=[callback], default_root_dir=folder, **quiet, **more), callback


def test_it_trains_as_a_plain_loop_does(tmp_path):
    trainer, callback = lightning(5, tmp_path, enable_checkpointing=False)
    module = lightning_module()
    trainer.fit(module, DataLoader(data(), 8))
    assert [record.phase for record in callback.history] == ["LOW", "FULL", "FULL", "LOW", "LOW"]
    assert_same(module.net, reference(5))


@pytest.mark.parametrize("kind", ["WeightAveraging", "EMAWeightAveraging", "StochasticWeightAveraging"])
def test_averages_that_lightning_keeps_come_along(kind, tmp_path):
    """The average of a training that goes through the phases is near the net, and is of its phases and ranks."""
    from pytorch_lightning import callbacks

    given = {"swa_lrs": 1e-2, "swa_epoch_start": 1} if kind == "StochasticWeightAveraging" else {}
    averaging = getattr(callbacks, kind)(**given)
    trainer, _ = lightning(5, tmp_path, enable_checkpointing=False)
    trainer.callbacks.append(averaging)
    module = lightning_module()
    averages = []

    class Watch(callbacks.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            held = averaging._average_model
            averages.append(held.module.net if hasattr(held, "module") else held.net)

    trainer.callbacks.append(Watch())
    trainer.fit(module, DataLoader(data(), 8))
    x = torch.stack([x for x, _ in data()])
    average = averages[-1].eval()
    assert dr.phases_of(average) == dr.phases_of(module.net)
    with torch.no_grad():
        gap = (average(x) - module.net.eval()(x)).norm() / module.net(x).norm()
    assert float(gap) < 0.5


def test_the_best_checkpoint_of_other_phases_comes_back_whole(tmp_path):
    """By ``validate(ckpt_path="best")`` and by ``load_from_checkpoint``, into a net in the phases of the last epoch."""
    from pytorch_lightning.callbacks import ModelCheckpoint

    class Scored(type(lightning_module())):
        def validation_step(self, batch: list[Tensor], index: int) -> None:
            self.log("loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

        def on_validation_end(self) -> None:
            scores.append(float(self.trainer.callback_metrics["loss"]))

    scores: list[float] = []
    more = {"num_sanity_val_steps": 0, "enable_checkpointing": False, "schedule": dr.schedules.warm_up(full=3)}
    trainer, callback = lightning(5, tmp_path, **more)
    trainer.callbacks.append(best := ModelCheckpoint(tmp_path, monitor="loss", mode="max"))
    module, rows = Scored(), DataLoader(data(), 8)
    trainer.fit(module, rows, rows)
    told, phases = max(scores), callback.history[scores.index(max(scores))].phases
    assert phases != dr.phases_of(module.net), "the worst is an early one"
    scores.clear()
    trainer.validate(module, rows, ckpt_path="best", weights_only=False)
    again = Scored.load_from_checkpoint(best.best_model_path, weights_only=False)
    assert scores == [told]
    assert dr.phases_of(module.net) == dr.phases_of(again.net) == phases
    assert_same(again.net, module.net)


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
    torch.save({"callbacks": {}, "hyper_parameters": Path("somewhere")}, tmp_path / "code.ckpt")
    with pytest.raises(dr.StoreError, match="only running code would read"):
        resume_from_(a_net(), tmp_path / "code.ckpt")
    for holds in ([3], {"callbacks": [3]}, {"callbacks": {"PhasesCallback": 3}}):
        torch.save(holds, tmp_path / "odd.ckpt")
        with pytest.raises(dr.DynrankError, match=r"is no checkpoint|has no state of|holds no history of phases"):
            resume_from_(a_net(), tmp_path / "odd.ckpt")
    bad = ((None, "there is no checkpoint"), (b"", "could not be read"), (b"junk" * 9, "could not be read"))
    for content, match in bad:
        if content is not None:
            (tmp_path / "bad.ckpt").write_bytes(content)
        with pytest.raises(dr.StoreError, match=match):
            resume_from_(a_net(), tmp_path / "bad.ckpt")


@pytest.mark.parametrize("length", [{"max_steps": 40}, {}], ids=["in steps", "in epochs"])
def test_several_optimizers_step_together(length, tmp_path):
    """Matrices and biases apart; Lightning counts the steps of both."""
    module = lightning_module()

    def step(batch: list[Tensor], index: int = 0) -> None:
        both = module.optimizers()
        for each in both:
            each.zero_grad()
        module.manual_backward(nn.functional.cross_entropy(module.net(batch[0]), batch[1]))
        for each in both:
            each.step()

    def configured() -> list[torch.optim.Optimizer]:
        split = [[p for p in module.net.parameters() if (p.ndim > 1) is matrices] for matrices in (True, False)]
        return [torch.optim.AdamW(split[0], lr=1e-2), torch.optim.SGD(split[1], lr=1e-1)]

    module.automatic_optimization, module.training_step, module.configure_optimizers = False, step, configured
    trainer, callback = lightning(-1 if length else 5, tmp_path, enable_checkpointing=False, **length)
    if length:
        callback.every = 4
    trainer.fit(module, Stream() if length else DataLoader(data(), 8))
    assert [record.phase for record in callback.history] == ["LOW", "FULL", "FULL", "LOW", "LOW"]
    assert max(callback.history[3].switch_error.values()) < 1e-5, "it landed before"


class Stream:
    """Batches without an end, and where they stand: what Lightning asks of a loader to go on within an epoch."""

    ahead = 1  # Lightning fetches what has no length one batch ahead
    batch = 8

    def __init__(self) -> None:
        self.given = 0

    def __iter__(self) -> Iterator[list[Tensor]]:
        batches = list(DataLoader(data(), self.batch))
        while True:
            self.given += 1
            yield batches[(self.given - 1) % len(batches)]

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given - self.ahead}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.given = state["given"]


def decaying(module: Any) -> Any:
    """The module with a scheduler of every step."""

    def configured() -> Any:
        optimizer = torch.optim.AdamW(module.net.parameters(), lr=1e-2, weight_decay=0.1)
        decay = torch.optim.lr_scheduler.StepLR(optimizer, 6, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}

    module.configure_optimizers = configured
    return module


def in_steps(steps: int, every: int, accumulated: int) -> nn.Module:
    """That training of a stream in a plain loop."""
    net = a_net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 6, 0.5)
    choices: Any = {"landing": True, "decay": dr.Decay.PRODUCT}
    dr.Phases(net, optimizer, SCHEDULE, lr_scheduler=scheduler, steps=steps, every=every, **choices)
    batches = iter(Stream())
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(accumulated):
            x, y = next(batches)
            (nn.functional.cross_entropy(net(x), y) / accumulated).backward()
        optimizer.step()
        scheduler.step()
    return net


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("stop", [3, 8, 14])
def test_a_stream_is_trained_on_in_steps_and_gone_on_with_between_two_of_them(stop, accumulated, tmp_path):
    """20 steps in 5 ticks, of which the schedule has the second and third FULL; 8 is where one begins."""
    from pytorch_lightning.callbacks import ModelCheckpoint

    from dynrank_fx.integrations.lightning import resume_from_

    given = {"max_steps": 20, "every": 4, "accumulate_grad_batches": accumulated}
    trainer, expected = lightning(-1, tmp_path, **given)
    trainer.callbacks.append(ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=stop, save_top_k=-1))
    whole = decaying(lightning_module())
    trainer.fit(whole, Stream())
    assert [(record.phase, record.step) for record in expected.history] == [
        ("LOW", 0),
        ("FULL", 4),
        ("FULL", 8),
        ("LOW", 12),
        ("LOW", 16),
    ]
    assert max(expected.history[3].switch_error.values()) < 1e-5, "it landed before"
    assert_same(whole.net, in_steps(20, 4, accumulated))

    again, file = decaying(lightning_module()), tmp_path / f"step={stop}.ckpt"
    resume_from_(again.net, file)
    trainer, callback = lightning(-1, tmp_path, enable_checkpointing=False, **given)
    trainer.fit(again, Stream(), ckpt_path=file, weights_only=False)
    assert len(callback.history) == 5
    assert all(map(torch.equal, again.net.state_dict().values(), whole.net.state_dict().values()))


@pytest.mark.parametrize("phases", [True, False], ids=["phases", "dense"])
@pytest.mark.parametrize("kind", ["no place", "its place", "and a length"])
def test_where_a_stream_goes_on_is_lightnings_and_the_loaders(kind, phases, tmp_path):
    """Also where nobody switches phases: a loader without a place begins again, and of one with a place but no length
    the batch is lost that Lightning had fetched ahead. With both it is exact.
    """
    from pytorch_lightning.callbacks import ModelCheckpoint

    from dynrank_fx.integrations.lightning import PhasesCallback, resume_from_

    class Counted(Stream):
        ahead = 0

        def __iter__(self) -> Iterator[list[Tensor]]:
            for x, y in super().__iter__():
                yield [x, y, torch.tensor(self.given)]

    class Long(Counted):
        def __len__(self) -> int:
            return 100

    def loader() -> Any:
        if kind == "no place":
            return DataLoader(list(itertools.islice(Counted(), 12)), batch_size=None)
        return Counted() if kind == "its place" else Long()

    def trained(checkpoint: Path | None) -> list[int]:
        module, seen = lightning_module(), list[int]()
        step = module.training_step

        def seeing(batch: list[Tensor], index: int = 0) -> Tensor:
            seen.append(int(batch[2]))
            return step(batch, index)

        module.training_step = seeing
        trainer, _ = lightning(-1, tmp_path, max_steps=12, every=4)
        if not phases:
            trainer.callbacks = [each for each in trainer.callbacks if not isinstance(each, PhasesCallback)]
        elif checkpoint is not None:
            resume_from_(module.net, checkpoint)
        trainer.callbacks.append(ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=7, save_top_k=-1))
        trainer.fit(module, loader(), ckpt_path=checkpoint, weights_only=False)
        return seen

    assert trained(None) == list(range(1, 13))
    first = {"no place": 1, "its place": 9, "and a length": 8}[kind]
    assert trained(tmp_path / "step=7.ckpt") == list(range(first, first + 5))


@pytest.mark.parametrize("length", [{}, {"max_steps": 6}])
def test_one_epoch_and_a_training_that_its_steps_end_are_divided_into_ticks(length, tmp_path):
    trainer, callback = lightning(1 if not length else 9, tmp_path, enable_checkpointing=False, **length)
    trainer.fit(lightning_module(), DataLoader(data(), 4))
    assert [record.step for record in callback.history] == [0, 1, 2, 3, 4, 5]
    assert [record.phase for record in callback.history] == ["LOW", "FULL", "FULL", "LOW", "LOW", "LOW"]


def test_steps_that_overflow_in_float16_count(tmp_path):
    from pytorch_lightning.plugins.precision import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, backoff_factor=2.0**-10)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    trainer, callback = lightning(-1, tmp_path, max_steps=20, every=4, enable_checkpointing=False, plugins=[plugin])
    trainer.fit(lightning_module(), Stream())
    assert scaler.get_scale() < 2.0**45, "it has overflowed"
    assert [(record.phase, record.step) for record in callback.history] == [
        ("LOW", 0),
        ("FULL", 4),
        ("FULL", 8),
        ("LOW", 12),
        ("LOW", 16),
    ]
    assert callback.phases.step == 20
    assert max(callback.history[3].switch_error.values()) < 1e-3, "it landed before"


@pytest.mark.parametrize("stop", [3, 6, 8])
def test_few_epochs_are_divided_and_gone_on_with(stop, tmp_path):
    """Two epochs of six steps, each of them a tick; the first of an epoch begins with it, after its validation."""
    from pytorch_lightning import Callback
    from pytorch_lightning.callbacks import ModelCheckpoint

    from dynrank_fx.integrations.lightning import resume_from_

    validated = []

    class Look(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            validated.append(len(callback.history))

    class Loader(Stream):
        ahead, batch = 0, 4

        def __len__(self) -> int:
            return 6

    trainer, callback = lightning(2, tmp_path, schedule=InTurn())
    trainer.callbacks += [ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=stop, save_top_k=-1), Look()]
    whole = lightning_module()
    trainer.fit(whole, Loader())
    assert [record.step for record in callback.history] == list(range(12))
    assert [record.phase for record in callback.history] == ["LOW", "LOW", "FULL", "FULL"] * 3
    assert validated == [6, 12]
    assert_same(whole.net, reference(2, InTurn(), batch=4))

    again, file = lightning_module(), tmp_path / f"step={stop}.ckpt"
    resume_from_(again.net, file)
    trainer, callback = lightning(2, tmp_path, schedule=InTurn(), enable_checkpointing=False)
    trainer.fit(again, Loader(), ckpt_path=file, weights_only=False)
    assert len(callback.history) == 12
    assert all(map(torch.equal, again.net.state_dict().values(), whole.net.state_dict().values()))


@pytest.mark.parametrize("stop", [6, 7, 9])
def test_an_epoch_that_a_checkpoint_has_begun_goes_on(stop, tmp_path):
    """After 7 of 15 steps, within the third epoch, with the landing before the cut under way; and after the last step
    of an epoch, where Lightning does not tell that the next one begins.
    """
    from pytorch_lightning.callbacks import ModelCheckpoint

    from dynrank_fx.integrations.lightning import resume_from_

    class Loader(Stream):
        ahead = 0

        def __len__(self) -> int:
            return 3

    trainer, _ = lightning(5, tmp_path)
    trainer.callbacks.append(ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=stop, save_top_k=-1))
    whole = lightning_module()
    trainer.fit(whole, Loader())
    again = lightning_module()
    resume_from_(again.net, tmp_path / f"step={stop}.ckpt")
    trainer, callback = lightning(5, tmp_path, enable_checkpointing=False)
    trainer.fit(again, Loader(), ckpt_path=tmp_path / f"step={stop}.ckpt", weights_only=False)
    assert [record.phase for record in callback.history] == ["LOW", "FULL", "FULL", "LOW", "LOW"]
    assert all(map(torch.equal, again.net.state_dict().values(), whole.net.state_dict().values()))


def test_it_fits_again_and_goes_on_where_lightning_does(tmp_path):
    """Lightning counts on from the first time, and makes other optimizers."""
    trainer, callback = lightning(3, tmp_path, enable_checkpointing=False)
    module = lightning_module()
    trainer.fit(module, DataLoader(data(), 8))
    spent = callback.history[-1].spent
    trainer.fit_loop.max_epochs = 5
    trainer.fit(module, DataLoader(data(), 8))
    assert [record.phase for record in callback.history] == ["LOW", "FULL", "FULL", "LOW", "LOW"]
    assert callback.history[-1].spent > spent
    assert callback.phases.step == trainer.global_step == 15
    other = lightning(2, tmp_path, enable_checkpointing=False)[0]
    other.callbacks = [callback]
    other.fit(module, DataLoader(data(), 8))
    assert [record.phase for record in callback.history] == ["LOW", "FULL"], "another Trainer begins anew"

    trainer, callback = lightning(-1, tmp_path, enable_checkpointing=False, max_steps=6, every=3)
    trainer.fit(module, DataLoader(data(), 8))
    trainer.fit_loop.epoch_loop.max_steps = 12
    trainer.fit(module, DataLoader(data(), 8))
    assert callback.phases.step == trainer.global_step == 12
    assert [record.step for record in callback.history] == [0, 3, 7, 9]


def test_a_scheduler_of_every_step_is_followed_and_the_compute_that_is_spent_is_logged(tmp_path):
    module = decaying(lightning_module())
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


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Of a training after two epochs."""
    trainer, _ = lightning(2, tmp_path, enable_checkpointing=False)
    trainer.fit(lightning_module(), DataLoader(data(), 8))
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    return tmp_path / "c.ckpt"


def test_a_flipped_bit_of_a_checkpoint_is_told(checkpoint):
    from dynrank_fx.integrations.lightning import resume_from_

    whole = checkpoint.read_bytes()
    weight = torch.load(checkpoint, weights_only=True)["state_dict"]["net.0.bias"].numpy().tobytes()
    for part in (b"PhasesCallback", b"history", weight):
        place = whole.index(part)
        checkpoint.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(dr.StoreError, match="is damaged"):
            resume_from_(a_net(), checkpoint)


def test_a_checkpoint_of_a_training_that_has_diverged_is_told(tmp_path):
    trainer, _ = lightning(1, tmp_path, enable_checkpointing=False)
    trainer.fit(lightning_module(), DataLoader(data(), 8))
    moments = next(iter(trainer.optimizers[0].state.values()))
    moments["exp_avg"].fill_(float("nan"))
    with pytest.warns(dr.DynrankWarning, match=r"the optimizer's exp_avg of \S+ is not finite, as in a training that"):
        trainer.save_checkpoint(tmp_path / "c.ckpt")


def test_the_sample_runs(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SAMPLES))
    monkeypatch.setattr(sys, "argv", ["with_lightning.py", "1"])
    runpy.run_path(str(SAMPLES / "with_lightning.py"), run_name="__main__")
    assert "held-out accuracy of the truncated model" in capsys.readouterr().out


# Several processes


def sharded() -> Any:
    """The module, whose net Lightning has in parts."""
    module = lightning_module()

    def configured(self: Any) -> None:
        if not isinstance(self.net, FSDPModule):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    type(module).configure_model = configured
    return module


def one_of_two(rank: int, folder: Path, much: bool) -> dict[str, Any]:
    """What is done by each of two processes: the results are compared where they come together. much: or only to train
    and to go on.
    """
    from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint
    from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy

    from dynrank_fx.integrations.lightning import resume_from_

    as_launched(rank)
    found: dict[str, Any] = {}

    def fit(name: str, module: Any, batch: int = 4, checkpoint: Path | None = None, **more: Any) -> Any:
        extra = more.pop("extra", [])
        given = {
            "devices": 2,
            "strategy": DDPStrategy(process_group_backend="gloo"),
            "enable_checkpointing": bool(extra),
        }
        trainer, callback = lightning(5, folder, **(given | more))
        trainer.callbacks += extra
        rows = DistributedSampler(data(), 2, rank, shuffle=False)
        trainer.fit(module, DataLoader(data(), batch, sampler=rows), ckpt_path=checkpoint, weights_only=False)
        state = {name: whole_of(value) for name, value in module.net.state_dict().items()}
        found[name] = (state, [record.phase for record in callback.history])
        assert callback.phases.step == 15
        return trainer

    module = lightning_module()
    trainer = fit("whole", module, extra=[ModelCheckpoint(folder, "{step}", every_n_train_steps=6, save_top_k=-1)])
    found["logged"] = float(trainer.callback_metrics["dynrank/spent"])
    again = lightning_module()
    resume_from_(again.net, folder / "step=6.ckpt")
    fit("gone on with", again, checkpoint=folder / "step=6.ckpt")
    if not much:
        return found
    fit("accumulated", lightning_module(), batch=2, accumulate_grad_batches=2)

    def in_parts() -> Any:
        return ModelParallelStrategy(2, 1, process_group_backend="gloo")

    saving = ModelCheckpoint(folder / "parts", "{step}", every_n_train_steps=6, save_top_k=-1)
    fit("sharded", sharded(), extra=[saving], strategy=in_parts())
    again, saved = sharded(), folder / "parts" / "step=6.ckpt"
    resume_from_(again.net, saved)
    fit("sharded and gone on with", again, checkpoint=saved, strategy=in_parts())
    fit("averaged", lightning_module(), extra=[EMAWeightAveraging(decay=0.5)])
    return found


@pytest.mark.parametrize("much", [False, pytest.param(True, marks=pytest.mark.fuzz)])
def test_two_processes_train_as_one_does(much, tmp_path):
    from pytorch_lightning.callbacks import EMAWeightAveraging

    first, second = in_processes(one_of_two, tmp_path, much, seconds=300)
    assert first.pop("logged") == second.pop("logged") > 0
    for name in first:
        assert first[name][1] == second[name][1]
        for key, value in first[name][0].items():
            assert torch.equal(value, second[name][0][key]), f"{name}: {key} is another in the second process"
    expected = reference(5).state_dict()
    for name in first.keys() - {"averaged"}:
        assert first[name][1] == ["LOW", "FULL", "FULL", "LOW", "LOW"]
        assert_near(first[name][0], expected)
    if not much:
        return
    trainer, _ = lightning(5, tmp_path, enable_checkpointing=False)
    trainer.callbacks.append(EMAWeightAveraging(decay=0.5))  # which leaves the average in the place of the weights
    module = lightning_module()
    trainer.fit(module, DataLoader(data(), 8))
    assert_near(first["averaged"][0], module.net.state_dict())


@pytest.mark.fuzz
def test_the_sample_runs_in_two_processes():
    said = launched(None, "with_lightning", "2", "2")
    assert said.count("held-out accuracy of the truncated model") == 1, "the first process says it"


@pytest.mark.parametrize("strategy", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_other_strategies_are_refused_before_training(strategy, tmp_path):
    _, callback = lightning(2, tmp_path, enable_checkpointing=False)
    sharded = SimpleNamespace(strategy=type(strategy, (), {})())
    with pytest.raises(
        dr.TransitionError, match=f'phases do not go with {strategy}, .* give the Trainer strategy="ddp"'
    ):
        callback.on_train_start(sharded, lightning_module())
