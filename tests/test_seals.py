"""A file that is no longer as it was written is never taken without a word."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import dynrank_fx as dr
from dynrank_fx.onnx.session import session
from dynrank_fx.seals import check_seal, check_zip


def flipped(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "m.onnx"
    dr.export_onnx(nn.Linear(32, 32), torch.ones(2, 32), path, external_data=True)
    return path


def test_a_file_as_it_was_written_is_opened_without_a_word_behind_a_link_too(model: Path, tmp_path: Path) -> None:
    (tmp_path / "link.onnx").symlink_to(model)
    for path in (model, tmp_path / "link.onnx"):
        session(path, ("CPUExecutionProvider",))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.99])
def test_a_changed_graph_is_told(model: Path, share: float) -> None:
    flipped(model, int(share * model.stat().st_size))
    with pytest.warns(dr.DynrankWarning, match=re.escape(f"{model} is not as dynrank-fx wrote it: it is damaged, or")):
        check_seal(model)


def test_weights_beside_a_graph_that_are_not_its_own_are_told(model: Path) -> None:
    flipped(model.with_name("m.onnx.data"), 100)
    with pytest.raises(dr.ExportError, match=r"m\.onnx\.data is damaged, or of another export than .*: copy"):
        session(model, ("CPUExecutionProvider",))


def test_a_flipped_bit_of_a_pickled_module_is_told(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save(nn.Linear(32, 32), path)
    check_zip(path)
    weight = torch.load(path, weights_only=False).weight.detach().numpy().tobytes()
    at = path.read_bytes().find(weight)
    assert at > 0
    flipped(path, at)
    with pytest.raises(dr.StoreError, match=r"m\.pt is damaged"):
        check_zip(path)
