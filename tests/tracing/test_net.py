"""Net: the module tree of the model, a graph for each mode, code for each setting, copies that share nothing."""

from __future__ import annotations

import copy
from contextlib import suppress

import pytest
import torch
from capturing import CAPTURES, linears
from models import Modal, randomized
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.tracing import (
    attribute,
    copy_graph,
    drop_dead_reads,
    evaluating,
    forget_meta,
    is_captured,
    meta_of,
    regions,
    set_submodule,
    untraced,
    unwrap,
)
from dynrank_fx.tracing.net import same_modes


def test_where_the_mode_changes_nothing_there_is_one_graph():
    for how in CAPTURES:
        net = dr.capture(linears(), (torch.randn(4, 8),), how=how)
        assert net.graphs[True] is net.graphs[False]


def test_a_copy_is_independent_of_what_was_captured():
    model, x = linears(), torch.randn(4, 8)
    net = dr.capture(model, (x,))
    twin = copy.deepcopy(net)
    before = net(x)
    with torch.no_grad():
        for p in (*model.parameters(), *twin.parameters()):
            p.zero_()
    assert torch.equal(net(x), before)
    assert type(net).__name__ == type(twin).__name__ == "Sequential"
    with pytest.raises(dr.CaptureError, match=r"shallow copy .* use copy\.deepcopy"):
        copy.copy(net)


def test_a_graph_exported_in_one_mode_refuses_the_other_in_words():
    x = torch.randn(4, 4, 6, 6)
    for training, name in ((True, "training"), (False, "evaluation")):
        model = randomized(Modal()).train(training)
        net = dr.transform(torch.export.export(model, (x,)).module(), rank=dr.Fixed(2))
        torch.manual_seed(0)
        expected = model(x)
        torch.manual_seed(0)
        assert torch.equal(net.train(training)(x), expected)
        for each in (net, copy.deepcopy(net)):
            with pytest.raises(
                dr.CaptureError, match=f"exported in {name} mode and cannot leave it: give the nn.Module"
            ):
                each.train(not training)
    without = dr.transform(torch.export.export(linears().eval(), (torch.randn(3, 8),)).module(), rank=dr.Fixed(2))
    assert without.train().training, "no operation of it depends on the mode"


class Rich(nn.Module):
    """Names that a plain GraphModule would lose: an alias, a layer that nothing uses, a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.again, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(2, 2)
        self.again.weight = self.fc.weight
        self.register_buffer("kept", torch.ones(4))
        self.register_buffer("passing", torch.ones(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.fc(x)) * 2.0 if self.training else self.again(self.fc(x))


def rich() -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = Rich(), torch.randn(3, 4)
    return dr.capture(model, (x,), how=dr.Capture.SYMBOLIC), model, x


def test_the_whole_state_is_kept_with_its_names_order_and_ties():
    net, model, x = rich()
    for each in (net, copy.deepcopy(net)):
        assert list(each.state_dict()) == list(model.state_dict())
        assert each.again.weight is each.fc.weight
        assert [name for name, _ in each.named_buffers()] == ["kept", "passing"]
    other = Rich()
    net.load_state_dict(other.state_dict())
    assert torch.equal(net(x), other(x))


def test_a_setting_seen_before_runs_the_code_object_that_it_had():
    net, model, x = rich()
    seen = {}
    for setting in ("one", "two"):
        for mode in (True, False):
            net.train(mode).specialize(setting)
            seen[setting, mode] = type(net).forward.__code__
    assert len({id(code) for code in seen.values()}) == 4
    for (setting, mode), code in reversed(seen.items()):
        net.train(mode).specialize(setting)
        assert type(net).forward.__code__ is code
        assert torch.equal(net(x), model.train(mode)(x))
    net.refresh()
    assert type(net).forward.__code__ is not seen["one", True], "after a rewrite all code is generated anew"


def test_modes_are_put_back_after_an_error_and_the_graph_of_the_mode_runs():
    net, model, x = rich()
    net.unused.eval()
    expected = net(x)
    with suppress(KeyError), same_modes(net):
        net.eval()
        assert torch.equal(net(x), model.eval()(x))
        raise KeyError
    assert (net.training, net.unused.training, net.fc.training) == (True, False, True)
    assert torch.equal(net(x), expected)
    with evaluating(net):
        assert not any(module.training for module in net.modules())
    assert torch.equal(net(x), expected)
    fixed = dr.capture(torch.export.export(nn.Sequential(nn.BatchNorm1d(4)).train(), (x,)).module())
    with evaluating(fixed):
        assert fixed.training, "a graph exported in one mode stays in it"


def test_a_copied_graph_is_independent_and_computes_the_same():
    graph = torch.fx.symbolic_trace(linears()).graph
    code, twin = graph.python_code("self").src, copy_graph(graph)
    assert twin.python_code("self").src == code
    twin.erase_node(next(iter(reversed(twin.nodes))))
    assert graph.python_code("self").src == code


def test_reads_that_nothing_uses_are_dropped_and_updates_in_place_stay():
    graph = torch.fx.Graph()
    x, kept = graph.placeholder("x"), graph.get_attr("kept")
    view = graph.call_method("t", (graph.get_attr("w"),))
    graph.call_method("add_", (graph.get_attr("calls"), 1))
    graph.output(graph.call_function(torch.mul, (x, kept)))
    drop_dead_reads(graph, {view})
    assert [(node.op, str(node.target)) for node in graph.nodes] == [
        ("placeholder", "x"),
        ("get_attr", "kept"),
        ("get_attr", "calls"),
        ("call_method", "add_"),
        ("call_function", str(torch.mul)),
        ("output", "output"),
    ]


def test_a_submodule_is_put_under_a_name_that_is_no_identifier():
    net, layer = nn.Sequential(nn.ModuleDict({"a-b": nn.Linear(2, 2)})), nn.Tanh()
    set_submodule(net, "0.a-b", layer)
    assert net[0]["a-b"] is layer
    assert attribute(net, "0") is net[0]


class Partly(nn.Module):
    """Code that branches on data around a block that can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x)) if float(x.detach().sum()) < 1e9 else x


def test_the_captured_parts_are_found_with_their_names_and_so_is_what_lies_around_them():
    x = torch.randn(3, 4)
    net, whole = dr.capture(Partly(), (x,), how=dr.Capture.MODULES), rich()[0]
    (part,) = regions(net)
    assert part.net is net.block
    assert part.full("0.weight") == "block.0.weight"
    assert [name for name, _ in untraced(net)] == ["", "head"]
    (one,) = regions(whole)
    assert (one.net, one.full("fc.weight")) == (whole, "fc.weight")
    assert list(untraced(whole)) == []


def test_what_is_known_of_a_net_survives_copies_and_can_be_forgotten():
    net = dr.capture(Partly(), (torch.randn(3, 4),), how=dr.Capture.MODULES)
    for captured in (net, rich()[0]):
        meta_of(captured)["note"] = [1]
        twin = copy.deepcopy(captured)
        assert meta_of(twin)["note"] == [1]
        assert meta_of(twin)["note"] is not meta_of(captured)["note"]
        assert is_captured(twin)
    forget_meta(net)
    assert not is_captured(net)
    assert not is_captured(Partly())
    compiled = torch.compile(net, backend="eager")
    assert unwrap(compiled) is unwrap(net) is net


class Labelled(nn.Module):
    """An optional argument, as the labels of a language model are."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        y = self.fc(x) if mask is None else self.fc(x) * mask
        return y if labels is None else (y - labels).square().sum()


@pytest.mark.parametrize(
    ("args", "names", "wrong"),
    [
        (1, ("labels",), "has no argument `labels`"),
        (1, ("labels", "lables"), "has no argument `labels`, `lables`"),
        (0, ("mask",), r"cannot be called so \(missing a required argument: 'x'\)"),
        (3, (), r"cannot be called so \(too many positional arguments\)"),
        (1, ("x", "mask"), r"cannot be called so \(multiple values for argument 'x'\)"),
    ],
)
def test_arguments_that_a_graph_does_not_take_are_named_with_those_that_it_takes(args, names, wrong):
    x = torch.randn(3, 4)
    net = dr.capture(Labelled(), {"x": x, "mask": x}, how=dr.Capture.EXPORT)
    sentence = (
        rf"^the graph of Labelled {wrong}; its arguments are x, mask: to give others, transform with those in "
        r"example_inputs, or with form=dr\.Form\.LAYERS$"
    )
    for each in (net, copy.deepcopy(net)):
        with pytest.raises(TypeError, match=sentence):
            each(*[x] * args, **dict.fromkeys(names, x))
    with_them = dr.capture(Labelled(), {"x": x, "mask": x, "labels": x}, how=dr.Capture.EXPORT)
    assert with_them(x, x, labels=x).shape == ()


def test_a_type_error_from_within_a_graph_stays_what_it_is():
    net = dr.capture(linears(), (torch.randn(4, 8),), how=dr.Capture.SYMBOLIC)
    with pytest.raises(TypeError, match="must be Tensor, not list"):
        net([1.0])
