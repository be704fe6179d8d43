"""Parameters that FSDP2 (``fully_shard``) keeps in parts, one in each process: the whole of one, and others put in its
place.

``fully_shard`` has no public way to exchange a parameter within the group that it is sent with. This file is the only
one that goes into torch's private ``torch.distributed.fsdp._fully_shard``: a group's list ``fsdp_params``, torch's own
class ``FSDPParam`` for each, and of that class what ``_USED`` names. It is the same in torch 2.11 to 2.13. Where
it is not, nothing is touched, and an error says so.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ..errors import TransitionError
from .together import ALONE, Processes, started

_ARGUMENTS = (
    "param",
    "module_info",
    "mesh_info",
    "post_forward_mesh_info",
    "device",
    "shard_placement_fn",
    "mp_policy",
    "offload_policy",
)
_USED = (
    "_module_info",
    "_post_load_hook_handle",
    "_setattr_on_modules",
    "fsdp_placement",
    "init_dtype_attrs",
    "is_dtensor",
    "reset_sharded_param",
    "sharded_param",
    "unsharded_accumulated_grad",
)
_PLACED: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()
"""Along which axis the parameters of a module were sharded, by name: for when they come again."""


def is_part(tensor: object) -> bool:
    """Whether this is the part of a tensor that several processes hold together: a DTensor."""
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def own(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: all of a plain one."""
    if not is_part(tensor):
        return tensor
    local: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    return local


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; where it is in parts all processes call this, each in the same order. A plain one is itself."""
    if not is_part(tensor):
        return tensor
    part: Any = tensor.detach()  # Any: a DTensor
    kind = part.device_mesh.device_type
    if part.to_local().device.type != kind:  # offloaded: the backend sends from where the mesh is
        part = Outline.of(part).around(part.to_local().to(kind))  # type: ignore[union-attr]
    full: Tensor = part.full_tensor()
    # Alone in its mesh the part is the whole, and it stays the parameter's.
    return full.clone() if full.data_ptr() == part.to_local().data_ptr() else full


@torch.no_grad()
def part_as(value: Tensor, like: Tensor, axis: int | None = None) -> Tensor:
    """What this process keeps of a whole tensor, in the mesh and on the device of a part of another.

    axis: along which it is cut; by default as the other is. No process waits for another.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    assert isinstance(like, DTensor)
    placements = list(like.placements)
    if value.ndim == 0 or (axis is None and value.shape != like.shape):
        placements = [Replicate() for _ in placements]
    elif axis is not None:
        placements = [Shard(axis) if isinstance(each, Shard) else each for each in placements]
    local = distribute_tensor(
        value.detach().to(like.device_mesh.device_type), like.device_mesh, placements, src_data_rank=None
    ).to_local()
    kept = torch.empty(local.shape, dtype=local.dtype, device=like.to_local().device).copy_(local)
    return Outline(like.device_mesh, tuple(placements), value.shape, _contiguous(value.shape)).around(kept)


@dataclass(frozen=True)
class Outline:
    """What makes a tensor in parts of what each process has of it."""

    mesh: Any  # Any: a DeviceMesh
    placements: tuple[Any, ...]  # Any: torch's
    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Any) -> Outline | None:  # Any: a DTensor, of which torch tells no more
        """That of a tensor; None of a plain one."""
        if not is_part(tensor):
            return None
        return cls(tensor.device_mesh, tuple(tensor.placements), tensor.shape, tuple(tensor.stride()))

    @property
    def cuts(self) -> list[tuple[int, int]]:
        """Along which axes it is cut, and into how many parts."""
        dims = enumerate(self.placements)
        return [(each.dim, self.mesh.size(index)) for index, each in dims if hasattr(each, "dim")]

    def of_rows(self, count: int, like: Tensor) -> Outline:
        """That of another tensor, cut alike, with so many rows in all, which are as long as those given."""
        shape = torch.Size((count, *like.shape[1:]))
        return replace(self, shape=shape, stride=_contiguous(shape))

    def around(self, local: Tensor) -> Tensor:
        """The tensor of which this process has that."""
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
        )

    def __str__(self) -> str:
        return f"{tuple(self.shape)} in parts {self.placements} of {self.mesh.size()}"


def outlined(value: object) -> object:
    """What all processes have alike of a value: of a tensor in parts its shape and how it is cut, else itself."""
    outline = Outline.of(value)
    return value if outline is None else f"{value.dtype} {outline}"  # type: ignore[attr-defined]


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(torch.empty(shape, device="meta").stride())


@dataclass(frozen=True)
class _Held:
    """A parameter that FSDP holds. group: torch's FSDPParamGroup. param: its FSDPParam."""

    group: Any  # Any: torch's own, private
    param: Any

    @property
    def holders(self) -> list[tuple[nn.Module, str]]:
        """The modules that have it, and under which names."""
        info = self.param._module_info
        shared = zip(info.shared_modules, info.shared_param_names, strict=True)
        return [(info.module, info.param_name), *shared]


class Shards:
    """What FSDP2 holds of some nets; nothing where ``fully_shard`` was not called on them or on a part of them.

    Args:
        nets: The nets.

    Raises:
        TransitionError: Where this torch keeps it in another way than is known here.
    """

    def __init__(self, nets: Iterable[nn.Module]) -> None:
        self._modules = [module for net in nets for module in net.modules() if is_sharded(module)]
        self.groups: list[Any] = []
        for module in self._modules:
            for group in _groups_of(module):
                if not any(group is each for each in self.groups):
                    self.groups.append(group)
        for group in self.groups:
            _check(group)
        self._index = {(id(module), name): held for held in self for module, name in held.holders}

    @property
    def processes(self) -> Processes:
        """Those that hold the parts. Raises TransitionError where they are no single group."""
        meshes = {id(group.mesh_info.mesh): group.mesh_info.mesh for group in self.groups}
        everyone, alone = started(), [mesh for mesh in meshes.values() if mesh.size() == 1]
        if all(mesh.size() == everyone.count for mesh in meshes.values()):
            return everyone
        if len(alone) == len(meshes):
            return ALONE
        groups = {id(mesh.get_group()): mesh.get_group() for mesh in meshes.values() if mesh.ndim == 1}
        if len(groups) != 1 or any(mesh.ndim > 1 for mesh in meshes.values()):
            raise TransitionError(
                f"the net is sharded over a part of the {everyone.count} processes in more than one way, so that no "
                "group is known that holds all of it: shard all of it over one mesh, or over all processes"
            )
        return Processes(next(iter(groups.values())))

    def __bool__(self) -> bool:
        return bool(self.groups)

    def __iter__(self) -> Iterator[_Held]:
        for group in self.groups:
            for param in group.fsdp_params:
                yield _Held(group, param)

    def settle(self) -> None:
        """Every parameter in parts again, and none on its way. All processes call this.

        Raises TransitionError where gradients wait that were not reduced.
        """
        for held in self:
            unsharded = getattr(held.param, "_unsharded_param", None)
            waiting = held.param.unsharded_accumulated_grad is not None or getattr(unsharded, "grad", None) is not None
            if waiting or getattr(held.group, "_partial_reduce_output", None) is not None:
                module, name = held.holders[0]
                raise TransitionError(
                    f"gradients of {getattr(module, 'site', None) or held.param._param_fqn or name} wait unreduced in "
                    "each process (set_requires_gradient_sync(False)): let the last backward before the switch reduce "
                    "them, and step the optimizer or call its zero_grad()"
                )
        for group in self.groups:
            group.wait_for_unshard()
        for module in self._modules:
            module.reshard()  # type: ignore[operator]

    def held(self, module: nn.Module, name: str) -> _Held | None:
        """What FSDP holds as this parameter of the module; None where it holds nothing of it."""
        return self._index.get((id(module), name))

    def refuse(self, name: str, modules: Sequence[nn.Module], parameters: Sequence[str]) -> None:
        """Raise TransitionError where no others can take the place of these parameters of all these modules.

        name: what the message calls them.
        """
        for held in (self.held(modules[0], each) for each in parameters):
            if held is None:
                if is_part(modules[0]._parameters.get(parameters[0])):
                    raise TransitionError(
                        f"{name} is a DTensor that fully_shard knows nothing of, and only what it shards can be "
                        "switched: leave the weight dense (exclude), or parallelise after the last switch"
                    )
                continue
            if held.param.is_dtensor:
                raise TransitionError(
                    f"{name} is sharded along a second mesh (tensor parallelism) too, where its phase cannot be "
                    "changed: leave the weight dense (exclude), or parallelise after the last switch"
                )
            if {id(module) for module, _ in held.holders} != {id(module) for module in modules}:
                raise TransitionError(
                    f"{name} is tied to modules outside of its FSDP group, which would keep the old weight: shard all "
                    "that hold it together, by fully_shard([one, other]) or on a module above both"
                )

    def axis(self, module: nn.Module, name: str, shape: Sequence[int], like: Tensor) -> int:
        """Along which axis a new parameter of the module is cut: as it was when there was one of this name, else 0."""
        axis: int = _PLACED.get(module, {}).get(name, 0)
        count = like.device_mesh.size(like.device_mesh.ndim - 1)  # type: ignore[attr-defined]
        return axis if axis < len(shape) and shape[axis] % count == 0 else 0

    def replace(self, modules: Sequence[nn.Module], names: Collection[str], new: Mapping[str, Parameter]) -> None:
        """Parts of parameters, by name, in the place of those that FSDP holds of all these modules under any of names.

        The modules have the new ones already. They go into the group of the old, in their place of its order, so that
        all are sent together as the user grouped them.
        """
        found = [self.held(module, name) for module in modules for name in names]
        old = list({id(held.param): held for held in found if held is not None}.values())
        if not old:
            return
        group, like = old[0].group, old[0].param
        made = [_fsdp_param(name, parameter, modules, like, group) for name, parameter in new.items()]
        gone = {id(held.param) for held in old}
        at = [id(param) for param in group.fsdp_params].index(id(like))
        rest = [param for param in group.fsdp_params[at:] if id(param) not in gone]
        group.fsdp_params[at:] = [*made, *rest]
        for held in old:
            held.param._post_load_hook_handle.remove()
            for module, name in held.holders:
                _PLACED.setdefault(module, {})[name] = held.param.fsdp_placement.dim
                del self._index[id(module), name]
        for held in (_Held(group, param) for param in made):
            self._index |= {(id(module), name): held for module, name in held.holders}


def _fsdp_param(name: str, parameter: Parameter, modules: Sequence[nn.Module], like: Any, group: Any) -> Any:
    """Torch's FSDPParam of a part that these modules have, beside that of the parameter that it replaces.

    It is made of a parameter without memory, and then takes the one that the module has, as after load_state_dict.
    """
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, ParamModuleInfo

    first = like._module_info.module
    others = [module for module in modules if module is not first]
    outline = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    param = FSDPParam(
        param=Parameter(outline, requires_grad=parameter.requires_grad),
        module_info=ParamModuleInfo(first, name, others, [name] * len(others)),
        mesh_info=like.mesh_info,
        post_forward_mesh_info=like.post_forward_mesh_info,
        device=like.device,
        shard_placement_fn=lambda _: next(each for each in parameter.placements if hasattr(each, "dim")),  # type: ignore[attr-defined]
        mp_policy=like.mp_policy,
        offload_policy=group.offload_policy,
    )
    param._setattr_on_modules(parameter)
    param.reset_sharded_param()
    param.init_dtype_attrs(like.mp_policy)
    if like._param_fqn is not None:
        param._param_fqn = f"{like._param_fqn.rpartition('.')[0]}.{name}".lstrip(".")
    return param


def is_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on this very module."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def _groups_of(module: nn.Module) -> list[Any]:
    """The groups of the parameters that are sent together, of a module that ``fully_shard`` was called on."""
    state = module._get_fsdp_state()  # type: ignore[operator]
    several = getattr(state, "_fsdp_param_groups", None)
    if several is None:
        several = [state._fsdp_param_group]
    return [group for group in several if group is not None]


def _check(group: Any) -> None:
    """Raise TransitionError where torch's inside is not as expected."""
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

    arguments = tuple(inspect.signature(FSDPParam.__init__).parameters)[1:]
    known = hasattr(group, "offload_policy") and isinstance(getattr(group, "fsdp_params", None), list)
    if arguments != _ARGUMENTS or not known or not all(hasattr(p, u) for p in group.fsdp_params for u in _USED):
        raise TransitionError(
            f"torch {torch.__version__} keeps the parameters of fully_shard in another way than torch 2.11 to 2.13, "
            "so that phases cannot be changed after it: change them before fully_shard, or use one of those"
        )
