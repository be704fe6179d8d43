"""From any model to a graph that trains, and the proof that the graph computes what the model does."""

from .blame import origin
from .choose import Capture, Form, capture
from .equivalence import tensors_in
from .inputs import (
    DynamicShapes,
    ExampleInputs,
    Inputs,
    batch_size,
    double_batch_of_one,
    free_dimensions,
    fresh,
    in_order,
    joined,
    split_inputs,
    tensors,
    with_batch,
)
from .isolation import quiet, same_buffers, same_values, slow_attention
from .measure import flop_counter, measure
from .net import (
    Net,
    Region,
    attribute,
    copy_graph,
    drop_dead_reads,
    evaluating,
    forget_meta,
    is_captured,
    meta_of,
    regions,
    set_submodule,
    untraced,
    unwrap,
)
from .shell import own_, shell

__all__ = [
    "Capture",
    "DynamicShapes",
    "ExampleInputs",
    "Form",
    "Inputs",
    "Net",
    "Region",
    "attribute",
    "batch_size",
    "capture",
    "copy_graph",
    "double_batch_of_one",
    "drop_dead_reads",
    "evaluating",
    "flop_counter",
    "forget_meta",
    "free_dimensions",
    "fresh",
    "in_order",
    "is_captured",
    "joined",
    "measure",
    "meta_of",
    "origin",
    "own_",
    "quiet",
    "regions",
    "same_buffers",
    "same_values",
    "set_submodule",
    "shell",
    "slow_attention",
    "split_inputs",
    "tensors",
    "tensors_in",
    "untraced",
    "unwrap",
    "with_batch",
]
