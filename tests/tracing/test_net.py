"""Net: the module tree of the model, a graph for each mode, code for each setting, copies that share nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from capturing import CAPTURES, linears
from models import Modal, randomized

import dynrank_fx as dr


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
