"""One run of a net's evaluation graph on fake tensors: shapes and FLOPs without memory or side effects."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import (
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from .errors import CaptureError
from .inputs import fresh, split_inputs
from .net import Net
from .ops import Shape
from .scopes import same_buffers, same_randomness, slow_attention


@dataclass
class Measured:
    """shapes: of every node that gives one tensor. flops: of the whole model for the example inputs."""

    shapes: dict[fx.Node, Shape] = field(default_factory=dict)
    flops: int = 0


class _Recorder(fx.Interpreter):
    def __init__(self, net: Net, measured: Measured) -> None:
        super().__init__(net, graph=net.graphs[False])
        self.measured = measured

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.measured.shapes[n] = tuple(result.shape)
        return result

    def fetch_attr(self, target: str) -> Any:
        # The flop counter hooks into modules, and fails there on a parameter as input where gradients are off.
        value = super().fetch_attr(target)
        return value.detach() if isinstance(value, Tensor) else value


def measure(net: Net, example_inputs: Any) -> Measured:
    """Shapes and FLOPs of the evaluation graph (torch.utils.flop_counter) on the example inputs.

    Raises CaptureError where the inputs do not fit the graph.
    """
    values = _placeholders(net.graphs[False], *split_inputs(fresh(example_inputs)))
    modes = {module: module.training for module in net.modules()}
    try:
        for module in modes:
            module.training = False
        try:
            return _run(net, values, FakeTensorMode(allow_non_fake_inputs=True))
        except (DynamicOutputShapeException, UnsupportedOperatorException):
            with same_randomness(), same_buffers(net):
                return _run(net, values, None)  # shapes that depend on data need the data
    finally:
        for module, training in modes.items():
            module.training = training


def _run(net: Net, values: list[Any], mode: FakeTensorMode | None) -> Measured:
    measured = Measured()
    if mode is not None:
        values = pytree.tree_map_only(Tensor, mode.from_tensor, values)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), slow_attention(), sdpa_kernel(SDPBackend.MATH), counter:
        if mode is None:
            _Recorder(net, measured).run(*values, enable_io_processing=False)
        else:
            with mode:
                _Recorder(net, measured).run(*values, enable_io_processing=False)
    measured.flops = counter.get_total_flops()
    return measured


def _placeholders(graph: fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """One value per placeholder, in order."""
    codegen = graph._codegen
    if isinstance(codegen, fx.graph._PyTreeCodeGen):
        spec = codegen.pytree_info.in_spec
        order = spec.child(1).context if spec.num_children == 2 else list(kwargs)
        return pytree.tree_leaves((args, {name: kwargs[name] for name in order}))
    values, given = [], list(args)
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        name = str(node.target)
        if name.startswith("*"):
            values.append(given if name.count("*") == 1 else kwargs)
            given = []
        elif given:
            values.append(given.pop(0))
        elif name in kwargs:
            values.append(kwargs[name])
        elif node.args:
            values.append(node.args[0])
        else:
            raise CaptureError(f"the example inputs have no value for the model's argument {name!r}")
    return values
