"""The samples are model files that a command can train: complete, reproducible, learning, and open to torch.fx."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, fx

from dynrank_fx.cli.modelfile import FUNCTIONS, ModelFile, load_model_file

SAMPLES = Path(__file__).parents[1] / "samples"


@pytest.fixture(scope="module", params=["digits", "chars"])
def sample(request: pytest.FixtureRequest) -> ModelFile:
    return load_model_file(SAMPLES / f"{request.param}.py")


def losses(sample: ModelFile, steps: int) -> list[float]:
    torch.manual_seed(0)
    model = sample.model()
    optimizer = sample.optimizer(model.parameters())
    values = []
    for _, batch in zip(range(steps), sample.train_data(), strict=False):
        args, kwargs = sample.inputs(batch)
        loss = sample.loss(model(*args, **kwargs), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return values


def test_every_function_that_training_takes_is_there(sample: ModelFile) -> None:
    sample.require(*(set(FUNCTIONS) - {"inputs", "calibration_data", "narrower"}))
    assert sample.epochs is not None


def test_a_few_steps_lower_the_loss_and_repeat_under_a_seed(sample: ModelFile) -> None:
    first = losses(sample, 8)
    assert first[-1] < 0.9 * first[0]
    assert losses(sample, 8) == first


def test_batches_share_one_shape_and_their_order_follows_the_global_generator(sample: ModelFile) -> None:
    train, test = sample.train_data(), sample.eval_data()
    assert test is not None
    for data in (train, test):
        assert len({tuple(part.shape for part in batch) for batch in data}) == 1
    torch.manual_seed(1)
    first, second = next(iter(train)), next(iter(train))
    torch.manual_seed(1)
    again = next(iter(train))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], second[0])


def test_evaluation_data_is_always_the_same(sample: ModelFile) -> None:
    def evaluation() -> Tensor:
        return torch.cat([batch[0] for batch in sample.eval_data() or ()])

    assert torch.equal(evaluation(), evaluation())


def test_loss_metric_and_example_fit_the_model(sample: ModelFile) -> None:
    model = sample.model().eval()
    batch = next(iter(sample.train_data()))
    (example,) = sample.example_inputs()
    assert (example.shape[1:], example.dtype) == (batch[0].shape[1:], batch[0].dtype)
    with torch.no_grad():
        output = model(batch[0])
        assert sample.loss(output, batch).ndim == 0
        assert sample.metric is not None
        assert 0 <= float(sample.metric(output, batch)) <= 1


def test_the_model_opens_to_symbolic_tracing(sample: ModelFile) -> None:
    model = sample.model().eval()
    batch = next(iter(sample.train_data()))
    with torch.no_grad():
        assert torch.equal(fx.symbolic_trace(model)(batch[0][:5]), model(batch[0][:5]))


def test_the_learning_rate_falls_over_the_epochs(sample: ModelFile) -> None:
    optimizer = sample.optimizer(sample.model().parameters())
    scheduler, every_step = sample.lr_scheduler(optimizer)
    assert not every_step
    assert scheduler is not None
    rates = []
    for _ in range(sample.epochs or 0):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.1 * rates[0]


def test_the_digits_are_split_once() -> None:
    sample = load_model_file(SAMPLES / "digits.py")
    train, test = (part.tensors[0] for part in sample.module._split())
    assert (len(train), len(test)) == (1437, 360)
    rows = torch.cat([train, test]).flatten(1)
    assert len(rows.unique(dim=0)) == len(rows)


def test_a_tone_repeats_after_one_period_of_its_pitch() -> None:
    """And its pitch is right within 50 cents, and no further."""
    pitch = load_model_file(SAMPLES / "pitch.py").module
    frames, cents = pitch.tones(64, seed=3)
    assert frames.shape == (64, 1024)
    periods = 16_000 / (10 * 2 ** (cents / 1200))
    alike = []
    for frame, period in zip(frames, periods.tolist(), strict=True):
        whole = [round(turns * period) for turns in (1, 2)]
        alike.append(max(float(torch.corrcoef(torch.stack([frame[n:], frame[:-n]]))[0, 1]) for n in whole))
    assert float(torch.tensor(alike).median()) > 0.6
    for off, score in ((0, 1.0), (40, 1.0), (60, 0.0), (-60, 0.0)):
        places = (cents + off - 1997.3794084376191) / 20
        output = torch.exp(-((torch.arange(360) - places[:, None]) ** 2) / 2)
        assert float(pitch.metric(output, (frames, cents))) == score
