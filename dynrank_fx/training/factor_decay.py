"""Weight decay of factors: what takes the place of the optimizer's own decay of each of them.

Decaying B and A at λ decays W = BA at about 2λ, and pulls the factors towards equal norms. Half of it on each decays W
at λ, to first order. Decaying the product, that is λ/2 · ‖BA‖_F² with the gradients λ B AAᵀ and λ BᵀB A, does to W what
λ/2 · ‖W‖_F² does (Frobenius decay, with spectral initialisation: arXiv 2105.01029, arXiv 2305.02538).
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import ASGD, SGD, Adafactor, Adagrad, Adam, Adamax, AdamW, Muon, NAdam, Optimizer, RAdam, RMSprop

from ..aliases import Args, Group, Kwargs
from ..checks import names_of
from ..errors import TransitionError
from ..layouts import TwoFactors
from ..phase import Phase
from ..phases import Optimizers, optimizers_in
from ..processes import is_part, part_as, whole
from ..rewrite import Switched, holds_captured, switched_modules
from ..tracing import unwrap
from .around_steps import AroundSteps, if_stepped


class Decay(enum.Enum):
    """What decays where a site trains its factors. The rate is that of the factors' parameter group.

    Attributes:
        EACH: Each factor, as the optimizer does: the product W then decays at about k times the rate, for k factors.
        HALVED: Each factor at the rate over the number of factors, half of it for two, so that W decays at the rate to
            first order.
        PRODUCT: The product of the factors, as a dense weight would (Frobenius decay, arXiv 2105.01029).
    """

    EACH = "each factor, as the optimizer does"
    HALVED = "each factor, by its share: half of it for two"
    PRODUCT = "the product of the factors"


# Adam, NAdam and RAdam say so in their groups.
_DECOUPLED = (AdamW, Adafactor, Muon)
_COUPLED = (SGD, Adam, NAdam, RAdam, Adagrad, Adamax, ASGD, RMSprop)


class FactorDecay(AroundSteps):
    """The hooks of ``factor_decay_``; ``remove()``, or the end of a ``with`` block, takes them off.

    Args:
        net: What ``transform`` made.
        optimizers: The optimizers over its parameters.
        decay: What decays.
        decoupled: Whether the optimizer decays weights beside its step; None where that is known of it.
    """

    def __init__(self, net: nn.Module, optimizers: Sequence[Optimizer], decay: Decay, decoupled: bool | None) -> None:
        self.decay, self.decoupled = decay, decoupled
        self._sites = [modules[0] for modules in switched_modules(net).values()]
        self._pending: list[tuple[Parameter, Group, float, Tensor]] = []
        super().__init__(optimizers if decay is not Decay.EACH else ())

    def _before(self, optimizer: Optimizer, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        self._pending = []
        corrections = self._corrections(optimizer)
        coupled = [row for row in corrections if not decays_beside_its_step(optimizer, row[1], self.decoupled)]
        for parameter, group, difference in corrections:
            if decays_beside_its_step(optimizer, group, self.decoupled):
                self._pending.append((parameter, group, group["lr"], difference))
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None or not coupled:
            _add_to_gradients(optimizer, coupled)
            return None

        def closure_then_decay() -> object:
            loss = closure()
            _add_to_gradients(optimizer, coupled)
            return loss

        return (args[:1], {**kwargs, "closure": closure_then_decay})

    def _after(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        with torch.no_grad():
            for parameter, group, before, difference in self._pending:
                if parameter.grad is not None:
                    # A re-warm-up lowers the rate within the step, and may do so before this hook or after it.
                    rate = min(before, group["lr"]) * group["weight_decay"]
                    parameter.copy_(if_stepped(optimizer, parameter - difference * rate, parameter))
        self._pending = []

    @torch.no_grad()
    def _corrections(self, optimizer: Optimizer) -> list[tuple[Parameter, Group, Tensor]]:
        """(factor p, its group, D(p) - p), where λ D(p) shall decay in the place of the optimizer's λ p."""
        groups = {
            id(p): group for group in optimizer.param_groups for p in group["params"] if group.get("weight_decay")
        }
        wanted: dict[Parameter, Tensor] = {}
        for site in self._sites:
            factors = site.factors if site.phase == int(Phase.LOW) else ()
            if not any(id(factor) in groups for factor in factors):
                continue
            if self.decay is Decay.HALVED:
                wanted |= {factor: factor / len(factors) for factor in factors}  # k factors: k times as fast a decay
                continue
            for factor, more in zip(factors, _decay_of(site), strict=True):
                # A factor that several sites share decays by the sum of theirs.
                wanted[factor] = wanted[factor] + more if factor in wanted else more
        return [(p, groups[id(p)], target - p) for p, target in wanted.items() if id(p) in groups]


def _decay_of(site: Switched) -> tuple[Tensor, ...]:
    """Half the gradients of ‖W‖_F² at the factors: for two, B AAᵀ and BᵀB A. Of factors in parts their parts."""
    layout, factors = site.layout, tuple(whole(factor.detach()) for factor in site.factors)
    if isinstance(layout, TwoFactors):
        B, A = layout.to_matrices(factors)
        decay = layout.from_matrices((B @ (A @ A.mT), (B.mT @ B) @ A), site.shape)
    else:
        decay = layout.pulled_back(factors, layout.join(factors))
    return tuple(part_as(each, p) if is_part(p) else each for each, p in zip(decay, site.factors, strict=True))


def _add_to_gradients(optimizer: Optimizer, rows: list[tuple[Parameter, Group, Tensor]]) -> None:
    # Under a GradScaler a fused optimizer divides the gradients by this itself.
    scale = getattr(optimizer, "grad_scale", None)
    for parameter, group, difference in rows:
        if parameter.grad is not None:
            more = difference * (group["weight_decay"] * (-1 if group.get("maximize") else 1))
            parameter.grad.add_(more if scale is None else more * scale)


def decays_beside_its_step(optimizer: Optimizer, group: Group, said: bool | None = None) -> bool:
    """Whether weights decay beside the step (as in AdamW) and not through the gradient."""
    if said is not None:
        return said
    return bool(group.get("decoupled_weight_decay")) or isinstance(optimizer, _DECOUPLED)


def decays_in_a_known_way(optimizer: Optimizer) -> bool:
    """Whether it is known how this optimizer decays weights: not at all, beside its step, or through the gradient."""
    decays = any(group.get("weight_decay") for group in optimizer.param_groups)
    return not decays or isinstance(optimizer, _COUPLED + _DECOUPLED)


def check_decay_is_known(optimizers: Sequence[Optimizer], decoupled: bool | None) -> None:
    """Raises TransitionError for an optimizer of which it is neither known nor said how it decays weights."""
    for each in optimizers:
        if decoupled is None and not decays_in_a_known_way(each):
            raise TransitionError(
                f"how {type(each).__name__} decays weights is not known: say decoupled=True (beside the step, as "
                "AdamW) or decoupled=False (through the gradient, as SGD)"
            )


def checked_decoupled(decoupled: bool | None) -> bool | None:
    """The value itself. Raises TransitionError for what is none."""
    if decoupled is not None and not isinstance(decoupled, bool):
        raise TransitionError(f"decoupled is {decoupled!r}: give True (as AdamW), False (as SGD) or None")
    return decoupled


def checked_decay(decay: Decay) -> Decay:
    """The value itself. Raises TransitionError for what is none."""
    if not isinstance(decay, Decay):
        raise TransitionError(f"{decay!r} does not say what decays: give one of {names_of(Decay)}")
    return decay


def factor_decay_(
    net: nn.Module, optimizer: Optimizers, decay: Decay = Decay.PRODUCT, *, decoupled: bool | None = None
) -> FactorDecay:
    """Let the product of the factors decay in LOW, at the rate of their parameter group, and not each of them.

    Hooks on ``optimizer.step()`` add what is missing to the optimizer's own decay and take off what is too much, so
    that groups, schedules and switches of phase go on as they are. The decay of the product W = B A at the rate λ has
    the gradients λ B A Aᵀ and λ Bᵀ B A (Frobenius decay, arXiv 2105.01029).

    Args:
        net: What ``transform`` made.
        optimizer: The optimizer over its parameters, or all of them.
        decay: What decays; see ``Decay``.
        decoupled: Whether the optimizer decays weights beside its step, as AdamW does, or through the gradient, as SGD
            does; None for torch's own optimizers, of which it is known.

    Returns:
        The hooks: ``remove()`` takes them off.

    Raises:
        TransitionError: For an optimizer of which it is neither known nor said how it decays weights, for a module that
            ``transform`` did not make, and for a value that is none of these.
    """
    checked_decay(decay)
    checked_decoupled(decoupled)
    if not holds_captured(unwrap(net)):
        raise TransitionError(f"{type(net).__name__} has no factors to decay: give what transform made of it")
    optimizers = optimizers_in(optimizer)
    if decay is not Decay.EACH:
        check_decay_is_known(optimizers, decoupled)
    return FactorDecay(net, optimizers, decay, decoupled)
