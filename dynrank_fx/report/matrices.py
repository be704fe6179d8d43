"""What is known of every matrix of a net or an ONNX file: spectra, ranks, and where factoring would pay."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import DynrankError, ExportError, first_line
from ..layouts import effective_rank, energy_rank, layout_for, singular_values, stable_rank
from ..phase import Phase
from ..plan import break_even_rank, find_sites, locate
from ..rewrite import switched_modules
from ..seals import check_seal
from ..text import json_text, text_table
from ..tracing import ExampleInputs, is_captured, measure, meta_of

if TYPE_CHECKING:
    from onnx import TensorProto


@dataclass(frozen=True)
class MatrixRow:
    """One matrix. spectrum: singular values, largest first, of all groups. state: the phase, with the rank of its
    factors.

    break_even: the largest rank at which factors hold fewer parameters, and at which they take fewer FLOPs.
    """

    name: str
    shape: tuple[int, ...]
    state: str
    spectrum: tuple[float, ...]
    effective_rank: float
    stable_rank: float
    energy_rank: int
    break_even: tuple[int | None, int | None] = (None, None)
    note: str = ""


# Any: each of ``more`` is of its field's type
def _row(name: str, shape: tuple[int, ...], state: str, spectrum: Tensor, **more: Any) -> MatrixRow:
    values = spectrum.flatten().sort(descending=True).values
    known = (effective_rank(spectrum), stable_rank(spectrum), energy_rank(spectrum, 0.95))
    return MatrixRow(name, shape, state, tuple(values.tolist()), *known, **more)


def inspect_net(net: nn.Module, example_inputs: ExampleInputs | None = None) -> tuple[MatrixRow, ...]:
    """Every matrix of a net, transformed or not: sites as they stand, and what stays dense with its reason.

    Raises DynrankError for weights that are not finite, which have no spectrum.
    """
    plan = meta_of(net).get("dynrank") if is_captured(net) else None
    if plan is None:
        sites, skipped = find_sites(net, measure(net, example_inputs).shapes if example_inputs is not None else None)
        layouts = {site.name: layout_for(site.uses[0].op) for site in sites}
    else:
        sites, skipped = tuple(row.site for row in plan.sites), plan.skipped
        layouts = {row.site.name: row.layout for row in plan.sites}
    for name, parameter in net.named_parameters():
        if parameter.ndim >= 2:
            _refuse_non_finite(name, parameter)
    modules, weights = switched_modules(net), locate(net)
    rows = []
    for site in sites:
        layout = layouts[site.name]
        if site.name in modules:
            module = modules[site.name][0]
            state = Phase(module.phase).name + ("" if module.phase == int(Phase.FULL) else f" {module.rank}")
            spectrum = module.spectrum()
        else:
            state, spectrum = "dense", singular_values(layout.to_matrix(weights[site.name].parameter.detach()))
        rows.append(_row(site.name, site.shape, state, spectrum, break_even=break_even_rank(site, layout)))
    for left in skipped:
        spectrum = singular_values(weights[left.name].parameter.detach().reshape(1, left.shape[0], -1))
        rows.append(_row(left.name, left.shape, "dense", spectrum, note=left.reason))
    return tuple(rows)


def _refuse_non_finite(name: str, weight: Tensor) -> None:
    if not bool(torch.isfinite(weight).all()):
        raise DynrankError(f"{name} has values that are not finite, and so no spectrum: look for a diverged step")


def inspect_onnx(path: Path) -> tuple[MatrixRow, ...]:
    """Every matrix that a Conv, Gemm or MatMul of an ONNX file multiplies by. Raises ExportError for a file that is
    none, DynrankError for weights that are not finite.
    """
    import onnx

    if not path.is_file():
        raise ExportError(f"there is no file {path}: give an ONNX file, a model file, a run or a folder of `transform`")
    try:
        model = onnx.load(os.path.realpath(path))  # weights lie beside the file, not beside a link
    except Exception as error:  # of protobuf, onnx or the disk, by what is damaged
        raise ExportError(f"{path} could not be read as an ONNX file ({first_line(error)})") from error
    if not model.HasField("graph"):  # to protobuf an empty file is a model without anything
        raise ExportError(f"{path} holds no model: it is empty or damaged; export it again, or use an earlier copy")
    check_seal(path)
    used = {
        name: (node.op_type, next((a.i for a in node.attribute if a.name == "group"), 1))
        for node in model.graph.node
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")
        for name in node.input[1:2]
    }
    rows = []
    for tensor in model.graph.initializer:
        if tensor.name in used and len(tensor.dims) >= 2:
            kind, groups = used[tensor.name]
            try:
                blocks = _blocks(tensor, groups)
            except Exception as error:  # of onnx, numpy or torch, by what is damaged
                raise ExportError(
                    f"{path} holds a damaged {tensor.name} ({first_line(error)}): export it again, or use an earlier "
                    "copy"
                ) from error
            _refuse_non_finite(tensor.name, blocks)
            m, n = tensor.dims[0], blocks.shape[-1]
            # Two factors of rank r hold r·(m + groups·n) numbers.
            pays = (m * n - 1) // (m + groups * n)
            spectrum = singular_values(blocks)
            rows.append(_row(tensor.name, tuple(tensor.dims), kind, spectrum, break_even=(pays, None)))
    return tuple(rows)


def _blocks(tensor: TensorProto, groups: int) -> Tensor:
    """A weight as the matrices [groups, m / groups, n] that multiply."""
    import onnx

    weight = torch.from_numpy(onnx.numpy_helper.to_array(tensor).astype("float32"))
    return weight.reshape(groups, -1, weight.numel() // tensor.dims[0])


_LEGEND = """
state: dense, the phase of a site with the rank of its factors, or the operation of an ONNX file
effective, stable: two measures of how many directions a weight uses, of all that it has (see --help); the fewer, the
  less a cut takes away
95 % energy: the least rank that keeps 95 % of the sum of the squared singular values"""
_OF_BREAK_EVEN = """
break-even: the largest rank at which two factors hold fewer parameters than the weight"""
_OF_FLOPS = """
by FLOPs: the largest rank at which they take fewer FLOPs, on the example inputs"""


def matrices_table(rows: tuple[MatrixRow, ...]) -> str:
    """The rows as a text table, with what its headings mean."""
    head = ("weight", "shape", "state", "effective", "stable", "95 % energy", "break-even", "by FLOPs", "why dense")
    cells = [
        (
            row.name,
            "x".join(map(str, row.shape)),
            row.state,
            f"{row.effective_rank:.1f} of {len(row.spectrum)}",
            f"{row.stable_rank:.1f}",
            str(row.energy_rank),
            *("" if rank is None else str(rank) for rank in row.break_even),
            row.note,
        )
        for row in rows
    ]
    if not rows:
        return "no matrix found"
    columns = zip((_OF_BREAK_EVEN, _OF_FLOPS), zip(*(row.break_even for row in rows), strict=True), strict=True)
    legend = _LEGEND + "".join(text for text, ranks in columns if any(rank is not None for rank in ranks))
    return f"{text_table(head, cells, right=(3, 4, 5, 6, 7))}\n{legend}"


def matrices_json(rows: tuple[MatrixRow, ...]) -> str:
    """The rows as JSON, spectra included."""
    return json_text([vars(row) for row in rows])
