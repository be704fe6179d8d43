"""What one sees of a training run: a bar on a terminal, and lines that stay everywhere."""

from __future__ import annotations

import io
import re

import torch
from torch import Tensor, nn
from torch.optim import SGD

import dynrank_fx as dr
from dynrank_fx.training import Bar, Run, Settings, Task, fit


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(file: io.StringIO, *, evaluate: bool = True, metric: bool = True) -> str:
    """All that a run of two epochs of eleven steps writes."""
    torch.manual_seed(0)
    net = dr.transform(nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12)), (torch.zeros(2, 12),))
    batch = torch.randn(4, 12)

    def accuracy(output: Tensor, batch: Tensor) -> float:
        return 0.25

    task = Task(
        [batch] * 11,
        loss=lambda output, batch: output.square().mean(),
        inputs=lambda batch: ((batch,), {}),
        eval_data=[batch] if evaluate else None,
        metric=accuracy if metric else None,
    )
    bar = Bar(2, 11, "accuracy", file)
    run = Run(net, SGD(net.parameters(), lr=0.125), dr.schedules.interleave(low=1, full=1))
    assert fit(run, task, Settings(epochs=2, compile=False), watcher=bar)
    assert bar.bar is None
    return file.getvalue()


def test_a_bar_names_epoch_phase_loss_accuracy_and_learning_rate() -> None:
    text = shown(Terminal())
    for phase, epoch in (("LOW", 1), ("FULL", 2)):
        bars = [part for part in text.split("\r") if part.startswith(f"epoch {epoch}/2 {phase}:")]
        assert any("loss=" in part and "accuracy=25.00%" in part and "lr=0.125" in part for part in bars)
        assert any("11/11" in part for part in bars)


def test_lines_stay_where_there_is_no_terminal() -> None:
    lines = shown(io.StringIO()).splitlines()
    assert lines[0].startswith("2 sites enter LOW: truncation moves the weights by up to ")
    assert lines[1].startswith("epoch 1/2  LOW   loss ")
    assert lines[2] == "2 sites enter FULL: weights unchanged"
    assert lines[3].startswith("epoch 2/2  FULL  loss ")
    assert "accuracy 25.00%  held out 25.00%  effective rank " in lines[3]
    assert "  lr 0.125  " in lines[3]
    assert lines[4].startswith("truncated as it is now, the model has a loss of ")
    assert re.search(r", held out \d+\.\d\d%$", lines[4])
    assert len(lines) == 5


def test_what_is_not_measured_is_not_shown() -> None:
    line = shown(io.StringIO(), evaluate=False).splitlines()[-1]
    assert "accuracy 25.00%" in line
    assert "held" not in line
    *_, line, cut = shown(io.StringIO(), metric=False).splitlines()
    assert "held-out loss " in line
    assert "accuracy" not in line
    assert "held out" not in cut
