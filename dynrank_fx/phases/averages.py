"""Averages of a net's weights (AveragedModel, ModelEmaV3, a copy): they change phase with the net, in its own bases.

An average of factors, factor by factor, stands for an average of weights only as long as the factors averaged are
alike: B̄ near B and Ā near A. A cut of the averaged weight W̄ by itself has other signs and rotations than that of W, so
that what is averaged from then on would be unlike things. So the average gets factors near the net's: one sweep of
alternating least squares from the net's B and A,

    B̄ = B + (W̄ − B A) Aᵀ (A Aᵀ + λ)⁻¹,        Ā = A + (B̄ᵀ B̄ + λ)⁻¹ B̄ᵀ (W̄ − B̄ A),

a step of subspace iteration, with which ‖W̄ − B̄ Ā‖ is that of the best cut of W̄ to second order in W̄ − W. A little λ
leaves alone the directions that the net's factors hardly have. From LOW to FULL the average is the product of its
averaged factors, so that what it computes does not change. In ADAPTOR its base is W̄ and its branch the net's; whoever
copies buffers from the net (AveragedModel with its defaults) takes the net's base at the next update.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Mapping, Sequence
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import DynrankWarning, TransitionError
from ..layouts import Factors, Layout, TwoFactors
from ..phase import Phase
from ..rewrite import Switched, copies_of, is_written, switched_modules

_AVERAGES = ("AveragedModel", "ModelEmaV2", "ModelEmaV3")  # by name, since timm need not be installed
_TOLD: WeakSet[object] = WeakSet()
_SEARCHED: WeakSet[nn.Module] = WeakSet()  # copies that no average holds: one that is made later has copies of its own
_STEPS = 50  # of conjugate gradients, for one factor of Tucker or CP
_LITTLE = 1e-6  # λ, in parts of the largest entry on the diagonal of A Aᵀ


def averages_in(given: object) -> tuple[object, ...]:
    """The averages in what a caller gave: one, or several in a list."""
    return tuple(given) if isinstance(given, list | tuple) else (given,)


def modules_of(averages: Sequence[object]) -> list[nn.Module]:
    """The modules that hold the averaged weights: what is given, or its ``module``, where that is one."""
    return [module for each in averages if (module := _held(each)) is not None]


def _held(average: object) -> nn.Module | None:
    module = average if isinstance(average, nn.Module) else getattr(average, "module", None)
    return module if isinstance(module, nn.Module) else None


def averages_of(given: object, net: nn.Module) -> list[nn.Module]:
    """The modules that hold the averaged weights: what is given, or its ``module``.

    Raises TransitionError for what is no average of the net, and for one that was left behind at a switch.
    """
    averages = averages_in(given)
    sites = switched_modules(net)
    for average in averages:
        kind, module = type(average).__name__, _held(average)
        if module is None:
            raise TransitionError(
                f"{kind} is no average that a switch could bring along: give the module that holds the averaged "
                "weights, such as an AveragedModel of the net"
            )
        averaged = sites_of_average(module, net)
        if averaged.keys() != sites.keys():
            raise TransitionError(f"the {kind} among the averages has other sites than the net: make it from this net")
        for name, (first, *_) in averaged.items():
            now, its = ((each.phase, each.rank) for each in (sites[name][0], first))
            if now != its:
                raise TransitionError(
                    f"the {kind} among the averages has {name} in {Phase(its[0]).name} at rank {its[1]}, and the net "
                    f"in {Phase(now[0]).name} at rank {now[1]}: it was left out of an earlier switch; give it to all "
                    "of them, enter_(net, ..., averages=[average]), or make it anew from the net"
                )
    return modules_of(averages)


def sites_of_average(average: nn.Module, net: nn.Module) -> dict[str, list[Switched]]:
    """The sites of an average, which may hold the net itself beside its own copy."""
    own = set(net.modules())
    found = {name: [each for each in modules if each not in own] for name, modules in switched_modules(average).items()}
    return {name: modules for name, modules in found.items() if modules}


def warn_of_left_out(net: nn.Module) -> None:
    """Say once of each average that could be the net's, where none was given.

    Only where copies of the net's sites are about, and once for each of them that is not written to, since the search
    for what holds them goes through all objects.
    """
    if _not_searched(net):
        gc.collect(0)  # takes no time, and most copies are of a net that nobody has any more
    if not (copies := _not_searched(net)):
        return
    _SEARCHED.update(copies)
    del copies  # or they would outlive what follows
    left = _left_out(net)
    if left:
        gc.collect()  # a copy that nobody has any more is no average
    for average, told in [(reference(), told) for reference, told in left]:
        if average is not None and average not in _TOLD:
            _TOLD.add(average)
            warnings.warn(
                f"there is {told}, which is not among the averages: if it is of this net, it cannot go on after a "
                "switch without it, and a switch of its own would ruin it; give it to every switch, "
                "enter_(net, ..., averages=[average]), or to Phases",
                DynrankWarning,
                stacklevel=3,
            )


def _left_out(net: nn.Module) -> list[tuple[ref[object], str]]:
    """What could average this net, among all objects, and what each is."""
    objects, left = gc.get_objects(), list[tuple[ref[object], str]]()
    known = [each for each in objects if any(kind.__name__ in _AVERAGES for kind in type(each).__mro__)]
    for average in known:
        if _averages(average, net):
            left.append((ref(average), f"an {type(average).__name__} of a net with the same sites"))
    within = {part for each in known for part in _averaged(each).modules()}
    written = [copy for copy in _copies(net) if is_written(copy) and copy not in within]
    # Not isinstance, which asks objects for their class: of lazy ones that imports modules.
    optimizers = [each for each in objects if issubclass(type(each), Optimizer)] if written else []
    trained = {id(p) for each in optimizers for group in each.param_groups for p in group["params"]}
    for copy in written:
        if not any(id(parameter) in trained for parameter in copy.parameters()):
            left.append((ref(copy), "a copy of a net with the same sites, written to by hand"))
    return left


def _not_searched(net: nn.Module) -> list[Switched]:
    """The copies whose holders are to be looked for: those that are new, and those that are written to by hand."""
    return [copy for copy in _copies(net) if copy not in _SEARCHED or (is_written(copy) and copy not in _TOLD)]


def _copies(net: nn.Module) -> list[Switched]:
    """Of the net's first site, as it is now."""
    (first, *_), *_ = switched_modules(net).values()
    known = set(net.modules())
    return [copy for copy in copies_of(first) if _alike(copy, first) and copy not in known]


def _averaged(average: object) -> nn.Module:
    """What an average of a known class holds."""
    module = getattr(average, "module", None)
    return module if isinstance(module, nn.Module) else nn.Module()


def _averages(average: object, net: nn.Module) -> bool:
    """Whether it could average this net, and is no part of it."""
    module, sites = _averaged(average), switched_modules(net)
    if {average, module} & set(net.modules()):
        return False
    averaged = sites_of_average(module, net)
    return averaged.keys() == sites.keys() and all(_alike(averaged[name][0], sites[name][0]) for name in sites)


def _alike(one: Switched, other: Switched) -> bool:
    mine, its = ((each.phase, each.rank, each.shape, each.layout) for each in (one, other))
    return mine == its


@torch.no_grad()
def near(layout: Layout, factors: Factors, weight: Tensor) -> Factors:
    """Factors of an average, near those of the net, for its dense weight: one sweep of alternating least squares, the
    core of Tucker and the kernels of CP before the outer factors.
    """
    W, exact = weight.double(), tuple(factor.to(weight.device, torch.float64) for factor in factors)
    if isinstance(layout, TwoFactors):
        X, (B, A) = layout.to_matrix(W), layout.to_matrices(exact)
        B = _fitted(X, B, A)
        A = _fitted(X.mT, A.mT, B.mT).mT
        new = layout.from_matrices((B, A), tuple(weight.shape))
    else:
        new = exact
        for index in (*range(1, len(exact) - 1), 0, len(exact) - 1):
            new = _stepped(layout, new, W, index)
    return tuple(factor.to(weight.dtype).contiguous() for factor in new)


def _fitted(W: Tensor, L: Tensor, T: Tensor) -> Tensor:
    """L + (W − L T) Tᵀ (T Tᵀ + λ)⁻¹."""
    gram = T @ T.mT
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    diagonal += _LITTLE * diagonal.amax(-1, keepdim=True).clamp_min(torch.finfo(T.dtype).tiny)
    moved: Tensor = L + torch.linalg.solve(gram, (W - L @ T) @ T.mT, left=False)
    return moved


def _stepped(layout: Layout, factors: Factors, W: Tensor, index: int) -> Factors:
    """The factors with one of them fitted, by conjugate gradients (CGLS) from where it is."""

    def at(factor: Tensor) -> Factors:
        return (*factors[:index], factor, *factors[index + 1 :])

    residual, delta = W - layout.join(factors), torch.zeros_like(factors[index])
    slope = layout.pulled_back(factors, residual)[index]
    direction, size = slope, slope.square().sum()
    enough = _LITTLE**2 * size
    for _ in range(_STEPS):
        if size <= enough:
            break
        image = layout.join(at(direction))
        length = size / image.square().sum()
        delta, residual = delta + length * direction, residual - length * image
        slope = layout.pulled_back(factors, residual)[index]
        direction, size = slope + slope.square().sum() / size * direction, slope.square().sum()
    return at(factors[index] + delta)


@torch.no_grad()
def copy_factors_(net: nn.Module, averages: Sequence[object]) -> None:
    """Averages that begin where the net does: after its factors have been drawn at random."""
    sites: Mapping[str, list[Switched]] = switched_modules(net)
    for average in averages_of(averages, net):
        for name, modules in sites_of_average(average, net).items():
            for key in modules[0].parameter_names:
                mine, its = modules[0]._parameters[key], sites[name][0]._parameters[key]
                assert mine is not None
                assert its is not None
                mine.copy_(its)
