"""Example inputs in the forms users have them, and their batch: the first dimension of their tensors."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, fx, nn

from ..aliases import Args, Kwargs
from ..errors import CaptureError
from ..text import counted
from .nested import mapped, tensors

# What a model takes may be anything: only the model itself knows.
Inputs: TypeAlias = tuple[Args, Kwargs]
"""Positional and keyword arguments of a model."""

ExampleInputs: TypeAlias = Tensor | Args | list[Any] | Mapping[str, Any]
"""Positional arguments, keyword arguments by name (a dict, or what a tokenizer gives), the pair ``(args, kwargs)``, or
one tensor.
"""

DynamicShapes: TypeAlias = torch.export.ShapesCollection | dict[str, Any] | tuple[Any, ...] | list[Any]
"""As ``torch.export`` takes them; its own annotation forgets the ShapesCollection."""

_Nested = TypeVar("_Nested")

NO_OTHER = "and serves no other: transform with such an example as is to be served, or with form=dr.Form.LAYERS"
"""How the sentences end that refuse what a graph was not made for."""


def split_inputs(example_inputs: ExampleInputs) -> Inputs:
    """``(args, kwargs)`` from a tuple of arguments, a dict of keyword arguments, the pair ``(args, kwargs)``, or one
    tensor. Any mapping serves for a dict.

    Raises CaptureError for anything else.
    """
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        if len(example_inputs) == 2 and isinstance(example_inputs[0], tuple) and isinstance(example_inputs[1], Mapping):
            return example_inputs[0], dict(example_inputs[1])
        return tuple(example_inputs), {}
    raise CaptureError(
        f"example inputs of type {type(example_inputs).__name__} are not understood: "
        "give a tuple of arguments, a dict of keyword arguments, or the pair (args, kwargs)"
    )


def check_shapes(dynamic_shapes: DynamicShapes | None) -> None:
    """Raises CaptureError for what are no dynamic shapes."""
    kinds = (type(None), torch.export.ShapesCollection, dict, tuple, list)
    if not isinstance(dynamic_shapes, kinds):
        raise CaptureError(f"{dynamic_shapes!r} are no dynamic shapes: give them as torch.export takes them")


def arguments(module: nn.Module, inputs: Inputs) -> Kwargs:
    """The inputs by the names of forward's parameters, in order, those of ``**kwargs`` by their own names."""
    args, kwargs = inputs
    bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    bound.pop(_catcher(module), None)
    return {**bound, **{name: value for name, value in kwargs.items() if name not in bound}}


def _catcher(module: nn.Module) -> str:
    """The name of forward's ``**kwargs``, or empty."""
    parameters = inspect.signature(module.forward).parameters.values()
    return next((each.name for each in parameters if each.kind is inspect.Parameter.VAR_KEYWORD), "")


def shapes_by_argument(module: nn.Module, inputs: Inputs, dynamic_shapes: DynamicShapes) -> Kwargs:
    """``dynamic_shapes`` of torch.export by the names of all ``arguments``, in whichever of its forms they were given.

    Those of ``forward(self, **batch)`` stand by themselves, or nested as torch does it: ``{"batch": {"ids": ...}}``.
    Raises CaptureError where they are not those of the arguments.
    """
    given, caught = arguments(module, inputs), _catcher(module)
    shapes: Any = dynamic_shapes  # Any: a tree of whatever a dimension may be
    if isinstance(shapes, torch.export.ShapesCollection):
        try:
            shapes = shapes.dynamic_shapes(module, *inputs)
        except ValueError as error:
            raise CaptureError(
                "the ShapesCollection has a tensor that is none of the example inputs: give it their own tensors"
            ) from error
    if isinstance(shapes, tuple | list):
        bound = inspect.signature(module.forward).bind(*inputs[0], **inputs[1]).arguments
        names = list(bound if len(bound) == len(shapes) else given)
        if len(names) != len(shapes):
            raise CaptureError(
                f"there are dynamic shapes of {counted(len(shapes), 'argument')}: give those of each of {list(given)}"
            )
        shapes = dict(zip(names, shapes, strict=True))
    shapes = dict(shapes or {})
    if caught and caught not in given and isinstance(shapes.get(caught), Mapping):
        shapes |= shapes.pop(caught)
    if unknown := [name for name in shapes if name not in given]:
        raise CaptureError(
            f"there are dynamic shapes for {unknown[0]!r}, which is none of the arguments given: name them as in "
            f"{list(given)}"
        )
    return {name: shapes.get(name) for name in given}


def in_order(module: nn.Module, inputs: Inputs) -> Inputs:
    """The inputs with the keyword arguments in the order of forward, and the defaults of those left out between them:
    torch.export binds the arguments of a GraphModule by their order, whatever their names.
    """
    args, kwargs = inputs
    if not isinstance(module, fx.GraphModule):
        return inputs
    behind = list(inspect.signature(module.forward).parameters.values())[len(args) :]
    count = max((place + 1 for place, parameter in enumerate(behind) if parameter.name in kwargs), default=0)
    ordered = {
        parameter.name: kwargs.get(parameter.name, parameter.default)
        for parameter in behind[:count]
        if parameter.name in kwargs or parameter.default is not parameter.empty
    }
    return args, {**ordered, **{name: value for name, value in kwargs.items() if name not in ordered}}


def fresh(example_inputs: _Nested) -> _Nested:
    """The same with copies of the tensors, for a model may write into what it is given; one tensor stays one."""
    copies: dict[int, Tensor] = {}

    def copied(tensor: Tensor) -> Tensor:
        return copies.setdefault(id(tensor), tensor.detach().clone())

    return mapped(copied, example_inputs)


def batch_size(inputs: Inputs) -> int | None:
    """The first dimension of the first tensor that has one."""
    return next((tensor.shape[0] for tensor in tensors(inputs) if tensor.ndim), None)


def double_batch_of_one(args: Args, kwargs: Kwargs) -> Inputs:
    """The inputs with a batch of 1 doubled: torch.export takes a size of 1 for a constant."""
    return with_batch((args, kwargs), 2) if batch_size((args, kwargs)) == 1 else (args, kwargs)


def free_dimensions(args: Args, kwargs: Kwargs, *, only_first: bool = False) -> torch.export.ShapesCollection:
    """``dynamic_shapes`` for torch.export that frees every dimension of every tensor, or the first of each, where the
    model allows it.
    """
    shapes = torch.export.ShapesCollection()
    for tensor in tensors((args, kwargs)):
        if tensor.ndim:
            shapes[tensor] = dict.fromkeys(range(1 if only_first else tensor.ndim), torch.export.Dim.AUTO)
    return shapes


def with_batch(inputs: Inputs, batch: int, *, seed: int | None = None, limits: Sequence[int | None] = ()) -> Inputs:
    """The inputs at another batch size: rows of the example over again, in every tensor that shares its batch.

    seed: draws new rows instead: floats from a normal distribution with the example's mean and deviation, other values
    from the example's rows. Of an example of one value, such as zeros, all rows would be alike: its deviation is taken
    as 1, and integers are drawn below a limit, where one is known. limits: by tensor, in order.
    """
    present = batch_size(inputs)
    generator = None if seed is None else torch.Generator().manual_seed(seed)

    below = {id(leaf): limit for leaf, limit in zip(tensors(inputs), limits, strict=False)}

    def resized(leaf: Tensor) -> Tensor:
        if not leaf.ndim or leaf.shape[0] != present:
            return leaf
        if generator is None:
            return leaf.detach()[torch.arange(batch) % leaf.shape[0]]
        if leaf.is_floating_point():
            noise = torch.randn((batch, *leaf.shape[1:]), generator=generator).to(leaf.device, leaf.dtype)
            std = leaf.std() if leaf.numel() > 1 else leaf.abs().mean()
            return leaf.mean() + torch.where(std > 0, std, 1) * noise
        limit = below.get(id(leaf))
        if limit is not None and leaf.dtype is not torch.bool and bool((leaf == leaf.flatten()[:1]).all()):
            drawn = torch.randint(limit, (batch, *leaf.shape[1:]), generator=generator)
            return drawn.to(leaf.device, leaf.dtype)
        return leaf.detach()[torch.randint(leaf.shape[0], (batch,), generator=generator)]

    done: dict[int, Tensor] = {}  # one tensor stays one
    return mapped(lambda leaf: done.setdefault(id(leaf), resized(leaf)), inputs)


def joined(path: Sequence[Any]) -> str:  # Any: pytree's kinds of keys, dataclasses without a common base
    """``batch_ids_0`` for ``batch["ids"][0]``, as torch.export names its inputs."""
    return "_".join(str(astuple(key)[0]) for key in path)
