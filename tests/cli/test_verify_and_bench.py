"""``verify`` names the first layer that differs; ``bench`` times what really runs, or says that it cannot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from click.testing import Result
from torch import nn

import dynrank_fx as dr
from dynrank_fx.cli.modelfile import load_model_file
from dynrank_fx.onnx import compare_onnx, memory

Run = Callable[..., Result]


@pytest.fixture
def files(write: Run) -> tuple[str, str]:
    """The model of the model file, and the same with another weight in its second matrix."""
    torch.manual_seed(0)
    file = load_model_file(Path(write()))
    model = file.model()
    dr.export_onnx(model, file.example_inputs(), "one.onnx")
    with torch.no_grad():
        model[4].weight[3, 5] += 1
    dr.export_onnx(model, file.example_inputs(), "other.onnx")
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


def test_factors_are_the_same_site_as_their_weight() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 14))
    x = torch.randn(3, 12)
    net = dr.transform(model, (x,), rank=dr.Fixed(3), exclude=("0.*",))
    dr.export_onnx(model, (x,), "dense.onnx")
    dr.export_onnx(dr.truncate(net, [(torch.randn(50, 12),)]), (x,), "small.onnx")
    verdict = compare_onnx("dense.onnx", "small.onnx")
    assert [(each.name, each.relative > 1e-4) for each in verdict.sites] == [("0", False), ("2", True)]


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
    assert "there is no file no.onnx" in refused("verify", "one.onnx", "no.onnx")
    dr.export_onnx(nn.Linear(3, 3), torch.randn(2, 3), "linear.onnx", output_names=["y"])
    assert "they are of two models" in refused("verify", "one.onnx", "linear.onnx")


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


def test_a_file_of_one_batch_is_run_at_that(run: Run) -> None:
    class One(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(4, 3) * 2

    dr.export_onnx(One(), torch.randn(4, 3), "fixed.onnx")
    assert isinstance(onnx.load("fixed.onnx").graph.input[0].type.tensor_type.shape.dim[0].dim_value, int)
    timings = json.loads(run("bench", "fixed.onnx", "--repeats", "5", "--json").stdout)["timings"]
    assert [t["batch"] for t in timings] == [4]


def test_a_parameter_that_stands_bare_is_a_site_too() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(12, 16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x @ self.w)

    torch.manual_seed(0)
    model, x = Bare(), torch.randn(3, 12)
    net = dr.transform(model, (x,), rank=dr.Fixed(3))
    dr.export_onnx(model, (x,), "dense.onnx")
    dr.export_onnx(dr.truncate(net, [(torch.randn(50, 12),)]), (x,), "small.onnx")
    first = compare_onnx("dense.onnx", "small.onnx").first
    assert first is not None
    assert first.name == "w"


def test_files_with_their_weights_beside_them_are_compared_inside_too(files: tuple[str, str]) -> None:
    for name in files:
        model = onnx.load(name)
        onnx.save(model, f"large-{name}", save_as_external_data=True, location=f"{name}.data", size_threshold=64)
    before = sorted(path.name for path in Path().iterdir())
    verdict = compare_onnx("large-one.onnx", "large-other.onnx")
    assert verdict.first is not None
    assert verdict.first.name == "4"
    assert sorted(path.name for path in Path().iterdir()) == before, "nothing is left in the folder"


def test_options_of_a_provider(files: tuple[str, str], run: Run, refused: Run) -> None:
    provider = ("--provider", "CPUExecutionProvider")
    timed = run("bench", files[0], "--batch", "2", "--repeats", "5", *provider, "--provider-option", "use_arena=0")
    assert "median ms" in timed.stdout
    assert "give --provider too" in refused("bench", files[0], "--provider-option", "a=b")
    assert "write KEY=VALUE" in refused("bench", files[0], *provider, "--provider-option", "arena")
    graph = ("--provider", "CUDAExecutionProvider", "--provider-option", "enable_cuda_graph=1")
    assert "a CUDA graph is of one batch size" in refused("bench", files[0], *graph)


class Tokens(nn.Module):
    """A layer called twice, between a table and a head that is tied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.shared = nn.Embedding(200, 16), nn.Linear(16, 16)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.shared(torch.relu(self.shared(self.table(tokens))))
        return x @ self.table.weight.T


def exported(model: nn.Module, path: str) -> str:
    dr.export_onnx(model, (torch.randint(200, (2, 40)),), path)
    return path


def test_every_row_of_a_table_is_looked_at_and_uses_of_one_weight_are_told_apart() -> None:
    torch.manual_seed(0)
    model = Tokens()
    one = exported(model, "one.onnx")
    rows = model.table.weight.detach().clone()
    with torch.no_grad():
        model.table.weight[2:] += 1
    verdict = compare_onnx(one, exported(model, "rows.onnx"))
    assert not verdict.same
    assert verdict.first is not None
    assert verdict.first.name == "table"
    with torch.no_grad():
        model.table.weight.copy_(rows)
        model.shared.weight[0, 0] += 1
    verdict = compare_onnx(one, exported(model, "shared.onnx"))
    assert [(each.name, each.relative > 0) for each in verdict.sites] == [
        ("table", False),
        ("shared", True),
        ("shared (use 2)", True),
        ("table (use 2)", True),
    ]


def test_what_differs_is_called_as_it_was_given(write: Run, refused: Run, files: tuple[str, str]) -> None:
    assert "other.onnx and model.py differ" in refused("verify", "other.onnx", "model.py")
    assert "give 0 or more" in refused("verify", *files, "--tolerance", "nan")


def test_memory_is_that_of_the_file_whichever_comes_first(run: Run) -> None:
    """40 MB of weights, and 1 MB."""
    x = torch.randn(2, 500)
    dr.export_onnx(nn.Linear(500, 20000), (x,), "large.onnx", batch_sizes=(1,))
    dr.export_onnx(nn.Linear(500, 500), (x,), "small.onnx", batch_sizes=(1,))
    for first, second in (("large.onnx", "small.onnx"), ("small.onnx", "large.onnx")):
        given = ("bench", first, "--against", second, "--batch", "1", "--repeats", "5", "--json")
        taken = {t["file"]: t["memory"] / 1e6 for t in json.loads(run(*given).stdout)["timings"]}
        assert 38 < taken["large.onnx"] < 200
        assert taken["small.onnx"] < 0.4 * taken["large.onnx"]


def test_a_child_that_fails_leaves_the_memory_unknown_and_the_times_there(
    files: tuple[str, str], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory.sys, "executable", "/bin/false")
    table = run("bench", files[0], "--batch", "2", "--repeats", "5").stdout.splitlines()
    assert "unknown" in table[2]
    assert "CPU" in table[2]


class Biased(nn.Module):
    """Linears on three dimensions, which become a product and a sum; the table is the head too."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.one, self.two = nn.Embedding(30, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 30)
        self.head.weight = self.emb.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.two(torch.tanh(self.one(self.emb(ids))))))


@pytest.mark.parametrize(
    ("changed", "named"),
    [("one.bias", "one"), ("two.bias", "two"), ("head.bias", "head (use 2)"), ("emb.weight", "head")],
)
def test_a_bias_belongs_to_its_layer_and_a_tied_weight_is_told_by_its_use(changed: str, named: str) -> None:
    torch.manual_seed(0)
    model, ids = Biased(), (torch.randint(0, 30, (2, 7)),)
    dr.export_onnx(model, ids, "one.onnx")
    with torch.no_grad():
        model.get_parameter(changed).add_(1)
    dr.export_onnx(model, ids, "other.onnx")
    verdict = compare_onnx("one.onnx", "other.onnx")
    assert verdict.first is not None
    assert verdict.first.name.replace("emb", "head") == named
    assert (", in the first of its uses" in str(verdict)) == (changed == "emb.weight")


def test_what_has_other_names_goes_by_its_place(write: Run, run: Run, refused: Run) -> None:
    write("torch.manual_seed(0)")
    file = load_model_file(Path("model.py"))
    dr.export_onnx(file.model(), file.example_inputs(), "named.onnx", input_names=["image"], output_names=["score"])
    assert "the same within" in run("verify", "named.onnx", "model.py").stdout
    assert "the same within" in run("verify", "model.py", "named.onnx").stdout


def test_the_threads_of_onnxruntime_are_told(files: tuple[str, str], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert ", 1 thread; " in run("bench", files[0], "--batch", "2", "--repeats", "5").stdout
