"""Steps of factors, in the measure of the weight that they make up.

A step of B moves W = BA by as much as A is large, and the other way round. An optimizer whose steps have one size
whatever the gradient's (Muon, Adam and their kin) knows nothing of that: as both factors grow, W moves by ever larger
steps, until it bears no more of the learning rate that a dense weight likes. Here each step of a factor is divided by
the largest singular value of the other one, so that it moves W by no more than the step itself is large, in the
spectral norm. Both factors move at once, and an optimizer that goes by shapes sees those of the factors: the rate is
not that of a dense weight, but what it does no longer depends on how large the factors are.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import ASGD, SGD, Optimizer

from ..aliases import Args, Group, Kwargs
from ..checks import names_of
from ..errors import TransitionError
from ..layouts import TwoFactors
from ..phase import Phase
from ..phases import Optimizers, optimizers_in
from ..processes import whole
from ..rewrite import holds_captured, switched_modules
from ..tracing import unwrap
from .around_steps import AroundSteps, if_stepped
from .clock import StepHook
from .factor_decay import FactorDecay, check_decay_is_known, checked_decoupled, decays_beside_its_step

_BY_GRADIENT = (SGD, ASGD)
_SQUARINGS = 5


class Steps(enum.Enum):
    """By how much a factor moves in a step of the optimizer. The rate is that of its parameter group.

    Attributes:
        EACH: As the optimizer does: the product W then moves the more, the larger the other factor is.
        PRODUCT: By that step over the largest singular value of the other factor, where this is above 1; over its
            square, where the step follows the size of the gradient (SGD), which grows with the other factor too. What
            decays through the gradient is part of the step; what decays beside it stays as it is. Factors of Tucker
            and CP move as in ``EACH``.
    """

    EACH = "each factor, as the optimizer does"
    PRODUCT = "in the measure of the product of the factors"


class FactorSteps(AroundSteps):
    """The hooks of ``factor_steps_``; ``remove()``, or the end of a ``with`` block, takes them off.

    Args:
        net: What ``transform`` made.
        optimizers: The optimizers over its parameters.
        steps: By how much factors move.
        decoupled: Whether the optimizer decays weights beside its step; None where that is known of it.
    """

    def __init__(self, net: nn.Module, optimizers: Sequence[Optimizer], steps: Steps, decoupled: bool | None) -> None:
        self.steps, self.decoupled = steps, decoupled
        self._sites = [modules[0] for modules in switched_modules(net).values()]
        self._pending: list[tuple[Parameter, Tensor, Tensor, float, Group]] = []
        super().__init__(optimizers if steps is Steps.PRODUCT else ())

    @torch.no_grad()
    def _before(self, optimizer: Optimizer, args: Args, kwargs: Kwargs) -> None:
        power = 1 if isinstance(optimizer, _BY_GRADIENT) else 0.5  # of the square
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        grams: dict[Parameter, Tensor] = {}
        for site in self._sites:
            layout, factors = site.layout, site.factors if site.phase == int(Phase.LOW) else ()
            if isinstance(layout, TwoFactors) and any(id(factor) in groups for factor in factors):
                for factor, gram in zip(factors, _grams_of_the_other(layout, factors), strict=True):
                    # What several sites share is multiplied with all of their others, one above the other.
                    grams[factor] = grams[factor] + gram if factor in grams else gram
        mine = [factor for factor in grams if id(factor) in groups]
        self._pending = []
        for factor, largest in zip(mine, _largest([grams[factor] for factor in mine]), strict=True):
            group = groups[id(factor)]
            self._pending.append((factor, factor.detach().clone(), largest.clamp(min=1) ** power, group["lr"], group))

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        for factor, before, size, rate, group in self._pending:
            if factor.grad is None:  # which the optimizer left alone
                continue
            # What decays beside the step is of W as it is. A re-warm-up may have lowered the rate meanwhile.
            decay = min(rate, group["lr"]) * group.get("weight_decay", 0)
            beside = decay and decays_beside_its_step(optimizer, group, self.decoupled)
            kept = before * (1 - decay) if beside else before
            factor.copy_(if_stepped(optimizer, kept + (factor - kept) / size, factor))
        self._pending = []


def _grams_of_the_other(layout: TwoFactors, factors: Sequence[Parameter]) -> tuple[Tensor, Tensor]:
    """For each of two factors, A Aᵀ or Bᵀ B of the other, [g, r, r]: its squared singular values are eigenvalues."""
    B, A = layout.to_matrices(tuple(whole(factor.detach()) for factor in factors))
    B, A = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in (B, A))
    return A @ A.mT, B.mT @ B


def _largest(grams: Sequence[Tensor]) -> list[Tensor]:
    """The largest eigenvalue of each of these [g, r, r], as tr(K³²)^(1/32), which is at most r^(1/32) times as large:
    by products alone, for which no device has to wait, and without a state that a resumed run would not have.
    """
    alike: dict[tuple[object, ...], list[int]] = {}
    for i, gram in enumerate(grams):
        alike.setdefault((gram.shape, gram.dtype, gram.device), []).append(i)
    found = dict[int, Tensor]()
    for indices in alike.values():
        powers = torch.stack([grams[i] for i in indices])
        logarithm = powers.new_zeros(())
        for squarings in range(_SQUARINGS + 1):
            if squarings:
                powers = powers @ powers
            trace = powers.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
            trace = trace.clamp(min=torch.finfo(powers.dtype).tiny)
            logarithm = logarithm + trace.log() / 2**squarings
            powers = powers / trace  # which neither vanish nor overflow
        found |= zip(indices, logarithm.exp().amax((1, 2, 3)), strict=True)
    return [found[i] for i in range(len(grams))]


def checked_steps(steps: Steps) -> Steps:
    """The value itself. Raises TransitionError for what is none."""
    if not isinstance(steps, Steps):
        raise TransitionError(f"{steps!r} does not say how far factors move: give one of {names_of(Steps)}")
    return steps


def factor_steps_(
    net: nn.Module, optimizer: Optimizers, steps: Steps = Steps.PRODUCT, *, decoupled: bool | None = None
) -> FactorSteps:
    """Let factors move in LOW in the measure of their product, and not each as the optimizer moves it.

    Hooks on ``optimizer.step()`` shorten what it did, so that groups, schedules and switches of phase go on as they
    are. With it factors bear higher learning rates: look for the best one anew, from twice the old one on. It takes a
    copy of the factors and a few products of r × r matrices a step.

    Args:
        net: What ``transform`` made.
        optimizer: The optimizer over its parameters, or all of them.
        steps: By how much factors move; see ``Steps``.
        decoupled: Whether the optimizer decays weights beside its step, as AdamW does, or through the gradient, as SGD
            does; None for torch's own optimizers, of which it is known.

    Returns:
        The hooks: ``remove()`` takes them off.

    Raises:
        TransitionError: For an optimizer that has such hooks, those of ``factor_decay_`` or a ``Phases`` already, which
            come after these; for one of which it is neither known nor said how it decays weights; for a module that
            ``transform`` did not make, and for a value that is none of these.
    """
    checked_steps(steps)
    checked_decoupled(decoupled)
    if not holds_captured(unwrap(net)):
        raise TransitionError(f"{type(net).__name__} has no factors that move: give what transform made of it")
    optimizers = optimizers_in(optimizer)
    if steps is Steps.PRODUCT:
        check_decay_is_known(optimizers, decoupled)
        for each in optimizers:
            _refuse_earlier_hooks(each)
    return FactorSteps(net, optimizers, steps, decoupled)


def _refuse_earlier_hooks(optimizer: Optimizer) -> None:
    """Raises TransitionError where what has to come after these hooks is there already."""
    todo = {
        FactorSteps: "its steps are shortened already: call remove() of the first",
        FactorDecay: "factor_decay_ comes after factor_steps_, or the decay is shortened too: call them in that order",
        StepHook: "its Phases would switch before a step is shortened: give factor_steps to Phases",
    }
    for hook in optimizer._optimizer_step_post_hooks.values():
        if (sentence := todo.get(type(getattr(hook, "__self__", None)))) is not None:
            raise TransitionError(f"{type(optimizer).__name__}: {sentence}")
