"""The batch norms of a module, be they modules or calls in a graph of torch.export, and their statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

_MEAN, _VARIANCE, _TRAINING, _MOMENTUM = 3, 4, 5, 6  # the places of these arguments in aten.batch_norm


@dataclass(frozen=True)
class ModuleNorm:
    """A batch norm that is a module."""

    module: _BatchNorm

    @property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Running mean and variance, [channels] each."""
        mean, variance = self.module.running_mean, self.module.running_var
        assert mean is not None
        assert variance is not None
        return mean, variance

    def observe(self, momentum: float) -> None:
        """Take in, from now on, this share of what the next batch has."""
        self.module.train()
        self.module.momentum = momentum


@dataclass(frozen=True)
class NodeNorm:
    """A batch norm that is a call of aten.batch_norm on its statistics."""

    owner: fx.GraphModule
    node: fx.Node

    @property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """As of ``ModuleNorm``."""
        mean, variance = (attrgetter(str(self.node.args[i].target))(self.owner) for i in (_MEAN, _VARIANCE))  # type: ignore[union-attr]
        return mean, variance

    def observe(self, momentum: float) -> None:
        """As of ``ModuleNorm``, once the owner is compiled anew."""
        self.node.args = (*self.node.args[:_TRAINING], True, momentum, *self.node.args[_MOMENTUM + 1 :])


Norm: TypeAlias = ModuleNorm | NodeNorm


def norms_of(module: nn.Module) -> list[Norm]:
    """The batch norms that keep running statistics."""
    parts = list(module.modules())
    modules = [part for part in parts if isinstance(part, _BatchNorm) and part.track_running_stats]
    graphs = [part for part in parts if isinstance(part, fx.GraphModule)]
    nodes = [(part, node) for part in graphs for node in part.graph.nodes if _is_norm(node)]
    return [*map(ModuleNorm, modules), *(NodeNorm(part, node) for part, node in nodes)]


def _is_norm(node: fx.Node) -> bool:
    return (
        node.target is torch.ops.aten.batch_norm.default
        and isinstance(node.args[_MEAN], fx.Node)
        and len(node.args) > _MOMENTUM
    )


@contextmanager
def batch_statistics(norms: Sequence[Norm]) -> Iterator[Callable[[float], None]]:
    """Within it the norms use the statistics of each batch and take them into their own; what it yields sets with which
    share the next batch counts.
    """
    modules = [norm.module for norm in norms if isinstance(norm, ModuleNorm)]
    nodes = [norm.node for norm in norms if isinstance(norm, NodeNorm)]
    owners = {id(norm.owner): norm.owner for norm in norms if isinstance(norm, NodeNorm)}.values()
    kept = [(module.momentum, module.training) for module in modules], [node.args for node in nodes]

    def weigh(momentum: float) -> None:
        for norm in norms:
            norm.observe(momentum)
        for owner in owners:
            owner.recompile()

    try:
        yield weigh
    finally:
        for module, (momentum, mode) in zip(modules, kept[0], strict=True):
            module.momentum = momentum
            module.train(mode)
        for node, args in zip(nodes, kept[1], strict=True):
            node.args = args
        for owner in owners:
            owner.recompile()
