"""A training step of a GPT under torch.compile and bfloat16 autocast with fused AdamW: time, and memory at its peak."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

import dynrank_fx as dr
from benchmarks.measuring import DEVICE, gpt
from benchmarks.result import Column, Table
from dynrank_fx.timing import interleaved

COLUMNS = (
    Column("width"),
    Column("parameters", "M", ".0f"),
    Column("rank"),
    Column("phase"),
    Column("original step", "ms", ".1f"),
    Column("its step", "ms", ".1f"),
    Column("ratio", spec=".3f"),
    Column("ratio of FLOPs", spec=".3f"),
    Column("original's peak memory", "GB", ".2f"),
    Column("ratio of peaks", spec=".3f"),
)


def large(quick: bool) -> Table:
    size = 2 if quick else gpt.BATCH
    batch = next(iter(gpt.Windows(torch.randint(256, (100_000,), dtype=torch.uint8, device=DEVICE), 1, size)))
    rows = []
    shapes = ((gpt.WIDTH, gpt.LAYERS, 4), (gpt.WIDTH, gpt.LAYERS, 8), (2048, 4, 4), (2048, 4, 8))
    for width, layers, part in ((64, 2, 4),) if quick else shapes:
        model = gpt.GPT(width, width // 64, layers)
        net = dr.transform(model, (batch[0][:2].cpu(),), rank=dr.Ratio(1 / part), leave=tuple(dr.Role))
        plan = dr.plan_of(net)
        sides = {"original": model.to(DEVICE)}
        for phase in (dr.Phase.FULL, dr.Phase.LOW):
            sides[phase.name] = copy.deepcopy(net).to(DEVICE)
            dr.enter_(sides[phase.name], phase)
        steps = {name: train_step(side, batch) for name, side in sides.items()}
        peaks = {name: peak(step) for name, step in steps.items()}
        dense = peaks["original"]
        for name in ("FULL", "LOW"):
            pair = interleaved(steps["original"], steps[name], repeats=3 if quick else 20)
            flops = (plan.low_flops or 0) / (plan.total_flops or 1) if name == "LOW" else 1.0
            memory = (None, None) if dense is None else (dense / 1e9, (peaks[name] or 0) / dense)
            times = 1e3 * pair.first, 1e3 * pair.second, pair.ratio
            rows.append((width, plan.total_params / 1e6, f"1/{part}", name, *times, flops, *memory))
            print(*rows[-1], sep="  ", file=sys.stderr, flush=True)  # a table that is cut short is lost
    return Table(COLUMNS, tuple(rows), f"{size} windows of {batch[0].shape[1]} bytes.")


def train_step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward = torch.compile(model, fullgraph=True, dynamic=False)

    def step() -> None:
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            loss = gpt.loss(forward(batch[0]), batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peak(step: Callable[[], None]) -> int | None:
    """Bytes that a step takes at most, what its optimizer holds included; None without a GPU."""
    if DEVICE != "cuda":
        step()
        return None
    before = torch.cuda.memory_allocated()
    for _ in range(2):
        step()
    held = torch.cuda.memory_allocated() - before  # the optimizer's state; gradients are gone
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    step()
    return held + torch.cuda.max_memory_allocated() - base
