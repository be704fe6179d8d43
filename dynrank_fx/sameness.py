"""Whether a captured net computes what its model computes, on the example inputs."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .inputs import fresh, split_inputs
from .net import Net
from .origin import first_line
from .scopes import same_buffers, same_randomness, slow_attention


def doubt(net: nn.Module, model: nn.Module, example_inputs: Any) -> str | None:
    """Why the net should not be relied on, as a sentence; None where it gives the same bits, or without an example."""
    if example_inputs is None:
        return None
    expected = evaluated(copy.deepcopy(model), example_inputs)
    return difference(copy.deepcopy(net), expected, example_inputs)


def difference(net: nn.Module, expected: Any, example_inputs: Any) -> str | None:
    """How the output of the net in evaluation mode differs from the expected one; None where it has the same bits."""
    try:
        got = evaluated(net, example_inputs)
    except Exception as error:
        return f"its graph fails on the example inputs: {first_line(error)}."
    return None if equal(expected, got) else "its graph computes something else on the example inputs."


def evaluated(model: nn.Module, example_inputs: Any) -> Any:
    """The output in evaluation mode; modes and buffers are as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    with torch.no_grad(), slow_attention(), same_buffers(model):
        try:
            model.eval()
            return run(model, example_inputs)
        finally:
            for module, training in modes.items():
                module.training = training
            for module in modes:
                if isinstance(module, Net):
                    module.specialize(module.setting)


def run(model: nn.Module, example_inputs: Any) -> Any:
    """The output, with inputs and random generators left as they are."""
    args, kwargs = split_inputs(fresh(example_inputs))
    with same_randomness():
        return model(*args, **kwargs)


def equal(a: Any, b: Any) -> bool:
    """The same bits in every tensor of two outputs, NaN being equal to NaN."""
    leaves_a, leaves_b = pytree.tree_leaves(a), pytree.tree_leaves(b)
    return len(leaves_a) == len(leaves_b) and all(map(_same_leaf, leaves_a, leaves_b))


def _same_leaf(x: Any, y: Any) -> bool:
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return x.shape == y.shape and bool(((x == y) | (x.isnan() & y.isnan())).all())
    if dataclasses.is_dataclass(x) and type(x) is type(y):
        return equal(vars(x), vars(y))
    return bool(x == y)
