"""What needs a CUDA device and is not a parameter of another test: memory, bfloat16 training, ONNX on the CUDA
provider.
"""

from __future__ import annotations

import pytest
import torch
from models import Modal, randomized
from torch import nn

import dynrank_fx as dr

pytestmark = pytest.mark.gpu


def deep(layers: int = 16, width: int = 1024) -> nn.Module:
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    return dr.transform(model, (torch.zeros(2, width),), rank=dr.Ratio(0.25)).cuda()


def step(net: nn.Module, optimizer: torch.optim.Optimizer, width: int = 1024) -> None:
    net(torch.ones(2, width, device="cuda")).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_low_holds_half_the_memory_at_a_quarter_of_the_rank():
    step(deep(1), torch.optim.AdamW([torch.zeros(1, device="cuda", requires_grad=True)]))  # cuBLAS takes its workspace
    own = torch.cuda.memory_allocated()
    net = deep()
    optimizer = torch.optim.AdamW(net.parameters())
    step(net, optimizer)
    torch.cuda.empty_cache()
    full = torch.cuda.memory_allocated() - own
    dr.enter_(net, dr.Phase.LOW, optimizer)
    assert torch.cuda.memory_allocated() - own < 0.6 * full


def test_the_peak_of_a_switch_stays_within_a_few_sites_of_the_steady_state():
    net = deep()
    optimizer = torch.optim.AdamW(net.parameters())
    site = 4 * 1024 * 1024
    for phase in (dr.Phase.LOW, dr.Phase.FULL, dr.Phase.LOW):
        step(net, optimizer)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        dr.enter_(net, phase, optimizer)
        steady = max(before, torch.cuda.memory_allocated())
        assert torch.cuda.max_memory_allocated() < steady + 16 * site


def test_both_phases_learn_in_bfloat16_under_compile():
    torch.manual_seed(0)
    x, y = torch.randn(64, 4, 6, 6, device="cuda"), torch.randint(10, (64,), device="cuda")
    net = dr.transform(randomized(Modal()).cuda(), (x,), rank=dr.Ratio(0.5), allow_unprofitable=True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, fused=True)
    compiled = torch.compile(net, fullgraph=True, dynamic=False)
    for phase in (dr.Phase.LOW, dr.Phase.FULL, dr.Phase.LOW):
        dr.enter_(net, phase, optimizer)
        losses = []
        for _ in range(20):
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = nn.functional.cross_entropy(compiled(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]


def test_truncation_on_the_gpu_is_as_good_as_the_optimum():
    torch.manual_seed(0)
    W = torch.randn(1, 1024, 512, device="cuda") @ torch.diag(torch.logspace(0, -3, 512, device="cuda"))
    from dynrank_fx.layouts import svd

    B, A = svd.truncate(W, 64)
    best = torch.linalg.svdvals(W.double())[0, 64:].norm()
    assert float((W.double() - B.double() @ A.double()).norm() / best) < 1.001


def test_onnx_agrees_on_the_cuda_provider(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has no CUDA provider")
    x = torch.randn(4, 4, 6, 6, device="cuda")
    net = dr.transform(randomized(Modal()).cuda(), (x,), rank=dr.Ratio(0.5), allow_unprofitable=True)
    report = dr.export_onnx(dr.truncate(net), (x,), tmp_path / "m.onnx", providers=["CUDAExecutionProvider"])
    assert report.provider == "CUDAExecutionProvider"
