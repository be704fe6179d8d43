"""Nested Python state survives JSON: its types, its keys and every bit of its numbers."""

from __future__ import annotations

import enum
import json
import math
import random
from collections import Counter, OrderedDict, defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from dynrank_fx.errors import StoreError
from dynrank_fx.randomness import random_state, seed_all, set_random_state
from dynrank_fx.training.state_tree import flatten, unflatten


def returned(value: Any) -> Any:
    tree, tensors = flatten(value, "state")
    assert all(name.startswith("state") for name in tensors)
    return unflatten(json.loads(json.dumps(tree)), {name: tensor.clone() for name, tensor in tensors.items()})


def identical(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return all(map(identical, a, b)) and all(map(identical, a.values(), b.values())) and len(a) == len(b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(identical, a, b))
    if isinstance(a, float):
        return math.isnan(a) if math.isnan(b) else (a, math.copysign(1, a)) == (b, math.copysign(1, b))
    return a == b


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        2**200,
        -0.0,
        0.1 + 0.2,
        5e-324,
        float("nan"),
        float("-inf"),
        "",
        "ﬁ\u2028\0\ud800",
        [],
        (),
        {},
        [None, (1, [2.0, ()]), {}],
        {1: "int", "1": "str", 1.5: "float", None: "none", (1, "a"): "tuple", False: "bool"},
        Counter({3: 2, 5: 1}),
        Counter(),
        {"tensor": "a.name", "dict": [], "tuple": 1},
        {"array": {"counter": {"tuple": ()}}},
        torch.tensor([1.0, float("nan")])[:1],
        torch.tensor(3),
        torch.zeros(0, 2, dtype=torch.bfloat16),
        np.arange(6, dtype=np.uint32).reshape(2, 3),
        np.array(2.5),
        {"a": {"b": torch.ones(1)}, "a.b": torch.zeros(1)},
        {1: torch.ones(2), "1": torch.zeros(2)},
        [np.zeros(1), (torch.ones(1), [torch.full((1,), 2.0)])],
    ],
    ids=repr,
)
def test_a_value_comes_back_as_it_was(value: Any) -> None:
    assert identical(returned(value), value)


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
        (defaultdict(list, x=[1]), {"x": [1]}),
        (torch.Size([2, 3]), (2, 3)),
        (np.int64(7), 7),
        (np.float32(0.1), float(np.float32(0.1))),
        (np.bool_(True), True),
        (enum.IntEnum("Level", "LOW")(1), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_kinds_of_the_plain_types_come_back_plain(value: Any, plain: Any) -> None:
    assert identical(returned(value), plain)


@pytest.mark.parametrize(
    ("value", "name", "kind"),
    [
        ({1, 2}, "state.a.0", "set"),
        (b"bytes", "state.a.0", "bytes"),
        (print, "state.a.0", "builtin_function_or_method"),
        (1j, "state.a.0", "complex"),
        (np.complex64(1j), "state.a.0", "complex64"),
        (np.datetime64("2025-01-01"), "state.a.0", "datetime64"),
        (np.array(["text"]), "state.a.0", "ndarray"),
        (torch.float32, "state.a.0", "dtype"),
        ({"deep": [object()]}, "state.a.0.deep.0", "object"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_any_other_type_is_named_with_its_place(value: Any, name: str, kind: str) -> None:
    with pytest.raises(StoreError) as caught:
        flatten({"a": [value]}, "state")
    assert str(caught.value) == f"{name} is a {kind}, which a checkpoint cannot hold without pickle; leave it out"


def test_a_missing_tensor_is_named() -> None:
    tree, tensors = flatten({"momentum": torch.ones(1)}, "state")
    tensors.clear()
    with pytest.raises(StoreError, match=r"^the checkpoint has no tensor 'state\.momentum': it is incomplete$"):
        unflatten(tree, tensors)


OPTIMIZERS = {
    "sgd": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda p: AdamW([{"params": p[:1], "lr": 0.2}, {"params": p[1:]}], amsgrad=True),
}
SCHEDULERS = {
    "multistep": lambda o: MultiStepLR(o, [2, 2, 5]),
    "cosine": lambda o: CosineAnnealingLR(o, 7),
    "lambda": lambda o: LambdaLR(o, lambda epoch: 0.9**epoch),
    "one cycle": lambda o: OneCycleLR(o, 0.5, total_steps=20),
    "plateau": lambda o: ReduceLROnPlateau(o),
    "sequential": lambda o: SequentialLR(o, [LinearLR(o), CosineAnnealingLR(o, 5)], [3]),
}


def stepped(optimizer: Optimizer, scheduler: Any, steps: int) -> None:
    for _ in range(steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.sin(p.detach())
        optimizer.step()
        scheduler.step(*([0.5] if isinstance(scheduler, ReduceLROnPlateau) else []))


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")
@pytest.mark.parametrize("schedule", SCHEDULERS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizers_and_schedulers_go_on_from_their_returned_state(kind: str, schedule: str) -> None:
    def made() -> tuple[list[torch.Tensor], Optimizer, Any]:
        p = [torch.nn.Parameter(torch.linspace(0, 1, 5)), torch.nn.Parameter(torch.ones(2, 2))]
        optimizer = OPTIMIZERS[kind](p)
        return p, optimizer, SCHEDULERS[schedule](optimizer)

    p, optimizer, scheduler = made()
    stepped(optimizer, scheduler, 3)
    saved = returned({"o": optimizer.state_dict(), "s": scheduler.state_dict(), "p": [t.detach().clone() for t in p]})
    stepped(optimizer, scheduler, 4)

    q, other, other_scheduler = made()
    stepped(other, other_scheduler, 1)
    with torch.no_grad():
        for t, value in zip(q, saved["p"], strict=True):
            t.copy_(value)
    other.load_state_dict(saved["o"])
    other_scheduler.load_state_dict(saved["s"])
    stepped(other, other_scheduler, 4)
    assert identical([t.detach() for t in q], [t.detach() for t in p])
    assert identical(other.state_dict(), optimizer.state_dict())


def test_the_random_generators_go_on_from_their_returned_state() -> None:
    def draw() -> tuple[Any, ...]:
        return random.random(), random.gauss(0, 1), np.random.rand(3), np.random.randn(), torch.rand(3), torch.randn(1)

    seed_all(3)
    draw()
    state = returned(random_state())
    first = draw()
    seed_all(4)
    assert not identical(draw(), first)
    set_random_state(state)
    assert identical(draw(), first)


def test_a_seed_decides_all_generators() -> None:
    def draw(seed: int) -> tuple[Any, ...]:
        seed_all(seed)
        return random.random(), np.random.rand(), torch.rand(1)

    assert identical(draw(5), draw(5))
    assert not any(map(identical, draw(5), draw(6)))
    assert identical(draw(2**40 + 1), draw(2**40 + 1))
