"""The statistics of batch norms after a cut, against the means and variances that torch computes itself."""

from __future__ import annotations

import pytest
import torch
from compressing import batches, pictures
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.compression import compress, recalibrate_
from dynrank_fx.compression.batchnorms import batch_statistics, norms_of
from dynrank_fx.errors import CalibrationError
from dynrank_fx.plan import Fixed


def test_batch_norms_get_the_mean_of_what_the_batches_have(small: nn.Module) -> None:
    """Against the convolution's own outputs: means of the batches' means and (unbiased) variances."""
    x = [batch for (batch,) in pictures()]
    parameters = {name: p.detach().clone() for name, p in small.named_parameters()}
    assert recalibrate_(small, pictures()) == 1
    buffers = {name.rpartition(".")[2]: b for name, b in small.named_buffers()}
    right = next(p for name, p in parameters.items() if name == "conv.right.weight")
    left, bias = parameters["conv.left.weight"], parameters["conv.left.bias"]
    with torch.no_grad():
        seen = [nn.functional.conv2d(nn.functional.conv2d(each, right), left, bias) for each in x]
    mean = torch.stack([y.mean((0, 2, 3)) for y in seen]).mean(0)
    var = torch.stack([y.var((0, 2, 3)) for y in seen]).mean(0)
    torch.testing.assert_close(buffers["running_mean"], mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(buffers["running_var"], var, rtol=1e-4, atol=1e-5)
    assert torch.equal(small(x[0]), small(x[0]))  # neither dropout nor batch statistics are on afterwards
    assert all(torch.equal(p, parameters[name]) for name, p in small.named_parameters())


def test_a_batch_that_does_not_fit_is_named(small: nn.Module) -> None:
    with pytest.raises(CalibrationError, match="calibration batch 1 does not fit"):
        recalibrate_(small, [*pictures(1), (torch.randn(2, 5),)])


class Two(nn.Module):
    """A batch norm before the layer that is cut, and one behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer, self.second = nn.BatchNorm1d(12), nn.Linear(12, 16), nn.BatchNorm1d(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.layer(self.first(x)))


def cut_between(how: dr.Capture) -> tuple[nn.Module, nn.Module]:
    """The model dense, with statistics of its own, and cut."""
    torch.manual_seed(0)
    model = Two()
    for _ in range(20):
        model(torch.randn(32, 12))
    x = (torch.randn(8, 12),)
    net = dr.transform(model, x, rank=Fixed(2), how=how, allow_unprofitable=True)
    dense = dr.inline(net.eval() if how is dr.Capture.SYMBOLIC else net)
    return dense.eval() if how is dr.Capture.SYMBOLIC else dense, dr.truncate(net, [x])


@pytest.mark.parametrize("how", [dr.Capture.SYMBOLIC, dr.Capture.EXPORT])
def test_batch_norms_that_no_cut_feeds_keep_their_statistics(how: dr.Capture) -> None:
    dense, small = cut_between(how)
    before = {name: b.clone() for name, b in small.named_buffers()}
    data = [(3 + torch.randn(32, 12),) for _ in range(3)]
    assert recalibrate_(small, data, like=dense) == 1
    after = dict(small.named_buffers())
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("first"))
    assert not torch.equal(before["second.running_mean"], after["second.running_mean"])


def test_statistics_move_by_what_the_cut_changes_and_keep_what_they_have_from_training() -> None:
    """One batch, so that what reaches the second norm is what the layers compute of the first one's outputs."""
    dense, small = cut_between(dr.Capture.SYMBOLIC)
    x = 3 + 2 * torch.randn(64, 12)
    mean, variance = (small.get_buffer(f"second.running_{what}").clone() for what in ("mean", "var"))
    recalibrate_(small, [(x,)], like=dense)
    with torch.no_grad():
        dense.get_submodule("first").train()
        inputs = dense.get_submodule("first")(x)
        then = nn.functional.linear(inputs, dense.get_parameter("layer.weight"), dense.get_parameter("layer.bias"))
        now = small.get_submodule("layer.left")(small.get_submodule("layer.right")(inputs))
    torch.testing.assert_close(small.get_buffer("second.running_mean"), mean + now.mean(0) - then.mean(0))
    ratio = (now.var(0) + 1e-3 * variance) / (then.var(0) + 1e-3 * variance)
    torch.testing.assert_close(small.get_buffer("second.running_var"), variance * ratio)


@pytest.mark.parametrize("trained", [1.0, 0.0])
def test_a_channel_that_hardly_varies_over_the_batches_keeps_its_variance(trained: float) -> None:
    """What the cut takes of so little is no measure for data that do vary; and nothing becomes NaN."""
    dense, small = cut_between(dr.Capture.SYMBOLIC)
    small.get_buffer("second.running_var").mul_(trained)
    before = small.get_buffer("second.running_var").clone()
    with torch.no_grad():
        for model in (dense, small):
            model.get_parameter("first.weight").fill_(1e-3)
    assert recalibrate_(small, [(torch.randn(64, 12),)], like=dense) == 1
    torch.testing.assert_close(small.get_buffer("second.running_var"), before, rtol=1e-2, atol=0)


def test_batches_count_by_their_rows_and_a_single_row_not_at_all() -> None:
    _, small = cut_between(dr.Capture.SYMBOLIC)
    data = [(torch.randn(30, 12),), (5 + torch.randn(10, 12),), (torch.full((1, 12), 1e3),)]
    recalibrate_(small, data)
    mean = torch.cat([batch for (batch,) in data[:2]]).mean(0)
    torch.testing.assert_close(small.get_buffer("first.running_mean"), mean, rtol=1e-5, atol=1e-5)
    with pytest.raises(CalibrationError, match="has one row: give batches of two or more"):
        recalibrate_(small, [(torch.randn(1, 12),)])


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.layer, self.behind = nn.BatchNorm1d(32), nn.Linear(32, 48), nn.BatchNorm1d(48)

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.layer(self.before(x)))


def test_batch_norms_before_every_cut_are_left_alone_and_a_short_last_batch_is_no_error() -> None:
    torch.manual_seed(0)
    dense = Normed()
    for (x,) in batches():
        dense(x)
    dense.eval()
    data = [*((x + 1,) for (x,) in batches()), (torch.randn(1, 32),)]
    small = compress(dense, batches()[0], dr.Budget(params=0.5), data).module
    assert torch.equal(small.get_buffer("before.running_mean"), dense.before.running_mean)
    assert not torch.equal(small.get_buffer("behind.running_mean"), dense.behind.running_mean)


@pytest.mark.parametrize("how", [dr.Capture.SYMBOLIC, dr.Capture.EXPORT])
def test_modes_momenta_and_code_are_as_before_whatever_happens(how: dr.Capture) -> None:
    _, small = cut_between(how)
    norms = norms_of(small)
    assert len(norms) == 2
    x = torch.randn(16, 12)
    before = small(x)
    code = [graph.code for graph in small.modules() if isinstance(graph, torch.fx.GraphModule)]
    settings = [(module.momentum, module.training) for module in small.modules() if isinstance(module, nn.BatchNorm1d)]

    def stopped() -> None:
        with batch_statistics(norms) as weigh:
            weigh(0.5)
            assert not torch.equal(small(x), before)  # by the batch's own statistics
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        stopped()
    assert [graph.code for graph in small.modules() if isinstance(graph, torch.fx.GraphModule)] == code
    after = [(module.momentum, module.training) for module in small.modules() if isinstance(module, nn.BatchNorm1d)]
    assert after == settings
    assert torch.equal(small(x), small(x))  # nothing is taken in any more


def test_a_module_without_batch_norms_has_none_to_recalibrate() -> None:
    assert recalibrate_(nn.Linear(12, 4), [(torch.randn(3, 12),)]) == 0
