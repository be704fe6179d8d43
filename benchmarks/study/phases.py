"""What a training step of the study's tasks takes in each phase: kept in phases.json, from which the study takes times.

Run it when nothing else runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import dynrank_fx as dr
from benchmarks.result import Column, Table
from benchmarks.study.cells import PHASES
from benchmarks.study.tasks import TASKS, StudyTask
from dynrank_fx.randomness import seed_all
from dynrank_fx.timing import interleaved
from dynrank_fx.training import Settings, Task, autocast

COLUMNS = (
    Column("network"),
    Column("phase"),
    Column("FLOPs", spec=".2f"),
    Column("time", spec=".2f"),
    Column("bytes held", spec=".2f"),
    Column("bytes at the peak", spec=".2f"),
)
WHAT = ("flops", "time", "bytes", "peak")


def phases(quick: bool) -> Table:
    torch.set_num_threads(1)
    there = "cuda" if torch.cuda.is_available() else "cpu"
    names = ["digits-vit"] if quick else [name for name, task in TASKS.items() if task.device == there]
    found = {name: measured(TASKS[name], 0.25, repeats=3 if quick else 30) for name in names}
    if not quick:
        known = json.loads(PHASES.read_text()) if PHASES.exists() else {}
        PHASES.write_text(json.dumps(known | found, indent=1) + "\n")
    return table(found)


def table(found: dict[str, dict[str, dict[str, float]]]) -> Table:
    """found: by network and phase, the ratios to a step in FULL."""
    rows = [
        (name, phase, *(of[phase][what] for what in WHAT)) for name, of in found.items() for phase in ("LOW", "ADAPTOR")
    ]
    note = (
        "Rank 1/4, one thread. FLOPs are counted by torch; bytes held are those of parameters and optimizer state; at "
        "the peak there are activations, gradients and temporaries besides."
    )
    return Table(COLUMNS, tuple(rows), note)


def measured(task: StudyTask, rank: float, *, repeats: int) -> dict[str, dict[str, float]]:
    """What a training step takes in each phase, over one in FULL: FLOPs counted by torch, time, bytes held between
    steps, and bytes at its peak.
    """
    seed_all(0)
    data = task.data()
    batch = next(iter(data.train_data))
    settings = Settings(1, device=task.device, amp=torch.bfloat16 if task.amp else None)
    steps, found = {}, {}
    for phase in dr.Phase:
        net = task.transformed(dr.Ratio(rank))
        optimizer = task.optimizer(net.parameters())
        dr.enter_(net, phase, optimizer)
        steps[phase] = partial(train_step, net, optimizer, data, settings, batch)
        with FlopCounterMode(display=False) as counter:
            steps[phase]()
        held: list[torch.Tensor] = list(net.parameters())
        held += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        held += [b for name, b in net.named_buffers() if name.endswith(".base")]
        held_bytes = sum(t.nbytes for t in held)
        found[phase.name] = {
            "flops": counter.get_total_flops(),
            "bytes": held_bytes,
            "peak": held_bytes + most_allocated(steps[phase], task.device),
        }
    for phase in dr.Phase:
        found[phase.name]["time"] = interleaved(steps[dr.Phase.FULL], steps[phase], repeats=repeats).ratio
    dense = dict(found["FULL"])
    for values in found.values():
        values.update({what: values[what] / dense[what] for what in ("flops", "bytes", "peak")})
    return found


def most_allocated(step: Callable[[], object], device: str) -> int:
    """The most bytes that the step has allocated at once: activations, gradients, temporaries. On the CPU by torch's
    profiler.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def train_step(net: nn.Module, optimizer: Optimizer, data: Task, settings: Settings, batch: Any) -> None:
    with autocast(settings):
        loss = data.loss(net(batch[0]), batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
