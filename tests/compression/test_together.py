"""Two processes that calibrate, cut, recover and compress together, each with a share of the batches.

The truth is one process that has all batches. Everything runs in one start of two processes.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from compressing import Pictured, SaidTimes, batches, error, perceptron, pictures
from several import in_processes
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.compression import deployed
from dynrank_fx.compression.model_times import ModelTimes
from dynrank_fx.compression.recover import distance
from dynrank_fx.timing import Pair

Made = dict[str, Any]


def tokens() -> nn.Module:
    """Three linears of one input that share a factor, and a weight that has two biases."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(12, 12, bias=False) for _ in range(3))
            self.out, self.again = nn.Linear(36, 20), nn.Linear(36, 20)
            self.again.weight = self.out.weight

        def forward(self, x: Tensor) -> Tensor:
            y = torch.cat([self.q(x), self.k(x), self.v(x)], -1).relu()
            return self.out(y) + self.again(2 * y - 1).tanh()

    torch.manual_seed(2)
    return Model().double()


def rows() -> list[tuple[Tensor]]:
    """Uneven batches, whose mean is not zero."""
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(12, 12, generator=generator).double() * torch.linspace(0.1, 2, 12).double()
    return [(torch.randn(n, 12, generator=generator).double() @ mixing + 1,) for n in (9, 4, 17, 30, 8)]


def pictured(count: int = 5) -> list[tuple[Tensor]]:
    return [(batch.double()[: 16 - 3 * number],) for number, (batch,) in enumerate(pictures(count))]


def pictured_net() -> nn.Module:
    torch.manual_seed(0)
    return dr.transform(Pictured().double(), pictured()[0], rank=dr.Fixed(2), allow_unprofitable=True)


def token_net() -> nn.Module:
    return dr.transform(tokens(), rows()[0], rank=dr.Fixed(4), share_inputs=True, allow_unprofitable=True)


def outputs(module: nn.Module, data: list[tuple[Tensor]]) -> Tensor:
    with torch.no_grad():
        return torch.cat([module(*batch) for batch in data])


def what_is_known(known: dr.Calibration) -> Made:
    return {
        name: (seen.matrix, seen.count, {key: (total, n) for key, (total, n) in seen.sums.items()})
        for name, seen in known.covariances.items()
    } | {"order": known.order, "plain": dict(known.plain)}


def recovered(share: Callable[[list[Any]], list[Any]], group: Any) -> Made:
    small = dr.truncate(pictured_net(), pictured())
    losses = dr.recover_(small, Pictured().double().eval(), share(pictured()), 6, group=group)
    return {"losses": losses, "state": dict(small.state_dict())}


def compressed(share: Callable[[list[Any]], list[Any]], group: Any, times: SaidTimes | None) -> Made:
    """By a metric that each process takes of its own data."""
    dense, said = perceptron(), []
    own = share(batches())

    def metric(net: nn.Module) -> tuple[float, float]:
        with torch.no_grad():
            lost = sum(float((net(*b) - dense(*b)).square().sum()) for b in own)
        return -lost / max(len(own), 1), len(own)

    budget = [dr.Budget(params=0.5), dr.MaxDrop(1e6)]
    settings: Made = {"metric": metric, "recover_steps": 3, "progress": said.append, "times": times, "group": group}
    found = dr.compress(perceptron(), batches()[0], budget, own, **settings)
    kept = found.cuts, found.params, found.flops, found.metrics, found.times
    return {"kept": kept, "said": said, "state": dict(found.module.state_dict()), "error": error(found.module, dense)}


def done(share: Callable[[list[Any]], list[Any]], group: Any, times: SaidTimes | None) -> Made:
    """Everything, by these parts of the batches."""
    made = cut(share, group)
    made["recovered"] = recovered(share, group)
    made["compressed"] = compressed(share, group, times)
    return made


def cut(share: Callable[[list[Any]], list[Any]], group: Any) -> Made:
    """What is known and what is cut, by these parts of the batches."""
    net, images = token_net(), pictured_net()
    if group is not None and dist.get_rank() == 1:  # as after a training: the statistics of the first count
        images.get_buffer("norm.running_mean").add_(1)
    made: Made = {"known": what_is_known(dr.calibrate(net, share(rows()), group=group))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made["plain"] = outputs(dr.truncate(net, group=group), rows())
    made["cut"] = outputs(dr.truncate(net, share(rows()), group=group), rows())
    made["in turn"] = outputs(dr.truncate(net, share(rows()), sequential=True, group=group), rows())
    made["in a budget"] = outputs(dr.truncate(net, share(rows()), rank=dr.Energy(0.9), group=group), rows())
    small = dr.truncate(images, share(pictured()), group=group)
    made["pictures"] = outputs(small, pictured())
    dense = dr.inline(images.eval())
    assert dr.recalibrate_(small, share(pictured()), like=dense, group=group) == 1
    made["norms"] = dict(small.state_dict())
    made["deployed"] = outputs(deployed(images, share(pictured()), group=group).module, pictured())
    return made


class FirstTimes(SaidTimes):
    """Times that only the first process is asked for."""

    def cost(self, rows: Any, total: float) -> Any:
        assert dist.get_rank() == 0
        return super().cost(rows, total)


def _said_once(rank: int) -> None:
    """The first process takes a second for the dense model and 0.9 for others; nobody is to measure in another."""

    def refused(*_: object) -> Any:
        raise AssertionError("the first measures")

    ModelTimes._of_dense = refused if rank else lambda self: (1.0, "")  # type: ignore[method-assign]
    ModelTimes._pair = refused if rank else lambda self, module: Pair(1.0, 0.9, 0.9)  # type: ignore[method-assign]


def _everything(rank: int, folder: Path) -> Made:
    _said_once(rank)
    times = FirstTimes({"2.weight": 0.6})
    times.cache = folder / f"{rank}.json"
    made = done(lambda data: data[rank::2], dist.group.WORLD, times)
    made["one has all"] = cut(lambda data: data if rank == 1 else [], dist.group.WORLD)
    made["one has all"]["recovered"] = recovered(lambda data: data if rank == 1 else [], dist.group.WORLD)
    made["refused"] = _refusals(rank)
    return made


def _refusals(rank: int) -> dict[str, str]:
    """What is said of mistakes; every call fails in both processes."""
    world, net, small = dist.group.WORLD, token_net(), dr.truncate(token_net(), rows())
    normed = dr.truncate(pictured_net(), pictured())
    other = copy.deepcopy(net)
    if rank == 1:
        with torch.no_grad():
            other.get_parameter("k.weight")[0, 0] += 1e-9
    wrong = [rows()[0], (torch.randn(3, 5).double(),)] if rank == 1 else rows()
    infinite = [(torch.full((3, 12), torch.inf).double(),)] if rank == 1 else rows()

    def failing(net: nn.Module) -> float:
        if rank == 1:
            raise ZeroDivisionError("no examples")
        return 1.0

    def compress(**given: Any) -> Any:
        return dr.compress(perceptron(), batches()[0], dr.Budget(params=0.5), batches(), group=world, **given)

    calls: dict[str, Callable[[], Any]] = {
        "another weight": lambda: dr.truncate(other, rows(), group=world),
        "no data": lambda: dr.truncate(net, [], group=world),
        "data in one alone": lambda: dr.truncate(net, [rows(), None][rank], group=world),
        "another argument": lambda: dr.calibrate(net, rows(), shrink=float(rank), group=world),
        "a batch that does not fit": lambda: dr.calibrate(net, wrong, group=world),
        "infinite data": lambda: dr.truncate(net, infinite, group=world),
        "no site": lambda: dr.calibrate(net, rows(), sites=[["q.weight", "nope"][rank]], group=world),
        "no recalibration": lambda: dr.recalibrate_(normed, [pictured(), rows()][rank], group=world),
        "no recovery": lambda: dr.recover_(small, tokens(), wrong, 3, group=world),
        "other steps": lambda: dr.recover_(small, tokens(), rows(), rank, group=world),
        "a metric that fails": lambda: compress(metric=failing),
        "a budget that is too small": lambda: dr.compress(
            perceptron(), batches()[0], dr.Budget(params=0.01), batches(), group=world
        ),
        "another budget": lambda: dr.compress(
            perceptron(), batches()[0], dr.Budget(params=0.5 + 0.1 * rank), batches(), group=world
        ),
    }
    before = [value.clone() for module in (small, normed) for value in module.state_dict().values()]
    said = {}
    for name, call in calls.items():
        try:
            call()
            said[name] = "nothing"
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    after = [value for module in (small, normed) for value in module.state_dict().values()]
    assert all(map(torch.equal, before, after))
    return said


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Made, Made, Path]:
    folder = tmp_path_factory.mktemp("times")
    first, second = in_processes(_everything, folder, seconds=300)
    return first, second, folder


def alike(one: Any, other: Any, relative: float) -> None:
    """Tensors and numbers within this, the rest equal."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            alike(one[key], other[key], relative)
    elif isinstance(one, tuple | list):
        assert len(one) == len(other)
        for each, another in zip(one, other, strict=True):
            alike(each, another, relative)
    elif isinstance(one, Tensor) and one.is_floating_point():
        scale = max(float(other.abs().amax()), 1e-6) if other.numel() else 0.0  # a mean of zero is one up to rounding
        assert float((one - other).abs().amax()) <= relative * scale
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=relative)
    else:
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


RESULTS = ("known", "plain", "cut", "in turn", "in a budget", "pictures", "norms", "deployed")


def test_both_processes_have_the_same_bit_by_bit(made: tuple[Made, Made, Path]) -> None:
    first, second, _ = made
    for some, others in ((first, second), (first["one has all"], second["one has all"])):
        for name in RESULTS:
            alike(some[name], others[name], 0.0)
        alike(some["recovered"], others["recovered"], 0.0)
    alike(first["compressed"]["state"], second["compressed"]["state"], 0.0)
    assert first["compressed"]["kept"] == second["compressed"]["kept"]


def test_the_result_is_that_of_one_process_with_all_batches(made: tuple[Made, Made, Path]) -> None:
    alone = done(lambda data: data, None, None)
    for some in (made[0], made[0]["one has all"]):
        for name in RESULTS:
            alike(some[name], alone[name], 1e-9)
    alike(made[0]["one has all"]["recovered"], alone["recovered"], 1e-9)
    found, wanted = (each["compressed"]["kept"] for each in (made[0], alone))
    assert [(cut.site, cut.rank) for cut in found[0]] == [(cut.site, cut.rank) for cut in wanted[0]]
    assert found[1:3] == wanted[1:3]


def test_a_step_of_the_recovery_lowers_the_mean_of_both_losses(made: tuple[Made, Made, Path]) -> None:
    """By a loss of one process that sees both batches: the mean of the two."""
    small, dense = dr.truncate(pictured_net(), pictured()), Pictured().double().eval()
    shares, step = [pictured()[0::2], pictured()[1::2]], iter(range(6))

    def both(output: Tensor, number: int) -> Tensor:
        at = next(step)
        pairs = [share[at % len(share)] for share in shares]
        return sum(distance(small(*batch), dense(*batch).detach()) for batch in pairs) / 2  # type: ignore[return-value]

    losses = dr.recover_(small, dense, pictured()[:1], 6, loss=both)
    assert made[0]["recovered"]["losses"] == pytest.approx(losses, rel=1e-6)
    alike(made[0]["recovered"]["state"], dict(small.state_dict()), 1e-6)


def test_the_metric_counts_each_process_by_its_examples(made: tuple[Made, Made, Path]) -> None:
    found = made[0]["compressed"]
    assert found["kept"][3] == pytest.approx((0, -found["error"] / 4), rel=1e-6)


def test_the_first_measures_keeps_the_times_and_tells(made: tuple[Made, Made, Path]) -> None:
    first, second, folder = made
    assert first["compressed"]["kept"][4] == second["compressed"]["kept"][4] == Pair(1.0, 0.9, 0.9)
    assert [path.name for path in folder.iterdir()] == ["0.json"]
    assert "calibrating on 4 batches" in first["compressed"]["said"]
    assert second["compressed"]["said"] == []


def test_what_fails_in_one_fails_in_both_with_a_sentence(made: tuple[Made, Made, Path]) -> None:
    first, second = made[0]["refused"], made[1]["refused"]
    same = (
        "is not the same in all processes, in process 1 of 2 it is another: give all of them the same model and the "
        "same arguments, and to each its own data"
    )
    equal = {
        "another weight": f"CalibrationError: k.weight {same}",
        "no data": "CalibrationError: the calibration data are empty: give at least one batch of inputs",
        "data in one alone": f"CalibrationError: the kind of calibration {same}",
        "another argument": f"CalibrationError: the argument shrink {same}",
        "other steps": f"CalibrationError: the argument steps {same}",
        "another budget": f"PlanError: the budget {same}",
    }
    assert {name: first[name] for name in equal} == {name: second[name] for name in equal} == equal
    there = "failed in process 1 of 2, and nothing was done in any:"
    for name, told, number in (
        ("a batch that does not fit", "calibration", 1),
        ("no recalibration", "recalibrate_", 0),
        ("no recovery", "the recovery", 1),
    ):
        sentence = f"calibration batch {number} does not fit the model"
        assert first[name].startswith(f"CalibrationError: {told} {there} {sentence}")
        assert second[name].startswith(f"CalibrationError: {sentence}")
    infinite = "calibration batch 0 holds numbers that are not finite: take them out"
    assert first["infinite data"] == f"CalibrationError: reading the calibration data {there} {infinite}"
    assert first["no site"].startswith(f"CalibrationError: calibrate {there} the net has no site 'nope'")
    raised = "the metric raised ZeroDivisionError: no examples (test_together.py, line "
    assert first["a metric that fails"].startswith(f"PlanError: scoring {there} {raised}")
    assert second["a metric that fails"].startswith(f"PlanError: {raised}")
    assert first["a budget that is too small"].startswith("PlanError: 0.01 of the dense parameters cannot be met")
    assert second["a budget that is too small"].startswith("PlanError: choosing the ranks failed in process 0 of 2")


@pytest.mark.fuzz
def test_processes_that_are_started_apart_do_the_same(tmp_path: Path) -> None:
    """Where each has an order of its own in its sets, as under torchrun."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, *command], check=True, timeout=300, env=environment)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    for name in RESULTS:
        alike(first[name], second[name], 0.0)
    alike(first["compressed"]["state"], second["compressed"]["state"], 0.0)


@pytest.mark.parametrize("group", ["world", True, 2])
def test_what_is_no_group_of_processes(group: Any) -> None:
    sentence = r"^group is .*, and no group of processes that this one is in: give torch\.distributed\.group\.WORLD"
    net, x = token_net(), rows()
    for call in (dr.calibrate, dr.truncate, dr.recalibrate_):
        with pytest.raises(dr.CalibrationError, match=sentence):
            call(net, x, group=group)  # type: ignore[operator]
    with pytest.raises(dr.CalibrationError, match=sentence):
        dr.recover_(net, net, x, 1, group=group)
    with pytest.raises(dr.PlanError, match=sentence):
        dr.compress(perceptron(), batches()[0], dr.Budget(params=0.5), batches(), group=group)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    _said_once(dist.get_rank())
    all_of_it = done(lambda data: data[dist.get_rank() :: 2], dist.group.WORLD, FirstTimes({}))
    torch.save(all_of_it, Path(sys.argv[1]) / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()
