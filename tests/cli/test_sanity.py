"""What is suspicious about a model and its data is said, and nothing of what is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dynrank_fx.cli.modelfile import load_model_file
from dynrank_fx.cli.sanity import suspicions

LEARNABLE = """
    def model():
        torch.manual_seed(int(os.environ.get("MODEL_SEED", 0)))
        return nn.Sequential(nn.Flatten(), nn.Linear(48, 8))
    def batch(seed):
        x = torch.randn(40, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
        return x, x.flatten(1)[:, :8].argmax(1)
    def train_data():
        return [batch(i) for i in range(3)]
    def eval_data():
        return [batch(9)]
"""


@pytest.fixture
def said(write: Callable[..., str]) -> Callable[..., list[str]]:
    """What is said of a model file with these lines, whose weights are right, or those of ``model()``."""

    def said(more: str = "", trained: bool = True) -> list[str]:
        path = Path(write(LEARNABLE + more))
        state = load_model_file(path).model().state_dict()
        if trained:
            state["1.weight"], state["1.bias"] = 5 * torch.eye(48)[:8], torch.zeros(8)
        torch.save(state, "w.pt")
        file = load_model_file(path, Path("w.pt"))
        return suspicions(file, file.model(), file.calibration_batches(4))

    return said


def test_nothing_is_said_of_a_trained_model_on_its_data(said: Callable[..., list[str]]) -> None:
    assert said() == []


def test_a_model_that_is_not_trained(said: Callable[..., list[str]]) -> None:
    loss, chance = said(trained=False)
    assert "is no lower than that of model() without them" in loss
    assert chance.startswith("the metric (0.")


def test_calibration_data_of_another_scale(said: Callable[..., list[str]]) -> None:
    more = """
    def calibration_data():
        return [255 * (batch(1)[0] + 1)]
    """
    (sentence,) = said(more)
    assert sentence.startswith("the calibration data are unlike eval_data(): input 0 has a mean of 25")
    assert sentence.endswith(": scale them alike")
    assert (
        said("""
    def calibration_data():
        return [batch(1)[0]]
    """)
        == []
    )
