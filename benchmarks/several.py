"""Two processes on one machine: what a step, a switch and the wrapper made anew take in them, and what each holds.

Each process has one thread and as many tokens as one process alone has, so that in two of them a step takes as long
as in one where nothing is lost.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

import dynrank_fx as dr
from benchmarks.measuring import chars, timed
from benchmarks.result import Cell, Column, Table
from benchmarks.study.phases import most_allocated
from dynrank_fx.processes import let_go, wrappers_of

WIDTH, HEADS, LAYERS, BATCH, TOKENS = 512, 8, 2, 8, 64
CHAIN, SIDE = 12, 1024  # layers, and their width, of the net whose memory is looked at
COLUMNS = (Column("what"), Column("original"), Column("FULL"), Column("LOW at rank 1/4"))


class Blocks(nn.Module):
    """Layers of a transformer: [batch, tokens, WIDTH] to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(chars.Layer(WIDTH, HEADS) for _ in range(LAYERS)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


def several(quick: bool) -> Table:
    """By processes of their own, one and then two."""
    alone, (both, _) = _in_processes(1, quick)[0], _in_processes(2, quick)
    steps = [[times["steps"][kind] for times in (alone, both)] for kind in ("original", "FULL", "LOW")]
    kept = [one / two for one, two in steps]
    rows: list[tuple[Cell, ...]] = [
        ("a step in one process", *(f"{1e3 * one:.0f} ms" for one, _ in steps)),
        ("a step in two, by DDP", *(f"{1e3 * two:.0f} ms" for _, two in steps)),
        ("of one's speed, each of two has", *(f"{each:.3f}" for each in kept)),
        ("beside the original's", "", *(f"{each / kept[0]:.3f}" for each in kept[1:])),
        ("a switch to it, in one process", "", *_switches(alone["switches"], steps[1][0])),
        ("a switch to it, in two by DDP", "", *_switches(both["switches"], steps[1][1])),
        ("of that, DDP made anew", "", *(f"{1e3 * both['anew'][kind]:.1f} ms" for kind in ("FULL", "LOW"))),
        ("a switch to it, in two by fully_shard", "", *_switches(both["sharded switches"], steps[1][1])),
        ("held by each of two by fully_shard, over half of all", "", *(f"{both['held'][k]:.3f}" for k in _KINDS)),
        (
            f"peak of a switch to it above both states, of {CHAIN} sites, in weights of one",
            "",
            *(f"{both['peak'][kind]:.1f}" for kind in _KINDS),
        ),
    ]
    return Table(
        COLUMNS,
        tuple(rows),
        f"{LAYERS} transformer layers of width {WIDTH}, {BATCH * TOKENS} tokens in each process, AdamW, eager, gloo, "
        f"one thread each; memory of a chain of {CHAIN} linear layers of {SIDE}×{SIDE} with AdamW under fully_shard, "
        "what tensors allocate. A switch moves weights and moments; its time is also in steps of FULL.",
    )


_KINDS = ("FULL", "LOW")


def _switches(seconds: dict[str, float], step: float) -> list[str]:
    return [f"{1e3 * seconds[kind]:.0f} ms, {seconds[kind] / step:.1f} steps" for kind in _KINDS]


def _in_processes(count: int, quick: bool) -> list[dict[str, dict[str, float]]]:
    context = torch.multiprocessing.get_context("spawn")
    with TemporaryDirectory() as folder:
        started = [context.Process(target=_one, args=(rank, count, folder, quick)) for rank in range(count)]
        for process in started:
            process.start()
        for process in started:
            process.join()
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(count)]


def _one(rank: int, count: int, folder: str, quick: bool) -> None:
    """What one of the processes measures."""
    torch.set_num_threads(1)
    if count > 1:
        place = f"file://{folder}/store"
        dist.init_process_group("gloo", place, timedelta(minutes=5), rank=rank, world_size=count)
    measured = _steps(count, 3 if quick else 15) | ({} if count == 1 else _anew() | _sharded(3 if quick else 7))
    (Path(folder) / f"{rank}.json").write_text(json.dumps(measured))
    if count > 1:
        dist.destroy_process_group()


def _net() -> nn.Module:
    torch.manual_seed(0)
    return dr.transform(Blocks(), (torch.randn(BATCH, TOKENS, WIDTH),), rank=dr.Ratio(0.25))


def _steps(count: int, rounds: int) -> dict[str, dict[str, float]]:
    """Steps of the original and of a net in both phases, in turn; then the switches of one of them."""
    torch.manual_seed(0)
    nets = {"original": Blocks(), "FULL": _net(), "LOW": _net()}
    dr.enter_(nets["LOW"], dr.Phase.LOW)
    wrapped = {kind: net if count == 1 else DistributedDataParallel(net) for kind, net in nets.items()}
    optimizers = {kind: AdamW(net.parameters()) for kind, net in wrapped.items()}
    x = torch.randn(BATCH, TOKENS, WIDTH)
    steps = {kind: partial(_step, net, optimizers[kind], x) for kind, net in wrapped.items()}
    times = _in_turn(steps, rounds)
    return {"steps": times, "switches": _switching(wrapped["FULL"], optimizers["FULL"], steps["FULL"], rounds // 2)}


def _step(net: nn.Module, optimizer: Optimizer, x: Tensor) -> None:
    net(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def _in_turn(calls: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Medians, after a round that does not count."""
    seconds: dict[str, list[float]] = {kind: [] for kind in calls}
    for _ in range(rounds + 1):
        for kind, call in calls.items():
            _wait()
            seconds[kind].append(timed(call))
    return {kind: statistics.median(each[1:]) for kind, each in seconds.items()}


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()


def _switching(net: nn.Module, optimizer: Optimizer, step: Callable[[], None], rounds: int) -> dict[str, float]:
    """Seconds of a switch to each phase, a step between any two."""
    seconds: dict[str, list[float]] = {"LOW": [], "FULL": []}
    for _ in range(rounds):
        for kind, each in seconds.items():
            step()
            _wait()
            each.append(timed(partial(dr.enter_, net, dr.Phase[kind], optimizer)))
    return {kind: statistics.median(each) for kind, each in seconds.items()}


def _anew() -> dict[str, dict[str, float]]:
    """Seconds in which DDP is made again over the parameters that are there."""
    seconds = {}
    for kind in _KINDS:
        net = _net()
        dr.enter_(net, dr.Phase[kind])
        wrappers = wrappers_of(DistributedDataParallel(net))
        each = []
        for _ in range(5):
            with let_go(wrappers) as again:
                each.append(timed(again))
        seconds[kind] = statistics.median(each)
    return {"anew": seconds}


def _sharded(rounds: int) -> dict[str, dict[str, float]]:
    net = _net()
    for layer in net.modules():
        if type(layer).__name__ == "Switched":
            fully_shard(layer)
    fully_shard(net)
    optimizer = AdamW(net.parameters())
    step = partial(_step, net, optimizer, torch.randn(BATCH, TOKENS, WIDTH))
    return {"sharded switches": _switching(net, optimizer, step, rounds)} | _memory()


def _memory() -> dict[str, dict[str, float]]:
    """What a process holds, over its share, and the peak of a switch above both states in weights of a site."""
    model = nn.Sequential(*(nn.Linear(SIDE, SIDE, bias=False) for _ in range(CHAIN)))
    net = dr.transform(model, (torch.zeros(2, SIDE),), rank=dr.Ratio(0.25))
    del model
    for site in net.children():
        fully_shard(site)
    fully_shard(net)
    optimizer = AdamW(net.parameters())
    held, peak = dict[str, float](), dict[str, float]()
    for kind in ("LOW", "FULL", "LOW"):
        _step(net, optimizer, torch.zeros(2, SIDE))
        before = _held(net, optimizer)
        most = most_allocated(partial(dr.enter_, net, dr.Phase[kind], optimizer), "cpu")
        after = _held(net, optimizer)
        peak[kind] = (most - max(0, after - before)) / (4 * SIDE * SIDE)
        whole = 3 * 4 * sum(p.numel() for p in net.parameters())
        held[kind] = after / (whole / dist.get_world_size())
    return {"held": held, "peak": peak}


def _held(net: nn.Module, optimizer: Optimizer) -> float:
    """Bytes of this process's parts: parameters and moments."""
    tensors = [*net.parameters(), *(t for state in optimizer.state.values() for t in state.values() if t.ndim)]
    return float(sum(t.to_local().nbytes if isinstance(t, DTensor) else t.nbytes for t in tensors))
