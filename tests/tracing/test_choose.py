"""Capture: what the user has, as a Net that computes the same, with nothing else changed; every refusal a sentence."""

from __future__ import annotations

import copy
import dataclasses
import io
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from capturing import CAPTURES, Loops, assert_alike, both_captures, linears, same
from models import Modal, gradients, randomized
from torch import Tensor, fx, nn

import dynrank_fx as dr

# What is given


def exported(model: nn.Module, x: Tensor) -> torch.export.ExportedProgram:
    shapes = torch.export.ShapesCollection()
    shapes[x] = {0: torch.export.Dim.AUTO}
    return torch.export.export(model, (x,), dynamic_shapes=shapes)


GIVEN: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "module": lambda model, x: model,
    "symbolic trace": lambda model, x: fx.symbolic_trace(model),
    "exported module": lambda model, x: exported(model, x).module(),
    "exported module without guards": lambda model, x: exported(model, x).module(check_guards=False),
    "exported program": exported,
    "net": lambda model, x: dr.capture(model, (x,)),
}


@pytest.mark.parametrize("examples", [True, False], ids=["with example", "without"])
@pytest.mark.parametrize("given", GIVEN)
def test_whatever_form_a_model_has_it_becomes_the_same_trainable_net(given, examples):
    model, x = linears(), torch.randn(4, 8)
    net = dr.capture(GIVEN[given](model, x), (x,) if examples else None)
    assert_alike(net, model, torch.randn(5, 8))
    assert sorted(net.state_dict()) == sorted(model.state_dict())
    assert not any(a is b for a in net.parameters() for b in model.parameters())
    plan = dr.make_plan(net, dr.Fixed(2), (x,))
    assert [row.site.name for row in plan.sites] == ["0.weight", "2.weight"]


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec")
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("how", [*CAPTURES, None], ids=str)
def test_however_it_was_captured_the_truncated_model_saves_loads_copies_and_exports(given, how):
    model, x = linears(), torch.randn(4, 8)
    net = dr.transform(GIVEN[given](model, x), (x,), rank=dr.Fixed(2), how=how)
    dr.enter_(net, dr.Phase.LOW)
    small, file = dr.truncate(net), io.BytesIO()
    torch.save(small, file)
    assert b"dynrank" not in file.getvalue()
    file.seek(0)
    more, expected = torch.randn(7, 8), None
    for twin in (torch.load(file, weights_only=False), copy.deepcopy(small), exported(small, x).module(), small):
        expected = net(more) if expected is None else expected
        torch.testing.assert_close(twin(more), expected)


# Inputs and outputs


class Signature(nn.Module):
    """Positional, keyword, default and None inputs; a dict in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(
        self, x: Tensor, features: dict[str, Tensor], scale: float = 2.0, mask: Tensor | None = None, *, shift: Tensor
    ) -> dict[str, Any]:
        h = torch.tanh(self.a(x) + features["left"] * features["right"]) * scale
        if mask is not None:
            h = h * mask
        return {"out": self.b(h) + shift, "extra": (h, [x])}


def signature_inputs(rows: int, **more: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    x, left, right, shift = torch.randn(4, rows, 8).unbind()
    return (x, {"left": left, "right": right}), {"shift": shift, **more}


@pytest.mark.parametrize("masked", [True, False])
def test_dicts_defaults_keywords_and_none_are_passed_as_in_the_original(masked):
    torch.manual_seed(0)
    model = Signature()
    more = {"mask": torch.rand(4, 8)} if masked else {}
    net = dr.transform(model, signature_inputs(4, **more), rank=dr.Fixed(2))
    args, kwargs = signature_inputs(4, **more)
    assert_alike(net, model, *args, **kwargs)
    assert dr.plan_of(net).total_flops == 2 * 2 * 4 * 64
    dr.enter_(net, dr.Phase.LOW)
    assert same(dr.truncate(net)(*args, **kwargs), net(*args, **kwargs))


def test_a_signature_that_symbolic_tracing_cannot_write_is_refused_in_words():
    with pytest.raises(
        dr.CaptureError, match="Signature cannot be traced symbolically: SyntaxError: non-default argument"
    ):
        dr.capture(Signature(), how=dr.Capture.SYMBOLIC)


# Modes and buffers


class Counting(nn.Module):
    """Buffers that change in forward, in place and by assignment, in training only and always."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        if self.training:
            self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return self.norm(self.fc(x)) + self.mean * self.calls


class Assigning(Counting):
    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return self.fc(x) * self.calls


@pytest.mark.parametrize("how", [*CAPTURES, None], ids=str)
def test_buffers_change_as_in_the_original_and_not_while_capturing(how):
    torch.manual_seed(0)
    model, x = randomized(Counting()), torch.randn(4, 8)
    net = dr.transform(model, (x,), rank=dr.Fixed(2), how=how)
    assert dict(net.named_buffers()).keys() == dict(model.named_buffers()).keys()
    for _ in range(2):
        assert_alike(net, model, x)
    calls = float(model.calls)
    assert calls > 4
    dr.enter_(net, dr.Phase.LOW)
    small = dr.truncate(net.eval())
    small(x)
    assert float(small.calls) == calls + 1, "the update is no dead code"
    assert "mean" not in small.state_dict()


def test_buffers_that_are_assigned_are_captured_by_export():
    torch.manual_seed(0)
    model, x = Assigning(), torch.randn(4, 8)
    with pytest.raises(dr.CaptureError, match="RuntimeError: forward assigns the buffer calls, which a symbolic graph"):
        dr.capture(model, (x,), how=dr.Capture.SYMBOLIC)
    net = dr.transform(model, (x,), rank=dr.Fixed(2))
    assert_alike(net, model, x)
    assert float(net.calls) == float(model.calls) == 2


def test_buffers_that_a_part_assigns_are_captured_too():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), Assigning()), torch.randn(4, 8)
    net = dr.transform(model, (x,), rank=dr.Fixed(2), how=dr.Capture.EXPORT)
    assert_alike(net, model, x)
    assert float(net.get_buffer("1.calls")) == float(model[1].calls) == 2


class Growing(nn.Module):
    """A part whose state has the shape of what it last saw."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.register_buffer("last", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x) + self.last
        self.last = y.detach().mean(0)
        return y


def test_a_graph_that_loses_a_change_of_a_buffer_is_not_taken():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), Growing()), torch.randn(4, 8)
    with pytest.raises(dr.CaptureError, match=r"its graph changes the buffer 1.last otherwise on the example inputs"):
        dr.capture(model, (x,), how=dr.Capture.EXPORT)
    net = dr.capture(copy.deepcopy(model), (x,))
    for _ in range(2):
        assert torch.equal(net(x), model(x))


@both_captures
@pytest.mark.parametrize("training", [True, False])
def test_the_mode_and_the_parts_set_apart_are_kept(training, how):
    torch.manual_seed(0)
    model, x = randomized(Modal()).train(training), torch.randn(4, 4, 6, 6)
    model.norm.train(not training)
    net = dr.capture(model, (x,), how=how)
    assert net.training == training
    for run in range(2):
        outputs = []
        for each in (model, net):
            torch.manual_seed(run)
            outputs.append(each(x))
        assert torch.equal(*outputs)
        assert torch.equal(model.norm.running_mean, net.norm.running_mean)


class Freezing(nn.Module):
    """A part that keeps its batch norm frozen whatever mode it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.fc(x))

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.norm.eval()
        return self


@pytest.mark.parametrize("how", [*CAPTURES, None], ids=str)
def test_a_part_that_freezes_itself_stays_frozen_in_training(how):
    torch.manual_seed(0)
    model, x = randomized(Holder(Freezing())), torch.randn(4, 8)
    net = dr.capture(model, (x,), how=how)
    running = model.block.norm.running_mean.clone()
    assert_alike(net, model, x)
    assert torch.equal(net.train().block.norm.running_mean, running)


class Sampled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.fc(x), 0.3, self.training)
        if self.training:
            x = x + 0.1 * torch.randn_like(x)
        return x


@pytest.mark.parametrize("how", [*CAPTURES, None], ids=str)
def test_dropout_and_noise_follow_the_mode_after_copying_too(how):
    model, x = Sampled(), torch.randn(4, 8)
    net = dr.transform(model, (x,), rank=dr.Fixed(2), how=how)
    assert_alike(copy.deepcopy(net), model, x)
    assert_alike(net, model, x)
    assert torch.equal(net.eval()(x), net(x))
    assert not torch.equal(net.train()(x), net(x))


# What a graph cannot hold


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = linears()

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.inner(x)
        return x


class Holder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.block = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


def test_a_branch_on_data_is_refused_with_the_module_and_the_line_or_left_as_it_is():
    torch.manual_seed(0)
    model, x = Holder(DataDependent()), torch.rand(4, 8)
    for how in CAPTURES:
        with pytest.raises(dr.CaptureError) as refused:
            dr.capture(model, (x,), how=how)
        assert "block (DataDependent, test_choose.py:" in str(refused.value)
        assert "`if x.sum() > 0:`" in str(refused.value)
        assert "\n" not in str(refused.value)
    with pytest.raises(dr.CaptureError, match=r"block .*`if x\.sum\(\) > 0:`.* cannot be traced symbolically"):
        dr.capture(model)
    net = dr.transform(model, (x,), rank=dr.Fixed(2))
    assert [row.site.name for row in dr.plan_of(net).sites] == ["block.inner.0.weight", "block.inner.2.weight"]
    for each in (x, -x):
        assert_alike(net, model, each.requires_grad_())


def test_a_branch_on_the_shape_falls_to_export_and_without_example_says_what_is_missing():
    class Shaped(Loops):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x if x.ndim == 2 else x.flatten(1))

    model, x = Shaped(), torch.randn(4, 8)
    net = dr.transform(model, (x,), rank=dr.Fixed(2))
    assert_alike(net, model, torch.randn(7, 8))
    with pytest.raises(
        dr.CaptureError, match=r"torch.export needs example inputs to trace Shaped; pass example_inputs"
    ):
        dr.capture(model, how=dr.Capture.EXPORT)


@pytest.mark.parametrize(
    ("example", "sentence"),
    [
        (
            (torch.zeros(4, 9),),
            r"float32\[4, 9\]\): (RuntimeError: mat1|AssertionError: .* exported for 8 numbers in dimension 1 of)",
        ),
        ((torch.zeros(4, 8), 3), r"float32\[4, 8\], int\): "),
        ({"x": torch.zeros(4, 8, dtype=torch.int64)}, r"x=int64\[4, 8\]\): "),
        ((torch.zeros(4, 8, dtype=torch.float64),), r"float64\[4, 8\]\): RuntimeError"),
    ],
)
@pytest.mark.parametrize("given", ["module", "symbolic trace", "exported module"])
def test_example_inputs_that_do_not_fit_are_shown_with_their_shapes(given, example, sentence):
    model = GIVEN[given](linears(), torch.zeros(3, 8))
    with pytest.raises(dr.CaptureError, match=r"does not accept the example inputs \(" + sentence) as refused:
        dr.capture(model, example)
    assert "\n" not in str(refused.value)


def test_a_model_that_raises_or_prints_is_heard(capsys):
    class Loud(Loops):
        def forward(self, x: Tensor) -> Tensor:
            print("called")
            return self.fc(x)

    class Broken(Loops):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("no such table\nwith a second line")

    x = torch.randn(3, 8)
    net = dr.transform(Loud(), (x,), rank=dr.Fixed(2))
    assert "called" in capsys.readouterr().out
    net(x)
    assert capsys.readouterr().out == "", "a graph does not print"
    for how in (*CAPTURES, None):
        with pytest.raises(
            dr.CaptureError, match=r"Broken does not accept the example inputs .*KeyError: 'no such table"
        ):
            dr.capture(Broken(), (x,), how=how)
    with pytest.raises(dr.CaptureError, match=r"the model \(Broken, test_choose.py:\d+: `raise KeyError"):
        dr.capture(Broken())


@pytest.mark.parametrize("name", ["graph", "meta", "code", "setting", "graphs"])
def test_a_part_with_a_name_that_the_net_needs_is_refused_by_name(name):
    for part in (nn.Linear(8, 8), nn.Parameter(torch.ones(8)), torch.ones(8)):
        model = linears()
        setattr(model, name, part)
        with pytest.raises(
            dr.CaptureError, match=f"calls a part of it '{name}', which a graph module needs for itself"
        ):
            dr.capture(model, (torch.zeros(3, 8),))


@pytest.mark.parametrize(
    "given", [lambda x: x, "model.py", None, torch.ones(3)], ids=["function", "str", "None", "Tensor"]
)
def test_what_is_no_model_is_refused_in_words(given):
    kind = type(given).__name__
    with pytest.raises(dr.CaptureError, match=f"a {kind} is no model that can be traced: give an nn.Module"):
        dr.capture(given)
    with pytest.raises(dr.CaptureError, match="'export' is no way to capture a model: give"):
        dr.capture(linears(), how="export")


@dataclasses.dataclass
class Output:
    logits: Tensor
    hidden: tuple[Tensor, ...]


def test_what_is_wrapped_already_is_refused() -> None:
    wrapped = nn.Sequential(nn.DataParallel(nn.Linear(3, 3)))
    with pytest.raises(dr.CaptureError, match="in a DataParallel: transform it first, and wrap what transform made"):
        dr.capture(wrapped, (torch.randn(2, 3),))


def test_a_dataclass_as_the_output_is_kept():
    class Structured(Loops):
        def forward(self, x: Tensor) -> Output:
            h = self.fc(x)
            return Output(h * 2, (h, h / 0))

    torch.manual_seed(0)
    model, x = Structured(), torch.randn(4, 8)
    net = dr.transform(model, (x,), rank=dr.Fixed(2))
    got, expected = net(x), model(x)
    assert type(got) is Output
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.hidden[0], expected.hidden[0])


def test_a_compiled_model_is_captured_as_the_model_in_it():
    model, x = linears(), torch.randn(4, 8)
    net = dr.capture(torch.compile(model, backend="eager"), (x,))
    assert sorted(net.state_dict()) == sorted(model.state_dict())
    assert_alike(net, model, x)


def test_a_model_that_cannot_be_copied_is_refused_in_words():
    class Uncopyable(Loops):
        def __init__(self) -> None:
            super().__init__()
            self.source = (i for i in range(3))

    with pytest.raises(dr.CaptureError, match=r"Uncopyable cannot be copied .*so make the model support copy.deepcopy"):
        dr.capture(Uncopyable(), (torch.zeros(3, 8),))


def test_a_lazy_module_without_weights_is_refused_by_name():
    model = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 8))
    with pytest.raises(dr.CaptureError, match=r"0 \(LazyLinear\) has no weights yet: call the model once"):
        dr.capture(model, (torch.zeros(3, 5),))
    model(torch.zeros(3, 5))
    assert len(dr.plan_of(dr.transform(model, (torch.zeros(3, 5),), rank=dr.Fixed(2))).sites) == 2


# What is kept and what is left alone


class Attributes(nn.Module):
    """Numbers, strings, lists, and tensors held as plain attributes, in the model and in a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.scale, self.names, self.kind = 3.0, ["a", "b"], "x"
        self.shift = torch.arange(8.0)
        self.part = nn.Module()
        self.part.table = torch.linspace(0, 1, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x) * self.scale * len(self.names) + self.shift + torch.ones(8, dtype=x.dtype)
        return x * self.part.table if self.kind == "x" else x


@pytest.mark.parametrize("how", [*CAPTURES, None], ids=str)
def test_constants_are_kept_move_with_the_net_and_are_no_part_of_its_state(how):
    torch.manual_seed(0)
    model, x = Attributes(), torch.randn(4, 8)
    net = dr.transform(model, (x,), rank=dr.Fixed(2), how=how)
    assert_alike(net, model, x)
    assert sorted(net.state_dict()) == sorted(model.state_dict())
    for each in (net, copy.deepcopy(net), dr.truncate(net)):
        assert each.double()(x.double()).dtype == torch.float64
    net.float()
    assert torch.equal(net(x), model(x))
    model.shift.zero_()
    assert not torch.equal(net(x), model(x)), "the constants are copies"


def test_hooks_of_the_callers_model_are_not_called_or_moved():
    calls = []
    model, x = linears(), torch.randn(4, 8)
    model.register_forward_hook(lambda *args: calls.append("model"))
    model[1].register_forward_hook(lambda *args: calls.append("tanh"))
    dr.capture(model, (x,))
    calls.clear()
    model(x)
    assert calls == ["tanh", "model"]


class Overwriting(Loops):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mul_(2))


@pytest.mark.parametrize("how", [*CAPTURES, None], ids=str)
def test_arguments_that_the_model_writes_into_stay_as_they_were(how):
    torch.manual_seed(0)
    model, x = Overwriting(), torch.randn(4, 8)
    keep = x.clone()
    net = dr.transform(model, (x,), rank=dr.Fixed(2), how=how)
    assert torch.equal(x, keep)
    assert torch.equal(net(x.clone()), model(x.clone()))


class Drawing(Loops):
    """Draws from every generator, in both modes."""

    def forward(self, x: Tensor) -> Tensor:
        noise = random.random() + float(np.random.rand())
        return F.dropout(self.fc(x), 0.5, training=True) + noise + torch.randn_like(x)


@pytest.mark.parametrize("how", [*CAPTURES, None], ids=str)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("make", [Drawing, Sampled])
def test_nothing_process_wide_changes(make, grad, how):
    model, x = make(), torch.randn(4, 8)

    def state() -> tuple[Any, ...]:
        return (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.backends.mha.get_fastpath_enabled(),
            torch.get_default_dtype(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_autocast_enabled("cpu"),
            random.getstate(),
            np.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist(),
            [module.training for module in model.modules()],
            {name: p.tolist() for name, p in model.named_parameters()},
        )

    with torch.set_grad_enabled(grad):
        before = state()
        net = dr.capture(model, (x,), how=how)
        plan = dr.make_plan(net, dr.Fixed(2), (x,))
        dr.factorize(net, plan)
        assert state() == before
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert all(p.grad is None for p in model.parameters())


@both_captures
def test_a_net_captured_without_gradients_trains(how):
    model, x = linears(), torch.randn(4, 8)
    with torch.no_grad():
        net = dr.capture(model, (x,), how=how)
    expected, got = gradients(model, x), gradients(net, x)
    assert expected.keys() == got.keys()
    assert all(torch.equal(got[name], gradient) for name, gradient in expected.items())


# What torch.export would get wrong by itself


SEEN: list[Tensor] = []


class Watching(nn.Module):
    """Hooks that the first forward registers, as libraries do to collect hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.hooked = nn.Linear(8, 8), nn.Linear(8, 8), False

    def forward(self, x: Tensor) -> dict[str, Any]:
        if not self.hooked:
            self.hooked = True
            for layer in (self.a, self.b):
                layer.register_forward_hook(lambda module, args, output: SEEN.append(output))
        SEEN.clear()
        x = self.b(torch.tanh(self.a(x.reshape(int(x.shape[0]), 8))))
        return {"out": x, "hidden": tuple(SEEN)}


def test_hooks_that_forward_registers_are_not_registered_twice():
    model, x = Watching(), torch.randn(4, 8)
    net = dr.capture(model, (x,))
    expected = copy.deepcopy(model)(x)
    assert len(expected["hidden"]) == 2
    assert same(net.eval()(x), expected)
    assert same(net.train()(x), expected)
    assert not model.hooked, "the model given is as it was"


class Rounded(torch.autograd.Function):
    """Rounding whose gradient passes straight through: torch.export would see a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class StraightThrough(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = linears(), linears()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(Rounded.apply(self.before(x)))


def test_a_function_with_a_backward_of_its_own_keeps_it():
    model, x = StraightThrough(), torch.randn(4, 8)
    with pytest.raises(dr.CaptureError, match=r"cannot be captured whole: Rounded has a backward of its own"):
        dr.capture(model, (x,), how=dr.Capture.EXPORT)
    net = dr.transform(model, (x,), rank=dr.Fixed(2))
    assert dr.plan_of(net).capture.startswith("module by module (2 parts")
    assert len(dr.plan_of(net).sites) == 4
    assert_alike(net, model, x)
    assert float(net.get_parameter("before.0.weight").detach().abs().sum()) > 0


class Traced(nn.Module):
    """Computes otherwise, by more than rounding, when it is traced."""

    def __init__(self, off: float) -> None:
        super().__init__()
        self.a, self.off = linears(), off

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != 8:
            raise ValueError
        x = self.a(x)
        return x * (1 + self.off) if torch.compiler.is_exporting() else x


def test_an_export_that_computes_something_else_is_not_taken_and_rounding_is_said():
    x = torch.randn(4, 8)
    net = dr.capture(Traced(1e-2), (x,))
    assert dr.make_plan(net, dr.Fixed(2), (x,)).capture.startswith("module by module (1 part ")
    assert_alike(net, Traced(1e-2), x)
    with pytest.raises(dr.CaptureError, match=r"as torch.export has it is not the same: its graph computes something"):
        dr.capture(Traced(1e-2), (x,), how=dr.Capture.EXPORT)
    close = dr.capture(Traced(1e-6), (x,))
    assert "by torch.export (off by rounding: " in dr.make_plan(close, dr.Fixed(2), (x,)).capture


def test_a_model_that_does_not_train_on_the_example_is_said_not_to_be_compared() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    plan = dr.plan_of(dr.transform(model, (torch.randn(1, 8),), rank=dr.Fixed(2)))
    said = "Training was not compared, since the model does not train on the example: ValueError: Expected more than 1"
    assert said in plan.capture
    assert f"captured    as one graph. {said}" in str(plan)
    assert "not compared" not in dr.plan_of(dr.transform(model, (torch.randn(2, 8),), rank=dr.Fixed(2))).capture


class Caught(nn.Module):
    """Reads arguments that it has no name for."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, *xs: Tensor, **batch: Tensor) -> Tensor:
        return self.b(self.a(xs[0] if xs else batch["x"]).relu()) * batch["mask"]


@pytest.mark.parametrize("named", [False, True])
def test_arguments_without_a_name_are_captured_by_export(named: bool) -> None:
    model, x, mask = Caught(), torch.randn(4, 8), torch.ones(4, 1)
    args, kwargs = ((), {"x": x, "mask": mask}) if named else ((x,), {"mask": mask})
    net = dr.transform(model, (args, kwargs), rank=dr.Fixed(2))
    assert [row.site.name for row in dr.plan_of(net).sites] == ["a.weight", "b.weight"]
    assert torch.equal(net(*args, **kwargs), model(*args, **kwargs))


def test_a_symbolic_graph_is_not_given_arguments_without_a_name() -> None:
    class Named(Caught):
        def forward(self, **batch: Tensor) -> Tensor:  # type: ignore[override]
            return self.a(batch["x"]) * batch["mask"]

    with pytest.raises(dr.CaptureError, match=r"^forward of Named reads \*\*batch, which a symbolic graph cannot be"):
        dr.capture(Named(), {"x": torch.randn(4, 8), "mask": torch.ones(4, 1)}, how=dr.Capture.SYMBOLIC)
