"""Whether a file computes what its model does: what is compared, by which tolerance, and what is said of an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from exporting import CPU, Apply
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.onnx import export_onnx, onnx_inputs, session, verify_onnx
from dynrank_fx.onnx.agreement import Agreement, check_batch_sizes, compare


def test_half_precision_has_a_tolerance_of_its_own(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)).half()
    report = export_onnx(model, torch.randn(3, 64).half(), tmp_path / "m.onnx")
    assert 0 < max(a.max_rel for a in report.agreements) < 1e-2


def test_infinities_must_be_where_pytorch_has_them(tmp_path: Path) -> None:
    masked = Apply(lambda x: x.masked_fill(x > 0, float("-inf")))
    report = export_onnx(masked, torch.randn(3, 8), tmp_path / "m.onnx")
    assert max(a.max_abs for a in report.agreements) == 0


@pytest.mark.filterwarnings("ignore:.*is not as dynrank-fx wrote it")
def test_a_file_whose_weights_were_changed(tmp_path: Path, exported: Any) -> None:
    model, x, good, _ = exported
    assert verify_onnx(good, model, x)[0] == CPU
    tampered, path = onnx.load(good), tmp_path / "m.onnx"
    weight = tampered.graph.initializer[0]
    changed = onnx.numpy_helper.to_array(weight).copy()
    changed.flat[0] += 0.05
    weight.CopyFrom(onnx.numpy_helper.from_array(changed, weight.name))
    onnx.save(tampered, path)
    with pytest.raises(dr.ExportError, match=r"differ by 0\.\d+ in 'output' on a batch of 2"):
        verify_onnx(path, model, x, batch_sizes=(2,))
    assert verify_onnx(path, model, x, tolerance=1.0)[0] == CPU
    changed.flat[0] = float("nan")
    weight.CopyFrom(onnx.numpy_helper.from_array(changed, weight.name))
    onnx.save(tampered, path)
    with pytest.raises(dr.ExportError, match="differ by nan"):
        verify_onnx(path, model, x, tolerance=1.0)


def test_integers_must_be_equal(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    export_onnx(Apply(lambda x: x + 1), torch.arange(6), path)
    with pytest.raises(dr.ExportError, match="differ in 2 of 2 values in 'output' on a batch of 2, which must be"):
        verify_onnx(path, Apply(lambda x: x + 2), torch.arange(6), batch_sizes=(2,))


def test_another_modules_file(exported: Any) -> None:
    _, x, path, _ = exported
    with pytest.raises(dr.ExportError, match=r"gives float32\[1, 4\] and PyTorch float32\[1, 5\] in 'output'"):
        verify_onnx(path, nn.Linear(40, 5), x)
    with pytest.raises(dr.ExportError, match="has 1 output and the module 2"):
        verify_onnx(path, Apply(lambda x: (x, x)), x)
    with pytest.raises(dr.ExportError, match="PyTorch fails on a batch of 1 "):
        verify_onnx(path, nn.Linear(7, 3), x)


@pytest.mark.filterwarnings("ignore:.*is not as dynrank-fx wrote it")
def test_inputs_by_name_and_order_whatever_the_file_dropped(tmp_path: Path) -> None:
    class Mixed(nn.Module):
        def forward(self, x: Tensor, unused: Tensor, y: Any, n: int, *, b: Tensor, a: Tensor) -> Tensor:
            return x + 2 * y["p"][0] + 3 * y["q"] + n * (a - b)

    x, p, q, a, b = (torch.full((2, 3), float(i)) for i in (1, 2, 3, 4, 5))
    args, path = (x, torch.zeros(2, 9), {"p": (p,), "q": q}, 3), tmp_path / "m.onnx"
    export_onnx(Mixed(), (args, {"a": a, "b": b}), path)
    names = ["x", "unused", "y_p_0", "y_q", "a", "b"]
    assert [value.name for value in onnx.load(path).graph.input] == names
    feeds = onnx_inputs(session(path), args, {"b": b, "a": a})
    assert [float(feeds[name].flat[0]) for name in names] == [1, 0, 2, 3, 4, 5]

    dropped = onnx.load(path)
    del dropped.graph.input[1]
    onnx.save(dropped, path)
    feeds = onnx_inputs(session(path), args, {"b": b, "a": a, "other": x})
    assert {name: float(array.flat[0]) for name, array in feeds.items()} == {
        "x": 1,
        "y_p_0": 2,
        "y_q": 3,
        "a": 4,
        "b": 5,
    }
    verify_onnx(path, Mixed(), (args, {"b": b, "a": a}))
    with pytest.raises(dr.ExportError, match=r"the ONNX input y_q is tensor\(float\) \['batch', 'sequence'\], and no"):
        onnx_inputs(session(path), (x, q), {"a": a, "b": b})
    with pytest.raises(dr.ExportError, match="the ONNX input x is "):
        onnx_inputs(session(path), (x.double(), p, q), {"a": a, "b": b})


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x * self.calls


def test_a_model_that_counts_its_calls_is_compared_from_the_state_that_was_exported(tmp_path: Path) -> None:
    model = Counter()
    assert len(export_onnx(model, torch.randn(3, 4), tmp_path / "m.onnx").agreements) == 4
    assert float(model.calls) == 0


class Given:
    """A session of one input x and one output y that gives what a test says."""

    class Value:
        def __init__(self, name: str) -> None:
            self.name, self.type, self.shape = name, "tensor(float)", ["batch", 3]

    def __init__(self, y: Tensor) -> None:
        self.y = y

    def get_inputs(self) -> list[Any]:
        return [Given.Value("x")]

    def get_outputs(self) -> list[Any]:
        return [Given.Value("y")]

    def run(self, names: None, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        return [self.y.numpy()]


def test_errors_are_those_of_the_worst_value() -> None:
    x = torch.tensor([[1.0, -4.0, 2.0], [0.0, 1.0, 1.0]])
    off = x + torch.tensor([[0.0, 1e-4, 0.0], [-3e-4, 0.0, 0.0]])
    (found,) = compare(Given(off), nn.Identity(), [((x,), {})], None)
    assert found == Agreement(2, "y", pytest.approx(3e-4, rel=1e-2), pytest.approx(3e-4 / 4, rel=1e-2))


@pytest.mark.parametrize(
    ("error", "tolerance", "agrees"),
    [(3e-4, None, True), (6e-4, None, False), (6e-4, 1e-3, True), (float("nan"), 1.0, False), (0.0, 0.0, True)],
)
def test_an_error_is_a_share_of_the_largest_value(error: float, tolerance: float | None, agrees: bool) -> None:
    """1e-4 of it in float32, and a hundredth of that absolutely."""
    x = torch.tensor([[1.0, -4.0, 2.0]])
    cases = [((x,), {})]
    if agrees:
        compare(Given(x + error), nn.Identity(), cases, tolerance)
        return
    with pytest.raises(dr.ExportError, match="onnxruntime and PyTorch differ by"):
        compare(Given(x + error), nn.Identity(), cases, tolerance)


def test_the_coarsest_type_that_takes_part_decides() -> None:
    x = torch.tensor([[1.0, -4.0, 2.0]])
    with pytest.raises(dr.ExportError, match=r"where 0\.0001 of"):
        compare(Given(x + 0.03), Apply(lambda layer, x: x, nn.Linear(2, 2)), [((x,), {})], None)
    compare(Given(x + 0.03), Apply(lambda layer, x: x, nn.Linear(2, 2).half()), [((x,), {})], None)


def test_batch_sizes_that_are_none() -> None:
    check_batch_sizes([1, 7])
    for sizes in ([], [0], [3, -1]):
        with pytest.raises(dr.ExportError, match="leave nothing to compare: give one or more, each 1 or more"):
            check_batch_sizes(sizes)
