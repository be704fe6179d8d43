"""What is told of a compressed model: as text, and in the metadata of its file."""

from __future__ import annotations

import json
import re

import torch
from compressing import SaidTimes, batches, params, perceptron

import dynrank_fx as dr
from dynrank_fx.compression import compress


def test_what_is_printed() -> None:
    found = compress(
        perceptron(),
        batches()[0],
        dr.Budget(params=0.5),
        batches(),
        metric=lambda net: 0.5,
        times=SaidTimes({"2.weight": 0.5}),
    )
    text = str(found)
    assert f"parameters  {params(perceptron()):,} -> {params(found.module):,}" in text
    assert "metric      0.5000 -> 0.5000" in text
    assert re.search(r"time        \d\.\d\d of dense \(\d+\.\d\d to \d+\.\d\d in several rounds; \d+\.\d{3} ms", text)
    assert " ms on the example inputs) in onnxruntime" in text
    assert json.loads(found.plan.to_json())["total_params"] == params(perceptron())


def test_few_calibration_data_are_told_of() -> None:
    found = compress(perceptron(), batches()[0], dr.Budget(params=0.5), [(torch.randn(1, 32),)])
    assert any(re.search(r"data are few for \d of 3 weights \(.* was seen on 1 input\)", n) for n in found.notes)
    enough = compress(perceptron(), batches()[0], dr.Budget(params=0.5), batches())
    assert not any("few" in note for note in enough.notes)


def test_what_its_file_tells() -> None:
    found = compress(perceptron(), batches()[0], dr.Budget(params=0.5), batches())
    assert found.metadata == {"dynrank_plan": found.plan.to_json()}
    scored = compress(perceptron(), batches()[0], dr.Budget(params=0.5), batches(), metric=lambda net: params(net) / 7)
    said = f"{params(scored.module) / 7:.6g} (dense: {params(perceptron()) / 7:.6g})"
    assert scored.metadata == {"dynrank_plan": scored.plan.to_json(), "dynrank_metric": said}


def test_flops_and_parameters_are_those_of_the_cuts() -> None:
    """Counted here from the ranks: 2 FLOPs for each weight and row."""
    found = compress(perceptron(), batches()[0], dr.Budget(params=0.6), batches())
    shapes = {"0.weight": (64, 32), "2.weight": (64, 64), "4.weight": (48, 64)}
    ranks = {cut.site: cut.rank for cut in found.cuts}
    left = sum(m * n if (r := ranks[name]) is None else r * (m + n) for name, (m, n) in shapes.items())
    assert found.params == (params(perceptron()), left + 64 + 64 + 48)
    assert found.flops == (2 * 64 * sum(m * n for m, n in shapes.values()), 2 * 64 * left)
