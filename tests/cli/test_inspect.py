"""``dynrank-fx inspect``: the figures of every matrix, of whatever it is given, and pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from dynrank_fx import store
from dynrank_fx.cli.modelfile import load_model_file

Run = Callable[..., Result]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def trained(write: Run, run: Run, once: Callable[..., None]) -> str:
    options = ("--no-compile", "--epochs", "2", "--schedule", "low")
    once("a run to inspect", lambda: run("train", write(), *options, "--out", "r"))
    return "r"


def rows(result: Result) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads(result.stdout)}


def same_spectrum(row: dict[str, Any], matrix: torch.Tensor) -> bool:
    s = torch.linalg.svdvals(matrix.detach().double().flatten(1))
    p = s[s > 1e-12 * s[0]] / s.sum()
    shown = torch.tensor(row["spectrum"], dtype=torch.float64)
    return (
        torch.allclose(shown, s[: len(shown)], rtol=1e-5)
        and math.isclose(row["effective_rank"], math.exp(-(p * p.log()).sum()), rel_tol=1e-4)
        and math.isclose(row["stable_rank"], float((s / s[0]).square().sum()), rel_tol=1e-4)
        and row["energy_rank"] == int((s.square().cumsum(0) < 0.95 * s.square().sum()).sum()) + 1
    )


def test_a_model_file(write: Run, run: Run) -> None:
    torch.manual_seed(0)
    model = load_model_file(Path(write())).model()
    torch.manual_seed(0)
    found = rows(run("inspect", "model.py", "--json"))
    assert list(found) == ["0.weight", "4.weight", "6.weight"]
    for name, row in found.items():
        weight = model.get_parameter(name)
        assert same_spectrum(row, weight)
        assert row["state"] == "dense"
        assert row["shape"] == list(weight.shape)
        m, n = weight.shape[0], weight.shape[1:].numel()
        assert row["break_even"] == [(m * n - 1) // (m + n)] * 2


def test_the_table(write: Run, run: Run) -> None:
    output = run("inspect", write()).stdout.splitlines()
    assert output[0].split("  ")[0] == "weight"
    assert [line.split()[:3] for line in output[2:5]] == [
        ["0.weight", "16x3x3x3", "dense"],
        ["4.weight", "32x256", "dense"],
        ["6.weight", "8x32", "dense"],
    ]
    explained = [line.partition(": ")[0].split(", ") for line in output[6:]]
    for head in ("state", "effective", "stable", "95 % energy", "break-even", "by FLOPs"):
        assert head in output[0]
        assert sum(head in heads for heads in explained) == 1, "in the lines below the table"


def test_a_run_in_low(trained: str, run: Run) -> None:
    found = rows(run("inspect", trained, "--json"))
    tensors, _ = store.read(Path("r/checkpoint.safetensors"))
    for name, rank in (("4.weight", 8), ("6.weight", 2)):
        path = "net." + name.removesuffix("weight")
        assert found[name]["state"] == f"LOW {rank}"
        assert len(found[name]["spectrum"]) == rank
        assert same_spectrum(found[name], tensors[path + "left"] @ tensors[path + "right"])
    assert found["0.weight"]["state"] == "LOW 4"


def test_a_folder_of_transform_with_what_it_leaves_dense(write: Run, run: Run, refused: Callable[..., str]) -> None:
    run("transform", write(), "--exclude", "0", "--out", "planned")
    assert "add --model MODEL.PY" in refused("inspect", "planned")
    found = rows(run("inspect", "planned", "--model", "model.py", "--json"))
    assert {name: (row["state"], row["note"]) for name, row in found.items()} == {
        "4.weight": ("FULL", ""),
        "6.weight": ("FULL", ""),
        "0.weight": ("dense", "excluded by name"),
    }
    tensors, _ = store.read(Path("planned/weights.safetensors"))
    assert all(same_spectrum(row, tensors[name]) for name, row in found.items())


def test_an_onnx_file(trained: str, run: Run) -> None:
    run("export", trained, "-o", "model.onnx", "--no-timing")
    found = rows(run("inspect", "model.onnx", "--json"))
    tensors, _ = store.read(Path("r/checkpoint.safetensors"))
    assert set(found) == {f"{i}.{factor}.weight" for i in (0, 4, 6) for factor in ("left", "right")}
    for name, row in found.items():
        assert row["state"] == ("Conv" if name.startswith("0") else "Gemm")
    assert all(
        same_spectrum(found[f"{name}.weight"], tensors[f"net.{name}"])
        for name in ("4.left", "4.right", "6.left", "6.right")
    )


@pytest.mark.parametrize("target", ["model.py", "r", "model.onnx"])
def test_a_picture(target: str, trained: str, run: Run) -> None:
    run("export", trained, "-o", "model.onnx", "--no-timing")
    result = run("inspect", target, "--plot", "picture.png")
    data = Path("picture.png").read_bytes()
    assert data.startswith(PNG)
    assert data.endswith(b"IEND\xaeB`\x82")
    assert len(data) > 10_000
    assert result.stderr.endswith("drew picture.png\n")
    assert "weight" in result.stdout


def test_the_picture_of_a_run_is_of_its_history(trained: str, run: Run) -> None:
    run("inspect", trained, "--plot", "run.svg")
    run("inspect", "model.py", "--plot", "file.svg")
    titles = [
        [part for part in ("Effective rank of each site", "Spectra (in brackets") if part in Path(name).read_text()]
        for name in ("run.svg", "file.svg")
    ]
    assert titles == [["Effective rank of each site"], ["Spectra (in brackets"]]


@pytest.mark.parametrize(
    ("plot", "sentence"),
    [
        ("picture.txt", "a picture cannot be written as '.txt': give a name that ends in .png, .svg or .pdf"),
        ("no/folder/picture.png", "no/folder/picture.png could not be written (No such file or directory); "),
        ("model.py/picture.png", "model.py/picture.png could not be written (Not a directory); "),
    ],
)
def test_a_picture_that_cannot_be_drawn(plot: str, sentence: str, write: Run, refused: Callable[..., str]) -> None:
    assert refused("inspect", write(), "--plot", plot).startswith(sentence)


@pytest.mark.parametrize("content", [b"no onnx", b"\x08\x0b\xff\xff"], ids=["text", "cut"])
def test_a_file_that_is_no_onnx(content: bytes, folder: Path, refused: Callable[..., str]) -> None:
    (folder / "model.onnx").write_bytes(content)
    assert refused("inspect", "model.onnx").startswith("model.onnx could not be read as an ONNX file (")
    (folder / "model.onnx").unlink()
    assert refused("inspect", "model.onnx") == (
        "there is no file model.onnx: give an ONNX file, a model file, a run or a folder of `transform`"
    )


def test_weights_that_are_not_finite(write: Run, refused: Callable[..., str]) -> None:
    broken = """
        whole = model
        def model():
            made = whole()
            made[4].weight.data[0, 0] = float("inf")
            return made
    """
    assert refused("inspect", write(broken)) == (
        "4.weight has values that are not finite, and so no spectrum: look for a diverged step"
    )
