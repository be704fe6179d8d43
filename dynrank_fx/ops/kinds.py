"""Every kind of op by its name, and ops as plain JSON values."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from .conv import ConvOp, ConvTransposeOp
from .matrix import EinsumOp, EmbeddingOp, LinearOp, MatmulOp
from .op import Op
from .view import View

KINDS: dict[str, type[Op]] = {
    "linear": LinearOp,
    "matmul": MatmulOp,
    "embedding": EmbeddingOp,
    "einsum": EinsumOp,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), ConvOp),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), ConvTransposeOp),
}


def op_to_json(op: Op) -> dict[str, object]:
    """A plain dictionary with the kind of the op and its settings."""
    return {"kind": op.kind, **asdict(op)}


def op_from_json(data: dict[str, Any]) -> Op:  # Any: as it was read from JSON
    """The op that ``op_to_json`` described. Raises KeyError or TypeError on anything else."""
    fields = {key: _tuples(value) for key, value in data.items() if key != "kind"}
    if "view" in fields:
        fields["view"] = View(**{key: _tuples(value) for key, value in fields["view"].items()})
    return KINDS[data["kind"]](**fields)


def _tuples(value: Any) -> Any:  # Any: as it was read from JSON
    return tuple(value) if isinstance(value, list) else value
