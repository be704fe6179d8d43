"""Ops with shapes that fit them: one per way of applying a weight, each with what makes it hard."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dynrank_fx.ops import ConvOp, ConvTransposeOp, EinsumOp, EmbeddingOp, LinearOp, MatmulOp, Op, View


@dataclass(frozen=True)
class OpCase:
    """An op with the shapes of a weight and an input that fit it; at: which matrices of a stack are gathered."""

    op: Op
    weight: tuple[int, ...]
    x: tuple[int, ...]
    at: tuple[int, ...] | None = None

    @property
    def matrices(self) -> int:
        """How many matrices the weight is: one a group, one in each place of a stack."""
        if isinstance(self.op, EinsumOp):
            return math.prod(self.weight[axis] for axis in self.op.axes[0])
        return getattr(self.op, "groups", math.prod(self.weight[:-2]))

    @property
    def index(self) -> Tensor | None:
        """What is given as ``at``."""
        return None if self.at is None else torch.tensor(self.at)

    def inputs(self) -> Tensor:
        """An input: numbers of rows for an embedding."""
        if isinstance(self.op, EmbeddingOp):
            return torch.randint(self.op.view.shape(self.weight)[0], self.x)
        return float64(self.x)


def float64(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def conv(weight: tuple[int, ...], x: tuple[int, ...], **settings: object) -> OpCase:
    dims = len(weight) - 2
    every = {"stride": (1,) * dims, "padding": (0,) * dims, "dilation": (1,) * dims} | settings
    return OpCase(ConvOp(**every), weight, x)  # type: ignore[arg-type]


def transposed(weight: tuple[int, ...], x: tuple[int, ...], **settings: object) -> OpCase:
    dims = len(weight) - 2
    every = {"stride": (1,) * dims, "padding": (0,) * dims, "output_padding": (0,) * dims, "dilation": (1,) * dims}
    return OpCase(ConvTransposeOp(**every | settings), weight, x)  # type: ignore[arg-type]


CONVS = {
    "conv1d": conv((8, 6, 3), (2, 6, 11), stride=(2,), padding=(1,)),
    "conv1d in groups": conv((12, 4, 3), (2, 8, 13), dilation=(2,), groups=2),
    "conv1d unbatched": conv((8, 6, 3), (6, 11), padding=(2,)),
    "conv2d": conv((10, 6, 3, 5), (2, 6, 9, 8), stride=(2, 3), padding=(1, 2), dilation=(2, 1)),
    "conv2d 1x1": conv((10, 6, 1, 1), (2, 6, 5, 4), stride=(2, 1)),
    "conv2d same": conv((10, 6, 3, 4), (2, 6, 9, 8), padding="same", dilation=(2, 3)),
    "conv2d in groups": conv((12, 2, 3, 3), (2, 8, 9, 8), padding=(1, 1), groups=4),
    "conv2d depthwise": conv((8, 1, 3, 2), (2, 8, 5, 4), stride=(1, 2), groups=8),
    "conv2d reflected": conv((10, 6, 3, 5), (2, 6, 9, 8), pad=(2, 1, 0, 2), pad_mode="reflect", stride=(1, 2)),
    "conv2d circular in groups": conv((10, 3, 3, 3), (2, 6, 9, 8), pad=(1, 2, 2, 0), pad_mode="circular", groups=2),
    "conv3d": conv((6, 4, 3, 2, 3), (2, 4, 5, 6, 7), stride=(1, 2, 2), padding=(1, 0, 1)),
    "conv3d in groups": conv((8, 2, 3, 2, 2), (2, 4, 5, 6, 7), groups=2, dilation=(1, 2, 1)),
}
TRANSPOSED = {
    "transposed 1d": transposed((6, 8, 3), (2, 6, 7), stride=(2,), padding=(1,), output_padding=(1,)),
    "transposed 2d": transposed((6, 8, 3, 4), (2, 6, 5, 4), stride=(2, 1), dilation=(1, 2)),
    "transposed 2d in groups": transposed((6, 4, 3, 2), (2, 6, 5, 4), padding=(1, 0), groups=2),
    "transposed 2d depthwise": transposed((4, 1, 3, 2), (2, 4, 5, 4), stride=(2, 2), groups=4),
    "transposed 3d": transposed((4, 6, 3, 2, 3), (2, 4, 3, 4, 2), stride=(1, 2, 2), output_padding=(0, 1, 0)),
}
PART = View(rows=(2, 8), columns=(1, 6))
TURNED = replace(PART, transposed=True)
PRODUCTS = {
    "linear": OpCase(LinearOp(), (9, 14), (3, 4, 14)),
    "linear by a part": OpCase(LinearOp(PART), (9, 14), (3, 4, 5)),
    "linear by a transposed part": OpCase(LinearOp(TURNED), (9, 14), (3, 4, 6)),
    "linear by one of a stack": OpCase(LinearOp(View(index=2)), (3, 9, 14), (4, 14)),
    "linear of one row": OpCase(LinearOp(), (1, 14), (3, 14)),
    "matmul": OpCase(MatmulOp(), (9, 14), (3, 4, 9)),
    "matmul with the weight first": OpCase(MatmulOp(PART, weight_first=True), (9, 14), (3, 5, 4)),
    "matmul of a vector": OpCase(MatmulOp(), (9, 14), (9,)),
    "matmul of a vector with the weight first": OpCase(MatmulOp(weight_first=True), (9, 14), (14,)),
    "matmul of a stack": OpCase(MatmulOp(batched=True), (3, 9, 14), (2, 3, 4, 9)),
    "matmul of a stack that is broadcast": OpCase(MatmulOp(batched=True), (3, 9, 14), (2, 1, 4, 9)),
    "matmul of one of a stack": OpCase(MatmulOp(View(index=1, transposed=True)), (3, 9, 14), (4, 14)),
    "matmul of gathered matrices": OpCase(
        MatmulOp(View(gathered=True), batched=True), (3, 9, 14), (5, 4, 9), (2, 0, 0, 1, 2)
    ),
    "matmul of parts of gathered matrices": OpCase(
        MatmulOp(replace(TURNED, gathered=True), batched=True, weight_first=True), (3, 9, 14), (2, 6, 4), (1, 1)
    ),
    "einsum": OpCase(EinsumOp("bld", "dhk", "blhk"), (6, 2, 5), (3, 4, 6)),
    "einsum of a stack": OpCase(EinsumOp("bhd", "ehd", "bhe"), (5, 2, 6), (3, 2, 6)),
    "einsum of a stack that is broadcast": OpCase(EinsumOp("bhd", "ehd", "bhe"), (5, 2, 6), (3, 1, 6)),
    "einsum with dots": OpCase(EinsumOp("...hk", "khd", "...d", weight_first=True), (5, 2, 6), (3, 4, 2, 5)),
}
EMBEDDINGS = {
    "embedding": OpCase(EmbeddingOp(padding_idx=3), (9, 14), (3, 4)),
    "embedding of a part": OpCase(EmbeddingOp(PART), (9, 14), (5,)),
    "embedding of the transpose": OpCase(EmbeddingOp(View(transposed=True), scale_grad_by_freq=True), (9, 14), (2, 7)),
}
OP_CASES = CONVS | TRANSPOSED | PRODUCTS | EMBEDDINGS
