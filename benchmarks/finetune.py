"""Fine-tuning: a dense-trained net goes on in LOW on other data, beside full fine-tuning and LoRA.

A character transformer is trained dense on Python (the standard library's modules), once for each seed, and then
fine-tuned on English (the prose of ``pydoc_data.topics``). Every way has the same data, AdamW, and half a cosine of a
learning rate after a warm-up. The rate is the best of three or four on seed 0, by the held-out loss at equal FLOPs.

At equal FLOPs every run takes as many as STEPS dense steps, counted by torch; at equal steps every run has STEPS. A
narrower dense model has the FLOPs of inference that LOW ends with. It is trained on both texts too, each for as many
FLOPs as the others; or on English alone, for all of them.

LoRA is peft's (``pip install 'dynrank-fx[neighbours]'``), at every linear layer, and is merged at the end. Rows are
appended to finetune.jsonl as they end, and are not run again; times are measured whenever the table is made.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.flop_counter import FlopCounterMode

import dynrank_fx as dr
from benchmarks.measuring import chars
from benchmarks.result import Cell, Column, Table
from benchmarks.study.narrower import Text, library
from benchmarks.study.rows import rows_in
from dynrank_fx.randomness import seed_all
from dynrank_fx.timing import interleaved, machine

ROWS = Path(__file__).parent / "finetune.jsonl"
WIDTH, HEADS, CONTEXT, WINDOWS = 128, 4, 64, 16
BEFORE, STEPS = 1500, 200
"""Dense steps on Python, and then on English."""
WARM_UP = 20
FULL_SHARE = 0.5
"""Of the FLOPs, where FULL comes first."""
EVERY, ALPHA = 4, 1.0
"""Every so many steps of LOW are distilled, and the factor of that loss."""


@cache
def python() -> tuple[Tensor, Tensor]:
    """To train on; and to look at what is forgotten, every twelfth block of what the study holds out."""
    train, held_out = library()
    return train, held_out.view(-1, 8192)[::12].flatten()


@cache
def english() -> tuple[Tensor, Tensor]:
    """The help texts of Python's language, as characters; every tenth block of 8,192 is held out."""
    source = "\n".join(topics[name] for name in sorted(topics)).encode()
    codes = torch.frombuffer(bytearray(source), dtype=torch.uint8).long() - 31
    codes[codes == ord("\n") - 31] = 0
    codes = codes[(codes >= 0) & (codes < chars.CHARACTERS)]
    blocks = codes[: len(codes) // 8192 * 8192].view(-1, 8192)
    held_out = torch.arange(len(blocks)) % 10 == 9
    return blocks[~held_out].flatten(), blocks[held_out].flatten()


_model = partial(chars.CharTransformer, layers=2)
OLD = Text("Python", _model, lambda _: HEADS, python, CONTEXT, WINDOWS, 4e-3)
NEW = Text("English", _model, lambda _: HEADS, english, CONTEXT, WINDOWS, 2e-3)

FULL, LORA = "full fine-tuning", "LoRA, merged"
NARROW, SCRATCH = "narrower dense, on both texts", "narrower dense, on English alone"
PLAIN, OUTPUTS = "cut at the start by SVD, LOW", "cut at the start by outputs, LOW"
SCALED = "cut at the start by SVD, LOW, steps in the measure of the product"
LANDING = "FULL for half, landing, then LOW"
ABRUPT = "FULL for half, cut by outputs, then LOW"
DISTILLED = "the same, distilled from FULL"
RATES, RATES_OF_LORA = (2e-3, 4e-3, 8e-3), (4e-3, 8e-3, 16e-3)
WAYS = (
    (FULL, 0.0),
    (LORA, 8),
    (LORA, 32),
    *((way, rank) for rank in (0.25, 0.5) for way in (PLAIN, OUTPUTS, SCALED, LANDING)),
    (ABRUPT, 0.25),
    (DISTILLED, 0.25),
    (NARROW, 0.25),
    (SCRATCH, 0.25),
)
"""With ranks: of LoRA; else over the lesser side of each weight, 0 where there is none."""


@dataclass(frozen=True)
class Run:
    """One fine-tuning. equal: what it has as much of as full fine-tuning has, "FLOPs" or "steps"."""

    way: str
    rank: float
    equal: str
    lr: float
    seed: int


def rates(way: str) -> tuple[float, ...]:
    return {LORA: RATES_OF_LORA, SCALED: (*RATES, 16e-3), SCRATCH: (OLD.lr,)}.get(way, RATES)


def wanted(done: dict[Run, dict[str, Any]]) -> Iterator[Run]:
    """The grid, the most telling first; asked again after every run, since the rate is chosen by the first ones."""
    for way, rank in WAYS:
        if way != LORA or has_peft():
            yield from (Run(way, rank, "FLOPs", lr, 0) for lr in rates(way))
    for equal, seed in (("FLOPs", 1), ("steps", 0), ("FLOPs", 2)):
        for way, rank in WAYS:
            once = way == SCRATCH or (way == NARROW and seed > 0)  # long trainings, and far from the others
            same = way == FULL and equal == "steps"  # as at equal FLOPs
            if (lr := chosen(done, way, rank)) and not (once or same):
                yield Run(way, rank, equal, lr, seed)


def chosen(done: dict[Run, dict[str, Any]], way: str, rank: float) -> float | None:
    """The rate with the least loss on seed 0, when all were run."""
    tried = {lr: done.get(Run(way, rank, "FLOPs", lr, 0)) for lr in rates(way)}
    losses = {lr: row["loss"] for lr, row in tried.items() if row}
    return min(losses, key=losses.__getitem__) if len(losses) == len(tried) else None


def has_peft() -> bool:
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):  # one that was built for another torch: peft does without it
        sys.modules["torchvision"] = None  # type: ignore[assignment]
    return find_spec("peft") is not None


def train(run: Run, steps: int = STEPS, before: int = BEFORE) -> dict[str, Any]:
    """The row of one run."""
    tuning = Tuning(run, steps, before)
    model = tuning.result()
    row: dict[str, Any] = {**asdict(run), "loss": NEW.held_out_loss(model), "old_loss": OLD.held_out_loss(model)}
    if run.way == FULL:
        row["before"] = [task.held_out_loss(pretrained(WIDTH, run.seed, before)) for task in (NEW, OLD)]
        for rank in (0.25, 0.5):
            cut = dr.truncate(transformed(model, rank), tuning.calibration())
            row[f"cut_{rank}"] = [NEW.held_out_loss(cut), OLD.held_out_loss(cut)]
    return {
        **row,
        "steps": tuning.done,
        "training_flops": tuning.spent / tuning.dense / steps,
        "step_flops": tuning.flops / tuning.dense,
        "trained_bytes": tuning.trained_bytes,
        "held_bytes": tuning.held_bytes,
        "parameters": sum(p.numel() for p in model.parameters()),
        "inference_flops": forward_flops(model),
        "machine": machine(),
    }


@dataclass
class Tuning:
    """A run at work. dense: FLOPs of a step of full fine-tuning. flops: of a step of the last phase, with its share of
    the teacher. spent: FLOPs of all steps so far. The bytes are the most that any phase holds: of gradients and
    optimizer state, and with all weights.
    """

    run: Run
    steps: int
    before: int
    done: int = 0
    spent: float = 0.0
    flops: float = 0.0
    trained_bytes: int = 0
    held_bytes: int = 0
    data: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.data = torch.Generator().manual_seed(2000 + self.run.seed)
        self.start = pretrained(WIDTH, self.run.seed, self.before)
        self.dense = NEW.flops(self.start)
        seed_all(self.run.seed)

    def calibration(self) -> list[tuple[Tensor]]:
        generator = torch.Generator().manual_seed(3000 + self.run.seed)
        return [NEW.batch(generator)[:1] for _ in range(16)]

    def result(self) -> nn.Module:
        """What is deployed."""
        way, rank = self.run.way, self.run.rank
        if way in (LANDING, ABRUPT, DISTILLED):
            return self._full_first()
        if way in (NARROW, SCRATCH):
            return self._narrower()
        if way == LORA:
            adapted: Any = lora(self.start, int(rank))  # Any: peft's own methods
            self._train(adapted, self._rest(adapted))
            merged: nn.Module = adapted.merge_and_unload()
            return merged
        model = self.start
        if way == SCALED:
            net = transformed(model, rank)
            dr.enter_(net, dr.Phase.LOW)
            optimizer, steps = self._optimizer(net), self._rest(net)
            dr.factor_steps_(net, optimizer)
            self._train(net, steps, optimizer=optimizer)
            return dr.truncate(net)
        if way in (PLAIN, OUTPUTS):
            model = dr.truncate(transformed(model, rank), self.calibration() if way == OUTPUTS else None)
        self._train(model, self._rest(model))
        return model

    def _full_first(self) -> nn.Module:
        net, full = transformed(self.start, self.run.rank), round(FULL_SHARE * self.steps)
        low = copy.deepcopy(net)
        dr.enter_(low, dr.Phase.LOW)
        teacher_flops = forward_flops(self.start) / EVERY if self.run.way == DISTILLED else 0
        left = (self.steps - full) * (self.dense / (NEW.flops(low) + teacher_flops) if self.run.equal == "FLOPs" else 1)
        total, optimizer = full + round(left), self._optimizer(net)
        if self.run.way == LANDING:
            schedule = dr.schedules.warm_up(1)
            phases = dr.Phases(net, optimizer, schedule, 2, steps=full, landing=True, by_itself=False)
            phases.begin(0)
            self._train(net, full, total, optimizer)
            phases.begin(1)
            phases.remove()
            self._train(net, total - full, total, optimizer)
            return dr.truncate(net)
        self._train(net, full, total, optimizer)
        model = dr.truncate(net, self.calibration())
        self._train(model, total - full, total, teacher=dr.inline(net) if self.run.way == DISTILLED else None)
        return model

    def _narrower(self) -> nn.Module:
        """With the FLOPs of both trainings, or of the second."""
        width = narrower_width(self.run.rank)
        if self.run.way == NARROW:
            model = pretrained(width, self.run.seed, self.before)
            self._train(model, self._rest(model))
        else:
            model = NEW.model(width, HEADS)
            self._train(model, round((self.before + self.steps) * self.dense / NEW.flops(model)))
        return model

    def _rest(self, model: nn.Module) -> int:
        """Steps of all that is to be done with this model."""
        return round(self.steps * self.dense / NEW.flops(model)) if self.run.equal == "FLOPs" else self.steps

    def _optimizer(self, model: nn.Module) -> AdamW:
        return AdamW([p for p in model.parameters() if p.requires_grad], lr=self.run.lr, weight_decay=0.01)

    def _train(
        self,
        model: nn.Module,
        steps: int,
        total: int = 0,
        optimizer: AdamW | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        """So many steps, the next of the run, with half a cosine over its total."""
        total, optimizer = total or steps, optimizer or self._optimizer(model)
        warm_up = 1 if optimizer.state else WARM_UP
        model.train()
        for number in range(steps):
            rise = min(1.0, (number + 1) / warm_up)
            for group in optimizer.param_groups:
                group["lr"] = self.run.lr * rise * 0.5 * (1 + math.cos(math.pi * self.done / total))
            step(model, optimizer, NEW.batch(self.data), teacher if number % EVERY == 0 else None)
            self.done += 1
        self.flops = NEW.flops(model) + (forward_flops(teacher) / EVERY if teacher else 0)
        self.spent += steps * self.flops
        trained, weights = held(model, optimizer)
        self.trained_bytes = max(self.trained_bytes, trained)
        others = sum(p.nbytes for p in teacher.parameters()) if teacher else 0
        self.held_bytes = max(self.held_bytes, trained + weights + others)


def step(model: nn.Module, optimizer: AdamW, batch: tuple[Tensor, Tensor], teacher: nn.Module | None = None) -> None:
    """CE + ALPHA KL(teacher, model), the latter where there is one."""
    scores = model(batch[0]).flatten(0, 1)
    loss = F.cross_entropy(scores, batch[1].flatten())
    if teacher is not None:
        with torch.no_grad():
            target = teacher(batch[0]).flatten(0, 1).log_softmax(-1)
        loss = loss + ALPHA * F.kl_div(scores.log_softmax(-1), target, reduction="batchmean", log_target=True)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def held(model: nn.Module, optimizer: AdamW) -> tuple[int, int]:
    """Bytes of gradients and optimizer state; of weights."""
    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return sum(t.nbytes for t in (*states, *gradients)), sum(p.nbytes for p in model.parameters())


def transformed(model: nn.Module, rank: float) -> nn.Module:
    example = torch.zeros(2, CONTEXT, dtype=torch.long)
    return dr.transform(model, (example,), rank=dr.Ratio(rank), exclude=NEW.exclude)


def lora(model: nn.Module, rank: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    names = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    adapted: nn.Module = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names))
    return adapted


@cache
def narrower_width(rank: float) -> int:
    """Of the dense model whose inference takes most nearly as many FLOPs as that of LOW."""
    seed_all(0)
    low = transformed(_model(WIDTH, HEADS), rank)
    dr.enter_(low, dr.Phase.LOW)
    aim = forward_flops(low)
    return min(range(HEADS, WIDTH + 1, HEADS), key=lambda width: abs(forward_flops(_model(width, HEADS)) - aim))


def pretrained(width: int, seed: int, steps: int = BEFORE) -> nn.Module:
    """A dense model after its training on Python, of as many FLOPs as so many steps at WIDTH. It is kept in a temporary
    folder, and trained where it is not there.
    """
    version = ".".join(map(str, sys.version_info[:3]))
    path = Path(tempfile.gettempdir()) / "dynrank-fx-finetune" / f"{width}-{seed}-{steps}-python{version}.pt"
    seed_all(seed)
    model, data = _model(width, HEADS), torch.Generator().manual_seed(1000 + seed)
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model
    total = round(steps * OLD.flops(_model(WIDTH, HEADS)) / OLD.flops(model))
    optimizer = AdamW(model.parameters(), lr=OLD.lr, weight_decay=0.01)
    for done in range(total):
        for group in optimizer.param_groups:
            group["lr"] = OLD.lr * min(1.0, (done + 1) / 100) * 0.5 * (1 + math.cos(math.pi * done / total))
        step(model, optimizer, OLD.batch(data))
    path.parent.mkdir(exist_ok=True)
    torch.save(model.state_dict(), path)
    return model


@torch.no_grad()
def forward_flops(model: nn.Module) -> int:
    """Of one batch."""
    model = copy.deepcopy(model).eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(WINDOWS, CONTEXT, dtype=torch.long))
    return counter.get_total_flops()


def missing(done: dict[Run, dict[str, Any]]) -> Run | None:
    return next((run for run in wanted(done) if run not in done), None)


def kept() -> dict[Run, dict[str, Any]]:
    return rows_in(ROWS, Run)


def finetune(quick: bool) -> Table:
    """Run what is missing; quick: a run of each way for a few steps, not kept."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a cut by plain SVD, which is one of the ways
        if quick:
            runs = [Run(way, rank, "FLOPs", rates(way)[0], 0) for way, rank in WAYS if way != LORA or has_peft()]
            return table({run: train(run, steps=4, before=4) for run in runs}, repeats=1, before=4)
        done = kept()
        while run := missing(done):
            done[run] = train(run)
            with ROWS.open("a") as file:
                file.write(json.dumps(done[run]) + "\n")
            print(*asdict(run).values(), round(done[run]["loss"], 4), sep="  ", file=sys.stderr, flush=True)
        return table(done)


def times(ways: Sequence[tuple[str, float]], repeats: int, before: int) -> dict[tuple[str, float], float]:
    """Of a step of the last phase, over one of full fine-tuning; medians, each timed in turn with the latter."""
    found: dict[tuple[str, float], float] = {}
    dense = pretrained(WIDTH, 0, before)
    reference = _steps(dense)
    for way, rank in ways:
        like = OUTPUTS if way in (PLAIN, LANDING, ABRUPT) else NARROW if way == SCRATCH else way
        if (like, rank) not in found:
            if like == LORA:
                model = lora(copy.deepcopy(dense), int(rank))
            elif like == NARROW:
                model = _model(narrower_width(rank), HEADS)
            elif like == SCALED:
                model = transformed(dense, rank)
                dr.enter_(model, dr.Phase.LOW)
            else:
                model = dr.truncate(transformed(dense, rank)) if rank else dense
            steps = _steps(model, dense if like == DISTILLED else None, scaled=like == SCALED)
            found[like, rank] = interleaved(reference, steps, repeats=repeats, warmup=1).ratio
        found[way, rank] = found[like, rank]
    return found


def _steps(model: nn.Module, teacher: nn.Module | None = None, *, scaled: bool = False) -> Callable[[], None]:
    """As many steps as there are for each that is distilled."""
    model = copy.deepcopy(model).train()
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    batch = NEW.batch(torch.Generator().manual_seed(0))
    if scaled:
        dr.factor_steps_(model, optimizer)

    def call() -> None:
        for number in range(EVERY):
            step(model, optimizer, batch, None if number else teacher)

    return call


COLUMNS = (
    Column("way"),
    Column("rank", spec="g"),
    Column("learning rate", spec="g"),
    Column("seeds"),
    Column("steps"),
    Column("loss on English", spec=".3f"),
    Column("its deviation", spec=".3f"),
    Column("on Python", spec=".3f"),
    Column("equal steps: FLOPs", spec=".2f"),
    Column("seeds"),
    Column("loss on English", spec=".3f"),
    Column("on Python", spec=".3f"),
    Column("FLOPs of a step", spec=".2f"),
    Column("its time", spec=".2f"),
    Column("gradients and state", spec=".2f"),
    Column("all that is held", spec=".2f"),
    Column("parameters of the result", spec=".2f"),
    Column("FLOPs of the result", spec=".2f"),
)


def table(done: dict[Run, dict[str, Any]], repeats: int = 15, before: int = BEFORE) -> Table:
    """A line for each way, at the rate that was chosen for it."""
    lines: list[tuple[Cell, ...]] = []
    ways = [each for each in WAYS if any((run.way, run.rank) == each for run in done)]
    clock = times(ways, repeats, before)
    full = next(row for run, row in done.items() if run.way == FULL)
    for way, rank in ways:
        tried = [run for run in done if (run.way, run.rank, run.equal, run.seed) == (way, rank, "FLOPs", 0)]
        best = min(tried, key=lambda run: done[run]["loss"])
        rows, equal = (
            [row for run, row in done.items() if (run.way, run.rank, run.equal, run.lr) == (way, rank, by, best.lr)]
            for by in ("FLOPs", "steps")
        )
        equal = rows if way == FULL else equal
        row = rows[0]
        names = ("trained_bytes", "held_bytes", "parameters", "inference_flops")
        lines.append(
            (
                way,
                rank or None,
                best.lr,
                len(rows),
                row["steps"],
                *_mean(rows, "loss"),
                _mean(rows, "old_loss")[0],
                _mean(equal, "training_flops")[0],
                len(equal) or None,
                _mean(equal, "loss")[0],
                _mean(equal, "old_loss")[0],
                row["step_flops"],
                clock[way, rank],
                *(row[name] / full[name] for name in names),
            )
        )
    fulls = [row for run, row in done.items() if (run.way, run.lr) == (FULL, lines[0][2])]
    return Table(COLUMNS, tuple(lines), _note(fulls))


def _mean(rows: Sequence[dict[str, Any]], name: str) -> tuple[Cell, Cell]:
    """And the deviation."""
    values = [row[name] for row in rows]
    return statistics.mean(values) if values else None, statistics.stdev(values) if len(values) > 1 else None


def _note(full: Sequence[dict[str, Any]]) -> str:
    """full: rows of full fine-tuning."""
    before, *cuts = (
        [statistics.mean(row[name][at] for row in full) for at in (0, 1)] for name in ("before", "cut_0.25", "cut_0.5")
    )
    sentences = [
        f"Before it the dense model has a loss of {before[0]:.3f} on English and {before[1]:.3f} on Python.",
        *(
            f"Fully fine-tuned and then cut by outputs to rank {rank}, without further training, it has {cut[0]:.3f} "
            f"and {cut[1]:.3f}."
            for rank, cut in zip(("1/4", "1/2"), cuts, strict=True)
        ),
        "FLOPs, times, bytes, parameters are over those of full fine-tuning. A step's are those of the last phase; "
        "bytes are the most that any phase holds, gradients and optimizer state, and with weights and a teacher's.",
    ]
    if not has_peft():
        sentences.append("LoRA is left out where peft is not installed: pip install 'dynrank-fx[neighbours]'.")
    return " ".join(sentences)
