"""A resumed run ends bitwise equal to the run that was never stopped, wherever it was stopped and however."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset

import dynrank_fx as dr
from dynrank_fx.randomness import generators_of, random_state, seed_all
from dynrank_fx.schedules import EpochRecord, Schedule, Setting
from dynrank_fx.training import CHECKPOINT, Run, Settings, Task, fit, read_run, restore_run_, save_run
from dynrank_fx.training.lines import records_in
from dynrank_fx.training.state_tree import flatten

FULL, LOW = dr.Phase.FULL, dr.Phase.LOW
EPOCHS, STEPS = 4, 3  # an epoch is two batches of 8 and a ragged one of 5


class Digits(nn.Module):
    """A convolution with batch norm, dropout, a shared linear and a bare weight, on [batch, 3, 5, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.Dropout(0.3)
        self.inner, self.again = nn.Linear(12, 12), nn.Linear(12, 12)
        self.again.weight = self.inner.weight
        self.w = nn.Parameter(torch.randn(9, 12) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(torch.relu(self.norm(self.conv(x)))).mean((2, 3))
        return F.linear(self.again(torch.relu(self.inner(x))), self.w)


class Vectors(nn.Module):
    """Fewer operations, to compile: [batch, 75] in."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop, self.last = (
            nn.Linear(75, 16),
            nn.BatchNorm1d(16),
            nn.Dropout(0.3),
            nn.Linear(16, 9),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(torch.tanh(self.norm(self.first(x.flatten(1))))))


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Every example is another one each time: all three generators are drawn from."""

    def __len__(self) -> int:
        return 21

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = torch.sin(torch.arange(75.0) * (index + 1)).view(3, 5, 5)
        x = x * random.uniform(0.5, 1.5) + float(np.random.randn()) * 0.1 + torch.randn(3, 5, 5) * 0.1
        return x, torch.tensor(index % 9)


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(Noisy(), 8, shuffle=True, **options)


def mixed(state: dr.TrainState) -> Setting:
    """A schedule of the user's own, with sites apart."""
    return {"*": FULL, "conv.weight": LOW} if state.epoch % 2 else {"*": LOW, "w": FULL}


def adaptors(state: dr.TrainState) -> Setting:
    return dr.Phase.ADAPTOR if state.epoch == 2 else LOW if state.epoch == 0 else FULL


NESTEROV = partial(SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)
MULTISTEP = partial(MultiStepLR, milestones=[1, 3], gamma=0.5)
LOW_FULL = dr.schedules.interleave(low=1, full=1)
EAGER = Settings(epochs=EPOCHS, compile=False, rewarm=4)


@dataclass(frozen=True)
class Recipe:
    """How a run is set up, the same each time."""

    optimizer: Callable[[Any], Optimizer] = NESTEROV
    lr_scheduler: Callable[[Optimizer], Any] = MULTISTEP
    schedule: Schedule = LOW_FULL
    model: Callable[[], nn.Module] = Digits
    data: Callable[[], Any] = loader
    settings: Settings = EAGER
    inputs: tuple[Tensor, ...] = (torch.zeros(2, 3, 5, 5),)
    conv_layout: type = dr.ChannelLayout

    def set_up(self) -> tuple[Run, Task]:
        seed_all(0)
        net = dr.transform(
            self.model(), self.inputs, rank=dr.Fixed(3), conv_layout=self.conv_layout, allow_unprofitable=True
        ).train()
        optimizer = self.optimizer(net.parameters())
        data = self.data()
        held_out = [(torch.linspace(0, 1, 5 * 75).view(5, 3, 5, 5), torch.arange(5))]
        task = Task(
            data,
            loss=lambda output, batch: F.cross_entropy(output, batch[1]),
            inputs=lambda batch: ((batch[0],), {}),
            eval_data=held_out,
            metric=lambda output, batch: (output.argmax(1) == batch[1]).float().mean(),
        )
        scheduler = self.lr_scheduler(optimizer)
        return Run(net, optimizer, self.schedule, scheduler, generators=generators_of(data)), task


RECIPES = {
    "sgd": Recipe(),
    "adamw": Recipe(partial(AdamW, lr=0.01, amsgrad=True), partial(CosineAnnealingLR, T_max=EPOCHS)),
    "mixed phases": Recipe(schedule=mixed),
}
OTHERS = {
    "plateau and groups": Recipe(
        lambda p: Adam([{"params": [t for t in p if t.ndim > 1], "lr": 0.02}], lr=0.01),
        partial(ReduceLROnPlateau, patience=0),
    ),
    "adaptors at the end": Recipe(schedule=adaptors),
    **{
        f"a soft landing, {layout.name}": Recipe(
            schedule=dr.schedules.warm_up(2),
            settings=Settings(epochs=EPOCHS, compile=False, landing=True),
            conv_layout=layout,
        )
        for layout in (dr.ChannelLayout, dr.TuckerLayout, dr.CPLayout)
    },
    **{
        f"moved and landed in turn, {layout.name}": Recipe(
            partial(AdamW, lr=0.01), settings=Settings(epochs=EPOCHS, compile=False, landing=True), conv_layout=layout
        )
        for layout in (dr.TuckerLayout, dr.CPLayout)
    },
    "channels last": Recipe(
        partial(AdamW, lr=0.01),
        partial(CosineAnnealingLR, T_max=EPOCHS),
        model=lambda: Digits().to(memory_format=torch.channels_last),
    ),
    "channels last, fused": Recipe(
        partial(AdamW, lr=0.01, fused=True),
        partial(CosineAnnealingLR, T_max=EPOCHS),
        model=lambda: Digits().to(memory_format=torch.channels_last),
    ),
    "channels last, fused, LOW only": Recipe(
        partial(AdamW, lr=0.01, fused=True),
        partial(CosineAnnealingLR, T_max=EPOCHS),
        dr.schedules.always(LOW),
        model=lambda: Digits().to(memory_format=torch.channels_last),
    ),
    "a generator of the data's own": Recipe(data=lambda: loader(generator=torch.Generator().manual_seed(3))),
    "float16, clipped, three batches a step": Recipe(
        settings=Settings(
            epochs=EPOCHS, compile=False, amp=torch.float16, accumulate=3, clip=1.0, landing=True, carry=dr.Carry.MOVE
        )
    ),
    "reset state, bf16": Recipe(
        settings=Settings(epochs=EPOCHS, compile=False, amp=torch.bfloat16, carry=dr.Carry.RESET)
    ),
}


@dataclass
class End:
    """All that a run ends with, as JSON and as bytes."""

    history: str
    tensors: dict[str, bytes]
    rest: str

    @classmethod
    def of(cls, run: Run) -> End:
        measured = ("seconds", "memory")  # of the machine, not of the run
        history = [{k: v for k, v in record.to_json().items() if not k.endswith(measured)} for record in run.history]
        state = {
            "net": run.net.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "lr_scheduler": run.lr_scheduler.state_dict(),
            "random": random_state(run.generators),
            "modes": [module.training for module in run.net.modules()],
        }
        tree, tensors = flatten(state, "end")
        data = {
            name: t.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() for name, t in tensors.items()
        }
        return cls(json.dumps(history), data, json.dumps(tree))

    def differences(self, other: End) -> list[str]:
        """Empty where both are the same bit by bit."""
        names = sorted(self.tensors.keys() | other.tensors.keys())
        found = [name for name in names if self.tensors.get(name) != other.tensors.get(name)]
        found += ["history"] if self.history != other.history else []
        return found + (["state"] if self.rest != other.rest else [])


def resumed(recipe: Recipe, folder: Path) -> Run:
    """As a new process would: everything is set up anew, with other random numbers in between."""
    run, task = recipe.set_up()
    seed_all(random.randrange(1000))
    restore_run_(run, *read_run(folder))
    assert fit(run, task, recipe.settings)
    return run


@dataclass
class Whole:
    """A run that was never stopped, and its checkpoint after every step, as a kill would have left it."""

    recipe: Recipe
    end: End
    checkpoints: dict[tuple[int, int], Path]


def whole(recipe: Recipe, folder: Path) -> Whole:
    run, task = recipe.set_up()
    checkpoints: dict[tuple[int, int], Path] = {}

    def save(run: Run) -> None:
        save_run(run, folder)
        checkpoints[run.epoch, run.step] = folder / f"{run.epoch}-{run.step}"
        checkpoints[run.epoch, run.step].mkdir()
        for name in (CHECKPOINT, "history.jsonl"):
            shutil.copy(folder / name, checkpoints[run.epoch, run.step])

    save(run)
    assert fit(run, task, replace(recipe.settings, checkpoint_steps=1), save=save)
    return Whole(recipe, End.of(run), checkpoints)


@pytest.fixture(scope="module", params=RECIPES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return whole(RECIPES[request.param], tmp_path_factory.mktemp("whole"))


MOMENTS = [(epoch, step) for epoch in range(EPOCHS) for step in range(STEPS + 1)] + [(EPOCHS, 0)]
STOPS = {
    "mid-epoch in LOW": 1,
    "before the ragged batch": 2,
    "after the ragged batch, exactly at an epoch's end": 3,
    "in FULL, during a re-warm": 4,
    "in FULL, at its end": 6,
    "in the second LOW": 8,
    "after the very last step": EPOCHS * STEPS,
}


@pytest.mark.parametrize("moment", MOMENTS, ids=str)
def test_a_killed_run_goes_on_from_its_last_checkpoint_bit_by_bit(case: Whole, moment: tuple[int, int]) -> None:
    assert set(case.checkpoints) == set(MOMENTS)
    run = resumed(case.recipe, case.checkpoints[moment])
    assert End.of(run).differences(case.end) == []


@pytest.mark.parametrize("moment", STOPS)
def test_a_stopped_run_goes_on_bit_by_bit(case: Whole, moment: str, tmp_path: Path) -> None:
    run, task = case.recipe.set_up()
    calls = iter(range(1, 100))
    done = fit(
        run,
        task,
        case.recipe.settings,
        save=lambda r: save_run(r, tmp_path),
        should_stop=lambda: next(calls) == STOPS[moment],
    )
    assert not done
    assert run.epoch * STEPS + run.step == STOPS[moment]
    assert End.of(resumed(case.recipe, tmp_path)).differences(case.end) == []


# The state that a switch moves is contiguous, and fused optimizers go through memory: mend optim.swap_parameters.
@pytest.mark.parametrize("name", OTHERS)
def test_other_optimizers_data_and_settings_go_on_bit_by_bit(name: str, tmp_path: Path) -> None:
    case = whole(OTHERS[name], tmp_path)
    moments = [(0, 1), (0, 3), (1, 0), (1, 2), (1, 3), (2, 0), (2, 1)]
    if case.recipe.settings.accumulate == 3:
        moments = [(0, 3), (1, 0), (1, 3), (2, 0)]  # between two steps alone
    for moment in moments:
        assert End.of(resumed(case.recipe, case.checkpoints[moment])).differences(case.end) == []


def test_a_run_stopped_again_and_again_ends_the_same(case: Whole, tmp_path: Path) -> None:
    save_run(case.recipe.set_up()[0], tmp_path)
    for _ in range(EPOCHS * STEPS + 1):
        run, task = case.recipe.set_up()
        restore_run_(run, *read_run(tmp_path))
        if fit(run, task, case.recipe.settings, save=lambda r: save_run(r, tmp_path), should_stop=lambda: True):
            break
    assert End.of(run).differences(case.end) == []


def test_compiled_runs_go_on_bit_by_bit_too(tmp_path: Path) -> None:
    """By inductor, fullgraph, with a graph of its own for the ragged batch."""
    recipe = Recipe(
        partial(AdamW, lr=0.01),
        partial(CosineAnnealingLR, T_max=2),
        model=Vectors,
        settings=Settings(epochs=2, rewarm=4),
    )
    torch._dynamo.reset()
    case = whole(recipe, tmp_path)
    for moment in ((0, 3), (1, 1)):
        torch._dynamo.reset()
        assert End.of(resumed(recipe, case.checkpoints[moment])).differences(case.end) == []


def test_the_history_file_can_be_read_beside_the_checkpoint(case: Whole, tmp_path: Path) -> None:
    run = resumed(case.recipe, case.checkpoints[1, 2])
    save_run(run, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    without = [replace(record, switch_spectra={}) for record in run.history]
    assert [EpochRecord.from_json(record) for record in records_in(lines)] == without != run.history
    assert len(lines) == EPOCHS


# What does not fit


def refusal(recipe: Recipe, folder: Path) -> str:
    run, _ = recipe.set_up()
    with pytest.raises(dr.DynrankError) as caught:
        restore_run_(run, *read_run(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def low(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stopped in LOW, by SGD with a MultiStepLR."""
    folder = tmp_path_factory.mktemp("low")
    run, task = Recipe().set_up()
    fit(run, task, Recipe().settings, save=lambda r: save_run(r, folder), should_stop=lambda: True)
    return folder


def own(state: dr.TrainState) -> dr.Phase:
    return LOW


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (
            Recipe(schedule=dr.schedules.interleave(low=2, full=1)),
            "trained with the schedule Interleave(low=1, full=1), not Interleave(low=2, full=1): resume with the same",
        ),
        (Recipe(schedule=own), "trained with the schedule Interleave(low=1, full=1), not <function own>: resume"),
        (Recipe(partial(AdamW, lr=0.1)), "trained with the optimizer SGD, not AdamW: resume with the same"),
        (
            Recipe(lr_scheduler=partial(CosineAnnealingLR, T_max=3)),
            "trained with the learning-rate scheduler MultiStepLR, not CosineAnnealingLR: resume",
        ),
        (
            Recipe(lr_scheduler=lambda optimizer: None),
            "trained with the learning-rate scheduler MultiStepLR, not none: ",
        ),
        (
            Recipe(lambda p: SGD([{"params": [t]} for t in p], lr=0.1, momentum=0.9)),
            "the checkpoint's optimizer is not the one that optimizer(parameters) makes now: ",
        ),
        (
            Recipe(data=lambda: loader(generator=torch.Generator())),
            "trained with the number of random generators in its data 0, not 1: resume",
        ),
        (Recipe(model=Vectors, inputs=(torch.zeros(2, 75),)), "conv.weight was saved as factors, but"),
    ],
    ids=["schedule", "own schedule", "optimizer", "scheduler", "no scheduler", "groups", "generator", "model"],
)
def test_a_resume_with_something_else_is_told(low: Path, other: Recipe, expected: str) -> None:
    assert expected in refusal(other, low)


def test_a_resume_with_other_shapes_is_told(low: Path) -> None:
    class Wider(Digits):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(10, 12))

    assert refusal(Recipe(model=Wider), low).endswith("has: it is of another plan")


def test_data_that_has_become_shorter_is_told(case: Whole) -> None:
    run, task = case.recipe.set_up()
    restore_run_(run, *read_run(case.checkpoints[0, 3]))
    short: Sequence[Any] = list(task.train_data)[:1]
    with pytest.raises(
        dr.DynrankError, match=r"^train_data\(\) gives fewer than the 3 batches of the epoch that were "
    ):
        fit(run, replace(task, train_data=short), case.recipe.settings)


def test_a_folder_that_is_no_run_and_a_damaged_run_are_told(case: Whole, tmp_path: Path) -> None:
    with pytest.raises(dr.StoreError, match=r"^there is no folder .*gone: give a run of `dynrank-fx train`$"):
        read_run(tmp_path / "gone")
    with pytest.raises(dr.StoreError, match=r"has no checkpoint.safetensors: it is not a run of `dynrank-fx train`"):
        read_run(tmp_path)
    data = bytearray((case.checkpoints[1, 0] / CHECKPOINT).read_bytes())
    data[-1] ^= 4
    (tmp_path / CHECKPOINT).write_bytes(data)
    with pytest.raises(dr.StoreError, match="is damaged"):
        read_run(tmp_path)


def test_state_that_json_cannot_hold_is_named_and_the_last_checkpoint_stays(case: Whole, tmp_path: Path) -> None:
    run, _ = case.recipe.set_up()
    save_run(run, tmp_path)
    before = (tmp_path / CHECKPOINT).read_bytes()
    run.optimizer.param_groups[0]["hook"] = print
    with pytest.raises(
        dr.StoreError, match=r"^run\.optimizer\.param_groups\.0\.hook is a builtin_function_or_method, "
    ):
        save_run(run, tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == before
