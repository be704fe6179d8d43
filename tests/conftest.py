"""What all tests share."""

import functools
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _translations_of_torch_onnx_are_read_once() -> Iterator[None]:
    """torch.onnx parses the source of its 500 translations anew at every export, more than half the time of exporting
    a small model. Nobody here adds any, so one reading serves all exports of a run.
    """
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield
