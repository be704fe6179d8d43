"""A run's net and its optimizer in parts, one in each process (FSDP2), once both hold what training begins with."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import DynrankError
from ..processes import is_part, part_as, started, whole
from ..rewrite import site_groups


def shard_(net: nn.Module, optimizer: Optimizer, device: str) -> None:
    """Leave each process a part of every parameter, and of what the optimizer has of it. All call it together.

    Each site is sent when its own turn comes, and all else together. Values and groups stay what they are: what the
    optimizer held of a whole parameter it holds of the parts, in the same groups.

    Args:
        net: What ``transform`` made, whole, in any phases; on the CPU where it does not fit the device.
        optimizer: The optimizer over its parameters, with or without state.
        device: Where the parts are to be.

    Raises:
        DynrankError: Where torch.distributed does not run.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if started().group is None:
        raise DynrankError("there are no processes to share the net's parameters: start it by torchrun")
    names: dict[Tensor, str] = {parameter: name for name, parameter in net.named_parameters()}
    state = dict(optimizer.state)
    mesh = init_device_mesh(torch.device(device).type, (started().count,))
    for group in site_groups(net):
        modules = [module for site in group.sites for module in site]
        if len(modules) == 1:  # several that share something are sent with the rest
            fully_shard(modules[0], mesh=mesh)
    fully_shard(net, mesh=mesh)
    net.to(device)  # of what is in no group, such as buffers
    parts = dict(net.named_parameters())
    for each in optimizer.param_groups:
        each["params"] = [parts[names[p]] if p in names else p for p in each["params"]]
    optimizer.state.clear()
    for parameter, values in state.items():
        part: Tensor = parts[names[parameter]] if parameter in names else parameter
        optimizer.state[part] = {key: _as_part(value, parameter, part) for key, value in values.items()}


def _as_part(value: object, parameter: Tensor, part: Tensor) -> object:
    """What the optimizer has of a part, of a value that it had of the whole."""
    ours = isinstance(value, Tensor) and value.shape == parameter.shape and is_part(part)
    return part_as(value, part) if ours and isinstance(value, Tensor) else value


def gathered(value: object) -> object:
    """A value with every part in it made whole, on the CPU, in the first process; the others, which have to call it
    too, get nothing of that.

    Args:
        value: Tensors in dicts, lists and tuples, with anything else among them.

    Returns:
        The same, in new containers.
    """
    if isinstance(value, dict):
        return {key: gathered(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(gathered(each) for each in value)
    if not isinstance(value, Tensor) or not is_part(value):
        return value
    full = whole(value.detach())
    return full.cpu() if started().first else None
