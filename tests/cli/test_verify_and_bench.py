"""``verify`` names the first layer that differs; ``bench`` times what really runs, or says that it cannot."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from torch import nn

import dynrank_fx as dr
from dynrank_fx.cli.modelfile import load_model_file
from dynrank_fx.onnx import compare_onnx, memory

Run = Callable[..., Result]


@pytest.fixture
def files(write: Run, once: Callable[..., None]) -> tuple[str, str]:
    """The model of the model file, and the same with another weight in its second matrix."""

    def make() -> None:
        torch.manual_seed(0)
        file = load_model_file(Path(write()))
        model = file.model()
        dr.export_onnx(model, file.example_inputs(), "one.onnx")
        with torch.no_grad():
            model[4].weight[3, 5] += 1
        dr.export_onnx(model, file.example_inputs(), "other.onnx")

    once("two files", make)
    return "one.onnx", "other.onnx"


def test_a_file_is_the_same_as_itself_and_the_first_layer_that_differs_is_named(
    files: tuple[str, str], run: Run, refused: Run
) -> None:
    assert run("verify", "one.onnx", "one.onnx").stdout.splitlines()[-1] == "the same within 0.0001"
    verdict = compare_onnx(*files)
    assert [each.name for each in verdict.sites] == ["0", "4", "6"]
    assert verdict.sites[0].relative == 0
    assert verdict.first is not None
    assert verdict.first.name == "4"
    assert "one.onnx and other.onnx differ by more than 0.0001" in refused("verify", *files)


def test_against_a_model_file(write: Run, run: Run) -> None:
    write("torch.manual_seed(0)")
    file = load_model_file(Path("model.py"))
    dr.export_onnx(file.model(), file.example_inputs(), "m.onnx")
    assert "the same within" in run("verify", "m.onnx", "model.py").stdout


def test_what_cannot_be_compared_is_told(files: tuple[str, str], refused: Run) -> None:
    Path("bad.onnx").write_bytes(Path("one.onnx").read_bytes()[:300])
    Path("empty.onnx").write_bytes(b"")
    for name in ("bad.onnx", "empty.onnx"):
        assert f"{name} is no ONNX file, or is damaged" in refused("verify", "one.onnx", name)
        assert f"{name} is no ONNX file, or is damaged" in refused("bench", name)
    assert refused("verify", "one.onnx", "no.onnx") == "there is no file no.onnx: export it first"
    dr.export_onnx(nn.Linear(3, 3), torch.randn(2, 3), "linear.onnx", output_names=["y"])
    assert "they are of two models" in refused("verify", "one.onnx", "linear.onnx")


@pytest.mark.parametrize("args", [["no.onnx", "model.py"], ["model.py", "no.onnx"]])
def test_a_file_that_is_not_there_is_told_before_the_other_is_exported(
    args: list[str], write: Run, refused: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    write()
    monkeypatch.setattr("dynrank_fx.onnx.export_onnx", lambda *args, **options: pytest.fail("it was exported"))
    assert refused("verify", *args) == "there is no file no.onnx: export it first"
    Path("no.onnx").touch()
    assert "this onnxruntime has no Toaster" in refused("verify", *args, "--provider", "Toaster")


def test_timings_name_the_provider_and_the_ratio(files: tuple[str, str], run: Run) -> None:
    result = run("bench", files[0], "--against", files[1], "--batch", "2", "--batch", "3", "--repeats", "7", "--json")
    timings = json.loads(result.stdout)["timings"]
    assert [(t["file"], t["batch"]) for t in timings] == [(name, batch) for batch in (2, 3) for name in files]
    for t in timings:
        assert t["provider"] == "CPUExecutionProvider"
        assert 0 < t["median"] <= t["p90"] <= t["p99"]
        assert t["throughput"] == pytest.approx(t["batch"] / t["median"])
        assert (t["ratio"] is None) == (t["file"] == files[1])
    table = run("bench", files[0], "--batch", "2", "--repeats", "5").stdout
    assert "median ms" in table
    assert "CPU" in table


def test_a_provider_that_is_not_there_is_an_error(files: tuple[str, str], refused: Run) -> None:
    assert "this onnxruntime has no Toaster" in refused("bench", files[0], "--provider", "Toaster")
    assert "this onnxruntime has no Toaster" in refused("verify", *files, "--provider", "Toaster")


def test_options_of_a_provider(files: tuple[str, str], run: Run, refused: Run) -> None:
    provider = ("--provider", "CPUExecutionProvider")
    timed = run("bench", files[0], "--batch", "2", "--repeats", "5", *provider, "--provider-option", "use_arena=0")
    assert "median ms" in timed.stdout
    assert "give --provider too" in refused("bench", files[0], "--provider-option", "a=b")
    assert "write KEY=VALUE" in refused("bench", files[0], *provider, "--provider-option", "arena")
    graph = ("--provider", "CUDAExecutionProvider", "--provider-option", "enable_cuda_graph=1")
    assert "a CUDA graph is of one batch size" in refused("bench", files[0], *graph)


def test_what_differs_is_called_as_it_was_given(write: Run, refused: Run, files: tuple[str, str]) -> None:
    assert "other.onnx and model.py differ" in refused("verify", "other.onnx", "model.py")
    assert "give 0 or more" in refused("verify", *files, "--tolerance", "nan")


def test_a_child_that_fails_leaves_the_memory_unknown_and_the_times_there(
    files: tuple[str, str], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory.sys, "executable", "/bin/false")
    table = run("bench", files[0], "--batch", "2", "--repeats", "5").stdout.splitlines()
    assert "unknown" in table[2]
    assert "CPU" in table[2]


def test_what_has_other_names_goes_by_its_place(write: Run, run: Run, refused: Run) -> None:
    write("torch.manual_seed(0)")
    file = load_model_file(Path("model.py"))
    dr.export_onnx(file.model(), file.example_inputs(), "named.onnx", input_names=["image"], output_names=["score"])
    assert "the same within" in run("verify", "named.onnx", "model.py").stdout
    assert "the same within" in run("verify", "model.py", "named.onnx").stdout


def test_the_threads_of_onnxruntime_are_told(files: tuple[str, str], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert ", 1 thread; " in run("bench", files[0], "--batch", "2", "--repeats", "5").stdout


def test_files_are_scored_themselves_beside_pytorch(write: Run, run: Run, refused: Run) -> None:
    write("""
    torch.manual_seed(0)
    def eval_data():
        return DataLoader(Noisy(), 8)
    """)
    run("export", "model.py", "-o", "m.onnx")
    run("export", "model.py", "-o", "int8.onnx", "--precision", "int8")
    result = run("verify", "m.onnx", "model.py", "--metric")
    score, torchs = re.findall(r"^metric (\S+)  (.+)$", result.stdout, re.M)
    assert (score[1], torchs[1]) == ("m.onnx in onnxruntime", "model.py in PyTorch")
    assert "Warning: the metric (" in result.stderr  # nobody has trained it
    data = json.loads(
        run("verify", "int8.onnx", "m.onnx", "--metric", "--model", "model.py", "--tolerance", "1", "--json").stdout
    )
    assert list(data["metric"]) == ["int8.onnx in onnxruntime", "m.onnx in onnxruntime", "model.py in PyTorch"]
    assert data["same"] is True
    assert "add --model MODEL.PY" in refused("verify", "int8.onnx", "m.onnx", "--metric")
    write("metric = lambda output, batch: float('nan')")
    said = run("verify", "m.onnx", "m.onnx", "--metric", "--model", "model.py", "--json").stdout
    assert set(json.loads(said)["metric"].values()) == {None}
    assert "NaN" not in said
    write("del metric")
    assert "model.py has no metric(output, batch), which --metric needs" in refused(
        "verify", "m.onnx", "model.py", "--metric"
    )
