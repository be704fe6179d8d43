"""The bytes that stay between steps: parameters, gradients and the state of the optimizer."""

from __future__ import annotations

from torch import Tensor, nn

import dynrank_fx as dr
from benchmarks.measuring import SAMPLES, Sample
from benchmarks.result import Column, Table
from dynrank_fx.randomness import seed_all

COLUMNS = (
    Column("sample"),
    Column("original", "MB", ".2f"),
    Column("FULL / original", spec=".3f"),
    Column("LOW / original", spec=".3f"),
    Column("parameters, LOW / original", spec=".3f"),
)


def held(quick: bool) -> Table:
    rows = []
    for sample in SAMPLES[:1] if quick else SAMPLES:
        seed_all(0)
        net = sample.transformed()
        plan = dr.plan_of(net)
        dense, full = held_bytes(sample, sample.model()), held_bytes(sample, net)
        dr.enter_(net, dr.Phase.LOW)
        low = held_bytes(sample, net)
        rows.append((sample.name, dense / 1e6, full / dense, low / dense, plan.low_params / plan.total_params))
    return Table(COLUMNS, tuple(rows))


def held_bytes(sample: Sample, model: nn.Module) -> int:
    """What a model holds after a training step, before its gradients are set to zero."""
    optimizer, batch = sample.optimizer(model), sample.batch()
    sample.module.loss(model(batch[0]), batch).backward()
    optimizer.step()
    tensors = [t for p in model.parameters() for t in (p, p.grad) if t is not None]
    tensors += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    total = sum(t.nbytes for t in tensors)
    optimizer.zero_grad()
    return total
