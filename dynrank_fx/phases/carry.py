"""Optimizer state across a change of parameters.

Whatever is linear in the gradients (momentum, first moments) maps exactly, as gradients do (see ``layouts.moments``).
Whatever is quadratic in them (second moments) maps only roughly, so it is mapped bias-corrected and kept at m² or more
where there is a first moment m: no first step is then longer than the learning rate. The step counter goes along.
"""

from __future__ import annotations

import enum
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from ..aliases import Group
from ..checks import names_of
from ..errors import DynrankWarning, TransitionError
from ..layouts import Factors, Layout, at_least_float32
from .groups import State, group_of


class Carry(enum.Enum):
    """What happens to the optimizer state of replaced parameters.

    Attributes:
        MOVE: It is moved into the new coordinates for optimizers whose state is known: SGD, Muon, Lion, Adam, AdamW,
            NAdam, RAdam, Adamax, Adagrad, Adafactor, and RMSprop without momentum. It is reset for others.
        RESET: First and second moments and the step counter start anew.
    """

    MOVE = "moved into the new coordinates where the optimizer's state is known, reset otherwise"
    RESET = "first and second moments and the step counter start anew"


def checked_carry(carry: Carry) -> Carry:
    """The value itself. Raises TransitionError for what is none."""
    if not isinstance(carry, Carry):
        raise TransitionError(f"{carry!r} does not say what becomes of optimizer state: give one of {names_of(Carry)}")
    return carry


@dataclass(frozen=True)
class _Kept:
    """What an optimizer keeps of every entry of a parameter, by its names in the optimizer's state.

    first: linear in the gradients. second: quadratic in them. most: the largest second so far. size: as ``second``, but
    its root. means: of a second moment, the means over the columns and over the rows, of whose product it is. counters:
    what is kept once for a parameter.
    """

    first: str = ""
    second: str = ""
    most: str = ""
    size: str = ""
    means: tuple[str, ...] = ()
    counters: tuple[str, ...] = ()

    @property
    def names(self) -> set[str]:
        return {self.first, self.second, self.most, self.size, *self.means, *self.counters} - {""}

    def read(self, state: State) -> State:
        """A state as ``first``, ``second`` and ``most`` in the shape of the parameter, and counters."""
        if not state or any(state.get(name) is None for name in self.names - {self.most}):
            return {}
        read = {name: state[name] for name in self.counters}
        if self.first:
            read["first"] = state[self.first]
        if self.second:
            read["second"] = state[self.second]
        if self.size:
            read["second"] = state[self.size].square()
        if self.means:
            rows, columns = (state[name] for name in self.means)
            read["second"] = rows * columns / rows.mean(-2, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
        if self.most in state:
            read["most"] = state[self.most]
        return read

    def written(self, read: State) -> State:
        """The inverse of ``read``."""
        if not read:
            return {}
        state = {name: read[name] for name in self.counters}
        if self.first:
            state[self.first] = read["first"]
        if self.second:
            state[self.second] = read["second"]
        if self.size:
            state[self.size] = read["second"].sqrt()
        if self.means:
            state |= dict(zip(self.means, (read["second"].mean(axis, keepdim=True) for axis in (-1, -2)), strict=True))
        if "most" in read:
            state[self.most] = read["most"]
        return state


_MOMENTUM = _Kept(first="momentum_buffer")
_ADAM = _Kept(first="exp_avg", second="exp_avg_sq", most="max_exp_avg_sq", counters=("step",))
# By the name of the class, or of one that it derives from: Lion is in many packages. What keeps anything else, or has
# momentum of steps and not of gradients (RMSprop), is reset.
_KNOWN = {
    "SGD": _MOMENTUM,
    "Muon": _MOMENTUM,
    "Lion": _Kept(first="exp_avg"),
    "Adam": _ADAM,
    "AdamW": _ADAM,
    "RAdam": _ADAM,
    "NAdam": _Kept(first="exp_avg", second="exp_avg_sq", counters=("step", "mu_product")),
    "Adamax": _Kept(first="exp_avg", size="exp_inf", counters=("step",)),
    "RMSprop": _Kept(second="square_avg", counters=("step",)),
    "Adagrad": _Kept(second="sum", counters=("step",)),
    "Adafactor": _Kept(means=("row_var", "col_var"), counters=("step",)),
}


def _kept_by(optimizer: Optimizer) -> _Kept | None:
    return next((_KNOWN[kind.__name__] for kind in type(optimizer).__mro__ if kind.__name__ in _KNOWN), None)


def can_move(optimizer: Optimizer, parameters: Sequence[Parameter]) -> bool:
    """Whether what this optimizer keeps of these parameters is of kinds that ``moved_*`` understands."""
    kept = _kept_by(optimizer)
    return kept is not None and all(set(optimizer.state.get(p, {})) <= kept.names for p in parameters)


def warn_reset(optimizer: Optimizer) -> None:
    """Say once per switch that state could not be moved."""
    warnings.warn(
        f"the state of {type(optimizer).__name__} is not one that can be moved between a weight and its factors: "
        f"it is reset for the replaced parameters ({', '.join(_KNOWN)} are moved, RMSprop without momentum)",
        DynrankWarning,
        stacklevel=4,
    )


def read_states(optimizer: Optimizer, parameters: Sequence[Parameter]) -> list[State]:
    """What the optimizer keeps of each, in the words of ``moved_*``; empty where it keeps nothing yet."""
    kept = _kept_by(optimizer)
    return [kept.read(optimizer.state.get(p, {})) if kept is not None else {} for p in parameters]


def written_states(optimizer: Optimizer, states: Sequence[State]) -> list[State]:
    """The inverse: as the optimizer keeps it."""
    kept = _kept_by(optimizer)
    return [kept.written(state) if kept is not None else {} for state in states]


def moved_to_factors(
    optimizer: Optimizer, weights: Sequence[Parameter], factors: Factors, layout: Layout
) -> list[State]:
    """Moments at the factors from those at the dense weight, or at several stacked; empty ones where there are none."""
    state, group = stacked_state(read_states(optimizer, weights)), group_of(optimizer, weights[0])
    if not state or group is None:
        return [{} for _ in factors]
    exact = _exact(factors)
    squares = tuple(factor.square() for factor in exact)
    return _moved(
        optimizer,
        group,
        [state],
        first=lambda M: layout.pulled_back(exact, M[0].to(exact[0].dtype)),
        second=lambda V: layout.pulled_back(squares, V[0].to(exact[0].dtype)),
        like=factors,
    )


def moved_to_dense(
    optimizer: Optimizer, lefts: Sequence[Parameter], others: Sequence[Parameter], weight: Tensor, layout: Layout
) -> list[State]:
    """The moments at the dense weight from those at its factors; empty ones where a factor has none yet.

    lefts: the first factor, or those of several weights that are stacked in ``weight``. others: the other factors.
    """
    left = stacked_state(read_states(optimizer, lefts))
    states, group = [left, *read_states(optimizer, others)], group_of(optimizer, lefts[0])
    if group is None or not all(states):
        return [{}]
    exact = _exact((torch.cat([*lefts]) if len(lefts) > 1 else lefts[0], *others))

    def moments(values: Sequence[Tensor]) -> Factors:
        return tuple(value.to(exact[0].dtype) for value in values)

    return _moved(
        optimizer,
        group,
        states,
        first=lambda M: (layout.first_moment(exact, moments(M)),),
        second=lambda V: (layout.second_moment(exact, moments(V)),),
        like=(weight,),
    )


def _exact(factors: Factors) -> Factors:
    """The factors in float32 at least."""
    return tuple(at_least_float32(factor.detach()) for factor in factors)


def stacked_state(states: Sequence[State]) -> State:
    """The state of parameters stacked along their first axis; empty where one has none."""
    if len(states) == 1 or not all(states):
        return states[0] if all(states) else {}

    def stacked(values: Sequence[object]) -> object:
        tensors = [value for value in values if isinstance(value, Tensor) and value.ndim]
        return torch.cat(tensors) if len(tensors) == len(values) else values[0]

    return {key: stacked([state[key] for state in states]) for key in states[0]}


def unstacked_state(state: State, sizes: Sequence[int]) -> list[State]:
    """The states of the parts, of these sizes along the first axis, of a stacked parameter."""
    if len(sizes) == 1:
        return [state]
    parts: list[State] = [{} for _ in sizes]
    for key, value in state.items():
        rows = isinstance(value, Tensor) and value.ndim and value.shape[0] == sum(sizes)
        for part, piece in zip(parts, value.split(list(sizes)) if rows else [value] * len(sizes), strict=True):
            part[key] = _clone(piece)
    return parts


_MOMENTS = ("first", "second", "most")

_Map: TypeAlias = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]


@torch.no_grad()
def _moved(
    optimizer: Optimizer,
    group: Group,
    states: list[State],
    *,
    first: _Map,
    second: _Map,
    like: Sequence[Tensor],
) -> list[State]:
    """New states, one for each tensor in ``like``, by what maps first and second moments to them."""

    def done(values: Sequence[Tensor]) -> list[Tensor]:
        return [t.to(p.dtype).contiguous().clone() for t, p in zip(values, like, strict=True)]

    kept = _kept_by(optimizer)
    # The bias of a mean that began at zero: none where the optimizer corrects none, as of sums and largest values.
    beta1, beta2 = (float(beta) for beta in group["betas"]) if "step" in states[0] and "betas" in group else (0.0, 0.0)
    if kept is not None and kept.size:
        beta2 = 0.0
    steps = [float(state.get("step", 1)) for state in states]
    # At step 0 (Adagrad before its first, a fused step that a GradScaler took back) there is nothing to correct.
    correct1, correct2 = ([1 - beta**step or 1.0 for step in steps] for beta in (beta1, beta2))
    new: list[State] = [{key: _clone(value) for key, value in states[0].items() if key not in _MOMENTS} for _ in like]
    m: tuple[Tensor, ...] = ()
    if "first" in states[0]:
        m = first([state["first"] / c for state, c in zip(states, correct1, strict=True)])
        for state, value in zip(new, done([each * correct1[0] for each in m]), strict=True):
            state["first"] = value
    if "second" in states[0]:
        v = second([state["second"] / c for state, c in zip(states, correct2, strict=True)])
        v = tuple(torch.maximum(b, a.square()) for a, b in zip(m, v, strict=True)) if m else v
        for state, value in zip(new, done([each * correct2[0] for each in v]), strict=True):
            state["second"] = value
    if "most" in states[0]:
        largest = done(second([state["most"] for state in states]))
        for state, value in zip(new, largest, strict=True):
            state["most"] = torch.maximum(value, state["second"])
    return new


def _clone(step: object) -> object:
    return step.clone() if isinstance(step, Tensor) else step
