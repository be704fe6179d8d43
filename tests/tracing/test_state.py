"""Loading a state is torch's own: the same tensors, answers, messages and hooks."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.tracing import load_as_its_class_, load_state_

State = dict[str, Any]


class Extra(nn.Module):
    """With what a module may have beside tensors, and a name that others begin with."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.ab, self.none = nn.Linear(3, 3), nn.Linear(3, 3), None
        self.note: object = "mine"

    def get_extra_state(self) -> object:
        return {"note": self.note}

    def set_extra_state(self, state: Any) -> None:
        self.note = state["note"]

    def forward(self, x: Tensor) -> Tensor:
        return self.ab(self.a(x))


def model() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), Extra(), nn.Sequential(nn.Linear(3, 3, bias=False)))
    made[3][0].weight = made[0].weight
    return made


def saved() -> State:
    torch.manual_seed(1)
    made = model()
    with torch.no_grad():
        for value in made.state_dict().values():
            if isinstance(value, Tensor):
                value.copy_(torch.randint(0, 9, value.shape))
    made[2].note = "other"
    return made.state_dict()


def without(*names: str) -> Callable[[State], State]:
    def changed(state: State) -> State:
        for name in names:
            del state[name]
        return state

    return changed


def plain(state: State) -> State:
    """Without the versions that torch notes: BatchNorm then takes the state for an old one."""
    return dict(state)


CHANGES: dict[str, Callable[[State], State]] = {
    "the same": lambda state: state,
    "no versions": lambda state: without("1.num_batches_tracked")(plain(state)),
    "missing": without("0.weight", "2.ab.bias", "2._extra_state"),
    "unexpected": lambda state: OrderedDict([*state.items(), ("2.c.weight", torch.ones(1)), ("top", torch.ones(1))]),
    "both": lambda state: without("2.a.bias")({**state, "3.0.more": torch.ones(1), "2a.bias": torch.ones(1)}),
    "another shape": lambda state: {**state, "2.a.weight": torch.ones(4, 4), "1.running_mean": torch.ones(9)},
    "no tensor": lambda state: {**state, "0.bias": "text"},
}


def outcome(load: Callable, made: nn.Module, state: State, **options: bool) -> list[object]:
    """What a load says, and all that the model then has."""
    calls: list[object] = []
    for name, module in made.named_modules():
        module.register_load_state_dict_pre_hook(lambda *given, name=name: calls.append((name, sorted(given[1]))))
        module.register_load_state_dict_post_hook(lambda _, keys, name=name: calls.append((name, str(keys))))
    try:
        said = str(load(made, state, **options))
    except RuntimeError as error:
        said = str(error)
    values = {name: value.tolist() for name, value in made.state_dict().items() if isinstance(value, Tensor)}
    trains = [parameter.requires_grad for parameter in made.parameters()]
    return [said, calls, values, trains, made[2].note, made[3][0].weight is made[0].weight]


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_it_does_and_says_what_torch_does(change: Callable, strict: bool, assign: bool) -> None:
    ours, theirs, given = model(), model(), change(saved())
    for made in (ours, theirs):
        made[2].a.weight.requires_grad_(False)
    before = list(given)
    options = {"strict": strict, "assign": assign}
    expected = outcome(nn.Module.load_state_dict, theirs, copy.deepcopy(given), **options)
    assert outcome(load_state_, ours, given, **options) == expected
    assert list(given) == before, "the caller's own is as it was"


def test_assigned_tensors_are_the_states_own() -> None:
    made, state = model(), saved()
    load_state_(made, state, assign=True)
    assert made[0].bias.data_ptr() == state["0.bias"].data_ptr()


def test_what_is_no_state_is_refused_as_by_torch() -> None:
    with pytest.raises(TypeError, match="Expected state_dict to be dict-like, got <class 'list'>"):
        load_state_(model(), [])  # type: ignore[arg-type]


def test_a_net_loads_by_it() -> None:
    net = dr.transform(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), (torch.randn(2, 8),), rank=dr.Fixed(2))
    state = {name: torch.ones_like(value) for name, value in net.state_dict().items()}
    assert str(net.load_state_dict(state)) == "<All keys matched successfully>"
    assert all(bool((value == 1).all()) for value in net.parameters())
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "more"'):
        net.load_state_dict({**state, "more": torch.ones(1)})


class Asked(nn.Sequential):
    """With a way of its own to load a state."""

    def load_state_dict(self, state: State, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict({name.removeprefix("old."): value for name, value in state.items()}, strict)


def test_a_class_that_loads_in_its_own_way_is_asked() -> None:
    for made, prefix in ((Asked(nn.Linear(3, 3)), "old."), (nn.Sequential(nn.Linear(3, 3)), "")):
        state = {f"{prefix}{name}": torch.ones_like(value) for name, value in made.state_dict().items()}
        load_as_its_class_(made, state)
        assert all(bool((value == 1).all()) for value in made.parameters())
        with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "more"'):
            load_as_its_class_(made, {**state, "more": torch.ones(1)})


def test_a_state_of_many_layers_is_loaded_in_a_time_that_grows_with_their_number() -> None:
    """By the names that are looked at, which torch's own does once for each layer and name."""

    class Counted(str):
        seen = 0

        def startswith(self, *prefix: Any) -> bool:
            Counted.seen += 1
            return super().startswith(*prefix)

        def removeprefix(self, prefix: str) -> str:
            Counted.seen += 1
            return super().removeprefix(prefix)

    def looked_at(load: Callable[[nn.Module, State], object], layers: int) -> int:
        made = nn.Sequential(*[nn.Linear(1, 1) for _ in range(layers)])
        Counted.seen = 0
        load(made, {Counted(name): value for name, value in made.state_dict().items()})
        return Counted.seen

    def growth(load: Callable[[nn.Module, State], object]) -> float:
        return looked_at(load, 80) / looked_at(load, 20)

    assert growth(nn.Module.load_state_dict) > 10  # and this is why
    assert growth(load_as_its_class_) < 5
