"""The grid of the contracts: every op (a case of ``models``) × every layout that serves it × every capture.

A model is captured once for each case, capture and dtype, and transformed once for each cell; tests get copies.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from models import ATTENTION, CASES, Case, randomized
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.layouts import CONV_LAYOUTS, ConvLayout

FULL, LOW, ADAPTOR = dr.Phase
# torch.fx leaves nn.MultiheadAttention closed: the other captures open it.
CASES_OF = {
    dr.Capture.SYMBOLIC: CASES,
    dr.Capture.EXPORT: (*CASES, ATTENTION),
    dr.Capture.MODULES: (*CASES, ATTENTION),
}


class Whole(nn.Module):
    """A model as the only part of another, as module by module takes it where its own code reads its weights."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@dataclass(frozen=True)
class Cell:
    """One place of the grid, with what the tests want of it. Everything is the same in every call."""

    case: Case
    layout: ConvLayout
    how: dr.Capture

    def __str__(self) -> str:
        return "-".join((self.case.name, *([self.layout.name] if self.case.conv else []), self.how.name))

    @property
    def inside(self) -> bool:
        """Whether the case's model is a part of another one."""
        return self.case.bare and self.how is dr.Capture.MODULES

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of the sites that the net must have."""
        return tuple(f"inner.{name}" if self.inside else name for name in self.case.sites)

    def model(self, dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0) -> nn.Module:
        """The original, in training mode."""
        torch.manual_seed(seed)
        model = randomized(self.case.model(), seed).to(device, dtype)
        return Whole(model) if self.inside else model

    def inputs(self, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
        """The example."""
        torch.manual_seed(1)
        return _cast(self.case.inputs(), dtype, device)

    def other_inputs(self, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
        """Inputs of other sizes."""
        torch.manual_seed(2)
        return _cast(self.case.other_inputs(), dtype, device)

    def captured(self, dtype: torch.dtype = torch.float64, device: str = "cpu") -> nn.Module:
        """The model as a graph, not to be changed."""
        return _captured(self.case, self.how, dtype, device)

    def net(self, ratio: float = 0.5, dtype: torch.dtype = torch.float64, device: str = "cpu") -> nn.Module:
        """The transformed model, in FULL and in training mode; at ratio 1 of full rank."""
        return copy.deepcopy(_transformed(self, ratio, dtype, device))


def _cast(x: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    return x.to(device, dtype if x.is_floating_point() else x.dtype)


@functools.cache
def _captured(case: Case, how: dr.Capture, dtype: torch.dtype, device: str) -> nn.Module:
    cell = Cell(case, CONV_LAYOUTS[0], how)
    return dr.capture(cell.model(dtype, device), (cell.inputs(dtype, device),), how=how)


@functools.cache
def _transformed(cell: Cell, ratio: float, dtype: torch.dtype, device: str) -> nn.Module:
    captured, x = cell.captured(dtype, device), cell.inputs(dtype, device)
    return dr.transform(captured, (x,), rank=dr.Ratio(ratio), conv_layout=cell.layout, allow_unprofitable=True)


def layouts_of(case: Case) -> tuple[ConvLayout, ...]:
    """Those that serve the case. What is no convolution has the one layout of its op, whichever is asked for.

    Tucker and CP are of ordinary convolutions: one in groups would have a core for each, a transposed one has its
    channels the other way round. CP has two factors for two axes of the kernel, no more and no fewer. The others take
    the channel layout, which ``test_plans`` holds.
    """
    if not case.conv:
        return CONV_LAYOUTS[:1]
    left_out = {dr.TuckerLayout: case.plain == 0, dr.CPLayout: case.plain != 2}
    return tuple(layout for layout in CONV_LAYOUTS if not left_out.get(layout, False))


CELLS = tuple(
    Cell(case, layout, how) for how, cases in CASES_OF.items() for case in cases for layout in layouts_of(case)
)


def cells(which: Callable[[Cell], bool] = lambda cell: True, every_day: Sequence[Cell] | None = None) -> Any:
    """The decorator of a test of ``cell``. which: a rule that leaves cells out, its reason said where it is given.
    every_day: the cells that every test run takes, by default LAYOUTS; the others are for ``make fuzz``.
    """
    chosen = [
        pytest.param(cell, id=str(cell), marks=() if cell in (every_day or LAYOUTS) else pytest.mark.fuzz)
        for cell in CELLS
        if which(cell)
    ]
    return pytest.mark.parametrize("cell", chosen)


def covering(features: Callable[[Cell], set[Hashable]]) -> tuple[Cell, ...]:
    """Few cells that have every feature that any cell has: always the one with most of those that are missing."""
    missing, kept = set[Hashable]().union(*map(features, CELLS)), []
    while missing:
        kept.append(max(CELLS, key=lambda cell: len(missing & features(cell))))
        missing -= features(kept[-1])
    return tuple(kept)


# What the tests of every day run on, where the whole grid would take too long; `make fuzz` runs the rest of it.
# Every case in every layout of it: for what the net computes.
LAYOUTS = covering(
    lambda cell: {(cell.case.name, cell.layout), (cell.case.kind, cell.how), (cell.layout, cell.how)},
)
# Every case, and every kind of layer in every layout of it and under every capture: for what happens to weights.
PAIRS = covering(
    lambda cell: {
        cell.case.name,
        (cell.case.kind, cell.layout),
        (cell.case.kind, cell.how),
        (cell.layout, cell.how),
    },
)
# Every case under every capture: for names, whatever the layout.
CAPTURES = covering(lambda cell: {(cell.case.name, cell.how), (cell.layout, cell.how)})
# Every kind of layer, every layout and every capture: for what is the same whatever the case.
KINDS = covering(lambda cell: {cell.case.kind, cell.layout, cell.how})
# Every family of layers, every layout and every capture: for what takes a second a cell. The family of Conv1d, Conv2d,
# Conv3d, in groups or not, is Conv.
FAMILIES = covering(lambda cell: {cell.case.kind.partition(" ")[0].rstrip("123d"), cell.layout, cell.how})


def seeded(model: nn.Module, x: Tensor) -> Tensor:
    """The output, with the same dropout in every call."""
    torch.manual_seed(7)
    return model(x)


def gradients_of(net: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """One step's gradients, none of which is left behind. run: what runs in the net's place, over its parameters."""
    net.zero_grad()
    (net if run is None else run)(x).square().mean().backward()
    found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    return found


@contextmanager
def fast_path(enabled: bool) -> Iterator[None]:
    """torch's attention fast path on or off."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
