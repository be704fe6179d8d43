"""What all tests share."""

import __future__

import functools
import gc
import inspect
import os
import textwrap
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

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
def _what_is_looked_up_for_an_export_is_looked_up_when_there_are_new_ops() -> Iterator[None]:
    """At every decomposition torch looks up all of its composite ops, once for each of thirty namespaces, and makes its
    table of decompositions anew.
    """
    import torch
    from torch._export import utils
    from torch.export import decomp_utils, exported_program
    from torch.onnx._internal.exporter import _decomp

    collect, make = utils._collect_all_valid_cia_ops, _decomp.create_onnx_friendly_decomposition_table
    collected = functools.cache(lambda _count: collect())
    made = functools.cache(lambda ops, _count: make(set(ops)))

    def registered() -> int:
        return len(torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd"))

    with pytest.MonkeyPatch.context() as patch:
        for module in (utils, decomp_utils, exported_program):
            patch.setattr(module, collect.__name__, lambda: collected(registered()))
        patch.setattr(_decomp, make.__name__, lambda ops: made(frozenset(ops), registered()))
        yield


@pytest.fixture(scope="session", autouse=True)
def _what_only_annotations_say_is_not_made_for_every_op() -> Iterator[None]:
    """At every export torch calls this ten thousand times, and each makes two generic types for its annotations."""
    from torch import _ops

    source, made = textwrap.dedent(inspect.getsource(_ops.OperatorBase.py_impl)), dict[str, Any]()
    exec(compile(source, _ops.__file__, "exec", __future__.annotations.compiler_flag), vars(_ops), made)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_ops.OperatorBase, "py_impl", made["py_impl"])
        yield


@pytest.fixture(scope="session", autouse=True)
def _a_seed_for_devices_that_are_not_there_notes_no_stack() -> Iterator[None]:
    """For each kind of device torch.manual_seed keeps the stack, for an error to come: of tests, a deep one."""
    import torch

    with pytest.MonkeyPatch.context() as patch:
        for kind in (torch.cuda, torch.xpu, torch.mtia):
            patch.setattr(kind, "traceback", SimpleNamespace(format_stack=list), raising=False)
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
