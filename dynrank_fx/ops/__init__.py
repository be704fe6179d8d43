"""What layers compute: an op for each kind of product and convolution, and how a model's code is read as one."""

from .conv import ConvolutionOp, ConvOp, ConvTransposeOp
from .from_calls import Call, call_of
from .from_modules import OP_MODULES, has_hooks, holds_more, module_op
from .from_views import gather_index, is_metadata, parts_of, reads_metadata
from .kinds import op_from_json, op_to_json
from .matrix import EinsumOp, EmbeddingOp, LinearOp, MatmulOp, ProductOp
from .op import Op
from .to_modules import keeps_weight, layer_of
from .view import WHOLE, Operand, Shape, View

__all__ = [
    "OP_MODULES",
    "WHOLE",
    "Call",
    "ConvOp",
    "ConvTransposeOp",
    "ConvolutionOp",
    "EinsumOp",
    "EmbeddingOp",
    "LinearOp",
    "MatmulOp",
    "Op",
    "Operand",
    "ProductOp",
    "Shape",
    "View",
    "call_of",
    "gather_index",
    "has_hooks",
    "holds_more",
    "is_metadata",
    "keeps_weight",
    "layer_of",
    "module_op",
    "op_from_json",
    "op_to_json",
    "parts_of",
    "reads_metadata",
]
