"""Optimizer state across a change of parameters.

First moments map exactly, as gradients do (see ``layouts.moments``). Second moments only roughly, so they are mapped
bias-corrected and kept at m² or more: no first step is then longer than the learning rate. The step counter goes along.
"""

from __future__ import annotations

import enum
import warnings
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Adam, AdamW, Optimizer

from ..aliases import Group
from ..checks import names_of
from ..errors import DynrankWarning, TransitionError
from ..layouts import Factors, Layout, at_least_float32
from .groups import State, group_of


class Carry(enum.Enum):
    """What happens to the optimizer state of replaced parameters.

    Attributes:
        MOVE: It is moved into the new coordinates for SGD, Adam and AdamW, whose state is known, and reset for others.
        RESET: First and second moments and the step counter start anew.
    """

    MOVE = "moved into the new coordinates where the optimizer's state is known, reset otherwise"
    RESET = "first and second moments and the step counter start anew"


def checked_carry(carry: Carry) -> Carry:
    """The value itself. Raises TransitionError for what is none."""
    if not isinstance(carry, Carry):
        raise TransitionError(f"{carry!r} does not say what becomes of optimizer state: give one of {names_of(Carry)}")
    return carry


_KNOWN_STATE: dict[type[Optimizer], set[str]] = {
    SGD: {"momentum_buffer"},
    Adam: {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
    AdamW: {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
}


def can_move(optimizer: Optimizer) -> bool:
    """Whether the state of this optimizer is one that ``moved_*`` understands."""
    known = next((keys for kind, keys in _KNOWN_STATE.items() if isinstance(optimizer, kind)), None)
    return known is not None and all(set(state) <= known for state in optimizer.state.values())


def warn_reset(optimizer: Optimizer) -> None:
    """Say once per switch that state could not be moved."""
    warnings.warn(
        f"the state of {type(optimizer).__name__} is not one that can be moved between a weight and its factors: "
        "it is reset for the replaced parameters (SGD, Adam and AdamW are moved)",
        DynrankWarning,
        stacklevel=4,
    )


def moved_to_factors(
    optimizer: Optimizer, weights: Sequence[Parameter], factors: Factors, layout: Layout
) -> list[State]:
    """States for the factors from that of the dense weight, or of several stacked; empty ones where there is none."""
    state, group = stacked_state([optimizer.state.get(w, {}) for w in weights]), group_of(optimizer, weights[0])
    if not state or group is None:
        return [{} for _ in factors]
    exact = _exact(factors)
    squares = tuple(factor.square() for factor in exact)
    return _moved(
        group,
        [state],
        first=lambda M: layout.pulled_back(exact, M[0].to(exact[0].dtype)),
        second=lambda V: layout.pulled_back(squares, V[0].to(exact[0].dtype)),
        like=factors,
    )


def moved_to_dense(
    optimizer: Optimizer, lefts: Sequence[Parameter], others: Sequence[Parameter], weight: Tensor, layout: Layout
) -> list[State]:
    """The state for the dense weight from those of its factors; an empty one where a factor has none yet.

    lefts: the first factor, or those of several weights that are stacked in ``weight``. others: the other factors.
    """
    left = stacked_state([optimizer.state.get(each, {}) for each in lefts])
    states = [left, *(optimizer.state.get(each, {}) for each in others)]
    group = group_of(optimizer, lefts[0])
    if group is None or not all(states):
        return [{}]
    exact = _exact((torch.cat([*lefts]) if len(lefts) > 1 else lefts[0], *others))

    def moments(values: Sequence[Tensor]) -> Factors:
        return tuple(value.to(exact[0].dtype) for value in values)

    return _moved(
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


_Map: TypeAlias = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]


@torch.no_grad()
def _moved(
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

    if "momentum_buffer" in states[0]:
        buffers = [state["momentum_buffer"] for state in states]
        if any(buffer is None for buffer in buffers):
            return [{} for _ in like]
        return [{"momentum_buffer": buffer} for buffer in done(first(buffers))]

    steps = [float(state["step"]) for state in states]
    beta1, beta2 = (float(beta) for beta in group["betas"])
    correct1, correct2 = ([1 - beta**step for step in steps] for beta in (beta1, beta2))
    m = first([state["exp_avg"] / c for state, c in zip(states, correct1, strict=True)])
    v = second([state["exp_avg_sq"] / c for state, c in zip(states, correct2, strict=True)])
    v = tuple(torch.maximum(b, a.square()) for a, b in zip(m, v, strict=True))
    new: list[State] = [{"step": _clone(states[0]["step"])} for _ in like]
    for key, values in (
        ("exp_avg", [a * correct1[0] for a in m]),
        ("exp_avg_sq", [b * correct2[0] for b in v]),
    ):
        for state, value in zip(new, done(values), strict=True):
            state[key] = value
    if "max_exp_avg_sq" in states[0]:
        largest = done(second([state["max_exp_avg_sq"] for state in states]))
        for state, value in zip(new, largest, strict=True):
            state["max_exp_avg_sq"] = torch.maximum(value, state["exp_avg_sq"])
    return new


def _clone(step: object) -> object:
    return step.clone() if isinstance(step, Tensor) else step
