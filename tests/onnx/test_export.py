"""The ONNX file, run here by onnxruntime itself, against the module it came from; and what must not be left behind."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from exporting import CPU, Apply, dims, run
from models import Modal, randomized
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.onnx import ExportReport, Precision, export_onnx, session
from dynrank_fx.onnx.agreement import Agreement


class Tagger(nn.Module):
    """Tokens and a mask in, a dict of several outputs out: a tied embedding around a transformer layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, *, padding: Tensor, scale: Tensor) -> dict[str, Any]:
        hidden = self.layer(self.embed(tokens), src_key_padding_mask=padding)
        logits = self.head(hidden * scale[:, None, None])
        return {"logits": logits, "tags": (logits.argmax(-1), hidden.mean(1)), "nothing": None, "tokens": tokens}


def tagger_inputs(batch: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    padding = torch.zeros(batch, 6, dtype=torch.bool)
    padding[0, 4:] = True
    tokens = torch.randint(20, (batch, 6), generator=generator)
    return {"tokens": tokens, "padding": padding, "scale": torch.randn(batch, generator=generator)}


def assert_refused(folder: Path, match: str, *args: Any, **options: Any) -> None:
    """Refused in words, nothing new in the folder, and the file that was there untouched."""
    path = folder / "model.onnx"
    path.write_bytes(b"precious")
    with pytest.raises(dr.ExportError, match=match):
        export_onnx(*args, path, **options)
    assert [(p.name, p.read_bytes()) for p in folder.iterdir()] == [("model.onnx", b"precious")]


class TestAgreement:
    def test_a_convolutional_net_on_batches_that_were_not_the_examples(self, tmp_path, capfd):
        model = randomized(Modal())
        report = export_onnx(model, torch.randn(4, 4, 6, 6), tmp_path / "m.onnx")
        assert model.training
        assert all(part.training for part in model.modules())
        assert capfd.readouterr() == ("", "")
        assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
        assert report.dynamic_batch
        assert [a.batch for a in report.agreements] == [1, 2, 5, 4, 4]  # the last ones of other heights and widths
        for batch in (1, 3, 9):
            x = torch.randn(batch, 4, 6, 6)
            (got,) = run(tmp_path / "m.onnx", x=x)
            torch.testing.assert_close(got, model.eval()(x).detach(), rtol=1e-5, atol=1e-6)

    def test_a_transformer_with_keyword_inputs_and_several_outputs(self, tmp_path):
        model, path = randomized(Tagger()).eval(), tmp_path / "tagger.onnx"
        report = export_onnx(model, tagger_inputs(1), path)
        assert report.dynamic_batch
        names = [output.name for output in onnx.load(path).graph.output]
        assert names == ["logits", "tags_0", "tags_1", "tokens_out"]
        assert {a.output for a in report.agreements} == set(names)
        for batch in (1, 4):
            inputs = tagger_inputs(batch, seed=batch)
            logits, tags, mean, tokens = run(path, **inputs)
            torch.backends.mha.set_fastpath_enabled(False)
            try:
                expected = model(**inputs)
            finally:
                torch.backends.mha.set_fastpath_enabled(True)
            torch.testing.assert_close(logits, expected["logits"].detach(), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(mean, expected["tags"][1].detach(), rtol=1e-4, atol=1e-5)
            assert torch.equal(tags, expected["tags"][0])
            assert torch.equal(tokens, inputs["tokens"])

    def test_a_graph_made_by_torch_export_is_taken_as_it_is(self, tmp_path):
        model = nn.Sequential(nn.Linear(4, 4), nn.Dropout()).eval()
        program = torch.export.export(model, (torch.randn(3, 4),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
        assert export_onnx(program.module(), torch.randn(3, 4), tmp_path / "m.onnx").dynamic_batch

    @pytest.mark.gpu
    def test_on_cuda_by_cuda(self, tmp_path):
        model = randomized(Modal()).cuda()
        report = export_onnx(model, torch.randn(4, 4, 6, 6, device="cuda"), tmp_path / "m.onnx")
        assert report.provider == "CUDAExecutionProvider"


class TestWhatIsStored:
    @pytest.mark.parametrize("how", list(dr.Capture))
    def test_a_low_net_is_exported_as_its_factors(self, tmp_path, how):
        model = nn.Sequential(nn.Linear(64, 48, bias=False), nn.Tanh(), nn.Dropout())
        x, path = torch.randn(3, 7, 64), tmp_path / "low.onnx"
        net = dr.transform(model, (x,), rank=dr.Ratio(0.1), how=how)
        dr.enter_(net, dr.Phase.LOW)
        report = export_onnx(net, (x,), path)
        assert {frozenset(shape) for shape in dims(path).values() if len(shape) == 2} == {
            frozenset({48, 4}),
            frozenset({4, 64}),
        }
        assert 4 * (48 + 64) <= report.params < 4 * (48 + 64) + 20
        assert net.training
        name = onnx.load(path).graph.input[0].name
        torch.testing.assert_close(run(path, **{name: x})[0], net.eval()(x).detach(), rtol=1e-5, atol=1e-6)

    def test_a_full_net_a_truncated_one_and_one_inside_another_module(self, tmp_path):
        x = torch.randn(3, 4, 6, 6)
        net = dr.transform(randomized(Modal()), (x,), rank=dr.Ratio(0.25), allow_unprofitable=True)
        full = export_onnx(net, (x,), tmp_path / "full.onnx")
        dr.enter_(net, dr.Phase.LOW)
        low = export_onnx(dr.truncate(net), (x,), tmp_path / "low.onnx")
        assert low.params < full.params
        outer = export_onnx(nn.Sequential(net, nn.Softmax(1)), (x,), tmp_path / "outer.onnx")
        assert outer.params == low.params

    def test_keyword_inputs_of_a_graph_module_may_come_in_any_order(self, tmp_path):
        class Scaled(nn.Module):
            def forward(self, x: Tensor, scale: Tensor) -> Tensor:
                return torch.sin(x) * scale

        x, scale = torch.randn(3, 8), torch.rand(3, 8)
        for inputs in ({"scale": scale, "x": x}, {"x": x, "scale": scale}):
            report = export_onnx(torch.fx.symbolic_trace(Scaled()), inputs, tmp_path / "m.onnx")
            assert len(report.agreements) == 4

    @pytest.mark.parametrize("how", [None, dr.Capture.EXPORT, dr.Capture.MODULES])
    def test_keyword_inputs_may_leave_out_one_between_others(self, tmp_path, how):
        class Gap(nn.Module):
            def __init__(self):
                super().__init__()
                self.a = nn.Linear(8, 8)

            def forward(self, signal, lengths=None, weight=None):
                return self.a(signal) if weight is None else self.a(signal) * weight

        inputs = {"weight": torch.rand(4, 1), "signal": torch.randn(4, 8)}
        net = dr.transform(Gap(), inputs, rank=dr.Fixed(2), how=how)
        for module in (net, dr.truncate(net)):
            assert dr.export_onnx(module, inputs, tmp_path / "m.onnx").dynamic_batch


class TestRefusals:
    def test_a_module_that_disagrees_with_its_file(self, tmp_path):
        noisy = Apply(lambda x: x + torch.rand_like(x))
        match = r"differ by 0\.\d+ in 'output' on a batch of 1, where 0.0001 of the largest value"
        assert_refused(tmp_path, match, noisy, torch.randn(3, 4))

    @pytest.mark.parametrize(
        ("function", "match"),
        [
            (lambda x: torch.linalg.svd(x)[1], "torch.onnx cannot convert Apply .*_linalg_svd"),
            (lambda x: (x, 3), "returns a plain number as output_1"),
            (lambda x: x * float("nan"), "PyTorch gives no finite value in 'output'"),
            (
                lambda x: x if x.sum() > 0 else -x,
                r"torch.export cannot trace the model \(Apply, exporting.py:\d+: .*\) \(GuardOnData",
            ),
        ],
    )
    def test_models_that_onnx_cannot_hold(self, tmp_path, capfd, function, match):
        assert_refused(tmp_path, match, Apply(function), torch.randn(3, 4))
        assert capfd.readouterr() == ("", "")

    def test_inputs_and_options_that_make_no_sense(self, tmp_path):
        linear, x = nn.Linear(4, 4), torch.randn(2, 4)
        assert_refused(tmp_path, "torch.export cannot trace Linear", linear, torch.randn(2, 5))
        assert_refused(tmp_path, "leave nothing to compare", linear, x, batch_sizes=())
        for sizes in ((2, 0), (2.5,), ("2",), 3):
            assert_refused(tmp_path, "each 1 or more", linear, x, batch_sizes=sizes)
        assert_refused(tmp_path, "there is no opset 99", linear, x, opset=99)
        assert_refused(tmp_path, "there is no opset '18'", linear, x, opset="18")
        assert_refused(tmp_path, "this onnxruntime has no Abacus", linear, x, providers=["Abacus"])
        assert_refused(tmp_path, r"providers are a list: give \['Abacus'\]", linear, x, providers="Abacus")
        assert_refused(tmp_path, "3 is no provider: give a name", linear, x, providers=[3])
        for tolerance in ("loose", -1, float("nan")):
            assert_refused(
                tmp_path, "a tolerance of .* cannot be: give a number of 0 or more", linear, x, tolerance=tolerance
            )
        assert_refused(tmp_path, "'xy' are no names of inputs or outputs: give a list", linear, x, input_names="xy")
        assert_refused(tmp_path, r"\[3\] are no names of inputs or outputs", linear, x, output_names=[3])
        assert_refused(tmp_path, "metadata are texts by name, not 'rank': 4", linear, x, metadata={"rank": 4})
        for dynamic in (3, {"input": 0}, {"input": {0: 1}}):
            assert_refused(tmp_path, "name dimensions by argument, such as", linear, x, dynamic=dynamic)
        large = nn.Linear(30000, 30000, device="meta")
        assert_refused(tmp_path, "holds 2 GB", large, x, external_data=False)

    @pytest.mark.parametrize("name", ["model.txt", "model"])
    def test_a_name_that_is_none_of_an_onnx_file(self, tmp_path, name):
        with pytest.raises(dr.ExportError, match=rf"{name} is no name of an ONNX file: give one that ends in \.onnx"):
            export_onnx(nn.Linear(4, 4), torch.randn(2, 4), tmp_path / name)
        assert list(tmp_path.iterdir()) == []

    def test_a_graph_that_is_stuck_in_training(self, tmp_path):
        x = torch.randn(3, 4)
        program = torch.export.export(nn.Sequential(nn.Linear(4, 4), nn.Dropout()), (x,))
        net = dr.transform(program, (x,), allow_unprofitable=True)
        assert_refused(tmp_path, "cannot be exported to ONNX: this graph was exported in training mode", net, x)

    def test_no_onnxruntime(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        assert_refused(tmp_path, r"pip install 'dynrank-fx\[gpu\]'", nn.Linear(4, 4), torch.randn(2, 4))


def test_the_report_is_one_line(exported):
    _, _, path, report = exported
    size, agreements = path.stat().st_size, report.agreements
    assert report == ExportReport(path, CPU, 20, size, 164, True, agreements, {"input": ("batch", 40)})
    worst = max(a.max_abs for a in agreements), max(a.max_rel for a in agreements)
    assert str(report) == (
        f"{path}: {size / 1e3:.1f} kB, opset 20, batch free (input is batch x 40); agrees with PyTorch on batches 1, 3 "
        f"(largest error {worst[0]:.2g} absolute, {worst[1]:.2g} relative), run by {CPU}"
    )
    assert str(replace(report, elsewhere={"Attention": 2})).endswith(f"run by {CPU}, but for 2 Attention")
    large = replace(report, path=Path("m.onnx"), file_size=1_234_567, agreements=(Agreement(4, "y", 2.1e-7, 3e-7),))
    assert str(large).startswith(
        "m.onnx: 1.2 MB, opset 20, batch free (input is batch x 40); agrees with PyTorch on batch 4 (largest error"
    )


# What a file is called, and where its weights lie


def test_a_batch_norm_folds_into_the_second_factor_and_the_factors_stay_two(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 32, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU())
    model(torch.randn(8, 16, 8, 8))
    model.eval()
    x = (torch.randn(2, 16, 8, 8),)
    small = dr.truncate(dr.transform(model, x, rank=dr.Fixed(4)), [x])
    dr.export_onnx(small, x, tmp_path / "m.onnx")
    assert [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node] == ["Conv", "Conv", "Relu"]
    (y,) = session(tmp_path / "m.onnx", (CPU,)).run(None, {"input": x[0].numpy()})
    torch.testing.assert_close(torch.from_numpy(y), small(*x), rtol=1e-4, atol=1e-5)


class Differences(nn.Module):
    """What int8 weights spoil: neighbouring rows share one huge entry, which their difference does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)
        with torch.no_grad():
            self.layer.weight[:, 0] = 1000.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y[:, 1:] - y[:, :-1]


@pytest.mark.parametrize("example", [torch.zeros(2, 64), torch.ones(2, 64), torch.randn(2, 64), torch.zeros(1, 64)])
def test_an_example_of_one_value_is_not_all_that_is_compared_on(example: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    assert_refused(
        tmp_path, "onnxruntime and PyTorch differ by", Differences(), (example,), precision=Precision.INT8_WEIGHTS
    )


def test_so_with_tokens_that_are_all_the_same(tmp_path: Path) -> None:
    """Only row 0 of the table is what int8 makes of it."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.rest = nn.Embedding(40, 64), Differences()
            with torch.no_grad():
                self.table.weight[0] = 0
                self.rest.layer.bias.zero_()

        def forward(self, ids: Tensor) -> Tensor:
            return self.rest(self.table(ids).sum(1))

    torch.manual_seed(0)
    ids = torch.zeros(2, 3, dtype=torch.long)
    assert_refused(tmp_path, "onnxruntime and PyTorch differ by", Tokens(), (ids,), precision=Precision.INT8_WEIGHTS)
