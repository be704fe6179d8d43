"""A net cut for good: by the outputs where they are known, at other ranks, site after site, with a sentence if not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.compression import cut_
from dynrank_fx.compression.truncation import Cut, added_biases, cut_plainly
from dynrank_fx.errors import CalibrationError, DynrankWarning
from dynrank_fx.plan import Fixed


class QKV(nn.Module):
    """Three linears of one input, which can share a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, 12, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)


def vectors() -> tuple[Tensor, ...]:
    mixing = torch.diag(torch.linspace(0.1, 3, 12)) @ torch.randn(12, 12)
    return (torch.randn(40, 5, 12) @ mixing + torch.randn(12),)


def images() -> tuple[Tensor, ...]:
    return (F.avg_pool2d(torch.randn(6, 4, 18, 18), 3, 1) + torch.randn(4, 1, 1),)


def test_means_go_into_the_biases() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(4, 10, 3, bias=False), nn.ReLU()), images()[0] + 5
    net = dr.transform(model, (x,), rank=Fixed(2))
    small = dr.truncate(net, [(x,)])
    names = dict(small.named_parameters())
    assert names["0.left.bias"].shape == (10,)
    first = nn.Sequential(*[small])(x)
    assert first.shape == model(x).shape
    assert "bias" not in dict(model.named_parameters())


def test_in_turn_every_site_sees_what_the_cut_ones_before_give() -> None:
    """The last site is then the best for the inputs that it will really get."""
    torch.manual_seed(3)
    model, x = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 14)).double(), vectors()[0].double()
    net = dr.transform(model, (x,), rank=Fixed(3), exclude=())
    small = dr.truncate(net, [(x,)], sequential=True)
    with torch.no_grad():
        hidden: list[Tensor] = []
        handle = small.get_submodule("1").register_forward_hook(lambda module, args, y: hidden.append(y))
        z = small(x)
        handle.remove()
        y = model[2](hidden[0]).reshape(-1, 14)
    least = float(torch.linalg.svdvals(y - y.mean(0))[3:].square().sum())
    assert float((y - z.reshape(-1, 14)).square().sum()) == pytest.approx(least, rel=5e-3)


def test_a_site_in_low_keeps_its_factors() -> None:
    net = dr.transform(QKV(), vectors(), rank=Fixed(3))
    dr.enter_(net, dr.Phase.LOW)
    x = vectors()[0]
    assert torch.equal(dr.truncate(net, [(x,)])(x), net.eval()(x))


def test_a_site_in_low_is_cut_further_by_its_outputs() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(12, 20), vectors()[0]
    net = dr.transform(model, (x,), rank=Fixed(6))
    dr.enter_(net, dr.Phase.LOW)
    small = dr.truncate(net, dr.calibrate(net, [(x,)], shrink=0.0), rank=Fixed(3))
    with torch.no_grad():
        net.eval()
        y, z = net(x).reshape(-1, 20).double(), small(x).reshape(-1, 20).double()
    least = float(torch.linalg.svdvals(y - y.mean(0))[3:].square().sum())
    assert float((y - z).square().sum()) == pytest.approx(least, rel=1e-3)


def test_a_budget_looks_at_the_outputs() -> None:
    """Of two equal weights, the one whose inputs fill one direction needs but little rank."""
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.narrow, self.wide = nn.Linear(32, 32), nn.Linear(32, 32)
            self.wide.load_state_dict(self.narrow.state_dict())

        def forward(self, x: Tensor) -> Tensor:
            return self.narrow(x[..., :1] * torch.ones(32)) + self.wide(x)

    model, x = Two(), torch.randn(200, 32)
    net = dr.transform(model, (x,), rank=Fixed(8))
    small = dr.truncate(net, [(x,)], rank=dr.Budget(params=0.55))
    sizes = {name: p.shape for name, p in small.named_parameters()}
    assert sizes["narrow.left.weight"][1] == 1
    assert "wide.weight" in sizes or sizes["wide.left.weight"][1] > 8
    assert sum(p.numel() for p in small.parameters()) <= 0.55 * sum(p.numel() for p in model.parameters())


def test_where_outputs_do_not_decide_it_says_so() -> None:
    net = dr.transform(nn.Conv2d(8, 8, 3), (torch.randn(2, 8, 6, 6),), rank=Fixed(2), conv_layout=dr.SpatialLayout)
    with pytest.warns(DynrankWarning, match="weight: cut by plain SVD, since no factor of the spatial layout"):
        dr.truncate(net, [(torch.randn(2, 8, 6, 6),)])
    net = dr.transform(nn.Linear(12, 12), (torch.randn(2, 12),), rank=Fixed(2))
    with pytest.warns(DynrankWarning, match="since there are no calibration data"):
        dr.truncate(net)


def test_every_reason_for_a_plain_cut_has_its_sites() -> None:
    cuts = [Cut("a", 2, 0.5, "one"), Cut("b", 2, 0.5, "other"), Cut("c", 2, 0.5, "one"), Cut("d", 2, 0.0, "one")]
    assert cut_plainly(cuts) == ["a, c: cut by plain SVD, since one", "b: cut by plain SVD, since other"]


def test_without_data_a_cut_is_the_truncated_svd_and_its_error_the_tail() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(24, 16), torch.randn(5, 24)
    net = dr.transform(model, (x,), rank=Fixed(4))
    (cut,) = cut_(net, None)
    S = torch.linalg.svdvals(model.weight.detach().double())
    assert (cut.site, cut.rank, cut.why) == ("weight", 4, "there are no calibration data")
    assert cut.error == pytest.approx(float(S[4:].norm() / S.norm()), rel=1e-3)
    U, S32, V = torch.linalg.svd(model.weight.detach())
    best = (U[:, :4] * S32[:4]) @ V[:4]
    torch.testing.assert_close(net(x).detach(), F.linear(x, best, model.bias.detach()), rtol=1e-4, atol=1e-5)


def test_a_site_whose_factors_would_cost_no_less_becomes_dense_again() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 24)), torch.randn(40, 24)
    net = dr.transform(model, (x,), rank=Fixed(4))
    small = dr.truncate(net, [(x,)], rank=dr.Energy(1.0))
    assert set(dict(small.named_parameters())) == set(dict(model.named_parameters()))
    torch.testing.assert_close(small(x), model(x))
    assert dr.phases_of(net) == dict.fromkeys(["0.weight", "1.weight"], dr.Phase.FULL)  # the net stays as it is


def test_bias_values_that_a_cut_adds_are_counted() -> None:
    """One for each output of a module without a bias; no parameter of the cut model is missed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 10, 3, bias=False), nn.ReLU(), nn.Conv2d(10, 6, 3))
    x = images()[0] + 5
    net = dr.transform(model, (x,), rank=Fixed(2))
    known = dr.calibrate(net, [(x,)])
    assert added_biases(net, known) == {"0.weight": 10, "2.weight": 0}
    small, plain = dr.truncate(net, known), dr.truncate(net)
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in plain.parameters()) + 10


def test_in_turn_takes_batches() -> None:
    net = dr.transform(nn.Linear(12, 20), vectors(), rank=Fixed(3))
    for known in (None, dr.calibrate(net, [vectors()])):
        with pytest.raises(CalibrationError, match="one after the other takes batches: give a list of inputs"):
            dr.truncate(net, known, sequential=True)
