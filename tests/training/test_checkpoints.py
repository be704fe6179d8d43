"""Checkpoints of a loop of one's own: training goes on from them as if it had not been stopped, by any processes."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adafactor, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

import dynrank_fx as dr
from dynrank_fx import files
from dynrank_fx.training import Run, Settings, Task, fit, save_run
from tests.several import in_processes, until_one_ends

FULL, LOW, ADAPTOR = dr.Phase.FULL, dr.Phase.LOW, dr.Phase.ADAPTOR
X = torch.randn(64, 12, generator=torch.Generator().manual_seed(1))
Y = X.roll(3, 1)[:, :8].contiguous()
STEPS = 16
Wrap = Callable[[nn.Module], nn.Module]


class Small(nn.Module):
    """Three weights, one of two layers; biases; and where it is to be noisy, a norm with buffers, and dropout."""

    def __init__(self, noisy: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 16), nn.Linear(16, 8)
        self.inner, self.again = nn.Linear(16, 16), nn.Linear(16, 16)
        self.again.weight = self.inner.weight
        self.norm = nn.Sequential(nn.BatchNorm1d(16), nn.Dropout(0.2)) if noisy else nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.tanh(self.first(x)))
        return self.last(torch.tanh(self.again(torch.tanh(self.inner(x)))))


def made(noisy: bool = False, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return dr.transform(Small(noisy), (X[:4],), **{"rank": dr.Fixed(3), "exclude": ["last"]} | options)


class Training:
    """A loop of one's own with all that it goes on from, in process ``rank`` of ``count``: each has its share of every
    batch, so that any number of them computes the same.
    """

    def __init__(
        self,
        rank: int = 0,
        count: int = 1,
        wrap: Wrap = lambda net: net,
        kind: type[Optimizer] = AdamW,
        whole: bool = False,
    ) -> None:
        """whole: with all that a run can have, dropout and averages of batches too."""
        self.rank, self.count = rank, count
        self.net = wrap(made(whole))
        biases = [p for name, p in self.net.named_parameters() if name.endswith("bias")]
        others = [p for name, p in self.net.named_parameters() if not name.endswith("bias")]
        self.optimizer = kind([{"params": others, "weight_decay": 0.1}, {"params": biases}], lr=0.01)  # type: ignore[call-arg]
        self.rates = CosineAnnealingLR(self.optimizer, STEPS)
        schedule = dr.schedules.interleave(low=1, full=1)
        self.phases = dr.Phases(
            self.net,
            self.optimizer,
            schedule,
            lr_scheduler=self.rates,
            steps=STEPS,
            every=4,
            landing=whole,
            rewarm=3,
            spectra=whole,
        )
        torch.manual_seed(100 + rank)

    def train(self, steps: range) -> list[float]:
        losses, share = [], 16 // self.count
        for step in steps:
            start = step % 4 * 16 + self.rank * share
            self.optimizer.zero_grad()
            loss = nn.functional.mse_loss(self.net(X[start : start + share]), Y[start : start + share])
            loss.backward()
            self.optimizer.step()
            self.rates.step()
            losses.append(loss.item())
        return losses

    def save(self, folder: Path, **extra: Any) -> None:
        dr.save_checkpoint(folder, self.net, phases=self.phases, extra=extra)

    def load(self, folder: Path) -> dict[str, Any]:
        return dr.load_checkpoint_(folder, self.net, phases=self.phases).extra

    def state(self) -> dict[str, Tensor]:
        """All tensors, whole: of the net, and what the optimizer holds of each."""
        net = getattr(self.net, "module", self.net)
        moments = {
            f"{name} {key}": value
            for name, p in net.named_parameters()
            for key, value in self.optimizer.state[p].items()
            if isinstance(value, Tensor)
        }
        return {name: whole(each).clone() for name, each in {**net.state_dict(), **moments}.items()}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, torch.distributed.tensor.DTensor) else tensor


def unequal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], most: float = 0.0) -> list[str]:
    """The names of what is not the same, or differs by more than this."""
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not float((ours[name].double() - theirs[name].double()).abs().max()) <= most]


@pytest.mark.parametrize("stop", [0, 3, 4, 9, 13])
def test_training_goes_on_bit_by_bit_wherever_it_stopped(stop: int, tmp_path: Path) -> None:
    expected, first, again = (Training(whole=True) for _ in range(3))
    losses = expected.train(range(STEPS))
    torch.manual_seed(100)
    before = first.train(range(stop))
    first.save(tmp_path / "saved", step=stop, mine=torch.arange(3))
    again.train(range(2))  # it has gone elsewhere
    extra = again.load(tmp_path / "saved")
    assert (extra["step"], extra["mine"].tolist()) == (stop, [0, 1, 2])
    assert dr.phases_of(again.net) == dr.phases_of(first.net)
    assert before + again.train(range(stop, STEPS)) == losses
    assert unequal(again.state(), expected.state()) == []


def ddp(net: nn.Module) -> nn.Module:
    return DistributedDataParallel(net)


def sharded(net: nn.Module) -> nn.Module:
    """By FSDP2: one site alone, the others with all the rest."""
    fully_shard(net.first)  # type: ignore[arg-type]
    fully_shard(net)
    return net


def across(rank: int, folder: Path, count: int) -> dict[str, Any]:
    found = {}
    told = Training(rank, count, ddp)  # a checkpoint of one process
    told.load(folder / "one")
    told.train(range(7, 9))
    found["from one"] = told.state()

    told.save(folder / "several", step=9)
    told.train(range(9, 11))
    found["two more"] = told.state()

    into = Training(rank, count, sharded)  # of DDP into FSDP2, and back
    into.load(folder / "several")
    into.train(range(9, 11))
    found["sharded"] = into.state()
    into.save(folder / "sharded", step=11)
    into.train(range(11, 13))
    told.load(folder / "sharded")
    told.train(range(11, 13))
    found["back"] = unequal(told.state(), into.state(), 1e-6)
    again = Training(rank, count, sharded)
    again.load(folder / "sharded")
    again.train(range(11, 13))
    found["sharded again"] = unequal(again.state(), into.state())
    found["later"] = into.state()

    first = Training(rank, count, ddp, whole=True)
    first.train(range(6))
    first.save(folder / "whole")
    first.train(range(6, 10))
    again = Training(rank, count, ddp, whole=True)
    again.load(folder / "whole")
    again.train(range(6, 10))
    found["again"] = unequal(again.state(), first.state())

    found["refusals"] = []
    file = folder / "whole" / f"__{count - 1}_0.distcp"
    before = again.state()
    if rank == 0:
        broken(file)
    with pytest.raises(dr.StoreError) as caught:
        again.load(folder / "whole")
    found["refusals"].append(str(caught.value))
    found["untouched"] = unequal(again.state(), before)
    with pytest.raises(dr.StoreError) as caught:  # something in one process cannot be kept
        again.save(folder / "several", mine=object() if rank == 0 else 3)
    found["refusals"].append(str(caught.value))
    return found


def broken(file: Path) -> None:
    """One bit of the file is another, in the middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.fuzz)])
def test_any_number_of_processes_goes_on(tmp_path: Path, count: int) -> None:
    one = Training()
    one.train(range(7))
    one.save(tmp_path / "one", step=7)
    one.train(range(7, 9))
    results = in_processes(across, tmp_path, count, count=count)
    assert unequal(results[0]["from one"], one.state(), 1e-6) == []
    again = Training()
    assert again.load(tmp_path / "several") == {"step": 9}
    again.train(range(9, 11))
    later = Training()
    assert later.load(tmp_path / "sharded") == {"step": 11}
    later.train(range(11, 13))
    for found in results:
        assert unequal(found["sharded"], found["two more"], 1e-6) == []
        assert unequal(found["later"], later.state(), 1e-6) == []
        assert (found["back"], found["sharded again"]) == ([], [])
        assert unequal(found["from one"], results[0]["from one"]) == []
        assert unequal(again.state(), found["two more"], 1e-6) == []
        assert found["again"] == []
        assert found["untouched"] == []
        damaged, kept = found["refusals"]
        assert f"__{count - 1}_0.distcp is damaged, or of another checkpoint" in damaged
        assert "mine is a object" in kept
    assert not list(tmp_path.glob(".*"))


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(dr.DynrankError) as caught:
        action()
    return str(caught.value)


def test_what_is_of_something_else_is_said_by_the_first_name_and_nothing_changes(tmp_path: Path) -> None:
    first = Training()
    first.train(range(5))
    folder = tmp_path / "saved"
    first.save(folder)

    def of(net: nn.Module, kind: type[Optimizer] = AdamW, split: bool = True, rates: bool = True) -> str:
        named = list(net.named_parameters())
        halves = [[p for n, p in named if n.endswith("bias") is bias] for bias in (False, True)]
        groups = [{"params": half} for half in halves] if split else [{"params": [p for _, p in named]}]
        optimizer = kind(groups, lr=0.5)  # type: ignore[call-arg]
        scheduler = CosineAnnealingLR(optimizer, 3) if rates else None
        before = {name: each.clone() for name, each in net.state_dict().items()}
        said = refusal(lambda: dr.load_checkpoint_(folder, net, optimizer, lr_scheduler=scheduler))
        assert all(torch.equal(each, before[name]) for name, each in net.state_dict().items())
        assert optimizer.param_groups[0]["lr"] == 0.5
        return said

    wider = dr.transform(nn.Sequential(nn.Linear(12, 20)), (X[:4],), rank=dr.Fixed(2))
    assert of(wider).startswith("first.weight is a site of the checkpoint, and none of the net: transform")
    assert of(made(exclude=["inner", "last"])).startswith(
        "inner.weight is a site of the checkpoint, and none of the net"
    )
    assert of(made(noisy=True)).startswith("norm.weight is of the shape (16,) in the checkpoint, and not there now")
    assert of(made(), SGD) == "the checkpoint was trained with the optimizer AdamW, not SGD: make the same one"
    assert of(made(), split=False).startswith(
        "first.bias was in number 1 of the optimizer's groups, and is in number 0"
    )
    assert of(made(), rates=False).startswith("the checkpoint has the state of 1 learning-rate schedulers, and 0 were")
    other = AdamW([nn.Parameter(torch.ones(3))])
    assert "a parameter of the shape (3,) that is none of the net's" in refusal(
        lambda: dr.load_checkpoint_(folder, made(), other)
    )
    assert refusal(lambda: dr.load_checkpoint_(folder, made(), phases=first.phases)).startswith(
        "the Phases are of anoth"
    )
    assert "no plan" in refusal(lambda: dr.save_checkpoint(folder, nn.Linear(2, 2)))
    (folder / "mine.txt").write_text("work")
    assert "holds mine.txt, which is not ours" in refusal(lambda: first.save(folder))
    assert refusal(lambda: dr.load_checkpoint_(tmp_path / "none", made())).startswith("there is no folder")
    assert "has no dynrank.safetensors: it is neither" in refusal(lambda: dr.load_checkpoint_(tmp_path, made()))


def test_every_file_is_of_this_checkpoint_and_as_it_was_written(tmp_path: Path) -> None:
    training = Training()
    for name in ("one", "other"):
        training.train(range(2))
        training.save(tmp_path / name)
    before = training.state()
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == [".metadata", "__0_0.distcp", "dynrank.safetensors"]
    for name in names:
        file = tmp_path / "one" / name
        data = file.read_bytes()
        broken(file)
        assert "damaged" in refusal(lambda: training.load(tmp_path / "one"))
        file.write_bytes((tmp_path / "other" / name).read_bytes())
        assert "of another checkpoint" in refusal(lambda: training.load(tmp_path / "one"))
        file.unlink()
        said = refusal(lambda: training.load(tmp_path / "one"))
        assert f"{name} is missing" in said or "has no dynrank.safetensors" in said
        file.write_bytes(data)
    assert unequal(training.state(), before) == []
    training.load(tmp_path / "one")


def test_a_net_alone_and_phases_that_are_made_afterwards(tmp_path: Path) -> None:
    first = Training()
    first.train(range(6))
    first.save(tmp_path / "saved")
    net = made()
    loaded = dr.load_checkpoint_(tmp_path / "saved", net)
    assert dr.phases_of(net) == dr.phases_of(first.net)
    assert all(torch.equal(each, net.state_dict()[name]) for name, each in first.net.state_dict().items())
    optimizer = SGD(net.parameters(), lr=0.1)
    phases = dr.Phases(net, optimizer, dr.schedules.always(LOW), steps=STEPS, every=4, resume=loaded.phases)
    assert phases.step == 6
    dr.save_checkpoint(tmp_path / "alone", net)
    assert "written without an optimizer" in refusal(lambda: dr.load_checkpoint_(tmp_path / "alone", net, optimizer))
    assert "written without phases" in refusal(lambda: dr.load_checkpoint_(tmp_path / "alone", net, phases=phases))


def test_a_net_that_has_diverged_goes_back_to_its_checkpoint(tmp_path: Path) -> None:
    training = Training()
    training.train(range(3))
    training.save(tmp_path / "saved")
    training.train(range(3, 6))
    expected = training.state()
    with torch.no_grad():
        for p in training.net.parameters():
            p.fill_(torch.nan)
    training.load(tmp_path / "saved")
    training.train(range(3, 6))
    assert unequal(training.state(), expected) == []


@pytest.mark.parametrize("kind", [SGD, Adafactor])
def test_other_optimizers_and_adaptors_and_averages(kind: type[Optimizer], tmp_path: Path) -> None:
    def begin() -> tuple[nn.Module, nn.Module, dr.Phases]:
        net = made()
        average = torch.optim.swa_utils.AveragedModel(net)
        more = {"momentum": 0.9} if kind is SGD else {}
        optimizer = kind(net.parameters(), lr=0.05, **more)  # type: ignore[call-arg]
        schedule = lambda state: {"first": FULL, "inner": (LOW, ADAPTOR, FULL)[state.epoch % 3]}  # noqa: E731
        return net, average, dr.Phases(net, optimizer, schedule, steps=12, every=2, averages=average)

    def train(net: nn.Module, average: Any, phases: dr.Phases, steps: int) -> None:
        for _ in range(steps):
            phases.optimizer.zero_grad()
            nn.functional.mse_loss(net(X), Y).backward()
            phases.optimizer.step()
            average.update_parameters(net)

    for stop in (3, 5):
        net, average, phases = begin()
        train(net, average, phases, stop)
        dr.save_checkpoint(tmp_path / "saved", net, phases=phases)
        train(net, average, phases, 4)
        again, of_again, phases = begin()
        dr.load_checkpoint_(tmp_path / "saved", again, phases=phases)
        train(again, of_again, phases, 4)
        assert unequal(again.state_dict(), net.state_dict()) == []
        assert unequal(of_again.state_dict(), average.state_dict()) == []


def test_what_one_process_has_written_till_now_goes_on(tmp_path: Path) -> None:
    """A net of ``save``, and a run of the command: weights, phases, optimizer and schedule."""
    net = made()
    dr.enter_(net, {"first": LOW})
    dr.save(net, tmp_path / "net")
    again = made()
    optimizer = AdamW(again.parameters())
    loaded = dr.load_checkpoint_(tmp_path / "net", again, optimizer)
    assert (loaded.phases, loaded.extra) == (None, {})
    assert unequal(again.state_dict(), net.state_dict()) == []
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in again.parameters()}
    dr.Phases(again, optimizer, dr.schedules.always(FULL), steps=4)  # a run of its own, from its first step on
    assert set(dr.phases_of(again).values()) == {FULL}

    batches = list(zip(X.split(16), Y.split(16), strict=True))
    task = Task(
        batches, lambda output, batch: nn.functional.mse_loss(output, batch[1]), lambda batch: ((batch[0],), {})
    )
    net, schedule = made(), dr.schedules.interleave(low=1, full=1)
    run = Run(net, AdamW(net.parameters(), lr=0.01), schedule)

    def save(run: Run) -> None:
        if run.epoch == 3 and not (tmp_path / "run").exists():
            (tmp_path / "run").mkdir()
            save_run(run, tmp_path / "run")

    fit(run, task, Settings(epochs=6, compile=False, landing=True, rewarm=3), save=save)
    again = made()
    optimizer = AdamW(again.parameters(), lr=0.5)
    phases = dr.Phases(again, optimizer, schedule, 6, steps=4, landing=True, rewarm=3)
    loaded = dr.load_checkpoint_(tmp_path / "run", again, phases=phases)
    assert loaded.extra == {"epoch": 3, "step": 0}
    assert optimizer.param_groups[0]["lr"] == 0.01
    for epoch in range(3, 6):
        if phases.is_due(epoch):
            phases.begin(epoch)
        for x, y in batches:
            optimizer.zero_grad()
            nn.functional.mse_loss(again(x), y).backward()
            optimizer.step()
    assert unequal(again.state_dict(), net.state_dict(), 1e-6) == []
    assert [record.phase for record in phases.history] == [record.phase for record in run.history]


class Numbered:
    """A training of which every number says which save it belongs to."""

    def __init__(self, wrap: Wrap = lambda net: net) -> None:
        self.net = wrap(made())
        self.optimizer = AdamW(self.net.parameters(), lr=0.01)
        nn.functional.mse_loss(self.net(X), Y).backward()
        self.optimizer.step()

    @torch.no_grad()
    def save(self, folder: Path, number: int) -> None:
        for p in self.net.parameters():
            p.fill_(number)
            self.optimizer.state[p]["exp_avg"].fill_(number)
        dr.save_checkpoint(folder, self.net, self.optimizer, extra={"number": number})

    def load(self, folder: Path) -> int:
        """The number of the checkpoint, all of which is of one save."""
        number = dr.load_checkpoint_(folder, self.net, self.optimizer).extra["number"]
        numbers = [*self.net.parameters(), *(self.optimizer.state[p]["exp_avg"] for p in self.net.parameters())]
        assert {int(value) for each in numbers for value in whole(each.detach()).flatten()} == {number}
        return int(number)


def counted(then: Callable[[int], None]) -> None:
    """From now on this process tells at every call of the disk which it is."""
    calls = 0

    def watched(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            then(calls)
            return real(*args, **options)

        return call

    for name in ("rename", "replace", "fsync", "mkdir", "unlink"):
        setattr(os, name, watched(getattr(os, name)))
    files._exchanged = watched(files._exchanged)


def dies_at(number: int) -> Callable[[int], None]:
    return lambda calls: os._exit(9) if calls == number else None


@pytest.mark.filterwarnings("ignore:This process")  # a fork beside torch's threads, which it does not use
@pytest.mark.parametrize("stride", [4, pytest.param(1, marks=pytest.mark.fuzz)])
def test_a_kill_at_any_moment_leaves_the_last_or_the_next(tmp_path: Path, stride: int) -> None:
    training, folder = Numbered(), tmp_path / "saved"
    for number in itertools.count(1, stride):
        training.save(folder, 1)
        assert [path.name for path in tmp_path.iterdir()] == ["saved"]  # what was left over is gone
        child = os.fork()
        if child == 0:
            counted(dies_at(number))
            training.save(folder, 2)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert training.load(folder) in ((1, 2) if code else (2,))
        if code == 0:
            break
        assert code == 9
    assert number > 8


def one_dies(rank: int, folder: Path) -> None:
    training = Numbered(ddp)
    training.save(folder / "saved", 1)
    if rank == 1:
        counted(dies_at(1))
    try:
        training.save(folder / "saved", 2)
    except Exception as error:
        (folder / "said").write_text(str(error))


def test_a_kill_of_another_process_leaves_the_last(tmp_path: Path) -> None:
    codes = until_one_ends(one_dies, tmp_path, kill=lambda ids: None)
    assert codes[1] == 9
    assert (tmp_path / "said").exists()
    training = Numbered()
    assert training.load(tmp_path / "saved") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["said", "saved"]
    training.save(tmp_path / "saved", 3)
    assert training.load(tmp_path / "saved") == 3


def saves_on_and_on(rank: int, folder: Path) -> None:
    training = Numbered(ddp)
    number = training.load(folder / "saved") if (folder / "saved").exists() else 0
    (folder / f"begun{rank}").touch()
    while True:
        number += 1
        training.save(folder / "saved", number)


@pytest.mark.fuzz
@pytest.mark.parametrize("seed", range(30))
def test_kills_at_random_moments_while_two_processes_save(tmp_path: Path, seed: int) -> None:
    """Of one or of both; and again, by processes that go on from what is there."""
    chance = random.Random(seed)
    last, training = 0, Numbered()
    for _ in range(2):

        def kill(ids: list[int]) -> None:
            end = time.monotonic() + 60
            while len(list(tmp_path.glob("begun*"))) < 2:
                assert time.monotonic() < end
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 1))
            for each in chance.choice(([0], [1], [0, 1])):
                os.kill(ids[each], signal.SIGKILL)

        until_one_ends(saves_on_and_on, tmp_path, kill=kill)
        for file in tmp_path.glob("begun*"):
            file.unlink()
        if (tmp_path / "saved").exists() or last:
            number = training.load(tmp_path / "saved")
            assert number >= last
            last = number
    training.save(tmp_path / "saved", last + 1)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
