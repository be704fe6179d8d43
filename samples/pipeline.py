"""dynrank-fx among other FX passes: transform a GraphModule, look at the factored operations, hand the graph on."""

from __future__ import annotations

import torch
from torch import fx, nn

import dynrank_fx as dr


def main() -> list[str]:
    """Returns the targets of the calls in the graph of the LOW phase."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 16, 32))
    traced = fx.symbolic_trace(model)  # what a pipeline hands over

    plan = dr.make_plan(dr.capture(traced), dr.Energy(0.9))
    net = dr.transform(traced, plan=plan)
    print(dr.plan_of(net))

    dr.enter_(net, dr.Phase.LOW)
    graph_module = dr.inline(net)  # ordinary FX nodes, for the next pass
    print(graph_module.code)
    x = torch.randn(2, 16, 4, 4)
    torch.testing.assert_close(graph_module(x), net(x))
    return [str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"]


if __name__ == "__main__":
    main()
