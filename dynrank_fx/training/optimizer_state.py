"""The state of optimizers by the names of their parameters, for nets whose parameters may lie in shards.

torch's ``state_dict`` numbers the parameters, which says nothing where another number of processes makes them anew, or
shards them in another way. Here a tensor of the state has the name ``optimizer.0.exp_avg.blocks.0.weight``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..aliases import Group, StateDict
from ..errors import StoreError
from ..processes import is_part, part_as
from ..text import counted

Names: TypeAlias = Mapping[int, str]
"""The names of a net's parameters, by their ids."""

_TENSOR, _VALUE = "tensor", "value"


def named_state(optimizers: Sequence[Optimizer], names: Names) -> tuple[list[StateDict], dict[str, Tensor]]:
    """What the optimizers hold as plain values, and the tensors of their states apart, by name.

    Raises StoreError for a parameter that is not the net's, and for state that only this process has.
    """
    told, tensors = list[StateDict](), dict[str, Tensor]()
    for number, optimizer in enumerate(optimizers):
        groups = [
            {"options": options_of(group), "names": [_name(p, names) for p in group["params"]]}
            for group in optimizer.param_groups
        ]
        states: dict[str, StateDict] = {}
        for parameter, state in optimizer.state.items():
            name = _name(parameter, names)
            states[name] = {}
            for key, value in state.items():
                states[name][key] = _described(value, parameter)
                if isinstance(value, Tensor):
                    _check_shared(value, parameter, f"{key} of {name}")
                    tensors[_full_name(number, name, key)] = value
        told.append({"kind": type(optimizer).__name__, "groups": groups, "states": states})
    return told, tensors


def named_of_numbered(
    kind: str, state: StateDict, optimizer: Optimizer, names: Names
) -> tuple[StateDict, dict[str, Tensor]]:
    """As ``named_state``, of a ``state_dict`` of torch's whose parameters are this optimizer's in their order."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    sizes = [[len(group["params"]) for group in groups] for groups in (state["param_groups"], optimizer.param_groups)]
    if sizes[0] != sizes[1]:
        raise StoreError(
            f"the checkpoint's optimizer has groups of {sizes[0]} parameters, and the one given of {sizes[1]}: make it "
            "as it was made then"
        )
    of_number = dict(zip(numbers, parameters, strict=True))
    groups = [
        {"options": options_of(group), "names": [_name(of_number[number], names) for number in group["params"]]}
        for group in state["param_groups"]
    ]
    states: dict[str, StateDict] = {}
    tensors = dict[str, Tensor]()
    for number, own in state["state"].items():
        parameter = of_number[number]
        name = _name(parameter, names)
        states[name] = {key: _described(value, parameter) for key, value in own.items()}
        tensors |= {_full_name(0, name, key): value for key, value in own.items() if isinstance(value, Tensor)}
    return {"kind": kind, "groups": groups, "states": states}, tensors


def check_kinds(optimizers: Sequence[Optimizer], kinds: Sequence[str]) -> None:
    """Raises StoreError for others than of these classes."""
    if len(kinds) != len(optimizers):
        raise StoreError(
            f"the checkpoint has the state of {counted(len(kinds), 'optimizer')}, and the call {len(optimizers)}: "
            "give the same ones, or none where only the net is to be loaded"
        )
    for optimizer, kind in zip(optimizers, kinds, strict=True):
        if type(optimizer).__name__ != kind:
            raise StoreError(
                f"the checkpoint was trained with the optimizer {kind}, not {type(optimizer).__name__}: make the same "
                "one"
            )


def check_state(
    optimizers: Sequence[Optimizer], told: Sequence[StateDict], owner: Callable[[str], str], names: Names
) -> None:
    """Raises StoreError where the state is of other optimizers, or of other groups. owner: the site of a parameter, in
    whatever phase that is, by its name.
    """
    check_kinds(optimizers, [saved["kind"] for saved in told])
    for optimizer, saved in zip(optimizers, told, strict=True):
        then = _groups_by_name([group["names"] for group in saved["groups"]], owner)
        now = _groups_by_name([[_name(p, names) for p in group["params"]] for group in optimizer.param_groups], owner)
        for name in dict.fromkeys([*then, *now]):
            if then.get(name) != now.get(name):
                raise StoreError(
                    f"{name} was in {_place(then.get(name))} of the optimizer's groups, and is in "
                    f"{_place(now.get(name))} now: make the groups as they were made then"
                )


def restore_state_(optimizers: Sequence[Optimizer], told: Sequence[StateDict], names: Names) -> dict[str, Tensor]:
    """Bring the optimizers to what is told, or to their start where nothing is; the tensors of their states, which are
    to be filled, by name.
    """
    tensors = dict[str, Tensor]()
    for optimizer in optimizers:
        optimizer.state.clear()
    for number, (optimizer, saved) in enumerate(zip(optimizers, told, strict=bool(told))):
        for group, then in zip(optimizer.param_groups, saved["groups"], strict=True):
            group.update({key: _beside(value, group.get(key)) for key, value in then["options"].items()})
            for parameter in group["params"]:
                name = _name(parameter, names)
                for key, described in saved["states"].get(name, {}).items():
                    value = _made(described, key, parameter, group)
                    optimizer.state[parameter][key] = value
                    if isinstance(value, Tensor) and described[0] == _TENSOR:
                        tensors[_full_name(number, name, key)] = value
    return tensors


def _beside(value: object, present: object) -> object:
    """A setting; a learning rate that is a tensor on the device of the present one."""
    return value.to(present.device) if isinstance(value, Tensor) and isinstance(present, Tensor) else value


def options_of(group: Group) -> StateDict:
    """What a group says of its parameters."""
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _name(parameter: Tensor, names: Names) -> str:
    if id(parameter) not in names:
        raise StoreError(
            f"the optimizer holds a parameter of the shape {tuple(parameter.shape)} that is none of the net's: make it "
            "over the net's parameters(), after the net was sharded or moved"
        )
    return names[id(parameter)]


def _full_name(number: int, name: str, key: str) -> str:
    return f"optimizer.{number}.{key}.{name}"


def _check_shared(value: Tensor, parameter: Tensor, what: str) -> None:
    if is_part(parameter) and not is_part(value) and value.numel() > 1:
        raise StoreError(
            f"the optimizer keeps {what} as a tensor of each process's own, which a checkpoint cannot put together: "
            "train with an optimizer that knows sharded parameters"
        )


def _described(value: object, parameter: Tensor) -> tuple[object, ...]:
    if not isinstance(value, Tensor):
        return _VALUE, value
    return _TENSOR, value.shape == parameter.shape, list(value.shape), str(value.dtype).removeprefix("torch.")


def _made(described: Sequence[object], key: str, parameter: Tensor, group: Group) -> object:
    """A value of the state of a parameter: a tensor to be filled, or what is not one, as it was."""
    if described[0] == _VALUE:
        return described[1]
    _, like, shape, kind = described
    dtype: torch.dtype = getattr(torch, str(kind))
    if like:
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    assert isinstance(shape, list)
    if is_part(parameter) and len(shape) == parameter.dim():  # such as the means of Adafactor
        return part_as(torch.zeros(shape, dtype=dtype), parameter)
    # As in torch: a counter of steps lies on the CPU, unless a kernel on the device counts.
    counts = key == "step" and not (group.get("capturable") or group.get("fused"))
    return torch.zeros(shape, dtype=dtype, device="cpu" if counts else parameter.device)


def _groups_by_name(groups: Sequence[Sequence[str]], owner: Callable[[str], str]) -> dict[str, int]:
    return {owner(name): number for number, names in enumerate(groups) for name in names}


def _place(group: int | None) -> str:
    return "none" if group is None else f"number {group}"
