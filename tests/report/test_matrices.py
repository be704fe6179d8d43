"""What is known of every matrix: spectra and ranks against torch.linalg in float64, break-even by its formula."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.report import inspect_net, inspect_onnx, matrices_json, matrices_table
from dynrank_fx.report.matrices import MatrixRow


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 12, 3, bias=False), nn.Flatten(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 2, bias=False)
    )


EXAMPLE = (torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)),)


def assert_of(row: MatrixRow, matrix: Tensor) -> None:
    """Against float64."""
    s = torch.linalg.svdvals(matrix.detach().double())
    assert row.spectrum == pytest.approx(s.tolist(), rel=1e-4, abs=1e-5)
    p = s / s.sum()
    assert row.effective_rank == pytest.approx(math.exp(-float((p * p.log()).nan_to_num().sum())), rel=1e-3)
    assert row.stable_rank == pytest.approx(float(s.square().sum() / s[0] ** 2), rel=1e-4)
    shares = s.square().cumsum(0) / s.square().sum()
    assert row.energy_rank == int((shares < 0.95).sum()) + 1


def test_every_matrix_of_a_model_that_is_captured_or_transformed() -> None:
    plain = model()
    weights = {name: p for name, p in plain.named_parameters() if p.ndim > 1}
    captured = inspect_net(dr.capture(plain, EXAMPLE), EXAMPLE)
    transformed = inspect_net(dr.transform(plain, EXAMPLE, rank=dr.Ratio(0.25), exclude=["4"]), EXAMPLE)
    for rows, states in ((captured, {"dense"}), (transformed, {"FULL", "dense"})):
        assert {row.name for row in rows} == set(weights)
        assert {row.state for row in rows} == states
        for row in rows:
            assert row.shape == tuple(weights[row.name].shape)
            assert_of(row, weights[row.name].flatten(1))
    (dense,) = [row for row in transformed if row.state == "dense"]
    assert (dense.name, bool(dense.note)) == ("4.weight", True), "it says why"


def test_sites_are_shown_as_they_stand() -> None:
    net = dr.transform(model(), EXAMPLE, rank=dr.Fixed(3))
    dr.enter_(net, {"0.weight": dr.Phase.LOW, "2.weight": dr.Phase.ADAPTOR})
    rows = {row.name: row for row in inspect_net(net)}
    assert rows["0.weight"].state == "LOW 3"
    assert rows["2.weight"].state == "ADAPTOR 3"
    assert len(rows["0.weight"].spectrum) == 3
    weight = net.get_submodule("0").weight.flatten(1)
    assert rows["0.weight"].spectrum == pytest.approx(torch.linalg.svdvals(weight.detach())[:3].tolist(), rel=1e-4)


def test_break_even_is_the_last_rank_at_which_factors_are_smaller() -> None:
    rows = {row.name: row for row in inspect_net(dr.capture(model(), EXAMPLE), EXAMPLE)}
    for name, m, n in (("0.weight", 12, 36), ("2.weight", 32, 48)):
        params, flops = rows[name].break_even
        assert params is not None
        assert params * (m + n) < m * n <= (params + 1) * (m + n)
        assert flops == params, "of these the FLOPs are in the same proportion"


def test_the_matrices_of_an_onnx_file_are_those_of_the_model(tmp_path: Path) -> None:
    plain = model().eval()
    dr.export_onnx(plain, EXAMPLE, tmp_path / "m.onnx")
    rows = inspect_onnx(tmp_path / "m.onnx")
    assert sorted((row.state, row.shape) for row in rows) == [
        ("Conv", (12, 4, 3, 3)),
        ("Gemm", (2, 32)),
        ("Gemm", (32, 48)),
    ]
    by_shape = {frozenset(p.shape): p for p in plain.parameters() if p.ndim > 1}
    for row in rows:
        assert_of(row, by_shape[frozenset(row.shape)].flatten(1))


def test_what_has_no_spectrum_or_is_no_file_is_told(tmp_path: Path) -> None:
    broken = model()
    with torch.no_grad():
        broken.get_parameter("2.weight")[0, 0] = float("nan")
    with pytest.raises(dr.DynrankError, match=r"^2\.weight has values that are not finite"):
        inspect_net(dr.capture(broken, EXAMPLE))
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(dr.ExportError, match="could not be read as an ONNX file"):
        inspect_onnx(tmp_path / "text.onnx")
    with pytest.raises(dr.ExportError, match=r"there is no file .*gone\.onnx: give an ONNX file, a model file, a run"):
        inspect_onnx(tmp_path / "gone.onnx")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dims", 17),
        ("dims", 0),
        ("dims", -1),
        ("data_type", 77),
        ("data_type", 8),
        ("length", 8),
        ("group", 5),
        ("group", 0),
    ],
)
def test_a_weight_that_does_not_fit_its_description_is_told(field: str, value: int, tmp_path: Path) -> None:
    weights = numpy_helper.from_array(np.ones((12, 4, 3, 3), np.float32), "w")
    node = helper.make_node("Conv", ["x", "w"], ["y"], group=1)
    if field == "group":
        node.attribute[0].i = value
    elif field == "length":
        weights.raw_data = weights.raw_data[value:]
    elif field == "dims":
        weights.dims[0] = value
    else:
        weights.data_type = value
    onnx.save(helper.make_model(helper.make_graph([node], "g", [], [], [weights])), tmp_path / "m.onnx")
    with pytest.raises(
        dr.ExportError, match=r"m\.onnx holds a damaged w \(.+\): export it again, or use an earlier copy$"
    ):
        inspect_onnx(tmp_path / "m.onnx")


def test_weights_of_which_nobody_says_where_they_are_are_told(tmp_path: Path) -> None:
    weights = onnx.TensorProto(name="w", dims=[4, 4], data_type=1, data_location=onnx.TensorProto.EXTERNAL)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    model = helper.make_model(helper.make_graph([node], "g", [], [], [weights]))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(dr.ExportError, match="could not be read as an ONNX file"):
        inspect_onnx(tmp_path / "m.onnx")


def test_the_table_and_the_json_say_the_same() -> None:
    rows = inspect_net(dr.transform(model(), EXAMPLE, rank=dr.Ratio(0.25)), EXAMPLE)
    table = matrices_table(rows).splitlines()
    for row, data in zip(rows, json.loads(matrices_json(rows)), strict=True):
        assert data == json.loads(json.dumps(vars(row)))
        (line,) = [each for each in table if each.startswith(row.name)]
        for cell in ("x".join(map(str, row.shape)), f"{row.effective_rank:.1f}", row.state, row.note):
            assert cell in line
    assert matrices_table(()) == "no matrix found"
    assert matrices_json(()) == "[]"
