"""The work of every step grows with the number of sites and not with its square: calls are counted, not seconds."""

from __future__ import annotations

import cProfile
import gc
import pstats
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynrank_fx as dr

pytestmark = pytest.mark.filterwarnings("ignore::dynrank_fx.DynrankWarning")

LOW, FULL = dr.Phase.LOW, dr.Phase.FULL
FEW, MOST = 150, 2.3  # calls that do not count, and the share allowed at twice the sites
Counts = dict[tuple[str, int, str], int]


class Attention(nn.Module):
    """Three weights that read one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.q(x) + self.k(x) * self.v(x))


# With how many blocks.
MODELS: dict[str, tuple[Callable[[], Iterable[nn.Module]], dict[str, Any], int]] = {
    "graph": (lambda: (nn.Linear(8, 8), nn.Tanh()), {}, 8),
    "layers": (lambda: (nn.Linear(8, 8), nn.Tanh()), {"form": dr.Form.LAYERS}, 8),
    "shared": (lambda: (Attention(),), {"share_inputs": True}, 4),
}


def counted(block: Callable[[], Iterable[nn.Module]], options: dict[str, Any], blocks: int) -> dict[str, Counts]:
    """By step, the calls of each function for a model of so many blocks."""
    counts: dict[str, Counts] = {}

    def count(name: str, step: Callable[[], Any]) -> Any:
        gc.collect()  # what was before must not be freed within the step
        profile = cProfile.Profile()
        result = profile.runcall(step)
        stats: dict[Any, Any] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
        counts[name] = {function: calls for function, (_, calls, *_) in stats.items()}
        return result

    torch.manual_seed(0)
    x, model = torch.randn(4, 8), nn.Sequential(*[layer for _ in range(blocks) for layer in block()])
    net = count("transform", lambda: dr.transform(model, (x,), rank=dr.Fixed(1), allow_unprofitable=True, **options))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    net(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    count("enter LOW", lambda: dr.enter_(net, LOW, optimizer))
    count("truncate in LOW", lambda: dr.truncate(net))
    with tempfile.TemporaryDirectory() as folder:
        count("save", lambda: dr.save(net, f"{folder}/net"))
        count("load", lambda: dr.load(f"{folder}/net", model, (x,)))
    two = dr.plan_of(net).with_ranks({row.site.name: 2 for row in dr.plan_of(net).sites})
    count("replan", lambda: dr.replan_(net, two, optimizer))
    count("enter FULL", lambda: dr.enter_(net, FULL, optimizer))
    count("inline", lambda: dr.inline(net))
    count("truncate", lambda: dr.truncate(net, [(torch.randn(8, 8),)]))
    return counts


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "graph" else pytest.mark.fuzz) for name in MODELS]
)
def test_twice_the_sites_are_twice_the_calls(name: str) -> None:
    block, options, blocks = MODELS[name]
    counted(block, options, 2)  # what is done once in a process
    once, twice = (counted(block, options, count) for count in (blocks, 2 * blocks))
    grown = {
        f"{step}: {function}": (once[step].get(function, 0), calls)
        for step, counts in twice.items()
        for function, calls in counts.items()
        if calls > FEW and calls > MOST * once[step].get(function, 0)
    }
    assert not grown
    for step, counts in twice.items():
        assert sum(counts.values()) < MOST * sum(once[step].values()), step
