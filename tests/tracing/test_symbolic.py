"""Capture by symbolic tracing: what a graph of calls cannot hold is refused, with the line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from capturing import assert_alike, linears
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.tracing.symbolic import closed_functions, closed_layers

X = torch.randn(4, 5, 8)


class NoGrad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.a(x)
        return self.b(x)


class Autocast(NoGrad):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = self.a(x)
        return self.b(x.float())


@pytest.mark.parametrize("make", [NoGrad, Autocast])
def test_gradients_or_autocast_switched_inside_forward_are_not_lost(make):
    """A symbolic graph would train what the model says not to train."""
    torch.manual_seed(0)
    model, x = make(), torch.randn(4, 8)
    with pytest.raises(dr.CaptureError, match=r"the model .*`x = self\.a\(x\)`.* gradients or autocast are switched"):
        dr.capture(model, (x,), how=dr.Capture.SYMBOLIC)
    for how, sites in ((dr.Capture.EXPORT, ["b.weight"]), (None, ["a.weight", "b.weight"])):
        net = dr.transform(model, (x,), rank=dr.Fixed(2), how=how)
        assert_alike(net, model, x)
        assert [row.site.name for row in dr.plan_of(net).sites] == sites


def test_a_symbolic_graph_keeps_defaults_dicts_and_scalars_free():
    class Free(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x: Tensor, features: dict[str, Tensor], scale: float = 2.0) -> dict[str, Any]:
            return {"out": self.a(x) * scale + features["left"], "extra": (x, [scale])}

    torch.manual_seed(0)
    model, (x, left) = Free(), torch.randn(2, 4, 8)
    net = dr.transform(model, (x, {"left": left}), rank=dr.Fixed(2), how=dr.Capture.SYMBOLIC)
    assert_alike(net, model, x, {"left": left})
    assert_alike(net, model, x, {"left": left}, 3.0)
    assert_alike(net, model, x, scale=0.5, features={"left": left})


def test_hooks_of_the_model_itself_are_not_for_symbolic_tracing():
    model, x = linears(), torch.randn(4, 8)
    model.register_forward_hook(lambda module, args, output: output * 2)
    model[0].register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(
        dr.CaptureError, match="Sequential has hooks of its own, which a symbolic graph would leave out"
    ):
        dr.capture(model, (x,), how=dr.Capture.SYMBOLIC)
    for how in (dr.Capture.EXPORT, None):
        assert_alike(dr.capture(model, (x,), how=how), model, x)


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        return 2 * self.a(x) if mask is not None else self.b(x)


class Asked(Optional):
    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        x = self.b(self.a(x))
        return x * mask if torch.is_tensor(mask) else x


class Handed(Optional):
    """Hands the mask on, whatever it is."""

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        x = self.a(x)
        return self.b(nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask))


@pytest.mark.parametrize("kind", [Optional, Asked])
@pytest.mark.parametrize("given", [True, False])
def test_an_input_that_forward_asks_for_is_the_examples_or_refused(kind, given):
    torch.manual_seed(0)
    model, both = kind(), [(X,), (X, torch.rand_like(X))]
    net = dr.capture(model, both[given])
    assert torch.equal(net(*both[given]), model(*both[given]))
    with pytest.raises((AssertionError, TypeError, ValueError), match=r"serves no other|argument|arity"):
        net(*both[not given])


def test_an_input_that_is_only_handed_on_may_be_left_out():
    model, mask = Handed(), torch.zeros(5, 5)
    net = dr.capture(model, (X,))
    for inputs in ((X,), (X, mask)):
        assert torch.equal(net(*inputs), model(*inputs))


class Ignoring(Optional):
    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        return self.b(self.a(x))


def test_an_input_that_makes_no_difference_is_no_hindrance():
    model, context = Ignoring(), torch.ones(3)
    for how in (None, dr.Capture.SYMBOLIC):
        net = dr.transform(model, (X, context), rank=dr.Fixed(2), how=how)
        assert dr.plan_of(net).capture.startswith("by symbolic tracing")
        assert torch.equal(net(X, context), model(X, context))
        assert torch.equal(net(X), model(X))


@torch.fx.wrap
def project(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight


@torch.fx.wrap
def unrelated(x: Tensor, other: Tensor) -> Tensor:
    """It is given no matrix of the model's."""
    return x @ other


class Closed(nn.Module):
    """What symbolic tracing looks into, and what it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.fc, self.attention = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 8), nn.MultiheadAttention(8, 2)
        self.memory, self.norm = nn.LSTM(8, 8), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = project(self.memory(self.norm(self.fc(x)))[0], self.w)
        return unrelated(self.attention(x, x, x)[0], x.mT)


def test_what_stays_closed_although_export_could_open_it_is_listed():
    net = dr.capture(Closed(), how=dr.Capture.SYMBOLIC)
    assert closed_layers(net) == ["attention"], "an LSTM's kernel is closed to every way"
    assert set(closed_functions(net)) == {"project"}
    open_ = dr.capture(linears(), how=dr.Capture.SYMBOLIC)
    assert closed_layers(open_) == closed_functions(open_) == []


def test_both_modes_are_traced_and_become_one_graph_only_where_they_are_the_same():
    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if self.training else x * 3

    net = dr.capture(Scaled(), how=dr.Capture.SYMBOLIC)
    x = torch.ones(2)
    assert float(net.train()(x)[0]) == 2
    assert float(net.eval()(x)[0]) == 3
    assert net.graphs[True] is not net.graphs[False]
