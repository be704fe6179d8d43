"""Finding sites: every matrix of the model is a site, or skipped with the reason as a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import fx, nn

from ..layouts import layout_for
from ..ops import OP_MODULES, ConvolutionOp, ProductOp, Shape, has_hooks, holds_more
from .locate import Located, locate
from .site import Site, Skipped, Use

Shapes: TypeAlias = Mapping[fx.Node | nn.Module, Sequence[Shape]]
_UNKNOWN: Sequence[Shape | None] = (None,)


def find_sites(
    net: nn.Module, shapes: Shapes | None = None, located: Mapping[str, Located] | None = None
) -> tuple[tuple[Site, ...], tuple[Skipped, ...]]:
    """Every matrix of the model, in the order of its parameters, as a Site or as Skipped.

    shapes: of the nodes' outputs, and of the inputs of modules that untraced code calls, for each time that they were
    run (``measure``): for counting FLOPs; without them sites have parameter counts only.
    located: what ``locate`` found, if that is known already.
    """
    sites, skipped = [], []
    for matrix in (locate(net) if located is None else located).values():
        (name, *others), shape = matrix.names, tuple(matrix.parameter.shape)
        reason = why_not(matrix)
        if reason:
            skipped.append(Skipped(name, shape, reason, tuple(others)))
        else:
            uses, reads = _uses(net, matrix, shapes or {}), _reads(matrix, shapes or {})
            sites.append(Site(name, shape, uses, tuple(others), reads, matrix.by_code))
    return tuple(sites), tuple(skipped)


def _uses(net: nn.Module, matrix: Located, shapes: Shapes) -> tuple[Use, ...]:
    in_eval = [use for use in matrix.uses if use.region is None or use.graph is use.region.net.graphs[False]]
    uses = []
    for use in in_eval or matrix.uses:
        at = use.x if use.node is not None else net.get_submodule(use.holder.rpartition(".")[0])
        times = _UNKNOWN if at is None else shapes.get(at, _UNKNOWN)
        weights = shapes.get(use.weight) if use.weight is not None else None
        if isinstance(use.op, ProductOp) and use.op.view.gathered and weights:
            times = [_broadcast(x, W) for x, W in zip(times, weights, strict=True)]
        uses += [Use(use.op, shape) for shape in times]
    return tuple(uses)


def _broadcast(x: Shape | None, gathered: Shape) -> Shape | None:
    """The shape of an input that is one for several gathered matrices, as if there were one for each."""
    return None if x is None else (*torch.broadcast_shapes(x[:-2], gathered[:-2]), *x[-2:])


def _reads(matrix: Located, shapes: Shapes) -> int:
    """How often the dense weight is read by itself in one evaluation."""
    weights = {reader.weight for reader in matrix.readers if reader.graph is reader.region.net.graphs[False]}
    return sum(len(shapes.get(weight, _UNKNOWN)) for weight in weights)


# What has no layout: the modules, how the names of the functions start, and the reason.
_NO_LAYOUT: tuple[tuple[tuple[type[nn.Module], ...], tuple[str, ...], str], ...] = (
    (
        (nn.RNNBase, nn.RNNCellBase),
        ("`lstm", "`gru", "`rnn_"),
        "recurrent layer: its kernel takes dense matrices",
    ),
    ((nn.Bilinear,), ("`bilinear",), "bilinear form: a tensor between two inputs, which two factors do not split"),
    ((nn.EmbeddingBag,), ("`embedding_bag", "`_embedding_bag"), "embedding bag: its kernel takes a dense table"),
)


def why_not(matrix: Located) -> str | None:
    """The reason, as a sentence, that this matrix cannot be a site; None if it can."""
    holder, inside, _ = f".{matrix.names[0]}".partition(".parametrizations.")
    if inside:
        return f"the weight of {holder[1:] or 'the model'} is computed from it by a parametrization"
    readers = [reader.words for reader in matrix.readers]
    for modules, functions, reason in _NO_LAYOUT:
        closed = any(isinstance(module, modules) for _, module in matrix.closed)
        if closed or any(words.startswith(functions) for words in readers):
            return f"shared with an {reason}" if matrix.uses else reason
    for path, module in matrix.closed:
        return f"inside the {type(module).__name__} {path or 'itself'}: {_why_closed(module)}"
    if matrix.read_outside:
        return "read by code that could not be traced, which its factors alone could not serve once truncated"
    if not matrix.uses:
        return _why_unused(readers)
    for reader in matrix.readers:
        if reader.writes:
            return f"{reader.words} needs the parameter itself, which does not exist while its factors train"
    if not matrix.parameter.is_floating_point():
        return f"its dtype is {matrix.parameter.dtype}, which has no truncated form"
    return _why_mixed(matrix)


def _why_unused(readers: list[str]) -> str:
    if any(words.startswith("`wrap_with_") for words in readers):
        return (
            "inside a block that switches gradients or autocast, which torch.export keeps closed: captured module by "
            "module (Capture.MODULES), the model's own code would run it"
        )
    if any("conv_transpose" in words for words in readers):
        return "transposed convolution whose output size is given: its padding depends on the input's size"
    if readers:
        return f"not multiplied by an input as it is: it is used by {readers[0]}"
    return "no operation of the graph uses it"


def _why_mixed(matrix: Located) -> str | None:
    """Uses that no layout serves together, or a weight that is as small as it can be."""
    ops = [use.op for use in matrix.uses]
    op, shape = ops[0], tuple(matrix.parameter.shape)
    if not all(layout_for(op).serves(other) for other in ops):
        convolutions = all(isinstance(other, ConvolutionOp) for other in ops)
        if convolutions:
            return "its convolutions have different numbers of groups"
        kinds = sorted({other.kind for other in ops})
        return f"used in {' and '.join(kinds)} in ways whose factors differ"
    if getattr(op, "groups", 1) > 1 and layout_for(op).max_rank(shape) == 1:
        return "depthwise convolution: rank 1 already"
    return None


def _why_closed(module: nn.Module) -> str:
    if isinstance(module, OP_MODULES):
        if has_hooks(module):
            return "a hook watches the module, and would be lost"
        if "forward" in vars(module):
            return "its forward was replaced by another"
        if holds_more(module):
            return "it holds more than a weight and a bias"
        if isinstance(module, nn.Embedding) and module.max_norm is not None:
            return "max_norm writes to the weight in every forward"
        return "the class has a forward of its own, or is called with more than its input"
    if type(module).__module__.startswith("torch.nn."):
        return "the tracer does not look into it (torch.export may)"
    return "its code could not be traced"
