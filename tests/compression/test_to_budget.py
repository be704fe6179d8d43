"""A trained model made smaller: budgets are met, nothing is slower than it was, and what is said is what is there."""

from __future__ import annotations

import bisect
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from compressing import SaidTimes, batches, error, params, perceptron
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.compression import MaxDrop, SiteTimes, compress, deployed
from dynrank_fx.compression.recover import distance
from dynrank_fx.errors import PlanError


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_a_budget_is_met_and_better_than_one_rank_for_all(share: float) -> None:
    dense = perceptron()
    found = compress(dense, batches()[0], dr.Budget(params=share), batches())
    assert params(found.module) <= share * params(dense)
    assert found.params == (params(dense), params(found.module))
    net = dr.transform(dense, batches()[0], rank=dr.Ratio(0.01), allow_unprofitable=True)

    def even(percent: int) -> nn.Module:
        return dr.truncate(net, batches(), rank=dr.Ratio(percent / 100))

    too_large = bisect.bisect(range(1, 100), False, key=lambda percent: params(even(percent)) > share * params(dense))
    fits = even(range(1, 100)[too_large - 1])
    assert params(fits) <= share * params(dense) < params(even(range(1, 100)[too_large]))
    assert error(found.module, dense) < error(fits, dense)


def test_flops_too() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    dense = perceptron()
    found = compress(dense, batches()[0], dr.Budget(flops=0.4), batches())
    counts, x = [], batches()[0]
    for net in (dense, found.module):
        with FlopCounterMode(display=False) as counter:
            net(*x)
        counts.append(counter.get_total_flops())
    assert found.flops == tuple(counts)
    assert counts[1] <= 0.4 * counts[0]


def test_the_model_is_left_as_it_was_and_the_result_is_plain_torch(tmp_path: Path) -> None:
    dense = perceptron()
    before = copy.deepcopy(dense.state_dict())
    found = compress(dense, batches()[0], dr.Budget(params=0.5), batches())
    assert all(torch.equal(t, before[name]) for name, t in dense.state_dict().items())
    torch.save(found.module, tmp_path / "m.pt")
    again = torch.load(tmp_path / "m.pt", weights_only=False)
    assert torch.equal(again(*batches()[0]), found.module(*batches()[0]))


def test_a_budget_that_cannot_be_met_says_the_least() -> None:
    with pytest.raises(PlanError, match=r"0.01 of the dense parameters cannot be met.* takes 0\.0\d+ of them"):
        compress(perceptron(), batches()[0], dr.Budget(params=0.01), batches())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"multiple_of": 0}, "ranks cannot be multiples of 0; give 1 or more"),
        ({"recover_steps": -3}, "a recovery of -3 steps is none: give 0 or more"),
        ({"recover_steps": 2.5}, r"a recovery of 2\.5 steps is none"),
        ({"metric": 0.01}, r"metric is 0\.01: give a function, or leave it out"),
        ({"times": True}, r"times is True: give SiteTimes\(\), or None to measure nothing"),
        ({"metric": lambda net: "good"}, "the metric is 'good' and no number"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PlanError, match=sentence):
        compress(perceptron(), batches()[0], dr.Budget(params=0.5), batches(), **options)


@pytest.mark.parametrize("budget", [0.5, "flops=0.5", dr.MaxDrop])
def test_what_is_no_budget_is_told_what_one_is(budget: Any) -> None:
    with pytest.raises(
        PlanError, match=r"is no budget: give Budget\(params=0\.5\), .* MaxDrop\(0\.01\) or a rank policy$"
    ):
        compress(perceptron(), batches()[0], budget, batches())


@pytest.mark.parametrize("drop", ["0.1", None, True, -1, float("nan")])
def test_a_fall_that_cannot_be(drop: Any) -> None:
    with pytest.raises(PlanError, match=r"a metric cannot fall by at most .*; give a number of 0 or more"):
        dr.MaxDrop(drop)


def low_rank_run() -> nn.Module:
    """A net that ends in LOW at a quarter of the rank, as its training leaves it."""
    torch.manual_seed(0)
    net = dr.transform(perceptron(), batches()[0], rank=dr.Ratio(0.25), allow_unprofitable=True)
    dr.enter_(net, dr.Phase.LOW)
    return net.eval()


@pytest.mark.parametrize("budget", [dr.Budget(flops=0.8), dr.Budget(params=0.9), dr.Budget(params=1.0)])
def test_what_is_of_low_rank_already_gets_no_rank_that_it_has_not(budget: dr.Budget) -> None:
    net = low_rank_run()
    small = dr.truncate(net)
    found = compress(net, batches()[0], budget, batches())
    assert params(found.module) == params(small)
    torch.testing.assert_close(found.module(*batches()[0]), small(*batches()[0]), rtol=1e-4, atol=1e-5)
    assert any("Nothing is lost: 3 of 3 weights are of low rank already" in note for note in found.notes)


def test_a_cut_that_loses_nothing_adds_no_bias() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(32, 48, bias=False), nn.ReLU(), nn.Linear(48, 32, bias=False))
    net = dr.transform(dense, batches()[0], rank=dr.Ratio(0.25), allow_unprofitable=True)
    dr.enter_(net, dr.Phase.LOW)
    found = compress(net.eval(), batches()[0], dr.Budget(flops=0.9), batches())
    assert params(found.module) == params(dr.truncate(net))


def test_biases_that_a_cut_adds_count_as_parameters() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(32, 48, bias=False), nn.ReLU(), nn.Linear(48, 48, bias=False), nn.ReLU(), nn.Linear(48, 32)]
    dense = nn.Sequential(*layers).eval()
    for share in (0.2, 0.3, 0.41, 0.5):
        found = compress(dense, batches()[0], dr.Budget(params=share), batches())
        assert found.params[1] <= share * found.params[0]


@pytest.mark.parametrize("share", [0.15, 0.3])
def test_no_budget_is_worse_on_its_data_than_one_ratio_for_all(share: float) -> None:
    dense = perceptron()
    found = compress(dense, batches()[0], dr.Budget(params=share), batches())
    even = compress(dense, batches()[0], dr.Budget(params=share, even=True), batches())
    ranks = [cut.rank / min(p.shape) for cut, p in zip(even.cuts, [dense[0].weight, dense[2].weight], strict=False)]
    assert max(ranks) - min(ranks) <= 1 / 32
    assert params(even.module) <= share * params(dense)
    assert far(found.module, dense) <= far(even.module, dense)


def far(net: nn.Module, dense: nn.Module) -> float:
    with torch.no_grad():
        return sum(float(distance(net(*b), dense(*b))) for b in batches())


def test_a_budget_of_time_takes_times() -> None:
    with pytest.raises(
        PlanError, match=r"times of the sites are unknown: let compress measure them \(without `--no-timing`"
    ):
        compress(perceptron(), batches()[0], dr.Budget(latency=0.5), batches())


def test_without_data_it_says_so() -> None:
    found = compress(perceptron(), batches()[0], dr.Budget(params=0.5))
    assert any("cut by plain SVD, since there are no calibration data" in note for note in found.notes)


def test_a_provider_that_is_not_there_is_no_untimed_success() -> None:
    sentence = r"this onnxruntime has no Toaster: .*, or measure no times \(`--no-timing`, in Python times=None\)$"
    with pytest.raises(dr.ExportError, match=sentence):
        compress(perceptron(), batches()[0], dr.Budget(flops=0.6), batches(), times=SiteTimes("Toaster", cache=None))


def test_options_of_planning_in_one_value_or_as_keywords_say_the_same() -> None:
    options = dr.PlanOptions(exclude=("0.*",), multiple_of=8, rank=dr.Fixed(1))  # the budget decides the ranks
    one = compress(perceptron(), batches()[0], dr.Budget(params=0.6), batches(), options)
    other = compress(perceptron(), batches()[0], dr.Budget(params=0.6), batches(), exclude="0.*", multiple_of=8)
    assert one.cuts == other.cuts
    assert [cut.site for cut in one.cuts] == ["2.weight", "4.weight"]
    assert all(cut.rank is None or cut.rank % 8 == 0 for cut in one.cuts)
    assert torch.equal(one.module(*batches()[0]), other.module(*batches()[0]))


def test_options_that_would_be_without_effect_are_refused() -> None:
    net = dr.transform(perceptron(), batches()[0], rank=dr.Fixed(2), allow_unprofitable=True)
    with pytest.raises(PlanError, match="has its plan, which says what is factored: leave out the options"):
        compress(net, batches()[0], dr.Budget(params=0.9), batches(), include=["2"])
    with pytest.raises(PlanError, match="the budget decides the ranks: leave out rank"):
        compress(perceptron(), batches()[0], dr.Budget(params=0.9), batches(), rank=dr.Fixed(3))


# Several budgets


def test_two_shares_are_both_kept_to_whichever_binds() -> None:
    dense = perceptron()
    for shares in ({"params": 0.5, "flops": 0.3}, {"params": 0.3, "flops": 0.9}):
        for budget in (dr.Budget(**shares), [dr.Budget(**{name: share}) for name, share in shares.items()]):
            found = compress(dense, batches()[0], budget, batches())
            assert found.flops is not None
            reached = {"params": found.params[1] / found.params[0], "flops": found.flops[1] / found.flops[0]}
            assert all(reached[name] <= share for name, share in shares.items())
            assert max(reached[name] / share for name, share in shares.items()) > 0.9


def test_a_budget_and_a_fall_that_is_allowed_say_what_binds() -> None:
    dense = perceptron()

    def metric(net: nn.Module) -> float:
        return -error(net, dense)

    budget = [dr.Budget(params=0.6, flops=0.9), MaxDrop(1e6)]
    found = compress(dense, batches()[0], budget, batches(), metric=metric)
    assert 0.5 < found.params[1] / found.params[0] <= 0.6  # and no further, though the fall would allow it
    assert found.notes[-1].startswith("All budgets are met: 0.")
    assert found.notes[-1].endswith("of the 1e+06 allowed, and what binds is the budget of parameters.")
    with pytest.raises(
        PlanError, match=r"the budgets cannot be met together: at 0\.3 of the parameters the metric falls by"
    ) as e:
        compress(dense, batches()[0], [dr.Budget(params=0.3), MaxDrop(50.0)], batches(), metric=metric)
    share = float(str(e.value).split("give params=")[1].split(",")[0])
    enough = compress(dense, batches()[0], [dr.Budget(params=share), MaxDrop(50.0)], batches(), metric=metric)
    assert enough.metrics is not None
    assert enough.metrics[0] - enough.metrics[1] <= 50


@pytest.mark.parametrize(
    ("budget", "sentence"),
    [
        ([], "several budgets are each of another thing"),
        ([MaxDrop(0.1), MaxDrop(0.2)], "several budgets are each of another thing"),
        ([dr.Budget(params=0.1), dr.Budget(params=0.2)], "several budgets are each of another thing"),
        ([dr.Budget(params=0.1), dr.Fixed(2)], "says two things of the ranks: give one rank policy"),
        ([dr.Budget(params=0.1), 0.5], "0.5 is no budget"),
    ],
)
def test_budgets_that_contradict_each_other(budget: Any, sentence: str) -> None:
    with pytest.raises(PlanError, match=sentence):
        compress(perceptron(), batches()[0], budget, batches(), metric=lambda net: 1.0)


def test_what_is_done_is_told_as_it_is_done() -> None:
    said: list[str] = []
    compress(perceptron(), batches()[0], MaxDrop(1.0), batches(), metric=lambda net: 1.0, progress=said.append)
    assert said[:4] == [
        "capturing the model",
        "scoring the dense model",
        "its metric is 1.0000",
        "calibrating on 4 batches",
    ]
    assert any(line.startswith("candidate 1: ") and "best so far" in line for line in said)
    assert "50.0% of the parameters: metric 1.0000, within what is allowed" in said
    said.clear()
    compress(perceptron(), batches()[0], dr.Budget(flops=0.5), times=SaidTimes({}), progress=said.append)
    assert "timing 0.weight, dense and factored" in said
    assert said[-1] == "timing the whole model beside the dense one"


def test_the_capture_can_be_chosen() -> None:
    found = compress(perceptron(), batches()[0], dr.Budget(params=0.5), how=dr.Capture.MODULES)
    assert "modules" in found.plan.capture.lower() or "layer" in found.plan.capture.lower(), found.plan.capture


class Streaming(nn.Module):
    """Counts its calls in a buffer, which its outputs depend on, and has a batch norm behind what is cut."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(32, 64), nn.BatchNorm1d(64), nn.Linear(64, 48)
        self.register_buffer("position", torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        self.position.add_(1.0)
        return self.last(torch.relu(self.norm(self.first(x)))) * self.position


@pytest.mark.parametrize("budget", [dr.Budget(params=0.5), MaxDrop(1e9)], ids=["a budget", "a fall"])
def test_what_a_model_counts_in_a_buffer_stays_where_it_was(budget: Any) -> None:
    """Calibration, the comparison of candidates, scores and the recovery all run it."""
    model = Streaming().eval()
    asked = {"metric": lambda net: net(*batches()[0]).mean().item(), "recover_steps": 2}
    found = compress(model, batches()[0], budget, batches(), **asked)
    assert found.module.position == model.position == 3
    assert any(cut.loses for cut in found.cuts)
    once = Streaming().eval()
    assert found.metrics is not None
    assert found.metrics[0] == pytest.approx(once(*batches()[0]).mean().item())
    net = dr.transform(model, batches()[0], rank=dr.Fixed(3))
    final = deployed(net, batches(), metric=lambda module: module(*batches()[0]).mean().item())
    assert final.module.position == net.position == model.position == 3
