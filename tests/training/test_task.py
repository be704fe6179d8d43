"""One forward on a batch, and the evaluation: means over examples, in evaluation mode, nothing left behind."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition

import dynrank_fx as dr
from dynrank_fx.training import Settings, Task, autocast, evaluate
from dynrank_fx.training.task import apply

EAGER = Settings(epochs=1, compile=False)
X = torch.randn(20, 12, generator=torch.Generator().manual_seed(1))
Y = X.roll(3, 1)[:, :8].contiguous()


def made() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Dropout(0.2), nn.Tanh(), nn.Linear(16, 8))
    return dr.transform(model, (X[:2],), rank=dr.Fixed(2))


def loss(output: Tensor, batch: Sequence[Tensor]) -> Tensor:
    return F.mse_loss(output, batch[1])


def metric(output: Tensor, batch: Sequence[Tensor]) -> Tensor:
    return (output.sign() == batch[1].sign()).float().mean()


TASK = Task((), loss, lambda batch: ((batch[0],), {}), metric=metric)


def test_an_evaluation_is_the_mean_over_examples_however_they_are_batched() -> None:
    net = made()
    ragged = [(X[:9], Y[:9]), (X[9:11], Y[9:11]), (X[11:], Y[11:])]
    found = evaluate(net, replace(TASK, eval_data=ragged), EAGER)
    with torch.no_grad():
        output = net.eval().double()(X.double())
    expected = {"eval_loss": F.mse_loss(output, Y.double()).item(), "eval_metric": metric(output, (X, Y)).item()}
    assert found == pytest.approx(expected, rel=1e-5)


def test_without_a_metric_or_data_there_is_none() -> None:
    assert evaluate(made(), TASK, EAGER) == {}
    found = evaluate(made(), replace(TASK, eval_data=[(X, Y)], metric=None), EAGER)
    assert found["eval_metric"] is None
    with pytest.raises(dr.DynrankError, match=r"^eval_data\(\) gave no batch: leave it out"):
        evaluate(made(), replace(TASK, eval_data=[]), EAGER)


def test_a_forward_is_the_models_own_on_positional_and_keyword_inputs() -> None:
    net = made().eval()
    expected = net(X)
    for inputs in (lambda batch: ((batch[0],), {}), lambda batch: ((), {"input": batch[0]})):
        output, batch = apply(net, replace(TASK, inputs=inputs), EAGER, [X, Y])
        assert torch.equal(output, expected)
        assert all(map(torch.equal, batch, (X, Y)))


def test_a_mapping_is_a_batch_of_its_own_kind() -> None:
    """As a tokenizer gives it: with attributes, and tensors that pytree does not see."""
    task = replace(
        TASK,
        loss=lambda output, batch: F.mse_loss(output, batch["y"]),
        metric=None,
        inputs=lambda batch: ((batch.data["x"],), {}),
        eval_data=[UserDict(x=X[:5], y=Y[:5]), UserDict(x=X[5:], y=Y[5:])],
    )
    net = made().eval()
    assert evaluate(net, task, EAGER)["eval_loss"] == pytest.approx(F.mse_loss(net(X), Y).item(), rel=1e-5)
    meta = Settings(epochs=1, compile=False, device="meta")
    _, batch = apply(net.to("meta"), task, meta, UserDict(x=X, y=Y))
    assert isinstance(batch, UserDict)
    assert batch["y"].is_meta


def test_autocast_is_where_it_is_asked_for_and_ends_with_its_block() -> None:
    for amp in (None, torch.bfloat16, torch.float16):
        with autocast(replace(EAGER, amp=amp)):
            assert torch.is_autocast_enabled("cpu") == (amp is not None)
            assert F.linear(X, torch.ones(4, 12)).dtype == (amp or torch.float32)
        assert not torch.is_autocast_enabled("cpu")


def test_evaluation_leaves_every_module_in_its_mode() -> None:
    net = made()
    task = replace(TASK, eval_data=[(X, Y)])
    for training in (True, False):
        net.train(training)
        net.get_submodule("1").train(not training)
        modes = {name: module.training for name, module in net.named_modules()}
        first, second = evaluate(net, task, EAGER), evaluate(net, task, EAGER)
        assert first == second  # no dropout
        assert {name: module.training for name, module in net.named_modules()} == modes
    with torch.no_grad():
        net.train()
        assert not torch.equal(net(X), net(X))  # the graph of the training mode runs again


def test_evaluation_that_fails_leaves_the_modes_too() -> None:
    net = made().train()

    def failing(output: Tensor, batch: Any) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError):
        evaluate(net, replace(TASK, loss=failing, eval_data=[(X, Y)]), EAGER)
    assert all(module.training for module in net.modules())


@pytest.mark.parametrize("once", [lambda: (b for b in [(X, Y)]), lambda: map(str, "ab"), lambda: iter([(X, Y)])])
@pytest.mark.parametrize("name", ["train_data", "eval_data"])
def test_data_that_give_their_batches_once_are_refused_before_training(name: str, once: Callable[[], Any]) -> None:
    with pytest.raises(dr.DynrankError, match=rf"^{name}\(\) gave a \w+, whose batches can be gone through only once"):
        replace(TASK, **{name: once()})


def test_a_loader_that_begins_anew_by_itself_is_taken() -> None:
    class Anew:
        def __iter__(self) -> Iterator[Any]:
            self.batches = iter([(X, Y)])
            return self

        def __next__(self) -> Any:
            return next(self.batches)

    task = replace(TASK, eval_data=Anew())
    assert evaluate(made(), task, EAGER) == evaluate(made(), task, EAGER)


class Block(nn.Module):
    """What a budget can do without: two norms and an activation around products."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.gelu(self.up(self.norm(x)).sin()).cos())
        return y


def test_what_a_budget_of_activation_memory_holds_for_is_the_models_own_forward() -> None:
    seen = []

    class Watched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch._functorch.config.activation_memory_budget)
            return x

    for budget in (None, 0.5):
        apply(Watched(), TASK, Settings(epochs=1, activation_memory=budget), [X, Y])
    assert [*seen, torch._functorch.config.activation_memory_budget] == [1.0, 0.5, 1.0]


@pytest.mark.fuzz
def test_activation_memory_keeps_less_for_the_backward_pass_and_changes_no_gradient() -> None:
    """What the forward graph hands on is counted in its outputs, as torch splits it for the kernels behind."""
    torch.manual_seed(0)
    net, kept = dr.transform(Block(), (X[:2],), rank=dr.Fixed(2)), list[int]()
    dr.enter_(net, dr.Phase.LOW)

    def forward_graph(graph: torch.fx.GraphModule, _: object) -> Any:
        values = [each.meta["val"] for each in graph.graph.output_node().args[0] if isinstance(each, torch.fx.Node)]
        kept.append(sum(value.nbytes for value in values if isinstance(value, Tensor)))
        return make_boxed_func(graph.forward)

    splitting = aot_autograd(
        fw_compiler=forward_graph,
        bw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
    )
    gradients = []
    for budget in (None, 0.3):
        settings = Settings(epochs=1, activation_memory=budget)
        output, _ = apply(torch.compile(net, backend=splitting), TASK, settings, [X, Y])
        gradients.append(torch.autograd.grad(loss(output, [X, Y]), list(net.parameters())))
        torch._dynamo.reset()
    whole, less = kept
    assert less < 0.8 * whole
    for each, other in zip(*gradients, strict=True):
        torch.testing.assert_close(each, other)
