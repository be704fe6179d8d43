"""Whether a captured net computes what its model computes, on the example inputs and in both modes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.utils import _pytree as pytree
from torch.utils import checkpoint

from ..errors import first_line
from .inputs import fresh, split_inputs
from .isolation import quiet, same_buffers, same_randomness, slow_attention
from .net import Net


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far apart two calls are: as a share of the largest value (infinite where they cannot be compared), and in
    words.
    """

    size: float
    words: str


_NONE = Difference(0.0, "")
# What torch.export may be off by: models choose other, equal ways of computing (masks, say) while they are traced.
ROUNDING = 1e-5


def difference(net: nn.Module, model: nn.Module, example_inputs: Any) -> Difference:
    """Of what the net and its model give, and do to their buffers, in the worse of both modes; none without an example.

    Training is compared under the same random numbers, and only where the model trains on the example at all.
    """
    if example_inputs is None:
        return _NONE
    twin, reference = copy.deepcopy(net), copy.deepcopy(model)
    found = [difference_from(twin, effect(reference, example_inputs, mode=False), example_inputs, mode=False)]
    try:
        expected = effect(reference, example_inputs, mode=True)
    except Exception:  # a batch norm over one row, say: no business of the net
        return found[0]
    found.append(difference_from(twin, expected, example_inputs, mode=True))
    return max(found, key=lambda each: each.size)


def difference_from(net: nn.Module, expected: Effect, example_inputs: Any, *, mode: bool) -> Difference:
    """Of what the net does in one mode from what is expected."""
    where = "in training " if mode else ""
    try:
        got = effect(net, example_inputs, mode=mode)
    except Exception as error:
        return Difference(float("inf"), f"its graph fails {where}on the example inputs: {first_line(error)}.")
    size = apart(expected.output, got.output)
    if size > ROUNDING:
        return Difference(size, f"its graph computes something else {where}on the example inputs.")
    for name in sorted(expected.buffers.keys() | got.buffers.keys()):
        lost = apart(expected.buffers.get(name), got.buffers.get(name))
        if lost > ROUNDING:
            return Difference(lost, f"its graph changes the buffer {name} otherwise {where}on the example inputs.")
        size = max(size, lost)
    if wrong := _wrong_gradient(expected.gradients, got.gradients):
        return Difference(float("inf"), f"its graph gives {wrong} another gradient on the example inputs.")
    return Difference(size, f"its graph rounds otherwise {where}on the example inputs." if size else "")


def _wrong_gradient(expected: dict[str, Tensor], got: dict[str, Tensor]) -> str:
    """The first parameter whose gradient is missing, or off by more than rounding; a small one may be nothing else."""
    for name in sorted(expected.keys() ^ got.keys()):
        return name
    largest = max((_largest(gradient) for gradient in expected.values()), default=0.0)
    for name, gradient in expected.items():
        scale = max(_largest(gradient), 1e-3 * largest)
        if not torch.allclose(got[name], gradient, rtol=0, atol=1e-3 * scale, equal_nan=True):
            return name
    return ""


def _largest(tensor: Tensor) -> float:
    finite = tensor[tensor.isfinite()].abs()
    return float(finite.max()) if finite.numel() else 0.0


@dataclasses.dataclass(frozen=True)
class Effect:
    """What a call gives, the buffers that it changes, by name, as it leaves them, and gradients, if it trains."""

    output: Any
    buffers: dict[str, Tensor]
    gradients: dict[str, Tensor]


def effect(model: nn.Module, example_inputs: Any, *, mode: bool) -> Effect:
    """Of a call in evaluation (False) or training mode; modes and buffers are as before afterwards."""
    with torch.set_grad_enabled(mode), slow_attention(), same_buffers(model), _in_mode(model, mode), quiet():
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        given = run(model, example_inputs)
        after = {name: buffer.detach() for name, buffer in model.named_buffers()}
        both = before.keys() & after.keys()
        changed = {name: after[name].clone() for name in both if apart(before[name], after[name])}
        return Effect(given, changed, _gradients(model, given) if mode else {})


def _gradients(model: nn.Module, given: Any) -> dict[str, Tensor]:
    """Of the sum of squares of what the model gives; none where nothing trains."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    outputs = [tensor for tensor in _tensors(given) if tensor.requires_grad]
    if not parameters or not outputs:
        return {}
    total = torch.stack([tensor.abs().square().sum().double() for tensor in outputs]).sum()
    found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(parameters, found, strict=True) if gradient is not None}


def _tensors(given: Any) -> Iterator[Tensor]:
    """All of them, those in the fields of dataclasses too."""
    for leaf in pytree.tree_leaves(given):
        if isinstance(leaf, Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf):
            yield from _tensors(vars(leaf))


@contextmanager
def _in_mode(model: nn.Module, mode: bool) -> Iterator[None]:
    """The model in this mode; where it is in it already, with the parts that were set apart, such as a batch norm."""
    modes = {module: module.training for module in model.modules()}
    try:
        if not getattr(model, "fixed_mode", False):
            apart = [module for module in modes if module.training != mode] if mode == model.training else []
            model.train(mode)
            for module in apart:
                module.training = not mode
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for module in modes:
            if isinstance(module, Net):
                module.specialize(module.setting)


def run(model: nn.Module, example_inputs: Any, *, grad: bool = False) -> Any:
    """The output, with inputs and random generators left as they are. grad: as from a layer that trains before."""
    args, kwargs = split_inputs(fresh(example_inputs))
    if grad:
        args, kwargs = pytree.tree_map_only(Tensor, _with_grad, (args, kwargs))
    with same_randomness():
        return model(*args, **kwargs)


def _with_grad(tensor: Tensor) -> Tensor:
    return tensor.requires_grad_() * 1 if tensor.is_floating_point() else tensor  # no leaf: it may be written to


def apart(a: Any, b: Any) -> float:
    """The largest difference as a share of the largest value: 0 for the same bits (NaN being NaN), infinite where the
    outputs have other parts, shapes or dtypes.
    """
    leaves_a, leaves_b = pytree.tree_leaves(a), pytree.tree_leaves(b)
    if len(leaves_a) != len(leaves_b):
        return float("inf")
    return max(map(_leaves_apart, leaves_a, leaves_b), default=0.0)


def _leaves_apart(x: Any, y: Any) -> float:
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        x, y = x.detach(), y.detach()
        if x.shape != y.shape or x.dtype != y.dtype:
            return float("inf")
        if bool(((x == y) | (x.isnan() & y.isnan())).all()):
            return 0.0
        if not x.is_floating_point() or not bool((x.isfinite() == y.isfinite()).all()):
            return float("inf")
        sound = x.isfinite() & y.isfinite()
        return float((x - y)[sound].abs().max() / x[sound].abs().max().clamp_min(torch.finfo(x.dtype).tiny))
    if dataclasses.is_dataclass(x) and type(x) is type(y):
        return apart(vars(x), vars(y))
    return 0.0 if bool(x == y) else float("inf")


def lost_in_a_graph(model: nn.Module, example_inputs: Any) -> str:
    """What of a training step a graph of its forward would leave out, as a sentence: an autograd function with a
    backward of its own, whose forward alone is traced, or activation checkpointing. Empty if nothing is, and without
    an example.
    """
    if example_inputs is None:
        return ""
    twin = copy.deepcopy(model)
    if not getattr(twin, "fixed_mode", False):
        twin.train()
    try:
        with torch.enable_grad(), slow_attention(), _noting_checkpoints() as checkpoints:
            given = run(twin, example_inputs, grad=True)
    except Exception:  # what cannot train has no step to lose
        return ""
    if checkpoints:
        return _CHECKPOINTS
    waiting = [tensor.grad_fn for tensor in _tensors(given) if tensor.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if isinstance(node, BackwardCFunction):
            function = type(node)._forward_cls  # type: ignore[attr-defined]
            if function is checkpoint.CheckpointFunction:
                return _CHECKPOINTS
            if not function.__module__.startswith("torch."):
                return f"{function.__name__} has a backward of its own, which a graph leaves out"
        more = [following for following, _ in node.next_functions if following is not None and following not in seen]
        seen.update(more)
        waiting += more
    return ""


_CHECKPOINTS = "torch.utils.checkpoint computes parts of it again in backward, which a graph leaves out"


@contextmanager
def _noting_checkpoints() -> Iterator[list[Any]]:
    """The functions that run under checkpoints inside; those of the reentrant kind show in autograd's graph."""
    noted: list[Any] = []
    generator = checkpoint._checkpoint_without_reentrant_generator

    def note(function: Any, *args: Any, **kwargs: Any) -> Any:
        noted.append(function)
        return generator(function, *args, **kwargs)

    checkpoint._checkpoint_without_reentrant_generator = note  # type: ignore[assignment]
    try:
        yield noted
    finally:
        checkpoint._checkpoint_without_reentrant_generator = generator
