"""Two files of one model: which site is the first to differ, whatever its layout, its uses and its bias."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import dynrank_fx as dr
from dynrank_fx.layouts import CONV_LAYOUTS
from dynrank_fx.onnx import compare_onnx
from dynrank_fx.onnx.diff import Gap, Verdict


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The empty folder in which every test runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_factors_are_the_same_site_as_their_weight() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 14))
    x = torch.randn(3, 12)
    net = dr.transform(model, (x,), rank=dr.Fixed(3), exclude=("0.*",))
    dr.export_onnx(model, (x,), "dense.onnx")
    dr.export_onnx(dr.truncate(net, [(torch.randn(50, 12),)]), (x,), "small.onnx")
    verdict = compare_onnx("dense.onnx", "small.onnx")
    assert [(each.name, each.relative > 1e-4) for each in verdict.sites] == [("0", False), ("2", True)]


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


@pytest.mark.filterwarnings("ignore:large-.*another tool has changed it")
def test_files_with_their_weights_beside_them_are_compared_inside_too() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 12))
    dr.export_onnx(layers, torch.randn(3, 12), "one.onnx")
    with torch.no_grad():
        layers[2].weight[3, 5] += 1
    dr.export_onnx(layers, torch.randn(3, 12), "other.onnx")
    for name in ("one.onnx", "other.onnx"):
        model = onnx.load(name)
        onnx.save(model, f"large-{name}", save_as_external_data=True, location=f"{name}.data", size_threshold=64)
    before = sorted(path.name for path in Path().iterdir())
    verdict = compare_onnx("large-one.onnx", "large-other.onnx")
    assert verdict.first is not None
    assert verdict.first.name == "2"
    assert sorted(path.name for path in Path().iterdir()) == before, "nothing is left in the folder"


@pytest.mark.parametrize(
    "layout", [*CONV_LAYOUTS[::3], *(pytest.param(each, marks=pytest.mark.fuzz) for each in CONV_LAYOUTS[1:3])]
)
def test_factors_of_every_layout_are_of_their_weights_site(layout: Any) -> None:
    """At a rank that keeps nearly nothing, so that the site differs, and behind one that does not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Conv2d(8, 10, 3))
    x = (torch.randn(2, 6, 9, 9),)
    net = dr.transform(model, x, rank=dr.Fixed(2), conv_layout=layout, exclude=("0.*",), allow_unprofitable=True)
    dr.export_onnx(model, x, "dense.onnx")
    dr.export_onnx(dr.truncate(net), x, "small.onnx")
    verdict = compare_onnx("dense.onnx", "small.onnx")
    assert [(each.name, each.relative > 1e-4) for each in verdict.sites] == [("0", False), ("2", True)]


def test_gaps_are_relative_norms_over_all_batches() -> None:
    torch.manual_seed(0)
    one, other = nn.Linear(4, 3), nn.Linear(4, 3)
    for name, model in (("one.onnx", one), ("other.onnx", other)):
        dr.export_onnx(model, torch.randn(2, 4), name)
    verdict = compare_onnx("one.onnx", "other.onnx", batch_sizes=(3, 2))
    inputs = [np.random.default_rng(batch).standard_normal((batch, 4)).astype(np.float32) for batch in (3, 2)]
    with torch.no_grad():
        y, z = (torch.cat([model(torch.from_numpy(x)) for x in inputs]).double() for model in (one, other))
    (gap,) = verdict.outputs
    assert gap.relative == pytest.approx(float((y - z).norm() / y.norm()), rel=1e-5)
    assert gap.largest == pytest.approx(float((y - z).abs().max()), rel=1e-5)


def test_a_verdict_names_the_first_site_beyond_the_tolerance() -> None:
    sites = (Gap("a", 0.01, 1.0), Gap("b", 0.3, 1.0), Gap("c", 0.4, 1.0))
    verdict = Verdict((Gap("y", 0.2, 0.5),), sites, 0.1)
    assert not verdict.same
    assert str(verdict).splitlines() == [
        "y: 0.2 relative, 0.5 at most",
        "the first site to differ is b (0.3 relative)",
        "NOT the same within 0.1",
    ]
    assert Verdict((Gap("y", 0.2, 0.5),), sites, 0.5).same
    assert not Verdict((Gap("y", float("nan"), 0.5),), (), 0.5).same
