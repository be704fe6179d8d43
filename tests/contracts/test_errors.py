"""Contract 3: what a cut to a rank loses of the weight, against singular values and factors that are computed here."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from grid import LOW, PAIRS, Cell, cells
from models import Case
from torch import Tensor

import dynrank_fx as dr
from dynrank_fx.rewrite import switched_modules

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

EPS = torch.finfo(torch.float32).eps
# Weights of einsums as [shared, contracted, free] axes, or the other way round; others are matrices, or stacks of them.
EINSUMS = {("products", "heads"): (1, 6, 8), ("products", "merge"): (1, 8, 6)}


def bounds(cell: Cell, name: str, W: Tensor, rank: int) -> tuple[float, float]:
    """The least error that factors of this rank can have, and the largest that is allowed."""
    if cell.case.conv and W.ndim > 2 and cell.layout is dr.TuckerLayout:
        # The two unfoldings along channels, each to its own number of them: the error of a projection on both bases is
        # at least either tail, and at most their sum (De Lathauwer et al., 2000).
        (m, n), most = W.shape[:2], max(W.shape[:2])
        outputs = tail(W.flatten(1)[None], math.ceil(rank * m / most))
        inputs = tail(W.transpose(0, 1).flatten(1)[None], math.ceil(rank * n / most))
        return max(outputs, inputs), math.hypot(outputs, inputs)
    if cell.case.conv and W.ndim > 2 and cell.layout is dr.CPLayout:
        return tail(W.flatten(1)[None], rank), cp_error(cell.case, rank)
    best = tail(matrices(cell, name, W), rank)
    return best, best


def matrices(cell: Cell, name: str, W: Tensor) -> Tensor:
    """The matrices [g, rows, columns] that the two factors stand for."""
    if W.ndim < 3 or not cell.case.conv:
        return W.reshape(EINSUMS.get((cell.case.name, name), (-1, *W.shape[-2:])))
    module = cell.case.model().get_submodule(name.rpartition(".")[0]) if name.endswith(".weight") else None
    blocks = W.chunk(1 if module is None else module.groups)
    if cell.layout is dr.ChannelLayout:
        return torch.stack([block.flatten(1) for block in blocks])
    if cell.layout is dr.InputLayout:  # rows hold the outputs and the whole kernel
        return torch.stack([block.movedim(1, -1).flatten(0, -2) for block in blocks])
    # Rows hold the outputs and the axes of the kernel after the first; columns the inputs and the first axis.
    return torch.stack([block.movedim((1, 2), (-2, -1)).flatten(-2).flatten(0, -2) for block in blocks])


def tail(stack: Tensor, rank: int) -> float:
    """The norm of the singular values beyond a rank."""
    return float(torch.linalg.svdvals(stack)[:, rank:].square().sum().sqrt())


@functools.cache
def cp_error(case: Case, rank: int) -> float:
    """The error of alternating least squares as anybody would write it, with 3 % for another local minimum than ours:
    as far apart are the ends of several starts.
    """
    cell = Cell(case, dr.CPLayout, dr.Capture.SYMBOLIC)
    weights = dict(cell.model(torch.float32).double().named_parameters())
    W = next(weights[name].detach() for name in cell.sites if weights[name].ndim == 4)
    axes = []
    for axis, size in enumerate(W.shape):
        start = torch.randn(size, rank, generator=torch.Generator().manual_seed(axis), dtype=W.dtype)
        U = torch.linalg.svd(W.movedim(axis, 0).flatten(1), full_matrices=False).U[:, :rank]
        start[:, : U.shape[1]] = U
        axes.append(start)
    return 1.03 * _least_squares(W, axes)


def _least_squares(W: Tensor, axes: list[Tensor], sweeps: int = 60) -> float:
    """W along each axis in turn, solved for on the Khatri-Rao product of the others: the error in the end."""
    for _ in range(sweeps):
        for i in range(4):
            a, b, c = axes[:i] + axes[i + 1 :]
            others = torch.einsum("ar,br,cr->abcr", a, b, c).flatten(0, 2)
            axes[i] = torch.linalg.lstsq(others, W.movedim(i, 0).flatten(1).T, driver="gelsd").solution.T
    return float((torch.einsum("ar,br,cr,dr->abcd", *axes) - W).norm())


@cells(every_day=PAIRS)
@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_a_cut_loses_no_more_than_it_must(cell: Cell, ratio: float) -> None:
    """In float32, as models are. What is lost where nothing must be is rounding: 100 ε ‖W‖."""
    net = cell.net(ratio).float()
    before = {name: modules[0].weight.detach().double() for name, modules in switched_modules(net).items()}
    changes = {change.site: change for change in dr.enter_(net, LOW).changes}
    assert set(before) == set(cell.sites)
    for name, modules in switched_modules(net).items():
        W, rounding = before[name], 100 * EPS * float(before[name].norm())
        error = float((modules[0].weight.detach().double() - W).norm())
        least, most = bounds(cell, name.removeprefix("inner.") if cell.inside else name, W, modules[0].rank)
        assert 0.999 * least - rounding <= error <= 1.001 * most + rounding, name
        assert abs(changes[name].error * float(W.norm()) - error) <= 0.001 * error + rounding
