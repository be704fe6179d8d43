"""Where every matrix of a model stands in its graphs: who holds it, who applies it, and who else touches it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capturing import both_captures
from models import Experts, Tied
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.ops import EmbeddingOp, LinearOp
from dynrank_fx.plan import locate
from dynrank_fx.plan.locate import input_of, refuse_non_finite


class Everything(nn.Module):
    """A layer, a product with a parameter, a weight that is read, one asked for its dtype, and a closed layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.w, self.b = nn.Linear(8, 8), nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(6))
        self.read, self.asked, self.closed = nn.Linear(6, 6), nn.Linear(6, 6), nn.LSTM(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(torch.tanh(self.layer(x)), self.w, self.b)
        x = self.read(x) / self.read.weight.norm()
        return self.closed(self.asked(x.to(self.asked.weight.dtype)))[0]


X = torch.randn(3, 8)


def test_a_matrix_is_found_with_all_that_touches_it():
    net = dr.capture(Everything(), how=dr.Capture.SYMBOLIC)
    located = locate(net)
    assert list(located) == [name for name, p in net.named_parameters() if p.ndim >= 2], "vectors are none"
    assert all(located[name].parameter is net.get_parameter(name) for name in located)
    (layer,) = located["layer.weight"].uses
    assert (layer.op, layer.holder, layer.own_bias, str(layer.x)) == (LinearOp(), "layer.weight", True, "x")
    (product,) = located["w"].uses
    assert (product.op, product.holder, product.own_bias, str(product.bias)) == (LinearOp(), "w", False, "b")
    assert str(product.x) == "tanh"
    (reader,) = located["read.weight"].readers
    assert (reader.words, reader.writes, reader.holder) == ("`norm`", False, "read.weight")
    assert not located["asked.weight"].readers
    assert [each.words for each in located["asked.weight"].metadata] == ["`.dtype`"]
    for name in ("closed.weight_ih_l0", "closed.weight_hh_l0"):
        assert located[name].closed == [("closed", net.closed)]
        assert not located[name].uses


@both_captures
def test_a_tied_weight_is_one_with_all_its_names_and_the_uses_of_both(how):
    net = dr.capture(Tied(), (torch.zeros(2, 3, dtype=torch.int64),), how=how)
    found = locate(net)["embed.weight"]
    assert found.names == ["embed.weight", "head.weight"]
    assert [type(use.op) for use in found.uses] == [EmbeddingOp, LinearOp]
    assert [use.own_bias for use in found.uses] == [True, True]


def test_the_views_between_a_weight_and_its_product_are_followed():
    located = locate(dr.capture(Experts(), how=dr.Capture.SYMBOLIC))
    (gathered,) = located["experts"].uses
    assert str(gathered.at) == "long", "the node that says which matrix each row takes"
    assert [str(view) for view in gathered.views] == ["getitem_1"]
    assert located["heads"].uses[0].at is None


class Written(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        self.a.weight.clamp_(-1, 1)
        return self.b(self.a(x)), self.b.weight


def test_what_writes_to_a_weight_or_gives_it_away_needs_the_parameter_itself():
    located = locate(dr.capture(Written().requires_grad_(False), (X,), how=dr.Capture.EXPORT))
    assert [(each.words, each.writes) for each in located["a.weight"].readers] == [("`clamp_`", True)]
    assert [(each.words, each.writes) for each in located["b.weight"].readers] == [("the output", True)]


class Untraced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.looked, self.raw = nn.Linear(8, 8), nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8))
        self.part = nn.Sequential(nn.Tanh(), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.looked(self.layer(x)) if float(x.detach().sum()) < 1e9 else x
        return self.part(x @ self.raw) * self.looked.weight.norm()


def test_in_code_that_is_not_traced_layers_are_uses_and_the_rest_is_closed_or_read():
    net = dr.capture(Untraced(), (X,), how=dr.Capture.MODULES)
    located = locate(net)
    (layer,) = located["layer.weight"].uses
    assert (layer.op, layer.node, layer.x, layer.bias, layer.region) == (LinearOp(), None, None, None, None)
    assert {name for name, found in located.items() if found.read_outside} == {"looked.weight"}
    assert located["raw"].closed == [("", net)]
    (inside,) = located["part.1.weight"].uses
    assert (inside.holder, str(inside.x)) == ("part.1.weight", "_0")


class Inputs(nn.Module):
    """Linears of one input and of others, and what could not share a factor with any."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.other = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 8)
        self.twice, self.read, self.table = nn.Linear(8, 8), nn.Linear(8, 8), nn.Embedding(4, 8)
        self.tied, self.head = nn.Linear(8, 8), nn.Linear(8, 8)
        self.head.weight = self.tied.weight

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.q(x), self.k(x)], 1).sum(1, keepdim=True) + self.other(torch.tanh(x))
        y = y + self.twice(self.twice(x)) + self.read(x) * self.read.weight.mean() + self.tied(x)
        return y + self.table(torch.zeros_like(x[:, 0]).long())


def test_only_a_plain_linear_that_is_used_once_by_one_name_has_an_input_to_share():
    located = locate(dr.capture(Inputs(), how=dr.Capture.SYMBOLIC))
    inputs = {name: input_of(found) for name, found in located.items()}
    assert inputs["q.weight"] == inputs["k.weight"]
    assert [str(node) for node in inputs["q.weight"]] == ["x"]
    assert [str(node) for node in inputs["other.weight"]] == ["tanh"]
    for name in ("twice.weight", "read.weight", "tied.weight", "table.weight"):
        assert inputs[name] is None, name


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_refused_by_name_and_others_are_not_looked_at(value):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[1].weight[2, 3] = value
    located = locate(dr.capture(model))
    refuse_non_finite(["0.weight"], located)
    with pytest.raises(dr.PlanError, match=r"^1\.weight has non-finite weights, which no factors can stand for: load"):
        refuse_non_finite(["0.weight", "1.weight"], located)
