"""Contract 6: torch.compile makes one graph for each setting and grad mode, then none, and computes what eager does.

Every day on few cells, that have most families of layers, every layout and every capture; `make fuzz` runs the others.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from grid import ADAPTOR, FAMILIES, FULL, LOW, Cell, cells, gradients_of
from torch._dynamo.testing import CompileCounter

import dynrank_fx as dr

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

SLOW = ("products", "attention")  # ten seconds each


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@cells(every_day=[cell for cell in FAMILIES if cell.case.kind not in SLOW])
def test_one_graph_for_each_setting_and_the_function_of_eager(cell: Cell) -> None:
    net, x = cell.net().eval(), cell.inputs()
    counter = CompileCounter()
    compiled = torch.compile(net, fullgraph=True, backend=counter, dynamic=False)
    first, *others = cell.sites
    settings = [{first: phase, **dict.fromkeys(others, FULL)} for phase in (FULL, LOW)]
    settings += [dict.fromkeys(cell.sites, phase) for phase in (LOW, ADAPTOR) if others or phase is ADAPTOR]
    seen = 0
    for again in range(2):
        for setting in settings:
            dr.enter_(net, setting)
            expected = gradients_of(net, x)
            for name, gradient in gradients_of(net, x, compiled).items():
                assert torch.equal(gradient, expected[name]), name
            with torch.no_grad():
                assert torch.equal(compiled(x), net(x))
            seen += 0 if again else 2
            assert counter.frame_count == seen
