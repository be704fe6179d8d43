"""Mappings of every kind are walked as dicts: as inputs, calibration data, batches, and for a file."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.tracing import as_dicts, leaves, leaves_with_paths, mapped, tensors
from dynrank_fx.training import Settings, Task, evaluate

X, Y = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)), torch.ones(6, 8)


class Own(dict):
    """A dict of another class, which pytree does not know either."""


class Shared(MutableMapping):
    """Whose copies write into the original."""

    def __init__(self, **items: object) -> None:
        self.items_ = items

    def __getitem__(self, key: str) -> object:
        return self.items_[key]

    def __setitem__(self, key: str, value: object) -> None:
        self.items_[key] = value

    def __delitem__(self, key: str) -> None:
        del self.items_[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.items_)

    def __len__(self) -> int:
        return len(self.items_)


KINDS: list[Any] = [dict, OrderedDict, UserDict, Own, Shared, lambda **items: MappingProxyType(items)]
every_kind = pytest.mark.parametrize("kind", KINDS)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        return self.second(torch.tanh(self.first(batch["x"])) * batch["more"]["y"])


def packed(kind: Any, rows: int = 6) -> Any:
    return kind(x=X[:rows], more=kind(y=Y[:rows]))


@every_kind
def test_the_leaves_are_those_of_a_dict_and_a_map_keeps_the_kind(kind: Any) -> None:
    values: Any = [kind(x=X, more=kind(y=Y)), (X, 3)]
    plain = as_dicts(values)[0]
    assert [type(each) in (dict, OrderedDict) for each in (plain, plain["more"])] == [True, True]
    assert plain["more"]["y"] is Y
    assert [leaf is given for leaf, given in zip(leaves(values), (X, Y, X, 3), strict=True)] == [True] * 4
    assert len(tensors(values)) == 3
    assert [[str(key) for key in path] for path, _ in leaves_with_paths(values)][1] == ["[0]", "['more']", "['y']"]
    new = mapped(lambda tensor: tensor + 1, values)
    assert torch.equal(new[0]["more"]["y"], Y + 1)
    assert values[0]["x"] is X, "the given one is as it was"
    if kind in (dict, OrderedDict, UserDict, Own):
        assert type(new[0]) is type(new[0]["more"]) is kind


@every_kind
@pytest.mark.parametrize("how", [None, dr.Capture.EXPORT, dr.Capture.MODULES])
def test_a_mapping_inside_an_argument_serves_for_the_whole_job(kind: Any, how: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = Packed(), (packed(kind),)
    net = dr.transform(model, inputs, rank=dr.Fixed(2), how=how)
    assert torch.equal(net(*inputs), model(*inputs))
    small = dr.truncate(net, [inputs, (packed(kind, 3),)])
    assert small(packed(kind, 2)).shape == (2, 8)
    path = tmp_path / "m.onnx"
    free = {"batch_x": {0: "rows"}, "batch_more_y": {0: "rows"}}
    report = dr.export_onnx(small, inputs, path, dynamic=free, more_inputs=[(packed(kind, 3),)])
    assert report.shapes == {"batch_x": ("rows", 8), "batch_more_y": ("rows", 8)}
    dr.verify_onnx(path, small, inputs)


@every_kind
def test_a_batch_may_hold_mappings(kind: Any) -> None:
    task = Task([], lambda output, batch: (output - batch[1]).square().mean(), lambda batch: ((batch[0],), {}))
    task = Task([], task.loss, task.inputs, eval_data=[(packed(kind, 4), Y[:4]), (packed(kind, 2), Y[:2])])
    told = evaluate(Packed(), task, Settings(epochs=1, compile=False))
    assert told["eval_loss"] is not None
    net = dr.transform(Packed(), (packed(kind),), rank=dr.Fixed(2))
    with pytest.raises(dr.errors.CalibrationError, match="not finite"):
        dr.calibrate(net, [(kind(x=X, more=kind(y=Y * torch.nan)),)])
