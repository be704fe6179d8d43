"""A trained model made smaller: budgets are met, nothing is slower than it was, and what is said is what is there."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx import compression as module
from dynrank_fx.bench import Pair
from dynrank_fx.compression import MaxDrop, compress
from dynrank_fx.errors import PlanError
from dynrank_fx.onnxcheck import session_of
from dynrank_fx.onnxsite import site_model
from dynrank_fx.ranks import Cost
from dynrank_fx.sitetimes import SiteTimes, paying_limit
from dynrank_fx.truncation import Cut, cut_plainly


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 48)).eval()


def batches() -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(32, 32, generator=generator) * torch.linspace(0, 1, 32) ** 3
    return [(torch.randn(64, 32, generator=generator) @ mixing,) for _ in range(4)]


def params(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def error(net: nn.Module, dense: nn.Module) -> float:
    with torch.no_grad():
        return sum(float((net(*b) - dense(*b)).square().sum()) for b in batches())


class Times(SiteTimes):
    """Times that a test says: of a site factored, over dense, at any rank; and of the whole model."""

    def __init__(self, ratios: dict[str, float]) -> None:
        super().__init__(cache=None)
        self.ratios = ratios

    def cost(self, rows: Any, total: float) -> Cost:
        ratio = self.ratios.get(rows[0].site.name, 0.5)
        return Cost(0.2, lambda rank: 0.2 * ratio)


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_a_budget_is_met_and_better_than_one_rank_for_all(share: float) -> None:
    dense = model()
    found = compress(dense, batches()[0], dr.Budget(params=share), batches())
    assert params(found.module) <= share * params(dense)
    assert found.params == (params(dense), params(found.module))
    net = dr.transform(dense, batches()[0], rank=dr.Ratio(0.01), allow_unprofitable=True)
    for ratio in np.arange(0.99, 0.0, -0.01):  # the largest ratio that fits
        even = dr.truncate(net, batches(), rank=dr.Ratio(float(ratio)))
        if params(even) <= share * params(dense):
            break
    assert error(found.module, dense) < error(even, dense)


def test_flops_too() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    dense = model()
    found = compress(dense, batches()[0], dr.Budget(flops=0.4), batches())
    counts, x = [], batches()[0]
    for net in (dense, found.module):
        with FlopCounterMode(display=False) as counter:
            net(*x)
        counts.append(counter.get_total_flops())
    assert found.flops == tuple(counts)
    assert counts[1] <= 0.4 * counts[0]


def test_the_model_is_left_as_it_was_and_the_result_is_plain_torch(tmp_path: Path) -> None:
    dense = model()
    before = copy.deepcopy(dense.state_dict())
    found = compress(dense, batches()[0], dr.Budget(params=0.5), batches())
    assert all(torch.equal(t, before[name]) for name, t in dense.state_dict().items())
    torch.save(found.module, tmp_path / "m.pt")
    again = torch.load(tmp_path / "m.pt", weights_only=False)
    assert torch.equal(again(*batches()[0]), found.module(*batches()[0]))


def test_the_least_model_within_a_drop() -> None:
    dense = model()

    def metric(net: nn.Module) -> float:
        return -error(net, dense)

    found = compress(dense, batches()[0], MaxDrop(50.0), batches(), metric=metric)
    assert found.metrics is not None
    assert found.metrics[1] >= found.metrics[0] - 50
    less = compress(dense, batches()[0], dr.Budget(params=found.params[1] / params(dense) - 0.03), batches())
    assert metric(less.module) < -50
    with pytest.raises(PlanError, match="takes a metric"):
        compress(dense, batches()[0], MaxDrop(0.1), batches())


def test_a_budget_that_cannot_be_met_says_the_least() -> None:
    with pytest.raises(PlanError, match=r"0.01 of the dense parameters cannot be met.* takes 0\.0\d+ of them"):
        compress(model(), batches()[0], dr.Budget(params=0.01), batches())


def test_a_site_that_is_not_faster_stays_dense() -> None:
    times = Times({"2.weight": 1.2})
    found = compress(model(), batches()[0], dr.Budget(flops=0.6), batches(), times=times)
    assert [cut.site for cut in found.cuts if cut.rank is None] == ["2.weight"]
    assert isinstance(found.module.get_submodule("2"), nn.Module)
    assert params(found.module) < params(model())


def test_a_budget_of_parameters_asks_for_size_alone_and_says_what_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module._Work, "_compared", lambda self, small: Pair(1.0, 1.3, 1.3))
    found = compress(model(), batches()[0], dr.Budget(params=0.5), batches(), times=Times({"2.weight": 1.2}))
    assert all(cut.rank is not None for cut in found.cuts)
    assert any("slower than the dense model (1.30 of its time)" in note for note in found.notes)


def test_what_is_not_faster_as_a_whole_gives_way_site_by_site(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every site is faster by itself, but not the model: those least faster go back, and at worst all of them."""
    seen: list[int] = []

    def compared(self: Any, small: nn.Module) -> Pair:
        seen.append(params(small))
        ratio = 1.2 if params(small) < 0.8 * params(model()) else 0.9
        return Pair(1.0, ratio, ratio)

    monkeypatch.setattr(module._Work, "_compared", compared)
    times = Times({"0.weight": 0.95, "2.weight": 0.95, "4.weight": 0.5})
    found = compress(model(), batches()[0], dr.Budget(latency=0.95), batches(), times=times)
    assert found.times is not None
    assert found.times.ratio == 0.9
    monkeypatch.setattr(module._Work, "_compared", lambda self, small: Pair(1.0, 1.2, 1.2))
    found = compress(model(), batches()[0], dr.ranks.Ratio(0.25), batches(), times=times)
    assert all(cut.rank is None for cut in found.cuts)
    assert params(found.module) == params(model())


def test_latency_is_measured_where_it_runs(tmp_path: Path) -> None:
    """Sites large enough that half the products are half the time; the cache then answers without a measurement."""
    torch.manual_seed(0)
    dense, x = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024)), torch.randn(256, 1024)
    times = SiteTimes(cache=tmp_path / "times.json", repeats=5)
    found = compress(dense, (x,), dr.Budget(latency=0.7), [(x,)], times=times)
    assert found.times is not None
    assert found.times.ratio < 1
    again = SiteTimes(cache=tmp_path / "times.json")
    plan = dr.plan_of(dr.transform(dense, (x,)))
    again._measured = None  # type: ignore[method-assign,assignment]
    assert again.pair(plan.sites[:1], paying_limit(plan.sites[:1])) is not None
    (tmp_path / "times.json").write_text("no JSON")
    assert SiteTimes(cache=tmp_path / "times.json")._known == {}


def conv(**settings: Any) -> nn.Module:
    return nn.Conv2d(8, 16, 3, **settings)


class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,ijk->bjk", x, self.w)


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 24))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


@pytest.mark.parametrize(
    ("net", "x"),
    [
        (nn.Linear(8, 24), torch.randn(5, 8)),
        (Product(), torch.randn(5, 3, 8)),
        (conv(stride=2, padding=1), torch.randn(2, 8, 9, 9)),
        (conv(padding="same", groups=2), torch.randn(2, 8, 9, 9)),
        (conv(padding=(1, 2), padding_mode="reflect"), torch.randn(2, 8, 9, 9)),
        (nn.ConvTranspose2d(8, 16, 3, stride=2, output_padding=1), torch.randn(2, 8, 5, 5)),
        (nn.Embedding(30, 16), torch.randint(0, 30, (4, 7))),
        (Einsum(), torch.randn(5, 8)),
    ],
)
def test_a_sites_own_model_has_the_shapes_of_the_site(net: nn.Module, x: Tensor) -> None:
    plan = dr.plan_of(dr.transform(net, (x,), rank=dr.ranks.Fixed(2), allow_unprofitable=True))
    for rank in (None, 2):
        made = site_model(plan.sites, rank, np.float32)
        assert made is not None
        proto, feeds = made
        (y,) = session_of(proto.SerializeToString(), "CPUExecutionProvider").run(None, feeds)
        assert y.shape == tuple(net(x).shape)
        stored = sum(int(np.prod(each.dims)) for each in proto.graph.initializer)
        assert stored == (plan.sites[0].site.params if rank is None else plan.sites[0].params)


def test_sites_that_share_a_factor_are_timed_together() -> None:
    class QK(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) + self.k(x)

    plan = dr.plan_of(dr.transform(QK(), (torch.randn(4, 16),), rank=dr.ranks.Fixed(3), share_inputs=True))
    made = site_model(plan.sites, 3, np.float32)
    assert made is not None
    assert [len(made[0].graph.node), len(made[0].graph.output)] == [3, 2]


def test_what_is_printed(tmp_path: Path) -> None:
    found = compress(
        model(), batches()[0], dr.Budget(params=0.5), batches(), metric=lambda net: 0.5, times=Times({"2.weight": 0.5})
    )
    text = str(found)
    assert f"parameters  {params(model()):,} -> {params(found.module):,}" in text
    assert "metric      0.5000 -> 0.5000" in text
    assert "of dense, in onnxruntime" in text
    assert json.loads(found.plan.to_json())["total_params"] == params(model())


def test_without_data_it_says_so() -> None:
    found = compress(model(), batches()[0], dr.Budget(params=0.5))
    assert any("cut by plain SVD, since there are no calibration data" in note for note in found.notes)


def test_a_provider_that_is_not_there_is_no_untimed_success() -> None:
    with pytest.raises(dr.ExportError, match="this onnxruntime has no Toaster"):
        compress(model(), batches()[0], dr.Budget(flops=0.6), batches(), times=SiteTimes("Toaster", cache=None))


def test_a_budget_that_only_slow_layers_could_meet_says_so() -> None:
    times = Times({"0.weight": 1.2, "2.weight": 1.2, "4.weight": 1.2})
    with pytest.raises(PlanError, match=r"cannot be met.*Only layers that are faster than dense count here"):
        compress(model(), batches()[0], dr.Budget(flops=0.5), batches(), times=times)


def test_every_reason_for_a_plain_cut_has_its_sites() -> None:
    cuts = [Cut("a", 2, 0.5, "one"), Cut("b", 2, 0.5, "other"), Cut("c", 2, 0.5, "one"), Cut("d", 2, 0.0, "one")]
    assert cut_plainly(cuts) == ["a, c: cut by plain SVD, since one", "b: cut by plain SVD, since other"]
