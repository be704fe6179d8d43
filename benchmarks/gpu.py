"""What only a GPU can say, the most telling rows first: `python benchmarks/gpu.py --seconds 570 --out gpu.jsonl`.

Each row is on the disk as soon as it is measured, so that a run that is cut off has lost only the one under way. What
would not be done in time by its estimate is left out, and said. What fails becomes a row that says so.

    products    the products of a linear by itself, each beside its floor: the longer of FLOPs and bytes, at the FLOP/s
                and bytes/s that this card reaches
    block       two transformer layers: LOW over dense in time and peak memory, both compiled by the same recipe
    step        where the time of such a step goes, by the kernels that ran
    switch      the switch of all sites of a large model with the state of AdamW
    together    cuts of sites of one shape, all at once over one by one: anew, and from where the last cut ended
    captures    how many graphs torch.compile makes, and how many more when all settings come again
    tests       pytest -m gpu
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script finds its own folder; the benchmarks are a package

import dynrank_fx as dr
from benchmarks.large import peak
from benchmarks.layers import kind_of
from benchmarks.measuring import DEVICE, chars, gpt, timed
from benchmarks.truncation import falling
from dynrank_fx.layouts import svd
from dynrank_fx.timing import interleaved, machine

Row: TypeAlias = dict[str, Any]  # Any: what JSON holds

ELEMENT = 2  # bytes of a bfloat16
AUTOTUNE = "max-autotune-no-cudagraphs"
ROLES = ("h, dh", "y, dx", "dL, dR", "dense")


@dataclass(frozen=True)
class Sizes:
    """widths: of the layers, by what their rows tell. tokens: of a batch. parts: of the full rank. window: of the
    attention. big: width and layers of what is switched. together: widths of weights that are cut, and how many.
    repeats: of a measurement. tests: arguments of pytest.
    """

    widths: tuple[int, ...] = (2048, 4096, 768, 1024)
    tokens: tuple[int, ...] = (32_768, 8_192)
    parts: tuple[int, ...] = (4, 8)
    window: int = 512
    big: tuple[int, int] = (2048, 20)
    together: tuple[tuple[int, ...], int] = ((256, 768, 2048), 24)
    repeats: int = 10
    tests: tuple[str, ...] = ("-m", "gpu and not fuzz", "tests")


TINY = Sizes((16,), (32,), (4,), 16, (16, 1), ((144,), 2), 1, ("--collect-only", "tests/benchmarks/test_result.py"))


@dataclass(frozen=True)
class Item:
    """What is measured together. seconds: that it takes, about, on an H100."""

    name: str
    seconds: float
    rows: Callable[[], Iterator[Row]]


def items(sizes: Sizes) -> list[Item]:
    """By worth."""
    first, *others = [(width, tokens) for tokens in sizes.tokens for width in sizes.widths]
    middle = len(sizes.widths) - 1

    def block(at: tuple[int, int], mode: str | None = None) -> Item:
        width, tokens = at
        return Item("block", 60, lambda: blocks(sizes, width, tokens, mode))

    def step(width: int) -> Item:
        return Item("step", 30, lambda: steps(sizes, width))

    return [
        Item("products", 15, partial(products, sizes)),
        block(first),
        step(sizes.widths[0]),
        *map(block, others[:middle]),
        *map(step, sizes.widths[2:3]),
        Item("switch", 60, partial(switch, sizes)),
        Item("together", 15, partial(together, sizes)),
        block((min(sizes.widths), sizes.tokens[0]), AUTOTUNE),
        Item("captures", 30, partial(captures, sizes)),
        *map(block, others[middle:]),
        Item("tests", 120, partial(tests, sizes)),
    ]


def run(out: Path, seconds: float, sizes: Sizes) -> None:
    """Measure what there is time for, and write a line of JSON for each row, as it comes."""
    started = time.perf_counter()
    with out.open("a", encoding="utf-8") as file:

        def keep(name: str, row: Row) -> None:
            line = json.dumps({"item": name, "at": round(time.perf_counter() - started, 1), **row})
            print(line, flush=True)
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

        keep("machine", {"machine": machine(), "device": DEVICE})
        for item in items(sizes):
            left = seconds - (time.perf_counter() - started)
            if item.seconds > left:
                keep(item.name, {"left out": f"{left:.0f} s are left, and it takes about {item.seconds:.0f}"})
                continue
            try:
                for row in item.rows():
                    keep(item.name, row)
            except Exception as error:  # whatever it is: the other rows are worth having
                keep(item.name, {"failed": f"{type(error).__name__}: {error}"[:500]})
            torch._dynamo.reset()
            if DEVICE == "cuda":
                torch.cuda.empty_cache()


# Products by themselves


def products(sizes: Sizes) -> Iterator[Row]:
    """Each product of a square linear in a step."""
    speed, traffic = _reached(sizes)
    yield {"reached": {"TFLOP/s": speed / 1e12, "TB/s": traffic / 1e12}}
    for tokens in sizes.tokens[:1]:
        for width in sizes.widths:
            for part in sizes.parts:
                rank = max(1, width // part)
                for role, (m, k, n) in shapes(tokens, width, rank).items():
                    a, b = (_random(m, k), _random(k, n)) if k != tokens else (_random(k, m).mT, _random(k, n))
                    took = _seconds(lambda a=a, b=b: a @ b, sizes)  # type: ignore[misc]
                    floor = max(2 * m * k * n / speed, ELEMENT * (m * k + k * n + m * n) / traffic)
                    where = {"tokens": tokens, "d": width, "r": rank, "role": role}
                    yield {**where, "us": 1e6 * took, "floor us": 1e6 * floor, "over floor": took / floor}


def shapes(tokens: int, width: int, rank: int) -> dict[str, tuple[int, int, int]]:
    """m, k, n of the products [m, k] · [k, n], as of y = L (R x): six factored, and the three of a dense step."""
    t, d, r = tokens, width, rank
    low = {"h": (t, d, r), "y": (t, r, d), "dh": (t, d, r), "dL": (d, t, r), "dx": (t, r, d), "dR": (r, t, d)}
    return low | {"dense": (t, d, d), "dense dx": (t, d, d), "dense dW": (d, t, d)}


def _reached(sizes: Sizes) -> tuple[float, float]:
    """FLOP/s and bytes/s of this card."""
    n = 8192 if DEVICE == "cuda" else 64
    a, b = _random(n, n), _random(n, n)
    copied = _random(4 * n, n)
    target = torch.empty_like(copied)
    speed = 2 * n**3 / _seconds(lambda: a @ b, sizes)
    return speed, 2 * copied.nbytes / _seconds(lambda: target.copy_(copied), sizes)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)


def _seconds(call: Callable[[], object], sizes: Sizes) -> float:
    return interleaved(call, call, repeats=sizes.repeats, inner=10).first


# Steps of blocks


def _sides(sizes: Sizes, width: int, part: int) -> tuple[nn.Module, nn.Module, float]:
    """Two layers dense, the same in LOW, and the ratio of their FLOPs."""
    model = nn.Sequential(*(chars.Layer(width, max(1, width // 64)) for _ in range(2)))
    example = torch.randn(2, min(16, sizes.window), width)
    low = dr.transform(model, (example,), rank=dr.Ratio(1 / part), leave=(), allow_unprofitable=True)
    plan = dr.plan_of(low)
    dr.enter_(low, dr.Phase.LOW)
    return model.to(DEVICE), low.to(DEVICE), (plan.low_flops or 0) / (plan.total_flops or 1)


def _step(model: nn.Module, x: Tensor, mode: str | None) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward = torch.compile(model, fullgraph=True, dynamic=False, mode=mode)

    def step() -> None:
        x.grad = None
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            y = forward(x)
        y.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _batch(sizes: Sizes, width: int, tokens: int) -> Tensor:
    """That layers before it train by, too."""
    return torch.randn(tokens // sizes.window, sizes.window, width, device=DEVICE, requires_grad=True)


def blocks(sizes: Sizes, width: int, tokens: int, mode: str | None) -> Iterator[Row]:
    """LOW over dense, at each rank."""
    x, dense = _batch(sizes, width, tokens), None
    for part in sizes.parts:
        model, low, flops = _sides(sizes, width, part)
        if dense is None:
            dense = _step(model, x, mode)
            peak_dense = peak(dense)
        step = _step(low, x, mode)
        peak_low = peak(step)
        pair = interleaved(dense, step, repeats=sizes.repeats)
        where = {"d": width, "rank": f"1/{part}", "tokens": tokens, "compile": mode or "default"}
        memory = {"dense GB": peak_dense / 1e9, "LOW / dense, peak": (peak_low or 0) / peak_dense} if peak_dense else {}
        yield {**where, "dense ms": 1e3 * pair.first, "LOW / dense": pair.ratio, "in FLOPs": flops, **memory}


def steps(sizes: Sizes, width: int) -> Iterator[Row]:
    """Where the time goes, of dense and of LOW."""
    tokens, part = sizes.tokens[0], sizes.parts[0]
    model, low, _ = _sides(sizes, width, part)
    for name, side, rank in (("dense", model, 0), ("LOW", low, max(1, width // part))):
        found, total = attributed(_step(side, _batch(sizes, width, tokens), None), tokens, rank)
        ms = {kind: 1e3 * seconds for kind, seconds in found.items()}
        known = 1 - found["other"] / total
        yield {"d": width, "tokens": tokens, "side": name, "ms": 1e3 * total, "by": ms, "attributed": known}


def attributed(step: Callable[[], None], tokens: int, rank: int, times: int = 3) -> tuple[dict[str, float], float]:
    """Seconds of a step by the role of its products and by kinds of all else, and of all: own times of the kernels on a
    GPU, and of the operations elsewhere.
    """
    for _ in range(2):
        step()
    cuda = DEVICE == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda], record_shapes=True) as profiler:
        for _ in range(times):
            step()
        if cuda:
            torch.cuda.synchronize()
    found = dict.fromkeys((*ROLES, "other products", "attention", "norms and the like", "optimizer", "other"), 0.0)
    total = 0.0
    for event in profiler.key_averages(group_by_input_shape=True):
        kernel = "CUDA" in str(event.device_type)
        own = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6 / times
        role = role_of(event.key, event.input_shapes, tokens, rank)
        if role is not None and not kernel:  # a kernel does not know the shapes of the operation that it is of
            found[role] += own
        if kernel or not cuda:
            total += own
            kind = kind_of(event.key)
            if role is None:
                found[kind if kind in found else "other products"] += own
    if cuda:  # kernels of products were found twice, with shapes and without
        known = sum(found[role] for role in ROLES)
        found["other products"] = max(0.0, found["other products"] - known)
        found["other"] = max(0.0, total - sum(each for kind, each in found.items() if kind != "other"))
    return found, total


def role_of(operation: str, shapes: Sequence[Sequence[int]], tokens: int, rank: int) -> str | None:
    """Of which product of a step this is, by its shapes; None where it is none. rank: 0 in a dense step."""
    matrices = [shape for shape in shapes if len(shape) == 2]
    if operation not in ("aten::mm", "aten::addmm") or len(matrices) < 2:
        return None
    (m, k), (_, n) = matrices[-2:]
    if rank not in (m, k, n):
        return "dense"
    return "dL, dR" if k == tokens else "y, dx" if k == rank else "h, dh"


# Phases


def switch(sizes: Sizes) -> Iterator[Row]:
    """All sites of a large model and the state of their optimizer."""
    width, layers = sizes.big
    with torch.device(DEVICE):
        model = gpt.GPT(width, max(1, width // 64), layers)
        tokens = torch.zeros(2, 16, dtype=torch.long)
    net = dr.transform(model, (tokens,), copy=False, how=dr.Capture.SYMBOLIC)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    for phase in (dr.Phase.LOW, dr.Phase.FULL, dr.Phase.LOW, dr.Phase.FULL):
        net(tokens).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        before = _restarted_peak()
        took = timed(partial(dr.enter_, net, phase, optimizer))
        memory = (
            {} if before is None else {"GB before": before / 1e9, "GB peak": torch.cuda.max_memory_allocated() / 1e9}
        )
        yield {"parameters": dr.plan_of(net).total_params, "to": phase.name, "s": took, **memory}


def together(sizes: Sizes) -> Iterator[Row]:
    """Cuts of a batch of weights, as of a stack of matrices, over one cut for each."""
    widths, count = sizes.together
    for width in widths:
        rank = width // 4
        weights = torch.stack([falling(width, width) for _ in range(count)])
        B, A = svd.truncate(weights, rank)
        moved = B @ A + 0.1 * weights.flip(0)
        for name, begun in (("anew", None), ("from the last", A.mT.bfloat16())):

            def single(begun: Tensor | None = begun, weights: Tensor = moved, rank: int = rank) -> None:
                for i in range(count):
                    svd.truncate(weights[i : i + 1], rank, None if begun is None else begun[i : i + 1])

            pair = interleaved(single, partial(svd.truncate, moved, rank, begun), repeats=sizes.repeats, warmup=1)
            yield {"d": width, "weights": count, "cut": name, "one by one ms": 1e3 * pair.first, "at once": pair.ratio}


def _restarted_peak() -> int | None:
    if DEVICE != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return int(torch.cuda.memory_allocated())


def captures(sizes: Sizes) -> Iterator[Row]:
    """All settings twice."""
    width = min(sizes.widths)
    _, net, _ = _sides(sizes, width, sizes.parts[0])
    x = _batch(sizes, width, sizes.window)
    forward = torch.compile(net, fullgraph=True, dynamic=False)
    settings: Sequence[Any] = (dr.Phase.LOW, dr.Phase.FULL, {"0.*": dr.Phase.LOW, "1.*": dr.Phase.FULL})
    counters.clear()
    graphs = []
    for setting in (*settings, *settings):
        dr.enter_(net, setting)
        forward(x).square().mean().backward()
        net.zero_grad(set_to_none=True)
        graphs.append(counters["stats"]["unique_graphs"])
    half = len(settings)
    yield {"settings": half, "graphs": graphs[half - 1], "more when they come again": graphs[-1] - graphs[half - 1]}


def tests(sizes: Sizes) -> Iterator[Row]:
    """As a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", *sizes.tests]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    last = [line for line in done.stdout.splitlines() if line.strip()][-1:]
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    yield {"code": done.returncode, "said": "".join(last), "failed": failed[:20]}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=570, help="that it may take")
    parser.add_argument("--out", type=Path, default=Path("gpu.jsonl"), metavar="FILE", help="to which rows are added")
    parser.add_argument("--tiny", action="store_true", help="do next to nothing, to see that it runs")
    options = parser.parse_args(arguments)
    run(options.out, options.seconds, TINY if options.tiny else Sizes())


if __name__ == "__main__":
    main()
