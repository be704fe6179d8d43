"""Real architectures, the hard ones, through every check but ONNX (`make zoo` runs hundreds, and ONNX).

Those that take longest are for `make fuzz`.
"""

from __future__ import annotations

import functools

import pytest
from cases import cases_of
from check import run_case

# Why each is here, and the share of matrix parameters that must be in sites.
HARD = {
    ("torchvision", "vit"): 0.95,  # nn.MultiheadAttention
    ("torchvision", "densenet121 memory_efficient=True"): 0.95,  # activation checkpoints
    ("torchvision", "mobilenet_v3_small"): 0.95,  # depthwise convolutions
    ("torchvision", "swin"): 0.95,  # windows: sizes that torch.export cannot reason about
    ("timm", "test_convnext"): 0.9,  # linear layers and convolutions over the same tensors
    ("transformers", "gpt2"): 0.95,  # Conv1D, and an embedding tied to the head
    ("transformers", "t5"): 0.95,  # encoder and decoder, one embedding under three names
    ("transformers", "mixtral"): 0.5,  # experts in stacks
    ("transformers", "bloom"): 0.95,  # an activation with a backward of its own
    ("transformers", "wav2vec2"): 0.5,  # weight norm; masks drawn in training
    ("transformers", "vilt"): 0.8,  # branches on data
    ("transformers", "mamba"): 0.9,  # a scan over the sequence
}
LONG = (
    "densenet121 memory_efficient=True",
    "mamba",
    "mixtral",
    "swin",
    "t5",
    "vilt",
    "wav2vec2",
    "gpt2",
    "bloom",
    "mobilenet_v3_small",
)


@functools.cache
def cases(source):
    return {case.name: case for case in cases_of(source)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("source", "name"),
    [
        pytest.param(*each, id="-".join(each).replace(" ", "_"), marks=[pytest.mark.fuzz] if each[1] in LONG else [])
        for each in HARD
    ],
)
def test_a_hard_model_holds_the_contracts(source, name):
    row = run_case(cases(source)[name], ("parity", "low", "truncate"))
    assert not row["failures"]
    assert row["reads_input"]
    assert row["full_eval"]
    assert row["full_train"]
    assert row["full_grads"]
    assert row["site_params"] >= HARD[source, name] * row["matrix_params"]
    assert all(reason and "unsupported" not in reason for _, _, reason in row["skipped"])
