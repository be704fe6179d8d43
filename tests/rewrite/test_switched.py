"""The module of one site: what it computes, holds and shows in every phase."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.layouts import layout_for
from dynrank_fx.ops import LinearOp
from dynrank_fx.phase import ALPHA
from dynrank_fx.plan import spectrum_of
from dynrank_fx.rewrite import STEM, Switched, switched_modules

PHASES = pytest.mark.parametrize("phase", list(dr.Phase), ids=lambda phase: phase.name)
OUTSIDE = pytest.mark.parametrize("phase", [dr.Phase.LOW, dr.Phase.ADAPTOR], ids=lambda phase: phase.name)


def switched(phase: dr.Phase = dr.Phase.FULL, **options: bool) -> Switched:
    """A linear of 6 from 8 at rank 3, in a phase, its branch away from zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6)).double()
    net = dr.transform(model, rank=dr.Fixed(3), allow_unprofitable=True)
    dr.enter_(net, phase)
    (site,) = switched_modules(net)["0.weight"]
    with torch.no_grad():
        for name in site.parameter_names:
            site.get_parameter(name).add_(0.1)
    return site


X = torch.linspace(-1, 1, 24).reshape(3, 8).double()


def dense(site: Switched) -> Tensor:
    """The weight that it stands for, from what it holds."""
    held = dict(site.named_parameters()) | dict(site.named_buffers())
    if site.phase == dr.Phase.FULL:
        return held["weight"]
    product = held["left"] @ held["right"]
    return product if site.phase == dr.Phase.LOW else held["base"] + ALPHA / 3 * product


@PHASES
def test_it_computes_what_its_dense_weight_would_with_its_bias_another_or_none(phase):
    site = switched(phase)
    torch.testing.assert_close(site.weight, dense(site))
    for given, bias in (((), site.bias), ((None,), None), ((torch.ones(6).double(),), torch.ones(6).double())):
        torch.testing.assert_close(site(X, *given), F.linear(X, dense(site), bias))


@PHASES
def test_it_holds_the_parameters_of_its_phase_and_nothing_else(phase):
    site = switched(phase)
    names = {"weight"} if phase is dr.Phase.FULL else {"left", "right"}
    assert {name for name, _ in site.named_parameters()} == names | {"bias"}
    assert {name for name, _ in site.named_buffers()} == ({"base"} if phase is dr.Phase.ADAPTOR else set())
    assert set(site.parameter_names) == set(site.names_in(phase)) == names


@PHASES
def test_its_outline_has_the_shape_dtype_and_device_of_the_weight_without_memory(phase):
    site = switched(phase)
    outline = site.outline
    assert (outline.shape, outline.dtype, outline.device) == ((6, 8), torch.float64, torch.device("cpu"))
    assert outline.untyped_storage().nbytes() == 8, "one number"


@PHASES
def test_its_spectrum_is_that_of_the_weight_that_it_stands_for(phase):
    site = switched(phase)
    expected = torch.linalg.svdvals(dense(site).detach())
    found = site.spectrum()[0]
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected[: len(found)])
    assert not (expected[len(found) :] > 1e-9).any(), "what is left out is zero"
    torch.testing.assert_close(spectrum_of(site.layout, [dense(site).detach()])[0].double(), expected)


@OUTSIDE
def test_a_dense_weight_cannot_be_written_to_where_there_is_none(phase):
    site = switched(phase)
    with pytest.raises(
        dr.TransitionError, match=rf"^0\.weight has no weight to write in {phase.name}: enter FULL first"
    ):
        site.weight = nn.Parameter(torch.ones(6, 8))
    site.weight.sum().backward()
    assert site.left.grad is not None, "but reads of it are differentiable"


def test_in_full_there_are_no_factors_and_the_weight_can_be_written_to():
    site = switched()
    with pytest.raises(dr.TransitionError, match=r"^0\.weight is in FULL: it has no factors; enter LOW first$"):
        _ = site.factors
    site.weight = nn.Parameter(torch.ones(6, 8).double())
    torch.testing.assert_close(site(X, None), X @ torch.ones(8, 6).double())


@PHASES
def test_it_shows_its_name_shape_layout_rank_and_phase(phase):
    assert repr(switched(phase)) == f"Switched(0.weight, linear 6x8, linear rank 3, {phase.name})"


def shared(phase: dr.Phase) -> tuple[Switched, Switched]:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 6), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.a(x), self.b(x)], 1)

    torch.manual_seed(0)
    net = dr.transform(Pair().double(), share_inputs=True, rank=dr.Fixed(3), allow_unprofitable=True)
    dr.enter_(net, phase)
    (a,), (b,) = switched_modules(net).values()
    return a, b


def test_of_sites_that_share_a_factor_the_first_owns_and_applies_it():
    a, b = shared(dr.Phase.LOW)
    assert [name for name, _ in b.named_parameters()] == ["left", "bias"]
    assert b.factors == (b.left, a.right)
    stem = a(X, use=STEM)
    torch.testing.assert_close(stem, X @ a.right.T)
    for site in (a, b):
        torch.testing.assert_close(site(stem), F.linear(X, site.left @ a.right, site.bias))
    a, b = shared(dr.Phase.FULL)
    assert a(X, use=STEM) is X
    assert [name for name, _ in b.named_parameters()] == ["weight", "bias"]


def test_a_bare_weight_keeps_its_own_name_in_the_state():
    weight = nn.Parameter(torch.ones(4, 4))
    op = LinearOp()
    holder = nn.Module()
    holder.w = Switched([op], layout_for(op), 2, weight, None, site="w", bare=True)
    assert list(holder.state_dict()) == ["w"]
    holder.w = Switched([op], layout_for(op), 2, weight, None, site="w")
    assert list(holder.state_dict()) == ["w.weight"]


def test_the_modules_of_every_site_are_found_in_the_order_of_the_tree():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    net = dr.transform(model, rank=dr.Fixed(2))
    assert {name: [id(module) for module in modules] for name, modules in switched_modules(net).items()} == {
        "0.weight": [id(net.get_submodule("0")), id(net.get_submodule("2"))],
        "1.weight": [id(net.get_submodule("1"))],
    }
    assert switched_modules(model) == {}
