"""What the tests of switches share: a chain of linears, an optimizer that has stepped, and a look at both."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.rewrite import switched_modules


def chain(layers: int = 3, width: int = 16) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    return dr.transform(model, (torch.randn(2, width),))


def trained(net: nn.Module) -> torch.optim.Optimizer:
    """An AdamW that has stepped, with the sites in two groups."""
    ps = list(net.parameters())
    optimizer = torch.optim.AdamW([{"params": ps[:2], "lr": 1e-3}, {"params": ps[2:], "lr": 1e-2}])
    width = next(iter(switched_modules(net).values()))[0].shape[1]
    net(torch.randn(4, width)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def snapshot(net: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[object, ...]:
    values = {name: t.clone() for name, t in net.state_dict().items()}
    held = copy.deepcopy(optimizer.state_dict())
    held["state"] = dict(sorted(held["state"].items()))  # the order of states means nothing
    return values, held, dr.phases_of(net)


def assert_same(net: nn.Module, optimizer: torch.optim.Optimizer, before: tuple[object, ...]) -> None:
    after = snapshot(net, optimizer)
    for mine, theirs in zip(
        torch.utils._pytree.tree_leaves(after), torch.utils._pytree.tree_leaves(before), strict=True
    ):
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in net.parameters()}


class Pair(nn.Module):
    """Two layers that read one input, and may share a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x)[:, :12] * self.b(x)
