"""``dynrank-fx compress``: from a trained model or a run to a smaller file, within the budget or in words."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import Result

from dynrank_fx import compression
from dynrank_fx.cli.modelfile import load_model_file
from dynrank_fx.errors import ExportError

Run = Callable[..., Result]


@pytest.fixture
def weights(write: Run) -> str:
    """Weights that are not those of ``model()``."""
    torch.manual_seed(7)
    model = load_model_file(Path(write())).model()
    torch.save(model.state_dict(), "weights.pt")
    return "weights.pt"


def stored(path: str) -> int:
    model = onnx.load(path)
    return sum(int(np.prod(each.dims)) for each in model.graph.initializer if each.data_type == onnx.TensorProto.FLOAT)


def test_a_model_becomes_a_smaller_file_with_its_plan(weights: str, run: Run, folder: Path) -> None:
    result = run("compress", "model.py", "--weights", weights, "--budget", "params=0.6", "-o", "m.onnx", "--no-timing")
    assert "of dense)" in result.stdout
    assert "metric      " in result.stdout
    assert "agrees with PyTorch on batches 1, 2, 5" in result.stdout
    model = load_model_file(Path("model.py")).model()
    dense = sum(p.numel() for p in model.parameters())
    assert stored("m.onnx") <= 0.6 * dense + 2 * 16  # the statistics of the batch norm
    metadata = {p.key: p.value for p in onnx.load("m.onnx").metadata_props}
    assert "dense: " in metadata["dynrank_metric"]
    assert '"rank"' in metadata["dynrank_plan"]


def test_with_all_parameters_it_computes_what_the_weights_do(weights: str, run: Run) -> None:
    run("compress", "model.py", "--weights", weights, "--budget", "params=1", "-o", "m.onnx", "--no-timing")
    model = load_model_file(Path("model.py")).model()
    model.load_state_dict(torch.load(weights))
    x = torch.randn(3, 3, 4, 4)
    session = onnxruntime.InferenceSession("m.onnx", providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(np.asarray(y)), model.eval()(x), rtol=1e-4, atol=1e-5)


ATTENTION = """
import torch
from torch import nn

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return torch.softmax(self.query(x) @ self.key(x).mT, -1) @ self.value(x)

def model():
    return Attention()

def example_inputs():
    return (torch.randn(2, 5, 32),)

def calibration_data():
    return [torch.randn(8, 5, 32) for _ in range(2)]
"""


@pytest.mark.parametrize("form", ["graph", "layers"])
def test_layers_that_read_one_input_share_a_factor(run: Run, folder: Path, form: str) -> None:
    (folder / "a.py").write_text(ATTENTION)
    given = ("compress", "a.py", "--budget", "params=0.5", "--no-timing", "--form", form, "--share-inputs")
    told = json.loads(run(*given, "-o", "m.pt", "--json").stdout)
    small = torch.load("m.pt", weights_only=False)
    rank = small.query.right.weight.shape[0]
    assert [(each["site"], each["rank"]) for each in told["sites"]] == [
        (f"{name}.weight", rank) for name in ("query", "key", "value")
    ]
    assert sum(p.numel() for p in small.parameters()) == 3 * (32 * rank + 32) + 32 * rank, "one right factor"
    assert told["params"][1] == 3 * (32 * rank + 32) + 32 * rank


def test_pytorch_too_and_a_run_and_a_recovery_by_the_loss(write: Run, run: Run, folder: Path) -> None:
    run("train", write(), "--no-compile", "--epochs", "1", "--schedule", "full", "--out", "r")
    result = run(
        *("compress", "r", "--budget", "flops=0.8", "-o", "m.pt", "--no-timing"),
        *("--recover-steps", "3", "--recover-by", "loss"),
    )
    assert result.stdout.splitlines()[-1].startswith("m.pt: a PyTorch module")
    small = torch.load("m.pt", weights_only=False)
    assert small(torch.randn(3, 3, 4, 4)).shape == (3, 8)


def test_sites_are_timed_by_default(weights: str, run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    result = run("compress", "model.py", "--weights", weights, "--budget", "latency=1", "-o", "m.onnx")
    assert "in onnxruntime" in result.stdout
    assert (folder / "cache" / "dynrank-fx" / "times.json").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--budget", "size=0.5", "-o", "m.onnx"], "'size=0.5' is none: give params=0.5"),
        (["--budget", "params=half", "-o", "m.onnx"], "'params=half' is none: give params=0.5"),
        (["--budget", "params=1.5", "-o", "m.onnx"], "a budget of 1.5 is no share of the dense model"),
        (["--budget", "params=0.01", "-o", "m.onnx"], "0.01 of the dense parameters cannot be met"),
        (["--budget", "params=0.5", "-o", "m.bin"], "m.bin is neither an .onnx nor a .pt file"),
        (["--budget", "params=0.5", "-o", "no/m.onnx"], "there is no folder no: make it first"),
        (["--budget", "params=0.5", "-o", "m.onnx", "--weights", "no.pt"], "there is no file no.pt"),
        (
            ["--budget", "params=0.5", "-o", "m.onnx", "--weights", "model.py"],
            "model.py could not be loaded into model()",
        ),
        (["--budget", "params=0.5", "-o", "m.onnx", "--provider", "Toaster"], "this onnxruntime has no Toaster"),
    ],
)
def test_what_cannot_be_is_told(write: Run, refused: Run, folder: Path, options: list[str], sentence: str) -> None:
    write()
    assert sentence in refused("compress", "model.py", *options)
    assert {p.name for p in folder.iterdir()} <= {"model.py", "__pycache__"}


def test_a_file_without_data_is_told_what_to_add(write: Run, refused: Run) -> None:
    write("del train_data")
    said = refused("compress", "model.py", "--budget", "params=0.5", "-o", "m.onnx")
    assert said.startswith("model.py has neither calibration_data() nor train_data()")
    write("def calibration_data():\n        return []")
    said = refused("compress", "model.py", "--budget", "params=0.5", "-o", "m.onnx")
    assert said.startswith("calibration_data() of model.py gave no batch: give one or more")
    write("def calibration_data():\n        return [(torch.zeros(2, 3, 5, 5), torch.zeros(2))]")
    said = refused("compress", "model.py", "--budget", "params=0.5", "-o", "m.onnx")
    assert "calibration batch 0 does not fit the model (RuntimeError: mat1 and mat2" in said
    write("def calibration_data():\n        return [(torch.full((2, 3, 4, 4), float('nan')), torch.zeros(2))]")
    said = refused("compress", "model.py", "--budget", "params=0.5", "-o", "m.onnx")
    assert "calibration batch 0 holds numbers that are not finite" in said


def test_a_metric_needs_no_loss_and_must_be_a_number(write: Run, run: Run, refused: Run) -> None:
    command = ("compress", "model.py", "--budget", "params=0.6", "-o", "m.onnx", "--no-timing")
    write("del loss")
    assert "metric      " in run(*command).stdout
    write("metric = lambda output, batch: float('nan')")
    assert "the metric is nan, which nothing can be compared with" in refused(*command)


def test_data_that_fail_while_they_are_drawn_and_recovery_without_data_are_told(write: Run, refused: Run) -> None:
    command = ("compress", "model.py", "--budget", "params=0.6", "-o", "m.onnx", "--no-timing")
    write("def calibration_data():\n        yield torch.zeros(2, 3, 4, 4)\n        raise OSError('disk gone')")
    assert "OSError: disk gone" in refused(*command)
    assert "to recover takes calibration data" in refused(*command, "--calibrate", "0", "--recover-steps", "5")


def test_a_full_disk_is_told_for_a_module_too(write: Run, refused: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    Path("m.pt").write_bytes(b"before")
    monkeypatch.setattr(Path, "write_bytes", full)
    said = refused("compress", write(), "--budget", "params=0.6", "-o", "m.pt", "--no-timing")
    assert said == "m.pt could not be written (No space left on device); what was there before is unchanged"
    assert Path("m.pt").read_bytes() == b"before"


def test_what_the_file_is_like_is_said_as_for_export(weights: str, run: Run, refused: Run) -> None:
    given = ("compress", "model.py", "--weights", weights, "--budget", "params=0.6", "--no-timing")
    run(*given, "-o", "m.onnx", "--precision", "float16", "--input-name", "image", "--output-name", "score")
    model = onnx.load("m.onnx")
    assert [model.graph.input[0].name, model.graph.output[0].name] == ["image", "score"]
    assert onnx.TensorProto.FLOAT16 in {each.data_type for each in model.graph.initializer}
    assert "--precision is of an ONNX file, and m.pt is none" in refused(*given, "-o", "m.pt", "--precision", "int8")
    assert not Path("m.pt").exists()


def test_what_would_be_without_effect_is_refused_before_any_work(weights: str, run: Run, refused: Run) -> None:
    given = ("compress", "model.py", "--weights", weights, "--budget", "params=0.6", "--no-timing", "-o", "m.pt")
    assert "this onnxruntime has no Toaster" in refused(*given, "--provider", "Toaster")
    assert "none beside others says two things" in refused(*given, "--leave", "none", "--leave", "head")
    run("transform", "model.py", "-o", "t")
    run_of = ("compress", "t", "--budget", "params=0.6", "--no-timing", "-o", "m.pt")
    assert "t brings its plan along: leave out --share-inputs" in refused(*run_of, "--share-inputs")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["-o", "m.onnx", "--opset", "99"], "there is no opset 99"),
        (["-o", "m.onnx", "--batch", "0"], "Invalid value for '--batch': 0 is not in the range x>=1."),
        (["-o", "folder.pt"], "folder.pt is a folder"),
        (["-o", "m.pt", "--recover-by", "loss"], "--recover-by is of --recover-steps"),
        (["-o", "m.pt", "--model", "model.py"], "--model is of a run, and model.py is none"),
    ],
)
def test_what_would_stop_the_export_is_said_before_the_work(
    weights: str, refused: Run, options: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("folder.pt").mkdir()
    monkeypatch.setattr(compression, "compress", None)
    given = ("compress", "model.py", "--weights", weights, "--budget", "params=0.6", "--no-timing")
    assert sentence in refused(*given, *options)


def test_several_budgets_are_all_met(weights: str, run: Run, refused: Run) -> None:
    given = ("compress", "model.py", "--weights", weights, "-o", "m.pt", "--no-timing", "--json")
    data = json.loads(run(*given, "--budget", "params=0.6", "--budget", "flops=0.9", "--budget", "max_drop=1").stdout)
    assert data["params"][1] <= 0.6 * data["params"][0]
    assert data["flops"][1] <= 0.9 * data["flops"][0]
    assert data["notes"][-1].startswith("All budgets are met: ")
    assert data["file"] == {"path": "m.pt"}
    assert "are each of another thing" in refused(*given, "--budget", "params=0.6", "--budget", "params=0.5")


def test_what_is_done_is_told_on_stderr_beside_json_too(weights: str, run: Run) -> None:
    given = ("compress", "model.py", "--weights", weights, "--budget", "params=0.6", "-o", "m.onnx", "--no-timing")
    result = run(*given, "--json", "--capture", "symbolic")
    for told in (run(*given).stderr, result.stderr):
        for part in ("looking at the model", "capturing the model", "candidate 1: ", "exporting, and comparing"):
            assert re.search(rf"^\[ +\d+ s\] {part}", told, re.M), told
    data = json.loads(result.stdout)
    assert data["file"]["shapes"] == {"input": ["batch", 3, 4, 4]}
    assert [site["site"] for site in data["sites"]] == ["0.weight", "4.weight", "6.weight"]
    assert len(data["warnings"]) == len(re.findall("^Warning: ", result.stderr, re.M))


def test_the_compressed_module_is_kept_where_the_export_fails(
    weights: str, refused: Run, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object, **options: object) -> None:
        assert Path("m.onnx.pt").is_file()  # already, as an exporter may crash
        raise ExportError("torch.onnx cannot convert it")

    given = ("compress", "model.py", "--weights", weights, "--budget", "params=0.6", "-o", "m.onnx", "--no-timing")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dynrank_fx.onnx.export_onnx", fails)
        said = refused(*given)
    assert said == (
        "torch.onnx cannot convert it. The compressed module is in m.onnx.pt; go on with `dynrank-fx export m.onnx.pt "
        "--model MODEL.PY`"
    )
    run("export", "m.onnx.pt", "--model", "model.py", "-o", "m.onnx")
    run(*given)
    assert sorted(map(str, Path().glob("m.onnx*.pt"))) == ["m.onnx.pt"], "what was there stays, and no second one does"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--precision", "bfloat16"], "CPUExecutionProvider has no product of matrices in bfloat16"),
        (["--input-name", "a", "--input-name", "b"], "the model has 1 input and these are names of 2 (a, b)"),
        (["--output-name", "a", "--output-name", "b"], "the model has 1 output and these are names of 2 (a, b)"),
        (["--dynamic", "x:0=batch"], "takes no tensor 'x'"),
    ],
)
def test_the_file_to_come_is_checked_before_the_work(
    weights: str, refused: Run, options: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compression, "compress", None)
    given = ("compress", "model.py", "--weights", weights, "--budget", "params=0.6", "-o", "m.onnx")
    assert sentence in refused(*given, *options)


STREAMING = """
    class Streaming(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(48, 64), nn.Linear(64, 8)
            self.register_buffer("position", torch.zeros(()))
        def forward(self, x):
            self.position.add_(1.0)
            return self.last(torch.relu(self.first(x.flatten(1)))) + self.position

    def model():
        torch.manual_seed(0)
        return Streaming()
"""


def test_a_module_that_unpickling_would_change_is_refused_and_an_onnx_file_holds_it(
    write: Run, run: Run, refused: Run, folder: Path
) -> None:
    """Its graph changes a buffer in place; torch traces such a graph again, which runs that once and drops it."""
    command = ("compress", write(STREAMING), "--budget", "params=0.6", "--no-timing", "-o")
    sentence = refused(*command, "m.pt")
    assert sentence == (
        "m.pt cannot hold this model: once it is loaded, position has another value; give an .onnx file, or "
        "--form layers"
    )
    assert [path.name for path in folder.iterdir() if path.suffix != ".py" and path.name != "__pycache__"] == []
    run(*command, "m.onnx")
    run("export", "model.py", "-o", "dense.onnx")
    x = {"x": np.zeros((2, 3, 4, 4), np.float32)}
    cut, dense = (onnxruntime.InferenceSession(name).run(None, x)[0] for name in ("m.onnx", "dense.onnx"))
    assert np.abs(np.asarray(cut) - np.asarray(dense)).max() < 0.5, "at the first position both"
