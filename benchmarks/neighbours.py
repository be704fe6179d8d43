"""Dynamic-rank training beside LoRA and pruning: what each does to the same model while it trains, and what it leaves.

Needs `pip install 'dynrank-fx[neighbours]'`. Each tool trains the sample for some steps, changes shapes where it has
such an action (FULL to LOW, a pruning step), trains as long again, and gives its result. The optimizer and the average
are made before the first step.
"""

from __future__ import annotations

import copy
import itertools
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode

import dynrank_fx as dr
from benchmarks.measuring import DEVICE, SAMPLES, Sample, chars
from benchmarks.result import Cell, Column, Table
from dynrank_fx.onnx import session
from dynrank_fx.randomness import seed_all

STEPS = 20
_NEGLIGIBLE = 1e-4
"""Of the largest singular value, where a rank is counted; and of the largest output, where outputs agree."""


class Tool(Protocol):
    """name: of the column. changes: whether it has an action that changes shapes while the model trains."""

    name: str
    changes: bool

    def model(self, sample: Sample) -> nn.Module:
        """What is trained."""
        ...

    def change_(self, sample: Sample, model: nn.Module, optimizer: Optimizer, average: AveragedModel) -> None:
        """The action that changes shapes, with what of the optimizer and the average the tool takes."""
        ...

    def result(self, model: nn.Module) -> nn.Module:
        """What is deployed; the model stays as it is."""
        ...


class Ours:
    name, changes = "dynrank-fx", True

    def model(self, sample: Sample) -> nn.Module:
        return sample.transformed()

    def change_(self, sample: Sample, model: nn.Module, optimizer: Optimizer, average: AveragedModel) -> None:
        dr.enter_(model, dr.Phase.LOW, optimizer, averages=[average])

    def result(self, model: nn.Module) -> nn.Module:
        if set(dr.phases_of(model).values()) == {dr.Phase.FULL}:
            return dr.inline(model)
        return dr.truncate(model)


class Lora:
    """Adapters of the same ranks, at the same weights."""

    name, changes = "peft (LoRA)", False

    def model(self, sample: Sample) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        ranks = {row.site.name.removesuffix(".weight"): row.rank for row in dr.plan_of(sample.transformed()).sites}
        config = LoraConfig(target_modules=list(ranks), rank_pattern=ranks, lora_alpha=16)
        model: nn.Module = get_peft_model(sample.model(), config)
        return model

    def change_(self, sample: Sample, model: nn.Module, optimizer: Optimizer, average: AveragedModel) -> None:
        raise NotImplementedError

    def result(self, model: nn.Module) -> nn.Module:
        merged: nn.Module = copy.deepcopy(model).merge_and_unload()  # type: ignore[operator]
        return merged


class Pruning:
    """Half of the channels of every layer but the last, by magnitude."""

    name, changes = "Torch-Pruning", True

    def model(self, sample: Sample) -> nn.Module:
        return sample.model()

    def change_(self, sample: Sample, model: nn.Module, optimizer: Optimizer, average: AveragedModel) -> None:
        import torch_pruning as tp

        attention = [part for part in model.modules() if isinstance(part, chars.Attention)]
        heads = {part: each.heads for each in attention for part in (each.query, each.key, each.value)}
        tp.pruner.BasePruner(
            model,
            (sample.batch()[0],),
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=0.5,
            ignored_layers=[model.head],
            num_heads=heads,
            round_to=max([1, *heads.values()]),
            unwrapped_parameters=[(p, p.ndim - 1) for name, p in model.named_parameters() if name == "positions"],
        ).step()

    def result(self, model: nn.Module) -> nn.Module:
        return copy.deepcopy(model)


TOOLS: tuple[Tool, ...] = (Ours(), Lora(), Pruning())
COLUMNS = (Column("model"), Column("what"), *(Column(tool.name, spec=".2f") for tool in TOOLS))


def neighbours(quick: bool) -> Table:
    require()
    rows: list[tuple[Cell, ...]] = []
    for sample in SAMPLES[:1] if quick else SAMPLES:
        columns = [measured(tool, sample, steps=2 if quick else STEPS) for tool in TOOLS]
        name = sample.name.split(" ")[0]
        rows += [(name, what, *(column[what] for column in columns)) for what in columns[0]]
    note = (
        f"Numbers are over the dense model's; – is for an action that the tool does not have. {STEPS} steps before the "
        "change of shapes, and as many after it. dynrank-fx goes from FULL to LOW at a quarter of the full rank, LoRA "
        "has the same ranks at the same weights, and Torch-Pruning takes half of the channels. "
        f"peft {version('peft')}, torch-pruning {version('torch-pruning')}."
    )
    return Table(COLUMNS, tuple(rows), note)


def require() -> None:
    """Raises ImportError where a neighbour is missing, with how to install it."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        # One that was built for another torch. transformers, which peft imports, does without it if there is none.
        sys.modules["torchvision"] = None  # type: ignore[assignment]
    try:
        import peft  # noqa: F401
        import torch_pruning  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error}: the neighbours are installed by pip install 'dynrank-fx[neighbours]'") from error


def measured(tool: Tool, sample: Sample, steps: int) -> dict[str, Cell]:
    """A column of the table for one model."""
    seed_all(0)
    dense, (x, *_) = sample.model(), sample.batch()
    seed_all(0)
    model = tool.model(sample).to(DEVICE).train()
    first = weights(tool.result(model))
    optimizer = sample.module.optimizer(trained := [p for p in model.parameters() if p.requires_grad])
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    flops = step_flops(sample, dense)

    cells: dict[str, Cell] = {"parameters that train": size(trained) / size(dense.parameters())}
    cells["FLOPs of a training step"] = step_flops(sample, model) / flops
    train(sample, model, optimizer, steps)
    changes = {name: weight - first[name] for name, weight in weights(tool.result(model)).items()}
    cells["weights that training has changed"] = share_changed(changes)
    cells["rank of that change, over the full rank"] = mean_rank(changes)
    average.update_parameters(model)

    after: dict[str, Cell] = dict.fromkeys(
        (
            "FLOPs of a training step after the change of shapes",
            "then the optimizer holds exactly the parameters that train",
            "and has its state of each",
            "an AveragedModel made before goes on, and comes to the model",
        ),
        "–",
    )
    if tool.changes:
        tool.change_(sample, model, optimizer, average)
        trained = [p for p in model.parameters() if p.requires_grad]
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        exactly = held == set(map(id, trained))
        answers = (exactly, all(optimizer.state.get(p) for p in trained), follows(average, model, x))
        after = dict(zip(after, (step_flops(sample, model) / flops, *map(said, answers)), strict=True))
        optimizer = optimizer if exactly else sample.module.optimizer(trained)
    cells |= after
    train(sample, model, optimizer, steps)
    cells["torch.compile(fullgraph=True) trains it"] = said(succeeds(lambda: compiled_step(sample, model)))

    result = tool.result(model).eval()
    cells["parameters of the result"] = size(result.parameters()) / size(dense.parameters())
    cells["FLOPs of the result"] = counted(lambda: result(x)) / counted(lambda: dense(x))
    cells["the result is made of torch's own layers"] = said(is_plain(result, dense))
    cells["torch.compile(fullgraph=True) of the result agrees"] = said(
        succeeds(lambda: agree(torch.compile(result, fullgraph=True, dynamic=False)(x), result(x)))
    )
    cells["torch.onnx and onnxruntime agree"] = said(succeeds(lambda: agree(in_onnxruntime(result, x), result(x))))
    return cells


def train(sample: Sample, model: nn.Module, optimizer: Optimizer, steps: int) -> None:
    for batch in itertools.islice(itertools.cycle(sample.module.train_data()), steps):
        optimizer.zero_grad()
        x, y = (t.to(DEVICE) for t in batch)
        sample.module.loss(model(x), (x, y)).backward()
        optimizer.step()
    optimizer.zero_grad()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().double().clone() for name, parameter in model.named_parameters()}


def size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def share_changed(changes: Mapping[str, Tensor]) -> float:
    return sum(int((change != 0).sum()) for change in changes.values()) / size(changes.values())


def mean_rank(changes: Mapping[str, Tensor]) -> float:
    """Over the matrices that have changed at all, convolutions as [out, in · kernel]."""
    matrices = [change.flatten(1) for change in changes.values() if change.ndim > 1 and change.any()]
    ranks = [int(torch.linalg.matrix_rank(matrix, rtol=_NEGLIGIBLE)) / min(matrix.shape) for matrix in matrices]
    return sum(ranks) / len(ranks)


def counted(call: Callable[[], object]) -> int:
    """torch's count of FLOPs."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def step_flops(sample: Sample, model: nn.Module) -> int:
    """Of forward and backward."""
    batch = sample.batch()
    flops = counted(lambda: sample.module.loss(model(batch[0]), batch).backward())
    model.zero_grad()
    return flops


def follows(average: AveragedModel, model: nn.Module, x: Tensor) -> bool:
    """Whether a moving average of a model that stands still comes to compute what the model does."""

    def settle() -> bool:
        for _ in range(60):
            average.update_parameters(model)
        with torch.no_grad():
            return agree(copy.deepcopy(average).eval()(x), copy.deepcopy(model).eval()(x))

    return succeeds(settle)


def compiled_step(sample: Sample, model: nn.Module) -> bool:
    """Whether a compiled step has the loss of an eager one, and gives every parameter that trains its gradient."""
    batch = sample.batch()
    expected = sample.module.loss(model(batch[0]), batch)
    loss = sample.module.loss(torch.compile(model, fullgraph=True, dynamic=False)(batch[0]), batch)
    loss.backward()
    whole = all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.zero_grad()
    return whole and agree(loss, expected)


def is_plain(result: nn.Module, dense: nn.Module) -> bool:
    """Whether every part is of torch's own classes (a graph's among them) or of the dense model's."""
    known = {type(part) for part in dense.modules()}
    kinds = [type(part) for part in result.modules()]
    return all(
        kind in known or kind.__module__.startswith("torch.nn.modules.") or issubclass(kind, torch.fx.GraphModule)
        for kind in kinds
    )


def in_onnxruntime(model: nn.Module, x: Tensor) -> Tensor:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        path = Path(folder) / "model.onnx"
        torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
        opened = session(path, ("CPUExecutionProvider",))
        return torch.from_numpy(opened.run(None, {opened.get_inputs()[0].name: x.cpu().numpy()})[0])


def agree(output: Tensor, expected: Tensor) -> bool:
    output, expected = output.detach().cpu(), expected.detach().cpu()
    return bool((output - expected).abs().max() <= _NEGLIGIBLE * expected.abs().max())


def succeeds(check: Callable[[], bool]) -> bool:
    """The check's answer; no where it raises, with the reason on the terminal."""
    try:
        return check()
    except Exception as error:  # of any tool's own kind
        print(f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}", file=sys.stderr, flush=True)
        return False


def said(answer: bool) -> str:
    return "yes" if answer else "no"
