"""What a checkpoint is not of is said by the first name that differs."""

from __future__ import annotations

from pathlib import Path

import torch
from checkpointing import Training, X, made, refusal
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

import dynrank_fx as dr


def test_what_is_of_something_else_is_said_by_the_first_name_and_nothing_changes(tmp_path: Path) -> None:
    first = Training()
    first.train(range(5))
    folder = tmp_path / "saved"
    first.save(folder)

    def of(net: nn.Module, kind: type[Optimizer] = AdamW, split: bool = True, rates: bool = True) -> str:
        named = list(net.named_parameters())
        halves = [[p for n, p in named if n.endswith("bias") is bias] for bias in (False, True)]
        groups = [{"params": half} for half in halves] if split else [{"params": [p for _, p in named]}]
        optimizer = kind(groups, lr=0.5)  # type: ignore[call-arg]
        scheduler = CosineAnnealingLR(optimizer, 3) if rates else None
        before = {name: each.clone() for name, each in net.state_dict().items()}
        said = refusal(lambda: dr.load_checkpoint_(folder, net, optimizer, lr_scheduler=scheduler))
        assert all(torch.equal(each, before[name]) for name, each in net.state_dict().items())
        assert optimizer.param_groups[0]["lr"] == 0.5
        return said

    wider = dr.transform(nn.Sequential(nn.Linear(12, 20)), (X[:4],), rank=dr.Fixed(2))
    assert of(wider).startswith("first.weight is a site of the checkpoint, and none of the net: transform")
    assert of(made(exclude=["inner", "last"])).startswith(
        "inner.weight is a site of the checkpoint, and none of the net"
    )
    assert of(made(noisy=True)).startswith("norm.weight is of the shape (16,) in the checkpoint, and not there now")
    assert of(made(), SGD) == "the checkpoint was trained with the optimizer AdamW, not SGD: make the same one"
    assert of(made(), split=False).startswith(
        "first.bias was in number 1 of the optimizer's groups, and is in number 0"
    )
    assert of(made(), rates=False).startswith("the checkpoint has the state of 1 learning-rate schedulers, and 0 were")
    other = AdamW([nn.Parameter(torch.ones(3))])
    assert "a parameter of the shape (3,) that is none of the net's" in refusal(
        lambda: dr.load_checkpoint_(folder, made(), other)
    )
    assert refusal(lambda: dr.load_checkpoint_(folder, made(), phases=first.phases)).startswith(
        "the Phases are of anoth"
    )
    assert "no plan" in refusal(lambda: dr.save_checkpoint(folder, nn.Linear(2, 2)))
    (folder / "mine.txt").write_text("work")
    assert "holds mine.txt, which is not ours" in refusal(lambda: first.save(folder))
    assert refusal(lambda: dr.load_checkpoint_(tmp_path / "none", made())).startswith("there is no folder")
    assert "has no dynrank.safetensors: it is neither" in refusal(lambda: dr.load_checkpoint_(tmp_path, made()))
