"""Times of whole models: on the target that the sites are timed on, or a sentence why there are none."""

from __future__ import annotations

import pytest
import torch
from compressing import batches, perceptron
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.compression import SiteTimes
from dynrank_fx.compression import model_times as timing
from dynrank_fx.compression.model_times import ModelTimes


class Numbered(nn.Module):
    """Gives a plain number, which ONNX has not."""

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return x + 1, 3


def test_a_model_is_timed_in_turn_with_the_dense_one(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[bytes] = []
    bound = timing.bound
    monkeypatch.setattr(timing, "bound", lambda session, feeds: ran.append(b"") or bound(session, feeds))
    times = ModelTimes(perceptron(), batches()[0], SiteTimes(cache=None))
    assert times.dense is not None
    assert times.dense > 0
    assert times.why == ""
    pair = times.pair(perceptron()[:1])
    assert pair is not None
    assert pair.ratio > 0
    assert len(ran) == 2  # a session for each of the two


def test_what_does_not_become_a_file_is_not_timed_and_says_why() -> None:
    times = ModelTimes(Numbered(), (torch.randn(2, 3),), SiteTimes(cache=None))
    assert times.dense is None
    assert "returns a plain number as output_1" in times.why
    assert times.pair(Numbered()) is None


def test_the_type_is_that_of_the_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []
    opened = timing.session_of

    def watched(model: bytes, provider: object) -> object:
        seen.append(model)
        return opened(model, provider)

    monkeypatch.setattr(timing, "session_of", watched)
    ModelTimes(perceptron(), batches()[0], SiteTimes(element="float16", cache=None))
    ModelTimes(perceptron(), batches()[0], SiteTimes(cache=None))
    assert len(seen[0]) < 0.6 * len(seen[1])


def test_a_provider_that_does_not_come_up_is_an_error() -> None:
    with pytest.raises(dr.ExportError, match="this onnxruntime has no Toaster"):
        ModelTimes(perceptron(), batches()[0], SiteTimes("Toaster", cache=None))
