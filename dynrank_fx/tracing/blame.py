"""Where in the user's model an error comes from, and what it was given, in words."""

from __future__ import annotations

import linecache
import traceback
from pathlib import Path

import torch
from torch import Tensor, nn

from ..aliases import Args, Kwargs

_TORCH = str(Path(torch.__file__).parent)


def describe(args: Args, kwargs: Kwargs) -> str:
    """Arguments in words: type and shape of tensors, the type of everything else."""

    def one(value: object) -> str:
        return (
            f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
            if isinstance(value, Tensor)
            else type(value).__name__
        )

    return ", ".join([*(one(a) for a in args), *(f"{k}={one(v)}" for k, v in kwargs.items())])


def in_words(value: object) -> str:
    """A value in words: type and shape of a tensor, the type of everything else."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    where = ", without values (on the device meta)" if value.is_meta else ""
    return f"a tensor of {str(value.dtype).removeprefix('torch.')} and shape {tuple(value.shape)}{where}"


def origin(error: BaseException, root: nn.Module) -> str:
    """The module and line of the innermost frame of the user's own code."""
    place = type(root).__name__
    names = {id(module): name for name, module in root.named_modules()}
    for frame, number in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        owner = frame.f_locals.get("self")
        if file.startswith((_TORCH, str(Path(__file__).parent), "<")) or id(owner) not in names:
            continue
        name = names[id(owner)]
        line = linecache.getline(file, number).strip()
        place = f"{name or 'the model'} ({type(owner).__name__}, {Path(file).name}:{number}: `{line}`)"
    return place
