"""An optimizer's groups and state, when one parameter takes the place of others."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import dynrank_fx as dr
from dynrank_fx.phases.groups import group_of, in_slots, laid_out_as, place_of, put_back, swap_parameters


def test_each_new_parameter_stands_in_the_group_and_place_of_the_one_it_replaces():
    torch.manual_seed(0)
    net = dr.transform(
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)),
        (torch.randn(2, 8),),
        rank=dr.Ratio(0.5),
        allow_unprofitable=True,
    )
    first, second = (net.get_submodule(name) for name in "01")
    optimizer = torch.optim.AdamW(
        [
            {"params": [("0.weight", first.weight), ("0.bias", first.bias)], "lr": 0.1, "weight_decay": 0.5},
            {"params": [("1.bias", second.bias), ("1.weight", second.weight)], "lr": 0.2},
        ]
    )
    dr.enter_(net, dr.Phase.LOW, optimizer)
    one, two = optimizer.param_groups
    assert [id(p) for p in one["params"]] == [id(p) for p in (*first.factors, first.bias)]
    assert [id(p) for p in two["params"]] == [id(p) for p in (second.bias, *second.factors)]
    assert one["param_names"] == ["0.left", "0.right", "0.bias"]
    assert (one["lr"], one["weight_decay"], two["lr"]) == (0.1, 0.5, 0.2)
    dr.enter_(net, dr.Phase.FULL, optimizer)
    assert one["param_names"] == ["0.weight", "0.bias"]
    assert [id(p) for p in two["params"]] == [id(second.bias), id(second.weight)]


# The groups by themselves


def three(named: bool = False) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
    """An AdamW that has stepped, over three parameters in two groups."""
    torch.manual_seed(0)
    held = [nn.Parameter(torch.randn(2, 2)) for _ in range(3)]
    given = [(f"layer.{name}", p) for name, p in zip("abc", held, strict=True)] if named else held
    optimizer = torch.optim.AdamW([{"params": given[:2], "lr": 0.1}, {"params": given[2:], "lr": 0.2}])
    for parameter in held:
        parameter.grad = torch.ones(2, 2)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer, held


def ids(optimizer: torch.optim.Optimizer) -> list[list[int]]:
    return [[id(p) for p in group["params"]] for group in optimizer.param_groups]


def test_a_parameter_is_found_by_identity_with_its_name():
    optimizer, (a, b, c) = three(named=True)
    other = three()[0]
    with in_slots([optimizer, other]):
        assert place_of(optimizer, b) == (0, 1, "layer.b")
        assert place_of(optimizer, nn.Parameter(b.detach().clone())) is None, "an equal one is another"
        assert group_of(optimizer, c) is optimizer.param_groups[1]
        assert group_of(optimizer, nn.Parameter(torch.ones(1))) is None
        assert place_of(other, a) is None


@pytest.mark.parametrize("named", [True, False])
def test_several_take_the_place_of_one_and_one_that_of_the_first_of_several(named):
    optimizer, (a, b, c) = three(named)
    left, right = nn.Parameter(torch.ones(2, 1)), nn.Parameter(torch.ones(1, 2))
    states = [{"step": torch.tensor(3.0)}, {}]
    with in_slots([optimizer]):
        swap_parameters(optimizer, [a], [left, right], states, ["left", "right"])
    assert ids(optimizer) == [[id(left), id(right), id(b)], [id(c)]]
    assert optimizer.state[left]["step"] == 3
    assert right not in optimizer.state
    assert a not in optimizer.state, "nothing of the old one remains"
    if named:
        assert optimizer.param_groups[0]["param_names"] == ["layer.left", "layer.right", "layer.b"]
    weight = nn.Parameter(torch.ones(2, 2))
    with in_slots([optimizer]):
        swap_parameters(optimizer, [left, right], [weight], [{}], ["weight"])
    assert ids(optimizer) == [[id(weight), id(b)], [id(c)]]
    if named:
        assert optimizer.param_groups[0]["param_names"] == ["layer.weight", "layer.b"]


def test_what_an_optimizer_does_not_train_is_left_out_of_it():
    optimizer, _ = three()
    before, one, other = ids(optimizer), nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    with in_slots([optimizer]):
        swap_parameters(optimizer, [one], [other], [{"step": 1}], ["weight"])
    assert ids(optimizer) == before
    assert len(optimizer.state) == 3


@pytest.mark.parametrize("named", [True, False])
def test_parameters_are_put_back_at_their_places_with_their_states(named):
    optimizer, (a, _, c) = three(named)
    before, held = ids(optimizer), copy.deepcopy(optimizer.state_dict())
    states = [dict(optimizer.state[p]) for p in (c, a)]
    with in_slots([optimizer]):
        places = [place_of(optimizer, p) for p in (c, a)]
        new = nn.Parameter(torch.ones(3))
        swap_parameters(optimizer, [c, a], [new], [{"step": 1}], ["weight"])
        swap_parameters(optimizer, [new], [], [], [])
        put_back(optimizer, [c, a], states, places)
    assert ids(optimizer) == before
    after = optimizer.state_dict()
    assert after["param_groups"] == held["param_groups"]
    for key, state in held["state"].items():
        assert all(torch.equal(value, after["state"][key][name]) for name, value in state.items())


def test_groups_are_as_before_when_nothing_was_exchanged_or_something_failed():
    optimizer, _ = three(named=True)
    before, names = ids(optimizer), [list(group["param_names"]) for group in optimizer.param_groups]
    with pytest.raises(KeyboardInterrupt), in_slots([optimizer, optimizer]):
        raise KeyboardInterrupt
    assert ids(optimizer) == before
    assert [group["param_names"] for group in optimizer.param_groups] == names


def test_state_of_the_parameters_shape_takes_its_memory_format():
    parameter = nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    state = {"exp_avg": torch.randn(4, 3, 2, 2).double(), "step": torch.tensor(2.0), "other": torch.randn(3), "n": 1}
    laid = laid_out_as(parameter, state)
    assert laid["exp_avg"].stride() == parameter.stride()
    assert laid["exp_avg"].dtype == torch.float64
    assert torch.equal(laid["exp_avg"], state["exp_avg"])
    assert laid["step"] is state["step"]
    assert laid["other"] is state["other"]
    assert laid["n"] == 1
