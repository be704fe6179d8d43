"""Shells: copies of a module tree that hold the model's own values, to be traced and run without copying any weight."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..errors import CaptureError, first_line


def shell(model: nn.Module) -> nn.Module:
    """A deep copy of everything but the values of the parameters, which the shell's own parameters share.

    What is done to the shell (modes, attributes, hooks, gradients, other parameters in its places) does not reach the
    model; what is written into a weight does, so run it inside ``same_values``. Raises CaptureError for what cannot be
    copied.
    """
    refuse_parts(model)
    try:
        return copy.deepcopy(model, same_parameters(model))
    except Exception as error:  # whatever the model's own __deepcopy__ raises
        raise CaptureError(
            f"{type(model).__name__} cannot be copied ({first_line(error)}); the pass works on a copy, so make the "
            f"model support copy.deepcopy"
        ) from error


def refuse_parts(model: nn.Module) -> None:
    """Raise CaptureError for a model of which each process has a part only."""
    if any(kind.__name__ == "FSDPModule" for module in model.modules() for kind in type(module).__mro__):
        raise CaptureError(
            "the net is sharded by fully_shard, and no process has all of it to copy: save it from all processes, "
            "dr.save(net, folder), and go on in one with dr.load(folder, model); what is to be captured is transformed "
            "before it is sharded"
        )


def same_parameters(model: nn.Module) -> dict[int, object]:
    """For deepcopy: other parameters with the same values, by the ids of the model's."""
    return {id(p): nn.Parameter(p.data, p.requires_grad) for p in model.parameters() if _is_plain(p)}


def own_(net: nn.Module, model: nn.Module) -> nn.Module:
    """The shell, or what was made of it, with values of its own where it shares those of the model."""
    shared = {p.untyped_storage()._cdata for p in model.parameters() if _is_plain(p)}
    for parameter in net.parameters():
        if _is_plain(parameter) and parameter.untyped_storage()._cdata in shared:
            parameter.data = parameter.data.clone()
    return net


def sharing(net: nn.Module, model: nn.Module) -> nn.Module:
    """The net over the model's own parameters and buffers, by their names."""
    memo: dict[int, object] = {}
    for mine, theirs in (
        (net.named_parameters(remove_duplicate=False), dict(model.named_parameters(remove_duplicate=False))),
        (net.named_buffers(remove_duplicate=False), dict(model.named_buffers(remove_duplicate=False))),
    ):
        memo |= {id(tensor): theirs[name] for name, tensor in mine if name in theirs}
    return copy.deepcopy(net, memo)


def _is_plain(parameter: nn.Parameter) -> bool:
    """Whether two parameters can share its values: those of other classes, and of inference mode, are copied."""
    plain = type(parameter) is nn.Parameter and type(parameter.data) is Tensor
    return plain and parameter.layout is torch.strided and not parameter.is_inference()
