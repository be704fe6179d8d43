"""The contracts as properties of random models: a few hundred every day, the same ones each time, and thousands with
``make fuzz`` (FUZZ_EXAMPLES says how many), which also exports to ONNX and compiles.

A failure prints a recipe: ``Recipe(...).build()`` and ``.example()`` make its model and inputs again.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from random_models import Recipe, models
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import dynrank_fx as dr
from dynrank_fx.rewrite import Switched, switched_modules
from dynrank_fx.tracing import slow_attention

SYMBOLIC, EXPORT = dr.Capture.SYMBOLIC, dr.Capture.EXPORT
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "2000"))
EVERYDAY = settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),  # making a failure smaller takes minutes: `make fuzz` does
    suppress_health_check=list(HealthCheck),
)
THOROUGH = settings(deadline=None, print_blob=True, suppress_health_check=list(HealthCheck))

pytestmark = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:The tensor attributes self.*_flat_weights"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk"),
]


@pytest.fixture(autouse=True, scope="module")
def one_way_of_attention():
    with slow_attention():
        yield


def transform(model: nn.Module, recipe: Recipe, how: dr.Capture | None, ratio: float = 1.0) -> nn.Module:
    example = recipe.example()
    return dr.transform(model, example, rank=dr.Ratio(ratio), how=how, allow_unprofitable=True, allow_empty=True)


def floats(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def run(model: nn.Module, recipe: Recipe, *, batch: int = 3, seed: int = 1) -> Any:
    args, kwargs = recipe.example(batch, seed)
    torch.manual_seed(7)
    return model(*args, **kwargs)


def step(model: nn.Module, recipe: Recipe) -> None:
    """Gradients of one training step, where anything trains."""
    loss = sum(leaf.square().mean() for leaf in floats(run(model.train(), recipe)))
    if loss.requires_grad:
        loss.backward()


def assert_same(got: Any, expected: Any, rtol: float = 0.0, atol: float = 0.0) -> None:
    """The same structure and, within the tolerance, numbers."""
    assert pytree.tree_structure(got) == pytree.tree_structure(expected)
    for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(expected), strict=True):
        if isinstance(b, Tensor):
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True)
        else:
            assert a == b


def assert_close(got: Any, expected: Any) -> None:
    """Equal but for float64's rounding, of which a deep model makes more."""
    largest = max((float(leaf.detach().abs().max()) for leaf in floats(expected)), default=0.0)
    assert_same(got, expected, rtol=1e-7, atol=1e-8 * (1 + largest))


def held(net: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters in FULL by the names they have in the original, aliases included."""
    by_name = dict(net.named_parameters(remove_duplicate=False))
    for path, module in net.named_modules(remove_duplicate=False):
        if isinstance(module, Switched) and module.bare:
            by_name[path] = by_name.pop(f"{path}.weight")
    return by_name


def ties(parameters: dict[str, nn.Parameter]) -> set[frozenset[str]]:
    groups: dict[int, set[str]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(id(parameter), set()).add(name)
    return {frozenset(group) for group in groups.values()}


def frozen(model: nn.Module) -> dict[str, bool]:
    return {name: not p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}


def enter(net: nn.Module, phase: dr.Phase, optimizer: torch.optim.Optimizer | None = None) -> None:
    if switched_modules(net):  # a net without sites has no phase to enter
        dr.enter_(net, phase, optimizer)


# The contracts


def full_is_the_original(recipe: Recipe, how: dr.Capture | None) -> None:
    """Outputs in both modes, gradients of a step and the buffers after it, bit for bit."""
    recipe = replace(recipe, apart=False)  # modes are switched as a whole here
    model = recipe.build()
    net = transform(model, recipe, how)
    for mode in (False, True):
        assert_same(run(net.train(mode), recipe), run(model.train(mode), recipe))
    step(model, recipe)
    step(net, recipe)
    mine = held(net)
    assert mine.keys() == dict(model.named_parameters(remove_duplicate=False)).keys()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert mine[name].requires_grad == parameter.requires_grad, name
        assert torch.equal(mine[name], parameter), name
        assert (mine[name].grad is None) == (parameter.grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(mine[name].grad, parameter.grad, rtol=0, atol=0, msg=name)
    buffers = dict(net.named_buffers())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffers[name], buffer), name


def full_rank_preserves(recipe: Recipe, how: dr.Capture | None) -> None:
    """LOW at full rank gives the outputs of the original, and so does FULL after it."""
    recipe = replace(recipe, dtype=torch.float64)
    model = recipe.build().eval()
    net = transform(model, recipe, how).eval()
    for phase in (dr.Phase.LOW, dr.Phase.FULL):
        enter(net, phase)
        assert_close(run(net, recipe), run(model, recipe))


def low_is_the_best_of_its_rank(recipe: Recipe, how: dr.Capture | None) -> None:
    """Every site's weight against the singular values that its rank leaves out; frozen stays frozen."""
    model = recipe.build()
    weights = dict(model.named_parameters(remove_duplicate=False))
    net = transform(model, recipe, how, 0.5)
    enter(net, dr.Phase.LOW)
    plan, sites = dr.plan_of(net), switched_modules(net)
    assert sum(p.numel() for p in net.parameters()) == plan.low_params
    for row in plan.sites:
        weight, module = weights[row.site.name].detach(), sites[row.site.name][0]
        assert all(factor.requires_grad == weights[row.site.name].requires_grad for factor in module.factors)
        if row.layout.name in ("linear", "channel"):
            groups = getattr(row.site.uses[0].op, "groups", 1)
            view = (groups, len(weight) // groups, -1) if row.layout.name == "channel" else (-1, *weight.shape[-2:])
            matrices = [w.reshape(view).double() for w in (weight, module.weight)]
            lost = torch.linalg.matrix_norm(matrices[0] - matrices[1])
            least = torch.linalg.svdvals(matrices[0])[:, row.rank :].square().sum(-1).sqrt()
            rounding = 8 * torch.finfo(weight.dtype).eps * torch.linalg.matrix_norm(matrices[0])
            assert bool((lost <= 1.001 * least + rounding).all()), (row.site.name, lost, least)


def truncate_is_low(recipe: Recipe, how: dr.Capture | None) -> None:
    """On another batch size, with nothing of the package left; inline equals the net; FULL after LOW keeps it."""
    recipe = replace(recipe, dtype=torch.float64)
    net = transform(recipe.build(), recipe, how, 0.5).eval()
    if not switched_modules(net):
        return
    enter(net, dr.Phase.LOW)
    small = dr.truncate(net)
    assert not any(type(module).__module__.startswith("dynrank_fx") for module in small.modules())
    assert sum(p.numel() for p in small.parameters()) <= dr.plan_of(net).low_params
    for batch in (3, 5, 1):
        low = run(copy.deepcopy(net), recipe, batch=batch, seed=batch)  # a copy: buffers may count
        assert_close(run(copy.deepcopy(small), recipe, batch=batch, seed=batch), low)
    training = copy.deepcopy(net).train()
    assert_close(run(dr.inline(training), recipe), run(training, recipe))
    low = run(copy.deepcopy(net), recipe)
    enter(net, dr.Phase.FULL)
    assert_close(run(net, recipe), low)


def the_optimizer_follows(recipe: Recipe, how: dr.Capture | None) -> None:
    """It holds the net's parameters, no others, in every phase and at another rank; they stay finite."""
    net = transform(recipe.build(), recipe, how, 0.5)
    if not list(net.parameters()):
        return
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    least = dr.plan_of(net).with_ranks(dict.fromkeys(switched_modules(net), 1))
    for phase in (dr.Phase.FULL, dr.Phase.LOW, dr.Phase.FULL, dr.Phase.LOW, None):
        if phase is None:
            dr.replan_(net, least, optimizer)
            assert sum(p.numel() for p in net.parameters()) == least.low_params
        else:
            enter(net, phase, optimizer)
        present = [id(p) for p in net.parameters()]
        assert sorted(id(p) for group in optimizer.param_groups for p in group["params"]) == sorted(present)
        assert {id(p) for p in optimizer.state} <= set(present)
        step(net, recipe)
        optimizer.step()
        optimizer.zero_grad()
        for name, parameter in net.named_parameters():
            assert bool(torch.isfinite(parameter).all()), name
            state = [value for value in optimizer.state.get(parameter, {}).values() if value.ndim]
            assert all(value.shape == parameter.shape and bool(torch.isfinite(value).all()) for value in state), name


def names_are_the_originals(recipe: Recipe, how: dr.Capture | None) -> None:
    """Weights load by name in both directions; what is tied stays tied, in LOW too."""
    model = recipe.build()
    net = transform(model, recipe, how)
    assert sorted(net.state_dict()) == sorted(model.state_dict())
    wanted = ties(dict(model.named_parameters(remove_duplicate=False)))
    assert ties(held(net)) == wanted
    other = replace(recipe, seed=recipe.seed + 1).build().eval()
    net.load_state_dict(other.state_dict())
    volatile = {name: b for name, b in other.named_buffers() if name not in other.state_dict()}
    for name, buffer in net.named_buffers():
        if name in volatile:
            buffer.copy_(volatile[name])
    expected = run(copy.deepcopy(other), recipe)
    assert_same(run(copy.deepcopy(net).eval(), recipe), expected)
    model.load_state_dict(net.state_dict())
    for name, buffer in model.named_buffers():
        if name in volatile:
            buffer.copy_(volatile[name])
    assert_same(run(model.eval(), recipe), expected)
    enter(net, dr.Phase.LOW)
    for modules in switched_modules(net).values():
        assert all(module.factors[0] is modules[0].factors[0] for module in modules)
        assert all(module.factors[1] is modules[0].factors[1] for module in modules)
    enter(net, dr.Phase.FULL)
    assert ties(held(net)) == wanted


def every_matrix_is_listed(recipe: Recipe, how: dr.Capture | None) -> None:
    """As a site or with a reason; and the plan is the same after its file."""
    model = recipe.build()
    plan = dr.plan_of(transform(model, recipe, how, 0.5))
    sites = [row.site for row in plan.sites]
    listed = [name for each in (*sites, *plan.skipped) for name in (each.name, *each.aliases)]
    matrices = [name for name, p in model.named_parameters(remove_duplicate=False) if p.ndim >= 2]
    assert sorted(listed) == sorted(matrices)
    assert all(skipped.reason and "unsupported" not in skipped.reason for skipped in plan.skipped)
    assert plan.total_params == sum(p.numel() for p in model.parameters())
    assert dr.Plan.from_json(plan.to_json()) == plan


def the_callers_model_is_untouched(recipe: Recipe, how: dr.Capture | None) -> None:
    """Values, modes, gradients and random state; and a copy of the net is another net that does the same."""
    model = recipe.build()
    before, modes, still = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()], frozen(model)
    random = torch.get_rng_state()
    net = transform(model, recipe, how, 0.5)
    assert torch.equal(torch.get_rng_state(), random)
    twin = copy.deepcopy(net)
    enter(twin, dr.Phase.LOW)
    step(twin, recipe)
    assert_same(model.state_dict(), before)
    assert [m.training for m in model.modules()] == modes
    assert frozen(model) == still
    assert all(p.grad is None for p in [*model.parameters(), *net.parameters()])
    assert_same(run(copy.deepcopy(net), recipe), run(copy.deepcopy(model), recipe))
    assert_same(run(net.eval(), recipe), run(model.eval(), recipe))
    again = copy.deepcopy(twin)
    for mode in (False, True):
        assert_same(run(again.train(mode), recipe), run(twin.train(mode), recipe))


def saved_and_loaded_it_is_the_same(recipe: Recipe, _: dr.Capture | None) -> None:
    """In LOW: parameters, buffers and plan. Loading chooses the way of capture itself."""
    net = transform(recipe.build(), recipe, None, 0.5)
    enter(net, dr.Phase.LOW)
    with tempfile.TemporaryDirectory() as folder:
        dr.save(net, Path(folder) / "net")
        again = dr.load(Path(folder) / "net", replace(recipe, seed=recipe.seed + 1).build(), recipe.example())
    assert_same(again.state_dict(), net.state_dict())
    assert dr.plan_of(again) == dr.plan_of(net)


Contract = Callable[[Recipe, dr.Capture | None], None]

CONTRACTS: dict[str, Contract] = {
    contract.__name__: contract
    for contract in (
        full_is_the_original,
        full_rank_preserves,
        low_is_the_best_of_its_rank,
        truncate_is_low,
        the_optimizer_follows,
        names_are_the_originals,
        every_matrix_is_listed,
        the_callers_model_is_untouched,
        saved_and_loaded_it_is_the_same,
    )
}
every_contract = pytest.mark.parametrize("name", CONTRACTS)


def hold(name: str, profile: settings, how: Sequence[dr.Capture | None]) -> None:
    """The contract of this name for as many models as the profile says."""

    @profile
    @given(models(symbolic=SYMBOLIC in how), st.sampled_from(how))
    def check(recipe: Recipe, how: dr.Capture | None) -> None:
        CONTRACTS[name](recipe, how)

    check()


@every_contract
def test_symbolic_nets(name):
    hold(name, settings(EVERYDAY, max_examples=10), [SYMBOLIC])


@settings(EVERYDAY, max_examples=4)
@given(models(symbolic=False), st.sampled_from(list(CONTRACTS)), st.sampled_from([EXPORT, None]))
def test_exported_nets(recipe, name, how):
    CONTRACTS[name](recipe, how)


# Thousands, and what is slow


@pytest.mark.fuzz
@every_contract
def test_many_symbolic_nets(name):
    hold(name, settings(THOROUGH, max_examples=EXAMPLES), [SYMBOLIC])


@pytest.mark.fuzz
@every_contract
def test_many_exported_nets(name):
    hold(name, settings(THOROUGH, max_examples=max(1, EXAMPLES // 10)), [EXPORT, None])


def onnx_report(module: nn.Module, recipe: Recipe) -> dr.ExportReport | None:
    """None where ONNX, or onnxruntime, has not what the module needs; a disagreement is an error."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return dr.export_onnx(module, recipe.example(), Path(folder) / "model.onnx")
        except dr.ExportError as error:
            if "differ" in str(error):
                raise
            return None


@pytest.mark.fuzz
@settings(THOROUGH, max_examples=max(1, EXAMPLES // 20))
@given(models())
def test_a_truncated_net_exports_to_onnx_where_its_model_does(recipe):
    recipe = replace(recipe, dtype=torch.float32)
    model = recipe.build()
    net = transform(model, recipe, SYMBOLIC, 0.5)
    assume(switched_modules(net))
    whole = onnx_report(model, recipe)
    assume(whole is not None)
    report, plan = onnx_report(dr.truncate(net), recipe), dr.plan_of(net)
    assert report is not None
    assert whole is not None
    # Beside its parameters a file has buffers and constants of the exporter's own: as many as that of the model.
    assert report.params - plan.low_params <= whole.params - plan.total_params


def compiled(module: nn.Module, recipe: Recipe) -> Any:
    """What the compiled module gives, or None where torch.compile cannot take it whole."""
    torch._dynamo.reset()
    try:
        return run(torch.compile(copy.deepcopy(module), fullgraph=True), recipe)
    except torch._dynamo.exc.TorchDynamoException:
        return None


def close(got: Any, expected: Any) -> bool:
    try:
        assert_close(got, expected)
    except AssertionError:
        return False
    return True


@pytest.mark.fuzz
@settings(THOROUGH, max_examples=max(1, EXAMPLES // 100))
@given(models())
def test_a_net_compiles_whole_where_its_model_does(recipe):
    recipe = replace(recipe, dtype=torch.float64)
    model = recipe.build().eval()
    net = transform(model, recipe, SYMBOLIC, 0.5).eval()
    assume(switched_modules(net))
    theirs = compiled(model, recipe)
    assume(theirs is not None)
    # Torch 2.13 compiles a model wrongly that changes a buffer in place before it uses it: a net in FULL then as well.
    rightly = close(theirs, run(copy.deepcopy(model), recipe))
    for phase in (dr.Phase.FULL, dr.Phase.LOW):
        enter(net, phase)
        expected = run(copy.deepcopy(net), recipe)
        got = compiled(net, recipe)
        assert got is not None
        if phase is dr.Phase.FULL:
            assert_close(got, theirs)
        if rightly:
            assert_close(got, expected)
