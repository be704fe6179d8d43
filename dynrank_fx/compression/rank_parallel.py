"""Tensor parallelism along the rank: each process holds some of the r directions that a weight has left.

With right A [r, n] and left B [m, r], y = B (A x). Process p holds the rows A_p of A and the columns B_p of B for its
share of the r directions, and y = Σ_p B_p (A_p x): what goes in is the same in all processes, what is between the
factors never leaves one, and one all-reduce adds up m numbers. Backward, dx = Σ_p A_pᵀ (B_pᵀ dy) is one more, of n
numbers; there is none where x has no gradient. Torch names its styles by the output: the factor that is applied first
is column-parallel (``ColwiseParallel``), the second row-parallel (``RowwiseParallel``). Split the other way, by the
rows of B and the columns of A, x would have to lie in parts as well, and y would.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import Tensor, fx, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from ..errors import PlanError
from ..layouts import LinearLayout
from ..ops import LinearOp, MatmulOp
from ..phase import Phase
from ..rewrite import Switched, switched_modules
from ..tracing import unwrap

_OTHER = {"left": "right", "right": "left"}


def rank_parallel_plan(module: nn.Module) -> dict[str, ParallelStyle]:
    """The plan of tensor parallelism along the rank, for ``torch.distributed.tensor.parallel.parallelize_module``.

    Each process then holds its share of every rank; a factored layer takes one all-reduce forward and one backward.
    Layers that are dense, convolutions, and factors that several layers share, or hold in common, stay whole in all
    processes. Make the optimizer after ``parallelize_module``, which puts other parameters in the places of the
    factors; they change phase no more.

    Args:
        module: What ``truncate`` or ``compress`` made, or a net of ``transform`` whose sites are in LOW.

    Returns:
        Styles, by the paths of the modules that they are for.

    Raises:
        PlanError: Where there is no layer to split, and, when the plan is applied, for a rank that the number of
            processes does not divide.
    """
    root = unwrap(module)
    held = Counter(id(parameter) for _, parameter in root.named_parameters(remove_duplicate=False))
    plan: dict[str, ParallelStyle] = {}
    for modules in switched_modules(root).values():
        if modules[0].phase != int(Phase.LOW):
            raise PlanError(
                f"{modules[0].site} is in {Phase(modules[0].phase).name}: enter LOW first, or truncate the net"
            )
        if len(modules) == 1 and _is_whole_site(modules[0]):
            plan |= {path: _Site() for path, part in root.named_modules() if part is modules[0]}
    for first, second in _pairs(root):
        alone = all(held[id(p)] == 1 for path in (first, second) for p in root.get_submodule(path).parameters())
        if alone:
            plan |= {first: _First(), second: RowwiseParallel()}
    if not plan:
        raise PlanError(
            f"{type(root).__name__} has no linear layer in two factors to split along its rank: give what truncate or "
            "compress made, or a net in LOW"
        )
    return plan


def _is_whole_site(module: Switched) -> bool:
    """Whether the factors are two matrices of this site alone, which all its uses multiply by."""
    products = all(isinstance(op, LinearOp | MatmulOp) and not op.view.gathered for op in module.ops)
    return products and isinstance(module.layout, LinearLayout) and len(module.shape) == 2 and not module.sharing


def _pairs(root: nn.Module) -> Iterator[tuple[str, str]]:
    """The paths of linear layers that are applied one after the other and to nothing else, as ``truncate`` names
    them: ``fc.right`` and ``fc.left``; a product ``x @ W`` has ``left`` first.
    """
    for path, part in root.named_modules():
        names = [name for name, _ in part.named_children()] if type(part) is nn.Sequential else []
        if names in (["left", "right"], ["right", "left"]) and _fit(*part):
            yield path + "." * bool(path) + names[0], path + "." * bool(path) + names[1]
        if isinstance(part, fx.GraphModule):
            for first, second in _pairs_of_graph(part):
                yield path + "." * bool(path) + first, path + "." * bool(path) + second


def _pairs_of_graph(part: fx.GraphModule) -> Iterator[tuple[str, str]]:
    calls: dict[str, list[fx.Node]] = {}
    for node in part.graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    for first, nodes in calls.items():
        holder, _, name = first.rpartition(".")
        second = f"{holder}.{_OTHER.get(name)}".lstrip(".")
        users = {user for node in nodes for user in node.users}
        follows = second in calls and users == set(calls[second])
        if follows and _fit(part.get_submodule(first), part.get_submodule(second)):
            yield first, second


def _fit(first: nn.Module, second: nn.Module) -> bool:
    """Whether these are the factors of a linear layer."""
    if not (isinstance(first, nn.Linear) and isinstance(second, nn.Linear)):
        return False
    return first.bias is None and first.out_features == second.in_features


class _First(ColwiseParallel):
    """The factor that is applied first: its outputs lie over the processes, and stay there."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, nn.Linear)
        _check_rank(module.out_features, device_mesh)
        return super()._apply(module, device_mesh)


class _Site(ParallelStyle):
    """Both factors of a site in LOW, in its own module."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, Switched)
        _check_rank(module.rank, device_mesh)
        # What these two give takes the place of the inputs and the output, which torch's annotations do not say.
        return distribute_module(module, device_mesh, self._partition, _replicated, _added_up)  # type: ignore[arg-type]

    def _partition(self, name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for factor, axis in (("left", 1), ("right", 0)):
            whole = module._parameters[factor]
            assert whole is not None
            part = distribute_tensor(whole.detach(), mesh, [Shard(axis)], src_data_rank=self.src_data_rank)
            module._parameters[factor] = nn.Parameter(part, requires_grad=whole.requires_grad)


def _replicated(module: nn.Module, inputs: tuple[object, ...], mesh: DeviceMesh) -> tuple[object, ...]:
    """The input, and a bias that is given beside it, as the same in all processes."""
    return tuple(
        DTensor.from_local(each, mesh, [Replicate()], run_check=False)
        if isinstance(each, Tensor) and not isinstance(each, DTensor)
        else each
        for each in inputs
    )


def _added_up(module: nn.Module, output: DTensor, mesh: DeviceMesh) -> Tensor:
    return output.redistribute(mesh, [Replicate()]).to_local()


def _check_rank(rank: int, mesh: DeviceMesh) -> None:
    if rank % mesh.size():
        raise PlanError(
            f"{mesh.size()} processes cannot share a rank of {rank}: give transform or compress multiple_of="
            f"{mesh.size()}, or leave this layer out of the plan"
        )
