"""Parameters of which each process has a part: what a switch does with them."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import Parameter

from ..errors import TransitionError


def refuse_sharded(name: str, parameter: Parameter) -> None:
    """Raise TransitionError for a parameter that is sharded over devices."""
    if isinstance(parameter, torch.distributed.tensor.DTensor) if torch.distributed.is_available() else False:
        raise TransitionError(f"{name} is a DTensor, sharded over devices: gather it, switch, and shard it again")


def refuse_fully_sharded(root: nn.Module) -> None:
    """Raise TransitionError for a net that ``fully_shard`` has sharded."""
    if any(kind.__name__ == "FSDPModule" for module in root.modules() for kind in type(module).__mro__):
        raise TransitionError(
            "the net is sharded by fully_shard (FSDP2), which would keep the old parameters: gather it, switch, and "
            "shard it again; or wrap it in DistributedDataParallel instead"
        )
