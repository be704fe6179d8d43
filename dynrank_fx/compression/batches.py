"""Calibration batches: checked before they are used, and given to a model one by one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..aliases import Output
from ..errors import CalibrationError, CaptureError, reason
from ..processes import ALONE, Processes
from ..tracing import ExampleInputs, fresh, mapped, same_values, split_inputs, tensors


def checked_batches(
    batches: Iterable[ExampleInputs], like: ExampleInputs | None = None, processes: Processes = ALONE
) -> list[ExampleInputs]:
    """The batches as a list. like: example inputs. Raises CalibrationError for none, for numbers that are not finite,
    and for tensors of other dimensions than those of the example inputs. Of several processes some may have none.
    """
    with processes.all_or_none(CalibrationError, "reading the calibration data"):
        data = _listed_batches(batches)
        for number, batch in enumerate(data):
            _check_batch(batch, number, like)
    if not any(processes.gathered(any(tensor.numel() for tensor in tensors(data)))):
        raise CalibrationError("the calibration data are empty: give at least one batch of inputs")
    return data


def dealt(data: Sequence[ExampleInputs], most: int, processes: Processes) -> list[ExampleInputs]:
    """This process's part of so many batches of all processes, which give one after the other in turn; the first so
    many where it is alone.
    """
    counts = processes.gathered(len(data))
    turns = sorted((number, rank) for rank, count in enumerate(counts) for number in range(min(count, most)))[:most]
    return list(data[: sum(rank == processes.rank for _, rank in turns)])


def _listed_batches(batches: Iterable[ExampleInputs]) -> list[ExampleInputs]:
    if isinstance(batches, Tensor | Mapping):  # whose rows, or names, would be taken for batches
        kind = "one tensor" if isinstance(batches, Tensor) else "one mapping"
        raise CalibrationError(f"calibration data of {kind} are no batches: give a list of them")
    try:
        data: list[ExampleInputs] = list(batches)
    except TypeError as error:
        raise CalibrationError(
            f"calibration data of type {type(batches).__name__} are no batches: give a list"
        ) from error
    try:
        return [split_inputs(batch) for batch in data]
    except CaptureError as error:
        raise CalibrationError(f"a calibration batch is none: {error}") from error


def _check_batch(batch: ExampleInputs, number: int, like: ExampleInputs | None) -> None:
    for tensor in tensors(batch):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CalibrationError(f"calibration batch {number} holds numbers that are not finite: take them out")
    if like is not None:
        _check_dimensions(batch, number, like)


def _check_dimensions(batch: ExampleInputs, number: int, like: ExampleInputs) -> None:
    """Many a layer takes any number of dimensions, and would calibrate on the wrong ones without a word."""
    given, wanted = ([tensor.ndim for tensor in tensors(split_inputs(each))] for each in (batch, like))
    if len(given) == len(wanted) and given != wanted:
        raise CalibrationError(
            f"the tensors of calibration batch {number} have {_listed(given)} dimensions and those of the example "
            f"inputs {_listed(wanted)}: give batches like these"
        )


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def call(module: nn.Module, batch: ExampleInputs, number: int) -> Output:
    """The module's output for a batch of inputs, its weights being as before afterwards: they may be another module's
    too. Raises CalibrationError, naming the batch, where that fails.
    """
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    args, kwargs = mapped(lambda t: t.to(device), fresh(split_inputs(batch)))
    try:
        with same_values(module):
            return module(*args, **kwargs)
    except Exception as error:  # the user's code, or torch's: whatever it raises
        raise CalibrationError(
            f"calibration batch {number} does not fit the model ({reason(error)[:200]}): give "
            "batches of the form of the example inputs"
        ) from error
