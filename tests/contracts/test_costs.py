"""What a plan says that the model costs, against what torch counts and what the model holds.

Ranks are 2 at least: an einsum over an axis of one is multiplied element by element, which torch counts nowhere, and
the plan as the product that it is.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from grid import FULL, LOW, PAIRS, Cell, cells
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dynrank_fx as dr

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


MORE_PRODUCTS = ("products", "attention")  # of one input with another, as attention has them


def counted(model: nn.Module, x: Tensor) -> int:
    """The FLOPs of one run. Attention by its two products: torch does not count the fused kernel of the CPU."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


def held(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@cells(every_day=PAIRS)
def test_flops_and_parameters_of_the_plan_are_those_of_the_models(cell: Cell) -> None:
    model, net, x = cell.model().eval(), cell.net().eval(), cell.inputs()
    plan = dr.plan_of(net)
    assert (plan.total_flops, plan.total_params) == (counted(model, x), held(model))
    assert (counted(net, x), held(net)) == (plan.total_flops, plan.total_params)
    dr.enter_(net, LOW)
    small = dr.truncate(net)
    assert (counted(net, x), held(net)) == (plan.low_flops, plan.low_params)
    assert (counted(small, x), held(small)) == (plan.low_flops, plan.low_params)


@cells(every_day=PAIRS)
def test_flops_and_parameters_of_a_row_are_what_its_site_alone_saves(cell: Cell) -> None:
    net, x = cell.net().eval(), cell.inputs()
    plan = dr.plan_of(net)
    for row in plan.sites:
        dr.enter_(net, {row.site.name: LOW})
        assert counted(net, x) == plan.total_flops - row.site.flops + row.flops
        assert held(net) == plan.total_params - row.site.params + row.params
        dr.enter_(net, FULL)
    if cell.case.name not in MORE_PRODUCTS:
        assert plan.total_flops == sum(row.site.flops for row in plan.sites), "the sites are all that multiplies"


@cells(lambda cell: cell.case.conv and cell.how is dr.Capture.SYMBOLIC)
def test_a_budget_of_flops_is_kept_as_torch_counts_them(cell: Cell) -> None:
    """Once for each layout: how the model became a graph no longer matters where its costs are known."""
    model, x = cell.model().eval(), cell.inputs()
    few = cell.layout is dr.InputLayout and "grouped" in cell.case.name  # so few channels that rank 1 costs 0.63
    share = 0.7 if few else 0.4
    net = dr.transform(
        cell.captured(), (x,), rank=dr.Budget(flops=share), conv_layout=cell.layout, allow_unprofitable=True
    )
    small = dr.truncate(net)
    assert 0 < counted(small, x) <= share * counted(model, x)


class Repeating(nn.Module):
    """Code that is not traced, and runs a part of it twice on inputs of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), Looking())

    def forward(self, x: Tensor) -> Tensor:
        return self.part(torch.cat([self.part(x), x]))


class Looking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) / self.layer.weight.norm()


def test_a_part_that_is_run_twice_costs_what_both_runs_do() -> None:
    model, x = Repeating().eval(), torch.randn(3, 8)
    net = dr.transform(model, (x,), rank=dr.Fixed(2), how=dr.Capture.MODULES)
    plan = dr.plan_of(net)
    assert [len(row.site.uses) for row in plan.sites] == [2, 2]
    assert plan.total_flops == counted(model, x)
    dr.enter_(net, LOW)
    assert plan.low_flops == counted(net, x) == counted(dr.truncate(net), x)
    assert dr.Plan.from_json(plan.to_json()) == plan


class Gathering(nn.Module):
    """One input that every gathered matrix multiplies, from either side."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(3, 8, 8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        chosen = (x[:, 0] > 0).long()
        return x @ self.up[chosen] + self.down[chosen] @ x.mT


@pytest.mark.parametrize("how", [dr.Capture.SYMBOLIC, dr.Capture.EXPORT])
def test_one_input_of_several_gathered_matrices_costs_a_product_with_each(how: dr.Capture) -> None:
    torch.manual_seed(0)
    model, x = Gathering(), torch.randn(8, 8)
    net = dr.transform(model, (x,), rank=dr.Fixed(2), how=how)
    plan = dr.plan_of(net)
    assert plan.total_flops == counted(model, x) == sum(row.site.flops for row in plan.sites)
    dr.enter_(net, LOW)
    assert plan.low_flops == counted(net, x)


@pytest.mark.parametrize(
    "layer",
    [lambda: nn.Linear(8, 8), lambda: nn.Linear(8, 8, bias=False), lambda: Vector()],
    ids=["linear", "linear without bias", "matrix times vector"],
)
def test_a_vector_costs_as_much_as_a_matrix_of_one_row(layer: Callable[[], nn.Module]) -> None:
    """Torch counts nothing for a matrix times a vector."""
    net = dr.transform(nn.Sequential(layer()), (torch.randn(8),), rank=dr.Fixed(2))
    plan = dr.plan_of(net)
    assert plan.total_flops == 2 * 8 * 8
    assert plan.low_flops == 2 * 2 * 8 * 2


class Vector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight @ x
