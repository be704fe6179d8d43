"""Two ONNX files of one model, compared: their outputs, and which site is the first to differ."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from ..aliases import JsonObject
from ..errors import ExportError, reason
from ..layouts import LAYOUTS
from .random_inputs import loaded, random_inputs, table_rows
from .session import Feeds, Provider, Session, session, session_of
from .stack import is_stack

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_HEAVY = {"Conv", "ConvTranspose", "Gemm", "MatMul", "Gather", "Einsum"}
_HELD = "|".join(sorted({"weight"}.union(*(layout.factor_names for layout in LAYOUTS))))
_Pair: TypeAlias = tuple[np.ndarray, np.ndarray]
_BEHIND_SITE = re.compile(
    rf"(\.({_HELD}))?(\.weight)?(_int8)?$"
)  # what follows a site's name in that of a weight or a factor


@dataclass(frozen=True)
class Gap:
    """How far two files are apart in an output, or in the value of a site: over all batches, ‖a − b‖ / ‖a‖ and the
    largest.
    """

    name: str
    relative: float
    largest: float


@dataclass(frozen=True)
class Verdict:
    """outputs: of both files. sites: what both have, in the order of the first file. tolerance: of ``relative``."""

    outputs: tuple[Gap, ...]
    sites: tuple[Gap, ...]
    tolerance: float

    @property
    def same(self) -> bool:
        return all(each.relative <= self.tolerance for each in self.outputs)

    @property
    def first(self) -> Gap | None:
        """The first site that differs by more than the tolerance."""
        return next((each for each in self.sites if not each.relative <= self.tolerance), None)

    def to_json(self) -> JsonObject:
        return {
            "same": self.same,
            "tolerance": self.tolerance,
            "outputs": [asdict(each) for each in self.outputs],
            "first_to_differ": None if self.first is None else asdict(self.first),
        }

    def __str__(self) -> str:
        lines = [f"{each.name}: {each.relative:.2g} relative, {each.largest:.2g} at most" for each in self.outputs]
        if self.first is not None:
            tied = any(each.name.startswith(f"{self.first.name} (use ") for each in self.sites)
            where = ", in the first of its uses" if tied else ""
            lines.append(f"the first site to differ is {self.first.name} ({self.first.relative:.2g} relative){where}")
        lines.append(f"{'the same' if self.same else 'NOT the same'} within {self.tolerance:g}")
        return "\n".join(lines)


def compare_onnx(
    one: str | os.PathLike[str],
    other: str | os.PathLike[str],
    *,
    batch_sizes: Sequence[int] = (1, 2, 5),
    provider: Provider = "CPUExecutionProvider",
    tolerance: float = 1e-4,
) -> Verdict:
    """Both files on the same random inputs. What has another name in the other file goes by its place. Raises
    ExportError for a file that is none, and for other inputs or outputs.
    """
    plain = [session(path, (provider,)) for path in (one, other)]
    inputs, outputs = _paired(plain, (one, other), "get_inputs"), _paired(plain, (one, other), "get_outputs")
    models = [loaded(path) for path in (one, other)]
    rows = table_rows(models[0])
    values = [_site_values(model) for model in models]
    shared = [name for name in values[0] if name in values[1]]
    inside = [
        _with_outputs(model, Path(path).parent, [of[name] for name in shared], provider)
        for model, path, of in zip(models, (one, other), values, strict=True)
    ]
    at_end: dict[str, list[_Pair]] = {}
    at_sites: dict[str, list[_Pair]] = {}
    for batch in batch_sizes:
        feeds = random_inputs(plain[0], batch, seed=batch, rows=rows)
        renamed = {inputs[name]: value for name, value in feeds.items()}
        try:
            got = [_by_name(each, given) for each, given in zip(inside, (feeds, renamed), strict=True)]
        except Exception as error:  # onnxruntime has kinds of its own
            raise ExportError(
                f"a batch of {batch} cannot be run ({reason(error)}): give batch sizes it takes"
            ) from error
        for name, its in outputs.items():
            at_end.setdefault(name, []).append((got[0][name], got[1][its]))
        for name in shared:
            at_sites.setdefault(name, []).append((got[0][values[0][name]], got[1][values[1][name]]))
    return Verdict(_gaps(at_end), _gaps(at_sites), tolerance)


def _paired(opened: Sequence[Session], paths: Sequence[str | os.PathLike[str]], which: str) -> dict[str, str]:
    """The names of the first file's inputs or outputs, each with that in the other."""
    mine, its = ({spec.name: f"{spec.type}, {len(spec.shape)}-D" for spec in getattr(each, which)()} for each in opened)
    if mine.keys() == its.keys():
        its = {name: its[name] for name in mine}
    if list(mine.values()) != list(its.values()):
        one, other = (Path(path).name for path in paths)
        verb = "takes" if which == "get_inputs" else "gives"
        raise ExportError(f"{one} {verb} {mine} and {other} {its}: they are of two models")
    return dict(zip(mine, its, strict=True))


def _by_name(opened: Session, feeds: Feeds) -> Feeds:
    return dict(zip((spec.name for spec in opened.get_outputs()), opened.run(None, feeds), strict=True))


def _site_values(model: ModelProto) -> dict[str, str]:
    """By use of a site, the value that its last product gives, with the bias where that is added by itself, in the
    order of the graph. A use after the first has its number behind the name.
    """
    weights = {each.name for each in model.graph.initializer if len(each.dims) > 1}
    constants = {each.name for each in model.graph.initializer}
    made = {name: node for node in model.graph.node for name in node.output}
    readers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def biased(value: str) -> str:
        after = readers.get(value, [])
        added = len(after) == 1 and after[0].op_type == "Add" and any(name in constants for name in after[0].input)
        return str(after[0].output[0]) if added else value

    seen: dict[str, int] = {}
    values: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type not in _HEAVY:
            continue
        for name in node.input:
            while (
                name not in weights and name in made and made[name].op_type in ("DequantizeLinear", "Transpose", "Cast")
            ):
                name = made[name].input[0]
            if name in weights and not is_stack(name):  # of first factors, whose values only their last ones explain
                seen[name] = seen.get(name, 0) + 1
                use = _BEHIND_SITE.sub("", name, count=1) + (f" (use {seen[name]})" if seen[name] > 1 else "")
                values.pop(use, None)  # the last of its factors stays, where it stands
                values[use] = biased(node.output[0])
    return values


def _with_outputs(model: ModelProto, folder: Path, values: Sequence[str], provider: Provider) -> Session:
    """A session that gives these values too. What has its weights in a file of its own is opened from the folder of
    that file, where a graph without weights lies for as long as that takes.
    """
    import onnx

    present = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in values if name not in present)
    if not any(each.data_location == onnx.TensorProto.EXTERNAL for each in model.graph.initializer):
        return session_of(model.SerializeToString(), provider)
    del model.metadata_props[:]  # a seal among them would be broken
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".verify-", suffix=".onnx") as beside:
            beside.write(model.SerializeToString())
            beside.flush()
            return session(beside.name, (provider,))
    except OSError as error:
        raise ExportError(
            f"{folder} cannot be written to ({reason(error)}), where a file with weights beside it is opened from: "
            "compare copies of the files"
        ) from error


def _gaps(compared: dict[str, list[_Pair]]) -> tuple[Gap, ...]:
    return tuple(_gap(name, pairs) for name, pairs in compared.items())


def _gap(name: str, pairs: Sequence[_Pair]) -> Gap:
    if any(np.shape(a) != np.shape(b) for a, b in pairs):
        return Gap(name, float("inf"), float("inf"))
    a, b = (np.concatenate([np.asarray(pair[i], dtype=np.float64).ravel() for pair in pairs]) for i in (0, 1))
    gap = a - b
    scale = float(np.linalg.norm(a)) or 1.0
    return Gap(name, float(np.linalg.norm(gap)) / scale, float(np.abs(gap).max(initial=0.0)))
