"""The ONNX file, run here by onnxruntime itself, against the module it came from; and what must not be left behind."""

from __future__ import annotations

import errno
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from models import Modal, Tied, randomized
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.onnx import ExportReport, Precision, export_onnx, onnx_inputs, session, threads, verify_onnx
from dynrank_fx.onnx.agreement import Agreement
from dynrank_fx.onnx.convert import refuse_inflated
from dynrank_fx.onnx.session import check_options

CPU = "CPUExecutionProvider"


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


class Apply(nn.Module):
    def __init__(self, function: Any, *layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, *args: Any) -> Any:
        return self.function(*self.layers, *args)


def tagger_inputs(batch: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    padding = torch.zeros(batch, 6, dtype=torch.bool)
    padding[0, 4:] = True
    tokens = torch.randint(20, (batch, 6), generator=generator)
    return {"tokens": tokens, "padding": padding, "scale": torch.randn(batch, generator=generator)}


def run(path: Path, **feeds: Tensor) -> list[Tensor]:
    opened = onnxruntime.InferenceSession(path, providers=[CPU])
    arrays = opened.run(None, {name: tensor.numpy() for name, tensor in feeds.items()})
    return [torch.from_numpy(np.asarray(array)) for array in arrays]


def dims(path: Path) -> dict[str, tuple[int, ...]]:
    return {i.name: tuple(i.dims) for i in onnx.load(path).graph.initializer}


def assert_refused(folder: Path, match: str, *args: Any, **options: Any) -> None:
    """Refused in words, nothing new in the folder, and the file that was there untouched."""
    path = folder / "model.onnx"
    path.write_bytes(b"precious")
    with pytest.raises(dr.ExportError, match=match):
        export_onnx(*args, path, **options)
    assert [(p.name, p.read_bytes()) for p in folder.iterdir()] == [("model.onnx", b"precious")]


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[nn.Module, Tensor, Path, ExportReport]:
    """A linear layer's file, which tests may read and copy."""
    torch.manual_seed(0)
    model, x, path = nn.Linear(40, 4), torch.randn(2, 40), tmp_path_factory.mktemp("exported") / "linear.onnx"
    return model, x, path, export_onnx(model, x, path, batch_sizes=(1, 3))


class TestAgreement:
    def test_a_convolutional_net_on_batches_that_were_not_the_examples(self, tmp_path, capfd):
        model = randomized(Modal())
        report = export_onnx(model, torch.randn(4, 4, 6, 6), tmp_path / "m.onnx")
        assert model.training
        assert all(part.training for part in model.modules())
        assert capfd.readouterr() == ("", "")
        assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
        assert report.dynamic_batch
        assert [a.batch for a in report.agreements] == [1, 2, 5]
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

    def test_half_precision_has_a_tolerance_of_its_own(self, tmp_path):
        model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)).half()
        report = export_onnx(model, torch.randn(3, 64).half(), tmp_path / "m.onnx")
        assert 0 < max(a.max_rel for a in report.agreements) < 1e-2

    def test_a_batch_that_the_model_fixes_is_said_to_be_fixed(self, tmp_path):
        fixed = Apply(lambda layer, x: layer(x).view(2, -1), nn.Linear(4, 4))
        report = export_onnx(fixed, torch.randn(2, 4), tmp_path / "m.onnx")
        assert not report.dynamic_batch
        assert {a.batch for a in report.agreements} == {2}
        assert "batch fixed at 2; agrees with PyTorch on batch 2 (" in str(report)
        shape = onnx.load(tmp_path / "m.onnx").graph.input[0].type.tensor_type.shape
        assert [dim.dim_value for dim in shape.dim] == [2, 4]

    def test_a_model_that_takes_one_row_only_keeps_its_batch_of_one(self, tmp_path):
        single = Apply(lambda layer, x: layer(x.reshape(1, 4)), nn.Linear(4, 4))
        report = export_onnx(single, torch.randn(1, 4), tmp_path / "m.onnx")
        assert not report.dynamic_batch
        assert {a.batch for a in report.agreements} == {1}

    def test_given_dynamic_shapes_are_the_ones_exported(self, tmp_path):
        shapes = ({0: torch.export.Dim("rows"), 1: torch.export.Dim("length")},)
        model = Apply(lambda x: x.softmax(1))
        assert export_onnx(model, torch.randn(2, 5, 3), tmp_path / "m.onnx", dynamic_shapes=(shapes,)).dynamic_batch
        x = torch.randn(7, 11, 3)
        torch.testing.assert_close(run(tmp_path / "m.onnx", args_0=x)[0], x.softmax(1))

    def test_infinities_must_be_where_pytorch_has_them(self, tmp_path):
        masked = Apply(lambda x: x.masked_fill(x > 0, float("-inf")))
        report = export_onnx(masked, torch.randn(3, 8), tmp_path / "m.onnx")
        assert max(a.max_abs for a in report.agreements) == 0

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

    def test_tied_weights_are_stored_once_under_their_name(self, tmp_path):
        model = Tied()
        report = export_onnx(model, torch.randint(20, (3, 7)), tmp_path / "m.onnx")
        shapes = dims(tmp_path / "m.onnx")
        assert sorted(s for s in shapes.values() if len(s) == 2) == [(12, 12), (20, 12)]
        assert set(shapes) <= {name for name, _ in model.named_parameters(remove_duplicate=False)}
        assert report.params == sum(p.numel() for p in model.parameters())

    def test_a_product_of_weights_is_not_multiplied_out(self, tmp_path):
        class Product(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                # Names that the input and the output have as well.
                self.x, self.output = nn.Parameter(torch.randn(64, 2)), nn.Parameter(torch.randn(2, 64))

            def forward(self, x: Tensor) -> Tensor:
                return x @ (self.x @ self.output)

        export_onnx(Product(), torch.randn(3, 64), tmp_path / "m.onnx")
        assert set(dims(tmp_path / "m.onnx").values()) == {(64, 2), (2, 64)}

    def test_a_graph_that_grew_beyond_the_module_is_refused(self):
        dense = onnx.helper.make_tensor("dense", onnx.TensorProto.FLOAT, (64, 64), np.zeros(4096))
        model = onnx.helper.make_model(onnx.helper.make_graph([], "grown", [], [], [dense]))
        refuse_inflated(model, [torch.zeros(64, 64)])
        with pytest.raises(dr.ExportError, match="4,096 weights where the module has 256"):
            refuse_inflated(model, [torch.zeros(64, 2), torch.zeros(2, 64)])

    def test_a_table_that_forward_makes_is_no_weight_but_a_weight_written_twice_is(self):
        weight, table = torch.randn(40, 50), torch.arange(3000.0)
        given = [onnx.numpy_helper.from_array(weight.numpy(), "w"), onnx.numpy_helper.from_array(table.numpy(), "t")]
        again = onnx.numpy_helper.from_array(weight.t().contiguous().numpy(), "w_t")
        grown = onnx.helper.make_model(onnx.helper.make_graph([], "table", [], [], given))
        refuse_inflated(grown, [weight])
        grown.graph.initializer.append(again)
        with pytest.raises(dr.ExportError, match="7,000 weights where the module has 2,000"):
            refuse_inflated(grown, [weight])

    def test_keyword_inputs_of_a_graph_module_may_come_in_any_order(self, tmp_path):
        class Scaled(nn.Module):
            def forward(self, x: Tensor, scale: Tensor) -> Tensor:
                return torch.sin(x) * scale

        x, scale = torch.randn(3, 8), torch.rand(3, 8)
        for inputs in ({"scale": scale, "x": x}, {"x": x, "scale": scale}):
            report = export_onnx(torch.fx.symbolic_trace(Scaled()), inputs, tmp_path / "m.onnx")
            assert len(report.agreements) == 3

    def test_metadata_opset_and_no_traces_of_this_machine(self, tmp_path):
        path = tmp_path / "m.onnx"
        report = export_onnx(nn.Linear(4, 4), torch.ones(2, 4), path, opset=18, metadata={"key": "value"})
        loaded = onnx.load(path)
        assert report.opset == loaded.opset_import[0].version == 18
        assert report.file_size == path.stat().st_size
        said = {"dynrank_fx_version": dr.__version__, "torch_version": torch.__version__, "precision": "float32"}
        made = {"onnx_version": onnx.__version__, "onnxruntime_version": onnxruntime.__version__}
        assert {p.key: p.value for p in loaded.metadata_props} == {**said, **made, "key": "value"}
        assert loaded.producer_name == "dynrank-fx"
        assert str(Path(__file__).parent).encode() not in path.read_bytes()


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x * self.calls


def test_a_model_that_counts_its_calls_is_compared_from_the_state_that_was_exported(tmp_path):
    model = Counter()
    assert len(export_onnx(model, torch.randn(3, 4), tmp_path / "m.onnx").agreements) == 3
    assert float(model.calls) == 0


class TestRefusals:
    def test_a_module_that_disagrees_with_its_file(self, tmp_path):
        noisy = Apply(lambda x: x + torch.rand_like(x))
        match = r"differ by 0\.\d+ in 'output' on a batch of 1, where 0.0001 of the largest value"
        assert_refused(tmp_path, match, noisy, torch.randn(3, 4))

    def test_a_file_whose_weights_were_changed(self, tmp_path, exported):
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

    def test_integers_must_be_equal(self, tmp_path):
        path = tmp_path / "m.onnx"
        export_onnx(Apply(lambda x: x + 1), torch.arange(6), path)
        with pytest.raises(dr.ExportError, match="differ in 2 of 2 values in 'output' on a batch of 2, which must be"):
            verify_onnx(path, Apply(lambda x: x + 2), torch.arange(6), batch_sizes=(2,))

    def test_another_modules_file(self, exported):
        _, x, path, _ = exported
        with pytest.raises(dr.ExportError, match=r"gives float32\[1, 4\] and PyTorch float32\[1, 5\] in 'output'"):
            verify_onnx(path, nn.Linear(40, 5), x)
        with pytest.raises(dr.ExportError, match="has 1 outputs and the module 2"):
            verify_onnx(path, Apply(lambda x: (x, x)), x)
        with pytest.raises(dr.ExportError, match="PyTorch fails on a batch of 1 "):
            verify_onnx(path, nn.Linear(7, 3), x)

    def test_files_that_are_none(self, tmp_path, exported):
        model, x, good, _ = exported
        with pytest.raises(dr.ExportError, match="there is no file"):
            verify_onnx(tmp_path / "m.onnx", model, x)
        (tmp_path / "m.onnx").write_bytes(good.read_bytes()[:-200])
        with pytest.raises(dr.ExportError, match=r"m\.onnx is no ONNX file, or is damaged"):
            verify_onnx(tmp_path / "m.onnx", model, x)

    @pytest.mark.parametrize(
        ("function", "match"),
        [
            (lambda x: torch.linalg.svd(x)[1], "torch.onnx cannot convert Apply .*_linalg_svd"),
            (lambda x: (x, 3), "returns a plain number as output_1"),
            (lambda x: x * float("nan"), "PyTorch gives no finite value in 'output'"),
            (
                lambda x: x if x.sum() > 0 else -x,
                r"torch.export cannot trace the model \(Apply, test_export.py:\d+: .*\) \(GuardOnData",
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
        assert_refused(tmp_path, "each 1 or more", linear, x, batch_sizes=(2, 0))
        assert_refused(tmp_path, "there is no opset 99", linear, x, opset=99)
        assert_refused(tmp_path, "this onnxruntime has no Abacus", linear, x, providers=["Abacus"])
        large = nn.Linear(30000, 30000, device="meta")
        assert_refused(tmp_path, "holds 2 GB", large, x, external_data=False)

    def test_a_graph_that_is_stuck_in_training(self, tmp_path):
        x = torch.randn(3, 4)
        program = torch.export.export(nn.Sequential(nn.Linear(4, 4), nn.Dropout()), (x,))
        net = dr.transform(program, (x,), allow_unprofitable=True)
        assert_refused(tmp_path, "cannot be exported to ONNX: this graph was exported in training mode", net, x)

    def test_places_that_cannot_be_written(self, tmp_path, monkeypatch):
        linear, x = nn.Linear(4, 4), torch.randn(2, 4)
        with pytest.raises(dr.ExportError, match=r"there is no folder .*nowhere: make it first"):
            export_onnx(linear, x, tmp_path / "nowhere" / "m.onnx")
        with pytest.raises(dr.ExportError, match="is a folder: give the name of a file"):
            export_onnx(linear, x, tmp_path)
        monkeypatch.setattr(Path, "write_bytes", full_disk)
        with pytest.raises(dr.ExportError, match="No space left on device"):
            export_onnx(linear, x, tmp_path / "m.onnx")
        assert not list(tmp_path.iterdir())

    @pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
    def test_an_unwritable_folder(self, tmp_path):
        tmp_path.chmod(0o500)
        try:
            with pytest.raises(dr.ExportError, match=r"m\.onnx could not be written .*Permission denied"):
                export_onnx(nn.Linear(4, 4), torch.randn(2, 4), tmp_path / "m.onnx")
        finally:
            tmp_path.chmod(0o700)

    def test_no_onnxruntime(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        assert_refused(tmp_path, r"pip install 'dynrank-fx\[gpu\]'", nn.Linear(4, 4), torch.randn(2, 4))


def full_disk(path: Path, data: bytes) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class TestSessions:
    def test_a_provider_that_was_asked_for_must_be_the_one_that_runs(self, exported, monkeypatch):
        path = exported[2]
        assert session(path, [CPU]).get_providers() == [CPU]
        assert session(path, [(CPU, {})]).get_providers() == [CPU]
        # As on a machine whose onnxruntime was built for CUDA but finds no libraries: it falls back without a word.
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", CPU])
        monkeypatch.setattr(onnxruntime, "InferenceSession", on_cpu(onnxruntime.InferenceSession))
        with pytest.raises(dr.ExportError, match=f"CUDAExecutionProvider did not come up.*ask for {CPU}"):
            session(path, ["CUDAExecutionProvider"])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert session(path).get_providers() == [CPU]

    def test_inputs_by_name_and_order_whatever_the_file_dropped(self, tmp_path):
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
        with pytest.raises(dr.ExportError, match=r"the ONNX input y_q is tensor\(float\) \['\w+', 3\], and no tensor"):
            onnx_inputs(session(path), (x, q), {"a": a, "b": b})
        with pytest.raises(dr.ExportError, match="the ONNX input x is "):
            onnx_inputs(session(path), (x.double(), p, q), {"a": a, "b": b})


def on_cpu(real: Any) -> Any:
    return lambda path, options, providers, enable_fallback: real(path, options, providers=[CPU])


def test_the_report_is_one_line(exported):
    _, _, path, report = exported
    size, agreements = path.stat().st_size, report.agreements
    assert report == ExportReport(path, CPU, 20, size, 164, True, agreements)
    worst = max(a.max_abs for a in agreements), max(a.max_rel for a in agreements)
    assert str(report) == (
        f"{path}: {size / 1e3:.1f} kB, opset 20, batch free; agrees with PyTorch on batches 1, 3 "
        f"(largest error {worst[0]:.2g} absolute, {worst[1]:.2g} relative), run by {CPU}"
    )
    large = replace(report, path=Path("m.onnx"), file_size=1_234_567, agreements=(Agreement(4, "y", 2.1e-7, 3e-7),))
    assert str(large).startswith(
        "m.onnx: 1.2 MB, opset 20, batch free; agrees with PyTorch on batch 4 (largest error 2.1e-07"
    )


# What a file is called, and where its weights lie


@pytest.fixture
def perceptron() -> tuple[nn.Module, tuple[Tensor]]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 8)).eval(), (torch.randn(2, 24),)


def test_names_that_clash(perceptron: Any, tmp_path: Path) -> None:
    """With a weight or another input: refused. With a value inside, which nobody named: that gets another."""
    for names in ({"input_names": ["0.weight"]}, {"input_names": ["a"], "output_names": ["a"]}):
        with pytest.raises(dr.ExportError, match="is the name of another input, output or weight: choose another"):
            dr.export_onnx(*perceptron, tmp_path / "m.onnx", **names)
    with pytest.raises(dr.ExportError, match="give as many output names"):
        dr.export_onnx(*perceptron, tmp_path / "m.onnx", output_names=[""])
    dr.export_onnx(*perceptron, tmp_path / "m.onnx")
    inside = onnx.load(tmp_path / "m.onnx").graph.node[0].output[0]
    dr.export_onnx(*perceptron, tmp_path / "m.onnx", output_names=[inside])
    assert onnx.load(tmp_path / "m.onnx").graph.output[0].name == inside


def test_a_dimension_that_the_model_fixes_is_named(perceptron: Any, tmp_path: Path) -> None:
    with pytest.raises(dr.ExportError, match="the model fixes width at the size in the example: leave that dimension"):
        dr.export_onnx(*perceptron, tmp_path / "m.onnx", dynamic={"input": {1: "width"}})


def test_weights_in_a_file_of_their_own_can_be_read_by_all_and_written_again(
    perceptron: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        dr.export_onnx(*perceptron, "m.onnx", external_data=True)
    assert Path("m.onnx").stat().st_mode == Path("m.onnx.data").stat().st_mode
    assert Path("m.onnx.data").stat().st_size >= 4 * 24 * 48
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]


@pytest.mark.parametrize("broken", ["missing", "short", "newer IR", "newer opset"])
def test_a_file_that_cannot_be_opened_says_which_and_why(perceptron: Any, tmp_path: Path, broken: str) -> None:
    path = tmp_path / "m.onnx"
    dr.export_onnx(*perceptron, path, external_data=broken in ("missing", "short"))
    weights, sentence = tmp_path / "m.onnx.data", "is of a newer ONNX than this onnxruntime knows"
    if broken == "missing":
        weights.unlink()
    elif broken == "short":
        weights.write_bytes(weights.read_bytes()[:100])
    else:
        model = onnx.load(path)
        if broken == "newer IR":
            model.ir_version = 99
        else:
            model.opset_import[0].version = 99
        path.write_bytes(model.SerializeToString())
    if broken in ("missing", "short"):
        sentence = "the weights of m.onnx lie in a file beside it, which is missing or damaged"
    with pytest.raises(dr.ExportError, match=sentence):
        session(path, ("CPUExecutionProvider",))


def test_a_type_that_the_provider_has_not_is_told(perceptron: Any, tmp_path: Path) -> None:
    with pytest.raises(dr.ExportError, match="float32 or float16") as told:
        dr.export_onnx(*perceptron, tmp_path / "m.onnx", precision=Precision.BFLOAT16)
    assert "onnxruntime_src" not in str(told.value)


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


def test_an_option_that_the_provider_has_not_is_refused() -> None:
    class Opened:
        def get_provider_options(self) -> dict[str, dict[str, str]]:
            return {"CUDAExecutionProvider": {"enable_cuda_graph": "1"}, CPU: {}}

    check_options(Opened(), "CUDAExecutionProvider", {"enable_cuda_graph": "1"})
    check_options(Opened(), CPU, {"use_arena": "0"})
    with pytest.raises(dr.ExportError, match="CUDAExecutionProvider has no option nonsense"):
        check_options(Opened(), "CUDAExecutionProvider", {"nonsense": "1"})


def test_sessions_run_on_as_many_threads_as_the_variable_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for said, count in (("3", 3), ("4,2", 4), ("", 0), ("many", 0)):
        monkeypatch.setenv("OMP_NUM_THREADS", said)
        assert threads() == count
