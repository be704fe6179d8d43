"""``dynrank-fx export``: from a run or a folder to a file that onnxruntime agrees with, or no file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import Result
from torch import nn

import dynrank_fx as dr
import dynrank_fx.onnx as exporting
from dynrank_fx import store
from dynrank_fx.cli.modelfile import load_model_file
from dynrank_fx.compression import SiteTimes
from dynrank_fx.onnx import Beside, Precision
from dynrank_fx.plan import PlannedSite
from dynrank_fx.timing import Pair

Run = Callable[..., Result]


@pytest.fixture
def trained(write: Run, run: Run, once: Callable[..., None]) -> str:
    options = ("--no-compile", "--epochs", "2", "--schedule", "interleave", "--low", "1")
    once("a run to export", lambda: run("train", write(), *options, "--out", "r"))
    return "r"


@pytest.fixture
def trained_here(write: Run, run: Run) -> str:
    """Whose model file is in the folder, and not where the copied run was made."""
    run("train", write(), "--no-compile", "--epochs", "1", "--out", "r")
    return "r"


def answers(path: str, x: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (value,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(np.asarray(value))


def test_a_run_becomes_a_file_that_computes_what_its_truncation_does(trained: str, run: Run, folder: Path) -> None:
    result = run("export", trained, "-o", "model.onnx", "--calibrate", "0", "--no-timing")
    assert result.stdout.startswith("model.onnx: ")
    assert len(result.stdout.splitlines()) == 1
    assert "agrees with PyTorch on batches 1, 2, 5" in result.stdout
    assert "CPUExecutionProvider" in result.stdout

    file = load_model_file(Path("model.py"))
    tensors, info = store.read(Path("r/checkpoint.safetensors"))
    assert set(info["phases"].values()) == {int(dr.Phase.FULL)}
    net = dr.transform(file.model(), file.example_inputs(), plan=dr.Plan.from_json(info["plan"]))
    net.load_state_dict({name.removeprefix("net."): t for name, t in tensors.items() if name.startswith("net.")})
    x = torch.randn(7, 3, 4, 4)
    with torch.no_grad():
        assert torch.allclose(answers("model.onnx", x), dr.truncate(net)(x), atol=1e-5)
    onnx.checker.check_model("model.onnx", full_check=True)
    assert dr.Plan.from_json({p.key: p.value for p in onnx.load("model.onnx").metadata_props}["dynrank_plan"]) == (
        dr.plan_of(net)
    )


def test_a_run_that_ends_full_is_cut_the_same_way_again_and_scored_as_it_was_written(trained: str, run: Run) -> None:
    run("export", trained, "-o", "model.onnx", "--no-timing")
    assert run("verify", "model.onnx", trained).stdout.splitlines()[-1] == "the same within 0.0001"
    (x, labels), *_ = load_model_file(Path("model.py")).eval_data()
    accuracy = float((answers("model.onnx", x).argmax(1) == labels).float().mean())
    said = {p.key: p.value for p in onnx.load("model.onnx").metadata_props}["dynrank_metric"]
    assert float(said) == pytest.approx(accuracy)


def test_options_reach_the_export(trained: str, run: Run) -> None:
    result = run(
        *("export", trained, "-o", "model.onnx", "--opset", "18", "--batch", "3", "--batch", "9", "--no-timing"),
        *("--provider", "CPUExecutionProvider"),
    )
    assert "batches 3, 9" in result.stdout
    assert "CPUExecutionProvider" in result.stdout
    assert onnx.load("model.onnx").opset_import[0].version == 18


@pytest.mark.parametrize(
    ("opset", "sentence"),
    [
        ("5", "torch's exporter makes no opset 5 of this model, but "),
        ("99", "Invalid value for --opset: there is no opset 99: this onnx knows 1 to "),
        ("-3", "Invalid value for --opset: there is no opset -3: "),
    ],
)
def test_an_opset_that_cannot_be_made_is_told(
    trained: str, refused: Callable[..., str], opset: str, sentence: str
) -> None:
    assert refused("export", trained, "-o", "model.onnx", "--opset", opset).startswith(sentence)
    assert not Path("model.onnx").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["-o", "no/m.onnx"], "there is no folder no: make it first"),
        (["-o", "m.onnx", "--opset", "99"], "there is no opset 99"),
        (["-o", "m.onnx", "--provider", "Toaster"], "this onnxruntime has no Toaster"),
    ],
)
def test_what_would_stop_the_export_is_told_before_the_model_is_cut(
    write: Run, refused: Callable[..., str], options: list[str], sentence: str
) -> None:
    write("def model(): assert False, 'it was made'")
    assert sentence in refused("export", "model.py", *options)


def test_a_folder_of_transform_is_exported_with_its_model_file(
    write: Run, run: Run, refused: Callable[..., str]
) -> None:
    run("transform", write(), "--rank", "3", "--out", "planned")
    assert refused("export", "planned", "-o", "model.onnx") == (
        "planned is a folder of `transform`, which does not note its model file: add --model MODEL.PY"
    )
    run("export", "planned", "-o", "model.onnx", "--model", "model.py", "--no-timing")
    shapes = {tuple(tensor.dims) for tensor in onnx.load("model.onnx").graph.initializer}
    assert {(3, 3, 3, 3), (16, 3, 1, 1)} <= shapes


def test_a_run_in_a_folder_of_transform_is_what_is_exported(write: Run, run: Run) -> None:
    """Not the untrained weights that lie there too."""
    run("transform", write(), "--out", "both")
    run("train", "model.py", "--from", "both", "--no-compile", "--epochs", "1", "--schedule", "full", "--out", "both")
    run("export", "both", "-o", "model.onnx", "--calibrate", "0", "--no-timing")
    bias = store.read(Path("both/checkpoint.safetensors"))[0]["net.6.bias"]
    stored = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load("model.onnx").graph.initializer]
    assert any(array.shape == (8,) and np.array_equal(array, bias.numpy()) for array in stored)


def test_a_model_file_that_has_moved(trained_here: str, run: Run, refused: Callable[..., str], folder: Path) -> None:
    Path("model.py").rename("elsewhere.py")
    assert refused("export", trained_here, "-o", "model.onnx").startswith(f"{folder / 'model.py'} does not exist: ")
    run("export", trained_here, "-o", "model.onnx", "--model", "elsewhere.py", "--no-timing")
    assert Path("model.onnx").exists()


def test_a_file_that_does_not_agree_is_not_written(
    trained: str, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    Path("model.onnx").write_bytes(b"the last good one")
    monkeypatch.setattr(exporting, "export_onnx", partial(exporting.export_onnx, tolerance=0.0))
    assert refused("export", trained, "-o", "model.onnx").startswith("onnxruntime and PyTorch differ by ")
    assert Path("model.onnx").read_bytes() == b"the last good one"
    assert sorted(path.name for path in folder.iterdir()) == ["model.onnx", "model.py", "r"]


@pytest.mark.parametrize(
    "options",
    [
        ["-o", "model.py/x.onnx"],
        ["-o", "no/such/folder/x.onnx"],
        ["-o", "x.onnx", "--provider", "ToasterExecutionProvider"],
        ["-o", "x.onnx", "--batch", "0"],
        ["-o", "x.onnx", "--opset", "3"],
    ],
    ids=" ".join,
)
def test_what_cannot_be_exported_is_told(
    options: list[str], trained: str, refused: Callable[..., str], folder: Path
) -> None:
    assert refused("export", trained, *options)
    assert sorted(path.name for path in folder.iterdir()) == ["model.py", "r"]


def test_a_model_file_of_another_model(trained_here: str, write: Run, refused: Callable[..., str]) -> None:
    write("def model(): return nn.Sequential(nn.Flatten(), nn.Linear(48, 8))")
    assert "the plan is of another model" in refused("export", trained_here, "-o", "x.onnx")
    assert not Path("x.onnx").exists()


def test_a_folder_that_is_neither(write: Run, refused: Callable[..., str], folder: Path) -> None:
    write()
    (folder / "empty").mkdir()
    sentence = "is neither a run of `dynrank-fx train` nor a folder of `dynrank-fx transform`: give one"
    assert refused("export", "empty", "-o", "x.onnx") == f"empty {sentence}"
    assert refused("export", "nowhere", "-o", "x.onnx")
    assert refused("inspect", "empty") == f"empty {sentence}"


def test_a_model_file_is_exported_as_it_is_with_weights_of_its_own(write: Run, run: Run, refused: Run) -> None:
    torch.manual_seed(3)
    model = load_model_file(Path(write())).model().eval()
    torch.save(model.state_dict(), "w.pt")
    run("export", "model.py", "--weights", "w.pt", "-o", "dense.onnx")
    x = torch.randn(7, 3, 4, 4)
    with torch.no_grad():
        assert torch.allclose(answers("dense.onnx", x), model(x), atol=1e-5)
    assert run("verify", "model.py", "dense.onnx", "--weights", "w.pt").stdout.splitlines()[-1] == (
        "the same within 0.0001"
    )
    assert "neither model.py nor w.pt is an .onnx file" in refused("verify", "model.py", "w.pt")


def test_what_compress_stored_is_exported_and_compared_with_its_model_file(write: Run, run: Run, refused: Run) -> None:
    write("torch.manual_seed(0)")
    run("compress", "model.py", "--budget", "params=0.6", "-o", "small.pt", "--no-timing")
    assert "small.pt has no example inputs: add --model" in refused("export", "small.pt", "-o", "small.onnx")
    run("export", "small.pt", "--model", "model.py", "-o", "small.onnx")
    x = torch.randn(7, 3, 4, 4)
    with torch.no_grad():
        assert torch.allclose(answers("small.onnx", x), torch.load("small.pt", weights_only=False)(x), atol=1e-5)
    assert "the same within" in run("verify", "small.onnx", "small.pt", "--model", "model.py").stdout
    torch.save({"a": 1}, "state.pt")
    assert "state.pt holds a dict and no module" in refused("export", "state.pt", "--model", "model.py", "-o", "x.onnx")


def test_the_file_is_an_onnx_file(trained: str, refused: Run) -> None:
    assert "p.txt is no .onnx file" in refused("export", trained, "-o", "p.txt")


def test_a_run_that_ends_low_is_compared_on_real_inputs_too(
    write: Run, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("train", write(), "--no-compile", "--epochs", "1", "--schedule", "low", "--out", "r")
    seen = []

    def watched(*args: object, **settings: object) -> object:
        seen.append(settings["more_inputs"])
        return export_onnx(*args, **settings)

    export_onnx = exporting.export_onnx
    monkeypatch.setattr(exporting, "export_onnx", watched)
    run("export", "r", "-o", "model.onnx", "--no-timing")
    assert [len(more) for more in seen] == [1]


def test_types_names_and_free_dimensions(trained: str, run: Run, refused: Run, folder: Path) -> None:
    run(
        *("export", trained, "-o", "m.onnx", "--precision", "int8", "--dynamic", "input:0=images"),
        *("--input-name", "pixels", "--output-name", "scores", "--external-data", "--no-timing"),
    )
    assert {"m.onnx", "m.onnx.data"} <= {path.name for path in folder.iterdir()}
    graph = onnx.load("m.onnx").graph
    assert [value.name for value in (*graph.input, *graph.output)] == ["pixels", "scores"]
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "images"
    assert any(each.data_type == onnx.TensorProto.INT8 for each in graph.initializer)
    assert "'input=0' is not ARG:AXIS=NAME" in refused("export", trained, "-o", "n.onnx", "--dynamic", "input=0")
    assert "takes no tensor 'x'" in refused("export", trained, "-o", "n.onnx", "--dynamic", "x:0=batch")
    assert not Path("n.onnx").exists()


# Time


@pytest.mark.filterwarnings("default::dynrank_fx.DynrankWarning")  # which it is, is a matter of the machine
def test_the_file_is_timed_beside_dense_weights(trained: str, run: Run) -> None:
    said = json.loads(run("export", trained, "-o", "m.onnx", "--json").stdout)["beside_dense"]
    assert (said["file"], said["batch"], said["provider"]) == ("m.onnx", 2, "CPUExecutionProvider")
    low, high = said["spread"]
    assert 0 < low <= said["ratio"] <= high


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The file is slower by a fifth, it is said of what was timed; how it was, and whether all weights were dense."""
    seen: list[dict[str, Any]] = []

    def beside(path: Path, dense: nn.Module, inputs: Any, **how: Any) -> Beside:
        seen.append({**how, "params": sum(parameter.numel() for parameter in dense.parameters())})
        return Beside(path, "CPUExecutionProvider", 2, 1.2e-3, 1e-3, 1.2, (1.1, 1.3))

    monkeypatch.setattr(exporting, "time_beside", beside)
    return seen


@pytest.mark.filterwarnings("default::dynrank_fx.DynrankWarning")
def test_a_slower_file_is_a_warning_that_says_what_to_do(trained: str, run: Run, timed: list[dict[str, Any]]) -> None:
    result = run("export", trained, "-o", "m.onnx", "--precision", "int8", "--opset", "21")
    assert "Warning: m.onnx is slower than with dense weights: --never-slower leaves dense each" in result.stderr
    last = result.stdout.splitlines()[-1]
    assert last == "m.onnx takes 1.20 of the time of the same model with dense weights (batch 2, CPUExecutionProvider)"
    whole = sum(parameter.numel() for parameter in load_model_file(Path("model.py")).model().parameters())
    assert timed == [{"opset": 21, "precision": Precision.INT8_WEIGHTS, "provider": None, "params": whole}]


@pytest.mark.filterwarnings("default::dynrank_fx.DynrankWarning")
def test_layers_that_are_slower_in_factors_stay_dense(
    trained: str, run: Run, refused: Run, timed: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def pair(times: SiteTimes, rows: Sequence[PlannedSite], rank: int) -> Pair:
        return Pair(1.0, 1.0, 1.5 if rows[0].site.shape == (32, 256) else 0.5)

    monkeypatch.setattr(SiteTimes, "pair", pair)
    monkeypatch.setattr(SiteTimes, "save", lambda times: None)
    options = ("-o", "m.onnx", "--never-slower", "--calibrate", "0")
    result = run("export", trained, *options)
    assert "weights: `dynrank-fx compress r --budget latency=0.9 -o m.onnx` looks for a cut" in result.stderr
    assert "1 layer left dense, slower in factors: " in result.stdout
    stored = {tuple(sorted(each.dims)) for each in onnx.load("m.onnx").graph.initializer}
    assert (32, 256) in stored
    assert "--never-slower is of a run or a folder" in refused("export", "model.py", *options)


def test_what_cannot_be_timed_is_said_and_the_file_stays(
    trained: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def beside(*args: object, **how: object) -> Beside:
        raise dr.ExportError("with dense weights it has 9.0 GB, and is not run from memory")

    monkeypatch.setattr(exporting, "time_beside", beside)
    result = run("export", trained, "-o", "m.onnx")
    assert "not timed beside the same model with dense weights: with dense weights it has 9.0 GB" in result.stderr
    assert Path("m.onnx").exists()
