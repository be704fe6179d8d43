"""Random models for the property tests: recipes, frozen values that print as the code that makes them again.

A block takes a tensor of any size and makes its layers fit, so that every list of blocks is a model, and a failing
one stays a model while hypothesis takes blocks away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from models import randomized
from torch import Tensor, nn
from torch.nn.utils import parametrizations

BATCH, WORDS, WIDEST = 3, 11, 12

Example = tuple[tuple[Any, ...], dict[str, Any]]


class Apply(nn.Module):
    """Parts and a function of them; traced through, as a module of the user's own is."""

    def __init__(self, function: Callable[[Any, Any], Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class Into(nn.Module):
    """A tensor into one of ``low`` to ``high`` dimensions, none but the batch wider than WIDEST."""

    def __init__(self, x: Tensor, low: int, high: int) -> None:
        super().__init__()
        self.register_buffer("pattern", torch.tensor([1.0, 0.6, -0.4, 0.2]), persistent=False)
        self.steps: list[tuple[Any, ...]] = [("flatten", -2)] * max(0, x.ndim - high)
        self.widen = max(0, low - x.ndim)
        self.narrow = [("narrow", axis, 0, WIDEST) for axis, size in enumerate(self(x).shape[1:], 1) if size > WIDEST]
        self.steps += self.narrow  # before the axes that are added, whose places do not move

    def forward(self, x: Tensor) -> Tensor:
        for name, *args in self.steps:
            x = getattr(x, name)(*args)
        for _ in range(self.widen):
            x = x.unsqueeze(-1) * self.pattern
        return x


@dataclass(frozen=True)
class Block:
    """What to build on a tensor of ``dims`` dimensions (least and most)."""

    @property
    def dims(self) -> tuple[int, int]:
        return 2, 5

    def build(self, x: Tensor) -> nn.Module:
        raise NotImplementedError


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / math.sqrt(max(shape)))


def joined(blocks: Sequence[Block], x: Tensor) -> tuple[list[nn.Module], Tensor]:
    """The modules of the blocks in a row, and what they make of ``x``."""
    modules: list[nn.Module] = []
    for block in blocks:
        into = Into(x, *block.dims)
        x = into(x)
        module = block.build(x).eval()
        x = module(x)
        modules.append(nn.Sequential(into, module) if into.steps or into.widen else module)
    return modules, x


def divisor(limit: int, *sizes: int) -> int:
    """The largest common divisor of the sizes that is no more than the limit."""
    return max(d for d in range(1, limit + 1) if all(size % d == 0 for size in sizes))


# Products with matrices


@dataclass(frozen=True)
class Linear(Block):
    out: int
    bias: bool = True
    inplace: bool = False

    def build(self, x: Tensor) -> nn.Module:
        linear = nn.Linear(x.shape[-1], self.out, bias=self.bias)
        return nn.Sequential(linear, nn.ReLU(inplace=True)) if self.inplace else linear


def rows(x: Any) -> Any:
    return x.reshape(-1, x.size(-1))


def like(y: Any, x: Any, last: tuple[int, ...]) -> Any:
    return y.view(x.size()[:-1] + last)


def gated(parts: Any) -> Any:
    a, b, c = parts
    return torch.tanh(a) * b + c


def sum_of(x: Any, parts: Any) -> Any:
    a, b = parts
    return F.linear(x, a) + torch.tanh(F.linear(x, b))


# How a raw parameter is applied, and its shape, of n inputs and m outputs.
CALLS: dict[str, tuple[str, Callable[[Any, Any], Any]]] = {
    "F.linear(x, w, b)": ("m n", lambda s, x: F.linear(x, s.w, s.b)),
    "F.linear by keyword": ("m n", lambda s, x: F.linear(bias=s.b, weight=s.w, input=x)),
    "F.linear(x, 0.5 * w)": ("m n", lambda s, x: F.linear(x, 0.5 * s.w)),
    "matmul": ("n m", lambda s, x: torch.matmul(x, s.w) + s.b),
    "x @ w": ("n m", lambda s, x: x @ s.w),
    "x @ w.t()": ("m n", lambda s, x: x @ s.w.t() + s.b),
    "x @ w.T": ("m n", lambda s, x: x @ s.w.T),
    "x @ w.transpose": ("m n", lambda s, x: x @ s.w.transpose(0, 1)),
    "mm": ("n m", lambda s, x: like(torch.mm(rows(x), s.w), x, (s.m,))),
    "addmm": ("n m", lambda s, x: like(torch.addmm(s.b, rows(x), s.w), x, (s.m,))),
    "einsum nm": ("n m", lambda s, x: torch.einsum("...n,nm->...m", x, s.w)),
    "einsum mn": ("m n", lambda s, x: torch.einsum("...n,mn->...m", x, s.w) + s.b),
    "tensordot": ("n m", lambda s, x: torch.tensordot(x, s.w, dims=([-1], [0]))),
    "packed output": ("3m n", lambda s, x: gated(F.linear(x, s.w).chunk(3, -1))),
    "chunked weight": ("2m n", lambda s, x: sum_of(x, s.w.chunk(2))),
    "split weight": ("2m n", lambda s, x: sum_of(x, torch.split(s.w, s.m))),
    "sliced weight": ("2m n", lambda s, x: sum_of(x, (s.w[: s.m], s.w[s.m :]))),
    "there and back": ("m n", lambda s, x: F.linear(torch.tanh(F.linear(x, s.w)), s.w.t())),
    "not at all": ("m n", lambda s, x: x * s.b.mean()),
    # On a matrix x
    "x.mm(w)": ("n m", lambda s, x: x.mm(s.w)),
    "w @ x.mT": ("m n", lambda s, x: (s.w @ x.mT).mT),
    "addmm scaled": ("n m", lambda s, x: torch.addmm(s.b, x, s.w, beta=0.5, alpha=2.0)),
    "einsum bn": ("m n", lambda s, x: torch.einsum("bn,mn->bm", x, s.w)),
    "einsum of experts": ("2 n m", lambda s, x: torch.einsum("bn,enm->bem", x, s.w)),
    "bmm": ("1 n m", lambda s, x: torch.bmm(x.unsqueeze(1), s.w.expand(x.shape[0], -1, -1))),
}
ON_MATRIX = tuple(CALLS)[tuple(CALLS).index("x.mm(w)") :]


@dataclass(frozen=True)
class Call(Block):
    """A raw parameter in one of CALLS. strided: it is stored in another order of its axes."""

    how: str
    m: int
    strided: bool = False

    @property
    def dims(self) -> tuple[int, int]:
        return (2, 2) if self.how in ON_MATRIX else (2, 5)

    def build(self, x: Tensor) -> nn.Module:
        shape, function = CALLS[self.how]
        sizes = {"n": x.shape[-1], "m": self.m, "2m": 2 * self.m, "3m": 3 * self.m, "1": 1, "2": 2}
        w = parameter(*(sizes[size] for size in shape.split()))
        if self.strided:
            w = nn.Parameter(w.detach().mT.contiguous().mT)
        return Apply(function, w=w, b=parameter(self.m), m=self.m)


def shared(function: Callable[[Any, Any], Any], *names: str) -> Callable[[int], nn.Module]:
    """Two linears of n to n that share what is named."""

    def build(n: int) -> nn.Module:
        a, b = nn.Linear(n, n), nn.Linear(n, n)
        for name in names:
            setattr(b, name, getattr(a, name))
        return Apply(function, a=a, b=b)

    return build


def one(function: Callable[[Any, Any], Any]) -> Callable[[int], nn.Module]:
    return lambda n: Apply(function, a=nn.Linear(n, n))


def under_two_names(n: int) -> nn.Module:
    linear = nn.Linear(n, n)
    return Apply(lambda s, x: s.b(torch.tanh(s.a(x))), a=linear, b=linear)


def shared_parameter(n: int) -> nn.Module:
    w = parameter(n, n)
    first = Apply(lambda s, x: F.linear(x, s.w), w=w)
    second = Apply(lambda s, x: F.linear(torch.tanh(x), s.other, s.b), other=w, b=parameter(n))
    return Apply(lambda s, x: s.b(s.a(x)), a=first, b=second)


# How a square linear is used more than once, or its weight by others too.
USES: dict[str, Callable[[int], nn.Module]] = {
    "called twice": one(lambda s, x: s.a(torch.tanh(s.a(x)))),
    "called by keyword": one(lambda s, x: s.a(input=x)),
    "module and call": one(lambda s, x: F.linear(torch.tanh(s.a(x)), s.a.weight, s.a.bias)),
    "weight alone": one(lambda s, x: F.linear(x, s.a.weight)),
    "transposed too": one(lambda s, x: F.linear(torch.tanh(s.a(x)), s.a.weight.t())),
    "dtype read": one(lambda s, x: s.a(x.to(s.a.weight.dtype))),
    "shape read": one(lambda s, x: s.a(x) / s.a.weight.shape[0]),
    "norm read": one(lambda s, x: s.a(x) / (1 + s.a.weight.norm())),
    "size known": one(lambda s, x: s.a(x) * s.a.in_features**-0.5),
    "detached": one(lambda s, x: s.a(x) + F.linear(x, s.a.weight.detach())),
    "bias read": one(lambda s, x: s.a(x) + s.a.bias.sum()),
    "one module, two names": under_two_names,
    "shared weight": shared(lambda s, x: s.b(torch.tanh(s.a(x))), "weight"),
    "shared weight and bias": shared(lambda s, x: s.b(torch.tanh(s.a(x))), "weight", "bias"),
    "shared bias": shared(lambda s, x: s.b(torch.tanh(s.a(x))), "bias"),
    "shared, one unused": shared(lambda s, x: s.b(x), "weight"),
    "shared raw parameter": shared_parameter,
}


@dataclass(frozen=True)
class Reused(Block):
    """A linear in one of USES."""

    how: str

    def build(self, x: Tensor) -> nn.Module:
        return USES[self.how](x.shape[-1])


@dataclass(frozen=True)
class Parametrized(Block):
    """A linear or convolution whose weight is computed."""

    out: int
    conv: bool
    spectral: bool

    @property
    def dims(self) -> tuple[int, int]:
        return (4, 4) if self.conv else (2, 5)

    def build(self, x: Tensor) -> nn.Module:
        layer = nn.Conv2d(x.shape[1], self.out, 3, padding=1) if self.conv else nn.Linear(x.shape[-1], self.out)
        return parametrizations.spectral_norm(layer) if self.spectral else parametrizations.weight_norm(layer)


# Convolutions

CONV, CONV_FUNCTION = (nn.Conv1d, nn.Conv2d, nn.Conv3d), (F.conv1d, F.conv2d, F.conv3d)
CONV_TRANSPOSE, CONV_TRANSPOSE_FUNCTION = (
    (nn.ConvTranspose1d, nn.ConvTranspose2d),
    (
        F.conv_transpose1d,
        F.conv_transpose2d,
    ),
)


@dataclass(frozen=True)
class Conv(Block):
    """kernel: clamped to what is there, and so differs by axis."""

    spatial: int
    out: int
    kernel: int
    stride: int = 1
    padding: int | str = 0
    mode: str = "zeros"
    dilation: int = 1
    groups: int = 1
    bias: bool = True
    functional: bool = False
    inplace: bool = False

    @property
    def dims(self) -> tuple[int, int]:
        return self.spatial + 2, self.spatial + 2

    def build(self, x: Tensor) -> nn.Module:
        channels, *sizes = x.shape[1:]
        groups = divisor(self.groups, channels)
        out = -(-self.out // groups) * groups
        padding: Any = self.padding
        if isinstance(padding, int) and self.mode != "zeros":
            padding = min(padding, *(size - 1 for size in sizes))  # they can only repeat what is there
        around = 0 if padding == "valid" else 2 * padding if isinstance(padding, int) else WIDEST
        kernel = [min(self.kernel, (size + around - 1) // self.dilation + 1) for size in sizes]
        mode = self.mode
        if padding == "same":
            mode = "zeros"
            kernel = [min(k, size) for k, size in zip(kernel, sizes, strict=True)]
        stride = 1 if padding == "same" else self.stride
        settings: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": self.dilation, "groups": groups}
        if self.functional:
            convolve = CONV_FUNCTION[self.spatial - 1]
            w, b = parameter(out, channels // groups, *kernel), parameter(out) if self.bias else None
            return Apply(lambda s, x: convolve(x, s.w, s.b, **settings), w=w, b=b)
        kind = CONV[self.spatial - 1]
        conv = kind(channels, out, tuple(kernel), bias=self.bias, padding_mode=mode, **settings)
        return nn.Sequential(conv, nn.ReLU(inplace=True)) if self.inplace else conv


@dataclass(frozen=True)
class ConvTranspose(Block):
    spatial: int
    out: int
    kernel: int
    stride: int = 1
    padding: int = 0
    extra: int = 0
    dilation: int = 1
    groups: int = 1
    bias: bool = True
    functional: bool = False

    @property
    def dims(self) -> tuple[int, int]:
        return self.spatial + 2, self.spatial + 2

    def build(self, x: Tensor) -> nn.Module:
        channels = x.shape[1]
        groups = divisor(self.groups, channels)
        out = -(-self.out // groups) * groups
        settings: dict[str, Any] = {
            "stride": self.stride,
            "padding": min(self.padding, self.dilation * (self.kernel - 1) // 2),
            "output_padding": min(self.extra, max(self.stride, self.dilation) - 1),
            "groups": groups,
            "dilation": self.dilation,
        }
        if self.functional:
            convolve = CONV_TRANSPOSE_FUNCTION[self.spatial - 1]
            w = parameter(channels, out // groups, *[self.kernel] * self.spatial)
            return Apply(lambda s, x: convolve(x, s.w, s.b, **settings), w=w, b=parameter(out) if self.bias else None)
        return CONV_TRANSPOSE[self.spatial - 1](channels, out, self.kernel, bias=self.bias, **settings)


@dataclass(frozen=True)
class SharedConvs(Block):
    """Two convolutions with one weight and strides of their own, or one convolution called twice."""

    stride: int
    twice: bool

    @property
    def dims(self) -> tuple[int, int]:
        return 4, 4

    def build(self, x: Tensor) -> nn.Module:
        channels = x.shape[1]
        a, b = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 3, self.stride, padding=1)
        if self.twice:
            return Apply(lambda s, x: s.a(torch.tanh(s.a(x))), a=a)
        b.weight = a.weight
        return Apply(lambda s, x: s.b(torch.tanh(s.a(x))), a=a, b=b)


# Sequences


def attend(s: Any, x: Any) -> Any:
    return s.a(x, x, x, attn_mask=s.mask)[0]


def encode(s: Any, x: Any) -> Any:
    return s.a(x, src_mask=s.mask)


@dataclass(frozen=True)
class Attention(Block):
    heads: int
    batch_first: bool
    mask: str = "none"
    bias: bool = True
    layer: bool = False
    norm_first: bool = False

    @property
    def dims(self) -> tuple[int, int]:
        return 3, 3

    def build(self, x: Tensor) -> nn.Module:
        length, width = x.shape[1:]
        heads = divisor(self.heads, width)
        first, masked = self.batch_first, torch.ones(length, length, dtype=torch.bool).triu(1)
        mask = {"none": None, "bool": masked, "float": masked.float() * -3.0}[self.mask]
        settings: dict[str, Any] = {"dropout": 0.2, "bias": self.bias, "batch_first": first}
        if self.layer:
            inner: nn.Module = nn.TransformerEncoderLayer(width, heads, 7, norm_first=self.norm_first, **settings)
        else:
            inner = nn.MultiheadAttention(width, heads, **settings)
        call = encode if self.layer else attend
        module = Apply(call if first else lambda s, x: call(s, x.transpose(0, 1)).transpose(0, 1), a=inner)
        module.register_buffer("mask", mask)
        return module


@dataclass(frozen=True)
class Recurrent(Block):
    lstm: bool
    hidden: int
    layers: int = 1
    bidirectional: bool = False
    batch_first: bool = True

    @property
    def dims(self) -> tuple[int, int]:
        return 3, 3

    def build(self, x: Tensor) -> nn.Module:
        kind = nn.LSTM if self.lstm else nn.GRU
        a = kind(x.shape[-1], self.hidden, self.layers, batch_first=self.batch_first, bidirectional=self.bidirectional)
        if self.batch_first:
            return Apply(lambda s, x: s.a(x)[0], a=a)
        return Apply(lambda s, x: s.a(x.transpose(0, 1))[0].transpose(0, 1), a=a)


# What is between them


PLAIN: dict[str, Callable[[Tensor], nn.Module]] = {
    "tanh": lambda x: nn.Tanh(),
    "gelu": lambda x: nn.GELU(),
    "silu": lambda x: Apply(lambda s, x: F.silu(x)),
    "softmax": lambda x: nn.Softmax(-1),
    "dropout": lambda x: nn.Dropout(0.4),
    "F.dropout": lambda x: Apply(lambda s, x: F.dropout(x, 0.3, s.training)),
    "layer norm": lambda x: nn.LayerNorm(x.shape[-1]),
    "batch norm": lambda x: (None, None, nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[x.ndim](
        x.shape[1]
    ),
    "swap axes": lambda x: Apply(lambda s, x: x.transpose(1, -1)),
    "flatten": lambda x: nn.Flatten(),
    "mean": lambda x: Apply(lambda s, x: x.mean(-1, keepdim=True)),
    "step": lambda x: Apply(lambda s, x: x[..., ::2]),
    "positions": lambda x: Apply(lambda s, x: x + s.p, p=parameter(*x.shape[1:])),
    "first positions": lambda x: Apply(lambda s, x: x + s.p[: x.shape[1]].mean(), p=parameter(WIDEST, 3)),
    "double": lambda x: Apply(lambda s, x: torch.cat([x, -x], -1)),
}


@dataclass(frozen=True)
class Plain(Block):
    """One of PLAIN."""

    how: str

    def build(self, x: Tensor) -> nn.Module:
        return PLAIN[self.how](x)


def count(s: Any, x: Any) -> Any:
    s.state.add_(1)
    return x * (1 + 0.01 * s.state)


def mean_while_training(s: Any, x: Any) -> Any:
    if s.training:
        s.state.mul_(0.9).add_(0.1 * x.detach().mean())
    return x - s.state


def assign(s: Any, x: Any) -> Any:
    s.state = s.state + 1
    return x * (1 + 0.01 * s.state)


STATES = {"count": count, "mean while training": mean_while_training, "assign": assign}


@dataclass(frozen=True)
class State(Block):
    """A buffer that forward changes, by one of STATES."""

    how: str
    persistent: bool

    def build(self, x: Tensor) -> nn.Module:
        module = Apply(STATES[self.how])
        module.register_buffer("state", torch.zeros(()), persistent=self.persistent)
        return module


# Structure


def per_row(y: Any, ndim: int) -> Any:
    """One number for every row of the batch, to go with a tensor of ``ndim`` dimensions."""
    return y.reshape(-1, *[1] * (ndim - 1))


CONTAINERS = ("sequential", "list", "dict", "names")


def in_a_row(modules: Sequence[nn.Module], container: str) -> nn.Module:
    """The modules one after the other, held in one of CONTAINERS."""

    def run(parts: Any, x: Any) -> Any:
        for part in parts:
            x = part(x)
        return x

    if container == "sequential":
        return nn.Sequential(*modules)
    if container == "list":
        return Apply(lambda s, x: run(s.parts, x), parts=nn.ModuleList(modules))
    named = {f"part{i}": module for i, module in enumerate(modules)}
    if container == "dict":
        return Apply(lambda s, x: run(s.parts.values(), x), parts=nn.ModuleDict(named))
    return Apply(lambda s, x: run((getattr(s, name) for name in named), x), **named)


def flat_mean(y: Any, ndim: int) -> Any:
    return per_row(y.flatten(1).mean(1), ndim)


@dataclass(frozen=True)
class Residual(Block):
    inner: tuple[Block, ...]
    container: str = "sequential"

    def build(self, x: Tensor) -> nn.Module:
        modules, y = joined(self.inner, x)
        same, ndim = y.shape == x.shape, x.ndim
        inner = in_a_row(modules, self.container)
        return Apply(lambda s, x: x + (s.inner(x) if same else flat_mean(s.inner(x), ndim)), inner=inner)


@dataclass(frozen=True)
class Repeated(Block):
    """Blocks applied over again, or, where they change the shape, held over again. names: under so many."""

    inner: tuple[Block, ...]
    names: int

    def build(self, x: Tensor) -> nn.Module:
        modules, y = joined(self.inner, x)
        again = y.shape == x.shape
        inner = nn.Sequential(*modules)
        if self.names == 1:
            return Apply(lambda s, x: s.a(torch.tanh(s.a(x))) if again else s.a(x), a=inner)
        return Apply(lambda s, x: s.b(torch.tanh(s.a(x))) if again else s.b(x), a=inner, b=inner)


@dataclass(frozen=True)
class Branch(Block):
    """Two ways side by side. join: what is made of them."""

    left: tuple[Block, ...]
    right: tuple[Block, ...]
    join: str

    def build(self, x: Tensor) -> nn.Module:
        (a, left), (b, right) = joined(self.left, x), joined(self.right, x)
        ndim, parts = left.ndim, {"a": nn.Sequential(*a), "b": nn.Sequential(*b)}
        if self.join == "product":
            same = left.shape == right.shape
            return Apply(lambda s, x: s.a(x) * (s.b(x) if same else flat_mean(s.b(x), ndim)), **parts)
        if self.join == "shape":  # a batch apart, sizes are known: only one way is ever taken
            return Apply(lambda s, x: s.a(x) if x.shape[1] > 5 else s.b(x), **parts)
        del right
        return Apply(lambda s, x: torch.cat([s.a(x).flatten(1), s.b(x).flatten(1)], 1), **parts)


# Whole models

STARTS: dict[str, tuple[int, ...]] = {
    "vector": (8,),
    "sequence": (5, 8),
    "image": (4, 6, 5),
    "volume": (3, 4, 3, 5),
    "tokens": (5,),
}
VALUES: dict[str, Callable[[Tensor], Any]] = {
    "usual": lambda w: None,
    "zero": lambda w: w.zero_(),
    "constant": lambda w: w.fill_(0.3),
    "tiny": lambda w: w.mul_(1e-25),
    "sparse": lambda w: w.mul_(torch.arange(w.numel()).reshape(w.shape) % 3 == 0),
}
OUTPUTS = ("tensor", "tuple", "dict", "nested")


class Model(nn.Module):
    def __init__(self, body: nn.Module, embed: nn.Module | None, head: nn.Module | None, ndim: int, form: str) -> None:
        super().__init__()
        self.embed, self.body, self.head, self.ndim, self.form = embed, body, head, ndim, form

    def forward(self, x: Tensor, scale: Tensor) -> Any:
        if self.embed is not None:
            x = self.embed(x)
        x = x * per_row(scale, self.ndim)
        y = self.body(x)
        if self.head is not None:
            y = self.head(y)
        if self.form == "tuple":
            return y, x.mean()
        if self.form == "dict":
            return {"y": y, "scale": scale}
        return {"all": [(y, x), None]} if self.form == "nested" else y


@dataclass(frozen=True)
class Recipe:
    """A whole model and its example inputs.

    frozen: every so many parameters do not train, none for 0. values: what is special in every third matrix. apart:
    dropout and batch norm are in evaluation mode while the model trains.
    """

    blocks: tuple[Block, ...]
    start: str = "vector"
    head: str = "none"
    container: str = "sequential"
    output: str = "tensor"
    inputs: str = "positional"
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    frozen: int = 0
    values: str = "usual"
    apart: bool = False
    seed: int = 0

    def build(self) -> nn.Module:
        """The model, in training mode; the same every time."""
        torch.manual_seed(self.seed)
        tokens = self.start == "tokens"
        with torch.no_grad():
            x = torch.randn(BATCH, *STARTS[self.start])
            embed = nn.Embedding(WORDS, 8) if tokens else None
            x = torch.randn(BATCH, 5, 8) if tokens else x
            modules, y = joined(self.blocks, x)
            head = None
            if self.head != "none":
                into = Into(y, 2, 5)
                y = into(y)
                tied = embed is not None and self.head == "tied"
                mix, last = nn.Linear(y.shape[-1], 8), nn.Linear(8, WORDS, bias=False)
                if tied:
                    last.weight = embed.weight  # type: ignore[union-attr]
                head = nn.Sequential(into, mix, last)
        model = Model(in_a_row(modules, self.container), embed, head, x.ndim, self.output)
        randomized(model, self.seed).to(self.dtype).train()
        if self.channels_last:
            for each in model.parameters():
                if each.ndim == 4:  # not model.to: it refuses a model that has a Conv3d too
                    each.data = each.data.contiguous(memory_format=torch.channels_last)
        # A computed weight is divided by a norm, which special values would make a division by zero.
        matrices = [p for name, p in model.named_parameters() if p.ndim >= 2 and ".parametrizations." not in name]
        with torch.no_grad():
            for each in matrices[::3]:
                VALUES[self.values](each)
        for module in model.modules():
            if self.apart and isinstance(module, nn.Dropout | nn.modules.batchnorm._BatchNorm):
                module.eval()
        for index, each in enumerate(model.parameters()):
            each.requires_grad_(not self.frozen or index % self.frozen != self.frozen - 1)
        return model

    def example(self, batch: int = BATCH, seed: int = 1) -> Example:
        """Inputs as ``(args, kwargs)``."""
        generator = torch.Generator().manual_seed(seed)
        shape = batch, *STARTS[self.start]
        x = torch.randn(shape, generator=generator).to(self.dtype)
        if self.start == "tokens":
            x = torch.randint(WORDS, shape, generator=generator)
        if self.channels_last and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        scale = (1 + torch.rand(batch, generator=generator)).to(self.dtype)
        if self.inputs == "keyword":
            return (), {"scale": scale, "x": x}
        return ((x,), {"scale": scale}) if self.inputs == "mixed" else ((x, scale), {})


def blocks(symbolic: bool) -> st.SearchStrategy[Block]:
    """One block. symbolic: only such as torch.fx can trace."""
    size, flag, few = st.integers(1, 10), st.booleans(), st.integers(1, 3)
    states = [how for how in STATES if not (symbolic and how == "assign")]
    joins = ["product", "cat"] if symbolic else ["product", "cat", "shape"]
    modes = st.sampled_from(["zeros", "circular", "reflect", "replicate"])
    conv = {"out": size, "kernel": st.integers(1, 4), "stride": few, "dilation": st.integers(1, 2), "groups": few}
    single: st.SearchStrategy[Block] = st.one_of(
        st.builds(Linear, size, flag, flag),
        st.builds(Call, st.sampled_from(list(CALLS)), size, flag),
        st.builds(Reused, st.sampled_from(list(USES))),
        st.builds(
            Conv,
            spatial=few,
            padding=st.sampled_from([0, 1, 2, "same", "valid"]),
            mode=modes,
            bias=flag,
            functional=flag,
            inplace=flag,
            **conv,
        ),
        st.builds(
            ConvTranspose,
            spatial=st.integers(1, 2),
            padding=st.integers(0, 1),
            extra=st.integers(0, 1),
            bias=flag,
            functional=flag,
            **conv,
        ),
        st.builds(SharedConvs, st.integers(1, 2), flag),
        st.builds(Attention, few, flag, st.sampled_from(["none", "bool", "float"]), flag, flag, flag),
        st.builds(Recurrent, flag, st.integers(1, 5), st.integers(1, 2), flag, flag),
        st.builds(Parametrized, size, flag, flag),
        st.builds(Plain, st.sampled_from(list(PLAIN))),
        st.builds(Plain, st.sampled_from(list(PLAIN))),
        st.builds(State, st.sampled_from(states), flag),
    )
    some = st.lists(single, min_size=1, max_size=2).map(tuple)
    return st.one_of(
        single,
        single,
        st.builds(Residual, some, st.sampled_from(CONTAINERS)),
        st.builds(Repeated, some, st.integers(1, 2)),
        st.builds(Branch, some, some, st.sampled_from(joins)),
    )


def models(*, symbolic: bool = True) -> st.SearchStrategy[Recipe]:
    """Recipes of whole models. symbolic: only such as torch.fx can trace."""
    return st.builds(
        Recipe,
        blocks=st.lists(blocks(symbolic), min_size=1, max_size=4).map(tuple),
        start=st.sampled_from(list(STARTS)),
        head=st.sampled_from(["none", "linear", "tied"]),
        container=st.sampled_from(CONTAINERS),
        output=st.sampled_from(OUTPUTS),
        inputs=st.sampled_from(["positional", "keyword", "mixed"]),
        dtype=st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16]),
        channels_last=st.booleans(),
        frozen=st.integers(0, 4),
        values=st.sampled_from(["usual", *VALUES]),
        apart=st.booleans(),
        seed=st.integers(0, 9),
    )
