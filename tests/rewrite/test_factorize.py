"""Rewriting as text before and after: one node per use while training, ordinary nodes once inlined."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import SharedLinears, randomized
from torch import Tensor, fx, nn

import dynrank_fx as dr
from dynrank_fx.rewrite import Switched, factorize_, switched_modules

CAPTURES = (dr.Capture.SYMBOLIC, dr.Capture.EXPORT)
both_captures = pytest.mark.parametrize("how", CAPTURES, ids=lambda how: how.name)


class Small(nn.Module):
    """A convolution, a linear, and a matrix of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.Linear(8, 6)
        self.w = nn.Parameter(torch.randn(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x)).mean((2, 3))
        return F.linear(self.fc(x), self.w)


X = torch.linspace(-1, 1, 288).reshape(2, 4, 6, 6)


def captured(how: dr.Capture = dr.Capture.SYMBOLIC) -> tuple[Any, dr.Plan]:
    torch.manual_seed(0)
    net = dr.capture(Small(), (X,), how=how)
    return net, dr.make_plan(net, dr.Fixed(2), (X,))


def body(gm: fx.GraphModule) -> list[str]:
    """The lines of ``gm.code`` between the signature and the return, without the deletions at their ends."""
    lines = [line.split(";  ")[0].strip() for line in gm.code.splitlines()]
    return [line for line in lines if line and not line.startswith(("def ", "return "))]


BEFORE = """\
conv = self.conv(x)
relu = torch.relu(conv)
mean = relu.mean((2, 3))
fc = self.fc(mean)
w = self.w
linear = torch._C._nn.linear(fc, w)"""

FACTORIZED = """\
conv = self.conv(x)
relu = torch.relu(conv)
mean = relu.mean((2, 3))
fc = self.fc(mean)
linear_1 = self.w(fc)"""

FULL = """\
conv_bias = self.conv.bias
conv_weight = self.conv.weight
conv2d = torch.conv2d(x, conv_weight, conv_bias, (2, 2), (1, 1), (1, 1), 1)
relu = torch.relu(conv2d)
mean = relu.mean((2, 3))
fc_bias = self.fc.bias
fc_weight = self.fc.weight
linear = torch._C._nn.linear(mean, fc_weight, fc_bias)
w_weight = self.w.weight
linear_2 = torch._C._nn.linear(linear, w_weight, None)"""

LOW = """\
conv_bias = self.conv.bias
conv_right = self.conv.right
conv2d = torch.conv2d(x, conv_right, None, (2, 2), (1, 1), (1, 1), 1)
conv_left = self.conv.left
conv2d_1 = torch.conv2d(conv2d, conv_left, conv_bias, (1, 1), (0, 0), (1, 1), 1)
relu = torch.relu(conv2d_1)
mean = relu.mean((2, 3))
fc_bias = self.fc.bias
fc_right = self.fc.right
linear = torch._C._nn.linear(mean, fc_right, None)
fc_left = self.fc.left
linear_2 = torch._C._nn.linear(linear, fc_left, fc_bias)
w_right = self.w.right
linear_3 = torch._C._nn.linear(linear_2, w_right, None)
w_left = self.w.left
linear_4 = torch._C._nn.linear(linear_3, w_left, None)"""

MIXED = """\
conv = self.conv(x)
relu = torch.relu(conv)
mean = relu.mean((2, 3))
fc_bias = self.fc.bias
fc_right = self.fc.right
linear_1 = torch._C._nn.linear(mean, fc_right, None)
fc_left = self.fc.left
linear_2 = torch._C._nn.linear(linear_1, fc_left, fc_bias)
w = self.w
linear = torch._C._nn.linear(linear_2, w)"""


def test_factorize_makes_one_node_of_every_use_and_inline_opens_them_in_the_present_setting():
    net, plan = captured()
    assert "\n".join(body(net)) == BEFORE
    factored = dr.factorize(net, plan)
    assert "\n".join(body(factored)) == FACTORIZED
    assert "\n".join(body(dr.inline(factored))) == FULL
    dr.enter_(factored, dr.Phase.LOW)
    assert "\n".join(body(factored)) == FACTORIZED, "a phase is a flag, not another graph"
    assert "\n".join(body(dr.inline(factored))) == LOW
    dr.enter_(factored, {"conv*": dr.Phase.FULL})
    assert "\n".join(body(dr.inline(factored))) == "\n".join([*FULL.splitlines()[:5], *LOW.splitlines()[7:]])


def test_a_plan_of_some_sites_leaves_the_other_nodes_as_they_are():
    net, _ = captured()
    only = dr.factorize(net, dr.make_plan(net, dr.Fixed(2), (X,), include=["fc"]))
    dr.enter_(only, dr.Phase.LOW)
    assert "\n".join(body(dr.inline(only))) == MIXED


def calls(gm: fx.GraphModule) -> list[tuple[str, str]]:
    return [(node.op, str(node.target)) for node in gm.graph.nodes if node.op.startswith(("call", "get"))]


def test_an_exported_graph_is_rewritten_alike():
    net, plan = captured(dr.Capture.EXPORT)
    assert ("get_attr", "fc.weight") in calls(net)
    factored = dr.factorize(net, plan)
    relu, mean = ("call_function", "aten.relu.default"), ("call_function", "aten.mean.dim")
    checks = ("aten.sym_size.int", "<built-in function eq>", "<function _assert ")  # of sizes it was exported for
    left = [call for call in calls(factored) if not call[1].startswith(checks)]
    assert left == [("call_module", "conv"), relu, mean, ("call_module", "fc"), ("call_module", "w")]
    dr.enter_(factored, dr.Phase.LOW)
    reads = [target for op, target in calls(dr.inline(factored)) if op == "get_attr"]
    assert sorted(reads) == sorted(name for name, _ in factored.named_parameters())
    assert not [target for op, target in calls(dr.inline(factored)) if op == "call_module"]


@both_captures
def test_the_nodes_keep_their_meta(how):
    net, plan = captured(how)
    for graph in set(net.graphs.values()):
        for node in graph.nodes:
            node.meta["note"] = (node.op, str(node.target))
    factored = dr.factorize(net, plan)
    notes = [node.meta["note"] for node in factored.graph.nodes]
    before = [node.meta["note"] for node in net.graph.nodes if node.op != "get_attr"]
    assert notes == before, "the call that replaces a function or a module has its meta"
    opened = [node.meta.get("note") for node in dr.inline(factored).graph.nodes]
    untouched = [
        note for note in before if "relu" in note[1] or "mean" in note[1] or note[0] in ("placeholder", "output")
    ]
    assert [note for note in opened if note in untouched] == untouched


@both_captures
def test_factorize_leaves_the_given_net_as_it_was(how):
    net, plan = captured(how)
    before = net.code, sorted(net.state_dict()), [type(module) for module in net.modules()], net(X)
    weights = {name: id(p) for name, p in net.named_parameters()}
    factored = dr.factorize(net, plan)
    dr.enter_(factored, dr.Phase.LOW)
    with torch.no_grad():
        for parameter in factored.parameters():
            parameter.zero_()
    assert (net.code, sorted(net.state_dict()), [type(module) for module in net.modules()]) == before[:3]
    assert torch.equal(net(X), before[3])
    assert {name: id(p) for name, p in net.named_parameters()} == weights
    assert "dynrank" not in net.meta
    assert dr.plan_of(factored) == plan


def test_a_plan_that_does_not_fit_raises_and_nothing_is_changed():
    net, plan = captured()
    before = net.code, [type(module) for module in net.modules()]
    other = dr.make_plan(dr.capture(nn.Sequential(nn.Linear(8, 8))), dr.Fixed(2))
    with pytest.raises(dr.PlanError, match=r"factors 0\.weight \(8, 8\), which this net does not have: fit it first"):
        dr.factorize(net, other)
    both = dr.Plan((*plan.sites, *other.sites), plan.skipped, plan.total_params)
    for _ in range(2):
        with pytest.raises(
            dr.PlanError, match=r"factors 0\.weight \(8, 8\), which this net does not have: fit it first"
        ):
            factorize_(net, both)
        assert (net.code, [type(module) for module in net.modules()]) == before
    factorize_(net, plan)
    again = net.code
    with pytest.raises(dr.PlanError):
        factorize_(net, plan)
    assert net.code == again
    assert len(switched_modules(net)) == 3


def test_a_plan_with_a_site_that_must_stay_dense_raises_with_the_reason():
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x), self.fc.weight

    class Plain(Read):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    plan = dr.make_plan(dr.capture(Plain()), dr.Fixed(2))
    with pytest.raises(dr.PlanError, match=r"factors fc\.weight, which must stay dense: the output needs"):
        dr.factorize(dr.capture(Read()), plan)


# Where a weight may stand


class Placed(nn.Module):
    """Weights in a list, in a dictionary, in a block beside other things, and in the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))
        self.listed = nn.ParameterList([nn.Parameter(torch.randn(8, 8)) for _ in range(2)])
        self.named = nn.ParameterDict({"inner": nn.Parameter(torch.randn(8, 8))})
        self.block = nn.Module()
        self.block.w, self.block.b = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))
        self.block.other = self.block.w

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.weight, self.bias)
        for weight in self.listed:
            x = torch.tanh(F.linear(x, weight))
        x = F.linear(x, self.named["inner"])
        return F.linear(F.linear(x, self.block.w, self.block.b), self.block.other)


PLACES = ["weight", "listed.0", "listed.1", "named.inner", "block.w"]


@both_captures
def test_a_weight_may_stand_bare_anywhere_and_keeps_its_name_in_the_state(how):
    torch.manual_seed(0)
    model, x = Placed(), torch.randn(3, 8)
    net = dr.transform(model, (x,), rank=dr.Fixed(2), how=how)
    plan = dr.plan_of(net)
    assert sorted(row.site.name for row in plan.sites) == sorted(PLACES)
    assert {row.site.name: row.site.aliases for row in plan.sites}["block.w"] == ("block.other",)
    for name in PLACES:
        site = net.get_submodule(name)
        assert isinstance(site, Switched)
        assert site.bare
        assert torch.equal(site.weight, model.get_parameter(name))
    assert net.get_submodule("block.other").weight is net.get_submodule("block.w").weight
    assert torch.equal(net(x), model(x))
    assert sorted(net.state_dict()) == sorted(model.state_dict())
    other = Placed()
    net.load_state_dict(other.state_dict())
    assert torch.equal(net(x), other(x))
    model.load_state_dict(net.state_dict())
    assert torch.equal(net(x), model(x))
    dr.enter_(net, dr.Phase.LOW)
    assert net.get_submodule("block.other").left is net.get_submodule("block.w").left
    torch.testing.assert_close(dr.truncate(net)(x), net(x))


@both_captures
def test_aliases_become_one_site_with_a_module_each_and_their_own_biases(how):
    torch.manual_seed(0)
    model, x = randomized(SharedLinears()), torch.randn(3, 10)
    net = dr.transform(model, (x,), rank=dr.Fixed(2), how=how)
    (modules,) = switched_modules(net).values()
    assert [module is net.get_submodule(name) for module, name in zip(modules, ("first", "second"), strict=True)] == [
        True
    ] * 2
    assert modules[0].weight is modules[1].weight
    assert torch.equal(modules[1].bias, model.second.bias)
    assert [target for op, target in calls(net) if op == "call_module"] == ["first", "second"]


class InHalves(nn.Module):
    """Both halves of a weight, each used by itself. name: the parameter's."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.register_parameter(name, nn.Parameter(torch.randn(16, 8)))

    def forward(self, x: Tensor) -> Tensor:
        one, other = getattr(self, self.name).chunk(2)
        return F.linear(x, one) + torch.tanh(F.linear(x, other))


class UnderTwoNames(nn.Module):
    """One module, of which torch.export and torch.fx each prefer another name. called: under which it is."""

    def __init__(self, name: str, called: str) -> None:
        super().__init__()
        self.a = self.b = InHalves(name)
        self.called = called

    def forward(self, x: Tensor) -> Tensor:
        for name in self.called:
            x = getattr(self, name)(x)
        return x


@both_captures
@pytest.mark.parametrize("name", ["weight", "w"])
@pytest.mark.parametrize("called", ["a", "b", "ab"])
def test_parts_of_a_weight_whose_module_has_two_names_are_all_its_sites(how, name, called):
    torch.manual_seed(0)
    model, x = UnderTwoNames(name, called), torch.randn(3, 8)
    net = dr.transform(model, (x,), rank=dr.Fixed(4), how=how, allow_unprofitable=True)
    (modules,) = switched_modules(net).values()
    assert len(modules) == 1
    assert len(modules[0].ops) == 2
    assert torch.equal(net(x), model(x))
    dr.enter_(net, dr.Phase.LOW)
    with torch.no_grad():
        getattr(model.a, name).copy_(modules[0].weight)
    torch.testing.assert_close(net(x), model(x))
    torch.testing.assert_close(dr.truncate(net)(x), model(x))
