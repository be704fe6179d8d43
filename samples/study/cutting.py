"""How to cut a dense-trained model: `python samples/study/cutting.py`. Prints accuracy by way and size.

Each row has as many parameters as one rank ratio for all sites gives; seed 0, 16 batches of training inputs.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from tasks import TASKS
from torch import nn

import dynrank_fx as dr
from dynrank_fx.bench import machine
from dynrank_fx.randomness import seed_all
from dynrank_fx.train import Run, Settings, evaluate, fit

RATIOS = (0.125, 0.25, 0.5)
HEAD = ("network", "parameters", "plain SVD", "calibrated", "+ batch norms", "budget on outputs", "+ 100 steps")


def rows(name: str) -> list[tuple[str, ...]]:
    task = TASKS[name]
    seed_all(0)
    net, data = task.transformed(dr.ranks.Ratio(0.25)), task.data()
    optimizer = task.optimizer(net.parameters())
    run = Run(net, optimizer, dr.schedules.always(dr.Phase.FULL), task.lr_scheduler(optimizer, task.epochs))
    fit(run, data, Settings(task.epochs, compile=False))
    batches = [(batch[0],) for batch, _ in zip(data.train_data, range(16), strict=False)]
    dense, known = dr.inline(net.eval()), dr.calibrate(net, batches)

    def score(model: nn.Module) -> str:
        return f"{100 * float(evaluate(model, data, Settings(1, compile=False))['eval_metric'] or 0):.2f} %"

    found = [(name, f"{_params(dense):,} (dense)", score(dense), "", "", "", "")]
    for ratio in RATIOS:
        policy = dr.ranks.Ratio(ratio)
        plain, small = dr.truncate(net, rank=policy), dr.truncate(net, known, rank=policy)
        calibrated = score(small)
        norms = score(small) if dr.recalibrate_(small, batches) else ""
        budget = dr.Budget(params=_params(small) / _params(dense))
        cells: list[Any] = [score(plain), calibrated, norms]
        for steps in (0, 100):
            cells.append(score(dr.compress(net, batches[0], budget, batches, recover_steps=steps).module))
        found.append((name, f"{_params(small):,}", *cells))
        print(found[-1], file=sys.stderr, flush=True)
    return found


def _params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    lines = [HEAD, ["---"] * len(HEAD), *rows("digits-conv"), *rows("chars-64")]
    print("\n".join("| " + " | ".join(line) + " |" for line in lines))
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
