"""Against what a user would do instead: a factored model beside a narrower dense one, trained and run at equal FLOPs.

A cell is one training run. All runs of a width, rank and length have one budget: the FLOPs that LOW alone takes for so
many steps, counted by torch. The narrower dense model is the one whose step takes nearly as many FLOPs as a step of
LOW, and so does its inference. Every way has the same data, the same learning rates to choose from, and half a cosine
of it, with a warm-up. Rows are appended to narrower.jsonl as they end, and are not run again.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import multiprocessing
import statistics
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.flop_counter import FlopCounterMode

import dynrank_fx as dr
from benchmarks.measuring import chars, gpt
from benchmarks.result import Column, Table
from benchmarks.study.rows import rows_in
from dynrank_fx.randomness import seed_all
from dynrank_fx.timing import machine

ROWS = Path(__file__).parent / "narrower.jsonl"
JOBS = 2
WARM_UP = 100
"""Steps over which the learning rate rises; so many, too, for a new optimizer after the last cut."""
DENSE, LOW = "narrower dense", "LOW alone"
SCALED = "LOW alone, steps in the measure of the product"
EARLY = "FULL for 0.12 of the FLOPs, landing, then LOW"
AUTO = "FULL for 0.4 of the steps, landing, then LOW"
SHARE, FULL_IN_AUTO = 0.12, 0.4

Batch = tuple[Tensor, Tensor]
Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Text:
    """A language model on source text. model: of a width and a number of heads; the narrower one has as many heads as
    the factored one. lr: of AdamW; Muon has twice as much.
    """

    name: str
    model: Callable[[int, int], nn.Module]
    heads: Callable[[int], int]
    text: Callable[[], tuple[Tensor, Tensor]]
    context: int
    windows: int
    lr: float
    device: str = "cpu"
    exclude: Sequence[str] = ("embed", "head")

    def batch(self, generator: torch.Generator) -> Batch:
        text = self.text()[0]
        at = torch.randint(len(text) - self.context - 1, (self.windows, 1), generator=generator)
        pieces = text[(at + torch.arange(self.context + 1)).to(text.device)].long()
        return pieces[:, :-1], pieces[:, 1:]

    @torch.no_grad()
    def held_out_loss(self, model: nn.Module) -> float:
        """Of windows side by side, at most 4,096."""
        text, length = self.text()[1], self.context + 1
        pieces = text[: len(text) // length * length].view(-1, length)[:4096].long()
        model.eval()
        with self.precision():
            losses = [self.loss(model, (some[:, :-1], some[:, 1:])).double() for some in pieces.split(256)]
        return float(torch.stack(losses).mean())

    def loss(self, model: Forward, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    def precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda")

    def flops(self, model: nn.Module) -> int:
        """Of a training step, counted by torch."""
        batch = self.batch(torch.Generator().manual_seed(0))
        model = copy.deepcopy(model).train().to(self.device)
        with FlopCounterMode(display=False) as counter:
            self.loss(model, batch).backward()
        return counter.get_total_flops()


@cache
def library() -> tuple[Tensor, Tensor]:
    """Characters of the standard library's own modules, as in the sample ``chars``: to train on, and of every tenth
    8,192 to hold out.
    """
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    codes = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8).long() - 31
    codes[codes == ord("\n") - 31] = 0
    codes = codes[(codes >= 0) & (codes < chars.CHARACTERS)]
    blocks = codes[: len(codes) // 8192 * 8192].view(-1, 8192)
    held_out = torch.arange(len(blocks)) % 10 == 9
    return blocks[~held_out].flatten(), blocks[held_out].flatten()


TASKS = {
    task.name: task
    for task in (
        Text("characters", partial(chars.CharTransformer, layers=2), lambda _: 4, library, 64, 32, 2e-3),
        Text("GPT", partial(gpt.GPT, layers=4), lambda w: w // 64, gpt.text, gpt.CONTEXT, 64, 1e-3, "cuda"),
    )
}


@dataclass(frozen=True)
class Cell:
    """One run. width: of the factored model. rank: over the lesser side of each weight. optimizer: of the matrices;
    all else has AdamW, and so has FULL. length: the steps of LOW alone, whose FLOPs are the budget. rate: over the
    learning rate of the task.
    """

    task: str
    width: int
    rank: float
    way: str
    optimizer: str
    seed: int
    length: int
    rate: float = 1.0


def cells() -> Iterator[Cell]:
    """The most telling first."""

    def text(width: int, rank: float, way: str, optimizer: str, length: int, rate: float = 1.0, seed: int = 0) -> Cell:
        return Cell("characters", width, rank, way, optimizer, seed, length, rate)

    both, all_three = ("Muon", "AdamW"), (DENSE, LOW, EARLY)
    for width in (128, 256):
        yield from (text(width, 0.25, SCALED, "Muon", 1500, rate) for rate in (4.0, 8.0))
        yield from (text(width, 0.25, DENSE, "Muon", 1500, rate) for rate in (4.0, 8.0))
        yield text(width, 0.25, LOW, "Muon", 1500, 4.0)
    for rate in (2.0, 4.0):
        yield from (text(256, 0.25, way, "AdamW", 1500, rate) for way in (SCALED, DENSE))
        yield from (text(512, 0.25, way, "Muon", 1000, rate) for way in (SCALED, DENSE))
    for width, rank in ((128, 0.5), (256, 0.5), (64, 0.25), (128, 0.125), (256, 0.125)):
        yield from (text(width, rank, way, "Muon", 1500, rate) for rate in (4.0, 8.0) for way in (SCALED, DENSE))
    yield from (text(256, 0.25, way, "Muon", 1500, 4.0, seed) for seed in (1, 2) for way in (SCALED, DENSE))
    yield from (text(512, 0.25, way, "Muon", 1000, 1.0) for way in (SCALED, DENSE))
    for width, optimizer in ((256, "Muon"), (128, "Muon"), (128, "AdamW"), (256, "AdamW"), (64, "Muon")):
        yield from (text(width, 0.25, way, optimizer, 1500, rate) for way in (LOW, DENSE) for rate in (1.0, 0.5, 2.0))
    yield text(256, 0.25, EARLY, "Muon", 1500)
    for rank, width in itertools.product((0.5, 0.125), (128, 256)):
        yield from (text(width, rank, way, "Muon", 1500, rate) for way in (LOW, DENSE) for rate in (1.0, 2.0))
    for length, width, rank in ((3000, 256, 0.25), (1500, 512, 0.25), (3000, 128, 0.25)):
        for seed, optimizer in itertools.product((0, 1, 2), both):
            yield from (
                text(width, rank, way, optimizer, length, rate, seed) for rate in (1.0, 2.0) for way in all_three
            )
            if optimizer == "AdamW":
                yield text(width, rank, AUTO, optimizer, length, seed=seed)
    for width, rank in ((1024, 0.25), (2048, 0.25), (512, 0.25), (1024, 0.125), (2048, 0.125)):
        yield from (Cell("GPT", width, rank, way, optimizer, 0, 2000) for optimizer in both for way in all_three)


def train(cell: Cell) -> dict[str, Any]:
    """The row of one cell."""
    started, task = time.perf_counter(), TASKS[cell.task]
    run = Run.of(cell, task)
    model, done = run.narrower() if cell.way == DENSE else run.factored()
    loss = task.held_out_loss(model)
    return {
        **asdict(cell),
        "steps": done,
        "trained_width": run.narrower_width if cell.way == DENSE else cell.width,
        "step_flops": task.flops(model) / run.full,
        "training_flops": run.spent / run.full / cell.length,
        "loss": round(loss, 4),
        "seconds": round(time.perf_counter() - started),
        "machine": machine(),
    }


@dataclass
class Run:
    """A cell at work. net: the factored model. full, low: FLOPs of its steps. spent: FLOPs of the training."""

    cell: Cell
    task: Text
    net: nn.Module
    full: int
    low: int
    data: torch.Generator
    spent: int = 0

    @classmethod
    def of(cls, cell: Cell, task: Text) -> Run:
        seed_all(cell.seed)
        dense = task.model(cell.width, task.heads(cell.width))
        example = torch.zeros(2, task.context, dtype=torch.long)
        net = dr.transform(dense, (example,), rank=dr.Ratio(cell.rank), exclude=task.exclude, leave=tuple(dr.Role))
        low = copy.deepcopy(net)
        dr.enter_(low, dr.Phase.LOW)
        generator = torch.Generator().manual_seed(1000 + cell.seed)
        return cls(cell, task, net.to(task.device), task.flops(dense), task.flops(low), generator)

    @property
    def narrower_width(self) -> int:
        """Of the dense model whose step takes most nearly as many FLOPs as one of LOW."""
        task, heads = self.task, self.task.heads(self.cell.width)
        widths = range(heads, self.cell.width + 1, heads)
        return min(widths, key=lambda width: abs(task.flops(task.model(width, heads)) - self.low))

    def narrower(self) -> tuple[nn.Module, int]:
        """The trained dense model, and its steps."""
        seed_all(self.cell.seed)
        model = self.task.model(self.narrower_width, self.task.heads(self.cell.width)).to(self.task.device)
        cost = self.task.flops(model)
        steps = round(self.cell.length * self.low / cost)
        self._train(model, self.optimizers(model), steps, steps, cost)
        return model, steps

    def factored(self) -> tuple[nn.Module, int]:
        """The trained factored model, cut, and its steps. FULL comes first, and a landing is at its end."""
        budget, price = self.cell.length * self.low, self.full - self.low
        if self.cell.way == AUTO:
            steps = round(budget / (self.low + FULL_IN_AUTO * price))
            full = round(FULL_IN_AUTO * steps)
        else:
            full = round(SHARE * budget / self.full) if self.cell.way == EARLY else 0
            steps = full + round((budget - full * self.full) / self.low)
        if full:
            optimizers = self.optimizers(self.net, matrices_by="AdamW")
            schedule = dr.schedules.warm_up(1)
            phases = dr.Phases(self.net, optimizers, schedule, 2, steps=full, landing=True, by_itself=False)
            phases.begin(0)
            self._train(self.net, optimizers, full, steps, self.full)
            phases.begin(1)
            phases.remove()
        else:
            dr.enter_(self.net, dr.Phase.LOW)
        optimizers = self.optimizers(self.net) if self.cell.optimizer == "Muon" or not full else optimizers
        if self.cell.way == SCALED:
            dr.factor_steps_(self.net, optimizers)
        if self.cell.optimizer == "AdamW":
            dr.factor_decay_(self.net, optimizers[0], dr.Decay.PRODUCT)
        self._train(self.net, optimizers, steps - full, steps, self.low)
        return dr.truncate(self.net), steps

    def optimizers(self, model: nn.Module, matrices_by: str = "") -> list[Optimizer]:
        matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("layers.")]
        known = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in known]
        lr = self.cell.rate * self.task.lr
        if (matrices_by or self.cell.optimizer) == "AdamW":
            return [AdamW([*matrices, *others], lr=lr, weight_decay=0.01)]
        muon = Muon(matrices, lr=2 * lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        return [muon, AdamW(others, lr=lr, weight_decay=0.01)]

    def _train(self, model: nn.Module, optimizers: Sequence[Optimizer], steps: int, total: int, cost: int) -> None:
        """So many steps, the last of the run or those before them: of half a cosine over all of its steps."""
        begin = 0 if self.spent == 0 else total - steps
        rates = [LambdaLR(optimizer, lambda step: _rate(step, begin, total)) for optimizer in optimizers]
        forward: Forward = torch.compile(model, dynamic=False) if self.task.device == "cuda" else model
        model.train()
        for _ in range(steps):
            with self.task.precision():
                loss = self.task.loss(forward, self.task.batch(self.data))
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            for rate in rates:
                rate.step()
        self.spent += steps * cost


def _rate(step: int, begin: int, total: int) -> float:
    return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * min(1.0, (begin + step) / total)))


def kept() -> dict[Cell, dict[str, Any]]:
    return rows_in(ROWS, Cell)


def _work(cell: Cell) -> dict[str, Any]:
    if TASKS[cell.task].device == "cpu":
        torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    return train(cell)


def narrower(quick: bool) -> Table:
    """Run what is missing (on a GPU, the cells of the GPT alone); quick: one small cell of each way, for a few steps,
    which are not kept.
    """
    there = "cuda" if torch.cuda.is_available() else "cpu"
    if quick:
        return table([train(Cell("characters", 32, 0.25, way, "Muon", 0, 20)) for way in (DENSE, LOW, SCALED, EARLY)])
    done = kept()
    wanted = [cell for cell in cells() if cell not in done and TASKS[cell.task].device == there]
    print(f"{len(wanted)} runs to do, {len(done)} are done", file=sys.stderr)
    with multiprocessing.get_context("spawn").Pool(JOBS if there == "cpu" else 1) as pool, ROWS.open("a") as file:
        for row in pool.imap_unordered(_work, wanted):
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(*(row[name] for name in (*Cell.__dataclass_fields__, "loss")), file=sys.stderr)
    return table(list(kept().values()))


COLUMNS = (
    Column("task"),
    Column("width"),
    Column("rank", spec="g"),
    Column("steps of LOW"),
    Column("optimizer"),
    Column("way"),
    Column("learning rate", spec="g"),
    Column("seeds"),
    Column("width trained"),
    Column("steps"),
    Column("FLOPs of a step at the end", spec=".3f"),
    Column("held-out loss", spec=".4f"),
    Column("its deviation", spec=".4f"),
    Column("above narrower dense", spec="+.4f"),
)


def table(rows: list[dict[str, Any]]) -> Table:
    """A line for each way and learning rate, over its seeds, beside the narrower dense model of the same seed and
    optimizer at the learning rate that is best for it.
    """
    beside: dict[tuple[Any, ...], float] = {}
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        same = tuple(row[name] for name in ("task", "width", "rank", "length", "optimizer"))
        groups.setdefault((*same, row["way"], row["rate"]), []).append(row)
        if row["way"] == DENSE:
            beside[(*same, row["seed"])] = min(row["loss"], beside.get((*same, row["seed"]), math.inf))
    lines = []
    for (*setting, way, rate), some in groups.items():
        losses = [row["loss"] for row in some]
        dense = [beside.get((*setting, row["seed"])) for row in some]
        gaps = [row["loss"] - best for row, best in zip(some, dense, strict=True) if best is not None]
        lines.append(
            (
                *setting,
                way,
                rate,
                len(some),
                *(some[0][name] for name in ("trained_width", "steps", "step_flops")),
                statistics.mean(losses),
                statistics.stdev(losses) if len(losses) > 1 else None,
                statistics.mean(gaps) if gaps else None,
            )
        )
    ways = (DENSE, LOW, SCALED, EARLY, AUTO)
    lines.sort(key=lambda line: (*line[:5], ways.index(line[5]), line[6]))
    return Table(
        COLUMNS,
        tuple(lines),
        "FLOPs are over those of the dense model of the same width; the learning rate is in parts of the task's; lower "
        "losses are better.",
    )
