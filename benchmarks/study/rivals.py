"""The same trained network and calibration data given to other tools.

Needs `pip install comprexx tensorly tensorly-torch torch-pruning`; a tool that is not there has a row that says so.
Seed 0, dense training, 16 batches of training inputs; every tool's result gets its batch norms recalibrated on them
and, in a column of its own, the same 100 steps towards the dense model's outputs. All files (runs/rivals) are timed at
the end.
"""

from __future__ import annotations

import copy
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dynrank_fx as dr
from benchmarks.measuring import chars
from benchmarks.result import Cell, Column, Table
from benchmarks.study.cutting import BATCH, accuracy, calibration, exported, flops_of, latency, params, trained
from benchmarks.study.methods import METHODS
from benchmarks.study.tasks import TASKS
from dynrank_fx.onnx import session

FILES = Path(__file__).parents[2] / "runs" / "rivals"
Batches = Sequence[tuple[torch.Tensor]]
COLUMNS = (
    Column("network"),
    Column("tool"),
    Column("accuracy", "%", ".2f"),
    Column("+ 100 steps", "%", ".2f"),
    Column("parameters", spec=".2f"),
    Column("FLOPs", spec=".2f"),
    Column("file", spec=".2f"),
    Column("time", spec=".2f"),
    Column("what went wrong"),
)
KEPT = 0.3
"""The share of the parameters, or of the FLOPs, that every tool which can be told is told to keep."""


@dataclass
class Field:
    """What is compared on: the dense model, its task, the batches; the rows so far but for the time, with their files.

    steps: of the recovery.
    """

    name: str
    dense: nn.Module
    batches: Batches
    steps: int = 100
    rows: list[tuple[tuple[Cell, ...], Path | None]] = field(default_factory=list)

    def file(self, model: nn.Module, name: str) -> Path:
        return exported(model, self.batches[0], FILES, f"{self.name}-{name}")

    @property
    def reference(self) -> Path:
        return FILES / f"{self.name}-dense.onnx"

    def add(self, tool: str, model: nn.Module) -> None:
        """A row of a module."""
        data, model = TASKS[self.name].data(), model.eval()
        dr.recalibrate_(model, self.batches)
        plain, after = accuracy(model, data), None
        if tool != "dense":
            recovered = copy.deepcopy(model)
            dr.recover_(recovered, self.dense, self.batches, self.steps)
            after = 100 * accuracy(recovered, data)
        path = self.file(model, f"{len(self.rows)}" if tool != "dense" else "dense")
        size = params(model) / params(self.dense)
        flops = flops_of(model, self.batches[0]) / flops_of(self.dense, self.batches[0])
        self._row(tool, 100 * plain, after, size, flops, path)

    def add_file(self, tool: str, path: Path) -> None:
        """A row of an ONNX file that stands for no module."""
        opened, data = session(path, ("CPUExecutionProvider",)), TASKS[self.name].data()
        inputs = opened.get_inputs()[0].name

        def run(x: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(opened.run(None, {inputs: x.numpy()})[0])

        scores = [float(data.metric(run(batch[0]), batch)) for batch in data.eval_data or ()]  # type: ignore[misc]
        self._row(tool, 100 * sum(scores) / len(scores), None, None, None, path)

    def fail(self, tool: str, error: Exception) -> None:
        """A row of a tool that did not do it."""
        said = str(error).strip().splitlines()
        what = f"{type(error).__name__}: {said[0][:90] if said else ''}"
        self._keep((self.name, tool, None, None, None, None, None, what), None)

    def _row(
        self, tool: str, plain: float, after: float | None, size: float | None, flops: float | None, path: Path
    ) -> None:
        length = path.stat().st_size / self.reference.stat().st_size
        self._keep((self.name, tool, plain, after, size, flops, length, ""), path)

    def _keep(self, row: tuple[Cell, ...], path: Path | None) -> None:
        self.rows.append((row, path))
        print(*row, sep="  ", file=sys.stderr, flush=True)

    def timed(self) -> list[tuple[Cell, ...]]:
        """The rows, with their file's time over the dense model's."""
        times = [None if path is None else latency(path, self.reference, BATCH[self.name]) for _, path in self.rows]
        return [(*row[:-1], each, row[-1]) for (row, _), each in zip(self.rows, times, strict=True)]


def ours(on: Field, net: nn.Module) -> None:
    for label, budget in (
        (f"dynrank-fx, params={KEPT}", dr.Budget(params=KEPT)),
        (f"dynrank-fx, flops={KEPT}", dr.Budget(flops=KEPT)),
    ):
        on.add(label, dr.compress(net, on.batches[0], budget, on.batches).module)


def narrower(on: Field, epochs: int | None = None) -> None:
    """Another model: the dense one of as many FLOPs as are to be kept, trained from nothing. epochs: of both ways."""
    task = TASKS[on.name]
    width, share = task.narrower(dr.Ratio(0.25), KEPT)
    for label, long in (("epochs", task.epochs), ("FLOPs", round(task.epochs / share))):
        net = trained(task, METHODS["dense"], epochs=epochs or long, width=width)
        on.add(f"narrower dense, trained for as many {label}", dr.inline(net))


def comprexx(on: Field) -> None:
    """Its low-rank stage takes linear layers alone; its structured pruning sets filters to zero."""
    import comprexx as cx

    shape = tuple(on.batches[0][0].shape)
    for label, stage in (
        (f"comprexx, low rank {KEPT / 2:g}", lambda: cx.stages.LowRankDecomposition(rank_ratio=KEPT / 2)),
        ("comprexx, structured pruning 0.5", lambda: cx.stages.StructuredPruning(sparsity=0.5)),
    ):
        attempt(on, label, lambda stage=stage: cx.Pipeline([stage()]).run(on.dense, input_shape=shape).model)  # type: ignore[misc]


def tensorly_torch(on: Field) -> None:
    """Convolutions in Tucker and CP form, linear layers as block tensor trains; the stem and the head as they are."""
    import tltorch

    def made(kind: str) -> nn.Module:
        model = copy.deepcopy(on.dense)
        for name, part in list(model.named_modules()):
            parent, _, last = name.rpartition(".")
            if isinstance(part, nn.Conv2d) and part.kernel_size != (1, 1) and part.in_channels > 3:
                other = tltorch.FactorizedConv.from_conv(
                    part, rank=KEPT, factorization=kind, implementation="factorized"
                )
            elif isinstance(part, nn.Linear) and kind == "blocktt" and part.out_features > 10:
                other = tltorch.FactorizedLinear.from_linear(
                    part, rank=KEPT, factorization=kind, n_tensorized_modes=2, implementation="factorized"
                )
            else:
                continue
            setattr(model.get_submodule(parent), last, other)
        return model

    kinds = ("tucker", "cp") if any(isinstance(m, nn.Conv2d) for m in on.dense.modules()) else ("blocktt",)
    for kind in kinds:
        attempt(on, f"tensorly-torch, {kind} {KEPT}", lambda kind=kind: made(kind))  # type: ignore[misc]


def torch_pruning(on: Field) -> None:
    """Whole channels by the Taylor criterion on the calibration batches, and by magnitude."""
    import torch_pruning as tp

    def made(taylor: bool) -> nn.Module:
        model = copy.deepcopy(on.dense)
        ignored = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features in (10, 96)]
        attention = [m for m in model.modules() if isinstance(m, chars.Attention)]
        heads = {part: m.heads for m in attention for part in (m.query, m.key, m.value)}
        pruner = tp.pruner.BasePruner(
            model,
            on.batches[0],
            importance=tp.importance.GroupTaylorImportance() if taylor else tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=1 - KEPT**0.5,
            global_pruning=False,
            ignored_layers=ignored,
            num_heads=heads,
            round_to=max([1, *heads.values()]),
            unwrapped_parameters=[(p, p.ndim - 1) for n, p in model.named_parameters() if n == "positions"],
        )
        if taylor:
            for batch in on.batches:
                model(*batch).square().mean().backward()
        pruner.step()
        model.zero_grad()
        return model

    for label, taylor in (("Taylor", True), ("magnitude", False)):
        attempt(on, f"Torch-Pruning, {label}", lambda taylor=taylor: made(taylor))  # type: ignore[misc]


def quantization(on: Field, small: nn.Module) -> None:
    """onnxruntime's int8, of the dense file and of the file that dynrank-fx made."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self, name: str) -> None:
            self.feeds: Iterator[dict[str, Any]] = iter([{name: batch[0].numpy()} for batch in on.batches])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.feeds, None)

    for label, model in (("dense", on.dense), (f"dynrank-fx, params={KEPT}", small)):
        source, ready = on.file(model, "toquant"), FILES / "ready.onnx"
        quant_pre_process(str(source), str(ready))
        name = session(source, ("CPUExecutionProvider",)).get_inputs()[0].name
        for way in ("static", "dynamic"):
            target = FILES / f"{on.name}-{len(on.rows)}.onnx"
            try:
                if way == "static":
                    quantize_static(str(ready), str(target), Reader(name), per_channel=True)
                else:
                    quantize_dynamic(str(ready), str(target))
                on.add_file(f"onnxruntime int8, {way}, of {label}", target)
            except Exception as error:
                on.fail(f"onnxruntime int8, {way}, of {label}", error)


def attempt(on: Field, label: str, make: Callable[[], nn.Module]) -> None:
    try:
        on.add(label, make())
    except Exception as error:  # other tools' own
        on.fail(label, error)


def compared(name: str, epochs: int | None = None) -> Field:
    """A network in every tool. epochs: of its training, in place of the task's, to see that it runs."""
    task = TASKS[name]
    net = trained(task, METHODS["dense"], epochs=epochs)
    on = Field(name, dr.inline(net).eval(), calibration(task), steps=100 if epochs is None else 1)
    original = task.model()  # the others look for layers of torch's classes
    original.load_state_dict(net.state_dict())
    on.dense = original.eval()
    on.add("dense", on.dense)
    ours(on, net)
    narrower(on, epochs)
    small = dr.compress(net, on.batches[0], dr.Budget(params=KEPT), on.batches).module
    for other in (comprexx, tensorly_torch, torch_pruning):
        try:
            other(on)
        except Exception as error:
            on.fail(other.__name__, error)
    quantization(on, small)
    return on


def rivals(quick: bool) -> Table:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    FILES.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fields = (
            [compared("digits-vit", epochs=1)] if quick else [compared(name) for name in ("digits-conv", "chars-64")]
        )
    rows = [row for each in fields for row in each.timed()]
    return Table(COLUMNS, tuple(rows), f"Parameters, FLOPs, file and time are over dense; {KEPT} were to be kept.")
