"""What is changed inside a context is put back: by it, or by what runs in it."""

from __future__ import annotations

import copy
import logging
import random
import sys
import warnings
from contextlib import suppress

import numpy as np
import pytest
import torch
from capturing import assert_alike
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.tracing import quiet, same_buffers, same_values, slow_attention
from dynrank_fx.tracing.isolation import assignments_in_place, in_mode, same_randomness, unchecked_distributions


def test_weights_that_forward_writes_to_are_put_back_through_whatever_view():
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 4, max_norm=0.1)
            self.parts = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))

        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            a, b, c, d, e = self.parts
            a.weight.data.clamp_(0, 0.1)
            b.weight[0], c.weight.mT[1:] = 7, 8
            b.bias += 1
            torch._foreach_mul_([c.bias, d.weight], 2.0)
            torch.ops.aten.mul_.Tensor(d.bias, 3.0)
            torch.add(e.bias, 1, out=e.bias)
            return self.table(x)

    model = Writing()
    before = copy.deepcopy(model.state_dict())
    with same_values(model):
        model(torch.tensor([1, 2]))
        changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == [name for name in before if name not in ("parts.0.bias", "parts.4.weight")]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Sampling(nn.Module):
    """torch.distributions checks its arguments by their values, which no tracer can."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.spread = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.distributions.Normal(self.mean(x), self.spread(x).exp()).rsample()


def test_distributions_can_be_exported_and_are_checked_as_before_afterwards(monkeypatch):
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)  # torch.compile turns it off
    model, x = Sampling(), torch.randn(4, 8)
    net = dr.capture(model, (x,), how=dr.Capture.EXPORT)
    assert_alike(net, model, torch.randn(5, 8))
    with pytest.raises(ValueError, match="constraint"):
        torch.distributions.Normal(torch.zeros(1), -torch.ones(1))


# Each context by itself


def drawn() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


class Interrupted(Exception):
    pass


def test_what_is_drawn_inside_is_drawn_again_afterwards_after_an_error_too():
    with suppress(Interrupted), same_randomness():
        inside = drawn()
        raise Interrupted
    assert drawn() == inside


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.register_buffer("kept", torch.zeros(4))
        self.register_buffer("replaced", torch.zeros(4))
        self.calls, self.seen = 0, None

    def forward(self, x: Tensor) -> Tensor:
        self.kept.add_(1)
        self.replaced = self.replaced + 1
        self.calls += 1
        self.seen = x
        self.fc.register_forward_hook(lambda module, args, output: output + 1)
        self.eval()
        return self.norm(self.fc(x))


def test_buffers_that_are_written_to_or_replaced_inside_are_the_same_tensors_with_the_same_values():
    model = Stateful()
    held, before = dict(model.named_buffers()), copy.deepcopy(dict(model.named_buffers()))
    with suppress(Interrupted), same_buffers(model):
        model(torch.randn(3, 4))
        assert int(model.kept[0]) == int(model.replaced[0]) == 1
        raise Interrupted
    for name, buffer in model.named_buffers():
        assert buffer is held[name]
        assert torch.equal(buffer, before[name])
    with same_buffers(model, but=[model.kept]):
        model(torch.randn(3, 4))
    assert [int(model.kept[0]), int(model.replaced[0])] == [1, 0]


@pytest.mark.parametrize("mode", [True, False])
def test_modes_buffers_attributes_and_hooks_are_as_before_after_a_run_in_a_mode(mode):
    model = Stateful()
    with suppress(Interrupted), in_mode(model, mode):
        assert [module.training for module in model.modules()] == [mode] * 3
        model._tensor_constant0 = torch.ones(2)  # as torch.fx names what forward makes
        model(torch.randn(3, 4))
        raise Interrupted
    assert [module.training for module in model.modules()] == [True] * 3
    assert (model.calls, model.seen, dict(model.fc._forward_hooks)) == (0, None, {})
    assert not model.kept.any()
    assert not model.replaced.any()
    assert torch.equal(model._tensor_constant0, torch.ones(2)), "the tracer's own constants stay"


@pytest.mark.parametrize("training", [True, False])
def test_in_the_mode_that_a_model_is_in_its_parts_that_were_set_apart_stay_apart(training):
    model = Stateful().train(training)
    model.norm.train(not training)
    with in_mode(model, training):
        assert (model.fc.training, model.norm.training) == (training, not training)
    with in_mode(model, not training):
        assert (model.fc.training, model.norm.training) == (not training, not training)
    assert (model.fc.training, model.norm.training) == (training, not training)


def test_a_buffer_that_a_part_assigns_is_written_in_place_where_it_fits():
    model = nn.Sequential(Stateful())
    model.register_buffer("own", torch.zeros(2))
    part, own = model[0], model.own
    held = part.replaced
    with suppress(Interrupted), assignments_in_place(model):
        part.replaced = torch.ones(4)
        assert part.replaced is held
        part.kept = torch.ones(7)
        model.own = torch.ones(2)
        raise Interrupted
    assert torch.equal(held, torch.ones(4))
    assert part.kept.shape == (7,), "what has another shape takes its place"
    assert model.own is not own, "torch.export sees what the root assigns"
    part.replaced = torch.zeros(4)
    assert part.replaced is not held, "and afterwards it is as always"


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    ("context", "read", "write"),
    [
        (slow_attention, torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled),
        (
            unchecked_distributions,
            lambda: torch.distributions.Distribution._validate_args,
            torch.distributions.Distribution.set_default_validate_args,
        ),
    ],
)
def test_a_switch_of_torch_is_off_inside_and_as_before_afterwards(context, read, write, before):
    found = read()
    try:
        write(before)
        with suppress(Interrupted), context():
            assert not read()
            raise Interrupted
        assert read() == before
    finally:
        write(found)


def test_nothing_is_heard_of_torch_inside_and_all_of_it_afterwards(capfd, caplog):
    logger = logging.getLogger("torch")
    level = logger.level
    with suppress(Interrupted), quiet():
        warnings.warn("deprecated", stacklevel=1)
        logger.error("not installed")
        print("raised anyway", file=sys.stderr)
        raise Interrupted
    assert capfd.readouterr().err == ""
    assert not [record for record in caplog.records if record.name == "torch"]
    assert logger.level == level
    with pytest.warns(UserWarning, match="deprecated"):
        warnings.warn("deprecated", stacklevel=1)


def test_weights_written_to_are_put_back_after_an_error_too():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    before = copy.deepcopy(model.state_dict())
    with suppress(Interrupted), same_values(model):
        with torch.no_grad():
            model[0].weight.zero_()
        raise Interrupted
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
