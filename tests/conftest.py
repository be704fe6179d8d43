"""What all tests share."""

import functools
import gc
from collections.abc import Iterator

import pytest


def pytest_collection_finish() -> None:
    """What torch and the tests have imported stays for good: the garbage collector need not go through it at every
    round, which takes a fifteenth of the time of the tests.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture(scope="session", autouse=True)
def _translations_of_torch_onnx_are_read_once() -> Iterator[None]:
    """torch.onnx parses the source of its 500 translations anew at every export, more than half the time of exporting
    a small model. Nobody here adds any, so one reading serves all exports of a run.
    """
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield
