"""Where an error comes from and what was given, in words that name the user's own module and line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynrank_fx.tracing import origin
from dynrank_fx.tracing.blame import describe


@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        ((), {}, ""),
        ((torch.zeros(2, 3),), {}, "float32[2, 3]"),
        ((torch.tensor(True), 3, None), {}, "bool[], int, NoneType"),
        (([torch.zeros(1)],), {"mask": torch.zeros(4, dtype=torch.int64)}, "list, mask=int64[4]"),
    ],
)
def test_tensors_are_told_by_type_and_shape_and_everything_else_by_its_type(args, kwargs, words):
    assert describe(args, kwargs) == words


def checked(x: Tensor) -> Tensor:
    raise ValueError("not this one")


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor, how: str) -> Tensor:
        if how == "helper":
            return checked(x)
        return self.fc(x[:, :2])


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Identity(), Inner())

    def forward(self, x: Tensor, how: str) -> Tensor:
        if how == "own":
            return x.no_such_method()
        return self.block[1](x, how)


def raised(model: Any, how: str) -> BaseException:
    with pytest.raises((ValueError, RuntimeError, AttributeError)) as caught:
        model(torch.zeros(2, 3), how)
    return caught.value


@pytest.mark.parametrize(
    ("how", "start", "line"),
    [
        ("own", "the model (Outer, test_blame.py:", "`return x.no_such_method()`)"),
        ("inside torch", "block.1 (Inner, test_blame.py:", "`return self.fc(x[:, :2])`)"),
        ("helper", "block.1 (Inner, test_blame.py:", "`return checked(x)`)"),
    ],
)
def test_the_innermost_line_of_the_models_own_modules_is_named(how, start, line):
    model = Outer()
    place = origin(raised(model, how), model)
    assert place.startswith(start)
    assert place.endswith(line)
    number = int(place.split(":")[1])
    with open(__file__, encoding="utf-8") as file:
        assert file.readlines()[number - 1].strip() in line


def test_an_error_of_code_that_is_no_module_of_the_model_names_its_class():
    assert origin(raised(Inner(), "helper"), Outer()) == "Outer"
    assert origin(ValueError("never raised"), nn.Linear(2, 2)) == "Linear"
