"""Collecting what the outputs of sites hold, over calibration data: see ``covariance`` for what decides a cut.

Sums are kept in float64, one matrix of products per site, and added batch by batch. Sites go in turns, each a pass over
the data, so that these sums stay small beside the weights. Several processes add up theirs at the end of a pass, in one
message; all else of the cut is made of these sums, as if one process had seen all data.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn
from torch.distributed import ProcessGroup
from torch.utils.hooks import RemovableHandle

from ..aliases import Args, Kwargs
from ..checks import is_list, is_number
from ..errors import CalibrationError
from ..layouts import TwoFactors
from ..ops import ConvolutionOp, LinearOp, MatmulOp, Op
from ..processes import ALONE, Processes, as_first_, check_same, in_group, whole_weights
from ..rewrite import STEM, SiteGroup, Switched, site_groups, switched_modules
from ..tracing import ExampleInputs, evaluating, is_captured, regions, same_buffers, untraced, unwrap
from .activation_rows import cuts_inputs, has_input_rows, has_output_rows, input_rows, output_rows, outputs_along_rows
from .batches import call, checked_batches
from .covariance import Calibration, Covariance

_BYTES = 2**28, 2**32
"""What is kept at a time may take a quarter of the weights' memory: no less than the first, no more than the second."""


@dataclass
class _Sums:
    """What the calls of one group have given so far; the fields are those of ``Covariance``, ``size`` is [g, k, k]."""

    group: SiteGroup
    rows: bool
    of_inputs: bool
    size: torch.Size
    products: Tensor = field(init=False)
    count: int = 0
    sums: dict[str, tuple[Tensor, int]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return self.size.numel() * torch.float64.itemsize

    def begin(self) -> None:
        self.products = torch.zeros(self.size, dtype=torch.float64, device=self.group.owner.outline.device)

    def ended(self, known: dict[tuple[object, ...], list[Tensor]]) -> Covariance:
        """The covariance; the matrix is one of the known where it is the same, as for sites that read one input."""
        layout, products = self.group.layout, self.products
        assert isinstance(layout, TwoFactors)
        for total, n in self.sums.values():
            products -= total[..., :, None] * total[..., None, :] / n
        del self.products
        matrix = (products / max(self.count, 1)).to(torch.promote_types(self.group.owner.outline.dtype, torch.float32))
        # Equal ones have an equal trace: few are compared as a whole.
        alike = known.setdefault((self.count, matrix.shape, float(matrix.diagonal(dim1=-2, dim2=-1).sum())), [])
        same = [other for other in alike if self.of_inputs and torch.equal(other, matrix)]
        matrix = same[0] if same else matrix
        if self.of_inputs and not same:
            alike.append(matrix)
        return Covariance(self.group.names, layout, self.rows, self.of_inputs, matrix, self.count, self.sums)


def calibrate(
    net: nn.Module,
    batches: Iterable[ExampleInputs],
    *,
    sites: Collection[str] | None = None,
    shrink: float | None = None,
    group: ProcessGroup | None = None,
) -> Calibration:
    """Run the net on data, and collect what the outputs of its sites hold, for a cut that keeps the outputs.

    It runs in its present phases and in evaluation mode.

    Args:
        net: What ``transform`` made; it stays as it is.
        batches: Batches of inputs, each as ``example_inputs``.
        sites: The names of the sites to look at; all by default.
        shrink: How much of the weight's own spectrum is mixed in, which settles what too few data leave open: the share
            of W Wᵀ, at the trace of C, that is added to the covariance C of the outputs. By default k / (k + rows seen)
            for k outputs: as much as C itself where there are hardly any data, and next to nothing where there are
            plenty.
        group: The processes that calibrate together, such as ``torch.distributed.group.WORLD``: each has the same net
            and gives its own batches, of which some may have none, and what all have seen is added up. By default this
            process alone.

    Returns:
        What is known of the outputs, for ``truncate`` and ``enter_(..., split=calibration.split)``; the same in all
            processes.

    Raises:
        CalibrationError: For a module that ``transform`` did not make, a site or a number that cannot be, and
            where there is no batch, a batch does not fit the model, or numbers are not finite. What fails in one
            process fails in all.
    """
    processes = in_group(group, CalibrationError)
    with processes.all_or_none(CalibrationError, "calibrate"):
        root, chosen = _asked(net, sites, shrink)
        given: dict[str, object] = {"the argument sites": chosen, "the argument shrink": shrink}
        given |= whole_weights(processes, root, CalibrationError)
    check_same(processes, given, CalibrationError)
    data = checked_batches(batches, processes=processes)
    return calibrated(root, data, chosen, shrink, processes)


def _asked(net: nn.Module, sites: Collection[str] | None, shrink: float | None) -> tuple[nn.Module, list[str]]:
    """The net itself and the names of the sites. Raises CalibrationError for what cannot be."""
    root = unwrap(net)
    if not switched_modules(root) and not is_captured(root):
        raise CalibrationError(
            f"{type(net).__name__} has no sites to calibrate: give what transform or factorize made of it"
        )
    if shrink is not None and not is_number(shrink, 0):
        raise CalibrationError(f"shrink is {shrink!r}: give a number of 0 or more, or leave it out")
    known = switched_modules(root)
    asked = sites if is_list(sites) else [str(sites)]
    chosen = known.keys() if sites is None else dict.fromkeys(asked)
    if unknown := [name for name in chosen if name not in known]:
        raise CalibrationError(f"the net has no site {unknown[0]!r}: its sites are named like {next(iter(known), '')}")
    return root, [name for name in known if name in chosen]


def calibrated(
    root: nn.Module,
    data: Sequence[ExampleInputs],
    sites: Collection[str] | None = None,
    shrink: float | None = None,
    processes: Processes = ALONE,
) -> Calibration:
    """As ``calibrate``, of arguments that were checked."""
    known = switched_modules(root)
    groups = site_groups(root, [name for name in known if sites is None or name in sites])
    plain = {group.name: why for group in groups if (why := _why_plain(group.sites[0])) is not None}
    seen: dict[str, Covariance] = {}
    matrices: dict[tuple[object, ...], list[Tensor]] = {}
    order: dict[str, None] = {}
    with evaluating(root), torch.no_grad(), _buffers_of_first(root, processes):
        for some in _passes(root, [_unseen(group) for group in groups if group.name not in plain]):
            with processes.all_or_none(CalibrationError, "calibration"):
                _run(root, data, some, order)
            _add_up(some, order, processes)
            for each in some:
                seen[each.group.name] = each.ended(matrices)
    plain |= {name: "the calibration data never reach it" for name, each in seen.items() if each.count == 0}
    covariances = {name: each for each in seen.values() if each.count for name in each.sites}
    reasons = {name: plain[group.name] for group in groups if group.name in plain for name in group.names}
    return Calibration(covariances, reasons, tuple(order), shrink)


def _why_plain(modules: Sequence[Switched]) -> str | None:
    """Why the outputs of a site say nothing of its cut."""
    ops, layout, shape = [op for module in modules for op in module.ops], modules[0].layout, modules[0].shape
    if not isinstance(layout, TwoFactors):
        return f"the {layout.name} layout has more than two factors"
    sides = {outputs_along_rows(op, layout) for op in ops}
    if None in sides:
        return f"no factor of the {layout.name} layout of a {ops[0].kind} holds whole outputs, or whole inputs"
    if len(sides) > 1:
        return "it is used both as it is and transposed"
    if cuts_inputs(ops[0], layout):
        return None
    if not all(map(has_input_rows, ops)) and not all(has_output_rows(op, shape) for op in ops):
        return "its uses take parts of it in different ways"
    return None


def _unseen(group: SiteGroup) -> _Sums:
    """What will be seen of a group: of its inputs or of its outputs, whichever is smaller and can be told apart."""
    layout, ops = group.layout, [op for module in group.modules for op in module.ops]
    assert isinstance(layout, TwoFactors)
    along_rows = bool(outputs_along_rows(ops[0], layout))
    g, (m, n) = layout.to_matrix(group.owner.outline).shape[0], layout.matrix_shape(group.shape)
    m, n = (m, n) if along_rows else (n, m)
    by_outputs = not group.shared and all(has_output_rows(op, group.shape) for op in ops)
    of_inputs = cuts_inputs(ops[0], layout) or (all(map(has_input_rows, ops)) and (n <= m or not by_outputs))
    k = n if of_inputs else m
    return _Sums(group, along_rows, of_inputs, torch.Size((g, k, k)))


def room_beside(root: nn.Module) -> int:
    """How many bytes may be kept beside the weights."""
    least, most = _BYTES
    return min(max(least, sum(parameter.nbytes for parameter in root.parameters()) // 4), most)


def _passes(root: nn.Module, deciding: Sequence[_Sums]) -> Iterable[list[_Sums]]:
    """The groups in turns whose sums take at most so much memory together, or one group in a turn."""
    room = room_beside(root)
    turn: list[_Sums] = []
    held = 0
    for each in deciding:
        if turn and held + each.nbytes > room:
            yield turn
            turn, held = [], 0
        turn.append(each)
        held += each.nbytes
    if turn:
        yield turn


@contextmanager
def _buffers_of_first(root: nn.Module, processes: Processes) -> Iterator[None]:
    """Within it all processes have the first one's buffers: each has statistics of its own after training."""
    if processes.count == 1:
        yield
        return
    with same_buffers(root):
        as_first_(processes, root.buffers())
        yield


def _add_up(watched: Sequence[_Sums], order: dict[str, None], processes: Processes) -> None:
    """What all processes have seen in one pass, and the order of the calls where one of them saw none."""
    if processes.count == 1:
        return
    seen = processes.gathered((list(order), [list(each.sums) for each in watched]))
    order |= dict.fromkeys(name for names, _ in seen for name in names)
    for number, each in enumerate(watched):
        for key in dict.fromkeys(key for _, keys in seen for key in keys[number]):
            each.sums[key] = each.sums.pop(key, (each.products.new_zeros(each.size[:-1]), 0))  # all in one order
    counts = torch.tensor([n for each in watched for n in (each.count, *(n for _, n in each.sums.values()))])
    totals = [total for each in watched for total, _ in each.sums.values()]
    processes.sum_([counts, *(each.products for each in watched), *totals])
    summed = iter(counts.tolist())
    for each in watched:
        each.count = next(summed)
        each.sums = {key: (total, next(summed)) for key, (total, _) in each.sums.items()}


def _run(root: nn.Module, data: Sequence[ExampleInputs], watched: Sequence[_Sums], order: dict[str, None]) -> None:
    """One pass over the data with hooks on these groups."""
    handles: list[RemovableHandle] = []
    free, paths = _free_biases(root), {id(module): name for name, module in root.named_modules()}
    for seen in watched:
        seen.begin()
        for module in seen.group.sites[0] if seen.group.shared else seen.group.modules:
            hook = _Watch(seen, order, free, paths[id(module)])
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        for number, batch in enumerate(data):
            with same_buffers(root):  # each batch finds the model as it is
                try:
                    call(root, batch, number)
                except CalibrationError as error:
                    for handle in handles:
                        handle.remove()
                    call(root, batch, number)
                    raise error.__cause__ or error from None  # the model takes the batch: what failed is ours
            for seen in watched:
                if not float(seen.products.abs().amax()) < torch.finfo(torch.float32).max:
                    side = "inputs" if seen.of_inputs else "outputs"
                    raise CalibrationError(
                        f"the {side} of {seen.group.name} are not finite, or too large to be squared, on calibration "
                        f"batch {number}: look for a diverged model, or leave the batch out"
                    )
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _Watch:
    """A forward hook that adds what a call reads, or gives, to the covariance."""

    seen: _Sums
    order: dict[str, None]
    free: Mapping[int, tuple[str, str]]
    path: str

    def __call__(self, module: Switched, args: Args, kwargs: Kwargs, given: Tensor) -> None:
        use, seen = int(kwargs.get("use", 0)), self.seen
        if module.after_stem and use != STEM:
            return  # what the sites that share a factor take is the shared input, or what the shared factor made of it
        op, x, at = module.ops[max(use, 0)], args[0], kwargs.get("at")
        if seen.of_inputs:
            active = input_rows(op, x, module.shape, at)
        else:
            bias = args[1] if args[1:] else module._parameters["bias"]
            y = None if use == STEM else _unbiased(op, given, bias)
            active = output_rows(op, op(x, module.weight, None, at) if y is None else y, seen.size[0])
        self.order[seen.group.name] = None
        X = active.rows.double()
        part = slice(active.start, active.start + X.shape[-1])
        products = seen.products[:, part, part]
        if isinstance(active.which, Tensor):
            products.index_add_(0, active.which, X.mT @ X)
        else:  # in place: temporaries of this size leave holes in the heap
            products = products if active.which is None else products[active.which, None]
            products.baddbmm_(X.mT, X)
        rows = X.shape[-2] * (1 if active.which is None else X.shape[0])
        seen.count += rows
        key = self._taker(op, module, args[1:])
        if key is not None:
            total, n = seen.sums.get(key, (0, 0))
            seen.sums[key] = (total + X.sum(-2), n + rows)

    def _taker(self, op: Op, module: Switched, given: Args) -> str | None:
        """The name of what takes up a mean of this call: the module by its own bias, or a bias that is given."""
        own = not given
        bias = module._parameters["bias"] if own else given[0]
        if cuts_inputs(op, module.layout):
            return None  # at its borders the kernel sees fewer inputs, and their mean is another
        if self.seen.group.shared or not _adds_constants(op, bias is not None):
            return None
        if own:
            return self.path
        site, name = self.free.get(id(bias), ("", ""))
        return name if site == module.site else None


def _unbiased(op: Op, y: Tensor, bias: Tensor | None) -> Tensor | None:
    """What a call gave before the bias; None where that is not plain to see."""
    if bias is None:
        return y
    if isinstance(op, ConvolutionOp):
        return y - bias.reshape(-1, *(1 for _ in op.stride))
    return y - bias if isinstance(op, LinearOp) else None


def _adds_constants(op: Op, biased: bool) -> bool:
    """Whether a constant added to the bias, or given as one, is added to what the op gives."""
    if isinstance(op, LinearOp | MatmulOp) and (op.view.rows or op.view.columns or op.view.gathered):
        return False
    if isinstance(op, MatmulOp):  # addmm takes a bias where matmul takes more axes: only where there is one already
        return biased and not op.weight_first and not op.batched and (op.alpha, op.beta) == (1, 1)
    return isinstance(op, LinearOp | ConvolutionOp)


def _free_biases(root: nn.Module) -> dict[int, tuple[str, str]]:
    """The parameters, by id, that the graphs give to the calls of one site as a bias and that nothing else reads: the
    site and the parameter's name.
    """
    takers: dict[int, set[str]] = {}
    for region in regions(root):
        for graph in dict.fromkeys(region.net.graphs.values()):
            for node in graph.nodes:
                value = operator.attrgetter(str(node.target))(region.net) if node.op == "get_attr" else None
                if isinstance(value, nn.Parameter):
                    takers.setdefault(id(value), set()).update(_biased(region.net, node, user) for user in node.users)
    for _, module in untraced(root):
        if not isinstance(module, Switched):
            takers |= {id(parameter): {""} for parameter in module._parameters.values()}
    names = {id(parameter): name for name, parameter in root.named_parameters()}
    return {
        key: (next(iter(sites)), names[key]) for key, sites in takers.items() if len(sites) == 1 and "" not in sites
    }


def _biased(net: nn.Module, node: fx.Node, user: fx.Node) -> str:
    """The site whose call ``user`` is, with the node as its bias alone; "" for anything else."""
    module = net.get_submodule(str(user.target)) if user.op == "call_module" else None
    alone = user.args[1:2] == (node,) and user.all_input_nodes.count(node) == 1 and user.args[0] is not node
    return module.site if isinstance(module, Switched) and alone else ""
