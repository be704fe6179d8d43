"""dynrank-fx in a training loop of one's own, with a switch by site, a re-warm-up, and a net kept between sessions."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import digits
import torch

import dynrank_fx as dr


def main(epochs: int = 4) -> float:
    """Train, save halfway, load, go on; returns the loss of the last batch."""
    torch.manual_seed(0)
    example = (torch.zeros(64, 1, 8, 8),)
    net = dr.transform(digits.model(), example, rank=dr.Ratio(0.25), exclude=["stem*", "*shortcut*", "head"])
    optimizer = digits.optimizer(net.parameters())
    schedule = dr.schedules.interleave(low=2, full=1)
    loss = torch.tensor(0.0)
    for epoch in range(epochs):
        # One more condition than the schedule's: the first block always trains dense.
        setting = {"*": schedule(dr.TrainState(epoch=epoch, epochs=epochs)), "blocks.0.*": dr.Phase.FULL}
        transition = dr.enter_(net, setting, optimizer)
        if transition and epoch:
            dr.rewarm_(optimizer, steps=5)
        for batch in digits.train_data():
            loss = digits.loss(net(batch[0]), batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch + 1}: {len(transition.changes)} sites switched, loss {loss.item():.4f}")

    with tempfile.TemporaryDirectory() as folder:
        dr.save(net, Path(folder) / "net")
        again = dr.load(Path(folder) / "net", digits.model(), example)
    assert dr.phases_of(again) == dr.phases_of(net)
    small = dr.truncate(again)
    print(f"{sum(p.numel() for p in digits.model().parameters()):,} parameters before,", end=" ")
    print(f"{sum(p.numel() for p in small.parameters()):,} after truncation")
    return loss.item()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
