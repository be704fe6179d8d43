"""The calibrated cut against independent truth: the singular values of the outputs themselves, in float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.errors import CalibrationError, DynrankWarning
from dynrank_fx.plan import Fixed


def plain(net: nn.Module, **settings: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DynrankWarning)
        return dr.truncate(net, **settings)


class Twice(nn.Module):
    """One linear used on two inputs of different means, whose bias is shared by both uses."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(12, 20)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.f(x), self.f(2 * x.flip(-1) - 1)


class TwoBiases(nn.Module):
    """One weight in two modules, each with a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(12, 20), nn.Linear(12, 20)
        self.g.weight = self.f.weight

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.f(x), self.g(2 * x.flip(-1) - 1)


class Product(nn.Module):
    """x @ W, the weight's rows contracted, without a bias."""

    def __init__(self, m: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(12, m))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


class Parts(nn.Module):
    """Three parts of one weight, as attention takes them, on one input."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(36, 12)), nn.Parameter(torch.randn(36))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.w.chunk(3)
        a, b, c = self.b.chunk(3)
        return torch.cat([F.linear(x, q, a), F.linear(x, k, b), F.linear(x, v, c)], -1)


class Stack(nn.Module):
    """A matrix of a stack for every position of the first axis."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 12, 20))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bsgi,gio->bsgo", x.unflatten(-1, (3, -1)), self.w)


class Experts(nn.Module):
    """Every example takes the matrix that it asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 12, 20))

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        return x @ self.w[at]


class QKV(nn.Module):
    """Three linears of one input, which can share a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, 12, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)


@dataclass(frozen=True)
class Case:
    """outputs: of the model's output, the rows [N, m] of each matrix, with whether a bias can take up their mean."""

    model: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    outputs: Callable[[Any], list[tuple[Tensor, bool]]]
    settings: tuple[tuple[str, Any], ...] = ()


def vectors() -> tuple[Tensor, ...]:
    mixing = torch.diag(torch.linspace(0.1, 3, 12)) @ torch.randn(12, 12)
    return (torch.randn(40, 5, 12) @ mixing + torch.randn(12),)


def images() -> tuple[Tensor, ...]:
    return (F.avg_pool2d(torch.randn(6, 4, 18, 18), 3, 1) + torch.randn(4, 1, 1),)


def one(y: Tensor) -> list[tuple[Tensor, bool]]:
    return [(y.reshape(-1, y.shape[-1]), True)]


def raw(y: Tensor) -> list[tuple[Tensor, bool]]:
    return [(y.reshape(-1, y.shape[-1]), False)]


def pooled(ys: tuple[Tensor, Tensor]) -> list[tuple[Tensor, bool]]:
    return one(torch.cat(ys))


def each_centred(ys: tuple[Tensor, Tensor]) -> list[tuple[Tensor, bool]]:
    return [(torch.cat([(y - y.mean((0, 1))).reshape(-1, y.shape[-1]) for y in ys]), False)]


def tiles(y: Tensor) -> list[tuple[Tensor, bool]]:
    """Of a transposed convolution whose stride is its kernel of 2x2: what comes of every place of the input."""
    n, m, height, width = y.shape
    rows = y.reshape(n, m, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return [(rows.reshape(-1, 4 * m), False)]


def channels(groups: int) -> Callable[[Tensor], list[tuple[Tensor, bool]]]:
    return lambda y: [(part.movedim(1, -1).reshape(-1, part.shape[1]), True) for part in y.chunk(groups, 1)]


CASES = {
    "linear, few outputs": Case(lambda: nn.Linear(12, 8), vectors, one),
    "linear, many outputs": Case(lambda: nn.Linear(12, 30), vectors, one),
    "linear without a bias": Case(lambda: nn.Linear(12, 20, bias=False), vectors, one),
    "convolution": Case(lambda: nn.Conv2d(4, 10, 3, stride=2, padding=1), images, channels(1)),
    "convolution without a bias": Case(lambda: nn.Conv2d(4, 10, 3, bias=False), images, channels(1)),
    "groups": Case(lambda: nn.Conv2d(4, 16, 3, groups=2), images, channels(2)),
    "transposed, outputs": Case(
        lambda: nn.ConvTranspose2d(4, 10, 3), images, channels(1), (("conv_layout", dr.InputLayout),)
    ),
    "transposed, inputs": Case(lambda: nn.ConvTranspose2d(4, 10, 2, stride=2, bias=False), images, tiles),
    "used twice": Case(Twice, vectors, pooled),
    "two biases": Case(TwoBiases, vectors, each_centred),
    "product, few outputs": Case(lambda: Product(8), vectors, raw),
    "product, many outputs": Case(lambda: Product(30), vectors, raw),
    "parts": Case(Parts, vectors, lambda y: raw(y - torch.zeros(36))),
    "stack": Case(
        Stack,
        lambda: (torch.randn(7, 9, 36) @ torch.randn(36, 36),),
        lambda y: [(y[:, :, i].reshape(-1, 20), False) for i in range(3)],
    ),
    "shared factor": Case(QKV, vectors, raw, (("share_inputs", True),)),
    "shared factor, of layers": Case(QKV, vectors, raw, (("share_inputs", True), ("form", dr.Form.LAYERS))),
    "embedding": Case(
        lambda: nn.Embedding(50, 16), lambda: (torch.randint(0, 20, (30, 4)),), raw, (("allow_unprofitable", True),)
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_cut_is_the_best_of_its_rank(name: str) -> None:
    """The least error is the tail of the singular values of the outputs, by Eckart and Young."""
    torch.manual_seed(1)
    case = CASES[name]
    model, inputs, rank = (
        case.model().double(),
        tuple(t.double() if t.is_floating_point() else t for t in case.inputs()),
        3,
    )
    net = dr.transform(model, inputs, rank=Fixed(rank), **dict(case.settings))
    assert [row.rank for row in dr.plan_of(net).sites] == [rank] * len(dr.plan_of(net).sites)
    batches = [tuple(t[:3] for t in inputs), tuple(t[3:] for t in inputs)]
    found = dr.truncate(net, dr.calibrate(net, batches, shrink=0.0))
    with torch.no_grad():
        wanted, given, by_weight = model(*inputs), found(*inputs), plain(net)(*inputs)
    least = error = other = 0.0
    bias = torch.zeros(())
    for (y, centred), (z, _), (w, _) in zip(*map(case.outputs, (wanted, given, by_weight)), strict=True):
        own = getattr(model, "b", bias).detach()  # what no cut touches is no part of the outputs
        tail = torch.linalg.svdvals(y - y.mean(0) if centred else y - own)[rank:]
        least += float(tail.square().sum())
        error += float((y - z).square().sum()) if name != "two biases" else 0.0
        other += float((y - w).square().sum())
    if name == "two biases":
        error = sum(float((y - z).square().sum()) for y, z in zip(wanted, given, strict=True))
        other = sum(float((y - w).square().sum()) for y, w in zip(wanted, by_weight, strict=True))
    assert least > 1e-3 * float(sum(y.square().sum() for y, _ in case.outputs(wanted)))
    assert error == pytest.approx(least, rel=1e-6)
    assert error < other


@pytest.mark.parametrize("groups", [1, 2])
def test_the_inputs_of_a_convolution_are_cut_for_every_place_of_the_kernel(groups: int) -> None:
    """Σ ‖(M − M') x‖², over all x and the matrices M of the places of the kernel, is the tail of what they give."""
    torch.manual_seed(0)
    model, (x,) = nn.Conv2d(8, 6, 3, padding=1, groups=groups).double(), (torch.randn(20, 8, 5, 5).double(),)
    x = torch.einsum("nchw,cd->ndhw", x, torch.randn(8, 8).double()) + 1
    net = dr.transform(model, (x,), rank=Fixed(2), conv_layout=dr.InputLayout, allow_unprofitable=True)
    small = dr.truncate(net, dr.calibrate(net, [(x[:7],), (x[7:],)], shrink=0.0))
    first, last = (part for part in small.modules() if isinstance(part, nn.Conv2d))
    assert [layer.kernel_size for layer in (first, last)] == [(1, 1), (3, 3)]
    torch.testing.assert_close(last.bias, model.bias)
    found = torch.stack(
        [
            torch.einsum("mrhw,rn->mnhw", left, right[..., 0, 0])
            for left, right in zip(last.weight.chunk(groups), first.weight.chunk(groups), strict=True)
        ]
    ).flatten(0, 1)
    for W, other, part in zip(model.weight.chunk(groups), found.chunk(groups), x.chunk(groups, 1), strict=True):
        rows = part.movedim(1, -1).flatten(0, -2)
        given, changed = (torch.einsum("an,mnhw->amhw", rows, each).flatten(1).detach() for each in (W, W - other))
        assert float(changed.square().sum()) == pytest.approx(float(torch.linalg.svdvals(given)[2:].square().sum()))


def test_experts_are_told_apart() -> None:
    torch.manual_seed(0)
    model, x, at = Experts().double(), torch.randn(60, 5, 12).double(), torch.randint(0, 3, (60,))
    net = dr.transform(model, (x, at), rank=Fixed(3))
    with torch.no_grad():
        y, z = model(x, at), dr.truncate(net, dr.calibrate(net, [(x[:9], at[:9]), (x[9:], at[9:])], shrink=0.0))(x, at)
    for expert in range(3):
        wanted = y[at == expert].reshape(-1, 20)
        least = float(torch.linalg.svdvals(wanted)[3:].square().sum())
        assert float((wanted - z[at == expert].reshape(-1, 20)).square().sum()) == pytest.approx(least, rel=1e-6)


@pytest.mark.parametrize("shrink", [None, 0.0, 0.5])
def test_never_worse_than_plain_svd_on_the_calibration_data(shrink: float | None) -> None:
    for seed in range(8):
        torch.manual_seed(seed)
        model, x = nn.Linear(24, 16), torch.randn(6 + 10 * seed, 24)
        net = dr.transform(model, (x,), rank=Fixed(4))
        with torch.no_grad():
            y = model(x)
            found, other = (
                (small(x) - y).norm()
                for small in (dr.truncate(net, dr.calibrate(net, [(x,)], shrink=shrink)), plain(net))
            )
        assert found <= other


def test_what_too_few_data_leave_open_is_settled_by_the_weight() -> None:
    """Two examples span two directions of the outputs; the other two of the rank are the best of the weight beyond."""
    torch.manual_seed(0)
    model, x = nn.Linear(24, 16, bias=False).double(), torch.randn(2, 24).double()
    small = dr.truncate(dr.transform(model, (x,), rank=Fixed(6)), [(x,)])
    W, found = model.weight.detach(), small.weight if hasattr(small, "weight") else None
    with torch.no_grad():
        found = small(torch.eye(24).double()).T - small(torch.zeros(1, 24).double()).T
        Y = (x @ W.T - (x @ W.T).mean(0)).T
        held = torch.linalg.svd(Y, full_matrices=False).U[:, :1]  # about their mean two examples span one
        beyond = torch.linalg.svdvals(W - held @ held.T @ W)
    assert float((W - found).norm()) == pytest.approx(float(beyond[5:].norm()), rel=1e-2)


def test_modes_buffers_and_weights_are_as_before() -> None:
    model = nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Dropout())
    net = dr.transform(model, (torch.randn(4, 12),), rank=Fixed(2))
    net.get_submodule("1").eval()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    modes = {name: module.training for name, module in net.named_modules()}
    dr.calibrate(net, [(torch.randn(9, 12),)])
    assert {name: module.training for name, module in net.named_modules()} == modes
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert net(torch.zeros(50, 12)).eq(0).any()  # dropout is on again


def test_a_mistake_of_ours_is_not_blamed_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("dynrank_fx.compression.calibration.output_rows", broken)
    net = dr.transform(nn.Linear(12, 8), (torch.randn(2, 12),), rank=Fixed(2))
    with pytest.raises(ZeroDivisionError, match="ours"):
        dr.calibrate(net, [(torch.randn(2, 12),)])
    monkeypatch.undo()
    assert dr.calibrate(net, [(torch.randn(2, 12),)]).covariances["weight"].count == 2


def test_sites_that_read_one_input_hold_one_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """However the sites are spread over passes."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.o(torch.tanh(self.q(x) * self.k(x) + self.v(x)))

    net = dr.transform(Heads(), (torch.randn(2, 8),), rank=Fixed(2))
    x = torch.randn(40, 8)
    together = dr.calibrate(net, [(x[:20],), (x[20:],)]).covariances
    q, k, v, o = (together[f"{name}.weight"].matrix for name in "qkvo")
    assert q is k is v is not o
    torch.testing.assert_close(q[0], torch.cov(x.T, correction=0))
    monkeypatch.setattr("dynrank_fx.compression.calibration._BYTES", (1, 1))  # one site in a pass
    apart = dr.calibrate(net, [(x[:20],), (x[20:],)]).covariances
    assert all(torch.equal(apart[name].matrix, seen.matrix) for name, seen in together.items())
    assert apart["q.weight"].matrix is apart["k.weight"].matrix


def test_a_module_without_sites_is_no_net_to_calibrate() -> None:
    with pytest.raises(CalibrationError, match="Linear has no sites to calibrate"):
        dr.calibrate(nn.Linear(4, 4), [(torch.randn(2, 4),)])


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"shrink": "much"}, "shrink is 'much': give a number of 0 or more, or leave it out"),
        ({"shrink": -1.0}, r"shrink is -1\.0: give a number of 0 or more"),
        ({"sites": ["9.weight"]}, "the net has no site '9.weight': its sites are named like 0.weight"),
        ({"sites": "9.weight"}, "the net has no site '9.weight'"),
    ],
)
def test_what_cannot_be_asked_for(given: dict[str, Any], sentence: str) -> None:
    x = torch.randn(8, 16)
    net = dr.transform(nn.Sequential(nn.Linear(16, 16)), (x,), rank=Fixed(2))
    with pytest.raises(CalibrationError, match=sentence):
        dr.calibrate(net, [(x,)], **given)


def test_each_batch_finds_the_model_as_it_is() -> None:
    """The inputs of a site behind a counter are those of the first call, whatever batches came before."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 16)
            self.register_buffer("position", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.position.add_(1.0)
            return self.last(self.first(x) * self.position)

    torch.manual_seed(0)
    x = torch.randn(64, 16)
    net = dr.transform(Counting(), (x,), rank=Fixed(4)).eval()
    once, thrice = dr.calibrate(net, [(x,)]), dr.calibrate(net, [(x,)] * 3)
    for site in ("first.weight", "last.weight"):
        weight = net.get_submodule(site.removesuffix(".weight")).weight
        torch.testing.assert_close(thrice.spectrum(site, weight), once.spectrum(site, weight))
    assert float(net.position) == 0
