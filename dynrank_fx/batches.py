"""Calibration batches: checked before they are used, and given to a model one by one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .errors import CalibrationError
from .inputs import fresh, split_inputs
from .onnxconvert import reason


def checked_batches(batches: Iterable[Any]) -> list[Any]:
    """The batches as a list. Raises CalibrationError for none, and for numbers that are not finite."""
    try:
        data = list(batches)
    except TypeError as error:
        raise CalibrationError(
            f"calibration data of type {type(batches).__name__} are no batches: give a list"
        ) from error
    if not data or not any(isinstance(leaf, Tensor) and leaf.numel() for leaf in pytree.tree_leaves(data)):
        raise CalibrationError("the calibration data are empty: give at least one batch of inputs")
    for number, batch in enumerate(data):
        for leaf in pytree.tree_leaves(batch):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
                raise CalibrationError(f"calibration batch {number} holds numbers that are not finite: take them out")
    return data


def call(module: nn.Module, batch: Any, number: int) -> Any:
    """The module's output for a batch of inputs. Raises CalibrationError, naming its number, where that fails."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    args, kwargs = split_inputs(pytree.tree_map_only(Tensor, lambda t: t.to(device), fresh(batch)))
    try:
        return module(*args, **kwargs)
    except Exception as error:
        raise CalibrationError(
            f"calibration batch {number} does not fit the model ({reason(error)[:200]}): give "
            "batches of the form of the example inputs"
        ) from error
