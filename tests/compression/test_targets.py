"""What the dense model gives for batches: run once where there is room, and anew where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dynrank_fx.compression.targets import Targets, by_batch


class Counted(nn.Module):
    """A batch norm behind a linear, which counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.calls = nn.Linear(4, 3), nn.BatchNorm1d(3), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.norm(self.linear(x))
        return y


@pytest.mark.parametrize(("room", "calls"), [(2**20, 2), (8 * 3 * 4, 3), (0, 4)], ids=["all", "one", "none"])
def test_a_batch_is_run_once_as_far_as_there_is_room(room: int, calls: int) -> None:
    model = Counted().eval()
    data = [((torch.randn(8, 4),), {}) for _ in range(2)]
    targets = Targets(model, data, room=room)
    found = [targets.of(number) for number in (0, 1, 0, 1)]
    assert model.calls == calls
    for output, (args, _) in zip(found, data * 2, strict=True):
        assert not output.requires_grad
        torch.testing.assert_close(output, model(*args))


def test_by_batch_every_batch_norm_goes_by_the_batch_and_keeps_its_own() -> None:
    model, x = Counted().eval(), torch.randn(8, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        found, given = by_batch(model, ((x,), {}), 0), model.linear(x)
    torch.testing.assert_close(found, (given - given.mean(0)) / (given.var(0, correction=0) + model.norm.eps).sqrt())
    torch.testing.assert_close(Targets(model, [((x,), {})], by_batch=True).of(0), found)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training
    assert not model.norm.training
