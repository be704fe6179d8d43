"""A ``state_dict`` loaded into a module in a time that grows with its size."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from functools import partial

from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from ..aliases import StateDict


def load_as_its_class_(module: nn.Module, state: Mapping[str, object]) -> None:
    """A strict load; by the ``load_state_dict`` of the class where that is not torch's, since it may do more."""
    own = type(module).load_state_dict is not nn.Module.load_state_dict
    (module.load_state_dict if own else partial(load_state_, module))(state, strict=True)


def load_state_(
    module: nn.Module, state: Mapping[str, object], strict: bool = True, assign: bool = False
) -> _IncompatibleKeys:
    """As ``nn.Module.load_state_dict``, with its hooks, messages and results.

    torch's own goes through all names anew for each module, n² steps for n layers in one ``nn.Sequential``: here the
    names of a module are dealt out to its children once.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"Expected state_dict to be dict-like, got {type(state)}.")
    metadata: Mapping[str, StateDict] = getattr(state, "_metadata", None) or {}
    missing: list[str] = []
    unexpected: list[str] = []
    errors: list[str] = []
    own: StateDict = OrderedDict(state)  # a copy, since modules may change what they are given
    if metadata:
        vars(own)["_metadata"] = metadata

    def load(part: nn.Module, own: StateDict, prefix: str) -> None:
        told = {**metadata.get(prefix.removesuffix("."), {}), **({"assign_to_params_buffers": True} if assign else {})}
        part._load_from_state_dict(own, prefix, told, True, missing, unexpected, errors)
        of_children: dict[str, StateDict] = {}
        for key, value in own.items():
            name, dot, _ = key.removeprefix(prefix).partition(".")
            if dot:
                of_children.setdefault(name, {})[key] = value
        for name, child in part._modules.items():
            if child is not None:
                load(child, of_children.get(name, {}), f"{prefix}{name}.")
        for hook in part._load_state_dict_post_hooks.values():
            hook(part, _IncompatibleKeys(missing, unexpected))

    load(module, own, "")
    if strict:
        kinds = {"Missing": missing, "Unexpected": unexpected}
        listed = {kind: ", ".join(f'"{key}"' for key in keys) for kind, keys in kinds.items() if keys}
        errors[:0] = [f"{kind} key(s) in state_dict: {keys}. " for kind, keys in listed.items()]
    if errors:
        raise RuntimeError(
            "Error(s) in loading state_dict for {}:\n\t{}".format(type(module).__name__, "\n\t".join(errors))
        )
    return _IncompatibleKeys(missing, unexpected)
