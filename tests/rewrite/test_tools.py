"""Tools that look for layers find those of a truncated model: torchao and peft, where they are installed."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator

import pytest
import schemas  # noqa: F401 (torchvision's operators, which peft's transformers may ask for)
import torch
from torch import Tensor, nn

import dynrank_fx as dr

HOW = pytest.mark.parametrize("how", list(dr.Capture))
FACTORS = [f"{name}.{factor}" for name in ("conv", "a", "b") for factor in ("right", "left")]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(3, 16, 3), nn.Linear(16, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.conv(x).mean((2, 3))).relu())


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """What the tools say about themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def cut(how: dr.Capture) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    net = dr.transform(Model(), (x,), rank=dr.Fixed(4), how=how).eval()
    dr.enter_(net, dr.Phase.LOW)
    return dr.truncate(net), x


def error(one: nn.Module, other: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((one(x) - other(x)).norm() / other(x).norm())


@HOW
def test_an_export_knows_each_factor_as_a_layer_of_its_own(how: dr.Capture) -> None:
    """By which quantisers of graphs (pt2e) find what to quantise."""
    small, x = cut(how)
    calls = [node for node in torch.export.export(small, (x,)).graph.nodes if node.op == "call_function"]
    layers = [[*node.meta["nn_module_stack"].values()][-1] for node in calls]
    kinds = {"Conv2d": "torch.nn.modules.conv.Conv2d", "Linear": "torch.nn.modules.linear.Linear"}
    wanted = [(name, kinds["Conv2d" if name.startswith("conv") else "Linear"]) for name in FACTORS]
    assert [layer for layer in layers if layer[1] in kinds.values()] == wanted


@HOW
def test_torchao_quantises_every_linear_layer(how: dr.Capture) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    small, x = cut(how)
    quantised = copy.deepcopy(small)
    quantization.quantize_(quantised, quantization.Int8WeightOnlyConfig())
    linears = [module for module in quantised.modules() if isinstance(module, nn.Linear)]
    assert len(linears) == 4
    assert all(type(module.weight.data).__name__ == "Int8Tensor" for module in linears)
    assert error(quantised, small, x) < 0.05


@HOW
def test_pt2e_quantises_every_factor(how: dr.Capture) -> None:
    pytest.importorskip("torchao.quantization.pt2e")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    small, x = cut(how)
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(small, (x,)).module(), quantizer)
    prepared(x)
    quantised = convert_pt2e(prepared)
    weights = [node for node in quantised.graph.nodes if "dequantize_per_channel" in str(node.target)]
    assert len(weights) == len(FACTORS)
    assert error(quantised, small, x) < 0.05


@HOW
def test_peft_adapts_every_factor_and_starts_at_the_models_function(how: dr.Capture) -> None:
    peft = pytest.importorskip("peft")
    small, x = cut(how)
    adapted = peft.get_peft_model(copy.deepcopy(small), peft.LoraConfig(r=2, target_modules=["left", "right"]))
    with torch.no_grad():
        assert torch.equal(adapted(x), small(x))
    trained = {name.partition(".lora_")[0] for name, each in adapted.named_parameters() if each.requires_grad}
    assert trained == {f"base_model.model.{name}" for name in FACTORS}
