"""What all tests share."""

import functools
import gc
import os
from collections.abc import Iterator
from types import SimpleNamespace

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


@pytest.fixture(scope="session", autouse=True)
def _composite_ops_are_looked_up_when_there_are_new_ones() -> Iterator[None]:
    """At every decomposition torch looks up all of its composite ops, once for each of thirty namespaces, a seventh of
    the time of an export.
    """
    import torch
    from torch._export import utils

    look_up = utils._materialize_cpp_cia_ops

    @functools.cache
    def once(_count: int) -> None:
        look_up()

    def registered() -> int:
        return len(torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "_materialize_cpp_cia_ops", lambda: once(registered()))
        yield


@pytest.fixture(scope="session", autouse=True)
def _a_seed_for_devices_that_are_not_there_notes_no_stack() -> Iterator[None]:
    """For each kind of device torch.manual_seed keeps the stack, for an error to come: of tests, a deep one."""
    import torch

    with pytest.MonkeyPatch.context() as patch:
        for kind in (torch.cuda, torch.xpu, torch.mtia):
            patch.setattr(kind, "traceback", SimpleNamespace(format_stack=list))
        yield


@pytest.fixture(scope="session", autouse=True)
def _files_of_tests_need_not_outlive_a_loss_of_power() -> Iterator[None]:
    """A disk that is waited for is most of what a small run takes. Tests of what fsync does set one of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture
def gpus() -> int:
    """How many processes can have a GPU each, 2 or 4; a test that asks is skipped where there are fewer than two."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < 2:
        pytest.skip(f"NCCL needs a GPU for each of two processes, and this machine has {count}")
    return 4 if count >= 4 else 2
