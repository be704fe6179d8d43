"""Where a step's time goes: every event of the profiler is of one kind, and the blocks are what they are called."""

from __future__ import annotations

import pytest
import torch

from benchmarks.layers import kind_of, layers, resnet18


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        ("aten::addmm", "products"),
        ("aten::convolution_backward", "products"),
        ("mkl::_mkl_linear", "products"),
        ("graph_0_cpp_fused_gelu_native_layer_norm_2", "norms and the like"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::_fused_adamw_", "optimizer"),
        ("Optimizer.step#AdamW.step", "optimizer"),
        ("nvjet_sm90_tst_128x256_64x4_1x2_h_bz_coopA_NNT", "products"),
        ("triton_tem_fused_mm_3", "products"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"),
        ("aten::empty", "other"),
    ],
)
def test_events_are_told_apart(event: str, kind: str) -> None:
    assert kind_of(event) == kind


def test_the_network_is_resnet_18() -> None:
    net = resnet18()
    assert sum(p.numel() for p in net.parameters()) == 11_689_512 - (512 * 1000 + 1000)
    assert net(torch.zeros(1, 3, 64, 64)).shape == (1, 512, 2, 2)


@pytest.mark.fuzz
def test_the_table_has_a_row_for_each_rank() -> None:
    (row,) = layers(quick=True).rows
    assert row[1] == "1/4"
