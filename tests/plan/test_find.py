"""Finding sites: the same ones under both captures, and for everything else the reason as a sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import CASES, randomized
from planning import reasons
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils import _pytree as pytree

import dynrank_fx as dr
from dynrank_fx.ops import ConvOp, LinearOp
from dynrank_fx.plan import find_sites, fit_plan
from dynrank_fx.rewrite import Switched, switched_modules

CAPTURES = (dr.Capture.SYMBOLIC, dr.Capture.EXPORT)
both_captures = pytest.mark.parametrize("how", CAPTURES, ids=lambda how: how.name)


def made(forward: Callable[..., Any], **parts: Any) -> nn.Module:
    """A model with these modules and parameters, and this forward."""

    class Made(nn.Module):
        pass

    Made.forward = forward
    model = Made()
    for name, part in parts.items():
        setattr(model, name, part)
    return randomized(model)


def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * 0.3)


def linear() -> nn.Linear:
    return nn.Linear(8, 8)


def conv(**settings: Any) -> nn.Conv2d:
    return nn.Conv2d(8, 8, 3, padding=1, **settings)


def sharing(first: nn.Module, second: nn.Module) -> dict[str, nn.Module]:
    second.weight = first.weight
    return {"a": first, "b": second}


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    """A subclass that changes nothing."""


class Gated(nn.Module):
    """A weight and a bias beside another parameter, applied by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias, self.gate = matrix(8, 8), matrix(8), matrix(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) * self.gate


X, IMAGE, SEQUENCE, TOKENS = (2, 8), (2, 8, 6, 7), (2, 5, 8), (2, 5)

FOUND = {
    "two linears in a row": (made(lambda s, x: s.b(s.a(x)), a=linear(), b=linear()), X, {"a.weight": 1, "b.weight": 1}),
    "a subclass that changes nothing": (made(lambda s, x: s.a(x), a=Renamed(8, 8)), X, {"a.weight": 1}),
    "a subclass with a forward of its own": (made(lambda s, x: s.a(x), a=Scaled(8, 8)), X, {"a.weight": 1}),
    "keyword arguments": (made(lambda s, x: s.a(input=x), a=linear()), X, {"a.weight": 1}),
    "functional keyword arguments": (
        made(lambda s, x: F.linear(bias=s.b, weight=s.w, input=x), w=matrix(6, 8), b=matrix(6)),
        X,
        {"w": 1},
    ),
    "a weight and bias of the model itself": (
        made(lambda s, x: F.linear(x, s.weight, s.bias), weight=matrix(6, 8), bias=matrix(6)),
        X,
        {"weight": 1},
    ),
    "a block with more in it": (made(lambda s, x: s.block(x), block=Gated()), X, {"block.weight": 1}),
    "a bias that is the output of another site": (
        made(lambda s, x: F.linear(x, s.w, s.a(x).mean(0)), a=linear(), w=matrix(8, 8)),
        X,
        {"w": 1, "a.weight": 1},
    ),
    "a list of parameters": (
        made(lambda s, x: F.linear(F.linear(x, s.w[0]), s.w[1]), w=nn.ParameterList([matrix(8, 8), matrix(6, 8)])),
        X,
        {"w.0": 1, "w.1": 1},
    ),
    "a dictionary of parameters": (
        made(lambda s, x: F.linear(x, s.w["inner"]), w=nn.ParameterDict({"inner": matrix(6, 8)})),
        X,
        {"w.inner": 1},
    ),
    "one weight of a linear and of F.linear": (
        made(lambda s, x: F.linear(torch.tanh(s.a(x)), s.a.weight), a=linear()),
        X,
        {"a.weight": 2},
    ),
    "one weight and bias of a linear and of F.linear": (
        made(lambda s, x: F.linear(torch.tanh(s.a(x)), s.a.weight, s.a.bias), a=linear()),
        X,
        {"a.weight": 2},
    ),
    "two convolutions with one weight": (
        made(lambda s, x: s.b(torch.tanh(s.a(x))), **sharing(conv(), conv(bias=False))),
        IMAGE,
        {"a.weight": 2},
    ),
    "two convolutions with one weight and strides of their own": (
        made(lambda s, x: s.b(torch.tanh(s.a(x))), **sharing(conv(bias=False), conv(bias=False, stride=2))),
        IMAGE,
        {"a.weight": 2},
    ),
    "vectors are no candidates": (
        made(lambda s, x: s.a(s.norm(x) * s.scale), norm=nn.LayerNorm(8), scale=matrix(8), a=linear()),
        X,
        {"a.weight": 1},
    ),
    "one row": (
        made(lambda s, x: s.b(s.a(x)), a=nn.Linear(8, 1), b=nn.Linear(1, 8)),
        X,
        {"a.weight": 1, "b.weight": 1},
    ),
}
TOKEN_SITES = {
    "an embedding": (made(lambda s, t: s.b(s.a(t)), a=nn.Embedding(9, 8), b=linear()), {"a.weight": 1, "b.weight": 1}),
    "an embedding that pads": (made(lambda s, t: s.a(t), a=nn.Embedding(9, 8, padding_idx=3)), {"a.weight": 1}),
    "F.embedding": (made(lambda s, t: F.embedding(t, s.w, padding_idx=-2), w=matrix(9, 8)), {"w": 1}),
    "an embedding tied to the head": (
        made(lambda s, t: s.b(s.a(t)), **sharing(nn.Embedding(9, 8), nn.Linear(8, 9))),
        {"a.weight": 2},
    ),
    "F.embedding tied to F.linear": (made(lambda s, t: F.linear(F.embedding(t, s.w), s.w), w=matrix(9, 8)), {"w": 2}),
    "an embedding tied to a matmul": (made(lambda s, t: s.a(t) @ s.a.weight.T, a=nn.Embedding(9, 8)), {"a.weight": 2}),
}
FOUND |= {
    "one weight at two strides": (
        made(lambda s, x: F.conv2d(x, s.w).mean() + F.conv2d(x, s.w, stride=2), w=matrix(8, 8, 3, 3)),
        IMAGE,
        {"w": 2},
    ),
    "a convolution and F.conv2d at another stride": (
        made(lambda s, x: F.conv2d(s.a(x), s.a.weight, stride=2), a=conv(bias=False)),
        IMAGE,
        {"a.weight": 2},
    ),
    "a convolution and a transposed one with one weight": (
        made(lambda s, x: s.b(torch.tanh(s.a(x))), **sharing(conv(), nn.ConvTranspose2d(8, 8, 3, padding=1))),
        IMAGE,
        {"a.weight": 2},
    ),
    "transposed convolutions": (
        made(
            lambda s, x: F.conv_transpose2d(s.a(x), s.w, groups=2), a=nn.ConvTranspose2d(8, 6, 3), w=matrix(6, 4, 2, 2)
        ),
        IMAGE,
        {"w": 1, "a.weight": 1},
    ),
    "a weight that the model reads": (
        made(lambda s, x: s.a(x) + s.a.weight.sum() + s.a.weight.size(1), a=linear()),
        X,
        {"a.weight": 1},
    ),
    "a part of a weight that the model reads": (
        made(lambda s, x: F.linear(x, s.w[:4]) + s.w[2:6].sum(), w=matrix(8, 8)),
        X,
        {"w": 1},
    ),
    "x @ w": (made(lambda s, x: x @ s.w, w=matrix(8, 6)), X, {"w": 1}),
    "x @ w.T": (made(lambda s, x: x @ s.w.T, w=matrix(6, 8)), X, {"w": 1}),
    "a vector times w": (made(lambda s, x: x[0] @ s.w, w=matrix(8, 6)), X, {"w": 1}),
    "methods and keywords": (
        made(lambda s, x: torch.matmul(other=s.v, input=x.matmul(s.w)), w=matrix(8, 6), v=matrix(6, 7)),
        X,
        {"w": 1, "v": 1},
    ),
    "addmm": (made(lambda s, x: torch.addmm(s.b, x, s.w), w=matrix(8, 6), b=matrix(6)), X, {"w": 1}),
    "addmm with the weight first, scaled": (
        made(lambda s, x: torch.addmm(s.b, s.w, x.T, beta=0.5, alpha=2), w=matrix(6, 8), b=matrix(2)),
        X,
        {"w": 1},
    ),
    "baddbmm": (
        made(lambda s, x: torch.baddbmm(s.b, x.expand(3, 2, 8), s.w), w=matrix(3, 8, 6), b=matrix(6)),
        X,
        {"w": 1},
    ),
    "parts of parts": (
        made(lambda s, x: x @ s.w[:, 2:8].transpose(0, 1)[1:4].T.mT.T[:, :3], w=matrix(8, 9)),
        X,
        {"w": 1},
    ),
    "one part of several": (made(lambda s, x: x @ s.w.chunk(2, 1)[1], w=matrix(8, 6)), X, {"w": 1}),
    "a part by names in any order": (
        made(lambda s, x: x @ s.w.split(dim=1, split_size=4)[1], w=matrix(8, 6)),
        X,
        {"w": 1},
    ),
    "a part that nobody uses": (
        made(lambda s, x: (s.w[:2].t(), x @ s.w)[1], w=matrix(8, 6)),
        X,
        {"w": 1},
    ),
    "matrices of a stack": (
        made(lambda s, x: F.linear(x @ s.w[0], s.w[-1]) + x @ s.w[1], w=matrix(3, 8, 8)),
        X,
        {"w": 3},
    ),
    "matrices gathered by an index": (
        made(
            lambda s, x: (
                torch.bmm(s.w[(x[:, 0] > 0).long()], x.unsqueeze(-1)).squeeze(-1)
                + torch.bmm(x.unsqueeze(1), s.v[(x[:, 1] > 0).long()].transpose(1, 2)[:, :, :6])[:, 0]
            ),
            w=matrix(2, 6, 8),
            v=matrix(2, 7, 8),
        ),
        X,
        {"w": 1, "v": 1},
    ),
    "a weight cast to another type": (
        made(lambda s, x: F.linear(x.double(), s.w.to(torch.float64)[2:]).float(), w=matrix(8, 8)),
        X,
        {"w": 1},
    ),
    "einsum with a shared axis": (
        made(lambda s, x: torch.einsum("bhd,hde->bhe", x.unflatten(1, (2, 4)), s.w), w=matrix(2, 4, 5)),
        X,
        {"w": 1},
    ),
    "einsum with dots": (made(lambda s, x: torch.einsum("...d,ed->...e", x, s.w), w=matrix(5, 8)), X, {"w": 1}),
    "einsum both ways": (
        made(lambda s, x: torch.einsum("be,ed->bd", torch.einsum("bd,ed->be", x, s.w), s.w), w=matrix(5, 8)),
        X,
        {"w": 2},
    ),
}
FOUND["one module under two names"] = (
    made(lambda s, x: s.b(torch.tanh(s.a(x))), **dict.fromkeys(("a", "b"), linear())),
    X,
    {"a.weight": 2},
)


FOUND |= {name: (model, TOKENS, expected) for name, (model, expected) in TOKEN_SITES.items()}


@both_captures
@pytest.mark.parametrize("name", FOUND)
def test_sites_are_found_under_both_captures_and_rewritten_exactly(name, how):
    model, shape, expected = FOUND[name]
    x = example(shape)
    net = dr.transform(model, (x,), rank=dr.Fixed(1), how=how, allow_unprofitable=True)
    plan = dr.plan_of(net)
    assert {row.site.name: len(row.site.uses) for row in plan.sites} == expected
    assert plan.skipped == ()
    assert torch.equal(net(x), model(x))
    net(x).square().mean().backward()
    model.zero_grad()
    model(x).square().mean().backward()
    gradients = sorted(float(p.grad.norm()) for p in model.parameters())
    assert sorted(float(p.grad.norm()) for p in net.parameters()) == gradients
    net.zero_grad()
    dr.enter_(net, dr.Phase.LOW)
    low = net(x)
    torch.testing.assert_close(dr.truncate(net)(x), low)
    dr.enter_(net, dr.Phase.FULL)
    torch.testing.assert_close(net(x), low, rtol=1e-4, atol=1e-5)


READ = "not multiplied by an input as it is: it is used by "
BAG = "embedding bag: its kernel takes a dense table"
RECURRENT = "recurrent layer: its kernel takes dense matrices"
COMPUTED = "the weight of a is computed from it by a parametrization"
ITSELF = " needs the parameter itself, which does not exist while its factors train"


def first(s: nn.Module, x: Tensor) -> Any:
    return s.a(x)


SKIPPED = {
    "an embedding bag": (made(first, a=nn.EmbeddingBag(9, 8)), TOKENS, {"a.weight": BAG}),
    "an embedding bag tied to a head": (
        made(lambda s, t: s.b(s.a(t)), **sharing(nn.EmbeddingBag(9, 8), nn.Linear(8, 9))),
        TOKENS,
        {"a.weight": "shared with an " + BAG},
    ),
    "rows by index": (made(lambda s, t: s.w[t], w=matrix(9, 8)), TOKENS, {"w": READ + "`getitem`"}),
    "a depthwise convolution": (
        made(first, a=nn.Conv2d(8, 8, 3, groups=8)),
        IMAGE,
        {"a.weight": "depthwise convolution: rank 1 already"},
    ),
    "a transposed depthwise convolution": (
        made(first, a=nn.ConvTranspose2d(8, 8, 3, groups=8)),
        IMAGE,
        {"a.weight": "depthwise convolution: rank 1 already"},
    ),
    "a cell": (
        made(lambda s, x: s.a(x)[0], a=nn.LSTMCell(8, 4)),
        X,
        {"a.weight_ih": RECURRENT, "a.weight_hh": RECURRENT},
    ),
    "a bilinear form": (
        made(lambda s, x: s.a(x, x), a=nn.Bilinear(8, 8, 4)),
        X,
        {"a.weight": "bilinear form: a tensor between two inputs, which two factors do not split"},
    ),
    "weight norm": (
        made(lambda s, x: s.b(s.a(x)), a=parametrizations.weight_norm(linear()), b=linear()),
        X,
        {f"a.parametrizations.weight.original{i}": COMPUTED for i in (0, 1)},
    ),
    "spectral norm": (
        made(lambda s, x: s.b(s.a(x)), a=parametrizations.spectral_norm(linear()), b=linear()),
        X,
        {"a.parametrizations.weight.original": COMPUTED},
    ),
    "a weight that the model returns": (
        made(lambda s, x: (s.a(x), s.a.weight), a=linear()),
        X,
        {"a.weight": "the output" + ITSELF},
    ),
    "a weight in groups of its own": (
        made(lambda s, x: F.conv2d(x, s.w, groups=2).mean() + F.conv2d(x[:, :4], s.w), w=matrix(8, 4, 3, 3)),
        IMAGE,
        {"w": "its convolutions have different numbers of groups"},
    ),
    "a weight of two kinds": (
        made(
            lambda s, x: torch.einsum("bd,hde->bhe", x, s.w).mean() + torch.einsum("bd,hed->bhe", x, s.w),
            w=matrix(2, 8, 8),
        ),
        X,
        {"w": "used in einsum in ways whose factors differ"},
    ),
    "an einsum that sums the weight": (
        made(lambda s, x: torch.einsum("bd,hde->bh", x, s.w), w=matrix(2, 8, 4)),
        X,
        {"w": READ + "`einsum`"},
    ),
    "an einsum that sums over dots": (
        made(lambda s, x: torch.einsum("...d,ed->e", x, s.w), w=matrix(6, 8)),
        X,
        {"w": READ + "`einsum`"},
    ),
    "a module that nobody calls": (
        made(lambda s, x: s.a(x), a=linear(), b=linear()),
        X,
        {"b.weight": "no operation of the graph uses it"},
    ),
    "a weight with dropout": (
        made(lambda s, x: F.linear(x, F.dropout(s.w, 0.1)), w=matrix(6, 8)),
        X,
        {"w": READ + "`dropout`"},
    ),
    "a weight times itself": (
        made(lambda s, x: F.linear(s.w, s.w) + x.sum(), w=matrix(8, 8)),
        X,
        {"w": READ + "`linear`"},
    ),
    "a weight as input": (
        made(lambda s, x: F.linear(s.p, s.w) + x.sum(), w=matrix(8, 8), p=matrix(4, 8)),
        X,
        {"p": READ + "`linear`"},
    ),
}


def example(shape: tuple[int, ...]) -> Tensor:
    torch.manual_seed(0)
    return torch.randint(9, shape) if shape == TOKENS else torch.randn(shape)


def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    return pytree.tree_leaves(model(x))


@both_captures
@pytest.mark.parametrize("name", SKIPPED)
def test_what_is_no_site_says_why_in_the_same_words_under_both_captures(name, how):
    model, shape, expected = SKIPPED[name]
    x = example(shape)
    net = dr.transform(model, (x,), rank=dr.Fixed(1), how=how, allow_unprofitable=True, allow_empty=True)
    assert {skipped.name: skipped.reason for skipped in dr.plan_of(net).skipped} == expected
    for got, wanted in zip(run(net, x), run(model, x), strict=True):
        assert torch.equal(got, wanted)
    names = dict(model.named_parameters(remove_duplicate=False))
    ties = {(a, b) for a in names for b in names if names[a] is names[b]}
    kept = dict(net.named_parameters(remove_duplicate=False))
    assert {(a, b) for a in kept for b in kept if kept[a] is kept[b]} >= {t for t in ties if t[0] in expected}


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: nn.LSTM(8, 4, batch_first=True), ("a.weight_ih_l0", "a.weight_hh_l0")),
        (lambda: nn.GRU(8, 4, batch_first=True), ("a.weight_ih_l0", "a.weight_hh_l0")),
    ],
)
@pytest.mark.parametrize("how", [*CAPTURES, None])
@pytest.mark.filterwarnings("ignore:The tensor attributes self.a._flat_weights")
def test_recurrent_layers_stay_dense_beside_their_head(make, names, how):
    model = made(lambda s, x: s.head(s.a(x)[0]), a=make(), head=nn.Linear(4, 8))
    x = example(SEQUENCE)
    net = dr.transform(model, (x,), rank=dr.Fixed(1), how=how)
    assert {s.name: s.reason for s in dr.plan_of(net).skipped} == dict.fromkeys(names, RECURRENT)
    assert torch.equal(net(x), model(x))
    dr.enter_(net, dr.Phase.LOW)
    assert dr.truncate(net)(x).shape == (2, 5, 8)


def test_a_hook_that_would_be_lost_keeps_its_module_as_it_is():
    layer = linear()
    layer.register_forward_hook(lambda module, args, output: output + 1)
    model = made(lambda s, x: s.b(s.a(x)), a=layer, b=linear())
    x = example(X)
    net = dr.transform(model, (x,), rank=dr.Fixed(1))
    (skipped,) = dr.plan_of(net).skipped
    assert (skipped.name, skipped.reason) == (
        "a.weight",
        "inside the Linear a: a hook watches the module, and would be lost",
    )
    assert torch.equal(net(x), model(x))
    exported = dr.transform(model, (x,), rank=dr.Fixed(1), how=dr.Capture.EXPORT)
    assert not dr.plan_of(exported).skipped, "torch.export has traced the hook"
    assert torch.equal(exported(x), model(x))


def test_a_forward_that_was_replaced_keeps_its_module_as_it_is():
    """A site in its place would have to run it, on the weight of the original."""
    layer = linear()
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)
    model = made(lambda s, x: s.b(s.a(x)), a=layer, b=linear())
    x = example(X)
    net = dr.transform(model, (x,), rank=dr.Fixed(1), allow_unprofitable=True)
    plan = dr.plan_of(net)
    assert [row.site.name for row in plan.sites] == ["b.weight"]
    assert [s.reason for s in plan.skipped] == ["inside the Linear a: its forward was replaced by another"]
    assert torch.equal(net(x), model(x))


@pytest.mark.parametrize(
    ("take", "words"),
    [
        (lambda s, x: x @ s.w[(x[:, 0] > 0).long()][0], ("getitem", "select")),
        (lambda s, x: torch.bmm(x[:, None], s.w[(x[:, 0] > 0).long()][0:2]), ("getitem", "slice")),
    ],
)
@pytest.mark.parametrize("how", CAPTURES)
def test_some_of_the_gathered_matrices_are_not_those_of_the_stack(take, words, how):
    model, x = made(take, w=matrix(2, 8, 6)), example(X)
    net = dr.transform(model, (x,), rank=dr.Fixed(1), how=how, allow_empty=True)
    (skipped,) = dr.plan_of(net).skipped
    assert skipped.reason in [f"{READ}`{word}`" for word in words]
    assert torch.equal(net(x), model(x))


ATTENTION = ("a.in_proj_weight", "a.out_proj.weight")


def test_attention_is_closed_to_symbolic_tracing_and_open_to_export_which_is_then_chosen():
    model = made(lambda s, x: s.a(x, x, x)[0], a=nn.MultiheadAttention(8, 2, batch_first=True))
    x = example(SEQUENCE)
    closed = dr.capture(model, (x,), how=dr.Capture.SYMBOLIC)
    sites, skipped = find_sites(closed)
    assert sites == ()
    assert {s.name: s.reason for s in skipped} == dict.fromkeys(
        ATTENTION, "inside the MultiheadAttention a: the tracer does not look into it (torch.export may)"
    )
    for how in (dr.Capture.EXPORT, None):
        net = dr.capture(model, (x,), how=how)
        assert tuple(site.name for site in find_sites(net)[0]) == ATTENTION
        assert torch.equal(net.train()(x), model.train()(x))


def test_a_module_that_holds_more_stays_as_it_is():
    layer = linear()
    layer.register_buffer("extra", torch.ones(3))
    (skipped,) = find_sites(dr.capture(made(lambda s, x: s.a(x), a=layer)))[1]
    assert skipped.reason == "inside the Linear a: it holds more than a weight and a bias"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_both_captures_find_the_same_sites_skips_shapes_and_costs(case):
    torch.manual_seed(0)
    model, x = case.model(), case.inputs()
    plans = [
        dr.make_plan(dr.capture(model, (x,), how=how), dr.Ratio(0.5), (x,), allow_unprofitable=True) for how in CAPTURES
    ]
    for plan in plans:
        assert [row.site.name for row in plan.sites] == list(case.sites)
    rows = [
        [(r.site.name, r.site.aliases, r.site.shape, r.rank, r.flops, len(r.site.uses)) for r in plan.sites]
        for plan in plans
    ]
    assert rows[0] == rows[1]
    assert plans[0].skipped == plans[1].skipped
    assert plans[0].total_flops == plans[1].total_flops
    by_export = dr.capture(model, (x,), how=dr.Capture.EXPORT)
    assert fit_plan(by_export, plans[0], (x,)).sites == plans[1].sites, "a plan serves the other capture too"


def test_a_site_knows_its_op_groups_and_the_shape_of_every_input():
    model = made(lambda s, x: s.b(s.a(x).mean((2, 3))), a=nn.Conv2d(8, 12, 3, stride=2, groups=4), b=nn.Linear(12, 5))
    plan = dr.make_plan(dr.capture(model), dr.Fixed(1), (torch.zeros(IMAGE),), allow_unprofitable=True)
    (first, second) = (row.site for row in plan.sites)
    assert first.uses[0].op == ConvOp(stride=(2, 2), padding=(0, 0), dilation=(1, 1), groups=4)
    assert (first.kind, first.shape) == ("conv2d", (12, 2, 3, 3))
    assert first.uses[0].input_shape == IMAGE
    assert second.uses[0].op == LinearOp()
    assert (second.kind, second.shape) == ("linear", (5, 12))
    assert second.uses[0].input_shape == (2, 12)
    unmeasured = find_sites(dr.capture(model))[0]
    assert [site.flops for site in unmeasured] == [None, None]


@both_captures
def test_one_module_under_two_names_stays_one_and_shared_weights_stay_shared_in_low(how):
    one, shape, _ = FOUND["one module under two names"]
    net = dr.transform(one, (torch.zeros(shape),), rank=dr.Fixed(1), how=how)
    assert net.get_submodule("a") is net.get_submodule("b")
    two, shape, _ = FOUND["two convolutions with one weight"]
    net = dr.transform(two, (torch.zeros(shape),), rank=dr.Fixed(1), how=how)
    dr.enter_(net, dr.Phase.LOW)
    (modules,) = switched_modules(net).values()
    assert [type(module) for module in modules] == [Switched, Switched]
    assert modules[0].left is modules[1].left
    assert modules[0].right is modules[1].right
    assert modules[0].bias is not None
    assert modules[1].bias is None


class OddWeights(nn.Module):
    """A complex and an integer matrix as linear weights, beside an ordinary one."""

    def __init__(self) -> None:
        super().__init__()
        self.wave = nn.Parameter(torch.randn(8, 8, dtype=torch.complex64))
        self.count = nn.Parameter(torch.ones(8, 8, dtype=torch.int64), requires_grad=False)
        self.real = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        wave = nn.functional.linear(x.to(torch.complex64), self.wave).abs()
        count = nn.functional.linear(x.to(torch.int64), self.count)
        return self.real(wave + count.to(x.dtype))


@pytest.mark.parametrize("how", [dr.Capture.SYMBOLIC, dr.Capture.EXPORT], ids=lambda how: how.name)
def test_complex_and_integer_matrices_stay_dense_with_their_dtype_as_the_reason(how):
    torch.manual_seed(0)
    x = torch.randn(3, 8)
    model = OddWeights()
    net = dr.transform(model, (x,), rank=dr.Fixed(2), how=how)
    assert reasons(dr.plan_of(net)) == {
        "wave": "its dtype is torch.complex64, which has no truncated form",
        "count": "its dtype is torch.int64, which has no truncated form",
    }
    assert torch.equal(net(x), model(x))
