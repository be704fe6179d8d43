"""Phase changes as a whole: all or nothing, in bounded memory, with every refusal in words."""

from __future__ import annotations

import weakref

import pytest
import torch
from switching import assert_same, chain, snapshot, trained
from torch import nn

import dynrank_fx as dr
from dynrank_fx.phases import transition
from dynrank_fx.rewrite import switched_modules


@pytest.mark.parametrize("start", list(dr.Phase))
def test_non_finite_weights_at_one_site_leave_everything_as_it_was(start):
    net = chain()
    dr.enter_(net, start)
    optimizer = trained(net)
    last = list(switched_modules(net).values())[-1][0]
    with torch.no_grad():
        next(p for n, p in last.named_parameters() if n != "bias").view(-1)[3] = float("nan")
    before = snapshot(net, optimizer)
    other = dr.Phase.LOW if start is dr.Phase.FULL else dr.Phase.FULL
    with pytest.raises(dr.TransitionError, match=r"2\.weight has non-finite weights"):
        dr.enter_(net, other, optimizer)
    after = snapshot(net, optimizer)
    assert after[2] == before[2]
    for name, value in before[0].items():
        torch.testing.assert_close(after[0][name], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("start", list(dr.Phase))
@pytest.mark.parametrize(
    "error", [RuntimeError("out of memory"), KeyboardInterrupt(), OSError(28, "No space left on device")]
)
def test_a_failure_midway_undoes_the_sites_already_switched(start, error, monkeypatch):
    net = chain(4)
    dr.enter_(net, start)
    optimizer = trained(net)
    before, output = snapshot(net, optimizer), net(torch.ones(2, 16))
    places = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    names = iter(range(10))
    real = transition.replace_parameters

    def fails_at_the_third(*args, **kwargs):
        if next(names) == 2:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(transition, "replace_parameters", fails_at_the_third)
    expected = dr.TransitionError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        dr.enter_(net, dr.Phase.LOW if start is dr.Phase.FULL else dr.Phase.FULL, optimizer)
    assert_same(net, optimizer, before)
    assert torch.equal(net(torch.ones(2, 16)), output)
    assert [len(ids) for ids in places] == [len(group["params"]) for group in optimizer.param_groups]
    monkeypatch.undo()
    assert len(dr.enter_(net, dr.Phase.LOW if start is dr.Phase.FULL else dr.Phase.FULL, optimizer).changes) == 4


def test_each_sites_old_parameters_are_freed_before_the_next_site_changes(monkeypatch):
    net = chain(5)
    optimizer = trained(net)
    weights = [weakref.ref(modules[0].weight) for modules in switched_modules(net).values()]
    states = [weakref.ref(optimizer.state[ref()]["exp_avg"]) for ref in weights]
    alive: list[int] = []
    real = transition._change_sites

    def counting(*args, **kwargs):
        alive.append(sum(ref() is not None for ref in weights))
        assert sum(ref() is not None for ref in states) == alive[-1]
        return real(*args, **kwargs)

    monkeypatch.setattr(transition, "_change_sites", counting)
    dr.enter_(net, dr.Phase.LOW, optimizer)
    assert alive == [5, 4, 3, 2, 1]
    assert all(ref() is None for ref in weights)


def test_the_reported_error_is_that_of_the_discarded_singular_values():
    net = chain()
    weights = {name: modules[0].weight.detach().double() for name, modules in switched_modules(net).items()}
    result = dr.enter_(net, dr.Phase.LOW)
    for change in result.changes:
        s = torch.linalg.svdvals(weights[change.site])
        optimum = s[4:].square().sum().sqrt() / s.square().sum().sqrt()
        assert change.error == pytest.approx(float(optimum), rel=1e-3)
        assert (change.before, change.after) == (dr.Phase.FULL, dr.Phase.LOW)
        assert (change.replaced, change.by) == (("weight",), ("left", "right"))
    assert all(change.error == 0 for change in dr.enter_(net, dr.Phase.FULL).changes)
    assert not dr.enter_(net, dr.Phase.FULL)


def test_phases_per_site_by_name_and_pattern():
    net = chain()
    dr.enter_(net, {"0.*": dr.Phase.LOW, "2.weight": dr.Phase.LOW})
    assert [phase.name for phase in dr.phases_of(net).values()] == ["LOW", "FULL", "LOW"]
    with pytest.raises(dr.TransitionError, match=r"'head' matches no site"):
        dr.enter_(net, {"head": dr.Phase.LOW})


def test_replan_changes_ranks_in_both_phases_and_the_plan():
    net = chain()
    optimizer = trained(net)
    dr.enter_(net, {"0.weight": dr.Phase.LOW}, optimizer)
    before = switched_modules(net)["0.weight"][0].weight.detach()
    result = dr.replan_(net, dr.plan_of(net).with_ranks({"0.weight": 2, "1.weight": 7}), optimizer)
    assert [change.site for change in result.changes] == ["0.weight", "0.weight"], "inflated, then cut anew"
    left, right = switched_modules(net)["0.weight"][0].factors
    assert left.shape == (16, 2)
    s = torch.linalg.svdvals(before.double())
    torch.testing.assert_close(torch.linalg.norm(before - left @ right).double(), s[2:].norm(), rtol=1e-3, atol=1e-5)
    assert dr.phases_of(net)["0.weight"] is dr.Phase.LOW
    assert [row.rank for row in dr.plan_of(net).sites] == [2, 7, 4]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in net.parameters()}
    dr.enter_(net, dr.Phase.LOW, optimizer)
    assert switched_modules(net)["1.weight"][0].factors[0].shape == (16, 7)
    with pytest.raises(dr.PlanError, match="other sites"):
        dr.replan_(net, dr.plan_of(dr.transform(nn.Linear(8, 8), (torch.randn(2, 8),))))


def test_a_replanned_adaptor_keeps_its_function_and_starts_another_branch():
    net = chain().double().eval()
    dr.enter_(net, dr.Phase.ADAPTOR)
    site, x = switched_modules(net)["0.weight"][0], torch.randn(3, 16, dtype=torch.float64)
    with torch.no_grad():
        site.factors[0].normal_()
    before = net(x)
    dr.replan_(net, dr.plan_of(net).with_ranks({"0.weight": 2}))
    assert [tuple(factor.shape) for factor in site.factors] == [(16, 2), (2, 16)]
    assert not site.factors[0].any()
    assert dr.phases_of(net)["0.weight"] is dr.Phase.ADAPTOR
    torch.testing.assert_close(net(x), before)


def test_a_failed_replan_leaves_ranks_plan_and_weights():
    net = chain()
    optimizer = trained(net)
    dr.enter_(net, dr.Phase.LOW, optimizer)
    before, plan = snapshot(net, optimizer), dr.plan_of(net)
    last = switched_modules(net)["2.weight"][0].factors[0]
    last.grad = torch.ones_like(last)
    with pytest.raises(dr.TransitionError, match="pending gradient"):
        dr.replan_(net, plan.with_ranks({"0.weight": 2, "2.weight": 3}), optimizer)
    last.grad = None
    assert_same(net, optimizer, before)
    assert dr.plan_of(net) == plan
    assert [modules[0].rank for modules in switched_modules(net).values()] == [4, 4, 4]


def test_a_replan_that_fails_midway_is_undone_as_a_whole(monkeypatch):
    net = chain()
    optimizer = trained(net)
    dr.enter_(net, dr.Phase.LOW, optimizer)
    before, plan = snapshot(net, optimizer), dr.plan_of(net)
    calls = iter(range(10))
    real = transition.replace_parameters

    def fails_in_the_second_site(*args, **kwargs):
        if next(calls) == 3:
            raise RuntimeError("out of memory")
        return real(*args, **kwargs)

    monkeypatch.setattr(transition, "replace_parameters", fails_in_the_second_site)
    with pytest.raises(RuntimeError, match="out of memory"):
        dr.replan_(net, plan.with_ranks({"0.weight": 2, "2.weight": 3}), optimizer)
    assert_same(net, optimizer, before)
    assert dr.plan_of(net) == plan
    assert [modules[0].rank for modules in switched_modules(net).values()] == [4, 4, 4]


class TestRefusals:
    def test_pending_gradients(self):
        net = chain()
        dr.enter_(net, dr.Phase.LOW)
        net(torch.randn(2, 16)).sum().backward()
        with pytest.raises(dr.TransitionError, match=r"pending gradient.*zero_grad"):
            dr.enter_(net, dr.Phase.FULL)

    def test_an_optimizer_of_another_net(self):
        with pytest.raises(dr.TransitionError, match="holds no parameter of the sites"):
            dr.enter_(chain(), dr.Phase.LOW, torch.optim.SGD(chain().parameters(), lr=0.1))

    def test_a_net_without_sites(self):
        with pytest.raises(dr.TransitionError, match="no site to switch"):
            dr.enter_(nn.Linear(3, 3), dr.Phase.LOW)

    def test_adaptors_over_a_shared_factor(self):
        class Pair(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.a(x) * self.b(x)

        net = dr.transform(Pair(), (torch.randn(2, 16),), share_inputs=True)
        with pytest.raises(dr.TransitionError, match=r"share a factor.*without share_inputs"):
            dr.enter_(net, dr.Phase.ADAPTOR)

    def test_distributed_wrappers_and_dtensors(self, tmp_path):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import distribute_tensor

        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
        try:
            net = chain()
            wrapped = nn.parallel.DistributedDataParallel(net)
            with pytest.raises(dr.TransitionError, match="DistributedDataParallel"):
                dr.enter_(wrapped, dr.Phase.LOW)
            mesh = init_device_mesh("cpu", (1,))
            module = switched_modules(net)["0.weight"][0]
            module._parameters["weight"] = nn.Parameter(distribute_tensor(module.weight.detach(), mesh))
            with pytest.raises(dr.TransitionError, match=r"0\.weight is a DTensor"):
                dr.enter_(net, dr.Phase.LOW)
            sharded = torch.distributed.fsdp.fully_shard(chain(), mesh=mesh)
            with pytest.raises(dr.TransitionError, match="FSDP"):
                dr.enter_(sharded, dr.Phase.LOW)
        finally:
            torch.distributed.destroy_process_group()


def test_tied_modules_switch_together_and_their_state_is_carried_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    model[2].weight = model[0].weight
    net = dr.transform(model, (torch.randn(2, 16),))
    optimizer = trained(net)
    dr.enter_(net, dr.Phase.LOW, optimizer)
    first, second = net.get_submodule("0"), net.get_submodule("2")
    assert all(a is b for a, b in zip(first.factors, second.factors, strict=True))
    assert len(list(net.parameters())) == 4
    assert first.bias is not second.bias
    dr.enter_(net, dr.Phase.FULL, optimizer)
    assert first.weight is second.weight


def test_frozen_sites_switch_and_stay_frozen():
    net = chain()
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    dr.enter_(net, dr.Phase.LOW)
    assert not any(p.requires_grad for p in net.parameters())


def test_a_compiled_net_can_be_given_in_place_of_the_net():
    net = chain()
    compiled = torch.compile(net, backend="eager")
    assert len(dr.enter_(compiled, dr.Phase.LOW).changes) == 3
    assert set(dr.phases_of(compiled).values()) == {dr.Phase.LOW}
    assert dr.plan_of(compiled) is dr.plan_of(net)


def test_what_does_not_say_what_becomes_of_the_state() -> None:
    net = dr.transform(nn.Linear(8, 8), (torch.randn(2, 8),), rank=dr.Fixed(2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    sentence = r"^'reset' does not say what becomes of optimizer state: give one of Carry\.MOVE, Carry\.RESET$"
    for call in (
        lambda: dr.enter_(net, dr.Phase.LOW, optimizer, carry="reset"),
        lambda: dr.replan_(net, dr.reranked(net, dr.Fixed(1)), optimizer, carry="reset"),
    ):
        with pytest.raises(dr.TransitionError, match=sentence):
            call()
    with pytest.raises(dr.PlanError, match=r"0\.5 is no Plan: give what make_plan makes"):
        dr.replan_(net, 0.5, optimizer)
    with pytest.raises(dr.TransitionError, match="the pattern 3 matches no site; they are named like weight"):
        dr.enter_(net, {3: dr.Phase.LOW}, optimizer)
    assert dr.phases_of(net) == {"weight": dr.Phase.FULL}
    for ladder in (0, 2.5, "fine"):
        with pytest.raises(dr.PlanError, match=r"a grid of .* ranks cannot be: give ladder as a whole number"):
            dr.reranked(net, dr.Fixed(1), ladder=ladder)
