"""The layers that a step is measured beside compute what their papers say."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.beside import Cola, GaLore, Lora, SlTrain, beside


def test_cola_has_silu_between_its_factors() -> None:
    layer, x = Cola(nn.Linear(6, 4), 2).double(), torch.randn(3, 6).double()
    hidden = x @ layer.right.weight.T
    expected = (hidden * torch.sigmoid(hidden)) @ layer.left.weight.T + layer.left.bias
    torch.testing.assert_close(layer(x), expected)


def test_sltrain_adds_a_sparse_matrix_to_the_product() -> None:
    layer, x = SlTrain(nn.Linear(20, 10), 2).double(), torch.randn(3, 20).double()
    nn.init.normal_(layer.values)
    sparse = torch.zeros(200).double()
    sparse[layer.places] = layer.values.detach()
    sparse = sparse.view(10, 20)
    assert int((sparse != 0).sum()) == layer.values.numel() == 6
    torch.testing.assert_close(layer(x), x @ (layer.left @ layer.right + sparse).T)
    layer(x).square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_lora_begins_as_the_layer_that_it_is_beside() -> None:
    linear, x = nn.Linear(6, 4), torch.randn(3, 6)
    layer = Lora(linear, 2)
    assert torch.equal(layer(x), linear(x))
    assert not linear.weight.requires_grad
    layer.left.weight.data.normal_()
    merged = linear.weight + layer.left.weight @ layer.right.weight
    torch.testing.assert_close(layer(x), x @ merged.T + linear.bias)


def test_a_step_of_galore_stays_in_the_leading_subspace_of_the_gradient() -> None:
    linear = nn.Linear(8, 6)
    before = linear.weight.detach().clone()
    optimizer = GaLore(linear.parameters(), lr=0.1, rank=2)
    linear(torch.randn(5, 8)).square().sum().backward()
    leading = torch.linalg.svd(linear.weight.grad)[0][:, :2]
    bias = linear.bias.detach().clone()
    optimizer.step()
    change = linear.weight.detach() - before
    torch.testing.assert_close(leading @ (leading.T @ change), change)
    coordinates = (leading.T @ change).abs()
    torch.testing.assert_close(coordinates, torch.full_like(coordinates, 0.1))  # Adam's first step is the sign
    assert not torch.equal(linear.bias, bias)


@pytest.mark.fuzz
def test_the_table_has_a_row_for_each_way() -> None:
    rows = beside(quick=True).rows
    assert [row[1] for row in rows] == [
        "dense", "narrower dense", "dynrank-fx, LOW", "CoLA", "SLTrain", "LoRA, merged", "GaLore",
    ]  # fmt: skip
    assert rows[0][2:4] == (1.0, 1.0)
