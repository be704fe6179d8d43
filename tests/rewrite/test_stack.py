"""First factors that read one value become one layer: the same function, fewer products, names that say whose."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, fx, nn

import dynrank_fx as dr


class Gated(nn.Module):
    """Sites that read one value: three with biases, then two without; one that is dense; one that is used twice."""

    def __init__(self, *, taken: bool = False) -> None:
        super().__init__()
        if taken:
            self.gate_up = nn.Linear(24, 24)
        self.attention = nn.ModuleDict({name: nn.Linear(16, 16) for name in ("query", "key", "value")})
        self.gate, self.up, self.dense, self.twice = (nn.Linear(16, 24, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.attention[name](x) for name in ("query", "key", "value"))
        y = x + torch.softmax(q @ k.mT, -1) @ v
        z = torch.sigmoid(self.gate(y)) * self.up(y) + self.dense(y) + self.twice(y) + self.twice(x)
        return self.gate_up(z) if hasattr(self, "gate_up") else z


@pytest.fixture
def net_and_x() -> tuple[nn.Module, Tensor]:
    return made()


def made(*, taken: bool = False, **choices: object) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    overrides = {"*key*": dr.Override(rank=dr.Fixed(2)), "dense*": dr.Override(dense=True)}
    net = dr.transform(Gated(taken=taken).double(), (x,), rank=dr.Fixed(4), overrides=overrides, **choices)  # type: ignore[arg-type]
    dr.enter_(net, dr.Phase.LOW)
    return net, x


def weights(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in module.named_parameters() if p.ndim == 2}


def test_the_function_stays_and_the_names_say_whose_factors_are_in_it(net_and_x: tuple[nn.Module, Tensor]) -> None:
    net, x = net_and_x
    plain, stacked = dr.truncate(net), dr.truncate(net, stacked=True)
    for inputs in (x, torch.randn(3, 7, 16, dtype=x.dtype)):
        torch.testing.assert_close(stacked(inputs), plain(inputs), rtol=1e-12, atol=1e-12)
    before, after = weights(plain), weights(stacked)
    assert sum(a * b for a, b in before.values()) == sum(a * b for a, b in after.values())
    assert {name: shape for name, shape in after.items() if name not in before} == {
        "attention.query_key_value.right.weight": (10, 16),
        "gate_up.right.weight": (8, 16),
    }
    assert {name for name in before if name not in after} == {
        *(f"attention.{name}.right.weight" for name in ("query", "key", "value")),
        *("gate.right.weight", "up.right.weight"),
    }
    assert isinstance(stacked, fx.GraphModule)
    counts = [Counter(node.op for node in each.graph.nodes)["call_module"] for each in (plain, stacked)]
    assert counts[0] - counts[1] == 3


def test_it_trains_on_to_the_same_gradients_and_its_state_loads(net_and_x: tuple[nn.Module, Tensor]) -> None:
    net, x = net_and_x
    plain, stacked = dr.truncate(net), dr.truncate(net, stacked=True)
    for each in (plain, stacked):
        each(x).square().mean().backward()
    own = [plain.get_parameter(f"{name}.right.weight").grad for name in ("gate", "up")]
    torch.testing.assert_close(
        stacked.get_parameter("gate_up.right.weight").grad, torch.cat(own), rtol=1e-9, atol=1e-12
    )  # type: ignore[arg-type]
    expected, state = stacked(x).detach(), {name: t.clone() for name, t in stacked.state_dict().items()}
    with torch.no_grad():
        for parameter in stacked.parameters():
            parameter.zero_()
    stacked.load_state_dict(state)
    assert torch.equal(stacked(x), expected)
    assert all(
        p.untyped_storage()._cdata != q.untyped_storage()._cdata for p in stacked.parameters() for q in net.parameters()
    )


def test_its_file_has_the_products_of_one_whose_factors_the_export_stacks(
    net_and_x: tuple[nn.Module, Tensor], tmp_path: Path
) -> None:
    net, x = net_and_x
    stacked = dr.truncate(net, stacked=True).float()
    dr.export_onnx(stacked, (x.float(),), tmp_path / "m.onnx", batch_sizes=(3,))
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node)
    attention, qkv, gated, dense, twice = 2, 1 + 3, 1 + 2, 1, 2 * 2
    assert (kinds["MatMul"], kinds["Split"]) == (attention + qkv + gated + dense + twice, 2)


def test_after_torch_export_and_where_the_name_is_taken() -> None:
    net, x = made(how=dr.Capture.EXPORT, taken=True)
    stacked = dr.truncate(net, stacked=True)
    torch.testing.assert_close(stacked(x), dr.truncate(net)(x), rtol=1e-12, atol=1e-12)
    assert {"attention.query_key_value.right.weight", "gate_up_.right.weight"} <= weights(stacked).keys()


@pytest.mark.parametrize("choices", [{"form": dr.Form.LAYERS}, {"how": dr.Capture.MODULES}], ids=str)
def test_where_the_models_own_code_calls_its_layers_there_is_no_graph(choices: dict[str, object]) -> None:
    net, _ = made(**choices)
    with pytest.raises(dr.PlanError, match="Gated has no graph in which layers that read one value could be found"):
        dr.truncate(net, stacked=True)
