"""Two processes train as one does with batches twice as large, and each goes on with what the other has left."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from several import in_processes
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dynrank_fx as dr
from dynrank_fx.processes import started, whole
from dynrank_fx.randomness import seed_all
from dynrank_fx.training import Decay, Run, Settings, Steps, Task, fit, read_run, restore_run_, save_run, shard_

SETTINGS = Settings(
    epochs=4, compile=False, accumulate=2, clip=1.0, decay=Decay.PRODUCT, factor_steps=Steps.PRODUCT, landing=True
)
STEPS = 6  # batches of an epoch, each of 16 samples in all
_drawn = torch.Generator().manual_seed(5)
X = torch.randn(16 * STEPS, 24, generator=_drawn)
Y = torch.tanh(X @ torch.randn(24, 8, generator=_drawn))


class Normed(nn.Module):
    """With a buffer that DDP brings from the first process, and a layer that draws."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Dropout(dropout), nn.Linear(32, 8))
        self.register_buffer("shift", torch.zeros(8))
        with torch.no_grad():  # factors of which a step takes the size into account
            self.layers[0].weight.mul_(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + self.shift


def set_up(dropout: float = 0.0, **task: Any) -> tuple[Run, Task]:
    """The same net in every process, which then draws its own numbers; together they take 16 samples a batch."""
    seed_all(1)
    net = dr.transform(Normed(dropout), (X[:2],), rank=dr.Fixed(4), leave=())
    if started().rank > 0:
        seed_all(1 + started().rank)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.05)
    lr_scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.8)
    run = Run(net, optimizer, dr.schedules.interleave(low=1, full=1), lr_scheduler)
    given: dict[str, Any] = {
        "train_data": DataLoader(TensorDataset(X, Y), 16 // started().count, shuffle=True),
        "loss": lambda output, batch: F.mse_loss(output, batch[1]),
        "inputs": lambda batch: ((batch[0],), {}),
        "eval_data": DataLoader(TensorDataset(X[:33], Y[:33]), 8),
        "metric": lambda output, batch: (output.sign() == batch[1].sign()).float().mean(),
    }
    return run, Task(**given | task)


def train(
    folder: Path, *, stop: int = 0, by: int = 0, resume: bool = False, parts: bool = False, **given: Any
) -> dict[str, Any]:
    """Into a folder, which is left after so many calls, as one of the processes is told to stop. parts: whether each
    process holds a part of every parameter.
    """
    run, task = set_up(**given)
    if resume:
        tensors, info = started().from_one(0, lambda: read_run(folder), dr.StoreError, "reading")
        restore_run_(run, tensors, info)
    if parts:
        shard_(run.net, run.optimizer, "cpu")
    calls = 0

    def should_stop() -> int:
        nonlocal calls
        calls += 1
        return int(calls == stop and started().rank == by)

    if started().first:
        folder.mkdir(exist_ok=True)
    finished = fit(run, task, SETTINGS, save=lambda r: save_run(r, folder), should_stop=should_stop)
    figures = [[each.loss, each.metric, each.eval_loss, each.eval_metric, each.steps] for each in run.history]
    figures.append([run.history[-1].truncated.get(key) for key in ("eval_loss", "eval_metric")] if finished else [])
    weights = {name: whole(value.detach()).clone() for name, value in run.net.state_dict().items()}
    return {"finished": finished, "place": (run.epoch, run.step), "figures": figures, "weights": weights}


def refused(work: Callable[[], object]) -> str:
    try:
        work()
    except dr.DynrankError as error:
        return str(error)
    return "no error"


def _in_two(rank: int, folder: Path) -> dict[str, Any]:
    done: dict[str, Any] = {"whole": train(folder / "two")}
    done["stopped"] = train(folder / "stopped", stop=5, by=1)
    done["left in parts"] = train(folder / "left in parts", stop=5, parts=True)
    for name, source, parts in (
        ("again", "stopped", False),
        ("after one", "alone", False),
        ("in parts", "stopped", True),
        ("after parts", "left in parts", False),
    ):
        if rank == 0:
            shutil.copytree(folder / source, folder / name)
        done[name] = train(folder / name, resume=True, parts=parts)
    # With data and random numbers of its own in each process, a resumed run is the same bit by bit.
    mine: dict[str, Any] = {"dropout": 0.3, "sharded": True}
    mine["train_data"] = DataLoader(TensorDataset(X[rank::2], Y[rank::2]), 8, shuffle=True)
    done["drawn"] = train(folder / "drawn", **mine)["weights"]
    train(folder / "drawn again", stop=4, **mine)
    done["drawn again"] = train(folder / "drawn again", resume=True, **mine)["weights"]
    own = [*zip(X[rank::2].split(8), Y[rank::2].split(8), strict=True)]
    done["own"] = train(folder / "own", train_data=own[: 6 - rank], sharded=True)
    done["few"] = refused(lambda: fit(*set_up(train_data=[(X[:8], Y[:8])]), SETTINGS))
    done["none"] = refused(lambda: fit(*set_up(train_data=[(X[:8], Y[:8])] * rank, sharded=True), SETTINGS))
    bad = lambda output, batch: F.mse_loss(output, batch[1]) * (float("nan") if rank else 1.0)  # noqa: E731
    done["diverged"] = refused(lambda: fit(*set_up(loss=bad), replace(SETTINGS, clip=None)))

    run, task = set_up()
    run.net.register_parameter("idle", nn.Parameter(torch.zeros(3)))
    done["idle"] = refused(lambda: fit(run, task, SETTINGS))
    run, task = set_up()
    with torch.no_grad():
        run.net.get_parameter("layers.0.bias").add_(rank)
    done["unlike"] = refused(lambda: fit(run, task, SETTINGS))
    return done


def near(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.allclose(one[name], other[name], rtol=1e-5, atol=1e-6) for name in one)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(one[name].equal(other[name]) for name in one)


def test_two_train_as_one(tmp_path: Path) -> None:
    alone = train(tmp_path / "one")
    half = train(tmp_path / "alone", stop=5)
    assert (half["finished"], half["place"]) == (False, (1, 4))
    first, second = in_processes(_in_two, tmp_path)
    for done in (first, second):
        assert done["whole"]["finished"]
        assert near(done["whole"]["weights"], alone["weights"])
        torch.testing.assert_close(done["whole"]["figures"], alone["figures"], rtol=1e-5, atol=1e-6)
        assert (done["stopped"]["finished"], done["stopped"]["place"]) == (False, (1, 4))
        assert same(done["again"]["weights"], done["whole"]["weights"])
        assert done["again"]["figures"] == done["whole"]["figures"]
        assert (done["left in parts"]["finished"], done["left in parts"]["place"]) == (False, (1, 4))
        for name in ("after one", "in parts", "after parts"):
            assert near(done[name]["weights"], alone["weights"]), name
            torch.testing.assert_close(done[name]["figures"], alone["figures"], rtol=1e-5, atol=1e-6)
        assert same(done["drawn"], done["drawn again"])
        assert done["own"]["figures"][0][-1] == 5  # the second has five batches only
        assert done["few"].startswith("train_data() has fewer batches (1) than there are processes")
        assert done["none"].startswith("train_data() gave no batch in epoch 1 for process 0 of 2: ")
        assert done["diverged"].startswith("the training diverged in epoch 1, where ")
        assert "layers.0.bias" in done["unlike"]
        assert done["idle"].startswith("idle takes no part in the loss, and several processes wait for its gradient: ")
    assert same(first["whole"]["weights"], second["whole"]["weights"])
    for left in ("stopped", "left in parts"):
        taken_up = train(tmp_path / left, resume=True)
        assert near(taken_up["weights"], alone["weights"])
        torch.testing.assert_close(taken_up["figures"], alone["figures"], rtol=1e-5, atol=1e-6)
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("one", "two")]
    assert files[0] == files[1] == ["checkpoint.safetensors", "history.jsonl"]
