"""Graphs as plain values: what comes back runs, reads and names the same."""

from __future__ import annotations

import operator
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from dynrank_fx.tracing.pickling import graph_from_data, graph_to_data


class Mixed(nn.Module):
    """Functions of torch's C modules, methods, attributes, slices and nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.scale = nn.Linear(4, 4), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor, shift: float = 2.0) -> dict[str, object]:
        y = torch._C._nn.gelu(self.fc(x)) * self.scale + shift
        return {"y": y.transpose(0, 1)[:2], "parts": (y.chunk(2, dim=1), [operator.neg(y)])}


def exported() -> tuple[nn.Module, fx.Graph]:
    model = Mixed()
    module = torch.export.export(model, (torch.randn(3, 4), 2.0)).module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    return module, module.graph


def traced() -> tuple[nn.Module, fx.Graph]:
    module = fx.symbolic_trace(Mixed())
    return module, module.graph


@pytest.mark.filterwarnings("ignore:.*LeafSpec")  # torch's own
@pytest.mark.parametrize("make", [traced, exported])
def test_a_graph_that_was_pickled_computes_the_same(make: Callable[[], tuple[nn.Module, fx.Graph]]) -> None:
    torch.manual_seed(0)
    root, graph = make()
    again = graph_from_data(pickle.loads(pickle.dumps(graph_to_data(graph))))
    assert again is not graph
    assert [(n.op, n.name, n.target) for n in again.nodes] == [(n.op, n.name, n.target) for n in graph.nodes]
    x = torch.randn(3, 4)
    one, other = (fx.GraphModule(root, each)(x, 2.0) for each in (graph, again))
    assert torch.equal(one["y"], other["y"])
    assert all(map(torch.equal, one["parts"][0], other["parts"][0]))
    assert torch.equal(one["parts"][1][0], other["parts"][1][0])


def test_a_function_that_nobody_can_name_is_kept_as_it_is() -> None:
    graph = fx.Graph()
    graph.output(graph.call_function(lambda a: a, (graph.placeholder("x"),)))
    again = graph_from_data(graph_to_data(graph))
    assert [node.target for node in again.nodes] == [node.target for node in graph.nodes]
