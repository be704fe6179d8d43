"""A truncated model is made of torch's own layers: tools that look for layers find them; nothing is stored twice."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dynrank_fx as dr

HOW = pytest.mark.parametrize("how", list(dr.Capture))


class Language(nn.Module):
    """A tied embedding, a bare weight that is used as x @ W, a convolution, and a dense layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc, self.dense = nn.Embedding(40, 16), nn.Linear(16, 32), nn.Linear(16, 16)
        self.turned, self.shift = nn.Parameter(torch.randn(32, 16)), nn.Parameter(torch.randn(16))
        self.conv, self.head = nn.Conv1d(16, 16, 3, padding=1), nn.Linear(16, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.fc(self.embed(ids)).relu()
        x = torch.addmm(self.shift, x.flatten(0, 1), self.turned).unflatten(0, ids.shape)
        x = self.conv(x.mT).mT
        return self.head(self.dense(self.dense(x)))


def cut(how: dr.Capture, *, phase: dr.Phase = dr.Phase.LOW) -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    ids = torch.randint(40, (3, 5))
    net = dr.transform(Language(), (ids,), rank=dr.Fixed(2), how=how, exclude=["dense*"]).eval()
    dr.enter_(net, phase)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dr.DynrankWarning)
        return net, dr.truncate(net), ids


@HOW
def test_each_factor_is_a_layer_and_so_is_what_stayed_dense(how: dr.Capture) -> None:
    net, small, ids = cut(how)
    torch.testing.assert_close(small(ids), net(ids))
    kinds = {name: type(module) for name, module in small.named_modules()}
    for name in ("fc.right", "fc.left", "head.right", "head.left", "dense"):
        assert kinds[name] is nn.Linear, name
    assert (kinds["conv.right"], kinds["conv.left"], kinds["embed.left"]) == (nn.Conv1d, nn.Conv1d, nn.Embedding)
    assert small.get_submodule("fc.left").bias is not None
    assert small.get_submodule("fc.right").bias is None
    if how not in (dr.Capture.MODULES, dr.Capture.LAYERS):  # there no graph reaches a bare weight
        assert kinds["turned.left"] is kinds["turned.right"] is nn.Linear
        assert small.get_parameter("turned.right.bias").shape == (16,)


@HOW
def test_tied_factors_are_stored_once(how: dr.Capture) -> None:
    net, small, _ = cut(how)
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in net.parameters())
    assert small.get_submodule("embed.left").weight is small.get_submodule("head.left").weight
    assert small.get_parameter("embed.right") is small.get_submodule("head.right").weight


@pytest.mark.filterwarnings("ignore:.*LeafSpec")  # torch's own, of a module that it exported
@HOW
def test_a_copy_a_file_and_a_list_of_layers_are_those_of_any_model(how: dr.Capture) -> None:
    import copy
    import io

    _, small, ids = cut(how)
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    for twin in (copy.deepcopy(small), torch.load(file, weights_only=False)):
        assert torch.equal(twin(ids), small(ids))
        assert twin.state_dict().keys() == small.state_dict().keys()


def test_a_layer_that_is_called_thrice_is_one_layer() -> None:
    class Thrice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.fc(self.fc(x).sin()).sin())

    net = dr.transform(Thrice(), (torch.randn(2, 16),), rank=dr.Fixed(2), how=dr.Capture.EXPORT).eval()
    dr.enter_(net, dr.Phase.LOW)
    small = dr.truncate(net)
    assert [type(module) for module in small.get_submodule("fc").children()] == [nn.Linear, nn.Linear]
    x = torch.randn(4, 16)
    assert torch.equal(small(x), net(x))


def test_a_bias_that_is_computed_stays_beside_the_function() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.fc.weight, self.fc.bias * 2)

    net = dr.transform(Computed(), (torch.randn(2, 16),), rank=dr.Fixed(2)).eval()
    dr.enter_(net, dr.Phase.LOW)
    small, x = dr.truncate(net), torch.randn(4, 16)
    assert isinstance(small.get_submodule("fc.right"), nn.Linear)
    assert small.get_parameter("fc.left").shape == (16, 2)
    assert torch.equal(small(x), net(x))


@HOW
def test_dynamic_quantisation_finds_every_layer(how: dr.Capture) -> None:
    """torch's own tool, which replaces each nn.Linear by one of int8."""
    _, small, ids = cut(how)
    linears = [name for name, module in small.named_modules() if type(module) is nn.Linear]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(small, {nn.Linear}, torch.qint8)
    kinds = {name: type(module).__module__ for name, module in quantized.named_modules()}
    assert {name for name in linears if "quantized" in kinds[name]} == set(linears)
    with torch.no_grad():
        error = (quantized(ids) - small(ids)).norm() / small(ids).norm()
    assert float(error) < 0.05


def test_one_weight_read_by_an_embedding_and_a_head_keeps_its_factors_in_layers() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(40, 16)

        def forward(self, ids: Tensor) -> Tensor:
            return F.linear(F.embedding(ids, self.embed.weight).sin(), self.embed.weight)

    ids = torch.randint(40, (3, 5))
    net = dr.transform(Functional(), (ids,), rank=dr.Fixed(2)).eval()
    dr.enter_(net, dr.Phase.LOW)
    small = dr.truncate(net)
    assert torch.equal(small(ids), net(ids))
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in net.parameters())
    assert isinstance(small.get_submodule("embed.right"), nn.Linear)  # of the head; the embedding multiplies by it
