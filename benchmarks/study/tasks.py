"""What the study trains: two networks on scikit-learn's digits, a character transformer of two sizes on Python code,
and ResNet-20 and a wide network on scenes of several digits, in the setting of arXiv 2508.08625.

The learning rate of each task is the best of a row of doublings for dense training on seed 0, on scenes that of the
paper, and serves every method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR

import dynrank_fx as dr
from benchmarks.measuring import chars, digits, gpt, task_of
from benchmarks.study import scenes
from dynrank_fx.plan import RankPolicy
from dynrank_fx.training import Task


@dataclass(frozen=True)
class StudyTask:
    """epochs: of dense training. leave, exclude: what stays dense. device: where to train. amp: whether in bfloat16, as
    on a GPU. width: of the model; ``model`` makes it of any other too, in multiples of ``heads``, where there is one.
    """

    name: str
    epochs: int
    model: Callable[..., nn.Module]
    data: Callable[[], Task]
    optimizer: Callable[[Any], Optimizer]
    lr_scheduler: Callable[[Optimizer, int], Any]
    leave: Sequence[dr.Role] = tuple(dr.Role)
    exclude: Sequence[str] = ()
    device: str = "cpu"
    in_bfloat16: bool = False
    width: int | None = None
    heads: int = 1

    def transformed(self, rank: RankPolicy, width: int | None = None) -> nn.Module:
        """width: in place of the task's own."""
        example = next(iter(self.data().train_data))[0][:2].cpu()  # its checks run on the CPU
        model = self.model() if width is None else self.model(width)
        return dr.transform(model, (example,), rank=rank, leave=self.leave, exclude=self.exclude).to(self.device)

    def narrower(self, rank: RankPolicy, flops: float) -> tuple[int, float]:
        """The width of the dense model whose FLOPs are nearest to this share of those of the task's own; its share."""
        assert self.width is not None, f"{self.name} has one width"
        whole = dr.plan_of(self.transformed(rank)).total_flops or 1

        def share(width: int) -> float:
            return (dr.plan_of(self.transformed(rank, width)).total_flops or 1) / whole

        shares = {width: share(width) for width in range(max(2, self.heads), self.width + 1, self.heads)}
        return min(shares.items(), key=lambda each: abs(each[1] - flops))

    @property
    def amp(self) -> bool:
        return self.in_bfloat16 or self.device == "cuda"


class DigitTransformer(nn.Module):
    """Images [batch, 1, 8, 8] as 16 patches of 2 × 2 pixels to class scores [batch, 10]."""

    def __init__(self, width: int = 64, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.positions = nn.Parameter(0.02 * torch.randn(16, width))
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).mT + self.positions
        return self.head(self.norm(self.layers(x)).mean(1))


class Layer(chars.Layer):
    """The layer of the character transformer, where every patch sees every other."""

    def forward(self, x: Tensor) -> Tensor:
        y, part = self.norm1(x), self.attention
        q, k, v = (f(y).unflatten(-1, (part.heads, -1)).transpose(1, 2) for f in (part.query, part.key, part.value))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + part.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def _steps(optimizer: Optimizer, epochs: int) -> MultiStepLR:
    return MultiStepLR(optimizer, [round(epochs * 2 / 3), round(epochs * 5 / 6)], 0.1)


def _as_in_the_paper(optimizer: Optimizer, epochs: int) -> MultiStepLR:
    """A tenth of the rate at 100 and at 130 of 150 epochs."""
    return MultiStepLR(optimizer, [round(epochs * 100 / 150), round(epochs * 130 / 150)], 0.1)


def _adamw(lr: float, parameters: Any) -> AdamW:
    return AdamW(parameters, lr=lr, weight_decay=0.05)


def _fused(lr: float, parameters: Any) -> AdamW:
    return AdamW(parameters, lr=lr, weight_decay=0.05, betas=(0.9, 0.95), fused=True)


def _sgd(lr: float, parameters: Any) -> SGD:
    return SGD(parameters, lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)


def _chars(width: int, lr: float) -> StudyTask:
    def model(width: int = width) -> nn.Module:
        return chars.CharTransformer(width, 4, 2)

    data, optimizer = partial(task_of, chars), partial(_adamw, lr)
    return StudyTask(f"chars-{width}", 12, model, data, optimizer, CosineAnnealingLR, width=width, heads=4)


TASKS = {
    task.name: task
    for task in (
        StudyTask("digits-conv", 12, digits.DigitNet, partial(task_of, digits), partial(_sgd, 0.05), _steps, width=64),
        StudyTask(
            "digits-vit",
            24,
            DigitTransformer,
            partial(task_of, digits),
            partial(_adamw, 2e-3),
            CosineAnnealingLR,
            width=64,
            heads=4,
        ),
        _chars(64, 8e-3),
        _chars(128, 4e-3),
        StudyTask(
            "scenes-resnet20",
            20,
            scenes.Reader,
            partial(task_of, scenes),
            partial(SGD, lr=0.1, momentum=0.9, weight_decay=1e-4),
            _as_in_the_paper,
            leave=(dr.Role.SHORTCUT, dr.Role.HEAD),
            in_bfloat16=True,
            width=16,
        ),
        StudyTask(
            "scenes-wrn",
            20,
            scenes.WideReader,
            partial(task_of, scenes),
            partial(_sgd, 0.1),
            _as_in_the_paper,
            leave=(dr.Role.SHORTCUT, dr.Role.HEAD),
            exclude=("blocks.0.conv1",),  # as in the paper
            in_bfloat16=True,
            width=32,
        ),
        # Its rate is not tuned: one in common use at this size.
        StudyTask("gpt", 12, gpt.GPT, partial(task_of, gpt), partial(_fused, 6e-4), CosineAnnealingLR, device="cuda"),
    )
}
