"""Right factors that read one value become one product: the same numbers, counted nodes, and what is left alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exporting import CPU, Apply, graph_of
from onnx import TensorProto, helper
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.onnx import compare_onnx, converted
from dynrank_fx.onnx.stack import is_stack, stack_rights_

N = 8  # inputs of every product below
RANKS = {"q": 3, "k": 2, "v": 5}
Node = onnx.NodeProto


def kinds(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def weights_of(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    return {each.name: tuple(each.dims) for each in model.graph.initializer if len(each.dims) > 1}


def outputs(model: onnx.ModelProto) -> list[np.ndarray]:
    """Of float64 rows: whatever is left of an error is rounding."""
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=[CPU])
    rows = {each.name: np.random.default_rng(0).standard_normal((4, N)) for each in session.get_inputs()}
    got: list[np.ndarray] = session.run(None, rows)
    return got


def by_hand(nodes: Sequence[Node], results: Sequence[str], turned: bool = False, names: str = "qkv") -> onnx.ModelProto:
    """These nodes over factors q.right, q.left and so on, in float64. turned: stored as torch stores them."""
    random = np.random.default_rng(1)
    weights = {}
    for name in names:
        for key, shape in (("right", (N, RANKS[name])), ("left", (RANKS[name], N))):
            weights[f"{name}.{key}"] = random.standard_normal(shape[::-1] if turned else shape)
    described = [{name: (TensorProto.DOUBLE, ["rows", N]) for name in some} for some in ("xy", results)]
    return graph_of(list(nodes), *described, weights)


def site(name: str, form: str = "MatMul", x: str = "x", result: str = "") -> list[Node]:
    """The two products of a site, in one of the forms that exporters write."""
    nodes, value = [], x
    for key in ("right", "left"):
        weight, out = f"{name}.{key}", f"{result or name}_{key}"
        if form == "turned":
            nodes.append(helper.make_node("Transpose", [weight], [f"{out}_turned"], perm=[1, 0]))
            weight = f"{out}_turned"
        attributes = {"transB": 1} if form == "Gemm of turned" else {}
        nodes.append(helper.make_node("Gemm" if "Gemm" in form else "MatMul", [value, weight], [out], **attributes))
        value = out
    return nodes


@pytest.mark.parametrize("form", ["MatMul", "turned", "Gemm", "Gemm of turned"])
def test_factors_of_mixed_ranks_become_one_product_in_every_form(form: str) -> None:
    nodes = [node for name in "qkv" for node in site(name, form)]
    model = by_hand(nodes, [f"{name}_left" for name in "qkv"], turned="turned" in form)
    expected, before = outputs(model), kinds(model)
    stack_rights_(model)
    after, product = kinds(model), "Gemm" if "Gemm" in form else "MatMul"
    assert (before[product], after[product], after["Split"]) == (6, 4, 1)
    assert after["Transpose"] == (4 if form == "turned" else 0)
    assert sum(np.prod(shape) for shape in weights_of(model).values()) == 2 * N * sum(RANKS.values())
    assert max(weights_of(model), key=is_stack) == "{q,k,v}.right"
    for got, want in zip(outputs(model), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-13, atol=1e-13)


def test_a_block_that_is_used_twice_has_one_stack_and_a_product_at_each_place() -> None:
    nodes = [node for x in "xy" for name in "qk" for node in site(name, "turned", x, result=f"{name}{x}")]
    results = ["qx_left", "kx_left", "qy_left", "ky_left"]
    model = by_hand(nodes, results, turned=True, names="qk")
    expected = outputs(model)
    stack_rights_(model)
    assert weights_of(model).keys() == {"q.left", "k.left", "{q,k}.right"}
    assert kinds(model)["MatMul"] == 6
    for got, want in zip(outputs(model), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("nodes", "results"),
    [
        ([*site("q"), *site("k", x="y")], ["q_left", "k_left"]),
        ([*site("q"), *site("k")], ["q_left", "k_left", "k_right"]),
        ([*site("q"), *site("k"), *site("k", x="y", result="again")], ["q_left", "k_left", "again_left"]),
        ([*site("q"), *site("k"), helper.make_node("Abs", ["k.right"], ["size"])], ["q_left", "k_left", "size"]),
        ([*site("q"), *site("k"), helper.make_node("Abs", ["k_right"], ["size"])], ["q_left", "k_left", "size"]),
        ([*site("q"), site("k")[0], helper.make_node("Tanh", ["k_right"], ["dense"])], ["q_left", "dense"]),
    ],
    ids=["another input", "given out", "used elsewhere too", "weight read", "product read", "no second product"],
)
def test_what_would_not_be_one_product_is_left_alone(nodes: Sequence[Node], results: Sequence[str]) -> None:
    model = by_hand(nodes, results, names="qk")
    before = model.SerializeToString(deterministic=True)
    stack_rights_(model)
    assert model.SerializeToString(deterministic=True) == before


def test_what_a_graph_inside_reads_is_left_alone() -> None:
    value = helper.make_tensor_value_info("inner", TensorProto.DOUBLE, None)
    inside = helper.make_graph([helper.make_node("Abs", ["k_right"], ["inner"])], "inside", [], [value])
    chosen = helper.make_node("If", ["c"], ["chosen"], then_branch=inside, else_branch=inside)
    model = by_hand([*site("q"), *site("k"), chosen], ["q_left", "k_left"], names="qk")
    stack_rights_(model)
    assert kinds(model)["Split"] == 0


class Gated(nn.Module):
    """Sites that read one value: three with biases, then two without, and one that stays dense beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.gate, self.up, self.dense = (nn.Linear(16, 24, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.query(x), self.key(x), self.value(x)
        y = x + torch.softmax(q @ k.mT, -1) @ v
        return torch.sigmoid(self.gate(y)) * self.up(y) + self.dense(y)


def gated(how: dr.Capture, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = Gated().to(dtype).eval(), torch.randn(2, 5, 16, dtype=dtype)
    overrides = {"key*": dr.Override(rank=dr.Fixed(2)), "dense*": dr.Override(dense=True)}
    net = dr.transform(model, (x,), rank=dr.Fixed(4), overrides=overrides, how=how)
    dr.enter_(net, dr.Phase.LOW)
    return dr.truncate(net), x


@pytest.mark.parametrize(
    "how",
    [pytest.param(how, marks=() if how.name in ("EXPORT", "LAYERS") else pytest.mark.fuzz) for how in dr.Capture],
    ids=lambda how: how.name,
)
def test_sites_of_one_value_are_found_under_every_capture(how: dr.Capture) -> None:
    small, x = gated(how)
    model, free = converted(small, ((x,), {}), None, None)
    assert free
    assert kinds(model)["Split"] == 2
    assert kinds(model)["MatMul"] == 2 + 1 + 3 + 1 + 2 + 1  # attention; stack and lefts, twice; dense
    stacks = {name: shape for name, shape in weights_of(model).items() if is_stack(name)}
    assert list(stacks.values()) == [(10, 16), (8, 16)]
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=[CPU])
    more = torch.cat([x, -x, x])[:5]
    (got,) = session.run(None, {session.get_inputs()[0].name: more.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), small(more).detach(), rtol=1e-12, atol=1e-12)


def test_a_file_with_stacks_is_compared_and_quantised(tmp_path: Path) -> None:
    small, x = gated(dr.Capture.SYMBOLIC, torch.float32)
    one, other, quantised = (tmp_path / f"{name}.onnx" for name in ("stacked", "plain", "int8"))
    reports = [dr.export_onnx(small, (x,), path, batch_sizes=(2,), stacked=path is one) for path in (one, other)]
    assert reports[0].params == reports[1].params
    stacks = {"{query,key,value}.right.weight": 3, "{gate,up}.right.weight": 2}
    assert [report.to_json()["stacks"] for report in reports] == [stacks, {}]
    assert str(reports[0]).endswith("; 5 right factors merged into 2 products")
    assert "merged" not in str(reports[1])
    assert kinds(onnx.load(other))["MatMul"] - kinds(onnx.load(one))["MatMul"] == 3
    verdict = compare_onnx(one, other)
    assert verdict.same
    names = {"query", "key", "value", "gate", "up", "dense"}
    assert {each.name for each in verdict.sites} == names
    assert {each.name for each in compare_onnx(one, one).sites} == names, "a stack is no site"
    quant_pre_process(one, tmp_path / "prepared.onnx")  # without it onnxruntime's quantiser takes no turned weight
    quantize_dynamic(tmp_path / "prepared.onnx", quantised)
    assert kinds(onnx.load(quantised))["MatMulInteger"] == 2 + 5 + 1, "stacks, left factors, the dense one"
    rows = {"x": x.numpy()}
    got, want = (onnxruntime.InferenceSession(path, providers=[CPU]).run(None, rows)[0] for path in (quantised, one))
    assert np.linalg.norm(got - want) < 0.1 * np.linalg.norm(want)


def test_opset_23_has_one_attention_node_beside_the_stacks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    q, k, v = (nn.Linear(16, 16) for _ in range(3))

    def attend(q: nn.Module, k: nn.Module, v: nn.Module, x: Tensor) -> Tensor:
        heads = [layer(x).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (q, k, v)]
        return nn.functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)

    net = dr.transform(Apply(attend, q, k, v), (x := torch.randn(2, 5, 16),), rank=dr.Fixed(4))
    dr.enter_(net, dr.Phase.LOW)
    report = dr.export_onnx(net, (x,), tmp_path / "m.onnx", opset=23)
    found = kinds(onnx.load(tmp_path / "m.onnx"))
    assert (found["Attention"], found["MatMul"], found["Softmax"]) == (1, 4, 0)
    assert (report.opset, report.elsewhere) == (23, {})
    assert {agreement.batch for agreement in report.agreements} >= {1, 2, 5}, "onnxruntime ran it, at other sizes too"
