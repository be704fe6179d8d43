"""The same trained network and calibration data given to other tools: `python samples/study/rivals.py`, which prints a
table.

Needs `pip install comprexx tensorly tensorly-torch torch-pruning`. Seed 0, dense training, 16 batches of training
inputs; every tool's result gets its batch norms recalibrated on them and, in a column of its own, the same 100 steps
towards the dense model's outputs. All files (runs/rivals) are timed at the end, when nothing else runs.
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
from cutting import BATCH, accuracy, calibration, exported, flops_of, latency, params, trained
from methods import METHODS
from tasks import TASKS, chars
from torch import nn

import dynrank_fx as dr
from dynrank_fx.onnx import session
from dynrank_fx.timing import machine

FILES = Path(__file__).parents[2] / "runs" / "rivals"
Batches = Sequence[tuple[torch.Tensor]]
HEAD = ("network", "tool", "accuracy", "+ 100 steps", "parameters", "FLOPs", "file", "time")
KEPT = 0.3
"""The share of the parameters that every tool which can be told is told to keep."""


@dataclass
class Field:
    """What is compared on: the dense model, its task, the batches; the rows so far, each with its file, if any."""

    name: str
    dense: nn.Module
    batches: Batches
    rows: list[tuple[list[str], Path | None]] = field(default_factory=list)

    def file(self, model: nn.Module, name: str) -> Path:
        return exported(model, self.batches[0], FILES, f"{self.name}-{name}")

    @property
    def reference(self) -> Path:
        return FILES / f"{self.name}-dense.onnx"

    def add(self, tool: str, model: nn.Module) -> None:
        """A row of a module."""
        data, model = TASKS[self.name].data(), model.eval()
        dr.recalibrate_(model, self.batches)
        plain, recovered = accuracy(model, data), copy.deepcopy(model)
        after = ""
        if tool != "dense":
            dr.recover_(recovered, self.dense, self.batches, 100)
            after = f"{100 * accuracy(recovered, data):.2f} %"
        path = self.file(model, f"{len(self.rows)}" if tool != "dense" else "dense")
        size = f"{params(model) / params(self.dense):.2f}"
        flops = f"{flops_of(model, self.batches[0]) / flops_of(self.dense, self.batches[0]):.2f}"
        self._row(tool, f"{100 * plain:.2f} %", after, size, flops, path)

    def add_file(self, tool: str, path: Path) -> None:
        """A row of an ONNX file that stands for no module."""
        opened, data = session(path, ("CPUExecutionProvider",)), TASKS[self.name].data()
        inputs = opened.get_inputs()[0].name

        def run(x: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(opened.run(None, {inputs: x.numpy()})[0])

        scores = [float(data.metric(run(batch[0]), batch)) for batch in data.eval_data or ()]  # type: ignore[misc]
        self._row(tool, f"{100 * sum(scores) / len(scores):.2f} %", "", "", "", path)

    def _row(self, tool: str, plain: str, after: str, size: str, flops: str, path: Path) -> None:
        length = path.stat().st_size / self.reference.stat().st_size
        self.rows.append(([self.name, tool, plain, after, size, flops, f"{length:.2f}"], path))
        print(self.rows[-1][0], file=sys.stderr, flush=True)

    def timed(self) -> list[list[str]]:
        """The rows, with their file's time over the dense model's."""
        times = [None if path is None else latency(path, self.reference, BATCH[self.name]) for _, path in self.rows]
        return [[*row, "" if each is None else f"{each:.2f}"] for (row, _), each in zip(self.rows, times, strict=True)]


def ours(on: Field, net: nn.Module) -> None:
    for label, budget in (
        (f"dynrank-fx, params={KEPT}", dr.Budget(params=KEPT)),
        (f"dynrank-fx, flops={KEPT}", dr.Budget(flops=KEPT)),
    ):
        on.add(label, dr.compress(net, on.batches[0], budget, on.batches).module)


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

    class Reader(CalibrationDataReader):  # type: ignore[misc]
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
                failed(on, f"onnxruntime int8, {way}, of {label}", error)


def attempt(on: Field, label: str, make: Callable[[], nn.Module]) -> None:
    try:
        on.add(label, make())
    except Exception as error:  # other tools' own
        failed(on, label, error)


def failed(on: Field, label: str, error: Exception) -> None:
    said = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:90] if str(error).strip() else ''}"
    on.rows.append(([on.name, label, f"does not work: {said}", "", "", "", ""], None))
    print(on.rows[-1][0], file=sys.stderr, flush=True)


def compared(name: str) -> Field:
    task = TASKS[name]
    net = trained(task, METHODS["dense"])
    on = Field(name, dr.inline(net).eval(), calibration(task))
    original = task.model()  # the others look for layers of torch's classes
    original.load_state_dict(net.state_dict())
    on.dense = original.eval()
    on.add("dense", on.dense)
    ours(on, net)
    small = dr.compress(net, on.batches[0], dr.Budget(params=KEPT), on.batches).module
    for other in (comprexx, tensorly_torch, torch_pruning):
        try:
            other(on)
        except Exception as error:
            failed(on, other.__name__, error)
    quantization(on, small)
    return on


def main() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    warnings.simplefilter("ignore")
    FILES.mkdir(parents=True, exist_ok=True)
    fields = [compared(name) for name in sys.argv[1:] or ("digits-conv", "chars-64")]
    input("Done but for the times: press Enter when nothing else runs. ")
    lines = [HEAD, ["---"] * len(HEAD), *(row for each in fields for row in each.timed())]
    print("\n".join("| " + " | ".join(line) + " |" for line in lines))
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
