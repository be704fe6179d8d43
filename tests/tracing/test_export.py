"""Capture by torch.export: one set of weights, a graph for each mode, and a refusal for what it was not made for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capturing import CAPTURES, Loops, assert_alike, linears
from models import Modal, gradients, randomized
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.tracing.export import fixed_sizes, mode_of, shortcoming

X = torch.randn(4, 5, 8)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_an_example_of_one_row_serves_every_batch_under_export(rows):
    model = Modal().eval()
    net = dr.capture(model, (torch.randn(1, 4, 6, 6),), how=dr.Capture.EXPORT)
    x = torch.randn(rows, 4, 6, 6)
    assert torch.equal(net(x), model(x))


class Branches(Loops):
    """A branch on the size of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * 2 if x.shape[0] > 4 else self.fc(x)


class Switches(Loops):
    """A branch on an input that is no tensor."""

    def forward(self, x: Tensor, double: bool = False, name: str = "a", mask: Tensor | None = None) -> Tensor:
        x = self.fc(x) if mask is None else self.fc(x) * mask
        return x * 2 if double else x


@pytest.mark.parametrize(
    ("model", "example", "good", "bad", "sentence"),
    [
        (Loops, (torch.ones(3, 8),), (torch.ones(3, 8),), (torch.ones(5, 8),), "exported for 3 rows of x, and serves"),
        (
            Branches,
            (torch.ones(3, 8),),
            (torch.ones(4, 8),),
            (torch.ones(5, 8),),
            "4 rows of x or fewer, and serves no",
        ),
        (Branches, (torch.ones(6, 8),), (torch.ones(5, 8),), (torch.ones(4, 8),), "5 rows of x or more, and serves no"),
        (
            Switches,
            (torch.ones(3, 8), True),
            (torch.ones(1, 8), True),
            (torch.ones(3, 8), False),
            "for double=True, and",
        ),
        (
            Switches,
            (torch.ones(3, 8), True, "b"),
            (torch.ones(4, 8), True, "b"),
            (torch.ones(3, 8), True, "c"),
            "name='b'",
        ),
        (
            Switches,
            (torch.ones(3, 8), True, "b", None),
            (torch.ones(3, 8), True, "b", None),
            (torch.ones(3, 8), True, "b", torch.ones(8)),
            r"mask=None, and serves no other: transform with such an example .*form=dr\.Form\.LAYERS$",
        ),
    ],
)
@pytest.mark.parametrize("given", ["module", "exported"])
def test_what_export_made_a_constant_of_is_refused_when_it_changes(given, model, example, good, bad, sentence):
    """Silently taking the example's value would be a wrong result."""
    torch.manual_seed(0)
    model = model()
    if given == "exported":
        shapes = torch.export.ShapesCollection()
        shapes[example[0]] = {0: torch.export.Dim.AUTO}
        source: Any = torch.export.export(model, example, dynamic_shapes=shapes).module()
    else:
        source = model
    net = dr.transform(source, example, rank=dr.Fixed(2), how=dr.Capture.EXPORT)
    compiled = torch.compile(net, fullgraph=True, backend="eager", dynamic=False)
    small = dr.truncate(net)
    assert torch.equal(net(*good), model(*good))
    assert torch.equal(compiled(*good), model(*good))
    assert small(*good).shape == model(*good).shape
    for each in (net, small):
        with pytest.raises(AssertionError, match=sentence):
            each(*bad)


class ConstantOfTheMode(Loops):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * torch.tensor(2.0 if self.training else 3.0)


class BranchOfTheMode(Loops):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + torch.cond(x.sum() > 1e6, lambda x: x * 1, lambda x: F.dropout(x, 0.5, self.training), (x,))


@pytest.mark.parametrize("how", [*CAPTURES, None], ids=str)
@pytest.mark.parametrize("make", [ConstantOfTheMode, BranchOfTheMode])
def test_modes_that_differ_in_a_constant_or_inside_a_branch_only_are_kept_apart(make, how):
    if make is BranchOfTheMode and how is dr.Capture.SYMBOLIC:
        how = None  # cond is for export
    torch.manual_seed(0)
    model, x = make(), torch.randn(4, 8)
    net = dr.transform(model, (x,), rank=dr.Fixed(2), how=how)
    assert_alike(net, model, x)
    assert_alike(copy.deepcopy(net), model, x)


def test_cond_keeps_both_branches_and_leaves_their_weights_dense():
    class Cond(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.cond(x.sum() > 0, lambda x: self.a(x), lambda x: self.b(x), (x,)))

    torch.manual_seed(0)
    model = Cond()
    net = dr.transform(model, (torch.randn(4, 8),), rank=dr.Fixed(2))
    assert [row.site.name for row in dr.plan_of(net).sites] == ["c.weight"]
    assert {s.name for s in dr.plan_of(net).skipped} == {"a.weight", "b.weight"}
    for sign in (1, -1):
        x = sign * torch.rand(4, 8)
        for each in (net, copy.deepcopy(net)):
            torch.testing.assert_close(each(x), model(x))
    with torch.no_grad():
        for parameter in (*net.a.parameters(), *net.b.parameters()):
            parameter.zero_()
    assert torch.equal(net(torch.rand(4, 8)), net.c.bias.expand(4, 8)), "the branches read the net's own weights"


class Attending(nn.Module):
    """Attention over a sequence of any length, with positions; symbolic tracing cannot unpack its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(20, 8), nn.Embedding(32, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, length = tokens.shape
        x = self.embed(tokens) + self.positions(torch.arange(length, device=tokens.device))
        return self.layer(x, src_key_padding_mask=mask).reshape(batch * length, 8)


def test_batch_and_sequence_length_stay_free_and_what_the_model_fixes_is_refused():
    torch.manual_seed(0)
    model = randomized(Attending())
    net = dr.capture(model, (torch.randint(20, (2, 6)), torch.zeros(2, 6, dtype=torch.bool)))
    for batch, length in ((2, 6), (3, 11), (1, 4)):
        mask = torch.arange(length) >= torch.tensor([[length - 1]] * batch)
        assert_alike(net, model, torch.randint(20, (batch, length)), mask)

    class Unrolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.zeros_like(x[:, 0])
            for t in range(int(x.shape[1])):
                h = torch.tanh(self.cell(h + x[:, t]))
            return h

    unrolled, x = Unrolled(), torch.randn(2, 5, 8)
    net = dr.capture(unrolled, (x,), how=dr.Capture.EXPORT)
    assert_alike(net, unrolled, torch.randn(4, 5, 8))
    with pytest.raises(AssertionError, match="exported for 5 numbers in dimension 1 of x, and serves no other"):
        net(torch.randn(4, 6, 8))


class Windows(nn.Module):
    """Pads to windows and merges them, again and again: the sizes become ever longer formulas of the input's."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = linears()

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != 8:
            raise ValueError
        x = self.fc(x)
        for _ in range(12):
            x = nn.functional.pad(x, (0, 0, 0, -x.shape[1] % 3))
            x = x.reshape(x.shape[0], -1, 3, x.shape[2]).sum(2).repeat_interleave(2, 1)
        return x


def test_sizes_that_grow_into_long_formulas_are_fixed_but_for_the_batch():
    torch.manual_seed(0)
    model, x = Windows(), torch.randn(2, 10, 8)
    net = dr.capture(model, (x,), how=dr.Capture.EXPORT)
    assert_alike(net, model, torch.randn(5, 10, 8))
    with pytest.raises(AssertionError, match="exported for 10 numbers in dimension 1 of x, and serves no other"):
        net(torch.randn(2, 12, 8))


class Upcasting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != 8:
            raise ValueError
        return self.b(self.a(x).float()) + torch.arange(8, device=x.device)


def test_an_exported_graph_runs_under_autocast_and_on_other_devices():
    torch.manual_seed(0)
    model = Upcasting()
    for given in (model.train(), torch.export.export(model.train(), (X,))):
        net = dr.capture(given, (X,), how=dr.Capture.EXPORT)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(net(X), model(X))
        on_meta = copy.deepcopy(net).to("meta")
        assert on_meta(X.to("meta")).device.type == "meta"


class Asking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(x, x, x)[0]
        return self.out(y * 0 if float(y.detach().sum()) > 1e9 else y)


def test_one_input_given_three_times_stays_one():
    torch.manual_seed(0)
    model = Asking()
    net = dr.transform(model, (X,), rank=dr.Fixed(2))
    row = next(row for row in dr.plan_of(net).sites if row.site.name == "attention.in_proj_weight")
    assert len(row.site.uses) == 1
    expected, found = gradients(model, X), gradients(net, X)
    assert torch.equal(found["attention.in_proj_bias"], expected["attention.in_proj_bias"])
    alone = dr.capture(nn.MultiheadAttention(8, 2, batch_first=True), (X, X, X))
    with pytest.raises(AssertionError, match="exported for key being query, and serves no other"):
        alone(X, X.clone(), X)


def test_a_generator_made_in_forward_is_refused_in_words():
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + torch.randn(8, generator=torch.Generator().manual_seed(1))

    with pytest.raises(dr.CaptureError, match=r"^forward makes a Generator, which an exported graph cannot keep\.$"):
        dr.capture(Noisy(), (torch.randn(4, 8),), how=dr.Capture.EXPORT)


def test_the_sizes_that_a_graph_is_fixed_to_are_told():
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(4, 8)
    net = dr.capture(model, (x,), how=dr.Capture.EXPORT)
    assert fixed_sizes(net) == ", fixed: input[1]=8"
    assert shortcoming(net, (x,)) == ""
    shapes = ({0: torch.export.Dim.STATIC},)
    fixed = dr.capture(model, (x,), how=dr.Capture.EXPORT, dynamic_shapes=shapes)
    assert fixed_sizes(fixed) == ", fixed: input[0]=4, input[1]=8"
    assert shortcoming(fixed, (x,)) == "serves no other batch size than the example's"
    with pytest.raises(AssertionError, match="exported for 4 rows of input, and serves no other"):
        fixed(torch.randn(5, 8))


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_an_exported_graph_is_read_off_its_operations(training):
    x = torch.randn(4, 8)
    for layers, expected in (((nn.BatchNorm1d(8),), training), ((nn.Dropout(0.5),), training), ((nn.Tanh(),), None)):
        model = nn.Sequential(nn.Linear(8, 8), *layers).train(training)
        assert mode_of(torch.export.export(model, (x,)).module().graph) is expected
