"""Whether a captured net computes what its model computes, on the example inputs and in both modes.

The model runs once in each mode, as a shell of itself, and what it gave is kept for all nets that are tried.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.utils import checkpoint

from ..aliases import Function, Output
from ..errors import first_line
from .gradients import Sketch, sketched_gradients, wrong_gradient
from .inputs import ExampleInputs, fresh, split_inputs
from .isolation import quiet, same_buffers, same_randomness, same_values, slow_attention
from .nested import leaves, mapped
from .net import same_modes, set_mode
from .shell import shell


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


@dataclasses.dataclass(frozen=True)
class Effect:
    """What a call gives, the buffers that it changes, by name, as it leaves them, and sketches of its gradients.

    gradients: none of a call in evaluation mode. inputs_train: the inputs were such as come from a layer that
    trains before.
    """

    output: object
    buffers: dict[str, Tensor]
    gradients: dict[str, Sketch]
    inputs_train: bool = False


class Original:
    """What a model does on the example inputs. It runs when first asked, once in each mode."""

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs | None) -> None:
        self.example_inputs = example_inputs
        self.untrained = ""  # why it does not train on the example, once that has been tried
        self._model = shell(model)
        self._lost: list[str] = []

    @cached_property
    def evaluated(self) -> Effect:
        assert self.example_inputs is not None
        return effect(self._model, self.example_inputs, mode=False)

    @cached_property
    def trained(self) -> Effect | None:
        """None where the model does not train on the example: a batch norm over one row, say. Then ``untrained`` says
        why.
        """
        assert self.example_inputs is not None
        for inputs_train in (True, False):  # some models refuse inputs that need a gradient
            watch = self._watch if inputs_train else None
            try:
                return effect(self._model, self.example_inputs, mode=True, inputs_train=inputs_train, watch=watch)
            except Exception as error:  # of the model's own forward and backward
                self.untrained = first_line(error)
        return None

    @property
    def lost(self) -> str:
        """What of a training step a graph of its forward would leave out, as a sentence: an autograd function with a
        backward of its own, whose forward alone is traced, or activation checkpointing. Empty if nothing is, and
        without an example.
        """
        if self.example_inputs is None:
            return ""
        _ = self.trained
        return self._lost[0] if self._lost else ""

    def _watch(self, given: object, checkpoints: Sequence[object]) -> None:
        sentence = _CHECKPOINTS if checkpoints else _own_backward(given)
        self._lost += [sentence] if sentence else []


def difference(net: nn.Module, original: Original) -> Difference:
    """Of what the net and its model give, and do to their buffers, in the worse of both modes; none without an example.

    Training is compared under the same random numbers, and only where the model trains on the example at all.
    """
    if original.example_inputs is None:
        return _NONE
    twin = shell(net)
    differences = [difference_from(twin, original.evaluated, original.example_inputs, mode=False)]
    if original.trained is not None:
        differences.append(difference_from(twin, original.trained, original.example_inputs, mode=True))
    return max(differences, key=lambda each: each.size)


def difference_from(net: nn.Module, expected: Effect, example_inputs: ExampleInputs, *, mode: bool) -> Difference:
    """Of what the net does in one mode from what is expected."""
    where = "in training " if mode else ""
    try:
        got = effect(net, example_inputs, mode=mode, inputs_train=expected.inputs_train)
    except Exception as error:  # a graph may call functions of the model's own
        return Difference(float("inf"), f"its graph fails {where}on the example inputs: {first_line(error)}.")
    size = apart(expected.output, got.output)
    if size > ROUNDING:
        return Difference(size, f"its graph computes something else {where}on the example inputs.")
    for name in sorted(expected.buffers.keys() | got.buffers.keys()):
        lost = apart(expected.buffers.get(name), got.buffers.get(name))
        if lost > ROUNDING:
            return Difference(lost, f"its graph changes the buffer {name} otherwise {where}on the example inputs.")
        size = max(size, lost)
    if wrong := wrong_gradient(expected.gradients, got.gradients):
        return Difference(float("inf"), f"its graph gives {wrong} another gradient on the example inputs.")
    return Difference(size, f"its graph rounds otherwise {where}on the example inputs." if size else "")


def effect(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    mode: bool,
    inputs_train: bool = False,
    watch: Callable[[object, Sequence[object]], None] | None = None,
) -> Effect:
    """Of a call in evaluation (False) or training mode; modes, buffers and weights are as before afterwards.

    watch: is shown what the model gave and the functions that ran under checkpoints.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(mode))
        for context in (slow_attention(), same_values(model), same_buffers(model)):
            stack.enter_context(context)
        stack.enter_context(same_modes(model))
        set_mode(model, mode)
        stack.enter_context(quiet())
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        noting: AbstractContextManager[Sequence[object]] = nullcontext([]) if watch is None else _noting_checkpoints()
        with noting as checkpoints:
            given = run(model, example_inputs, grad=inputs_train)
        after = {name: buffer.detach() for name, buffer in model.named_buffers()}
        both = before.keys() & after.keys()
        changed = {name: after[name].clone() for name in both if apart(before[name], after[name])}
        if watch is not None:
            watch(given, checkpoints)
        training = [tensor for tensor in tensors_in(given) if tensor.requires_grad]
        gradients = sketched_gradients(model, training) if mode else {}
    return Effect(mapped(Tensor.detach, given), changed, gradients, inputs_train)


def tensors_in(given: object) -> Iterator[Tensor]:
    """All of them, those in the fields of dataclasses too."""
    for leaf in leaves(given):
        if isinstance(leaf, Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf):
            yield from tensors_in(vars(leaf))


def run(model: nn.Module, example_inputs: ExampleInputs, *, grad: bool = False) -> Output:
    """The output, with inputs and random generators left as they are. grad: as from a layer that trains before."""
    args, kwargs = fresh(split_inputs(example_inputs))
    if grad:
        made: dict[int, Tensor] = {}  # one tensor stays one
        args, kwargs = mapped(lambda t: made.setdefault(id(t), _with_grad(t)), (args, kwargs))
    with same_randomness():
        return model(*args, **kwargs)


def _with_grad(tensor: Tensor) -> Tensor:
    return tensor.requires_grad_() * 1 if tensor.is_floating_point() else tensor  # no leaf: it may be written to


def apart(a: object, b: object) -> float:
    """The largest difference as a share of the largest value: 0 for the same bits (NaN being NaN), infinite where the
    outputs have other parts, shapes or dtypes.
    """
    leaves_a, leaves_b = leaves(a), leaves(b)
    if len(leaves_a) != len(leaves_b):
        return float("inf")
    return max(map(_leaves_apart, leaves_a, leaves_b), default=0.0)


def _leaves_apart(x: object, y: object) -> float:
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
    if type(x) is type(y) and _has_fields(x):  # dataclasses, and objects such as a cache of keys and values
        try:
            return apart(vars(x), vars(y))
        except RecursionError:  # it holds itself
            return float("inf")
    return 0.0 if bool(x == y) else float("inf")


def _has_fields(value: object) -> bool:
    """Whether a value is what its attributes are: a dataclass, or an object that does not say when two are equal."""
    plain = type(value).__eq__ is object.__eq__ and hasattr(value, "__dict__") and not isinstance(value, type)
    return dataclasses.is_dataclass(value) or (plain and not callable(value))


def _own_backward(given: object) -> str:
    """Of the autograd functions that led to what was given, one with a backward of its own, as a sentence."""
    waiting = [tensor.grad_fn for tensor in tensors_in(given) if tensor.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if isinstance(node, BackwardCFunction):
            function = type(node)._forward_cls
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
def _noting_checkpoints() -> Iterator[Sequence[object]]:
    """The functions that run under checkpoints inside; those of the reentrant kind show in autograd's graph."""
    noted: list[object] = []
    generator = checkpoint._checkpoint_without_reentrant_generator

    def note(function: Function, *args: Any, **kwargs: Any) -> object:  # Any: they are handed on as they are
        noted.append(function)
        return generator(function, *args, **kwargs)

    checkpoint._checkpoint_without_reentrant_generator = note  # type: ignore[assignment]
    try:
        yield noted
    finally:
        checkpoint._checkpoint_without_reentrant_generator = generator
