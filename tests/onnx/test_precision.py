"""Files in other types, under other names, with other free dimensions, with the weights outside: all of them agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.errors import ExportError
from dynrank_fx.onnx import Precision, export_onnx


class Tagger(nn.Module):
    """Tokens [batch, length] to scores, by the table that they were looked up in."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(50, 64), nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        self.norm = nn.LayerNorm(64)

    def forward(self, tokens: Tensor, scale: Tensor) -> Tensor:
        x = self.table(tokens) * scale[:, None, None]
        return self.norm(x + self.mix(x)) @ self.table.weight.T


@pytest.fixture
def tagger() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    return Tagger().eval(), (torch.randint(0, 50, (3, 7)), torch.rand(3) + 0.5)


def run(path: Path, *inputs: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feeds = {spec.name: t.numpy() for spec, t in zip(session.get_inputs(), inputs, strict=True)}
    return torch.from_numpy(np.asarray(session.run(None, feeds)[0]))


def kinds(path: Path) -> dict[str, int]:
    return {each.name: each.data_type for each in onnx.load(path).graph.initializer}


def test_float16_takes_and_gives_float32_and_is_half_as_large(tmp_path: Path, tagger: Any) -> None:
    model, inputs = tagger
    full = export_onnx(model, inputs, tmp_path / "full.onnx")
    half = export_onnx(model, inputs, tmp_path / "half.onnx", precision=Precision.FLOAT16)
    assert half.file_size < 0.6 * full.file_size
    assert {"table.weight", "mix.0.weight"} <= set(kinds(tmp_path / "half.onnx"))
    assert kinds(tmp_path / "half.onnx")["mix.0.weight"] == onnx.TensorProto.FLOAT16
    with torch.no_grad():
        y = model(*inputs)
    z = run(tmp_path / "half.onnx", *inputs)
    assert z.dtype is torch.float32
    assert 0 < float((y - z).abs().max()) < 1e-2 * float(y.abs().max())
    assert [spec.name for spec in onnx.load(tmp_path / "half.onnx").graph.input] == ["tokens", "scale"]
    assert next(iter(model.parameters())).dtype is torch.float32  # the caller's is as it was


def test_bfloat16_where_the_provider_has_it_or_a_sentence(tmp_path: Path, tagger: Any) -> None:
    model, inputs = tagger
    with pytest.raises(
        ExportError, match=r"CPUExecutionProvider cannot run m\.onnx .*: export it in float32 or float16"
    ):
        export_onnx(
            model, inputs, tmp_path / "m.onnx", precision=Precision.BFLOAT16, providers=["CPUExecutionProvider"]
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("factored", [False, True])
def test_int8_weights_have_one_scale_per_row_and_are_a_quarter_as_large(
    tmp_path: Path, tagger: Any, factored: bool
) -> None:
    model, inputs = tagger
    if factored:
        net = dr.transform(model, inputs, rank=dr.Ratio(0.25))
        model = dr.truncate(net, [inputs])
    full = export_onnx(model, inputs, tmp_path / "full.onnx")
    report = export_onnx(model, inputs, tmp_path / "m.onnx", precision=Precision.INT8_WEIGHTS)
    assert report.file_size < (0.5 if factored else 0.35) * full.file_size
    stored = {each.name: onnx.numpy_helper.to_array(each) for each in onnx.load(tmp_path / "m.onnx").graph.initializer}
    name = "mix.0.left.weight" if factored else "mix.0.weight"
    W = dict(model.named_parameters())[name].detach().numpy()
    q, scale = stored[f"{name}_int8"], stored[f"{name}_scale"]
    assert (q.dtype, len(scale), name in stored) == (np.int8, len(W), False)
    assert np.abs(q * scale[:, None] - W).max() <= 0.5001 * scale.max()
    assert [key for key in stored if key.startswith("table.")].count("table.weight_int8") == (0 if factored else 1)
    with torch.no_grad():
        y = model(*inputs)
    z = run(tmp_path / "m.onnx", *inputs)
    assert float((y - z).norm()) < 0.02 * float(y.norm())


def test_a_weight_that_float16_cannot_hold_is_named(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    nn.init.constant_(model.weight, 1e5)
    with pytest.raises(ExportError, match="weight has values that float16 cannot hold"):
        export_onnx(model, torch.ones(2, 4), tmp_path / "m.onnx", precision=Precision.FLOAT16)
    assert not list(tmp_path.iterdir())


def test_dimensions_and_values_by_name(tmp_path: Path, tagger: Any) -> None:
    model, inputs = tagger
    report = export_onnx(
        model,
        inputs,
        tmp_path / "m.onnx",
        dynamic={"tokens": {0: "batch", 1: "length"}, "scale": {0: "batch"}},
        input_names=["ids", "factor"],
        output_names=["scores"],
    )
    graph = onnx.load(tmp_path / "m.onnx").graph
    dims = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert dims == {"ids": ["batch", "length"], "factor": ["batch"], "scores": ["batch", "length", 50]}
    assert report.dynamic_batch
    more = torch.randint(0, 50, (5, 11)), torch.rand(5)
    torch.testing.assert_close(run(tmp_path / "m.onnx", *more), model(*more), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dynamic": {"x": {0: "batch"}}}, "takes no tensor 'x' to free a dimension of"),
        ({"dynamic": {"tokens": {2: "batch"}}}, "tokens has 2 dimensions, counted from 0, and none is number 2"),
        ({"dynamic": {}, "dynamic_shapes": {}}, "not both"),
        ({"input_names": ["a"]}, r"the file has 2 inputs \(tokens, scale\): give as many input names"),
        ({"output_names": ["a", "b"]}, "the file has 1 outputs"),
        ({"more_inputs": [(torch.zeros(2, 3), torch.zeros(2))]}, "no tensor like that"),
    ],
)
def test_options_that_do_not_fit_are_told(tmp_path: Path, tagger: Any, options: dict[str, Any], words: str) -> None:
    model, inputs = tagger
    with pytest.raises(ExportError, match=words):
        export_onnx(model, inputs, tmp_path / "m.onnx", **options)
    assert not list(tmp_path.iterdir())


def test_weights_in_a_file_of_their_own(tmp_path: Path, tagger: Any) -> None:
    model, inputs = tagger
    report = export_onnx(model, inputs, tmp_path / "m.onnx", external_data=True)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(sizes) == {"m.onnx", "m.onnx.data"}
    assert sizes["m.onnx"] < 60_000 < 0.5 * sizes["m.onnx.data"]
    assert report.file_size == sum(sizes.values())
    torch.testing.assert_close(run(tmp_path / "m.onnx", *inputs), model(*inputs), rtol=1e-4, atol=1e-5)


def test_real_inputs_are_compared_too(tmp_path: Path, tagger: Any) -> None:
    model, inputs = tagger
    report = export_onnx(
        model, inputs, tmp_path / "m.onnx", more_inputs=[tuple(t.repeat_interleave(3, 0) for t in inputs)]
    )
    assert [agreement.batch for agreement in report.agreements] == [1, 2, 5, 3, 9]


@pytest.mark.parametrize("precision", [Precision.INT8_WEIGHTS, Precision.FLOAT16])
def test_a_batch_norm_that_the_exporter_folds_into_a_convolution(tmp_path: Path, precision: Precision) -> None:
    """The file's weight is then not the module's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 8, 3))
    model(torch.randn(16, 3, 9, 9) * 3 + 1)
    x = torch.randn(4, 3, 9, 9)
    export_onnx(model, x, tmp_path / "m.onnx", precision=precision)
    with torch.no_grad():
        y = model.eval()(x)
    assert float((run(tmp_path / "m.onnx", x) - y).norm()) < 0.02 * float(y.norm())
