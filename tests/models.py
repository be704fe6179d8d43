"""Small models and the cases of the contract tests: one per kind of op, each with what makes it hard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class OneLayer(nn.Module):
    """A layer between others, so that its weights get gradients that differ by entry."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(torch.sin(x)))


class Functional(nn.Module):
    """F.linear and F.conv2d on parameters of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(12, 8, 3, 3) * 0.2)
        self.w = nn.Parameter(torch.randn(10, 12) * 0.3)
        self.b = nn.Parameter(torch.randn(10) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.kernel, stride=2, padding=1)
        return F.linear(torch.tanh(x).mean((2, 3)), self.w, self.b)


class CalledTwice(nn.Module):
    """One linear applied several times."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


class SharedLinears(nn.Module):
    """Two linears with one weight and biases of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(10, 10), nn.Linear(10, 10)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Tied(nn.Module):
    """An embedding whose weight is also the output head's, and a linear between them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(20, 12), nn.Linear(12, 12), nn.Linear(12, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(tokens))))


def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * 0.3)


class Products(nn.Module):
    """Every way to multiply by a matrix of the model's own, in either order, transposed or in part."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.added, self.turned, self.before = matrix(8, 6), matrix(6, 8), matrix(6, 8), matrix(5, 4)
        self.packed, self.stack, self.bias = matrix(18, 6), matrix(3, 6, 4), matrix(8)
        self.heads, self.merge = matrix(6, 2, 4), matrix(2, 4, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x @ self.plain)
        x = torch.addmm(self.bias, x.flatten(0, 1), self.added, alpha=0.5).view(x.shape[0], 4, 8)
        x = torch.tanh(x @ self.turned.t())
        q, k, v = self.projections(x)
        x = x + torch.softmax(q @ k.mT, -1) @ v + F.linear(x, self.packed[4:10])
        x = torch.tanh(torch.einsum("bln,nhk->bhlk", x, self.heads))
        x = torch.tanh(torch.einsum("hkn,bhlk->bln", self.merge, x))
        y = torch.matmul(self.before, torch.bmm(x.transpose(0, 1)[:3].tanh(), self.stack).mT)
        return torch.cat([x.flatten(1).mean(1), y.flatten(), (x @ self.stack[1]).flatten()])

    def projections(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.packed.split(6)
        return F.linear(x, q), F.linear(x, k), F.linear(x, v)


class Experts(nn.Module):
    """Stacks of matrices: one gathered for each row, one whose first axis an einsum shares, and an einsum with dots."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.heads, self.last = matrix(3, 8, 9), matrix(2, 4, 5), matrix(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.experts[(x[:, 0] > 0).long()]
        x = torch.tanh(torch.bmm(chosen, x.unsqueeze(-1)).squeeze(-1))
        x = torch.tanh(torch.einsum("bhd,hde->bhe", x.unflatten(1, (2, 4)), self.heads))
        return torch.einsum("...e,oe->...o", x, self.last)


class Attention(nn.Module):
    """A layer that symbolic tracing leaves closed."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.block(x, x, x, need_weights=False)[0]))


class Conv1D(nn.Module):
    """A weight [inputs, outputs], as GPT-2 has it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(7, 9) * 0.3), nn.Parameter(torch.randn(9))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(x.size(0), x.size(1), 9)


class Reads(nn.Module):
    """Code that looks at the weights of its layers: their dtype and shape, and their values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(10, 12), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x.to(self.a.weight.dtype)))
        return self.b(x) / self.b.weight.shape[1] + self.b.weight.norm()


class ReadKernel(nn.Module):
    """A convolution whose kernel the code looks at besides."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.conv(x)) / self.conv.weight.square().sum().sqrt()


class Modal(nn.Module):
    """Dropout and batch norm: training and evaluation differ, and buffers change in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.drop, self.head = nn.Dropout(0.4), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(F.relu(self.norm(self.conv(x))).mean((2, 3))))


@dataclass(frozen=True)
class Case:
    """A model, its example inputs, and the sites that must be found in it.

    conv: whether its sites are convolutions. plain: over how many axes, where they are neither in groups nor
    transposed. free: the axes of the input that may have other sizes than in the example. bare: the model's own code
    reads its weights, so that module by module it can be captured only as a part of another. kind: what it is about,
    the same for cases that differ in how they use it.
    """

    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    sites: tuple[str, ...] = ("layer.weight",)
    conv: bool = False
    plain: int = 0
    free: tuple[int, ...] = (0,)
    bare: bool = False
    kind: str = "Linear"

    def other_inputs(self) -> Tensor:
        """Inputs of other sizes than the example's, on every axis that is free."""
        like = self.inputs()
        shape = [size + 2 if axis in self.free else size for axis, size in enumerate(like.shape)]
        return torch.randn(shape) if like.is_floating_point() else torch.randint(int(like.max()) + 1, shape)


def _layer(name: str, make: Callable[[], nn.Module], *shape: int) -> Case:
    layer, axes = make(), range(len(shape))
    conv = isinstance(layer, nn.modules.conv._ConvNd)
    plain = len(layer.kernel_size) if conv and not layer.transposed and layer.groups == 1 else 0
    free = tuple(i for i in axes if i != (1 if conv else axes[-1]))
    kind = type(layer).__name__ + " in groups" * (conv and layer.groups > 1)
    return Case(name, lambda: OneLayer(make()), lambda: torch.randn(*shape), Case.sites, conv, plain, free, kind=kind)


CASES: tuple[Case, ...] = (
    _layer("linear", lambda: nn.Linear(12, 9), 5, 12),
    _layer("linear without bias on three dimensions", lambda: nn.Linear(9, 14, bias=False), 3, 4, 9),
    _layer("conv1d", lambda: nn.Conv1d(6, 8, 3, padding=1), 2, 6, 11),
    _layer("conv1d dilated grouped", lambda: nn.Conv1d(8, 12, 3, dilation=2, groups=2, bias=False), 2, 8, 13),
    _layer("conv2d", lambda: nn.Conv2d(6, 10, 3), 2, 6, 9, 8),
    _layer("conv2d strided padded", lambda: nn.Conv2d(6, 10, (3, 5), stride=(2, 1), padding=(1, 2)), 2, 6, 9, 8),
    _layer("conv2d same dilated", lambda: nn.Conv2d(6, 10, 3, padding="same", dilation=2), 2, 6, 9, 8),
    _layer("conv2d even same", lambda: nn.Conv2d(6, 10, (4, 2), padding="same"), 2, 6, 9, 8),
    _layer("conv2d grouped", lambda: nn.Conv2d(8, 12, 3, padding=1, groups=4, stride=2), 2, 8, 9, 8),
    _layer("conv2d circular", lambda: nn.Conv2d(6, 10, (3, 5), padding=(1, 2), padding_mode="circular"), 2, 6, 9, 8),
    _layer("conv2d reflect", lambda: nn.Conv2d(6, 10, 3, padding=2, padding_mode="reflect", stride=2), 2, 6, 9, 8),
    _layer(
        "conv2d replicate grouped",
        lambda: nn.Conv2d(6, 10, 3, padding=1, padding_mode="replicate", groups=2),
        2,
        6,
        9,
        8,
    ),
    _layer("conv2d 1x1", lambda: nn.Conv2d(6, 10, 1), 2, 6, 5, 4),
    _layer("conv transposed 1d", lambda: nn.ConvTranspose1d(6, 8, 3, stride=2, padding=1), 2, 6, 7),
    _layer(
        "conv transposed",
        lambda: nn.ConvTranspose2d(6, 8, (3, 4), stride=(2, 1), output_padding=(1, 0), dilation=(1, 2)),
        2,
        6,
        5,
        4,
    ),
    _layer("conv transposed grouped", lambda: nn.ConvTranspose2d(6, 8, 3, padding=1, groups=2, bias=False), 2, 6, 5, 4),
    _layer("conv transposed 3d", lambda: nn.ConvTranspose3d(4, 6, (3, 2, 3), stride=(1, 2, 2)), 2, 4, 3, 4, 2),
    _layer("conv3d", lambda: nn.Conv3d(4, 6, (3, 2, 3), padding=(1, 0, 1)), 2, 4, 5, 6, 7),
    _layer("conv3d grouped strided", lambda: nn.Conv3d(4, 8, 3, stride=(1, 2, 2), groups=2, bias=False), 2, 4, 5, 6, 7),
    Case(
        "functional",
        Functional,
        lambda: torch.randn(2, 8, 9, 8),
        ("kernel", "w"),
        conv=True,
        plain=2,
        free=(0, 2, 3),
        bare=True,
        kind="Conv2d",
    ),
    Case("called three times", CalledTwice, lambda: torch.randn(5, 10), ("inner.weight",)),
    Case("shared linears", SharedLinears, lambda: torch.randn(5, 10), ("first.weight",)),
    Case(
        "tied embedding",
        Tied,
        lambda: torch.randint(20, (3, 7)),
        ("embed.weight", "mix.weight"),
        free=(0, 1),
        kind="Embedding",
    ),
    Case(
        "embedding with padding",
        lambda: nn.Sequential(nn.Embedding(20, 12, padding_idx=3), nn.Tanh()),
        lambda: torch.randint(20, (3, 7)),
        ("0.weight",),
        free=(0, 1),
        kind="Embedding",
    ),
    Case(
        "products",
        Products,
        lambda: torch.randn(4, 4, 8),
        ("plain", "added", "turned", "before", "packed", "stack", "heads", "merge"),
        bare=True,
        kind="products",
    ),
    Case("experts", Experts, lambda: torch.randn(5, 9), ("experts", "heads", "last"), bare=True, kind="experts"),
    Case("weight of inputs by outputs", lambda: OneLayer(Conv1D()), lambda: torch.randn(3, 4, 7), free=(0, 1)),
    Case("weights that are read", Reads, lambda: torch.randn(5, 10), ("a.weight", "b.weight"), bare=True),
    Case(
        "kernel that is read",
        ReadKernel,
        lambda: torch.randn(2, 6, 7, 6),
        ("conv.weight",),
        conv=True,
        plain=2,
        free=(0, 2, 3),
        bare=True,
        kind="Conv2d",
    ),
    Case(
        "dropout and batch norm",
        Modal,
        lambda: torch.randn(4, 4, 6, 6),
        ("conv.weight", "head.weight"),
        conv=True,
        plain=2,
        free=(0, 2, 3),
        kind="Conv2d",
    ),
)

ATTENTION = Case(
    "attention",
    Attention,
    lambda: torch.randn(3, 4, 8),
    ("block.in_proj_weight", "block.out_proj.weight", "head.weight"),
    free=(0, 1),
    kind="attention",
)


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and floating buffer away from its initial value, so that parity means something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=generator).to(tensor.device, tensor.dtype) * 0.1)
    return model


def gradients(model: nn.Module, *args: Any) -> dict[str, Tensor]:
    """The gradients of the mean square of the output, by parameter name, aliases included."""
    model.zero_grad()
    model(*args).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}
